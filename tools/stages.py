"""The stages of a run: which of them it needs, and with which settings.

Paper:    arXiv 2306.08543v4, Algorithm 1, whose phase 1 is the stage "init", and Section 3.1 with
          the baselines. distill.py runs the stages, and tools/plan.py tells what they take.
Left out: the search over learning rates of Appendix B.1.
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import distill
import sample as sampling
import teacher as supervised
from config import UserError, make
from model import is_shape
from safe import runs

# The supervised stages of the built-in world. Rouge-L is chance there, where a reference is one of
# very many right answers: the last weights are kept, and phase 1's of the lowest loss.
TINY_TEACHER = dict(updates=800, lr=6e-3, batch_size=32, select="last", evals=1)
TINY_INIT = dict(updates=1000, lr=1.2e-2, batch_size=64, evals=4)
TINY_BASELINE = dict(lr=6e-3, batch_size=64, select="last", evals=4)
AS_RELEASED = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}


@dataclass(frozen=True)
class Stages:
    """The settings of each stage; None for one that is not needed."""
    teacher: supervised.Config | None
    init: supervised.Config | None
    answers: sampling.Config | None
    baselines: dict[str, supervised.Config]
    minillm: distill.Config


def is_raw(name: str, role: str, cfg: distill.Config) -> bool:
    """Whether a model has yet to learn to follow instructions: it is new, or GPT-2 as released."""
    if is_shape(name) and cfg.finetune not in ("auto", "both", role):
        raise UserError(f"--{role}={name} is new and has to be trained: leave --finetune as it is")
    raw = is_shape(name) or Path(name).name in AS_RELEASED
    return raw if cfg.finetune == "auto" else cfg.finetune in ("both", role)


def stages(cfg: distill.Config) -> Stages:
    """What comes before phase 2 and beside it. Raises UserError for settings that cannot work."""
    out, tiny = cfg.out, cfg.preset == "tiny"
    same = ("data", "max_prompt_tokens", "max_tokens", "seed", "micro_batch", "sample_batch",
            "recompute", "compile", "resume", "device", "dtype")
    common = {name: getattr(cfg, name) for name in same} | {"decoder": cfg.one_model_decoder}

    def training(name: str, **settings) -> supervised.Config:
        return make(supervised.Config, common | {"out": f"{out}/{name}"} | settings)

    teacher = init = answers = None
    names = {"teacher": cfg.teacher, "student": cfg.student}
    if is_raw(cfg.teacher, "teacher", cfg):
        teacher = training("teacher", model=cfg.teacher, **(TINY_TEACHER if tiny else {}))
        names["teacher"] = teacher.out
    if is_raw(cfg.student, "student", cfg):
        recipe = TINY_INIT if tiny else {"epochs": 3}
        init = training("init", model=cfg.student, select="loss", **recipe)
        names["student"] = init.out
    # In the built-in world a baseline goes on from phase 1 for as many updates as MiniLLM. Else it
    # begins with --student and has its own recipe.
    recipe = dict(model=names["student"], updates=cfg.steps, **TINY_BASELINE)
    recipe = recipe if tiny else dict(model=cfg.student)
    baselines = {}
    for name in cfg.baselines.split(",") if cfg.baselines else []:
        more = {"teacher": names["teacher"]} if name == "kd" else {}
        if name == "seqkd":  # other settings write another file
            asked = (names["teacher"], runs.checksum(cfg.teacher), cfg.data,
                     runs.checksum(cfg.data), cfg.max_prompt_tokens, cfg.max_tokens, cfg.seed,
                     cfg.dtype)
            answers = sampling.Config(
                model=names["teacher"], data=cfg.data, split="train", seed=cfg.seed,
                out=f"{out}/answers-{zlib.crc32(repr(asked).encode()):08x}.jsonl",
                max_prompt_tokens=cfg.max_prompt_tokens, max_response_tokens=cfg.response_tokens,
                sample_batch=cfg.sample_batch, decoder=cfg.one_model_decoder, device=cfg.device,
                dtype=cfg.dtype)
            more = {"data": answers.out, "valid_data": cfg.data}
        baselines[name] = training(name, **recipe | more)
    return Stages(teacher, init, answers, baselines, replace(cfg, **names))
