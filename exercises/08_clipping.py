"""8. Clipping: how far one collection of answers may push the student.

Paper:    arXiv 2306.08543v4, Algorithm 1: the update with rho_t = q_theta(y_t) / p~(y_t) and clip(rho_t, 1 - eps,
          1 + eps). It prints min(rho_t, clip(rho_t)) R; for a negative R that is the wrong side. Take PPO's form.
Task:     solve(student_logp, mixed_logp, R, response_mask, clip_eps) gives one number, the loss: minus the sum over
          the answers' tokens of the smaller of rho_t R_{t+1} and clip(rho_t) R_{t+1}. Its gradient with respect to
          student_logp is compared too.
Allowed:  torch, and no loop.
In words: rho is 1.5, eps is 0.2. For which sign of R does this token still have a gradient, and why is that right?
Run:      python exercises/08_clipping.py              then --hint, then --hint=2
"""

import torch
from checker import Exercise, run
from torch import Tensor


def spec(student_logp: Tensor, mixed_logp: Tensor, R: Tensor, response_mask: Tensor, clip_eps: float) -> Tensor:
    """log q_theta(y_t), with its gradient, log p~(y_t), R_{t+1} (B, T) float, response_mask (B, T) bool -> ()"""
    B, T = student_logp.shape
    loss = torch.zeros(())
    for b in range(B):
        for t in range(T):
            if response_mask[b, t]:
                rho = (student_logp[b, t] - mixed_logp[b, t]).exp()
                inside = min(max(rho, torch.tensor(1 - clip_eps)), torch.tensor(1 + clip_eps))  # clip(rho)
                loss = loss - min(rho * R[b, t], inside * R[b, t])
    return loss


def solve(student_logp: Tensor, mixed_logp: Tensor, R: Tensor, response_mask: Tensor, clip_eps: float) -> Tensor:
    raise NotImplementedError  # yours


# ---- what checks it -------------------------------------------------------------------------------------------------

def checked(solve):
    """What is compared: the loss, and its gradient by student_logp."""
    def loss_and_gradient(student_logp: Tensor, *arguments) -> tuple:
        loss, gradient = solve(student_logp.requires_grad_(), *arguments), torch.zeros_like(student_logp)
        if not isinstance(loss, Tensor):
            return loss, gradient
        if loss.requires_grad and loss.dim() == 0:
            gradient = torch.autograd.grad(loss, student_logp, allow_unused=True, materialize_grads=True)[0]
        return loss.detach(), gradient

    return loss_and_gradient


def cases():
    generator = torch.Generator().manual_seed(8)
    for name, lengths, width, clip_eps in (
            ("answers of several lengths", [5, 2, 7, 1], 7, 0.2), ("one row", [4], 4, 0.2),
            ("answers of one token", [1, 1, 1], 1, 0.1), ("padding behind every answer", [3, 2], 6, 0.2),
            ("a row that is all padding", [0, 4], 5, 0.3), ("nothing but padding", [0], 3, 0.2),
            ("no clipping, eps infinite", [3, 6], 6, float("inf"))):
        response_mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        student_logp, mixed_logp = -torch.rand(2, len(lengths), width, generator=generator)
        R = torch.randn(len(lengths), width, generator=generator)  # of both signs, in the padding too
        yield name, (student_logp, mixed_logp, R, response_mask, clip_eps)
    log_rho = torch.tensor([[-0.8, -0.25, -0.21, -0.1, 0.1, 0.19, 0.25, 0.8]]).repeat(2, 1)  # log 1.2 is 0.18
    R = torch.tensor([[1.0], [-1.0]]).repeat(1, 8)
    yield "all of rho, both signs of R", (log_rho - 1, torch.full((2, 8), -1.0), R, torch.ones(2, 8).bool(), 0.2)
    yield "R is 0", (log_rho - 1, torch.full((2, 8), -1.0), 0 * R, torch.ones(2, 8).bool(), 0.2)


def surrogate(q: Tensor, p: Tensor, R: Tensor, m: Tensor, eps: float, kind: str) -> Tensor:
    log_rho = q - p if kind != "upside down" else p - q
    rho, low = log_rho if kind == "difference" else log_rho.exp(), 1 - eps if kind != "above" else 0.0
    inside = log_rho.clamp(-eps, eps).exp() if kind == "log" else rho.clamp(low, 1 + eps)
    smaller = {"printed": torch.minimum(rho, inside) * R, "clipped": inside * R,
               "larger": torch.maximum(rho * R, inside * R)}.get(kind, torch.minimum(rho * R, inside * R))
    smaller = smaller if kind == "padding" else smaller * m
    count = {"mean": m.sum().clamp(min=1), "array": m.numel()}.get(kind, 1)
    return (smaller if kind == "sign" else -smaller).sum() / count


SLIPS = {words: checked(lambda q, p, R, m, eps, kind=kind: surrogate(q, p, R, m, eps, kind)) for kind, words in {
    "printed": "this is min(rho, clip(rho)) R, as printed: for a negative R the smaller ratio makes the larger "
               "product; multiply first, then take the minimum",
    "larger": "this takes the larger of the products; the loss is minus the smaller, which never promises too much",
    "clipped": "this is clip(rho) R alone: a token outside could never come back; take the smaller of it and rho R",
    "log": "this clips log rho to [-eps, eps]; rho itself is clipped, to [1 - eps, 1 + eps]",
    "above": "rho is clipped from above only: for a negative R it is 1 - eps that stops the push",
    "upside down": "the ratio is upside down: rho is q over p~",
    "padding": "what stands in the padding is counted: did you apply response_mask?",
    "sign": "the sign is turned: a loss is minimised, R is to grow",
    "difference": "this takes log q - log p~ for rho; the ratio is its exponential",
    "array": "this is a mean over the array, padding included; the sum is asked for, and who calls you divides",
    "mean": "this is a mean over tokens; the sum is asked for, and who calls you divides",
}.items()}
SLIPS["the gradient is 0 everywhere: student_logp is detached, and nothing would be learned"] = checked(
    lambda q, p, R, m, eps: surrogate(q.detach(), p, R, m, eps, ""))
HINTS = ("Two products for each token, one with the ratio and one with the clipped ratio. Which of them is the smaller "
         "depends on the sign of R, so compare the products and not the ratios.",
         "torch.clamp has no gradient outside of its bounds, and torch.minimum passes the gradient to the smaller of "
         "two: nothing has to be written for the gradient. Mask before you sum.")
EXERCISE = Exercise(checked(solve), checked(spec), cases, SLIPS, HINTS, ("the loss", "its gradient by student_logp"))

if __name__ == "__main__":
    run(EXERCISE)
