"""1. The log-probability of an answer: what every later equation is made of.

Paper:    arXiv 2306.08543v4, Section 2.1: q(y|x) is the product of q(y_t | y_<t, x), so its logarithm is a sum over
          tokens. Eq. (2) needs the terms, log q(y_t | y_<t, x), and the same of the teacher p.
Task:     solve(logits, tokens, prompt_tokens, response_mask) gives log q(y_t | y_<t, x) of each response token, and 0
          outside response_mask. A row of tokens is a prompt, its response, and padding up to the common length S; the
          prompts differ in length. The logits at a position are those of the NEXT token. The padding may hold
          anything, and so may the prompt; go by response_mask, which is true up to and including the end token.
          Gradients flow through, and the gradient of the answer's sum by logits is compared too.
Allowed:  torch, and no loop over rows or positions.
In words: an implementation masks with tokens != end_token. What does the student no longer learn?
Run:      python exercises/01_log_prob.py           then --hint, then --hint=2
"""

import torch
from checker import Exercise, run, with_gradient
from torch import Tensor

END, V = 0, 7  # the end token, with which rows are padded too, as GPT-2's are; and the vocabulary


def spec(logits: Tensor, tokens: Tensor, prompt_tokens: list[int], response_mask: Tensor) -> Tensor:
    """logits (B, S, V) float, tokens (B, S) int64, the length of each prompt (B of them, at least 1), response_mask
    (B, T) bool -> (B, T)"""
    logp = torch.zeros(response_mask.shape)
    for b in range(len(tokens)):
        for t in range(response_mask.size(1)):
            if response_mask[b, t]:
                i = prompt_tokens[b] + t  # where y_t stands in the row
                z = logits[b, i - 1]  # (V,), from which it is predicted
                logp[b, t] = z[tokens[b, i]] - z.logsumexp(0)
    return logp


def solve(logits: Tensor, tokens: Tensor, prompt_tokens: list[int], response_mask: Tensor) -> Tensor:
    raise NotImplementedError  # yours


# ---- what checks it -------------------------------------------------------------------------------------------------

def cases():
    generator = torch.Generator().manual_seed(1)
    for name, prompt_tokens, lengths, width in (
            ("prompts and answers of several lengths", [3, 1, 5], [4, 6, 2], 6), ("one row", [2], [3], 3),
            ("answers of one token", [1, 4], [1, 1], 1), ("padding behind every answer", [2, 3], [3, 1], 5),
            ("a row that is all padding", [4, 2], [0, 3], 3), ("an end token inside the prompt", [4, 3], [2, 4], 4),
            ("padding that holds other tokens", [1, 3], [2, 3], 4)):
        S = max(prompt_tokens) + width
        logits = 3 * torch.randn(len(lengths), S, V, generator=generator)  # in the padding too: models compute it
        tokens = torch.randint(1, V, (len(lengths), S), generator=generator)
        response_mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        for b, (n, length) in enumerate(zip(prompt_tokens, lengths)):
            if "other tokens" not in name:
                tokens[b, n + length :] = END
            if 0 < length < width:  # it ended; an answer as long as there is room for did not
                tokens[b, n + length - 1] = END
            if "end token" in name:
                tokens[b, 1] = END
        yield name, (logits, tokens, prompt_tokens, response_mask)


def mistaken(logits: Tensor, tokens: Tensor, prompt_tokens: list[int], response_mask: Tensor, at: int = -1,
             axis: int = 2, take=torch.log, keep=None) -> Tensor:
    """spec with mistakes: y_t predicted `at` another position, normalised over another axis, `take` for the logarithm,
    and `keep`, which says of each token and place in the mask whether it counts."""
    keep = keep or (lambda token, true: true)
    q, logp = logits.softmax(axis), torch.zeros(response_mask.shape)
    for b in range(len(tokens)):
        for t in range(response_mask.size(1)):
            i = prompt_tokens[b] + t
            if keep(tokens[b, i], response_mask[b, t]):
                logp[b, t] = take(q[b, i + at, tokens[b, i]])
    return logp


SLIPS = {
    "off by one: the logits at a position are of the next token, so y_t is predicted one position before its own":
        lambda z, y, n, m: mistaken(z, y, n, m, at=0),
    "the prompt is not skipped: these are the row's first T predictions, but y_1 comes after prompt_tokens":
        lambda z, y, n, m: mistaken(z, y, [1] * len(n), m),
    "these are the row's last T tokens: rows are padded on the right, and each response begins after its own prompt":
        lambda z, y, n, m: mistaken(z, y, [max(n)] * len(n), m),
    "tokens in the padding are counted: did you apply response_mask?":
        lambda z, y, n, m: mistaken(z, y, n, m, keep=lambda token, true: True),
    "the end token is lost: response_mask is true through it, and its log-probability counts like any other":
        lambda z, y, n, m: mistaken(z, y, n, m, keep=lambda token, true: true and token != END),
    "this masks with tokens != END: the end token is lost, and padding that holds another token is counted":
        lambda z, y, n, m: mistaken(z, y, n, m, keep=lambda token, true: token != END),
    "these are probabilities; take their logarithm": lambda z, y, n, m: mistaken(z, y, n, m, take=lambda q: q),
    "softmax runs over the positions; it has to run over the vocabulary, the last axis":
        lambda z, y, n, m: mistaken(z, y, n, m, axis=1),
    "no gradient flows through this to logits: nothing could be trained with it":
        lambda z, y, n, m: spec(z, y, n, m).detach(),
}
SLIPS = {words: with_gradient(slip) for words, slip in SLIPS.items()}
checked = with_gradient
HINTS = ("Where in its row does y_t stand? For all rows and t at once that is a table of positions (B, T), made of "
         "prompt_tokens as a column and torch.arange(T) as a row.",
         "Normalise with log_softmax, then index with two tables, rows (B, 1) and positions (B, T): once into the "
         "tokens, and once, a position earlier, into the log-probabilities. Mask last.")
EXERCISE = Exercise(checked(solve), checked(spec), cases, SLIPS, HINTS,
                    ("the answer", "the gradient of its sum by logits"))

if __name__ == "__main__":
    run(EXERCISE)
