"""A report of what runs have written: results beside the paper's, curves, figures, and answers side by side.

Paper:    arXiv 2306.08543v4: Table 1, Figures 5 to 8 and 16, Tables 2 to 4, each drawn where the folders hold its data.
Run:      python report.py out/tiny
          python report.py out/gpt2-xl-to-gpt2 out/eval out/exposure --out=out/report
Left out: significance tests (intervals are printed; five seeds are few).
"""

import base64
import html
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

import numpy as np

from config import UserError, check, check_place, checksum, command, flag, read_lines, run, written_aside
from data import HUB_SETS
from distill import FREE
from eval import LENGTHS
from judge import samples

SETS = tuple(HUB_SETS)
# Table 1, GPT-2: Rouge-L on the five sets in this order, then GPT-4's score on the first three.
TABLE_1 = {
    ("1.5B", "teacher"): (27.6, 14.3, 16.3, 27.6, 31.8, 58.4, 42.9, 48.6),
    ("120M", "sft"): (23.3, 10.0, 14.7, 16.3, 18.5, 38.6, 26.3, 32.8),
    ("120M", "kd"): (22.8, 10.8, 13.4, 19.7, 22.0, 40.3, 27.8, 31.9),
    ("120M", "seqkd"): (22.7, 10.1, 14.3, 16.4, 18.8, 41.2, 26.2, 31.0),
    ("120M", "minillm"): (24.6, 13.2, 16.9, 25.3, 26.6, 44.7, 29.2, 34.1),
    ("340M", "sft"): (25.5, 13.0, 16.0, 25.1, 32.0, 51.9, 39.6, 42.3),
    ("340M", "kd"): (25.0, 12.0, 15.4, 23.7, 31.0, 51.6, 39.2, 42.8),
    ("340M", "seqkd"): (25.3, 12.6, 16.9, 22.9, 30.2, 50.5, 39.0, 43.0),
    ("340M", "minillm"): (25.4, 15.6, 17.7, 27.4, 34.5, 52.2, 40.5, 42.6),
    ("760M", "sft"): (25.4, 12.4, 16.1, 21.5, 27.1, 50.7, 38.3, 43.1),
    ("760M", "kd"): (25.9, 13.4, 16.9, 25.3, 31.7, 53.4, 40.4, 43.4),
    ("760M", "seqkd"): (25.6, 14.0, 15.9, 26.1, 32.9, 52.0, 38.9, 42.4),
    ("760M", "minillm"): (26.4, 15.9, 18.3, 29.3, 37.7, 54.7, 44.6, 45.7),
}
SIZES = {124_439_808: "120M", 354_823_168: "340M", 774_030_080: "760M", 1_557_611_200: "1.5B"}  # parameters, as named
METRICS = ("valid", "distinct", "rouge_l", "reverse_kl", "forward_kl", "loss", "text_loss", "dist_4", "dist_4_prompt",
           "tokens", "ended", "exact_match")
