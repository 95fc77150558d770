"""Calibration: whether a model is right as often as it is sure, on two classification tasks it was not trained for.

Paper:    arXiv 2306.08543v4, Section 3.3, Table 2: accuracy and expected calibration error, zero-shot, on SST-2 and
          BoolQ. Prompts, label words and the number of bins are our own, and the paper's models are 7B: compare the
          order of methods, not digits. ECE is Eq. (3) of Guo et al. 2017, arXiv 1706.04599.
Run:      python calibration.py --model=MiniLLM/MiniLLM-gpt2-120M --data=boolq/val.jsonl,SST-2/dev.tsv
          python calibration.py --model=gpt2 --data=boolq/val.jsonl --out=out/calibration/gpt2
Shapes:   B prompts, K labels, T tokens of a label, N = B T positions, D width, V vocabulary; n examples measured.
Left out: cures, such as a fitted temperature. report.py draws the reliability diagram.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
from config import Machine, UserError, check, check_place, checksum, command, flag, machine, run
from data import Row
from eval import earlier, keep
from model import GPT, by_chunks, frozen, load, predicting
from sample import taken

# ---- tasks ----------------------------------------------------------------------------------------------------------

TASKS = {  # the instruction, and the words that answer it, for a file's 0 and its 1
    "sst2": ("Is the sentiment of this sentence from a film review negative or positive? Answer with one word, "
             "Negative or Positive.", ("Negative", "Positive")),
    "boolq": ("Read the passage and answer the question about it with one word, No or Yes.", ("No", "Yes")),
}


def read_task(path: Path) -> tuple[str, list[tuple[int, Row, int]]]:
    """The task of a file, told by its first line, and its rows: line number, prompt, and label, 0 or 1."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    task = "sst2" if lines[0].rstrip(b"\r") == b"sentence\tlabel" else "boolq"
    if task == "boolq" and not lines[0].startswith(b"{"):
        raise UserError(f"{path}:1: neither a row of BoolQ's .jsonl nor the header of SST-2's .tsv, sentence TAB label")
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (number > 1 or task == "boolq"):
            try:
                text, label = (read_boolq if task == "boolq" else read_sst2)(line.decode("utf-8").rstrip("\r"))
                text.encode("utf-8")
            except UnicodeError as error:  # of the bytes, or half of a surrogate pair that JSON spells out
                raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason})") from None
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            rows.append((number, Row(TASKS[task][0], text), label))
    if not rows:
        raise UserError(f"{path}: it holds no rows")
    return task, rows


def read_sst2(line: str) -> tuple[str, int]:
    """A row of GLUE's .tsv. The format is raw: a quotation mark is part of the sentence."""
    sentence, *label = line.split("\t")
    if not sentence.strip() or label not in (["0"], ["1"]):
        raise UserError(f"a sentence, a tab, and 0 or 1 are expected, the line ends {line[-30:]!r}")
    return sentence.strip(), int(label[0])


