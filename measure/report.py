"""A report of what runs have written: tables, curves, figures, and answers side by side.

Paper:    arXiv 2306.08543v4: Table 1, Figures 5 to 8 and 16 and Tables 2 to 4, each where the
          folders hold its data.
Run:      python -m measure.report out/tiny
          python -m measure.report out/gpt2-xl-to-gpt2 out/eval out/exposure --out=out/report
Left out: significance tests (intervals are printed; five seeds are few).
"""

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path

import numpy as np

from config import UserError, check, command, flag, run
from data import HUB_SETS
from distill import FREE, OBJECTIVES
from measure.judge import samples
from safe.files import check_place, written_aside
from safe.runs import checksum

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
SIZES = {124_439_808: "120M", 354_823_168: "340M", 774_030_080: "760M", 1_557_611_200: "1.5B"}
METRICS = ("valid", "covered", "rouge_l", "reverse_kl", "forward_kl", "loss", "text_loss",
           "dist_4", "dist_4_prompt", "tokens", "ended", "exact_match")
METHODS = ("teacher", "init", "sft", "kd", "seqkd", "minillm")  # in the order of the paper's tables
CURVES = ("reverse_kl", "reward", "valid", "rouge_l", "response_tokens", "clip_fraction",
          "weight_mean", "weight_max", "loss_pt")
LENGTHS = {"[0,5]": 5, "[6,10]": 10, "[11,inf)": math.inf}  # Figure 7: most tokens of a reference
COLORS = ("#111111", "#b03a2e", "#2e6da4", "#6fa33a")
DASHES = ("-", "--", "-.", ":")
# Four lines in a row differ in the dashes, for those who see or print in grey.
STYLES = [(color, DASHES[(n + shift) % 4]) for shift in range(4) for n, color in enumerate(COLORS)]
MARKERS = "osD^"  # of the first four colours, the next four, and so on
HATCHES = ("", "//", "..", "xx", "\\\\", "oo")


# ---- what there is ----------------------------------------------------------------------------

class Written(dict):
    """An object in a .json file. To read what it lacks is a UserError that names the file."""

    def __init__(self, path: Path, content: dict):
        super().__init__(content)
        self.path = path

    def __missing__(self, key):
        raise UserError(f"{self.path} is not as the commands write it, for it lacks {key!r}: "
                        "remove it, or make it anew")


@dataclass
class Found:
    """A file that a run has written, and the model and the set of prompts that it is about."""
    kind: str  # "evaluation", "training", "exposure", "calibration" or "judge"
    path: Path
    model: str
    data: str | None
    content: dict
    settings: dict  # flags that may tell this file from others about the same model and set
    name: str = ""  # what the report calls it


KINDS = {"results.json": "evaluation", "run.json": "training", "exposure.json": "exposure",
         "calibration.json": "calibration"}
# flags that do not change what is measured, or only add to it; some are of earlier versions
UNCHANGED = {"out", "device", "dtype", "data", "model", "files", "sample_batch", "decoder",
             "batch_size", "capture"}
LEFT_OUT = {"evaluation": UNCHANGED | {"teacher", "corpus"},
            "training": {*FREE, "seed", "command", "checksums", "capture", "explain", "plan_pairs",
                         "ignore_memory", "eval_seeds", "test_data", "log_every", "vocab_chunk"}}


def whole_lines(path: Path) -> list[dict]:
    """The rows of a .jsonl file, except a last line that is not whole, as in one being written."""
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        return [json.loads(line, object_hook=partial(Written, path)) for line in lines]
    except ValueError:
        raise UserError(f"{path} has a line that is not JSON: remove it, or the file") from None


def answers_of(item: Found) -> list[dict]:
    """The answers that lie beside an evaluation."""
    path = item.path.with_name("samples.jsonl")
    return whole_lines(path) if path.is_file() else []


def read(path: Path) -> Found | None:
    """What a .json file holds that a report can show; None if there is nothing."""
    kind = "judge" if path.name.startswith("judge") else KINDS.get(path.name)
    if kind is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=partial(Written, path))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON: remove it, and run again what wrote it") from None
    try:
        return recognized(kind, path, content) if isinstance(content, dict) else None
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{path} is not as the commands write it: remove it, or make it "
                        "anew") from None


def recognized(kind: str, path: Path, content: dict) -> Found | None:
    """The content of a file that one of our commands has written; None for any other file."""
    given = content if kind == "training" else content.get("given", {})
    model = given.get("answers" if kind == "judge" else "model")
    if kind == "training":  # only runs of distill.py are shown
        model = f"{given['out']}/minillm" if "mix_alpha" in given else None
    if model is None:
        return None
    if kind == "judge" and (evaluated := evaluation_behind(path, given)):
        model = evaluated.model
        content |= {name: evaluated.content[name] for name in ("data", "parameters")}
        flags = {name: value for name, value in given.items() if value is not None}
        given = evaluated.settings | flags
    settings = {}
    for name, value in given.items():
        if isinstance(value, str):  # runs that differ in their seed alone belong together
            value = re.sub(r"(^|/)seed-\d+(?=/)", "", value)
        if name not in LEFT_OUT.get(kind, UNCHANGED) and not name.startswith("the content of "):
            settings[name] = value
    if kind == "evaluation":  # not the teacher's weights: a teacher only adds measurements
        settings["weights"] = given.get("weights", [None])[0]
    if kind == "training":
        content["alone"] = single_step_alone(content)
    data = content["data"] if kind == "evaluation" else content.get("data")
    return Found(kind, path, os.path.normpath(model), data, content, settings)


