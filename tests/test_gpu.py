"""What runs on a GPU against the same on the CPU. Collected only when asked for: pytest tests/test_gpu.py"""

import dataclasses
import gc
import math
import weakref
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU

import bench
import distill
import eval as evaluation
import exposure
import sample as sampling
import teacher as supervised
from calibration import label_probabilities
from config import Machine, Stopped, machine, make
from data import Example, Row
from model import GPTConfig, frozen, new, trained
from sample import follow, sample, turns, uniforms

pytestmark = pytest.mark.usefixtures("few_rows")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

HALF = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
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


def test_a_recorded_step_is_the_step(m, monkeypatch):
    """Prompts of several lengths, rows that leave, recordings of 128 columns and of more."""
    recordings, caches, record, new_cache = [], [], sampling.record, sampling.KVCache.__init__
    monkeypatch.setattr(sampling, "record", lambda step: recordings.append(1) or record(step))
    monkeypatch.setattr(sampling.KVCache, "__init__",
                        lambda self, *given: caches.append(weakref.ref(self)) or new_cache(self, *given))
    gc.disable()
    try:
        plain, recorded = draw(m), draw(m, capture=True)
        assert len(caches) == 4 and not any(cache() for cache in caches)  # let go of at once
    finally:
        gc.enable()
    assert 3 <= len(recordings) <= 6  # of 5 rows and of fewer, of 128 columns and of more; not of 60 steps
    assert plain.answers == recorded.answers and recorded.ended.equal(plain.ended)
    mask = plain.response_mask
    for name in ("student_logp", "teacher_logp", "mixed_logp", "teacher_hidden"):
        torch.testing.assert_close(getattr(plain, name)[mask], getattr(recorded, name)[mask], atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", sorted({HALF, "float16"}))
@pytest.mark.parametrize("way", ["plain", "by_turns", "capture"])
def test_what_it_notes_in_few_bits_is_what_one_pass_finds(dtype, way):
    m = machine("cuda", dtype)
    rollout, (student, teacher) = draw(m, way == "by_turns", m.dtype, way == "capture"), models(m.device, m.dtype)
    found, mask = follow(student, PROMPTS, rollout.answers, 60, m, teacher), rollout.response_mask
    for name in ("student_logp", "teacher_logp"):
        apart = (getattr(rollout, name) - getattr(found, name))[mask].abs()
        assert apart.mean() < 0.05 and apart.max() < 1


@pytest.mark.parametrize("dtype, off", sorted({("float32", 1e-3), (HALF, 0.05), ("float16", 0.05)}))
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


@pytest.mark.parametrize("more", [dict(capture=True, dtype=HALF), dict(
    turns=2, dtype="float16", recompute=True, pt_kd=0.5, weight="exact")], ids=["capture", "turns"])
def test_phase_2_from_end_to_end(distill_config, more, monkeypatch):
    """With its plan before, which here measures each thing once, and the final evaluation."""
    seconds = lru_cache(maxsize=1)(Machine.seconds)
    monkeypatch.setattr(Machine, "seconds", lambda m, function: seconds(m, function))
    rows = distill.main(distill_config(device="cuda", sample_batch=16, **more))
    assert len(rows) == 3 and all(math.isfinite(row["loss"]) and math.isfinite(row["reverse_kl"]) for row in rows)


def test_a_stopped_run_goes_on_from_its_state(distill_config, tmp_path, monkeypatch):
    """The optimiser's moments return to the GPU, and the scaler's factor."""
    settings, asked = dict(device="cuda", dtype="float16", steps=8), iter([False, True])
    with pytest.raises(Stopped):
        distill.distil(distill_config(**settings), SimpleNamespace(asked=lambda m: next(asked), signum=2))
    state = torch.load(tmp_path / "run" / "minillm" / "state.pt", map_location="cpu", weights_only=True)
    load_state, seen = supervised.load_state, []

    def load_and_look(out, cfg, student, optimizer, scaler, m):
        loaded = load_state(out, cfg, student, optimizer, scaler, m)
        for number, saved in state["optimizer"]["state"].items():
            for name, value in optimizer.state_dict()["state"][number].items():
                assert value.device == m.device and torch.equal(value.cpu(), saved[name])
                seen.append(name)
        assert scaler.state_dict() == state["scaler"] != {}
        return loaded

    monkeypatch.setattr(supervised, "load_state", load_and_look)
    assert distill.distil(distill_config(**settings, resume=True))["best"] and {"exp_avg", "exp_avg_sq"} < set(seen)


def test_an_update_explained(distill_config, capsys):
    distill.main(distill_config(device="cuda", explain=True))
    assert "An update divides" in capsys.readouterr().out


def test_commands_find_what_they_find_on_the_cpu(tiny_models, tmp_path):
    """KD, metrics with a teacher, exposure bias, probabilities of labels."""
    found, both = {}, dict(model=tiny_models["student"], teacher=tiny_models["teacher"], dtype="float32")
    for device in ("cpu", "cuda"):
        few, m = both | dict(device=device, limit=4, max_response_tokens=6), machine(device, "float32")
        taught = supervised.main(make(supervised.Config, both | dict(
            device=device, data="tiny", out=str(tmp_path / device), updates=2, evals=1, batch_size=6, micro_batch=4,
            valid_limit=5, max_prompt_tokens=16, max_tokens=44), supervised.presets))
        scores = evaluation.main(evaluation.Config(**few, seeds=2))["scores"]
        labels = label_probabilities(models(m.device)[0], PROMPTS, [[1], [2, 3]], m)
        found[device] = [taught["best"]["loss"], *scores["loss"], *scores["reverse_kl"], *scores["forward_kl"],
                         *exposure.main(exposure.Config(**few, samples=2))["R"], *labels.flatten()]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)


@pytest.mark.parametrize("part", bench.PARTS)
@pytest.mark.parametrize("how", [dict(turns=True), dict(turns=False, capture=True)], ids=str)
def test_every_part_of_the_benchmark_runs(part, how):
    ours = bench.Ours(bench.Config(student="1x2x8", teacher="2x2x16", batch=2, rollouts=4, device="cuda", **how),
                      machine("cuda", HALF, capture=how.get("capture", False)), 3)
    getattr(ours, part)()
    assert ours.spent or part == "rouge"
