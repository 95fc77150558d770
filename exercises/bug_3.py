"""Silent bug 3: rare words.

Trainer:  The student is one row of logits over eight words. It learns from a teacher by the policy
          gradient of Eq. (2) of arXiv 2306.08543v4, its "- 1" included: 256 words are drawn from
          the student, and each pushes by (r - 1) grad log q, where r = log p - log q.
Symptom:  The student begins near the teacher, as after phase 1. From there KL[q || p] rises, and
          ever more probability goes to words that the teacher hardly uses.
Task:     Find and repair the bug, in `solve` only. student_logp_vocab is (B, V), and uniform (B,)
          holds numbers in [0, 1). solve returns the token (B,) at which the sum of the
          probabilities, in the order of the vocabulary, first exceeds the number, and its
          log q (B,).
In words: How would a test have found it? What does E[grad log q] = 0 need, and why does the "- 1"
          show it here?
Run:      python -m exercises.bug_3                    trains, then checks; --hint, then --hint=2
"""

import sys

import torch
from torch import Tensor

from exercises.checker import Exercise, run

TEACHER = torch.tensor([0.40, 0.25, 0.15, 0.08, 0.05, 0.03, 0.02, 0.02]).log()  # log p (V,)
LIKELIEST = 3  # words; those behind them are often noise


def solve(student_logp_vocab: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    kept = min(LIKELIEST, student_logp_vocab.size(-1))
    least = student_logp_vocab.topk(kept, dim=-1).values[:, -1:]  # (B, 1)
    rollout_logp_vocab = student_logp_vocab.masked_fill(student_logp_vocab < least, -torch.inf)
    rollout_logp_vocab = rollout_logp_vocab.log_softmax(-1)  # (B, V)
    cdf = rollout_logp_vocab.detach().double().exp().cumsum(-1)  # (B, V)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(1)  # (B,)
    student_logp = student_logp_vocab.gather(-1, token[:, None]).squeeze(-1)  # (B,)
    return token, student_logp


def train(steps: int = 400, B: int = 256, lr: float = 0.5) -> None:
    logits = 0.8 * TEACHER
    generator = torch.Generator().manual_seed(0)
    for step in range(steps + 1):
        logits.requires_grad_()
        q = logits.log_softmax(-1)
        uniform = torch.rand(B, generator=generator, dtype=torch.float64)
        token, student_logp = solve(q.expand(B, -1), uniform)
        reward = TEACHER[token] - student_logp.detach()  # (B,)
        loss = -((reward - 1) * student_logp).mean()  # Eq. (2)
        if step % 100 == 0:
            kl = (q.exp() * (q - TEACHER)).sum().item()
            rare = q.exp()[LIKELIEST:].sum().item()
            print(f"step {step:3}  KL {kl:.3f}  reward {reward.mean().item():6.3f}  "
                  f"share of rare words {rare:.2f}")
        logits = (logits - lr * torch.autograd.grad(loss, logits)[0]).detach()
    p = TEACHER.exp()
    print(f"the teacher's own share of rare words: {p[LIKELIEST:].sum().item():.2f}; word by word:")
    for name, row in (("p", p), ("q", logits.softmax(-1))):
        print(name, *(f"{value:5.2f}" for value in row.tolist()))
    print()


# ---- what checks it ------------------------------------------------------------------------------

def spec(student_logp_vocab: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    from sample import inverse_cdf, taken

    token = inverse_cdf(student_logp_vocab, uniform)
    return token, taken(student_logp_vocab, token)


def cases():
    generator = torch.Generator().manual_seed(3)
    for name, B, V in (
        ("eight words", 40, 8),
        ("two words", 5, 2),
        ("one row", 1, 6),
        ("a large vocabulary", 30, 300),
    ):
        logits = 2 * torch.randn(B, V, generator=generator)
        uniform = torch.rand(B, generator=generator, dtype=torch.float64)
        yield name, (logits.log_softmax(-1), uniform)
    logits = torch.randn(9, 5, generator=generator)
    impossible = torch.arange(5) == torch.arange(9)[:, None] % 5  # one word in each row
    logits = logits.masked_fill(impossible, -9e9)
    uniform = torch.linspace(0, 0.999, 9, dtype=torch.float64)
    yield "a word that cannot be drawn", (logits.log_softmax(-1), uniform)


HINTS = (
    "Count each word in ten thousand draws, and compare with q. Which words are missing?",
    "What is scored is q. What is drawn from has to be the very same numbers: where do the two "
    "part?",
)
EXERCISE = Exercise(solve, spec, cases, {}, HINTS, ("the token", "its log q"))

if __name__ == "__main__":
    if not sys.argv[1:]:
        train()
    run(EXERCISE)
