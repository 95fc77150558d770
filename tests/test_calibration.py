"""ECE is computed by hand, label words are scored token by token, and files are read as they are published."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import random_gpt, refused

import data
from measure import calibration
from measure.calibration import bin_of, ece, label_probabilities, measure, read_task, reliability
from model import GPTConfig, new, save

# ---- the metrics ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("confidence, correct, want", [
    ([0.75] * 4, [1, 1, 1, 0], 0.0),  # right three times of four
    ([0.55] * 20, [1] * 11 + [0] * 9, 0.0),
    ([1.0, 1.0], [0, 0], 1.0),  # sure, and never right
    ([0.95] * 4, [1, 1, 0, 0], 0.45),  # over-confident
    ([0.6] * 2, [1, 1], 0.4),  # under-confident
    ([0.7], [1], 0.3),  # a single example
    ([0.95, 0.95, 0.95, 0.55], [1, 1, 1, 0], (3 * 0.05 + 0.55) / 4),  # bins weigh by their examples
    ([0.62, 0.68], [1, 0], 0.15),  # one bin: |0.5 - 0.65|
    ([0.62, 0.72], [1, 0], (0.38 + 0.72) / 2),  # two bins: errors of either sign add
])
def test_ece_by_hand(confidence, correct, want):
    assert ece(np.array(confidence), np.array(correct)) == pytest.approx(want)


def test_a_confidence_on_an_edge_belongs_below_it():
    """Bins are (low, high] as in Guo et al., for any number of bins, although 0.07 * 100 is more than 7."""
    assert bin_of(np.array([0.0, 0.1, 0.1001, 0.5, 0.7, 0.9, 1.0]), 10).tolist() == [0, 0, 1, 4, 6, 8, 9]
    for bins in (1, 2, 3, 7, 10, 100, 1000):
        assert bin_of(np.array([(b + 1) / bins for b in range(bins)]), bins).tolist() == list(range(bins))
    confidence, correct = np.array([0.7, 0.71]), np.array([1, 0])
    assert ece(confidence, correct, 10) == pytest.approx((0.3 + 0.71) / 2)
    assert ece(confidence, correct, 1) == pytest.approx(abs(1 - 1.41) / 2)


def test_the_diagram_has_every_bin_and_gives_the_ece():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, 500)
    correct = (generator.random(500) < confidence**2).astype(float)
    for bins in (1, 4, 10, 15):
        diagram = reliability(confidence, correct, bins)
        assert [b["low"] for b in diagram[1:]] == [b["high"] for b in diagram[:-1]] and len(diagram) == bins
        assert sum(b["count"] for b in diagram) == 500
        full = [b for b in diagram if b["count"]]
        assert all(b["low"] < b["confidence"] <= b["high"] for b in full)
        by_hand = sum(b["count"] / 500 * abs(b["accuracy"] - b["confidence"]) for b in full)
        assert ece(confidence, correct, bins) == pytest.approx(by_hand)
    assert all(b["count"] == 0 and b["accuracy"] is None and b["confidence"] is None
               for b in reliability(confidence, correct, 10)[:5])


def test_accuracy_majority_and_intervals():
    """A model that is 0.9 sure is right in 70 of 100. Accuracy has the interval of a mean, and the ECE its mirror."""
    labels = np.array([1] * 60 + [0] * 40)
    says = np.array([1] * 50 + [0] * 10 + [1] * 20 + [0] * 20)
    probabilities = np.where(says[:, None] == [0, 1], 0.9, 0.1)
    r = measure(probabilities, labels)
    assert (r["examples"], r["accuracy"], r["majority"]) == (100, 70, 60)
    assert r["confidence"] == pytest.approx(0.9) and r["ece"] == pytest.approx(0.2)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert r["accuracy_interval"] == pytest.approx([70 - 100 * half, 70 + 100 * half], abs=1.5)
    assert r["ece_interval"] == pytest.approx([0.2 - half, 0.2 + half], abs=0.02)
    assert measure(probabilities, labels) == r
    assert measure(np.array([[0.2, 0.3, 0.5]]), np.array([2]))["accuracy_interval"] == [100, 100]  # of one example


def test_the_interval_of_a_calibrated_model_reaches_to_zero():
    """Quantiles of resampled ECEs do not: they all lie above the sample's own ECE, which is too large already."""
    generator = np.random.default_rng(0)
    p = generator.uniform(0.5, 1, 1000)
    low, high = measure(np.stack([1 - p, p], 1), (generator.random(1000) < p).astype(int))["ece_interval"]
    assert low == 0 and high < 0.05


# ---- probabilities of labels ----------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2], [3, 3], [2, 2]]


