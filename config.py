"""Flags, the machine and files: what every command needs before any mathematics begins.

A script's settings are one frozen dataclass. `flag(default, help)` declares a field, `run(main, Config)` reads
`--name=value` flags into it, and a user's mistake ends in one line and exit code 2. Tests, notebooks and exercises
skip the command line and write `Config(steps=3)`; settings that imply others, as a recipe does, go through `make`.

Run:      python distill.py --help
Left out: YAML files and a registry of settings (each script shows its own defaults); sub-commands (a script is one).
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import types
import typing
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout


class UserError(ValueError):
    """A mistake in flags, files or names. The message says what was given and what to do."""


class Stopped(Exception):
    """SIGINT or SIGTERM has ended the run where nothing is lost. The message says what there is to go on with."""

    def __init__(self, signum: int, message: str = "stopped"):
        super().__init__(f"{message} ({signal.Signals(signum).name})")
        self.signum = signum


# ---- flags ----------------------------------------------------------------------------------------------------------

def flag(default, help: str, may_be_empty: bool = False):
    """A field of a Config: its default, and one phrase that --help prints. An empty value, --name=, is a mistake unless
    `may_be_empty`: as a path it would mean the present folder."""
    return dataclasses.field(default=default, metadata={"help": help, "may_be_empty": may_be_empty})


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(Config: type, argv: list[str], presets: Callable[[dict], dict] | None = None):
    """Flags to a Config. `presets` maps the flags given to the settings that they imply; flags given win.

    Exits with code 2 and one line on an unknown flag, a value of the wrong type or one out of range."""
    parser = Parser(allow_abbrev=False, description=(sys.modules[Config.__module__].__doc__ or "").split("\n")[0])
    hints, fields = typing.get_type_hints(Config), dataclasses.fields(Config)
    for field in fields:
        kind, choices = hints[field.name], None
        if kind == tuple[str, ...]:  # words that no flag stands before
            parser.add_argument(field.name, nargs="*", default=argparse.SUPPRESS, help=field.metadata["help"])
            continue
        if isinstance(kind, types.UnionType):  # `float | None`: None stands for "not given"
            kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        if typing.get_origin(kind) is typing.Literal:
            choices, kind = typing.get_args(kind), str
        help = f"{field.metadata['help']} [{' | '.join(choices) + '; ' if choices else ''}default {field.default}]"
        more = {"nargs": "?", "const": True} if kind is bool else {"choices": choices}
        parser.add_argument(f"--{field.name}", type=READERS[kind], default=argparse.SUPPRESS,
                            help=help.replace("%", "%%"), metavar=kind.__name__.upper(), **more)
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:  # it could not be written beside a result either
            parser.error(f"{word!r} is not UTF-8 text")
    known, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("--"):
            parser.error(f"unexpected argument {unknown[0]!r}: every setting is a flag, --name=value")
        near = difflib.get_close_matches(name, [f"--{field.name}" for field in fields], n=1)
        parser.error(f"unknown flag {name}" + (f" (did you mean {near[0]}?)" if near else "; --help lists them"))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(known).items()}
    for field in fields:
        value = given.get(field.name)
        if isinstance(value, tuple) and hints[field.name] != tuple[str, ...]:  # argparse reads "--" as no value at all
            parser.error(f"argument --{field.name}: a value is missing")
        if value == "" and not field.metadata["may_be_empty"]:
            parser.error(f"--{field.name}= is empty: give a value, or leave the flag out")
    try:
        return make(Config, given, presets)
    except UserError as error:
        parser.error(str(error))


def make(Config: type, given: dict, presets: Callable[[dict], dict] | None = None):
    """A Config of the settings given, of what they imply by `presets` where they are silent, and of the defaults."""
    return Config(**(presets(given) if presets else {}) | given)


def read_bool(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def read_number(kind: type, name: str) -> Callable[[str], float]:
    def read(word: str):
        try:
            value = kind(word)
        except ValueError:
            value = float("nan")
        if value != value:
            raise argparse.ArgumentTypeError(f"{word!r} is not {name}")
        return value

    return read


READERS = {bool: read_bool, int: read_number(int, "an integer"), float: read_number(float, "a number"), str: str}


def check(cfg, **ranges: tuple[float, float]) -> None:
    """Raises UserError for a field outside its range, bounds included. None is always allowed."""
    for name, (low, high) in ranges.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name}={value} is out of range: it must lie between {low} and {high}")


def check_place(cfg, folder: str = "", file: str = "") -> None:
    """Raises UserError if nothing can be written to the path in a field, of a folder or of a file. Folders that do not
    exist yet are no mistake."""
    name, path = folder or file, getattr(cfg, folder or file)
    if path is None:
        return
    if file and os.path.isdir(path):
        raise UserError(f"--{name}={path} is a folder: give the name of a file")
    for place in (Path(path) if folder else Path(path).parent, *Path(path).parents):
        if os.path.lexists(place) and not os.path.isdir(place):
            raise UserError(f"--{name}={path}: {place} is a file, and no folder to write into")


def run(main: Callable, Config: type, presets: Callable[[dict], dict] | None = None) -> None:
    """What stands under `if __name__ == "__main__"`: reads the flags and calls main. A mistake is told in one line, and
    the exit code is 2; what was stopped by a signal has the signal's."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without the letter "±" is no reason to stop
            stream.reconfigure(errors="replace")
    cfg = parse(Config, sys.argv[1:], presets)
    before = signal.signal(signal.SIGTERM, stop_now)
    try:
        main(cfg)
        if dist.is_initialized():  # not after an error: NCCL would wait for processes that wait for this one
            dist.destroy_process_group()
    except (Stopped, KeyboardInterrupt) as stop:
        stop = stop if isinstance(stop, Stopped) else Stopped(signal.SIGINT)
        print(f"{os.path.basename(sys.argv[0])}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except BrokenPipeError:  # data.py | head
        drop_output()
        sys.exit(128 + 13)  # as a shell says of SIGPIPE
    except (UserError, OSError, RuntimeError) as error:
        too_much = "can't allocate memory" in str(error)  # a RuntimeError, on a CPU
        known = too_much or isinstance(error, UserError | OSError | torch.cuda.OutOfMemoryError)
        if not known or os.environ.get("MINILLM_DEBUG"):
            raise
        if too_much:
            error = f"there is not so much memory ({str(error).rpartition('memory: ')[2][:60]}): take a smaller model"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            error = f"{error}: make room; what was written before is whole, and a run goes on from it with --resume"
        if isinstance(error, torch.cuda.OutOfMemoryError):
            error = "out of memory on the GPU: lower --micro_batch, --batch_size or --sample_batch, where there is one"
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, before)


