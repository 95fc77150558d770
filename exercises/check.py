"""Progress in the exercises, of one student or of a class: a row a folder, a column an exercise.

A folder holds a student's copies of the exercises. Only `solve` is taken from a copy. It is checked
against the specification in this folder, in a process of its own, so a solution that never ends,
raises, exits or floods the terminal does not stop the others.

Run:      python -m exercises.check                             this folder
          python -m exercises.check class/anna class/ben --csv=progress.csv
"""

import ast
import contextlib
import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from config import UserError, check, flag, run
from safe.files import check_place, written_aside
from exercises import checker

HERE = Path(__file__).resolve().parent
EXERCISES = sorted(path.stem for pattern in ("[0-9][0-9]_*.py", "bug_[0-9].py")
                   for path in HERE.glob(pattern))
MARKS = {"solved": "yes", "unsolved": ".", "wrong": "no", "error": "error", "missing": "-",
         "too long": "time"}
RUNNING: set[subprocess.Popen] = set()
stopping = threading.Event()


@dataclass(frozen=True)
class Config:
    folders: tuple[str, ...] = flag((), "folders of students; default: this one")
    csv: str | None = flag(None, "also write the table here, with every message")
    seconds: float = flag(60.0, "longest time for one exercise", 0.1, 3600)
    jobs: int = flag(2, "exercises checked at a time", 1, 100)

    def __post_init__(self):
        check(self)
        check_place(self, file="csv")
        for folder in self.folders:
            if not Path(folder).is_dir():
                raise UserError(f"{folder} is not a folder")


# ---- one exercise --------------------------------------------------------------------------------

def load(path: Path):
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judge(name: str, path: str, verdict: str) -> None:
    """Checks a student's file and writes the verdict to another file. This runs in a process of its
    own."""
    ours = load(HERE / f"{name}.py")
    sys.modules["checker"] = checker  # its name in copies made before this folder was a package
    try:
        student = load(Path(path))
        student.spec = handed_in
        task = body(HERE / f"{name}.py", "spec")
        if task and body(Path(path), "solve") == task:
            raise ValueError("this is spec word for word: it is the task, not an answer to it")
        found = checker.check(ours.EXERCISE, student.solve)
    except BaseException as error:  # a student's file may even exit
        found = checker.Verdict("error", f"{type(error).__name__}: {checker.first_line(error)}")
    Path(verdict).write_text(json.dumps([found.state, found.message]), encoding="utf-8")


def body(path: Path, function: str) -> list[str]:
    """The statements of a function in a file, without comments and docstring."""
    statements = []
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            statements = node.body  # the last definition counts
    return [ast.dump(part) for part in statements
            if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]


def handed_in(*arguments) -> None:
    """Replaces `spec` in a student's file."""
    raise ValueError("spec is the task, not an answer to it")


def verdict_on(folder: Path, name: str, seconds: float) -> tuple[str, str]:
    """(state, message) of one exercise in a folder."""
    path = (folder / f"{name}.py").resolve()
    if not path.is_file():
        return "missing", "there is no such file"
    if name.startswith("bug") and path.read_bytes() == (HERE / path.name).read_bytes():
        return "unsolved", "as it was given"
    with tempfile.TemporaryDirectory() as scratch:
        verdict = Path(scratch) / "verdict.json"
        command = [sys.executable, "-m", "exercises.check", "--judge", name, path, verdict]
        process = subprocess.Popen(
            command, cwd=scratch, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checker.ROOT)})
        RUNNING.add(process)
        try:
            process.wait(0 if stopping.is_set() else seconds)
        except subprocess.TimeoutExpired:
            return "too long", f"it was stopped after {seconds:g} seconds: does a loop never end?"
        finally:
            end(process)
            process.wait()
            RUNNING.discard(process)
        if not verdict.is_file():
            return "error", f"it ended by itself, with exit code {process.returncode}"
        return tuple(json.loads(verdict.read_text(encoding="utf-8")))


def end(process: subprocess.Popen) -> None:
    """Kills a process and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, AttributeError):  # it has ended; or on Windows
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


# ---- command -------------------------------------------------------------------------------------

def table(rows: dict[str, Sequence[tuple[str, str]]]) -> str:
    width = max(len(name) for name in (*rows, "folder")) + 2
    heads = [name.split("_")[0] if name[0].isdigit() else name.replace("_", "")
             for name in EXERCISES]
    lines = [f"{'folder':{width}}" + "".join(f"{head:>6}" for head in heads) + f"{'solved':>9}"]
    for name, verdicts in rows.items():
        marks = "".join(f"{MARKS[state]:>6}" for state, _ in verdicts)
        solved = sum(state == "solved" for state, _ in verdicts)
        lines.append(f"{name:{width}}{marks}{f'{solved}/{len(verdicts)}':>9}")
    return "\n".join(lines)


def write_csv(path: Path, rows: dict[str, Sequence[tuple[str, str]]]) -> None:
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["folder", "exercise", "state", "message"])
        for label, verdicts in rows.items():
            for name, (state, message) in zip(EXERCISES, verdicts):
                writer.writerow([label, name, state, message])


def verdicts_on(folders: dict[str, Path], cfg: Config) -> dict[str, list[tuple[str, str]]]:
    """The verdicts on all exercises of each folder, `jobs` of them at a time."""
    with ThreadPoolExecutor(cfg.jobs) as pool:
        work = {label: [pool.submit(verdict_on, folder, name, cfg.seconds) for name in EXERCISES]
                for label, folder in folders.items()}
        try:
            return {label: [future.result() for future in work[label]] for label in work}
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                end(process)
            raise


def main(cfg: Config) -> dict[str, list[tuple[str, str]]]:
    folders = {folder: Path(folder) for folder in cfg.folders} or {HERE.name: HERE}
    rows = verdicts_on(folders, cfg)
    print(table(rows))
    if len(rows) == 1:
        (verdicts,) = rows.values()
        for name, (state, message) in zip(EXERCISES, verdicts):
            if state not in ("solved", "unsolved"):
                print(f"\n{name}: {state}: {message}")
    if cfg.csv:
        write_csv(Path(cfg.csv), rows)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--judge"]:
        judge(*sys.argv[2:])
    else:
        run(main, Config)
