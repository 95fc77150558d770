"""Sampling: drawn with the right frequencies, ended at the right token, and never dependent on the company it keeps."""

import dataclasses
import itertools
import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import another_vocabulary, in_two_processes, random_gpt, refused

import config
import data
import sample as sampling
import world
from config import Machine
from model import save
from sample import follow, inverse_cdf, mix, restrict, sample, uniforms

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1, 2], [3, 3]]


def pair(**shape):
    """Student and teacher, which end one answer in ten with each token or so."""
    models = random_gpt(1, **shape), random_gpt(2, **shape | dict(n_layer=1))
    for model in models:
        model.ln_f.bias.data += model.wte.weight.data[-1]
    return models


def by(m, size):
    """The machine that decodes so many answers together."""
    return dataclasses.replace(m, sample_batch=size)


@torch.no_grad()
def rescored(gpt, prompt, answer):
    """log-probabilities (T, V) by a plain forward pass, and the hidden states from which they come (T, D)."""
    hidden = gpt(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    return gpt.logits(hidden).log_softmax(-1), hidden


# ---- the distribution -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mix_alpha", [0.0, 0.3, 1.0])
def test_answers_come_with_the_frequencies_of_eq_4(mix_alpha, m):
    """All answers of two tokens from a vocabulary of five, 40,000 times, against their exact probabilities."""
    student, teacher = pair(vocab_size=5, eos_token_id=4)
    n, prompt = 40_000, [1, 2]
    rollout = sample(student, [prompt] * n, uniforms(0, range(n), 2), by(m, n), teacher, mix_alpha)
    answers, counts = np.unique([(a + [-1])[:2] for a in rollout.answers], axis=0, return_counts=True)
    expected, weighted = {}, ((mix_alpha, teacher), (1 - mix_alpha, student))
    for first in range(5):
        two = sum(weight * rescored(gpt, prompt, [first, 0])[0].exp() for weight, gpt in weighted)  # (2, V)
        if first == 4:
            expected[(4, -1)] = two[0, 4].item()
            continue
        expected |= {(first, second): (two[0, first] * two[1, second]).item() for second in range(5)}
    assert abs(sum(expected.values()) - 1) < 1e-5 and set(map(tuple, answers)) <= set(expected)
    observed = dict(zip(map(tuple, answers), counts))
    chi2 = sum((observed.get(a, 0) - n * p) ** 2 / (n * p) for a, p in expected.items())
    assert chi2 < 45  # 20 degrees of freedom: exceeded by chance once in a thousand times


def test_mix_is_the_mixture():
    log_q, log_p = torch.randn(2, 3, 7, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(mix(log_q, log_p, 0.2).exp(), 0.2 * log_p.exp() + 0.8 * log_q.exp(), rtol=1e-12, atol=0)
    assert mix(log_q, log_p, 0.0) is log_q and mix(log_q, log_p, 1.0) is log_p


def test_each_answer_has_its_own_stream():
    torch.testing.assert_close(uniforms(5, [3, 4], 6), uniforms(5, range(10), 8)[3:5, :6], atol=0, rtol=0)
    assert len(uniforms(5, range(100), 10).unique()) == 1000
    assert 0 <= uniforms(0, range(100), 100).min() and uniforms(0, range(100), 100).max() < 1
    assert uniforms(0, [], 7).shape == (0, 7)


def test_the_inverse_cdf_takes_no_impossible_token():
    logp = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log().repeat(6, 1)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)
    assert inverse_cdf(logp, uniform).tolist() == [1, 1, 3, 3, 4, 4]
    unnormalised = torch.full((1, 50257), -40.0).log_softmax(-1)  # rounding leaves a sum other than 1
    assert inverse_cdf(unnormalised, uniform[-1:]).item() == 50256


# ---- rollouts -------------------------------------------------------------------------------------------------------

def test_what_is_kept_of_the_one_pass_equals_a_plain_forward_pass(m):
    """log q, log p, log p~ and the teacher's states: nothing has to be scored again."""
    student, teacher = pair()
    rollout = sample(student, PROMPTS, uniforms(0, range(5), 12), m, teacher, 0.2)
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


def test_without_a_teacher_there_is_nothing_of_one(m):
    rollout = sample(random_gpt(), PROMPTS, uniforms(0, range(5), 12), m)
    assert rollout.teacher_hidden is None and not rollout.teacher_logp.any()
    assert torch.equal(rollout.mixed_logp, rollout.student_logp)


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
    """Nor on the batch it is decoded in, nor on rows that have ended, nor on the length that was allowed."""
    student, teacher = pair()
    draw = lambda length, size: sample(student, PROMPTS, uniforms(7, range(5), length), by(m, size), teacher, 0.5)
    whole, parts, longer = draw(9, 64), draw(9, batch_size), draw(20, batch_size)
    assert whole.answers == parts.answers
    torch.testing.assert_close(whole.mixed_logp, parts.mixed_logp, atol=1e-5, rtol=0)
    mask = whole.response_mask
    torch.testing.assert_close(whole.teacher_hidden[mask], parts.teacher_hidden[mask], atol=1e-5, rtol=0)
    assert [a[:9] for a in longer.answers] == whole.answers
    assert draw(9, 64).answers == whole.answers  # the same seed, the same text
    assert sample(student, PROMPTS, uniforms(8, range(5), 9), m, teacher, 0.5).answers != whole.answers


@pytest.mark.parametrize("size", [1, 2, 64])
def test_what_a_token_is_drawn_from_can_be_adjusted(size, m):
    """`adjust` is told which answers these are, and what was said so far. It changes the draws, and what is noted of
    them, and nothing else."""
    student, teacher = pair()
    told, uniform = {}, uniforms(0, range(5), 12)

    def adjust(logp_vocab, rows, said):
        torch.testing.assert_close(logp_vocab.exp().sum(-1), torch.ones(len(rows)))
        for row, line in zip(rows, said.tolist(), strict=True):
            told.setdefault(row, []).append([token for token in line if token >= 0])
            assert line == [-1] * line.count(-1) + told[row][-1]  # padding is at the left
        forbidden = torch.zeros(11).index_fill(0, torch.tensor([1, 3, 10]), -torch.inf)
        return (logp_vocab + forbidden).log_softmax(-1)

    rollout = sample(student, PROMPTS, uniform, by(m, size), teacher, 0.2, adjust)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, rollout.answers)):
        assert told[row] == [prompt + answer[:t] for t in range(12)]
        assert len(answer) == 12 and not {1, 3, 10} & set(answer)
        (log_q, _), (log_p, _) = rescored(student, prompt, answer), rescored(teacher, prompt, answer)
        mixed, chosen = mix(log_q, log_p, 0.2), torch.tensor(answer)[:, None]
        mixed[:, [1, 3, 10]] = -torch.inf
        for name, logp in (("student_logp", log_q), ("teacher_logp", log_p), ("mixed_logp", mixed.log_softmax(-1))):
            torch.testing.assert_close(getattr(rollout, name)[row], logp.gather(1, chosen)[:, 0], atol=1e-5, rtol=0)
    assert not rollout.ended.any()


