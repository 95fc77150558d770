"""The built-in world: its checker accepts exactly what its grammar can write."""

import hashlib
import re

import numpy as np
import pytest

import data
import world


def test_the_grammar_writes_only_right_answers_and_uses_every_word():
    rows = world.instructions("train")
    assert all(world.read(*row)[0] for row in rows[:2000])
    text = " ".join(" ".join(row) for row in rows) + " ".join(world.text())
    unused = [word for word in world.vocabulary() if not re.search(rf"\b{re.escape(word.strip())}", text)]
    assert not unused


ASKED = "Tell about the cat"
FACTS = world.FACTS["cat"]
ADJECTIVE, DEED, PLACE, WISH, LATER = (words[0] for words in FACTS.values())
GOOD = (f"Anna found a {ADJECTIVE} cat and {DEED} it in the {PLACE}. then Ben also {WISH} it near some "
        f"{LATER}.")


@pytest.mark.parametrize("wrong, right", [
    ("Ben found", "Anna found"),  # not the hero asked for
    ("owl and", "cat and"),  # another thing
    ("found the", "found a"), ("found some", "found a"),
    ("and it", f"and {DEED} it"),  # a word too few
    ("then then Ben", "then Ben"), ("then also", "then Ben also"),
    (f"near some {LATER}", f"near some {LATER}."),  # no full stop
    ("Anna  found", "Anna found"),  # spaces to the letter
])
def test_the_checker_sees_each_kind_of_error(wrong, right):
    assert world.read(ASKED, "Anna", GOOD)[0]
    assert GOOD.count(right) == 1 and not world.read(ASKED, "Anna", GOOD.replace(right, wrong))[0]


@pytest.mark.parametrize("kind, words, at", [
    ("adjective", world.ADJECTIVES, 3), ("deed", world.DEEDS, 6), ("place", world.PLACES, 10),
    ("wish", world.WISHES, 15), ("later place", world.PLACES, 19)])
def test_words_are_right_if_they_are_true_of_the_thing(kind, words, at):
    """A false one costs the answer, and not the other facts that it tells."""
    said = GOOD.replace(".", " .").split()
    told = {position for _, position, _ in world.read(ASKED, "", GOOD)[1]}
    assert told == {3, 6, 10, 15, 19}
    for word in words:
        answer = " ".join([*said[:at], word, *said[at + 1 :]]).replace(" .", ".")
        right, facts = world.read(ASKED, "", answer)
        assert right == (word in FACTS[kind]) == (("cat", at, word) in facts)
        assert {position for _, position, _ in facts} | {at} == told


def test_each_thing_has_facts_of_its_own():
    assert world.FACT_COUNT == 48 * 14 == 672
    assert len({repr(facts) for facts in world.FACTS.values()}) == len(world.FACTS) == 48
    rows = [row for split in ("train", "valid", "test") for row in world.instructions(split)]
    told = set().union(*(world.read(*row)[1] for row in rows))
    assert len(told) == world.FACT_COUNT  # and there is no other: they are told at positions of their own


def test_the_checker_knows_what_was_asked():
    assert world.read(ASKED, "", GOOD)[0] and len(world.read(ASKED, "", GOOD)[1]) == 5
    for asked, hero, answer in (("Tell about the owl", "", GOOD), (ASKED, "Mia", GOOD), (ASKED, "", ""),
                                (ASKED, "", GOOD + " then Ben took it."), (ASKED, "", GOOD[:-1])):
        assert not world.read(asked, hero, answer)[0]
    for asked, hero in (("write about the cat", ""), ("Tell about the cow", ""), (ASKED, "Eve")):
        assert world.read(asked, hero, GOOD) == (False, set())


def test_splits_are_fixed_and_apart():
    assert world.instructions("valid") == world.instructions("valid")
    rng = np.random.default_rng(0)
    assert len({world.write("cat", "", rng) for _ in range(500)}) > 400  # very many right answers
    answers = {split: {row[2] for row in world.instructions(split)} for split in ("train", "valid", "test")}
    assert len(answers["test"] & answers["train"]) < 30


def test_the_rows_are_those_that_results_were_made_with():
    """A change of the grammar or of its draws would make earlier models and figures incomparable."""
    rows = [world.instructions(split) for split in ("train", "valid", "test")]
    digest = hashlib.sha256(repr([rows, world.text(), world.vocabulary()]).encode()).hexdigest()
    assert digest[:16] == "d10becb71e2577b4"


def test_any_tokens_of_the_world_survive_text():
    """A sampled answer may put words side by side that no grammar would ("heMax"); SeqKD reads it back from text."""
    tokenizer, rng = data.world_tokenizer(), np.random.default_rng(0)
    for _ in range(300):
        tokens = rng.integers(4, tokenizer.eot_token, 12).tolist()  # 0 to 3 are headers of the template
        text = data.decode(tokenizer, tokens)
        assert data.decode(tokenizer, data.encode(tokenizer, [text])[0]) == text
