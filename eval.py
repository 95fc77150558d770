"""The metrics: Rouge-L, diversity, KL to a teacher, and right answers in the built-in world.

Paper:    arXiv 2306.08543v4, Section 3.1 (Rouge-L at temperature 1, mean of 5 seeds), Section 2.1
          (the two KLs), Section 3.3 (Figure 7, Rouge-L by length; Table 3, Dist-4 and loss).
Run:      python eval.py --model=out/tiny/minillm --teacher=out/tiny/teacher
          python eval.py --model=MiniLLM/MiniLLM-gpt2-120M --data=all --out=out/eval
Shapes:   B answers, b of them together, T response tokens, D width, V vocabulary.
Left out: exposure bias, calibration and a judge's marks, which have files of their own in measure/.
"""

import string
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import torch
from torch import Tensor

import data
import world
from config import Machine, UserError, check, command, flag, machine, run
from data import Example
from model import GPT, load
from safe import runs
from safe.files import check_place
from safe.texts import UnicodeWords, letters_seen
from sample import decoder, follow, lengths, taken, uniforms


@cache
def rouge_scorer(words: str):
    from rouge_score.rouge_scorer import RougeScorer
    if words == "unicode":
        return RougeScorer(["rougeL"], tokenizer=UnicodeWords())
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, references: Sequence[str], words: str = "english") -> float:
    """Rouge-L F1 in percent, the best over the references. "english" is the paper's scorer: stemmed
    words of a-z and 0-9. "unicode" reads words in any script and does not stem."""
    scores = [rouge_scorer(words).score(reference, answer)["rougeL"] for reference in references]
    return 100 * max(score.fmeasure for score in scores)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """100 if the answer is a reference but for case, punctuation and white space, else 0."""
    def plain(text: str) -> str:
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        return " ".join(kept.split()) or text.strip()  # "" and "!" are not one answer

    return 100.0 * (plain(answer) in map(plain, references))


def dist_n(texts: Iterable[str], n: int = 4, split: Callable = str.split) -> float:
    """The percentage of different n-grams of words among all in these texts; 0 without any."""
    ngrams = []
    for text in texts:
        words = split(text)
        ngrams += [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
    return 100 * len(set(ngrams)) / max(1, len(ngrams))


@torch.no_grad()
def held_out_loss(model: GPT, examples: Sequence[Example], m: Machine) -> float:
    """The mean of -log q over the tokens of the references, end tokens included, in nats."""
    total = torch.zeros(2, dtype=torch.float64, device=m.device)  # nats, tokens
    longest = max(len(e.response) for e in examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].response))
    for rows in data.slices(order[m.rank :: m.world], m.room(longest, model.config.vocab_size)):
        batch = data.batch_of([examples[i] for i in rows], m.device)
        with m.autocast():
            hidden = batch.predicting(model(batch.tokens))  # (b, T, D)
            logp = taken(model.logits(hidden).log_softmax(-1), batch.response)  # (b, T)
        total[0] -= (logp * batch.response_mask).double().sum()
        total[1] += batch.response_mask.sum()
    m.sum(total)
    return (total[0] / total[1]).item()


def without_repeats(n: int) -> Callable:
    """For sample(): no token that would repeat an n-gram of the prompt or the answer is drawn. The
    released code tests with n = 6, which the paper does not mention."""
    def adjust(logp_vocab: Tensor, rows: list[int], said: Tensor) -> Tensor:
        if said.size(1) < n:
            return logp_vocab
        ngrams = said.unfold(1, n, 1)  # (b, S - n + 1, n)
        latest = said[:, None, said.size(1) - n + 1 :]  # (b, 1, n - 1)
        repeated = (ngrams[..., :-1] == latest).all(-1) & (ngrams >= 0).all(-1)  # padding is -1
        banned = torch.zeros_like(logp_vocab)
        banned.scatter_add_(1, ngrams[..., -1].clamp(min=0), repeated.to(logp_vocab.dtype))
        return logp_vocab.masked_fill(banned > 0, -torch.inf).log_softmax(-1)

    return adjust


