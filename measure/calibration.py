"""Calibration: whether a model is right as often as it is sure, in two classification tasks.

Paper:    arXiv 2306.08543v4, Section 3.3, Table 2: accuracy and expected calibration error (ECE) on
          SST-2 and BoolQ, for which no model was trained. Prompts, label words and bins are ours,
          and the paper's models are 7B: compare the order of methods, not digits. ECE is Eq. (3) of
          Guo et al. 2017, arXiv 1706.04599.
Run:      python -m measure.calibration --model=gpt2 --data=boolq/val.jsonl,SST-2/dev.tsv
          python -m measure.calibration --model=gpt2 --data=boolq/val.jsonl --out=out/calibration
Shapes:   B prompts, b of them together, K labels, T tokens of a label, V vocabulary; n examples.
Left out: cures, such as a fitted temperature. report.py draws the reliability diagram.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import data
from config import Machine, UserError, check, command, flag, machine, run
from data import Row
from model import GPT, load
from safe import runs
from safe.files import check_place, refuse_pointer
from safe.rows import parsed
from sample import taken

# ---- tasks ------------------------------------------------------------------------------------

TASKS = {  # the instruction, and the words that answer it, for label 0 and label 1
    "sst2": ("Is the sentiment of this sentence from a film review negative or positive? Answer "
             "with one word, Negative or Positive.", ("Negative", "Positive")),
    "boolq": ("Read the passage and answer the question about it with one word, No or Yes.",
              ("No", "Yes")),
}


def read_task(path: Path) -> tuple[str, list[tuple[int, Row, int]]]:
    """The task of a file, recognised by its first line, and its rows: the number of the line, the
    prompt, and the label, 0 or 1."""
    try:
        refuse_pointer(path)
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    is_sst2 = lines[0].rstrip(b"\r") == b"sentence\tlabel"
    if not is_sst2 and not lines[0].startswith(b"{"):
        raise UserError(f"{path}:1: this is neither a row of BoolQ's .jsonl nor the header of "
                        "SST-2's .tsv, sentence TAB label")
    task, read = ("sst2", read_sst2) if is_sst2 else ("boolq", read_boolq)
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (is_sst2 and number == 1):
            continue
        try:
            text, label = read(line.rstrip(b"\r"))
        except ValueError as error:  # a UserError, or bytes that are not UTF-8
            raise UserError(f"{path}:{number}: {error}") from None
        rows.append((number, Row(TASKS[task][0], text), label))
    if not rows:
        raise UserError(f"{path}: it holds no rows")
    return task, rows


def read_sst2(line: bytes) -> tuple[str, int]:
    """A row of GLUE's .tsv. The format is raw: a quotation mark is part of the sentence."""
    sentence, *label = line.decode("utf-8").split("\t")
    if not sentence.strip() or label not in (["0"], ["1"]):
        raise UserError("a row is a sentence, a tab, and 0 or 1; this ends with "
                        f"{line[-30:].decode('utf-8', 'replace')!r}")
    return sentence.strip(), int(label[0])


def read_boolq(line: bytes) -> tuple[str, int]:
    """A row of BoolQ's .jsonl. The label is "label" for SuperGLUE and "answer" for the authors."""
    raw = parsed(line)
    texts = [raw.get("passage"), raw.get("question")]
    label = raw.get("label", raw.get("answer"))
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError('"passage" and "question" must be texts that are not empty')
    if type(label) not in (bool, int) or label not in (0, 1):
        raise UserError('"label" or "answer" must be true or false')
    passage, question = (text.strip() for text in texts)
    text = f"{passage}\n\nQuestion: {question.removesuffix('?')}?"
    text.encode("utf-8")  # a ValueError, if JSON spells out half of a surrogate pair
    return text, int(label)


# ---- probabilities and metrics ----------------------------------------------------------------

