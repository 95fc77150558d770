"""The estimators of distill.py against the exact gradient, on toys all of whose answers can be enumerated.

Paper:    arXiv 2306.08543v4, Section 2.2 and Appendices A.2 and A.3: which of Eqs. (2) to (7) have the gradient of
          Eq. (1), and what the others pay for less noise. The functions are the very ones distill.py trains with.
Run:      python oracle.py
Shapes:   N answers (all there are), T response tokens, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from config import check, flag, run
from distill import OFFICIAL, future_reward, minillm_loss, reverse_kl, token_reward, whiten
from sample import mix, taken

V, T, END = 3, 3, 2  # two words and an end token; answers of three tokens at most
PREFIXES = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]  # each has a row of logits in a model's table


def every_answer() -> tuple[Tensor, Tensor, Tensor]:
    """response (N, T), response_mask (N, T), and the row of a model's table from which each token is drawn (N, T)."""
    answers = [[END], [0, END], [1, END], *([a, b, c] for a in range(2) for b in range(2) for c in range(V))]
    pad = lambda row: row + [0] * (T - len(row))
    mask = [[t < len(answer) for t in range(T)] for answer in answers]
    tables = [pad([PREFIXES.index(tuple(answer[:t])) for t in range(len(answer))]) for answer in answers]
    return torch.tensor([pad(answer) for answer in answers]), torch.tensor(mask), torch.tensor(tables)


RESPONSE, MASK, TABLE = every_answer()


def logps(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log-probabilities of any next token (N, T, V) and of the one taken (N, T), from a table of logits (7, V)."""
    logp_vocab = logits.log_softmax(-1)[TABLE]
    return logp_vocab, taken(logp_vocab, RESPONSE) * MASK


def exact_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. (1) by autograd: the gradient of KL[q || p] over whole answers, (7, V)."""
    log_q, log_p = (logps(logits)[1].sum(1) for logits in (student, teacher))
    return torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), student)[0]  # Eq. (1)


def answer_gradients(student: Tensor, teacher: Tensor, mix_alpha: float = 0.0, weight: str = "per_token",
                     weight_single: bool = True, single_step: bool = True, long_term: bool = True,
                     length_norm: bool = False, return_from: str = "next", gamma: float = 1.0,
                     reward_scale: float = 1.0, reward_clip: float = math.inf, whitening: str = "none",
                     baseline: float = 0.0, clip_eps: float = math.inf) -> tuple[Tensor, Tensor]:
    """What distill.py makes of each answer: the probability with which it is sampled (N,), and its gradient (N, 7 V),
    summed over its tokens as in the equations. (distill.py's mean over tokens differs by a factor.)"""
    (log_q_vocab, log_q), (log_p_vocab, log_p) = logps(student), logps(teacher)
    mixed = taken(mix(log_q_vocab, log_p_vocab, mix_alpha), RESPONSE).detach() * MASK
    probability = mixed.sum(1).exp()
    reward = token_reward(log_p, log_q.detach(), reward_scale, reward_clip) * MASK
    R = (future_reward(reward, MASK, gamma, length_norm, return_from) - baseline) * MASK
    if whitening != "none":  # of a batch in which each answer stands as often as in a hundred thousand samples
        counts = (probability * 1e5).round().long().clamp(min=1)
        batch = whiten(R.repeat_interleave(counts, 0), MASK.repeat_interleave(counts, 0), whitening)
        R = batch[counts.cumsum(0) - 1]
    single, long, _, _ = minillm_loss(log_q, reverse_kl(log_q_vocab, log_p_vocab), log_q.detach(), mixed, R, MASK,
                                      weight, weight_single, clip_eps)
    losses = (single_step * single + long_term * long).sum(1)  # (N,)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0].flatten() for loss in losses]
    return probability, torch.stack(gradients)


PAPER = dict(mix_alpha=0.2, length_norm=True, clip_eps=0.2)
RELEASED = {"whitening" if name == "whiten" else name: value for name, value in OFFICIAL.items()
            if name not in ("pt_kd", "normalize")}
ESTIMATORS = {
    "Eq. (2)": dict(single_step=False, return_from="current", baseline=1.0),
    "Eq. (2) without its -1": dict(single_step=False, return_from="current"),
    "Eq. (3)": dict(),
    "L_Single alone (GKD with reverse KL)": dict(long_term=False),
    "L_Single, and R_t for R_{t+1}": dict(return_from="current"),
    "Eq. (4), alpha 0.2, exact weights": dict(mix_alpha=0.2, weight="exact"),
    "Eqs. (4, 5) as printed: product": dict(mix_alpha=0.2, weight="product"),
    "Eqs. (4, 5) with w_t per token": dict(mix_alpha=0.2),
    "  the same, not on L_Single": dict(mix_alpha=0.2, weight_single=False),
    "  the same, length-normalised, Eq. (6)": dict(mix_alpha=0.2, length_norm=True),
    "  the same, clipped": dict(mix_alpha=0.2, clip_eps=0.2),
    "Eq. (4), no weights": dict(mix_alpha=0.2, weight="none"),
    "Eq. (6), length normalisation": dict(length_norm=True),
    "--recipe=paper: Eq. (7), clipped": PAPER,
    "--recipe=official": PAPER | RELEASED,
}


def compare(settings: dict, toys: int, seed: int) -> tuple[float, float, float]:
    """Means over toys of the cosine of expected and exact gradient, of their distance, and of the standard deviation
    of an estimate from one answer; the last two in units of the exact gradient's norm."""
    generator, figures = torch.Generator().manual_seed(seed), []
    for _ in range(toys):
        student, teacher = torch.randn(2, len(PREFIXES), V, generator=generator, dtype=torch.float64)
        exact = exact_gradient(student.requires_grad_(), teacher).flatten()
        probability, each = answer_gradients(student, teacher, **settings)
        mean = probability @ each
        noise = (probability @ (each - mean).square().sum(1)).sqrt()
        cosine = torch.cosine_similarity(mean, exact, dim=0)
        figures.append([cosine, (mean - exact).norm() / exact.norm(), noise / exact.norm()])
    return tuple(torch.tensor(figures).mean(0).tolist())


# ---- command --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    toys: int = flag(100, "random pairs of p and q to average over")
    seed: int = flag(0, "of the toys")

    def __post_init__(self):
        check(self, toys=(1, 10**6), seed=(0, 2**62))


def main(cfg: Config) -> None:
    print(f"Expected gradient against that of KL[q || p], {len(RESPONSE)} answers enumerated, mean of {cfg.toys} toys")
    print(f"\n{'estimator':38}{'cosine':>10}{'error':>10}{'noise':>8}")
    for name, settings in ESTIMATORS.items():
        cosine, error, noise = compare(settings, cfg.toys, cfg.seed)
        print(f"{name:38}{cosine:10.6f}{error:10.1e}{noise:8.2f}")
    print("\nerror: |expected - exact| / |exact|. noise: standard deviation of one answer's estimate / |exact|.")


if __name__ == "__main__":
    run(main, Config)
