"""Every mistake on the command line ends in one line that says what was given and what to do, with exit code 2."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import pickle
import runpy
import signal
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import CPU, in_two_processes, refused

import config
from config import Stopped, UserError, flag, make, parse
from safe import files, hub, runs
from safe.files import read_json, write_json, written_aside
from safe.hub import fetch, read_torch, require
from safe.runs import Stop, checksum, held, peak_gib


@dataclass(frozen=True)
class Config:
    teacher: str = flag("gpt2", "who teaches")
    lr: float = flag(0.1, "100% of it")
    steps: int | None = flag(None, "how long")
    compile: bool = flag(False, "or not")
    recipe: Literal["paper", "official"] = flag("paper", "whose")
    out: str | None = flag(None, "where to")
    input: str = flag("", "what", may_be_empty=True)
    folders: tuple[str, ...] = flag((), "words before which no flag stands")

    def __post_init__(self):
        config.check(self, lr=(0, 1), steps=(1, 10))
        files.check_place(self, "out")


def test_flags_are_read_as_their_types():
    cfg = parse(Config, ["--teacher", "a=b", "--lr=1", "--steps=3", "--compile", "--recipe=official", "--input="])
    assert cfg == Config("a=b", 1.0, 3, True, "official") and isinstance(cfg.lr, float)
    assert parse(Config, ["--compile=False"]).compile is False is parse(Config, ["--compile", "false"]).compile
    assert parse(Config, []) == Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 2


def test_words_may_stand_anywhere_among_the_flags():
    cfg = parse(Config, ["a", "--lr=1", "b", "--compile=True", "c"])
    assert cfg == Config(lr=1.0, compile=True, folders=("a", "b", "c"))


@pytest.mark.parametrize("argv, words", [
    (["--techer=x"], ["unknown flag --techer (did you mean --teacher?)"]),
    (["--teach=x"], ["unknown flag --teach"]),  # no abbreviations
    (["-lr=1"], ["unknown flag -lr (did you mean --lr?)"]),
    (["--qqq"], ["unknown flag --qqq", "--name=value", "--help"]),
    (["--lr=fast"], ["--lr", "float", "'fast'"]),
    (["--lr=nan"], ["--lr=nan is out of range", "give 0 to 1"]),
    (["--lr=2"], ["--lr=2.0 is out of range", "give 0 to 1"]),
    (["--lr=--"], ["--lr"]),  # which argparse may read as no value at all
    (["--steps=2.5"], ["--steps", "int", "'2.5'"]),
    (["--steps="], ["--steps", "int", "''"]),
    (["--steps=0"], ["--steps=0 is out of range", "give 1 to 10"]),
    (["--compile=maybe"], ["--compile", "true_or_false", "'maybe'"]),
    (["--recipe=mine"], ["--recipe", "'mine'", "paper", "official"]),
    (["--teacher"], ["--teacher", "expected one argument"]),
    (["--teacher="], ["--teacher= is empty", "leave the flag out"]),
    (["--teacher", ""], ["--teacher= is empty"]),
    (["--teacher=a\udcff"], [r"'--teacher=a\udcff' is not UTF-8 text"]),
    (["a\udcff"], [r"'a\udcff' is not UTF-8 text"]),
    ([f"--out={__file__}/x"], ["--out=", "test_config.py is a file, and no folder"]),
])
def test_a_mistake_is_one_line_and_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, argv)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.count("\n") == 1
    for word in words:
        assert word in printed


def test_a_word_is_a_mistake_where_a_command_takes_none(capsys):
    with pytest.raises(SystemExit):
        parse(dataclasses.make_dataclass("Config", [], frozen=True), ["gpt2"])
    assert "unknown flag gpt2 (settings are --name=value; see --help)\n" in capsys.readouterr().err


def test_help_prints_each_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "who teaches [default gpt2]" in printed and "100% of it" in printed and "{paper,official}" in printed


def test_presets_win_over_defaults_and_flags_over_presets():
    presets = lambda given: {"lr": 0.5, "steps": 2} if given.get("recipe") == "official" else {}
    expected = Config(lr=0.5, steps=7, recipe="official")
    assert make(Config, {"recipe": "official", "steps": 7}, presets) == expected
    assert parse(Config, ["--recipe=official", "--steps=7"], presets) == expected
    assert make(Config, {}, presets) == Config()


# ---- what a command ends with ---------------------------------------------------------------------------------------

def ended(monkeypatch, capsys, main) -> tuple[int, str]:
    """The exit code and the line on stderr of a command."""
    monkeypatch.setattr("sys.argv", ["tool.py"])
    with pytest.raises(SystemExit) as caught:
        config.run(main, Config)
    printed = capsys.readouterr().err
    assert printed.startswith("tool.py: ") and printed.count("\n") == 1
    return caught.value.code, printed[len("tool.py: ") : -1]


@pytest.mark.parametrize("error, words", [
    (UserError("no such thing"), ["no such thing"]),
    (OSError(28, "No space left on device"), ["No space left on device", "make room", "--resume"]),
    (PermissionError(13, "Permission denied", "out"), ["Permission denied: 'out'"]),
    (torch.cuda.OutOfMemoryError("CUDA\nout of memory"), ["out of memory: lower --micro_batch"]),
    (torch.cuda.OutOfMemoryError(), ["out of memory: lower --micro_batch"]),
])
def test_run_turns_user_errors_and_file_errors_into_one_line(error, words, monkeypatch, capsys):
    def main(cfg):
        raise error

    code, line = ended(monkeypatch, capsys, main)
    assert code == 2 and all(word in line for word in words)
    monkeypatch.setenv("MINILLM_DEBUG", "1")
    with pytest.raises(type(error)):
        config.run(main, Config)


def test_more_memory_than_a_cpu_has(monkeypatch, capsys):
    code, line = ended(monkeypatch, capsys, lambda cfg: torch.empty(2**55))
    assert code == 2 and "out of memory: lower --micro_batch" in line


@pytest.mark.parametrize("main, error", [(lambda cfg: 1 / 0, ZeroDivisionError),
                                         (lambda cfg: torch.ones(2) @ torch.ones(3), RuntimeError)])
def test_run_does_not_hide_our_own_mistakes(main, error, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tool.py"])
    with pytest.raises(error):
        config.run(main, Config)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_its_code(signum, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    main = lambda cfg: os.kill(os.getpid(), signum)
    assert ended(monkeypatch, capsys, main) == (128 + signum, f"stopped ({signum.name})")
    assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


def test_within_stop_the_first_signal_is_noted_and_the_second_ends_the_run(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"saved \(SIGTERM\)"), Stop("soon") as stop:
        assert not stop.asked(CPU)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked(CPU)
        assert "stopping soon; a second one stops at once" in capsys.readouterr().err
        stop.end(CPU, "saved")
    with pytest.raises(Stopped, match=r"stopped \(SIGINT\)"), Stop("soon"):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal was not heard")
    with pytest.raises(Stopped), Stop("soon"):  # the loop ends, but what is behind it does not begin
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


TOOL = """
from dataclasses import dataclass
import config

