"""The metrics: Rouge-L and its kin, diversity, KL to a teacher, and the share of right answers in the built-in world.

Paper:    arXiv 2306.08543v4, Section 3.1 (Rouge-L at temperature 1, mean of 5 seeds), Section 2.1 (the two KLs), and
          Section 3.3: Figure 7 (Rouge-L by the length of the reference) and Table 3 (Dist-4, loss on the references).
Run:      python eval.py --model=out/tiny/minillm --teacher=out/tiny/teacher
          python eval.py --model=MiniLLM/MiniLLM-gpt2-120M --data=dolly
          python eval.py --model=MiniLLM/MiniLLM-gpt2-120M --data=all --out=out/eval/minillm-120M
Shapes:   B answers, T response tokens, N response tokens of several rows, D width.
Left out: what has files of its own: exposure bias in exposure.py, calibration.py, and GPT-4's marks in judge.py.
"""

import json
import math
import multiprocessing
import os
import string
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import torch

import data
import world
from config import (
    Machine,
    UserError,
    check,
    check_place,
    checksum,
    clock,
    command,
    flag,
    machine,
    run,
    write_json,
    write_lines,
)
from data import Example
from model import GPT, by_chunks, frozen, load, predicting, same_vocabulary
from sample import follow, room_for_answers, sample, taken, uniforms


@cache
def rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Rouge-L F1 in percent, Porter-stemmed, the best over the references: the number in the paper's tables."""
    return 100 * max(rouge_scorer().score(reference, answer)["rougeL"].fmeasure for reference in references)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """100 if the answer is a reference but for case, punctuation and white space, else 0."""
    plain = lambda text: " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())
    return 100.0 * (plain(answer) in map(plain, references))


def score(answer: str, references: Sequence[str]) -> dict[str, float]:
    return {"rouge_l": rouge_l(answer, references), "exact_match": exact_match(answer, references)}


MANY = 10_000  # answers; scoring fewer takes less time than to start other processes


def score_all(pairs: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, float]]:
    """The scores of each (answer, references); of many, by up to 16 processes."""
    if len(pairs) < MANY:
        return [score(*pair) for pair in pairs]
    cores = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(score, *zip(*pairs), chunksize=256))


def dist_n(texts: Iterable[str], n: int = 4) -> float:
    """Percentage of different ones among all n-grams of words of these texts, Dist-4 of Table 3; 0 without any."""
    words = [text.split() for text in texts]
    ngrams = [tuple(w[at : at + n]) for w in words for at in range(len(w) - n + 1)]
    return 100 * len(set(ngrams)) / max(1, len(ngrams))


@torch.no_grad()
def held_out_loss(model: GPT, examples: Sequence[Example], m: Machine, batch_size: int = 16) -> float:
    """Mean negative log-likelihood of the references in nats per token, end tokens included."""
    total = torch.zeros(2, dtype=torch.float64, device=m.device)  # nats, tokens
    lengths = [len(e.prompt) + len(e.response) for e in examples]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)[m.rank :: m.world]
    with m.autocast():
        head = model.head()
    logps = lambda hidden, y: (taken(model.logits(hidden, head).log_softmax(-1), y),)
    for at in range(0, len(order), batch_size):
        batch = [examples[i] for i in order[at : at + batch_size]]
        tokens, response, mask = data.pad_right([e.prompt for e in batch], [e.response for e in batch], m.device)
        with m.autocast():
            hidden = model(tokens, where=predicting([e.prompt for e in batch], mask))  # (N, D)
            (logp,) = by_chunks(logps, m.vocab_chunk, hidden, response[mask])  # (N,)
        total[0] -= logp.double().sum()
        total[1] += len(logp)
    m.sum(total)
    return (total[0] / total[1]).item()


