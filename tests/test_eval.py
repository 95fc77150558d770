"""The metrics: Rouge-L as the paper's scorer gives it, KLs exact at each position, loss over the right tokens."""

import dataclasses
import json
import math
import multiprocessing
import os
import shutil

import pytest
import torch
from conftest import change_weights, random_gpt, refused

import data
import eval as evaluation
import world
from data import Example, Row
from eval import evaluate, exact_match, held_out_loss, rouge_l
from model import load, save
from sample import follow, sample, uniforms


def test_rouge_l_by_hand():
    """The longest common subsequence of stemmed words: these two share "cat on mat"."""
    assert rouge_l("the cat sits on mats", ["cats sat on the mat"]) == pytest.approx(100 * 3 / 5)
    assert rouge_l("the cat", ["dog", "the cat sat"]) == pytest.approx(100 * 2 * (2 / 2) * (2 / 3) / (1 + 2 / 3))
    assert rouge_l("The, CAT!", ["the cat"]) == pytest.approx(100) and rouge_l("", ["a"]) == 0


def test_exact_match_ignores_case_punctuation_and_space():
    assert exact_match(" The  cat. ", ["dog", "the cat"]) == 100 and exact_match("cats", ["cat"]) == 0


def test_held_out_loss_counts_response_tokens_and_nothing_else(m):
    """Against a loop over single tokens; unequal lengths, so that a mean of means would differ."""
    gpt = random_gpt()
    examples = [Example(Row("a"), [1, 2, 3], [4, 5, 6, 10]), Example(Row("b"), [7], [8, 10]),
                Example(Row("c"), [9, 9], [10])]
    total, count = 0.0, 0
    for e in examples:
        for t, token in enumerate(e.response):
            with torch.no_grad():
                logits = gpt.logits(gpt(torch.tensor([e.prompt + e.response[:t]])))[0, -1]
            total, count = total - logits.log_softmax(-1)[token].item(), count + 1
    for batch_size in (1, 2, 3):
        assert held_out_loss(gpt, examples, m, batch_size) == pytest.approx(total / count, abs=1e-5)


def test_the_kls_are_what_enumeration_says(m):
    """reverse_kl summed along answers of q estimates KL[q || p] over answers, exactly so in expectation."""
    q, p = random_gpt(1, vocab_size=4, eos_token_id=3), random_gpt(2, vocab_size=4, eos_token_id=3)
    prompt, exact = [1, 2], {"reverse": 0.0, "forward": 0.0}
    answers = [[3]] + [[a, b] for a in range(3) for b in range(4)]
    for answer in answers:
        with torch.no_grad():
            log_q, log_p = (g.logits(g(torch.tensor([prompt + answer])))[0, 1:-1].log_softmax(-1)[
                range(len(answer)), answer].sum().item() for g in (q, p))
        exact["reverse"] += math.exp(log_q) * (log_q - log_p)
        exact["forward"] += math.exp(log_p) * (log_p - log_q)
    n = 20_000
    uniform = uniforms(0, range(n), 2)
    drawn = lambda model: sample(model, [prompt] * n, uniform, m, batch_size=n).answers
    reverse = follow(q, [prompt] * n, drawn(q), 2, m, p, n).reverse_kl.sum(1)
    forward = follow(p, [prompt] * n, drawn(p), 2, m, q, n).reverse_kl.sum(1)
    for got, want in ((reverse, exact["reverse"]), (forward, exact["forward"])):
        assert abs(got.mean().item() - want) < 4 * got.std().item() / n**0.5


def test_evaluate_scores_every_prompt_and_seed(tiny_models, m):
    student, teacher = (load(tiny_models[name]) for name in ("student", "teacher"))
    tokenizer = data.world_tokenizer()
    examples = data.load_examples("tiny", "test", tokenizer, 64, 64, lambda *words: None)[:12]
    means, answers = evaluate(student, tokenizer, examples, m, teacher, (10, 20), 16, forward=True)
    assert len(answers) == 24 and [a["prompt"] for a in answers[:12]] == list(range(12))
    assert set(means) == {"rouge_l", "exact_match", "tokens", "ended", "valid", "reverse_kl", "forward_kl", "distinct",
                          "dist_4", "dist_4_prompt"}
    assert all(len(values) == 2 for name, values in means.items() if name not in ("distinct", "dist_4_prompt"))
    assert means["tokens"][0] != means["tokens"][1]  # seeds differ
    again, _ = evaluate(student, tokenizer, examples, m, teacher, (10, 20), 16, batch_size=5, forward=True)
    assert all(again[name] == pytest.approx(means[name], abs=1e-4) for name in means)
    swapped, _ = evaluate(teacher, tokenizer, examples, m, student, (10, 20), 16, forward=True)
    assert means["forward_kl"] == pytest.approx(swapped["reverse_kl"], rel=1e-5)  # along the teacher's answers
    assert means["reverse_kl"] == pytest.approx(swapped["forward_kl"], rel=1e-5)
    itself, _ = evaluate(student, tokenizer, examples, m, student, (10,), 16)
    assert itself["reverse_kl"] == [0.0]


