"""Silent bug 5: the width of a batch.

Trainer:  a student with one row of logits for all positions learns from a bigram teacher by Eqs. (3) and (6) of arXiv
          2306.08543v4, on answers of its own. Token 0 ends an answer, begins the next, and fills up short rows, as in
          GPT-2; in `labels`, which are the same tokens otherwise, padding is -100.
Symptom:  the same answers, filled up to another width, make another student. The wider the batch, the more often it
          says "Once", with which the teacher begins an answer, and which it hardly says later.
Task:     find and repair it, in `solve` only: response and labels (B, T) int64, student_logp (log q(y_t)), kl
          (KL[q || p] at each position) and reward (r_t), (B, T) each, scored at every position -> the loss, a mean
          over response tokens. student_logp and kl carry the gradient; reward does not.
In words: how would a test have found it? What is the smallest batch in which the bug does nothing?
Run:      python exercises/bug_5.py                    trains, then checks; --hint, then --hint=2
"""

import sys

import torch
from checker import Exercise, run
from torch import Tensor

END, ONCE, IGNORED = 0, 1, -100
TEACHER = torch.tensor([[0.02, 0.90, 0.04, 0.04], [0.20, 0.01, 0.40, 0.39],  # log p behind "end" and "Once" (V, V)
                        [0.35, 0.01, 0.24, 0.40], [0.35, 0.01, 0.40, 0.24]]).log()


def solve(response: Tensor, labels: Tensor, student_logp: Tensor, kl: Tensor, reward: Tensor) -> Tensor:
    response_mask = (response != IGNORED).float()  # (B, T)
    reward = reward * response_mask
    later = lambda values: values.flip(1).cumsum(1).flip(1) - values  # the sum of what follows (B, T)
    R = later(reward) / later(response_mask).clamp(min=1)  # Eq. (6)
    loss_single, loss_long = kl, -student_logp * R  # Eq. (3) (B, T)
    return ((loss_single + loss_long) * response_mask).sum() / response_mask.sum()


def sampled(logits: Tensor, uniform: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Answers drawn from the student, no longer than uniform (B, T) is wide: response and labels (B, width)."""
    drawn = torch.searchsorted(logits.softmax(-1).cumsum(-1), uniform).clamp(max=len(logits) - 1)  # (B, T)
    over = (drawn == END).cumsum(1) - (drawn == END).long() > 0  # behind the first END
    response, labels = torch.full((len(drawn), width), END), torch.full((len(drawn), width), IGNORED)
    response[:, : drawn.size(1)] = drawn.masked_fill(over, END)
    labels[:, : drawn.size(1)] = drawn.masked_fill(over, IGNORED)
    return response, labels


def train(steps: int = 300, B: int = 64, longest: int = 8, lr: float = 0.3) -> None:
    for width in (8, 16, 32):
        logits, generator = torch.zeros(len(TEACHER)), torch.Generator().manual_seed(0)
        for _ in range(steps):
            response, labels = sampled(logits, torch.rand(B, longest, generator=generator), width)
            before = torch.cat([torch.full_like(response[:, :1], END), response[:, :-1]], 1)  # (B, T)
            log_q, log_p = logits.requires_grad_().log_softmax(-1), TEACHER[before]  # (V,), (B, T, V)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)  # (B, T)
            reward = log_p.gather(-1, response[..., None]).squeeze(-1) - log_q[response].detach()
            loss = solve(response, labels, log_q[response], kl, reward)
            logits = (logits - lr * torch.autograd.grad(loss, logits)[0]).detach()
        end, once, *_ = logits.softmax(-1).tolist()
        print(f"width {width:2}  loss {loss.item():.3f}  share of Once {once:.2f}  tokens an answer {1 / end:5.1f}")
    print()


# ---- what checks it -------------------------------------------------------------------------------------------------

def checked(solve):
    """What is compared: the gradient of the loss by student_logp and by kl."""
    def gradients(response: Tensor, labels: Tensor, student_logp: Tensor, kl: Tensor,
                  reward: Tensor) -> tuple[Tensor, Tensor]:
        given = student_logp.clone().requires_grad_(), kl.clone().requires_grad_()
        loss = solve(response, labels, *given, reward)
        return torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)
    return gradients


def spec(response: Tensor, labels: Tensor, student_logp: Tensor, kl: Tensor, reward: Tensor) -> Tensor:
    from distill import future_reward, minillm_loss
    response_mask, own = labels >= 0, student_logp.detach()
    R = future_reward(reward * response_mask, response_mask)
    losses = minillm_loss(student_logp, kl, own, own, R, response_mask, weight="none", clip_eps=torch.inf)
    return (losses[0] + losses[1]).sum() / response_mask.sum()


def cases():
    generator = torch.Generator().manual_seed(5)
    for name, lengths, width in (("answers of several lengths", [5, 2, 7, 1], 7), ("one row", [4], 4),
                                 ("answers of one token", [1, 1, 1], 1), ("padding behind every answer", [3, 2], 6),
                                 ("a row that is all padding", [0, 4], 5)):
        outside = torch.arange(width) >= torch.tensor(lengths)[:, None]
        tokens = torch.randint(0, 4, outside.shape, generator=generator)
        student_logp, kl, reward = torch.randn(3, *outside.shape, generator=generator)
        yield name, (tokens.masked_fill(outside, END), tokens.masked_fill(outside, IGNORED), -student_logp.abs(),
                     kl.abs(), reward)


def repaired(mask_of, only_last: bool = False):
    def mistaken(response: Tensor, labels: Tensor, student_logp: Tensor, kl: Tensor, reward: Tensor) -> Tensor:
        mask = mask_of(response, labels).float()
        inner = torch.ones_like(mask) if only_last else mask
        later = lambda values: values.flip(1).cumsum(1).flip(1) - values
        R = later(reward * inner) / later(inner).clamp(min=1)
        return ((kl - student_logp * R) * mask).sum() / mask.sum()

    return checked(mistaken)


SLIPS = {
    "the padding is gone, and with it every end token, which is the same token: labels tell them apart":
        repaired(lambda response, labels: response != END),
    "the mean is right, but the returns still count rewards and terms of the padding":
        repaired(lambda response, labels: labels != IGNORED, only_last=True)}
HINTS = ("Print response_mask for one short answer in a wide batch. How many tokens does it say there are?",
         "Which of the two, response and labels, ever holds -100?")
EXERCISE = Exercise(checked(solve), checked(spec), cases, SLIPS, HINTS,
                    ("the gradient by student_logp", "the gradient by kl"))

if __name__ == "__main__":
    if not sys.argv[1:]:
        train()
    run(EXERCISE)
