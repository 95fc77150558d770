"""Sampling from the student q, the teacher p, or their mixture p~ = alpha p + (1 - alpha) q.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (4): teacher-mixed sampling. distill.py learns from
          what is sampled here; fast/decode.py samples from the same distribution in less time.
Run:      python sample.py --model=out/tiny/minillm --prompt="Tell about the cat"
          python sample.py --model=gpt2 --prompt="Name three colours." --samples=3 --top_p=0.9
          python sample.py --model=out/teacher --data=dolly --split=train --out=out/answers.jsonl
Shapes:   B answers, b of them decoded together, P prompt tokens, T response tokens, V vocabulary.
Left out: beam search (no equation needs it); continuous batching, which serves many users.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import data
from config import Machine, UserError, check, flag, machine, run
from data import Row
from model import GPT, load, read_config
from safe.files import check_place, write_lines
from safe.rows import is_blank
from safe.texts import Stream


def mix(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, mix_alpha: float) -> Tensor:
    """log p~ = log(alpha p + (1 - alpha) q). (..., V) each."""
    if mix_alpha in (0.0, 1.0):
        return teacher_logp_vocab if mix_alpha else student_logp_vocab
    of_teacher = teacher_logp_vocab + math.log(mix_alpha)
    of_student = student_logp_vocab + math.log1p(-mix_alpha)
    return torch.logaddexp(of_teacher, of_student)  # Eq. (4)


def inverse_cdf(logp_vocab: Tensor, uniform: Tensor) -> Tensor:
    """The token (b,) at which each row's distribution function first exceeds uniform (b,), which
    lies in [0, 1).

    A token of probability 0 is a step of height 0, and is never taken. The last sum stands for 1,
    so that rounding cannot lead beyond the vocabulary."""
    cdf = logp_vocab.exp().cumsum(-1, dtype=torch.float64)  # (b, V)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return token.clamp(max=logp_vocab.size(-1) - 1)  # a row of NaN leads beyond it


def uniforms(seed: int, answers: Iterable[int], length: int) -> Tensor:
    """(B, T) float64 numbers in [0, 1). Each answer has a stream of its own, so it depends neither
    on the batch that it is decoded in nor on the number of processes."""
    streams = (np.random.Generator(np.random.Philox(key=[seed, answer])) for answer in answers)
    return torch.from_numpy(np.array([s.random(length) for s in streams]).reshape(-1, length))


def taken(logp_vocab: Tensor, token: Tensor) -> Tensor:
    """The log-probability of each token: (..., V), (...) -> (...)."""
    return logp_vocab.gather(-1, token[..., None]).squeeze(-1)


@dataclass
class Rollout:
    """Answers, and what is known of them since they were sampled. Padding is 0."""
    prompts: list[list[int]]
    response: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, T) bool, true for the tokens of the answer, end token included
    ended: Tensor  # (B,) bool, false where an answer has run out of length
    student_logp: Tensor  # (B, T) log q(y_t)
    mixed_logp: Tensor  # (B, T) the log-probability under which y_t was drawn: Eq. (4)
    teacher_logp: Tensor  # (B, T) log p(y_t); 0 without a teacher
    reverse_kl: Tensor | None = None  # (B, T) KL[q || p] over the vocabulary; from follow() only
    teacher_hidden: Tensor | None = None  # (B, T, D) the teacher's states that predict y_t

    @classmethod
    def empty(cls, prompts: list[list[int]], T: int, m: Machine, width: int = 0) -> "Rollout":
        """A rollout to be filled in; with room for the teacher's states if they have a width."""
        B = len(prompts)
        response, *logps = (torch.zeros(B, T, device=m.device) for _ in range(4))
        hidden = torch.zeros(B, T, width, device=m.device, dtype=m.dtype) if width else None
        return cls(prompts, response.long(), response.bool(), response[:, 0].bool(), *logps,
                   teacher_hidden=hidden)

    @cached_property
    def answers(self) -> list[list[int]]:
        """The tokens of each response, its end token included."""
        lengths = self.response_mask.sum(1).tolist()
        return [row[:length] for row, length in zip(self.response.tolist(), lengths)]

    def finish(self, length: Tensor, ends: Tensor) -> "Rollout":
        """Sets the mask by each length (B,) and clears the rest. ends (B, T) marks end tokens."""
        T = self.response.size(1)
        self.response_mask = torch.arange(T, device=length.device) < length[:, None]  # (B, T)
        for values in (self.response, self.student_logp, self.mixed_logp, self.teacher_logp):
            values.masked_fill_(~self.response_mask, 0)
        if self.mixed_logp.isnan().any():
            raise UserError("the model's probabilities are not numbers: its weights are broken, or "
                            "--dtype is too coarse")
        self.ended = (ends & self.response_mask).any(1)
        return self


