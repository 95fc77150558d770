"""The first update of phase 2, token by token for one answer, with the equation of each figure.

Paper:    arXiv 2306.08543v4, Section 2.2: Eqs. (2) to (7). The figures come from the functions,
          the models and the seeds of training. Nothing is trained or written.
Run:      python -m exercises.explain                      with the models that distill.py trains
          python -m exercises.explain --objective=eq2      any flag of distill.py
          python -m exercises.explain --prompt="Tell about the cat" --picture=out/tiny/answer.png
Shapes:   B answers of a collection, T response tokens, D width, V vocabulary.
"""

import math
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import data
import distill
import teacher as supervised
from config import UserError, flag, machine, run
from model import load
from safe import runs
from safe.files import check_place, written_aside
from safe.texts import END
from sample import decoder, taken
from tools import stages


@dataclass(frozen=True)
class Config(distill.Config):
    prompt: str | None = flag(None, "an instruction; default: one of the first update's")
    input: str = flag("", "the input that goes with --prompt", may_be_empty=True)
    picture: str | None = flag(None, "draw the answer there too, .svg or .png")

    def __post_init__(self):
        super().__post_init__()
        check_place(self, file="picture")
        if self.picture and Path(self.picture).suffix not in (".svg", ".png"):
            raise UserError(f"--picture={self.picture} must end in .svg or .png")


@dataclass(frozen=True)
class Seen:
    """One answer of the first update, with what Eqs. (2) to (7) make of each of its tokens."""
    row: data.Row
    prompt: list[int]
    answer: str
    tokens: list[str]
    values: dict[str, Tensor]  # (T,) each, by the names of columns()
    meaning: dict[str, tuple[str, str]]
    clipped: Tensor  # (T,)
    divisor: str  # what an update does with their sums


def with_models(cfg: distill.Config) -> distill.Config:
    """The settings, with the names of the models that phase 2 begins with. Raises UserError if one
    has still to be trained."""
    work = stages.stages(replace(cfg, baselines=""))
    for stage in (work.teacher, work.init):
        if stage and not runs.is_finished(Path(stage.out), stage, supervised.FREE):
            command = shlex.join(["python", "distill.py", *sys.argv[1:]])
            raise UserError(f"{stage.out} does not hold a model yet: `{command}` makes it")
    return work.minillm


def columns(cfg: distill.Config) -> dict[str, tuple[str, str]]:
    """The columns of the table: for each its equation, and what it holds under these settings."""
    if cfg.source == "gold":
        mixed = ("", "the student's as of now: this answer is a reference")
    elif cfg.mix_alpha == 0:
        mixed = ("", "the student's alone, from which the token was drawn")
    elif cfg.mix_alpha == 1:
        mixed = ("", "the teacher's alone, from which the token was drawn")
    else:
        mixed = ("(4)", "the mixture's, from which the token was drawn")
    reward = "log p - log q"
    if cfg.reward_clip < math.inf:
        reward += f", clipped at {cfg.reward_clip:g}"
    shown = {
        "log q": ("", "the student's log-probability of the token taken"),
        "log p": ("", "the teacher's"),
        "log p~": mixed,
        "r_t": ("(2)", reward),
        "KL": ("(3)", "KL[q || p] over the vocabulary, which is -E[r_t]"),
    }

    current = cfg.return_from == "current"
    mean = "mean" if cfg.length_norm else "sum"
    future = f"the {mean} of {'r_t and the r' if current else 'the r'} that follow"
    if cfg.gamma < 1:
        future += f", discounted by {cfg.gamma:g}"
    if cfg.whiten != "none":
        future += ", whitened"
    if cfg.return_from == "none":
        equation, future = "", "0: there is no long term"
    elif cfg.length_norm:
        equation = "(6)"
    else:
        equation = "(2)" if current else "(3)"
    shown["R_t" if current else "R_t+1"] = (equation, future)

    weights = {
        "per_token": "q / p~",
        "long_only": "q / p~",
        "product": "the product of q / p~ up to this token",
        "exact": "the product of q / p~ before this token",
        "none": "1: there are no weights",
    }
    shown["w_t"] = ("(5)", weights[cfg.weight])

    single = "KL" if cfg.divergence in ("none", "reverse") else f"{cfg.divergence} divergence"
    if cfg.weight != "long_only":
        single = f"w_t {single}"
    if cfg.divergence == "none":
        single += ", switched off"
    shown["L_Single"] = ("(7)", single)

    ratio = "q / q as of sampling" if cfg.weight == "none" else "q / p~"
    long = f"-min(rho R, clip(rho) R), rho = {ratio}"
    if cfg.weight in ("product", "exact"):
        long += ", times the product of q / p~ over other tokens"
    if cfg.return_from == "none":
        long += ", switched off"
    shown["L_Long"] = ("Alg. 1", long)
    return shown


