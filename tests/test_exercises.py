"""The exercises: each stub fails as unsolved, the project's own functions pass, each likely slip is named."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data import pad_right
from distill import (
    divergence,
    future_reward,
    importance_weights,
    long_term_loss,
    minillm_loss,
    reverse_kl,
    single_step_loss,
    token_reward,
)
from eval import rouge_l
from exercises import check as course
from exercises import checker
from sample import inverse_cdf, mix, taken

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "exercises"
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9][0-9]_*.py"))


# ---- the answer to each exercise is a function of the main files -----------------------------------------------------

def log_prob(logits, tokens, prompt_tokens, mask):
    prompts, responses = [], []
    for row, n, length in zip(tokens.tolist(), prompt_tokens, mask.sum(1).tolist()):
        prompts.append(row[:n])
        responses.append(row[n : n + length])
    batch = pad_right(prompts, responses, torch.device("cpu"))
    logp = taken(batch.predicting(logits).log_softmax(-1), batch.response) * batch.response_mask
    return torch.nn.functional.pad(logp, (0, mask.size(1) - logp.size(1)))


def two_kls(logits, p):
    return divergence(logits.log_softmax(-1), p.log(), "forward"), reverse_kl(logits.log_softmax(-1), p.log())


def policy_gradient(log_q, log_p, mask):
    reward = token_reward(log_p, log_q.detach()) * mask
    R = future_reward(reward, mask, length_norm=False, return_from="current")
    return long_term_loss(log_q, log_q.detach(), R, torch.ones_like(R), math.inf)[0].sum(1).mean()


def single_step(log_q, log_p, mask):
    return single_step_loss(reverse_kl(log_q, log_p), torch.ones(mask.shape)) * mask


def mixture(log_q, log_p, mix_alpha, uniform):
    mixed = mix(log_q, log_p, mix_alpha)
    token = inverse_cdf(mixed, uniform)
    return token, taken(mixed, token)


def four_weights(log_q, mixed_logp, mask):
    per_token, _ = importance_weights(log_q, mixed_logp, mask, "per_token")
    product, _ = importance_weights(log_q, mixed_logp, mask, "product")
    exact_single, exact_long = importance_weights(log_q, mixed_logp, mask, "exact")
    return per_token * mask, product * mask, exact_single * mask, exact_long * per_token * mask


def clipping(log_q, mixed_logp, R, mask, clip_eps):
    return (long_term_loss(log_q, mixed_logp, R, torch.ones_like(R), clip_eps)[0] * mask).sum()


def minillm(log_q, kl, mixed_logp, R, mask, clip_eps):
    return minillm_loss(log_q, kl, log_q.detach(), mixed_logp, R, mask, clip_eps=clip_eps)[:2]


ANSWERS = {
    "01_log_prob": log_prob,
    "02_two_kls": two_kls,
    "03_policy_gradient": policy_gradient,
    "04_single_step": single_step,
    "05_mixture": mixture,
    "06_weights": four_weights,
    "07_length_norm": lambda reward, mask: future_reward(reward * mask, mask),
    "08_clipping": clipping,
    "09_rouge_l": rouge_l,
    "10_minillm": minillm,
}


def exercise(name: str):
    return importlib.import_module(f"exercises.{name}").EXERCISE


@pytest.mark.parametrize("name", NAMES)
def test_what_is_given_is_unsolved(name):
    assert checker.check(exercise(name)).state == "unsolved"


@pytest.mark.parametrize("name", NAMES)
def test_the_projects_own_function_is_the_answer(name):
    assert checker.check(exercise(name), ANSWERS[name]) == checker.Verdict("solved")


@pytest.mark.parametrize("name", NAMES)
def test_each_slip_is_caught_and_named(name):
    assert len(exercise(name).slips) >= 3
    for words, slip in exercise(name).slips.items():
        assert checker.check(exercise(name), slip) == checker.Verdict("wrong", words)


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_says_what_to_do(name, capsys, monkeypatch):
    module = importlib.import_module(f"exercises.{name}")
    for part in ("Paper:", "Task:", "In words:", f"python -m exercises.{name}"):
        assert part in module.__doc__, part
    for flags, code in (([], 1), (["--hint=3"], 2)):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        with pytest.raises(SystemExit) as ended:
            checker.run(module.EXERCISE)
        assert ended.value.code == code
    assert len(module.EXERCISE.hints) == 2
    for flag, hint in zip(("--hint", "--hint=2"), module.EXERCISE.hints):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", flag])
        capsys.readouterr()
        checker.run(module.EXERCISE)
        assert capsys.readouterr().out == hint + "\n"


# ---- the checker -----------------------------------------------------------------------------------------------------

def example(solve):
    """An exercise: double a (2, 3) tensor and count its rows."""
    def spec(x):
        return 2 * x, len(x)

    slips = {"this is squared": lambda x: (x * x, len(x))}
    cases = lambda: iter([("a case", (torch.arange(6.0).view(2, 3),))])
    return checker.check(checker.Exercise(solve, spec, cases, slips, ("", "")))


@pytest.mark.parametrize("solve, words", [
    (lambda x: (2 * x, 2, 3), "should be 2 values, not 3 values"),
    (lambda x: None, "is there a return?"),
    (lambda x: (2 * x[:1], 2), "value 1 should have the shape (2, 3), it has (1, 3)"),  # would broadcast
    (lambda x: (2 * x.double(), 2), "value 1 should be float32, it is float64"),
    (lambda x: (2 * x, torch.tensor(2)), "value 2 should be a plain int, not a Tensor"),
    (lambda x: (x * x, 2), "this is squared"),
    (lambda x: (2 * x + (x == 4), 2), "at [1, 1] yours is 9, it should be 8"),
    (lambda x: (2 * x, 3), "value 2: yours is 3, it should be 2"),
    (lambda x: (2 * x * (x - 1) / (x - 1), 2), "inf or NaN"),
    (lambda x: (x * x * (x - 1) / (x - 1), 2),
     "this is squared; besides, case 'a case': the answer holds inf or NaN"),
    (lambda x: (x.mul_(2), 2), "changed in place"),
    (lambda x: x[7], "IndexError"),
    (lambda: 1, "TypeError")])
def test_the_checker_says_what_is_wrong(solve, words):
    verdict = example(solve)
    assert verdict.state in ("wrong", "error") and words in verdict.message and "\n" not in verdict.message


def test_a_wrong_value_is_told_before_a_case_that_breaks():
    """Swapped KLs, of logits whose softmax is 0 somewhere, break in a later case: the slip is named all the same."""
    def kl(a, b):
        return (a * (a.log() - b.log())).sum()

    two_kls = exercise("02_two_kls")
    verdict = checker.check(two_kls, lambda z, p: (kl(z.softmax(0), p), kl(p, z.softmax(0))))
    assert verdict.message.startswith("the two are swapped") and "'logits far apart'" in verdict.message
    verdict = checker.check(two_kls, lambda z, p: (kl(p, z.softmax(0)), kl(z.softmax(0), p)))
    assert verdict.message.startswith("case 'logits far apart': the answer holds inf or NaN")
    verdict = checker.check(exercise("07_length_norm"), lambda r, m: (
        (r * m).flip(1).cumsum(1).flip(1) / m.flip(1).cumsum(1).flip(1)))
    assert verdict.message.startswith("the sum begins with r_t") and "NaN" in verdict.message


def test_a_list_that_has_grown_is_an_argument_changed_in_place():
    def solve(rows):
        rows.append(0)
        return len(rows) - 1

    cases = lambda: iter([("a case", ([1, 2],))])
    assert "changed in place" in checker.check(checker.Exercise(solve, len, cases, {}, ("", ""))).message


def test_an_error_within_torch_is_told_by_the_line_that_led_there():
    verdict = example(lambda x: torch.nn.functional.cross_entropy(x, "wrong"))
    assert "of test_exercises.py" in verdict.message


def test_the_checker_accepts_what_is_right():
    assert example(lambda x: (x + x, 2)) == checker.Verdict("solved")
    assert example(lambda x: (_ for _ in ()).throw(NotImplementedError())).state == "unsolved"


def test_a_value_is_called_by_its_name():
    one, two = torch.ones(2), 2 * torch.ones(2)
    parts = (("KL[p||q]", "KL[q||p]"), "the gradient")

    def message(given):
        return checker.check(checker.Exercise(
            lambda x: given, lambda x: ((x, x), x), lambda: [("a case", (one,))], {}, ("", ""), parts)).message

    assert message(((one, two), one)) == "case 'a case': KL[q||p]: at [0] yours is 2, it should be 1"
    assert message(((one, one), two)) == "case 'a case': the gradient: at [0] yours is 2, it should be 1"
    assert message(((one, one[:1]), one)) == "case 'a case': KL[q||p] should have the shape (2,), it has (1,)"
    assert message((one, one)) == "case 'a case': the answer should be 2 values, not a Tensor"


# ---- a class ---------------------------------------------------------------------------------------------------------

ENDLESS = "def solve(*arguments):\n    while True:\n        pass\n"
FLOOD = "def solve(*arguments):\n    while True:\n        print('x' * 10**6, flush=True)\n"
GIVEN = (FOLDER / "07_length_norm.py").read_text()


def written(answer: str) -> str:
    return GIVEN.replace("    raise NotImplementedError  # yours", f"    {answer}")


SOLVED = written("from distill import future_reward\n    return future_reward(reward * response_mask, response_mask)")
COPIED = GIVEN.split("def spec(")[1].split("def solve(")[0].rsplit('"""\n    ', 1)[1]
BEFORE = "from checker import Exercise, run\n\n" + SOLVED.split("masks, run\n")[1].split("# ---- what checks")[0]


