"""Silent bug 1: answers that never stop.

Trainer:  a student with a row of logits for each token, the one before (a bigram model), learns sixteen answers by the
          mean of -log q over their tokens, as phase 1 does. Token 0 ends an answer; it fills up short rows too, as
          GPT-2 has no other token for that.
Symptom:  the loss falls, the words are right, and hardly an answer that is sampled ends by itself.
Task:     find and repair it, in `solve` only: answers as lists of tokens -> the batch (B, T), filled up with 0, and
          response_mask (B, T), true where there is something to learn. An answer without 0 ran out of length.
In words: how would a test have found it? Which two answers would you give to it?
Run:      python exercises/bug_1.py                    trains, then checks; --hint, then --hint=2
"""

import sys

import torch
from checker import Exercise, run
from torch import Tensor

END, V, LONGEST = 0, 5, 12
ANSWERS = [[1, 2, END], [3, END], [1, 4, 2, END], [2, 3, 4, END]] * 4


def solve(answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    T = max(len(answer) for answer in answers)
    response = torch.full((len(answers), T), END)  # (B, T)
    for b, answer in enumerate(answers):
        response[b, : len(answer)] = torch.tensor(answer)
    response_mask = response != END  # (B, T)
    return response, response_mask


def loss_of(logits: Tensor, response: Tensor, response_mask: Tensor) -> Tensor:
    """The mean of -log q(y_t | y_{t-1}) over the response tokens. Row END of the table speaks first."""
    before = torch.cat([torch.full_like(response[:, :1], END), response[:, :-1]], 1)  # (B, T)
    logp = logits.log_softmax(-1)[before].gather(-1, response[..., None]).squeeze(-1)  # (B, T)
    return -(logp * response_mask).sum() / response_mask.sum()


def sampled(logits: Tensor, count: int) -> list[list[int]]:
    """Answers drawn from the student, of LONGEST tokens at most."""
    generator, answers = torch.Generator().manual_seed(0), []
    for _ in range(count):
        answer = []
        while len(answer) < LONGEST and END not in answer:
            row = logits[answer[-1] if answer else END].softmax(-1)
            answer.append(int(torch.multinomial(row, 1, generator=generator)))
        answers.append(answer)
    return answers


def train(steps: int = 200) -> None:
    logits = torch.zeros(V, V, requires_grad=True)
    optimizer, (response, response_mask) = torch.optim.Adam([logits], 0.1), solve(ANSWERS)
    for step in range(steps + 1):
        loss = loss_of(logits, response, response_mask)
        if step % 50 == 0:
            answers = sampled(logits.detach(), 100)
            ended = sum(END in answer for answer in answers)
            tokens = sum(map(len, answers)) / len(answers)
            print(f"step {step:3}  loss {loss.item():.3f}  of 100 answers {ended:3} end, {tokens:4.1f} tokens each")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"what it learned from: all end, {sum(map(len, ANSWERS)) / len(ANSWERS):.1f} tokens each\n")


# ---- what checks it -------------------------------------------------------------------------------------------------

def checked(solve):
    """What is compared: the loss on a batch that `solve` has made, and its gradient."""
    def loss_and_gradient(logits: Tensor, answers: list[list[int]]) -> tuple[Tensor, Tensor]:
        response, response_mask = solve(answers)
        if response.shape != response_mask.shape:
            raise ValueError(f"response {tuple(response.shape)} and response_mask {tuple(response_mask.shape)} differ")
        loss = loss_of(logits := logits.clone().requires_grad_(), response, response_mask)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]
    return loss_and_gradient


def padded(answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    import data
    return data.pad_right([[1]] * len(answers), answers, torch.device("cpu"))[1:]


def cases():
    generator = torch.Generator().manual_seed(1)
    for name, answers in (("answers of several lengths", [[1, 2, END], [3, END], [1, 4, 2, 2, END]]),
                          ("one answer", [[4, 1, END]]), ("answers of one token", [[END], [3], [END]]),
                          ("answers that ran out of length", [[1, 2, 3], [4, END], [2, 2, 1, 1, 3]]),
                          ("all of one length", [[3, END], [2, END]])):
        yield name, (torch.randn(V, V, generator=generator), answers)


def filled(answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Every row is learned as far as its first 0, even where that is padding."""
    response, _ = padded(answers)
    return response, (response == END).cumsum(1) - (response == END).long() == 0


SLIPS = {"an answer that ran out of length is taught to end where it was cut: its first 0 is padding": checked(filled)}
HINTS = ("Print response and response_mask of one short answer beside each other. Which of its tokens has no loss?",
         "A token's value does not say whether it is padding, as the same value stands for something else; its place "
         "and the answer's length do.")
EXERCISE = Exercise(checked(solve), checked(padded), cases, SLIPS, HINTS, ("the loss", "its gradient"))

if __name__ == "__main__":
    if not sys.argv[1:]:
        train()
    run(EXERCISE)