def explain(cfg: distill.Config, say=print) -> Seen:
    """The first answer of the first update, or one to --prompt."""
    cfg = with_models(cfg)
    m = machine(cfg.device, cfg.dtype, cfg.sample_batch)
    tokenizer = data.load_tokenizer(cfg.student, cfg.template)
    data.same_vocabulary(tokenizer, data.load_tokenizer(cfg.teacher, cfg.template))
    if getattr(cfg, "prompt", None) is not None:
        row = data.Row(cfg.prompt, cfg.input)
        instructions = [data.Example(row, data.prompts_of(tokenizer, [row])[0], [])]
        cfg = replace(cfg, rollouts=1, minibatch=1)
    else:
        limits = (cfg.max_prompt_tokens, cfg.max_tokens)
        instructions = data.load_examples(cfg.data, "train", tokenizer, *limits, say)
    student = load(cfg.student, m.device)
    _, ready = decoder(cfg.decoder)
    teacher = ready(load(cfg.teacher, m.device, m.dtype), m.dtype)

    # the answers of the first collection, their rewards, and the first minibatch
    rollout = distill.collect(
        cfg, 0, list(range(cfg.rollouts)), instructions, student, teacher, m)
    mask = rollout.response_mask  # (B, T)
    reward = distill.token_reward(rollout.teacher_logp, rollout.student_logp, cfg.reward_clip)
    reward = reward * mask
    R = distill.future_reward(
        reward, mask, cfg.gamma, cfg.length_norm, cfg.return_from)
    minibatch = distill.minibatches(cfg, 0)[0]
    R[minibatch] = distill.whiten(R[minibatch], mask[minibatch], cfg.whiten)

    # its first answer, token by token
    one = minibatch[0]
    answer = rollout.answers[one]
    T = len(answer)
    batch = data.pad_right([rollout.prompts[one]], [answer], m.device)
    with torch.no_grad(), m.autocast():
        hidden = batch.predicting(student(batch.tokens))  # (1, T, D)
        log_q = student.logits(hidden).log_softmax(-1)  # (1, T, V)
        log_p = teacher.logits(rollout.teacher_hidden[[one], :T]).log_softmax(-1)
    logp = taken(log_q, batch.response)  # (1, T)
    mixed_logp = rollout.mixed_logp[[one], :T]
    single, long, clipped = distill.minillm_loss(
        logp, distill.divergence(log_q, log_p, cfg.divergence),
        rollout.student_logp[[one], :T], mixed_logp, R[[one], :T], batch.response_mask,
        cfg.weight, cfg.clip_eps)
    # long_only weights L_Single by 1; what it weights L_Long by is shown
    kind = "per_token" if cfg.weight == "long_only" else cfg.weight
    weight, _ = distill.importance_weights(logp, mixed_logp, batch.response_mask, kind)
    values = [logp[0], rollout.teacher_logp[one, :T], mixed_logp[0], reward[one, :T],
              distill.reverse_kl(log_q, log_p)[0], R[one, :T], weight[0], single[0], long[0]]
    count = f"{mask[minibatch].sum()} tokens" if cfg.normalize == "token" else "number"
    answers = f"its {cfg.minibatch} answers" if len(minibatch) > 1 else "all its answers"
    count = count if len(minibatch) > 1 else count.split()[-1]
    divisor = (f"An update divides the sums of both losses over {answers} by their {count}, and "
               f"adds {cfg.pt_coef:g} L_PT.")
    if cfg.pt_kd:
        divisor += f"\nA share of {cfg.pt_kd:g} of L_PT is KL[p || q]."
    picks = data.picks(0, cfg.rollouts, len(instructions), cfg.seed)
    tokens = [repr(tokenizer.decode([token]) or END)[1:-1] for token in answer]
    meaning = columns(cfg)
    return Seen(instructions[picks[one]].row, rollout.prompts[one],
                data.decode(tokenizer, answer), tokens,
                {name: value.detach().float().cpu() for name, value in zip(meaning, values)},
                meaning, clipped[0].cpu(), divisor)


