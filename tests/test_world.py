"""The built-in world: its checker accepts exactly what its grammar can write."""

import hashlib
import re

import numpy as np
import pytest

import data
import world


def test_the_grammar_writes_only_right_answers_and_uses_every_word():
    rows = world.instructions("train")
    assert all(world.is_valid(*row) for row in rows[:2000])
    text = " ".join(" ".join(row) for row in rows) + " ".join(world.text())
    unused = [word for word in world.vocabulary() if not re.search(rf"\b{re.escape(word.strip())}", text)]
    assert not unused


GOOD = "Anna found two old cats and she fed them in the barn. then Ben took the cats from Anna near the barn."


@pytest.mark.parametrize("wrong, right", [
    ("Ben found", "Anna found"),  # not the hero asked for
    ("two old cat and", "two old cats and"),  # number
    ("a old", "two old"), ("an red", "two old"),  # article
    ("and he fed", "and she fed"),  # pronoun
    ("fed it in", "fed them in"),  # object
    ("feeds them", "fed them"),  # tense of the second verb
    ("ate them", "fed them"),  # deed does not fit the thing
    ("then Mia took", "then Ben took"),  # the other one
    ("Ben takes", "Ben took"),  # tense of the second sentence
    ("from Ella", "from Anna"),  # the hero again
    ("near the street.", "near the barn."),  # the place again
    ("near the barn", "near the barn."),  # no full stop
    ("Anna  found", "Anna found"),  # spaces to the letter
])
def test_the_checker_sees_each_kind_of_error(wrong, right):
    assert world.is_valid("Tell about the cat", "Anna", GOOD)
    assert right in GOOD and not world.is_valid("Tell about the cat", "Anna", GOOD.replace(right, wrong))


def test_the_checker_knows_what_was_asked():
    assert world.is_valid("Tell about the cat", "", GOOD)
    assert not world.is_valid("Tell about the owl", "", GOOD)
    assert not world.is_valid("Tell about the cat", "Mia", GOOD)
    assert not world.is_valid("write about the cat", "", GOOD) and not world.is_valid("Tell about the cat", "", "")
    assert not world.is_valid("Tell about the cat", "", GOOD + " then Ben took it.")


def test_splits_are_fixed_and_apart():
    assert world.instructions("valid") == world.instructions("valid")
    rng = np.random.default_rng(0)
    assert len({world.write("cat", "", rng) for _ in range(500)}) > 490  # very many right answers
    answers = {split: {row[2] for row in world.instructions(split)} for split in ("train", "valid", "test")}
    assert len(answers["test"] & answers["train"]) < 20


def test_the_rows_are_those_that_results_were_made_with():
    """A change of the grammar or of its draws would make earlier models and figures incomparable."""
    rows = [world.instructions(split) for split in ("train", "valid", "test")]
    digest = hashlib.sha256(repr([rows, world.text(), world.vocabulary()]).encode()).hexdigest()
    assert digest[:16] == "2fae43c23a50b57a"


def test_any_tokens_of_the_world_survive_text():
    """A sampled answer may put words side by side that no grammar would ("heMax"); SeqKD reads it back from text."""
    tokenizer, rng = data.world_tokenizer(), np.random.default_rng(0)
    for _ in range(300):
        tokens = rng.integers(4, tokenizer.eot_token, 12).tolist()  # 0 to 3 are headers of the template
        text = data.decode(tokenizer, tokens)
        assert data.decode(tokenizer, data.encode(tokenizer, [text])[0]) == text
