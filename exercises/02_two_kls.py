"""2. Two KLs: what it means to learn from a teacher by one or by the other.

Paper:    arXiv 2306.08543v4, Section 2.1 and Figure 2: one Gaussian q is fitted to a mixture p of two. Eq. (1) takes
          the reverse KL[q||p] = sum of q log(q/p); supervised distillation the forward KL[p||q] = sum of p log(p/q).
Task:     solve(q_logits, p) gives both, KL[p||q] first and KL[q||p] second. q is the softmax of q_logits, which may lie
          far apart; p is given as probabilities, none of them 0, though some may be close. Gradients flow through,
          and those of each by q_logits are compared too.
Allowed:  torch, and no loop.
In words: where p is 0 and q is not, one of the two is infinite. Which, and what does it teach q? And the other way
          round: what does the other teach a q that is too small to do all that p does?
Run:      python exercises/02_two_kls.py           then --hint, then --hint=2
          python exercises/02_two_kls.py --draw           once it is solved: Figure 2 with it, out/two_kls.png
"""

import sys

import torch
from checker import ROOT, Exercise, check, run
from torch import Tensor


def spec(q_logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """q_logits (K,) float, p (K,) float, positive, its sum 1 -> KL[p||q] and KL[q||p], of no dimension each"""
    log_Z = q_logits.logsumexp(0)
    forward, reverse = torch.zeros(()), torch.zeros(())
    for k in range(len(p)):
        log_q, log_p = q_logits[k] - log_Z, p[k].log()
        forward = forward + p[k] * (log_p - log_q)
        reverse = reverse + log_q.exp() * (log_q - log_p)
    return forward, reverse


def solve(q_logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError  # yours


# ---- what checks it -------------------------------------------------------------------------------------------------

def checked(solve):
    """What is compared: both KLs, and the gradients of each by q_logits."""
    def kls_and_gradients(q_logits: Tensor, p: Tensor) -> tuple:
        q_logits = q_logits.detach().requires_grad_()
        kls, none = solve(q_logits, p), torch.zeros_like(p)
        if not isinstance(kls, tuple) or not all(isinstance(kl, Tensor) for kl in kls):
            return kls, (none, none)
        gradients = tuple(torch.autograd.grad(kl.sum(), q_logits, retain_graph=True)[0] if kl.requires_grad else none
                          for kl in kls)
        return tuple(kl.detach() for kl in kls), gradients

    return kls_and_gradients


def cases():
    generator = torch.Generator().manual_seed(2)
    normal = lambda K: torch.randn(K, generator=generator)
    yield "seven symbols", (normal(7), normal(7).softmax(0))
    yield "two symbols", (normal(2), normal(2).softmax(0))
    yield "one symbol", (normal(1), torch.ones(1))
    yield "a grid of fifty points", (3 * normal(50), (3 * normal(50)).softmax(0))
    yield "q equal to p", (torch.tensor([0.2, 0.5, 0.3]).log() + 4, torch.tensor([0.2, 0.5, 0.3]))
    yield "a p close to 0", (normal(3), torch.tensor([0.25, 0.75, 1e-30]))
    yield "logits far apart", (torch.tensor([0.0, -150.0, 2.0, 150.0]), normal(4).softmax(0))


def cross_entropies(q_logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.cross_entropy(q_logits, p), -(q_logits.softmax(0) @ p.log())


def unnormalised(q_logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """spec with q_logits for log q: it differs by log Z, once for all of p and once for all of q."""
    forward, reverse = spec(q_logits, p)
    return forward - q_logits.logsumexp(0), reverse + q_logits.logsumexp(0)


SLIPS = {
    "the two are swapped: forward, KL[p||q], averages over p and comes first": lambda z, p: spec(z, p)[::-1],
    "this is a mean over the symbols (kl_div's reduction, perhaps); an expectation is a sum, weighed by probabilities":
        lambda z, p: tuple(kl / len(p) for kl in spec(z, p)),
    "q_logits are taken for log q: they have to be normalised first": unnormalised,
    "these are cross-entropies, -sum p log q and -sum q log p: the entropy of what is averaged over is left out":
        cross_entropies,
    "both have the wrong sign: KL is never negative": lambda z, p: tuple(-kl for kl in spec(z, p)),
}
HINTS = ("Make log q and log p first. Each KL is then one line: weights, times a difference of logarithms, summed.",
         "log_softmax gives log q, also where softmax gives 0, whose logarithm is no number. The weights are those of "
         "the distribution named first: KL[p||q] has p, KL[q||p] has q.")
SLIPS |= {"the q that weighs KL[q||p] is detached; its gradient flows through the weights too":
          lambda z, p: (spec(z, p)[0], (z.detach().softmax(0) * (z.log_softmax(0) - p.log())).sum())}
SLIPS |= {"no gradient flows through these to q_logits: nothing could be trained with them":
          lambda z, p: tuple(kl.detach() for kl in spec(z, p))}
SLIPS = {words: checked(slip) for words, slip in SLIPS.items()}
EXERCISE = Exercise(checked(solve), checked(spec), cases, SLIPS, HINTS,
                    (("KL[p||q]", "KL[q||p]"), ("the gradient of KL[p||q]", "the gradient of KL[q||p]")))


# ---- Figure 2 -------------------------------------------------------------------------------------------------------

def fitted(x: Tensor, p: Tensor, which: int) -> Tensor:
    """The Gaussian on the grid x that gradient descent on solve's value `which` leads to: probabilities."""
    mean, log_width = torch.tensor(0.5, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_width], lr=0.02)
    for _ in range(1000):
        q_logits = -((x - mean) / log_width.exp()) ** 2 / 2
        optimizer.zero_grad()
        solve(q_logits, p)[which].backward()
        optimizer.step()
    kls = ", ".join(f"{name} {kl.item():.3f}" for name, kl in zip(("forward", "reverse"), solve(q_logits, p)))
    print(f"by {('forward', 'reverse')[which]} KL: mean {mean.item():5.2f}, width {log_width.exp().item():.2f}: {kls}")
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
    for label, line, y in (("p, the teacher", "-", p), ("q by forward KL[p||q]", "--", fitted(x, p, 0)),
                           ("q by reverse KL[q||p]", ":", fitted(x, p, 1))):
        axis.plot(x.numpy(), (y / (x[1] - x[0])).numpy(), line, label=label)
    axis.legend(frameon=False)
    (ROOT / "out").mkdir(exist_ok=True)
    canvas.savefig(ROOT / "out" / "two_kls.png", dpi=130)
    print("the picture: out/two_kls.png")


if __name__ == "__main__":
    draw() if sys.argv[1:] == ["--draw"] else run(EXERCISE)