def evaluation_behind(path: Path, given: dict) -> Found | None:
    """The evaluation whose answers a judge has marked, or None. Raises UserError if other answers
    have taken their place."""
    files = [samples(given["answers"]), path.with_name("samples.jsonl")]
    answers = next(filter(Path.is_file, files), None)
    if answers and given.get("files") not in (None, checksum(answers)):
        raise UserError(f"{path} has marks of other answers than {answers} holds now: run the "
                        "judge again, or remove it")
    evaluations = [file.with_name("results.json") for file in files]
    return next(filter(None, map(read, filter(Path.is_file, evaluations))), None)


def single_step_alone(run: dict) -> tuple[str, str] | None:
    """A run's divergence and whose answers it learns from, if the single step is its only term."""
    if "objective" not in run:  # flags of an earlier version
        return None if run["long_term"] else (run["divergence"], run["source"])
    divergence, return_from = OBJECTIVES[run["objective"]]
    source = run["source"]
    if source == "sampled":
        source = {0: "student", 1: "teacher"}.get(run["mix_alpha"], "mixed")
    return (divergence, source) if return_from == "none" else None


def find(folders: Iterable[str]) -> list[Found]:
    """Everything in these folders that a report can show. Raises UserError if one has nothing."""
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give what a command has written")
        items = list(filter(None, map(read, sorted(folder.rglob("*.json")))))
        if not items:
            raise UserError(f"{folder}: no results in it; distill.py and eval.py --out write some")
        for item in items:
            # A teacher is evaluated beside each student, and a model may be measured twice: the
            # first file counts, and gains what it lacks.
            flags = sorted((item.settings | {"weights": None}).items())
            first = found.setdefault((item.kind, item.model, item.data, repr(flags)), item)
            if first.settings.get("weights") != item.settings.get("weights"):
                raise UserError(f"{first.path} and {item.path} are of {item.model} with different "
                                "weights: remove the older")
            for part in {"scores", "tasks"} & item.content.keys():
                for name, value in item.content[part].items():
                    first.content[part].setdefault(name, value)
    return named(list(found.values()))


def named(items: list[Found]) -> list[Found]:
    """Names each item by its model, without the folders that all have in common, and by the
    settings in which those of one name differ. Sorts them as in the paper's tables."""
    parts = {}
    for item in items:
        path = [part for part in Path(item.model).parts if not re.fullmatch(r"seed-\d+", part)]
        parts[item.model] = path or [item.model]
    columns = zip(*(path[:-1] for path in parts.values()))
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    for item in items:
        item.name = "/".join(parts[item.model][shared:])
    order = [*METHODS, None]
    folders = list(dict.fromkeys(Path(item.name).parent for item in items))
    items = sorted(items, key=lambda item: (folders.index(Path(item.name).parent),
                                            order.index(method_of(item.name))))
    for group in grouped(items, lambda item: (item.kind, item.name, item.data)).values():
        names = [] if group[0].kind == "judge" else differing(group)
        for item in group if names else []:
            flags = [f"{name}={plain(item.settings.get(name))}" for name in names]
            item.name += f" ({', '.join(flags)})"
    return items


def differing(items: Sequence[Found]) -> list[str]:
    """The settings in which these items differ, except the checksum of the weights."""
    names = dict.fromkeys(name for item in items for name in item.settings if name != "weights")
    return [name for name in names if len({repr(item.settings.get(name)) for item in items}) > 1]


def plain(value) -> str:
    """A setting as a table shows it: the end of it, if it is a path."""
    return "/".join(str(value).split("/")[-2:])


def grouped(items: Iterable, key: Callable = lambda item: item.name) -> dict[object, list]:
    """Items in groups, by name if no other key is given. Runs of one name differ in their seeds."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_data(items: Iterable[Found]) -> dict[str, list[Found]]:
    """Items by their set of prompts: first the sets of Table 1 in its order, then others."""
    sets = grouped(items, lambda item: item.data)
    return {name: sets[name] for name in sorted(sets, key=lambda name: [*SETS, name].index(name))}


def values_of(evaluations: Sequence[Found], metric: str) -> list[float]:
    """A metric of each run that has it or, if there is only one run, of each seed of sampling."""
    measured = [values for item in evaluations if (values := item.content["scores"].get(metric))]
    if len(evaluations) == 1 and measured:
        return measured[0]
    return [float(np.mean(values)) for values in measured]


def by_prompt(item: Found, metric: str) -> dict[tuple, float]:
    """A metric's mean over the answers to each prompt. It is empty without the answers."""
    rows = [row for row in answers_of(item) if metric in row["scores"]]
    prompts = grouped(rows, lambda row: (row["prompt"], row["instruction"], row["input"]))
    return {prompt: float(np.mean([row["scores"][metric] for row in some]))
            for prompt, some in prompts.items()}