def drop_output() -> None:
    """Lets further output go nowhere: who read it has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def stop_now(signum: int, frame) -> typing.NoReturn:
    raise Stopped(signum)


class Stop:
    """Within it SIGINT and SIGTERM are only noted, for a loop to end where nothing is lost; a second one ends the run
    at once. Python handles signals in its main thread only, so in another nothing changes."""

    def __init__(self, when: str):
        self.when, self.own, self.signum = when, 0, 0  # the signal that this process had; that any had

    def __enter__(self) -> "Stop":
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.before = {s: signal.signal(s, self.note) for s in signals}
        return self

    def note(self, signum: int, frame) -> None:
        if self.own:
            stop_now(signum, frame)
        self.own = self.signum = signum
        print(f"{signal.Signals(signum).name}: will stop {self.when}; a second one stops at once, and loses more",
              file=sys.stderr, flush=True)

    def asked(self, m: "Machine") -> bool:
        """Whether any process has been asked to stop; all hear the same."""
        signum = torch.tensor(self.signum, device=m.device)
        m.max(signum)
        self.signum = int(signum)
        return self.signum > 0

    def __exit__(self, kind, error, trace) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)
        if self.signum and kind is None:  # the loop came to its end first
            raise Stopped(self.signum)


def command() -> str:
    """The command that is running, to be noted beside what it makes."""
    return shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])


# ---- the machine ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Machine:
    """Where tensors live, what autocast computes in, and which of the `world` processes this one is."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    vocab_chunk: int = 128  # positions whose logits exist at a time
    capture: bool = False  # record a decoding step as a CUDA graph, and replay it

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, *tensors: torch.Tensor) -> None:
        """Adds each tensor over all processes, in place."""
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor)

    def max(self, tensor: torch.Tensor) -> None:
        """The largest over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, items: list) -> list:
        """The lists of all processes, joined."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Waits for what the device was told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable) -> float:
        """How long a call of the function takes, including what it has told the device to do."""
        began = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - began

    def peak_gib(self) -> float:
        """The most memory held so far: on a GPU by tensors, on a CPU by the process, and NaN if that is not Linux."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        status = Path("/proc/self/status")  # not getrusage: a child inherits its parent's figure there
        lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
        return next((float(line.split()[1]) for line in lines if line.startswith("VmHWM")), math.nan) / 2**20

    def say(self, *words) -> None:
        """Prints, on the first process only."""
        if self.rank == 0:
            try:
                print(*words, flush=True)
            except BrokenPipeError:  # `| head` does not end hours of training
                drop_output()


def keep_freed_memory() -> None:
    """Tells glibc's allocator to keep freed memory for the next tensor of that size, which saves a third of training's
    memory: otherwise holes remain. Elsewhere nothing happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def machine(device: str = "auto", dtype: str = "auto", vocab_chunk: int | None = None,
            capture: bool = False) -> Machine:
    """Picks device and dtype, and joins torchrun's process group where there is one.

    dtype auto: bfloat16 where the device multiplies it natively, else float16 on CUDA and float32 on the CPU.
    vocab_chunk None: 1,024 positions on CUDA; on the CPU 128, whose logits fit into its caches."""
    try:
        rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        world = int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise UserError("RANK, WORLD_SIZE and LOCAL_RANK in the environment are torchrun's: unset them") from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device={device} is no device; use cpu, cuda or cuda:1") from None
    if place.type not in ("cpu", "cuda"):
        raise UserError(f"--device={device} is not supported; use cpu or cuda")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device={device}, but this PyTorch sees no CUDA device; use --device=cpu")
        if world > 1 and place.index is not None:
            raise UserError(f"--device={device} is one GPU for {world} processes; give --device=cuda, one for each")
        index = local if place.index is None else place.index
        if index >= torch.cuda.device_count():
            raise UserError(f"there is no GPU number {index}: this machine has {torch.cuda.device_count()}, from 0 on")
        place = torch.device("cuda", index)
        torch.cuda.set_device(place)
        torch.backends.cuda.enable_cudnn_sdp(False)  # on an H100 it plans anew for each length, up to 40 ms a token
    elif capture:
        raise UserError("--capture records a step of a GPU; on the CPU there is nothing to record")
    if world > 1 and not dist.is_initialized():  # six hours, as all wait while one tokenises plain text
        kind = dict(backend="nccl", device_id=place) if place.type == "cuda" else dict(backend="gloo")
        dist.init_process_group(**kind, timeout=timedelta(hours=6))
    if dtype == "auto":
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # private in 2.13, hence the default
        if place.type == "cuda":
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        else:
            dtype = "bfloat16" if native() else "float32"
    if place.type == "cpu":
        keep_freed_memory()
    chunk = vocab_chunk or (128 if place.type == "cpu" else 1024)
    return Machine(place, getattr(torch, dtype), rank, world, chunk, capture)


