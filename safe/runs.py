"""Folders of runs and of results: nothing is lost, mixed up or half-written.

A run in training leaves run.json (its settings and checksums of what it reads), log.jsonl (a line
an update), state.pt and the state before; when it is finished, results.json and the last state.
A folder of results holds results.json alone, with the settings that made it under "given".
"""

import ctypes
import json
import math
import os
import re
import signal
import sys
import time
import typing
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import torch

from config import Machine, Stopped, UserError, command
from families import is_gpt2
from safe.files import (as_json, read_json, refuse_pointer, txt_files, write_json, write_lines,
                        written_aside)
from safe.hub import read_torch
from safe.rows import is_file_of_rows

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

LENGTHS = ("steps", "updates", "epochs")  # what may grow when a finished run goes on


class Stop:
    """Within it, SIGINT and SIGTERM are only noted, so that a loop can end where nothing is lost.
    A second signal ends the run at once."""

    def __init__(self, when: str):
        self.when = when
        self.own = 0  # the signal that this process has had
        self.signum = 0  # the signal that any process has had

    def __enter__(self) -> "Stop":
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, signum: int, frame) -> None:
        if self.own:
            raise Stopped(signum)
        self.own = self.signum = signum
        print(f"signal {signum}: stopping {self.when}; a second one stops at once", file=sys.stderr)

    def asked(self, m: Machine) -> bool:
        """Tells whether any process has had a signal. All processes get the same answer."""
        signum = torch.tensor(self.signum, device=m.device)
        m.max(signum)
        self.signum = int(signum)
        return self.signum > 0

    def end(self, m: Machine, message: str) -> typing.NoReturn:
        m.barrier()  # all processes have saved before one ends
        raise Stopped(self.signum, message)

    def __exit__(self, kind, error, trace) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        if self.signum and not error:  # the loop came to its end first
            raise Stopped(self.signum)


def held(folder: Path) -> AbstractContextManager:
    """Keeps other runs out of a folder until the block, or the process, ends. Where there are no
    locks, as on some network file systems, the run goes on, and a line says so."""
    if int(os.environ.get("RANK", 0)) > 0:
        return nullcontext()
    lock = f"{os.path.realpath(folder)}.lock"  # one folder may have two names
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a")
    except OSError as error:
        raise UserError(f"--out={folder}: {error.filename or lock} cannot be written "
                        f"({error.strerror}); choose another --out") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the second is how some file systems say it
        file.close()
        raise UserError(f"{folder}: another run is writing there; use another --out") from None
    except (OSError, AttributeError) as error:
        reason = error.strerror if fcntl else "this system has no flock"
        print(f"{lock} cannot be locked ({reason}): the run goes on, but nothing keeps a second "
              "one out of this folder", file=sys.stderr)
    return file


def checksum(name: str | Path | None) -> int | None:
    """Returns a checksum of a user's file, or of a folder's model and texts; else None."""
    path = Path(name or "no file")
    kinds = ["*.safetensors", "*.bin", "config.json", "tokenizer.json", "vocab.json"]
    if path.is_dir() and (path / "config.json").is_file() and not is_gpt2(str(path)):
        kinds += ["tokenizer_config.json", "generation_config.json", "chat_template.jinja",
                  "tokenizer.model"]
    model = [file for kind in kinds for file in path.glob(kind)]
    files = [path] if path.is_file() else sorted({*model, *txt_files(path)})
    crc = 0
    for file in files:
        with open(file, "rb") as content:
            while piece := content.read(2**24):
                crc = zlib.crc32(piece, crc)
    return crc if files else None


def made_with(cfg) -> dict:
    """The settings of a run, and checksums of the user's files that it reads."""
    settings = as_json(cfg)
    for name in ("data", "valid_data", "corpus", "model", "teacher", "student"):
        content = checksum(getattr(cfg, name, None))
        if content is not None:
            settings[f"the content of {name}"] = content
    if is_file_of_rows(getattr(cfg, "data", "")):  # earlier versions held a file's last rows out
        settings["rows held out by"] = "a hash of the prompt"
    return settings


def same(old, new) -> bool:
    """Whether two settings are equal. Two names of one file or folder are, as w/ and ./w."""
    if isinstance(old, str) and isinstance(new, str):
        return os.path.realpath(old) == os.path.realpath(new)
    return old == new


def grown(old, new) -> bool:
    """Whether a number of updates or of epochs is larger than it was."""
    return isinstance(old, int) and isinstance(new, int) and old < new


def to_be_longer(out: Path, cfg) -> bool:
    """Whether --resume asks for more updates than the run in this folder was made for."""
    old = read_json(out / "run.json") if (out / "run.json").is_file() else {}
    return cfg.resume and any(grown(old.get(name), getattr(cfg, name, None)) for name in LENGTHS)


