"""The plan: what it adds up from steps measured on one and two layers, and the shapes it counts bytes by."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import random_gpt, refused

import distill
import plan
from config import Machine
from model import GPTConfig, frozen, new_config, save
from plan import Measured, decode_bytes, frozen_bytes, measure

pytestmark = pytest.mark.usefixtures("few_rows")
COST = Measured(layer=2.0, output=3.0, layer_forward=0.5, layer_bytes=10.0, step_layer=0.1, step_output=0.2,
                update_layer=0.3, update_output=0.4)


def test_a_cost_grows_with_layers_samples_and_tokens():
    assert COST.train(layers=4, samples=5, tokens=7, predicted=2, recompute=False) == 5 * (7 * 4 * 2.0 + 2 * 3.0)
    assert COST.train(layers=4, samples=5, tokens=7, predicted=2, recompute=True) == 5 * (7 * 4 * 2.5 + 2 * 3.0)
    assert COST.judge(layers=4, samples=5, tokens=7, predicted=2) == 5 * (7 * 4 * 0.5 + 2 * 3.0 / 3)
    assert COST.step(4) == 4 * 0.1 + 0.2 and COST.update(4) == 4 * 0.3 + 0.4


def test_a_layer_is_told_from_the_rest_by_one_more(m, monkeypatch):
    layers = lambda config, *settings: [n * config.n_layer + n / 2 for n in (1.0, 2.0, 3.0, 4.0, 5.0)]
    monkeypatch.setattr(plan, "measure_layers", layers)
    cost = measure(GPTConfig(7, 2, 16, 50, 64), m, rows=4, length=5, sample_batch=4)
    assert cost == Measured(layer=1 / 20, output=0.5 / 16, layer_forward=2 / 20, layer_bytes=3 / 5, step_layer=4.0,
                            step_output=2.0, update_layer=5.0, update_output=2.5)


def test_what_is_measured_predicts_all_it_can_and_activations_are_those_of_a_layer(m, monkeypatch):
    timed, answer_loss = [], plan.supervised.answer_loss
    monkeypatch.setattr(plan.supervised, "answer_loss",
                        lambda model, batch, *more, **by: timed.extend(batch) or answer_loss(model, batch, *more, **by))
    cost = measure(GPTConfig(2, 2, 16, 50, 64), m, rows=4, length=32, sample_batch=4)
    assert {(len(e.prompt), len(e.response)) for e in timed} == {(1, 31)}
    # float32 kept for the backward pass of a layer: of width D at least the inputs of its 2 norms and 4 matrices
    # (D, D, D, D, D, 4D) and q, k, v; at most a score for each of 32 tokens and 2 heads besides
    assert 4 * (5 + 4 + 3) * 16 <= cost.layer_bytes <= 4 * (40 * 16 + 2 * 32)


def test_recomputed_layers_leave_their_inputs_and_one_layer_s_activations(m):
    config = GPTConfig(5, 2, 16, 50, 64)
    kept, again = (plan.update_bytes(config, COST, m, 2, 8, recompute) for recompute in (False, True))
    assert kept - again == 2 * 8 * (5 * 10.0 - (5 * 16 * 4 + 10.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_are_counted_by_the_token_and_weights_are_not(dtype):
    """Autocast's copies of the matrices are saved for the backward pass too, but are as large for one token."""
    m, config = Machine(torch.device("cpu"), dtype), GPTConfig(2, 2, 128, 50, 300, resid_pdrop=0.0)
    short, long = (measure(config, m, 2, length, 2).layer_bytes for length in (32, 256))
    assert short == pytest.approx(long, rel=0.1)


def test_the_bytes_of_a_frozen_model_are_those_it_holds():
    gpt = random_gpt(n_embd=32, vocab_size=300)
    for dtype in (torch.float32, torch.bfloat16):
        light = frozen(gpt, dtype)
        held = [*light.parameters()] + [light.frozen_head] * (light.frozen_head is not None)
        actual = sum(tensor.nbytes for tensor in held)
        assert abs(frozen_bytes(gpt.config, Machine(torch.device("cpu"), dtype)) / actual - 1) < 0.02  # biases, norms


def test_the_bytes_of_decoding_hold_both_caches(m):
    config = GPTConfig(2, 2, 16, 50, 64)
    one, two = decode_bytes([config], m, rows=3, tokens=20), decode_bytes([config, config], m, rows=3, tokens=20)
    assert two - one == 2 * 2 * 16 * 3 * 20 * 4  # layers, keys and values, width, rows, tokens, float32


def test_what_a_later_stage_would_stumble_over_is_told_first(distill_config, tmp_path, tiny_models, m, monkeypatch):
    draft = lambda **settings: plan.Draft(distill_config(**settings), [], m)
    refused(lambda: draft(corpus="nowhere.txt"), "nowhere.txt", "no such .txt file")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: draft(corpus="openwebtext"), "pip install pyarrow", "--pt_coef=0")
    refused(lambda: draft(max_tokens=100), "--max_tokens=100", "64 positions")
    (tmp_path / "bad.jsonl").write_text("{")
    monkeypatch.setattr(plan.data, "tokenizer_for", None)  # no vocabulary is fetched before that is told
    refused(lambda: draft(data=str(tmp_path / "bad.jsonl"), student="1x2x8"), "bad.jsonl:1: not JSON")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: draft(student="out/no/such/folder"), "out/no/such/folder")
    save(random_gpt(vocab_size=77, eos_token_id=76, n_positions=64), tmp_path / "other")
    refused(lambda: draft(teacher=str(tmp_path / "other")), "the teacher has 77 tokens", "one vocabulary")
    draft(corpus="openwebtext", pt_coef=0.0)


