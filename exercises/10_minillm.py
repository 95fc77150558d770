"""10. MiniLLM: both losses together, and a student that learns from yours.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (7), clipped as in Algorithm 1. Exercises 6 to 8 are
          its parts.
Task:     solve(student_logp, kl, mixed_logp, R, response_mask, clip_eps) returns two losses (B, T),
          which are 0 in the padding:
          loss_single  w_t KL[q || p] at this position; w_t = q(y_t) / p~(y_t) is a number and has
                       no gradient
          loss_long    minus the smaller of rho_t R_{t+1} and clip(rho_t) R_{t+1}; rho_t is w_t with
                       its gradient
          The checker also compares the gradients of their sum by student_logp and by kl.
Allowed:  torch, and no loop.
In words: Train with 0 * loss_long, then with 0 * loss_single. One of the two students falls silent.
          Why?
Run:      python -m exercises.10_minillm               then --hint, then --hint=2
          python -m exercises.10_minillm --train       trains the built-in world's student with your
                                                       losses, in one or two minutes
"""

import sys
import tempfile
from functools import partial

import torch
from torch import Tensor

from exercises.checker import ROOT, Exercise, check, masks, run, with_gradient


def spec(student_logp: Tensor, kl: Tensor, mixed_logp: Tensor, R: Tensor, response_mask: Tensor,
         clip_eps: float) -> tuple[Tensor, Tensor]:
    """log q(y_t), KL[q || p], log p~(y_t), R_{t+1} (B, T) float, response_mask (B, T) bool
    -> both losses, (B, T) each"""
    low = torch.tensor(1 - clip_eps)
    high = torch.tensor(1 + clip_eps)
    loss_single = torch.zeros_like(kl)
    loss_long = torch.zeros_like(kl)
    for b in range(len(kl)):
        for t in range(int(response_mask[b].sum())):
            rho = (student_logp[b, t] - mixed_logp[b, t]).exp()
            inside = min(max(rho, low), high)  # clip(rho)
            w = rho.item()  # without the gradient
            loss_single[b, t] = w * kl[b, t]
            loss_long[b, t] = -min(rho * R[b, t], inside * R[b, t])
    return loss_single, loss_long


def solve(student_logp: Tensor, kl: Tensor, mixed_logp: Tensor, R: Tensor, response_mask: Tensor,
          clip_eps: float) -> tuple[Tensor, Tensor]:
    raise NotImplementedError  # yours


# ---- what checks it ------------------------------------------------------------------------------

def cases():
    generator = torch.Generator().manual_seed(10)
    for name, response_mask in masks():
        shape = response_mask.shape
        student_logp, mixed_logp = -torch.rand((2, *shape), generator=generator)
        kl = torch.rand(shape, generator=generator)
        R = torch.randn(shape, generator=generator)  # padding holds junk in all four
        for words, clip_eps in ((name, 0.2), (f"{name}, no clipping, eps infinite", torch.inf)):
            yield words, (student_logp, kl, mixed_logp, R, response_mask, clip_eps)


def mistaken(q: Tensor, kl: Tensor, mixed_logp: Tensor, R: Tensor, m: Tensor, clip_eps: float,
             kind: str) -> tuple[Tensor, Tensor]:
    """spec with a mistake of some kind, a key of MISTAKES."""
    rho = (q - mixed_logp).exp()
    if kind == "upside down":
        rho = 1 / rho
    w = rho.detach()
    if kind == "gradient":
        w = rho
    if kind == "detached":
        rho = rho.detach()
    if kind == "constant":
        kl = kl.detach()
    if kind == "twice":
        R = w * R
    inside = rho.clamp(1 - clip_eps, 1 + clip_eps)
    loss_single = w * kl
    loss_long = -torch.minimum(rho * R, inside * R)
    if kind == "unweighted":
        loss_single = kl
    if kind == "reinforce":
        loss_long = -w * R * q
    if kind == "printed":
        loss_long = -torch.minimum(rho, inside) * R
    if kind == "sign":
        loss_long = -loss_long
    if kind == "padding":
        return loss_single, loss_long
    return loss_single * m, loss_long * m


MISTAKES = {
    "unweighted": "L_Single is not weighted: Eq. (7) has w_t there too",
    "gradient": "w_t carries a gradient in L_Single: there it is a number, so detach it",
    "detached":
        "rho carries no gradient: it is L_Long's only way to the student, so do not detach it",
    "constant":
        "kl carries no gradient: it is L_Single's only way to the student, so do not detach it",
    "reinforce":
        "L_Long is -w R log q: at the first update its gradient is right, but nothing clips it",
    "twice": "L_Long is weighted twice: rho is already w_t",
    "printed":
        "L_Long is min(rho, clip(rho)) R, as printed: take the smaller of the products, because R "
        "may be negative",
    "upside down": "the ratio is upside down: it is q over p~, in both losses",
    "sign": "the sign of L_Long is turned: a loss is minimised, and R is to grow",
    "padding": "the padding is counted: did you apply response_mask to both losses?",
}
SLIPS = {words: partial(mistaken, kind=kind) for kind, words in MISTAKES.items()}
HINTS = (
    "Compute the ratio once. In one of the losses it is a number, in the other it carries the "
    "gradient.",
    "L_Single is the detached ratio times kl. L_Long is exercise 8 without its sum. Mask both.",
)
PARTS = (
    ("loss_single", "loss_long"),
    ("the gradient by student_logp", "the gradient by kl"),
)
EXERCISE = Exercise(
    solve, spec, cases, SLIPS, HINTS, PARTS, compared=partial(with_gradient, leaves=2))


# ---- a student that learns from them -------------------------------------------------------------

def train(steps: int = 640) -> None:
    """Runs phase 2 of Algorithm 1 with solve's losses. It uses the teacher and the phase 1 in
    out/tiny, and trains them if they are missing; the rest is temporary."""
    import distill
    import teacher as supervised
    from config import in_one_line, make
    from tools import stages

    verdict = check(EXERCISE)
    print(f"10_minillm.py: {verdict.state}: {verdict.message}".removesuffix(": "))
    if verdict.state in ("unsolved", "error"):  # what a wrong answer leads to is worth seeing
        sys.exit(1)
    own = distill.minillm_loss

    def yours(student_logp, kl, old_logp, mixed_logp, R, response_mask, weight, clip_eps):
        clipped = own(student_logp, kl, old_logp, mixed_logp, R, response_mask, weight, clip_eps)[2]
        return *solve(student_logp, kl, mixed_logp, R, response_mask, clip_eps), clipped

    tiny = str(ROOT / "out" / "tiny")
    work = stages.stages(distill.Config(out=tiny, baselines=""))
    distill.minillm_loss = yours
    with in_one_line(), tempfile.TemporaryDirectory() as folder:
        for settings in (work.teacher, work.init):
            supervised.main(settings)  # a finished one is kept
        given = dict(
            preset="tiny", teacher=work.teacher.out, student=work.init.out, out=f"{folder}/out",
            baselines="", steps=steps, device="cpu")
        rows = distill.main(make(distill.Config, given, distill.presets))
    distill.minillm_loss = own
    valid = {row["method"]: row["valid"] for row in rows}
    print(f"(That folder was temporary.)\n\nvalid answers, in percent: {valid['init']:.1f} before, "
          f"{valid['minillm']:.1f} after {steps} updates with your losses; distill.py's own give "
          "about 87 after 640")


if __name__ == "__main__":
    if sys.argv[1:] == ["--train"]:
        train()
    else:
        run(EXERCISE)
