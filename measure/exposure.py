"""Exposure bias: how much more a student errs after its own words than after the teacher's.

Paper:    arXiv 2306.08543v4, Section 3.3, Figure 6, and Appendix B.5, Eqs. (30) to (32).
Run:      python -m measure.exposure --model=out/tiny/minillm --teacher=out/tiny/teacher
          python -m measure.exposure --model=gpt2 --teacher=gpt2-xl --out=out/exposure
Shapes:   N prompts, l up to T response tokens. An error is KL[p || q] at one position, computed
          over the whole vocabulary.
Left out: the decoding rules of the released script, which samples from neither q nor p.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import data
from config import Machine, check, command, flag, machine, run
from model import GPT, load
from safe import runs
from safe.files import check_place
from sample import decoder, follow, lengths, sample, uniforms


def errors(student: GPT, teacher: GPT, prompts: Sequence[list[int]], samples: int, T: int,
           m: Machine, seed: int = 0, draw: Callable = sample) -> np.ndarray:
    """Sums over `samples` answers to each prompt, (4, N, T): the errors along answers of q, and how
    many of them reach the position; then the same two along answers of p. `draw` samples, and the
    models are ready for it."""
    totals = torch.zeros(4, len(prompts), T, dtype=torch.float64, device=m.device)
    mine = list(range(m.rank, len(prompts), m.world))
    mine_prompts = [prompts[i] for i in mine]
    quiet = True if m.rank else None  # None: quiet unless a terminal shows it
    for n in tqdm(range(samples), "samples", leave=False, delay=2, disable=quiet):
        # The same draws for q and p, so that chance does not make their answers differ.
        uniform = uniforms(seed, [n * len(prompts) + i for i in mine], T)
        for at, speaker in ((0, student), (2, teacher)):
            answers = draw(speaker, mine_prompts, uniform, m).answers
            # p comes first here, so the KL that follow() calls reverse is KL[p || q]
            known = follow(teacher, mine_prompts, answers, T, m, student)
            totals[at, mine] += known.reverse_kl.double()
            totals[at + 1, mine] += known.response_mask.double()
    m.sum(totals)
    return totals.cpu().numpy()


def excess(totals: np.ndarray,
           weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R(l), eps(l) and ExAccErr(l) in percent, (..., l) each, for l = 1, 2 and so on, as long as at
    least one answer in a hundred goes on.

    totals (4, N, T) is what errors() returns; weights (..., N) says how often each prompt counts.
    The equations do not mention that answers end: here a mean is over those that reach t."""
    weights = np.ones(totals.shape[1]) if weights is None else weights
    alive = totals[1::2].sum(1)  # (2, T)
    l = int((alive >= np.maximum(1, alive[:, :1] / 100)).all(0).sum())
    q_error, q_alive, p_error, p_alive = (weights @ total[:, :l] for total in totals)  # (..., l)
    with np.errstate(divide="ignore", invalid="ignore"):
        R = (q_error / q_alive).cumsum(-1)  # Eq. (30)
        l_eps = (p_error / p_alive).cumsum(-1)
        return R, l_eps / np.arange(1, l + 1), 100 * (R - l_eps) / l_eps  # Eqs. (31), (32)


# ---- command ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    model: str = flag("out/tiny/minillm", "q: a folder, gpt2 ... gpt2-xl, or OWNER/NAME on the hub")
    teacher: str = flag("out/tiny/teacher", "p, by the same kinds of name")
    data: str | None = flag(None, "prompts: tiny, dolly, FILE.jsonl ...; default by the model")
    split: Literal["test", "valid"] = flag("test", "which rows; of a FILE.jsonl test is the whole")
    template: Literal["auto", "paper", "chat"] = flag("auto", "chat: the model's; families/README")
    samples: int = flag(10, "answers of q and of p to each prompt")
    limit: int | None = flag(None, "use the first so many prompts only")
    max_prompt_tokens: int = flag(256, "longer prompts are dropped")
    max_response_tokens: int | None = flag(None, "longest answer; default 256, or what fits")
    seed: int = flag(0, "seed of the draws")
    sample_batch: int = flag(64, "answers decoded together; changes memory and speed only")
    decoder: Literal["fast", "captured", "plain"] = flag("fast", "captured: steps as CUDA graphs")
    out: str | None = flag(None, "folder for exposure.json; default: only print")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "autocast's dtype")

    def __post_init__(self):
        check(self, samples=(1, 10**6), limit=(1, 10**9), max_prompt_tokens=(1, 2**20),
              max_response_tokens=(1, 2**20), seed=(0, 2**62), sample_batch=(1, 10**5))
        check_place(self, "out")


def main(cfg: Config) -> dict:
    m = machine(cfg.device, cfg.dtype, cfg.sample_batch)
    tokenizer = data.load_tokenizer(cfg.model, cfg.template)
    data.same_vocabulary(tokenizer, data.load_tokenizer(cfg.teacher, cfg.template))
    name = cfg.data or ("tiny" if tokenizer.name == "words" else "dolly")
    path = Path(cfg.out) / "exposure.json" if cfg.out else None
    given = asdict(cfg) | dict.fromkeys(("sample_batch", "decoder", "device"))
    given["weights"] = [runs.checksum(cfg.model), runs.checksum(cfg.teacher)]
    given["files"] = [runs.checksum(cfg.data)]
    if results := runs.earlier(path, given, m):
        return results
    draw, ready = decoder(cfg.decoder)
    models = [ready(load(model, m.device, m.dtype), m.dtype) for model in (cfg.model, cfg.teacher)]
    room = min(model.config.n_positions for model in models)
    longest, T = lengths(room, cfg.max_prompt_tokens, cfg.max_response_tokens)
    examples = data.load_examples(name, cfg.split, tokenizer, longest, room, m.say)
    prompts = [example.prompt for example in examples[: cfg.limit]]
    totals = errors(*models, prompts, cfg.samples, T, m, cfg.seed, draw)
    R, eps, ex_acc_err = excess(totals)
    N = len(prompts)
    bootstrap = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), 500)  # (500, N)
    low, high = np.quantile(excess(totals, bootstrap)[2], [0.025, 0.975], axis=0)
    last = len(R)
    columns = {"R": R, "eps": eps, "ex_acc_err": ex_acc_err, "low": low, "high": high,
               "q_answers": totals[1].sum(0)[:last], "p_answers": totals[3].sum(0)[:last]}
    m.say(f"{cfg.model} of {cfg.teacher} on {name}: {N:,} prompts, {cfg.samples} answers each")
    m.say(f"{'l':>5}{'R(l)':>11}{'l eps(l)':>11}{'ExAccErr(l) %':>16}   95% interval over prompts")
    for l in sorted({*(2**n for n in range(last.bit_length())), last}):
        m.say(f"{l:5}{R[l - 1]:11.4f}{l * eps[l - 1]:11.4f}{ex_acc_err[l - 1]:16.2f}   "
              f"{low[l - 1]:.2f} to {high[l - 1]:.2f}")
    results = {"command": command(), "given": given, "data": name, "prompts": N,
               "samples": cfg.samples}
    for key, column in columns.items():  # JSON has no NaN
        results[key] = [x if np.isfinite(x) else None for x in column.tolist()]
    return runs.keep(results, path, m)


if __name__ == "__main__":
    run(main, Config)
