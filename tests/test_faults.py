"""Runs that are stopped, killed, or started twice: either they go on to the same bits, or one line says what to do.

MINILLM_KILLS=50 pytest tests/test_faults.py kills fifty times instead of three."""

import dataclasses
import json
import os
import random
import signal
import time

import pytest
import torch
from conftest import random_gpt, refused, weights

import config
import distill
import teacher as supervised
from config import Stopped, held
from model import KVCache
from sample import sample, uniforms

KILLS = int(os.environ.get("MINILLM_KILLS", 3))
# every stage of the built-in world at a few updates
SMALL = dict(teacher="1x2x12", student="1x2x8", baselines="seqkd", steps=8, rollouts=8, minibatch=4, inner_epochs=2,
             eval_every=4, valid_limit=4, eval_seeds=2, max_tokens=24)


@pytest.fixture
def small(distill_config, monkeypatch):
    for name in ("TINY_TEACHER", "TINY_INIT", "TINY_BASELINE"):
        few = dict(evals=2) | (dict(updates=6) if name != "TINY_BASELINE" else {})
        monkeypatch.setattr(distill, name, getattr(distill, name) | few)
    return lambda **settings: distill_config(**SMALL | settings)


def signal_at(monkeypatch, module, step: int, *signums: int) -> None:
    """Sends this process signals when a line for this step is logged by `module`."""
    log = supervised.log

    def logging(out, m, line):
        log(out, m, line)
        if line["step"] == step and ("loss_single" in line) == (module is distill):
            for signum in signums:
                os.kill(os.getpid(), signum)

    monkeypatch.setattr(supervised, "log", logging)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(signum, small, tmp_path, monkeypatch, capsys):
    """The teacher's second update is then its last; in phase 2 what was sampled is used up first, in four updates."""
    whole = small(out=str(tmp_path / "whole"), baselines="")
    distill.main(whole)
    cfg = small(baselines="")
    for module, step, saved in ((supervised, 2, "teacher: stopped and saved after update 2"),
                                (distill, 2, "minillm: stopped and saved after update 4")):
        with monkeypatch.context() as patch:
            signal_at(patch, module, step, signum)
            with pytest.raises(Stopped, match=saved) as stopped:
                distill.main(dataclasses.replace(cfg, resume=True))
        assert stopped.value.signum == signum and "--resume" in str(stopped.value)
        assert "a second one stops at once" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    distill.main(dataclasses.replace(cfg, resume=True))
    for stage in ("teacher", "init", "minillm"):
        there = weights(tmp_path / "run" / stage)
        assert all(torch.equal(tensor, there[name]) for name, tensor in weights(tmp_path / "whole" / stage).items())


def test_a_second_signal_stops_at_once(small, monkeypatch):
    signal_at(monkeypatch, distill, 2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        distill.main(small(baselines=""))
    assert "saved" not in str(stopped.value)
    monkeypatch.undo()


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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_two_runs_in_one_folder(small, tmp_path):
    cfg = small()
    with held(tmp_path / "run"):
        refused(lambda: distill.main(cfg), f"{tmp_path / 'run'}: another run is writing there", "--out")
        refused(lambda: supervised.main(supervised.Config(data="tiny", out=cfg.out)), "another run is writing there")
    with held(tmp_path / "run"):  # it was let go
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


def test_killed_at_any_moment(small, tmp_path, capfd):
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
        for stage in ("teacher", "init", "seqkd", "minillm"):
            there = weights(out / stage)
            assert all(torch.equal(tensor, there[name]) for name, tensor in weights(tmp_path / "whole" / stage).items())
        for file in ("answers.jsonl", "minillm/samples.jsonl", "test/minillm/samples.jsonl"):
            assert (out / file).read_text() == (tmp_path / "whole" / file).read_text()
        assert not list(out.rglob("state.pt"))


# ---- memory ---------------------------------------------------------------------------------------------------------

def test_out_of_memory_halves_the_micro_batch_and_changes_no_more(small, tmp_path, monkeypatch, capsys):
    """In phase 2 and in a supervised stage: as if the GPU had room for two samples at most."""
    cfg = small(baselines="", out=str(tmp_path / "whole"))
    distill.main(cfg)
    forward, tried = supervised.GPT.forward, set()

    def too_many(model, tokens, *more):
        if torch.is_grad_enabled():
            tried.add(len(tokens))
            if len(tokens) > 2:
                raise torch.OutOfMemoryError
        return forward(model, tokens, *more)

    monkeypatch.setattr(supervised.GPT, "forward", too_many)
    distill.main(small(baselines=""))
    said = capsys.readouterr().out
    assert "--micro_batch=64 is 32 from here on" in said and said.count("out of memory") == 3 * 5
    assert {1, 2} <= tried
    for stage in ("teacher", "init", "minillm"):
        logs = [(tmp_path / run / stage / "log.jsonl").read_text().splitlines() for run in ("whole", "run")]
        for one, other in zip(*(map(json.loads, log) for log in logs), strict=True):
            for name in one.keys() & {"loss", "loss_single", "loss_long", "loss_pt", "reverse_kl", "grad_norm"}:
                assert other[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), (stage, one["step"], name)
    monkeypatch.setattr(supervised.GPT, "forward", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        distill.main(small(baselines="", out=str(tmp_path / "none")))


def test_out_of_memory_while_sampling_changes_nothing(m, monkeypatch, capsys):
    student, prompts = random_gpt(), [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1, 2], [3, 3]]
    draw = lambda **more: sample(student, prompts, uniforms(0, range(5), 12), m, **more)
    whole, room = draw(), KVCache.__init__

    def small_room(cache, config, batch, *more):
        if batch > 1:
            raise torch.OutOfMemoryError
        room(cache, config, batch, *more)

    monkeypatch.setattr(KVCache, "__init__", small_room)
    rollout = draw()
    assert rollout.answers == whole.answers and capsys.readouterr().out.count("out of memory") == 2
    torch.testing.assert_close(rollout.student_logp, whole.student_logp, atol=1e-5, rtol=0)
    with pytest.raises(torch.OutOfMemoryError):
        draw(on_token=lambda row, token: None)
