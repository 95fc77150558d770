"""The exercises: what is given fails as unsolved, the project's own functions pass, and each likely slip is named."""

import importlib
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "exercises"
sys.path.append(str(FOLDER))
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9][0-9]_*.py"))

import check as course  # noqa: E402
import checker  # noqa: E402

from distill import (  # noqa: E402
    divergence,
    future_reward,
    importance_weights,
    long_term_loss,
    minillm_loss,
    reverse_kl,
    single_step_loss,
    token_reward,
)
from eval import rouge_l  # noqa: E402
from model import predicting  # noqa: E402
from sample import inverse_cdf, mix, taken  # noqa: E402


def mixture(log_q, log_p, mix_alpha, uniform):
    mixed = mix(log_q, log_p, mix_alpha)
    token = inverse_cdf(mixed, uniform)
    return token, taken(mixed, token)


def four_weights(log_q, mixed_logp, mask):
    of = {kind: importance_weights(log_q, mixed_logp, mask, kind) for kind in ("per_token", "product", "exact")}
    per_token = of["per_token"][0]
    return per_token * mask, of["product"][0] * mask, of["exact"][0] * mask, of["exact"][1] * per_token * mask


# the answer to each exercise is a function of the main files
ANSWERS = {
    "01_log_prob": lambda z, y, n, mask: torch.zeros(mask.shape).masked_scatter(mask, taken(
        z[predicting(map(range, n), mask)].log_softmax(-1), y.roll(-1, 1)[predicting(map(range, n), mask)])),
    "02_two_kls": lambda z, p: (divergence(z.log_softmax(-1), p.log(), "forward"),
                                reverse_kl(z.log_softmax(-1), p.log())),
    "03_policy_gradient": lambda q, p, mask: long_term_loss(
        q, q.detach(), future_reward(token_reward(p, q.detach()) * mask, mask, length_norm=False,
                                     return_from="current"), torch.ones_like(q), math.inf)[0].sum(1).mean(),
    "04_single_step": lambda q, p, mask: single_step_loss(reverse_kl(q, p), torch.ones(mask.shape)) * mask,
    "05_mixture": mixture,
    "06_weights": four_weights,
    "07_length_norm": lambda reward, mask: future_reward(reward * mask, mask),
    "08_clipping": lambda q, mixed, R, mask, clip_eps: (
        long_term_loss(q, mixed, R, torch.ones_like(R), clip_eps)[0] * mask).sum(),
    "09_rouge_l": rouge_l,  # the scorer gives an integer, 0, for ""
    "10_minillm": lambda q, kl, mixed, R, mask, clip_eps: minillm_loss(
        q, kl, q.detach(), mixed, R, mask, clip_eps=clip_eps)[:2],
}


def exercise(name: str):
    module = importlib.import_module(name)
    return module, getattr(module, "checked", lambda solve: solve)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_given_is_unsolved(name):
    module, _ = exercise(name)
    assert checker.check(module.EXERCISE).state == "unsolved"


@pytest.mark.parametrize("name", NAMES)
def test_the_projects_own_function_is_the_answer(name):
    module, checked = exercise(name)
    assert checker.check(module.EXERCISE, checked(ANSWERS[name])) == checker.Verdict("solved")


@pytest.mark.parametrize("name", NAMES)
def test_each_slip_is_caught_and_named(name):
    module, _ = exercise(name)
    assert len(module.EXERCISE.slips) >= 3 and len(module.EXERCISE.hints) == 2
    for words, slip in module.EXERCISE.slips.items():
        assert checker.check(module.EXERCISE, slip) == checker.Verdict("wrong", words)


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_says_what_to_do(name, capsys, monkeypatch):
    module, _ = exercise(name)
    for part in ("Paper:", "Task:", "In words:", f"python exercises/{name}.py"):
        assert part in module.__doc__, part
    for flags, code in (([], 1), (["--hint=3"], 2)):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        with pytest.raises(SystemExit) as ended:
            checker.run(module.EXERCISE)
        assert ended.value.code == code
    for flag, hint in zip(("--hint", "--hint=2"), module.EXERCISE.hints):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", flag])
        capsys.readouterr()
        checker.run(module.EXERCISE)
        assert capsys.readouterr().out == hint + "\n"


def example(solve):
    """An exercise to double a (2, 3) tensor and count its rows."""
    spec = lambda x: (2 * x, len(x))
    slips = {"this is squared": lambda x: (x * x, len(x))}
    return checker.check(checker.Exercise(solve, spec, lambda: iter([("a case", (torch.arange(6.0).view(2, 3),))]),
                                          slips, ("", "")))


