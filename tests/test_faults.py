"""Runs that are stopped, killed, or started twice: either they go on to the same bits, or one line says what to do.

MINILLM_KILLS=50 pytest tests/test_faults.py kills fifty times instead of three."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import lines, random_gpt, refused, weights

import config
import data
import distill
import teacher as supervised
from config import Stopped, UserError, make
from model import load, save
from safe import runs
from safe.hub import intact, read_torch
from tools import plan, stages
from tools.plan import measure

pytestmark = pytest.mark.usefixtures("few_rows")
KILLS = int(os.environ.get("MINILLM_KILLS", 3))
# every stage of the built-in world at a few updates
SMALL = dict(preset="tiny", teacher="1x2x12", student="1x2x8", baselines="seqkd", steps=8, rollouts=8, minibatch=4,
             inner_epochs=2, eval_every=4, max_tokens=24, device="cpu")


def shorten(monkeypatch) -> None:
    """Few updates, and a plan by costs that are not measured."""
    monkeypatch.setattr(plan, "measure", lambda *given: plan.Measured(*[1e-6] * 8))
    for name in ("TINY_TEACHER", "TINY_INIT", "TINY_BASELINE"):
        few = dict(evals=2) | (dict(updates=6) if name != "TINY_BASELINE" else {})
        monkeypatch.setattr(stages, name, getattr(stages, name) | few)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A function that makes a Config of a small run in tmp_path / "run"."""
    shorten(monkeypatch)
    return lambda **settings: make(distill.Config, SMALL | dict(out=str(tmp_path / "run")) | settings, distill.presets)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_rows):
    """The folder of the small run, uninterrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        distill.main(make(distill.Config, SMALL | dict(out=str(out)), distill.presets))
    return out


def same_bits(out, whole, *stages: str) -> None:
    for stage in stages:
        there = weights(out / stage)
        assert all(torch.equal(tensor, there[name]) for name, tensor in weights(whole / stage).items()), stage


def signal_at(monkeypatch, module, step: int, *signums: int) -> None:
    """Sends this process signals when a line for this step is logged by `module`."""
    log = runs.log

    def logging(out, m, line):
        log(out, m, line)
        if line["step"] == step and ("loss_single" in line) == (module is distill):
            for signum in signums:
                os.kill(os.getpid(), signum)

    monkeypatch.setattr(runs, "log", logging)


def test_a_finished_run_can_be_made_longer(small, tmp_path, capsys):
    """With all that depends on the number of updates, to the same bits, for phase 2 has no schedule that ends."""
    whole = small(steps=8, out=str(tmp_path / "whole"), baselines="sft")
    distill.main(whole)
    distill.main(small(steps=4, baselines="sft"))
    refused(lambda: distill.main(small(steps=8, baselines="sft")), "made with updates=4, and now it is 8", "--resume")
    capsys.readouterr()
    table = distill.main(small(steps=8, baselines="sft", resume=True))
    said = capsys.readouterr().out
    assert said.count("goes on for more updates") == 2 and "run/teacher: finished earlier, kept" in said
    assert len(lines(tmp_path / "run" / "minillm")) > 8 and len(table) == 4
    there, here = (weights(tmp_path / run / "minillm") for run in ("whole", "run"))
    assert all(torch.equal(there[name], here[name]) for name in there)
    assert distill.main(small(steps=8, baselines="sft")) == table
    refused(lambda: distill.main(small(steps=4, baselines="sft", resume=True)), "made with updates=8, and now it is 4")
    cfg = small(steps=6, baselines="", out=str(tmp_path / "odd"))
    distill.main(cfg)
    distill.main(dataclasses.replace(cfg, steps=8, resume=True))  # 6 is no multiple of a collection's 4 updates
    updates = [line["step"] for line in lines(tmp_path / "odd" / "minillm") if "loss_single" in line]
    assert updates == [*range(1, 9)]
    (tmp_path / "run" / "minillm" / "state.pt").unlink()
    refused(lambda: distill.main(small(steps=16, baselines="", resume=True)), "there is no state.pt")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(signum, small, finished, tmp_path, monkeypatch, capsys):
    """The teacher's second update is then its last; in phase 2 what was sampled is used up first, in four updates."""
    cfg = small(baselines="", eval_every=8)  # no validation would save where it stops
    for module, step, stage, saved in ((supervised, 2, "teacher", 2), (distill, 2, "minillm", 4)):
        with monkeypatch.context() as patch:
            signal_at(patch, module, step, signum)
            with pytest.raises(Stopped, match=f"{stage}: stopped and saved after update {saved}") as stopped:
                distill.main(dataclasses.replace(cfg, resume=True))
        assert read_torch(tmp_path / "run" / stage / "state.pt")["step"] == saved
        assert stopped.value.signum == signum and "--resume" in str(stopped.value)
        assert "a second one stops at once" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    distill.main(dataclasses.replace(cfg, resume=True))
    same_bits(tmp_path / "run", finished, "teacher", "init", "minillm")


