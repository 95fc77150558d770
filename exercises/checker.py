"""What every exercise shares: an answer is compared with a slow specification, and a slip that explains it is named.

An exercise is a file with an `Exercise` in it. Its `spec` is written in loops and the paper's letters; the answer to be
written, `solve`, has to give the same in every case. Shapes are compared first, then dtypes, then values, and nothing
is broadcast: a mean over the wrong axis does not pass by chance.

Run:      python exercises/07_length_norm.py           (this file has no command of its own)
"""

import copy
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the project's files have no package


@dataclass(frozen=True)
class Exercise:
    """solve: the function to be written. spec: what it should compute. cases(): (name, arguments) pairs, awkward ones
    among them. slips: what to say of a mistake, and a function that makes it. hints: a first and a second. parts: the
    names of the values if there are several; of a value that is a tuple, a tuple of names."""
    solve: Callable
    spec: Callable
    cases: Callable[[], Iterator[tuple[str, tuple]]]
    slips: dict[str, Callable]
    hints: tuple[str, str]
    parts: tuple[str | tuple[str, ...], ...] = ()
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Verdict:
    """state: "solved", "unsolved" (nothing written yet), "wrong" or "error"; message: one line, in plain words."""
    state: str
    message: str = ""


def check(exercise: Exercise, solve: Callable | None = None) -> Verdict:
    """Tries the cases up to the first that cannot be compared. A wrong value in one before says more than that one, so
    it is told instead: by the slip that gives the same values, or else as a difference."""
    solve, fault, tried = solve or exercise.solve, Verdict("solved"), []  # tried: (name, arguments, given, wanted)
    for name, arguments in exercise.cases():
        mine, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
        wanted = exercise.spec(*theirs)
        try:
            given = solve(*mine)
        except NotImplementedError:
            return Verdict("unsolved", "nothing is written yet: replace the line that raises NotImplementedError")
        except Exception as error:  # a student's code may raise anything
            lines = [frame for frame in traceback.extract_tb(error.__traceback__)
                     if frame.filename != __file__ and "site-packages" not in frame.filename]  # nor torch's
            where = f", line {lines[-1].lineno} of {Path(lines[-1].filename).name}" if lines else ""
            fault = Verdict("error", f"case '{name}': {type(error).__name__}: {first_line(error)}{where}")
            break
        if words := form(given, wanted, parts=exercise.parts):
            fault = Verdict("wrong", f"case '{name}': {words}")
            break
        if not same(mine, arguments, 0.0):
            fault = Verdict("wrong", f"case '{name}': the arguments were changed in place; work on copies")
            break
        tried.append((name, arguments, given, wanted))
    broken = next((f"case '{name}': the answer holds inf or NaN"
                   for name, _, given, wanted in tried if not_finite(given) and not not_finite(wanted)), "")
    wrong = [(name, given, wanted) for name, _, given, wanted in tried if not agree(given, wanted, exercise.tolerance)]
    for words, slip in exercise.slips.items() if wrong else ():
        made = [(given, slip(*copy.deepcopy(arguments)), wanted) for _, arguments, given, wanted in tried]
        if all(not form(m, w) and agree(g, m, exercise.tolerance) for g, m, w in made):
            return Verdict("wrong", words + f"; besides, {broken}" * bool(broken))
    if broken:
        return Verdict("wrong", broken)
    if wrong:
        name, given, wanted = wrong[0]
        return Verdict("wrong", f"case '{name}': {difference(given, wanted, exercise.tolerance, exercise.parts)}")
    return fault


def with_gradient(solve: Callable) -> Callable:
    """What is compared: the answer, and the gradient of its sum by the first argument."""
    def answer_and_gradient(first: Tensor, *others) -> tuple:
        first = first.detach().requires_grad_()
        given, gradient = solve(first, *others), torch.zeros_like(first)
        if not isinstance(given, Tensor):
            return given, gradient
        if given.requires_grad:
            (gradient,) = torch.autograd.grad(given.sum(), first)
        return given.detach(), gradient

    return answer_and_gradient


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def part_of(parts: tuple, n: int) -> tuple[str, tuple]:
    """The name of the n-th value, and the names of its own parts."""
    part = parts[n] if parts else f"value {n + 1}"
    return ("the answer", part) if isinstance(part, tuple) else (part, ())


