"""The scripts of the paper's tables: every command that they would run is one that the project accepts."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused

from config import parse

FOLDER = Path(__file__).parent.parent / "reproduce"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "worlds")


@pytest.fixture(autouse=True)
def worlds(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("worlds")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("world", ["tiny", "paper"])
def test_every_command_is_accepted(script, world, worlds):
    commands = list(importlib.import_module(script).commands(worlds.World(world, 1)))
    assert commands or (script, world) == ("released", "tiny")
    for name, *flags in commands:
        module = importlib.import_module(name.removesuffix(".py"))
        cfg = parse(module.Config, flags, getattr(module, "presets", None))
        if name == "distill.py":
            assert cfg.preset == world and cfg.resume


def test_variants_begin_with_the_same_models_and_differ_in_their_flags(worlds):
    import distill
    world = worlds.World("tiny", 3)
    made = [parse(distill.Config, command[1:], distill.presets)
            for command in (world.variant("a"), world.variant("b", "--mix_alpha=0", "--baselines=seqkd"))]
    assert made[0].teacher == made[1].teacher == "out/reproduce/tiny/seed-3/start/teacher" and made[0].seed == 3
    assert made[0].baselines == "" and made[1].baselines == "seqkd" and made[1].mix_alpha == 0


def test_commands_run_in_order_then_the_report(worlds, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(worlds.subprocess, "run", lambda command, **more: ran.append(command) or
                        subprocess.CompletedProcess(command, 0))
    commands = lambda world: iter([world.start(), world.variant("x", "--gamma=0.5")])
    worlds.go(worlds.Config(seeds=2), commands, "test", ("--prompts=1",))
    assert [command[0] for command in ran] == [sys.executable] * 5
    assert [command[-1] for command in ran[1:5:2]] == ["--gamma=0.5"] * 2
    folders = [f"out/reproduce/tiny/seed-{seed}/{name}" for seed in (1, 2) for name in ("start", "x")]
    assert ran[-1][1:] == ["report.py", *folders, "--out=out/reproduce/tiny/test", "--prompts=1"]
    ran.clear()
    worlds.go(worlds.Config(seeds=1, dry_run=True), commands, "test", ())
    assert not ran and capsys.readouterr().out.count("$ python distill.py") == 6


def test_a_try_with_few_prompts(worlds, capsys):
    released = importlib.import_module("released")
    worlds.go(worlds.Config(world="paper", limit=7, dry_run=True), released.commands, "released", ())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 14 and all(line.endswith("--limit=7") for line in printed[:-1])
    refused(lambda: worlds.go(worlds.Config(), released.commands, "released", ()), "--world=tiny", "--world=paper")


def test_a_command_that_fails_stops_the_script(worlds):
    refused(lambda: worlds.call(["oracle.py", "--toys=0"], False), "oracle.py --toys=0", "exit code 2")
