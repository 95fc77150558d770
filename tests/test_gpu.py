"""What runs on a GPU against the same on the CPU. Collected only when asked for: pytest tests/test_gpu.py"""

import dataclasses
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU

import distill
import eval as evaluation
import teacher as supervised
from config import Stopped, machine, make
from data import Example, Row, batch_of
from exercises import explain
from fast import decode
from fast.decode import frozen
from measure import exposure
from measure.calibration import label_probabilities
from model import GPTConfig, KVCache, new
from safe import runs
from sample import follow, uniforms
from tools import bench

pytestmark = pytest.mark.usefixtures("few_rows")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

HALF = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
PROMPTS = [[1, 2, 3, 4, 5] * 24, [6] * 24, [7, 8, 9] * 24, [3, 1] * 24, [5, 5, 2, 9] * 24]  # of 24 to 120 tokens


@pytest.fixture
def m():
    return machine("cuda", "float32")


def gpt(seed, device):
    return new(GPTConfig(2, 2, 128, vocab_size=80, n_positions=200, eos_token_id=79, embd_pdrop=0.0, attn_pdrop=0.0,
                         resid_pdrop=0.0), seed).to(device)


def models(device, dtype=torch.float32):
    return [frozen(gpt(seed, device), dtype) for seed in (0, 1)]


def draw(m, way="sample"):
    """A rollout by decode.sample, captured or by_turns."""
    student, teacher = models(m.device, m.dtype)
    more = {"turn": decode.turns(0, 0, range(5), 60, 0.3, 2)} if way == "by_turns" else {}
    return getattr(decode, way)(student, PROMPTS, uniforms(4, range(5), 60), m, teacher, 0.3, **more)


@pytest.mark.parametrize("way", ["sample", "by_turns"])
def test_it_says_what_the_cpu_says(m, way):
    here, there = draw(CPU, way), draw(m, way)
    assert here.answers == there.answers
    for name in ("student_logp", "teacher_logp", "mixed_logp"):
        torch.testing.assert_close(getattr(here, name), getattr(there, name).cpu(), atol=1e-3, rtol=0)


def test_a_recorded_step_is_the_step(m, monkeypatch):
    """Prompts of several lengths, rows that leave, recordings of 128 columns and of more."""
    recordings, caches, record, new_cache = [], [], decode.record, KVCache.__init__
    monkeypatch.setattr(decode, "record", lambda step: recordings.append(1) or record(step))
    monkeypatch.setattr(KVCache, "__init__",
                        lambda self, *given: caches.append(weakref.ref(self)) or new_cache(self, *given))
    gc.disable()
    try:
        plain, recorded = draw(m), draw(m, "captured")
        assert len(caches) == 4 and not any(cache() for cache in caches)  # let go of at once
    finally:
        gc.enable()
    assert 3 <= len(recordings) <= 6  # of 5 rows and of fewer, of 128 columns and of more; not of 60 steps
    assert plain.answers == recorded.answers and recorded.ended.equal(plain.ended)
    mask = plain.response_mask
    for name in ("student_logp", "teacher_logp", "mixed_logp", "teacher_hidden"):
        torch.testing.assert_close(getattr(plain, name)[mask], getattr(recorded, name)[mask], atol=1e-3, rtol=0)


