"""The annotated page: docs/annotated.html and .ipynb, of docs/annotated.md and the root's files.

The text names functions, and lines by their words, never by number. A function that has gone, a
line that is not found, or an equation whose line has lost its tag ends the build. What the Python
cells of the text print and draw is kept in docs/annotated.json, and is run anew by --run alone:
figures differ in their last digits from machine to machine.

Run:      pip install -r requirements-dev.txt      latex2mathml, Pygments, Markdown and jupytext
          python -m tools.annotate                 the page and the notebook
          python -m tools.annotate --run           the cells too, which takes three minutes
Text:     ```code: a function, and `from:` and `to:`, words in the first and in the last line of it
          ```equation N: LaTeX, and `symbols:`; ```python: a cell, with a description of its figure
          ```question: it, a line ---, and its answer; {{w_t}}: a symbol of ```symbols
Left out: numbers of lines; scripts in the page; a search.
"""

import ast
import contextlib
import hashlib
import html
import io
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config import UserError, check, flag, run
from safe.files import read_json, written_aside

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w+) ?(.*)$")
STYLE = DOCS / "annotated.css"


@dataclass(frozen=True)
class Config:
    run: bool = flag(False, "run the cells anew and keep what they print")

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class Part:
    """A piece of the text: "prose" or what a fence is called, its argument, its lines."""
    kind: str
    argument: str
    body: str


@dataclass(frozen=True)
class Symbol:
    latex: str
    code: str
    shape: str
    meaning: str


def parts_of(text: str) -> Iterator[Part]:
    """The text in pieces. A heading begins a piece of prose."""
    lines, prose = iter(text.splitlines()), []
    for line in lines:
        fence = FENCE.match(line)
        if fence or line.startswith("#"):
            if any(prose):
                yield Part("prose", "", "\n".join(prose))
            prose = [] if fence else [line]
        else:
            prose.append(line)
        if fence:
            body = []
            for inner in lines:
                if inner == "```":
                    break
                body.append(inner)
            else:
                raise UserError(f"docs/annotated.md: a fence is not closed: {line}")
            yield Part(fence[1], fence[2], "\n".join(body))
    if any(prose):
        yield Part("prose", "", "\n".join(prose))


# ---- what the text names ------------------------------------------------------------------------

def source(name: str) -> str:
    """The lines of a function or class, as in "distill.reverse_kl" or "model.GPT.forward"."""
    words = name.split(".")
    for at in range(len(words) - 1, 0, -1):
        path = ROOT.joinpath(*words[:at]).with_suffix(".py")
        if path.is_file():
            break
    else:
        raise UserError(f"docs/annotated.md: there is no file of {name}")
    text = path.read_text(encoding="utf-8")
    node = ast.parse(text)
    for word in words[at:]:
        found = [inner for inner in node.body if getattr(inner, "name", None) == word]
        if not found:
            raise UserError(f"docs/annotated.md names {name}, which is not in {path.name}")
        node = found[0]
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])


def excerpt(body: str) -> tuple[str, str]:
    """(name, lines) of a ```code: the whole function, or its lines from one to another."""
    name, *limits = body.strip().splitlines()
    lines = source(name).splitlines()
    words = dict(limit.split(": ", 1) for limit in limits)
    for key, first in (("from", True), ("to", False)):
        if key in words:
            at = [n for n, line in enumerate(lines) if words[key] in line]
            if not at:
                raise UserError(f"docs/annotated.md: {name} has no line with {words[key]!r}")
            lines = lines[at[0] :] if first else lines[: at[0] + 1]
    return name, textwrap.dedent("\n".join(lines))


def tags(code: str) -> dict[int, set[str]]:
    """The equations that the comments at the ends of lines name, by line: {3: {"3", "5"}}."""
    found = {}
    for n, line in enumerate(code.splitlines()):
        comment = re.search(r"#\s*(?!not)(.*)$", line)
        if comment and re.match(r"Eqs?\. \(", comment[1]):
            found[n] = set(re.findall(r"\((\d)\)", comment[1]))
        elif comment and comment[1].startswith("Alg. 1") and line.split("#")[0].strip():
            found[n] = {"Algorithm 1"}
    return found


