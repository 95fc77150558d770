"""The metrics: Rouge-L as the paper's scorer gives it, KLs exact at each position, loss over the right tokens."""

import dataclasses
import json
import math
import os
import shutil
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import another_vocabulary, change_weights, random_gpt, refused

import data
import eval as evaluation
import world
from data import Example, Row
from eval import evaluate, exact_match, held_out_loss, rouge_l, without_repeats
from model import load, save
from safe import runs
from sample import follow, sample, uniforms


def some_rows(count):
    """Of the built-in world, which the small models can speak of."""
    return data.load_examples("tiny", "test", data.world_tokenizer(), 64, 64, lambda *words: None)[:count]


def test_rouge_l_by_hand():
    """The longest common subsequence of stemmed words: these two share "cat on mat"."""
    assert rouge_l("the cat sits on mats", ["cats sat on the mat"]) == pytest.approx(100 * 3 / 5)
    assert rouge_l("the cat", ["dog", "the cat sat"]) == pytest.approx(100 * 2 * (2 / 2) * (2 / 3) / (1 + 2 / 3))
    assert rouge_l("The, CAT!", ["the cat"]) == pytest.approx(100) and rouge_l("", ["a"]) == 0


def test_exact_match_ignores_case_punctuation_and_space():
    assert exact_match(" The  cat. ", ["dog", "the cat"]) == 100 and exact_match("cats", ["cat"]) == 0
    assert exact_match("", ["!"]) == exact_match("!", [""]) == exact_match("!", ["?"]) == 0
    assert exact_match("", [""]) == exact_match(" ? ", ["?"]) == 100


class Sharing:
    """One of several processes, whose sums are noted."""

    def __init__(self, m, sums):
        self.m, self.sums = m, sums

    def __getattr__(self, name):
        return getattr(self.m, name)

    def sum(self, total):
        self.sums.append(total.clone())


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
    for positions in (1, 8, 100):
        machine = dataclasses.replace(m, logits=11 * positions)
        assert held_out_loss(gpt, examples, machine) == pytest.approx(total / count, abs=1e-5)
    parts = [dataclasses.replace(m, rank=rank, world=3) for rank in range(3)]  # as three processes share it
    sums = []
    for part in parts:
        held_out_loss(gpt, examples, Sharing(part, sums))
    assert sum(sums).tolist() == pytest.approx([total, count], abs=1e-4)


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
    m = dataclasses.replace(m, sample_batch=n, logits=2**25)
    drawn = lambda model: sample(model, [prompt] * n, uniform, m).answers
    reverse = follow(q, [prompt] * n, drawn(q), 2, m, p).reverse_kl.sum(1)
    forward = follow(p, [prompt] * n, drawn(p), 2, m, q).reverse_kl.sum(1)
    for got, want in ((reverse, exact["reverse"]), (forward, exact["forward"])):
        assert abs(got.mean().item() - want) < 4 * got.std().item() / n**0.5


def test_evaluate_scores_every_prompt_and_seed(tiny_models, m):
    student, teacher = (load(tiny_models[name]) for name in ("student", "teacher"))
    examples, tokenizer = some_rows(12), data.world_tokenizer()
    score = lambda model, other, seeds=(10, 20), m=m, forward=True: evaluate(
        model, tokenizer, examples, m, sample, other, seeds, 16, forward)
    means, answers = score(student, teacher)
    assert len(answers) == 24 and [a["prompt"] for a in answers[:12]] == list(range(12))
    assert set(means) == {"rouge_l", "exact_match", "tokens", "ended", "valid", "reverse_kl", "forward_kl", "covered",
                          "dist_4", "dist_4_prompt"}
    assert all(len(values) == 2 for name, values in means.items() if name not in ("covered", "dist_4_prompt"))
    assert means["tokens"][0] != means["tokens"][1]  # seeds differ
    again, _ = score(student, teacher, m=dataclasses.replace(m, sample_batch=5))
    assert all(again[name] == pytest.approx(means[name], abs=1e-4) for name in means)
    swapped, _ = score(teacher, student)
    assert means["forward_kl"] == pytest.approx(swapped["reverse_kl"], rel=1e-5)  # along the teacher's answers
    assert means["reverse_kl"] == pytest.approx(swapped["forward_kl"], rel=1e-5)
    itself, _ = score(student, student, (10,), forward=False)
    assert itself["reverse_kl"] == [0.0] and "forward_kl" not in itself
    alone, _ = score(student, None, (10,))
    assert not {"reverse_kl", "forward_kl", "dist_4_prompt"} & set(alone)


