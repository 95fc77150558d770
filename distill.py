"""MiniLLM: a student q learns from a teacher p by reverse KL and policy gradient.

Paper:    arXiv 2306.08543v4, Section 2. The equations are below, except Eq. (4), which is in
          sample.py. Phase 1 of Algorithm 1 is in teacher.py, phase 2 is algorithm_1() below. Where
          the code departs from the paper, a comment says "not".
Run:      python distill.py                    the built-in world: no network, no GPU, two minutes
          python distill.py --teacher=gpt2-xl  the paper's world, from the released GPT-2 on
          python distill.py --teacher=MiniLLM/teacher-gpt2-1.5B --student=MiniLLM/init-gpt2-120M
Shapes:   B answers, b in a micro-batch, c in a chunk, T response tokens, D width, V vocabulary.
Left out: a critic, a KL to the initial student, an entropy bonus (the paper has none).
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import data
import sample as sampling
import teacher as supervised
from config import Machine, UserError, check, flag, machine, run
from model import GPT, load
from safe import runs
from safe.files import check_place, read_json, write_lines
from sample import Rollout, decoder, follow, mix, taken, uniforms

# ---- the equations, in the paper's order ------------------------------------------------------
# They take and return tensors. response_mask is true up to the end of an answer; beyond it, (B, T)
# tensors are 0.


def reverse_kl(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor) -> Tensor:
    """KL[q || p] at each position: Eq. (1) for one token. It is -E_{y_t ~ q}[r_t], the single step
    of Eq. (3). (..., V) -> (...)"""
    difference = student_logp_vocab - teacher_logp_vocab
    return (student_logp_vocab.exp() * difference).sum(-1)  # Eq. (1)


def divergence(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, kind: str) -> Tensor:
    """What the single step minimises: reverse, KL[q || p], as in the paper; forward, KL[p || q];
    js, the mean of KL[q || m] and KL[p || m] with m = (p + q) / 2, as in GKD (arXiv 2306.13649);
    skew, KL[p || 0.1 p + 0.9 q], as in DistiLLM (arXiv 2402.03898); none, 0. (..., V) -> (...)"""
    q, p = student_logp_vocab, teacher_logp_vocab
    if kind == "none":
        return torch.zeros_like(q[..., 0])
    if kind == "reverse":
        return reverse_kl(q, p)
    if kind == "forward":
        return reverse_kl(p, q)
    if kind == "skew":
        return reverse_kl(p, mix(q, p, 0.1))
    middle = mix(q, p, 0.5)
    return (reverse_kl(q, middle) + reverse_kl(p, middle)) / 2


def token_reward(teacher_logp: Tensor, student_logp: Tensor, clip: float = math.inf) -> Tensor:
    """r_t = log p(y_t | y_<t, x) - log q(y_t | y_<t, x) of Eq. (2). The paper does not clip it.
    (B, T)"""
    return (teacher_logp - student_logp).clamp(-clip, clip)  # Eq. (2)


def future_reward(reward: Tensor, response_mask: Tensor, gamma: float = 1.0,
                  length_norm: bool = True, return_from: str = "next") -> Tensor:
    """The return of each token, (B, T): R_{t+1}, which is 0 for the last token; R_t if return_from
    is "current"; 0 if it is "none". length_norm divides it by the number of rewards in it.

    gamma discounts r_{t'} by gamma^(t'-t). The paper has no discount."""
    R = torch.zeros_like(reward)
    if return_from == "none":
        return R
    total = torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.size(1))):
        total = reward[:, t] + gamma * total  # R_t
        R[:, t] = total if return_from == "current" else total - reward[:, t]
    remaining = response_mask.flip(1).cumsum(1).flip(1)  # T - t + 1: tokens from t to the end
    terms = remaining if return_from == "current" else remaining - 1
    if length_norm:  # not T - t - 1 as printed, which is 0 at t = T - 1: R_{t+1} sums T - t rewards
        R = R / terms.clamp(min=1)  # Eq. (6)
    return R * response_mask


def importance_weights(student_logp: Tensor, mixed_logp: Tensor, response_mask: Tensor,
                       kind: str) -> tuple[Tensor, Tensor]:
    """The weights of L_Single and of L_Long, (B, T) each, for tokens drawn from p~ instead of q.
    L_Long's lacks the ratio q / p~ at t, by which long_term_loss multiplies.

    per_token: w_t = q(y_t) / p~(y_t), which the paper puts in place of the product, for less
    variance; biased. long_only: the same for L_Long, and 1 for L_Single.
    product: prod_{t'<=t}, Eq. (5) as printed. It is exact for the single step and biased for the
    long term, because the later tokens that R_{t+1} sums over were drawn from p~ too.
    exact: the product over earlier tokens for the single step, over all others for the long term.
    none: as if the tokens had been drawn from q."""
    log_w = ((student_logp - mixed_logp) * response_mask).detach()  # (B, T)
    upto = log_w.cumsum(1)
    one = torch.ones_like(log_w)
    if kind in ("none", "long_only"):
        return one, one
    if kind == "per_token":
        return log_w.exp(), one  # Eq. (5), w_t approximated
    if kind == "product":
        return upto.exp(), (upto - log_w).exp()  # Eq. (5), w_t as printed
    return (upto - log_w).exp(), (upto[:, -1:] - log_w).exp()  # not Eq. (5)


def whiten(values: Tensor, response_mask: Tensor, kind: str) -> Tensor:
    """Scales values (B, T) to mean 0 and variance 1, which the paper does not do. "responses" takes
    both from response positions; "all" counts the zeros of padding too, as the released code."""
    if kind == "none":
        return values
    counted = values if kind == "all" else values[response_mask]
    centred = values - counted.mean()
    return centred * torch.rsqrt(counted.var(correction=0) + 1e-8) * response_mask


def single_step_loss(kl: Tensor, weight: Tensor) -> Tensor:
    """L_Single at each position. Its gradient is (grad L)_Single of Eqs. (3), (5), (7). (B, T)"""
    return weight * kl  # Eqs. (3), (5), (7)


def long_term_loss(student_logp: Tensor, behaviour_logp: Tensor, R: Tensor, weight: Tensor,
                   clip_eps: float) -> tuple[Tensor, Tensor]:
    """L_Long at each position, clipped as in Algorithm 1, and where clipping bites. (B, T) each.

    The ratio q(y_t) / p~(y_t) is both w_t of Eq. (5) and rho_t of Algorithm 1: its gradient is
    w_t grad log q. Algorithm 1 prints min(rho, clip(rho)) R, an upper bound where R is negative.
    This is not that, but PPO's min(rho R, clip(rho) R), a lower bound for either sign."""
    ratio = (student_logp - behaviour_logp).exp()
    weighted = R * weight
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = -torch.minimum(ratio * weighted, clipped * weighted)  # Alg. 1
    return loss, (clipped - ratio) * weighted < 0


def minillm_loss(student_logp: Tensor, kl: Tensor, old_logp: Tensor, mixed_logp: Tensor, R: Tensor,
                 response_mask: Tensor, weight: str = "per_token",
                 clip_eps: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (7) at each position: L_Single, L_Long, and where the clipping bites. (B, T) each.

    student_logp, of the token taken, and kl, from reverse_kl, carry the gradient. old_logp and
    mixed_logp are log q and log p~ of when it was sampled. R comes from future_reward."""
    of_single, of_long = importance_weights(student_logp, mixed_logp, response_mask, weight)
    behaviour_logp = old_logp if weight == "none" else mixed_logp
    loss_single = single_step_loss(kl, of_single)
    loss_long, clipped = long_term_loss(student_logp, behaviour_logp, R, of_long, clip_eps)
    mask = response_mask
    return loss_single * mask, loss_long * mask, clipped & mask  # Eq. (7)


# ---- settings ---------------------------------------------------------------------------------

# --objective: the divergence in L_Single, and the return in L_Long
OBJECTIVES = {
    "eq3": ("reverse", "next"),  # Eq. (3), the paper's
    "eq2": ("none", "current"),  # Eq. (2), not with its -1, whose mean is 0; R_t holds r_t
    "single": ("reverse", "none"),  # GKD with reverse KL
    "double": ("reverse", "current"),  # the released code counts r_t twice
    "unpaid": ("none", "next"),  # no reward depends on y_t itself: the student ends at once
    "forward": ("forward", "none"), "js": ("js", "none"), "skew": ("skew", "none")}


@dataclass(frozen=True)
class Config:
    preset: Literal["tiny", "paper"] = flag("tiny", "which world; --teacher implies paper")
    recipe: Literal["paper", "official"] = flag("paper", "official: as the released code")
    teacher: str = flag("1x4x64", "p: a folder, gpt2-xl, OWNER/NAME, or a new LAYERSxHEADSxWIDTH")
    student: str = flag("1x2x10", "q: the same kinds of name")
    data: str = flag("tiny", "instructions, D: tiny, dolly or FILE.jsonl")
    corpus: str = flag("tiny-text", "D_PT: tiny-text, FILE.txt, a folder, openwebtext(:FILES)")
    out: str = flag("out/tiny", "folder of all stages")
    baselines: str = flag("sft,kd,seqkd", "train these too; empty for none", may_be_empty=True)
    finetune: Literal["auto", "both", "teacher", "student", "none"] = flag(
        "auto", "which to fine-tune on D first; auto: a new one, or GPT-2 as released")
    template: Literal["auto", "paper", "chat"] = flag("auto", "chat: the model's; families/README")
    plan: Literal["auto", "only", "off"] = flag("auto", "off: go on though memory may not suffice")
    resume: bool = flag(False, "go on with an unfinished run")
    # Algorithm 1
    steps: int = flag(640, "updates of phase 2", 1)
    lr: float = flag(8e-3, "learning rate, eta", 0, 10)
    rollouts: int = flag(256, "answers sampled at a time", 1)
    minibatch: int = flag(64, "answers of an update, and pieces of D_PT", 1)
    inner_epochs: int = flag(4, "passes over the answers sampled", 1)
    mix_alpha: float = flag(0.2, "alpha of Eq. (4): 0 samples from q alone, 1 from p alone", 0, 1)
    source: Literal["sampled", "gold"] = flag("sampled", "gold: learn from D's references instead")
    objective: Literal[tuple(OBJECTIVES)] = flag("eq3", "see OBJECTIVES in distill.py")
    weight: Literal["per_token", "long_only", "product", "exact", "none"] = flag(
        "per_token", "w_t of Eq. (5); long_only: on L_Long, not on L_Single")
    length_norm: bool = flag(True, "Eq. (6)")
    gamma: float = flag(1.0, "discount of the return", 0, 1)
    reward_clip: float = flag(math.inf, "largest |r_t|", 1e-9)
    whiten: Literal["none", "responses", "all"] = flag("none", "whiten R; all: over padding too")
    clip_eps: float = flag(0.2, "epsilon of Algorithm 1's clipping; inf for none", 1e-9)
    normalize: Literal["token", "sequence"] = flag("token", "mean over tokens, or of answers' sums")
    pt_coef: float = flag(0.0, "factor on L_PT; 1 in the paper, whose student knows D_PT", 0, 1e9)
    pt_kd: float = flag(0.0, "share of KL[p || q] in L_PT", 0, 1)
    max_prompt_tokens: int = flag(16, "longer prompts are dropped", 1, 2**20)
    max_tokens: int = flag(44, "most tokens of prompt and answer", 2, 2**20)
    eval_every: int = flag(160, "updates between validations", 1)
    select: Literal["rouge_l", "loss", "last"] = flag("last", "validation that picks the weights")
    micro_batch: int = flag(64, "answers of a forward pass; changes memory and speed only", 1)
    sample_batch: int = flag(256, "answers decoded together; changes memory and speed only", 1)
    decoder: Literal["fast", "turns", "captured", "plain"] = flag("fast", "see fast/decode.py")
    recompute: bool = flag(False, "make layers again in the backward pass, which saves memory")
    compile: bool = flag(False, "torch.compile the forward pass")
    shard: bool = flag(False, "split the model in training over torchrun's processes")
    seed: int = flag(1, "seed of prompts, draws, order and new weights", 0, 2**62)
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("float32", "autocast's dtype")

    def __post_init__(self):
        check(self, max_tokens=(self.max_prompt_tokens + 1, 2**20))
        check_place(self, "out")
        if self.rollouts % self.minibatch:
            raise UserError(f"--rollouts={self.rollouts} is not a multiple of "
                            f"--minibatch={self.minibatch}")
        if self.source == "gold" and (self.return_from, self.weight) != ("none", "none"):
            raise UserError("--source=gold has neither L_Long nor weights: leave out --objective="
                            f"{self.objective} and --weight={self.weight}")
        if self.compile and self.decoder == "plain":
            raise UserError("--compile would compile every step of --decoder=plain: give one")

    @property
    def divergence(self) -> str:
        return OBJECTIVES[self.objective][0]

    @property
    def return_from(self) -> str:
        return OBJECTIVES[self.objective][1]

    @property
    def one_model_decoder(self) -> str:
        return "fast" if self.decoder == "turns" else self.decoder

    @property
    def per_collection(self) -> int:
        """How many updates learn from the same answers."""
        return self.inner_epochs * self.rollouts // self.minibatch

    @property
    def response_tokens(self) -> int:
        return self.max_tokens - self.max_prompt_tokens


# Appendix B.1. Weight decay and betas, below, are the released scripts': the paper has none.
PAPER = dict(teacher="gpt2-xl", student="gpt2", data="dolly", corpus="openwebtext", baselines="",
             steps=5000, lr=5e-6, pt_coef=1.0, max_prompt_tokens=256, max_tokens=512,
             eval_every=320, select="rouge_l", decoder="turns", micro_batch=8, sample_batch=64,
             dtype="auto")
# What the released code computes; reproduce/README.md has it in words.
OFFICIAL = dict(gamma=0.95, objective="double", whiten="all", reward_clip=50.0, weight="long_only",
                pt_kd=0.5)
# Flags that do not change what phase 2 learns. The decoder does: "turns" draws other answers.
FREE = supervised.FREE - {"decoder"} | {"plan", "baselines"}
LOGGED = ("loss_single", "loss_long", "loss_pt", "reverse_kl", "weight", "clipped", "gap")


def presets(given: dict) -> dict:
    """What the flags that are given imply for those that are not."""
    preset = given.get("preset", "paper" if "teacher" in given else "tiny")
    implied = {"preset": preset}
    if preset == "paper":
        names = [Path(given.get(role, PAPER[role])).name for role in ("teacher", "student")]
        implied |= PAPER | {"out": "out/" + "-to-".join(names)}
    if given.get("recipe") == "official":
        implied |= OFFICIAL
    if given.get("source") == "gold":
        implied |= {"objective": "single", "weight": "none"}
    return implied


# ---- Algorithm 1, phase 2 ---------------------------------------------------------------------

def collect(cfg: Config, collection: int, mine: list[int], instructions: Sequence[data.Example],
            student: GPT, teacher: GPT, m: Machine) -> Rollout:
    """The answers numbered `mine` of a collection, S of Algorithm 1, or references in their place.
    The prompt and the draws of an answer depend on its number alone."""
    first, T = collection * cfg.rollouts, cfg.response_tokens
    picks = data.picks(first, cfg.rollouts, len(instructions), cfg.seed)
    examples = [instructions[picks[i]] for i in mine]
    prompts = [example.prompt for example in examples]
    draw, ready = decoder(cfg.decoder)
    student = ready(student, m.dtype)
    if cfg.source == "gold":
        answers = [example.response for example in examples]
        return follow(student, prompts, answers, T, m, teacher, keep_hidden=True)
    given = [student, prompts, uniforms(cfg.seed, [first + i for i in mine], T), m, teacher]
    if cfg.decoder == "turns":
        from fast.decode import turns
        return draw(*given, cfg.mix_alpha, turns(cfg.seed, collection, mine, T, cfg.mix_alpha))
    return draw(*given, cfg.mix_alpha)


def minibatches(cfg: Config, collection: int) -> list[list[int]]:
    """The answers of each update, one inner epoch after the other. A minibatch has one answer i of
    each column i % minibatch, and a process owns whole columns, so that the minibatches are the
    same for any number of processes."""
    columns = np.arange(cfg.rollouts).reshape(-1, cfg.minibatch)
    batches = []
    for epoch in range(cfg.inner_epochs):
        generator = np.random.default_rng((cfg.seed, collection, epoch))
        batches += generator.permuted(columns, axis=0).tolist()
    return batches


def shared(rollout: Rollout, mine: list[int], cfg: Config, m: Machine) -> tuple[Tensor, ...]:
    """log p, log q and response_mask of the answers of all processes, (rollouts, T) each, and
    whether they ended, (rollouts,). `mine` are the numbers of this process's answers."""
    ended = rollout.ended[:, None].expand(rollout.response.shape)
    known = torch.zeros(4, cfg.rollouts, cfg.response_tokens, device=m.device)
    for whole, own in zip(known, (rollout.teacher_logp, rollout.student_logp,
                                  rollout.response_mask, ended)):
        whole[mine] = own.to(known.dtype)
    m.sum(known)
    return known[0], known[1], known[2].bool(), known[3][:, 0]


def add(sums: dict[str, Tensor], response_mask: Tensor, **values: Tensor) -> None:
    """Adds the sum of each value over the response positions to its entry."""
    for name, value in values.items():
        sums[name] += (value.detach() * response_mask).sum()


def plain_text(corpus: Sequence[data.Example], step: int, cfg: Config,
               m: Machine) -> tuple[list[data.Example], float]:
    """This process's pieces of D_PT for an update, and what the sum of L_PT is divided by."""
    if not corpus:
        return [], 1.0
    picks = data.picks(step * cfg.minibatch, cfg.minibatch, len(corpus), cfg.seed)
    per_piece = cfg.max_tokens - 1 if cfg.normalize == "token" else 1
    return [corpus[i] for i in picks[m.rank :: m.world]], cfg.minibatch * per_piece


def algorithm_1(student: GPT, teacher: GPT, instructions: Sequence[data.Example],
                corpus: Sequence[data.Example], optimizer: torch.optim.Optimizer,
                scaler: torch.amp.GradScaler, cfg: Config, m: Machine, step: int) -> Iterator[dict]:
    """Phase 2 from update `step` on: trains the student in place, and yields each update's log."""
    mine = [i for i in range(cfg.rollouts) if i % cfg.minibatch % m.world == m.rank]
    pt_teacher = teacher if cfg.pt_kd else None
    warmup = max(1, min(100, cfg.steps // 32))  # not in the paper, but in the released scripts
    while step < cfg.steps:
        # 1 Alg. 1: sample answers from the mixture p~ to prompts of D. They are S.
        began = time.perf_counter()
        collection, done = divmod(step, cfg.per_collection)  # done, if --steps has been raised
        rollout = None  # frees the teacher's states of the last collection
        rollout = collect(cfg, collection, mine, instructions, student, teacher, m)

        # 2 r_t and the returns of all answers, those of other processes too
        teacher_logp, student_logp, mask, ended = shared(rollout, mine, cfg, m)
        reward = token_reward(teacher_logp, student_logp, cfg.reward_clip) * mask  # (rollouts, T)
        R = future_reward(reward, mask, cfg.gamma, cfg.length_norm, cfg.return_from)
        sample_seconds = time.perf_counter() - began

        # 3 Alg. 1: inner epochs over S, and in each an update for each minibatch
        for minibatch in minibatches(cfg, collection)[done : done + cfg.steps - step]:
            began = time.perf_counter()
            R_white = torch.zeros_like(R)
            R_white[minibatch] = whiten(R[minibatch], mask[minibatch], cfg.whiten)
            # One normaliser for the minibatch, however it is split. It is not the M of Algorithm 1,
            # under which a long piece of D_PT would outweigh an answer.
            tokens = mask[minibatch].sum().item()
            divisor = tokens if cfg.normalize == "token" else cfg.minibatch
            sums = {name: torch.zeros((), device=m.device) for name in LOGGED}

            # 4 the gradient of Eq. (7), a micro-batch of the rollout's rows at a time
            rows = [row for row, i in enumerate(mine) if i in minibatch]
            rows.sort(key=lambda row: len(rollout.answers[row]), reverse=True)
            for some in data.slices(rows, cfg.micro_batch):
                batch = data.pad_right([rollout.prompts[row] for row in some],
                                       [rollout.answers[row] for row in some], m.device)
                b, T = batch.response.shape
                with m.autocast():
                    hidden = batch.predicting(student(batch.tokens))  # (b, T, D)
                    head = student.head()  # (V, D)
                states = hidden.detach().requires_grad_()  # logits fit for a few rows at a time
                for chunk in data.slices(range(b), m.room(T, len(head))):
                    at = [some[row] for row in chunk]  # the same rows in the rollout
                    response_mask = batch.response_mask[chunk]
                    p_hidden = rollout.teacher_hidden[at, :T]  # kept: no layer of the teacher runs
                    with m.autocast():
                        log_q = student.logits(states[chunk], head).log_softmax(-1)  # (c, T, V)
                        log_p = teacher.logits(p_hidden).log_softmax(-1)  # (c, T, V)
                    logp = taken(log_q, batch.response[chunk])  # (c, T)
                    kl = divergence(log_q, log_p, cfg.divergence)  # (c, T)
                    old_logp, mixed_logp = rollout.student_logp[at, :T], rollout.mixed_logp[at, :T]
                    single, long, clipped = minillm_loss(
                        logp, kl, old_logp, mixed_logp, R_white[[mine[row] for row in at], :T],
                        response_mask, cfg.weight, cfg.clip_eps)
                    loss = (single + long).sum() / divisor  # Eq. (7)
                    scaler.scale(loss).backward()
                    if cfg.divergence != "reverse":  # it is logged in any case
                        kl = reverse_kl(log_q.detach(), log_p)
                    add(sums, response_mask, loss_single=single, loss_long=long, reverse_kl=kl,
                        clipped=clipped, gap=(logp - old_logp).abs(),
                        weight=(logp - mixed_logp).exp())
                hidden.backward(states.grad)  # the sum of all chunks, back through the layers

            # 5 the gradient of L_PT, on pieces of plain text; its backward() is in add_gradient()
            pieces, pt_divisor = plain_text(corpus, step, cfg, m)
            for some in data.slices(pieces, cfg.micro_batch):
                batch = data.batch_of(some, m.device)
                sums["loss_pt"] += supervised.add_gradient(
                    student, batch, pt_divisor / cfg.pt_coef, m, scaler, pt_teacher, cfg.pt_kd)[0]

            # 6 clip the gradient's norm at 1, which is not in the paper; take a step; log means
            sums = supervised.summed(sums, m, f"{cfg.out}: stopped at update {step + 1}")
            lr = optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, (step + 1) / warmup)
            norm = supervised.clip_gradient(student, optimizer, scaler, m, where=cfg.out)
            scaler.step(optimizer)  # optimizer.step(), unless float16 has overflowed
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            yield {"step": step, "loss_single": sums["loss_single"] / divisor,
                   "loss_long": sums["loss_long"] / divisor,
                   "loss_pt": sums["loss_pt"] / pt_divisor,
                   "reverse_kl": sums["reverse_kl"] / cfg.minibatch,
                   "reward": reward[minibatch].sum().item() / cfg.minibatch,
                   "weight_mean": sums["weight"] / tokens,
                   "clip_fraction": sums["clipped"] / tokens, "logp_gap": sums["gap"] / tokens,
                   "response_tokens": tokens / cfg.minibatch,
                   "ended_fraction": ended[minibatch].mean().item(), "grad_norm": norm, "lr": lr,
                   "sample_seconds": sample_seconds, "update_seconds": time.perf_counter() - began}
            sample_seconds = 0.0


def distil(cfg: Config, stop: runs.Stop | None = None) -> dict:
    """Phase 2 as a run that is validated, saved and resumed. The result is a folder, OUT/minillm.

    After a signal it finishes the updates on the sampled answers, because these are not saved."""
    m, out = machine(cfg.device, cfg.dtype, cfg.sample_batch), Path(cfg.out) / "minillm"
    if runs.begin(out, cfg, FREE, m):
        return read_json(out / "results.json")
    tokenizer = data.load_tokenizer(cfg.student, cfg.template)
    data.same_vocabulary(tokenizer, data.load_tokenizer(cfg.teacher, cfg.template))
    limits = cfg.max_prompt_tokens, cfg.max_tokens
    instructions = data.load_examples(cfg.data, "train", tokenizer, *limits, m.say)
    valid = data.load_examples(cfg.data, "valid", tokenizer, *limits, m.say)
    corpus = data.load_pieces(cfg.corpus, tokenizer, out, cfg.max_tokens, m) if cfg.pt_coef else []
    # Dropout is off after load() and stays off: log q must be that of sampling.
    student = supervised.trained(load(cfg.student, m.device), cfg, m)
    draw, ready = decoder(cfg.one_model_decoder)
    teacher = ready(load(cfg.teacher, m.device, m.dtype), m.dtype).requires_grad_(False)
    optimizer, scaler = supervised.optimizer_of(student, m, (0.9, 0.95), 1e-6)
    run = runs.Run(out, cfg, m, stop, cfg.steps, student, optimizer, scaler)
    step, best, validated = run.step, run.best, run.best is not None
    select = supervised.selection(cfg.select, valid, m)
    updates = algorithm_1(student, teacher, instructions, corpus, optimizer, scaler, cfg, m, step)
    while True:
        before = step - cfg.per_collection
        due = before // cfg.eval_every < step // cfg.eval_every or step == cfg.steps
        if due and not validated:
            scores, answers = supervised.validate(
                ready(student, m.dtype), tokenizer, valid, m, draw, cfg.response_tokens, teacher)
            run.log_validation(step, scores, answers[:3])
            scores["step"] = step
            best = supervised.keep_best(student, tokenizer, out, m, select, scores, best)
            if m.rank == 0:
                write_lines(out / "samples.jsonl", answers)
        if step == cfg.steps:
            return run.finish(step, best)
        run.save(step, best, due and not validated)
        for line in islice(updates, cfg.per_collection - step % cfg.per_collection):
            step = line["step"]
            run.log(line)
        validated = False


# ---- all stages -------------------------------------------------------------------------------

def main(cfg: Config) -> list[dict]:
    """The plan, then every stage that is not finished."""
    with contextlib.nullcontext() if cfg.plan == "only" else runs.held(Path(cfg.out)):
        from tools import plan, stages  # they import this file
        work = stages.stages(cfg)
        plan.check(cfg, work)
        if cfg.plan != "off":
            plan.show(work, f"{cfg.teacher} teaches {cfg.student} {cfg.data}, in {cfg.out}")
        if cfg.plan == "only":
            return []
        if cfg.preset == "tiny":
            torch.set_num_threads(1)  # more only get in the way of models so small
        for settings in filter(None, (work.teacher, work.init)):
            supervised.main(settings)
        if work.answers and not Path(work.answers.out).is_file():
            sampling.main(work.answers)
        for settings in work.baselines.values():
            supervised.main(settings)
        with runs.Stop("once these answers are learned from") as stop:
            runs.within_memory(distil, work.minillm, stop)
        return stages.evaluate(work.minillm)


if __name__ == "__main__":
    run(main, Config, presets)
