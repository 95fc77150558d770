"""7. Length normalisation: what comes after a token, as a mean.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (6): R_{t+1} is divided by the number of its terms, so that a long answer
          is not worse for being long. As printed, the divisor is T - t - 1, t counted from 1; count the terms yourself.
Task:     solve(reward, response_mask) gives, at each t, the mean of the rewards after t: r_{t+1} ... r_T. Where nothing
          comes after t, and in the padding, it is 0.
Allowed:  torch, and no loop over rows. One over t is fine; none is better.
In words: what would a student learn to do if R were not divided? (Its rewards are mostly negative. Why?) Your code may
          say T - t - 1: why is that right in Python, and wrong in the paper?
Run:      python exercises/07_length_norm.py           then --hint, then --hint=2
"""

import torch
from checker import Exercise, run
from torch import Tensor


def spec(reward: Tensor, response_mask: Tensor) -> Tensor:
    """reward r_t (B, T) float, response_mask (B, T) bool, true up to each answer's last token -> (B, T)"""
    R = torch.zeros_like(reward)
    for b in range(len(reward)):
        T = int(response_mask[b].sum())  # the answer's own length; the paper counts t from 1, Python from 0
        for t in range(T):
            later = [reward[b, u] for u in range(t + 1, T)]  # r_{t+1} ... r_T
            if later:
                R[b, t] = sum(later) / len(later)
    return R


def solve(reward: Tensor, response_mask: Tensor) -> Tensor:
    raise NotImplementedError  # yours


# ---- what checks it -------------------------------------------------------------------------------------------------

def cases():
    generator = torch.Generator().manual_seed(7)
    for name, lengths, width in (("answers of several lengths", [5, 2, 7, 1], 7), ("one row", [4], 4),
                                 ("answers of one token", [1, 1, 1], 1), ("padding behind every answer", [3, 2], 6),
                                 ("a row that is all padding", [0, 4], 5)):
        response_mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        reward = torch.randn(len(lengths), width, generator=generator)  # what stands in the padding is no reward
        yield name, (reward, response_mask)


def sums(reward: Tensor, response_mask: Tensor, first: int, less: int, masked: bool = True) -> Tensor:
    """Rewards from t + first on, divided by the number of tokens from t on, less `less`: spec's mistakes."""
    reward = reward * response_mask if masked else reward
    R = torch.zeros_like(reward)
    for b in range(len(reward)):
        T = int(response_mask[b].sum()) if masked else reward.size(1)
        for t in range(T):
            R[b, t] = sum(reward[b, t + first : T]) / max(1, T - t - less)
    return R * response_mask


def mean_over(reward: Tensor, response_mask: Tensor, count: Tensor) -> Tensor:
    return sums(reward, response_mask, first=1, less=1) * spec_terms(response_mask) / count.clamp(min=1)


SLIPS = {
    "the sum begins with r_t; R_{t+1} begins one later, for L_Single has r_t already":
        lambda r, m: sums(r, m, first=0, less=0),
    "this is divided by T - t - 1 as printed, one less than there are terms (the paper's t counts from 1)":
        lambda r, m: sums(r, m, first=1, less=2),
    "this is divided by the tokens from t on, one more than there are terms":
        lambda r, m: sums(r, m, first=1, less=0),
    "this is the sum; Eq. (6) is its mean": lambda r, m: sums(r, m, first=1, less=1) * spec_terms(m),
    "this is divided by the columns that follow, of the array and not of the answer": lambda r, m: mean_over(
        r, m, torch.arange(r.size(1)).flip(0)),
    "this is divided by the whole answer's length; Eq. (6) has the number of terms": lambda r, m: mean_over(
        r, m, m.sum(1, keepdim=True)),
    "this is the mean of what came before t; what comes after it is wanted": lambda r, m: (
        ((r * m).cumsum(1) - r * m) / torch.arange(r.size(1)).clamp(min=1) * m),
    "rewards in the padding are counted: did you apply response_mask, and count with it?":
        lambda r, m: sums(r, m, first=1, less=1, masked=False),
}


def spec_terms(response_mask: Tensor) -> Tensor:
    T = response_mask.sum(1, keepdim=True)
    return (T - 1 - torch.arange(response_mask.size(1))).clamp(min=1) * response_mask


HINTS = ("Mask first. Then the sum of what comes after t is the sum from t on, less r_t itself; and so is the count.",
         "A sum from t on is a cumulative sum read backwards: x.flip(1).cumsum(1).flip(1). Take it of the rewards and "
         "of the mask; where the count is 0 divide by 1.")
EXERCISE = Exercise(solve, spec, cases, SLIPS, HINTS)

if __name__ == "__main__":
    run(EXERCISE)
