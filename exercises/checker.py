"""The checker that all exercises share: it compares an answer with a slow specification.

An exercise is a file with an `Exercise` in it. Its `spec` is written in loops and in the paper's
letters, and the student's `solve` has to return the same in every case. The checker compares
shapes first, then dtypes, then values. It never broadcasts, so a mean over the wrong axis cannot
pass by chance. If an answer has the values of a likely slip, the checker names that slip.

Run:      python -m exercises.07_length_norm           (this file itself is not a command)
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
# The station of docs/annotated.md that introduces each exercise.
STATIONS = {"01": "policy-gradient", "02": "two-kls", "03": "policy-gradient", "04": "single-step",
            "05": "mixture", "06": "weights", "07": "length", "08": "together", "09": "metrics",
            "10": "algorithm"}


def unchanged(function: Callable) -> Callable:
    return function


@dataclass(frozen=True)
class Exercise:
    solve: Callable  # what the student writes
    spec: Callable  # what solve should compute
    cases: Callable[[], Iterator[tuple[str, tuple]]]  # names and arguments; some are awkward
    slips: dict[str, Callable]  # what to say about a mistake, and a function that makes it
    hints: tuple[str, str]
    # the names of the values, if there are several; for a value that is a tuple, a tuple of names
    parts: tuple[str | tuple[str, ...], ...] = ()
    # is applied to solve, spec and each slip before they are compared, to add gradients, say
    compared: Callable[[Callable], Callable] = unchanged
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Verdict:
    """state: "solved", "unsolved" (nothing is written yet), "wrong" or "error"; message: a line."""

    state: str
    message: str = ""


@dataclass(frozen=True)
class Trial:
    """A case whose answer has the right form: it can be compared."""

    name: str
    arguments: tuple
    given: object
    wanted: object


# ---- what exercises are made of ------------------------------------------------------------------

def masks() -> Iterator[tuple[str, Tensor]]:
    """The response_mask (B, T) of each of the batches that most exercises try, with its name."""
    for name, lengths, width in (
        ("answers of several lengths", [5, 2, 7, 1], 7),
        ("one row", [4], 4),
        ("answers of one token", [1, 1, 1], 1),
        ("padding behind every answer", [3, 2], 6),
        ("a row that is all padding", [0, 4], 5),
    ):
        yield name, torch.arange(width) < torch.tensor(lengths)[:, None]


def gradients(value: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradient of the value's sum by each leaf. It is 0 where no gradient flows."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(
        value.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def with_gradient(solve: Callable, leaves: int = 1) -> Callable:
    """A function that returns the answer of solve, and the gradients of its sum by the first
    `leaves` arguments."""

    def answer_and_gradients(*arguments) -> tuple:
        first = tuple(argument.detach().requires_grad_() for argument in arguments[:leaves])
        answer = solve(*first, *arguments[leaves:])
        values = answer if isinstance(answer, tuple) else (answer,)
        if not all(isinstance(value, Tensor) for value in values):
            return answer, first  # the form of the answer is wrong: nothing else is looked at
        found = gradients(sum(value.sum() for value in values), first)
        values = tuple(value.detach() for value in values)
        return (
            values if isinstance(answer, tuple) else values[0],
            found if leaves > 1 else found[0],
        )

    return answer_and_gradients


# ---- the verdict ---------------------------------------------------------------------------------

def check(exercise: Exercise, solve: Callable | None = None) -> Verdict:
    """The verdict on solve, by default the exercise's own.

    A wrong value says more than an error in a later case, so the verdict is about the value: it
    names the slip that makes the same values, or else shows the first difference."""
    trials, fault = try_cases(exercise, solve or exercise.solve)
    broken = ""
    for trial in trials:
        if not_finite(trial.given) and not not_finite(trial.wanted):
            broken = f"case '{trial.name}': the answer holds inf or NaN"
            break
    wrong = [trial for trial in trials
             if not agree(trial.given, trial.wanted, exercise.tolerance)]
    if wrong:
        for words, slip in exercise.slips.items():
            if all(explains(exercise, slip, trial) for trial in trials):
                return Verdict("wrong", f"{words}; besides, {broken}" if broken else words)
    if broken:
        return Verdict("wrong", broken)
    if wrong:
        first = wrong[0]
        words = difference(first.given, first.wanted, exercise.tolerance, exercise.parts)
        return Verdict("wrong", f"case '{first.name}': {words}")
    return fault


def try_cases(exercise: Exercise, solve: Callable) -> tuple[list[Trial], Verdict]:
    """The cases up to the first that cannot be compared, and the verdict on that one."""
    trials = []
    solve = exercise.compared(solve)
    spec = exercise.compared(exercise.spec)
    for name, arguments in exercise.cases():
        wanted = spec(*copy.deepcopy(arguments))
        mine = copy.deepcopy(arguments)
        try:
            given = solve(*mine)
        except NotImplementedError:
            return [], Verdict("unsolved", "nothing is written yet: replace the line that raises "
                                           "NotImplementedError")
        except Exception as error:  # a student's code may raise anything
            return trials, Verdict("error", f"case '{name}': {told(error)}")
        words = form(given, wanted, parts=exercise.parts)
        if not words and not same(mine, arguments, 0.0):
            words = "the arguments were changed in place: work on copies"
        if words:
            return trials, Verdict("wrong", f"case '{name}': {words}")
        trials.append(Trial(name, arguments, given, wanted))
    return trials, Verdict("solved")


def explains(exercise: Exercise, slip: Callable, trial: Trial) -> bool:
    """Whether a slip makes the values that were given."""
    made = exercise.compared(slip)(*copy.deepcopy(trial.arguments))
    return not form(made, trial.wanted) and agree(trial.given, made, exercise.tolerance)


def told(error: Exception) -> str:
    """The error in one line, with the student's line that led to it."""
    words = f"{type(error).__name__}: {first_line(error)}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename != __file__ and "site-packages" not in frame.filename]
    if frames:
        words += f", line {frames[-1].lineno} of {Path(frames[-1].filename).name}"
    return words


