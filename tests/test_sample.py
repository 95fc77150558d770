"""Sampling: drawn with the right frequencies, ended at the right token, and never dependent on the company it keeps."""

import dataclasses
import json
import re
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import random_gpt, refused

import data
import sample as sampling
from model import GPTConfig, PackedLinear, frozen, new
from sample import inverse_cdf, mix, restrict, sample, turns, uniforms, without_repeats

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1, 2], [3, 3]]


def pair(**shape):
    return random_gpt(1, **shape), random_gpt(2, **shape | dict(n_layer=1))


@torch.no_grad()
def rescored(gpt, prompt, answer):
    """log-probabilities (T, V) by a plain forward pass, and the hidden states from which they come (T, D)."""
    hidden = gpt(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    return gpt.logits(hidden).log_softmax(-1), hidden


@cache
def draws():
    return uniforms(0, range(40_000), 2)


@pytest.mark.parametrize("by_turns", [False, True])
@pytest.mark.parametrize("mix_alpha", [0.0, 0.3, 1.0])
def test_answers_come_with_the_frequencies_of_eq_4(mix_alpha, by_turns, m):
    """All answers of two tokens from a vocabulary of five, 40,000 times, against their exact probabilities."""
    student, teacher = pair(vocab_size=5, eos_token_id=4)
    uniform, prompt = draws(), [1, 2]
    n = len(uniform)
    turn = torch.cat([turns(0, i, [0], 2, mix_alpha, 1) for i in range(n)]) if by_turns else None
    rollout = sample(student, [prompt] * n, uniform, m, teacher, mix_alpha, batch_size=n, turn=turn)
    answers, counts = np.unique([(a + [-1])[:2] for a in rollout.answers], axis=0, return_counts=True)
    expected = {}
    for first in range(5):
        p1 = sum(w * rescored(g, prompt, [first])[0].exp() for w, g in ((mix_alpha, teacher), (1 - mix_alpha, student)))
        if first == 4:
            expected[(4, -1)] = p1[0, 4].item()
            continue
        weighted = (mix_alpha, teacher), (1 - mix_alpha, student)
        two = sum(weight * rescored(gpt, prompt, [first, 0])[0].exp() for weight, gpt in weighted)
        expected |= {(first, second): (p1[0, first] * two[1, second]).item() for second in range(5)}
    assert abs(sum(expected.values()) - 1) < 1e-5 and set(map(tuple, answers)) <= set(expected)
    observed = dict(zip(map(tuple, answers), counts))
    chi2 = sum((observed.get(a, 0) - n * p) ** 2 / (n * p) for a, p in expected.items())
    assert chi2 < 45  # 20 degrees of freedom: exceeded by chance once in a thousand times


def test_mix_is_the_mixture():
    log_q, log_p = torch.randn(2, 3, 7, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(mix(log_q, log_p, 0.2).exp(), 0.2 * log_p.exp() + 0.8 * log_q.exp(), rtol=1e-12, atol=0)
    assert mix(log_q, log_p, 0.0) is log_q and mix(log_q, log_p, 1.0) is log_p


def test_what_is_kept_of_the_one_pass_equals_a_plain_forward_pass(m):
    """log q, log p, log p~ and the teacher's states: nothing has to be scored again."""
    student, teacher = pair()
    rollout = sample(student, PROMPTS, uniforms(0, range(5), 12), m, teacher, 0.2, keep_hidden=True)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, rollout.answers)):
        log_q, _ = rescored(student, prompt, answer)
        log_p, hidden = rescored(teacher, prompt, answer)
        n, chosen = len(answer), torch.tensor(answer)[:, None]
        want = {"student_logp": log_q.gather(1, chosen).squeeze(1), "teacher_logp": log_p.gather(1, chosen).squeeze(1),
                "mixed_logp": (0.2 * log_p.exp() + 0.8 * log_q.exp()).log().gather(1, chosen).squeeze(1),
                "teacher_hidden": hidden}
        for name, values in want.items():
            torch.testing.assert_close(getattr(rollout, name)[i, :n], values, atol=1e-5, rtol=0)
    for name in ("response", "student_logp", "teacher_logp", "mixed_logp"):
        assert not getattr(rollout, name)[~rollout.response_mask].any()