METHODS = ("teacher", "init", "sft", "kd", "seqkd", "minillm")  # in the order of the paper's tables
CURVES = ("reverse_kl", "reward", "valid", "rouge_l", "response_tokens", "clip_fraction", "weight_max", "loss_pt")
# colour and pattern of a line; four in a row differ in the pattern, for those who see or print in grey
STYLES = [(("#111111", "#b03a2e", "#2e6da4", "#6fa33a")[n % 4], ("-", "--", "-.", ":")[(n + n // 4) % 4])
          for n in range(16)]
KEYS = {"instruction", "input", "references", "answer", "scores"}  # of a line of samples.jsonl
HATCHES = ("", "//", "..", "xx", "\\\\", "oo")


# ---- what there is --------------------------------------------------------------------------------------------------

@dataclass
class Found:
    """A file that a run has written, the model and the set that it is about, and what it was made with."""
    kind: str  # "evaluation", "training", "exposure", "calibration" or "judge"
    path: Path
    model: str
    data: str | None
    content: dict
    settings: dict
    name: str = ""


KINDS = {"results.json": "evaluation", "run.json": "training", "exposure.json": "exposure",
         "calibration.json": "calibration"}
# settings that do not change what is measured, or only add to it
UNCHANGED = {"out", "device", "batch_size", "capture", "dtype", "data", "model", "files"}
NEEDED = {  # of a file, by its kind as judge.py calls it, and of parts of it
    "evaluation": {"data", "scores", "parameters", "prompts", "seconds", "peak_gib", "rouge_l_by_length"},
    "training": {"data", "teacher", "divergence", "source", "long_term"}, "exposure": {"ex_acc_err", "low", "high"},
    "calibration": {"tasks"}, "task": {"accuracy", "majority", "ece", "bins"},
    "reference": {"judged", "unscored", "score", "interval"}, "pairwise": {"judged", "unscored", "win", "tie", "loss"},
    "judge's flags": {"judge", "against"}}
LEFT_OUT = {"training": FREE | {"seed", "command", "bytes", "checksums"},
            "evaluation": UNCHANGED | {"teacher", "corpus"}}


def read(path: Path) -> Found | None:
    """What a .json file holds that a report can show. A list, as distill.py's results.json is one, holds nothing."""
    kind = "judge" if path.name.startswith("judge") else KINDS.get(path.name)
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if kind else None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON: remove it, and run again what wrote it") from None
    try:
        return recognized(kind, path, content) if isinstance(content, dict) else None
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{path} is not as the commands write it: remove it, or make it anew") from None


def recognized(kind: str, path: Path, content: dict) -> Found | None:
    """The content of a file, if it is one of ours. Raises UserError for what is of another version or other answers."""
    if kind == "training":
        given = content
        model = f"{given['out']}/minillm" if "mix_alpha" in given else None  # of phase 2 alone
    else:
        given = content.get("given", {})
        model = given.get("answers" if kind == "judge" else "model")
    if model is None:
        return None
    if "command" not in content:
        raise UserError(f"{path} was made by an earlier version, and lacks what a report needs: make it anew")
    parts = [(content.get("kind", kind), content), *(("task", task) for task in content.get("tasks", {}).values())]
    if kind == "judge":
        parts.append(("judge's flags", given))
    if any(NEEDED[name] - part.keys() for name, part in parts):
        raise LookupError
    if kind == "judge":  # of the evaluation whose answers were judged, if it is one
        files = samples(model), path.parent / "samples.jsonl"
        answers = next((file for file in files if file.is_file()), None)
        if answers and given.get("files") not in (None, checksum(answers)):
            raise UserError(f"{path} has marks of other answers than are in {answers} now: run judge.py again, or "
                            "remove it")
        beside = (file.parent / "results.json" for file in files)
        if evaluated := next(filter(None, map(read, filter(Path.is_file, beside))), None):
            model = evaluated.model
            content |= {name: evaluated.content[name] for name in ("data", "parameters")}
            given = evaluated.settings | {name: value for name, value in given.items() if value is not None}
    settings = {name: re.sub(r"(^|/)seed-\d+(?=/)", "", value) if isinstance(value, str) else value
                for name, value in given.items() if name not in LEFT_OUT.get(kind, UNCHANGED)}
    if kind == "evaluation":  # of the model, for the teacher only adds to what is measured
        settings["weights"] = given.get("weights", [None])[0]
    return Found(kind, path, os.path.normpath(model), content.get("data"), content, settings)


def find(folders: Iterable[str]) -> list[Found]:
    """Everything in these folders that a report can show. Raises UserError for a folder without any of it."""
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give what distill.py, eval.py or another command has written")
        items = [item for item in map(read, sorted(folder.rglob("*.json"))) if item]
        if not items:
            raise UserError(f"{folder}: no results in it; they are written by distill.py, or by eval.py --out=FOLDER")
        for item in items:  # a teacher is evaluated beside each of its students; one model may be measured twice
            key = (item.kind, item.model, item.data, repr({**item.settings, "weights": None}))
            first = found.setdefault(key, item)
            if first.settings.get("weights") != item.settings.get("weights"):
                raise UserError(f"{first.path} and {item.path} are of {item.model} with different weights: remove the "
                                "older")
            for part in {"scores", "tasks"} & item.content.keys():  # the first keeps its own, and gains what it lacks
                first.content[part] = first.content[part] | item.content[part] | first.content[part]
    return named(list(found.values()))


def named(items: list[Found]) -> list[Found]:
    """Names each after its model, without the folders that all have in common, and with the settings in which those of
    the same name differ. Sorted as in the paper's tables."""
    parts = {item.model: [p for p in Path(item.model).parts if not re.fullmatch(r"seed-\d+", p)] or [item.model]
             for item in items}
    heads = [path[:-1] for path in parts.values()]
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*heads)))
    for item in items:
        item.name = "/".join(parts[item.model][shared:])
    rank = lambda item: [*METHODS, None].index(method_of(item.name))
    folders = grouped(items, lambda item: Path(item.name).parent).values()
    items = [item for folder in folders for item in sorted(folder, key=rank)]
    for group in grouped(items, lambda item: (item.kind, item.name, item.data)).values():
        if group[0].kind != "judge" and (names := differing(group)):
            for item in group:
                item.name += f" ({', '.join(f'{name}={plain(item.settings.get(name))}' for name in names)})"
    return items