def read_boolq(line: str) -> tuple[str, int]:
    """A row of BoolQ's .jsonl: SuperGLUE calls the label "label", the authors' own file "answer"."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("not JSON that can be read; is the line cut off?") from None
    if not isinstance(raw, dict):
        raise UserError(f"one JSON object a line is expected, this is a {type(raw).__name__}")
    key = "answer" if "answer" in raw and "label" not in raw else "label"
    is_text, is_label = lambda x: isinstance(x, str) and x.strip(), lambda x: isinstance(x, int) and x in (0, 1)
    for name, kind, fits in (("passage", "text", is_text), ("question", "text", is_text),
                             (key, "true or false", is_label)):
        if not fits(raw.get(name)):
            found = json.dumps(raw[name])[:40] if name in raw else f"missing (found: {', '.join(raw) or 'nothing'})"
            raise UserError(f'"{name}" must be {kind}, it is {found}')
    return f"{raw['passage'].strip()}\n\nQuestion: {raw['question'].strip().removesuffix('?')}?", int(raw[key])


# ---- probabilities and metrics --------------------------------------------------------------------------------------

@torch.no_grad()
def label_probabilities(model: GPT, prompts: Sequence[list[int]], labels: Sequence[list[int]], m: Machine,
                        batch_size: int = 16, progress: str = "") -> np.ndarray:
    """(B, K): how likely each label is after each prompt, among the labels. Pass a `frozen` model.

    A label's probability is the product of its tokens', not their mean, which would favour longer words."""
    def logps(hidden: Tensor, *answers: Tensor) -> tuple[Tensor, ...]:
        logp_vocab = model.logits(hidden).log_softmax(-1)  # (chunk, V)
        return tuple(taken(logp_vocab, y) for y in answers)

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))[m.rank :: m.world]
    logp = torch.zeros(len(order), len(labels), dtype=torch.float64, device=m.device)  # (B, K)
    together = max(map(len, labels)) == 1  # labels of one token are all read off one pass
    groups = [range(len(labels))] if together else [[k] for k in range(len(labels))]
    quiet = not progress or m.rank > 0 or None  # None: unless a terminal shows it
    for at in tqdm(range(0, len(order), batch_size), progress, leave=False, delay=2, disable=quiet):
        batch = [prompts[i] for i in order[at : at + batch_size]]
        for group in groups:
            tokens, _, mask = data.pad_right(batch, [labels[group[0]]] * len(batch), m.device)
            answers = [torch.tensor(labels[k] * len(batch), device=m.device) for k in group]  # (N,) each
            with m.autocast():
                hidden = model(tokens, where=predicting(batch, mask))  # (N, D)
                values = by_chunks(logps, m.vocab_chunk, hidden, *answers)  # (N,) each
            for k, value in zip(group, values):
                logp[at : at + len(batch), k] = value.double().view(len(batch), -1).sum(1)
    rows = sorted(m.gather(list(zip(order, logp.softmax(1).tolist()))))
    probabilities = np.array([row for _, row in rows])
    if np.isnan(probabilities).any():
        raise UserError("the model's probabilities are not numbers: its weights are broken, or --dtype is too coarse")
    return probabilities


def bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each confidence, from 0 on. Bins have one width and are (low, high]; the first holds 0 as well."""
    return np.searchsorted(np.arange(1, bins) / bins, confidence)