def form(given, wanted, name: str = "the answer", parts: tuple = ()) -> str:
    """What is wrong with the form of an answer; empty if nothing is."""
    if given is None:
        return f"{name} is None: is there a return?"
    if isinstance(wanted, tuple):
        if not isinstance(given, tuple) or len(given) != len(wanted):
            return f"{name} should be {len(wanted)} values, not {kind(given)}"
        faults = (form(g, w, *part_of(parts, n)) for n, (g, w) in enumerate(zip(given, wanted)))
        return next(filter(None, faults), "")
    if isinstance(wanted, Tensor):
        if not isinstance(given, Tensor):
            return f"{name} should be a tensor, not {kind(given)}"
        if given.shape != wanted.shape:
            return f"{name} should have the shape {tuple(wanted.shape)}, it has {tuple(given.shape)}"
        if given.dtype != wanted.dtype:
            return f"{name} should be {str(wanted.dtype)[6:]}, it is {str(given.dtype)[6:]}"
    elif not isinstance(given, int | float if isinstance(wanted, float) else type(wanted)):
        return f"{name} should be a plain {type(wanted).__name__}, not {kind(given)}"
    return ""


def kind(value) -> str:
    name = type(value).__name__
    return f"{len(value)} values" if isinstance(value, tuple) else f"a{'n' * (name[0] in 'aeiou')} {name}"


def not_finite(value) -> bool:
    """Whether an answer holds inf or NaN."""
    if isinstance(value, tuple):
        return any(map(not_finite, value))
    if isinstance(value, Tensor):
        return not value.isfinite().all()
    return isinstance(value, float) and not math.isfinite(value)


def agree(given, wanted, tolerance: float) -> bool:
    """As same(), of two answers of one form(), but where a tensor is all finite, inf or NaN in the other is passed
    over."""
    if isinstance(wanted, tuple):
        return all(agree(g, w, tolerance) for g, w in zip(given, wanted))
    if isinstance(wanted, Tensor) and not not_finite(wanted):
        given, wanted = given[given.isfinite()], wanted[given.isfinite()]
    return same(given, wanted, tolerance)


def same(given, wanted, tolerance: float) -> bool:
    """Whether two answers of one form are equal."""
    if isinstance(wanted, tuple | list):
        return len(given) == len(wanted) and all(same(g, w, tolerance) for g, w in zip(given, wanted))
    if isinstance(wanted, Tensor):
        return torch.allclose(given.double(), wanted.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(wanted, float):
        return math.isclose(given, wanted, rel_tol=tolerance, abs_tol=tolerance)
    return callable(wanted) or given == wanted


def difference(given, wanted, tolerance: float, parts: tuple = ()) -> str:
    """Where two answers first differ."""
    if isinstance(wanted, tuple):
        n = next(n for n, (g, w) in enumerate(zip(given, wanted)) if not same(g, w, tolerance))
        name, own = part_of(parts, n)
        return f"{name}: " * (not own) + difference(given[n], wanted[n], tolerance, own)
    if isinstance(wanted, Tensor) and wanted.dim():
        apart = (given.double() - wanted.double()).abs() > tolerance * (1 + wanted.double().abs())
        at = tuple(apart.nonzero()[0].tolist())
        return f"at {list(at)} " + difference(given[at], wanted[at], tolerance)
    if isinstance(wanted, float | Tensor):
        return f"yours is {float(given):.6g}, it should be {float(wanted):.6g}"
    return f"yours is {given!r}, it should be {wanted!r}"


def run(exercise: Exercise) -> None:
    """What stands under `if __name__ == "__main__"`: checks, or hints. The exit code is 0 if it is solved."""
    flags = sys.argv[1:]
    if flags in (["--hint"], ["--hint=1"], ["--hint=2"]):
        print(exercise.hints[flags == ["--hint=2"]])
        return
    name = Path(sys.argv[0]).name
    if flags:
        print(f"{name}: {flags[0]} is unknown: give nothing to check, or --hint, then --hint=2", file=sys.stderr)
        sys.exit(2)
    verdict = check(exercise)
    print(f"{name}: {verdict.state}" + f": {verdict.message}" * bool(verdict.message))
    sys.exit(verdict.state != "solved")
