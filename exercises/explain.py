"""The first update of phase 2, token by token for one answer, with the equation of each figure.

Paper:    arXiv 2306.08543v4, Section 2.2: Eqs. (2) to (7). The figures come from the functions,
          the models and the seeds of training. Nothing is trained or written.
Run:      python -m exercises.explain                      with the models that distill.py trains
          python -m exercises.explain --objective=eq2      any flag of distill.py
Shapes:   B answers of a collection, T response tokens, D width, V vocabulary.
"""

import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import data
import distill
import teacher as supervised
from config import UserError, machine, run
from model import load
from safe import runs
from sample import decoder, taken
from tools import stages


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


def main(cfg: distill.Config) -> None:
    cfg = with_models(cfg)
    m = machine(cfg.device, cfg.dtype, cfg.sample_batch)
    tokenizer = data.load_tokenizer(cfg.student, cfg.template)
    data.same_vocabulary(tokenizer, data.load_tokenizer(cfg.teacher, cfg.template))
    limits = (cfg.max_prompt_tokens, cfg.max_tokens)
    instructions = data.load_examples(cfg.data, "train", tokenizer, *limits, m.say)
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

    picks = data.picks(0, cfg.rollouts, len(instructions), cfg.seed)
    row = instructions[picks[one]].row
    m.say(f"\n{row.instruction} | {row.input}".removesuffix(" | "))
    m.say(f"{data.decode(tokenizer, answer)}\n")
    tokens = [repr(tokenizer.decode([token]))[1:-1] for token in answer]
    show(columns(cfg), tokens, values, clipped[0], m.say)
    count = f"{mask[minibatch].sum()} tokens" if cfg.normalize == "token" else "number"
    m.say(f"\nAn update divides the sums of both losses over its {cfg.minibatch} answers by their "
          f"{count}, and adds {cfg.pt_coef:g} L_PT.")
    if cfg.pt_kd:
        m.say(f"A share of {cfg.pt_kd:g} of L_PT is KL[p || q].")


def show(shown: dict[str, tuple[str, str]], tokens: list[str], values: list[Tensor],
         clipped: Tensor, say) -> None:
    """Prints the table, a line for each token, and what its columns mean. values are (T,) each, in
    the order of the columns."""

    def line(head: str, cells: list[str], tail: str = "") -> None:
        say(f"{head:>14}" + "".join(f"{cell:>10}" for cell in cells) + tail)

    line("", list(shown))
    line("Eq.", [equation for equation, _ in shown.values()])
    for t, token in enumerate(tokens):
        figures = [f"{value[t].item():.4f}" for value in values]
        line(token, figures, "  clipped" if clipped[t] else "")
    sums = []
    for name, value in zip(shown, values):
        summed = name not in ("R_t", "R_t+1", "w_t")  # their sum means nothing
        sums.append(f"{value.sum().item():.4f}" if summed else "")
    line("sum", sums, "\n")
    for name, (_, meaning) in shown.items():
        say(f"{name:>14}  {meaning}")


if __name__ == "__main__":
    run(main, distill.Config, distill.presets)
