"""Flags and the machine: what every command needs before the mathematics begins.

A script's settings are a frozen dataclass of `flag`s, which `run(main, Config)` reads from the
command line. Tests, notebooks and exercises write `Config(steps=3)` or call `make` instead.

Run:      python distill.py --help
Left out: YAML and sub-commands, because a script shows its own defaults and does one thing.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import math
import os
import re
import shlex
import signal
import sys
import typing
from datetime import timedelta

import torch
import torch.distributed as dist


class UserError(ValueError):
    """A mistake in flags, files or names. The message says what was given and what to do."""


class Stopped(BaseException):
    """SIGINT or SIGTERM has ended the run. The message says how to go on."""

    def __init__(self, signum: int, message: str = "stopped"):
        super().__init__(f"{message} ({signal.Signals(signum).name})")
        self.signum = signum


@contextlib.contextmanager
def in_one_line():
    """Ends the program with one line: after a mistake with code 2, after a signal with its own."""
    try:
        yield
    except BrokenPipeError:  # the reader has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except KeyboardInterrupt:
        print(f"{program()}: stopped (SIGINT)", file=sys.stderr)
        sys.exit(130)
    except (Stopped, UserError, argparse.ArgumentError, OSError, RuntimeError) as error:
        line = str(error)
        if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in line:
            line = "out of memory: lower --micro_batch or --sample_batch, or take a smaller model"
        elif isinstance(error, RuntimeError):  # it is no mistake of the user
            raise
        if "No space left on device" in line:
            line += ": make room, then go on with --resume"
        if os.environ.get("MINILLM_DEBUG"):
            raise
        print(f"{program()}: {line}", file=sys.stderr)
        sys.exit(128 + error.signum if isinstance(error, Stopped) else 2)


def flag(default, help: str, low: float | None = None, high: float = math.inf,
         may_be_empty: bool = False):
    """Declares a field of a Config: its default, what --help says about it, and its range."""
    metadata = dict(help=help, low=low, high=high, may_be_empty=may_be_empty)
    return dataclasses.field(default=default, metadata=metadata)


def make(Config: type, given: dict, presets=None):
    """Returns a Config of the settings given, of what `presets(given)` adds, and of defaults."""
    return Config(**(presets(given) if presets else {}) | given)


@in_one_line()
def parse(Config: type, argv: list[str], presets=None):
    """Returns the Config that these flags ask for."""
    title = (sys.modules[Config.__module__].__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(program(), description=title, exit_on_error=False,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    fields = {f"--{field.name}": field for field in dataclasses.fields(Config)}
    for name, field in fields.items():
        options = typing.get_args(field.type)  # of a Literal, or of `int | None`
        help = f"{field.metadata['help']} [default {field.default}]".replace("%", "%%")
        if field.type == tuple[str, ...]:
            parser.add_argument(field.name, nargs="*", help=help)
        elif field.type is bool:
            parser.add_argument(name, type=true_or_false, nargs="?", const=True, help=help)
        elif typing.get_origin(field.type) is typing.Literal:
            parser.add_argument(name, choices=options, help=help)
        else:
            parser.add_argument(name, type=options[0] if options else field.type, help=help)
    for word in argv:
        if re.search(r"[\ud800-\udfff]", word):
            raise UserError(f"{word!r} is not UTF-8 text")
    known, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "settings are --name=value; see --help"
        raise UserError(f"unknown flag {name} ({hint})")
    given = vars(known)
    for name, value in given.items():
        if value in ("", []) and not fields[f"--{name}"].metadata["may_be_empty"]:
            raise UserError(f"--{name}= is empty: give a value, or leave the flag out")
        if isinstance(value, list):
            given[name] = tuple(value)
        if isinstance(value, str) and name not in ("prompt", "input"):
            given[name] = ",".join(map(os.path.expanduser, value.split(",")))  # as in ~/a,~/b
    return make(Config, given, presets)


def true_or_false(word: str) -> bool:
    return bool(("false", "true").index(word.lower()))  # argparse reports the ValueError


def check(cfg, **ranges: tuple[float, float]) -> None:
    """Raises UserError if a field is neither None nor within its flag's range, bounds included."""
    for field in dataclasses.fields(cfg):
        low, high = ranges.get(field.name, (field.metadata["low"], field.metadata["high"]))
        value = getattr(cfg, field.name)
        if value is not None and low is not None and not low <= value <= high:
            raise UserError(f"--{field.name}={value} is out of range: give {low} to {high}")