def evaluate(model: GPT, tokenizer: tiktoken.Encoding, examples: Sequence[Example], m: Machine,
             teacher: GPT | None = None, seeds: Sequence[int] = (10,), max_response_tokens: int = 256,
             batch_size: int = 64, forward: bool = False, no_repeat_ngram: int = 0,
             progress: str = "evaluating") -> tuple[dict, list[dict]]:
    """Answers each prompt with each seed, and scores the answers: {metric: its mean for each seed}, and the answers.

    Of an answer: rouge_l and exact_match, in percent; tokens; ended, 100 if it reached the end token; with a teacher
    reverse_kl, the exact KL[q || p] in nats summed over the positions of the answer; if `forward` also forward_kl,
    KL[p || q] along an answer of p; in the built-in world valid, 100 if it is right. Of all answers of a seed: dist_4.
    Of all seeds together: dist_4_prompt, the dist_4 of the answers to one prompt, mean over the prompts that have any
    4-gram; in the built-in world distinct, the percentage of answers that are left without repetitions."""
    model, answers, in_world, longest = frozen(model, m.dtype), [], tokenizer.name == "words", max_response_tokens
    mine = range(m.rank, len(examples), m.world)
    prompts = [examples[i].prompt for i in mine]
    for seed in seeds:
        uniform, label = uniforms(seed, mine, longest), f"{progress}, seed {seed}"
        rollout = sample(model, prompts, uniform, m, batch_size=batch_size, no_repeat_ngram=no_repeat_ngram,
                         progress=label)
        columns = {"tokens": rollout.response_mask.sum(1), "ended": 100 * rollout.ended}
        if teacher:
            columns["reverse_kl"] = follow(model, prompts, rollout.answers, longest, m, teacher).reverse_kl.sum(1)
        if teacher and forward:
            of_teacher = sample(teacher, prompts, uniform, m, batch_size=batch_size, progress=label + ", teacher")
            columns["forward_kl"] = follow(teacher, prompts, of_teacher.answers, longest, m, model).reverse_kl.sum(1)
        columns = {name: values.tolist() for name, values in columns.items()}
        for n, i in enumerate(mine):
            row, text = examples[i].row, data.decode(tokenizer, rollout.answers[n])
            scores = {name: values[n] for name, values in columns.items()}
            if in_world:
                right = rollout.ended[n] and world.is_valid(row.instruction, row.input, text)
                scores["valid"] = 100.0 if right else 0.0
            answers.append({"seed": seed, "prompt": i, "instruction": row.instruction, "input": row.input,
                            "references": row.outputs, "answer": text, "scores": scores})
    for answer, scores in zip(answers, score_all([(a["answer"], a["references"]) for a in answers])):
        answer["scores"] |= scores
    answers = sorted(m.gather(answers), key=lambda a: (a["seed"], a["prompt"]))
    by_seed = [[a for a in answers if a["seed"] == seed] for seed in seeds]
    means = {name: [float(np.mean([a["scores"][name] for a in of_seed])) for of_seed in by_seed]
             for name in answers[0]["scores"]}
    means["dist_4"] = [dist_n(a["answer"] for a in of_seed) for of_seed in by_seed]
    if len(seeds) > 1:
        by_prompt = [[a["answer"] for a in of_prompt] for of_prompt in zip(*by_seed)]
        long = [texts for texts in by_prompt if any(len(text.split()) >= 4 for text in texts)]
        means["dist_4_prompt"] = [float(np.mean([dist_n(texts) for texts in long])) if long else 0.0]
    if in_world:
        different = {(a["instruction"], a["input"], a["answer"]) for a in answers}
        means["distinct"] = [100 * len(different) / len(answers)]
    return means, answers


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean's 95% interval by a bootstrap over prompts, one value of each: 2,000 draws, always the same."""
    generator = np.random.default_rng(0)
    draws = [generator.choice(values, len(values)).mean() for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return low, high


LENGTHS = {"[0,5]": 0, "[6,10]": 6, "[11,inf)": 11}  # Figure 7's groups, and the fewest reference tokens in each


def by_length(values: Sequence[float], reference_tokens: Sequence[int]) -> dict[str, dict]:
    """For each group of Figure 7 that is not empty: the number of prompts, and the mean of their values."""
    values, groups = np.asarray(values), np.searchsorted([*LENGTHS.values()], reference_tokens, side="right") - 1
    return {name: {"prompts": int((groups == g).sum()), "mean": float(values[groups == g].mean())}
            for g, name in enumerate(LENGTHS) if (groups == g).any()}


# ---- command --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    model: str = flag("out/tiny/minillm", "what to evaluate: a folder, gpt2 ... gpt2-xl, OWNER/NAME on the hub")
    data: str | None = flag(None, "instruction set or FILE.jsonl, several with commas between, or all for the paper's "
                                  "five; default tiny for a model of that world, else dolly")
    split: Literal["test", "valid"] = flag("test", "which rows of it; a FILE.jsonl is its own test split, whole")
    teacher: str | None = flag(None, "measure reverse and forward KL to this model")
    seeds: int = flag(5, "number of seeds, of 10, 20, 30 ...")
    corpus: str | None = flag(None, "measure the loss on this plain text too, as distill.py: tiny-text, FILE.txt ...")
    limit: int | None = flag(None, "use the first so many prompts only")
    max_prompt_tokens: int = flag(256, "longer prompts are dropped")
    max_response_tokens: int | None = flag(None, "longest answer; default 256, or what the model has room for")
    no_repeat_ngram: int = flag(0, "never say so many tokens in a row twice; the released code tests with 6")
    batch_size: int = flag(64, "answers decoded together; changes memory and speed only")
    capture: bool = flag(False, "on a GPU: record a decoding step as a CUDA graph, and replay it")
    out: str | None = flag(None, "folder for results.json and samples.jsonl; default: only print")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "what autocast computes in")

    def __post_init__(self):
        check(self, seeds=(1, 1000), limit=(1, 10**9), max_prompt_tokens=(1, 1023), max_response_tokens=(1, 1023),
              no_repeat_ngram=(0, 1024), batch_size=(1, 10**5))
        check_place(self, "out")


