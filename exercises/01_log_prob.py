"""1. The log-probability of an answer: what every later equation is made of.

Paper:    arXiv 2306.08543v4, Section 2.1: q(y|x) is the product of q(y_t | y_<t, x), so its
          logarithm is a sum over tokens. Eq. (2) needs the terms of this sum, log q(y_t | y_<t, x),
          and the same terms of the teacher p.
Task:     solve(logits, tokens, prompt_tokens, response_mask) returns log q(y_t | y_<t, x) for each
          response token, and 0 outside response_mask. A row of tokens is a prompt, its response,
          and padding up to the common length S. Prompts differ in length. The logits at a position
          predict the NEXT token. Prompt and padding may hold any token, so go by response_mask,
          which is true up to and including the end token. Gradients must flow through: the checker
          also compares the gradient of the answer's sum by logits.
Allowed:  torch, and no loop over rows or positions.
In words: An implementation masks with tokens != end_token. What does its student never learn?
Run:      python -m exercises.01_log_prob           then --hint, then --hint=2
"""

from functools import partial

import torch
from torch import Tensor

from exercises.checker import Exercise, run, with_gradient

END = 0  # the end token; it fills up short rows too, as in GPT-2
V = 7


def spec(logits: Tensor, tokens: Tensor, prompt_tokens: list[int], response_mask: Tensor) -> Tensor:
    """logits (B, S, V) float, tokens (B, S) int64, prompt_tokens: the B lengths of the prompts,
    each at least 1, response_mask (B, T) bool -> (B, T)"""
    logp = torch.zeros(response_mask.shape)
    for b in range(len(tokens)):
        for t in range(response_mask.size(1)):
            if response_mask[b, t]:
                i = prompt_tokens[b] + t  # the place of y_t in the row
                z = logits[b, i - 1]  # (V,), which predicts y_t
                logp[b, t] = z[tokens[b, i]] - z.logsumexp(0)
    return logp


def solve(logits: Tensor, tokens: Tensor, prompt_tokens: list[int],
          response_mask: Tensor) -> Tensor:
    raise NotImplementedError  # yours


# ---- what checks it ------------------------------------------------------------------------------

BATCHES = (  # a name, the lengths of the prompts and of the answers, and T
    ("prompts and answers of several lengths", [3, 1, 5], [4, 6, 2], 6),
    ("one row", [2], [3], 3),
    ("answers of one token", [1, 4], [1, 1], 1),
    ("padding behind every answer", [2, 3], [3, 1], 5),
    ("a row that is all padding", [4, 2], [0, 3], 3),
    ("an end token inside the prompt", [4, 3], [2, 4], 4),
    ("padding that holds other tokens", [1, 3], [2, 3], 4),
)


def cases():
    generator = torch.Generator().manual_seed(1)
    for name, prompt_tokens, lengths, T in BATCHES:
        S = max(prompt_tokens) + T
        logits = 3 * torch.randn(len(lengths), S, V, generator=generator)
        tokens = torch.randint(1, V, (len(lengths), S), generator=generator)
        response_mask = torch.arange(T) < torch.tensor(lengths)[:, None]
        for b in range(len(lengths)):
            behind = prompt_tokens[b] + lengths[b]  # where the padding begins
            if "other tokens" not in name:
                tokens[b, behind:] = END
            if 0 < lengths[b] < T:  # it has ended; an answer of T tokens ran out of room
                tokens[b, behind - 1] = END
            if "end token" in name:
                tokens[b, 1] = END
        yield name, (logits, tokens, prompt_tokens, response_mask)


def in_mask(token: Tensor, true: Tensor) -> bool:
    return true


def every_token(token: Tensor, true: Tensor) -> bool:
    return True


def no_end_token(token: Tensor, true: Tensor) -> bool:
    return token != END


def in_mask_but_no_end_token(token: Tensor, true: Tensor) -> bool:
    return true and token != END


def mistaken(logits: Tensor, tokens: Tensor, prompt_tokens: list[int], response_mask: Tensor,
             at: int = -1, axis: int = 2, take=torch.log, keep=in_mask) -> Tensor:
    """spec with a mistake: y_t is predicted `at` another position, softmax runs over another axis,
    `take` stands for the logarithm, or `keep` decides which tokens count."""
    q = logits.softmax(axis)
    logp = torch.zeros(response_mask.shape)
    for b in range(len(tokens)):
        for t in range(response_mask.size(1)):
            i = prompt_tokens[b] + t
            if keep(tokens[b, i], response_mask[b, t]):
                logp[b, t] = take(q[b, i + at, tokens[b, i]])
    return logp


SLIPS = {
    "off by one: the logits at a position predict the next token, so those for y_t stand one "
    "position before it":
        partial(mistaken, at=0),
    "the prompt is not skipped: these are the row's first T predictions, but y_1 comes after "
    "prompt_tokens":
        lambda z, y, n, m: mistaken(z, y, [1] * len(n), m),
    "these are the row's last T tokens: rows are padded on the right, and each response begins "
    "right after its own prompt":
        lambda z, y, n, m: mistaken(z, y, [max(n)] * len(n), m),
    "tokens in the padding are counted: did you apply response_mask?":
        partial(mistaken, keep=every_token),
    "the end token is lost: response_mask is true for it, and its log-probability counts like any "
    "other":
        partial(mistaken, keep=in_mask_but_no_end_token),
    "this masks with tokens != END: it loses the end token, and it counts padding that holds "
    "another token":
        partial(mistaken, keep=no_end_token),
    "these are probabilities: take their logarithm":
        partial(mistaken, take=lambda q: q),
    "softmax runs over the positions: it has to run over the vocabulary, the last axis":
        partial(mistaken, axis=1),
    "no gradient flows through this to logits: nothing could be trained with it":
        lambda z, y, n, m: spec(z, y, n, m).detach(),
}
HINTS = (
    "Where does y_t stand in its row? For all rows and all t that is a table of positions (B, T): "
    "prompt_tokens as a column plus torch.arange(T) as a row.",
    "Normalise with log_softmax. Then index with two tables, rows (B, 1) and positions (B, T): "
    "once into the tokens, and once, a position earlier, into the log-probabilities. Mask at the "
    "end.",
)
EXERCISE = Exercise(
    solve, spec, cases, SLIPS, HINTS, ("the answer", "the gradient of its sum by logits"),
    compared=with_gradient)

if __name__ == "__main__":
    run(EXERCISE)