@pytest.mark.parametrize("labels", [[[4], [7]], [[4, 5], [7]], [[4, 5], [4, 6, 1], [4]]])
def test_a_label_is_the_product_of_its_tokens(m, labels):
    """A loop that feeds one token after the other finds the same, whether the labels have one length or several."""
    gpt, want = random_gpt(), []
    for prompt in PROMPTS:
        products = []
        for label in labels:
            p = 1.0
            for t, token in enumerate(label):
                with torch.no_grad():
                    p *= gpt.logits(gpt(torch.tensor([prompt + label[:t]])))[0, -1].softmax(-1)[token].item()
            products.append(p)
        want.append([p / sum(products) for p in products])
    for sample_batch, positions in ((1, 512), (2, 512), (5, 512), (5, 2), (5, 1)):
        few = dataclasses.replace(m, sample_batch=sample_batch, logits=11 * positions)
        np.testing.assert_allclose(label_probabilities(gpt, PROMPTS, labels, few), want, rtol=1e-4)


def test_several_processes_score_each_prompt_once(m, monkeypatch):
    gpt, labels, parts = random_gpt(), [[4, 5], [7]], []
    whole = label_probabilities(gpt, PROMPTS, labels, m)
    monkeypatch.setattr(type(m), "gather", lambda self, items: parts.append(items) or items)
    for rank in range(3):
        label_probabilities(gpt, PROMPTS, labels, dataclasses.replace(m, rank=rank, world=3))
    rows = sorted(row for part in parts for row in part)
    assert [i for i, _ in rows] == list(range(5)) and [len(part) for part in parts] == [2, 2, 1]
    np.testing.assert_allclose([p for _, p in rows], whole, rtol=1e-5)


def test_probabilities_that_are_not_numbers_are_told(m):
    broken = random_gpt()
    broken.ln_f.weight.data[0] = float("nan")
    refused(lambda: label_probabilities(broken, PROMPTS, [[4], [7]], m), "not numbers", "--dtype")


# ---- files ----------------------------------------------------------------------------------------------------------

BOOLQ = {"question": "is it raining", "passage": "It rains.", "label": True}


def test_both_forms_of_boolq_are_read(tmp_path):
    rows = [BOOLQ | {"idx": 0}, {"question": "is it dry?", "title": "Rain", "answer": False, "passage": "It rains. "},
            BOOLQ | {"label": 0}]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, rows)).encode())
    task, read = read_task(tmp_path / "a.jsonl")
    assert task == "boolq" and [(number, label) for number, _, label in read] == [(1, 1), (3, 0), (5, 0)]
    assert [row.input for _, row, _ in read[:2]] == ["It rains.\n\nQuestion: is it raining?",
                                                     "It rains.\n\nQuestion: is it dry?"]
    for word in calibration.TASKS["boolq"][1]:
        assert word in read[0][1].prompt_text


def test_the_tsv_of_sst2_is_raw(tmp_path):
    """GLUE quotes nothing: a lone quotation mark must not swallow the lines up to the next."""
    (tmp_path / "dev.tsv").write_bytes('sentence\tlabel\r\n"a fine film \t1\r\nno \\ "plot"é\t0\r\n'.encode())
    task, read = read_task(tmp_path / "dev.tsv")
    assert task == "sst2"
    assert [(number, row.input, label) for number, row, label in read] == [
        (2, '"a fine film', 1), (3, 'no \\ "plot"é', 0)]


@pytest.mark.parametrize("content, words", [
    ("", [":1: this is neither"]), ("[1]", [":1: this is neither"]),
    ("index\tsentence\n0\tgood\n", [":1: this is neither", "sentence TAB label"]),
    ("sentence\tlabel\n", ["holds no rows"]), ("sentence\tlabel\ngood\t1\nbad\n", [":3: ", "a tab", "'bad'"]),
    ("sentence\tlabel\ngood\t2\n", [":2: ", r"'good\t2'"]), ("sentence\tlabel\nso\tgood\t1\n", [":2: "]),
    ("sentence\tlabel\n \t1\n", [":2: "]), (b"sentence\tlabel\n\xff\t1\n", [":2: 'utf-8' codec"]),
    (b'{"question": "\xff"}\n', [":1: not UTF-8"]), ('{"question": "a", \n', [":1: not JSON", "cut off"]),
    (json.dumps(BOOLQ) + "\n[1]\n", [":2: one JSON object a line"]), ('{"a":' * 10**5, [":1: ", "nested too deeply"]),
    ("{}\n", [':1: "passage" and "question" must be texts']),
    *((json.dumps(BOOLQ | wrong), [':1: "passage" and']) for wrong in ({"question": " "}, {"passage": None})),
    *((json.dumps(BOOLQ | {"label": wrong}), [':1: "label" or "answer" must be true or false'])
      for wrong in (2, "true", 1.0, None, [])),
    (json.dumps({"question": "a", "passage": "b", "idx": 1}), [':1: "label" or "answer" must be']),
    (json.dumps({"question": "a", "passage": "b", "answer": None}), [':1: "label" or "answer" must be']),
    (json.dumps(BOOLQ | {"question": "\ud800"}), [":1: 'utf-8' codec", "surrogates not allowed"]),
])
def test_a_bad_file_is_told_in_one_line(tmp_path, content, words):
    path = tmp_path / "rows"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: read_task(path), str(path), *words)