@torch.no_grad()
def sample(student: GPT, prompts: list[list[int]], uniform: Tensor, m: Machine,
           teacher: GPT | None = None, mix_alpha: float = 0.0,
           adjust: Callable | None = None) -> Rollout:
    """An answer to each of B prompts, of at most T tokens, drawn from Eq. (4)'s mixture. uniform
    (B, T) holds the draws.

    adjust(logp (b, V), rows, said (b, P + t)) may change what a token is drawn from. `rows` are
    the answers' numbers, and `said` is each prompt with its answer so far, -1 for padding."""
    (B, T), device = uniform.shape, m.device
    models = [student] if teacher is None else [student, teacher]
    rollout = Rollout.empty(prompts, T, m, teacher.config.n_embd if teacher else 0)
    length = torch.zeros(B, dtype=torch.int64, device=device)
    order = sorted(range(B), key=lambda row: -len(prompts[row]))  # like lengths share a batch
    for rows in data.slices(order, m.sample_batch):
        tokens, starts = data.pad_left([prompts[row] for row in rows], device)  # (b, P), (b,)
        room = min(model.config.n_positions for model in models)
        if tokens.size(1) + T - 1 > room:
            raise UserError(f"a prompt of {tokens.size(1)} tokens and {T} new ones do not fit into "
                            f"{room} positions")
        columns = torch.arange(tokens.size(1), device=device)
        said = tokens.masked_fill(columns < starts[:, None], -1)  # (b, P)
        size = tokens.size(1) + T - 1
        caches = [g.new_cache(g.config, len(rows), size, device, m.dtype) for g in models]
        done = torch.zeros_like(starts).bool()  # (b,)
        with m.autocast():
            heads = [model.head() for model in models]  # (V, D) each
            for t in range(T):
                hidden = [model(tokens, starts, cache)[:, -1]  # (b, D) each
                          for model, cache in zip(models, caches)]
                logp_vocab = [model.logits(h, head).log_softmax(-1)  # (b, V) each
                              for model, h, head in zip(models, hidden, heads)]
                drawn_from = mix(logp_vocab[0], logp_vocab[-1], mix_alpha)  # Eq. (4)
                if adjust:
                    drawn_from = adjust(drawn_from, rows, said)
                token = inverse_cdf(drawn_from, uniform[rows, t].to(device))  # (b,)
                rollout.response[rows, t] = token
                rollout.student_logp[rows, t] = taken(logp_vocab[0], token)
                rollout.mixed_logp[rows, t] = taken(drawn_from, token)
                if teacher:
                    rollout.teacher_logp[rows, t] = taken(logp_vocab[1], token)
                    rollout.teacher_hidden[rows, t] = hidden[1].to(m.dtype)
                length[rows] += (~done).long()  # the end token counts, what follows it does not
                done |= student.ends(token)
                if done.all():
                    break
                tokens = token[:, None]  # (b, 1)
                said = torch.cat([said, tokens], 1)  # (b, P + t + 1)
    return rollout.finish(length, student.ends(rollout.response))


