"""The fast decoder: it samples from the distribution of `sample.sample`, in less time.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (4). Read sample.sample first: from the same uniform
          numbers, sample() and captured() draw the same tokens, and a test holds them to it.
Shapes:   B answers, b of them decoded together, P prompt tokens, T response tokens, V vocabulary.

By turns. A draw from alpha p + (1 - alpha) q takes two steps: toss a coin that shows heads with
probability alpha, then draw from p on heads and from q on tails. So at each position only the model
whose turn it is has to speak. The other one need not run there: when its own turn comes, it reads
all that was said since, several tokens in one pass, which costs little more than one token. With
alpha = 0.2 a large teacher runs at every fifth position.

The coins do not depend on what is said. They can be tossed in advance, and the answers of a group
can share them: their turns are then the same, and they can be decoded together. An answer depends
on its own uniforms and its group's coins alone, so its law is Eq. (4), whatever its company. But
two answers of one group are no longer independent of each other.
"""

import gc
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import data
from config import Machine, UserError
from fast.packed import PackedLinear, frozen
from model import GPT, KVCache
from safe.runs import close_holes
from sample import Rollout, inverse_cdf, mix, taken

__all__ = ["PackedLinear", "by_turns", "captured", "frozen", "sample", "turns"]


class Together:
    """Answers that are decoded together. What is drawn goes into their rows of the rollout."""

    def __init__(self, models: list[GPT], rollout: Rollout, uniform: Tensor, m: Machine,
                 rows: list[int], recorded: bool):
        self.models, self.rollout, self.uniform, self.m = models, rollout, uniform, m
        prompts = [rollout.prompts[row] for row in rows]
        self.prompts, starts = data.pad_left(prompts, m.device)  # (b, P), (b,)
        padded = min(map(len, prompts)) < self.prompts.size(1) or recorded
        self.starts = starts if padded else None  # without it attention needs no mask
        self.rows = torch.tensor(rows, device=m.device)  # (b,) the numbers of the answers
        self.done = torch.zeros_like(starts).bool()  # (b,) whether an answer has ended
        self.t = torch.zeros(1, dtype=torch.int64, device=m.device)  # the position drawn next
        columns = self.prompts.size(1) + uniform.size(1) - 1
        room = min(model.config.n_positions for model in models)
        if columns > room:
            raise UserError(f"a prompt of {self.prompts.size(1)} tokens and {uniform.size(1)} new "
                            f"ones do not fit into {room} positions")
        self.caches = []
        for model in models:
            new_cache = RecordedCache if recorded else model.new_cache
            self.caches.append(new_cache(model.config, len(rows), columns, m.device, m.dtype))

    def going_on(self, t: int, share: float = 0.75) -> Tensor:
        """The places (b',) in the batch of the answers to go on with behind y_t. They are all of
        them until no more than this share has not ended, as copying caches costs something too."""
        everyone = torch.arange(len(self.rows), device=self.m.device)
        if self.m.device.type == "cuda" and (t + 1) % 16:  # to ask a GPU is to wait for it
            return everyone
        alive = (~self.done).nonzero().squeeze(1)
        return alive if len(alive) <= share * len(everyone) else everyone

    def keep(self, places: Tensor) -> None:
        """Drops all answers but these."""
        if len(places) == len(self.rows):
            return
        self.rows, self.prompts, self.done = (
            values[places] for values in (self.rows, self.prompts, self.done))
        self.starts = None if self.starts is None else self.starts[places]
        for cache in self.caches:
            cache.keep(places)


def draw(models: list[GPT], prompts: list[list[int]], uniform: Tensor, m: Machine,
         decode: Callable, groups: Iterable[list[int]], recorded: bool = False) -> Rollout:
    """Calls decode(Together) for the rows of each group, m.sample_batch at a time. Where a GPU has
    no room for so many, it goes on with half as many: an answer does not depend on its company."""
    rollout = Rollout.empty(prompts, uniform.size(1), m, sum(p.config.n_embd for p in models[1:]))
    uniform = uniform.to(m.device)
    size = m.sample_batch
    for group in groups:
        group = sorted(group, key=lambda row: -len(prompts[row]))  # like lengths share a batch
        while group:
            rows, fits = group[:size], True
            try:
                decode(Together(models, rollout, uniform, m, rows, recorded))
            except torch.cuda.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                fits = False  # the error holds the caches, so they go at the end of this block
            if fits:
                group = group[size:]
            else:
                torch.cuda.empty_cache()
                size = len(rows) // 2
                print(f"out of memory: {len(rows)} answers were too many to decode together, "
                      f"{size} are tried")
    ends = models[0].ends(rollout.response)  # (B, T); a row may have gone on behind the first
    length = torch.where(ends.any(1), ends.int().argmax(1) + 1, ends.size(1))
    close_holes()  # an update's tensors would not fit into those that the caches leave
    return rollout.finish(length, ends)


