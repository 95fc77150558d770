"""2. Two KLs: what it means to learn from a teacher by one or by the other.

Paper:    arXiv 2306.08543v4, Section 2.1 and Figure 2, which fits one Gaussian q to a mixture p of
          two. Eq. (1) takes the reverse KL[q||p], the sum of q log(q/p). Supervised distillation
          takes the forward KL[p||q], the sum of p log(p/q).
Task:     solve(q_logits, p) returns both: KL[p||q] first, KL[q||p] second. q is the softmax of
          q_logits, which may lie far apart. p is given as probabilities; none is 0, but some may
          be close to 0. Gradients must flow through: the checker also compares the gradient of
          each KL by q_logits.
Allowed:  torch, and no loop.
In words: Where p is 0 and q is not, one of the two is infinite. Which one, and what does it teach
          q? And the other way round: what does the other one teach a q that is too small to do all
          that p does?
Run:      python -m exercises.02_two_kls           then --hint, then --hint=2
          python -m exercises.02_two_kls --draw           once solved: Figure 2 by your function
"""

import sys

import torch
from torch import Tensor

from exercises.checker import ROOT, Exercise, check, gradients, run


def spec(q_logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """q_logits (K,) float, p (K,) float, positive with sum 1 -> KL[p||q] (), KL[q||p] ()"""
    log_Z = q_logits.logsumexp(0)
    forward = torch.zeros(())
    reverse = torch.zeros(())
    for k in range(len(p)):
        log_q = q_logits[k] - log_Z
        log_p = p[k].log()
        forward = forward + p[k] * (log_p - log_q)
        reverse = reverse + log_q.exp() * (log_q - log_p)
    return forward, reverse


def solve(q_logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError  # yours


# ---- what checks it ------------------------------------------------------------------------------

def with_gradients(solve):
    """What is compared: both KLs, and the gradient of each by q_logits."""

    def kls_and_gradients(q_logits: Tensor, p: Tensor) -> tuple:
        q_logits = q_logits.detach().requires_grad_()
        kls = solve(q_logits, p)
        if not isinstance(kls, tuple) or not all(isinstance(kl, Tensor) for kl in kls):
            return kls, ()
        found = tuple(gradients(kl, (q_logits,))[0] for kl in kls)
        return tuple(kl.detach() for kl in kls), found

    return kls_and_gradients


def cases():
    generator = torch.Generator().manual_seed(2)

    def normal(K: int) -> Tensor:
        return torch.randn(K, generator=generator)

    yield "seven symbols", (normal(7), normal(7).softmax(0))
    yield "two symbols", (normal(2), normal(2).softmax(0))
    yield "one symbol", (normal(1), torch.ones(1))
    yield "a grid of fifty points", (3 * normal(50), (3 * normal(50)).softmax(0))
    p = torch.tensor([0.2, 0.5, 0.3])
    yield "q equal to p", (p.log() + 4, p)
    yield "a p close to 0", (normal(3), torch.tensor([0.25, 0.75, 1e-30]))
    yield "logits far apart", (torch.tensor([0.0, -150.0, 2.0, 150.0]), normal(4).softmax(0))


def cross_entropies(q_logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    forward = torch.nn.functional.cross_entropy(q_logits, p)
    return forward, -(q_logits.softmax(0) @ p.log())


def unnormalised(q_logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """spec with q_logits in the place of log q, which differs from them by log Z."""
    forward, reverse = spec(q_logits, p)
    log_Z = q_logits.logsumexp(0)
    return forward - log_Z, reverse + log_Z


def with_detached_weights(q_logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    forward, _ = spec(q_logits, p)
    log_q = q_logits.log_softmax(0)
    return forward, (log_q.detach().exp() * (log_q - p.log())).sum()


SLIPS = {
    "the two are swapped: the forward KL[p||q] averages over p, and it comes first":
        lambda z, p: spec(z, p)[::-1],
    "this is a mean over the symbols (kl_div's reduction, perhaps): an expectation is a sum, "
    "weighted by probabilities":
        lambda z, p: tuple(kl / len(p) for kl in spec(z, p)),
    "q_logits stand in the place of log q: normalise them first": unnormalised,
    "these are the cross-entropies -sum p log q and -sum q log p: each lacks the entropy of the "
    "distribution that it averages over":
        cross_entropies,
    "both have the wrong sign: KL is never negative": lambda z, p: tuple(-kl for kl in spec(z, p)),
    "the q that weights KL[q||p] is detached: its gradient flows through the weights too":
        with_detached_weights,
    "no gradient flows through these to q_logits: nothing could be trained with them":
        lambda z, p: tuple(kl.detach() for kl in spec(z, p)),
}
HINTS = (
    "Compute log q and log p first. Each KL is then one line: weights times a difference of "
    "logarithms, summed.",
    "log_softmax gives log q even where softmax gives 0, whose logarithm is -inf. The weights are "
    "those of the distribution named first: p in KL[p||q], q in KL[q||p].",
)
PARTS = (
    ("KL[p||q]", "KL[q||p]"),
    ("the gradient of KL[p||q]", "the gradient of KL[q||p]"),
)
EXERCISE = Exercise(solve, spec, cases, SLIPS, HINTS, PARTS, compared=with_gradients)


# ---- Figure 2 ------------------------------------------------------------------------------------

def fitted(x: Tensor, p: Tensor, which: int) -> Tensor:
    """The probabilities (K,), on the grid x, of the Gaussian that minimises the value `which` of
    solve: 0 is the forward KL, 1 the reverse."""
    mean = torch.tensor(0.5, requires_grad=True)
    log_width = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_width], lr=0.02)
    for _ in range(1000):
        q_logits = -((x - mean) / log_width.exp()) ** 2 / 2
        optimizer.zero_grad()
        solve(q_logits, p)[which].backward()
        optimizer.step()
    forward, reverse = solve(q_logits, p)
    print(f"by {('forward', 'reverse')[which]} KL: mean {mean.item():5.2f}, "
          f"width {log_width.exp().item():.2f}: "
          f"forward {forward.item():.3f}, reverse {reverse.item():.3f}")
    return q_logits.detach().softmax(0)


def draw() -> None:
    if check(EXERCISE).state != "solved":
        sys.exit("02_two_kls.py: --draw fits with your solve: solve the exercise first")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x = torch.linspace(-7, 7, 281)
    p = 0.4 * (-((x + 3) ** 2)).exp() + 0.6 * (-((x - 2) ** 2)).exp()
    p = p / p.sum()
    canvas = Figure(figsize=(6, 3.4), layout="constrained")
    FigureCanvasAgg(canvas)
    axis = canvas.subplots()
    for label, line, y in (
        ("p, the teacher", "-", p),
        ("q by forward KL[p||q]", "--", fitted(x, p, 0)),
        ("q by reverse KL[q||p]", ":", fitted(x, p, 1)),
    ):
        axis.plot(x.numpy(), (y / (x[1] - x[0])).numpy(), line, label=label)
    axis.legend(frameon=False)
    (ROOT / "out").mkdir(exist_ok=True)
    canvas.savefig(ROOT / "out" / "two_kls.png", dpi=130)
    print("the picture: out/two_kls.png")


if __name__ == "__main__":
    if sys.argv[1:] == ["--draw"]:
        draw()
    else:
        run(EXERCISE)