@pytest.mark.parametrize("solve, words", [
    (lambda x: (2 * x, 2, 3), "should be 2 values, not 3 values"), (lambda x: None, "is there a return?"),
    (lambda x: (2 * x[:1], 2), "value 1 should have the shape (2, 3), it has (1, 3)"),  # would broadcast
    (lambda x: (2 * x.double(), 2), "value 1 should be float32, it is float64"),
    (lambda x: (2 * x, torch.tensor(2)), "value 2 should be a plain int, not a Tensor"),
    (lambda x: (x * x, 2), "this is squared"),
    (lambda x: (2 * x + (x == 4), 2), "at [1, 1] yours is 9, it should be 8"),
    (lambda x: (2 * x, 3), "value 2: yours is 3, it should be 2"),
    (lambda x: (2 * x * (x - 1) / (x - 1), 2), "inf or NaN"),
    (lambda x: (x * x * (x - 1) / (x - 1), 2), "this is squared; besides, case 'a case': the answer holds inf or NaN"),
    (lambda x: (x.mul_(2), 2), "changed in place"), (lambda x: x[7], "IndexError"), (lambda: 1, "TypeError")])
def test_the_checker_says_what_is_wrong(solve, words):
    verdict = example(solve)
    assert verdict.state in ("wrong", "error") and words in verdict.message and "\n" not in verdict.message


def test_a_wrong_value_is_told_before_a_case_that_breaks():
    """Swapped KLs, of logits whose softmax is 0 somewhere, break in a later case: the slip is named all the same."""
    module, checked = exercise("02_two_kls")
    kl = lambda a, b: (a * (a.log() - b.log())).sum()
    verdict = checker.check(module.EXERCISE, checked(lambda z, p: (kl(z.softmax(0), p), kl(p, z.softmax(0)))))
    assert verdict.message.startswith("the two are swapped") and "'logits far apart'" in verdict.message
    verdict = checker.check(module.EXERCISE, checked(lambda z, p: (kl(p, z.softmax(0)), kl(z.softmax(0), p))))
    assert verdict.message.startswith("case 'logits far apart': the answer holds inf or NaN")
    verdict = checker.check(importlib.import_module("07_length_norm").EXERCISE, lambda r, m: (
        (r * m).flip(1).cumsum(1).flip(1) / m.flip(1).cumsum(1).flip(1)))
    assert verdict.message.startswith("the sum begins with r_t") and "NaN" in verdict.message


def test_a_list_that_has_grown_is_an_argument_changed_in_place():
    exercise = checker.Exercise(lambda rows: len(rows) + len(rows.append(0) or []), len,
                                lambda: iter([("a case", ([1, 2],))]), {}, ("", ""))
    assert "changed in place" in checker.check(exercise).message


def test_an_error_within_torch_is_told_by_the_line_that_led_there():
    verdict = example(lambda x: torch.nn.functional.cross_entropy(x, "wrong"))
    assert "of test_exercises.py" in verdict.message


def test_the_checker_accepts_what_is_right():
    assert example(lambda x: (x + x, 2)) == checker.Verdict("solved")
    assert example(lambda x: (_ for _ in ()).throw(NotImplementedError())).state == "unsolved"


ENDLESS = "def solve(*arguments):\n    while True:\n        pass\n"
FLOOD = "def solve(*arguments):\n    while True:\n        print('x' * 10**6, flush=True)\n"


GIVEN = (FOLDER / "07_length_norm.py").read_text()


def written(answer: str) -> str:
    return GIVEN.replace("    raise NotImplementedError  # yours", f"    {answer}")


SOLVED = written("from distill import future_reward\n    return future_reward(reward * response_mask, response_mask)")
COPIED = GIVEN.split("def spec(")[1].split("def solve(")[0].rsplit('"""\n    ', 1)[1]


@pytest.mark.parametrize("source, state, words", [
    (SOLVED, "solved", ""), (GIVEN, "unsolved", "NotImplementedError"), ("import sys\nsys.exit(0)\n", "error", "Exit"),
    (written("return spec(reward, response_mask)"), "error", "spec is the task"), ("solve = (\n", "error", "Syntax"),
    (written("# my own\n    " + COPIED), "error", "word for word"),
    (f"{GIVEN}\n\ndef solve(reward, response_mask):\n    {COPIED}", "error", "word for word"),
    ("def solve(reward, response_mask):\n    return reward\n", "wrong", "")],
    ids=["solved", "given", "exits", "spec", "syntax", "copied", "copied behind", "wrong"])
def test_the_verdict_on_a_students_file(source, state, words, tmp_path):
    (tmp_path / "07_length_norm.py").write_text(source)
    course.judge("07_length_norm", str(tmp_path / "07_length_norm.py"), str(tmp_path / "verdict"))
    found, message = json.loads((tmp_path / "verdict").read_text())
    assert found == state and words in message