def show(seen: Seen, say=print) -> None:
    """Prints the answer, a line for each token, and what the columns mean."""
    say(f"\n{seen.row.instruction} | {seen.row.input}".removesuffix(" | "))
    say(f"{seen.answer}\n")

    def line(head: str, cells: list[str], tail: str = "") -> None:
        say(f"{head:>14}" + "".join(f"{cell:>10}" for cell in cells) + tail)

    line("", list(seen.values))
    line("Eq.", [equation for equation, _ in seen.meaning.values()])
    for t, token in enumerate(seen.tokens):
        figures = [f"{value[t].item():.4f}" for value in seen.values.values()]
        line(token, figures, "  clipped" if seen.clipped[t] else "")
    sums = []
    for name, value in seen.values.items():
        summed = name not in ("R_t", "R_t+1", "w_t")  # their sum means nothing
        sums.append(f"{value.sum().item():.4f}" if summed else "")
    line("sum", sums, "\n")
    for name, (_, meaning) in seen.meaning.items():
        say(f"{name:>14}  {meaning}")
    say(f"\n{seen.divisor}")


def picture(seen: Seen, a_line: int = 13):
    """The answer as a figure: its tokens in a row, and below each the figures that the losses are
    made of, red where negative and blue where positive; w_t is white at 1. A clipped token
    is bold and red."""
    from matplotlib.figure import Figure
    shown = [name for name in seen.values if name in ("r_t", "KL", "R_t", "R_t+1", "w_t")]
    starts = range(0, len(seen.tokens), a_line)
    figure = Figure(figsize=(0.8 * a_line + 0.8, 0.32 * (len(shown) + 2) * len(starts) + 0.5))
    size = {name: max(seen.values[name].sub(float(name == "w_t")).abs().max().item(), 0.25)
            for name in shown}  # no less, or an answer without surprises would look like one
    for axes, start in zip(figure.subplots(len(starts), 1, squeeze=False)[:, 0], starts):
        part = slice(start, start + a_line)
        colours = torch.stack([seen.values[name][part].sub(float(name == "w_t")) / size[name]
                               for name in shown])
        axes.imshow(colours.numpy(), cmap="RdBu", vmin=-1.4, vmax=1.4, aspect="auto",
                    extent=(0, colours.size(1), len(shown), 0))
        for t, token in enumerate(seen.tokens[part]):
            for n, name in enumerate(shown):
                ink = "white" if colours[n, t].abs() > 0.85 else "black"
                axes.text(t + 0.5, n + 0.5, f"{seen.values[name][start + t]:.2f}", ha="center",
                          va="center", fontsize=8, color=ink)
            mark = dict(fontweight="bold", color="#a03000") if seen.clipped[start + t] else {}
            token = "(end)" if token == END else token.strip()[:11]
            axes.text(t + 0.5, -0.25, token, ha="center", fontsize=8, **mark)
        axes.set(xlim=(0, a_line), xticks=[], yticks=[n + 0.5 for n in range(len(shown))],
                 yticklabels=shown)
        axes.tick_params(length=0, labelsize=8)
        for side in axes.spines.values():
            side.set_visible(False)
    asked = " | ".join(filter(None, (seen.row.instruction, seen.row.input)))
    figure.suptitle(asked[:120], x=0.06, y=0.99, ha="left", va="top", fontsize=9)
    figure.subplots_adjust(left=0.06, right=0.99, top=1 - 0.5 / figure.get_figheight(), bottom=0.01,
                           hspace=0.35)
    return figure


def main(cfg: Config) -> None:
    seen = explain(cfg)
    show(seen)
    if cfg.picture:
        with written_aside(Path(cfg.picture)) as aside:
            picture(seen).savefig(aside, format=Path(cfg.picture).suffix[1:], dpi=150)
        print(f"\ndrawn to {cfg.picture}")


if __name__ == "__main__":
    run(main, Config, distill.presets)