def test_a_second_signal_stops_at_once(small, monkeypatch):
    signal_at(monkeypatch, distill, 2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        distill.main(small(baselines=""))
    assert "saved" not in str(stopped.value)
    monkeypatch.undo()


def test_a_signal_that_another_process_had_is_not_ones_own(monkeypatch):
    """The first signal of this process then is no second one: it is saving, and goes on."""
    class Both:
        device = torch.device("cpu")

        def max(self, tensor):
            tensor.fill_(signal.SIGTERM)

    with pytest.raises(Stopped), runs.Stop("soon") as stop:
        assert stop.asked(Both())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        saved = True
    assert saved


def test_a_signal_in_the_last_update_is_not_forgotten(small, monkeypatch):
    """All of phase 2 is done and kept, but the evaluation behind it does not begin."""
    signal_at(monkeypatch, distill, 8, signal.SIGTERM)
    cfg = small(baselines="")
    with pytest.raises(Stopped):
        distill.main(cfg)
    assert os.path.isfile(f"{cfg.out}/minillm/results.json") and not os.path.exists(f"{cfg.out}/test")


def test_the_exit_code_is_the_signals(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eval.py"])
    for signum, fault in ((signal.SIGTERM, None), (signal.SIGINT, KeyboardInterrupt)):
        def main(cfg, fault=fault):
            if fault:
                raise fault
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

        with pytest.raises(SystemExit) as ended:
            config.run(main, dataclasses.make_dataclass("Config", [], frozen=True))
        assert ended.value.code == 128 + signum and capsys.readouterr().err == f"eval.py: stopped ({signum.name})\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_one_folder_by_two_names_is_one_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with runs.held(tmp_path / "run"):
        refused(lambda: runs.held(tmp_path / "link"), "another run is writing there")


def test_at_the_end_of_a_run_all_processes_hear_of_a_signal(monkeypatch, m):
    """Else one would go on to the evaluation, and wait there for the one that has stopped."""
    asked = []
    monkeypatch.setattr(runs, "load_state", lambda *given: (8, None))
    monkeypatch.setattr(runs, "save_state", lambda *given: asked.append("saved"))
    monkeypatch.setattr(runs, "finish", lambda *given: asked.append("finished"))
    stop = SimpleNamespace(asked=lambda m: asked.append("asked"))
    runs.Run(Path("run"), None, m, stop, 8, None, None, None).finish(8, None)
    assert asked == ["asked", "saved", "finished"]


def test_two_runs_in_one_folder(small, tmp_path):
    cfg = small()
    with runs.held(tmp_path / "run"):
        refused(lambda: distill.main(cfg), f"{tmp_path / 'run'}: another run is writing there", "--out")
        refused(lambda: supervised.main(supervised.Config(data="tiny", out=cfg.out)), "another run is writing there")
    with runs.held(tmp_path / "run"):  # it was let go
        assert not os.path.exists(cfg.out)


def killed_after(seconds: float, cfg: distill.Config) -> bool:
    """Runs in a process of its own, kills it after so many seconds, and tells whether it had come to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            distill.main(cfg)
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "it failed by itself"
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def test_killed_at_any_moment(small, finished, tmp_path, capfd):
    """SIGKILL in whatever stage, write or evaluation it is: the next run goes on, and ends with the same bits."""
    began = time.monotonic()
    assert killed_after(600, small(out=str(tmp_path / "whole")))
    takes, chance, killed = time.monotonic() - began, random.Random(1), 0
    rounds = 0
    while killed < KILLS:
        out, rounds = tmp_path / f"run-{rounds}", rounds + 1
        cfg = small(out=str(out), resume=True)
        while not killed_after(chance.uniform(0, takes), cfg):
            killed += 1
        same_bits(out, finished, "teacher", "init", "seqkd", "minillm")
        for pattern in ("answers-*.jsonl", "minillm/samples.jsonl", "test/minillm/samples.jsonl"):
            (one,), (other,) = out.glob(pattern), finished.glob(pattern)
            assert one.read_text() == other.read_text()
        assert not list(out.rglob("state-before.pt"))


# ---- disk -----------------------------------------------------------------------------------------------------------

def flip(path) -> None:
    """One bit, in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-9])], ids=["flip", "cut"])
