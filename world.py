"""The built-in world: a little language of facts, whose right answers can be told from wrong ones.

Each of 48 things has facts of its own: three adjectives, three deeds, three places, two wishes and
three later places, drawn once from lists of twelve and six. A right answer is a short story whose
words are all true of its thing. So a laptop can measure precision instead of estimating it, and
count which of the 672 facts a student still tells. Facts take memory: a small student does not hold
all of them, and has to choose. There are 432 prompts; all are trained on, and the same ones tested.

Paper:    none; but Section 2.1 of arXiv 2306.08543v4 prefers a student that is right to a student
          that covers everything.
Run:      python data.py --data=tiny          prints some of it
"""

import re
from functools import cache

import numpy as np

NAMES = ["Anna", "Ella", "Mia", "Zoe", "Ben", "Leo", "Max", "Tom"]
THINGS = """cat owl goat dog hen fox pig duck apple egg cake pear loaf plum nut melon drum bell
    flute harp kite doll ball horn lamp knife rope spoon broom saw clock key coat hat shoe glove
    scarf belt bag ring boat cart tent wheel chair book map box""".split()
ADJECTIVES = ["red", "dry", "warm", "big", "tiny", "new", "long", "grey", "soft", "round", "cheap",
              "strange"]
DEEDS = ["washed", "hid", "lost", "carried", "kept", "drew", "watched", "sold", "lent", "weighed",
         "painted", "followed"]
PLACES = ["garden", "kitchen", "barn", "street", "school", "market", "forest", "mill", "tower",
          "harbour", "meadow", "church"]
WISHES = ["wanted", "took", "liked", "bought", "missed", "praised"]
FINDING = ["found", "spotted", "met"]


def draw_facts() -> dict[str, dict[str, list[str]]]:
    """What is true of each thing: some words of each list, the same in every run."""
    rng = np.random.default_rng(0)
    kinds = {"adjective": (ADJECTIVES, 3), "deed": (DEEDS, 3), "place": (PLACES, 3),
             "wish": (WISHES, 2), "later place": (PLACES, 3)}
    return {thing: {kind: sorted(rng.choice(words, count, replace=False).tolist())
                    for kind, (words, count) in kinds.items()} for thing in THINGS}


FACTS = draw_facts()
FACT_COUNT = sum(len(words) for kinds in FACTS.values() for words in kinds.values())


def story(thing: str, hero: str):
    """The grammar, as a coroutine. It yields the words that may come next, "" for the end, and is
    sent the one that came.

    write() sends it random words, read() those of an answer: the two cannot disagree."""
    facts = FACTS[thing]
    for words in ([hero] if hero else NAMES, FINDING, ["a"], facts["adjective"], [thing], ["and"],
                  facts["deed"], ["it"], ["in"], ["the"], facts["place"], ["."]):
        yield words
    if (yield ["then", ""]) == "then":
        for words in (NAMES, ["also"], facts["wish"], ["it"], ["near"], ["some"],
                      facts["later place"], ["."]):
            yield words
    while True:
        yield [""]


def write(thing: str, hero: str, rng: np.random.Generator) -> str:
    """A right answer, in which each word is drawn evenly from those that the grammar allows."""
    grammar = story(thing, hero)
    words = [pick(rng, next(grammar))]
    while words[-1]:
        words.append(pick(rng, grammar.send(words[-1])))
    return " ".join(words[:-1]).replace(" .", ".")


def read(instruction: str, input: str, answer: str) -> tuple[bool, set[tuple[str, int, str]]]:
    """Whether this is one of the right answers, to the letter, and the facts that it tells even if
    it is wrong: (thing, position, word). Other instructions have no right answers."""
    asked = re.fullmatch(r"Tell about the (\w+)", instruction)
    if asked is None or asked[1] not in THINGS or input not in ("", *NAMES):
        return False, set()
    words = re.findall(r"\w+|\.", answer)
    right = " ".join(words).replace(" .", ".") == answer
    told = set()
    grammar = story(asked[1], input)
    allowed = next(grammar)
    for position, word in enumerate([*words, ""]):
        right &= word in allowed
        if word in allowed and allowed in FACTS[asked[1]].values():
            told.add((asked[1], position, word))
        allowed = grammar.send(word)
    return right, told


@cache
def instructions(split: str) -> list[tuple[str, str, str]]:
    """(instruction, input, answer) of each row. In half of them the input names the hero."""
    count, stream = {"train": (8000, 0), "valid": (200, 1), "test": (300, 2)}[split]
    rng = np.random.default_rng((1, stream))
    rows = []
    for _ in range(count):
        thing = pick(rng, THINGS)
        hero = pick(rng, NAMES) if rng.random() < 0.5 else ""
        rows.append((f"Tell about the {thing}", hero, write(thing, hero, rng)))
    return rows


@cache
def text() -> list[str]:
    """The plain text of this world: lines of the same words that tell no story."""
    rng = np.random.default_rng(2)
    slots = (NAMES, WISHES, ["the"], ADJECTIVES, THINGS, ["near"], ["the"], PLACES)
    return [" ".join(pick(rng, words) for words in slots) + "." for _ in range(20000)]


def pick(rng: np.random.Generator, words) -> str:
    return list(words)[rng.integers(len(words))]


@cache
def vocabulary() -> list[str]:
    """Every word with the space before it, and without one the full stop and the words that may
    begin a text. These have capitals, so tokens side by side can always be told apart."""
    small = "about the a and it in then also near some".split()
    spaced = [*small, *FINDING, *NAMES, *THINGS, *ADJECTIVES, *DEEDS, *WISHES, *PLACES]
    return ["Tell", ".", *NAMES, *(" " + word for word in spaced)]