@pytest.mark.parametrize("mix_alpha", [0.0, 0.3, 1.0])
def test_by_turns_as_by_a_plain_loop(mix_alpha, m):
    """Against whole forward passes, token by token: the same answers, and what is kept of them. Whatever the batch."""
    student, teacher = pair(n_positions=64)
    uniform, turn = uniforms(0, range(20), 24), turns(0, 0, range(20), 24, mix_alpha, 3)
    draw = lambda size, chunk: sample(student, PROMPTS * 4, uniform, dataclasses.replace(m, vocab_chunk=chunk), teacher,
                                      mix_alpha, size, keep_hidden=True, turn=turn)
    for rollout in (draw(64, 128), draw(64, 5), draw(4, 128), draw(1, 1)):
        for i, (prompt, answer) in enumerate(zip(PROMPTS * 4, rollout.answers)):
            said = []
            while len(said) < 24 and 10 not in said:
                log_p, log_q = (rescored(model, prompt, [*said, 0])[0][-1:] for model in (teacher, student))
                at = len(said)
                said.append(inverse_cdf(log_p if turn[i, at] else log_q, uniform[i, at : at + 1]).item())
            assert answer == said
            (log_q, _), (log_p, hidden) = rescored(student, prompt, said), rescored(teacher, prompt, said)
            mixed, chosen = mix(log_q, log_p, mix_alpha), torch.tensor(said)[:, None]
            for name, logp in (("student_logp", log_q), ("teacher_logp", log_p), ("mixed_logp", mixed)):
                values = getattr(rollout, name)[i]
                torch.testing.assert_close(values[: len(said)], logp.gather(1, chosen).squeeze(1), atol=1e-5, rtol=0)
                assert not values[len(said) :].any()
            torch.testing.assert_close(rollout.teacher_hidden[i, : len(said)], hidden, atol=1e-5, rtol=0)
        assert rollout.ended.tolist() == [answer[-1] == 10 for answer in rollout.answers]


def test_a_model_reads_a_token_once_and_only_when_it_must(m):
    """The teacher as often as it has its turn, and once more at the end: no pass but those that decode."""
    student, teacher = (random_gpt(seed, n_positions=64, eos_token_id=-1) for seed in (1, 2))
    turn, read = turns(0, 0, [0], 40, 0.2, 1), {student: [], teacher: []}
    for model in read:
        model.register_forward_pre_hook(lambda model, args: read[model].append(args[0].size(1)))
    sample(student, [[1, 2, 3]], uniforms(0, [0], 40), m, teacher, 0.2, turn=turn)
    for model, mine in ((teacher, turn[0]), (student, ~turn[0])):
        assert len(read[model]) == mine.sum() + (not mine[-1]) and sum(read[model]) == 3 + 39
    assert len(read[teacher]) < 16


def test_turns_are_evenly_spread_over_groups_and_independent_in_an_answer():
    drawn = torch.stack([turns(3, collection, range(8), 50, 0.3, 4) for collection in range(400)])  # (400, 8, 50)
    assert drawn[:, :4].equal(drawn[:, 4:])  # answer i is of group i % 4
    assert set(drawn[:, :4].sum(1).unique().tolist()) == {1, 2}  # of four groups 1.2
    one = drawn[:, 0].double()
    assert one.mean().item() == pytest.approx(0.3, abs=0.015)  # 0.003 is a standard error
    together = (one[:, 1:] * one[:, :-1]).mean().item()
    assert together == pytest.approx(0.09, abs=0.01)
    other = turns(3, 0, [6, 1], 20, 0.3, 4)
    assert other.equal(drawn[0][[6, 1], :20])  # whatever the process and the length
    assert not turns(4, 0, range(8), 50, 0.3, 4).equal(drawn[0])
    assert turns(0, 0, [0], 9, 1.0, 1).all() and not turns(0, 0, [0], 9, 0.0, 1).any()