@in_one_line()
def run(main, Config: type, presets=None) -> None:
    """Reads the flags and calls main. It stands under `if __name__ == "__main__"`."""
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack the letter "±"
    before = signal.signal(signal.SIGTERM, stop_now)
    try:
        main(parse(Config, sys.argv[1:], presets))
    finally:
        signal.signal(signal.SIGTERM, before)
    if dist.is_initialized():  # not after an error: NCCL would wait for the other processes
        dist.destroy_process_group()


def stop_now(signum: int, frame) -> typing.NoReturn:
    raise Stopped(signum)


def program() -> str:
    """Returns "distill.py", or "tools.bench" under `python -m tools.bench`."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec and spec.origin == sys.argv[0] else os.path.basename(sys.argv[0])


def command() -> str:
    """Returns the running command, to be noted beside what it makes."""
    module = [] if program().endswith(".py") else ["-m"]
    return shlex.join(["python", *module, program(), *sys.argv[1:]])


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where tensors live, what autocast computes in, and which of `world` processes this one is.
    `sum` and `max` go over all processes, in place, and `gather` joins their lists."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    sample_batch: int = 64  # answers decoded together
    logits: int = 2**25  # numbers in the logits that exist at a time

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            if self.world > 1 and not hasattr(tensor, "full_tensor"):  # --shard has summed those
                dist.all_reduce(tensor)

    def room(self, T: int, vocab_size: int) -> int:
        """How many rows of T positions have their logits at a time: 1 to sample_batch."""
        return min(self.sample_batch, max(1, self.logits // (T * vocab_size)))

    def max(self, tensor: torch.Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, items: list) -> list:
        parts = [items] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def barrier(self) -> None:
        self.gather([])

    def say(self, *words) -> None:
        try:
            if self.rank == 0:
                print(*words, flush=True)
        except BrokenPipeError:  # `| head` does not end hours of training
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def machine(device: str = "auto", dtype: str = "auto", sample_batch: int = 64) -> Machine:
    """Picks a device and its fastest dtype, and joins the processes that torchrun has started."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device={device} is not supported; use cpu, cuda or cuda:1")
    if device == "cpu":
        place = torch.device("cpu")
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        fastest = torch.bfloat16 if native else torch.float32
        with contextlib.suppress(AttributeError, OSError, TypeError):  # where malloc is not glibc's
            # Freed memory is kept for the next tensor. Otherwise training needs half as much again.
            ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    else:
        index = int(device.partition(":")[2] or os.environ.get("LOCAL_RANK", 0))
        if world > 1 and device != "cuda":
            raise UserError(f"--device={device} is one GPU for {world} processes; use cuda")
        if index >= torch.cuda.device_count():
            raise UserError(f"--device={device}: there is no GPU number {index}; use --device=cpu")
        place = torch.device("cuda", index)
        torch.cuda.set_device(place)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for each length, 40 ms on an H100
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        fastest = torch.bfloat16 if native else torch.float16
    if world > 1 and not dist.is_initialized():  # all wait, perhaps for hours, while one tokenises
        backend = dict(backend="gloo") if device == "cpu" else dict(backend="nccl", device_id=place)
        dist.init_process_group(**backend, timeout=timedelta(hours=6))
    kind = fastest if dtype == "auto" else getattr(torch, dtype)
    logits = int(6.5e6 if device == "cpu" else 5.2e7)
    return Machine(place, kind, rank, world, sample_batch, logits)
