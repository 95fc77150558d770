"""4. The single step: an expectation that need not be sampled.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (3): it splits Eq. (2) in two, and sums the part with
          r_t, which is -grad E_{y_t ~ q}[r_t], over the vocabulary. As before, r_t is
          log p(y_t | y_<t, x) - log q(y_t | y_<t, x).
Task:     solve(student_logp_vocab, teacher_logp_vocab, response_mask) returns -E_{y_t ~ q}[r_t] at
          each position, and 0 in the padding. Both inputs are normalised log-probabilities of all
          tokens; in the padding they are any finite numbers. Gradients must flow through: the
          checker also compares the gradient of the answer's sum by the logits of which
          student_logp_vocab is the log_softmax.
Allowed:  torch, and no loop.
In words: Eqs. (2) and (3) have the same expectation. --variance prints how far the estimate from
          one answer strays from it. Where does the difference between the two come from, and why
          is some noise left?
Run:      python -m exercises.04_single_step           then --hint, then --hint=2
          python -m exercises.04_single_step --variance
"""

import sys

import torch
from torch import Tensor

from exercises.checker import Exercise, run, with_gradient


def spec(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, response_mask: Tensor) -> Tensor:
    """log q and log p of each token of the vocabulary (B, T, V) float, response_mask (B, T) bool
    -> (B, T)"""
    B, T, V = student_logp_vocab.shape
    loss_single = torch.zeros(B, T)
    for b in range(B):
        for t in range(T):
            if response_mask[b, t]:
                expected = 0
                for v in range(V):  # y_t = v
                    log_q = student_logp_vocab[b, t, v]
                    log_p = teacher_logp_vocab[b, t, v]
                    r = log_p - log_q
                    expected = expected + log_q.exp() * r
                loss_single[b, t] = -expected
    return loss_single


def solve(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, response_mask: Tensor) -> Tensor:
    raise NotImplementedError  # yours


# ---- what checks it ------------------------------------------------------------------------------

BATCHES = (  # a name, the lengths of the answers, T and V
    ("answers of several lengths", [4, 2, 5], 5, 7),
    ("one row", [3], 3, 11),
    ("answers of one token", [1, 1], 1, 5),
    ("a vocabulary of two", [3, 1], 3, 2),
    ("padding behind every answer", [2, 1], 4, 6),
    ("a row that is all padding", [0, 3], 3, 5),
)


def cases():
    generator = torch.Generator().manual_seed(4)
    for name, lengths, T, V in BATCHES:
        response_mask = torch.arange(T) < torch.tensor(lengths)[:, None]
        logits = 2 * torch.randn(2, len(lengths), T, V, generator=generator)
        # in the padding they are not normalised
        logp_vocab = torch.where(response_mask[..., None], logits.log_softmax(-1), logits)
        student_logp_vocab, teacher_logp_vocab = logp_vocab
        yield name, (student_logp_vocab, teacher_logp_vocab, response_mask)


def by_logits(solve):
    """What is compared: the answer, and the gradient of its sum by q's logits."""
    return with_gradient(lambda logits, p, m: solve(logits.log_softmax(-1), p, m))


SLIPS = {
    "the expectation is over p, -E_{y_t ~ p}[r_t]: it has to be over q, from which y_t is drawn":
        lambda q, p, m: -spec(p, q, m),
    "this is the forward KL[p||q]: -E_{y_t ~ q}[r_t] is the reverse one":
        lambda q, p, m: spec(p, q, m),
    "this is a mean over the vocabulary: an expectation is a sum, weighted by probabilities":
        lambda q, p, m: spec(q, p, m) / q.size(-1),
    "the sign is turned: this is E[r_t], which is to grow; the loss is -E[r_t]":
        lambda q, p, m: -spec(q, p, m),
    "the differences are not weighted: multiply them by the probabilities of q":
        lambda q, p, m: (q - p).sum(-1) * m,
    "the weights are logarithms: r_t has to be multiplied by q, the exponential of "
    "student_logp_vocab":
        lambda q, p, m: (q * (q - p)).sum(-1) * m,
    "log q is missing in r_t: this is the cross-entropy -sum q log p":
        lambda q, p, m: -(q.exp() * p).sum(-1) * m,
    "the padding is counted: did you apply response_mask?":
        lambda q, p, m: spec(q, p, m | True),
    "its gradient is 0, and nothing could be trained with it. Either no gradient flows to q, or "
    "the weights are detached, and what is left, sum q grad log q, is 0":
        lambda q, p, m: (q.detach().exp() * (q - p)).sum(-1) * m,
}
HINTS = (
    "An expectation over y_t ~ q is a sum over the vocabulary: q(v) times what is averaged. The "
    "arguments do not contain q itself, but they contain its logarithm.",
    "-r is log q - log p. Weight it by q, sum along the last axis, which is the vocabulary, and "
    "mask the padding.",
)
EXERCISE = Exercise(
    solve, spec, cases, SLIPS, HINTS, ("the answer", "the gradient of its sum by the logits"),
    compared=by_logits)


def variance(toys: int = 100) -> None:
    """Prints three rows of the oracle: how far the estimate from one answer strays."""
    from exercises.oracle import ESTIMATORS, compare

    print(f"Gradients of {toys} toys, all of whose answers are enumerated, in units of the exact")
    print("gradient's norm. error: of the expected gradient. noise: the standard deviation of the")
    print("estimate from one answer.\n")
    print(f"{'':26}{'error':>9}{'noise':>8}{'squared':>9}")
    for name in ("Eq. (2)", "Eq. (2) without its -1", "Eq. (3)"):
        _, error, noise = compare(ESTIMATORS[name], toys, seed=0)
        print(f"{name:26}{error:9.0e}{noise:8.2f}{noise**2:9.2f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--variance"]:
        variance()
    else:
        run(EXERCISE)