def test_each_process_scores_its_own_answers(tiny_models, m, monkeypatch):
    """What three processes gather is what one has."""
    student, teacher, examples = load(tiny_models["student"]), load(tiny_models["teacher"]), some_rows(7)
    score = lambda m: evaluate(student, data.world_tokenizer(), examples, m, sample, teacher, (10, 20), 16, True)
    alone, gathered = score(m), []
    for rank in range(3):
        part = Sharing(dataclasses.replace(m, rank=rank, world=3), [])
        part.gather = lambda answers: gathered.extend(answers) or answers
        score(part)
    part.gather = lambda answers: gathered
    means, answers = score(part)
    assert [a["answer"] for a in answers] == [a["answer"] for a in alone[1]] and len(gathered) == 14
    assert all(means[name] == pytest.approx(alone[0][name], abs=1e-4) for name in alone[0])


def test_the_length_of_the_first_reference_is_noted(tiny_models, m):
    """In tokens, without its end. Figure 7 groups answers by it."""
    examples = some_rows(3)
    cut = Row("Tell about the cat", "", ("Anna saw a", "Anna saw a red cat and she fed it"), ended=False)
    examples[1] = Example(cut, examples[1].prompt, examples[1].response[:3])
    _, answers = evaluate(load(tiny_models["student"]), data.world_tokenizer(), examples, m, sample, T=4)
    lengths = [len(examples[0].response) - 1, 3, len(examples[2].response) - 1]
    assert [a["reference_tokens"] for a in answers] == lengths


def test_dist_n_by_hand():
    """The 2-grams of "a b a b c" are ab, ba, ab, bc, three of four different; a second text with bc makes it 3 of 5."""
    assert evaluation.dist_n(["a b a b c"], 2) == 75.0 and evaluation.dist_n(["a b a b c", "b  c"], 2) == 60.0
    assert evaluation.dist_n(["a b c d", "a b c d e"]) == pytest.approx(200 / 3) and evaluation.dist_n(["a b c"]) == 0.0
    assert evaluation.dist_n(["\u732b\u5728\u5bb6\u91cc\u7761"]) == 0.0
    assert evaluation.dist_n(["\u732b\u5728\u5bb6\u91cc\u7761"], 4, evaluation.UnicodeWords().tokenize) == 100.0


@pytest.mark.parametrize("reference, english, unicode", [
    ("ab", 100, 100), ("\u0431\u0430", 0, 100), ("a\u0431", 50, 100), ("!", 0, 0), ("\U0001f600", 0, 0)])
def test_what_rouge_l_can_see_of_a_reference(reference, english, unicode):
    examples = [data.Example(data.Row("", "", (reference,)), [1], [2])]
    assert evaluation.letters_seen(examples) == english
    assert evaluation.letters_seen(examples, "unicode") == unicode


def test_diversity_is_of_a_seed_and_of_a_prompt(tiny_models, m, monkeypatch):
    """Two prompts, two seeds: each seed says the same to both prompts, the first seed twice the same four words."""
    examples, tokenizer = some_rows(2), data.world_tokenizer()
    texts = iter(["Anna saw the cat and the cat"] * 2 + ["Anna found an owl"] * 2)
    monkeypatch.setattr(data, "decode", lambda tokenizer, tokens: next(texts))
    means, answers = evaluate(load(tiny_models["student"]), tokenizer, examples, m, sample, None, (10, 20), 16)
    assert means["dist_4"] == [50.0, 50.0] and means["dist_4_prompt"] == [100.0]
    assert answers[0]["references"] == examples[0].row.outputs