def evaluate(model: GPT, tokenizer: tiktoken.Encoding, examples: Sequence[Example], m: Machine,
             draw: Callable, teacher: GPT | None = None, seeds: Sequence[int] = (10,), T: int = 256,
             forward: bool = False, adjust: Callable | None = None,
             words: str = "english") -> tuple[dict, list[dict]]:
    """Answers each prompt once for each seed, by at most T tokens, and scores the answers: {metric:
    its mean for each seed}, and the answers. `draw` samples, and the models are ready for it.

    Of an answer: rouge_l, exact_match; tokens; ended, 100 if it has reached the end token; with a
    teacher reverse_kl, KL[q || p] in nats summed over its positions, and if `forward` forward_kl,
    KL[p || q] along an answer of p; in the built-in world valid, 100 if it is right. Of all answers
    of a seed: dist_4. Of all seeds: dist_4_prompt, the mean over prompts of the dist_4 of their
    answers; in the built-in world covered, the percentage of its facts that they tell."""
    answers = []
    mine = range(m.rank, len(examples), m.world)
    prompts = [examples[i].prompt for i in mine]
    for seed in seeds:
        uniform = uniforms(seed, mine, T)
        rollout = draw(model, prompts, uniform, m, adjust=adjust)
        columns = {"tokens": rollout.response_mask.sum(1), "ended": 100 * rollout.ended}
        if teacher:
            known = follow(model, prompts, rollout.answers, T, m, teacher)
            columns["reverse_kl"] = known.reverse_kl.sum(1)
        if teacher and forward:
            of_teacher = draw(teacher, prompts, uniform, m).answers
            known = follow(teacher, prompts, of_teacher, T, m, model)
            columns["forward_kl"] = known.reverse_kl.sum(1)  # p and q have changed places
        columns = {name: values.tolist() for name, values in columns.items()}
        for n, i in enumerate(mine):
            row = examples[i].row
            text = data.decode(tokenizer, rollout.answers[n])
            scores = {name: values[n] for name, values in columns.items()}
            if tokenizer.name == "words":
                right = rollout.ended[n] and world.read(row.instruction, row.input, text)[0]
                scores["valid"] = 100.0 if right else 0.0
            scores["rouge_l"] = rouge_l(text, row.outputs, words)
            scores["exact_match"] = exact_match(text, row.outputs)
            answers.append({"seed": seed, "prompt": i, "instruction": row.instruction,
                            "input": row.input, "references": row.outputs, "answer": text,
                            "reference_tokens": len(examples[i].response) - row.ended,
                            "scores": scores})
    answers = sorted(m.gather(answers), key=lambda a: (a["seed"], a["prompt"]))
    by_seed = [[a for a in answers if a["seed"] == seed] for seed in seeds]
    means = {}
    for name in answers[0]["scores"]:
        means[name] = [float(np.mean([a["scores"][name] for a in some])) for some in by_seed]
    split = UnicodeWords().tokenize if words == "unicode" else str.split
    means["dist_4"] = [dist_n([a["answer"] for a in some], 4, split) for some in by_seed]
    if len(seeds) > 1:
        by_prompt = [[a["answer"] for a in some] for some in zip(*by_seed)]
        long = [share for texts in by_prompt if (share := dist_n(texts, 4, split))]
        means["dist_4_prompt"] = [float(np.mean(long or [0.0]))]
    if tokenizer.name == "words":
        told = [world.read(a["instruction"], a["input"], a["answer"])[1] for a in answers]
        means["covered"] = [100 * len(set().union(*told)) / world.FACT_COUNT]
    return means, answers


# ---- command ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    model: str = flag("out/tiny/minillm", "a folder, gpt2 ... gpt2-xl, or OWNER/NAME on the hub")
    data: str | None = flag(None, "instruction set or FILE.jsonl, several with commas between, or "
                                  "all for the paper's five; default tiny or dolly, by the model")
    split: Literal["test", "valid"] = flag("test", "which rows; of a FILE.jsonl test is the whole")
    teacher: str | None = flag(None, "measure reverse and forward KL to this model")
    seeds: int = flag(5, "number of seeds, of 10, 20, 30 ...", 1, 1000)
    corpus: str | None = flag(None, "measure the loss on this plain text too: tiny-text, FILE.txt")
    limit: int | None = flag(None, "use the first so many prompts only", 1)
    template: Literal["auto", "paper", "chat"] = flag("auto", "chat: the model's; families/README")
    max_prompt_tokens: int = flag(256, "longer prompts are dropped", 1, 2**20)
    max_response_tokens: int | None = flag(None, "longest answer; default at most 256", 1, 2**20)
    rouge: Literal["english", "unicode"] = flag("english", "Rouge-L's words; unicode: any script")
    no_repeat_ngram: int = flag(0, "say no n-gram twice; the released code: 6", 0, 1024)
    sample_batch: int = flag(64, "answers decoded together; changes memory and speed only", 1)
    decoder: Literal["fast", "captured", "plain"] = flag("fast", "captured: steps as CUDA graphs")
    out: str | None = flag(None, "folder for results.json and samples.jsonl; default: only print")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "autocast's dtype")

    def __post_init__(self):
        check(self)
        check_place(self, "out")