# ---- files ----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` if the block ends well: what is read there is the old file or the new one,
    never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def checksum(name: str | Path | None) -> int | None:
    """A checksum of a user's own file, or of the texts and weights in a folder, to notice if they are replaced; None
    for the name of anything else, which always means the same."""
    path = Path(name or "")
    kinds = ("*.safetensors", "*.bin", "**/*.txt") if name and path.is_dir() else ()
    files = [path] if path.is_file() else sorted(file for kind in kinds for file in path.glob(kind))
    checksums = (crc32_of(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return zlib.crc32(repr([*checksums]).encode()) if files else None


@cache
def crc32_of(path: Path, size: int, mtime_ns: int) -> int:
    """Of a file that had this size and time of change. Each is read once in a process, and of a very large one only the
    beginning and the end."""
    crc, part = size, 2**24
    with open(path, "rb") as file:
        while piece := file.read(part):
            crc = zlib.crc32(piece, crc)
            if size > 2**30 and file.tell() == part:
                file.seek(size - part)
    return crc


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other runs from writing into a folder: raises UserError if one does already. The lock, on a file beside the
    folder, ends with the process, however that ends."""
    lock = FileLock(f"{folder}.lock")
    if int(os.environ.get("RANK", 0)) == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{folder}: another run is writing there; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def read_json(path: Path) -> dict:
    """The object in a .json file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: remove it, or fetch it again")
    return value


def write_json(path: Path, value) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    """The rows of a .jsonl file that a run has written or is writing; a last line that is not whole is left out."""
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise UserError(f"{path} holds a line that is not JSON: remove it, or make the file anew") from None


def write_lines(path: Path, rows: list[dict]) -> None:
    with written_aside(path) as aside:
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def clock(seconds: float) -> str:
    """"41 s", "7 min", "3 h 20", "2.5 days"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d}" if minutes < 1440 else f"{minutes / 1440:.1f} days"