def is_finished(out: Path, cfg, free: set[str]) -> bool:
    """Whether the folder holds a finished run of these settings, the `free` ones aside. With
    --resume a finished run may go on for more updates; then it is unfinished.

    Raises UserError if it holds something else, a run of other flags or files, or an unfinished run
    while --resume is not given."""
    finished = (out / "results.json").is_file()
    begun = (out / "run.json").is_file()
    if finished and (not begun or "given" in read_json(out / "results.json")):  # of eval.py
        raise UserError(f"--out={out} holds results of something else: give another folder")
    weights = [file for kind in ("*.safetensors", "*.bin") for file in out.glob(kind)]
    if weights and not begun:
        raise UserError(f"--out={out} holds a model that no run here has made: give another folder")
    if finished and not weights:
        raise UserError(f"{out} holds a finished run without its weights: remove that folder, and "
                        "it is trained again")
    if begun:
        old, new = read_json(out / "run.json"), made_with(cfg)
        old = {field.name: field.default for field in fields(cfg)} | old  # of earlier versions
        longer = to_be_longer(out, cfg)
        for name in new:
            more = name in LENGTHS and grown(old.get(name), new[name])
            if name in free or same(old.get(name), new[name]) or (longer and more):
                continue
            go_on = "give --resume to go on" if more else "choose another --out"
            raise UserError(f"{out} was made with {name}={old.get(name)}, and now it is "
                            f"{new[name]}: {go_on}, or remove that folder")
        if finished and longer and not (out / "state.pt").is_file():
            raise UserError(f"{out} cannot go on: there is no state.pt; choose another "
                            "--out")
        finished = finished and not longer
        if not finished and not cfg.resume:
            raise UserError(f"{out} holds an unfinished run: --resume goes on with it; to begin "
                            "anew remove the folder")
    return finished


def begin(out: Path, cfg, free: set[str], m: Machine) -> bool:
    """Whether the run of this folder is finished. Raises UserError as is_finished() does."""
    finished = is_finished(out, cfg, free)
    if to_be_longer(out, cfg):
        m.say(f"{out}: goes on for more updates; the learning rate, if it changes with their "
              "number, is from here on that of the longer run")
    m.barrier()  # all processes have looked before one writes
    if finished:
        m.say(f"{out}: finished earlier, kept")
    return finished


def save_state(out: Path, model: torch.nn.Module, optimizer, scaler, step: int,
               best: dict | None) -> None:
    """Writes what a run is resumed from, and keeps the state before, should this one be damaged.
    Order and draws are functions of the step and the seed."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scaler": scaler.state_dict(), "step": step, "best": best}
    with written_aside(out / "state.pt") as aside:
        with open(aside, "wb") as file:  # given a path, torch does not say that the disk is full
            torch.save(state, file)
        if (out / "state.pt").is_file():
            os.replace(out / "state.pt", out / "state-before.pt")


def load_state(out: Path, cfg, model: torch.nn.Module, optimizer, scaler,
               m: Machine) -> tuple[int, dict | None]:
    """(updates done, best validation so far) from state.pt, or (0, None) without one. Notes the
    flags in run.json, and cuts log.jsonl back to where the run goes on."""
    state, before = out / "state.pt", out / "state-before.pt"
    path = before if before.is_file() and not state.is_file() else state  # killed between two names
    step, best, logged = 0, None, -1
    if path.is_file():
        refuse_pointer(path)
        try:
            saved = read_torch(path)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if saved["scaler"]:  # it is empty unless the run computes in float16
                scaler.load_state_dict(saved["scaler"])
            step, best, logged = saved["step"], saved["best"], saved["step"]
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # pickle, zip and torch have their own for a broken file
            other = f"remove {state.name}, and --resume takes the older {before.name}; or "
            raise UserError(f"{path} is damaged ({type(error).__name__}): "
                            f"{other if before.is_file() and path == state else ''}remove {out} to "
                            "begin anew") from None
    if m.rank == 0:
        (out / "results.json").unlink(missing_ok=True)  # of a run that is to be longer
        write_json(out / "run.json", made_with(cfg) | {"command": command()})
        if (out / "log.jsonl").is_file():
            lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
            with written_aside(out / "log.jsonl") as aside:
                aside.write_bytes(b"".join(line for line in lines if step_of(line) <= logged))
    m.barrier()
    return step, best


def step_of(line: bytes) -> float:
    """The update of a line of log.jsonl; infinity for one that was not written whole."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf


def finish(out: Path, m: Machine, results: dict) -> dict:
    """Marks a run as finished, by results.json. Its last state stays, to make it longer one day."""
    if m.rank == 0:
        write_json(out / "results.json", results)
        (out / "state-before.pt").unlink(missing_ok=True)
    m.barrier()
    return results


