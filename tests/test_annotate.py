"""The annotated page: it is fresh, needs nothing from anywhere, and breaks where the code has moved away from it."""

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused

pytest.importorskip("latex2mathml")
pytest.importorskip("markdown")
pytest.importorskip("jupytext")
from tools import annotate

ROOT = Path(annotate.__file__).parent.parent
TEXT = (ROOT / "docs/annotated.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return annotate.build()


@pytest.mark.parametrize("name", ["annotated.html", "annotated.ipynb"])
def test_what_is_committed_is_fresh(name, made):
    """Else: python -m tools.annotate"""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made[name]


class Reader(html.parser.HTMLParser):
    """Notes ids, links and elements, and whether each element that opens closes."""
    EMPTY = ("meta", "br", "use", "path", "rect", "img", "link", "hr", "input")

    def __init__(self, page: str):
        super().__init__()
        self.ids, self.links, self.loads, self.tags, self.open = [], [], [], set(), []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" and "href" in attrs else []
        self.loads += [value for name, value in attrs.items() if name in ("src", "data", "action", "poster")]
        self.loads += [attrs["href"]] if tag == "link" else []
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def test_the_page_is_whole_in_itself(made):
    page = made["annotated.html"]
    read = Reader(page)
    assert not read.loads and not read.tags & {"script", "iframe", "link", "img"}
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(page.encode()) < 2 * 2**20
    assert len(read.ids) == len(set(read.ids))
    for link in read.links:
        assert link.startswith("https://arxiv.org/") or link[1:] in read.ids, link


def test_every_equation_of_the_paper_leads_to_its_line(made):
    read = Reader(made["annotated.html"])
    targets = [match[1] for link in read.links if (match := re.search(r"-(\d|alg-1)$", link))]
    assert targets == ["1", *"1234567", "alg-1"]  # the first is a station: phase 1
    lines = re.findall(r'<mark><a id="[\w-]+">.*?</mark>', made["annotated.html"])
    assert all("Eq" in line or "Alg" in line for line in lines) and len(lines) >= 8


def test_every_function_of_the_page_is_the_files_own(made):
    for part in annotate.parts_of(TEXT):
        if part.kind == "code":
            name, code = annotate.excerpt(part.body)
            path = ROOT.joinpath(*name.split(".")[: 2 if name.startswith("fast.") else 1]).with_suffix(".py")
            assert [line.strip() for line in code.splitlines() if line.strip()] == [
                line.strip() for line in code.splitlines() if line.strip() and line.strip() in path.read_text("utf-8")]


@pytest.mark.parametrize("old, new, told", [
    ("distill.reverse_kl\n", "distill.gone\n", "names distill.gone"),
    ("distill.reverse_kl\n", "gone.reverse_kl\n", "no file of gone.reverse_kl"),
    ("from: # 4 the gradient", "from: # 4 something", "no line with '# 4 something"),
    ("distill.single_step_loss: weight", "distill.single_step_loss: mass", "has no mass"),
    ("{{alpha}}", "{{beta}}", "{{beta}}"),
    ("```equation 6", "```equation 3", "no line of the code beside Eq. (3)"),
    ("torch.linspace(-6, 6, 601)", "torch.linspace(-6, 6, 602)", "has changed since it was run"),
    ("```question\nBoth", "```riddle\nBoth", "no fence 'riddle'"),
    ("```python Two fits of one", "```python", "")])
def test_a_page_that_the_code_has_left_is_not_built(old, new, told, tmp_path, monkeypatch):
    assert old in TEXT
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "docs/annotated.md").write_text(TEXT.replace(old, new, 1), encoding="utf-8")
    monkeypatch.setattr(annotate, "DOCS", tmp_path / "docs")
    refused(annotate.build, told) if told else annotate.build()


def test_an_equation_whose_line_has_lost_its_tag_is_named(monkeypatch):
    source = annotate.source
    monkeypatch.setattr(annotate, "source", lambda name: source(name).replace("# Eq. (6)", "# (6)"))
    refused(annotate.build, "no line of the code beside Eq. (6) has its tag")


def test_the_notebook_runs_from_top_to_bottom(made, tmp_path):
    """Its cells, one after the other, in a process of their own and a copy of the project."""
    notebook = json.loads(made["annotated.ipynb"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 10 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    ignored = shutil.ignore_patterns("out", ".git", "results", "tests", "__pycache__", ".*")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    (tmp_path / "cells.py").write_text("\n\n".join(cells), encoding="utf-8")
    run = subprocess.run([sys.executable, tmp_path / "cells.py"], cwd=tmp_path / "copy" / "docs", text=True,
                         capture_output=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Tell about the dog" in run.stdout and "reverse KL" in run.stdout
