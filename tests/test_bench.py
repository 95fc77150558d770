"""The benchmark: it times what distill.py runs, and its floors are what a machine cannot go below."""

import json
import multiprocessing
import os
import pickle
from multiprocessing.context import ForkContext
from types import SimpleNamespace

import pytest
import torch
from conftest import refused

import bench

SMALL = dict(student="1x2x8", teacher="2x2x16", batch=2, prompt_tokens=4, response_tokens="3", sft_tokens=6, repeats=1,
             rollouts=4, inner_epochs=2, pt_tokens=5, micro_batch=1, device="cpu", dtype="float32")


def test_a_part_prints_one_line_for_each_length_beside_its_peer(capfd, tmp_path, monkeypatch):
    """What it takes of the machine is taken once, and in half a second as it were; the processes are forks, which have
    imported everything: what a new one would be sent is looked at."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    figure = tmp_path / "growth.svg"
    several = dict(response_tokens="3,4", parts="cycle", pt_tokens=0, against="transformers", figure=str(figure))
    cfg, run, timed, fork = bench.Config(**SMALL | several), bench.Machine.seconds, set(), ForkContext()

    def seconds(m, function):
        if os.getpid() != here:  # of a side
            return run(m, function)
        if function.__code__ not in timed:
            timed.add(function.__code__)
            function()
        return 0.5

    def process(target, args, daemon):
        assert pickle.loads(pickle.dumps((target, args[:-1])))
        return fork.Process(target=target, args=args, daemon=daemon)

    here, asked = os.getpid(), []
    monkeypatch.setattr(bench.Machine, "seconds", seconds)
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda kind: asked.append(kind) or SimpleNamespace(
        Pipe=fork.Pipe, Process=process))
    lines = bench.main(cfg)
    printed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert printed[1:] == lines and [line["response_tokens"] for line in lines] == [3, 4]
    assert printed[0]["gflops"] == round(2 * 2048**3 / 0.5 / 1e9) and len(timed) == 2 and asked == ["spawn"] * 2
    assert printed[0]["read_gb_per_s"] == round(2**28 / 0.5 / 1e9, 1)
    for line in lines:
        assert line["seconds"] > 0 and line["ratio"] > 0 and line["peak_gib"] > 0 and line["peer_peak_gib"] > 0
        assert set(line["seconds_by_part"]) == {"decode", "gradient", "optimizer"}
    assert "response tokens" in figure.read_text()


@pytest.mark.parametrize("part", bench.PARTS)
def test_every_part_runs(m, part):
    ours = bench.Ours(bench.Config(**SMALL), m, 3)
    getattr(ours, part)()
    floor = bench.floor(ours.cfg, m, part, 3, rate=1.0, bandwidth=1.0)
    assert floor is None if part == "rouge" else floor > 0 and ours.spent


@pytest.mark.parametrize("part", bench.SIDES["transformers"][1])
def test_the_peer_runs_the_same_parts(m, part):
    pytest.importorskip("transformers")
    getattr(bench.Transformers(bench.Config(**SMALL), m, 3), part)()


def test_answers_are_of_full_length_and_an_update_moves_the_student(m):
    ours = bench.Ours(bench.Config(**SMALL), m, 3)
    before = ours.student.wte.weight.clone()
    ours.update()
    assert ours.rollout.response_mask.all() and ours.rollout.response.shape == (2, 3)
    assert not torch.equal(ours.student.wte.weight, before)


def test_a_collection_makes_its_returns_once_of_models_that_are_unsure(m, monkeypatch):
    made, future_reward = [], bench.distill.future_reward
    monkeypatch.setattr(bench.distill, "future_reward", lambda *given: made.append(future_reward(*given)) or made[-1])
    ours = bench.Ours(bench.Config(**SMALL), m, 3)
    ours.collection()
    assert [R.shape for R in made] == [(4, 3)]
    assert ours.q.wte.weight.std() == pytest.approx(0.02, rel=0.05)  # of 1, ratios of probabilities would be infinite


def test_of_a_turn_the_second_run_counts():
    ours, theirs = multiprocessing.Pipe()
    for seconds in (9.0, 2.0, 8.0):
        theirs.send(seconds)
    assert bench.second_run(ours) == 2.0
    assert [theirs.recv() for _ in range(2)] == [True, True] and not theirs.poll()


def test_the_floor_of_a_step_is_its_weights_read_once_or_its_products(m):
    cfg = bench.Config(**SMALL | dict(prompt_tokens=1))
    weights, head = 12 * 8 * 8, 50257 * 8
    by_reading = bench.floor(cfg, m, "sample_q", 3, rate=1e30, bandwidth=4.0)
    cache = 2 * 8 * 2 * (2 + 3)  # keys and values, their width, 2 rows; of 2 and 3 tokens in the second and third step
    assert by_reading == pytest.approx(3 * (weights + head) + cache)  # 4 bytes each, 3 steps
    by_products = bench.floor(cfg, m, "sample_q", 3, rate=1.0, bandwidth=1e30)
    assert by_products == pytest.approx(3 * 2 * 2 * (weights + head))
    longer = bench.floor(bench.Config(**SMALL), m, "sample_q", 3, rate=1.0, bandwidth=1e30)  # by 3 tokens of 2 prompts
    assert longer - by_products == pytest.approx(2 * 3 * 2 * 3 * 8 * 8)  # of which its one layer makes q, k and v


def test_the_floor_of_a_collection_is_that_of_its_decoding_and_its_updates(m):
    cfg = bench.Config(**SMALL)
    floor = lambda part: bench.floor(cfg, m, part, 3, rate=1.0, bandwidth=1.0)
    assert floor("collection") == pytest.approx(2 * floor("sample_mixed") + 2 * 2 * floor("update"))


def test_a_peer_that_is_not_there(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    cfg = bench.Config(**SMALL | dict(pt_tokens=0, against="trl"))
    refused(lambda: bench.main(cfg), "--against=trl", "pip install trl==1.14.2")


def test_flags_that_cannot_work(tmp_path):
    refused(lambda: bench.Config(parts="sample_q,rollout"), "--parts=sample_q,rollout", "'rollout'")
    refused(lambda: bench.Config(student="gpt2"), "'gpt2'", "12x12x768")
    refused(lambda: bench.Config(response_tokens="64,x"), "--response_tokens=64,x", "'x'")
    refused(lambda: bench.Config(response_tokens="1000"), "--response_tokens=1000", "960")
    refused(lambda: bench.Config(rollouts=12), "--rollouts=12", "--batch=8")
    refused(lambda: bench.Config(pt_tokens=1), "--pt_tokens=1")
    refused(lambda: bench.Config(pt_tokens=9, against="trl"), "--pt_tokens=9", "--against=trl")
    refused(lambda: bench.Config(**SMALL, capture=True), "--capture", "--turns=False")
    refused(lambda: bench.main(bench.Config(**SMALL, capture=True, turns=False)), "--capture", "on the CPU")
    refused(lambda: bench.Config(figure="growth.pdf"), "--figure=growth.pdf", ".svg")
    refused(lambda: bench.Config(against="nanogpt", nanogpt=str(tmp_path)), "--nanogpt", "model.py")
