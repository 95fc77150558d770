"""5. The mixture: a token drawn from teacher and student together.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (4): p~ = alpha p + (1 - alpha) q. Answers are drawn
          from it, token by token, so that the teacher leads the student away from phrases that it
          overrates.
Task:     solve(student_logp_vocab, teacher_logp_vocab, mix_alpha, uniform) returns a token for each
          row, and its log-probability under p~. The token is the first at which the sum of the
          probabilities so far exceeds the row's uniform number. Rounding may leave the whole sum a
          little below 1, and uniform above it: then it is the last token whose probability is not
          0. A probability of 0 may come as a log-probability of -inf.
Allowed:  torch, and no loop over rows or tokens. No torch.multinomial: uniform alone has to decide
          what is drawn.
In words: solve could draw uniform itself. What is gained by drawing it outside, for each answer
          from its own seed?
Run:      python -m exercises.05_mixture               then --hint, then --hint=2
"""

import math

import torch
from torch import Tensor

from exercises.checker import Exercise, run


def spec(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, mix_alpha: float,
         uniform: Tensor) -> tuple[Tensor, Tensor]:
    """log q and log p (B, V) float64, uniform (B,) float64 in [0, 1)
    -> token (B,) int64, its log p~ (B,) float64"""
    B, V = student_logp_vocab.shape
    token = torch.zeros(B, dtype=torch.int64)
    mixed_logp = torch.zeros(B, dtype=torch.float64)
    for b in range(B):
        cdf = 0.0
        for v in range(V):
            q = math.exp(student_logp_vocab[b, v])
            p = math.exp(teacher_logp_vocab[b, v])
            mixed = mix_alpha * p + (1 - mix_alpha) * q  # p~
            cdf += mixed
            if mixed > 0:
                token[b] = v
                mixed_logp[b] = math.log(mixed)
            if cdf > uniform[b]:
                break
    return token, mixed_logp


