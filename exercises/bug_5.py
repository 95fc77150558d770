"""Silent bug 5: the width of a batch.

Trainer:  The student is one row of logits for all positions. It learns from a bigram teacher by
          Eqs. (3) and (6) of arXiv 2306.08543v4, on its own answers. Token 0 ends an answer, begins
          the next, and fills up short rows, as in GPT-2. `labels` are the same tokens, but their
          padding is -100.
Symptom:  The same answers, filled up to another width, make another student. The wider the batch,
          the more often it says "Once", with which the teacher begins an answer and which it hardly
          says later.
Task:     Find and repair the bug, in `solve` only. response and labels are (B, T) int64;
          student_logp is log q(y_t), kl is KL[q || p] at each position, and reward is r_t, (B, T)
          each, scored at every position. solve returns the loss, a mean over response tokens.
          student_logp and kl carry the gradient; reward does not.
In words: How would a test have found it? What is the smallest batch in which the bug does nothing?
Run:      python -m exercises.bug_5                    trains, then checks; --hint, then --hint=2
"""

import sys
from functools import partial

import torch
from torch import Tensor

from exercises.checker import Exercise, gradients, masks, run

END = 0
IGNORED = -100
TEACHER = torch.tensor([  # the probabilities of end, "Once" and two other words
    [0.02, 0.90, 0.04, 0.04],  # after end, which begins an answer
    [0.20, 0.01, 0.40, 0.39],  # after "Once"
    [0.35, 0.01, 0.24, 0.40],
    [0.35, 0.01, 0.40, 0.24],
]).log()


def later(values: Tensor) -> Tensor:
    """The sum of what follows each position, (B, T) -> (B, T)"""
    return values.flip(1).cumsum(1).flip(1) - values


def solve(response: Tensor, labels: Tensor, student_logp: Tensor, kl: Tensor,
          reward: Tensor) -> Tensor:
    response_mask = (response != IGNORED).float()  # (B, T)
    R = later(reward * response_mask) / later(response_mask).clamp(min=1)  # Eq. (6)
    loss_single = kl  # (B, T)
    loss_long = -student_logp * R  # Eq. (3) (B, T)
    return ((loss_single + loss_long) * response_mask).sum() / response_mask.sum()


def sampled(logits: Tensor, uniform: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """response and labels (B, width) of answers drawn from the student, no longer than uniform
    (B, T) is wide."""
    B, T = uniform.shape
    drawn = torch.searchsorted(logits.softmax(-1).cumsum(-1), uniform)  # (B, T)
    drawn = drawn.clamp(max=len(logits) - 1)
    ends = (drawn == END).long()
    padding = ends.cumsum(1) - ends > 0  # behind the first END
    response = torch.full((B, width), END)
    labels = torch.full((B, width), IGNORED)
    response[:, :T] = drawn.masked_fill(padding, END)
    labels[:, :T] = drawn.masked_fill(padding, IGNORED)
    return response, labels


def train(steps: int = 300, B: int = 64, longest: int = 8, lr: float = 0.3) -> None:
    for width in (8, 16, 32):
        logits = torch.zeros(len(TEACHER))
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            uniform = torch.rand(B, longest, generator=generator)
            response, labels = sampled(logits, uniform, width)
            begin = torch.full_like(response[:, :1], END)
            before = torch.cat([begin, response[:, :-1]], 1)  # (B, T)
            log_q = logits.requires_grad_().log_softmax(-1)  # (V,)
            log_p = TEACHER[before]  # (B, T, V)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)  # (B, T)
            teacher_logp = log_p.gather(-1, response[..., None]).squeeze(-1)  # (B, T)
            reward = teacher_logp - log_q[response].detach()
            loss = solve(response, labels, log_q[response], kl, reward)
            logits = (logits - lr * torch.autograd.grad(loss, logits)[0]).detach()
        end, once, *_ = logits.softmax(-1).tolist()
        print(f"width {width:2}  loss {loss.item():.3f}  share of Once {once:.2f}  "
              f"tokens an answer {1 / end:5.1f}")
    print()


# ---- what checks it ------------------------------------------------------------------------------

def by_gradients(solve):
    """What is compared: the gradient of the loss by student_logp and by kl."""

    def both(response: Tensor, labels: Tensor, student_logp: Tensor, kl: Tensor,
             reward: Tensor) -> tuple[Tensor, Tensor]:
        student_logp = student_logp.clone().requires_grad_()
        kl = kl.clone().requires_grad_()
        loss = solve(response, labels, student_logp, kl, reward)
        return gradients(loss, (student_logp, kl))

    return both


def spec(response: Tensor, labels: Tensor, student_logp: Tensor, kl: Tensor,
         reward: Tensor) -> Tensor:
    from distill import future_reward

    response_mask = labels >= 0
    R = future_reward(reward * response_mask, response_mask)
    return ((kl - student_logp * R) * response_mask).sum() / response_mask.sum()


def cases():
    generator = torch.Generator().manual_seed(5)
    for name, response_mask in masks():
        shape = response_mask.shape
        tokens = torch.randint(0, 4, shape, generator=generator)
        student_logp, kl, reward = torch.randn((3, *shape), generator=generator)
        response = tokens.masked_fill(~response_mask, END)
        labels = tokens.masked_fill(~response_mask, IGNORED)
        yield name, (response, labels, -student_logp.abs(), kl.abs(), reward)


def half_repaired(response: Tensor, labels: Tensor, student_logp: Tensor, kl: Tensor,
                  reward: Tensor, kind: str) -> Tensor:
    mask = (labels != IGNORED).float()
    inner = mask  # of the returns
    if kind == "no end tokens":
        mask = inner = (response != END).float()
    if kind == "only the mean":
        inner = torch.ones_like(mask)
    R = later(reward * inner) / later(inner).clamp(min=1)
    return ((kl - student_logp * R) * mask).sum() / mask.sum()


SLIPS = {
    "the padding is gone, and with it every end token, which is the same token: labels tell them "
    "apart":
        partial(half_repaired, kind="no end tokens"),
    "the mean is right, but the returns still count the padding":
        partial(half_repaired, kind="only the mean"),
}
HINTS = (
    "Print response_mask for one short answer in a wide batch. How many tokens does it claim?",
    "Which of the two, response or labels, ever holds -100?",
)
PARTS = ("the gradient by student_logp", "the gradient by kl")
EXERCISE = Exercise(solve, spec, cases, SLIPS, HINTS, PARTS, compared=by_gradients)

if __name__ == "__main__":
    if not sys.argv[1:]:
        train()
    run(EXERCISE)
