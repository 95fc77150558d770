"""3. Policy gradient: a loss whose gradient is Eq. (2).

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (2), with r_t = log p(y_t | y_<t, x) - log q(y_t |
          y_<t, x) and R_t = r_t + r_{t+1} + ... + r_T. The "-1" beside R_t changes no expectation,
          and this exercise leaves it out.
Task:     solve(student_logp, teacher_logp, response_mask) returns one number, a tensor of no
          dimension, whose gradient is Eq. (2)'s estimate from these answers: -R_t grad log q(y_t),
          summed over the tokens of an answer and averaged over the rows, rows of padding included.
          R_t is a number that multiplies a gradient; it has no gradient of its own. The value of
          the loss is free: the checker compares its gradient alone.
Allowed:  torch, and no loop over rows.
In words: r_1 was earned before y_2 was drawn. Why may it be left out of what multiplies
          grad log q(y_2)?
Run:      python -m exercises.03_policy_gradient           then --hint, then --hint=2
          python -m exercises.03_policy_gradient --exact           once solved: its mean over ALL
                                                                   answers of a toy
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from exercises.checker import Exercise, check, gradients, masks, run


def spec(student_logp: Tensor, teacher_logp: Tensor, response_mask: Tensor) -> Tensor:
    """student_logp and teacher_logp (B, T) float, of the tokens taken, response_mask (B, T) bool
    -> the gradient of the loss by student_logp, (B, T). Your solve returns the loss instead."""
    r = teacher_logp - student_logp
    gradient = torch.zeros_like(r)
    B, T = r.shape
    for b in range(B):
        for t in range(T):
            if response_mask[b, t]:
                R = sum(r[b, u] for u in range(t, T) if response_mask[b, u])
                gradient[b, t] = -R / B  # the gradient of log q(y_t) by itself is 1
    return gradient


def solve(student_logp: Tensor, teacher_logp: Tensor, response_mask: Tensor) -> Tensor:
    raise NotImplementedError  # yours


# ---- what checks it ------------------------------------------------------------------------------

def cases():
    generator = torch.Generator().manual_seed(3)
    for name, response_mask in masks():
        shape = (2, *response_mask.shape)
        student_logp, teacher_logp = -3 * torch.rand(shape, generator=generator)  # padding too
        yield name, (student_logp, teacher_logp, response_mask)


def gradient_alone(solve: Callable) -> Callable:
    """What is compared: zeros in the form of the loss, and its gradient by student_logp."""

    def compared(student_logp: Tensor, teacher_logp: Tensor, response_mask: Tensor):
        student_logp = student_logp.detach().requires_grad_()
        loss = solve(student_logp, teacher_logp, response_mask)
        if not isinstance(loss, Tensor):
            return loss, student_logp
        return torch.zeros_like(loss.detach()), gradients(loss, (student_logp,))[0]

    return compared


def loss_of(gradient_of: Callable) -> Callable:
    """A loss that has the gradient which gradient_of returns."""

    def loss(q: Tensor, p: Tensor, m: Tensor) -> Tensor:
        return (q * gradient_of(q.detach(), p, m)).sum()

    return loss


SLIPS = {words: loss_of(gradient_of) for words, gradient_of in {
    "R carries a gradient too: it contains log q, so detach it":
        lambda q, p, m: spec(q, p, m) + (q * m).cumsum(1) * m / len(q),
    "these are the rewards up to t: R_t sums those from t on":
        lambda q, p, m: spec(q.flip(1), p.flip(1), m.flip(1)).flip(1),
    "this is R_{t+1}, as in Eq. (3)'s long term: R_t of Eq. (2) begins with r_t":
        lambda q, p, m: spec(q, p, m) + (p - q) * m / len(q),
    "the whole return multiplies every token: what was earned before t is no merit of y_t":
        lambda q, p, m: -((p - q) * m).sum(1, keepdim=True) * m / len(q),
    "this is a mean over tokens: Eq. (2) sums over the tokens of an answer, and averages over "
    "answers":
        lambda q, p, m: spec(q, p, m) * len(q) / m.sum(),
    "this is a mean over all positions of the array: sum over the tokens of an answer, and average "
    "over answers":
        lambda q, p, m: spec(q, p, m) / q.size(1),
    "this is a sum over the rows too: average over them":
        lambda q, p, m: spec(q, p, m) * len(q),
    "the sign is turned: is r_t = log p - log q, and is there a minus before R_t? A loss is "
    "minimised":
        lambda q, p, m: -spec(q, p, m),
    "the padding is counted: did you apply response_mask?":
        lambda q, p, m: spec(q, p, m | True),
    "rewards in the padding are counted: mask them before you sum them":
        lambda q, p, m: spec(q, p, m | True) * m,
    "no gradient reaches student_logp: detach R alone":
        lambda q, p, m: torch.zeros_like(q),
}.items()}
HINTS = (
    "Three steps: the rewards, detached and masked; their sums R_t from t on; then the product of "
    "R_t and what is differentiated, summed and divided.",
    "A sum from t on is a cumulative sum read backwards: flip, cumsum, flip along the tokens. The "
    "loss is the sum of -R_t log q(y_t) over all tokens, divided by the number of rows.",
)
EXERCISE = Exercise(
    solve, loss_of(spec), cases, SLIPS, HINTS, ("the loss", "its gradient by student_logp"),
    compared=gradient_alone)


def exact() -> None:
    """Compares the mean of your estimates over every answer of a toy with the gradient of
    Eq. (1)."""
    if check(EXERCISE).state != "solved":
        sys.exit("03_policy_gradient.py: --exact measures your solve: solve the exercise first")
    from exercises.oracle import MASK, PREFIXES, V, exact_gradient, logps

    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, len(PREFIXES), V, generator=generator).double()
    student.requires_grad_()
    wanted = exact_gradient(student, teacher)
    _, log_q = logps(student)  # (N, T), N answers
    _, log_p = logps(teacher)
    expected = torch.zeros_like(wanted)
    for n in range(len(MASK)):
        loss = solve(log_q[n : n + 1], log_p[n : n + 1], MASK[n : n + 1])
        probability = log_q[n].sum().exp().detach()
        expected += probability * gradients(loss, (student,))[0]
    off = (expected - wanted).norm() / wanted.norm()
    print(f"the gradient of Eq. (1) over all {len(MASK)} answers of a toy has the norm "
          f"{wanted.norm():.6f}")
    print("the mean of your estimates, each answer weighted by its probability, has the norm "
          f"{expected.norm():.6f}, and is off by {off:.1e} of it")


if __name__ == "__main__":
    if sys.argv[1:] == ["--exact"]:
        exact()
    else:
        run(EXERCISE)
