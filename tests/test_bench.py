"""The benchmark: it times what distill.py runs, and its floors are what a machine cannot go below."""

import json
import mmap
import multiprocessing
import os
import pickle
from multiprocessing.context import ForkContext
from types import SimpleNamespace

import pytest
import torch
from conftest import refused

from tools import bench

SMALL = dict(student="1x2x8", teacher="2x2x16", batch=2, prompt_tokens=4, response_tokens="3", sft_tokens=6, repeats=1,
             rollouts=4, inner_epochs=2, pt_tokens=5, micro_batch=1, decoder="plain", device="cpu", dtype="float32")
RATE = dict(rate=1.0, bandwidth=1.0)


def small(**settings) -> bench.Config:
    return bench.Config(**SMALL | settings)


def test_a_part_prints_one_line_for_each_length_beside_its_peer(capfd, tmp_path, monkeypatch):
    """What it takes of the machine is taken once, and in half a second as it were; the processes are forks, which have
    imported everything: what a new one would be sent is looked at."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    figure = tmp_path / "growth.svg"
    cfg = small(response_tokens="3,4", parts="cycle", pt_tokens=0, against="transformers", figure=str(figure))
    run, timed, fork = bench.seconds, set(), ForkContext()

    def seconds(function, device):
        if os.getpid() != here:  # of a side
            return run(function, device)
        if function.__code__ not in timed:
            timed.add(function.__code__)
            function()
        return 0.5

    def process(target, args, daemon):
        assert pickle.loads(pickle.dumps((target, args[:-1])))
        return fork.Process(target=target, args=args, daemon=daemon)

    here, asked = os.getpid(), []
    monkeypatch.setattr(bench, "seconds", seconds)
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda kind: asked.append(kind) or SimpleNamespace(
        Pipe=fork.Pipe, Process=process))
    lines = bench.main(cfg)
    printed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert printed[1:] == lines and [line["response_tokens"] for line in lines] == [3, 4]
    assert printed[0]["gflops"] == round(2 * 2048**3 / 0.5 / 1e9) and len(timed) == 2 and asked == ["spawn"] * 2
    assert printed[0]["read_gb_per_s"] == round(2**28 / 0.5 / 1e9, 1)
    for line in lines:
        assert line["seconds"] > 0 and line["ratio"] > 0 and line["peak_gib"] > 0 and line["peer_peak_gib"] > 0
        assert set(line["seconds_by_part"]) == {"sample", "update"} and line["peer_dtype"] == "float32"
    assert "response tokens" in figure.read_text()


@pytest.mark.parametrize("part", bench.PARTS)
def test_every_part_runs(m, part):
    ours = bench.Ours(small(), m, 3)
    getattr(ours, part)()
    floor = bench.Floor(ours.cfg, 4, 3, **RATE).of(part)
    assert floor is None if part == "rouge" else floor > 0


@pytest.mark.parametrize("part", bench.SIDES["transformers"][1])
def test_the_peer_runs_the_same_parts(m, part):
    pytest.importorskip("transformers")
    getattr(bench.Transformers(small(), m, 3), part)()


def test_ctranslate2_draws_answers_of_full_length_from_the_whole_vocabulary(m, monkeypatch):
    """Of a model that would always end at once, and to which all other tokens are equally likely."""
    pytest.importorskip("transformers")
    pytest.importorskip("ctranslate2")
    peer = bench.CTranslate2(small(batch=50, rollouts=None), m, 3)
    model = peer.new("1x2x8")
    model.transformer.wte.weight.data.zero_()[50256] = 10.0
    torch.nn.init.ones_(model.transformer.ln_f.bias)
    monkeypatch.setattr(peer, "new", lambda shape: model)
    answers = [result.sequences_ids[0] for result in peer.generate(peer.q)]
    assert [len(answer) for answer in answers] == [3] * 50
    assert len({token for answer in answers for token in answer}) > 100


def test_ctranslate2_is_refused_a_dtype_that_it_lacks(m):
    pytest.importorskip("ctranslate2")
    cfg = small(pt_tokens=0, against="ctranslate2", peer_dtype="bfloat16")
    refused(lambda: bench.check_peer(cfg, m), "does not compute in bfloat16", "--peer_dtype=float32")
    bench.check_peer(small(pt_tokens=0, against="ctranslate2"), m)


def test_an_update_is_one_of_distill_py_s_and_answers_are_of_full_length(m, monkeypatch):
    """Both parts that update take algorithm_1's own steps: one after the other, from answers drawn once."""
    drawn, collect = [], bench.distill.collect
    monkeypatch.setattr(bench.distill, "collect", lambda *given: drawn.append(collect(*given)) or drawn[-1])
    ours = bench.Ours(small(), m, 3)
    before = ours.student.wte.weight.clone()
    ours.update()
    after = ours.student.wte.weight.clone()
    ours.update()
    assert not torch.equal(before, after) and not torch.equal(after, ours.student.wte.weight)
    assert len(drawn) == 1 and drawn[0].response_mask.all() and drawn[0].response.shape == (2, 3)
    ours.collection()
    assert len(drawn) == 2 and drawn[1].response.shape == (4, 3)
    assert ours.q.wte.weight.std() == pytest.approx(0.02, rel=0.05)  # of 1, ratios of probabilities would be infinite


