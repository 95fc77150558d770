"""3. Policy gradient: a loss whose gradient is Eq. (2).

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (2), with r_t = log p(y_t | y_<t, x) - log q(y_t | y_<t, x) and
          R_t = r_t + r_{t+1} + ... + r_T. The "-1" beside R_t changes no expectation, and is left out here.
Task:     solve(student_logp, teacher_logp, response_mask) gives one number, a tensor of no dimension. Its gradient
          is Eq. (2)'s estimate from these answers, to be descended: -R_t grad log q(y_t), summed over the tokens of an
          answer, averaged over the rows, a row that is all padding among them. R_t is a number by which a gradient is
          multiplied; it has none of its own. The value of the loss is free, and is not compared.
Allowed:  torch, and no loop over rows.
In words: r_1 was earned before y_2 was drawn. Why may it be left out of what multiplies grad log q(y_2)?
Run:      python exercises/03_policy_gradient.py           then --hint, then --hint=2
          python exercises/03_policy_gradient.py --exact           once it is solved: its mean over ALL answers of a toy
"""

import sys
from collections.abc import Callable

import torch
from checker import Exercise, check, run
from torch import Tensor


def spec(student_logp: Tensor, teacher_logp: Tensor, response_mask: Tensor) -> Tensor:
    """student_logp, teacher_logp (B, T) float, of the tokens taken, response_mask (B, T) bool -> the gradient of the
    loss by student_logp, (B, T). Your solve gives the loss instead."""
    r, gradient = teacher_logp - student_logp, torch.zeros_like(teacher_logp)
    B, T = gradient.shape
    for b in range(B):
        for t in range(T):
            if response_mask[b, t]:
                R = sum(r[b, u] for u in range(t, T) if response_mask[b, u])
                gradient[b, t] = -R / B  # the gradient of log q(y_t) by itself is 1
    return gradient


def solve(student_logp: Tensor, teacher_logp: Tensor, response_mask: Tensor) -> Tensor:
    raise NotImplementedError  # yours


# ---- what checks it -------------------------------------------------------------------------------------------------

def cases():
    generator = torch.Generator().manual_seed(3)
    for name, lengths, width in (("answers of several lengths", [5, 2, 7, 1], 7), ("one row", [4], 4),
                                 ("answers of one token", [1, 1, 1], 1), ("padding behind every answer", [3, 2], 6),
                                 ("a row that is all padding", [0, 4], 5)):
        response_mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        student_logp, teacher_logp = -3 * torch.rand(2, len(lengths), width, generator=generator)  # in the padding too
        yield name, (student_logp, teacher_logp, response_mask)


def checked(solve: Callable) -> Callable:
    """What is compared of a solve: zeros in the form of its loss, and the gradient of that by student_logp."""
    def compared(student_logp: Tensor, teacher_logp: Tensor, response_mask: Tensor):
        student_logp = student_logp.detach().requires_grad_()
        loss = solve(student_logp, teacher_logp, response_mask)
        if not isinstance(loss, Tensor):
            return None if loss is None else (loss, student_logp)
        gradient = torch.zeros_like(student_logp)
        if loss.requires_grad:
            gradient, = torch.autograd.grad(loss.sum(), student_logp, allow_unused=True, materialize_grads=True)
        return torch.zeros_like(loss, requires_grad=False), gradient
    return compared


def as_compared(gradient_of: Callable) -> Callable:
    return lambda *arguments: (torch.zeros(()), gradient_of(*arguments))


def spec_next(q: Tensor, p: Tensor, m: Tensor) -> Tensor:
    return spec(q, p, m) + (p - q) * m / len(q)


SLIPS = {
    "R carries a gradient too: it holds log q, and has to be detached":
        lambda q, p, m: spec(q, p, m) + (q * m).cumsum(1) * m / len(q),
    "these are the rewards up to t; R_t is made of those from t on":
        lambda q, p, m: spec(q.flip(1), p.flip(1), m.flip(1)).flip(1),
    "this is R_{t+1}, as in Eq. (3)'s long term; R_t of Eq. (2) begins with r_t": spec_next,
    "every token is multiplied by the whole return; what was earned before t is no merit of y_t":
        lambda q, p, m: -((p - q) * m).sum(1, keepdim=True) * m / len(q),
    "this is a mean over tokens; Eq. (2) sums over the tokens of an answer, and averages over answers":
        lambda q, p, m: spec(q, p, m) * len(q) / m.sum(),
    "this is a mean over all positions of the array; sum over the tokens of an answer, and average over answers":
        lambda q, p, m: spec(q, p, m) / q.size(1),
    "this is a sum over rows too; average over them": lambda q, p, m: spec(q, p, m) * len(q),
    "the sign is turned: is r_t = log p - log q, and is there a minus before R_t? A loss is descended":
        lambda q, p, m: -spec(q, p, m),
    "the padding is counted: did you apply response_mask?": lambda q, p, m: spec(q, p, m | True),
    "rewards in the padding are counted: mask them before they are summed": lambda q, p, m: spec(q, p, m | True) * m,
    "no gradient reaches student_logp: detach R alone": lambda q, p, m: torch.zeros_like(q),
}
SLIPS = {words: as_compared(slip) for words, slip in SLIPS.items()}
HINTS = ("Three steps: the rewards, detached and masked; their sums R_t from t on; then a product with what is "
         "differentiated, summed and divided.",
         "A sum from t on is a cumulative sum read backwards: flip, cumsum, flip along the tokens. The loss is the sum "
         "of -R_t log q(y_t) over all tokens, divided by the number of rows.")
EXERCISE = Exercise(checked(solve), as_compared(spec), cases, SLIPS, HINTS,
                    ("the loss", "its gradient by student_logp"))


def exact() -> None:
    """Every answer of a toy, weighted by its probability: what Eq. (2) is in expectation, against Eq. (1) itself."""
    if check(EXERCISE).state != "solved":
        sys.exit("03_policy_gradient.py: --exact measures your solve: solve the exercise first")
    from oracle import MASK, PREFIXES, V, exact_gradient, logps
    student, teacher = torch.randn(2, len(PREFIXES), V, generator=torch.Generator().manual_seed(0)).double()
    wanted = exact_gradient(student.requires_grad_(), teacher)
    log_q, log_p = logps(student)[1], logps(teacher)[1]  # (N, T) each, N answers
    losses = [solve(log_q[n : n + 1], log_p[n : n + 1], MASK[n : n + 1]) for n in range(len(MASK))]
    each = torch.stack([torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in losses])
    expected = torch.einsum("n,nsv->sv", log_q.sum(1).exp().detach(), each)
    print(f"gradient of Eq. (1) over all {len(MASK)} answers of a toy: norm {wanted.norm():.6f}")
    print(f"mean of your estimates, each answer by its probability: norm {expected.norm():.6f}, "
          f"off by {(expected - wanted).norm() / wanted.norm():.1e} of it")


if __name__ == "__main__":
    exact() if sys.argv[1:] == ["--exact"] else run(EXERCISE)