def differing(items: Sequence[Found]) -> list[str]:
    """The settings in which these differ, but for the checksum of their weights."""
    known = dict.fromkeys(name for item in items for name in item.settings if name != "weights")
    return [name for name in known if len({repr(item.settings.get(name)) for item in items}) > 1]


def plain(value) -> str:
    """A setting as a table shows it: of a path the end."""
    return "/".join(str(value).split("/")[-2:])


def grouped(items: Iterable, key: Callable = lambda item: item.name) -> dict[object, list]:
    """Items in groups: by name, if no other key is given. The runs of one name differ in their seeds."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_data(items: Iterable[Found]) -> dict[str, list[Found]]:
    """By test set: those of Table 1 in its order, then others."""
    sets = grouped(items, lambda item: item.data)
    return {name: sets[name] for name in sorted(sets, key=lambda name: [*SETS, name].index(name))}


Measured = tuple[float, float | None, int]  # mean; standard deviation, None of a single value; number of runs


def spread(values: Sequence[float], runs: int) -> Measured | None:
    if not values:
        return None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, runs


def figure_of(evaluations: Sequence[Found], metric: str) -> Measured | None:
    """A metric over runs, or over the seeds of sampling where there is a single run. That only one of several runs has
    it says nothing of the spread over runs."""
    measured = [values for item in evaluations if (values := item.content["scores"].get(metric))]
    single = len(evaluations) == 1 and measured
    return spread(measured[0] if single else [float(np.mean(values)) for values in measured], len(measured))


def shown(figure: Measured | None, runs: int = 0, digits: int = 2) -> str:
    """The figure as a table shows it, with the number of runs that have it where that is less than `runs`."""
    if figure is None:
        return ""
    mean, deviation, measured = figure
    text = f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")
    return text + f" (of {measured})" * (measured < runs)


def method_of(name: str) -> str | None:
    """The method, as in METHODS, from the name of a folder or a repository."""
    match = re.match(r"(teacher|init|minillm|seqkd|kd|sft)(-gpt2.*)?( \(.*)?$", Path(name).name.lower())
    return match[1] if match else None


def sft_of(name: str) -> str | None:
    """The name, in lower case, of the SFT model of the same size: sft-gpt2-340m for KD-gpt2-340M."""
    method = method_of(name)
    return None if method in (None, "teacher") else re.sub(rf"(^|/){method}(?=[^/]*$)", r"\1sft", name.lower())


def of_paper(item: Found, score: bool = False) -> float | None:
    """Table 1's figure for this model, method and set: Rouge-L, or GPT-4's score. None for a part of a set."""
    row = TABLE_1.get((SIZES.get(item.content.get("parameters")), method_of(item.name)))
    whole = item.settings.get("split", "test") == "test" and item.settings.get("limit") is None
    if row is None or not whole or item.data not in (SETS[:3] if score else SETS):
        return None
    return row[SETS.index(item.data) + len(SETS) * score]


# ---- tables ---------------------------------------------------------------------------------------------------------

@dataclass
class Table:
    title: str
    about: str
    header: list[str]
    rows: list[list[str]]

    def html(self) -> str:
        cells = lambda tag, row: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        rows = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in self.rows)
        return (f"<h2>{html.escape(self.title)}</h2>\n<p>{html.escape(self.about)}</p>\n"
                f"<table><tr>{cells('th', self.header)}</tr>\n{rows}</table>\n")

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
        return f"## {self.title}\n\n{self.about}\n\n{body}\n"


def summary_table(evaluations: list[Found]) -> list[Table]:
    """Rouge-L of each model on each set, as Table 1 is arranged; of a single set there is no more to say."""
    sets = {name: grouped(items) for name, items in by_data(evaluations).items()}
    if len(sets) < 2:
        return []
    rows = []
    for label in grouped(evaluations):
        cells = []
        for groups in sets.values():
            group = groups.get(label, [])
            theirs = of_paper(group[0]) if group else None
            cells.append(shown(figure_of(group, "rouge_l")) + (f" ({theirs:.1f})" if theirs else ""))
        rows.append([label, *cells])
    return [Table("Rouge-L", "In brackets the paper's Table 1, where it has this model.", ["model", *sets], rows)]


def result_tables(evaluations: list[Found]) -> list[Table]:
    """For each set every metric of each model, and the paper's Rouge-L where it has that model."""
    tables = []
    for name, items in by_data(evaluations).items():
        metrics = [metric for metric in METRICS if any(metric in item.content["scores"] for item in items)]
        paper = any(map(of_paper, items))
        rows = []
        for label, group in grouped(items).items():
            row = [label, str(len(group)), *(shown(figure_of(group, metric), len(group)) for metric in metrics)]
            if paper:
                theirs, ours = of_paper(group[0]), figure_of(group, "rouge_l")[0]
                row += [f"{theirs:.1f}", f"{ours - theirs:+.1f}"] if theirs else ["", ""]
            minutes = np.mean([item.content["seconds"] for item in group]) / 60
            rows.append([*row, f"{minutes:.1f}", f"{max(item.content['peak_gib'] for item in group):.1f}"])
        header = ["model", "runs", *metrics, *["paper's rouge_l", "difference"] * paper, "minutes", "GiB"]
        prompts = sorted({item.content["prompts"] for item in items})
        least_to_most = f"{prompts[0]:,}" + f" to {prompts[-1]:,}" * (len(prompts) > 1)
        about = (f"{least_to_most} prompts. Mean ± standard deviation over runs; for a single run over its seeds of "
                 "sampling. Minutes of an evaluation, and the most memory that its process had held by its end.")
        tables.append(Table(f"Results on {name}", about, header, rows))
    return tables