def test_as_many_updates_are_at_hand_as_are_timed(m):
    ours = bench.Ours(small(), m, 3)
    lines = [next(ours.updates) for _ in range(2 * (bench.UNCOUNTED + 1))]
    assert [line["step"] for line in lines] == [2, 3, 4, 5] and not any(line["sample_seconds"] for line in lines)


def test_by_turns_all_answers_of_a_batch_are_decoded_together(m, monkeypatch):
    from fast import decode
    given, by_turns = [], decode.by_turns
    monkeypatch.setattr(decode, "by_turns", lambda *most, turn: given.append(turn) or by_turns(*most, turn=turn))
    bench.Ours(small(decoder="turns", batch=4), m, 30).sample_mixed()
    assert given[0].shape == (4, 30) and given[0].any() and (given[0] == given[0][0]).all()


def test_of_a_turn_the_second_run_counts():
    ours, theirs = multiprocessing.Pipe()
    for seconds in (9.0, 2.0, 8.0):
        theirs.send(seconds)
    assert bench.second_run(ours) == 2.0
    assert [theirs.recv() for _ in range(2)] == [True, True] and not theirs.poll()


def test_a_peak_of_memory_is_that_of_the_run_that_counts(m):
    with mmap.mmap(-1, 2**28) as big:  # which the allocator has no part in
        big.write(b"1" * 2**28)
    peak = bench.peak_gib(m.device)
    bench.forget_peak(m.device)
    assert bench.peak_gib(m.device) < peak - 0.2 or not os.access("/proc/self/clear_refs", os.W_OK)


def test_the_floor_of_a_step_is_its_weights_read_once_or_its_products():
    cfg = small(prompt_tokens=1)
    weights, head = 12 * 8 * 8, 50257 * 8
    by_reading = bench.Floor(cfg, 4, 3, rate=1e30, bandwidth=4.0).of("sample_q")
    cache = 2 * 8 * 2 * (2 + 3)  # keys and values, their width, 2 rows; of 2 and 3 tokens in the second and third step
    assert by_reading == pytest.approx(3 * (weights + head) + cache)  # 4 bytes each, 3 steps
    by_products = bench.Floor(cfg, 4, 3, rate=1.0, bandwidth=1e30).of("sample_q")
    assert by_products == pytest.approx(3 * 2 * 2 * (weights + head))
    longer = bench.Floor(small(), 4, 3, rate=1.0, bandwidth=1e30).of("sample_q")  # by 3 tokens of 2 prompts
    assert longer - by_products == pytest.approx(2 * 3 * 2 * 3 * 8 * 8)  # of which its one layer makes q, k and v


def test_by_turns_a_model_takes_its_share_of_the_steps():
    together, by_turns = (bench.Floor(small(decoder=kind, response_tokens="101"), 4, 101, 1e30, 1.0).of("sample_mixed")
                          for kind in ("fast", "turns"))
    assert by_turns < 0.6 * together  # the teacher, in a fifth of the steps, is the larger


def test_the_floor_of_a_collection_is_that_of_its_decoding_and_its_updates():
    floor = bench.Floor(small(), 4, 3, **RATE).of
    assert floor("collection") == pytest.approx(2 * floor("sample_mixed") + 2 * 2 * floor("update"))


def test_a_peer_that_is_not_there(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    refused(lambda: bench.main(small(pt_tokens=0, against="trl")), "--against=trl", "pip install trl==1.14.2")


def test_flags_that_cannot_work(tmp_path):
    refused(lambda: bench.Config(parts="sample_q,rollout"), "--parts=sample_q,rollout", "'rollout'")
    refused(lambda: bench.Config(student="gpt2"), "'gpt2'", "12x12x768")
    refused(lambda: bench.Config(response_tokens="64,x"), "--response_tokens=64,x", "'x'")
    refused(lambda: bench.Config(response_tokens="1000"), "--response_tokens=1000", "960")
    refused(lambda: bench.Config(rollouts=12), "--rollouts=12", "--batch=8")
    refused(lambda: bench.Config(pt_tokens=1), "--pt_tokens=1")
    refused(lambda: bench.Config(pt_tokens=9, against="trl"), "--pt_tokens=9", "--against=trl")
    refused(lambda: bench.Config(figure="growth.pdf"), "--figure=growth.pdf", ".svg")
    refused(lambda: bench.Config(against="nanogpt", nanogpt=str(tmp_path)), "--nanogpt", "model.py")