@dataclass(frozen=True)
class Config:
    lines: int = config.flag(1, "lines to print")

def main(cfg):
    for n in range(cfg.lines):
        print("a line ±", n)
    print(config.command())

if __name__ == "__main__":
    config.run(main, Config)
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The folder that holds the commands kit/tool.py and `python -m kit.tool`."""
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "tool.py").write_text(TOOL, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_command_without_a_reader_ends_quietly(tool):
    """As others do before `| head`; and the terminal may lack a letter."""
    env = os.environ | {"PYTHONPATH": str(Path(config.__file__).parent), "PYTHONIOENCODING": "ascii"}
    run = subprocess.Popen([sys.executable, "kit/tool.py", "--lines=20000"], cwd=tool, env=env, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline() == "a line ? 0\n"
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait() == 128 + signal.SIGPIPE


def test_a_command_is_named_as_it_was_started(tool, monkeypatch, capsys):
    """`python -m kit.tool` is what must be typed to run it again."""
    monkeypatch.setattr("sys.argv", ["/somewhere/tool.py", "--lines", "0"])
    runpy.run_path(str(tool / "kit" / "tool.py"), run_name="__main__")
    assert capsys.readouterr().out == "python tool.py --lines 0\n"
    runpy.run_module("kit.tool", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out == "python -m kit.tool --lines 0\n"
    monkeypatch.setattr("sys.argv", ["python", "--line=0"])
    with pytest.raises(SystemExit):
        runpy.run_module("kit.tool", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().err == "kit.tool: unknown flag --line (did you mean --lines?)\n"


# ---- the machine ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99x", "cpu:1", "cuda:", ""])
def test_an_unknown_device_is_refused(device):
    refused(lambda: config.machine(device), f"--device={device} is not supported")


def test_the_cpu_as_a_machine():
    m = config.machine("cpu", sample_batch=7)
    assert (m.device.type, m.rank, m.world, m.sample_batch) == ("cpu", 0, 1, 7)
    assert [m.room(T, V) for T, V in ((1, 50257), (10, 50257), (500, 50257), (10, 500))] == [7, 7, 1, 7]
    assert [config.machine("cpu").room(T, V) for T, V in ((20, 50257), (10, 20000), (10, 50))] == [6, 32, 64]
    assert m.dtype in (torch.float32, torch.bfloat16) and config.machine("cpu", "float16").dtype == torch.float16
    assert m.gather([1, 2]) == [1, 2]
    assert not CPU.autocast()._enabled
    big = torch.ones(2**24)
    assert peak_gib(m.device) >= big.nbytes / 2**30 or not sys.platform.startswith("linux")


def test_which_gpu_is_whose(monkeypatch):
    """On a machine with two, as far as one without can tell: every device that is set has a number."""
    said, joined, cudnn = [], [], []
    for name, answer in (("is_available", True), ("device_count", 2), ("is_bf16_supported", False)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer, **settings: answer)
    monkeypatch.setattr(torch.cuda, "set_device", said.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    monkeypatch.setattr(config.dist, "init_process_group", lambda **settings: joined.append(settings))
    for device in ("auto", "cuda", "cuda:1"):
        m = config.machine(device)
        assert (m.dtype, m.room(100, 50257)) == (torch.float16, 10)  # the GPU is one without bfloat16
    assert said == [torch.device("cuda", n) for n in (0, 0, 1)] and not joined
    assert cudnn == [False] * 3
    refused(lambda: config.machine("cuda:2"), "no GPU number 2", "--device=cpu")
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    m = config.machine("auto", "bfloat16")
    assert (m.device, m.rank, m.world, m.dtype) == (torch.device("cuda", 1), 3, 4, torch.bfloat16)
    assert joined[0]["backend"] == "nccl" and joined[0]["timeout"].total_seconds() == 6 * 3600
    refused(lambda: config.machine("cuda:0"), "--device=cuda:0 is one GPU for 4 processes")


def share(folder: Path) -> None:
    """What each of two processes does."""
    m = config.machine("cpu", "float32")
    one, two, largest = torch.tensor([1.0 + m.rank]), torch.tensor(10), torch.tensor(m.rank)
    m.sum(one, two)
    m.max(largest)
    lists = m.gather([m.rank, "x"])
    with held(folder / "run"), Stop("soon") as stop:
        m.barrier()
        if m.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        asked = stop.asked(m) and stop.signum
        stop.signum = 0
        write_json(folder / f"{m.rank}.json", {"got": [one.item(), two.item(), largest.item(), lists, asked]})
        m.barrier()
    config.dist.destroy_process_group()


def test_two_processes_share_what_they_have(tmp_path, monkeypatch):
    """Sums, maxima and lists; one lock for both; a signal that one of them has had is everyone's."""
    in_two_processes(monkeypatch, lambda rank: share(tmp_path))
    for rank in range(2):
        assert read_json(tmp_path / f"{rank}.json")["got"] == [3.0, 20, 1, [0, "x", 1, "x"], signal.SIGTERM]