@torch.no_grad()
def label_probabilities(model: GPT, prompts: Sequence[list[int]], labels: Sequence[list[int]],
                        m: Machine, progress: str = "") -> np.ndarray:
    """How likely each label is after each prompt, compared with the other labels, (B, K).

    A label's probability is the product of its tokens' probabilities, not their mean, which would
    favour longer words."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))[m.rank :: m.world]
    longest = max(map(len, labels))
    groups = [[k] for k in range(len(labels))]
    if longest == 1:
        groups = [range(len(labels))]  # one pass predicts all labels of one token
    batches = data.slices(order, m.room(longest, model.config.vocab_size))
    quiet = True if m.rank or not progress else None  # None: quiet unless a terminal shows it
    rows = []
    for some in tqdm(list(batches), progress, leave=False, delay=2, disable=quiet):
        logp = torch.zeros(len(some), len(labels), dtype=torch.float64, device=m.device)  # (b, K)
        for group in groups:
            answers = [labels[group[0]]] * len(some)
            batch = data.pad_right([prompts[i] for i in some], answers, m.device)
            with m.autocast():
                hidden = batch.predicting(model(batch.tokens))  # (b, T, D)
                logp_vocab = model.logits(hidden).log_softmax(-1)  # (b, T, V)
            for k in group:
                label = torch.tensor(labels[k], device=m.device).expand(len(some), -1)  # (b, T)
                logp[:, k] = taken(logp_vocab, label).double().sum(1)
        rows += zip(some, logp.softmax(1).tolist())
    probabilities = np.array([row for _, row in sorted(m.gather(rows))])
    if np.isnan(probabilities).any():
        raise UserError("the model's probabilities are not numbers: its weights are broken, or "
                        "--dtype is too coarse")
    return probabilities


def bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each confidence, counted from 0. Bins are equally wide and (low, high]; the first
    holds 0 as well."""
    return np.searchsorted(np.arange(1, bins) / bins, confidence)


def ece(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error, Eq. (3) of Guo et al.: the sum over bins of n_b / n times
    |accuracy_b - confidence_b|. confidence (n,) lies in [0, 1], correct (n,) is 0 or 1.

    n_b times the difference of means is computed as a sum of differences. An empty bin adds 0."""
    gaps = np.bincount(bin_of(confidence, bins), np.asarray(correct) - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int) -> list[dict]:
    """The reliability diagram: the mean confidence and the accuracy in each bin, as fractions, or
    None where the bin is empty."""
    diagram = []
    for b in range(bins):
        inside = bin_of(confidence, bins) == b
        count = int(inside.sum())
        means = [float(x[inside].mean()) if count else None for x in (confidence, correct)]
        diagram.append({"low": b / bins, "high": (b + 1) / bins, "count": count,
                        "confidence": means[0], "accuracy": means[1]})
    return diagram


def measure(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> dict:
    """From probabilities (n, K) and labels (n,): accuracy in percent and ECE as a fraction, as in
    Table 2, and their 95% intervals by a bootstrap over examples: 2,000 draws, always the same.

    Chance makes an ECE larger, and a second draw makes it larger once more. That is why the
    bootstrap's ECEs are mirrored at the measured one."""
    confidence = probabilities.max(1)
    correct = (probabilities.argmax(1) == labels).astype(float)
    n, error = len(labels), ece(confidence, correct, bins)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        i = generator.integers(0, n, n)
        mirrored = 2 * error - ece(confidence[i], correct[i], bins)
        drawn.append((100 * correct[i].mean(), mirrored))
    accuracies, errors = np.quantile(drawn, [0.025, 0.975], axis=0).clip(0).T.tolist()
    return {"examples": n, "accuracy": float(100 * correct.mean()),
            "accuracy_interval": accuracies,
            "majority": float(100 * np.bincount(labels).max() / n),
            "confidence": float(confidence.mean()), "ece": error, "ece_interval": errors,
            "bins": reliability(confidence, correct, bins)}


# ---- command ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    model: str = flag("gpt2", "a folder, gpt2 ... gpt2-xl, or OWNER/NAME on the hub")
    data: str | None = flag(None, "BoolQ's .jsonl, SST-2's .tsv, or both with a comma between")
    template: Literal["auto", "paper", "chat"] = flag("auto", "chat: the model's; families/README")
    bins: int = flag(10, "bins of confidence, from 0 to 1, of the ECE")
    limit: int | None = flag(None, "use the first so many prompts of each file only")
    sample_batch: int = flag(16, "prompts read together; changes memory and speed only")
    out: str | None = flag(None, "folder for calibration.json and .jsonl; default: only print")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "autocast's dtype")

    def __post_init__(self):
        check(self, bins=(1, 1000), limit=(1, 10**9), sample_batch=(1, 10**5))
        if not all((self.data or "").split(",")):
            raise UserError("give --data: BoolQ's .jsonl, SST-2's dev.tsv, or both with one comma")
        check_place(self, "out")


