"""Silent bug 1: answers that never stop.

Trainer:  The student is a bigram model: it has a row of logits for each token, which predicts the
          token after it. It learns sixteen answers by the mean of -log q over their tokens, as in
          phase 1. Token 0 ends an answer. It also fills up short rows, because GPT-2 has no other
          token for that.
Symptom:  The loss falls and the words are right, but hardly any sampled answer ends by itself.
Task:     Find and repair the bug, in `solve` only. solve(answers) turns lists of tokens into the
          batch (B, T), filled up with 0, and response_mask (B, T), which is true where there is
          something to learn. An answer without a 0 ran out of room.
In words: How would a test have found it? Which two answers would you give to the test?
Run:      python -m exercises.bug_1                    trains, then checks; --hint, then --hint=2
"""

import sys

import torch
from torch import Tensor

from exercises.checker import Exercise, gradients, run

END = 0
V = 5
LONGEST = 12
ANSWERS = [[1, 2, END], [3, END], [1, 4, 2, END], [2, 3, 4, END]] * 4


def solve(answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    T = max(len(answer) for answer in answers)
    response = torch.full((len(answers), T), END)  # (B, T)
    for b, answer in enumerate(answers):
        response[b, : len(answer)] = torch.tensor(answer)
    response_mask = response != END  # (B, T)
    return response, response_mask


def loss_of(logits: Tensor, response: Tensor, response_mask: Tensor) -> Tensor:
    """The mean of -log q(y_t | y_{t-1}) over the response tokens. Row END of the table predicts the
    first token."""
    before = torch.cat([torch.full_like(response[:, :1], END), response[:, :-1]], 1)  # (B, T)
    logp_vocab = logits.log_softmax(-1)[before]  # (B, T, V)
    logp = logp_vocab.gather(-1, response[..., None]).squeeze(-1)  # (B, T)
    return -(logp * response_mask).sum() / response_mask.sum()


def sampled(logits: Tensor, count: int) -> list[list[int]]:
    """Answers drawn from the student, of LONGEST tokens at most."""
    generator = torch.Generator().manual_seed(0)
    answers = []
    for _ in range(count):
        answer = []
        while len(answer) < LONGEST and END not in answer:
            row = logits[answer[-1] if answer else END].softmax(-1)
            answer.append(int(torch.multinomial(row, 1, generator=generator)))
        answers.append(answer)
    return answers


def tokens_each(answers: list[list[int]]) -> float:
    return sum(len(answer) for answer in answers) / len(answers)


def train(steps: int = 200) -> None:
    logits = torch.zeros(V, V, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.1)
    response, response_mask = solve(ANSWERS)
    for step in range(steps + 1):
        loss = loss_of(logits, response, response_mask)
        if step % 50 == 0:
            answers = sampled(logits.detach(), 100)
            ended = sum(END in answer for answer in answers)
            print(f"step {step:3}  loss {loss.item():.3f}  of 100 answers {ended:3} end, "
                  f"{tokens_each(answers):4.1f} tokens each")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"what it learned from: all end, {tokens_each(ANSWERS):.1f} tokens each\n")


# ---- what checks it ------------------------------------------------------------------------------

def by_loss(solve):
    """What is compared: the loss on the batch that solve makes, and its gradient."""

    def loss_and_gradient(logits: Tensor, answers: list[list[int]]) -> tuple[Tensor, Tensor]:
        response, response_mask = solve(answers)
        if response.shape != response_mask.shape:
            raise ValueError(f"response has the shape {tuple(response.shape)}, and response_mask "
                             f"has {tuple(response_mask.shape)}")
        logits = logits.clone().requires_grad_()
        loss = loss_of(logits, response, response_mask)
        return loss.detach(), gradients(loss, (logits,))[0]

    return loss_and_gradient


def padded(answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    from data import pad_right

    batch = pad_right([[1]] * len(answers), answers, torch.device("cpu"))
    return batch.response, batch.response_mask


def cases():
    generator = torch.Generator().manual_seed(1)
    for name, answers in (
        ("answers of several lengths", [[1, 2, END], [3, END], [1, 4, 2, 2, END]]),
        ("one answer", [[4, 1, END]]),
        ("answers of one token", [[END], [3], [END]]),
        ("answers that ran out of room", [[1, 2, 3], [4, END], [2, 2, 1, 1, 3]]),
        ("all of one length", [[3, END], [2, END]]),
    ):
        yield name, (torch.randn(V, V, generator=generator), answers)


def up_to_first_end(answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Every row is learned up to its first 0, even if that is padding."""
    response, _ = padded(answers)
    ends = (response == END).long()
    return response, ends.cumsum(1) - ends == 0


SLIPS = {
    "an answer that ran out of room is taught to end where it was cut: its first 0 is padding":
        up_to_first_end,
}
HINTS = (
    "Print response and response_mask of a short answer, one below the other. Which of its tokens "
    "has no loss?",
    "A token's value does not say whether it is padding, because the same value also means "
    "something else. Its place and the answer's length do.",
)
EXERCISE = Exercise(
    solve, padded, cases, SLIPS, HINTS, ("the loss", "its gradient"), compared=by_loss)

if __name__ == "__main__":
    if not sys.argv[1:]:
        train()
    run(EXERCISE)