def run_tables(evaluations: list[Found]) -> list[Table]:
    """What the spread is made of: valid, or else Rouge-L, and reverse KL on each set, with a column for each seed."""
    tables, seed_of = [], lambda item: int((re.findall(r"(?:^|/)seed-(\d+)(?=/)", item.model) or ["0"])[-1])
    for name, items in by_data(evaluations).items():
        runs = {label: {seed_of(item): item.content["scores"] for item in group}
                for label, group in grouped(items).items() if len(group) > 1}
        seeds = sorted({seed for of in runs.values() for seed in of})
        measured = {metric for of in runs.values() for scores in of.values() for metric in scores}
        first = "valid" if "valid" in measured else "rouge_l"
        for metric in [metric for metric in (first, "reverse_kl") if metric in measured]:
            rows = [[label, *(f"{np.mean(of[seed][metric]):.2f}" if metric in of.get(seed, {}) else ""
                              for seed in seeds)] for label, of in runs.items()]
            tables.append(Table(f"Run by run on {name}: {metric}", "Each seed has models of its own: compare within a "
                                "column.", ["model", *(f"seed {seed}" for seed in seeds)], rows))
    return tables


def tested(trainings: Iterable[Found], evaluations: Sequence[Found], method: str = "minillm") -> dict[str, list[Found]]:
    """By name of runs: the evaluations of what they made, or of what another method made beside it, on the set that the
    runs are tested with. Of evaluations with several settings, those with the settings of the first."""
    results = {}
    for name, group in grouped(trainings).items():
        models = {str(Path(item.model).with_name(method)) for item in group}
        data = group[0].content.get("test_data") or group[0].content["data"]
        if found := [item for item in evaluations if item.model in models and item.data == data]:
            results[name] = [item for item in found if not differing([item, found[0]])]
    return results


def comparison(trainings: list[Found], evaluations: list[Found]) -> list[Table]:
    """Runs of MiniLLM whose flags differ, as an ablation; sixteen pairs of divergence and source as a square."""
    flags, results = differing(trainings), tested(trainings, evaluations)
    if len(results) < 2 or not flags:
        return []
    runs = {name: group for name, group in grouped(trainings).items() if name in results}
    metrics = [metric for metric in METRICS if any(figure_of(found, metric) for found in results.values())]
    rows = [[name, str(len(group)), *(plain(group[0].settings.get(flag)) for flag in flags),
             *(shown(figure_of(results[name], metric), len(group)) for metric in metrics)]
            for name, group in runs.items()]
    tables = [Table("What flags change", "Runs of MiniLLM that differ in these flags. Mean ± standard deviation over "
                    "runs.", ["model", "runs", *(f"--{flag}" for flag in flags), *metrics], rows)]
    alone = grouped([group[0] for group in runs.values() if not group[0].content["long_term"]],
                    lambda item: (item.content["divergence"], item.content["source"]))
    kinds, sources = ([*dict.fromkeys(pair[at] for pair in alone)] for at in (0, 1))
    if len(kinds) > 1 and len(sources) > 1:
        for metric in [metric for metric in ("valid", "rouge_l", "reverse_kl", "forward_kl") if metric in metrics]:
            cells = {pair: " / ".join(shown(figure_of(results[item.name], metric)) for item in items)
                     for pair, items in alone.items()}
            tables.append(Table(f"Divergence by source of answers: {metric}", "The single-step term alone.",
                                ["--divergence", *(f"--source={source}" for source in sources)],
                                [[kind, *(cells.get((kind, source), "") for source in sources)] for kind in kinds]))
    return tables


