"""The estimators of distill.py against the exact gradient, on toys small enough to enumerate.

Paper:    arXiv 2306.08543v4, Section 2.2 and Appendices A.2 and A.3: which of Eqs. (2) to (7) have
          the gradient of Eq. (1), and what the others give up for less noise. The functions are
          those that distill.py trains with.
Run:      python -m exercises.oracle
Shapes:   N answers (all there are), T response tokens, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from config import check, flag, run
from distill import OBJECTIVES, OFFICIAL, divergence, future_reward, minillm_loss, token_reward
from distill import whiten as whitened
from sample import mix, taken

V = 3  # two words and an end token
T = 3  # the longest answer
END = 2
# what may come before a token; each has a row of logits in the table that is a model
PREFIXES = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]


def every_answer() -> tuple[Tensor, Tensor, Tensor]:
    """response (N, T), response_mask (N, T), and the row of the table that predicts each token
    (N, T)."""
    answers = [[END], [0, END], [1, END]]
    answers += [[*prefix, last] for prefix in PREFIXES if len(prefix) == 2 for last in range(V)]
    response = torch.zeros(len(answers), T, dtype=torch.int64)
    response_mask = torch.zeros(len(answers), T, dtype=torch.bool)
    table_row = torch.zeros(len(answers), T, dtype=torch.int64)
    for n, answer in enumerate(answers):
        for t, token in enumerate(answer):
            response[n, t] = token
            response_mask[n, t] = True
            table_row[n, t] = PREFIXES.index(tuple(answer[:t]))
    return response, response_mask, table_row


RESPONSE, MASK, TABLE_ROW = every_answer()


def logps(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities of any next token (N, T, V) and of the one taken (N, T), from a table
    of logits (7, V)."""
    logp_vocab = logits.log_softmax(-1)[TABLE_ROW]
    return logp_vocab, taken(logp_vocab, RESPONSE) * MASK


def exact_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """The gradient of Eq. (1), KL[q || p] over whole answers, by autograd. (7, V)"""
    log_q = logps(student)[1].sum(1)  # (N,)
    log_p = logps(teacher)[1].sum(1)
    kl = (log_q.exp() * (log_q - log_p)).sum()  # Eq. (1)
    return torch.autograd.grad(kl, student)[0]


def answer_gradients(student: Tensor, teacher: Tensor, mix_alpha: float = 0.0,
                     objective: str = "eq3", weight: str = "per_token", length_norm: bool = False,
                     gamma: float = 1.0, reward_clip: float = math.inf, whiten: str = "none",
                     baseline: float = 0.0, clip_eps: float = math.inf) -> tuple[Tensor, Tensor]:
    """The probability (N,) with which each answer is sampled, and the gradient (N, 7 V) that
    distill.py's losses have on it. The gradient is a sum over tokens as in the equations;
    distill.py's mean over tokens differs by a factor."""
    kind, return_from = OBJECTIVES[objective]
    log_q_vocab, log_q = logps(student)
    log_p_vocab, log_p = logps(teacher)
    mixed = taken(mix(log_q_vocab, log_p_vocab, mix_alpha), RESPONSE).detach() * MASK
    probability = mixed.sum(1).exp()  # (N,)
    reward = token_reward(log_p, log_q.detach(), reward_clip) * MASK
    R = future_reward(reward, MASK, gamma, length_norm, return_from)
    R = (R - baseline) * MASK
    if whiten != "none":  # in a batch that holds each answer as often as 100,000 samples would
        counts = (probability * 1e5).round().long().clamp(min=1)
        batch = whitened(R.repeat_interleave(counts, 0), MASK.repeat_interleave(counts, 0), whiten)
        R = batch[counts.cumsum(0) - 1]
    kl = divergence(log_q_vocab, log_p_vocab, kind)
    single, long, _ = minillm_loss(log_q, kl, log_q.detach(), mixed, R, MASK, weight, clip_eps)
    gradients = [torch.autograd.grad(of_answer, student, retain_graph=True)[0].flatten()
                 for of_answer in (single + long).sum(1)]
    return probability, torch.stack(gradients)


PAPER = dict(mix_alpha=0.2, length_norm=True, clip_eps=0.2)
RELEASED = {name: OFFICIAL[name] for name in OFFICIAL if name not in ("pt_kd", "normalize")}
ESTIMATORS = {
    "Eq. (2)": dict(objective="eq2", baseline=1.0),
    "Eq. (2) without its -1": dict(objective="eq2"),
    "Eq. (3)": dict(),
    "L_Single alone (GKD with reverse KL)": dict(objective="single"),
    "L_Single, and R_t for R_{t+1}": dict(objective="double"),
    "Eq. (4), alpha 0.2, exact weights": dict(mix_alpha=0.2, weight="exact"),
    "Eqs. (4, 5) as printed: product": dict(mix_alpha=0.2, weight="product"),
    "Eqs. (4, 5) with w_t per token": dict(mix_alpha=0.2),
    "  the same, not on L_Single": dict(mix_alpha=0.2, weight="long_only"),
    "  the same, length-normalised, Eq. (6)": dict(mix_alpha=0.2, length_norm=True),
    "  the same, clipped": dict(mix_alpha=0.2, clip_eps=0.2),
    "Eq. (4), no weights": dict(mix_alpha=0.2, weight="none"),
    "Eq. (6), length normalisation": dict(length_norm=True),
    "--recipe=paper: Eq. (7), clipped": PAPER,
    "--recipe=official": PAPER | RELEASED,
}


def compare(settings: dict, toys: int, seed: int) -> tuple[float, float, float]:
    """Means over toys: the cosine of the expected and the exact gradient, their distance, and the
    standard deviation of the estimate from one answer. The last two are in units of the exact
    gradient's norm."""
    generator = torch.Generator().manual_seed(seed)
    figures = []
    for _ in range(toys):
        shape = (2, len(PREFIXES), V)
        student, teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
        student.requires_grad_()
        exact = exact_gradient(student, teacher).flatten()
        probability, each = answer_gradients(student, teacher, **settings)
        mean = probability @ each
        cosine = torch.cosine_similarity(mean, exact, dim=0)
        error = (mean - exact).norm() / exact.norm()
        noise = (probability @ (each - mean).square().sum(1)).sqrt() / exact.norm()
        figures.append([cosine, error, noise])
    return tuple(torch.tensor(figures).mean(0).tolist())


# ---- command -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    toys: int = flag(100, "random pairs of p and q to average over", 1, 10**6)
    seed: int = flag(0, "seed of the toys", 0, 2**62)

    def __post_init__(self):
        check(self)


def main(cfg: Config) -> None:
    print(f"Expected gradient against that of KL[q || p], {len(RESPONSE)} answers enumerated, "
          f"mean of {cfg.toys} toys")
    print(f"\n{'estimator':38}{'cosine':>10}{'error':>10}{'noise':>8}")
    for name, settings in ESTIMATORS.items():
        cosine, error, noise = compare(settings, cfg.toys, cfg.seed)
        print(f"{name:38}{cosine:10.6f}{error:10.1e}{noise:8.2f}")
    print("\nerror: |expected - exact| / |exact|. "
          "noise: standard deviation of one answer's estimate / |exact|.")


if __name__ == "__main__":
    run(main, Config)
