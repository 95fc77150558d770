"""6. Importance weights: what a token drawn from the mixture counts for.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (5). With w_t = q(y_t | y_<t, x) / p~(y_t | y_<t, x) it prints the
          product w_1 ... w_t, and then puts w_t alone in its place. algorithm.md says which weights are exact.
Task:     solve(student_logp, mixed_logp, response_mask) gives four weights for each token, and 0 in the padding:
          per_token     w_t
          product       w_1 ... w_t, as printed
          exact_single  w_1 ... w_{t-1}: what led to the single step at t; 1 at the first token
          exact_long    w_1 ... w_T, the whole answer: what R_{t+1} depends on
          They are numbers and carry no gradient.
Allowed:  torch, and no loop.
In words: which are exact, and each for which term? Why does one still train with w_t alone? Think of an
          answer of 200 tokens: --bias measures three tokens only.
Run:      python exercises/06_weights.py               then --hint, then --hint=2
          python exercises/06_weights.py --bias        bias and noise of the gradient that each leads to, by oracle.py
"""

import sys

import torch
from checker import Exercise, run
from torch import Tensor


def spec(student_logp: Tensor, mixed_logp: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log q(y_t) and log p~(y_t) (B, T) float, response_mask (B, T) bool -> the four weights, (B, T) each"""
    log_q, log_p = student_logp.detach(), mixed_logp.detach()
    per_token, product, exact_single, exact_long = torch.zeros(4, *log_q.shape)
    for b in range(len(log_q)):
        T = int(response_mask[b].sum())
        w = [(log_q[b, t] - log_p[b, t]).exp() for t in range(T)]  # w_t
        for t in range(T):
            per_token[b, t], product[b, t], exact_single[b, t], exact_long[b, t] = w[t], 1, 1, 1
            for u in range(T):
                if u <= t:
                    product[b, t] *= w[u]
                if u < t:
                    exact_single[b, t] *= w[u]
                exact_long[b, t] *= w[u]
    return per_token, product, exact_single, exact_long


def solve(student_logp: Tensor, mixed_logp: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise NotImplementedError  # yours


# ---- what checks it -------------------------------------------------------------------------------------------------

def checked(solve):
    """What is compared: the weights, and whether one of them carries a gradient."""
    def weights(student_logp: Tensor, mixed_logp: Tensor, response_mask: Tensor) -> tuple:
        found = solve(student_logp.requires_grad_(), mixed_logp, response_mask)
        values = found if isinstance(found, tuple) else (found,)
        gradient = any(isinstance(value, Tensor) and value.requires_grad for value in values)
        plain = tuple(value.detach() if isinstance(value, Tensor) else value for value in values)
        return plain if isinstance(found, tuple) else plain[0], "a gradient" if gradient else "no gradient"

    return weights


def cases():
    generator = torch.Generator().manual_seed(6)
    for name, lengths, width in (("answers of several lengths", [5, 2, 7, 1], 7), ("one row", [4], 4),
                                 ("answers of one token", [1, 1, 1], 1), ("padding behind every answer", [3, 2], 6),
                                 ("a row that is all padding", [0, 4], 5)):
        response_mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        student_logp, mixed_logp = -torch.rand(2, len(lengths), width, generator=generator)  # in the padding too
        yield name, (student_logp, mixed_logp, response_mask)


def products(q: Tensor, p: Tensor, m: Tensor, sign: int = 1, single: str = "before", masked: bool = True,
             sums: bool = False) -> tuple[Tensor, ...]:
    log_w = sign * (q - p).detach()
    log_w = log_w * m if masked else log_w
    upto = log_w.cumsum(1)
    one = upto if single == "upto" else upto - log_w
    whole = upto[:, -1:].expand_as(upto) if single != "after" else upto[:, -1:] - upto + log_w
    if sums:
        w = log_w.exp() * m
        return w, w.cumsum(1) * m, (w.cumsum(1) - w) * m, w.sum(1, keepdim=True) * m
    return tuple(value.exp() * m for value in (log_w, upto, one, whole))


def attached(q: Tensor, p: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    return tuple(value + 0 * q for value in products(q, p, m))


def zeros(q: Tensor, p: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    w = (q - p).exp().detach() * m
    upto = w.cumprod(1)
    before = torch.cat([torch.ones_like(w[:, :1]), upto[:, :-1]], 1)
    return w, upto, before * m, upto[:, -1:] * m


SLIPS = {
    "the whole answer's weight is 0 behind padding: a factor that does not count is 1, and 0 only in a sum":
        checked(zeros),
    "a weight carries a gradient: detach, for a weight is a number and q learns through the loss beside it":
        checked(attached),
    "the ratio is upside down: w_t is q over p~, for the answers are p~'s and the mean that is wanted is q's":
        checked(lambda q, p, m: products(q, p, m, sign=-1)),
    "exact_single is the product up to t; y_t is not drawn in the single step at t, so the product ends before it":
        checked(lambda q, p, m: products(q, p, m, single="upto")),
    "exact_long is the product from t on; what came before was drawn from p~ too, so it is that of the whole answer":
        checked(lambda q, p, m: products(q, p, m, single="after")),
    "the whole answer's weight includes the padding: did you apply response_mask before the sum?":
        checked(lambda q, p, m: products(q, p, m, masked=False)),
    "these are sums of weights: the weight of tokens that were drawn one after another is a product":
        checked(lambda q, p, m: products(q, p, m, sums=True)),
}
HINTS = ("A product of ratios is the exponential of a sum of differences. Mask the differences: then padding adds 0.",
         "With log_w masked and detached, cumsum(1) is the logarithm of the product up to t; without its own term, of "
         "the product before t; its last column is the whole answer's. Mask once more at the end.")
EXERCISE = Exercise(checked(solve), checked(spec), cases, SLIPS, HINTS,
                    (("per_token", "product", "exact_single", "exact_long"), "whether a weight carries one"))


def bias() -> None:
    import oracle  # checker has put the project's files within reach
    print("answers from the mixture, alpha 0.2, in units of the exact gradient's norm, means over 100 toys")
    print("exact: exact_single and exact_long together; product: on both terms; none: every weight is 1")
    print(f"{'weight':12}{'bias':>10}{'noise':>8}")
    for weight in ("none", "per_token", "product", "exact"):
        _, error, noise = oracle.compare(dict(mix_alpha=0.2, weight=weight), toys=100, seed=0)
        print(f"{weight:12}{error:10.1e}{noise:8.2f}")


if __name__ == "__main__":
    bias() if sys.argv[1:] == ["--bias"] else run(EXERCISE)