def interval(means: Iterable[float]) -> str:
    """The 95% interval of the mean by a bootstrap over prompts: 2,000 draws, always the same."""
    means = np.array(list(means))
    if not len(means):
        return ""
    draws = np.random.default_rng(0).integers(len(means), size=(2000, len(means)))
    low, high = np.quantile(means[draws].mean(1), [0.025, 0.975])
    return f"{low:.2f} to {high:.2f}"


def shown(values: Sequence[float], runs: int = 0, digits: int = 2) -> str:
    """Mean and spread as a table shows them, and the number of values if less than that of runs."""
    if not values:
        return ""
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return f"{text} (of {len(values)})" if len(values) < runs else text


def method_of(name: str) -> str | None:
    """The method, as in METHODS, in the name of a folder or a repository."""
    pattern = r"(teacher|init|minillm|seqkd|kd|sft)(-gpt2.*)?( \(.*)?$"
    match = re.match(pattern, Path(name).name.lower())
    return match[1] if match else None


def sft_of(name: str) -> str | None:
    """The name of the SFT model of the same size, in lower case: sft-gpt2-340m for KD-gpt2-340M."""
    method = method_of(name)
    if method in (None, "teacher"):
        return None
    return re.sub(rf"(^|/){method}(?=[^/]*$)", r"\1sft", name.lower())


def of_paper(item: Found, score: bool = False) -> float | None:
    """Table 1's Rouge-L for this model and set, or GPT-4's score. None for a part of a set."""
    row = TABLE_1.get((SIZES.get(item.content.get("parameters")), method_of(item.name)))
    whole = item.settings.get("split", "test") == "test" and item.settings.get("limit") is None
    if row is None or not whole or item.data not in (SETS[:3] if score else SETS):
        return None
    return row[SETS.index(item.data) + (len(SETS) if score else 0)]


# ---- tables -----------------------------------------------------------------------------------

@dataclass
class Table:
    title: str
    about: str
    header: list[str]
    rows: list[list[str]]

    def html(self) -> str:
        lines = []
        for tag, cells in [("th", self.header), *(("td", row) for row in self.rows)]:
            line = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            lines.append(f"<tr>{line}</tr>\n")
        return (f"<h2>{html.escape(self.title)}</h2>\n<p>{html.escape(self.about)}</p>\n"
                f"<table>{''.join(lines)}</table>\n")

    def markdown(self) -> str:
        lines = []
        for row in [self.header, ["---"] * len(self.header), *self.rows]:
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n")
        return f"## {self.title}\n\n{self.about}\n\n{''.join(lines)}"


def summary_table(evaluations: list[Found]) -> Table:
    """Rouge-L of each model on each set, arranged as in Table 1."""
    sets = {name: grouped(items) for name, items in by_data(evaluations).items()}
    rows = []
    for label in grouped(evaluations):
        row = [label]
        for groups in sets.values():
            group = groups.get(label, [])
            theirs = of_paper(group[0]) if group else None
            ours = shown(values_of(group, "rouge_l"))
            row.append(f"{ours} ({theirs:.1f})" if theirs else ours)
        rows.append(row)
    about = "In brackets the paper's Table 1, where it has this model."
    return Table("Rouge-L", about, ["model", *sets], rows)


def result_table(data: str, items: list[Found]) -> Table:
    """Every metric of each model on a set, and the paper's Rouge-L where it has that model."""
    metrics = [name for name in METRICS if any(name in item.content["scores"] for item in items)]
    beside = ["paper's rouge_l", "difference"] if any(map(of_paper, items)) else []
    groups, main = grouped(items), quality(items)
    alone = [f"{main}, 95%"] if any(len(group) == 1 for group in groups.values()) else []
    rows = []
    for label, group in groups.items():
        row = [label, str(len(group))]
        row += [shown(values_of(group, metric), len(group)) for metric in metrics]
        if alone:
            row.append(interval(by_prompt(group[0], main).values()) if len(group) == 1 else "")
        if theirs := of_paper(group[0]):
            row += [f"{theirs:.1f}", f"{np.mean(values_of(group, 'rouge_l')) - theirs:+.1f}"]
        else:
            row += [""] * len(beside)
        row.append(f"{np.mean([item.content['seconds'] for item in group]) / 60:.1f}")
        row.append(f"{max(item.content['peak_gib'] for item in group):.1f}")
        rows.append(row)
    prompts = [item.content["prompts"] for item in items]
    few, many = f"{min(prompts):,}", f"{max(prompts):,}"
    asked = few if few == many else f"{few} to {many}"
    about = (f"{asked} prompts. Mean ± standard deviation over runs; for a single run, over its "
             "seeds of sampling, and the 95% interval over prompts. Minutes of an evaluation, and "
             "the most memory that its process had held by then.")
    header = ["model", "runs", *metrics, *alone, *beside, "minutes", "GiB"]
    return Table(f"Results on {data}", about, header, rows)