def first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return lines[0][:200]


# ---- comparing values ----------------------------------------------------------------------------

def part_of(parts: tuple, n: int) -> tuple[str, tuple]:
    """The name of the n-th value, and the names of its own parts."""
    if not parts:
        return f"value {n + 1}", ()
    if isinstance(parts[n], tuple):
        return "the answer", parts[n]
    return parts[n], ()


def form(given, wanted, name: str = "the answer", parts: tuple = ()) -> str:
    """What is wrong with the form of an answer. The text is empty if nothing is."""
    if given is None:
        return f"{name} is None: is there a return?"
    if isinstance(wanted, tuple):
        if not isinstance(given, tuple) or len(given) != len(wanted):
            return f"{name} should be {len(wanted)} values, not {kind(given)}"
        for n in range(len(wanted)):
            words = form(given[n], wanted[n], *part_of(parts, n))
            if words:
                return words
        return ""
    if isinstance(wanted, Tensor):
        if not isinstance(given, Tensor):
            return f"{name} should be a tensor, not {kind(given)}"
        if given.shape != wanted.shape:
            return (f"{name} should have the shape {tuple(wanted.shape)}, "
                    f"it has {tuple(given.shape)}")
        if given.dtype != wanted.dtype:
            dtypes = [str(value.dtype).removeprefix("torch.") for value in (wanted, given)]
            return f"{name} should be {dtypes[0]}, it is {dtypes[1]}"
        return ""
    allowed = (int, float) if isinstance(wanted, float) else type(wanted)
    if not isinstance(given, allowed):
        return f"{name} should be a plain {type(wanted).__name__}, not {kind(given)}"
    return ""


def kind(value) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} values"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def not_finite(value) -> bool:
    """Whether an answer holds inf or NaN."""
    if isinstance(value, tuple):
        return any(not_finite(part) for part in value)
    if isinstance(value, Tensor):
        return not value.isfinite().all()
    return isinstance(value, float) and not math.isfinite(value)


def agree(given, wanted, tolerance: float) -> bool:
    """Like same(), for two answers of one form, but without the places where only the given answer
    is inf or NaN."""
    if isinstance(wanted, tuple):
        return all(agree(g, w, tolerance) for g, w in zip(given, wanted))
    if isinstance(wanted, Tensor) and not not_finite(wanted):
        finite = given.isfinite()
        return same(given[finite], wanted[finite], tolerance)
    return same(given, wanted, tolerance)


def same(given, wanted, tolerance: float) -> bool:
    """Whether two answers of one form are equal."""
    if isinstance(wanted, tuple | list):
        return len(given) == len(wanted) and all(
            same(g, w, tolerance) for g, w in zip(given, wanted))
    if isinstance(wanted, Tensor):
        return torch.allclose(
            given.double(), wanted.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(wanted, float):
        return math.isclose(given, wanted, rel_tol=tolerance, abs_tol=tolerance)
    return given == wanted


def difference(given, wanted, tolerance: float, parts: tuple = ()) -> str:
    """Where two answers differ first."""
    if isinstance(wanted, tuple):
        for n in range(len(wanted)):
            if not same(given[n], wanted[n], tolerance):
                break
        name, own = part_of(parts, n)
        words = difference(given[n], wanted[n], tolerance, own)
        return words if own else f"{name}: {words}"
    if isinstance(wanted, Tensor) and wanted.dim():
        apart = (given.double() - wanted.double()).abs()
        far = apart > tolerance * (1 + wanted.double().abs())
        at = tuple(far.nonzero()[0].tolist())
        return f"at {list(at)} {difference(given[at], wanted[at], tolerance)}"
    if isinstance(wanted, float | Tensor):
        return f"yours is {float(given):.6g}, it should be {float(wanted):.6g}"
    return f"yours is {given!r}, it should be {wanted!r}"


def run(exercise: Exercise) -> None:
    """Is called under `if __name__ == "__main__"`: checks the exercise, or gives a hint. The exit
    code is 0 if the exercise is solved."""
    flags = sys.argv[1:]
    name = Path(sys.argv[0]).name
    if flags in (["--hint"], ["--hint=1"]):
        print(exercise.hints[0])
        return
    if flags == ["--hint=2"]:
        print(exercise.hints[1])
        return
    if flags == ["--read"]:
        from tools.annotate import station  # what is read beside the paper
        print(station(STATIONS[Path(name).stem[:2]]))
        return
    if flags:
        print(f"{name}: {flags[0]} is unknown: give no flag to check your answer, --read for its "
              "pages in docs/annotated.html, or --hint, then --hint=2", file=sys.stderr)
        sys.exit(2)
    verdict = check(exercise)
    print(f"{name}: {verdict.state}: {verdict.message}".removesuffix(": "))
    sys.exit(verdict.state != "solved")