def ece(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error, Eq. (3) of Guo et al.: sum over bins of n_b / n |accuracy_b - confidence_b|.

    confidence (n,) in [0, 1], correct (n,) 0 or 1. n_b times the difference of means is here a sum of differences. An
    empty bin adds 0, as the lower half does with two labels, of which the likelier has at least 1 / 2."""
    gaps = np.bincount(bin_of(confidence, bins), np.asarray(correct) - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int) -> list[dict]:
    """The reliability diagram: the mean confidence and the accuracy of each bin, as fractions; None if it is empty."""
    members = [bin_of(confidence, bins) == b for b in range(bins)]
    mean = lambda values, inside: float(np.mean(values[inside])) if inside.any() else None
    return [{"low": b / bins, "high": (b + 1) / bins, "count": int(inside.sum()),
             "confidence": mean(confidence, inside), "accuracy": mean(correct, inside)}
            for b, inside in enumerate(members)]


def measure(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> dict:
    """probabilities (n, K), labels (n,) -> accuracy in percent and ECE as a fraction, as in Table 2, and their 95%
    intervals by a bootstrap over examples: 2,000 draws, always the same.

    Chance makes an ECE larger, and drawing again makes it larger once more: so its draws are mirrored at the ECE."""
    confidence, correct = probabilities.max(1), (probabilities.argmax(1) == labels).astype(float)
    n, error, generator = len(labels), ece(confidence, correct, bins), np.random.default_rng(0)
    draws = (generator.integers(0, n, n) for _ in range(2000))
    drawn = [(100 * correct[i].mean(), 2 * error - ece(confidence[i], correct[i], bins)) for i in draws]
    accuracies, errors = np.quantile(drawn, [0.025, 0.975], axis=0).clip(0).T.tolist()
    return {"examples": n, "accuracy": float(100 * correct.mean()), "accuracy_interval": accuracies,
            "majority": float(100 * np.bincount(labels).max() / n), "confidence": float(confidence.mean()),
            "ece": error, "ece_interval": errors, "bins": reliability(confidence, correct, bins)}


# ---- command --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    model: str = flag("gpt2", "what to evaluate: a folder, gpt2 ... gpt2-xl, OWNER/NAME on the hub")
    data: str | None = flag(None, "BoolQ's .jsonl or SST-2's .tsv, rows with labels, or both with a comma between")
    bins: int = flag(10, "bins of confidence, from 0 to 1, of the ECE")
    limit: int | None = flag(None, "use the first so many prompts of each file only")
    batch_size: int = flag(16, "prompts read together; changes memory and speed only")
    out: str | None = flag(None, "folder for calibration.json and calibration.jsonl; default: only print")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "what autocast computes in")

    def __post_init__(self):
        check(self, bins=(1, 1000), limit=(1, 10**9), batch_size=(1, 10**5))
        if not all((self.data or "").split(",")):
            raise UserError("give --data: BoolQ's .jsonl, SST-2's dev.tsv, or both with one comma between")
        check_place(self, "out")


def main(cfg: Config) -> dict:
    m, files, tasks, lines = machine(cfg.device, cfg.dtype), [Path(name) for name in cfg.data.split(",")], {}, []
    for task, rows in map(read_task, files):  # a bad row is told before anything is worked on
        if task in tasks:
            raise UserError(f"--data={cfg.data}: two files of {task}; measure one by one")
        tasks[task] = rows
    tokenizer = data.load_tokenizer(cfg.model)
    given = asdict(cfg) | dict.fromkeys(("batch_size", "device"))
    given |= {"weights": checksum(cfg.model), "files": [checksum(path) for path in files]}
    path = Path(cfg.out) / "calibration.json" if cfg.out else None
    if results := earlier(path, given, cfg.data, m):
        return results
    results = {"command": command(), "given": given, "tasks": {}}
    model = frozen(load(cfg.model, m.device), m.dtype)
    for task, rows in tasks.items():
        began, words, P = time.perf_counter(), TASKS[task][1], model.config.n_positions
        labels, prompts = data.encode(tokenizer, words), data.encode(tokenizer, [row.prompt_text for _, row, _ in rows])
        fit = [i for i, prompt in enumerate(prompts) if len(prompt) + max(map(len, labels)) <= P]
        dropped = len(rows) - len(fit)
        m.say(f"data {task}: {len(fit):,} rows; dropped {dropped:,} that are too long for {P:,} positions")
        if not fit:
            raise UserError(f"--data={cfg.data}: no row of {task} fits into this model's {P} positions")
        rows, prompts = ([x[i] for i in fit[: cfg.limit]] for x in (rows, prompts))
        probabilities = label_probabilities(model, prompts, labels, m, cfg.batch_size, task)
        r = measure(probabilities, np.array([label for _, _, label in rows]), cfg.bins)
        r |= {"dropped": dropped, "labels": list(words), "seconds": round(time.perf_counter() - began, 1)}
        results["tasks"][task] = r
        lines += [{"task": task, "line": number, "label": words[label], "probabilities": dict(zip(words, row))}
                  for (number, _, label), row in zip(rows, probabilities.tolist())]
        (low, high), (least, most) = r["accuracy_interval"], r["ece_interval"]
        m.say(f"{cfg.model} on {task}, {len(rows):,} prompts (95% in brackets): accuracy {r['accuracy']:.1f} "
              f"[{low:.1f}, {high:.1f}], majority {r['majority']:.1f}, confidence {r['confidence']:.3f}, "
              f"ECE {r['ece']:.3f} [{least:.3f}, {most:.3f}], {r['seconds']} s")
    return keep(results, path, m, "calibration.jsonl", lines)


if __name__ == "__main__":
    run(main, Config)
