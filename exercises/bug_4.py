"""Silent bug 4: an eye for the next word only.

Trainer:  The student is one row of logits for all positions. It learns from a teacher by Eq. (3) of
          arXiv 2306.08543v4: L_Single, and L_Long with the return of what follows, without mixture
          and length normalisation. All answers of the oracle's toy are enumerated and weighted by
          their probability, so nothing is sampled.
Symptom:  The gradient of Eq. (3) is that of Eq. (1), and here it has no noise. Yet KL[q || p] of
          whole answers rises. The teacher likes to begin with "a", but after an "a" it never ends;
          the student takes the "a".
Task:     Find and repair the bug, in `solve` only. student_logp is log q(y_t), kl is KL[q || p] at
          each position, reward is r_t, and response_mask is as always, (B, T) each. solve returns a
          loss for each answer (B,), whose gradient is Eq. (3)'s estimate. student_logp and kl carry
          the gradient; reward does not.
In words: How would a test have found it? Why is q = p not a good case for such a test?
Run:      python -m exercises.bug_4                    trains, then checks; --hint, then --hint=2
"""

import sys

import torch
from torch import Tensor

from exercises.checker import Exercise, gradients, masks, run

TEACHER = torch.tensor([  # the probabilities of a, b and end
    [0.60, 0.10, 0.30],  # as the first token
    [0.45, 0.549, 0.001],  # after a
    [0.10, 0.10, 0.80],  # after b
    [0.01, 0.989, 0.001],  # after aa
    [0.01, 0.989, 0.001],  # after ab
    [0.90, 0.05, 0.05],  # after ba
    [0.01, 0.989, 0.001],  # after bb
], dtype=torch.float64).log()


def solve(student_logp: Tensor, kl: Tensor, reward: Tensor, response_mask: Tensor) -> Tensor:
    reward = reward * response_mask
    R = torch.zeros_like(reward)
    total = torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.size(1))):
        total = total + reward[:, t]  # (B,)
        R[:, t] = total
    loss_single = kl  # (B, T)
    loss_long = -student_logp * R  # (B, T)
    return ((loss_single + loss_long) * response_mask).sum(1)


def train(steps: int = 200, lr: float = 0.5) -> None:
    from distill import reverse_kl, token_reward
    from exercises.oracle import MASK, PREFIXES, V, exact_gradient, logps

    log_p_vocab, log_p = logps(TEACHER)
    students = {name: torch.zeros(V, dtype=torch.float64) for name in ("solve", "Eq. (1)")}
    for step in range(steps + 1):
        for name, logits in students.items():
            table = logits.expand(len(PREFIXES), V).clone().requires_grad_()
            log_q_vocab, log_q = logps(table)
            probability = log_q.sum(1).exp().detach()  # of each of the answers (N,)
            if step in (0, 5, 20, 100, steps):
                whole = (probability @ (log_q - log_p).sum(1)).item()
                begins_with_a = logits.softmax(-1)[0].item()
                print(f"step {step:3}  by {name:8}  KL of whole answers {whole:.3f}  "
                      f"share that begin with a {begins_with_a:.2f}")
            if name == "solve":
                reward = token_reward(log_p, log_q.detach()) * MASK
                losses = solve(log_q, reverse_kl(log_q_vocab, log_p_vocab), reward, MASK)  # (N,)
                gradient = torch.autograd.grad(probability @ losses, table)[0]
            else:
                gradient = exact_gradient(table, TEACHER)
            students[name] = logits - lr * gradient.sum(0)
    print()


# ---- what checks it ------------------------------------------------------------------------------

def by_gradients(solve):
    """What is compared: the gradients by student_logp and by kl of a loss that weights each answer
    differently."""

    def both(student_logp: Tensor, kl: Tensor, reward: Tensor, response_mask: Tensor) -> tuple:
        student_logp = student_logp.clone().requires_grad_()
        kl = kl.clone().requires_grad_()
        losses = solve(student_logp, kl, reward, response_mask)
        if losses.shape != (len(kl),):
            raise ValueError(f"a loss for each answer has the shape {(len(kl),)}, this has "
                             f"{tuple(losses.shape)}")
        return gradients(losses * torch.arange(1, len(kl) + 1), (student_logp, kl))

    return both


def spec(student_logp: Tensor, kl: Tensor, reward: Tensor, response_mask: Tensor) -> Tensor:
    from distill import future_reward

    R = future_reward(reward * response_mask, response_mask, length_norm=False)
    return ((kl - student_logp * R) * response_mask).sum(1)


def cases():
    generator = torch.Generator().manual_seed(4)
    for name, response_mask in masks():
        numbers = torch.randn((3, *response_mask.shape), generator=generator)
        student_logp, kl, reward = numbers
        yield name, (-student_logp.abs(), kl.abs(), reward, response_mask)


HINTS = (
    "Take answers of one token. Which of the two losses should have a gradient there, and which of "
    "them has one?",
    "Write down which r belong to L_Single at t, and which to L_Long at t. Each of r_t ... r_T has "
    "one place.",
)
PARTS = ("the gradient by student_logp", "the gradient by kl")
EXERCISE = Exercise(solve, spec, cases, {}, HINTS, PARTS, compared=by_gradients)

if __name__ == "__main__":
    if not sys.argv[1:]:
        train()
    run(EXERCISE)