@torch.no_grad()
def follow(student: GPT, prompts: list[list[int]], answers: list[list[int]], T: int, m: Machine,
           teacher: GPT, keep_hidden: bool = False) -> Rollout:
    """Scores given answers, cut to T tokens, with one pass of each model. The rollout is what
    sample() would return if q had drawn them, with KL[q || p] at each position."""
    answers = [answer[:T] for answer in answers]
    rollout = Rollout.empty(prompts, T, m, teacher.config.n_embd if keep_hidden else 0)
    rollout.reverse_kl = torch.zeros_like(rollout.student_logp)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + len(answers[row]))
    for rows in data.slices(order, m.room(T, student.config.vocab_size)):
        batch = data.pad_right([prompts[r] for r in rows], [answers[r] for r in rows], m.device)
        with m.autocast():
            tokens = batch.tokens[:, :-1]  # the last predicts nothing, and may have no position
            q_hidden = batch.predicting(student(tokens))  # (b, n, D)
            p_hidden = batch.predicting(teacher(tokens))
            log_q = student.logits(q_hidden).log_softmax(-1)  # (b, n, V)
            log_p = teacher.logits(p_hidden).log_softmax(-1)
        n = batch.response.size(1)
        rollout.response[rows, :n] = batch.response
        rollout.student_logp[rows, :n] = taken(log_q, batch.response)
        rollout.teacher_logp[rows, :n] = taken(log_p, batch.response)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)  # (b, n)
        rollout.reverse_kl[rows, :n] = kl * batch.response_mask
        if keep_hidden:
            rollout.teacher_hidden[rows, :n] = p_hidden.to(m.dtype)
    rollout.mixed_logp = rollout.student_logp.clone()
    length = torch.tensor([len(answer) for answer in answers], dtype=torch.int64, device=m.device)
    return rollout.finish(length, student.ends(rollout.response))


def decoder(kind: str) -> tuple[Callable, Callable]:
    """How answers are sampled, and what makes a model ready for it: (sample, ready(model, dtype)).

    "plain" is sample(), above. The others have its signature, and draw from the same distribution:
    "fast"; "captured", which records a step as a CUDA graph; "turns", for a mixture."""
    if kind == "plain":
        return sample, lambda model, dtype: model
    from fast import decode  # sample() above does not need it
    samplers = {"fast": decode.sample, "captured": decode.captured, "turns": decode.by_turns}
    return samplers[kind], decode.frozen


