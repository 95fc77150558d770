"""9. Rouge-L: how much of a reference an answer says, in the reference's order.

Paper:    arXiv 2306.08543v4, Section 3.1: the metric of the paper's tables. Rouge-L is Lin's
          (2004); with several references the best one counts.
Task:     solve(answer, references) returns, in percent, the largest F1 over the references. L is
          the length of the longest common subsequence of words, precision is L / words of the
          answer, recall is L / words of the reference, and F1 is
          2 precision recall / (precision + recall), or 0 if L is 0. Lower-case the text first: a
          word is then a run of the letters a to z and the digits. The tables stem words too ("cats"
          becomes "cat"); you need not.
Allowed:  plain Python and re; no package.
In words: A dull answer and a good one may have the same Rouge-L. Find a pair. What does the number
          reward?
Run:      python -m exercises.09_rouge_l               then --hint, then --hint=2
"""

import random
import re
from functools import cache, partial

from exercises.checker import Exercise, run


def spec(answer: str, references: list[str]) -> float:
    """The answer and at least one reference -> percent, from 0.0 to 100.0"""

    def longest(a: list[str], r: list[str]) -> int:  # tries every subsequence of the answer
        best = 0
        for chosen in range(2 ** len(a)):
            words = [a[n] for n in range(len(a)) if chosen >> n & 1]
            rest = iter(r)
            found = all(word in rest for word in words)  # each `in` goes on where the last ended
            if found and len(words) > best:
                best = len(words)
        return best

    F1 = [0.0]
    a = re.findall("[a-z0-9]+", answer.lower())
    for reference in references:
        r = re.findall("[a-z0-9]+", reference.lower())
        L = longest(a, r)
        if L > 0:
            precision = L / len(a)
            recall = L / len(r)
            F1.append(2 * precision * recall / (precision + recall))
    return 100 * max(F1)


def solve(answer: str, references: list[str]) -> float:
    raise NotImplementedError  # yours


# ---- what checks it ------------------------------------------------------------------------------

def cases():
    yield "one pair", ("the cat sat on the red mat", ["the red cat is on a mat"])
    yield "the same words in another order", ("red cat the", ["the red cat"])
    yield "a word said twice", ("the the the cat", ["the cat and the dog"])
    yield "case and punctuation", (
        "The cat, the DOG; and 2 owls!", ["the cat (the dog) and 2 owls."])
    yield "a hyphen separates words, and so does an apostrophe", (
        "the red-hot cat's mat", ["red hot cat s mat"])
    yield "an underscore, an accent and a digit", ("a_b 3 caf\u00e9", ["a b 4 caf"])
    yield "several references", ("a big dog", ["a cat", "a big red dog", "the dog", ""])
    yield "gaps on both sides", ("a x b y c z", ["u a v b w c"])
    yield "nothing in common", ("yes", ["no"])
    yield "an empty answer", ("", ["the cat"])
    yield "an answer without a word", ("?!", ["the cat", "..."])
    yield "the same text", ("The cat sat.", ["The cat sat."])
    draw = random.Random(9)

    def text() -> str:
        return " ".join(draw.choices("the cat dog a sat red on".split(), k=draw.randint(1, 9)))

    for n in range(12):
        yield f"random words, {n + 1}", (text(), [text() for _ in range(draw.randint(1, 3))])


@cache
def subsequence(a: tuple, r: tuple) -> int:
    """The length of the longest common subsequence."""
    if not a or not r:
        return 0
    if a[0] == r[0]:
        return 1 + subsequence(a[1:], r[1:])
    return max(subsequence(a[1:], r), subsequence(a, r[1:]))


def run_of_words(a: tuple, r: tuple) -> int:
    """The length of the longest common run."""
    best = 0
    for i in range(len(a)):
        for j in range(len(r)):
            n = 0
            while i + n < len(a) and j + n < len(r) and a[i + n] == r[j + n]:
                n += 1
            best = max(best, n)
    return best


def in_any_order(a: tuple, r: tuple) -> int:
    return sum(min(a.count(word), r.count(word)) for word in set(a))


def different_words(a: tuple, r: tuple) -> int:
    return len(set(a) & set(r))


def words_of(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def harmonic(P: float, R: float) -> float:
    return 2 * P * R / (P + R) if P + R else 0.0


def mistaken(answer: str, references: list[str], words=words_of, common=subsequence, f1=harmonic,
             over=max, percent=100) -> float:
    """Rouge-L with one of its five steps replaced."""
    a = tuple(words(answer))
    F1 = []
    for reference in references:
        r = tuple(words(reference))
        L = common(a, r)
        F1.append(f1(L / max(1, len(a)), L / max(1, len(r))))
    return float(percent * over(F1))


SLIPS = {
    "this is the longest common run of words: a subsequence may leave out words in between":
        partial(mistaken, common=run_of_words),
    "this counts common words in any order (Rouge-1): a subsequence keeps the order":
        partial(mistaken, common=in_any_order),
    "this counts each common word once: a subsequence keeps the order, and may hold a word twice":
        partial(mistaken, common=different_words),
    "this is recall: F1 needs precision too": partial(mistaken, f1=lambda P, R: R),
    "this is precision: F1 needs recall too": partial(mistaken, f1=lambda P, R: P),
    "this is the arithmetic mean of precision and recall: F1 is 2 P R / (P + R)":
        partial(mistaken, f1=lambda P, R: (P + R) / 2),
    "this is the mean over the references: the best of them counts":
        partial(mistaken, over=lambda F1: sum(F1) / len(F1)),
    "capital letters make different words here: lower-case the text first":
        partial(mistaken, words=lambda text: re.findall("[A-Za-z0-9]+", text)),
    "punctuation is taken as part of the word: a word is a run of letters and digits":
        partial(mistaken, words=lambda text: text.lower().split()),
    "this compares letters: Rouge-L compares words": partial(mistaken, words=str.lower),
    "this is a fraction: return percent": partial(mistaken, percent=1),
}
HINTS = (
    "Let L[i][j] be the length of the longest common subsequence of the first i words of one text "
    "and the first j words of the other. L[i][j] follows from L[i-1][j-1], L[i-1][j] and "
    "L[i][j-1].",
    "If the two last words are equal, L[i][j] is L[i-1][j-1] + 1, else the larger of the other "
    "two. Row 0 and column 0 are 0. Before you divide, think of texts without words.",
)
EXERCISE = Exercise(solve, spec, cases, SLIPS, HINTS)

if __name__ == "__main__":
    run(EXERCISE)
