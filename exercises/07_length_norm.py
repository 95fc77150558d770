"""7. Length normalisation: what comes after a token, as a mean.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (6): R_{t+1} is divided by the number of its terms,
          so that a long answer is not worse for being long. As printed, the divisor is T - t - 1,
          t counted from 1; count the terms yourself.
Task:     solve(reward, response_mask) returns, at each t, the mean of the rewards after t:
          r_{t+1} ... r_T. Where nothing comes after t, and in the padding, it is 0.
Allowed:  torch, and no loop over rows. One over t is fine; none is better.
In words: What would a student learn to do if R were not divided? (Its rewards are mostly negative.
          Why?) Your code may say T - t - 1: why is that right in Python, and wrong in the paper?
Run:      python -m exercises.07_length_norm           then --hint, then --hint=2
"""

import torch
from torch import Tensor

from exercises.checker import Exercise, masks, run


def spec(reward: Tensor, response_mask: Tensor) -> Tensor:
    """reward r_t (B, T) float, response_mask (B, T) bool, true up to each answer's last token
    -> (B, T)"""
    R = torch.zeros_like(reward)
    for b in range(len(reward)):
        T = int(response_mask[b].sum())  # the answer's own length
        for t in range(T):  # the paper counts t from 1, Python from 0
            later = [reward[b, u] for u in range(t + 1, T)]  # r_{t+1} ... r_T
            if later:
                R[b, t] = sum(later) / len(later)
    return R


def solve(reward: Tensor, response_mask: Tensor) -> Tensor:
    raise NotImplementedError  # yours


# ---- what checks it ------------------------------------------------------------------------------

def cases():
    generator = torch.Generator().manual_seed(7)
    for name, response_mask in masks():
        reward = torch.randn(response_mask.shape, generator=generator)  # padding holds no rewards
        yield name, (reward, response_mask)


def sums(reward: Tensor, response_mask: Tensor, first: int, less: int) -> Tensor:
    """A mistake in spec: the rewards from t + first on, divided by the number of tokens from t on,
    less `less`."""
    R = torch.zeros_like(reward)
    for b in range(len(reward)):
        T = int(response_mask[b].sum())
        for t in range(T):
            R[b, t] = sum(reward[b, t + first : T]) / max(1, T - t - less)
    return R


def divided_by(count: Tensor, reward: Tensor, response_mask: Tensor) -> Tensor:
    """A mistake in spec: the sum of what comes after t, divided by another count."""
    after = response_mask.sum(1, keepdim=True) - 1 - torch.arange(reward.size(1))
    return spec(reward, response_mask) * after.clamp(min=1) / count.clamp(min=1)


def mean_before(reward: Tensor, response_mask: Tensor) -> Tensor:
    reward = reward * response_mask
    before = reward.cumsum(1) - reward
    return before / torch.arange(reward.size(1)).clamp(min=1) * response_mask


SLIPS = {
    "the sum begins with r_t: R_{t+1} begins one later, because L_Single already has r_t":
        lambda r, m: sums(r, m, first=0, less=0),
    "this is divided by T - t - 1 as printed, one less than there are terms (the paper counts t "
    "from 1)":
        lambda r, m: sums(r, m, first=1, less=2),
    "this is divided by the number of tokens from t on, one more than there are terms":
        lambda r, m: sums(r, m, first=1, less=0),
    "this is the sum: Eq. (6) is its mean":
        lambda r, m: divided_by(torch.ones(1), r, m),
    "this is divided by the number of columns that follow in the array: count those of the answer":
        lambda r, m: divided_by(torch.arange(r.size(1)).flip(0), r, m),
    "this is divided by the whole answer's length: Eq. (6) has the number of terms":
        lambda r, m: divided_by(m.sum(1, keepdim=True), r, m),
    "this is the mean of what came before t: take what comes after t": mean_before,
    "rewards in the padding are counted: did you apply response_mask, and count with it?":
        lambda r, m: spec(r, m | True) * m,
}
HINTS = (
    "Mask first. Then the sum of what comes after t is the sum from t on, less r_t itself. The "
    "count follows in the same way.",
    "A sum from t on is a cumulative sum read backwards: x.flip(1).cumsum(1).flip(1). Take it of "
    "the rewards and of the mask. Where the count is 0, divide by 1.",
)
EXERCISE = Exercise(solve, spec, cases, SLIPS, HINTS)

if __name__ == "__main__":
    run(EXERCISE)