def lengths(positions: int, max_prompt_tokens: int, answer: int | None) -> tuple[int, int]:
    """The longest prompt and the longest answer. An answer has up to 256 tokens, as in the paper,
    or half of the positions if that is less. Longer prompts are dropped."""
    T = answer or min(256, max(1, positions // 2))
    if T >= positions:
        raise UserError(f"--max_response_tokens={T} leaves no room for a prompt in {positions} "
                        "positions")
    return min(max_prompt_tokens, positions + 1 - T, positions - 1), T


# ---- command ----------------------------------------------------------------------------------

def restrict(logp_vocab: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """log-probabilities (b, V) divided by a temperature, cut to the top_k tokens, then to the
    fewest that hold top_p. This is for people who read samples; a student learns from whole p~."""
    ranked, index = (logp_vocab / temperature).sort(-1, descending=True)
    if top_k:
        ranked[:, top_k:] = -torch.inf
    probability = ranked.softmax(-1)
    above = probability.cumsum(-1) - probability  # the probability of what ranks higher
    if top_p < 1:
        ranked[above >= top_p] = -torch.inf
    return ranked.scatter(-1, index, ranked).log_softmax(-1)


@dataclass(frozen=True)
class Config:
    model: str = flag("out/tiny/minillm", "a folder, gpt2 ... gpt2-xl, or OWNER/NAME on the hub")
    teacher: str | None = flag(None, "p, for a mixture as in Eq. (4)")
    mix_alpha: float = flag(0.0, "the teacher's share in the mixture, alpha", 0, 1)
    prompt: str | None = flag(None, "an instruction")
    input: str = flag("", "the input that goes with --prompt", may_be_empty=True)
    data: str | None = flag(None, "answer the rows of --split of this set or .jsonl instead")
    split: Literal["train", "valid", "test"] = flag("test", "of a .jsonl, test is the whole file")
    template: Literal["auto", "paper", "chat"] = flag("auto", "chat: the model's; families/README")
    samples: int = flag(1, "answers to each prompt", 1)
    max_response_tokens: int | None = flag(None, "longest answer; default at most 256", 1, 2**20)
    max_prompt_tokens: int = flag(256, "longer prompts are dropped", 1, 2**20)
    temperature: float = flag(1.0, "near 0 the likeliest token is drawn", 1e-4, 100)
    top_k: int = flag(0, "draw from the likeliest k tokens only; 0 for all", 0)
    top_p: float = flag(1.0, "draw from the fewest tokens that hold this probability", 1e-6, 1)
    seed: int = flag(0, "seed of the draws", 0, 2**62)
    sample_batch: int = flag(64, "answers decoded together", 1)
    decoder: Literal["fast", "captured", "plain"] = flag("fast", "see fast/decode.py")
    out: str | None = flag(None, "write rows for teacher.py --data=THAT instead of printing")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "autocast's dtype")

    def __post_init__(self):
        check(self)
        check_place(self, file="out", ending=".jsonl")  # teacher.py reads it
        if (self.prompt is None) == (self.data is None):
            raise UserError("give one of --prompt and --data")
        if self.prompt is not None and is_blank(self.prompt):
            raise UserError("--prompt holds nothing that can be seen: give an instruction")
        if self.input and self.prompt is None:
            raise UserError("--input goes with --prompt")
        if self.out and os.path.realpath(self.out) == os.path.realpath(self.data or ""):
            raise UserError(f"--out={self.out} would be written over the --data that it answers")
        if bool(self.teacher) != bool(self.mix_alpha):
            raise UserError("--teacher and --mix_alpha make a mixture: give both or neither")


def main(cfg: Config) -> None:
    m = machine(cfg.device, cfg.dtype, cfg.sample_batch)
    tokenizer = data.load_tokenizer(cfg.model, cfg.template)
    if cfg.teacher:
        data.same_vocabulary(tokenizer, data.load_tokenizer(cfg.teacher, cfg.template))
    room = min(read_config(name).n_positions for name in (cfg.model, cfg.teacher) if name)
    if cfg.data:
        longest, T = lengths(room, cfg.max_prompt_tokens, cfg.max_response_tokens)
        examples = data.load_examples(cfg.data, cfg.split, tokenizer, longest, room, m.say)
        rows = [example.row for example in examples]
    else:
        rows = [Row(cfg.prompt, cfg.input)]
        asked = len(data.prompts_of(tokenizer, rows)[0])
        T = cfg.max_response_tokens or max(1, min(256, room + 1 - asked))
    rows = [row for row in rows for _ in range(cfg.samples)]
    prompts = data.prompts_of(tokenizer, rows)
    draw, ready = decoder(cfg.decoder)
    model = ready(load(cfg.model, m.device, m.dtype), m.dtype)
    teacher = ready(load(cfg.teacher, m.device, m.dtype), m.dtype) if cfg.teacher else None
    streamed = len(rows) == 1 and not cfg.out and cfg.decoder != "captured"
    restricted = (cfg.temperature, cfg.top_k, cfg.top_p) != (1.0, 0, 1.0)
    stream = Stream(tokenizer)

    def adjust(logp_vocab: Tensor, rows: list[int], said: Tensor) -> Tensor:
        if streamed:
            stream.show(said[0, len(prompts[0]) :].tolist())
        if restricted:
            return restrict(logp_vocab, cfg.temperature, cfg.top_k, cfg.top_p)
        return logp_vocab

    began = time.perf_counter()
    mine = list(range(m.rank, len(rows), m.world))
    rollout = draw(model, [prompts[i] for i in mine], uniforms(cfg.seed, mine, T), m, teacher,
                   cfg.mix_alpha, adjust if streamed or restricted else None)
    seconds = time.perf_counter() - began
    answers = sorted(m.gather(list(zip(mine, rollout.answers, rollout.ended.tolist()))))
    if m.rank == 0 and streamed:
        print(data.decode(tokenizer, answers[0][1])[stream.shown :])
    elif m.rank == 0:
        lines = []
        for i, answer, ended in answers:
            text = data.decode(tokenizer, answer)
            lines.append({"instruction": rows[i].instruction, "input": rows[i].input,
                          "output": text, "ended": ended, "seed": cfg.seed,
                          "tokens": answer[:-1] if ended else answer})
            if not cfg.out:
                print(f"[{i}] {text}")
        if cfg.out:
            write_lines(Path(cfg.out), lines)
            empty = sum(not line["output"] for line in lines)
            print(f"{cfg.out}: {len(lines):,} answers, {empty:,} of them empty")
    m.barrier()
    count = sum(len(answer) for _, answer, _ in answers)
    if m.rank == 0:
        print(f"{count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s, on "
              f"{m.device} in {str(m.dtype)[6:]}", file=sys.stderr)


if __name__ == "__main__":
    run(main, Config)