def test_a_damaged_state_is_named_and_the_one_before_offered(damage, small, finished, tmp_path, monkeypatch):
    cfg = small(baselines="", resume=True)
    with monkeypatch.context() as patch:  # validated and saved at 0 and 4, then stopped
        signal_at(patch, distill, 5, signal.SIGINT, signal.SIGINT)
        with pytest.raises(Stopped):
            distill.main(cfg)
    state = tmp_path / "run" / "minillm" / "state.pt"
    damage(state)
    refused(lambda: distill.main(cfg), f"{state} is damaged", "state-before.pt", "remove state.pt")
    state.unlink()
    distill.main(cfg)
    same_bits(tmp_path / "run", finished, "minillm")


def test_a_flipped_bit_in_weights_is_found(tmp_path):
    save(random_gpt(), tmp_path / "a")
    load(str(tmp_path / "a"))
    flip(tmp_path / "a" / "model.safetensors")
    refused(lambda: load(str(tmp_path / "a")), "model.safetensors is damaged", "checksum")
    save(random_gpt(), tmp_path / "b")
    torch.save(weights(tmp_path / "b"), tmp_path / "b" / "pytorch_model.bin")
    (tmp_path / "b" / "model.safetensors").unlink()
    load(str(tmp_path / "b"))
    flip(tmp_path / "b" / "pytorch_model.bin")
    refused(lambda: load(str(tmp_path / "b")), "pytorch_model.bin is damaged")


def test_a_file_of_the_hubs_cache_is_what_its_name_says(tmp_path):
    content = b"weights" * 1000
    blob = tmp_path / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    for n in range(2):
        (tmp_path / f"model-{n}.safetensors").symlink_to(blob)
    assert intact(tmp_path / "model-0.safetensors") == tmp_path / "model-0.safetensors"
    flip(blob)
    refused(lambda: intact(tmp_path / "model-1.safetensors"), "is damaged", f"remove {blob}")


def test_a_full_disk_loses_nothing(small, tmp_path, finished):
    """Whatever is being written when there is no more room: one line, and with room again the same bits."""
    out, cfg = tmp_path / "run", small(resume=True)
    answers = os.path.basename(stages.stages(cfg).answers.out)
    for file in ("teacher/run.json.part", "teacher/model.safetensors.part", "teacher/state.pt.part", f"{answers}.part",
                 "seqkd/log.jsonl", "minillm/log.jsonl", "minillm/model.safetensors.part",
                 "minillm/samples.jsonl.part", "minillm/state.pt.part", "minillm/results.json.part",
                 "test/minillm/samples.jsonl.part", "test/minillm/results.json.part", "results.json.part"):
        full = out / file
        full.parent.mkdir(parents=True, exist_ok=True)
        full.symlink_to("/dev/full")
        with pytest.raises((OSError, UserError), match="No space left on device") as caught:
            distill.main(cfg)
        assert "\n" not in str(caught.value), file
        full.unlink(missing_ok=True)
        assert not list(out.rglob("*.part")), file
    distill.main(cfg)
    same_bits(out, finished, "teacher", "init", "seqkd", "minillm")