def main(cfg: Config) -> dict:
    m = machine(cfg.device, cfg.dtype, cfg.sample_batch)
    files = [Path(name) for name in cfg.data.split(",")]
    tasks = {}
    for task, rows in map(read_task, files):  # a bad row is told before anything is computed
        if task in tasks:
            raise UserError(f"--data={cfg.data}: two files of {task}; measure them one by one")
        tasks[task] = rows
    tokenizer = data.load_tokenizer(cfg.model, cfg.template)
    path = Path(cfg.out) / "calibration.json" if cfg.out else None
    given = asdict(cfg) | dict.fromkeys(("sample_batch", "device"))
    given |= {"weights": runs.checksum(cfg.model), "files": [runs.checksum(file) for file in files]}
    if results := runs.earlier(path, given, m):
        return results
    model = load(cfg.model, m.device)
    P = model.config.n_positions
    results, lines = {"command": command(), "given": given, "tasks": {}}, []
    for task, rows in tasks.items():
        began, words = time.perf_counter(), TASKS[task][1]
        labels = data.encode(tokenizer, words)
        prompts = data.prompts_of(tokenizer, [row for _, row, _ in rows])
        longest = max(map(len, labels))
        fit = [(prompt, number, label) for prompt, (number, _, label) in zip(prompts, rows)
               if len(prompt) + longest <= P]
        dropped = len(rows) - len(fit)
        m.say(f"data {task}: {len(fit):,} rows; dropped {dropped:,} that are too long for {P:,} "
              "positions")
        if not fit:
            raise UserError(f"--data={cfg.data}: no row of {task} fits into this model's {P} "
                            "positions")
        fit = fit[: cfg.limit]
        prompts = [prompt for prompt, _, _ in fit]
        probabilities = label_probabilities(model, prompts, labels, m, task)
        r = measure(probabilities, np.array([label for _, _, label in fit]), cfg.bins)
        r |= {"dropped": dropped, "labels": list(words),
              "seconds": round(time.perf_counter() - began, 1)}
        results["tasks"][task] = r
        for (_, number, label), row in zip(fit, probabilities.tolist()):
            lines.append({"task": task, "line": number, "label": words[label],
                          "probabilities": dict(zip(words, row))})
        show(cfg.model, task, r, m)
    return runs.keep(results, path, m, "calibration.jsonl", lines)


def show(model: str, task: str, r: dict, m: Machine) -> None:
    low, high = r["accuracy_interval"]
    least, most = r["ece_interval"]
    m.say(f"{model} on {task}, {r['examples']:,} prompts (95% in brackets): accuracy "
          f"{r['accuracy']:.1f} [{low:.1f}, {high:.1f}], majority {r['majority']:.1f}, confidence "
          f"{r['confidence']:.3f}, ECE {r['ece']:.3f} [{least:.3f}, {most:.3f}], {r['seconds']} s")


if __name__ == "__main__":
    run(main, Config)
