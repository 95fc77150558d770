"""10. MiniLLM: both losses together, and a student that learns from yours.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (7), clipped as in Algorithm 1. Exercises 6 to 8 are its parts.
Task:     solve(student_logp, kl, mixed_logp, R, response_mask, clip_eps) gives two losses (B, T), 0 in the padding:
          loss_single  w_t KL[q || p] at this position; w_t = q(y_t) / p~(y_t), a number without a gradient
          loss_long    minus the smaller of rho_t R_{t+1} and clip(rho_t) R_{t+1}; rho_t is w_t with its gradient
          The gradients of their sum by student_logp and by kl are compared too.
Allowed:  torch, and no loop.
In words: train with 0 * loss_long, then with 0 * loss_single. One of the two students says nothing any more. Why?
Run:      python exercises/10_minillm.py               then --hint, then --hint=2
          python exercises/10_minillm.py --train       trains the built-in world's student with your losses: 1 or 2 min
"""

import sys
import tempfile

import torch
from checker import ROOT, Exercise, check, run
from torch import Tensor


def spec(student_logp: Tensor, kl: Tensor, mixed_logp: Tensor, R: Tensor, response_mask: Tensor,
         clip_eps: float) -> tuple[Tensor, Tensor]:
    """log q(y_t), KL[q || p], log p~(y_t), R_{t+1} (B, T) float, response_mask (B, T) bool -> both losses (B, T)"""
    loss_single, loss_long = torch.zeros_like(kl), torch.zeros_like(kl)
    for b in range(len(kl)):
        for t in range(int(response_mask[b].sum())):
            rho = (student_logp[b, t] - mixed_logp[b, t]).exp()
            inside = min(max(rho, torch.tensor(1 - clip_eps)), torch.tensor(1 + clip_eps))  # clip(rho)
            loss_single[b, t] = rho.item() * kl[b, t]  # item() leaves the gradient behind: w_t
            loss_long[b, t] = -min(rho * R[b, t], inside * R[b, t])
    return loss_single, loss_long


def solve(student_logp: Tensor, kl: Tensor, mixed_logp: Tensor, R: Tensor, response_mask: Tensor,
          clip_eps: float) -> tuple[Tensor, Tensor]:
    raise NotImplementedError  # yours


# ---- what checks it -------------------------------------------------------------------------------------------------

def checked(solve):
    """What is compared: both losses, and the gradients of their sum, by student_logp and by kl."""
    def losses_and_gradients(student_logp: Tensor, kl: Tensor, *arguments) -> tuple:
        leaves = student_logp.requires_grad_(), kl.requires_grad_()
        losses, gradients = solve(*leaves, *arguments), (torch.zeros_like(kl),) * 2
        if not isinstance(losses, tuple) or not all(isinstance(loss, Tensor) for loss in losses):
            return losses, gradients
        if (total := sum(loss.sum() for loss in losses)).requires_grad:
            gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return tuple(loss.detach() for loss in losses), gradients

    return losses_and_gradients


def cases():
    generator = torch.Generator().manual_seed(10)
    for name, lengths, width, clip_eps in (
            ("several lengths", [5, 2, 7, 1], 7, 0.2), ("one row", [4], 4, 0.2), ("one token", [1, 1, 1], 1, 0.1),
            ("a row that is all padding", [0, 4], 6, 0.3), ("no clipping, eps infinite", [6, 3], 6, float("inf"))):
        response_mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        student_logp, mixed_logp, minus_kl = -torch.rand(3, len(lengths), width, generator=generator)
        R = torch.randn(len(lengths), width, generator=generator)  # junk in the padding of all four
        yield name, (student_logp, -minus_kl, mixed_logp, R, response_mask, clip_eps)