def main(cfg: Config, own: bool = False) -> dict:
    """The results of one set; of several, those of each by its name. In a run's `own` folder, results that were made
    with other settings are replaced."""
    names = list(data.HUB_SETS) if cfg.data == "all" else (cfg.data or "").split(",")
    if len(names) > 1:
        folder = lambda name: str(Path(cfg.out) / Path(name).stem) if cfg.out else None
        if len({Path(name).stem for name in names}) < len(names):
            raise UserError(f"--data={cfg.data}: two sets of one name; evaluate one by one")
        data.load_tokenizer(cfg.model)  # what is missing is told before any set is worked on
        for name in names:
            data.load_rows(name, cfg.split)
        corpus = {names[0]: cfg.corpus}  # plain text is measured once, beside the first
        return {name: main(replace(cfg, data=name, out=folder(name), corpus=corpus.get(name))) for name in names}
    m, tokenizer = machine(cfg.device, cfg.dtype, capture=cfg.capture), data.load_tokenizer(cfg.model)
    given = asdict(cfg) | dict.fromkeys(("batch_size", "capture", "device"))
    given |= {"weights": [checksum(cfg.model), checksum(cfg.teacher)],
              "files": [checksum(cfg.data), checksum(cfg.corpus)]}
    path = Path(cfg.out) / "results.json" if cfg.out else None
    name = cfg.data or ("tiny" if tokenizer.name == "words" else "dolly")
    if results := earlier(path, given, name, m, own):
        return results
    model = load(cfg.model, m.device)
    teacher = frozen(load(cfg.teacher, m.device), m.dtype) if cfg.teacher else None
    if teacher:
        same_vocabulary(model.config, teacher.config)
    both = [model, teacher] if teacher else [model]
    longest = min(cfg.max_prompt_tokens + (cfg.max_response_tokens or 256), *(g.config.n_positions for g in both))
    examples = data.load_examples(name, cfg.split, tokenizer, cfg.max_prompt_tokens, longest, m.say)[: cfg.limit]
    seeds = [10 * (n + 1) for n in range(cfg.seeds)]
    room = cfg.max_response_tokens or min(room_for_answers(g, [e.prompt for e in examples]) for g in both)
    texts = {"loss": examples}
    if cfg.corpus:
        corpus = data.load_corpus(cfg.corpus, tokenizer, Path(cfg.out or "out") / "corpus", m)
        texts["text_loss"] = data.Pieces(corpus, min(512, model.config.n_positions))[:200]
    began = time.perf_counter()
    means, answers = evaluate(model, tokenizer, examples, m, teacher, seeds, room, cfg.batch_size, forward=True,
                              no_repeat_ngram=cfg.no_repeat_ngram, progress=cfg.model)
    means |= {name: [held_out_loss(model, text, m)] for name, text in texts.items()}
    seconds = time.perf_counter() - began
    m.say(f"{cfg.model} on {name}, {len(examples):,} prompts; mean and standard deviation over seeds: {len(seeds)}")
    for metric, values in means.items():
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        m.say(f"  {metric:12}{np.mean(values):9.3f}{spread}")
    rouge = np.zeros(len(examples))
    gold = [len(tokens) for tokens in data.encode(tokenizer, [e.row.outputs[0] for e in examples])]
    for answer in answers:
        rouge[answer["prompt"]] += answer["scores"]["rouge_l"] / len(seeds)
    low, high = interval(rouge)
    lengths = by_length(rouge, gold)
    m.say(f"  rouge_l of other prompts, 95%: {low:.2f} to {high:.2f}; by tokens of the reference: "
          + ", ".join(f"{group} {of['mean']:.2f} ({of['prompts']:,})" for group, of in lengths.items()))
    m.say(f"  took {clock(seconds)}, the process {m.peak_gib():.1f} GiB at most so far, on {m.device} in "
          f"{str(m.dtype)[6:]}")
    results = {"command": command(), "given": given, "data": name, "prompts": len(examples), "seeds": seeds,
               "parameters": model.config.parameters, "seconds": seconds, "peak_gib": m.peak_gib(), "scores": means,
               "rouge_l_interval": [low, high], "rouge_l_by_length": lengths}
    return keep(results, path, m, "samples.jsonl", answers)


