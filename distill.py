"""MiniLLM: a student q learns from a teacher p by reverse KL and policy gradient.

Paper:    arXiv 2306.08543v4, Section 2: Eqs. (1) to (7), except (4), which is in sample.py; and Algorithm 1: phase 1 is
          in teacher.py, phase 2 is distil() below. Where the code departs from the paper, a comment says "not".
Run:      python distill.py                           the built-in world: no network, no GPU, about two minutes
          python distill.py --teacher=gpt2-xl         the paper's world, every stage, beginning with the released GPT-2
          python distill.py --teacher=MiniLLM/teacher-gpt2-1.5B --student=MiniLLM/init-gpt2-120M       phase 2 alone
Shapes:   B answers, b in a micro-batch, T response tokens, N response tokens of several answers, D width, V vocabulary.
Left out: a critic, a KL to the initial student, an entropy bonus (the paper has none); ZeRO, tensor parallelism.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import data
import eval as evaluation
import plan as planning
import sample as sampling
import teacher as supervised
from config import (
    Machine,
    Stop,
    Stopped,
    UserError,
    check,
    check_place,
    checksum,
    clock,
    flag,
    held,
    machine,
    make,
    read_json,
    run,
    write_json,
    write_lines,
)
from model import GPT, by_chunks, frozen, is_shape, learn_by_chunks, load, predicting, same_vocabulary, trained
from sample import Rollout, follow, mix, sample, taken, turns, uniforms

# ---- the equations, in the paper's order ----------------------------------------------------------------------------
# Tensors in, tensors out. response_mask tells where an answer ends; beyond it (B, T) tensors are 0.


def reverse_kl(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor) -> Tensor:
    """KL[q || p] at each position: Eq. (1) for one token, which is -E_{y_t ~ q}[r_t], the single step of Eq. (3).
    (..., V) -> (...)"""
    return (student_logp_vocab.exp() * (student_logp_vocab - teacher_logp_vocab)).sum(-1)  # Eq. (1)


def divergence(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, kind: str) -> Tensor:
    """What the single step minimises: reverse, KL[q || p], as in the paper; forward, KL[p || q]; js, the mean of
    KL[q || m] and KL[p || m] with m = (p + q) / 2, as in GKD (arXiv 2306.13649); skew, KL[p || 0.1 p + 0.9 q], as in
    DistiLLM (arXiv 2402.03898). (..., V) -> (...)"""
    q, p = student_logp_vocab, teacher_logp_vocab
    if kind == "reverse":
        return reverse_kl(q, p)
    if kind == "forward":
        return reverse_kl(p, q)
    if kind == "skew":
        return reverse_kl(p, mix(q, p, 0.1))
    middle = mix(q, p, 0.5)
    return (reverse_kl(q, middle) + reverse_kl(p, middle)) / 2


def token_reward(teacher_logp: Tensor, student_logp: Tensor, scale: float = 1.0, clip: float = math.inf) -> Tensor:
    """r_t = log p(y_t | y_<t, x) - log q(y_t | y_<t, x) of Eq. (2), which the paper neither scales nor clips. (B, T)"""
    return ((teacher_logp - student_logp) * scale).clamp(-clip, clip)  # Eq. (2)


def future_reward(reward: Tensor, response_mask: Tensor, gamma: float = 1.0, length_norm: bool = True,
                  return_from: str = "next") -> Tensor:
    """R_{t+1}, or R_t if return_from is "current"; with length_norm divided by the number of its rewards. (B, T)

    gamma weighs r_{t'} by gamma^(t'-t), which the paper does not. R_{t+1} of the last token is an empty sum: 0."""
    R, total = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.size(1))):
        total = reward[:, t] + gamma * total  # R_t
        R[:, t] = total if return_from == "current" else total - reward[:, t]
    remaining = response_mask.flip(1).cumsum(1).flip(1)  # T - t + 1: tokens from t to the end
    terms = remaining if return_from == "current" else remaining - 1
    if length_norm:  # not T - t - 1 as printed: R_{t+1} sums T - t rewards, and T - t - 1 is 0 at t = T - 1
        R = R / terms.clamp(min=1)  # Eq. (6)
    return R * response_mask


def importance_weights(student_logp: Tensor, mixed_logp: Tensor, response_mask: Tensor,
                       kind: str) -> tuple[Tensor, Tensor]:
    """The weights of L_Single and of L_Long, for tokens drawn from p~ instead of q. (B, T) each. That of L_Long is
    without the ratio q / p~ at t, which long_term_loss multiplies by.

    per_token: w_t = q(y_t) / p~(y_t), which the paper puts in place of the product, for less variance; biased.
    product: prod_{t'<=t}, Eq. (5) as printed; exact for the single step, but biased for the long term, because the
    later tokens that R_{t+1} sums over were drawn from p~ too.
    exact: for the single step the product over what led to it, prod_{t'<t}; for the long term over the whole answer.
    none: as if the tokens had been drawn from q."""
    log_w = ((student_logp - mixed_logp) * response_mask).detach()  # (B, T)
    upto, one = log_w.cumsum(1), torch.ones_like(log_w)
    if kind == "none":
        return one, one
    if kind == "per_token":
        return log_w.exp(), one  # Eq. (5), w_t approximated
    if kind == "product":
        return upto.exp(), (upto - log_w).exp()  # Eq. (5), w_t as printed
    return (upto - log_w).exp(), (upto[:, -1:] - log_w).exp()  # not Eq. (5)


def whiten(values: Tensor, response_mask: Tensor, kind: str) -> Tensor:
    """Shifts and scales to mean 0 and variance 1, which the paper does not: over the response positions ("responses"),
    or over the whole array ("all"), zeros of the padding included, as the released code does. (B, T) -> (B, T)"""
    if kind == "none":
        return values
    counted = values if kind == "all" else values[response_mask]
    return (values - counted.mean()) * torch.rsqrt(counted.var(correction=0) + 1e-8) * response_mask


def single_step_loss(kl: Tensor, weight: Tensor) -> Tensor:
    """L_Single at each position; its gradient is (grad L)_Single of Eqs. (3), (5) and (7). (B, T)"""
    return weight * kl  # Eqs. (3), (5), (7)


def long_term_loss(student_logp: Tensor, behaviour_logp: Tensor, R: Tensor, weight: Tensor,
                   clip_eps: float) -> tuple[Tensor, Tensor]:
    """L_Long at each position, clipped as in Algorithm 1, and where the clipping bites. (B, T) each.

    The ratio q(y_t) / p~(y_t) is both w_t of Eq. (5) and rho_t of Algorithm 1: its gradient is w_t grad log q. Not
    min(rho, clip(rho)) R as printed, an upper bound where R is negative, but PPO's lower bound."""
    ratio, weighted = (student_logp - behaviour_logp).exp(), R * weight
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.minimum(ratio * weighted, clipped * weighted), (clipped - ratio) * weighted < 0  # Alg. 1


def minillm_loss(student_logp: Tensor, kl: Tensor, old_logp: Tensor, mixed_logp: Tensor, R: Tensor,
                 response_mask: Tensor, weight: str = "per_token", weight_single: bool = True,
                 clip_eps: float = 0.2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. (7) at each position: L_Single, L_Long, the weight w_t, and where the clipping bites. (B, T) each.

    student_logp, of the token taken, and kl, from reverse_kl, carry the gradient; old_logp and mixed_logp are log q and
    log p~ when it was sampled; R comes from future_reward."""
    of_single, of_long = importance_weights(student_logp, mixed_logp, response_mask, weight)
    loss_single = single_step_loss(kl, of_single if weight_single else torch.ones_like(of_single))
    behaviour_logp = old_logp if weight == "none" else mixed_logp
    loss_long, clipped = long_term_loss(student_logp, behaviour_logp, R, of_long, clip_eps)
    mask = response_mask
    return loss_single * mask, loss_long * mask, of_single * mask, clipped & mask  # Eq. (7)


# ---- settings -------------------------------------------------------------------------------------------------------

ALONE = {"student": 0.0, "teacher": 1.0}  # --source: alpha of Eq. (4)


@dataclass(frozen=True)
class Config:
    preset: Literal["tiny", "paper"] = flag("tiny", "built-in world, or the paper's; --teacher implies paper")
    recipe: Literal["paper", "official"] = flag("paper", "what the paper says, or what the released code computes")
    teacher: str = flag("2x4x96", "p: a folder, gpt2 ... gpt2-xl, OWNER/NAME, or LAYERSxHEADSxWIDTH for a new one")
    student: str = flag("1x2x12", "q: likewise")
    data: str = flag("tiny", "instructions, D: tiny, dolly or FILE.jsonl")
    test_data: str | None = flag(None, "evaluate on this set at the end; default --data, and of a FILE.jsonl the held-"
                                       "out tenth, by which --select picks as well")
    corpus: str = flag("tiny-text", "plain text, D_PT: tiny-text, FILE.txt, a folder of them, or openwebtext: the "
                                    "first of its files, 306 MB; openwebtext:3 takes three")
    out: str = flag("out/tiny", "folder of all stages")
    baselines: str = flag("sft,kd,seqkd", "train these too, from --student on, of sft, kd and seqkd; empty for none",
                          may_be_empty=True)
    finetune_teacher: Literal["auto", "yes", "no"] = flag("auto", "fine-tune p on D first; auto: if new or as released")
    init_student: Literal["auto", "yes", "no"] = flag("auto", "phase 1 of Algorithm 1 first; auto: likewise")
    explain: bool = flag(False, "show the first update of phase 2 token by token, with the equations, and stop")
    plan: bool = flag(False, "print what would be done, its memory and time, and stop")
    plan_pairs: bool = flag(False, "print memory and time of phase 2 for each pair of GPT-2s on 1 to 8 devices")
    ignore_memory: bool = flag(False, "go on though the plan finds too little memory")
    resume: bool = flag(False, "go on with an unfinished run")
    # Algorithm 1
    steps: int = flag(640, "updates of phase 2")
    lr: float = flag(4e-3, "learning rate, eta")
    warmup_steps: int = flag(20, "updates over which it rises; it is constant afterwards")
    rollouts: int = flag(256, "answers sampled at a time")
    minibatch: int = flag(64, "answers of an update, and pieces of D_PT")
    inner_epochs: int = flag(4, "passes over the answers sampled")
    mix_alpha: float = flag(0.2, "teacher's share in sampling, alpha of Eq. (4)")
    source: Literal["mixed", "student", "teacher", "gold"] = flag(
        "mixed", "where answers come from: the mixture; q or p alone, which is --mix_alpha=0 or 1; or the references")
    turns: int = flag(0, "groups of a collection's answers; a token of a whole group is drawn by p, with probability "
                         "alpha, or by q; 0: each token from p~")
    divergence: Literal["reverse", "forward", "js", "skew"] = flag(
        "reverse", "of the single step; another than the paper's goes without the long term, which is reverse KL's")
    single_step: bool = flag(True, "L_Single of Eq. (3); without it the gradient is Eq. (2), whose return holds r_t")
    long_term: bool = flag(True, "L_Long of Eq. (3)")
    weight: Literal["per_token", "product", "exact", "none"] = flag("per_token", "importance weights, w_t of Eq. (5)")
    weight_single: bool = flag(True, "weigh L_Single too")
    length_norm: bool = flag(True, "Eq. (6)")
    return_from: Literal["next", "current"] = flag("next", "R_{t+1} or R_t")
    gamma: float = flag(1.0, "discount of the return")
    reward_scale: float = flag(1.0, "factor on r_t")
    reward_clip: float = flag(math.inf, "largest |r_t| once scaled")
    whiten: Literal["none", "responses", "all"] = flag("none", "whiten R over response positions, or padding too")
    clip_eps: float = flag(0.2, "epsilon of Algorithm 1's clipping; inf for none")
    normalize: Literal["token", "sequence"] = flag("token", "mean over tokens; or over sequences, of sums")
    pt_coef: float = flag(0.2, "factor on L_PT; the paper's is 1, but its student knows D_PT beforehand")
    pt_kd: float = flag(0.0, "share of KL[p || q] in L_PT")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    weight_decay: float = flag(1e-6, "of AdamW")
    # lengths, validation, machine
    max_prompt_tokens: int = flag(16, "longer prompts are dropped")
    max_tokens: int = flag(44, "prompt and answer; answers have max_tokens - max_prompt_tokens at most")
    eval_every: int = flag(160, "updates between validations, in whole collections of answers")
    valid_limit: int = flag(200, "validation rows used")
    select: Literal["rouge_l", "loss", "last"] = flag("last", "validation that picks the weights to keep")
    eval_seeds: int = flag(5, "seeds of the final evaluation")
    micro_batch: int = flag(64, "answers of a forward pass; changes memory and speed only, and in supervised stages "
                                "dropout's draws")
    sample_batch: int = flag(256, "answers decoded together; changes memory and speed only")
    vocab_chunk: int | None = flag(None, "positions whose logits exist at a time; likewise; default by device; with "
                                   "--weight=product or exact an answer's")
    capture: bool = flag(False, "on a GPU: record a decoding step as a CUDA graph, and replay it")
    recompute: bool = flag(False, "make each layer again in the backward pass: less memory, a third more time")
    compile: bool = flag(False, "torch.compile the trained model; changes speed, rounding and dropout's draws only")
    seed: int = flag(1, "of prompts, draws, order and new weights")
    log_every: int = flag(32, "updates between printed lines; log.jsonl has them all")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("float32", "what autocast computes in")

    def __post_init__(self):
        check(self, steps=(1, 10**9), lr=(0, 10), warmup_steps=(0, 10**9), rollouts=(1, 10**6), minibatch=(1, 10**6),
              inner_epochs=(1, 1000), mix_alpha=(0, 1), turns=(0, 10**6), gamma=(0, 1), reward_scale=(1e-9, 1e9),
              clip_eps=(1e-9, math.inf), reward_clip=(1e-9, math.inf), pt_coef=(0, 1e9), pt_kd=(0, 1),
              grad_clip=(1e-9, math.inf), weight_decay=(0, 10), max_prompt_tokens=(1, 1022), max_tokens=(2, 1024),
              eval_every=(1, 10**9), valid_limit=(1, 10**9), eval_seeds=(1, 1000), micro_batch=(1, 10**6),
              sample_batch=(1, 10**6), vocab_chunk=(1, 10**9), seed=(0, 2**62), log_every=(1, 10**9))
        check_place(self, "out")
        if self.rollouts % self.minibatch:
            raise UserError(f"--rollouts={self.rollouts} is not a multiple of --minibatch={self.minibatch}")
        if self.max_prompt_tokens >= self.max_tokens:
            raise UserError(f"--max_prompt_tokens={self.max_prompt_tokens} leaves no room for an answer in "
                            f"--max_tokens={self.max_tokens}")
        if not (self.single_step or self.long_term or self.pt_coef):
            raise UserError("--single_step=False, --long_term=False and --pt_coef=0 leave nothing to learn from")
        if self.warmup_steps >= self.steps:
            raise UserError(f"--warmup_steps={self.warmup_steps} leaves none of --steps={self.steps} at the full --lr")
        if self.capture and self.turns:
            raise UserError(f"--capture records a step of both models, and --turns={self.turns} takes one of either: "
                            "give --turns=0 too")
        if self.mix_alpha != ALONE.get(self.source, self.mix_alpha):
            raise UserError(f"--source={self.source} and --mix_alpha={self.mix_alpha} contradict each other: give one")
        wrong = f"--long_term={self.long_term}" if self.long_term else f"--weight={self.weight}"
        if self.source == "gold" and (self.long_term or self.weight != "none"):
            raise UserError("--source=gold was drawn from neither model, and has neither the long term nor weights: "
                            f"leave {wrong} out")
        if self.divergence != "reverse" and self.long_term:
            raise UserError(f"--divergence={self.divergence} has no long term: leave --long_term=True out")
        for name in ("teacher", "student"):
            if os.path.realpath(getattr(self, name)) == os.path.realpath(Path(self.out) / "minillm"):
                raise UserError(f"--{name}={getattr(self, name)} would be overwritten by the result: give "
                                "another --out")
        names = self.baselines.split(",") if self.baselines else []
        if not set(names) <= {"sft", "kd", "seqkd"} or len(names) > len(set(names)):
            raise UserError(f"--baselines={self.baselines}: give sft, kd and seqkd, or some of them, once each")

    @property
    def test_split(self) -> tuple[str, str]:
        """The set of the final evaluation, and which rows of it: of a user's file those that nothing was trained on."""
        held_out = self.data.endswith(".jsonl") and not self.test_data
        return self.test_data or self.data, "valid" if held_out else "test"


# Appendix B.1; warm-up, weight decay and betas are from the released scripts, as the paper does not name them.
PAPER = dict(teacher="gpt2-xl", student="gpt2", data="dolly", corpus="openwebtext", baselines="", steps=5000, lr=5e-6,
             warmup_steps=100, pt_coef=1.0, max_prompt_tokens=256, max_tokens=512, eval_every=320, valid_limit=1000,
             select="rouge_l", turns=4, micro_batch=8, sample_batch=64, log_every=1, dtype="auto")
# What the released code computes; reproduce/README.md has it in words.
OFFICIAL = dict(gamma=0.95, return_from="current", whiten="all", reward_scale=2.0, reward_clip=100.0,
                weight_single=False, normalize="token", pt_kd=0.5)
# The supervised stages of the built-in world. A reference there is one of very many right answers, and Rouge-L with it
# is chance: the last weights are kept, and phase 1's of the lowest loss.
TINY = dict(batch_size=64, log_every=200)
TINY_TEACHER = TINY | dict(updates=800, lr=6e-3, batch_size=32, select="last", evals=1)
TINY_INIT = TINY | dict(updates=1000, lr=1.2e-2, evals=4)
TINY_BASELINE = TINY | dict(lr=6e-3, select="last", evals=4)
# flags that do not change what phase 2 learns
FREE = supervised.FREE | {"capture", "explain", "plan", "plan_pairs", "ignore_memory", "baselines", "eval_seeds",
                          "test_data"}


def presets(given: dict) -> dict:
    """What flags given imply for those that are not."""
    preset = given.get("preset", "paper" if "teacher" in given else "tiny")
    implied = {"preset": preset} | (PAPER if preset == "paper" else {})
    implied |= OFFICIAL if given.get("recipe") == "official" else {}
    if preset == "paper":
        names = (Path(given.get(role, PAPER[role])).name for role in ("teacher", "student"))
        implied["out"] = "out/" + "-to-".join(names)
    if given.get("source") in ALONE:
        implied["mix_alpha"] = ALONE[given["source"]]
    if given.get("source") == "gold":
        implied |= {"long_term": False, "weight": "none"}
    if given.get("divergence", "reverse") != "reverse":
        implied["long_term"] = False
    if not given.get("single_step", True):
        implied["return_from"] = "current"  # Eq. (2): nothing else would count r_t
    return implied


# ---- Algorithm 1, phase 2 -------------------------------------------------------------------------------------------

def collect(cfg: Config, collection: int, mine: list[int], instructions: list[data.Example], student: GPT,
            teacher: GPT, m: Machine) -> Rollout:
    """The answers numbered `mine` of a collection, S of Algorithm 1, or references instead. Prompt and draws of an
    answer depend on its number alone."""
    first, T = collection * cfg.rollouts, cfg.max_tokens - cfg.max_prompt_tokens
    chosen = data.picks(first, cfg.rollouts, len(instructions), cfg.seed)
    examples, student = [instructions[chosen[i]] for i in mine], frozen(student, m.dtype)
    prompts = [example.prompt for example in examples]
    if cfg.source == "gold":
        answers = [example.response for example in examples]
        return follow(student, prompts, answers, T, m, teacher, cfg.micro_batch, keep_hidden=True)
    turn = turns(cfg.seed, collection, mine, T, cfg.mix_alpha, cfg.turns) if cfg.turns else None
    return sample(student, prompts, uniforms(cfg.seed, [first + i for i in mine], T), m, teacher, cfg.mix_alpha,
                  cfg.sample_batch, keep_hidden=True, turn=turn)


def score(student: GPT, teacher: GPT, rollout: Rollout, rows: list[int], R: Tensor, cfg: Config, m: Machine,
          backward: Callable | None = None) -> dict[str, Tensor]:
    """Eq. (7) at each token of some rows of a rollout, row by row, (N,) each: "loss", whose sums `backward` takes
    backward; "loss_single" and "loss_long", its parts; "weight", w_t; "clipped", where the clipping bites; "gap", how
    far log q(y_t) has moved since it was sampled; "student_logp", log q(y_t) now; "reverse_kl", KL[q || p]. R (B, T) is
    that of all rows, and may be whitened.

    It takes one pass of the student, and of the teacher, whose last hidden states were kept, the output embedding."""
    prompts, answers = [rollout.prompts[r] for r in rows], [rollout.answers[r] for r in rows]
    tokens, response, mask = data.pad_right(prompts, answers, m.device)  # (b, S), (b, T), (b, T)
    row, t = mask.nonzero(as_tuple=True)
    row = torch.tensor(rows, device=m.device)[row]  # of the rollout
    known = (rollout.teacher_hidden, rollout.student_logp, rollout.mixed_logp, R)
    known = [values[row, t] for values in known]  # (N, D), then (N,) each

    def terms(head: Tensor, hidden: Tensor, y: Tensor, teacher_hidden: Tensor, *of_rollout: Tensor) -> tuple:
        log_q = student.logits(hidden, head).log_softmax(-1)  # (chunk, V)
        log_p = teacher.logits(teacher_hidden).log_softmax(-1)  # (chunk, V)
        student_logp, single = taken(log_q, y), divergence(log_q, log_p, cfg.divergence)  # (chunk,) each
        # minillm_loss has rows of answers: a chunk is one row, (1, chunk)
        logp, kl, old_logp, mixed_logp, R = (values[None] for values in (student_logp, single, *of_rollout))
        losses = minillm_loss(logp, kl, old_logp, mixed_logp, R, torch.ones_like(R).bool(), cfg.weight,
                              cfg.weight_single, cfg.clip_eps)  # Eq. (7)
        loss_single, loss_long, weight, clipped = (values[0] for values in losses)  # (chunk,) each
        loss_single, loss_long = cfg.single_step * loss_single, cfg.long_term * loss_long
        gap = (student_logp - old_logp[0]).abs()
        kl = single if cfg.divergence == "reverse" else reverse_kl(log_q.detach(), log_p)
        return loss_single + loss_long, loss_single, loss_long, weight, clipped, gap, student_logp, kl

    # weights that are products over an answer need the whole of it in one chunk
    chunk = [len(answer) for answer in answers] if cfg.weight in ("product", "exact") else m.vocab_chunk
    with m.autocast():
        hidden = student(tokens, where=predicting(prompts, mask))  # (N, D)
        by_token = (hidden, response[mask], *known)
        values = (learn_by_chunks(terms, chunk, backward, student, *by_token) if backward else
                  by_chunks(partial(terms, student.head()), chunk, *by_token))
    names = ("loss", "loss_single", "loss_long", "weight", "clipped", "gap", "student_logp", "reverse_kl")
    return dict(zip(names, values))


def accumulate(micro_batch: int, student: GPT, teacher: GPT, rollout: Rollout, rows: list[int], R: Tensor,
               pieces: list[data.Example], divisor: float, pt_divisor: float, cfg: Config, m: Machine,
               scaler: torch.amp.GradScaler) -> tuple[dict, Tensor]:
    """Adds to the student's gradient that of Eq. (7) over some rows of a rollout, and that of L_PT over pieces of plain
    text, `micro_batch` at a time. Returns the sums over tokens of what is logged, and the largest weight."""
    weight_max = zero = torch.zeros((), device=m.device)
    sums = dict.fromkeys(("loss_single", "loss_long", "loss_pt", "reverse_kl", "weight", "clipped", "gap"), zero)
    backward = lambda loss: scaler.scale(loss / divisor).backward()
    pt_backward = lambda loss: scaler.scale(cfg.pt_coef * loss / pt_divisor).backward()
    for at in range(0, len(rows), micro_batch):
        tokens = score(student, teacher, rollout, rows[at : at + micro_batch], R, cfg, m, backward)
        sums |= {name: total + tokens[name].sum() for name, total in sums.items() if name in tokens}
        weight_max = torch.maximum(weight_max, tokens["weight"].max())
    judge = teacher if cfg.pt_kd else None
    for at in range(0, len(pieces), micro_batch):
        _, loss = supervised.answer_loss(student, pieces[at : at + micro_batch], m, judge, cfg.pt_kd, pt_backward)
        sums["loss_pt"] = sums["loss_pt"] + loss  # not +=, in place: the sums begin as one tensor
    return sums, weight_max


def minibatches(rollouts: int, minibatch: int, seed: tuple[int, ...]) -> list[list[int]]:
    """The minibatches of one inner epoch, in which each answer stands once. A minibatch has one answer i of each column
    i % minibatch, and a process owns whole columns: the minibatches are the same for any number of processes."""
    columns = np.arange(rollouts).reshape(-1, minibatch)
    return np.random.default_rng(seed).permuted(columns, axis=0).tolist()


def distil(cfg: Config, stop: Stop | None = None) -> dict:
    """Phase 2: the student, after phase 1, learns from the teacher. The result is a model folder, OUT/minillm.

    Asked to stop, it first learns from the answers that it has sampled: they are not saved."""
    m, out = machine(cfg.device, cfg.dtype, cfg.vocab_chunk, cfg.capture), Path(cfg.out) / "minillm"

    # 1 what is there already
    if supervised.begin(out, cfg, FREE, m):
        return read_json(out / "results.json")

    # 2 the student q and the teacher p, the instructions D and the plain text D_PT
    tokenizer, limits = data.load_tokenizer(cfg.student), (cfg.max_prompt_tokens, cfg.max_tokens)
    instructions = data.load_examples(cfg.data, "train", tokenizer, *limits, m.say)
    valid = data.load_examples(cfg.data, "valid", tokenizer, *limits, m.say)[: cfg.valid_limit]
    corpus = []
    if cfg.pt_coef:
        corpus = data.Pieces(data.load_corpus(cfg.corpus, tokenizer, out.parent / "corpus", m), cfg.max_tokens)
    # load() leaves dropout off, and it stays off, as in the released code: log q must be that of sampling
    student = trained(load(cfg.student, m.device), cfg.recompute, cfg.compile)
    teacher = frozen(load(cfg.teacher, m.device), m.dtype)
    same_vocabulary(student.config, teacher.config)
    optimizer, scaler = supervised.optimizer_of(student, m, (0.9, 0.95), cfg.weight_decay)
    step, best = supervised.load_state(out, cfg, student, optimizer, scaler, m)
    mine = [i for i in range(cfg.rollouts) if i % cfg.minibatch % m.world == m.rank]  # the answers of this process
    row_of = {i: row for row, i in enumerate(mine)}  # in its rollout
    began, first, validated = time.perf_counter(), step, step if best else -1  # a state is validated, then saved
    micro_batch = cfg.micro_batch  # less once memory did not suffice

    while True:
        # 3 validate, keep the best, save
        if validated // cfg.eval_every < step // cfg.eval_every or validated < step == cfg.steps:
            scores, answers = supervised.validate(student, tokenizer, valid, m, cfg, teacher)
            supervised.log(out, m, {"step": step, "valid": scores})
            shown = "".join(f"  {name} {value:.2f}" for name, value in scores.items())
            m.say(f"minillm {step}/{cfg.steps}  | validation:{shown}")
            for answer in answers[:3]:
                text = f"{answer['instruction']} {answer['input']} -> {answer['answer']}"
                m.say(f"    {' '.join(text.split())[:112]}")
            best = supervised.keep_best(student, tokenizer, out, m, cfg.select, scores | {"step": step}, best)
            validated = step
            if m.rank == 0:
                write_lines(out / "samples.jsonl", answers)
                supervised.save_state(out, student, optimizer, scaler, step, best)
        if step == cfg.steps:
            return supervised.finish(out, m, {"best": best})
        if stop and stop.asked(m):
            if m.rank == 0:
                supervised.save_state(out, student, optimizer, scaler, step, best)
            m.barrier()  # saved, before any process ends
            raise Stopped(stop.signum, f"{out}: stopped and saved after update {step}; --resume goes on")

        # 4 Alg. 1: sample answers from the mixture p~ to prompts of D; they are S
        started, collection = time.perf_counter(), step * cfg.minibatch // (cfg.rollouts * cfg.inner_epochs)
        rollout = collect(cfg, collection, mine, instructions, student, teacher, m)

        # 5 the reward of each token and of those that follow it, known to every process
        reward, mask = torch.zeros(2, cfg.rollouts, cfg.max_tokens - cfg.max_prompt_tokens, device=m.device)
        ended = torch.zeros(cfg.rollouts, device=m.device)
        r = token_reward(rollout.teacher_logp, rollout.student_logp, cfg.reward_scale, cfg.reward_clip)
        reward[mine], mask[mine] = r * rollout.response_mask, rollout.response_mask.float()
        ended[mine] = rollout.ended.float()
        m.sum(reward, mask, ended)
        mask = mask.bool()  # (rollouts, T), as reward and R
        R = future_reward(reward, mask, cfg.gamma, cfg.length_norm, cfg.return_from)
        sample_seconds = time.perf_counter() - started

        # 6 Alg. 1: the inner epochs over S, an update for each minibatch
        batches = [batch for epoch in range(cfg.inner_epochs)
                   for batch in minibatches(cfg.rollouts, cfg.minibatch, (cfg.seed, collection, epoch))]
        for number, batch in enumerate(batches[: cfg.steps - step]):
            started, whitened = time.perf_counter(), torch.zeros_like(R)
            whitened[batch] = whiten(R[batch], mask[batch], cfg.whiten)
            rows = sorted((row_of[i] for i in batch if i in row_of), key=lambda row: -len(rollout.answers[row]))
            pieces = data.picks(step * cfg.minibatch, cfg.minibatch, len(corpus), cfg.seed) if corpus else []
            pieces = [corpus[i] for i in pieces[m.rank :: m.world]]
            # one normaliser for the whole minibatch, however it is split: the tokens of all processes. Not the M of
            # Algorithm 1, under which a piece of D_PT would outweigh an answer by being longer
            tokens, by_token = mask[batch].sum().item(), cfg.normalize == "token"
            divisor = tokens if by_token else cfg.minibatch
            pt_divisor = cfg.minibatch * (corpus.length - 1 if by_token and corpus else 1)
            (sums, weight_max), micro_batch = supervised.fitting(
                accumulate, micro_batch, student, student, teacher, rollout, rows, whitened[mine], pieces, divisor,
                pt_divisor, cfg, m, scaler)
            totals = torch.stack([*sums.values()])
            m.sum(totals)
            m.max(weight_max)
            sums = dict(zip(sums, totals.tolist()))
            for name in ("loss_single", "loss_long", "loss_pt"):
                if not math.isfinite(sums[name]):
                    raise UserError(f"{out}: stopped at update {step + 1}: {name} is {sums[name]}")
            lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
            try:
                norm = supervised.apply_update(student, optimizer, scaler, m, lr, cfg.grad_clip)
            except UserError as error:
                raise UserError(f"{out}: stopped at update {step + 1}: {error}") from None
            step += 1

            # 7 log: each figure is a mean over the whole update
            line = {"step": step, "loss_single": sums["loss_single"] / divisor,
                    "loss_long": sums["loss_long"] / divisor, "loss_pt": sums["loss_pt"] / pt_divisor,
                    "reverse_kl": sums["reverse_kl"] / cfg.minibatch,
                    "reward": reward[batch].sum().item() / cfg.minibatch, "weight_mean": sums["weight"] / tokens,
                    "weight_max": weight_max.item(), "clip_fraction": sums["clipped"] / tokens,
                    "response_tokens": tokens / cfg.minibatch, "ended_fraction": ended[batch].mean().item(),
                    "logp_gap": sums["gap"] / tokens if number == 0 else None,
                    "grad_norm": norm if math.isfinite(norm) else None, "lr": lr,
                    "sample_seconds": sample_seconds if number == 0 else 0.0,
                    "update_seconds": time.perf_counter() - started}
            supervised.log(out, m, line)
            if step % cfg.log_every == 0:
                left = (time.perf_counter() - began) / (step - first) * (cfg.steps - step)
                m.say(f"minillm {step}/{cfg.steps}  reverse_kl {line['reverse_kl']:.3f}  reward {line['reward']:.3f}  "
                      f"loss_pt {line['loss_pt']:.3f}  clip {line['clip_fraction']:.3f}  tokens "
                      f"{line['response_tokens']:.1f}  norm {norm:.2f}  left {clock(left)}")
        rollout = None  # its teacher's states, the largest of a collection, go before the next are made


def columns(cfg: Config) -> dict[str, tuple[str, str]]:
    """The columns of --explain: for each its equation, and what it holds under these settings."""
    now, off = cfg.return_from == "current", ", switched off"
    r = "log p - log q" + f", times {cfg.reward_scale:g}" * (cfg.reward_scale != 1)
    r += f", clipped at {cfg.reward_clip:g}" * (cfg.reward_clip < math.inf)
    R = f"the {'mean' if cfg.length_norm else 'sum'} of {'r_t and ' * now}the r that follow"
    R += f", discounted by {cfg.gamma:g}" * (cfg.gamma < 1) + ", whitened" * (cfg.whiten != "none")
    w = {"per_token": "q / p~", "product": "the product of q / p~ up to here", "exact": "the product of q / p~ before",
         "none": "1: there are no weights"}[cfg.weight]
    single = "KL" if cfg.divergence == "reverse" else f"{cfg.divergence} divergence"
    rho = "q / q as of then" if cfg.weight == "none" else "q / p~"
    long = f"-min(rho R, clip(rho) R), rho = {rho}" + ", and a weight" * ("product" in w)
    drawn_from = {"gold": "the student's as of then: this answer is a reference",
                  "mixed": "the mixture's, from which it was drawn"}
    drawn_from = drawn_from.get(cfg.source, f"the {cfg.source}'s alone, from which it was drawn")
    return {"log q": ("", "the student's log-probability of the token taken"), "log p": ("", "the teacher's"),
            "log p~": ("(4)" * (cfg.source == "mixed"), drawn_from), "r_t": ("(2)", r),
            "KL": ("(3)", "KL[q || p] over the vocabulary, or -E[r_t]"),
            "R_t" if now else "R_t+1": ("(6)" if cfg.length_norm else "(2)" if now else "(3)", R), "w_t": ("(5)", w),
            "L_Single": ("(7)", "w_t " * cfg.weight_single + single + off * (not cfg.single_step)),
            "L_Long": ("Alg. 1", long + off * (not cfg.long_term))}


def explain(cfg: Config) -> None:
    """Phase 2's first update, token by token for the first of its answers, by the functions and from the seeds of
    training. Nothing is trained or written."""
    m, limits = machine(cfg.device, cfg.dtype, cfg.vocab_chunk), (cfg.max_prompt_tokens, cfg.max_tokens)
    tokenizer = data.load_tokenizer(cfg.student)
    instructions = data.load_examples(cfg.data, "train", tokenizer, *limits, m.say)
    student, teacher = load(cfg.student, m.device), frozen(load(cfg.teacher, m.device), m.dtype)
    same_vocabulary(student.config, teacher.config)
    rollout = collect(cfg, 0, list(range(cfg.rollouts)), instructions, student, teacher, m)
    mask = rollout.response_mask
    r = token_reward(rollout.teacher_logp, rollout.student_logp, cfg.reward_scale, cfg.reward_clip) * mask
    R = future_reward(r, mask, cfg.gamma, cfg.length_norm, cfg.return_from)
    batch = minibatches(cfg.rollouts, cfg.minibatch, (cfg.seed, 0, 0))[0]
    R[batch], one = whiten(R[batch], mask[batch], cfg.whiten), batch[0]
    with torch.no_grad():
        by_token = score(student, teacher, rollout, [one], R, cfg, m)
    values = (by_token["student_logp"], rollout.teacher_logp[one], rollout.mixed_logp[one], r[one],
              by_token["reverse_kl"], R[one], by_token["weight"], by_token["loss_single"],
              by_token["loss_long"])  # (T,) each, in the order of columns()
    row = instructions[data.picks(0, cfg.rollouts, len(instructions), cfg.seed)[one]].row
    m.say(f"\n{row.instruction}" + f" | {row.input}" * bool(row.input)
          + f"\n{data.decode(tokenizer, rollout.answers[one])}\n")
    shown = columns(cfg)
    line = lambda head, cells, tail="": m.say(f"{head:>14}" + "".join(f"{cell:>10}" for cell in cells) + tail)
    line("", shown)
    line("Eq.", (equation for equation, _ in shown.values()))
    for t, token in enumerate(rollout.answers[one]):
        line(repr(tokenizer.decode([token]))[1:-1], (f"{value[t].item():.4f}" for value in values),
             "  clipped" * by_token["clipped"][t])
    line("sum", (f"{value.sum().item():.4f}" * (name[0] not in "Rw") for name, value in zip(shown, values)), "\n")
    for name, (_, meaning) in shown.items():
        m.say(f"{name:>14}  {meaning}")
    tokens = sum(len(rollout.answers[i]) for i in batch)
    divisor = f"{tokens} tokens" if cfg.normalize == "token" else f"{cfg.minibatch} answers"
    m.say(f"\nAn update divides the sums of both losses over its {cfg.minibatch} answers by their {divisor}, and adds "
          f"{cfg.pt_coef:g} L_PT" + f", of which a share of {cfg.pt_kd:g} is KL[p || q]" * (cfg.pt_kd > 0) + ".")


# ---- all stages -----------------------------------------------------------------------------------------------------

AS_RELEASED = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}


def is_raw(name: str, choice: str) -> bool:
    """Whether a model has yet to learn to follow instructions: one that is new, or GPT-2 as released."""
    return choice == "yes" or (choice == "auto" and (is_shape(name) or Path(name).name in AS_RELEASED))


def stages(cfg: Config) -> tuple[list[tuple[str, Callable, object]], Config]:
    """What comes before phase 2 and beside it, as (name, main, its Config); and cfg with the names of the results.

    Raises UserError for a stage that cannot be skipped."""
    out, tiny, work = Path(cfg.out), cfg.preset == "tiny", []
    common = {name: getattr(cfg, name) for name in ("data", "max_prompt_tokens", "max_tokens", "valid_limit", "seed",
                                                    "micro_batch", "sample_batch", "vocab_chunk", "recompute",
                                                    "compile", "log_every", "resume", "device", "dtype")}

    def train(name: str, **settings) -> str:
        settings = common | {"out": str(out / name)} | settings
        work.append((name, supervised.main, make(supervised.Config, settings, supervised.presets)))
        return settings["out"]

    teacher, student = cfg.teacher, cfg.student
    for name, choice in (("teacher", "finetune_teacher"), ("student", "init_student")):
        if is_shape(getattr(cfg, name)) and getattr(cfg, choice) == "no":
            raise UserError(f"--{name}={getattr(cfg, name)} is new and has to be trained: leave --{choice} as it is")
    if is_raw(teacher, cfg.finetune_teacher):
        teacher = train("teacher", model=teacher, **TINY_TEACHER if tiny else {})
    if is_raw(student, cfg.init_student):
        student = train("init", model=student, select="loss", **TINY_INIT if tiny else dict(epochs=3))
    # a baseline of the built-in world goes on from phase 1 for as many updates as MiniLLM; else it has its own recipe
    baseline = dict(model=student, updates=cfg.steps, **TINY_BASELINE) if tiny else dict(model=cfg.student)
    for name in cfg.baselines.split(",") if cfg.baselines else []:
        if name == "sft":
            train(name, **baseline)
        elif name == "kd":
            train(name, **baseline, teacher=teacher)
        else:
            answers = sampling.Config(
                model=teacher, data=cfg.data, split="train", out=str(out / "answers.jsonl"), seed=cfg.seed,
                max_prompt_tokens=cfg.max_prompt_tokens, max_response_tokens=cfg.max_tokens - cfg.max_prompt_tokens,
                batch_size=cfg.sample_batch, capture=cfg.capture, device=cfg.device, dtype=cfg.dtype)
            work.append(("answers", answer_once, answers))
            train(name, **baseline | dict(data=answers.out, valid_data=cfg.data))
    return work, dataclasses.replace(cfg, teacher=teacher, student=student)


def answer_once(cfg: sampling.Config) -> None:
    """Writes the teacher's answers, unless they are there. Raises UserError if they were made with other flags."""
    m, answers, beside = machine(cfg.device, cfg.dtype), Path(cfg.out), Path(cfg.out).with_suffix(".json")
    made_with = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in FREE | {"batch_size"}}
    made_with["checksum"] = checksum(cfg.model)
    there = answers.is_file()
    if there and (not beside.is_file() or made_with | read_json(beside) != made_with):  # older ones lack the checksum
        raise UserError(f"{answers} was made with another teacher, seed or length: choose another --out, or remove it")
    m.barrier()  # all have looked before one writes
    if not there:
        if m.rank == 0:
            write_json(beside, made_with)
        sampling.main(cfg)


def main(cfg: Config) -> list[dict]:
    with contextlib.nullcontext() if cfg.plan or cfg.plan_pairs else held(Path(cfg.out)):
        return run_stages(cfg)


def run_stages(cfg: Config) -> list[dict]:
    """The plan, every stage that is not finished, and the evaluation of all models that were made."""
    m, out = machine(cfg.device, cfg.dtype, cfg.vocab_chunk, cfg.capture), Path(cfg.out)
    if cfg.explain:
        cfg = dataclasses.replace(cfg, baselines="")
    what = f"{cfg.teacher} teaches {cfg.student} {cfg.data}, in {out}"
    work, cfg = stages(cfg)
    draft = planning.Draft(cfg, work, m)
    if cfg.plan_pairs:
        planning.show_pairs(draft, m)
        return []
    if not cfg.plan:  # a folder of another run is told before there is work
        for _, _, settings in work:
            if isinstance(settings, supervised.Config):
                supervised.is_finished(Path(settings.out), settings, supervised.FREE)
        if not cfg.explain:
            supervised.is_finished(out / "minillm", cfg, FREE)
            results = out / "results.json"
            if (out / "run.json").is_file() or (results.is_file() and results.read_text(encoding="utf-8")[:1] != "["):
                raise UserError(f"--out={out} holds results of something else: give a folder of its own")
        m.barrier()  # all have looked before one writes
    planning.show(draft.lines(), m, what, cfg.ignore_memory)
    if cfg.plan:
        return []
    if cfg.pt_coef and not (out / "minillm" / "results.json").is_file():  # its faults are told before training
        data.Pieces(data.load_corpus(cfg.corpus, draft.tokenizer, out / "corpus", m), cfg.max_tokens)
    for name, stage, settings in work:
        began = time.perf_counter()
        stage(settings)
        m.say(f"-- {name}: {clock(time.perf_counter() - began)}\n")
    if cfg.explain:
        explain(cfg)
        return []
    with Stop("once these answers are learned from") as stop:
        distil(cfg, stop)

    # every model that this run has made, on rows that none was trained on
    made = {"teacher": cfg.teacher, "init": cfg.student}
    made |= {name: str(out / name) for name in ("sft", "kd", "seqkd", "minillm")
             if (out / name / "results.json").is_file()}
    (test, split), rows = cfg.test_split, []
    for method, model in made.items():
        scores = evaluation.main(evaluation.Config(
            model=model, data=test, split=split, teacher=cfg.teacher, seeds=cfg.eval_seeds,
            out=str(out / "test" / method), max_prompt_tokens=cfg.max_prompt_tokens,
            max_response_tokens=cfg.max_tokens - cfg.max_prompt_tokens, batch_size=cfg.sample_batch,
            capture=cfg.capture, device=cfg.device, dtype=cfg.dtype), own=True)["scores"]
        spread = {name: float(np.std(values, ddof=1)) for name, values in scores.items() if len(values) > 1}
        means = {name: float(np.mean(values)) for name, values in scores.items()}
        rows.append({"method": method} | means | {"std": spread})
    if m.rank == 0:
        write_json(out / "results.json", rows)
    shown = ("valid", "distinct", "rouge_l", "reverse_kl", "forward_kl", "loss", "tokens")
    shown = [name for name in shown if name in rows[0]]
    m.say(f"\n{'method':10}" + "".join(f"{name:>12}" for name in shown))
    for row in rows:
        m.say(f"{row['method']:10}" + "".join(f"{row[name]:12.3f}" for name in shown))
    m.say(f"written to {out / 'results.json'}; the student is {out / 'minillm'}")
    return rows


if __name__ == "__main__":
    run(main, Config, presets)
