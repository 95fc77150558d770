"""Silent bug 2: a flag that should change nothing.

Trainer:  The student is a bigram model: it has a row of logits for each token, which predicts the
          token after it. It learns a batch of answers by the mean of -log q over all their tokens.
          To save memory, the gradient is made `micro_batch` answers at a time and added up.
Symptom:  --micro_batch should change memory and speed only. Here a smaller one makes the student's
          answers shorter.
Task:     Find and repair the bug, in `solve` only. logits are (V, V), and row y_{t-1} predicts y_t.
          answers are lists of tokens, their end token 0 included. solve returns the loss of the
          batch and its gradient (V, V).
In words: How would a test have found it? Would a batch of answers of one length have been enough?
Run:      python -m exercises.bug_2                    trains, then checks; --hint, then --hint=2
"""

import sys

import torch
from torch import Tensor

from exercises.checker import Exercise, gradients, run

END = 0
V = 3
ANSWERS = [[1] * n + [END] for n in (1, 1, 2, 12, 1, 2, 1, 15, 2, 1, 1, 9, 2, 1, 20, 1)]


def solve(logits: Tensor, answers: list[list[int]], micro_batch: int) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = torch.zeros(())
    gradient = torch.zeros(logits.shape)
    micro_batches = [answers[at : at + micro_batch] for at in range(0, len(answers), micro_batch)]
    for micro in micro_batches:
        before = torch.tensor([token for answer in micro for token in [END, *answer[:-1]]])  # (N,)
        response = torch.tensor([token for answer in micro for token in answer])  # (N,)
        logp = logits.log_softmax(-1)[before, response]  # (N,)
        micro_loss = -logp.mean() / len(micro_batches)
        gradient += torch.autograd.grad(micro_loss, logits)[0]
        loss += micro_loss.detach()
    return loss, gradient


def tokens_each(logits: Tensor) -> float:
    """The mean length of the student's answers, end token included: how often each token is
    visited, summed."""
    q = logits.double().softmax(-1)
    not_ended = torch.eye(V - 1, dtype=torch.float64) - q[1:, 1:]
    return 1 + (q[END, 1:] @ torch.linalg.inv(not_ended)).sum().item()


def train(steps: int = 300) -> None:
    mean = sum(len(answer) for answer in ANSWERS) / len(ANSWERS)
    print(f"The answers to learn from have {mean:.1f} tokens each. After {steps} updates the "
          "student's own have:")
    for micro_batch in (16, 8, 4, 2, 1):
        logits = torch.zeros(V, V)
        optimizer = torch.optim.Adam([logits], 0.1)
        for _ in range(steps):
            loss, logits.grad = solve(logits, ANSWERS, micro_batch)
            optimizer.step()
        print(f"micro_batch {micro_batch:2}  loss {loss.item():.3f}  "
              f"{tokens_each(logits):4.1f} tokens an answer")
    print()


# ---- what checks it ------------------------------------------------------------------------------

def spec(logits: Tensor, answers: list[list[int]], micro_batch: int) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the whole batch at once."""
    logits = logits.detach().requires_grad_()
    rows = [logits[[END, *answer[:-1]]] for answer in answers]
    response = torch.cat([torch.tensor(answer) for answer in answers])
    loss = torch.nn.functional.cross_entropy(torch.cat(rows), response)  # the mean over all tokens
    return loss.detach(), gradients(loss, (logits,))[0]


def cases():
    generator = torch.Generator().manual_seed(2)
    for name, lengths, micro_batch in (
        ("a last part that is smaller", [2, 6, 1, 3, 8], 2),
        ("several lengths, two at a time", [5, 2, 7, 1], 2),
        ("one at a time", [1, 9, 3], 1),
        ("one answer", [4], 1),
        ("all at a time, and room for more", [3, 1, 5], 8),
    ):
        answers = [torch.randint(1, 6, (n - 1,), generator=generator).tolist() + [END]
                   for n in lengths]
        yield name, (torch.randn(6, 6, generator=generator), answers, micro_batch)


def by_share_of_answers(logits: Tensor, answers: list[list[int]],
                        micro_batch: int) -> tuple[Tensor, Tensor]:
    loss = torch.zeros(())
    gradient = torch.zeros(logits.shape)
    for at in range(0, len(answers), micro_batch):
        part = answers[at : at + micro_batch]
        part_loss, part_gradient = spec(logits, part, len(part))
        loss += part_loss * len(part) / len(answers)
        gradient += part_gradient * len(part) / len(answers)
    return loss, gradient


SLIPS = {
    "each micro-batch is weighted by its share of the answers: a mean over tokens needs its share "
    "of the tokens":
        by_share_of_answers,
}
HINTS = (
    "How much does one token of the loss count if its micro-batch has 4 tokens, and how much if it "
    "has 40?",
    "Sums can be added up, means cannot. The divisor belongs to the whole batch, and it is known "
    "before the first micro-batch.",
)
EXERCISE = Exercise(solve, spec, cases, SLIPS, HINTS, ("the loss", "its gradient"))

if __name__ == "__main__":
    if not sys.argv[1:]:
        train()
    run(EXERCISE)