def earlier(path: Path | None, given: dict, data_name: str, m: Machine, own: bool = False) -> dict | None:
    """The results in this file if they were made with the same settings, weights and data, else None.

    Raises UserError if the file is something else's or, unless it is the run's own, another model's or set's, or of
    more prompts or answers than there would be now."""
    if not path or not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        made_with = results["given"]
        model, data_before = map(os.path.normpath, (made_with["model"], results.get("data", made_with["data"])))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # distill.py's is a list, say
        raise UserError(f"--out={path.parent} holds results of something else: give a folder of its own") from None
    if made_with == given:
        m.say(f"{path}: made earlier, kept")
        return results
    if own:
        return None
    for name, before, now in (("model", model, given["model"]), ("data", data_before, data_name)):
        if before != os.path.normpath(now):
            raise UserError(f"--out={path.parent} holds results of --{name}={before}, now it is {now}: give a folder "
                            "of its own")
    for name in ("limit", "seeds", "samples"):
        before, now = made_with.get(name), given.get(name)
        if now and now < (before or math.inf):
            made = f"without --{name}" if before is None else f"with --{name}={before}"
            raise UserError(f"--out={path.parent} holds results made {made}, and with --{name}={now} some would be "
                            "lost: give another --out, or remove that folder")
    return None


def keep(results: dict, path: Path | None, m: Machine, beside: str = "", lines: Sequence[dict] = ()) -> dict:
    """Writes the results into a file, if there is a path for one, and before them the lines that they were made of
    into a .jsonl beside it."""
    if path and m.rank == 0:
        if lines:
            path.unlink(missing_ok=True)  # it is of other lines than those that are written now
            write_lines(path.with_name(beside), lines)
        write_json(path, results)
    m.barrier()
    return results


if __name__ == "__main__":
    run(main, Config)
