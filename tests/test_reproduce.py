"""The scripts of the paper's tables: every command that they would run is one that the project accepts."""

import importlib
import os
import signal
import sys
import threading
import time
import unittest.mock
from pathlib import Path

import pytest
from conftest import refused

import config
import distill
from config import UserError, parse
from reproduce import released, worlds

SCRIPTS = sorted(path.stem for path in Path(worlds.__file__).parent.glob("*.py")
                 if path.stem not in ("worlds", "__init__"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("world", ["tiny", "paper"])
def test_every_command_is_accepted(script, world):
    commands = list(importlib.import_module(f"reproduce.{script}").commands(worlds.World(world, 1)))
    assert commands or script in {"tiny": ("released", "fig7"), "paper": ("capacity", "search")}[world]
    for name, *flags in commands:
        if name == "-m":
            name, *flags = flags
        module = importlib.import_module(name.removesuffix(".py"))
        cfg = parse(module.Config, flags, getattr(module, "presets", None))
        if name == "distill.py":
            assert cfg.preset == world and cfg.resume


def test_variants_begin_with_the_same_models_and_differ_in_their_flags():
    world = worlds.World("tiny", 3)
    made = [parse(distill.Config, command[1:], distill.presets)
            for command in (world.variant("a"), world.variant("b", "--mix_alpha=0", "--baselines=seqkd"))]
    assert made[0].teacher == made[1].teacher == "out/reproduce/tiny/seed-3/start/teacher" and made[0].seed == 3
    assert made[0].baselines == "" and made[1].baselines == "seqkd" and made[1].mix_alpha == 0


def test_commands_run_in_order_then_the_report(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(worlds.subprocess, "Popen", lambda command, **more: ran.append(command) or
                        unittest.mock.Mock(wait=lambda: 0))
    commands = lambda world: iter([world.answers(), world.baseline("y", "sft"), world.start(),
                                   world.variant("x", "--gamma=0.5")])
    worlds.go(worlds.Config(seeds=2), commands, "test")
    assert [command[0] for command in ran] == [sys.executable] * 9
    assert [command[-1] for command in ran[3:9:4]] == ["--gamma=0.5"] * 2
    folders = [f"out/reproduce/tiny/seed-{seed}/{name}" for seed in (1, 2) for name in ("start", "x")]
    assert ran[-1][1:] == ["-m", "measure.report", *folders, "--out=out/reproduce/tiny/test"]
    ran.clear()
    worlds.go(worlds.Config(seeds=1, dry_run=True), commands, "test")
    assert not ran and capsys.readouterr().out.count("$ python distill.py") == 6


def test_a_try_with_few_prompts(capsys):
    worlds.go(worlds.Config(world="paper", limit=7, dry_run=True), released.commands, "released")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 14 and all(line.endswith("--limit=7") for line in printed[:-1])
    refused(lambda: worlds.go(worlds.Config(), released.commands, "released"), "--world=tiny", "--world=paper")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_seed_that_fails_stops_the_others(jobs, monkeypatch):
    ran = []

    def call(command, dry_run):
        ran.append(command)
        if command[1] == "--seed=1":
            raise UserError("stopped")
        time.sleep(0.2)

    monkeypatch.setattr(worlds, "call", call)
    commands = lambda world: iter([["distill.py", f"--seed={world.seed}", f"--n={n}"] for n in range(9)])
    refused(lambda: worlds.go(worlds.Config(seeds=4, jobs=jobs), commands, "test"), "stopped")
    assert len(ran) <= jobs + 1 and ran[-1][0] == "distill.py"


def test_sigterm_ends_what_runs_and_begins_nothing_more(monkeypatch, tmp_path):
    (tmp_path / "slow.py").write_text("import pathlib, time; pathlib.Path('begun').touch(); time.sleep(60)")
    monkeypatch.setattr(worlds, "ROOT", tmp_path)

    def stop_once_it_runs():
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, config.stop_now)
    try:
        threading.Thread(target=stop_once_it_runs).start()
        with pytest.raises(config.Stopped):
            worlds.go(worlds.Config(seeds=1), lambda world: iter([["slow.py"], ["slow.py", "--again"]]), "test")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not worlds.RUNNING


def test_jobs_are_worked_on_at_a_time(monkeypatch):
    together = threading.Barrier(3, timeout=20)
    monkeypatch.setattr(worlds, "call", lambda command, dry_run: command[0] == "-m" or together.wait())
    worlds.go(worlds.Config(seeds=3, jobs=3), lambda world: iter([["distill.py", f"--seed={world.seed}"]]), "test")


def test_what_is_the_same_for_all_seeds_is_done_once(capsys):
    worlds.go(worlds.Config(world="paper", seeds=3, dry_run=True), released.commands, "released")
    assert capsys.readouterr().out.count("eval.py") == 13


def test_a_command_that_fails_stops_the_script():
    refused(lambda: worlds.call(["-m", "exercises.oracle", "--toys=0"], False), "exercises.oracle --toys=0",
            "exit code 2")