def quality(items: Iterable[Found]) -> str:
    """The metric of answers: valid in the built-in world, else Rouge-L."""
    return "valid" if any("valid" in item.content["scores"] for item in items) else "rouge_l"


def run_table(data: str, items: list[Found], metric: str) -> Table:
    """What the spread of a metric consists of: a column for each seed."""
    runs = {}  # label -> seed -> values
    for item in items:
        seeds = re.findall(r"(?:^|/)seed-(\d+)(?=/)", item.model)
        values = item.content["scores"].get(metric, [])
        runs.setdefault(item.name, {})[int(seeds[-1]) if seeds else 0] = values
    runs = {label: of for label, of in runs.items() if len(of) > 1 and any(of.values())}
    seeds = sorted({seed for of in runs.values() for seed in of})
    rows = []
    for label, of in runs.items():
        rows.append([label, *(f"{np.mean(of[n]):.2f}" if of.get(n) else "" for n in seeds)])
    about = "Each seed has models of its own: compare within a column."
    header = ["model", *(f"seed {seed}" for seed in seeds)]
    return Table(f"Run by run on {data}: {metric}", about, header, rows)


def difference_table(data: str, items: list[Found], metric: str, against: str) -> Table:
    """How far one model is ahead of each other, prompt by prompt. Prompts differ more than models
    do, and in the differences they cancel out."""
    single = {label: group[0] for label, group in grouped(items).items() if len(group) == 1}
    rows = []
    for label, item in single.items():
        if Path(label).name != against:
            continue
        own = by_prompt(item, metric)
        for other, rival in single.items():
            theirs = by_prompt(rival, metric)
            both = np.array([own[prompt] - theirs[prompt] for prompt in own if prompt in theirs])
            if other != label and len(both):
                ahead = [f"{100 * np.mean(x):.0f}%" for x in (both > 0, both < 0)]
                rows.append([f"{label} - {other}", f"{both.mean():+.2f}", interval(both), *ahead])
    about = (f"The mean difference of {against} and each other model over the prompts that both "
             "answered, its 95% interval by a bootstrap over prompts, and the share of prompts on "
             f"which {against} has more and less.")
    header = ["difference", metric, "95%", "more", "less"]
    return Table(f"Prompt by prompt on {data}: {metric}", about, header, rows)


def tested(trainings: Iterable[Found], evaluations: Sequence[Found],
           method: str = "minillm") -> dict[str, list[Found]]:
    """By name of runs, the evaluations of what they made, or of what another method made beside it,
    on the set that they are tested with and all with the settings of the first."""
    results = {}
    for name, group in grouped(trainings).items():
        models = {str(Path(item.model).with_name(method)) for item in group}
        data = group[0].content.get("test_data") or group[0].content["data"]
        found = [item for item in evaluations if item.model in models and item.data == data]
        if found:
            results[name] = [item for item in found if not differing([item, found[0]])]
    return results


def ablation_table(trainings: list[Found], results: dict[str, list[Found]]) -> Table:
    """Runs of MiniLLM whose flags differ, with what `tested` has found."""
    flags = differing(trainings)
    metrics = [name for name in METRICS if any(values_of(x, name) for x in results.values())]
    rows = []
    for name, found in results.items():
        group = grouped(trainings)[name]
        row = [name, str(len(group))]
        row += [plain(group[0].settings.get(flag)) for flag in flags]
        rows.append(row + [shown(values_of(found, metric), len(group)) for metric in metrics])
    about = "Runs of MiniLLM that differ in these flags. Mean ± standard deviation over runs."
    header = ["model", "runs", *(f"--{flag}" for flag in flags), *metrics]
    return Table("What flags change", about, header, rows if flags and len(rows) > 1 else [])


def square_table(trainings: list[Found], results: dict[str, list[Found]], metric: str) -> Table:
    """A metric by divergence and source of answers, if there are several of both."""
    cells = {}
    for name, (item, *_) in grouped(trainings).items():
        if item.content["alone"] and (values := values_of(results.get(name, []), metric)):
            cells.setdefault(item.content["alone"], []).append(shown(values))
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    sources = list(dict.fromkeys(source for _, source in cells))
    rows = []
    for kind in kinds:
        rows.append([kind, *(" / ".join(cells.get((kind, source), [])) for source in sources)])
    return Table(f"Divergence by source of answers: {metric}", "The single-step term alone.",
                 ["divergence", *sources], rows if min(len(kinds), len(sources)) > 1 else [])