# ---- command --------------------------------------------------------------------------------------------------------

@pytest.fixture
def settings(gpt2, tmp_path) -> dict:
    """Flags for ten questions, of which one is too long, five sentences, and a small model with GPT-2's vocabulary."""
    questions = [BOOLQ | {"label": i % 2 == 0} for i in range(9)] + [BOOLQ | {"passage": "It rains. " * 400}]
    (tmp_path / "boolq.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + "\n".join(f"film {i}\t{i % 2}" for i in range(5)))
    save(new(GPTConfig(1, 1, 8, gpt2.n_vocab, eos_token_id=gpt2.eot_token), seed=0), tmp_path / "model")
    return dict(model=str(tmp_path / "model"), data=f"{tmp_path / 'boolq.jsonl'},{tmp_path / 'dev.tsv'}",
                dtype="float32", device="cpu", out=str(tmp_path / "out"))


def test_the_command_measures_what_the_model_says(settings, monkeypatch, tmp_path):
    """A model that always answers Yes and is 0.8 sure is right in 5 of 9, so its ECE is 0.8 - 5/9."""
    seen = []

    def always_the_second(model, prompts, labels, *more):
        seen.append((prompts, labels))
        return np.array([[0.2, 0.8]] * len(prompts))

    monkeypatch.setattr(calibration, "label_probabilities", always_the_second)
    results = calibration.main(calibration.Config(**settings))
    boolq, sst2 = results["tasks"]["boolq"], results["tasks"]["sst2"]
    assert (boolq["examples"], boolq["dropped"], boolq["labels"]) == (9, 1, ["No", "Yes"])
    assert boolq["accuracy"] == boolq["majority"] == pytest.approx(500 / 9)
    assert boolq["ece"] == pytest.approx(0.8 - 5 / 9) and boolq["confidence"] == pytest.approx(0.8)
    assert [b["count"] for b in boolq["bins"]] == [0, 0, 0, 0, 0, 0, 0, 9, 0, 0]
    assert (sst2["examples"], sst2["accuracy"], sst2["majority"]) == (5, 40, 60)
    decode = lambda tokens: data.decode(data.gpt2_tokenizer(), tokens)
    (prompts, labels), (_, sentiments) = seen
    assert decode(prompts[0]).endswith("It rains.\n\nQuestion: is it raining?\n\n### Response:\n")
    assert [decode(word) for word in labels + sentiments] == ["No", "Yes", "Negative", "Positive"]


def test_results_can_be_made_again_from_the_lines_and_are_kept(settings, tmp_path, capsys):
    cfg = calibration.Config(**settings)
    results, printed = calibration.main(cfg), capsys.readouterr().out
    assert "data boolq: 9 rows; dropped 1 that are too long for 1,024 positions" in printed and "on sst2, 5" in printed
    assert json.loads((tmp_path / "out" / "calibration.json").read_text()) == results
    lines = [json.loads(line) for line in (tmp_path / "out" / "calibration.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [*range(1, 10), *range(2, 7)]
    for task, of in results["tasks"].items():
        of_task = [line for line in lines if line["task"] == task]
        probabilities = np.array([list(line["probabilities"].values()) for line in of_task])
        np.testing.assert_allclose(probabilities.sum(1), 1)
        again = measure(probabilities, np.array([of["labels"].index(line["label"]) for line in of_task]))
        assert again == {name: of[name] for name in again}
    assert calibration.main(dataclasses.replace(cfg, sample_batch=2)) == results
    assert "made earlier, kept" in capsys.readouterr().out
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + "good\t1\n" * 4)  # other rows under the same name
    refused(lambda: calibration.main(cfg), "calibration.json holds results of other settings or of other files")
    few = calibration.main(dataclasses.replace(cfg, limit=3, out=None))
    assert [of["examples"] for of in few["tasks"].values()] == [3, 3]


def test_commands_that_cannot_work(settings, tiny_models, tmp_path):
    with_ = lambda **other: calibration.main(calibration.Config(**settings | other))
    files = settings["data"].split(",")
    refused(lambda: with_(data=None), "give --data", "BoolQ's .jsonl", "SST-2's dev.tsv")
    refused(lambda: with_(data=files[0] + ","), "give --data", "both with one comma")
    refused(lambda: with_(data=f"{files[0]},{files[0]}"), "two files of boolq")
    refused(lambda: with_(data=str(tmp_path / "none.jsonl")), "none.jsonl: No such file")
    refused(lambda: with_(bins=0), "--bins=0 is out of range")
    refused(lambda: with_(out=files[0]), "is a file", "--out=")
    refused(lambda: with_(model=tiny_models["student"]), "a model of the built-in world does not know")
    (tmp_path / "long.jsonl").write_text(json.dumps(BOOLQ | {"passage": "It rains. " * 400}))
    refused(lambda: with_(data=str(tmp_path / "long.jsonl")), "no row of boolq fits", "1024 positions")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "calibration.json").write_text('{"best": null}')
    refused(with_, "calibration.json holds results of other settings")