@pytest.mark.parametrize("source, state, words", [
    (SOLVED, "solved", ""),
    ("import torch\nfrom torch import Tensor\n" + BEFORE, "solved", ""),
    (GIVEN, "unsolved", "NotImplementedError"),
    ("import sys\nsys.exit(0)\n", "error", "Exit"),
    (written("return spec(reward, response_mask)"), "error", "spec is the task"),
    ("solve = (\n", "error", "Syntax"),
    (written("# my own\n    " + COPIED), "error", "word for word"),
    (f"{GIVEN}\n\ndef solve(reward, response_mask):\n    {COPIED}", "error", "word for word"),
    ("def solve(reward, response_mask):\n    return reward\n", "wrong", "")],
    ids=["solved", "an old copy", "given", "exits", "spec", "syntax", "copied", "copied behind", "wrong"])
def test_the_verdict_on_a_students_file(source, state, words, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "checker", raising=False)
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
    command = [sys.executable, "-m", "exercises.check", str(tmp_path), "--seconds=600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
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


def test_a_student_runs_a_copy_of_the_folder(tmp_path):
    """`python -m anna.07_length_norm` in the folder that holds the copy, with the project's folder on the path."""
    shutil.copytree(FOLDER, tmp_path / "anna", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "anna" / "07_length_norm.py").write_text(SOLVED)
    done = subprocess.run([sys.executable, "-m", "anna.07_length_norm"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "07_length_norm.py: solved\n" and done.returncode == 0


# ---- the silent bugs -------------------------------------------------------------------------------------------------

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
    importlib.import_module(f"exercises.{name}").train()
    assert len(capsys.readouterr().out.splitlines()) >= 3
    assert checker.check(exercise(name)).state == "wrong" and len(exercise(name).hints) == 2
    source = (FOLDER / f"{name}.py").read_text()
    given, repaired = REPAIRS[name]
    assert source.count(given) == 1
    (tmp_path / f"{name}.py").write_text(source.replace(given, repaired))
    assert checker.check(exercise(name), course.load(tmp_path / f"{name}.py").solve).state == "solved"


@pytest.mark.parametrize("name", REPAIRS)
def test_half_a_repair_is_named(name):
    for words, slip in exercise(name).slips.items():
        assert checker.check(exercise(name), slip) == checker.Verdict("wrong", words)


def test_a_silent_bug_that_nobody_touched_is_unsolved(tmp_path):
    shutil.copy(FOLDER / "bug_1.py", tmp_path)
    assert course.verdict_on(tmp_path, "bug_1", 60.0) == ("unsolved", "as it was given")


def test_every_silent_bug_has_its_repair():
    assert sorted(REPAIRS) == sorted(path.stem for path in FOLDER.glob("bug_*.py"))