def symbols_of(body: str) -> dict[str, Symbol]:
    """The symbols by their names. Raises UserError where the code does not have one any more."""
    symbols = {}
    for line in body.strip().splitlines():
        name, *cells = (cell.strip() for cell in line.split("|"))
        symbol = Symbol(*cells)
        where, what = symbol.code.split(": ")
        code = source(where)
        for word in re.findall(r"\w+", what):
            if not re.search(rf"\b{word}\b", code):
                raise UserError(f"docs/annotated.md: {where} has no {word}, the symbol {name}")
        symbols[name] = symbol
    return symbols


# ---- cells --------------------------------------------------------------------------------------

def cells(parts: list[Part]) -> list[Part]:
    return [part for part in parts if part.kind == "python"]


def key(part: Part) -> str:
    return hashlib.sha256(part.body.encode()).hexdigest()[:16]


def run_cells(parts: list[Part]) -> dict[str, dict]:
    """What each cell prints, and its figure as SVG. They share their names, as in a notebook."""
    import matplotlib
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "annotated"})
    names, results = {"__name__": "cells"}, {}
    for cell in cells(parts):
        printed = io.StringIO()
        names.pop("figure", None)
        with contextlib.redirect_stdout(printed):
            exec(compile(cell.body, "docs/annotated.md", "exec"), names)
        results[key(cell)] = {"text": printed.getvalue()}
        if "figure" in names:
            drawn = io.StringIO()
            names["figure"].savefig(drawn, format="svg", metadata={"Date": None})
            svg = drawn.getvalue()
            results[key(cell)]["svg"] = svg[svg.index("<svg") :]
    return results


def kept_results(parts: list[Part]) -> dict[str, dict]:
    results = read_json(DOCS / "annotated.json")
    for cell in cells(parts):
        if key(cell) not in results:
            first = cell.body.strip().splitlines()[0]
            raise UserError(f"a cell of docs/annotated.md has changed since it was run ({first}): "
                            "python -m tools.annotate --run")
    return results


# ---- the page -----------------------------------------------------------------------------------