def exposure_table(items: list[Found]) -> Table:
    longest = max((len(item.content["ex_acc_err"]) for item in items), default=0)
    lengths = [l for l in (1, 5, 10, 25, 50, 100, 200) if l <= longest]
    rows = []
    for label, group in grouped(items).items():
        row = [label, str(len(group))]
        for l in lengths:
            values = [x for item in group for x in item.content["ex_acc_err"][l - 1 : l]]
            row.append(shown([x for x in values if x is not None], len(group), 1))
        rows.append(row)
    about = ("Figure 6: ExAccErr(l) in percent, the excess error accumulated over the first l "
             "tokens of a model's own answers.")
    return Table("Exposure bias", about, ["model", "runs", *(f"l = {l}" for l in lengths)], rows)


def by_task(calibrations: list[Found]) -> Iterator[tuple[str, str, list[dict]]]:
    """Each name and task, with the results of the runs that have it."""
    for label, group in grouped(calibrations).items():
        for task in dict.fromkeys(task for item in group for task in item.content["tasks"]):
            runs = [item.content["tasks"].get(task) for item in group]
            yield label, task, [results for results in runs if results]


def calibration_table(items: list[Found]) -> Table:
    rows = []
    for label, task, results in by_task(items):
        row = [label, str(len(results)), task]
        for name, digits in (("accuracy", 1), ("majority", 1), ("ece", 3)):
            row.append(shown([result[name] for result in results], digits=digits))
        rows.append(row)
    about = ("Table 2: zero-shot accuracy in percent, the accuracy of always giving the commoner "
             "label, and expected calibration error.")
    header = ["model", "runs", "task", "accuracy", "majority", "ECE"]
    return Table("Calibration", about, header, rows)


def judge_table(items: list[Found]) -> Table:
    rows = []
    for item in items:
        c, theirs = item.content, of_paper(item, score=True)
        if c["kind"] == "reference":
            verdict = f"{c['score']:.1f} ({c['interval'][0]:.1f} to {c['interval'][1]:.1f})"
        else:
            shares = [f"{name} {c[name]['percent']:.1f}" for name in ("win", "tie", "loss")]
            verdict, theirs = f"{', '.join(shares)} against {c['given']['against']}", None
        rows.append([item.name, item.data or "", c["given"]["judge"], verdict,
                     f"{theirs:.1f}" if theirs else "", str(c["judged"]), str(c["unscored"])])
    about = ("100 times the marks of the answers over those of the references, with a 95% interval "
             "over prompts; or percent of comparisons. The paper's judge was GPT-4, with another "
             "question.")
    header = ["answers", "data", "judge", "score", "paper's", "judged", "unscored"]
    return Table("Judged", about, header, rows)


# ---- figures ----------------------------------------------------------------------------------

