"""Every mistake on the command line ends in one line that says what was given and what to do, with exit code 2."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from conftest import refused

import config
from config import UserError, check, clock, flag, make, parse, read_json, write_json, written_aside


@dataclass(frozen=True)
class Config:
    teacher: str = flag("gpt2", "who teaches")
    lr: float = flag(0.1, "100% of it")
    steps: int | None = flag(None, "how long")
    compile: bool = flag(False, "or not")
    recipe: Literal["paper", "official"] = flag("paper", "whose")

    def __post_init__(self):
        check(self, lr=(0, 1), steps=(1, 10))


def test_flags_are_read_as_their_types():
    cfg = parse(Config, ["--teacher", "a=b", "--lr=1", "--steps=3", "--compile", "--recipe=official"])
    assert cfg == Config("a=b", 1.0, 3, True, "official") and isinstance(cfg.lr, float)
    assert parse(Config, ["--compile=False"]).compile is False
    assert parse(Config, []) == Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 2


@pytest.mark.parametrize("argv, words", [
    (["--techer=x"], ["unknown flag --techer", "did you mean --teacher?"]),
    (["--teach=x"], ["unknown flag --teach"]),  # no abbreviations
    (["--qqq"], ["unknown flag --qqq", "--help"]),
    (["gpt2"], ["unexpected argument 'gpt2'", "--name=value"]),
    (["--lr=fast"], ["--lr", "'fast' is not a number"]),
    (["--lr=nan"], ["--lr", "'nan' is not a number"]),
    (["--lr=2"], ["--lr=2.0 is out of range", "between 0 and 1"]),
    (["--steps=2.5"], ["--steps", "'2.5' is not an integer"]),
    (["--steps=0"], ["--steps=0 is out of range", "between 1 and 10"]),
    (["--compile=maybe"], ["--compile", "'maybe' is neither true nor false"]),
    (["--recipe=mine"], ["--recipe", "'mine'", "paper", "official"]),
    (["--teacher"], ["--teacher", "expected one argument"]),
])
def test_a_mistake_is_one_line_and_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, argv)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.count("\n") == 1
    for word in words:
        assert word in printed


def test_help_prints_each_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "who teaches [default gpt2]" in printed and "100% of it" in printed and "paper | official" in printed


def test_presets_win_over_defaults_and_flags_over_presets():
    presets = lambda given: {"lr": 0.5, "steps": 2} if given.get("recipe") == "official" else {}
    assert make(Config, {"recipe": "official", "steps": 7}, presets) == Config(lr=0.5, steps=7, recipe="official")
    assert make(Config, {}, presets) == Config()


def test_run_turns_user_errors_and_file_errors_into_one_line(monkeypatch, capsys):
    def main(cfg):
        raise {"gpt2": UserError("no such thing"), "disk": OSError(28, "No space left"),
               "large": torch.cuda.OutOfMemoryError("CUDA\nout of memory")}[cfg.teacher]

    for teacher, words in (("gpt2", "no such thing"), ("disk", "No space left"), ("large", "lower --micro_batch")):
        monkeypatch.setattr("sys.argv", ["tool.py", f"--teacher={teacher}"])
        with pytest.raises(SystemExit) as caught:
            config.run(main, Config)
        printed = capsys.readouterr().err
        assert caught.value.code == 2 and printed.startswith("tool.py: ") and words in printed
        assert printed.count("\n") == 1


def test_run_does_not_hide_our_own_mistakes(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tool.py"])
    with pytest.raises(ZeroDivisionError):
        config.run(lambda cfg: 1 / 0, Config)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99x"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(UserError, match="--device"):
        config.machine(device)


def test_which_gpu_is_whose(monkeypatch):
    """On a machine with two, as far as one without can tell: every device that is set has a number."""
    said, joined, cudnn = [], [], []
    for name, answer in (("is_available", True), ("device_count", 2), ("is_bf16_supported", False)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer, **settings: answer)
    monkeypatch.setattr(torch.cuda, "set_device", said.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    monkeypatch.setattr(config.dist, "init_process_group", lambda backend, **settings: joined.append(backend))
    for device in ("auto", "cuda", "cuda:1"):
        assert config.machine(device).dtype == torch.float16  # the GPU is one without bfloat16
    assert said == [torch.device("cuda", n) for n in (0, 0, 1)] and not joined
    assert cudnn == [False] * 3
    refused(lambda: config.machine("cuda:2"), "no GPU number 2", "has 2")
    refused(lambda: config.machine("cpu", capture=True), "--capture", "on the CPU")
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    m = config.machine("auto", "bfloat16")
    assert (m.device, m.rank, m.world, m.dtype) == (torch.device("cuda", 1), 3, 4, torch.bfloat16)
    assert joined == ["nccl"]
    refused(lambda: config.machine("cuda:0"), "--device=cuda:0 is one GPU for 4 processes")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "file.json"
    write_json(path, {"n": 1})
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text('{"n": ')
        raise RuntimeError
    assert json.loads(path.read_text()) == {"n": 1} == read_json(path)
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    for text in ("{", "[1]"):
        path.write_text(text)
        with pytest.raises(UserError, match="not a JSON object"):
            read_json(path)


def test_clock():
    seconds = 4.4, 99, 420, 12_000, 216_000
    assert [clock(s) for s in seconds] == ["4 s", "99 s", "7 min", "3 h 20", "2.5 days"]
