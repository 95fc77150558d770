"""4. The single step: an expectation that need not be sampled.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (3): Eq. (2) is split in two, and the part with r_t, which is
          -grad E_{y_t ~ q}[r_t], is summed over the vocabulary. r_t = log p(y_t | y_<t, x) - log q(y_t | y_<t, x).
Task:     solve(student_logp_vocab, teacher_logp_vocab, response_mask) gives -E_{y_t ~ q}[r_t] at each position, and 0
          in the padding. Both are log-probabilities of all tokens, normalised; in the padding they are anything finite.
          Gradients flow through, and that of the answer's sum is compared too: by the logits of which
          student_logp_vocab is the log_softmax.
Allowed:  torch, and no loop.
In words: Eqs. (2) and (3) have the same expectation. --variance prints how far one answer's estimate strays from it,
          by either. Where does the difference come from, and why is something left?
Run:      python exercises/04_single_step.py           then --hint, then --hint=2
          python exercises/04_single_step.py --variance
"""

import sys

import torch
from checker import Exercise, run, with_gradient
from torch import Tensor


def spec(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, response_mask: Tensor) -> Tensor:
    """log q and log p of each token of the vocabulary (B, T, V) float, response_mask (B, T) bool -> (B, T)"""
    B, T, V = student_logp_vocab.shape
    loss_single = torch.zeros(B, T)
    for b in range(B):
        for t in range(T):
            if response_mask[b, t]:
                expected = 0
                for v in range(V):  # y_t = v
                    log_q, log_p = student_logp_vocab[b, t, v], teacher_logp_vocab[b, t, v]
                    r = log_p - log_q
                    expected = expected + log_q.exp() * r
                loss_single[b, t] = -expected
    return loss_single


def solve(student_logp_vocab: Tensor, teacher_logp_vocab: Tensor, response_mask: Tensor) -> Tensor:
    raise NotImplementedError  # yours


# ---- what checks it -------------------------------------------------------------------------------------------------

def cases():
    generator = torch.Generator().manual_seed(4)
    for name, lengths, width, V in (("answers of several lengths", [4, 2, 5], 5, 7), ("one row", [3], 3, 11),
                                    ("answers of one token", [1, 1], 1, 5), ("a vocabulary of two", [3, 1], 3, 2),
                                    ("padding behind every answer", [2, 1], 4, 6),
                                    ("a row that is all padding", [0, 3], 3, 5)):
        response_mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        logits = 2 * torch.randn(2, len(lengths), width, V, generator=generator)
        student_logp_vocab, teacher_logp_vocab = torch.where(response_mask[..., None], logits.log_softmax(-1), logits)
        yield name, (student_logp_vocab, teacher_logp_vocab, response_mask)


SLIPS = {
    "the expectation is over p, -E_{y_t ~ p}[r_t]; it has to be over q, from which y_t is drawn":
        lambda q, p, m: -spec(p, q, m),
    "this is the forward KL, KL[p||q]; -E_{y_t ~ q}[r_t] is the reverse one": lambda q, p, m: spec(p, q, m),
    "this is a mean over the vocabulary; an expectation is a sum, its weights are the probabilities":
        lambda q, p, m: spec(q, p, m) / q.size(-1),
    "the sign is turned: this is E[r_t], which is to grow; a loss is -E[r_t]": lambda q, p, m: -spec(q, p, m),
    "the differences are not weighted: multiply with the probabilities of q, not its logarithms, or nothing":
        lambda q, p, m: (q - p).sum(-1) * m,
    "the weights are logarithms: what multiplies r_t is q, the exponential of student_logp_vocab":
        lambda q, p, m: (q * (q - p)).sum(-1) * m,
    "log q is left out of r_t: this is the cross-entropy -sum q log p":
        lambda q, p, m: -torch.einsum("btv,btv->bt", q.exp(), p) * m,
    "the padding is counted: did you apply response_mask?": lambda q, p, m: spec(q, p, m | True),
    "its gradient is 0, and nothing could be trained with it: either none flows to q, or the probabilities that weigh "
    "the differences are detached, and what is left, sum q grad log q, is 0":
        lambda q, p, m: (q.detach().exp() * (q - p)).sum(-1) * m,
}


def checked(solve):
    """What is compared: the answer, and its gradient by q's logits."""
    return with_gradient(lambda z, p, m: solve(z.log_softmax(-1), p, m))


SLIPS = {words: checked(slip) for words, slip in SLIPS.items()}
HINTS = ("An expectation over y_t ~ q is a sum over the vocabulary of q(v) times what is averaged. q itself is not "
         "among the arguments, but its logarithm is.",
         "-r is log q - log p. Weigh it by q, sum along the last axis, which is the vocabulary, and mask the rest.")
EXERCISE = Exercise(checked(solve), checked(spec), cases, SLIPS, HINTS,
                    ("the answer", "the gradient of its sum by the logits"))


def variance(toys: int = 100) -> None:
    """What one answer's estimate strays by, as a standard deviation: oracle.py's figures of three of its rows."""
    from oracle import ESTIMATORS, compare
    print(f"Gradients of {toys} toys, all of whose answers are enumerated. error: of the expected gradient. noise:")
    print("standard deviation of the estimate from one answer. Both in units of the exact gradient's norm.\n")
    print(f"{'':26}{'error':>9}{'noise':>8}{'squared':>9}")
    for name in ("Eq. (2)", "Eq. (2) without its -1", "Eq. (3)"):
        _, error, noise = compare(ESTIMATORS[name], toys, seed=0)
        print(f"{name:26}{error:9.0e}{noise:8.2f}{noise**2:9.2f}")


if __name__ == "__main__":
    variance() if sys.argv[1:] == ["--variance"] else run(EXERCISE)