def log(out: Path, m: Machine, line: dict) -> None:
    if m.rank == 0:
        with open(out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def within_memory(train: Callable, cfg, stop: Stop | None) -> dict:
    """train(cfg, stop). Where a GPU's memory does not suffice, it goes on from the last saved state
    with half the micro-batch, of several processes none."""
    while True:
        try:
            return train(cfg, stop)
        except torch.cuda.OutOfMemoryError:
            if cfg.micro_batch == 1 or os.environ.get("WORLD_SIZE", "1") != "1":
                raise
        torch.cuda.empty_cache()
        print(f"out of memory: --micro_batch={cfg.micro_batch} is {cfg.micro_batch // 2} from here "
              "on; the batch stays the same")
        cfg = replace(cfg, micro_batch=cfg.micro_batch // 2, resume=True)


def clock(seconds: float) -> str:
    """Returns "0:07:00" or "2 days, 12:00:00"."""
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """Prints how far a stage is, every two seconds at most, and every validation."""
    SHOWN = ("loss", "valid", "rouge_l", "reverse_kl", "reward", "loss_pt", "clip_fraction",
             "response_tokens", "grad_norm")

    def __init__(self, m: Machine, stage: str, first: int, last: int):
        self.m, self.stage, self.first, self.last = m, stage, first, last
        self.began = self.shown_at = time.perf_counter()

    def show(self, step: int, values: dict, answers: Sequence[dict] | None = None) -> None:
        """The values of a step. With answers, even if there are none, they are a validation's."""
        now = time.perf_counter()
        validated = answers is not None
        if not validated and now - self.shown_at < 2:
            return
        self.shown_at = now
        values = {name: values[name] for name in self.SHOWN if values.get(name) is not None}
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if validated:
            text = f"| validation:  {text}"
        else:
            left = (now - self.began) / (step - self.first) * (self.last - step)
            text += f"  left {clock(left)}"
        self.m.say(f"{self.stage} {step}/{self.last}  {text}")
        for answer in answers or ():
            mark = {100.0: "right  ", 0.0: "wrong  "}.get(answer["scores"].get("valid"), "")
            text = f"{answer['instruction']} {answer['input']} -> {answer['answer']}"
            self.m.say(f"    {mark}{' '.join(text.split())[:110 - len(mark)]}")


class Run:
    """A stage in training: what it logs and prints, and what it saves and is resumed from."""

    def __init__(self, out: Path, cfg, m: Machine, stop: Stop | None, last: int,
                 model: torch.nn.Module, optimizer, scaler):
        self.out, self.m, self.stop = out, m, stop
        self.trained = (model, optimizer, scaler)
        self.step, self.best = load_state(out, cfg, *self.trained, m)
        self.progress = Progress(m, out.name, self.step, last)

    def log(self, line: dict) -> None:
        log(self.out, self.m, line)
        self.progress.show(line["step"], line)

    def log_validation(self, step: int, scores: dict, answers: Sequence[dict]) -> None:
        log(self.out, self.m, {"step": step, "valid": scores})
        self.progress.show(step, scores, answers)

    def save(self, step: int, best: dict | None, due: bool) -> None:
        """Saves the state if it is due, or if a signal has come, after which the run ends."""
        stopped = bool(self.stop and self.stop.asked(self.m))
        if due or stopped:
            self.write(step, best)
        if stopped:
            message = f"{self.out}: stopped and saved after update {step}; --resume goes on"
            self.stop.end(self.m, message)

    def write(self, step: int, best: dict | None) -> None:
        if self.m.rank == 0:
            save_state(self.out, *self.trained, step, best)
        elif hasattr(self.trained[0], "skeleton"):  # --shard: each process gives its part
            for part in self.trained[:2]:
                part.state_dict()

    def finish(self, step: int, best: dict | None) -> dict:
        if self.stop:
            self.stop.asked(self.m)  # a signal that one process has had stops all of them
        self.write(step, best)
        return finish(self.out, self.m, {"best": best})


def earlier(path: Path | None, given: dict, m: Machine, own: bool = False) -> dict | None:
    """The results in this file if they were made with the same settings, weights and data; None
    where there is no file, or where it is the run's own. Raises UserError for any other results."""
    if not path or not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        old = results["given"]
        if "template" in given:  # which results of earlier versions lack
            old.setdefault("template", "auto")
        if old.keys() == given.keys() and all(same(old[name], given[name]) for name in given):
            m.say(f"{path}: made earlier, kept")
            return results
    except (ValueError, LookupError, TypeError):  # it is a list, say
        own = False
    if not own:
        raise UserError(f"{path} holds results of other settings or of other files: give another "
                        "--out, or remove that folder")
    return None


def keep(results: dict, path: Path | None, m: Machine, beside: str = "",
         lines: Sequence[dict] = ()) -> dict:
    """Writes the results to a path if there is one, and what they were made of beside it."""
    if path and m.rank == 0:
        if lines:
            path.unlink(missing_ok=True)  # it belongs to other lines than those written now
            write_lines(path.with_name(beside), lines)
        write_json(path, results)
    m.barrier()
    return results


def close_holes() -> None:
    """Gives the memory that the C library keeps free back to the system, between two kinds of work,
    whose tensors do not fit into each other's holes. A cycle's peak is 5 to 9% lower for it."""
    with suppress(AttributeError, OSError, TypeError):  # where malloc is not glibc's
        ctypes.CDLL(None).malloc_trim(0)


def peak_gib(device: torch.device) -> float:
    """Returns the peak of memory, on a GPU or, under Linux, of the process. It is 0 elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")  # getrusage would start from the parent's peak
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else "")
    return int(peak[1]) / 2**20 if peak else 0.0