# ---- both models walk together ----------------------------------------------------------------

def step(batch: Together, mix_alpha: float, adjust: Callable | None = None) -> None:
    """The models read each answer's last token, or its prompt, and its next token is drawn. This
    happens in place, and on the device alone, so that it can be recorded."""
    rows, t, rollout = batch.rows, batch.t, batch.rollout
    tokens = batch.prompts  # (b, P)
    if batch.caches[0].length:
        tokens = rollout.response[rows, t - 1][:, None]  # (b, 1)
    with batch.m.autocast():
        hidden = [model(tokens, batch.starts, cache)[:, -1]  # (b, D) each
                  for model, cache in zip(batch.models, batch.caches)]
        logp_vocab = [model.logits(h).log_softmax(-1)  # (b, V) each
                      for model, h in zip(batch.models, hidden)]
    drawn_from = mix(logp_vocab[0], logp_vocab[-1], mix_alpha)  # Eq. (4)
    if adjust:
        drawn_from = adjust(drawn_from, rows.tolist(), said(batch))
    token = inverse_cdf(drawn_from, batch.uniform[rows, t])  # (b,)
    rollout.response[rows, t] = token
    rollout.student_logp[rows, t] = taken(logp_vocab[0], token)
    rollout.mixed_logp[rows, t] = taken(drawn_from, token)
    if len(batch.models) == 2:
        rollout.teacher_logp[rows, t] = taken(logp_vocab[1], token)
        rollout.teacher_hidden[rows, t] = hidden[1].to(batch.m.dtype)
    batch.done |= batch.models[0].ends(token)
    batch.t += 1


def said(batch: Together) -> Tensor:
    """(b, P + t): each prompt and its answer so far, with -1 for padding."""
    prompts = batch.prompts
    if batch.starts is not None:
        column = torch.arange(prompts.size(1), device=prompts.device)
        prompts = prompts.masked_fill(column < batch.starts[:, None], -1)
    return torch.cat([prompts, batch.rollout.response[batch.rows, : int(batch.t)]], 1)


@torch.no_grad()
def sample(student: GPT, prompts: list[list[int]], uniform: Tensor, m: Machine,
           teacher: GPT | None = None, mix_alpha: float = 0.0,
           adjust: Callable | None = None) -> Rollout:
    """What sample.sample draws, from `frozen` models; rows that have ended leave their batch."""
    def decode(batch: Together) -> None:
        for t in range(uniform.size(1)):
            step(batch, mix_alpha, adjust)
            batch.keep(batch.going_on(t))
            if not len(batch.rows):
                break

    models = [student, teacher] if teacher else [student]
    return draw(models, prompts, uniform, m, decode, [range(len(prompts))])


# ---- steps recorded as CUDA graphs ------------------------------------------------------------