def exposure_table(items: list[Found]) -> list[Table]:
    lengths = [l for l in (1, 5, 10, 25, 50, 100, 200) if any(l <= len(item.content["ex_acc_err"]) for item in items)]
    rows = []
    for label, group in grouped(items).items():
        at = [[x for item in group for x in item.content["ex_acc_err"][l - 1 : l] if x is not None] for l in lengths]
        rows.append([label, str(len(group)), *(shown(spread(values, len(values)), len(group), 1) for values in at)])
    about = ("Figure 6: ExAccErr(l) in percent, the excess error accumulated over the first l tokens of a model's own "
             "answers.")
    return [Table("Exposure bias", about, ["model", "runs", *(f"l = {l}" for l in lengths)], rows)] if rows else []


def by_task(calibrations: list[Found]) -> Iterator[tuple[str, str, list[dict]]]:
    """Each name and task, with its results in those runs that have it."""
    for label, group in grouped(calibrations).items():
        for task in dict.fromkeys(task for item in group for task in item.content["tasks"]):
            yield label, task, [item.content["tasks"][task] for item in group if task in item.content["tasks"]]


def calibration_table(items: list[Found]) -> list[Table]:
    rows = [[label, str(len(results)), task,
             *(shown(spread([result[name] for result in results], len(results)), digits=digits)
               for name, digits in (("accuracy", 1), ("majority", 1), ("ece", 3)))]
            for label, task, results in by_task(items)]
    about = ("Table 2: zero-shot accuracy in percent, beside that of always saying the commoner label, and expected "
             "calibration error.")
    return [Table("Calibration", about, ["model", "runs", "task", "accuracy", "majority", "ECE"], rows)] if rows else []


def judge_table(items: list[Found]) -> list[Table]:
    rows = []
    for item in items:
        c, theirs = item.content, of_paper(item, score=True)
        if c["kind"] == "reference":
            verdict = f"{c['score']:.1f} ({c['interval'][0]:.1f} to {c['interval'][1]:.1f})"
        else:
            shares = ", ".join(f"{name} {c[name]['percent']:.1f}" for name in ("win", "tie", "loss"))
            verdict, theirs = f"{shares} against {c['given']['against']}", None
        rows.append([item.name, item.data or "", c["given"]["judge"], verdict,
                     f"{theirs:.1f}" if theirs else "", str(c["judged"]), str(c["unscored"])])
    return [Table("Judged", "100 x marks of the answers / marks of the references, and a 95% interval over prompts; or "
                  "percent of comparisons. The paper's judge was GPT-4, its question another.",
                  ["answers", "data", "judge", "score", "paper's", "judged", "unscored"], rows)] if rows else []


# ---- figures --------------------------------------------------------------------------------------------------------

@dataclass
class Figure:
    title: str
    about: str
    file: str
    panels: dict[str, dict]  # title of a panel -> label -> what is drawn
    items: Sequence[Found]
    png: bytes

    def html(self) -> str:
        made = [*dict.fromkeys(item.content["command"] for item in self.items)]
        if len(made) > 5:
            made[4:] = [f"... and {len(made) - 4} more"]
        code = "".join(f"<code>{html.escape(line)}</code><br>" for line in [*made, command()])
        return (f"<h2>{html.escape(self.title)}</h2>\n<p>{html.escape(self.about)}</p>\n"
                f'<img alt="{html.escape(self.title)}" src="data:image/png;base64,'
                f'{base64.b64encode(self.png).decode()}">\n<p class="from">{code}</p>\n')


