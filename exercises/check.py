"""Progress in the exercises, of one student or of a class: a row for each folder, a column for each exercise.

A folder holds copies of the exercises with what was written into them. Of each copy only `solve` is taken, and checked
against this folder's own specification, in a process of its own: one that loops for ever, raises, exits or floods the
terminal does not stop the others.

Run:      python exercises/check.py                             this folder
          python exercises/check.py class/anna class/ben --csv=progress.csv
"""

import ast
import contextlib
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

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the project's files have no package

from config import UserError, check, check_place, flag, run, written_aside  # noqa: E402

EXERCISES = sorted(path.stem for pattern in ("[0-9][0-9]_*.py", "bug_[0-9].py") for path in HERE.glob(pattern))
RUNNING: set[subprocess.Popen] = set()
stopping = threading.Event()
MARKS = {"solved": "yes", "unsolved": ".", "wrong": "no", "error": "error", "missing": "-", "too long": "time"}


@dataclass(frozen=True)
class Config:
    folders: tuple[str, ...] = flag((), "folders of students; default: this one")
    csv: str | None = flag(None, "write the table here too, with every message")
    seconds: float = flag(60.0, "longest time for one exercise")
    jobs: int = flag(2, "exercises checked at a time")

    def __post_init__(self):
        check(self, seconds=(0.1, 3600), jobs=(1, 100))
        check_place(self, file="csv")
        for folder in self.folders:
            if not Path(folder).is_dir():
                raise UserError(f"{folder} is no folder")


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judge(name: str, path: str, verdict: str) -> None:
    """In a process of its own: checks a student's file, and writes the verdict to another."""
    import checker
    ours = load(HERE / f"{name}.py")
    try:
        student = load(Path(path))
        student.spec, solve = handed_in, student.solve
        task = body(HERE / f"{name}.py", "spec")
        if task and body(Path(path), "solve") == task:
            raise ValueError("this is spec word for word, which is the task, and no answer to it")
    except BaseException as error:  # it may even exit
        found = checker.Verdict("error", f"{type(error).__name__}: {checker.first_line(error)}")
    else:
        found = checker.check(ours.EXERCISE, ours.checked(solve) if hasattr(ours, "checked") else solve)
    Path(verdict).write_text(json.dumps([found.state, found.message]), encoding="utf-8")


def body(path: Path, function: str) -> list[str]:
    """The statements of a function in a file, without comments and docstring."""
    bodies = {node.name: node.body for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.FunctionDef)}
    return [ast.dump(part) for part in bodies.get(function, []) if not (
        isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]


def handed_in(*arguments) -> None:
    """Stands for `spec` in a student's file."""
    raise ValueError("spec is the task, and no answer to it")


def verdict_on(folder: Path, name: str, seconds: float) -> tuple[str, str]:
    """(state, message) of one exercise in a folder."""
    path = (folder / f"{name}.py").resolve()
    if not path.is_file():
        return "missing", "there is no such file"
    if name.startswith("bug") and path.read_bytes() == (HERE / path.name).read_bytes():
        return "unsolved", "as it was given"
    with tempfile.TemporaryDirectory() as scratch:
        verdict = Path(scratch) / "verdict.json"
        command = [sys.executable, str(HERE / "check.py"), "--judge", name, str(path), str(verdict)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True, cwd=scratch,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        RUNNING.add(process)
        try:
            process.wait(0 if stopping.is_set() else seconds)
        except subprocess.TimeoutExpired:
            return "too long", f"it was stopped after {seconds:g} seconds: does a loop not end?"
        finally:
            end(process)
            process.wait()
            RUNNING.discard(process)
        if not verdict.is_file():
            return "error", f"it ended by itself, with exit code {process.returncode}"
        return tuple(json.loads(verdict.read_text(encoding="utf-8")))


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, AttributeError):  # it has ended; Windows has no groups
        os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
    process.kill()


def table(rows: dict[str, Sequence[tuple[str, str]]]) -> str:
    width = max(len(name) for name in (*rows, "folder")) + 2
    heads = [name.split("_")[0] if name[0].isdigit() else name.replace("_", "") for name in EXERCISES]
    lines = [f"{'folder':{width}}" + "".join(f"{head:>6}" for head in heads) + f"{'solved':>9}"]
    for name, verdicts in rows.items():
        solved = sum(state == "solved" for state, _ in verdicts)
        lines.append(f"{name:{width}}" + "".join(f"{MARKS[state]:>6}" for state, _ in verdicts)
                     + f"{f'{solved}/{len(verdicts)}':>9}")
    return "\n".join(lines)


def main(cfg: Config) -> dict[str, list[tuple[str, str]]]:
    folders = {folder: Path(folder) for folder in cfg.folders} or {HERE.name: HERE}
    with ThreadPoolExecutor(cfg.jobs) as pool:
        work = {(label, name): pool.submit(verdict_on, folder, name, cfg.seconds)
                for label, folder in folders.items() for name in EXERCISES}
        try:
            rows = {label: [work[label, name].result() for name in EXERCISES] for label in folders}
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                end(process)
            raise
    print(table(rows))
    if len(rows) == 1:
        for name, (state, message) in zip(EXERCISES, *rows.values()):
            if state not in ("solved", "unsolved"):
                print(f"\n{name}: {state}: {message}")
    if cfg.csv:
        import csv
        with written_aside(Path(cfg.csv)) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["folder", "exercise", "state", "message"])
            writer.writerows([label, name, state, message] for label, verdicts in rows.items()
                             for name, (state, message) in zip(EXERCISES, verdicts))
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--judge"]:
        judge(*sys.argv[2:])
    else:
        run(main, Config)