class RecordedCache(KVCache):
    """A cache for steps that are recorded. A recording cannot depend on numbers that the host
    counts: a token's place is read from a tensor, and a multiple of 128 columns is attended to.
    The mask hides those that are empty."""

    def __init__(self, *given):
        super().__init__(*given)
        self.place = torch.zeros(1, dtype=torch.int64, device=self.layers[0].device)

    def positions(self, T: int) -> Tensor:
        return self.place + torch.arange(T, device=self.place.device)

    def columns(self, T: int) -> int:
        return min(-(-(self.length + T) // 128) * 128, self.layers[0].size(3))

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kv, T = self.layers[layer], k.size(2)
        kv.index_copy_(3, self.positions(T), torch.stack([k, v]).to(kv.dtype))
        keys, values = kv[:, :, :, : self.columns(T)]
        return keys, values

    def advance(self, T: int) -> None:
        super().advance(T)
        self.place += T


def record(function: Callable) -> Callable:
    """Records a function that works in place on a GPU as a CUDA graph, without running it. What is
    returned replays it: the host then gives one order instead of a thousand."""
    graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()  # to free something of the GPU's would break the recording
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's may go on
            function()
    finally:
        if collecting:
            gc.enable()
    return graph.replay


@torch.no_grad()
def captured(student: GPT, prompts: list[list[int]], uniform: Tensor, m: Machine,
             teacher: GPT | None = None, mix_alpha: float = 0.0,
             adjust: Callable | None = None) -> Rollout:
    """What sample() draws. A step is recorded for each number of rows and each 128 columns."""
    if m.device.type != "cuda" or adjust:
        raise UserError("--decoder=captured replays the steps of a GPU, and can change nothing "
                        "between two of them: take --decoder=fast")
    if not isinstance(student, GPT):
        raise UserError("--decoder=captured knows the steps of a GPT-2 alone: take --decoder=fast")

    def decode(batch: Together) -> None:
        shape = replay = None
        for t in range(uniform.size(1)):
            for cache in batch.caches:  # a replay does not count
                cache.length = batch.prompts.size(1) + t - 1 if t else 0
            now = (len(batch.rows), batch.caches[0].columns(1), t > 0)
            if now != shape:  # a step must run once before it is recorded
                shape, replay = now, None  # two recordings would share cuBLAS's memory
                step(batch, mix_alpha)
            else:
                replay = replay or record(partial(step, batch, mix_alpha))
                replay()
            batch.keep(batch.going_on(t, share=0.5))
            if not len(batch.rows):
                break

    models = [student, teacher] if teacher else [student]
    return draw(models, prompts, uniform, m, decode, [range(len(prompts))], recorded=True)


# ---- one model at a time ----------------------------------------------------------------------

def turns(seed: int, collection: int, answers: Iterable[int], length: int, mix_alpha: float,
          groups: int = 4) -> Tensor:
    """(B, T) bool: whether it is the teacher's turn, which has probability alpha.

    Answer i of a collection has the turns of group i % groups. Within an answer they are
    independent. Over the groups they are spread evenly: at each position the teacher draws for
    alpha of them, rounded up or down."""
    key = np.array([seed + 2**63, collection], dtype=np.uint64)  # uniforms() has smaller keys
    stream = np.random.Generator(np.random.Philox(key=key))
    group = np.array([i % groups for i in answers], dtype=np.int64)  # (B,)
    uniform = (stream.random(length) + group[:, None] / groups) % 1  # (B, T)
    return torch.from_numpy(uniform < mix_alpha)


def read(batch: Together, which: int, t: int, draws: bool) -> None:
    """The student (0) or the teacher (1) reads in one pass the tokens before y_t that it has not
    read. If it `draws`, y_t is drawn from it. It notes the log-probability of each of them, and of
    y_t."""
    model, cache = batch.models[which], batch.caches[which]
    rollout, rows = batch.rollout, batch.rows
    text = torch.cat([batch.prompts, rollout.response[rows, :t]], 1)  # (b, P + t)
    first = max(0, cache.length + 1 - batch.prompts.size(1))  # it has noted those before y_first
    with batch.m.autocast():
        hidden = model(text[:, cache.length :], batch.starts, cache)  # (b, n, D)
        predicting = hidden[:, first - t - 1 :]  # y_first to y_t
        for part in predicting.split(batch.m.room(len(rows), model.config.vocab_size), 1):
            logp_vocab = model.logits(part).log_softmax(-1)  # (b, chunk, V)
            after = first + part.size(1)
            if draws and after == t + 1:
                token = inverse_cdf(logp_vocab[:, -1], batch.uniform[rows, t])  # (b,)
                rollout.response[rows, t] = token
                batch.done |= batch.models[0].ends(token)
            logp = taken(logp_vocab, rollout.response[rows, first:after])  # (b, chunk)
            if which == 0:
                rollout.student_logp[rows, first:after] = logp
            else:
                rollout.teacher_logp[rows, first:after] = logp
                rollout.teacher_hidden[rows, first:after] = part.to(batch.m.dtype)
            first = after


@torch.no_grad()
def by_turns(student: GPT, prompts: list[list[int]], uniform: Tensor, m: Machine, teacher: GPT,
             mix_alpha: float, turn: Tensor) -> Rollout:
    """Answers whose tokens the teacher draws where `turn` (B, T), from turns(), is true, and the
    student elsewhere. An answer comes with the probability that Eq. (4) gives it."""
    def decode(batch: Together) -> None:
        every, out = batch.rows, batch.rollout
        for t, which in enumerate(turn[int(every[0])].int().tolist()):
            read(batch, which, t, draws=True)
            places = batch.going_on(t)
            if t + 1 < uniform.size(1) and len(places) == len(batch.rows):
                continue
            read(batch, 1 - which, t, draws=False)  # what those that leave have said
            batch.keep(places)
            if not len(places):
                break
        out.mixed_logp[every] = mix(out.student_logp[every], out.teacher_logp[every], mix_alpha)

    groups = {}
    for row, its_turns in enumerate(turn.tolist()):
        groups.setdefault(tuple(its_turns), []).append(row)
    return draw([student, teacher], prompts, uniform, m, decode, groups.values())