def draw(title: str, about: str, file: str, panels: dict[str, dict], items: Sequence[Found],
         paint: Callable) -> list[Figure]:
    """paint(axis, label, what, n, color, line) draws the n-th label of a panel; no figure where there is nothing."""
    from matplotlib.figure import Figure as Canvas
    panels = {name: of for name, of in panels.items() if of}
    labels = [*dict.fromkeys(label for of in panels.values() for label in of)]
    if not labels:
        return []
    if len(labels) > len(STYLES):
        about += f" Of {len(labels)} models the first {len(STYLES)} are drawn."
    columns, rows = min(len(panels), 4), -(-len(panels) // 4)
    canvas = Canvas(figsize=(3.4 * columns if len(panels) > 1 else 7, 3.0 * rows + 0.8), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, of) in zip(axes, panels.items()):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if len(panels) > 1:
            axis.set_title(name, fontsize=9)
        for n, (label, (color, line)) in enumerate(zip(labels, STYLES)):
            if label in of:
                words = " " * label.startswith("_") + label.replace("$", r"\$")  # a label that begins with _ is hidden
                paint(axis, words, of[label], n, color, line)
    for axis in axes[len(panels):]:
        axis.set_visible(False)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    room = int(10 * canvas.get_figwidth() / (max(map(len, handles)) + 8))
    canvas.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False, handlelength=3.5,
                  ncols=max(1, min(4, room, len(handles))))
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=130)
    return [Figure(title, about, file, panels, items, png.getvalue())]


def over_runs(curves: Iterable[tuple[Iterable[float], Iterable[float | None]]]) -> np.ndarray:
    """Rows x, mean, least and largest of curves, at every x that any of them has, over those that have it."""
    at = {}
    for xs, ys in curves:
        for x, y in zip(xs, ys):
            if y is not None:
                at.setdefault(x, []).append(y)
    return np.array([(x, np.mean(ys), min(ys), max(ys)) for x, ys in sorted(at.items())], float).reshape(-1, 4).T


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """At each place the mean of the last `width` values, of fewer at the beginning."""
    return np.array([values[max(0, n + 1 - width) : n + 1].mean() for n in range(len(values))])