def main(cfg: Config, own: bool = False) -> dict:
    """The results of a set, or of several by name. In a run's `own` folder others are replaced."""
    names = list(data.HUB_SETS) if cfg.data == "all" else (cfg.data or "").split(",")
    if len(names) > 1:
        return evaluate_sets(cfg, names)
    m = machine(cfg.device, cfg.dtype, cfg.sample_batch)
    tokenizer = data.load_tokenizer(cfg.model, cfg.template)
    if cfg.teacher:
        data.same_vocabulary(tokenizer, data.load_tokenizer(cfg.teacher, cfg.template))
    name = cfg.data or ("tiny" if tokenizer.name == "words" else "dolly")
    path = Path(cfg.out) / "results.json" if cfg.out else None
    given = asdict(cfg) | dict.fromkeys(("sample_batch", "decoder", "device"))
    given["weights"] = [runs.checksum(cfg.model), runs.checksum(cfg.teacher)]
    given["files"] = [runs.checksum(cfg.data), runs.checksum(cfg.corpus)]
    if results := runs.earlier(path, given, m, own):
        return results
    draw, ready = decoder(cfg.decoder)
    model = ready(load(cfg.model, m.device, m.dtype), m.dtype)
    teacher = ready(load(cfg.teacher, m.device, m.dtype), m.dtype) if cfg.teacher else None
    room = min(g.config.n_positions for g in (model, teacher) if g)
    longest, T = lengths(room, cfg.max_prompt_tokens, cfg.max_response_tokens)
    whole = min(longest + T, room)
    examples = data.load_examples(name, cfg.split, tokenizer, longest, whole, m.say)[: cfg.limit]
    seeds = [10 * (n + 1) for n in range(cfg.seeds)]
    began = time.perf_counter()
    adjust = without_repeats(cfg.no_repeat_ngram) if cfg.no_repeat_ngram else None
    means, answers = evaluate(model, tokenizer, examples, m, draw, teacher, seeds, T, True, adjust,
                              cfg.rouge)
    means["loss"] = [held_out_loss(model, examples, m)]
    if cfg.corpus:
        length = min(512, model.config.n_positions)
        pieces = data.load_pieces(cfg.corpus, tokenizer, Path(cfg.out or "out/x"), length, m)[:200]
        means["text_loss"] = [held_out_loss(model, pieces, m)]
    results = {"command": command(), "given": given, "data": name, "prompts": len(examples),
               "seeds": seeds, "parameters": model.config.parameters,
               "seconds": time.perf_counter() - began, "peak_gib": runs.peak_gib(m.device),
               "rouge_sees": letters_seen(examples, cfg.rouge), "scores": means}
    show(results, m)
    return runs.keep(results, path, m, "samples.jsonl", answers)


def evaluate_sets(cfg: Config, names: list[str]) -> dict:
    """The results of each set by its name, in a folder each. Plain text is measured once."""
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(names):
        raise UserError(f"--data={cfg.data}: two sets have one name; evaluate them one by one")
    data.load_tokenizer(cfg.model)  # what is missing is told before any set is worked on
    for name in names:
        data.load_rows(name, cfg.split)
    results = {}
    for name, stem in zip(names, stems):
        out = str(Path(cfg.out) / stem) if cfg.out else None
        corpus = cfg.corpus if name == names[0] else None
        results[name] = main(replace(cfg, data=name, out=out, corpus=corpus))
    return results


def show(results: dict, m: Machine) -> None:
    m.say(f"{results['given']['model']} on {results['data']}, {results['prompts']:,} prompts; mean "
          f"and standard deviation over {len(results['seeds'])} seeds")
    for metric, values in results["scores"].items():
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        blind = metric == "rouge_l" and results["rouge_sees"] < 50
        mark = f" (blind: it sees {results['rouge_sees']:.0f}% of the references)" if blind else ""
        m.say(f"  {metric:14}{np.mean(values):9.3f}{spread}{mark}")
    m.say(f"  took {runs.clock(results['seconds'])} and at most {results['peak_gib']:.1f} GiB, on "
          f"{m.device} in {str(m.dtype)[6:]}")


if __name__ == "__main__":
    run(main, Config)