def test_memory_is_shared_by_the_processes_of_one_machine(capsys, monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda m: 2**30)
    monkeypatch.setattr(Machine, "max", lambda self, tensor: None)
    line = plan.Line("minillm", "", 1, 0.6 * 2**30, 1.0)
    plan.show([line], Machine(torch.device("cpu"), torch.float32), "", False)
    alone = Machine(torch.device("cpu"), torch.float32, rank=0, world=2)
    refused(lambda: plan.show([line], alone, "", False), "minillm needs about 0.6 GiB and 0.5 are free")
    plan.show([line], alone, "", ignore_memory=True)


def test_a_stage_that_is_done_is_not_planned_again(distill_config, tmp_path, m):
    work, cfg = distill.stages(distill_config(teacher="1x2x12", student="1x2x8", baselines="sft,seqkd"))
    stages = lambda: [line.stage for line in plan.Draft(cfg, work, m).lines()]
    assert stages() == ["teacher", "init", "sft", "answers", "seqkd", "minillm", "evaluate"]
    for name in ("teacher", "minillm"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "results.json").write_text("{}")
    (tmp_path / "run" / "answers.jsonl").write_text("")
    assert stages() == ["init", "sft", "seqkd", "evaluate"]


def test_models_that_do_not_exist_yet_have_the_shape_they_will_have(distill_config, m):
    work, cfg = distill.stages(distill_config(teacher="1x2x12", student="1x2x8"))
    draft = plan.Draft(cfg, work, m)
    assert cfg.student.endswith("init") and draft.root(cfg.student) == "1x2x8"
    assert draft.shape(cfg.student)[0] == new_config("1x2x8", draft.tokenizer)


@pytest.mark.parametrize("world, batches", [(1, 3), (3, 1), (2, 3), (6, 1)])
def test_taking_turns_costs_each_model_its_share_of_steps_and_a_pass_over_the_rest(world, batches, distill_config, m):
    """60 answers in 3 groups: processes may own a part of each group, or one group alone."""
    m = replace(m, world=world)
    draft = plan.Draft(distill_config(rollouts=60, minibatch=60, turns=3, sample_batch=64, mix_alpha=0.25), [], m)
    draft.shape, draft.longest = lambda name: (GPTConfig(4 if name == draft.cfg.teacher else 2), COST), 8
    of_student = 6 * batches * COST.step(2) + COST.judge(2, 60 / world, 2, 2)  # 6 of 8 tokens are its own
    of_teacher = 2 * batches * COST.step(4) + COST.judge(4, 60 / world, 6, 6)
    assert draft.take_turns(60) == pytest.approx(of_student + of_teacher)


def test_comparing_decodes_with_one_model_and_reads_once_with_both(distill_config, m):
    draft = plan.Draft(distill_config(sample_batch=20, max_tokens=40), [], m)
    draft.shape, draft.longest = lambda name: (GPTConfig({"q": 2, "p": 4}[name]), COST), 8
    of_two = 3 * 8 * COST.step(2) + COST.judge(2, 50, 40, 8) + COST.judge(4, 50, 40, 8)  # the third batch is of 10
    assert draft.compare(["q", "p"], 50, 7) == pytest.approx(7 * of_two)
    assert draft.compare(["q"], 50, 1) == pytest.approx(3 * 8 * COST.step(2))


def test_small_collections_are_not_decoded_together(distill_config, m):
    """Four collections of 24 answers, of which each of two processes decodes its 12 at once."""
    draft = plan.Draft(distill_config(sample_batch=20), [], replace(m, world=2))
    draft.shape, draft.longest = lambda name: (GPTConfig(2), COST), 8
    assert draft.decode(["q", "p"], 4 * 24, 24) == pytest.approx(4 * 8 * 2 * COST.step(2))


def test_every_pair_on_one_to_eight_devices(distill_config, monkeypatch, capsys, tmp_path):
    """Of small shapes: six pairs, and twice the devices take half the time; a larger teacher takes more memory."""
    small = {f"s{n}": GPTConfig(2, 2, 16 * n, 90, 64) for n in (1, 2, 3)}
    monkeypatch.setattr(plan, "GPT2S", small)
    cfg = distill_config(plan_pairs=True, rollouts=64, minibatch=64)
    assert distill.main(cfg) == [] and not (tmp_path / "run" / "minillm").exists()
    printed = capsys.readouterr().out
    assert printed.count(" GiB ") == 6 * 4 and "extrapolated" in printed
    work, other = distill.stages(cfg)
    found = plan.pairs(plan.Draft(other, work, Machine(torch.device("cpu"), torch.float32)))
    lines = {(teacher, student): lines for teacher, student, lines in found}
    assert len(lines) == 6 and set(lines) >= {("s3", "s1"), ("s1", "s1")} and ("s1", "s3") not in lines
    assert lines["s3", "s1"][0].bytes > lines["s1", "s1"][0].bytes
    for of in lines.values():
        assert of[0].bytes >= of[3].bytes and of[0].seconds > of[1].seconds > of[3].seconds