def curve(path: Path, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric in a log.jsonl: those of training, or else of validation."""
    lines = [line for line in read_lines(path) if isinstance(line, dict) and "step" in line]
    number = lambda value: isinstance(value, int | float)
    points = [(line["step"], line[name]) for line in lines if number(line.get(name))]
    validated = [(line["step"], line["valid"]) for line in lines if isinstance(line.get("valid"), dict)]
    points = points or [(step, valid[name]) for step, valid in validated if number(valid.get(name))]
    return tuple(map(list, zip(*points))) if points else ([], [])


def training_figure(trainings: list[Found], width: int) -> list[Figure]:
    items = [item for item in trainings if item.path.with_name("log.jsonl").is_file()]
    panels = {name: {} for name in CURVES}
    for label, group in grouped(items).items():
        for name, panel in panels.items():
            runs = [item for item in group if name != "loss_pt" or item.content.get("pt_coef")]  # else 0 is logged
            x, y, _, _ = over_runs(curve(item.path.with_name("log.jsonl"), name) for item in runs)
            if len(x):
                panel[label] = (x, smooth(y, width) if len(x) > 2 * width else y)

    def paint(axis, label, what, n, color, line) -> None:
        axis.plot(*what, line, color=color, label=label, marker="" if len(what[0]) > 2 * width else ".")
        axis.set_xlabel("update", fontsize=8)

    about = (f"The first panel is Figure 8. Means over runs of different seeds and, where there are more than "
             f"{2 * width} updates, over {width} of them; else each update, or each validation, is a point.")
    return draw("Training", about, "training", panels, items, paint)


def exposure_figure(items: list[Found]) -> list[Figure]:
    lines = {}
    for label, group in grouped(items).items():
        x, mean, low, high = over_runs((count(1), item.content["ex_acc_err"]) for item in group)
        if len(group) == 1:
            low, high = (np.array([group[0].content[key][int(l) - 1] for l in x], float) for key in ("low", "high"))
        if len(x):
            lines[label] = (x, mean, low, high)

    def paint(axis, label, what, n, color, line) -> None:
        x, mean, low, high = what
        axis.plot(x, mean, line, color=color, label=label)
        axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.set_xlabel("answer tokens, l")
        axis.set_ylabel("ExAccErr(l) in percent")

    return draw("Exposure bias", "Figure 6: excess error accumulated along a model's own answers. The band is the "
                "range of runs, or the 95% interval over prompts of a single one.", "exposure", {"": lines}, items,
                paint)


def length_figure(evaluations: list[Found]) -> list[Figure]:
    figures = []
    for data, items in by_data(evaluations).items():
        means = {}  # label -> Rouge-L of each length, nan where no reference has it
        for label, group in grouped(items).items():
            of = [item.content["rouge_l_by_length"] for item in group]
            values = [[one[bucket]["mean"] for one in of if bucket in one] for bucket in LENGTHS]
            means[label] = np.array([np.mean(value) if value else np.nan for value in values])
        there = ~np.isnan([*means.values()]).all(0)
        if there.sum() < 2:
            continue
        known = {label.lower(): label for label in means}
        base = {label: known.get(sft_of(label)) for label in means}  # the SFT of the same size
        less = any(base.values())
        bars = {label: (mean - means[base[label]] if less else mean)[there].tolist()
                for label, mean in means.items() if not less or base[label] not in (None, label)}
        buckets, bar = np.array([*LENGTHS])[there], 0.8 / max(1, min(len(bars), len(STYLES)))

        def paint(axis, label, what, n, color, line, bar=bar, buckets=buckets, less=less) -> None:
            axis.bar(np.arange(len(buckets)) + bar * (n + 0.5) - 0.4, what, 0.9375 * bar, color=color, label=label,
                     edgecolor="black", linewidth=0.4, hatch=HATCHES[n % len(HATCHES)])
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_xticks(range(len(buckets)), buckets)
            axis.set_xlabel("tokens of the reference")
            axis.set_ylabel("Rouge-L" + " less that of SFT" * less)

        figures += draw(f"Rouge-L by length, {data}", "Figure 7: groups by the length of the reference.",
                        "length-" + re.sub(r"\W+", "-", data), {"": bars}, items, paint)
    return figures


def sweep_figure(trainings: list[Found], evaluations: list[Found]) -> list[Figure]:
    """Where runs differ in alpha alone, or in the teacher alone: Figures 16 and 5."""
    flags, methods = differing(trainings), ["minillm"]
    size = {item.model: item.content["parameters"] for item in evaluations}
    if flags == ["mix_alpha"]:
        place = lambda item: item.content["mix_alpha"]
        title, about, file, xlabel = "Alpha", "Figure 16: the teacher's share in sampling.", "alpha", "--mix_alpha"
    elif flags == ["teacher"]:
        place, methods = lambda item: size.get(os.path.normpath(item.content["teacher"]), 0), ["minillm", "seqkd"]
        title, about, file, xlabel = "Size of the teacher", "Figure 5.", "teachers", "parameters of the teacher"
    else:
        return []
    metric = "valid" if any("valid" in item.content["scores"] for item in evaluations) else "rouge_l"
    lines = {}
    for method in methods:
        for name, found in tested(trainings, evaluations, method).items():
            if figure := figure_of(found, metric):
                lines.setdefault(method, {})[place(grouped(trainings)[name][0])] = figure
    xs = sorted({x for line in lines.values() for x in line})
    if len(xs) < 2:
        return []

    def paint(axis, label, what, n, color, line) -> None:
        at = [x for x in xs if x in what]
        axis.errorbar([xs.index(x) for x in at], [what[x][0] for x in at], [what[x][1] or 0 for x in at], color=color,
                      linestyle=line, marker="o", capsize=3, label=label)
        axis.set_xticks(range(len(xs)), [f"{x:,}" for x in xs])
        axis.set_xlabel(xlabel)
        axis.set_ylabel(metric + " %")

    return draw(title, about + " Mean and standard deviation over runs.", file, {metric: lines}, trainings, paint)


def reliability_figure(items: list[Found]) -> list[Figure]:
    panels = {}
    for label, task, results in by_task(items):
        places = grouped([bin for result in results for bin in result["bins"] if bin["count"]], lambda bin: bin["low"])
        mean = lambda of, name: np.average([bin[name] for bin in of], weights=[bin["count"] for bin in of])
        panels.setdefault(task, {})[label] = [[mean(places[low], name) for low in sorted(places)]
                                              for name in ("confidence", "accuracy")]

    def paint(axis, label, what, n, color, line) -> None:
        axis.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
        axis.plot(*what, line, color=color, label=label, marker="o", markersize=4)
        axis.set_xlabel("confidence")
        axis.set_ylabel("accuracy")

    return draw("Reliability", "Accuracy among answers of like confidence, over all runs; on the diagonal a model is "
                "calibrated.", "reliability", panels, items, paint)


# ---- answers side by side -------------------------------------------------------------------------------------------

def answers_page(evaluations: list[Found], prompts: int) -> str:
    """The first prompts of each set, with the reference and the first answer of each model."""
    page = []
    for data, items in by_data(evaluations).items():
        said = {}  # label -> {(instruction, input): row of the first answer}
        for label, group in grouped(items).items():
            path = group[0].path.parent / "samples.jsonl"
            said[label] = {}
            for row in read_lines(path) if path.is_file() else []:
                if isinstance(row, dict) and KEYS <= row.keys():
                    said[label].setdefault((row["instruction"], row["input"]), row)
        keys = [*dict.fromkeys(key for rows in said.values() for key in rows)][:prompts]
        page.append(f"<h2>Answers on {html.escape(data)}</h2>\n" * bool(keys))
        for key in keys:
            rows = {label: of[key] for label, of in said.items() if key in of}
            cells = [("reference", "", text) for text in next(iter(rows.values()))["references"][:1]]
            for label, row in rows.items():
                scores = [f"{name} {row['scores'][name]:.0f}" for name in ("valid", "rouge_l", "tokens")
                          if name in row["scores"]]
                cells.append((label, ", ".join(scores), row["answer"]))
            body = "".join(f"<tr><th>{html.escape(label)}<br><small>{note}</small></th><td>{html.escape(text)}</td>"
                           "</tr>" for label, note, text in cells)
            page.append(f'<h3>{html.escape(" | ".join(filter(None, key)))}</h3><table class="answers">{body}</table>\n')
    return "".join(page)


# ---- command --------------------------------------------------------------------------------------------------------

STYLE = """body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #111; }
table { border-collapse: collapse; display: block; overflow-x: auto; } img { max-width: 100%; }
th, td { border-bottom: 1px solid #ccc; padding: .25em .7em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } code, .from { font-size: 12px; overflow-wrap: anywhere; }
.answers { display: table; width: 100%; } .answers th { width: 14em; vertical-align: top; font-weight: normal; }
.answers td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; } h3 { margin-bottom: .2em; }
"""


@dataclass(frozen=True)
class Config:
    folders: tuple[str, ...] = flag((), "what distill.py, eval.py, exposure.py, calibration.py, judge.py have written")
    out: str = flag("out/report", "folder for report.html, report.md and the pictures")
    title: str = flag("MiniLLM", "heading")
    prompts: int = flag(20, "prompts of each set whose answers are shown")
    smooth: int = flag(32, "updates over which a curve is averaged; the paper's Figure 8 has 32")

    def __post_init__(self):
        check(self, prompts=(0, 10**6), smooth=(1, 10**6))
        check_place(self, "out")
        if not self.folders:
            raise UserError("give the folders to report on: python report.py out/tiny")


def main(cfg: Config) -> None:
    found = find(cfg.folders)
    kinds = ("evaluation", "training", "exposure", "calibration", "judge")
    evaluations, trainings, exposures, calibrations, judged = ([f for f in found if f.kind == kind] for kind in kinds)
    tables = [*summary_table(evaluations), *result_tables(evaluations), *run_tables(evaluations),
              *comparison(trainings, evaluations),
              *exposure_table(exposures), *calibration_table(calibrations), *judge_table(judged)]
    figures = [*sweep_figure(trainings, evaluations), *training_figure(trainings, cfg.smooth),
               *exposure_figure(exposures), *length_figure(evaluations), *reliability_figure(calibrations)]
    body = "".join(part.html() for part in (*tables, *figures)) + answers_page(evaluations, cfg.prompts)
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(cfg.title)}</title>'
            f"<style>{STYLE}</style>\n<h1>{html.escape(cfg.title)}</h1>\n<p><code>{html.escape(command())}</code></p>\n"
            f"{body}</html>\n")
    markdown = f"# {cfg.title}\n\n`{command()}`\n\n" + "\n".join(table.markdown() for table in tables)
    files = {"report.html": page.encode(), "report.md": markdown.encode()}
    out = Path(cfg.out)
    for file, content in (files | {f"{figure.file}.png": figure.png for figure in figures}).items():
        with written_aside(out / file) as aside:
            aside.write_bytes(content)
    print(f"{out / 'report.html'}: {len(tables)} tables, {len(figures)} figures")


if __name__ == "__main__":
    run(main, Config)