def test_samples_that_cannot_be_drawn(m):
    student, broken = random_gpt(1), random_gpt()
    broken.ln_f.weight.data[0] = float("nan")
    refused(lambda: sample(broken, [[1]], uniforms(0, [0], 3), m), "not numbers", "--dtype")
    refused(lambda: sample(student, [[1] * 30], uniforms(0, [0], 4), m), "30 tokens and 4 new ones", "32 positions")
    assert len(sample(student, [[1] * 30], uniforms(0, [0], 3), m).answers[0]) <= 3  # the last token needs no position
    short = random_gpt(2, n_positions=20)
    refused(lambda: sample(student, [[1] * 20], uniforms(0, [0], 3), m, short, 0.5), "20 positions")


def test_a_process_without_prompts_has_no_answers(m):
    student, teacher = pair()
    for rollout in (sample(student, [], uniforms(0, [], 7), m, teacher, 0.2),
                    follow(student, [], [], 7, m, teacher, keep_hidden=True)):
        assert rollout.answers == [] and rollout.response.shape == (0, 7) and rollout.ended.shape == (0,)


def test_in_bfloat16_the_log_probs_are_those_drawn_from():
    """The states kept of the teacher give its log-probabilities again, to the bit."""
    m = Machine(torch.device("cpu"), torch.bfloat16)
    student, teacher = pair()
    rollout = sample(student, PROMPTS, uniforms(0, range(5), 8), m, teacher, 0.2)
    assert rollout.student_logp.dtype == torch.float32 and rollout.teacher_hidden.dtype == torch.bfloat16
    with m.autocast(), torch.no_grad():
        again = teacher.logits(rollout.teacher_hidden).log_softmax(-1)
        again = again.gather(-1, rollout.response[..., None]).squeeze(-1)
    torch.testing.assert_close(again[rollout.response_mask], rollout.teacher_logp[rollout.response_mask])