def test_dist_n_by_hand():
    """The 2-grams of "a b a b c" are ab, ba, ab, bc, three of four different; a second text with bc makes it 3 of 5."""
    assert evaluation.dist_n(["a b a b c"], 2) == 75.0 and evaluation.dist_n(["a b a b c", "b  c"], 2) == 60.0
    assert evaluation.dist_n(["a b c d", "a b c d e"]) == pytest.approx(200 / 3) and evaluation.dist_n(["a b c"]) == 0.0


def test_diversity_is_of_a_seed_and_of_a_prompt(tiny_models, m, monkeypatch):
    """Two prompts, two seeds: each seed says the same to both prompts, the first seed twice the same four words."""
    tokenizer = data.world_tokenizer()
    examples = data.load_examples("tiny", "test", tokenizer, 64, 64, lambda *words: None)[:2]
    texts = iter(["Anna saw the cat and the cat"] * 2 + ["Anna found an owl"] * 2)
    monkeypatch.setattr(data, "decode", lambda tokenizer, tokens: next(texts))
    means, answers = evaluate(load(tiny_models["student"]), tokenizer, examples, m, None, (10, 20), 16)
    assert means["dist_4"] == [50.0, 50.0] and means["dist_4_prompt"] == [100.0]
    assert answers[0]["references"] == examples[0].row.outputs


def test_many_answers_are_scored_by_several_processes(monkeypatch):
    pairs = [("the cat" + " sat" * n, ("the cat", f"a dog {n}")) for n in range(40)]
    alone = evaluation.score_all(pairs)
    monkeypatch.setattr(evaluation, "MANY", 10)
    fork, asked = multiprocessing.get_context("fork"), []  # which has imported everything
    monkeypatch.setattr(evaluation.multiprocessing, "get_context", lambda kind: asked.append(kind) or fork)
    assert evaluation.score_all(pairs) == alone and len({s["rouge_l"] for s in alone}) == 40 and asked == ["spawn"]


