"""What runs on a GPU against the same on the CPU. Collected only when asked for: pytest tests/test_gpu.py"""

import dataclasses
import math

import pytest
import torch
from conftest import CPU

import distill
import teacher as supervised
from config import machine
from data import Example, Row
from model import GPTConfig, frozen, new, trained
from sample import follow, sample, turns, uniforms

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

PROMPTS = [[1, 2, 3, 4, 5] * 24, [6] * 24, [7, 8, 9] * 24, [3, 1] * 24, [5, 5, 2, 9] * 24]  # of 24 to 120 tokens


@pytest.fixture
def m():
    return machine("cuda", "float32")


def gpt(seed, device):
    return new(GPTConfig(2, 2, 128, vocab_size=80, n_positions=200, eos_token_id=79, resid_pdrop=0.0), seed).to(device)


def models(device, dtype=torch.float32):
    return [frozen(gpt(seed, device), dtype) for seed in (0, 1)]


def draw(m, by_turns=False, dtype=torch.float32, capture=False):
    student, teacher = models(m.device, dtype)
    turn = turns(0, 0, range(5), 60, 0.3, 2) if by_turns else None
    return sample(student, PROMPTS, uniforms(4, range(5), 60), dataclasses.replace(m, capture=capture), teacher, 0.3, 5,
                  keep_hidden=True, turn=turn)


@pytest.mark.parametrize("by_turns", [False, True])
def test_it_says_what_the_cpu_says(m, by_turns):
    here, there = draw(CPU, by_turns), draw(m, by_turns)
    assert here.answers == there.answers
    for name in ("student_logp", "teacher_logp", "mixed_logp"):
        torch.testing.assert_close(getattr(here, name), getattr(there, name).cpu(), atol=1e-3, rtol=0)


def test_a_recorded_step_is_the_step(m):
    """Prompts of several lengths, rows that leave, recordings of 128 columns and of more."""
    plain, recorded = draw(m), draw(m, capture=True)
    assert plain.answers == recorded.answers and recorded.ended.equal(plain.ended)
    for name in ("student_logp", "teacher_logp", "mixed_logp", "reverse_kl"):
        torch.testing.assert_close(getattr(plain, name), getattr(recorded, name), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("way", ["plain", "by_turns", "capture"])
def test_what_it_notes_in_few_bits_is_what_one_pass_finds(dtype, way):
    m = machine("cuda", dtype)
    rollout, (student, teacher) = draw(m, way == "by_turns", m.dtype, way == "capture"), models(m.device, m.dtype)
    found, mask = follow(student, PROMPTS, rollout.answers, 60, m, teacher), rollout.response_mask
    for name in ("student_logp", "teacher_logp"):
        apart = (getattr(rollout, name) - getattr(found, name))[mask].abs()
        assert apart.mean() < 0.05 and apart.max() < 1


@pytest.mark.parametrize("dtype, off", [("float32", 1e-3), ("bfloat16", 0.05), ("float16", 0.05)])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_update_has_the_cpus_gradients(dtype, off, recompute):
    """Of the supervised loss, and of Eq. (7)."""
    rows, grads = [Example(Row(""), prompt[:5], [4, 3, 2, 79]) for prompt in PROMPTS], {}
    rollout = draw(CPU)
    for m in (CPU, machine("cuda", dtype)):
        student = trained(gpt(2, m.device), recompute, compile=False)
        optimizer, scaler = supervised.optimizer_of(student, m, (0.9, 0.95), 0.0)
        backward = lambda loss, scaler=scaler: scaler.scale(loss / 100).backward()
        supervised.answer_loss(student, rows, m, backward=backward)
        moved = dataclasses.replace(rollout, **{
            name: value.to(m.device) for name, value in vars(rollout).items() if isinstance(value, torch.Tensor)})
        distill.score(student, models(m.device, m.dtype)[1], moved, [0, 2, 4], torch.ones_like(moved.student_logp),
                      distill.Config(clip_eps=math.inf), m, backward)  # a ratio may lie at the edge
        scaler.unscale_(optimizer)
        grads[m.device.type] = torch.cat([p.grad.cpu().flatten() for p in student.parameters()])
    assert (grads["cpu"] - grads["cuda"]).norm() <= off * grads["cpu"].norm()


def test_what_does_not_fit_is_tried_with_half(m, capsys):
    def hungry(micro_batch):
        if micro_batch > 2:
            torch.empty(2**50, device=m.device)
        return "fits"

    assert supervised.fitting(hungry, 8, gpt(0, m.device)) == ("fits", 2)
    assert capsys.readouterr().out.count("out of memory") == 2


@pytest.mark.parametrize("more", [dict(capture=True), dict(turns=2), dict(dtype="bfloat16"), dict(dtype="float16")])
def test_phase_2_from_end_to_end(distill_config, more):
    cfg = distill_config(device="cuda", **more)
    assert distill.distil(cfg)["best"]["step"] in (0, 4)
