"""8. Clipping: how far one collection of answers may push the student.

Paper:    arXiv 2306.08543v4, Algorithm 1: the update with rho_t = q_theta(y_t) / p~(y_t) and
          clip(rho_t, 1 - eps, 1 + eps). It prints min(rho_t, clip(rho_t)) R, which takes the wrong
          side where R is negative. Take PPO's form.
Task:     solve(student_logp, mixed_logp, R, response_mask, clip_eps) returns one number, the loss:
          minus the sum, over the tokens of all answers, of the smaller of rho_t R_{t+1} and
          clip(rho_t) R_{t+1}. The checker also compares its gradient by student_logp.
Allowed:  torch, and no loop.
In words: rho is 1.5, eps is 0.2. For which sign of R does this token still have a gradient, and why
          is that right?
Run:      python -m exercises.08_clipping              then --hint, then --hint=2
"""

import math
from functools import partial

import torch
from torch import Tensor

from exercises.checker import Exercise, masks, run, with_gradient


def spec(student_logp: Tensor, mixed_logp: Tensor, R: Tensor, response_mask: Tensor,
         clip_eps: float) -> Tensor:
    """log q_theta(y_t), with its gradient, log p~(y_t), R_{t+1} (B, T) float,
    response_mask (B, T) bool -> ()"""
    B, T = student_logp.shape
    low = torch.tensor(1 - clip_eps)
    high = torch.tensor(1 + clip_eps)
    loss = torch.zeros(())
    for b in range(B):
        for t in range(T):
            if response_mask[b, t]:
                rho = (student_logp[b, t] - mixed_logp[b, t]).exp()
                inside = min(max(rho, low), high)  # clip(rho)
                loss = loss - min(rho * R[b, t], inside * R[b, t])
    return loss


def solve(student_logp: Tensor, mixed_logp: Tensor, R: Tensor, response_mask: Tensor,
          clip_eps: float) -> Tensor:
    raise NotImplementedError  # yours


# ---- what checks it ------------------------------------------------------------------------------

def cases():
    generator = torch.Generator().manual_seed(8)
    epsilons = {"answers of one token": 0.1, "a row that is all padding": 0.3}
    batches = [(name, mask, epsilons.get(name, 0.2)) for name, mask in masks()]
    batches += [
        ("nothing but padding", torch.zeros(1, 3).bool(), 0.2),
        ("no clipping, eps infinite", torch.arange(6) < torch.tensor([[3], [6]]), math.inf),
    ]
    for name, response_mask, clip_eps in batches:
        shape = response_mask.shape
        student_logp, mixed_logp = -torch.rand((2, *shape), generator=generator)
        R = torch.randn(shape, generator=generator)  # of both signs, in the padding too
        yield name, (student_logp, mixed_logp, R, response_mask, clip_eps)
    log_rho = torch.tensor([-0.8, -0.25, -0.21, -0.1, 0.1, 0.19, 0.25, 0.8])  # log 1.2 is 0.18
    mixed_logp = torch.full((2, 8), -1.0)
    student_logp = mixed_logp + log_rho
    R = torch.tensor([[1.0], [-1.0]]).repeat(1, 8)
    everything = torch.ones(2, 8).bool()
    yield "all of rho, both signs of R", (student_logp, mixed_logp, R, everything, 0.2)
    yield "R is 0", (student_logp, mixed_logp, 0 * R, everything, 0.2)


def smaller(rho: Tensor, R: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(rho * R, rho.clamp(low, high) * R)


def mistaken(q: Tensor, p: Tensor, R: Tensor, m: Tensor, clip_eps: float, kind: str) -> Tensor:
    """spec with a mistake of some kind, a key of MISTAKES."""
    low = 1 - clip_eps
    high = 1 + clip_eps
    rho = (q - p).exp()
    if kind == "printed":
        value = torch.minimum(rho, rho.clamp(low, high)) * R
    elif kind == "larger":
        value = torch.maximum(rho * R, rho.clamp(low, high) * R)
    elif kind == "clipped":
        value = rho.clamp(low, high) * R
    elif kind == "log":
        value = torch.minimum(rho * R, (q - p).clamp(-clip_eps, clip_eps).exp() * R)
    elif kind == "above":
        value = smaller(rho, R, 0.0, high)
    elif kind == "upside down":
        value = smaller(1 / rho, R, low, high)
    elif kind == "difference":
        value = smaller(q - p, R, low, high)
    elif kind == "detached":
        value = smaller(rho.detach(), R, low, high)
    else:
        value = smaller(rho, R, low, high)
    if kind == "padding":
        return -value.sum()
    loss = -(value * m).sum()
    if kind == "sign":
        return -loss
    if kind == "array":
        return loss / m.numel()
    if kind == "mean":
        return loss / m.sum().clamp(min=1)
    return loss


MISTAKES = {
    "printed":
        "this is min(rho, clip(rho)) R, as printed: where R is negative, the smaller ratio makes "
        "the larger product, so multiply first, then take the minimum",
    "larger":
        "this takes the larger of the products: the loss is minus the smaller, which never "
        "promises too much",
    "clipped":
        "this is clip(rho) R alone, and a token outside could never come back: take the smaller of "
        "it and rho R",
    "log": "this clips log rho to [-eps, eps]: rho itself is clipped, to [1 - eps, 1 + eps]",
    "above": "rho is clipped from above only: where R is negative, 1 - eps stops the push",
    "upside down": "the ratio is upside down: rho is q over p~",
    "padding": "the padding is counted: did you apply response_mask?",
    "sign": "the sign is turned: a loss is minimised, and R is to grow",
    "difference": "this takes log q - log p~ for rho: the ratio is its exponential",
    "array": "this is a mean over the array, padding included: return the sum; the caller divides",
    "mean": "this is a mean over tokens: return the sum; the caller divides",
    "detached":
        "the gradient is 0 everywhere: student_logp is detached, so nothing would be learned",
}
SLIPS = {words: partial(mistaken, kind=kind) for kind, words in MISTAKES.items()}
HINTS = (
    "Compute two products for each token, one with the ratio and one with the clipped ratio. Which "
    "of them is the smaller depends on the sign of R, so compare the products, not the ratios.",
    "torch.clamp has no gradient outside its bounds, and torch.minimum passes the gradient to the "
    "smaller of the two, so you need not write anything for the gradient. Mask before you sum.",
)
EXERCISE = Exercise(
    solve, spec, cases, SLIPS, HINTS, ("the loss", "its gradient by student_logp"),
    compared=with_gradient)

if __name__ == "__main__":
    run(EXERCISE)
