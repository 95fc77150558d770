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
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import UserError, check, command, flag, read_json, run, written_aside

# Table 1, GPT-2: Rouge-L on DollyEval, SelfInst, Vicuna, S-NI, UnNI, then GPT-4's score on the first three.
SETS = ("dolly", "self-inst", "vicuna", "sinst", "uinst")
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
# lines that can be told apart in grey: by their pattern, and from dark to light
STYLES = [(("#111111", "#b03a2e", "#2e6da4", "#6fa33a")[n % 4], ("-", "--", "-.", ":")[(n + n // 4) % 4])
          for n in range(16)]


# ---- what there is --------------------------------------------------------------------------------------------------

@dataclass
class Found:
    """A file that a run has written, and the name of the model that it is about, its seed struck out."""
    kind: str  # "evaluation", "training", "exposure", "calibration" or "judge"
    path: Path
    name: str
    content: dict


def find(folders: Iterable[str]) -> list[Found]:
    """Everything in these folders that a report can show. Raises UserError for a folder without any of it."""
    found = []
    for folder in map(Path, folders):
        before = len(found)
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give what distill.py, eval.py or another command has written")
        for path in sorted(folder.rglob("*.json")):
            if path.name == "results.json" and "scores" in (content := read_results(path)):
                found.append(Found("evaluation", path, content["given"]["model"], content))
            elif path.name == "run.json" and "mix_alpha" in (content := read_json(path)):
                found.append(Found("training", path, content["out"] + "/minillm", content))
            elif path.name in ("exposure.json", "calibration.json"):
                content = read_json(path)
                found.append(Found(path.stem, path, content["given"]["model"], content))
            elif path.name.startswith("judge"):
                content = read_json(path)
                found.append(Found("judge", path, content["given"]["answers"], content))
        if lacking := [item.path for item in found[before:] if "command" not in item.content]:
            raise UserError(f"{lacking[0]} was made by an earlier version, and lacks what a report needs: make it anew")
        if len(found) == before:
            raise UserError(f"{folder}: no results in it; they are written by distill.py, or by eval.py --out=FOLDER")
    names = {item.name: [p for p in Path(item.name).parts if not re.fullmatch(r"seed-\d+", p)] for item in found}
    shared = 0
    while len({tuple(parts[: shared + 1]) for parts in names.values()}) == 1 and shared + 1 < min(
            map(len, names.values())):
        shared += 1
    once, places = {}, {}
    for item in found:  # a teacher is evaluated beside each of its students
        first = once.setdefault((item.path.name, item.name, item.content.get("data")), item)
        if item.kind == "evaluation":
            first.content["scores"] = item.content["scores"] | first.content["scores"]
    for item in once.values():
        item.name = "/".join(names[item.name][shared:])
        places.setdefault(Path(item.name).parent, len(places))
    rank = lambda name: METHODS.index(method_of(name)) if method_of(name) else len(METHODS)
    return sorted(once.values(), key=lambda item: (places[Path(item.name).parent], rank(item.name)))


def read_results(path: Path) -> dict:
    """An evaluation, or nothing: distill.py's table of all has the same name, and is a list."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not JSON: remove it, and run again what wrote it") from None
    return content if isinstance(content, dict) else {}


def grouped(items: Iterable[Found]) -> dict[str, list[Found]]:
    """By name: the runs of one group differ in their seeds."""
    groups = {}
    for item in items:
        groups.setdefault(item.name, []).append(item)
    return groups


def figure_of(evaluations: Sequence[Found], metric: str) -> tuple[float, float, int] | None:
    """(mean, standard deviation, of how many): over runs, or over the seeds of sampling of a single run."""
    runs = [item.content["scores"][metric] for item in evaluations if metric in item.content["scores"]]
    values = [float(np.mean(values)) for values in runs] if len(runs) > 1 else runs[0] if runs else []
    if not values:
        return None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, len(values)


def tested(trainings: Sequence[Found], evaluations: Iterable[Found]) -> dict[str, list[Found]]:
    """The evaluations on the set that these runs are tested with, by name."""
    settings = trainings[0].content if trainings else {}
    data = settings.get("test_data") or settings.get("data")
    return grouped(item for item in evaluations if item.content["data"] == data)


def shown(figure: tuple[float, float, int] | None, spread: bool = True) -> str:
    if figure is None:
        return ""
    return f"{figure[0]:.2f}" + (f" ± {figure[1]:.2f}" if spread and figure[2] > 1 else "")


def method_of(name: str) -> str | None:
    """The paper's name of a method, from that of a folder or a repository."""
    match = re.match(r"(teacher|init|minillm|seqkd|kd|sft)(-gpt2.*)?$", Path(name).name.lower())
    return match[1] if match else None


def sft_of(name: str) -> str | None:
    """The name, in small letters, that the SFT of this size has: beside sft-gpt2-340m stands kd-gpt2-340m."""
    method = method_of(name)
    return re.sub(rf"(^|/){method}(-gpt2[^/]*)?$", r"\1sft\2", name.lower()) if method else None


def of_paper(item: Found, score: bool = False) -> float | None:
    """Table 1's figure for this model, method and set: Rouge-L, or GPT-4's score."""
    row = TABLE_1.get((SIZES.get(item.content.get("parameters")), method_of(item.name)))
    name = item.content.get("data")
    if row is None or name not in (SETS[:3] if score else SETS):
        return None
    return row[SETS.index(name) + len(SETS) * score]


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


def result_tables(evaluations: list[Found]) -> list[Table]:
    """One a set: every metric of each model, and the paper's Rouge-L where it has that model."""
    tables = []
    for name, items in by_data(evaluations).items():
        groups = grouped(items)
        metrics = [metric for metric in METRICS if any(metric in item.content["scores"] for item in items)]
        paper = any(of_paper(item) is not None for item in items)
        rows = []
        for label, group in groups.items():
            row = [label, str(len(group)), *(shown(figure_of(group, metric)) for metric in metrics)]
            if paper:
                theirs, ours = of_paper(group[0]), figure_of(group, "rouge_l")[0]
                row += ["", ""] if theirs is None else [f"{theirs:.1f}", f"{ours - theirs:+.1f}"]
            minutes = np.mean([item.content["seconds"] for item in group]) / 60
            rows.append([*row, f"{minutes:.1f}", f"{max(item.content['peak_gib'] for item in group):.1f}"])
        header = ["model", "runs", *metrics, *(["paper's rouge_l", "difference"] if paper else []), "minutes", "GiB"]
        prompts = items[0].content["prompts"]
        tables.append(Table(f"Results on {name}", f"{prompts:,} prompts. Mean ± standard deviation over runs; for a "
                            "single run over its seeds of sampling. Minutes and peak memory are of the evaluation.",
                            header, rows))
    return tables


def summary_table(evaluations: list[Found]) -> list[Table]:
    """Rouge-L of each model on each set, as Table 1 is arranged; of a single set there is no more to say."""
    sets = {name: grouped(items) for name, items in by_data(evaluations).items()}
    rows = []
    for label in grouped(evaluations) if len(sets) > 1 else ():
        cells = []
        for groups in sets.values():
            group = groups.get(label, [])
            theirs = of_paper(group[0]) if group else None
            cells.append(shown(figure_of(group, "rouge_l")) + (f" ({theirs:.1f})" if theirs is not None else ""))
        rows.append([label, *cells])
    return [Table("Rouge-L", "In brackets the paper's Table 1, where it has this model.", ["model", *sets],
                  rows)] if rows else []


def by_data(items: Iterable[Found]) -> dict[str, list[Found]]:
    sets = {}
    for item in items:
        sets.setdefault(item.content["data"], []).append(item)
    return dict(sorted(sets.items(), key=lambda pair: (pair[0] not in SETS, [*SETS, pair[0]].index(pair[0]))))


NOT_COMPARED = {"out", "seed", "command", "resume", "device", "log_every", "baselines"}


def differing(trainings: list[Found]) -> list[str]:
    """The flags in which the groups of runs differ, but for their seeds and folders."""
    known = dict.fromkeys(name for item in trainings for name in item.content if name not in NOT_COMPARED)
    return [name for name in known if len({plain(item.content.get(name)) for item in trainings}) > 1]


def plain(value) -> str:
    """A flag's value in a table; of a folder its end, its seed struck out."""
    text = re.sub(r"(^|/)seed-\d+/", r"\1", str(value))
    return "/".join(text.split("/")[-2:])


def comparison(trainings: list[Found], evaluations: list[Found]) -> list[Table]:
    """Runs of MiniLLM whose flags differ, as an ablation; sixteen pairs of divergence and source as a square."""
    flags, results = differing(trainings), tested(trainings, evaluations)
    runs = {name: group for name, group in grouped(trainings).items() if name in results}
    metrics = [metric for metric in METRICS if any(figure_of(results[name], metric) for name in runs)]
    if len(runs) < 2 or not flags:
        return []
    rows = [[name, str(len(group)), *(plain(group[0].content.get(flag)) for flag in flags),
             *(shown(figure_of(results[name], metric)) for metric in metrics)] for name, group in runs.items()]
    tables = [Table("What flags change", "Runs of MiniLLM that differ in these flags. Mean ± standard deviation over "
                    "runs.", ["model", "runs", *(f"--{flag}" for flag in flags), *metrics], rows)]
    alone = {(g[0].content["divergence"], g[0].content["source"]): name for name, g in runs.items()
             if not g[0].content["long_term"]}
    kinds, sources = ([*dict.fromkeys(pair[at] for pair in alone)] for at in (0, 1))
    if len(kinds) > 1 and len(sources) > 1:
        for metric in [metric for metric in ("valid", "rouge_l", "reverse_kl", "forward_kl") if metric in metrics]:
            rows = [[kind, *(shown(figure_of(results[alone[kind, source]], metric)) if (kind, source) in alone else ""
                             for source in sources)] for kind in kinds]
            tables.append(Table(f"Divergence by source of answers: {metric}", "The single-step term alone.",
                                ["--divergence", *(f"--source={source}" for source in sources)], rows))
    return tables


def calibration_table(items: list[Found]) -> list[Table]:
    rows = [[label, task, f"{of['accuracy']:.1f}", f"{of['majority']:.1f}", f"{of['ece']:.3f}"]
            for label, group in grouped(items).items() for task, of in group[0].content["tasks"].items()]
    return [Table("Calibration", "Table 2: zero-shot accuracy in percent, beside that of always saying the commoner "
                  "label, and expected calibration error.", ["model", "task", "accuracy", "majority", "ECE"], rows)]


def judge_table(items: list[Found]) -> list[Table]:
    rows = []
    for item in items:
        c = item.content
        if c["kind"] == "reference":
            verdict = f"{c['score']:.1f} ({c['interval'][0]:.1f} to {c['interval'][1]:.1f})"
        else:
            shares = ", ".join(f"{name} {c[name]['percent']:.1f}" for name in ("win", "tie", "loss"))
            verdict = f"{shares} against {c['given']['against']}"
        rows.append([item.name, c["given"]["judge"], verdict, str(c["judged"]), str(c["unscored"])])
    return [Table("Judged", "100 x marks of the answers / marks of the references, and a 95% interval over prompts; or "
                  "percent of comparisons.", ["answers", "judge", "score", "judged", "unscored"], rows)]


# ---- figures --------------------------------------------------------------------------------------------------------

@dataclass
class Figure:
    title: str
    about: str
    commands: list[str]
    png: bytes
    file: str

    def html(self) -> str:
        code = "".join(f"<code>{html.escape(line)}</code><br>" for line in self.commands)
        return (f"<h2>{html.escape(self.title)}</h2>\n<p>{html.escape(self.about)}</p>\n"
                f'<img alt="{html.escape(self.title)}" src="data:image/png;base64,'
                f'{base64.b64encode(self.png).decode()}">\n<p class="from">{code}</p>\n')


def draw(title: str, about: str, file: str, items: Sequence[Found], paint: Callable, panels: int = 1) -> Figure:
    """paint(axes) draws on a list of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    columns = min(panels, 4)
    canvas = Canvas(figsize=(3.4 * columns if panels > 1 else 7, 3.0 * -(-panels // columns) + 0.8),
                    layout="constrained")
    FigureCanvasAgg(canvas)
    axes = list(canvas.subplots(-(-panels // columns), columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    paint(axes[:panels])
    for axis in axes[panels:]:
        axis.set_visible(False)
    labels = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    if labels:
        room = int(10 * canvas.get_figwidth() / (max(map(len, labels)) + 8))
        canvas.legend(labels.values(), labels.keys(), loc="outside lower center", frameon=False, handlelength=3.5,
                      ncols=max(1, min(4, room, len(labels))))
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=130)
    commands = [*dict.fromkeys(item.content["command"] for item in items)]
    more = [f"... and {len(commands) - 4} more"] if len(commands) > 5 else commands[4:5]
    return Figure(title, about, [*commands[:4], *more, command()], png.getvalue(), file)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Means over the last `width` values; over what there is at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - width)
    return (sums[last] - sums[first]) / (last - first)


def curve(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one column of a log.jsonl; of what is only validated, those of validation."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), float)]
    points = points or [(line["step"], line["valid"][name]) for line in lines if name in line.get("valid", {})]
    return tuple(np.array(column, dtype=float) for column in zip(*points)) if points else (np.empty(0), np.empty(0))


def training_figure(trainings: list[Found], width: int) -> list[Figure]:
    groups = {name: [item for item in group if (item.path.parent / "log.jsonl").is_file()]
              for name, group in grouped(trainings).items()}
    groups = {name: group for name, group in groups.items() if group}
    groups, rest = dict(list(groups.items())[: len(STYLES)]), max(0, len(groups) - len(STYLES))
    if not groups:
        return []
    logs = {(label, name): [curve(item.path.parent / "log.jsonl", name) for item in group]
            for label, group in groups.items() for name in CURVES}
    columns = [name for name in CURVES if any(len(curve[0]) for label in groups for curve in logs[label, name])]

    def paint(axes) -> None:
        for axis, name in zip(axes, columns):
            for (label, _), (color, line) in zip(groups.items(), STYLES):
                runs = [(steps, values) for steps, values in logs[label, name] if len(steps)]
                if not runs:
                    continue
                length = min(len(steps) for steps, _ in runs)
                mean = np.mean([values[:length] for _, values in runs], 0)
                many = length > 2 * width
                axis.plot(runs[0][0][:length], smooth(mean, width) if many else mean, line, color=color, label=label,
                          marker="" if many else ".")
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("update", fontsize=8)

    about = (f"Figure 8 among them. Means over {width} updates, and over runs of different seeds; points are "
             "validations." + f" {rest} more runs are not drawn." * (rest > 0))
    return [draw("Training", about, "training", trainings, paint, len(columns))]


def exposure_figure(items: list[Found]) -> list[Figure]:
    groups = grouped(items)

    def paint(axes) -> None:
        for (label, group), (color, line) in zip(groups.items(), STYLES):
            length = min(len(item.content["ex_acc_err"]) for item in group)
            rows = np.array([item.content["ex_acc_err"][:length] for item in group], dtype=float)
            axes[0].plot(np.arange(1, length + 1), rows.mean(0), line, color=color, label=label)
            low, high = ((rows.min(0), rows.max(0)) if len(group) > 1 else
                         (np.array(group[0].content[k][:length], dtype=float) for k in ("low", "high")))
            axes[0].fill_between(np.arange(1, length + 1), low, high, color=color, alpha=0.12, linewidth=0)
        axes[0].axhline(0, color="#888888", linewidth=0.8)
        axes[0].set_xlabel("answer tokens, l")
        axes[0].set_ylabel("ExAccErr(l) in percent")

    return [draw("Exposure bias", "Figure 6: excess error accumulated along a model's own answers. The band is the "
                 "range of runs, or the 95% interval over prompts of a single one.", "exposure", items, paint)]


def length_figure(evaluations: list[Found]) -> list[Figure]:
    figures = []
    for data, items in by_data(evaluations).items():
        groups = grouped(items)
        means = {label: {} for label in groups}
        for label, group in groups.items():
            for bucket in group[0].content["rouge_l_by_length"]:
                of = [i.content["rouge_l_by_length"][bucket]["mean"] for i in group
                      if bucket in i.content["rouge_l_by_length"]]
                means[label][bucket] = float(np.mean(of))
        buckets = [*dict.fromkeys(bucket for of in means.values() for bucket in of)]
        known = {label.lower(): label for label in groups}
        base = {label: known.get(sft_of(label)) for label in groups}  # the SFT of the same size
        less = any(base.values())
        lines = {label: [of.get(b, np.nan) - (means[base[label]].get(b, np.nan) if less else 0) for b in buckets]
                 for label, of in means.items() if base[label] != label and (base[label] or not less)}
        if len(buckets) < 2 or not lines:
            continue

        def paint(axes, lines=lines, buckets=buckets, less=less) -> None:
            for n, ((label, values), (color, _)) in enumerate(zip(lines.items(), STYLES)):
                axes[0].bar(np.arange(len(buckets)) + 0.8 * (n + 0.5) / len(lines) - 0.4, values, 0.75 / len(lines),
                            color=color, label=label, edgecolor="black", linewidth=0.4,
                            hatch=("", "//", "..", "xx", "\\\\", "oo")[n % 6])
            axes[0].axhline(0, color="black", linewidth=0.8)
            axes[0].set_xticks(range(len(buckets)), buckets)
            axes[0].set_xlabel("tokens of the reference")
            axes[0].set_ylabel("Rouge-L" + " less that of SFT" * less)

        figures.append(draw(f"Rouge-L by length, {data}", "Figure 7: groups by the length of the reference.",
                            f"length-{Path(data).stem}", items, paint))
    return figures


def sweep_figure(trainings: list[Found], evaluations: list[Found]) -> list[Figure]:
    """Where runs differ in alpha alone, or in the teacher alone: Figures 16 and 5."""
    results, flags = tested(trainings, evaluations), set(differing(trainings))
    metric = "valid" if any("valid" in item.content["scores"] for item in evaluations) else "rouge_l"
    if flags == {"mix_alpha"}:
        place = lambda item: (item.content["mix_alpha"], f"{item.content['mix_alpha']:g}")
        title, about, file, xlabel = "Alpha", "Figure 16: the teacher's share in sampling.", "alpha", "--mix_alpha"
    elif flags == {"teacher"}:
        size = {item.content["given"]["model"]: item.content["parameters"] for item in evaluations}
        place = lambda item: (size.get(item.content["teacher"], 0), f"{size.get(item.content['teacher'], 0):,}")
        title, about, file, xlabel = "Size of the teacher", "Figure 5.", "teachers", "parameters of the teacher"
    else:
        return []
    points = {}  # method -> [(place, label, figure)]
    for name, group in grouped(trainings).items():
        for method in ("minillm", "seqkd"):
            sibling = "/".join([*name.split("/")[:-1], method])
            if sibling in results and (figure := figure_of(results[sibling], metric)):
                points.setdefault(method, []).append((*place(group[0]), figure))
    if max(map(len, points.values()), default=0) < 2:
        return []

    def paint(axes) -> None:
        ticks = sorted({(x, label) for line in points.values() for x, label, _ in line})
        at = {x: n for n, (x, _) in enumerate(ticks)}
        for (method, line), (color, pattern) in zip(points.items(), STYLES[::5]):
            line = sorted(line)
            axes[0].errorbar([at[x] for x, _, _ in line], [f[0] for _, _, f in line], [f[1] for _, _, f in line],
                             color=color, linestyle=pattern, marker="o", capsize=3, label=method)
        axes[0].set_xticks(range(len(ticks)), [label for _, label in ticks])
        axes[0].set_xlabel(xlabel)
        axes[0].set_ylabel(metric + " %")

    return [draw(title, about + " Mean and standard deviation over runs.", file, trainings, paint)]


def reliability_figure(items: list[Found]) -> list[Figure]:
    tasks = [*dict.fromkeys(task for item in items for task in item.content["tasks"])]

    def paint(axes) -> None:
        for axis, task in zip(axes, tasks):
            axis.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
            for (label, group), (color, line) in zip(grouped(items).items(), STYLES):
                bins = [b for b in group[0].content["tasks"].get(task, {"bins": []})["bins"] if b["count"]]
                points = [[b[name] for b in bins] for name in ("confidence", "accuracy")]
                axis.plot(*points, line, color=color, label=label, marker="o", markersize=4)
            axis.set_title(task, fontsize=9)
            axis.set_xlabel("confidence")
            axis.set_ylabel("accuracy")

    return [draw("Reliability", "Accuracy among answers of like confidence; on the diagonal a model is calibrated.",
                 "reliability", items, paint, len(tasks))]


# ---- answers side by side -------------------------------------------------------------------------------------------

def answers_page(evaluations: list[Found], prompts: int) -> str:
    """The first prompts of each set, the reference, and one answer of each model."""
    page = []
    for data, items in by_data(evaluations).items():
        said = {}  # label -> {(instruction, input): answer}
        for label, group in grouped(items).items():
            path = group[0].path.parent / "samples.jsonl"
            if path.is_file():
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                said[label] = {(row["instruction"], row["input"]): row for row in reversed(rows)}  # the first seed's
        if not said:
            continue
        page.append(f"<h2>Answers on {html.escape(data)}</h2>\n")
        for key in list(dict.fromkeys(key for rows in said.values() for key in reversed(rows)))[:prompts]:
            rows = {label: of[key] for label, of in said.items() if key in of}
            references = next(iter(rows.values())).get("references", [])[:1]
            cells = [("reference", text, "") for text in references]
            cells += [(label, row["answer"], ", ".join(f"{name} {row['scores'][name]:.0f}" for name in
                                                       ("valid", "rouge_l", "tokens") if name in row["scores"]))
                      for label, row in rows.items()]
            body = "".join(f"<tr><th>{html.escape(label)}<br><small>{note}</small></th><td>{html.escape(text)}</td>"
                           "</tr>" for label, text, note in cells)
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
        if not self.folders:
            raise UserError("give the folders to report on: python report.py out/tiny")


def main(cfg: Config) -> None:
    found = find(cfg.folders)
    kinds = ("evaluation", "training", "exposure", "calibration", "judge")
    evaluations, trainings, exposures, calibrations, judged = ([f for f in found if f.kind == kind] for kind in kinds)
    tables = [*summary_table(evaluations), *result_tables(evaluations), *comparison(trainings, evaluations)]
    tables += calibration_table(calibrations) if calibrations else []
    tables += judge_table(judged) if judged else []
    figures = [*sweep_figure(trainings, evaluations), *training_figure(trainings, cfg.smooth)]
    figures += exposure_figure(exposures) if exposures else []
    figures += length_figure(evaluations) + (reliability_figure(calibrations) if calibrations else [])
    body = "".join(part.html() for part in (*tables, *figures)) + answers_page(evaluations, cfg.prompts)
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(cfg.title)}</title>'
            f"<style>{STYLE}</style>\n<h1>{html.escape(cfg.title)}</h1>\n<p><code>{html.escape(command())}</code></p>\n"
            f"{body}</html>\n")
    out = Path(cfg.out)
    markdown = f"# {cfg.title}\n\n`{command()}`\n\n" + "\n".join(table.markdown() for table in tables)
    for file, content in (("report.html", page), ("report.md", markdown)):
        with written_aside(out / file) as aside:
            aside.write_text(content, encoding="utf-8")
    for figure in figures:
        with written_aside(out / f"{figure.file}.png") as aside:
            aside.write_bytes(figure.png)
    print(f"{out / 'report.html'}: {len(tables)} tables, {len(figures)} figures")


if __name__ == "__main__":
    run(main, Config)