def test_results_do_not_outlive_their_answers(m, tmp_path, monkeypatch):
    """Were the disk full once the new answers are written, the old results beside them would be of others."""
    path = tmp_path / "results.json"
    runs.keep({"of": "old"}, path, m, "samples.jsonl", [{"answer": "old"}])
    monkeypatch.setattr(runs, "write_json", lambda path, value: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        runs.keep({"of": "new"}, path, m, "samples.jsonl", [{"answer": "new"}])
    assert "new" in (tmp_path / "samples.jsonl").read_text() and not path.exists()


def test_right_answers_are_counted_only_if_they_end(tiny_models, m):
    examples = some_rows(4)

    def gold(model, prompts, uniform, *more, **settings):
        rollout = sample(model, prompts, uniform, *more, **settings)
        rollout.answers = [e.response for e in examples]
        rollout.ended = torch.tensor([True, True, True, False])
        return rollout

    means, _ = evaluate(load(tiny_models["student"]), data.world_tokenizer(), examples, m, gold, T=28)
    assert means["valid"] == [75.0] and means["rouge_l"] == [100.0] and means["exact_match"] == [100.0]
    facts = set().union(*(world.read(e.row.instruction, e.row.input, e.row.outputs[0])[1] for e in examples))
    assert means["covered"] == [100 * len(facts) / 672] and len(facts) >= 12


# ---- no n-gram twice ------------------------------------------------------------------------------------------------

def test_repeated_ngrams_as_transformers_bans_them():
    processor = pytest.importorskip("transformers").NoRepeatNGramLogitsProcessor
    seen = torch.randint(0, 9, (50, 7), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    logp = torch.randn(50, 9).log_softmax(-1)
    for n in (2, 3, 5):
        want = processor(n)(seen, logp.clone())
        got = without_repeats(n)(logp, list(range(50)), seen)
        assert want.isinf().any() and torch.equal(got.isinf(), want.isinf())
        torch.testing.assert_close(got, want.log_softmax(-1))
    padded = torch.cat([torch.full((50, 3), -1), seen], 1)  # what is padding is no token
    adjust = lambda n, said: without_repeats(n)(logp, list(range(50)), said)
    torch.testing.assert_close(adjust(3, padded), adjust(3, seen))
    assert adjust(3, seen[:, :2]) is logp
    assert not adjust(2, torch.full((50, 4), -1)).isinf().any()


def test_no_ngram_comes_twice(m):
    """Neither from the answer nor from the prompt, whatever the batch, and what is drawn from is what is noted."""
    student, prompts = random_gpt(5), [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1, 2], [3, 3]]
    draw = lambda size, rule: sample(student, prompts, uniforms(0, range(5), 20),
                                     dataclasses.replace(m, sample_batch=size), adjust=rule)
    free, ruled, alone = draw(64, None), draw(64, without_repeats(2)), draw(1, without_repeats(2))
    bigrams = lambda rollout: [list(pairwise(prompt + answer)) for prompt, answer in zip(prompts, rollout.answers)]
    assert any(len(set(pairs)) < len(pairs) for pairs in bigrams(free))
    assert all(len(set(pairs)) == len(pairs) for pairs in bigrams(ruled))
    assert ruled.answers == alone.answers and ruled.answers != free.answers
    gained = ruled.mixed_logp - ruled.student_logp
    assert gained.min() > -1e-5 and gained.max() > 0.01


def test_the_command_says_no_ngram_twice(tiny_models, tmp_path):
    cfg = evaluation.Config(model=tiny_models["student"], limit=20, seeds=1, max_response_tokens=30, dtype="float32",
                            device="cpu", no_repeat_ngram=2, out=str(tmp_path))
    evaluation.main(cfg)
    tokenizer = data.world_tokenizer()
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        (tokens,) = data.encode(tokenizer, [json.loads(line)["answer"]])
        assert len(set(pairwise(tokens))) == len(tokens[1:])


# ---- command --------------------------------------------------------------------------------------------------------

def test_several_sets_in_one_command(tiny_models, tmp_path):
    rows = [json.dumps({"instruction": "Tell about the cat", "output": "Anna found the cat"})] * 3
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    cfg = evaluation.Config(model=tiny_models["student"], data=f"tiny,{tmp_path / 'mine.jsonl'}", limit=3, seeds=2,
                            max_response_tokens=8, out=str(tmp_path / "out"), dtype="float32", device="cpu")
    both = evaluation.main(cfg)
    assert list(both) == cfg.data.split(",")
    for results, folder in zip(both.values(), ("tiny", "mine")):
        assert json.loads((tmp_path / "out" / folder / "results.json").read_text()) == results
        assert results["prompts"] == 3 and len(results["scores"]["rouge_l"]) == 2
    missing = dataclasses.replace(cfg, data="tiny,nope", out=str(tmp_path / "none"))
    refused(lambda: evaluation.main(missing), "nope is not an instruction set")
    assert not (tmp_path / "none").exists()
    twice = dataclasses.replace(cfg, data=f"{cfg.data},{tmp_path / 'out' / 'mine.jsonl'}")
    refused(lambda: evaluation.main(twice), "two sets have one name")
    both = evaluation.main(dataclasses.replace(cfg, corpus="tiny-text", out=None))
    assert ["text_loss" in results["scores"] for results in both.values()] == [True, False]  # it is the same twice


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


def test_results_of_other_settings_are_not_overwritten(tiny_models, tmp_path, monkeypatch):
    """Of another model or set, of fewer prompts or seeds, or of a folder's own run: then distill.py makes them anew."""
    cfg = evaluation.Config(model=tiny_models["student"], limit=3, seeds=2, max_response_tokens=2, device="cpu",
                            out=str(tmp_path / "out"))
    evaluation.main(cfg)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(data, "load_rows", lambda name, split, load=data.load_rows: load("tiny", split))
    for other in (dict(model=tiny_models["teacher"]), dict(data="mine.jsonl"), dict(limit=2), dict(limit=None),
                  dict(seeds=1), dict(seeds=3), dict(max_response_tokens=1), dict(no_repeat_ngram=3)):
        other = dataclasses.replace(cfg, **other)
        refused(lambda other=other: evaluation.main(other), str(tmp_path / "out"), "other settings", "another --out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    for same in (dict(sample_batch=5), dict(device="auto"), dict(decoder="plain")):
        evaluation.main(dataclasses.replace(cfg, **same))  # they change rounding at most
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert evaluation.main(dataclasses.replace(cfg, data="mine.jsonl"), own=True)["data"] == "mine.jsonl"
    assert evaluation.main(dataclasses.replace(cfg, limit=2), own=True)["prompts"] == 2
    (tmp_path / "out" / "results.json").write_text("[]")  # distill.py's table, which is no evaluation
    refused(lambda: evaluation.main(cfg, own=True), str(tmp_path / "out"))


def test_results_are_kept_for_the_file_that_they_were_made_with(tiny_models, tmp_path, capsys):
    rows, row = tmp_path / "mine.jsonl", {"instruction": "Tell about the cat", "output": "Anna saw a cat."}
    rows.write_text(json.dumps(row) + "\n")
    cfg = evaluation.Config(model=tiny_models["student"], data=str(rows), seeds=1, max_response_tokens=4,
                            out=str(tmp_path / "out"), dtype="float32", device="cpu")
    for kept in (False, True):
        assert evaluation.main(cfg)["prompts"] == 1
        assert ("made earlier" in capsys.readouterr().out) == kept
    rows.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    refused(lambda: evaluation.main(cfg), "of other files")
    assert evaluation.main(cfg, own=True)["prompts"] == 2


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
        if not kept:
            refused(lambda: evaluation.main(cfg), "of other files")
        evaluation.main(cfg, own=True)
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


def test_commands_that_cannot_work(tiny_models, tmp_path):
    refused(lambda: evaluation.main(evaluation.Config(model="out/nowhere/x/y")), "out/nowhere/x/y")
    refused(lambda: evaluation.main(evaluation.Config(model=tiny_models["student"], data="nope")),
            "nope is not an instruction set")
    another_vocabulary(tmp_path / "other")
    settings = dict(model=tiny_models["student"], teacher=str(tmp_path / "other"))
    refused(lambda: evaluation.main(evaluation.Config(**settings)), "tokens and the teacher other 78")
    (tmp_path / "results.json").write_text('{"best": null}')
    settings = dict(model=tiny_models["student"], out=str(tmp_path))
    refused(lambda: evaluation.main(evaluation.Config(**settings)), str(tmp_path), "another --out")
    assert (tmp_path / "results.json").read_text() == '{"best": null}'


def test_rouge_l_of_other_scripts():
    """The paper's scorer keeps a-z and 0-9 alone, to the digit; the other reads every script."""
    assert rouge_l("ôté", ["été"]) == 100 and rouge_l("猫在花园里", ["猫在花园里"]) == 0
    of = partial(rouge_l, words="unicode")
    assert of("\u0e41\u0e21\u0e27\u0e19\u0e2d\u0e19", ["\u0e41\u0e21\u0e27\u0e01\u0e34\u0e19"]) > 50  # Thai
    assert of("\U00020bb7\u91ce", ["\U00020bb7\u7530"]) == 50  # a rare letter of Chinese
    assert of("ôté", ["été"]) == 0 and of("Été, enfin!", ["été enfin"]) == 100
    assert of("狗在花园里", ["猫在花园里。"]) == pytest.approx(80)
    assert of("Кошка в саду", ["КОШКА в доме"]) == pytest.approx(200 / 3)
    assert of("हा हि हु", ["हो ही है"]) == 0 and of("e\u0301te\u0301", ["été"]) == 100
    assert of("the cats", ["the cat"]) == 50 and rouge_l("the cats", ["the cat"]) == 100  # Porter's stems


@pytest.mark.parametrize("rouge", ["english", "unicode"])
def test_an_evaluation_marks_references_that_rouge_l_cannot_see(rouge, tiny_models, monkeypatch, capsys):
    monkeypatch.setattr(data, "load_rows", lambda name, split: [data.Row("Tell about the cat", "", ("猫在花园里",))])
    monkeypatch.setattr(data, "encode", lambda tokenizer, texts: [[1, 2] for _ in texts])
    evaluation.main(evaluation.Config(model=tiny_models["student"], seeds=1, rouge=rouge, device="cpu"))
    assert ("blind: it sees 0% of the references" in capsys.readouterr().out) == (rouge == "english")


def test_a_long_prompt_is_dropped_and_shortens_no_other_answer(tiny_models, tmp_path, monkeypatch, capsys):
    rows = [data.Row("Tell about the cat", "", ("Anna found a cat.",))] * 2
    long = data.Row("Tell about the cat" + " and the cat" * 16, "", ("Anna found a cat.",))
    drawn = []
    draw = lambda model, prompts, uniform, m, **more: drawn.append(uniform.shape) or sample(model, prompts, uniform, m)
    monkeypatch.setattr(evaluation, "decoder", lambda kind: (draw, lambda model, dtype: model))
    for some in (rows, [*rows, long]):
        monkeypatch.setattr(data, "load_rows", lambda name, split, some=some: some)
        evaluation.main(evaluation.Config(model=tiny_models["student"], seeds=1, device="cpu"))
    assert drawn == [(2, 32), (2, 32)] and "dropped 1 with a prompt over 33 tokens" in capsys.readouterr().out


def test_a_teacher_of_fewer_positions_sets_the_room_for_answers(tiny_models, tmp_path):
    tokenizer = data.world_tokenizer()
    save(random_gpt(vocab_size=tokenizer.n_vocab, n_positions=30, eos_token_id=tokenizer.eot_token), tmp_path / "short")
    data.save_tokenizer(data.world_tokenizer(), tmp_path / "short")
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
