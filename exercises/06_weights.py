"""6. Importance weights: what a token drawn from the mixture counts for.

Paper:    arXiv 2306.08543v4, Section 2.2, Eq. (5). With w_t = q(y_t | y_<t, x) / p~(y_t | y_<t, x)
          the paper prints the product w_1 ... w_t, and then replaces it by w_t alone.
          --read says which weights are exact.
Task:     solve(student_logp, mixed_logp, response_mask) returns four weights for each token, and 0
          in the padding:
          per_token     w_t
          product       w_1 ... w_t, as printed
          exact_single  w_1 ... w_{t-1}: what led to the single step at t; 1 at the first token
          exact_long    w_1 ... w_T, over the whole answer: what R_{t+1} depends on
          The weights are numbers and carry no gradient.
Allowed:  torch, and no loop.
In words: Which of them are exact, and for which term is each? Why does one train with w_t alone all
          the same? Think of an answer of 200 tokens: --bias measures three tokens only.
Run:      python -m exercises.06_weights               then --hint, then --hint=2
          python -m exercises.06_weights --bias        bias and noise of the gradient that each
                                                       leads to, by the oracle
"""

import sys

import torch
from torch import Tensor

from exercises.checker import Exercise, masks, run


def spec(student_logp: Tensor, mixed_logp: Tensor,
         response_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log q(y_t) and log p~(y_t) (B, T) float, response_mask (B, T) bool
    -> the four weights, (B, T) each"""
    log_q = student_logp.detach()
    log_p = mixed_logp.detach()
    per_token, product, exact_single, exact_long = torch.zeros(4, *log_q.shape)
    for b in range(len(log_q)):
        T = int(response_mask[b].sum())
        w = [(log_q[b, t] - log_p[b, t]).exp() for t in range(T)]  # w_t
        for t in range(T):
            per_token[b, t] = w[t]
            product[b, t] = exact_single[b, t] = exact_long[b, t] = 1
            for u in range(T):
                if u <= t:
                    product[b, t] *= w[u]
                if u < t:
                    exact_single[b, t] *= w[u]
                exact_long[b, t] *= w[u]
    return per_token, product, exact_single, exact_long


def solve(student_logp: Tensor, mixed_logp: Tensor,
          response_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise NotImplementedError  # yours


# ---- what checks it ------------------------------------------------------------------------------

def and_whether_differentiable(solve):
    """What is compared: the weights, and whether one of them carries a gradient."""

    def weights(student_logp: Tensor, mixed_logp: Tensor, response_mask: Tensor) -> tuple:
        found = solve(student_logp.detach().requires_grad_(), mixed_logp, response_mask)
        values = found if isinstance(found, tuple) else (found,)
        if not all(isinstance(value, Tensor) for value in values):
            return found, ""
        carries = "a gradient" if any(value.requires_grad for value in values) else "no gradient"
        values = tuple(value.detach() for value in values)
        return values if isinstance(found, tuple) else values[0], carries

    return weights


def cases():
    generator = torch.Generator().manual_seed(6)
    for name, response_mask in masks():
        shape = (2, *response_mask.shape)
        student_logp, mixed_logp = -torch.rand(shape, generator=generator)  # in the padding too
        yield name, (student_logp, mixed_logp, response_mask)


def upside_down(q: Tensor, p: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    return spec(p, q, m)


def attached(q: Tensor, p: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    return tuple(weight + 0 * q for weight in spec(q, p, m))


def single_up_to_t(q: Tensor, p: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    per_token, product, _, exact_long = spec(q, p, m)
    return per_token, product, product, exact_long


def long_from_t_on(q: Tensor, p: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    per_token, product, exact_single, exact_long = spec(q, p, m)
    return per_token, product, exact_single, exact_long / exact_single.where(m, 1)


def with_padding(q: Tensor, p: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    return tuple(weight * m for weight in spec(q, p, m | True))


def sums(q: Tensor, p: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    w = spec(q, p, m)[0]
    upto = w.cumsum(1)
    return w, upto * m, (upto - w) * m, upto[:, -1:] * m


def zeros_in_a_product(q: Tensor, p: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    w, product, exact_single, _ = spec(q, p, m)
    return w, product, exact_single, w.prod(1, keepdim=True) * m


SLIPS = {
    "the weight of the whole answer is 0 where padding follows: a factor that does not count is 1, "
    "and only in a sum is it 0":
        zeros_in_a_product,
    "a weight carries a gradient: detach it, for a weight is a number, and q learns through the "
    "loss beside it":
        attached,
    "the ratio is upside down: w_t is q over p~, because the answers come from p~, and a mean over "
    "q is wanted":
        upside_down,
    "exact_single is the product up to t: the single step at t does not draw y_t, so the product "
    "ends before t":
        single_up_to_t,
    "exact_long is the product from t on: what came before t was drawn from p~ too, so multiply "
    "over the whole answer":
        long_from_t_on,
    "the weight of the whole answer includes the padding: did you apply response_mask before the "
    "sum?":
        with_padding,
    "these are sums of weights: the weight of tokens that are drawn one after another is a product":
        sums,
}
HINTS = (
    "A product of ratios is the exponential of a sum of differences. Mask the differences: then "
    "padding adds 0.",
    "Let log_w be masked and detached. cumsum(1) of it is the logarithm of the product up to t; "
    "without its own term it is that of the product before t; its last column is that of the whole "
    "answer. Mask once more at the end.",
)
PARTS = (
    ("per_token", "product", "exact_single", "exact_long"),
    "whether a weight carries one",
)
EXERCISE = Exercise(
    solve, spec, cases, SLIPS, HINTS, PARTS, compared=and_whether_differentiable)


def bias() -> None:
    from exercises.oracle import compare

    print("answers from the mixture, alpha 0.2, in units of the exact gradient's norm, means over "
          "100 toys")
    print("exact: exact_single and exact_long together; product: on both terms; none: every weight "
          "is 1")
    print(f"{'weight':12}{'bias':>10}{'noise':>8}")
    for weight in ("none", "per_token", "product", "exact"):
        _, error, noise = compare(dict(mix_alpha=0.2, weight=weight), toys=100, seed=0)
        print(f"{weight:12}{error:10.1e}{noise:8.2f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--bias"]:
        bias()
    else:
        run(EXERCISE)
