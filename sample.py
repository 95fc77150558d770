"""Decoding from the student q, from the teacher p, or from their mixture p~ = alpha p + (1 - alpha) q.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (4): teacher-mixed sampling. distill.py learns from what comes out here.
Run:      python sample.py --model=out/tiny/minillm --prompt="Tell about the cat"
          python sample.py --model=gpt2 --prompt="Name three colours." --samples=3 --top_p=0.9
          python sample.py --model=out/teacher --data=dolly --split=train --out=out/answers.jsonl       (for SeqKD)
Shapes:   B answers, b of them decoded together, P prompt tokens, T response tokens, D width, V vocabulary.
Left out: beam search (no equation needs it); paged caches and continuous batching, which serve many users.
"""

import codecs
import gc
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
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

import data
from config import Machine, UserError, check, check_place, flag, machine, run, write_lines
from data import Row
from model import GPT, KVCache, by_chunks, frozen, load, predicting, same_vocabulary

# ---- Eq. (4), and one draw ------------------------------------------------------------------------------------------

def mix(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, mix_alpha: float) -> Tensor:
    """log p~ = log(alpha p + (1 - alpha) q). (..., V) each."""
    if mix_alpha in (0.0, 1.0):
        return teacher_logp_vocab if mix_alpha else student_logp_vocab
    of_teacher, of_student = teacher_logp_vocab + math.log(mix_alpha), student_logp_vocab + math.log1p(-mix_alpha)
    return torch.logaddexp(of_teacher, of_student)  # Eq. (4)


def restrict(logp_vocab: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """log-probabilities (b, V) sharpened by a temperature, cut to the top_k tokens, then to the fewest that hold top_p:
    for people who read samples. A rollout to learn from is never restricted."""
    if temperature == 1 and not top_k and top_p == 1:
        return logp_vocab
    logp_vocab = (logp_vocab / temperature).log_softmax(-1)
    if top_k:
        least = logp_vocab.topk(min(top_k, logp_vocab.size(-1)), dim=-1).values[:, -1:]
        logp_vocab = logp_vocab.masked_fill(logp_vocab < least, -torch.inf).log_softmax(-1)
    if top_p < 1:
        ranked, index = logp_vocab.sort(-1, descending=True)
        beyond = ranked.exp().cumsum(-1) - ranked.exp() >= top_p  # what ranks higher holds top_p already
        logp_vocab = logp_vocab.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf).log_softmax(-1)
    return logp_vocab


def without_repeats(logp_vocab: Tensor, seen: Tensor, n: int) -> Tensor:
    """log-probabilities (b, V) without tokens that would repeat an n-gram of `seen` (b, S), prompt and answer so far,
    where -1 is padding. The released code tests with n = 6, which the paper does not mention."""
    if seen.size(1) < n:
        return logp_vocab
    ngrams = seen.unfold(1, n, 1)  # (b, S - n + 1, n)
    repeated = (ngrams[..., :-1] == seen[:, None, seen.size(1) - n + 1 :]).all(-1) & (ngrams >= 0).all(-1)
    counts = torch.zeros_like(logp_vocab).scatter_add_(1, ngrams[..., -1].clamp(min=0), repeated.to(logp_vocab.dtype))
    return logp_vocab.masked_fill(counts > 0, -torch.inf).log_softmax(-1)


def inverse_cdf(logp_vocab: Tensor, uniform: Tensor) -> Tensor:
    """The token (b,) at which each row's distribution function first exceeds uniform (b,), in [0, 1).

    A token of probability 0 is a step of height 0, and never taken. The last sum stands for 1, so that rounding cannot
    lead beyond the vocabulary."""
    cdf = logp_vocab.exp().cumsum(-1, dtype=torch.float64)  # (b, V)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return token.clamp(max=logp_vocab.size(-1) - 1)  # beyond it for rows of NaN, which sample() reports