# ---- files ----------------------------------------------------------------------------------------------------------

def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "file.json"
    write_json(path, {"n": 1})
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text('{"n": ')
        raise RuntimeError
    assert json.loads(path.read_text()) == {"n": 1} == read_json(path)
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    files.write_lines(path, [{"a": "ä"}, {}])
    assert path.read_text(encoding="utf-8") == '{"a": "ä"}\n{}\n'
    for text in ("{", "[1]", "[]", "3", "null", "[" * 10**5, b"\xff"):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(lambda: read_json(path), "file.json is not a JSON object")


def test_infinity_is_a_word_in_json(tmp_path):
    @dataclass(frozen=True)
    class Clip:
        high: float = math.inf
        low: float = -math.inf
        n: int = 3
        name: str | None = None

    write_json(tmp_path / "run.json", files.as_json(Clip()))
    assert read_json(tmp_path / "run.json") == {"high": "inf", "low": "-inf", "n": 3, "name": None}
    assert Clip(float(files.as_json(Clip())["high"])) == Clip()
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError):
            write_json(tmp_path / "run.json", {"loss": value})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_checksum_is_of_what_was_read(tmp_path):
    """It follows the bytes, not the place or the time; a name of the hub, or no name, has none."""
    assert [checksum(name) for name in (None, "", "gpt2", tmp_path / "none", tmp_path)] == [None] * 5
    file, folder = tmp_path / "rows.jsonl", tmp_path / "model"
    file.write_bytes(b"rows")
    assert checksum(file) == checksum(str(file)) == zlib.crc32(b"rows")
    (folder / "texts").mkdir(parents=True)
    seen = {checksum(file)}
    for name in ("model.safetensors", "pytorch_model.bin", "texts/a.txt"):
        for content in (b"", b"one", b"two"):
            (folder / name).write_bytes(content)
            os.utime(folder / name, (1, 1))
            seen.add(checksum(folder))
    assert len(seen) == 1 + 3 * 2 + 1  # an empty file adds nothing to those before it
    before = checksum(folder)
    (folder / "log.jsonl").write_text("a line")
    os.utime(folder / "model.safetensors", (2, 2))
    assert checksum(folder) == before == checksum(folder.rename(tmp_path / "moved"))