def test_an_answer_ends_with_its_end_token_and_the_end_token_counts(m):
    student, _ = pair()
    rollout = sample(student, PROMPTS * 20, uniforms(0, range(100), 12), m)
    assert 0 < rollout.ended.sum() < 100
    for answer, ended in zip(rollout.answers, rollout.ended.tolist()):
        assert (answer[-1] == 10) == ended and 10 not in answer[:-1]
        assert ended or len(answer) == 12
    assert (rollout.student_logp != 0).equal(rollout.response_mask)


def test_an_end_token_in_the_prompt_ends_nothing(m):
    student, _ = pair()
    rollout = sample(student, [[10, 10], [10]], uniforms(3, range(2), 6), m)
    assert min(map(len, rollout.answers)) >= 1 and max(map(len, rollout.answers)) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_answer_does_not_depend_on_its_company(batch_size, m):
    """Nor on the batch it is decoded in, nor on rows that leave, nor on the length that was allowed."""
    student, teacher = pair()
    draw = lambda length, size: sample(student, PROMPTS, uniforms(7, range(5), length), m, teacher, 0.5, size,
                                       keep_hidden=True)
    whole, parts, longer = draw(9, 64), draw(9, batch_size), draw(20, batch_size)
    assert whole.answers == parts.answers
    torch.testing.assert_close(whole.mixed_logp, parts.mixed_logp, atol=1e-5, rtol=0)
    mask = whole.response_mask
    torch.testing.assert_close(whole.teacher_hidden[mask], parts.teacher_hidden[mask], atol=1e-5, rtol=0)
    assert [a[:9] for a in longer.answers] == whole.answers
    assert draw(9, 64).answers == whole.answers  # the same seed, the same text
    assert sample(student, PROMPTS, uniforms(8, range(5), 9), m, teacher, 0.5).answers != whole.answers


def test_each_answer_has_its_own_stream():
    torch.testing.assert_close(uniforms(5, [3, 4], 6), uniforms(5, range(10), 8)[3:5, :6], atol=0, rtol=0)
    assert len(uniforms(5, range(100), 10).unique()) == 1000
    assert 0 <= uniforms(0, range(100), 100).min() and uniforms(0, range(100), 100).max() < 1


def test_the_inverse_cdf_takes_no_impossible_token():
    logp = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log().repeat(6, 1)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)
    assert inverse_cdf(logp, uniform).tolist() == [1, 1, 3, 3, 4, 4]
    unnormalised = torch.full((1, 50257), -40.0).log_softmax(-1)  # rounding leaves a sum other than 1
    assert inverse_cdf(unnormalised, uniform[-1:]).item() == 50256


def test_temperature_top_k_and_top_p_by_hand():
    logp = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    probs = lambda *settings: restrict(logp, *settings).exp()[0].tolist()
    assert restrict(logp, 1.0, 0, 1.0) is logp
    assert probs(1.0, 2, 1.0) == pytest.approx([0.625, 0, 0.375, 0])
    assert probs(1.0, 0, 0.49) == pytest.approx([1, 0, 0, 0])
    assert probs(1.0, 0, 0.51) == pytest.approx([0.625, 0, 0.375, 0])
    assert probs(0.5, 0, 1.0) == pytest.approx([25 / 36, 1 / 36, 9 / 36, 1 / 36])
    assert probs(1e-4, 0, 1.0) == pytest.approx([1, 0, 0, 0])
    assert probs(1.0, 100, 1.0) == pytest.approx([0.5, 0.1, 0.3, 0.1])