def uniforms(seed: int, answers: Iterable[int], length: int) -> Tensor:
    """(B, T) float64 numbers in [0, 1), each answer's from a stream of its own: an answer depends neither on the batch
    that it is decoded in, nor on the number of processes, nor on what was sampled before."""
    streams = (np.random.Generator(np.random.Philox(key=[seed, answer])) for answer in answers)
    return torch.from_numpy(np.array([stream.random(length) for stream in streams]).reshape(-1, length))


def turns(seed: int, collection: int, answers: Iterable[int], length: int, mix_alpha: float, groups: int) -> Tensor:
    """(B, T) bool: whether the teacher draws a token, which it does with probability alpha. That is Eq. (4) too: a draw
    from alpha p + (1 - alpha) q is one from p with probability alpha, else one from q.

    Answer i of a collection has the turns of group i % groups. Within an answer they are independent; over the groups
    they are spread evenly, so that at each position the teacher draws for alpha of them, rounded up or down."""
    key = np.array([seed + 2**63, collection], dtype=np.uint64)  # not an answer's: their seeds are smaller
    stream = np.random.Generator(np.random.Philox(key=key))
    group = np.array([i % groups for i in answers], dtype=np.int64)  # (B,)
    uniform = (stream.random(length) + group[:, None] / groups) % 1  # (B, T)
    return torch.from_numpy(uniform < mix_alpha)


def taken(logp_vocab: Tensor, token: Tensor) -> Tensor:
    """(..., V), (...) -> (...)"""
    return logp_vocab.gather(-1, token[..., None]).squeeze(-1)


# ---- rollouts -------------------------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """Answers, and what was known of them when they were sampled. Entries outside response_mask are 0."""
    prompts: list[list[int]]
    response: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, T) bool, true through the end token, inclusive
    ended: Tensor  # (B,) bool, false where an answer ran out of length
    student_logp: Tensor  # (B, T) log q(y_t)
    mixed_logp: Tensor  # (B, T) log-probability under what y_t was drawn from: p~, Eq. (4), restricted if asked for
    teacher_logp: Tensor | None = None  # (B, T) log p(y_t)
    reverse_kl: Tensor | None = None  # (B, T) KL[q || p] over the vocabulary at each position; from follow() only
    teacher_hidden: Tensor | None = None  # (B, T, D) the teacher's last hidden state, from which it predicts y_t

    @cached_property
    def answers(self) -> list[list[int]]:
        """The tokens of each response, its end token included."""
        return [row[:n] for row, n in zip(self.response.tolist(), self.response_mask.sum(1).tolist())]


def record(function: Callable) -> Callable:
    """Records a function that works in place on a GPU as a CUDA graph, without running it. What is returned replays it:
    the host then gives one order instead of a thousand."""
    graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()  # freeing something of the GPU's would break the recording
    gc.freeze()  # torch before 2.9 collects before each recording, which would walk through all rows of the data
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads, NCCL's, may go on
            function()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return graph.replay


