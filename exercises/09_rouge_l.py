"""9. Rouge-L: how much of a reference an answer says, in its order.

Paper:    arXiv 2306.08543v4, Section 3.1: the metric of its tables. Rouge-L is Lin's (2004), the best over references.
Task:     solve(answer, references) gives, in percent, the largest F1 over the references. With L the length of the
          longest common subsequence of words, precision is L / words of the answer, recall L / words of the reference,
          F1 = 2 precision recall / (precision + recall), and 0 if L is 0. A word is a run of the letters a to z and the
          digits, once the text is lower-cased. The tables stem words too ("cats" is "cat"); you need not.
Allowed:  plain Python and re; no package.
In words: a dull answer and a good one may have the same Rouge-L. Find a pair. What does the number reward?
Run:      python exercises/09_rouge_l.py               then --hint, then --hint=2
"""

import random
import re
from functools import cache

from checker import Exercise, run


def spec(answer: str, references: list[str]) -> float:
    """two texts or more -> percent, from 0.0 to 100.0"""
    def longest(a: tuple[str, ...], r: tuple[str, ...]) -> int:  # try every subsequence of the answer's words
        best = 0
        for chosen in range(2 ** len(a)):
            words, rest = [a[n] for n in range(len(a)) if chosen >> n & 1], iter(r)
            if len(words) > best and all(word in rest for word in words):  # `in` goes on where the last one was found
                best = len(words)
        return best

    F1 = [0.0]
    a = tuple(re.findall("[a-z0-9]+", answer.lower()))
    for reference in references:
        r = tuple(re.findall("[a-z0-9]+", reference.lower()))
        if L := longest(a, r):
            precision, recall = L / len(a), L / len(r)
            F1.append(2 * precision * recall / (precision + recall))
    return 100 * max(F1)


def solve(answer: str, references: list[str]) -> float:
    raise NotImplementedError  # yours


# ---- what checks it -------------------------------------------------------------------------------------------------

def cases():
    yield "one pair", ("the cat sat on the red mat", ["the red cat is on a mat"])
    yield "the same words in another order", ("red cat the", ["the red cat"])
    yield "a word said twice", ("the the the cat", ["the cat and the dog"])
    yield "case and punctuation", ("The cat, the DOG; and 2 owls!", ["the cat (the dog) and 2 owls."])
    yield "a hyphen parts words, and so does an apostrophe", ("the red-hot cat's mat", ["red hot cat s mat"])
    yield "an underscore, an accent and a digit", ("a_b 3 caf\u00e9", ["a b 4 caf"])
    yield "several references", ("a big dog", ["a cat", "a big red dog", "the dog", ""])
    yield "gaps on both sides", ("a x b y c z", ["u a v b w c"])
    yield "nothing in common", ("yes", ["no"])
    yield "an empty answer", ("", ["the cat"])
    yield "an answer without a word", ("?!", ["the cat", "..."])
    yield "the same text", ("The cat sat.", ["The cat sat."])
    draw = random.Random(9)
    for n in range(12):
        text = lambda: " ".join(draw.choices(["the", "cat", "dog", "a", "sat", "red", "on"], k=draw.randint(1, 9)))
        yield f"random words, {n + 1}", (text(), [text() for _ in range(draw.randint(1, 3))])


def rouge(answer: str, references: list[str], words=lambda text: re.findall("[a-z0-9]+", text.lower()), common=None,
          f1=lambda P, R: 2 * P * R / (P + R) if P + R else 0.0, over=max, percent: int = 100) -> float:
    F1, a = [], words(answer)
    for r in map(words, references):
        L = (common or subsequence)(tuple(a), tuple(r))
        F1.append(f1(L / max(1, len(a)), L / max(1, len(r))))
    return float(percent * over(F1))


@cache
def subsequence(a: tuple, r: tuple) -> int:
    if not (a and r):
        return 0
    return 1 + subsequence(a[1:], r[1:]) if a[0] == r[0] else max(subsequence(a[1:], r), subsequence(a, r[1:]))


def substring(a: tuple, r: tuple) -> int:
    pieces = {r[i:j] for i in range(len(r)) for j in range(i, len(r) + 1)}
    return max((j - i for i in range(len(a)) for j in range(i, len(a) + 1) if a[i:j] in pieces), default=0)


SLIPS = {
    "this is the longest common run of words: a subsequence may leave words out in between":
        lambda a, r: rouge(a, r, common=substring),
    "this counts common words in any order (Rouge-1): a subsequence keeps the order":
        lambda a, r: rouge(a, r, common=lambda a, r: sum(min(a.count(w), r.count(w)) for w in set(a))),
    "this counts different common words: a subsequence keeps their order, and a word may be in it twice":
        lambda a, r: rouge(a, r, common=lambda a, r: len(set(a) & set(r))),
    "this is recall: F1 asks for precision too": lambda a, r: rouge(a, r, f1=lambda P, R: R),
    "this is precision: F1 asks for recall too": lambda a, r: rouge(a, r, f1=lambda P, R: P),
    "this is the arithmetic mean of precision and recall; F1 is 2 P R / (P + R)":
        lambda a, r: rouge(a, r, f1=lambda P, R: (P + R) / 2),
    "this is the mean over the references; the best of them counts":
        lambda a, r: rouge(a, r, over=lambda F1: sum(F1) / len(F1)),
    "capital letters make other words here: lower the case first":
        lambda a, r: rouge(a, r, words=lambda text: re.findall("[A-Za-z0-9]+", text)),
    "punctuation is taken for a part of the word: a word is a run of letters and digits":
        lambda a, r: rouge(a, r, words=lambda text: text.lower().split()),
    "this compares letters; Rouge-L compares words": lambda a, r: rouge(a, r, words=str.lower),
    "this is a fraction; percent are asked for": lambda a, r: rouge(a, r, percent=1),
}
HINTS = ("Let L[i][j] be the longest common subsequence of the first i words of one text and the first j of the other. "
         "L[i][j] follows from L[i-1][j-1], L[i-1][j] and L[i][j-1].",
         "If the two last words are equal, L[i][j] is L[i-1][j-1] + 1, else the larger of the other two; row 0 and "
         "column 0 are 0. Take care of texts without words before you divide.")
EXERCISE = Exercise(solve, spec, cases, SLIPS, HINTS)

if __name__ == "__main__":
    run(EXERCISE)