def test_the_table_of_a_class(tmp_path, monkeypatch, capsys):
    """One who has solved it, one without a file, and others whose code must not stop the table."""
    name = "07_length_norm"
    monkeypatch.setattr(course, "EXERCISES", [name])
    students = {"anna": SOLVED, "dora": "raise ValueError('no')\n", "hugo": None, "gita": "import os\nos._exit(3)\n"}
    for student, source in students.items():
        (tmp_path / student).mkdir()
        if source is not None:
            (tmp_path / student / f"{name}.py").write_text(source)
    folders = tuple(str(tmp_path / student) for student in students)
    rows = course.main(course.Config(folders, csv=str(tmp_path / "class.csv"), seconds=300, jobs=2))
    states = {Path(folder).name: verdicts[0][0] for folder, verdicts in rows.items()}
    assert states == {"anna": "solved", "dora": "error", "gita": "error", "hugo": "missing"}
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 + len(students) and "1/1" in printed
    csv = (tmp_path / "class.csv").read_text().splitlines()
    assert csv[0] == "folder,exercise,state,message" and len(csv) == 1 + len(students)
    assert "ValueError: no" in csv[2] and "exit code 3" in csv[4]


def test_what_does_not_end_is_stopped_and_floods_no_terminal(tmp_path, capfd):
    (tmp_path / "07_length_norm.py").write_text(FLOOD)
    assert course.verdict_on(tmp_path, "07_length_norm", 5.0)[0] == "too long"
    assert capfd.readouterr() == ("", "")


def test_a_signal_ends_the_class_and_what_it_has_started(tmp_path):
    for name in course.EXERCISES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'begun')!r}, 'w').close()\n{ENDLESS}")
    command = [sys.executable, str(FOLDER / "check.py"), str(tmp_path), "--seconds=600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "begun").exists():
        time.sleep(0.1)
    process.terminate()
    assert "stopped" in process.communicate(timeout=60)[1] and process.returncode == 143
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout if shutil.which("ps") else ""
    assert str(tmp_path) not in left


def test_this_folder_as_it_is_given(monkeypatch, capsys):
    monkeypatch.setattr(course, "EXERCISES", ["07_length_norm"])
    ((state, message),) = course.main(course.Config())["exercises"]
    assert state == "unsolved" and "NotImplementedError" in message and "0/1" in capsys.readouterr().out


# of each silent bug the line that repairs it, beside the line as it is given
REPAIRS = {
    "bug_1": ("response_mask = response != END  # (B, T)",
              "lengths = torch.tensor([len(answer) for answer in answers])\n"
              "    response_mask = torch.arange(T) < lengths[:, None]"),
    "bug_2": ("-logp.mean() / len(micro_batches)", "-logp.sum() / sum(map(len, answers))"),
    "bug_3": ("rollout_logp_vocab.detach()", "student_logp_vocab.detach()"),
    "bug_4": ("        total = total + reward[:, t]  # (B,)\n        R[:, t] = total\n",
              "        R[:, t] = total\n        total = total + reward[:, t]\n"),
    "bug_5": ("response != IGNORED", "labels != IGNORED"),
}


@pytest.mark.parametrize("name", REPAIRS)
def test_a_silent_bug_runs_is_wrong_and_can_be_repaired(name, tmp_path, capsys):
    """As it is given it trains, shows something, and is wrong; with one line repaired it is right."""
    module, checked = exercise(name)
    module.train()
    assert len(capsys.readouterr().out.splitlines()) >= 3
    verdict = checker.check(module.EXERCISE)
    assert verdict.state == "wrong" and len(module.EXERCISE.hints) == 2
    source = (FOLDER / f"{name}.py").read_text()
    given, repaired = REPAIRS[name]
    assert source.count(given) == 1
    (tmp_path / f"{name}.py").write_text(source.replace(given, repaired))
    assert checker.check(module.EXERCISE, checked(course.load(tmp_path / f"{name}.py").solve)).state == "solved"


@pytest.mark.parametrize("name", REPAIRS)
def test_half_a_repair_is_named(name):
    module = importlib.import_module(name)
    for words, slip in module.EXERCISE.slips.items():
        assert checker.check(module.EXERCISE, slip) == checker.Verdict("wrong", words)


def test_a_value_is_called_by_its_name():
    x, parts = (torch.ones(2),), (("KL[p||q]", "KL[q||p]"), "the gradient")
    verdict = lambda given: checker.check(checker.Exercise(
        lambda x: given, lambda x: ((x, x), x), lambda: [("a case", x)], {}, ("", ""), parts)).message
    one, two = torch.ones(2), 2 * torch.ones(2)
    assert verdict(((one, two), one)) == "case 'a case': KL[q||p]: at [0] yours is 2, it should be 1"
    assert verdict(((one, one), two)) == "case 'a case': the gradient: at [0] yours is 2, it should be 1"
    assert verdict(((one, one[:1]), one)) == "case 'a case': KL[q||p] should have the shape (2,), it has (1,)"
    assert verdict((one, one)) == "case 'a case': the answer should be 2 values, not a Tensor"


def test_a_silent_bug_that_nobody_touched_is_unsolved(tmp_path):
    shutil.copy(FOLDER / "bug_1.py", tmp_path)
    assert course.verdict_on(tmp_path, "bug_1", 60.0) == ("unsolved", "as it was given")


def test_every_silent_bug_has_its_repair():
    assert sorted(REPAIRS) == sorted(path.stem for path in FOLDER.glob("bug_*.py"))