class Decoder:
    """Rows of a rollout that are decoded together. A step works in place, and on the device alone, so that it can be
    recorded."""

    def __init__(self, models: list[GPT], batch: list[int], rollout: Rollout, length: Tensor, uniform: Tensor,
                 m: Machine, draw_from: Callable, no_repeat_ngram: int, turn: list[bool] | None):
        self.models, self.rollout, self.length, self.uniform, self.m = models, rollout, length, uniform, m
        self.draw_from, prompts = draw_from, [rollout.prompts[row] for row in batch]
        self.tokens, self.starts = data.pad_left(prompts, m.device)  # (b, P), later the last ones drawn (b, 1); (b,)
        self.padded = len({len(prompt) for prompt in prompts}) > 1
        self.P, self.width = self.tokens.size(1), self.tokens.size(1) + uniform.size(1) - 1
        self.rows, self.done = torch.tensor(batch, device=m.device), torch.zeros_like(self.starts).bool()
        room = min(model.config.n_positions for model in models)
        if self.width > room:
            raise UserError(f"a prompt of {self.P} tokens and {uniform.size(1)} new ones do not fit into {room} "
                            "positions")
        self.caches = [KVCache(model.config, len(batch), self.width, m.device, m.dtype, m.capture) for model in models]
        self.t = torch.zeros(1, dtype=torch.int64, device=m.device)
        self.no_repeat_ngram, padding = no_repeat_ngram, torch.arange(self.P, device=m.device) < self.starts[:, None]
        self.seen = self.tokens.masked_fill(padding, -1) if no_repeat_ngram else None  # (b, P + t)
        self.shape, self.replay = None, None  # of the recorded step
        # by turns `tokens` stay the prompts; `noted`: how many of an answer's tokens each model has given a probability
        self.turn, self.noted = turn, [0, 0]

    def advance(self, t: int) -> None:
        """Draws y_t of every row."""
        if self.turn is not None:
            return self.read(int(self.turn[t]), t, draws=True)
        if not self.m.capture or t == 0:
            self.tokens = self.step()
            return
        for cache in self.caches:
            cache.length = self.P + t - 1
            cache.width = min(self.width, -(-(cache.length + 1) // 128) * 128)  # a recording for each 128 columns
        step, shape = lambda: self.tokens.copy_(self.step()), (len(self.rows), cache.width)
        if shape != self.shape:  # the old recording goes before there is another: they would share cuBLAS's workspace
            self.shape, self.replay = shape, None
            step()
        else:  # it has run once as it is
            self.replay = self.replay or record(step)
            self.replay()

    def step(self) -> Tensor:
        """The tokens drawn, (b, 1), behind those fed; what a rollout keeps of them is noted."""
        rows, t, out = self.rows, self.t, self.rollout
        with self.m.autocast():
            hidden = [model(self.tokens, self.starts if self.padded else None, cache, np.s_[:, -1])  # (b, D) each
                      for model, cache in zip(self.models, self.caches)]
            logp_vocab = [model.logits(h).log_softmax(-1) for model, h in zip(self.models, hidden)]  # (b, V) each
        log_q, log_p = logp_vocab[0], logp_vocab[-1]
        drawn_from = self.draw_from(log_q, log_p)  # (b, V)
        if self.seen is not None:
            drawn_from = without_repeats(drawn_from, self.seen, self.no_repeat_ngram)
        token = inverse_cdf(drawn_from, self.uniform[rows, t])  # (b,)
        self.say(token, t)
        out.student_logp[rows, t], out.mixed_logp[rows, t] = taken(log_q, token), taken(drawn_from, token)
        if out.teacher_logp is not None:
            out.teacher_logp[rows, t] = taken(log_p, token)
        if out.teacher_hidden is not None:
            out.teacher_hidden[rows, t] = hidden[1].to(self.m.dtype)
        self.t.add_(1)
        if self.seen is not None:
            self.seen = torch.cat([self.seen, token[:, None]], 1)
        return token[:, None]

    def say(self, token: Tensor, t: int | Tensor) -> None:
        """Notes y_t of each row, (b,), and which rows it ends."""
        self.rollout.response[self.rows, t] = token
        self.length[self.rows] = torch.where(self.done, self.length[self.rows], t + 1)
        self.done.logical_or_(token == self.models[0].config.eos_token_id)

    def read(self, which: int, t: int, draws: bool) -> None:
        """The student (0) or the teacher (1) reads in one pass what was said since it last read, draws y_t if it is its
        turn, and notes its log-probability of each token up to y_t."""
        model, cache, out, first = self.models[which], self.caches[which], self.rollout, self.noted[which]
        text = torch.cat([self.tokens, out.response[self.rows, :t]], 1)[:, cache.length :]  # (b, n)
        with self.m.autocast():
            unnoted = np.s_[:, first - t - 1 :]  # what y_first to y_t are predicted from
            hidden = model(text, self.starts if self.padded else None, cache, unnoted)  # (b, n, D)
            for part in hidden.split(max(1, self.m.vocab_chunk // len(text)), 1):
                logp_vocab, upto = model.logits(part).log_softmax(-1), first + part.size(1)  # (b, n, V)
                if draws and upto == t + 1:
                    self.say(inverse_cdf(logp_vocab[:, -1], self.uniform[self.rows, t]), t)
                logp = taken(logp_vocab, out.response[self.rows, first:upto])
                (out.teacher_logp if which else out.student_logp)[self.rows, first:upto] = logp
                if which and out.teacher_hidden is not None:
                    out.teacher_hidden[self.rows, first:upto] = part.to(self.m.dtype)
                first = upto
        self.noted[which] = t + 1

    def catch_up(self, t: int) -> None:
        """Each model reads what it has not."""
        for which in range(2):
            if self.turn is not None and self.noted[which] <= t:
                self.read(which, t, draws=False)

    def keep_alive(self, t: int) -> bool:
        """Whether any row goes on. Drops those that have ended once they are many: copying caches costs something, and
        recording for fewer rows more."""
        alive = (~self.done).nonzero().squeeze(1)
        if 0 < len(alive) <= (0.5 if self.m.capture else 0.75) * len(self.rows):
            self.catch_up(t)
            self.rows, self.done, self.tokens, self.starts = (
                values[alive] for values in (self.rows, self.done, self.tokens, self.starts))
            self.seen = None if self.seen is None else self.seen[alive]
            for cache in self.caches:
                cache.keep(alive)
        return len(alive) > 0


@torch.no_grad()
def sample(student: GPT, prompts: list[list[int]], uniform: Tensor, m: Machine, teacher: GPT | None = None,
           mix_alpha: float = 0.0, batch_size: int = 64, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
           no_repeat_ngram: int = 0, keep_hidden: bool = False, on_token: Callable | None = None,
           progress: str = "", turn: Tensor | None = None) -> Rollout:
    """An answer of at most T tokens to each of B prompts, drawn from Eq. (4)'s mixture; uniform (B, T) sets T.

    Both models read a prompt once, then advance together, token by token. With turn (B, T), from `turns`, the one whose
    turn it is draws alone, and the other reads its tokens later, several in one pass. Prompts of like length and with
    the same turns are decoded together, and rows that have ended leave. on_token(row, token) is called for each token
    as it is drawn. Pass `frozen` models."""
    (B, T), device = uniform.shape, m.device
    if mix_alpha and teacher is None:
        raise UserError(f"--mix_alpha={mix_alpha} mixes with a teacher: give --teacher")
    if no_repeat_ngram == 1:
        raise UserError("--no_repeat_ngram=1 would let no token be said twice: give 2 or more, or 0")
    plain = (temperature, top_k, top_p, no_repeat_ngram) == (1, 0, 1, 0)
    if turn is not None and (teacher is None or m.capture or on_token or not plain):
        raise UserError("--turns needs a teacher, and goes with neither --capture, streaming nor a rule on what is "
                        "drawn: give --turns=0")
    if no_repeat_ngram and m.capture:
        raise UserError("--no_repeat_ngram looks back over more tokens at each step, and --capture records one step")
    new = lambda *shape, dtype=torch.float32: torch.zeros(B, *shape, dtype=dtype, device=device)
    rollout = Rollout(prompts, response=new(T, dtype=torch.int64), response_mask=new(T, dtype=torch.bool),
                      ended=new(dtype=torch.bool), student_logp=new(T), mixed_logp=new(T))
    if teacher:
        rollout.teacher_logp = new(T)
    if teacher and keep_hidden:
        rollout.teacher_hidden = new(T, teacher.config.n_embd, dtype=m.dtype)
    draw_from = lambda log_q, log_p: restrict(mix(log_q, log_p, mix_alpha), temperature, top_k, top_p)
    length, uniform = new(dtype=torch.int64), uniform.to(device)
    look_every = 16 if device.type == "cuda" else 1  # to ask which rows have ended is to wait for the device
    together = [None] * B if turn is None else turn.tolist()  # rows where it is equal may be decoded together
    order = sorted(range(B), key=lambda row: (together[row], -len(prompts[row])))  # longest first
    bar = tqdm(total=B, desc=progress, unit=" answers", leave=False, delay=2,
               disable=not progress or m.rank > 0 or None)  # None: unless a terminal shows it
    while order:
        its_turns, fits = together[order[0]], True
        batch = [row for row in order[:batch_size] if together[row] == its_turns]
        try:
            decoder = Decoder([student, teacher] if teacher else [student], batch, rollout, length, uniform, m,
                              draw_from, no_repeat_ngram, its_turns)
            for t in range(T):
                before = decoder.done.tolist() if on_token else []
                decoder.advance(t)
                if on_token:
                    for row, ended, token in zip(decoder.rows.tolist(), before, decoder.tokens.squeeze(1).tolist()):
                        ended or on_token(row, token)
                if (t + 1) % look_every == 0 and not decoder.keep_alive(t):
                    break
            decoder.catch_up(t)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1 or on_token:  # tokens told once cannot be taken back
                raise
            fits = False
        decoder = None  # its caches go before there are others
        if fits:
            order = order[len(batch) :]
            bar.update(len(batch))
        else:  # an answer does not depend on its company
            torch.cuda.empty_cache()
            batch_size = len(batch) // 2
            print(f"out of memory: {len(batch)} answers were too many to decode together, {batch_size} are tried")
    bar.close()
    rollout.response_mask = torch.arange(T, device=device) < length[:, None]  # (B, T)
    if turn is not None:
        rollout.mixed_logp = mix(rollout.student_logp, rollout.teacher_logp, mix_alpha)
    for values in (rollout.response, rollout.student_logp, rollout.mixed_logp, rollout.teacher_logp):
        if values is not None:  # a row that has ended goes on until it leaves
            values.masked_fill_(~rollout.response_mask, 0)
    if rollout.mixed_logp.isnan().any():
        raise UserError("the model's probabilities are not numbers: its weights are broken, or --dtype is too coarse")
    rollout.ended = rollout.response.gather(1, length[:, None] - 1).squeeze(1) == student.config.eos_token_id
    return rollout


@torch.no_grad()
def follow(student: GPT, prompts: list[list[int]], answers: list[list[int]], T: int, m: Machine, teacher: GPT,
           batch_size: int = 16, keep_hidden: bool = False) -> Rollout:
    """A rollout of given answers, references or another rollout's, cut to T tokens: what sample() would know had it
    drawn them from q, and KL[q || p] (KL[p || q] if the models change places), by one pass of each. Pass `frozen`
    models."""
    B, answers, end = len(prompts), [answer[:T] for answer in answers], student.config.eos_token_id
    new = lambda *shape, dtype=torch.float32: torch.zeros(B, *shape, dtype=dtype, device=m.device)
    ended = torch.tensor([answer[-1:] == [end] for answer in answers], dtype=torch.bool, device=m.device)
    rollout = Rollout(prompts, new(T, dtype=torch.int64), new(T, dtype=torch.bool), ended, student_logp=new(T),
                      mixed_logp=new(T), teacher_logp=new(T), reverse_kl=new(T))
    if keep_hidden:
        rollout.teacher_hidden = new(T, teacher.config.n_embd, dtype=m.dtype)

    def terms(of_student: Tensor, of_teacher: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_q = student.logits(of_student).log_softmax(-1)  # (chunk, V)
        log_p = teacher.logits(of_teacher).log_softmax(-1)
        return taken(log_q, y), taken(log_p, y), (log_q.exp() * (log_q - log_p)).sum(-1)

    order = sorted(range(B), key=lambda row: len(prompts[row]) + len(answers[row]))
    for at in range(0, B, batch_size):
        rows = order[at : at + batch_size]
        of_rows = [prompts[row] for row in rows]
        tokens, response, mask = data.pad_right(of_rows, [answers[row] for row in rows], m.device)
        row, t = mask.nonzero(as_tuple=True)
        place = torch.tensor(rows, device=m.device)[row], t  # of each response token in the rollout
        with m.autocast():
            where = predicting(of_rows, mask)
            # without the last token, which predicts nothing and may have no position
            hidden = [model(tokens[:, :-1], where=where) for model in (student, teacher)]  # (N, D) each
            values = by_chunks(terms, m.vocab_chunk, *hidden, response[mask])  # (N,) each
        rollout.response[place], rollout.response_mask[place] = response[mask], True
        for name, value in zip(("student_logp", "teacher_logp", "reverse_kl"), values):
            getattr(rollout, name)[place] = value
        if keep_hidden:
            rollout.teacher_hidden[place] = hidden[1].to(m.dtype)
    rollout.mixed_logp = rollout.student_logp
    return rollout


def room_for_answers(model: GPT, prompts: list[list[int]]) -> int:
    """The paper's 256 tokens, or as many as fit behind the longest prompt."""
    return max(1, min(256, model.config.n_positions + 1 - max(map(len, prompts))))


# ---- command --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    model: str = flag("out/tiny/minillm", "what to sample from: a folder, gpt2 ... gpt2-xl, OWNER/NAME on the hub")
    teacher: str | None = flag(None, "second model of the mixture, p in Eq. (4)")
    mix_alpha: float = flag(0.0, "share of the teacher in the mixture, alpha in Eq. (4)")
    prompt: str | None = flag(None, "an instruction; the template is put around it")
    input: str = flag("", "its optional input", may_be_empty=True)
    raw: bool = flag(False, "take --prompt, or the lines of --prompts, as they are, without the template")
    prompts: str | None = flag(None, "a file of instructions: .jsonl rows, or one a line")
    data: str | None = flag(None, "an instruction set by name or .jsonl, all of --split")
    split: Literal["train", "valid", "test"] = flag("test", "which part of --data")
    samples: int = flag(1, "answers to each prompt")
    max_response_tokens: int | None = flag(None, "longest answer; default 256, or what the model has room for")
    max_prompt_tokens: int = flag(256, "longer prompts of --data are dropped")
    temperature: float = flag(1.0, "divides the logits; near 0 the likeliest token always")
    top_k: int = flag(0, "draw from the likeliest k tokens only; 0 for all")
    top_p: float = flag(1.0, "draw from the fewest tokens that hold this probability")
    no_repeat_ngram: int = flag(0, "never say so many tokens in a row twice, nor the prompt's; 0 for no such rule")
    seed: int = flag(0, "of the draws")
    batch_size: int = flag(64, "answers decoded together")
    limit: int | None = flag(None, "use the first so many prompts only")
    capture: bool = flag(False, "on a GPU: record a decoding step as a CUDA graph, and replay it")
    out: str | None = flag(None, "write a .jsonl of rows (for SeqKD: teacher.py --data=THAT) instead of printing")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "what autocast computes in")

    def __post_init__(self):
        check(self, mix_alpha=(0, 1), samples=(1, 10**6), max_response_tokens=(1, 1023), max_prompt_tokens=(1, 1023),
              temperature=(1e-4, 100), top_k=(0, 10**6), top_p=(1e-6, 1), no_repeat_ngram=(0, 1024), seed=(0, 2**62),
              batch_size=(1, 10**5), limit=(1, 10**9))
        if [self.prompt, self.prompts, self.data].count(None) != 2:
            raise UserError("give one of --prompt, --prompts and --data")
        check_place(self, file="out")
        if self.out and os.path.realpath(self.out) in map(os.path.realpath, (self.prompts or "", self.data or "")):
            raise UserError(f"--out={self.out} would be written over what is read from it: give another name")
        if self.input and (self.prompt is None or self.raw):
            raise UserError("--input goes with --prompt, into the template")
        if self.raw and self.data:
            raise UserError("--raw goes with --prompt or --prompts; the rows of --data have the template")
        if self.teacher and not self.mix_alpha:
            raise UserError(f"--teacher={self.teacher} does nothing without --mix_alpha")


class Printer:
    """Prints answers as they are drawn: a single one token by token, each of several once it is complete."""

    def __init__(self, tokenizer: tiktoken.Encoding, count: int):
        self.tokenizer, self.single, self.tokens = tokenizer, count == 1, [[] for _ in range(count)]
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over tokens

    def __call__(self, row: int, token: int) -> None:
        self.tokens[row].append(token)
        if self.single and token != self.tokenizer.eot_token:
            print(self.utf8.decode(self.tokenizer.decode_single_token_bytes(token)), end="", flush=True)
        elif token == self.tokenizer.eot_token:
            self.finish(row)

    def finish(self, row: int) -> None:
        whole = f"[{row}] {data.decode(self.tokenizer, self.tokens[row])}"
        print(self.utf8.decode(b"", final=True) if self.single else whole, flush=True)


def read_prompts(cfg: Config, tokenizer: tiktoken.Encoding, say: Callable) -> tuple[list[Row], list[list[int]]]:
    if cfg.data:
        examples = data.load_examples(cfg.data, cfg.split, tokenizer, cfg.max_prompt_tokens, 1024, say)
        return [e.row for e in examples], [e.prompt for e in examples]
    rows = [Row(cfg.prompt, cfg.input)] if cfg.prompt is not None else []
    if cfg.prompts and cfg.prompts.lower().endswith((".jsonl", ".json")):
        rows = data.read_rows(Path(cfg.prompts), need_output=False)
    elif cfg.prompts:
        try:
            rows = [Row(line) for line in Path(cfg.prompts).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except UnicodeDecodeError:
            raise UserError(f"{cfg.prompts}: not UTF-8 text") from None
        except OSError as error:
            raise UserError(f"{cfg.prompts}: {error.strerror}") from None
    prompts = data.encode(tokenizer, [row.instruction if cfg.raw else row.prompt_text for row in rows])
    if not rows or not all(prompts) or not all(row.instruction.strip() for row in rows):
        raise UserError(f"{cfg.prompts or '--prompt'}: there is no prompt in it; a model needs a token to begin with")
    return rows, prompts


def main(cfg: Config) -> None:
    m, tokenizer = machine(cfg.device, cfg.dtype, capture=cfg.capture), data.load_tokenizer(cfg.model)
    rows, prompts = read_prompts(cfg, tokenizer, m.say)
    rows, prompts = ([x for x in xs[: cfg.limit] for _ in range(cfg.samples)] for xs in (rows, prompts))
    model = frozen(load(cfg.model, m.device), m.dtype)
    teacher = frozen(load(cfg.teacher, m.device), m.dtype) if cfg.teacher else None
    if teacher:
        same_vocabulary(model.config, teacher.config)
    longest = cfg.max_response_tokens or room_for_answers(model, prompts)
    mine = range(m.rank, len(rows), m.world)
    printer, began = None if cfg.out else Printer(tokenizer, len(rows)), time.perf_counter()
    rollout = sample(model, [prompts[i] for i in mine], uniforms(cfg.seed, mine, longest), m, teacher, cfg.mix_alpha,
                     cfg.batch_size, cfg.temperature, cfg.top_k, cfg.top_p, cfg.no_repeat_ngram,
                     on_token=printer, progress="sampling" if cfg.out else "")
    seconds, answers = time.perf_counter() - began, m.gather(list(zip(mine, rollout.answers, rollout.ended.tolist())))
    if printer:
        for row in (~rollout.ended).nonzero().squeeze(1).tolist():
            printer.finish(row)
    elif m.rank == 0:
        lines = [{"instruction": rows[i].instruction, "input": rows[i].input, "output": data.decode(tokenizer, answer),
                  "ended": ended, "seed": cfg.seed} for i, answer, ended in sorted(answers)]
        kept = [line for line in lines if line["output"].strip()]
        write_lines(Path(cfg.out), kept)
        empty = len(lines) - len(kept)
        print(f"{cfg.out}: {len(kept):,} answers" + f", {empty:,} empty ones left out" * (empty > 0))
    m.barrier()
    if m.rank == 0:
        count = sum(len(answer) for _, answer, _ in answers)
        print(f"{count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s, on {m.device} in "
              f"{str(m.dtype)[6:]}", file=sys.stderr)


if __name__ == "__main__":
    run(main, Config)