@pytest.mark.parametrize("positions", [1, 25, 10_000])
def test_following_an_answer_finds_what_sampling_noted(positions, m):
    """By one pass of each model, however many rows have room for their logits, and the KL at each position with it."""
    student, teacher = pair()
    drawn = sample(student, PROMPTS, uniforms(0, range(5), 12), m, teacher)
    machine = dataclasses.replace(m, logits=11 * positions)
    found = follow(student, PROMPTS, drawn.answers, 12, machine, teacher, keep_hidden=True)
    assert found.answers == drawn.answers and torch.equal(found.ended, drawn.ended)
    mask = drawn.response_mask
    for name in ("student_logp", "teacher_logp", "mixed_logp"):
        torch.testing.assert_close(getattr(found, name), getattr(drawn, name), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.teacher_hidden[mask], drawn.teacher_hidden[mask], atol=1e-5, rtol=0)
    assert not found.reverse_kl[~mask].any() and found.reverse_kl.min() > -1e-6
    for row, (prompt, answer) in enumerate(zip(PROMPTS, drawn.answers)):
        (log_q, _), (log_p, _) = rescored(student, prompt, answer), rescored(teacher, prompt, answer)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        torch.testing.assert_close(found.reverse_kl[row, : len(answer)], kl, atol=1e-5, rtol=0)
    assert follow(student, PROMPTS, drawn.answers, 12, machine, teacher).teacher_hidden is None


def test_an_answer_that_is_followed_is_cut_to_the_length_allowed(m):
    student, teacher = pair()
    found = follow(student, [[1, 2], [3]], [[4, 5, 6, 10], [7, 10]], 3, m, teacher)
    assert found.answers == [[4, 5, 6], [7, 10]] and found.ended.tolist() == [False, True]
    full = follow(student, [[1] * 30], [[2, 3, 4]], 3, m, teacher)  # 33 tokens, of which the last is not fed
    assert full.answers == [[2, 3, 4]]


# ---- what is for readers of samples ---------------------------------------------------------------------------------

def test_temperature_top_k_and_top_p_by_hand():
    logp = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    probs = lambda *settings: restrict(logp, *settings).exp()[0].tolist()
    assert probs(1.0, 0, 1.0) == pytest.approx([0.5, 0.1, 0.3, 0.1])
    assert probs(1.0, 2, 1.0) == pytest.approx([0.625, 0, 0.375, 0])
    assert probs(1.0, 0, 0.49) == pytest.approx([1, 0, 0, 0])
    assert probs(1.0, 0, 0.51) == pytest.approx([0.625, 0, 0.375, 0])
    assert probs(0.5, 0, 1.0) == pytest.approx([25 / 36, 1 / 36, 9 / 36, 1 / 36])
    assert probs(1e-4, 0, 1.0) == pytest.approx([1, 0, 0, 0])
    assert probs(1.0, 100, 1.0) == pytest.approx([0.5, 0.1, 0.3, 0.1])
    assert probs(0.5, 3, 0.8) == pytest.approx([25 / 34, 0, 9 / 34, 0])


