"""The benchmark: it times what distill.py runs, and its floors are what a machine cannot go below."""

import json

import pytest
import torch
from conftest import refused

import bench

SMALL = dict(student="1x2x8", teacher="2x2x16", batch=2, prompt_tokens=4, response_tokens=3, sft_tokens=6, repeats=1,
             device="cpu", dtype="float32")


def test_every_part_prints_one_line(capsys):
    lines = bench.main(bench.Config(**SMALL))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[1:] == lines and [line["part"] for line in lines] == list(bench.PARTS)
    assert printed[0]["gflops"] > 0 and printed[0]["read_gb_per_s"] > 0
    assert all(line["seconds"] > 0 and line["share_of_floor"] >= 0 for line in lines[:-1])


def test_answers_are_of_full_length_and_an_update_moves_the_student(m):
    ours = bench.Ours(bench.Config(**SMALL), m)
    before = ours.student.wte.weight.clone()
    ours.cycle()
    assert ours.rollout.response_mask.all() and ours.rollout.response.shape == (2, 3)
    assert not torch.equal(ours.student.wte.weight, before)


def test_the_peer_runs_the_same_shapes():
    pytest.importorskip("transformers")
    parts = "sample_q,sample_mixed,cycle,sft"
    for line in bench.main(bench.Config(**SMALL, parts=parts, against="transformers")):
        assert line["against"] == "transformers" and line["ratio"] > 0


def test_the_floor_of_a_step_is_its_weights_read_once_or_its_products(m):
    cfg = bench.Config(**SMALL | dict(prompt_tokens=1))
    weights, head = 12 * 8 * 8, 50257 * 8
    by_reading = bench.floor(cfg, m, "sample_q", rate=1e30, bandwidth=4.0)
    assert by_reading == pytest.approx(3 * (weights + head))  # 4 bytes each, 3 steps
    by_products = bench.floor(cfg, m, "sample_q", rate=1.0, bandwidth=1e30)
    assert by_products == pytest.approx(2 * 2 * weights + 3 * 2 * 2 * (weights + head))


def test_flags_that_cannot_work():
    refused(lambda: bench.Config(parts="sample_q,rollout"), "--parts=sample_q,rollout", "'rollout'")
    refused(lambda: bench.Config(student="gpt2"), "'gpt2'", "12x12x768")
