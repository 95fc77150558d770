"""The house rules that a reader relies on: budgets, one-way imports, a home for each equation, and a README whose
commands, map and metrics are true."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from config import parse

ROOT = Path(__file__).parent.parent
# import order, and the most lines of each file: what has been reached, which may only become less
ORDER = {"config": 232, "world": 122, "model": 320, "data": 320, "sample": 323, "eval": 256, "teacher": 313,
         "distill": 500}
FOLDERS = ("safe", "families", "fast", "measure", "tools", "exercises", "reproduce")
SOURCE = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path.read_text(encoding="utf-8")
          for pattern in ("*.py", *(f"{folder}/*.py" for folder in FOLDERS)) for path in sorted(ROOT.glob(pattern))}
COMMANDS = ["data", "sample", "eval", "teacher", "distill", "measure.exposure", "measure.calibration", "measure.judge",
            "measure.report", "tools.plan", "tools.bench", "tools.annotate", "exercises.oracle"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOME = {"Eq. (1)": "distill.reverse_kl", "Eq. (2)": "distill.token_reward", "Eq. (3)": "distill.single_step_loss",
        "Eq. (4)": "sample.mix", "Eq. (5)": "distill.importance_weights", "Eq. (6)": "distill.future_reward",
        "Eq. (7)": "distill.minillm_loss", "Alg. 1": "distill.long_term_loss"}


def definitions(name: str) -> dict[str, str]:
    """The source of every function and class of a file, with the comments at its line ends."""
    nodes = (node for node in ast.walk(ast.parse(SOURCE[name])) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    lines = SOURCE[name].splitlines()
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes}


# ---- budgets --------------------------------------------------------------------------------------------------------

def test_the_root_has_these_files_and_no_others():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_at_the_root_can_be_read_in_a_sitting(name):
    assert len(SOURCE[name].splitlines()) <= ORDER[name]


def test_the_root_can_be_read_in_an_evening():
    assert sum(len(SOURCE[name].splitlines()) for name in ORDER) <= 2400
    assert sum(len(SOURCE[name].encode()) for name in ORDER) <= 123_500


@pytest.mark.parametrize("name", SOURCE)
def test_lines_and_functions_are_short(name):
    assert all(len(line) <= 100 for line in SOURCE[name].splitlines())
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 90, node.name


def test_distill_has_forty_two_flags_at_most():
    assert len(importlib.import_module("distill").Config.__dataclass_fields__) <= 42


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200 and all(len(line) <= 100 for line in lines)


# ---- structure ------------------------------------------------------------------------------------------------------

def imported(name: str) -> set[str]:
    """The modules that a file imports, those in functions too."""
    modules = set()
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return modules


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    """And of the folders the root imports safe/, what picks a family, and in functions fast/ and tools/."""
    order = list(ORDER)
    assert imported(name) & set(ORDER) <= set(order[: order.index(name)])
    folders = {module.partition(".")[0] for module in imported(name)} & set(FOLDERS)
    known = {"sample": {"fast"}, "distill": {"fast", "tools"}, "model": {"families"}, "data": {"families"},
             "teacher": {"families"}}
    assert folders - {"safe"} <= known.get(name, set())
    at_the_top = [node for node in ast.parse(SOURCE[name]).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(ast.unparse(node).split()[1].partition(".")[0] in FOLDERS[2:] for node in at_the_top)


@pytest.mark.parametrize("name", [name for name in SOURCE if name.startswith("safe.")])
def test_what_keeps_files_safe_knows_no_model(name):
    assert imported(name) & set(ORDER) <= {"config", "world"}


@pytest.mark.parametrize("name", SOURCE)
def test_transformers_is_a_peer_or_opens_other_families(name):
    assert name in ("tools.bench", "families.causal", "families.tokens") or "transformers" not in imported(name)


@pytest.mark.parametrize("tag", HOME)
def test_each_equation_has_its_home(tag):
    """A comment with its number, on a line that computes, in the function that the paper map names."""
    file, function = HOME[tag].split(".")
    comments = re.findall(r"\S  # (Eqs?\..*|Alg\..*)", definitions(file)[function])
    assert any(tag in comment.replace("Eqs.", "Eq.") for comment in comments) or (
        any(comment.startswith("Eqs.") and tag[4:] in comment for comment in comments))


def test_the_loop_of_algorithm_1_is_in_view():
    """Its gradient and its step stand in one function, with the losses by name."""
    loop = definitions("distill")["algorithm_1"]
    for visible in ("minillm_loss(", "future_reward(", ").backward()", "scaler.step(optimizer)", "log_q", "log_p"):
        assert visible in loop


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_read(name):
    config = importlib.import_module(name).Config
    own = SOURCE[name].replace(definitions(name)["__post_init__"], "")  # to be checked is not to be used
    read = own + "".join(source for other, source in SOURCE.items() if other not in COMMANDS or other in ("teacher",))
    read += SOURCE["tools.plan"] if name == "distill" else ""
    for field in config.__dataclass_fields__:
        used = re.search(rf"\b(cfg|self|s|settings)\.{field}\b", read) or f'given.get("{field}"' in own
        assert used or f'"{field}"' in definitions("tools.stages")["stages"], f"nothing reads --{field}"


# ---- what is printed for readers ------------------------------------------------------------------------------------

def commands(text: str) -> set[str]:
    """The commands of a text: `python FILE.py ...` or `python -m FOLDER.FILE ...`, or torchrun's, without what is told
    of them at their right."""
    before = r"(?m)(?:^|`|\s{2,})(?:torchrun(?: --\S+)+|(?:OMP_NUM_THREADS=1 )?python)"
    found = re.findall(before + r" ((?:-m )?(?:\w+\.py|\w+\.\w+)(?: [^`\n]*)?)", text)
    return {re.split(r"\s{2,}|;|\s+#", line)[0].rstrip(",. ") for line in found}


TEXTS = [path.read_text(encoding="utf-8") for pattern in ("*/*.md", "results/*/README.md")
         for path in ROOT.glob(pattern)]


@pytest.mark.parametrize("command", sorted(commands("\n".join([README, *SOURCE.values(), *TEXTS]))))
def test_commands_as_printed_are_accepted(command):
    """Every flag exists, and every value is in its range."""
    script, *flags = shlex.split(command.removeprefix("-m "))
    name = script.removesuffix(".py")
    if name not in COMMANDS and name.partition(".")[0] != "anna":  # a student's copy of the exercises
        assert (ROOT / (name.replace(".", "/") + ".py")).is_file()
    owner = {name: "reproduce.worlds" for name in [name] if name[:9] == "reproduce"}
    owner["exercises.explain"] = "exercises.explain"
    if name not in COMMANDS and name not in owner:
        return  # an exercise, which has no Config
    module = importlib.import_module(owner.get(name, name))
    flags = [flag.replace("=S", "=1") if flag.startswith("--seed") else flag for flag in flags]
    assert flags == ["--help"] or parse(module.Config, flags, getattr(module, "presets", None))


def test_the_paper_map_points_at_what_exists():
    section = README.split("## Paper map")[1].split("\n## ")[0]
    places = re.findall(r"`((?:\w+/)?\w+)\.py`: ((?:`\w+`(?:, )?)+)", section)
    assert len(places) >= 12
    for file, names in places:
        file = file.replace("/", ".")
        for name in re.findall(r"`(\w+)`", names):
            assert name in definitions(file) or re.search(rf"(?m)^{name}\b.* = ", SOURCE[file]), f"{file}.py: {name}"
    for tag, (file, function) in ((tag, home.split(".")) for tag, home in HOME.items()):
        start = "| " + tag.replace("Alg. 1", "Algorithm 1, phase 2")
        row = next(line for line in section.splitlines() if line.startswith(start))
        assert f"`{file}.py`: " in row and f"`{function}`" in row


def test_the_readme_names_every_file_at_the_root_and_every_folder():
    for name in [f"{name}.py" for name in ORDER] + [f"{folder}/" for folder in FOLDERS]:
        assert name in README


def test_every_metric_of_the_log_has_its_sentence():
    glossary = (ROOT / "measure" / "README.md").read_text(encoding="utf-8")
    logged = re.findall(r'"(\w+)":', definitions("distill")["algorithm_1"].rsplit("yield", 1)[1])
    assert len(logged) > 10
    for name in logged:
        assert f"`{name}`" in glossary, f"the glossary lacks {name}"


def test_the_promises_name_tests_that_exist():
    promises = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    places = re.findall(r"`tests/(\w+)\.py`: ((?:`\w+`(?:, )?)+)", promises)
    assert len(places) >= 12
    for file, names in places:
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert f"def {name}(" in source, f"{file}.py has no {name}"
