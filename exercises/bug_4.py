"""Silent bug 4: an eye for the next word only.

Trainer:  a student with one row of logits for all positions learns from a teacher by Eq. (3) of arXiv 2306.08543v4:
          L_Single, and L_Long with the return of what follows; no mixture, no length normalisation. All answers of
          oracle.py's toy are enumerated and weighted by their probability, so there is no noise of sampling.
Symptom:  the gradient of Eq. (3) is that of Eq. (1), and here nothing is sampled; yet KL[q || p] of whole answers
          rises. The teacher likes to begin with "a", but behind an "a" it never ends; the student takes the "a".
Task:     find and repair it, in `solve` only: student_logp (log q(y_t)), kl (KL[q || p] at each position), reward
          (r_t) and response_mask, (B, T) each -> a loss for each answer (B,), the gradient of which is Eq. (3)'s
          estimate. student_logp and kl carry the gradient; reward does not.
In words: how would a test have found it? Why is q = p no good case for such a test?
Run:      python exercises/bug_4.py                    trains, then checks; --hint, then --hint=2
"""

import sys

import torch
from checker import Exercise, run
from torch import Tensor

TEACHER = torch.tensor([[0.60, 0.10, 0.30], [0.45, 0.549, 0.001], [0.10, 0.10, 0.80],  # at first, behind a, behind b
                        [0.01, 0.989, 0.001], [0.01, 0.989, 0.001], [0.90, 0.05, 0.05],  # behind aa, ab, ba
                        [0.01, 0.989, 0.001]], dtype=torch.float64).log()  # behind bb; log p of a, b, end: (7, V)


def solve(student_logp: Tensor, kl: Tensor, reward: Tensor, response_mask: Tensor) -> Tensor:
    R, total = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    reward = reward * response_mask
    for t in reversed(range(reward.size(1))):
        total = total + reward[:, t]  # (B,)
        R[:, t] = total
    loss_single, loss_long = kl, -student_logp * R  # (B, T)
    return ((loss_single + loss_long) * response_mask).sum(1)


def train(steps: int = 200, lr: float = 0.5) -> None:
    from distill import reverse_kl, token_reward
    from oracle import MASK, PREFIXES, V, exact_gradient, logps
    (log_p_vocab, log_p), rows = logps(TEACHER), len(PREFIXES)
    students = {"solve": torch.zeros(V, dtype=torch.float64), "Eq. (1)": torch.zeros(V, dtype=torch.float64)}
    for step in range(steps + 1):
        for name, logits in students.items():
            table = logits.expand(rows, V).clone().requires_grad_()
            log_q_vocab, log_q = logps(table)
            probability = log_q.sum(1).exp().detach()  # of each of the answers (N,)
            if step in (0, 5, 20, 100, steps):
                whole, a = (probability @ (log_q - log_p).sum(1)).item(), logits.softmax(-1)[0].item()
                print(f"step {step:3}  by {name:8}  KL of whole answers {whole:.3f}  share that begin with a {a:.2f}")
            if name == "solve":
                reward = token_reward(log_p, log_q.detach()) * MASK
                losses = solve(log_q, reverse_kl(log_q_vocab, log_p_vocab), reward, MASK)  # (N,)
                gradient = torch.autograd.grad(probability @ losses, table)[0]
            else:
                gradient = exact_gradient(table, TEACHER)
            students[name] = logits - lr * gradient.sum(0)
    print()


# ---- what checks it -------------------------------------------------------------------------------------------------

def checked(solve):
    """What is compared: the gradient by student_logp and by kl of a loss in which each answer has a weight."""
    def gradients(student_logp: Tensor, kl: Tensor, reward: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        given = student_logp.clone().requires_grad_(), kl.clone().requires_grad_()
        losses = solve(*given, reward, response_mask)
        if losses.shape != (len(kl),):
            raise ValueError(f"a loss for each answer has the shape {(len(kl),)}, this has {tuple(losses.shape)}")
        weighted = (losses * torch.arange(1, len(kl) + 1)).sum()
        return torch.autograd.grad(weighted, given, allow_unused=True, materialize_grads=True)
    return gradients


def spec(student_logp: Tensor, kl: Tensor, reward: Tensor, response_mask: Tensor) -> Tensor:
    from distill import future_reward, minillm_loss
    R, own = future_reward(reward * response_mask, response_mask, length_norm=False), student_logp.detach()
    losses = minillm_loss(student_logp, kl, own, own, R, response_mask, weight="none", clip_eps=torch.inf)
    return (losses[0] + losses[1]).sum(1)


def cases():
    generator = torch.Generator().manual_seed(4)
    for name, lengths, width in (("answers of several lengths", [5, 2, 7, 1], 7), ("one row", [4], 4),
                                 ("answers of one token", [1, 1, 1], 1), ("padding behind every answer", [3, 2], 6),
                                 ("a row that is all padding", [0, 4], 5)):
        student_logp, kl, reward = torch.randn(3, len(lengths), width, generator=generator)
        yield name, (-student_logp.abs(), kl.abs(), reward, torch.arange(width) < torch.tensor(lengths)[:, None])


HINTS = ("Take answers of one token. Which of the two losses should have a gradient there, and which of them has?",
         "Write down which r belong to L_Single at t, and which to L_Long at t. Each of r_t ... r_T has one place.")
EXERCISE = Exercise(checked(solve), checked(spec), cases, {}, HINTS,
                    ("the gradient by student_logp", "the gradient by kl"))

if __name__ == "__main__":
    if not sys.argv[1:]:
        train()
    run(EXERCISE)
