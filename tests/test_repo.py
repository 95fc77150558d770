"""The house rules a reader relies on: data flow one way, each equation has one home, the README tells the truth."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from config import parse

ROOT = Path(__file__).parent.parent
ORDER = ["config", "model", "world", "data", "sample", "eval", "exposure", "calibration", "judge", "teacher", "plan",
         "distill", "oracle", "report", "bench"]
SOURCE = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ORDER}
COMMANDS = ["data", "sample", "eval", "exposure", "calibration", "judge", "teacher", "distill", "oracle", "report",
            "bench"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOME = {"Eq. (1)": "distill.reverse_kl", "Eq. (2)": "distill.token_reward", "Eq. (3)": "distill.single_step_loss",
        "Eq. (4)": "sample.mix", "Eq. (5)": "distill.importance_weights", "Eq. (6)": "distill.future_reward",
        "Eq. (7)": "distill.minillm_loss", "Alg. 1": "distill.long_term_loss"}


def definitions(name: str) -> dict[str, str]:
    """The source of every function and class of a file, with the comments at its line ends."""
    nodes = (node for node in ast.walk(ast.parse(SOURCE[name])) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    lines = SOURCE[name].splitlines()
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes}


def test_every_file_at_the_root_is_known():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    imported = {alias.name for node in ast.walk(ast.parse(SOURCE[name])) if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {node.module for node in ast.walk(ast.parse(SOURCE[name])) if isinstance(node, ast.ImportFrom)}
    assert imported & set(ORDER) <= set(ORDER[: ORDER.index(name)])
    assert "transformers" not in imported or name == "bench"  # the peer that it is timed against


@pytest.mark.parametrize("tag", HOME)
def test_each_equation_has_its_home(tag):
    """A comment with its number, on a line that computes, in the function that the paper map names."""
    file, function = HOME[tag].split(".")
    comments = re.findall(r"\S  # (Eqs?\..*|Alg\..*)", definitions(file)[function])
    assert any(tag in comment.replace("Eqs.", "Eq.") for comment in comments) or (
        any(comment.startswith("Eqs.") and tag[4:] in comment for comment in comments))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_read(name):
    config = importlib.import_module(name).Config
    own = SOURCE[name].replace(definitions(name)["__post_init__"], "")  # to be checked is not to be used
    read = own + "".join(SOURCE[other] for other in ORDER if other not in COMMANDS)
    for field in config.__dataclass_fields__:
        used = re.search(rf"\b(cfg|self|s|settings)\.{field}\b", read) or f'given.get("{field}"' in own
        assert used or f'"{field}"' in definitions(name).get("stages", ""), f"nothing reads --{field}"


def commands(text: str) -> set[str]:
    """The commands of a text: `python FILE.py ...`, or torchrun's, without what is told of them at their right."""
    before = r"(?m)(?:^|`|\s{2,})(?:torchrun(?: --\S+)+|(?:OMP_NUM_THREADS=1 )?python)"
    found = re.findall(before + r" ((?:reproduce/)?\w+\.py[^`\n]*)", text)
    return {re.split(r"\s{3,}|;|\s+#", line)[0].rstrip(",. ") for line in found}


SCRIPTS = [path.read_text(encoding="utf-8") for pattern in ("reproduce/*.py", "*/*.md", "results/*/README.md")
           for path in ROOT.glob(pattern)]


@pytest.mark.parametrize("command", sorted(commands("\n".join([README, *SOURCE.values(), *SCRIPTS]))))
def test_commands_as_printed_are_accepted(command, monkeypatch):
    """Every flag exists, every value is in its range."""
    script, *flags = shlex.split(command)
    if script.startswith("reproduce/"):
        assert (ROOT / script).is_file()
        monkeypatch.syspath_prepend(str(ROOT / "reproduce"))
        script = "worlds.py"
    module = importlib.import_module(script.removesuffix(".py"))
    presets = getattr(module, "presets", None)
    flags = [flag.replace("=S", "=1") if flag.startswith("--seed") else flag for flag in flags]
    assert flags == ["--help"] or isinstance(parse(module.Config, flags, presets), module.Config)


def test_the_paper_map_points_at_what_exists():
    section = README.split("## Paper map")[1].split("\n## ")[0]
    places = re.findall(r"`(\w+)\.py`: ((?:`\w+`(?:, )?)+)", section)
    assert len(places) >= 12
    for file, names in places:
        for name in re.findall(r"`(\w+)`", names):
            assert name in definitions(file) or re.search(rf"(?m)^{name}\b.* = ", SOURCE[file]), f"{file}.py: {name}"
    for tag, (file, function) in ((tag, home.split(".")) for tag, home in HOME.items()):
        start = "| " + tag.replace("Alg. 1", "Algorithm 1, phase 2")
        row = next(line for line in section.splitlines() if line.startswith(start))
        assert f"`{file}.py`: " in row and f"`{function}`" in row


def test_the_readme_names_every_file():
    for name in ORDER:
        assert f"{name}.py" in README


def test_every_metric_of_the_log_has_its_sentence():
    logged = re.findall(r'"(\w+)":', definitions("distill")["distil"].split("# 7 log")[1].split("supervised.log")[0])
    assert len(logged) > 10
    for name in logged:
        assert f"`{name}`" in README, f"the glossary lacks {name}"


def test_the_promises_name_tests_that_exist():
    promises = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    places = re.findall(r"`tests/(\w+)\.py`: ((?:`\w+`(?:, )?)+)", promises)
    assert len(places) >= 12
    for file, names in places:
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert f"def {name}(" in source, f"{file}.py has no {name}"