def test_a_recorded_prompt_of_one_token(m):
    """Its place, too, is read from the tensor; and one model alone is recorded as two are."""
    student, uniform = models(m.device)[0], uniforms(0, range(3), 9)
    plain, recorded = (function(student, [[1], [2], [3]], uniform, m) for function in (decode.sample, decode.captured))
    assert plain.answers == recorded.answers
    torch.testing.assert_close(plain.student_logp, recorded.student_logp, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", sorted({HALF, "float16"}))
@pytest.mark.parametrize("way", ["sample", "by_turns", "captured"])
def test_what_it_notes_in_few_bits_is_what_one_pass_finds(dtype, way):
    m = machine("cuda", dtype)
    rollout, (student, teacher) = draw(m, way), models(m.device, m.dtype)
    found, mask = follow(student, PROMPTS, rollout.answers, 60, m, teacher), rollout.response_mask
    for name in ("student_logp", "teacher_logp"):
        apart = (getattr(rollout, name) - getattr(found, name))[mask].abs()
        assert apart.mean() < 0.05 and apart.max() < 1


def after_an_update(m, recompute, rollout, monkeypatch):
    """What the supervised loss, and then an update of Eq. (7) by plain gradient descent, do to the weights."""
    # a ratio may lie at an edge of a clip
    cfg = distill.Config(clip_eps=math.inf, lr=1.0, steps=1, rollouts=5, minibatch=5, inner_epochs=1, pt_coef=0.0,
                         max_prompt_tokens=120, max_tokens=180, micro_batch=2, recompute=recompute)
    student, teacher = supervised.trained(gpt(2, m.device), cfg, m), models(m.device, m.dtype)[1]
    examples = [Example(Row(""), prompt[:5], [4, 3, 2, 79]) for prompt in PROMPTS]
    moved = {name: value.to(m.device) for name, value in vars(rollout).items() if isinstance(value, torch.Tensor)}
    monkeypatch.setattr(distill, "collect", lambda *given: dataclasses.replace(rollout, **moved))
    scaler = supervised.optimizer_of(student, m, (0.9, 0.95), 0.0)[1]
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    supervised.add_gradient(student, batch_of(examples, m.device), 20, m, scaler)
    supervised.clip_gradient(student, optimizer, scaler, m, largest=math.inf)
    found = torch.cat([p.grad.cpu().flatten() for p in student.parameters()])
    optimizer.zero_grad(set_to_none=True)
    scaler.update()
    before = torch.cat([p.detach().cpu().flatten() for p in student.parameters()])
    next(distill.algorithm_1(student, teacher, examples, [], optimizer, scaler, cfg, m, 0))
    return found, torch.cat([p.detach().cpu().flatten() for p in student.parameters()]) - before


@pytest.mark.parametrize("dtype, off", sorted({("float32", 1e-3), (HALF, 0.05), ("float16", 0.05)}))
@pytest.mark.parametrize("recompute", [False, True])
def test_an_update_has_the_cpus_gradients(dtype, off, recompute, monkeypatch):
    rollout = draw(CPU)
    here = after_an_update(CPU, recompute, rollout, monkeypatch)
    there = after_an_update(machine("cuda", dtype), recompute, rollout, monkeypatch)
    for ours, theirs in zip(here, there):
        assert (ours - theirs).norm() <= off * ours.norm() > 0


def test_what_does_not_fit_is_tried_with_half(m, capsys):
    @dataclasses.dataclass
    class Config:
        micro_batch: int
        resume: bool = False

    def hungry(cfg, stop):
        if cfg.micro_batch > 2:
            torch.empty(2**50, device=m.device)
        return cfg

    assert runs.within_memory(hungry, Config(8), None) == Config(2, resume=True)
    assert capsys.readouterr().out.count("out of memory") == 2


@pytest.mark.parametrize("more", [dict(decoder="captured", dtype=HALF), dict(
    decoder="turns", dtype="float16", recompute=True, pt_kd=0.5, weight="exact")], ids=["captured", "turns"])
def test_phase_2_from_end_to_end(distill_config, more):
    """With its plan before, and the final evaluation."""
    rows = distill.main(distill_config(device="cuda", sample_batch=16, plan="auto", **more))
    assert len(rows) == 3 and all(math.isfinite(row["loss"]) and math.isfinite(row["reverse_kl"]) for row in rows)


def test_a_stopped_run_goes_on_from_its_state(distill_config, tmp_path, monkeypatch):
    """The optimiser's moments return to the GPU, and the scaler's factor."""
    settings, asked = dict(device="cuda", dtype="float16", steps=8), iter([False, True])

    def end(m, message):
        raise Stopped(2, message)

    with pytest.raises(Stopped):
        distill.distil(distill_config(**settings), SimpleNamespace(asked=lambda m: next(asked), end=end))
    state = torch.load(tmp_path / "run" / "minillm" / "state.pt", map_location="cpu", weights_only=True)
    load_state, seen = runs.load_state, []

    def load_and_look(out, cfg, student, optimizer, scaler, m):
        loaded = load_state(out, cfg, student, optimizer, scaler, m)
        for number, saved in state["optimizer"]["state"].items():
            for name, value in optimizer.state_dict()["state"][number].items():
                assert value.device == m.device and torch.equal(value.cpu(), saved[name])
                seen.append(name)
        assert scaler.state_dict() == state["scaler"] != {}
        return loaded

    monkeypatch.setattr(runs, "load_state", load_and_look)
    assert distill.distil(distill_config(**settings, resume=True))["best"] and {"exp_avg", "exp_avg_sq"} < set(seen)


def test_an_update_explained(distill_config, capsys):
    explain.show(explain.explain(distill_config(device="cuda")))
    assert "An update divides" in capsys.readouterr().out


def test_commands_find_what_they_find_on_the_cpu(tiny_models, tmp_path):
    """KD, metrics with a teacher, exposure bias, probabilities of labels."""
    found, both = {}, dict(model=tiny_models["student"], teacher=tiny_models["teacher"], dtype="float32")
    for device in ("cpu", "cuda"):
        few, m = both | dict(device=device, limit=4, max_response_tokens=6), machine(device, "float32")
        taught = supervised.main(make(supervised.Config, both | dict(
            device=device, data="tiny", out=str(tmp_path / device), updates=2, evals=1, batch_size=6, micro_batch=4,
            max_prompt_tokens=16, max_tokens=44), supervised.presets))
        scores = evaluation.main(evaluation.Config(**few, seeds=2))["scores"]
        labels = label_probabilities(models(m.device)[0], PROMPTS, [[1], [2, 3]], m)
        found[device] = [taught["best"]["loss"], *scores["loss"], *scores["reverse_kl"], *scores["forward_kl"],
                         *exposure.main(exposure.Config(**few, samples=2))["R"], *labels.flatten()]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)


@pytest.mark.parametrize("part", bench.PARTS)
@pytest.mark.parametrize("decoder", ["turns", "captured"])
def test_every_part_of_the_benchmark_runs(part, decoder):
    ours = bench.Ours(bench.Config(student="1x2x8", teacher="2x2x16", batch=2, rollouts=4, device="cuda",
                                   decoder=decoder), machine("cuda", HALF), 3)
    getattr(ours, part)()
