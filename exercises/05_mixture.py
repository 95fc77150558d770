"""5. The mixture: a token drawn from teacher and student together.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (4): p~ = alpha p + (1 - alpha) q. Answers are drawn from it, token by
          token, so that the teacher keeps the student from phrases that it overrates.
Task:     solve(student_logp_vocab, teacher_logp_vocab, mix_alpha, uniform) gives a token for each row, and its
          log-probability under p~. A token is the first at which the sum of the probabilities so far exceeds the row's
          uniform number. Rounding may leave the whole sum a little below 1, and uniform above it: then it is the last
          token whose probability is not 0. A probability of 0 may come as a log-probability of -inf.
Allowed:  torch, and no loop over rows or tokens. No torch.multinomial: what is drawn has to follow from uniform.
In words: uniform could have been drawn within. What is won by drawing it outside, for each answer on its own?
Run:      python exercises/05_mixture.py               then --hint, then --hint=2
"""

import math

import torch
from checker import Exercise, run
from torch import Tensor


def spec(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, mix_alpha: float,
         uniform: Tensor) -> tuple[Tensor, Tensor]:
    """log q and log p (B, V) float64, uniform (B,) float64 in [0, 1) -> token (B,) int64, log p~ of it (B,) float64"""
    B, V = student_logp_vocab.shape
    token, mixed_logp = torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.float64)
    for b in range(B):
        cdf = 0.0
        for v in range(V):
            q, p = math.exp(student_logp_vocab[b, v]), math.exp(teacher_logp_vocab[b, v])
            mixed = mix_alpha * p + (1 - mix_alpha) * q  # p~
            cdf += mixed
            if mixed > 0:
                token[b], mixed_logp[b] = v, math.log(mixed)
            if cdf > uniform[b]:
                break
    return token, mixed_logp


def solve(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, mix_alpha: float,
          uniform: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError  # yours


# ---- what checks it -------------------------------------------------------------------------------------------------

def cases():
    generator = torch.Generator().manual_seed(5)
    numbers = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    logps = lambda *shape: (2 * numbers(*shape)).log_softmax(-1)
    draws = lambda B: torch.rand(B, generator=generator, dtype=torch.float64)
    q, p = torch.linspace(-2, 2, 28, dtype=torch.float64).view(2, 2, 7).log_softmax(-1).roll(3, 1)
    yield "small uniform numbers", (q, p.flip(-1), 0.2, torch.tensor([0.1, 0.3], dtype=torch.float64))
    for name, B, V, mix_alpha in (("alpha 0.2", 40, 7, 0.2), ("alpha 0, the student alone", 9, 5, 0.0),
                                  ("alpha 1, the teacher alone", 9, 5, 1.0), ("one row", 1, 11, 0.5),
                                  ("a vocabulary of one token", 3, 1, 0.2)):
        yield name, (logps(B, V), logps(B, V), mix_alpha, draws(B))
    q, p = logps(3, 6), logps(3, 6)
    yield "uniform at its ends", (q, p, 0.2, torch.tensor([0.0, 0.999999, 1e-300], dtype=torch.float64))
    none = torch.tensor([-math.inf] * 2 + [0.0] * 4 + [-math.inf], dtype=torch.float64)  # two at the front, one behind
    yield "tokens of probability 0", ((logps(4, 7) + none).log_softmax(-1), (logps(4, 7) + none).log_softmax(-1), 0.2,
                                      torch.tensor([0.5, 0.6, 0.7, 0.999999], dtype=torch.float64))
    rare = torch.tensor([-2000.0, 0, 0, -2000], dtype=torch.float64)  # exp(-2000) is 0 too, even in float64
    yield "a probability of 0 at uniform 0", ((numbers(1, 4) + rare).log_softmax(-1),
                                              (numbers(1, 4) + rare).log_softmax(-1), 0.2, torch.zeros(1).double())
    short = lambda: (numbers(2, 4) + rare).log_softmax(-1) - 1e-9
    yield "rows whose sum is a little below 1", (short(), short(), 0.2,
                                                 torch.tensor([1 - 1e-12, 0.3], dtype=torch.float64))


def draw(mixed_logp_vocab: Tensor, uniform: Tensor, right: bool = True, below: int = 0, last: bool = True) -> Tensor:
    """The token, or one of spec's mistakes: the first that reaches uniform; the one before; the vocabulary's end."""
    cdf = mixed_logp_vocab.exp().cumsum(-1)
    level = uniform[:, None] * cdf[:, -1:] if last else uniform[:, None]
    token = torch.searchsorted(cdf, level, right=right).squeeze(1)
    return (token - below).clamp(0, cdf.size(-1) - 1)


def answer(drawn_from: Tensor, scored: Tensor, uniform: Tensor, **mistakes) -> tuple[Tensor, Tensor]:
    token = draw(drawn_from, uniform, **mistakes)
    return token, scored.gather(-1, token[:, None]).squeeze(-1)


def mixed(q: Tensor, p: Tensor, a: float) -> Tensor:
    share = lambda a: math.log(a) if a else -math.inf
    return torch.logaddexp(p + share(a), q + share(1 - a))


def blended(q: Tensor, p: Tensor, a: float) -> Tensor:
    return torch.where(p.isinf() | q.isinf(), -math.inf, a * p + (1 - a) * q)


SLIPS = {
    "this mixes log-probabilities, which makes p^alpha q^(1 - alpha); Eq. (4) mixes probabilities":
        lambda q, p, a, u: answer(blended(q, p, a), blended(q, p, a), u),
    "this mixes log-probabilities, and what comes of it does not even sum to 1; Eq. (4) mixes probabilities":
        lambda q, p, a, u: answer(blended(q, p, a), blended(q, p, a), u.minimum(blended(q, p, a).exp().sum(-1) - 1e-9),
                                  last=False),
    "this mixes log-probabilities, and normalises: p^alpha q^(1 - alpha) again; Eq. (4) mixes probabilities":
        lambda q, p, a, u: answer(*2 * (blended(q, p, a).log_softmax(-1),), u),
    "alpha stands on the student's side; in Eq. (4) it is the teacher's share":
        lambda q, p, a, u: answer(mixed(q, p, 1 - a), mixed(q, p, 1 - a), u),
    "the token is right, its log-probability is the student's: it was drawn from p~, so p~ scores it":
        lambda q, p, a, u: answer(mixed(q, p, a), q, u),
    "this is the token below: the one whose sum exceeds uniform is meant":
        lambda q, p, a, u: answer(mixed(q, p, a), mixed(q, p, a), u, below=1),
    "a token of probability 0 is drawn where uniform is 0: the sum has to exceed uniform, not to reach it":
        lambda q, p, a, u: answer(mixed(q, p, a), mixed(q, p, a), u, right=False),
    "where rounding leaves the sum below uniform, this draws the last token of the vocabulary; its probability is 0":
        lambda q, p, a, u: answer(mixed(q, p, a), mixed(q, p, a), u, last=False),
}
HINTS = ("Back from logarithms, mix, and keep the mixture: one cumulative sum over the vocabulary serves all rows. For "
         "each row you look for the place of uniform in a sorted list.",
         "torch.searchsorted(cdf, uniform[:, None], right=True) finds the place; gather finds the log-probability. "
         "Multiply uniform by the row's last sum, and nothing can lie beyond it.")
EXERCISE = Exercise(solve, spec, cases, SLIPS, HINTS, ("the token", "its log-probability"))

if __name__ == "__main__":
    run(EXERCISE)