def test_results_do_not_outlive_their_answers(m, tmp_path, monkeypatch):
    """Were the disk full once the new answers are written, the old results beside them would be of others."""
    path = tmp_path / "results.json"
    evaluation.keep({"of": "old"}, path, m, "samples.jsonl", [{"answer": "old"}])
    monkeypatch.setattr(evaluation, "write_json", lambda path, value: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        evaluation.keep({"of": "new"}, path, m, "samples.jsonl", [{"answer": "new"}])
    assert "new" in (tmp_path / "samples.jsonl").read_text() and not path.exists()


def test_right_answers_are_counted_only_if_they_end(tiny_models, m, monkeypatch):
    tokenizer = data.world_tokenizer()
    examples = data.load_examples("tiny", "test", tokenizer, 64, 64, lambda *words: None)[:4]
    student = load(tiny_models["student"])

    def gold(model, prompts, uniform, *more, **settings):
        rollout = sample(model, prompts, uniform, *more, **settings)
        rollout.answers = [e.response for e in examples]
        rollout.ended = torch.tensor([True, True, True, False])
        return rollout

    monkeypatch.setattr(evaluation, "sample", gold)
    means, _ = evaluate(student, tokenizer, examples, m, max_response_tokens=16)
    assert means["valid"] == [75.0] and means["rouge_l"] == [100.0] and means["exact_match"] == [100.0]
    assert means["distinct"] == [100.0]


def test_the_interval_is_that_of_a_mean():
    """Of 0 and 100 in equal parts: 50, give or take 1.96 standard errors."""
    low, high = evaluation.interval([0.0, 100.0] * 200)
    assert (low, high) == pytest.approx((50 - 1.96 * 2.5, 50 + 1.96 * 2.5), abs=0.6)
    assert evaluation.interval([3.0] * 7) == (3.0, 3.0)


def test_groups_by_length_of_the_reference():
    groups = evaluation.by_length([1.0, 2.0, 3.0, 5.0, 10.0], [0, 5, 6, 10, 11])
    assert groups == {"[0,5]": {"prompts": 2, "mean": 1.5}, "[6,10]": {"prompts": 2, "mean": 4.0},
                      "[11,inf)": {"prompts": 1, "mean": 10.0}}
    assert evaluation.by_length([4.0], [300]) == {"[11,inf)": {"prompts": 1, "mean": 4.0}}


def test_several_sets_in_one_command(tiny_models, tmp_path):
    rows = [json.dumps({"instruction": "Tell about the cat", "output": "Anna found the cat"})] * 3
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    cfg = evaluation.Config(model=tiny_models["student"], data=f"tiny,{tmp_path / 'mine.jsonl'}", limit=3, seeds=2,
                            max_response_tokens=8, out=str(tmp_path / "out"), dtype="float32", device="cpu")
    both = evaluation.main(cfg)
    assert list(both) == cfg.data.split(",")
    for results, folder in zip(both.values(), ("tiny", "mine")):
        assert json.loads((tmp_path / "out" / folder / "results.json").read_text()) == results
        low, high = results["rouge_l_interval"]
        of_seeds = results["scores"]["rouge_l"]
        assert low <= sum(of_seeds) / len(of_seeds) <= high
        groups = results["rouge_l_by_length"].values()
        assert sum(group["prompts"] for group in groups) == 3
        mean = sum(group["prompts"] * group["mean"] for group in groups) / 3
        assert mean == pytest.approx(sum(of_seeds) / len(of_seeds))
    missing = dataclasses.replace(cfg, data="tiny,nope", out=str(tmp_path / "none"))
    refused(lambda: evaluation.main(missing), "nope is no instruction set")
    assert not (tmp_path / "none").exists()


def test_the_command_writes_its_results_and_keeps_them(tiny_models, tmp_path, capsys):
    cfg = evaluation.Config(model=tiny_models["student"], teacher=tiny_models["teacher"], limit=5, seeds=2,
                            max_response_tokens=8, out=str(tmp_path), dtype="float32", device="cpu")
    results = evaluation.main(cfg)
    printed = capsys.readouterr().out
    assert "on tiny, 5 prompts" in printed and "rouge_l" in printed and "±" in printed and "forward_kl" in printed
    assert json.loads((tmp_path / "results.json").read_text()) == results
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and {line["seed"] for line in lines} == {10, 20}
    assert evaluation.main(cfg) == results and "made earlier" in capsys.readouterr().out


def test_results_of_another_model_are_not_overwritten(tiny_models, tmp_path, monkeypatch):
    settings = dict(limit=1, seeds=1, max_response_tokens=2, out=str(tmp_path / "out"), device="cpu")
    results = evaluation.main(evaluation.Config(model=tiny_models["student"], **settings))
    monkeypatch.setattr(data, "load_rows", lambda name, split, load=data.load_rows: load("tiny", split))
    for other in (dict(model=tiny_models["teacher"]), dict(model=tiny_models["student"], data="mine.jsonl")):
        refused(lambda other=other: evaluation.main(evaluation.Config(**other, **settings)), "holds results of --",
                "a folder of its own")
    same = evaluation.Config(model=tiny_models["student"] + "/", data="tiny", **settings | dict(seeds=2))
    assert len(evaluation.main(same)["seeds"]) == 2 and len(results["seeds"]) == 1
    other = evaluation.Config(model=tiny_models["student"], data="mine.jsonl", **settings)
    assert evaluation.main(other, own=True)["data"] == "mine.jsonl"  # distill.py --test_data=ANOTHER


def test_results_are_kept_for_the_file_that_they_were_made_with(tiny_models, tmp_path, capsys):
    rows, row = tmp_path / "mine.jsonl", {"instruction": "Tell about the cat", "output": "Anna saw a cat."}
    rows.write_text(json.dumps(row) + "\n")
    cfg = evaluation.Config(model=tiny_models["student"], data=str(rows), seeds=1, max_response_tokens=4,
                            out=str(tmp_path / "out"), dtype="float32", device="cpu")
    for changed, kept in ((False, False), (False, True), (True, False)):
        if changed:
            rows.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
        assert evaluation.main(cfg)["prompts"] == 1 + changed
        assert ("made earlier" in capsys.readouterr().out) == kept


def test_results_are_kept_for_the_weights_and_the_text_that_they_were_made_with(tiny_models, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(world.text()[:100]))
    shutil.copytree(tiny_models["student"], tmp_path / "model")
    cfg = evaluation.Config(model=str(tmp_path / "model"), data="tiny", seeds=1, limit=2, max_response_tokens=4,
                            corpus=str(tmp_path / "text.txt"), out=str(tmp_path / "out"), dtype="float32", device="cpu")
    evaluation.main(cfg)
    days = iter(range(9))
    moved = lambda: os.utime(tmp_path / "model" / "model.safetensors", (next(days),) * 2)  # to another machine, say
    more = lambda: (tmp_path / "text.txt").write_text("".join(world.text()[100:200]))
    for change, kept in ((moved, True), (lambda: change_weights(cfg.model), False), (more, False), (moved, True)):
        change()
        capsys.readouterr()
        evaluation.main(cfg)
        assert ("made earlier" in capsys.readouterr().out) == kept


def test_the_loss_on_plain_text_is_of_that_text(tiny_models, tmp_path, m):
    (tmp_path / "text.txt").write_text("".join(world.text()[:100]))
    cfg = evaluation.Config(model=tiny_models["student"], data="tiny", seeds=1, limit=2, max_response_tokens=4,
                            corpus=str(tmp_path / "text.txt"), out=str(tmp_path / "out"), dtype="float32", device="cpu")
    (loss,) = evaluation.main(cfg)["scores"]["text_loss"]
    model, tokenizer = load(tiny_models["student"]), data.load_tokenizer(tiny_models["student"])
    pieces = data.Pieces(data.load_corpus(cfg.corpus, tokenizer, tmp_path / "corpus", m), model.config.n_positions)
    tokens = torch.tensor([piece.prompt + piece.response for piece in pieces])
    with torch.no_grad():
        logits = model.logits(model(tokens[:, :-1]))
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss == pytest.approx(want.item())


def test_the_length_group_goes_by_the_first_reference(tiny_models, tmp_path):
    outputs = ["Anna saw a cat.", "Anna saw a red cat and she fed it in the garden."]
    row = {"instruction": "Tell about the cat", "output": outputs}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    cfg = evaluation.Config(model=tiny_models["student"], data=str(tmp_path / "mine.jsonl"), seeds=1, device="cpu",
                            max_response_tokens=4)
    assert list(evaluation.main(cfg)["rouge_l_by_length"]) == ["[0,5]"]


def test_results_of_more_are_not_lost_to_a_try(tiny_models, tmp_path):
    cfg = evaluation.Config(model=tiny_models["student"], data="tiny", seeds=2, limit=3, max_response_tokens=2,
                            out=str(tmp_path), device="cpu")
    evaluation.main(cfg)
    for name, fewer in (("limit", 2), ("seeds", 1)):
        try_it = dataclasses.replace(cfg, **{name: fewer})
        refused(lambda cfg=try_it: evaluation.main(cfg), f"holds results made with --{name}=", "some would be lost")
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 6
    assert evaluation.main(dataclasses.replace(cfg, limit=None, max_response_tokens=1))["prompts"] == 300


def test_commands_that_cannot_work(tiny_models, tmp_path):
    refused(lambda: evaluation.main(evaluation.Config(model="out/nowhere/x/y")), "out/nowhere/x/y")
    refused(lambda: evaluation.main(evaluation.Config(model=tiny_models["student"], data="nope")),
            "nope is no instruction set")
    save(random_gpt(vocab_size=77), tmp_path / "other")
    settings = dict(model=tiny_models["student"], teacher=str(tmp_path / "other"))
    refused(lambda: evaluation.main(evaluation.Config(**settings)), "the teacher has 77 tokens")
    (tmp_path / "results.json").write_text('{"best": null}')
    settings = dict(model=tiny_models["student"], out=str(tmp_path))
    refused(lambda: evaluation.main(evaluation.Config(**settings)), f"--out={tmp_path}", "something else")
    assert (tmp_path / "results.json").read_text() == '{"best": null}'


def test_a_teacher_of_fewer_positions_sets_the_room_for_answers(tiny_models, tmp_path):
    save(random_gpt(vocab_size=90, n_positions=30, eos_token_id=89), tmp_path / "short")
    cfg = evaluation.Config(model=tiny_models["student"], teacher=str(tmp_path / "short"), limit=2, seeds=1,
                            dtype="float32", device="cpu")
    scores = evaluation.main(cfg)["scores"]
    assert scores["reverse_kl"][0] > 0 and 10 < scores["tokens"][0] < 30


def test_references_beyond_the_models_positions_are_cut(tiny_models, monkeypatch):
    settings = dict(model=tiny_models["student"], limit=2, seeds=1, max_prompt_tokens=60, max_response_tokens=30)
    rows = [data.Row("Tell about the cat", "", (" ".join(["Anna found"] * 60),))]
    monkeypatch.setattr(data, "load_rows", lambda name, split: rows)
    assert evaluation.main(evaluation.Config(**settings))["scores"]["loss"][0] > 0
    refused(lambda: evaluation.Config(seeds=0), "--seeds=0 is out of range")