def test_weights_that_do_not_fit_onto_the_disk(tmp_path):
    save(random_gpt(1), tmp_path)
    before = weights(tmp_path)
    (tmp_path / "model.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        save(random_gpt(2), tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch, capsys):
    """As run() tells it; the system's own words, as root may write anywhere."""
    def main(cfg):
        raise PermissionError(errno.EACCES, "Permission denied", "out/x/run.json.part")

    monkeypatch.setattr("sys.argv", ["distill.py"])
    with pytest.raises(SystemExit) as ended:
        config.run(main, dataclasses.make_dataclass("Config", [], frozen=True))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "distill.py: [Errno 13] Permission denied: 'out/x/run.json.part'\n"


# ---- memory ---------------------------------------------------------------------------------------------------------

def test_out_of_memory_halves_the_micro_batch_and_changes_no_more(small, finished, tmp_path, monkeypatch, capsys):
    """In phase 2, in a supervised stage and where the plan measures: as if the GPU had room for two samples at most."""
    forward, tried = supervised.GPT.forward, set()

    def too_many(model, tokens, *more, **settings):
        if torch.is_grad_enabled():
            tried.add(len(tokens))
            if len(tokens) > 2:
                raise torch.cuda.OutOfMemoryError
        return forward(model, tokens, *more, **settings)

    monkeypatch.setattr(supervised.GPT, "forward", too_many)
    monkeypatch.setattr(plan, "measure", measure)
    distill.main(small(baselines=""))
    said = capsys.readouterr().out
    assert "--micro_batch=64 is 32 from here on" in said and said.count("out of memory") == 3 * 5
    assert {1, 2} <= tried
    for stage in ("teacher", "init", "minillm"):
        logs = [(run / stage / "log.jsonl").read_text().splitlines() for run in (finished, tmp_path / "run")]
        for one, other in zip(*(map(json.loads, log) for log in logs), strict=True):
            for name in one.keys() & {"loss", "loss_single", "loss_long", "loss_pt", "reverse_kl", "grad_norm"}:
                assert other[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), (stage, one["step"], name)

    def none(*given, **settings):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(supervised.GPT, "forward", none)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        distill.main(small(baselines="", out=str(tmp_path / "none")))


def test_a_run_without_memory_goes_on_from_the_last_state(small, finished, tmp_path, monkeypatch, capsys):
    """What the failed update had added to the gradient is forgotten, and each update is logged once."""
    clip, calls = supervised.clip_gradient, []

    def fail_once(*given, **more):
        calls.append(given)
        if len(calls) == 7:  # a state was saved after the fourth
            raise torch.cuda.OutOfMemoryError
        return clip(*given, **more)

    distill.main(small(baselines="", out=str(tmp_path / "run")))
    shutil.rmtree(tmp_path / "run" / "minillm")
    monkeypatch.setattr(supervised, "clip_gradient", fail_once)
    distill.main(small(baselines=""))
    assert capsys.readouterr().out.count("--micro_batch=64 is 32 from here on") == 1 and len(calls) == 8 + 3
    assert [line["step"] for line in lines(tmp_path / "run" / "minillm")] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    same_bits(tmp_path / "run", finished, "minillm")  # a minibatch of four is in one piece either way


def test_memory_that_cannot_be_saved_ends_the_run(monkeypatch):
    """One sample does not fit; or several processes, which would have to halve together."""
    tried = []

    def train(cfg, stop):
        tried.append((cfg.micro_batch, cfg.resume))
        raise torch.cuda.OutOfMemoryError

    cfg = supervised.Config(micro_batch=5)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        runs.within_memory(train, cfg, None)
    assert tried == [(5, False), (2, True), (1, True)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        runs.within_memory(train, cfg, None)
    assert tried[3:] == [(5, False)]


def test_killed_while_plain_text_is_tokenised(gpt2, m, tmp_path):
    """What is there behind a kill is nothing, or the whole; the next run makes it whole."""
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"document {n} " + "word " * 300 for n in range(1500)))
    whole, chance = data.load_corpus(str(text), gpt2, tmp_path / "whole", m), random.Random(2)
    for n in range(KILLS):
        child = os.fork()
        if child == 0:
            data.load_corpus(str(text), gpt2, tmp_path / str(n), m)
            os._exit(0)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        there = list((tmp_path / str(n)).glob("*.bin"))
        assert all(path.stat().st_size == whole.nbytes for path in there)
        assert (data.load_corpus(str(text), gpt2, tmp_path / str(n), m) == whole).all()
