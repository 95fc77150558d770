"""Silent bug 2: a flag that should change nothing.

Trainer:  a student with a row of logits for each token, the one before (a bigram model), learns a batch of answers by
          the mean of -log q over all of their tokens. To save memory their gradient is made `micro_batch` answers at a
          time, and added up.
Symptom:  --micro_batch should change memory and speed only. Here the smaller it is, the shorter are the student's
          answers.
Task:     find and repair it, in `solve` only: logits (V, V), row y_{t-1} of which predicts y_t, and answers as lists of
          tokens, their end token 0 included -> the loss of the batch and its gradient (V, V).
In words: how would a test have found it? Would a batch of answers of one length have been enough?
Run:      python exercises/bug_2.py                    trains, then checks; --hint, then --hint=2
"""

import sys

import torch
from checker import Exercise, run
from torch import Tensor

END, V = 0, 3
ANSWERS = [[1] * n + [END] for n in (1, 1, 2, 12, 1, 2, 1, 15, 2, 1, 1, 9, 2, 1, 20, 1)]


def solve(logits: Tensor, answers: list[list[int]], micro_batch: int) -> tuple[Tensor, Tensor]:
    loss, gradient, logits = torch.zeros(()), torch.zeros_like(logits), logits.detach().requires_grad_()
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
    """The mean length of the student's answers, end token included: how often each token is visited, summed."""
    q = logits.double().softmax(-1)
    words = torch.eye(V - 1, dtype=torch.float64) - q[1:, 1:]  # whoever has not ended goes on
    return 1 + (q[END, 1:] @ torch.linalg.inv(words)).sum().item()


def train(steps: int = 300) -> None:
    mean = sum(map(len, ANSWERS)) / len(ANSWERS)
    print(f"what is learned from has {mean:.1f} tokens an answer; the student's, after {steps} updates:")
    for micro_batch in (16, 8, 4, 2, 1):
        logits = torch.zeros(V, V)
        optimizer = torch.optim.Adam([logits], 0.1)
        for _ in range(steps):
            loss, logits.grad = solve(logits, ANSWERS, micro_batch)
            optimizer.step()
        print(f"micro_batch {micro_batch:2}  loss {loss.item():.3f}  {tokens_each(logits):4.1f} tokens an answer")
    print()


# ---- what checks it -------------------------------------------------------------------------------------------------

class Bigram:
    """A table of logits, as the model that teacher.answer_loss asks for."""

    def __init__(self, table: Tensor):
        self.table = table

    def __call__(self, tokens: Tensor, where: tuple) -> Tensor:
        return self.table[tokens[where]]  # (N, V)

    def head(self) -> None:
        return None

    def logits(self, hidden: Tensor, head: None) -> Tensor:
        return hidden


def spec(logits: Tensor, answers: list[list[int]], micro_batch: int) -> tuple[Tensor, Tensor]:
    from config import Machine
    from data import Example, Row
    from teacher import answer_loss
    logits, m = logits.requires_grad_(), Machine(torch.device("cpu"), torch.float32)
    _, total = answer_loss(Bigram(logits), [Example(Row(""), [END], answer) for answer in answers], m)
    loss = total / sum(map(len, answers))
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def cases():
    generator = torch.Generator().manual_seed(2)
    for name, lengths, micro_batch in (("a last part that is smaller", [2, 6, 1, 3, 8], 2),
                                       ("several lengths, two at a time", [5, 2, 7, 1], 2),
                                       ("one at a time", [1, 9, 3], 1), ("one answer", [4], 1),
                                       ("all at a time, and room for more", [3, 1, 5], 8)):
        answers = [torch.randint(1, 6, (n - 1,), generator=generator).tolist() + [END] for n in lengths]
        yield name, (torch.randn(6, 6, generator=generator), answers, micro_batch)


def by_answers(logits: Tensor, answers: list[list[int]], micro_batch: int) -> tuple[Tensor, Tensor]:
    parts = [answers[at : at + micro_batch] for at in range(0, len(answers), micro_batch)]
    found = [[len(part) / len(answers) * value for value in spec(logits.detach().clone(), part, len(part))]
             for part in parts]
    return tuple(sum(values) for values in zip(*found))


SLIPS = {"each micro-batch weighs by its share of the answers; for a mean over tokens it is the share of the tokens":
         by_answers}
HINTS = ("How much does one token of the loss count if its micro-batch has 4 tokens, and how much if it has 40?",
         "Sums can be added up, means cannot. The divisor belongs to the whole batch and is known before the first "
         "micro-batch.")
EXERCISE = Exercise(solve, spec, cases, SLIPS, HINTS, ("the loss", "its gradient"))

if __name__ == "__main__":
    if not sys.argv[1:]:
        train()
    run(EXERCISE)