def test_rules_on_what_is_drawn_are_those_of_transformers():
    """In their order: temperature, top k, and top p of what is left."""
    process = pytest.importorskip("transformers").generation.logits_process
    logp = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for temperature, top_k, top_p in ((0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (1.3, 4, 0.7)):
        scores = process.TemperatureLogitsWarper(temperature)(None, logp)
        scores = process.TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = process.TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
        got, want = restrict(logp, temperature, top_k, top_p).exp(), scores.softmax(-1)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


# ---- command --------------------------------------------------------------------------------------------------------

def run(tiny_models, **settings):
    return sampling.main(sampling.Config(model=tiny_models["student"], dtype="float32", device="cpu", **settings))


def test_one_answer_is_streamed_and_several_are_printed_whole(tiny_models, capsys):
    run(tiny_models, prompt="Tell about the cat", input="Anna", max_response_tokens=6)
    one = capsys.readouterr().out
    run(tiny_models, prompt="Tell about the cat", input="Anna", max_response_tokens=6, samples=3)
    several = capsys.readouterr().out
    assert one.strip() and re.findall(r"^\[\d\]", several, re.M) == ["[0]", "[1]", "[2]"]
    assert f"[0] {one}" in several  # the first of several is the one alone
    run(tiny_models, prompt="Tell about the cat", input="Anna", max_response_tokens=1)
    first = capsys.readouterr().out
    assert first[-1] == "\n" and one.startswith(first[:-1])


@pytest.fixture
def says(gpt2, tmp_path, monkeypatch):
    """A function that lets a model of GPT-2's vocabulary say these tokens."""
    save(random_gpt(vocab_size=50257, eos_token_id=50256), tmp_path / "gpt")
    monkeypatch.setattr(data, "WITHOUT_INPUT", "{instruction}")  # the model has few positions

    def say(tokens, prompt="a", **settings):
        left = iter(tokens)
        monkeypatch.setattr(sampling, "inverse_cdf", lambda logp, uniform: torch.tensor([next(left)]))
        sampling.main(sampling.Config(model=str(tmp_path / "gpt"), prompt=prompt, max_response_tokens=len(tokens),
                                      decoder="plain", device="cpu", dtype="float32", **settings))
    return say


def test_a_character_spread_over_tokens_is_printed_once_it_is_whole(says, gpt2, capsys):
    tokens = gpt2.encode_ordinary("日本")
    assert len(tokens) > 2
    says([*tokens, gpt2.eot_token])
    assert capsys.readouterr().out == "日本\n"
    says(tokens[:-1])  # cut within the second
    assert capsys.readouterr().out == gpt2.decode(tokens[:-1]) + "\n"


def test_what_is_drawn_behind_the_end_is_not_shown(says, gpt2, monkeypatch, capsys):
    """A decoder on a GPU asks only now and then whether an answer has ended, and draws on until then."""
    def draw(model, prompts, uniform, m, teacher, mix_alpha, adjust):
        rollout = sample(model, prompts, uniform, m, teacher, mix_alpha, adjust)
        for more in range(3):
            said = torch.tensor([prompts[0] + rollout.answers[0] + [5] * more])
            adjust(torch.zeros(1, gpt2.n_vocab).log_softmax(-1), [0], said)
        return rollout

    monkeypatch.setattr(sampling, "decoder", lambda kind: (draw, lambda model, dtype: model))
    says([*gpt2.encode_ordinary("so it is"), gpt2.eot_token])
    assert capsys.readouterr().out == "so it is\n"


def test_rules_reach_what_is_drawn(tiny_models, capsys):
    """The likeliest token is the same for any seed: by a temperature near 0, by top_k=1 and by a small top_p."""
    for rule in (dict(temperature=1e-4), dict(top_k=1), dict(top_p=1e-6)):
        said = []
        for samples in (1, 3):  # streamed and whole
            run(tiny_models, prompt="Tell about the cat", max_response_tokens=8, samples=samples, seed=samples, **rule)
            said.append(capsys.readouterr().out)
        assert said[1] == "".join(f"[{n}] {said[0]}" for n in range(3))


def test_a_mixture_is_drawn_from(tiny_models, capsys):
    said = []
    for teacher in ({}, dict(teacher=tiny_models["teacher"], mix_alpha=1.0)):
        run(tiny_models, prompt="Tell about the cat", max_response_tokens=12, **teacher)
        said.append(capsys.readouterr().out)
    cfg = sampling.Config(model=tiny_models["teacher"], dtype="float32", device="cpu", prompt="Tell about the cat",
                          max_response_tokens=12)
    sampling.main(cfg)
    assert said[0] != said[1] == capsys.readouterr().out


@pytest.fixture
def rows(tmp_path):
    """A file of twenty rows."""
    prompts = itertools.islice(itertools.product(world.THINGS, world.NAMES), 20)
    lines = [json.dumps({"instruction": f"Tell about the {thing}", "input": name, "output": "Anna saw a cat."}) + "\n"
             for thing, name in prompts]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return str(tmp_path / "rows.jsonl")


def test_answers_are_written_as_rows_to_train_on(tiny_models, rows, tmp_path, capsys):
    out = str(tmp_path / "answers.jsonl")
    run(tiny_models, data=rows, samples=2, out=out, max_response_tokens=10)
    lines = [json.loads(line) for line in open(out, encoding="utf-8")]
    written, empty = map(int, re.search(r"(\d+) answers, (\d+) of them empty", capsys.readouterr().out).groups())
    assert len(data.load_rows(out, "test")) == len(lines) == written == 40
    assert sum(line["output"] == "" for line in lines) == empty
    assert all(line["seed"] == 0 for line in lines)
    tokenizer = data.world_tokenizer()
    for example in data.load_examples(out, "test", tokenizer, 64, 64, lambda *words: None):
        (said,) = data.encode(tokenizer, example.row.outputs)
        assert (example.response[-1] == tokenizer.eot_token) == example.row.ended == (len(said) < 10)
    assert 0 < sum(line["ended"] for line in lines) < len(lines)


def test_an_answer_is_learned_by_the_tokens_and_the_prompt_that_it_was_sampled_with(says, gpt2, tmp_path, capsys):
    """Cut within a character, of white space, with a carriage return, in tokens that text would not make, and empty."""
    out, end = str(tmp_path / "answers.jsonl"), gpt2.eot_token
    cut = gpt2.encode_ordinary("日本")[:-1]
    for tokens in (cut, [220, 220, 198], [201, 198, end], [64, 65, end], [220, end], [end]):
        says(tokens, " x\r\n\u2028 ", out=out)
        assert f"1 answers, {int(tokens == [end])} of them empty" in capsys.readouterr().out
        (example,) = data.load_examples(out, "all", gpt2, 256, 512, lambda *words: None)
        assert (example.prompt, example.response) == (gpt2.encode_ordinary(" x\r\n\u2028 "), tokens)
        assert example.row.ended == (tokens[-1] == end)


def test_answers_to_rows_are_printed_by_their_numbers(tiny_models, rows, capsys):
    run(tiny_models, data=rows, split="valid", max_response_tokens=3)
    assert re.findall(r"^\[(\d+)\]", capsys.readouterr().out, re.M) == ["0", "1"]


def test_several_processes_number_their_answers_together(tiny_models, monkeypatch, tmp_path, capsys):
    """As one process prints them, by one of the processes; and so it is with a single answer, and with a file."""
    out = tmp_path / "answers.jsonl"
    asked = [dict(samples=5), dict(), dict(samples=5, out=str(out))]

    def all_of_it():
        for settings in asked:
            run(tiny_models, prompt="Tell about the cat", max_response_tokens=6, **settings)

    all_of_it()
    alone, written = capsys.readouterr().out, out.read_text()
    assert re.findall(r"^\[(\d)\]", alone, re.M) == list("01234")
    out.unlink()

    def one_of_two(rank):
        with open(tmp_path / f"{rank}.txt", "w") as sys.stdout:
            all_of_it()
        config.dist.destroy_process_group()

    in_two_processes(monkeypatch, one_of_two)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [alone, ""]
    assert out.read_text() == written


def test_commands_that_cannot_work(tiny_models, rows, tmp_path):
    another_vocabulary(tmp_path / "other")
    refused(lambda: run(tiny_models, prompt="Tell about the cat", teacher=str(tmp_path / "other"), mix_alpha=0.2),
            "tokens and the teacher other 78", "one vocabulary")
    refused(lambda: run(tiny_models, prompt="Tell about the cow"), "does not know 'cow'")
    refused(lambda: run(tiny_models, data=str(tmp_path / "none.jsonl")), "none.jsonl")
    refused(lambda: sampling.Config(), "one of --prompt and --data")
    refused(lambda: sampling.Config(prompt="a", data="tiny"), "one of --prompt and --data")
    refused(lambda: sampling.Config(data="tiny", input="Anna"), "--input", "--prompt")
    for half in (dict(teacher="gpt2"), dict(mix_alpha=0.2)):
        refused(lambda half=half: sampling.Config(prompt="a", **half), "--teacher and --mix_alpha")
    for out in (rows, f"{tmp_path}/./rows.jsonl"):
        refused(lambda out=out: sampling.Config(data=rows, out=out), f"--out={out} would be written over")
    refused(lambda: sampling.Config(prompt="a", out=str(tmp_path)), "is a folder: give the name of a file")