class Page:
    """Turns the parts into HTML. A row has notes at the left, and code at the right."""

    def __init__(self, parts: list[Part], results: dict[str, dict]):
        self.parts, self.results = parts, results
        self.symbols = {}
        self.tips = 0
        self.marked = set()  # addresses of lines
        self.contents = []  # (address, title)

    def formula(self, latex: str, display: str = "inline") -> str:
        from latex2mathml.converter import convert
        made = convert(latex, display=display)
        # A prime is a raised sign already: as a superscript it can hardly be seen.
        prime = r"<msup>(<mi>\w</mi>)<mi>&#x02032;</mi></msup>"
        return re.sub(prime, r'<mrow>\1<mo lspace="0" rspace="0">&#x02032;</mo></mrow>', made)

    def symbol(self, name: str) -> str:
        """A symbol that shows what it is when it is pointed at or reached by the keyboard."""
        if name not in self.symbols:
            raise UserError(f"docs/annotated.md: {{{{{name}}}}} is not among its symbols")
        symbol = self.symbols[name]
        self.tips += 1
        where, what = symbol.code.split(": ")
        tip = (f"{html.escape(symbol.meaning)}<br>in <code>{where}</code>: <code>"
               f"{html.escape(what)}</code>, {html.escape(symbol.shape)}")
        return (f'<span class="symbol"><button type="button" aria-describedby="tip-{self.tips}">'
                f'<span aria-hidden="true">{self.formula(symbol.latex)}</span>'
                f'<span class="spoken">{name}</span></button>'
                f'<span role="tooltip" id="tip-{self.tips}">{tip}</span></span>')

    def prose(self, text: str) -> str:
        """Markdown, with {{symbols}} and $formulas$."""
        import markdown
        kept = []

        def hold(match: re.Match) -> str:
            kept.append(self.symbol(match[1]) if match[1] else self.formula(match[2]))
            return f"§{len(kept) - 1}§"

        made = markdown.markdown(re.sub(r"\{\{(.+?)\}\}|\$(.+?)\$", hold, text, flags=re.S),
                                 extensions=["tables", "attr_list"])
        made = re.sub(r"(<table>.*?</table>)", r'<div class="table">\1</div>', made, flags=re.S)
        return re.sub(r"§(\d+)§", lambda match: kept[int(match[1])], made)

    def code(self, body: str, station: str) -> str:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer
        name, code = excerpt(body)
        lines = highlight(code, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip("\n").split("\n")
        for n, numbers in tags(code).items():
            new = sorted({f"{station}-{number}".replace("Algorithm 1", "alg-1")
                          for number in numbers} - self.marked)
            self.marked |= set(new)
            ids = "".join(f'<a id="{address}"></a>' for address in new)
            lines[n] = f'<mark>{ids}{lines[n]}</mark>'
        newline = "\n"
        path = "/".join(name.split(".")[: 2 if name.startswith("fast.") else 1]) + ".py"
        return (f'<figure class="code"><figcaption><code>{path}</code>: '
                f'<code>{name.split(".")[-1]}</code></figcaption>'
                f'<pre tabindex="0"><code>{newline.join(lines)}</code></pre></figure>')

    def equation(self, part: Part, station: str, known: set[str]) -> str:
        latex, _, names = part.body.partition("\nsymbols: ")
        number, label = part.argument, ""
        if number:
            if number not in known:
                raise UserError(f"docs/annotated.md: no line of the code beside Eq. ({number}) has "
                                "its tag")
            shown = number if number.startswith("Alg") else f"Eq. ({number})"
            address = f"{station}-{number}".replace("Algorithm 1", "alg-1")
            label = f'<a href="#{address}" class="number">{shown}</a>'
        chips = " ".join(self.symbol(name) for name in names.split())
        chips = f'<p class="where">{chips}</p>' if chips else ""
        return (f'<div class="equation"><div class="formula" tabindex="0">'
                f'{self.formula(latex, "block")}</div>{label}</div>{chips}')

    def cell(self, part: Part) -> str:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer
        code = highlight(part.body, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip()
        made = f'<pre class="cell" tabindex="0"><code>{code}</code></pre>'
        result = self.results[key(part)]
        if result["text"]:
            made += f'<pre class="out" tabindex="0">{html.escape(result["text"].rstrip())}</pre>'
        if "svg" in result:
            if not part.argument:
                raise UserError("docs/annotated.md: a cell with a figure needs a description of it")
            label = html.escape(part.argument, quote=True)
            svg = result["svg"].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
            svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{key(part)}-", svg)
            made += f"<figure class=\"drawn\">{svg}<figcaption>{label}</figcaption></figure>"
        return f'<div class="run">{made}</div>'

    def question(self, body: str) -> str:
        asked, _, answer = body.partition("\n---\n")
        return (f'<details><summary>{html.escape(asked.strip())}</summary>{self.prose(answer)}'
                "</details>")

    def station(self, title: str, address: str, parts: list[Part]) -> str:
        """A section: rows of notes, and the code that they are about."""
        known = {number for part in parts if part.kind == "code"
                 for numbers in tags(excerpt(part.body)[1]).values() for number in numbers}
        rows, notes, shown = [], [], []

        def close() -> None:
            if notes or shown:
                rows.append(f'<div class="row"><div class="notes">{"".join(notes)}</div>'
                            f'<div class="shown">{"".join(shown)}</div></div>')
            notes.clear()
            shown.clear()

        for part in parts:
            if part.kind in ("code", "python"):
                shown.append(self.code(part.body, address) if part.kind == "code"
                             else self.cell(part))
                continue
            if shown:
                close()
            if part.kind == "prose":
                notes.append(self.prose(part.body))
            elif part.kind == "equation":  # it needs the whole width
                close()
                notes.append(self.equation(part, address, known))
                close()
            elif part.kind == "question":
                notes.append(self.question(part.body))
            else:
                raise UserError(f"docs/annotated.md: there is no fence {part.kind!r}")
        close()
        return (f'<section id="{address}" aria-labelledby="{address}-title"><h2 '
                f'id="{address}-title">{title}</h2>{"".join(rows)}</section>')

    def whole(self) -> str:
        stations, title, address, inner = [], "", "", []
        head = ""

        def close() -> None:
            if address:
                self.contents.append((address, title))
                stations.append(self.station(title, address, inner))

        for part in self.parts:
            heading = re.match(r"## (.+) \{#([\w-]+)\}\n(.*)", part.body + "\n", re.S)
            if part.kind == "symbols":
                self.symbols = symbols_of(part.body)
            elif part.kind == "prose" and part.body.startswith("# "):
                head = part.body
            elif part.kind == "prose" and heading:
                close()
                title, address, rest = heading.groups()
                inner = [Part("prose", "", rest)] if rest.strip() else []
            else:
                inner.append(part)
        close()
        contents = "".join(f'<li><a href="#{to}">{name}</a></li>' for to, name in self.contents)
        return (TOP.replace("STYLE", STYLE.read_text(encoding="utf-8"))
                + f'<nav aria-label="Contents"><ol>{contents}</ol></nav><main><header>'
                + self.prose(head) + f'</header>{"".join(stations)}</main></body></html>\n')


TOP = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>The Annotated MiniLLM</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>
STYLE</style></head><body><a class="skip" href="#two-kls">Skip the contents</a>
"""


def station(address: str) -> str:
    """The prose and the equations of a station as plain text, up to its questions."""
    parts = parts_of((DOCS / "annotated.md").read_text(encoding="utf-8"))
    symbols, shown, inside = {}, [], False
    for part in parts:
        if part.kind == "symbols":
            symbols = symbols_of(part.body)
        if part.body.startswith("## "):
            inside = f"{{#{address}}}" in part.body
        if inside and part.kind == "prose":
            text = re.sub(r" \{#[\w-]+\}", "", part.body).strip()
            for name, symbol in symbols.items():
                text = text.replace(f"{{{{{name}}}}}", symbol.latex)
            shown.append(text)
        elif inside and part.kind == "equation":
            number = f"   ({part.argument})" if part.argument else ""
            shown.append(f"    {part.body.partition(chr(10) + 'symbols: ')[0]}{number}")
    if not shown:
        raise UserError(f"docs/annotated.md has no station {address}")
    return "\n\n".join([*shown, f"With code and figures: docs/annotated.html#{address}"])


# ---- the notebook -------------------------------------------------------------------------------

BEGIN = """# The notebook runs in the project's root, wherever it was opened.
import os
import sys
while not os.path.exists("distill.py"):
    os.chdir("..")
sys.path.insert(0, os.getcwd())
if "get_ipython" in globals():  # figures are shown
    get_ipython().run_line_magic("matplotlib", "inline")"""


def notebook(parts: list[Part]) -> str:
    """The text as a notebook: prose, equations and code as Markdown, and the cells to be run."""
    import jupytext
    symbols, blocks = {}, [("code", BEGIN)]
    for part in parts:
        if part.kind == "symbols":
            symbols = symbols_of(part.body)
        elif part.kind == "python":
            blocks.append(("code", part.body))
        elif part.kind == "code":
            name, code = excerpt(part.body)
            blocks.append(("markdown", f"`{name}`\n```python\n{code}\n```"))
        elif part.kind == "equation":
            latex = part.body.partition("\nsymbols: ")[0]
            number = rf" \tag{{{part.argument}}}" if part.argument else ""
            blocks.append(("markdown", f"$$ {latex}{number} $$"))
        elif part.kind == "question":
            asked, _, answer = part.body.partition("\n---\n")
            blocks.append(("markdown", f"<details><summary>{asked.strip()}</summary>\n\n{answer}\n"
                                       "</details>"))
        else:
            text = re.sub(r" \{#[\w-]+\}", "", part.body)
            blocks.append(("markdown", text.strip()))
    text = ""
    for kind, body in blocks:
        body = re.sub(r"\{\{(.+?)\}\}", lambda m: f"${symbols[m[1]].latex}$", body)
        if kind == "markdown":
            lines = "\n".join(f"# {line}".rstrip() for line in body.splitlines())
            text += f"# %% [markdown]\n{lines}\n\n"
        else:
            text += f"# %%\n{body}\n\n"
    made = jupytext.reads(text, fmt="py:percent")
    made.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3",
                                    "language": "python"}}
    for n, cell in enumerate(made.cells):
        cell["id"] = f"cell-{n}"
    return jupytext.writes(made, fmt="ipynb") + "\n"


# ---- command ------------------------------------------------------------------------------------

def build() -> dict[str, str]:
    """The page and the notebook, by the names of their files."""
    parts = list(parts_of((DOCS / "annotated.md").read_text(encoding="utf-8")))
    return {"annotated.html": Page(parts, kept_results(parts)).whole(),
            "annotated.ipynb": notebook(parts)}


def main(cfg: Config) -> None:
    if cfg.run:
        parts = list(parts_of((DOCS / "annotated.md").read_text(encoding="utf-8")))
        with written_aside(DOCS / "annotated.json") as aside:
            aside.write_text(json.dumps(run_cells(parts), indent=1) + "\n", encoding="utf-8")
    for name, made in build().items():
        with written_aside(DOCS / name) as aside:
            aside.write_text(made, encoding="utf-8")
        print(f"docs/{name}: {len(made.encode()) / 2**20:.2f} MiB")


if __name__ == "__main__":
    run(main, Config)
