"""Exposure bias: how much a student's error grows because it goes on from its own words instead of the teacher's.

Paper:    arXiv 2306.08543v4, Section 3.3, Figure 6, and Appendix B.5, Eqs. (30) to (32).
Run:      python exposure.py --model=out/tiny/minillm --teacher=out/tiny/teacher
          python exposure.py --model=MiniLLM/MiniLLM-gpt2-120M --teacher=MiniLLM/teacher-gpt2-1.5B --out=out/exposure
Shapes:   N prompts, l up to T response tokens. An error is KL[p || q] at one position, exact over the vocabulary.
Left out: the decoding rules with which the released script samples, which are neither q's nor p's.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
from config import Machine, check, check_place, checksum, command, flag, machine, run
from eval import earlier, keep
from model import GPT, frozen, load, same_vocabulary
from sample import follow, room_for_answers, sample, uniforms


def errors(student: GPT, teacher: GPT, prompts: Sequence[list[int]], samples: int, T: int, m: Machine, seed: int = 0,
           batch_size: int = 64) -> np.ndarray:
    """(4, N, T): the errors along answers of q, summed over `samples` answers to each prompt, and the number of answers
    that reach the position; then the same two along answers of p. Pass `frozen` models."""
    totals = torch.zeros(4, len(prompts), T, dtype=torch.float64, device=m.device)
    mine = list(range(m.rank, len(prompts), m.world))
    mine_prompts = [prompts[i] for i in mine]
    for n in range(samples):
        # the same draws for q and p: what differs between their answers is not chance
        uniform = uniforms(seed, [n * len(prompts) + i for i in mine], T)
        for at, speaker, whose in ((0, student, "student"), (2, teacher, "teacher")):
            rollout = sample(speaker, mine_prompts, uniform, m, batch_size=batch_size,
                             progress=f"sample {n + 1} of {samples}, {whose}")
            known = follow(teacher, mine_prompts, rollout.answers, T, m, student)  # p stands first: it is KL[p || q]
            totals[at, mine] += known.reverse_kl.double()
            totals[at + 1, mine] += known.response_mask.double()
    m.sum(totals)
    return totals.cpu().numpy()


def excess(totals: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R(l), eps(l) and ExAccErr(l) in percent, (..., l) each, for l = 1, 2 ... while one answer in a hundred goes on.

    totals (4, N, T) is what errors() returns; weights (..., N), how often a bootstrap draws each prompt. The equations
    say nothing of answers that end: here E_{y_<t ~ q} and E_{y_<t ~ p} are over the answers that reach t."""
    weights = np.ones(totals.shape[1]) if weights is None else weights
    alive = totals[1::2].sum(1)  # (2, T)
    l = int((alive >= np.maximum(1, alive[:, :1] / 100)).all(0).sum())
    q_error, q_alive, p_error, p_alive = (weights @ total[:, :l] for total in totals)  # (..., l)
    with np.errstate(divide="ignore", invalid="ignore"):
        R = (q_error / q_alive).cumsum(-1)  # Eq. (30)
        l_eps = (p_error / p_alive).cumsum(-1)
        return R, l_eps / np.arange(1, l + 1), 100 * (R - l_eps) / l_eps  # Eqs. (31), (32)


# ---- command --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    model: str = flag("out/tiny/minillm", "the student q: a folder, gpt2 ... gpt2-xl, OWNER/NAME on the hub")
    teacher: str = flag("out/tiny/teacher", "p: likewise")
    data: str | None = flag(None, "prompts: an instruction set or FILE.jsonl; default tiny or dolly, as the model is")
    split: Literal["test", "valid"] = flag("test", "which rows of it")
    samples: int = flag(10, "answers of q and of p to each prompt")
    limit: int | None = flag(None, "use the first so many prompts only")
    max_prompt_tokens: int = flag(256, "longer prompts are dropped")
    max_response_tokens: int | None = flag(None, "longest answer; default 256, or what the model has room for")
    seed: int = flag(0, "of the draws")
    batch_size: int = flag(64, "answers decoded together; changes memory and speed only")
    capture: bool = flag(False, "on a GPU: record a decoding step as a CUDA graph, and replay it")
    out: str | None = flag(None, "folder for exposure.json; default: only print")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "what autocast computes in")

    def __post_init__(self):
        check(self, samples=(1, 10**6), limit=(1, 10**9), max_prompt_tokens=(1, 1023), max_response_tokens=(1, 1023),
              seed=(0, 2**62), batch_size=(1, 10**5))
        check_place(self, "out")


def main(cfg: Config) -> dict:
    m, tokenizer = machine(cfg.device, cfg.dtype, capture=cfg.capture), data.load_tokenizer(cfg.model)
    given = asdict(cfg) | dict.fromkeys(("batch_size", "capture", "device"))
    given |= {"weights": [checksum(cfg.model), checksum(cfg.teacher)], "files": [checksum(cfg.data)]}
    path = Path(cfg.out) / "exposure.json" if cfg.out else None
    name = cfg.data or ("tiny" if tokenizer.name == "words" else "dolly")
    if results := earlier(path, given, name, m):
        return results
    student, teacher = load(cfg.model, m.device), load(cfg.teacher, m.device)
    same_vocabulary(student.config, teacher.config)
    room = min(student.config.n_positions, teacher.config.n_positions)
    examples = data.load_examples(name, cfg.split, tokenizer, cfg.max_prompt_tokens, room, m.say)[: cfg.limit]
    prompts = [example.prompt for example in examples]
    T = cfg.max_response_tokens or min(room_for_answers(model, prompts) for model in (student, teacher))
    totals = errors(frozen(student, m.dtype), frozen(teacher, m.dtype), prompts, cfg.samples, T, m, cfg.seed,
                    cfg.batch_size)
    R, eps, ex_acc_err = excess(totals)
    again = np.random.default_rng(0).multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), 500)
    low, high = np.quantile(excess(totals, again)[2], [0.025, 0.975], axis=0)
    m.say(f"{cfg.model} of {cfg.teacher} on {name}: {len(prompts):,} prompts, {cfg.samples} answers each")
    m.say(f"{'l':>5}{'R(l)':>11}{'l eps(l)':>11}{'ExAccErr(l) %':>16}   95%, other prompts")
    last = len(R)
    for l in sorted({*(2**n for n in range(last.bit_length())), last}):
        m.say(f"{l:5}{R[l - 1]:11.4f}{l * eps[l - 1]:11.4f}{ex_acc_err[l - 1]:16.2f}   {low[l - 1]:.2f} to "
              f"{high[l - 1]:.2f}")
    columns = {"R": R, "eps": eps, "ex_acc_err": ex_acc_err, "low": low, "high": high,
               "q_answers": totals[1].sum(0)[:last], "p_answers": totals[3].sum(0)[:last]}
    results = {"command": command(), "given": given, "data": name, "prompts": len(prompts), "samples": cfg.samples}
    results |= {key: [x if np.isfinite(x) else None for x in column.tolist()] for key, column in columns.items()}
    return keep(results, path, m)


if __name__ == "__main__":
    run(main, Config)
