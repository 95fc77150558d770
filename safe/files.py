"""Files are written whole or not at all, and what is no JSON object is named in one line."""

import contextlib
import dataclasses
import json
import math
import os
import sys
from functools import cache
from pathlib import Path

from config import UserError

POINTER = b"version https://git-lfs.github.com/"  # it begins so


def check_place(cfg, folder: str = "", file: str = "", ending: str = "") -> None:
    """Raises UserError if the path in this field cannot become a folder, or a file that ends so."""
    path = getattr(cfg, folder or file)
    if path and file and os.path.isdir(path):
        raise UserError(f"--{file}={path} is a folder: give the name of a file")
    if path and not path.endswith(ending):
        raise UserError(f"--{file}={path} must end in {ending}")
    for parent in Path(path or "", "content" if folder else "").parents:
        if os.path.lexists(parent) and not parent.is_dir():
            raise UserError(f"--{folder or file}={path}: {parent} is a file, and no folder")


@cache
def say_once(line: str) -> None:
    """Prints a line to stderr, by one process, however often the stages of a run come by."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def written_aside(path: Path):
    """Yields a temporary path that becomes `path` if the block ends well: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def as_json(cfg) -> dict:
    """Returns the settings as a JSON object, in which infinity is the word "inf"."""
    settings = dataclasses.asdict(cfg).items()
    return {name: str(x) if x in (math.inf, -math.inf) else x for name, x in settings}


def refuse_pointer(path: Path) -> None:
    """Raises UserError if the file is a Git LFS pointer, which a clone may have in its place."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` "
                            "where it was cloned, or download the file itself")


def txt_files(folder: Path) -> list[Path]:
    """The .txt files in a folder and below it, but not those of the models that lie below it."""
    files = sorted(folder.rglob("*.txt"))
    own = [file for file in files if file.parent == folder]
    below = [file for file in files if file.parent != folder]
    return own + [file for file in below if not (file.parent / "config.json").is_file()]


def read_json(path: Path) -> dict:
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, RecursionError):
        refuse_pointer(path)
        raise UserError(f"{path} is not a JSON object: remove it, or fetch it again") from None


def write_json(path: Path, value) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with written_aside(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def write_lines(path: Path, rows: list[dict]) -> None:
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