@dataclass
class Figure:
    """A picture: in each panel, a line (x, y) for each label, or (x, y, low, high) with a band."""
    title: str
    about: str
    file: str
    items: Sequence[Found]  # what it is made of
    panels: dict[str, dict[str, tuple]]
    xlabel: str
    ylabel: str = ""
    line: tuple = ()  # the x's and the y's of a thin grey line
    ticks: Sequence[str] = ()  # the names of x = 0, 1, 2 ...
    bars: bool = False
    dots: bool = False  # of percentages

    def __post_init__(self):
        self.panels = {name: lines for name, lines in self.panels.items() if lines}
        self.labels = list(dict.fromkeys(label for of in self.panels.values() for label in of))
        if len(self.labels) > len(STYLES):
            self.about += f" Of {len(self.labels)} models the first {len(STYLES)} are drawn."
            self.labels = self.labels[: len(STYLES)]

    @property
    def beside(self) -> bool:
        """Whether labels stand beside their dots; there is room for a few."""
        return self.dots and len(self.labels) <= 7

    def html(self) -> str:
        made = list(dict.fromkeys(item.content["command"] for item in self.items))
        if len(made) > 5:
            made[4:] = [f"... and {len(made) - 4} more"]
        lines = "".join(f"<code>{html.escape(line)}</code><br>" for line in [*made, command()])
        title, png = html.escape(self.title), base64.b64encode(self.png).decode()
        return (f"<h2>{title}</h2>\n<p>{html.escape(self.about)}</p>\n"
                f'<img alt="{title}" src="data:image/png;base64,{png}">\n'
                f'<p class="from">{lines}</p>\n')

    @cached_property
    def png(self) -> bytes:
        from matplotlib.figure import Figure as Canvas
        columns, rows = min(len(self.panels), 4), math.ceil(len(self.panels) / 4)
        width = 3.4 * columns if len(self.panels) > 1 else 7
        canvas = Canvas(figsize=(width, 3.0 * rows + 0.8), layout="constrained")
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        handles = {}
        for axis, (name, lines) in zip(axes, self.panels.items()):
            axis.set_title(name, fontsize=9)
            self.paint(axis, lines)
            for handle, label in zip(*axis.get_legend_handles_labels()):
                handles[label] = handle
        for axis in axes[len(self.panels) :]:
            axis.set_visible(False)
        if not self.beside:
            room = int(10 * width / (max(map(len, handles)) + 8))
            canvas.legend(handles.values(), handles.keys(), loc="outside lower center",
                          frameon=False, handlelength=3.5, ncols=max(1, min(4, room, len(handles))))
        png = io.BytesIO()
        canvas.savefig(png, format="png", dpi=130)
        return png.getvalue()

    def paint(self, axis, lines: dict[str, tuple]) -> None:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_xlabel(self.xlabel)
        axis.set_ylabel(self.ylabel)
        if self.ticks:
            axis.set_xticks(range(len(self.ticks)), self.ticks)
        if self.dots:
            axis.set_ylim(0, 100)
            axis.margins(x=0.1)  # room for labels
        if self.line:
            axis.plot(*self.line, color="#888888", linewidth=0.8)
        width = 0.8 / len(self.labels)  # of a bar
        for n, (label, (color, dashes)) in enumerate(zip(self.labels, STYLES)):
            if label not in lines:
                continue
            x, y, *band = lines[label]
            words = label.replace("$", r"\$")
            if words.startswith("_"):  # matplotlib hides such labels
                words = " " + words
            if self.bars:
                axis.bar(np.add(x, width * (n + 0.5) - 0.4), y, 0.94 * width, color=color,
                         label=words, edgecolor="black", linewidth=0.4, hatch=HATCHES[n % 6])
                continue
            if self.dots:
                axis.plot(x, y, MARKERS[n // 4], color=color, label=words,
                          markersize=9 if len(x) == 1 else 5)
                if not self.beside:
                    continue
                above = 9 if n % 2 else -18  # SFT's label is below its dot, KD's above
                axis.annotate(words, (np.mean(x), np.mean(y)), (0, above), color=color,
                              textcoords="offset points", ha="center")
                continue
            axis.plot(x, y, dashes, color=color, label=words, marker="." if len(x) < 65 else "")
            if band:
                axis.fill_between(x, *band, color=color, alpha=0.12, linewidth=0)


def trade_figure(items: Sequence[Found], points: dict[str, tuple]) -> Figure:
    """Of the built-in world: right answers against the facts that are still told, at a point, or
    one for each run, (x, y) of a method."""
    about = ("Section 2.1: forward KL covers what the teacher may say, and is wrong where "
             "the student cannot hold it; reverse KL drops some of it, and is right more often.")
    return Figure("Right answers against coverage", about, "first-run", items, {"": points},
                  "facts that its answers still tell, %", "right answers, %", dots=True)


def over_runs(curves: Iterable[tuple[Iterable[float], Iterable[float | None]]]) -> np.ndarray:
    """Four rows, x and the mean, least and largest of the curves, at every x that any curve has,
    over the curves that have it."""
    at = {}
    for xs, ys in curves:
        for x, y in zip(xs, ys):
            if y is not None:
                at.setdefault(x, []).append(y)
    points = [(x, np.mean(ys), min(ys), max(ys)) for x, ys in sorted(at.items())]
    return np.array(points, float).reshape(-1, 4).T


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """At each place the mean of the last `width` values, or of fewer at the beginning."""
    return np.array([values[max(0, n + 1 - width) : n + 1].mean() for n in range(len(values))])


def curve(path: Path, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric in a log.jsonl: those of training, or else of validation."""
    lines = whole_lines(path)
    validations = [{"step": line["step"], **line["valid"]} for line in lines if "valid" in line]
    for some in (lines, validations):
        values = {x["step"]: x[name] for x in some if isinstance(x.get(name), int | float)}
        if values:
            break
    return list(values), list(values.values())


def training_figure(trainings: list[Found], width: int) -> Figure:
    items = [item for item in trainings if item.path.with_name("log.jsonl").is_file()]
    panels = {name: {} for name in CURVES}
    for label, group in grouped(items).items():
        for name, panel in panels.items():
            # without L_PT its loss is logged as 0
            runs = [item for item in group if name != "loss_pt" or item.content.get("pt_coef")]
            x, y, _, _ = over_runs(curve(item.path.with_name("log.jsonl"), name) for item in runs)
            if len(x):
                panel[label] = (x, smooth(y, width) if len(x) > 2 * width else y)
    about = ("The first panel is Figure 8. Means over runs of different seeds and, where there are "
             f"more than {2 * width} updates, over {width} of them; elsewhere each update, or each "
             "validation, is a point.")
    return Figure("Training", about, "training", items, panels, "update")


def exposure_figure(items: list[Found]) -> Figure:
    lines, longest = {}, 1
    for label, group in grouped(items).items():
        curves = [item.content["ex_acc_err"] for item in group]
        x, mean, low, high = over_runs((range(1, len(ys) + 1), ys) for ys in curves)
        if len(group) == 1:
            at = x.astype(int) - 1
            low, high = (np.array(group[0].content[key], float)[at] for key in ("low", "high"))
        if len(x):
            lines[label] = (x, mean, low, high)
            longest = max(longest, x[-1])
    about = ("Figure 6: excess error accumulated along a model's own answers. The band is the "
             "range of runs; for a single run, the 95% interval over prompts.")
    return Figure("Exposure bias", about, "exposure", items, {"": lines}, "answer tokens, l",
                  "ExAccErr(l) in percent", line=((1, longest), (0, 0)))


def by_length(item: Found) -> dict[str, float]:
    """The mean Rouge-L of each of Figure 7's groups that has answers."""
    if "rouge_l_by_length" in item.content:  # an earlier version's answers lack the lengths
        return {name: of["mean"] for name, of in item.content["rouge_l_by_length"].items()}
    values = {}
    for row in answers_of(item):
        name = next(name for name, most in LENGTHS.items() if row["reference_tokens"] <= most)
        values.setdefault(name, []).append(row["scores"]["rouge_l"])
    return {name: float(np.mean(of)) for name, of in values.items()}


def length_figure(data: str, items: list[Found]) -> Figure:
    """Figure 7 on one set: Rouge-L less that of the SFT model of the same size, if there is one."""
    means = {}  # label -> Rouge-L of each group of lengths, nan where there are no answers
    for label, group in grouped(items).items():
        runs = [by_length(item) for item in group]
        values = [[run[name] for run in runs if name in run] for name in LENGTHS]
        means[label] = np.array([np.mean(of) if of else np.nan for of in values])
    known = {label.lower(): label for label in means}
    base = {label: known.get(sft_of(label)) for label in means}
    bars, ylabel = means, "Rouge-L"
    if any(base.values()):
        ylabel = "Rouge-L less that of SFT"
        bars = {label: means[label] - means[sft] for label, sft in base.items()
                if sft not in (None, label)}
    there = ~np.isnan([*means.values()]).all(0)
    x = np.arange(there.sum())
    bars = {label: (x, mean[there]) for label, mean in bars.items()} if len(x) > 1 else {}
    title, file = f"Rouge-L by length, {data}", "length-" + re.sub(r"\W+", "-", data)
    return Figure(title, "Figure 7: groups by the length of the reference.", file, items,
                  {"": bars}, "tokens of the reference", ylabel,
                  line=((-0.5, len(x) - 0.5), (0, 0)),
                  ticks=[name for name, has in zip(LENGTHS, there) if has], bars=True)


SWEEPS = {  # by the flag in which runs differ: a figure's title, text, file and axis; the methods
    "mix_alpha": ("Alpha", "Figure 16: the teacher's share in sampling.", "alpha", "--mix_alpha",
                  ["minillm"]),
    "teacher": ("Size of the teacher", "Figure 5.", "teachers", "parameters of the teacher",
                ["minillm", "seqkd"])}


def sweep_figure(flag: str, trainings: list[Found], evaluations: list[Found]) -> Figure:
    """A metric over alpha, or over the size of the teacher, for runs that differ in that alone."""
    title, about, file, xlabel, methods = SWEEPS[flag]
    sizes = {item.model: item.content["parameters"] for item in evaluations}
    places = {}  # name of runs -> x
    for item in reversed(trainings):
        value = item.content[flag]
        places[item.name] = sizes.get(os.path.normpath(value), 0) if flag == "teacher" else value
    xs, metric, lines = sorted(set(places.values())), quality(evaluations), {}
    for method in methods:
        points = []  # x, mean, standard deviation
        for name, found in tested(trainings, evaluations, method).items():
            if values := values_of(found, metric):
                deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
                points.append((xs.index(places[name]), np.mean(values), deviation))
        if points:
            x, mean, deviation = np.array(sorted(points)).T
            lines[method] = (x, mean, mean - deviation, mean + deviation)
    return Figure(title, f"{about} Mean and standard deviation over runs.", file, trainings,
                  {"": lines}, xlabel, f"{metric} %", ticks=[f"{x:,}" for x in xs])


def reliability_figure(items: list[Found]) -> Figure:
    panels = {}
    for label, task, results in by_task(items):
        bins = [bin for result in results for bin in result["bins"] if bin["count"]]
        points = []
        for _, of in sorted(grouped(bins, lambda bin: bin["low"]).items()):
            counts = [bin["count"] for bin in of]
            points.append([np.average([bin[name] for bin in of], weights=counts)
                           for name in ("confidence", "accuracy")])
        panels.setdefault(task, {})[label] = np.transpose(points).tolist()
    about = ("Accuracy among answers of similar confidence, over all runs. On the diagonal a model "
             "is calibrated.")
    return Figure("Reliability", about, "reliability", items, panels, "confidence", "accuracy",
                  line=((0, 1), (0, 1)))


# ---- answers side by side ---------------------------------------------------------------------

def answers_page(data: str, items: list[Found], prompts: int) -> str:
    """The first prompts of a set, each with the reference and the first answer of each model."""
    said = {}  # (instruction, input) -> label -> row of the first answer
    for label, group in grouped(items).items():
        for row in answers_of(group[0]):
            said.setdefault((row["instruction"], row["input"]), {}).setdefault(label, row)
    page = []
    for key, rows in list(said.items())[:prompts]:
        reference = next(iter(rows.values()))["references"][0]
        cells = [("reference", "", reference)]
        for label, row in rows.items():
            scores = {name: row["scores"].get(name) for name in ("valid", "rouge_l", "tokens")}
            note = ", ".join(f"{name} {x:.0f}" for name, x in scores.items() if x is not None)
            cells.append((label, note, row["answer"]))
        page.append(f"<h3>{html.escape(' | '.join(filter(None, key)))}</h3><table class=answers>")
        for label, note, text in cells:
            page.append(f"<tr><th>{html.escape(label)}<br><small>{note}</small></th>"
                        f"<td>{html.escape(text)}</td></tr>")
        page.append("</table>\n")
    return f"<h2>Answers on {html.escape(data)}</h2>\n{''.join(page)}" if page else ""


def pictures(folders: Sequence[str]) -> str:
    """The pictures of single answers, answer*.png, that exercises.explain has drawn there."""
    page = ""
    for path in sorted({path for name in folders for path in Path(name).rglob("answer*.png")}):
        png, name = base64.b64encode(path.read_bytes()).decode(), html.escape(str(path))
        label = f"{name}: the tokens of one answer, and below each r_t, KL, R and w_t in colour"
        page += f'<h3>{name}</h3>\n<img alt="{label}" src="data:image/png;base64,{png}">\n'
    return f"<h2>Answers, token by token</h2>\n{page}" if page else ""


# ---- command ----------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #111; }
table { border-collapse: collapse; display: block; overflow-x: auto; } img { max-width: 100%; }
th, td { border-bottom: 1px solid #ccc; padding: .25em .7em; text-align: right; }
th, td { white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
code, .from { font-size: 12px; overflow-wrap: anywhere; } h3 { margin-bottom: .2em; }
.answers { display: table; width: 100%; } .answers th { width: 14em; vertical-align: top; }
.answers td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Config:
    folders: tuple[str, ...] = flag((), "folders that distill.py, eval.py and others have written")
    out: str = flag("out/report", "folder for report.html, report.md and the pictures")
    title: str = flag("MiniLLM", "heading")
    prompts: int = flag(20, "prompts of each set whose answers are shown")
    against: str = flag("minillm", "the model whose lead over the others is told by prompts")
    smooth: int = flag(32, "updates over which a curve is averaged; the paper's Figure 8 has 32")

    def __post_init__(self):
        check(self, prompts=(0, 10**6), smooth=(1, 10**6))
        check_place(self, "out")
        if not self.folders:
            raise UserError("give the folders to report on: python -m measure.report out/tiny")


def main(cfg: Config) -> None:
    items = {kind: [] for kind in (*KINDS.values(), "judge")}
    for item in find(cfg.folders):
        items[item.kind].append(item)
    evaluations, trainings = items["evaluation"], items["training"]
    sets, results = by_data(evaluations), tested(trainings, evaluations)
    tables = [summary_table(evaluations)] if len(sets) > 1 else []
    tables += [result_table(data, group) for data, group in sets.items()]
    for data, group in sets.items():
        for metric in (quality(group), "reverse_kl", "forward_kl"):
            tables.append(run_table(data, group, metric))
            tables.append(difference_table(data, group, metric, cfg.against))
    tables.append(ablation_table(trainings, results))
    for metric in ("valid", "rouge_l", "reverse_kl", "forward_kl"):
        tables.append(square_table(trainings, results, metric))
    tables += [exposure_table(items["exposure"]), calibration_table(items["calibration"]),
               judge_table(items["judge"])]
    flags = differing(trainings)
    figures = [sweep_figure(flag, trainings, evaluations) for flag in SWEEPS if flags == [flag]]
    trade = [item for item in evaluations if "covered" in item.content["scores"]]
    points = {name: [[np.mean(item.content["scores"][metric]) for item in group]
                     for metric in ("covered", "valid")] for name, group in grouped(trade).items()}
    figures += [training_figure(trainings, cfg.smooth), exposure_figure(items["exposure"])]
    figures += [length_figure(data, group) for data, group in sets.items()]
    figures.append(reliability_figure(items["calibration"]))
    tables = [table for table in tables if table.rows]
    figures = [figure for figure in figures if figure.panels]
    first = [trade_figure(trade, points)] if len(points) > 1 else []
    parts = [part.html() for part in (*first, *tables, *figures)]
    parts += [answers_page(data, group, cfg.prompts) for data, group in sets.items()]
    parts.append(pictures(cfg.folders))
    title = html.escape(cfg.title)
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style>\n<h1>{title}</h1>\n"
            f"<p><code>{html.escape(command())}</code></p>\n{''.join(parts)}</html>\n")
    markdown = f"# {cfg.title}\n\n`{command()}`\n\n" + "\n".join(t.markdown() for t in tables)
    files = {"report.html": page.encode(), "report.md": markdown.encode()}
    files |= {f"{figure.file}.png": figure.png for figure in (*first, *figures)}
    for file, content in files.items():
        with written_aside(Path(cfg.out) / file) as aside:
            aside.write_bytes(content)
    print(f"{Path(cfg.out) / 'report.html'}: {len(tables)} tables, {len(first + figures)} figures")


if __name__ == "__main__":
    run(main, Config)