def test_a_folder_has_one_writer(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "run"
    with held(folder):
        refused(lambda: held(folder), "run: another run is writing there", "--out")
        monkeypatch.setenv("RANK", "1")  # a process of the same run
        with held(folder):
            pass
        monkeypatch.delenv("RANK")
        refused(lambda: held(folder), "another run is writing there")
    with held(folder):
        assert not folder.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL], ids=errno.errorcode.get)
def test_a_run_goes_on_where_nothing_can_be_locked(code, tmp_path, monkeypatch, capsys):
    """As on some network file systems; on Windows there is no flock at all."""
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path / "run"), held(tmp_path / "run"):
        line = f"{tmp_path}/run.lock cannot be locked ({os.strerror(code)}): the run goes on, but nothing keeps"
        assert capsys.readouterr().err.count(line) == 2
    monkeypatch.setattr(runs, "fcntl", None)
    with held(tmp_path / "run"):
        assert "run.lock cannot be locked (this system has no flock): the run goes on" in capsys.readouterr().err


def test_a_lock_that_may_not_be_taken_is_another_run_s(tmp_path, monkeypatch):
    def flock(file, operation):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fcntl, "flock", flock)
    refused(lambda: held(tmp_path / "run"), "another run is writing there")


def test_a_folder_beside_which_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "run.lock").mkdir()
    refused(lambda: held(tmp_path / "run"), f"--out={tmp_path}/run: {tmp_path}/run.lock cannot be written (Is a dir",
            "choose another --out")

    def read_only(path, *settings, **more):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(lambda: held(tmp_path / "a" / "run"), f"{tmp_path}/a cannot be written (Read-only file system)")