def test_repeated_ngrams_as_transformers_bans_them():
    processor = pytest.importorskip("transformers").NoRepeatNGramLogitsProcessor
    seen = torch.randint(0, 9, (50, 7), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    logits = torch.randn(50, 9)
    for n in (2, 3, 5):
        banned = processor(n)(seen, logits.clone()).isinf()
        assert torch.equal(without_repeats(logits, seen, n).isinf(), banned) and banned.any()
    padded = torch.cat([torch.full((50, 3), -1), seen], 1)  # what is padding is no token
    torch.testing.assert_close(without_repeats(logits, padded, 3), without_repeats(logits, seen, 3))
    assert without_repeats(logits, seen[:, :2], 3) is logits
    nothing = without_repeats(logits, torch.full((50, 4), -1), 2)
    assert not nothing.isinf().any()


def test_no_ngram_comes_twice(m):
    """Neither from the answer nor from the prompt, whatever the batch, and what is drawn from is what is noted."""
    student = random_gpt(5)
    uniform = uniforms(0, range(5), 20)
    free, ruled, alone = (sample(student, PROMPTS, uniform, m, **settings) for settings in (
        {}, dict(no_repeat_ngram=2), dict(no_repeat_ngram=2, batch_size=1)))
    bigrams = lambda rollout: [list(pairwise(prompt + answer)) for prompt, answer in zip(PROMPTS, rollout.answers)]
    assert any(len(set(pairs)) < len(pairs) for pairs in bigrams(free))
    assert all(len(set(pairs)) == len(pairs) for pairs in bigrams(ruled))
    assert ruled.answers == alone.answers and ruled.answers != free.answers
    gained = ruled.mixed_logp - ruled.student_logp
    assert gained.min() > -1e-5 and gained.max() > 0.01
    refused(lambda: sample(student, PROMPTS, uniform, m, no_repeat_ngram=1), "--no_repeat_ngram=1")
    refused(lambda: sample(student, PROMPTS, uniform, dataclasses.replace(m, capture=True), no_repeat_ngram=2),
            "--no_repeat_ngram", "--capture")
    by_turns = lambda **rule: sample(student, PROMPTS, uniform, m, random_gpt(2), 0.2, turn=uniform < 0.2, **rule)
    for rule in (dict(no_repeat_ngram=2), dict(temperature=0.5), dict(top_k=2), dict(top_p=0.5), dict(on_token=print)):
        refused(lambda rule=rule: by_turns(**rule), "--turns=0")
    refused(lambda: sample(student, PROMPTS, uniform, m, turn=uniform < 0), "--turns needs a teacher")


def test_samples_that_cannot_be_drawn(m):
    student, _ = pair()
    refused(lambda: sample(student, [[1]], uniforms(0, [0], 3), m, mix_alpha=0.2), "--mix_alpha=0.2", "--teacher")
    broken = random_gpt()
    broken.ln_f.weight.data[0] = float("nan")
    refused(lambda: sample(broken, [[1]], uniforms(0, [0], 3), m), "not numbers", "--dtype")
    refused(lambda: sample(student, [[1] * 30], uniforms(0, [0], 4), m), "30 tokens and 4 new ones", "32 positions")
    assert len(sample(student, [[1] * 30], uniforms(0, [0], 3), m).answers[0]) <= 3  # the last token needs no position


def test_packed_weights_draw_the_same_answers(m, monkeypatch):
    shape = dict(n_embd=256, n_head=4, vocab_size=50, eos_token_id=49)
    models = [new(GPTConfig(n_layer=2, n_positions=32, **shape), seed).eval() for seed in (0, 1)]
    draw = lambda: sample(*(frozen(g, m.dtype) for g in models[:1]), PROMPTS, uniforms(3, range(5), 12), m,
                          frozen(models[1], m.dtype), 0.2)
    packed = draw()
    monkeypatch.setattr(PackedLinear, "fits", staticmethod(lambda *settings: False))
    plain = draw()
    assert packed.answers == plain.answers
    for name in ("student_logp", "teacher_logp", "mixed_logp"):
        torch.testing.assert_close(getattr(packed, name), getattr(plain, name), atol=1e-5, rtol=0)


def test_a_process_without_prompts_has_no_answers(m):
    student, teacher = pair()
    rollout = sample(student, [], uniforms(0, [], 7), m, teacher, 0.2, keep_hidden=True)
    assert rollout.answers == [] and rollout.response.shape == (0, 7) and rollout.ended.shape == (0,)


# ---- command --------------------------------------------------------------------------------------------------------

def run(tiny_models, **settings):
    return sampling.main(sampling.Config(model=tiny_models["student"], dtype="float32", device="cpu", **settings))


def test_one_answer_is_streamed_and_several_are_printed_whole(tiny_models, capsys):
    run(tiny_models, prompt="Tell about the cat", input="Anna", max_response_tokens=6)
    one = capsys.readouterr().out
    run(tiny_models, prompt="Tell about the cat", input="Anna", max_response_tokens=6, samples=3)
    several = capsys.readouterr().out
    assert one.strip() and sorted(re.findall(r"^\[\d\]", several, re.M)) == ["[0]", "[1]", "[2]"]
    assert f"[0] {one}" in several  # the first of several is the one alone


def test_a_character_spread_over_tokens_is_printed_once_it_is_whole(gpt2, capsys):
    printer = sampling.Printer(gpt2, 1)
    tokens = gpt2.encode_ordinary("日本")
    assert len(tokens) > 2
    for token in [*tokens, gpt2.eot_token]:
        printer(0, token)
    assert capsys.readouterr().out == "日本\n"


def test_answers_are_written_as_rows_to_train_on(tiny_models, tmp_path, capsys):
    out = str(tmp_path / "answers.jsonl")
    run(tiny_models, data="tiny", limit=20, samples=2, out=out, max_response_tokens=10)
    rows, lines = data.load_rows(out, "test"), [json.loads(line) for line in open(out, encoding="utf-8")]
    said = re.search(r": (\d+) answers(?:, (\d+) empty ones left out)?", capsys.readouterr().out)
    assert len(rows) == int(said[1]) == 40 - int(said[2] or 0) and all(line["seed"] == 0 for line in lines)
    tokenizer = data.world_tokenizer()
    for example in data.load_examples(out, "test", tokenizer, 64, 64, lambda *words: None):
        (said,) = data.encode(tokenizer, example.row.outputs)
        assert (example.response[-1] == tokenizer.eot_token) == example.row.ended == (len(said) < 10)
    assert 0 < sum(row.ended for row in rows) < len(rows)


def test_prompts_from_files(tiny_models, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("Tell about the cat\n\nTell about the owl\n")
    run(tiny_models, prompts=str(tmp_path / "p.txt"), max_response_tokens=3)
    assert capsys.readouterr().out.count("[") == 2
    (tmp_path / "p.jsonl").write_text('{"instruction": "Tell about the cat", "input": "Mia"}\n')
    run(tiny_models, prompts=str(tmp_path / "p.jsonl"), max_response_tokens=3, raw=True)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text("\n")
    refused(lambda: run(tiny_models, prompts=str(tmp_path / "bad.txt")), "bad.txt", "not UTF-8")
    refused(lambda: run(tiny_models, prompts=str(tmp_path / "empty.txt")), "empty.txt", "no prompt")
    refused(lambda: run(tiny_models, prompts=str(tmp_path / "none.txt")), "none.txt", "No such file")
    for raw in (True, False):
        refused(lambda raw=raw: run(tiny_models, prompt="", raw=raw), "--prompt", "no prompt")
    refused(lambda: run(tiny_models, prompt="Tell about the dog"), "does not know 'dog'")
    refused(lambda: sampling.Config(), "one of --prompt, --prompts and --data")
    refused(lambda: sampling.Config(prompt="a", data="tiny"), "one of --prompt, --prompts and --data")
    refused(lambda: sampling.Config(data="tiny", input="Anna"), "--input goes with --prompt")
    refused(lambda: sampling.Config(data="tiny", raw=True), "--raw goes with")
    refused(lambda: sampling.Config(prompt="a", teacher="gpt2"), "--teacher=gpt2 does nothing without --mix_alpha")


def test_frozen_models_in_bfloat16_keep_the_log_probs_that_they_draw_from(tmp_path):
    from config import Machine
    m = Machine(torch.device("cpu"), torch.bfloat16)
    student, teacher = (frozen(g, m.dtype) for g in pair())
    rollout = sample(student, PROMPTS, uniforms(0, range(5), 8), m, teacher, 0.2, keep_hidden=True)
    assert rollout.student_logp.dtype == torch.float32 and rollout.teacher_hidden.dtype == torch.bfloat16
    with m.autocast():
        again = teacher.logits(rollout.teacher_hidden).log_softmax(-1)
        again = again.gather(-1, rollout.response[..., None]).squeeze(-1)
    torch.testing.assert_close(again[rollout.response_mask], rollout.teacher_logp[rollout.response_mask])