def losses(q: Tensor, kl: Tensor, mixed: Tensor, R: Tensor, m: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    rho = (mixed - q if kind == "upside down" else q - mixed).exp()
    w, R = rho if kind == "gradient" else rho.detach(), rho.detach() * R if kind == "twice" else R
    rho, m = rho.detach() if kind == "detached" else rho, m | (kind == "padding")
    inside, kl = rho.clamp(1 - eps, 1 + eps), kl.detach() if kind == "constant" else kl
    if kind == "reinforce":
        return w * kl * m, -(w * R * q) * m
    smaller = torch.minimum(rho, inside) * R if kind == "printed" else torch.minimum(rho * R, inside * R)
    return (kl if kind == "unweighted" else w * kl) * m, (smaller if kind == "sign" else -smaller) * m


SLIPS = {words: checked(lambda *a, kind=kind: losses(*a, kind)) for kind, words in {
    "unweighted": "L_Single is not weighted: Eq. (7) has w_t there too",
    "gradient": "w_t carries a gradient in L_Single: there it is a number, so detach it",
    "detached": "rho carries no gradient: L_Long has no other way to the student, so do not detach it there",
    "constant": "kl carries no gradient: L_Single has no other way to the student, so do not detach it",
    "reinforce": "L_Long is -w R log q: at the first update its gradient is right, but nothing clips it",
    "twice": "L_Long is weighted twice: rho is w_t already",
    "printed": "L_Long is min(rho, clip(rho)) R, as printed: take the smaller of the products, for R may be negative",
    "upside down": "the ratio is upside down: it is q over p~, in both losses",
    "sign": "the sign of L_Long is turned: a loss is minimised, R is to grow",
    "padding": "what stands in the padding is counted: did you apply response_mask to both losses?"}.items()}
HINTS = ("Compute the ratio once. For one of the losses it is a number, for the other it is what carries the gradient.",
         "L_Single is the detached ratio times kl; L_Long is exercise 8 without its sum. Mask both.")
EXERCISE = Exercise(checked(solve), checked(spec), cases, SLIPS, HINTS,
                    (("loss_single", "loss_long"), ("the gradient by student_logp", "the gradient by kl")))


def train(steps: int = 640) -> None:
    """Phase 2 of Algorithm 1 with solve's losses. Teacher and phase 1 are those in out/tiny; the rest is temporary."""
    import distill
    from config import Stopped, UserError, make
    verdict, own, tiny = check(EXERCISE), distill.minillm_loss, str(ROOT / "out" / "tiny")
    print(f"10_minillm.py: {verdict.state}: {verdict.message}".rstrip(": "))
    if verdict.state in ("unsolved", "error"):  # with a wrong answer it is worth seeing what comes of it
        sys.exit(1)

    def yours(student_logp, kl, old_logp, mixed_logp, R, response_mask, weight, weight_single, clip_eps):
        figures = own(student_logp, kl, old_logp, mixed_logp, R, response_mask, clip_eps=clip_eps)[2:]  # to be logged
        return *solve(student_logp, kl, mixed_logp, R, response_mask, clip_eps), *figures
    distill.minillm_loss = yours
    try:
        for _, stage, settings in distill.stages(distill.Config(out=tiny, baselines=""))[0]:
            stage(settings)  # what is finished is kept
        with tempfile.TemporaryDirectory() as folder:
            given = dict(preset="tiny", teacher=f"{tiny}/teacher", student=f"{tiny}/init", out=f"{folder}/out",
                         baselines="", steps=steps, eval_seeds=2, device="cpu")
            rows = distill.main(make(distill.Config, given, distill.presets))
    except (UserError, Stopped) as error:
        sys.exit(f"10_minillm.py: {error}")
    finally:
        distill.minillm_loss = own
    valid = {row["method"]: row["valid"] for row in rows}
    print(f"(a temporary folder)\n\nvalid answers, in percent: {valid['init']:.1f} before, {valid['minillm']:.1f} "
          f"after {steps} updates with your losses; distill.py's own give about 97 after 640")


if __name__ == "__main__":
    train() if sys.argv[1:] == ["--train"] else run(EXERCISE)