def test_a_file_of_a_folder_or_of_the_hub(tmp_path, monkeypatch):
    """tests/test_model.py asks a hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert fetch("out", "config.json") == require("out", "config.json") == Path("out/config.json")
    assert fetch("out", "model.safetensors") is None
    refused(lambda: require("out", "model.safetensors"), "out: this folder has no model.safetensors")
    for name in ("out/nowhere", "out/config.json"):
        refused(lambda name=name: fetch(name, "config.json"), f"'{name}' is neither a folder nor a name on the hub")
    refused(lambda: fetch("not a name", "config.json"), "'not a name' is neither a folder nor a name on the hub")


def test_a_file_of_the_hubs_cache_is_what_its_name_says(tmp_path):
    content = b"weights" * 1000
    blob, link = tmp_path / hashlib.sha256(content).hexdigest(), tmp_path / "model.safetensors"
    link.symlink_to(blob)
    blob.write_bytes(content)
    assert hub.intact(link) == link
    hub.intact.cache_clear()
    blob.write_bytes(content[:-1])
    refused(lambda: hub.intact(link), "model.safetensors is damaged", f"remove {blob}")


def test_a_cache_of_the_hub_that_cannot_be_written_is_not_the_network(monkeypatch):
    import huggingface_hub

    def ends_with(error, *words):
        def download(*name, **settings):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        refused(lambda: fetch("owner/name", "config.json"), "owner/name: ", *words)

    for code in (errno.ENOLCK, errno.EACCES, errno.EROFS, errno.ENOSPC):
        error = OSError(code, os.strerror(code), "/cache")
        ends_with(error, "config.json cannot be kept in the hub's cache", os.strerror(code), "set HF_HOME")
    for error in (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), OSError("no route")):
        ends_with(error, "the hub could not be reached for config.json", "check the network")


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    """It is what a clone without Git LFS has in the place of a large file."""
    path = tmp_path / "config.json"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    for read in (read_json, files.refuse_pointer):
        refused(lambda read=read: read(path), f"{path} is a Git LFS pointer, not the file itself", "`git lfs pull`")
    for text in ("", "{}", "version https://git-lfs.github.io"):
        path.write_text(text)
        files.refuse_pointer(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_holds_what_was_saved_and_runs_no_code(zipped, tmp_path):
    """A flipped bit is found in what is written today, a zip."""
    path, state = tmp_path / "state.pt", {"model": {"w": torch.arange(99.0)}, "step": 3}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_torch(path)["model"]["w"], state["model"]["w"]) and read_torch(path)["step"] == 3
    torch.save({"model": Path(".").resolve}, tmp_path / "code.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        read_torch(tmp_path / "code.pt")
    content = bytearray(path.read_bytes())
    at = content.index(torch.tensor([50.0]).numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    if zipped:
        with pytest.raises((ValueError, zipfile.BadZipFile)):
            read_torch(path)


def test_a_name_is_taken_as_it_is_but_for_the_home_folder(monkeypatch):
    """./dolly is a folder and dolly a set; a .. may lead out of a link."""
    monkeypatch.setenv("HOME", "/home/me")
    Names = dataclasses.make_dataclass("Names", [("data", str, flag("x", "")), ("prompt", str, flag("x", ""))])
    assert parse(Names, ["--data=./dolly"]).data == "./dolly" and parse(Names, ["--data=a/../b/"]).data == "a/../b/"
    assert parse(Names, ["--data=~/a,~/b"]).data == "/home/me/a,/home/me/b"
    assert parse(Names, ["--prompt=~/a"]).prompt == "~/a"


def test_clock():
    assert [runs.clock(s) for s in (4.4, 12_000, 216_000)] == ["0:00:04", "3:20:00", "2 days, 12:00:00"]