def solve(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, mix_alpha: float,
          uniform: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError  # yours


# ---- what checks it ------------------------------------------------------------------------------

def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cases():
    generator = torch.Generator().manual_seed(5)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def logps(*shape: int, plus: Tensor | float = 0.0) -> Tensor:
        return (2 * numbers(*shape) + plus).log_softmax(-1)

    q = float64(-2, -1, 0, 1, 2, -1.5, 1.5).repeat(2, 1).log_softmax(-1)
    yield "small uniform numbers", (q, q.flip(-1), 0.2, float64(0.1, 0.3))
    for name, B, V, mix_alpha in (
        ("alpha 0.2", 40, 7, 0.2),
        ("alpha 0, the student alone", 9, 5, 0.0),
        ("alpha 1, the teacher alone", 9, 5, 1.0),
        ("one row", 1, 11, 0.5),
        ("a vocabulary of one token", 3, 1, 0.2),
    ):
        uniform = torch.rand(B, generator=generator, dtype=torch.float64)
        yield name, (logps(B, V), logps(B, V), mix_alpha, uniform)
    yield "uniform at its ends", (logps(3, 6), logps(3, 6), 0.2, float64(0.0, 0.999999, 1e-300))
    none = float64(-math.inf, -math.inf, 0, 0, 0, 0, -math.inf)  # two at the front, one behind
    yield "tokens of probability 0", (
        logps(4, 7, plus=none), logps(4, 7, plus=none), 0.2, float64(0.5, 0.6, 0.7, 0.999999))
    rare = float64(-2000, 0, 0, -2000)  # exp(-2000) is 0, even in float64
    yield "a probability of 0 at uniform 0", (
        logps(1, 4, plus=rare), logps(1, 4, plus=rare), 0.2, float64(0))
    yield "rows whose sum is a little below 1", (
        logps(2, 4, plus=rare) - 1e-9, logps(2, 4, plus=rare) - 1e-9, 0.2, float64(1 - 1e-12, 0.3))


def draw(drawn_from: Tensor, scored: Tensor, uniform: Tensor, right: bool = True, below: int = 0,
         last: bool = True) -> tuple[Tensor, Tensor]:
    """The token drawn from log-probabilities (B, V), and its log-probability under others. Each of
    the three settings makes one of spec's mistakes."""
    cdf = drawn_from.exp().cumsum(-1)
    level = uniform[:, None] * cdf[:, -1:] if last else uniform[:, None]
    token = torch.searchsorted(cdf, level, right=right)  # (B, 1)
    token = (token - below).clamp(0, cdf.size(-1) - 1)
    return token.squeeze(1), scored.gather(-1, token).squeeze(1)


def log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf


def mixture(q: Tensor, p: Tensor, a: float) -> Tensor:
    return torch.logaddexp(p + log(a), q + log(1 - a))


def from_mixture(q: Tensor, p: Tensor, a: float, u: Tensor, **mistakes) -> tuple[Tensor, Tensor]:
    return draw(mixture(q, p, a), mixture(q, p, a), u, **mistakes)


def of_logarithms(q: Tensor, p: Tensor, a: float) -> Tensor:
    return torch.where(p.isinf() | q.isinf(), -math.inf, a * p + (1 - a) * q)


def drawn_from_logarithms(q: Tensor, p: Tensor, a: float, u: Tensor) -> tuple[Tensor, Tensor]:
    mixed = of_logarithms(q, p, a)
    return draw(mixed, mixed, u)


def drawn_without_a_whole(q: Tensor, p: Tensor, a: float, u: Tensor) -> tuple[Tensor, Tensor]:
    mixed = of_logarithms(q, p, a)
    return draw(mixed, mixed, u.minimum(mixed.exp().sum(-1) - 1e-9), last=False)


def drawn_from_normalised(q: Tensor, p: Tensor, a: float, u: Tensor) -> tuple[Tensor, Tensor]:
    mixed = of_logarithms(q, p, a).log_softmax(-1)
    return draw(mixed, mixed, u)


SLIPS = {
    "this mixes log-probabilities, which makes p^alpha q^(1 - alpha): Eq. (4) mixes probabilities":
        drawn_from_logarithms,
    "this mixes log-probabilities, and the result does not even sum to 1: Eq. (4) mixes "
    "probabilities":
        drawn_without_a_whole,
    "this mixes log-probabilities and normalises, which makes p^alpha q^(1 - alpha) again: Eq. (4) "
    "mixes probabilities":
        drawn_from_normalised,
    "alpha stands on the student's side: in Eq. (4) it is the teacher's share":
        lambda q, p, a, u: from_mixture(q, p, 1 - a, u),
    "the token is right, but its log-probability is the student's: it was drawn from p~, so p~ "
    "scores it":
        lambda q, p, a, u: draw(mixture(q, p, a), q, u),
    "this is the token before: take the one at which the sum exceeds uniform":
        lambda q, p, a, u: from_mixture(q, p, a, u, below=1),
    "a token of probability 0 is drawn where uniform is 0: the sum has to exceed uniform, not to "
    "reach it":
        lambda q, p, a, u: from_mixture(q, p, a, u, right=False),
    "where rounding leaves the sum below uniform, this draws the last token of the vocabulary, "
    "whose probability is 0":
        lambda q, p, a, u: from_mixture(q, p, a, u, last=False),
}
HINTS = (
    "Go back from logarithms to probabilities, mix, and keep the mixture. One cumulative sum over "
    "the vocabulary serves all rows: in each row you look for the place of uniform in a sorted "
    "list.",
    "torch.searchsorted(cdf, uniform[:, None], right=True) finds the place, and gather finds the "
    "log-probability. Multiply uniform by the row's last sum: then nothing can lie beyond it.",
)
EXERCISE = Exercise(solve, spec, cases, SLIPS, HINTS, ("the token", "its log-probability"))

if __name__ == "__main__":
    run(EXERCISE)
