"""The built-in world: a little language whose right answers can be told from wrong ones exactly.

An instruction has tens of thousands of right answers, in which later words depend on earlier ones:
the pronoun depends on the name, every verb on the tense of the first, the word after "a" or "an" on
its first letter, "it" or "them" on the number, the deed on the kind of thing, and the second
sentence on the name and place of the first. So a laptop can measure precision instead of estimating
it. There are 81 instructions; a model is trained on all of them and tested on the same ones.

Paper:    none; but Section 2.1 of arXiv 2306.08543v4 prefers a student that is right to a student
          that covers everything.
Run:      python data.py --data=tiny          prints some of it
"""

import re
from functools import cache

import numpy as np

NAMES = {"Anna": "she", "Ella": "she", "Mia": "she", "Zoe": "she",
         "Ben": "he", "Leo": "he", "Max": "he", "Tom": "he"}
THINGS = {"cat": "animal", "owl": "animal", "goat": "animal",
          "apple": "food", "egg": "food", "cake": "food",
          "drum": "tool", "umbrella": "tool", "knife": "tool"}
PLURALS = {thing: "knives" if thing == "knife" else thing + "s" for thing in THINGS}
ADJECTIVES = ["red", "old", "ugly", "big", "odd", "new"]
FINDING = {"past": ["found", "saw", "bought"], "present": ["finds", "sees", "buys"]}
DOING = {"animal": {"past": ["fed", "washed"], "present": ["feeds", "washes"]},
         "food": {"past": ["ate", "cooked"], "present": ["eats", "cooks"]},
         "tool": {"past": ["used", "mended"], "present": ["uses", "mends"]}}
WANTING = {"past": ["wanted", "took", "liked"], "present": ["wants", "takes", "likes"]}
PLACES = ["garden", "kitchen", "barn", "street"]


def story(thing: str, hero: str):
    """The grammar, as a coroutine. It yields the words that may come next, "" for the end, and is
    sent the one that came.

    write() sends it random words, is_valid() those of an answer: the two cannot disagree."""
    name = yield [hero] if hero else list(NAMES)
    verb = yield FINDING["past"] + FINDING["present"]
    tense = "past" if verb in FINDING["past"] else "present"
    article = yield ["a", "an", "two", "some"]
    noun, them = (thing, "it") if article in ("a", "an") else (PLURALS[thing], "them")
    vowel = {"a": [False], "an": [True]}.get(article, [False, True])
    if (yield [word for word in [*ADJECTIVES, noun] if (word[0] in "aeiou") in vowel]) != noun:
        yield [noun]
    yield ["and"]
    yield [NAMES[name]]
    yield DOING[THINGS[thing]][tense]
    yield [them]
    yield ["in"]
    yield ["the"]
    place = yield PLACES
    yield ["."]
    if (yield ["then", ""]) == "then":
        yield [other for other in NAMES if NAMES[other] != NAMES[name]]
        yield WANTING[tense]
        if (yield [them, "the"]) == "the":
            yield [noun]
        yield ["from"]
        yield [name]
        yield ["near"]
        yield ["the"]
        yield [place]
        yield ["."]
        yield [""]


def write(thing: str, hero: str, rng: np.random.Generator) -> str:
    """A right answer, in which each word is drawn evenly from those that the grammar allows."""
    grammar = story(thing, hero)
    words = [pick(rng, next(grammar))]
    while words[-1]:
        words.append(pick(rng, grammar.send(words[-1])))
    return " ".join(words[:-1]).replace(" .", ".")


def is_valid(instruction: str, input: str, answer: str) -> bool:
    """Whether this is one of the right answers, to the letter. Other instructions have none."""
    asked = re.fullmatch(r"Tell about the (\w+)", instruction)
    if asked is None or asked[1] not in THINGS or input not in ("", *NAMES):
        return False
    words = re.findall(r"\w+|\.", answer)
    if " ".join(words).replace(" .", ".") != answer:
        return False
    grammar = story(asked[1], input)
    allowed = next(grammar)
    for word in words:
        if word not in allowed:
            return False
        allowed = grammar.send(word)
    return "" in allowed


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
    verbs = WANTING["past"] + FINDING["past"]
    slots = (NAMES, verbs, ["the"], ADJECTIVES, THINGS, ["near"], ["the"], PLACES)
    return [" ".join(pick(rng, words) for words in slots) + "." for _ in range(20000)]


def pick(rng: np.random.Generator, words) -> str:
    return list(words)[rng.integers(len(words))]


@cache
def vocabulary() -> list[str]:
    """Most words include the space before them. The full stop and the words that may begin a text
    do not; those words have capitals, so tokens side by side can always be told apart."""
    tenses = [*FINDING.values(), *(verbs for kind in DOING.values() for verbs in kind.values()),
              *WANTING.values()]
    verbs = [verb for words in tenses for verb in words]
    small = "about the a an two some and she he it them in then from near".split()
    spaced = [*small, *NAMES, *THINGS, *PLURALS.values(), *ADJECTIVES, *verbs, *PLACES]
    return ["Tell", ".", *NAMES, *(" " + word for word in spaced)]
