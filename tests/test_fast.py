"""The fast decoder against the plain one: the same tokens from the same uniforms, or, by turns, the same law."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import CPU, random_gpt, refused
from torch.nn.functional import scaled_dot_product_attention as sdpa

import sample as plain
from config import Machine
from fast import decode, packed
from fast.decode import PackedLinear, by_turns, captured, frozen, turns
from model import GPTConfig, KVCache, new
from sample import inverse_cdf, mix, restrict, uniforms

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1, 2], [3, 3]]
NOTED = ("student_logp", "teacher_logp", "mixed_logp")


def pair(**shape):
    """A student whose answers end after 1 to 25 tokens, and a teacher."""
    return random_gpt(5, **shape), random_gpt(2, **shape | dict(n_layer=1))


def wide_pair():
    """Models that are wide enough for packed weights."""
    shape = dict(n_head=4, n_embd=256, vocab_size=50, n_positions=32, eos_token_id=49)
    return [new(GPTConfig(n_layer, **shape), seed).eval() for seed, n_layer in enumerate((2, 1))]


def in_batches_of(size, m=CPU):
    return dataclasses.replace(m, sample_batch=size)


def assert_same(rollout, other):
    assert rollout.answers == other.answers and rollout.ended.equal(other.ended)
    for name in (*NOTED, "teacher_hidden"):
        got, want = getattr(rollout, name), getattr(other, name)
        mask = other.response_mask if want is None or want.dim() == 2 else other.response_mask[..., None]
        if want is not None:
            torch.testing.assert_close(got * mask, want * mask, atol=1e-5, rtol=0)
            assert not (got * ~mask).any() or name == "teacher_hidden"


# ---- fast and plain together ----------------------------------------------------------------------------------------

def restricted(logp_vocab, rows, said):
    return restrict(logp_vocab, 0.7, 3, 0.9)


def never_said_before(logp_vocab, rows, said):
    """What was said, prompt included, is not said again, but by answers of even numbers."""
    odd = torch.tensor(rows)[:, None] % 2
    counts = torch.zeros_like(logp_vocab).scatter_add_(1, said.clamp(min=0), ((said >= 0) * odd).float())
    return logp_vocab.masked_fill(counts > 0, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("make, mix_alpha, adjust", [
    *product([pair], [None, 0.0, 0.3, 1.0], [None, restricted, never_said_before]), (wide_pair, 0.3, None)])
def test_fast_and_plain_draw_the_same(make, mix_alpha, adjust):
    """Padded prompts and prompts of one length, rows that leave, one answer alone, models packed and not."""
    student, teacher = make()
    mixture = dict(teacher=teacher, mix_alpha=mix_alpha) if mix_alpha is not None else {}
    ready = dict(mixture, teacher=frozen(teacher, torch.float32)) if mixture else {}
    for prompts in (PROMPTS, [[1, 2], [3, 4], [5, 6]]):
        uniform = uniforms(3, range(len(prompts)), 20)
        want = plain.sample(student, prompts, uniform, CPU, **mixture, adjust=adjust)
        for size in (64, 2, 1):
            got = decode.sample(frozen(student, torch.float32), prompts, uniform, in_batches_of(size), **ready,
                                adjust=adjust)
            assert_same(got, want)


def test_rows_that_have_ended_leave():
    student, seen = pair()[0], []
    student.register_forward_pre_hook(lambda model, args: seen.append(len(args[0])))
    rollout = decode.sample(student, PROMPTS * 8, uniforms(0, range(40), 25), CPU)
    longest = max(map(len, rollout.answers))
    assert seen[0] == 40 and sorted(seen, reverse=True) == seen and len(set(seen)) > 3 and len(seen) == longest
    assert seen[-1] < 5


def test_half_as_many_are_tried_where_memory_is_short(monkeypatch, capsys):
    """By both decoders; and one answer for which there is no room is an error."""
    student, teacher = pair()
    uniform, turn = uniforms(0, range(5), 12), turns(0, 0, range(5), 12, 0.5, 1)
    draws = [lambda: decode.sample(student, PROMPTS, uniform, CPU),
             lambda: by_turns(student, PROMPTS, uniform, CPU, teacher, 0.5, turn)]
    whole, room = [draw() for draw in draws], KVCache.__init__
    most = 1

    def small_room(cache, config, batch, *more):
        if batch > most:
            raise torch.cuda.OutOfMemoryError
        room(cache, config, batch, *more)

    monkeypatch.setattr(KVCache, "__init__", small_room)
    for draw, want in zip(draws, whole):
        assert_same(draw(), want)
        assert capsys.readouterr().out == ("out of memory: 5 answers were too many to decode together, 2 are tried\n"
                                           "out of memory: 2 answers were too many to decode together, 1 are tried\n")
    most = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        draws[0]()


def test_half_as_many_are_tried_in_the_middle_of_an_answer(monkeypatch, capsys):
    student, calls = pair()[0], [0]
    want = decode.sample(student, PROMPTS, uniforms(0, range(5), 12), CPU)
    extend = KVCache.extend

    def fails_once(cache, layer, k, v):
        calls[0] += 1
        if calls[0] == 7:  # in the fourth step of two layers
            raise torch.cuda.OutOfMemoryError
        return extend(cache, layer, k, v)

    monkeypatch.setattr(KVCache, "extend", fails_once)
    assert_same(decode.sample(student, PROMPTS, uniforms(0, range(5), 12), CPU), want)
    assert capsys.readouterr().out.count("out of memory") == 1


def test_samples_that_cannot_be_drawn():
    student, teacher = pair()
    uniform = uniforms(0, [0], 4)
    refused(lambda: decode.sample(student, [[1] * 30], uniform, CPU), "30 tokens and 4 new ones", "32 positions")
    assert len(decode.sample(student, [[1] * 30], uniform[:, :3], CPU).answers[0]) <= 3  # the last needs no position
    student.ln_f.weight.data[0] = float("nan")
    refused(lambda: decode.sample(student, [[1]], uniform, CPU), "not numbers", "--dtype")
    refused(lambda: by_turns(student, [[1]], uniform, CPU, teacher, 0.5, uniform < 0.5), "not numbers")
    refused(lambda: captured(student, [[1]], uniform, CPU), "--decoder=captured", "--decoder=fast")
    gpu = dataclasses.replace(CPU, device=torch.device("cuda"))
    refused(lambda: captured(student, [[1]], uniform, gpu, adjust=restricted), "--decoder=captured", "--decoder=fast")


def test_a_process_without_prompts_has_no_answers():
    student, teacher = pair()
    nothing = uniforms(0, [], 7)
    for rollout in (decode.sample(student, [], nothing, CPU, teacher, 0.2),
                    by_turns(student, [], nothing, CPU, teacher, 0.2, nothing < 0.2)):
        assert rollout.answers == [] and rollout.response.shape == (0, 7) and rollout.ended.shape == (0,)


# ---- by turns -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def rescored(gpt, prompt, answer):
    """log-probabilities (T, V) by a plain forward pass, and the hidden states from which they come (T, D)."""
    hidden = gpt(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    return gpt.logits(hidden).log_softmax(-1), hidden


def law(student, teacher, prompt, mix_alpha):
    """The probability of each answer of two tokens, or of one that ends it, in a vocabulary of five: Eq. (4)."""
    def mixture(said):
        parts = (mix_alpha, teacher), (1 - mix_alpha, student)
        return sum(share * rescored(gpt, prompt, [*said, 0])[0][-1].exp() for share, gpt in parts)

    first, answers = mixture([]), {(4,): 0.0}
    answers[4,] = first[4].item()
    for token in range(4):
        second = mixture([token])
        answers |= {(token, after): (first[token] * second[after]).item() for after in range(5)}
    assert abs(sum(answers.values()) - 1) < 1e-5
    return answers


def chi_square(answers, expected):
    counts = Counter(map(tuple, answers))
    assert set(counts) <= set(expected)
    return sum((counts[a] - len(answers) * p) ** 2 / (len(answers) * p) for a, p in expected.items())


@cache
def draws(count, each):
    """The uniforms (count * each, 2) of `count` collections of `each` answers."""
    return uniforms(0, range(count * each), 2)


@pytest.mark.parametrize("mix_alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("groups", [1, 4])
def test_each_answer_by_turns_has_the_law_of_eq_4(groups, mix_alpha):
    """Of 8 answers of a collection each, whatever the group, over 6,000 collections. 20 degrees of freedom."""
    student, teacher = pair(vocab_size=5, eos_token_id=4)
    count, each = 6000, 8
    turn = torch.cat([turns(0, i, range(each), 2, mix_alpha, groups) for i in range(count)])
    prompts = [[1, 2]] * (count * each)
    rollout = by_turns(student, prompts, draws(count, each), in_batches_of(count * each), teacher, mix_alpha, turn)
    expected = law(student, teacher, [1, 2], mix_alpha)
    for number in range(each):
        assert chi_square(rollout.answers[number::each], expected) < 52.4  # once in 10,000 times by chance


def test_an_answer_by_turns_does_not_know_what_others_say():
    """Of those collections in which answer 0 begins with a certain token, answer 4, whose turns it shares, may have
    another law: they are dependent. But given its turns, its law is that of the models whose turns they are."""
    student, teacher = pair(vocab_size=5, eos_token_id=4)
    count = 20000
    turn = torch.tensor([[True, False]]).repeat(2 * count, 1)
    rollout = by_turns(student, [[1, 2]] * (2 * count), draws(count, 2), in_batches_of(2 * count), teacher, 0.5, turn)
    answers = rollout.answers
    ours = [other for one, other in zip(answers[::2], answers[1::2]) if one[0] == 2]
    first, expected = rescored(teacher, [1, 2], [0])[0][0].exp(), {}
    expected[4,] = first[4].item()
    for token in range(4):
        second = rescored(student, [1, 2], [token, 0])[0][-1].exp()
        expected |= {(token, after): (first[token] * second[after]).item() for after in range(5)}
    assert len(ours) > 1000 and chi_square(ours, expected) < 52.4


@pytest.mark.parametrize("mix_alpha", [0.0, 0.3, 1.0])
def test_by_turns_as_by_a_plain_loop(mix_alpha):
    """Against whole forward passes, token by token: the same answers, and what is kept of them. Whatever the batch."""
    student, teacher = pair(n_positions=64)
    uniform, turn = uniforms(0, range(20), 24), turns(0, 0, range(20), 24, mix_alpha, 3)
    turn[:, :8] = turn[0, :8]  # groups differ later only
    for size, chunk in ((64, 128), (64, 5), (4, 128), (1, 1)):
        m = dataclasses.replace(CPU, sample_batch=size, logits=11 * chunk)
        rollout = by_turns(student, PROMPTS * 4, uniform, m, teacher, mix_alpha, turn)
        for i, (prompt, answer) in enumerate(zip(PROMPTS * 4, rollout.answers)):
            said = []
            while len(said) < 24 and 10 not in said:
                log_p, log_q = (rescored(model, prompt, [*said, 0])[0][-1:] for model in (teacher, student))
                at = len(said)
                said.append(inverse_cdf(log_p if turn[i, at] else log_q, uniform[i, at : at + 1]).item())
            assert answer == said
            (log_q, _), (log_p, hidden) = rescored(student, prompt, said), rescored(teacher, prompt, said)
            mixed, chosen = mix(log_q, log_p, mix_alpha), torch.tensor(said)[:, None]
            for name, logp in zip(NOTED, (log_q, log_p, mixed)):
                values = getattr(rollout, name)[i]
                torch.testing.assert_close(values[: len(said)], logp.gather(1, chosen).squeeze(1), atol=1e-5, rtol=0)
                assert not values[len(said) :].any()
            torch.testing.assert_close(rollout.teacher_hidden[i, : len(said)], hidden, atol=1e-5, rtol=0)
        assert rollout.ended.tolist() == [answer[-1] == 10 for answer in rollout.answers]


def test_a_model_reads_a_token_once_and_only_when_it_must():
    """The teacher as often as it has its turn, and once more at the end: no pass but those that decode."""
    student, teacher = (random_gpt(seed, n_positions=64, eos_token_id=-1) for seed in (1, 2))
    turn, lengths = turns(0, 0, [0], 40, 0.2, 1), {student: [], teacher: []}
    for model in lengths:
        model.register_forward_pre_hook(lambda model, args: lengths[model].append(args[0].size(1)))
    by_turns(student, [[1, 2, 3]], uniforms(0, [0], 40), CPU, teacher, 0.2, turn)
    for model, mine in ((teacher, turn[0]), (student, ~turn[0])):
        assert len(lengths[model]) == mine.sum() + (not mine[-1]) and sum(lengths[model]) == 3 + 39
    assert len(lengths[teacher]) < 16


def test_turns_are_evenly_spread_over_groups_and_independent_in_an_answer():
    drawn = torch.stack([turns(3, collection, range(8), 50, 0.3) for collection in range(400)])  # (400, 8, 50)
    assert drawn[:, :4].equal(drawn[:, 4:])  # answer i is of group i % 4
    assert set(drawn[:, :4].sum(1).unique().tolist()) == {1, 2}  # of four groups 1.2
    one = drawn[:, 0].double()
    assert one.mean().item() == pytest.approx(0.3, abs=0.015)  # 0.003 is a standard error
    together = (one[:, 1:] * one[:, :-1]).mean().item()
    assert together == pytest.approx(0.09, abs=0.01)
    other = turns(3, 0, [6, 1], 20, 0.3)
    assert other.equal(drawn[0][[6, 1], :20])  # whatever the process and the length
    assert not turns(4, 0, range(8), 50, 0.3).equal(drawn[0])
    assert turns(0, 0, [0], 9, 1.0, 1).all() and not turns(0, 0, [0], 9, 0.0, 1).any()


# ---- models for inference -------------------------------------------------------------------------------------------

def logits(gpt, tokens):
    return gpt.logits(gpt(tokens))


def tokens_for(config, rows=3, length=7):
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_model_computes_what_autocast_does(dtype):
    gpt, m = random_gpt(), Machine(torch.device("cpu"), dtype)
    ready, tokens = frozen(gpt, dtype), tokens_for(gpt.config)
    with m.autocast(), torch.no_grad():
        assert torch.equal(logits(ready, tokens), logits(gpt, tokens))
        assert torch.equal(ready.head(), gpt.head()) and ready.head() is ready.head()
    assert ready.wte.weight.data_ptr() == gpt.wte.weight.data_ptr()  # shared, not copied
    shared = ready.h[0].attn.c_attn.weight.data_ptr() == gpt.h[0].attn.c_attn.weight.data_ptr()
    assert shared == (dtype == torch.float32)
    assert not any(p.requires_grad for p in ready.parameters()) and all(p.requires_grad for p in gpt.parameters())


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("rows", [1, 3])
def test_packed_weights_compute_the_same(rows, dtype, atol, monkeypatch):
    """Where a CPU can pack weights, a frozen model's log-probabilities are those of the plain one. Attention to a cache
    is float32 even under autocast, as in the plain one."""
    gpt, m = wide_pair()[0], Machine(torch.device("cpu"), dtype)
    if not packed.packs(dtype):
        return  # frozen() leaves the plain weights, and another test has them
    ready, tokens = frozen(gpt, dtype), tokens_for(gpt.config, rows)
    assert isinstance(ready.head(), PackedLinear) and isinstance(ready.h[1].up, PackedLinear)
    with m.autocast(), torch.no_grad():
        got, want = logits(ready, tokens).log_softmax(-1), logits(gpt, tokens).log_softmax(-1)
        cache, dtypes = KVCache(gpt.config, rows, tokens.size(1), m.device, dtype), set()

        def watched(*given, **more):
            y = sdpa(*given, **more)
            dtypes.add(y.dtype)
            return y

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        steps = [logits_of(ready, column[:, None], cache) for column in tokens.T]
    assert dtypes == {torch.float32}
    torch.testing.assert_close(got, want, atol=atol, rtol=0)
    torch.testing.assert_close(torch.stack(steps, 1), want, atol=atol, rtol=0)


def logits_of(gpt, column, cache):
    return gpt.logits(gpt(column, None, cache)[:, 0]).log_softmax(-1)


def test_weights_are_held_once():
    """Plain until several rows come, then packed, and never both."""
    if not packed.packs(torch.float32):
        return
    weight, bias, x = torch.randn(802, 256, generator=torch.Generator().manual_seed(0)).split([400, 400, 2])
    linear = PackedLinear(0.1 * weight, bias[:, 0].contiguous())
    one = linear(x[:1])
    assert linear.packed is None
    torch.testing.assert_close(linear(x)[:1], one)
    assert linear.weight is None and linear.packed is not None
    torch.testing.assert_close(linear(x[:1]), one)


def test_frozen_models_in_bfloat16_keep_the_log_probs_that_they_draw_from():
    m = Machine(torch.device("cpu"), torch.bfloat16)
    student, teacher = (frozen(gpt, m.dtype) for gpt in pair())
    rollout = decode.sample(student, PROMPTS, uniforms(0, range(5), 8), m, teacher, 0.2)
    assert rollout.student_logp.dtype == torch.float32 and rollout.teacher_hidden.dtype == torch.bfloat16
    with m.autocast():
        again = teacher.logits(rollout.teacher_hidden).log_softmax(-1)
        again = again.gather(-1, rollout.response[..., None]).squeeze(-1)
    torch.testing.assert_close(again[rollout.response_mask], rollout.teacher_logp[rollout.response_mask])


SCRIPT = """
import torch
from conftest import CPU
from config import Machine
from fast import decode, packed
from sample import uniforms
from test_fast import PROMPTS, wide_pair
assert packed.packs(torch.float32), "float32 needs no more than AVX2"
assert not packed.packs(torch.bfloat16), "this processor was to have AVX2 alone"
m = Machine(CPU.device, torch.bfloat16)
student, teacher = (decode.frozen(gpt, m.dtype) for gpt in wide_pair())
rollout = decode.sample(student, PROMPTS, uniforms(0, range(5), 8), m, teacher, 0.2)
assert rollout.response_mask.any()
"""


def test_bfloat16_runs_on_a_processor_with_avx2_alone():
    """oneDNN does not pack bfloat16 there; it asks for its instructions once, so this has a process of its own."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("no oneDNN, or no AVX2")
    tests = Path(__file__).parent
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
