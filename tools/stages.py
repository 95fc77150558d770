"""The stages of a run: which of them it needs, with which settings, and the table at its end.

Paper:    arXiv 2306.08543v4, Algorithm 1, whose phase 1 is the stage "init", and Section 3.1 with
          the baselines. distill.py runs the stages, and tools/plan.py tells what they take.
Left out: the search over learning rates of Appendix B.1.
"""

import os
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import data
import distill
import eval as evaluation
import sample as sampling
import teacher as supervised
from config import UserError, machine, make
from families import is_gpt2
from model import is_shape
from safe import runs
from safe.files import read_json, write_json, written_aside
from safe.hub import tensor_names, weight_files
from safe.rows import is_file_of_rows

# The supervised stages of the built-in world. Rouge-L is chance there, where a reference is one of
# very many right answers: the last weights are kept, and phase 1's of the lowest loss.
TINY_TEACHER = dict(updates=1000, lr=1e-2, batch_size=64, select="last", evals=1)
TINY_INIT = dict(updates=2000, lr=1.6e-2, batch_size=64, evals=4)
TINY_BASELINE = dict(batch_size=64, select="last", evals=4)
TINY_RATES = {"sft": 8e-3, "kd": 1.6e-2, "seqkd": 2e-3}  # by reproduce/search.py
GPT2S = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
AS_RELEASED = {*GPT2S, *(f"openai-community/{name}" for name in GPT2S), "distilgpt2",
               "distilbert/distilgpt2"}


@dataclass(frozen=True)
class Stages:
    """The settings of each stage; None for one that is not needed."""
    teacher: supervised.Config | None
    init: supervised.Config | None
    answers: sampling.Config | None
    baselines: dict[str, supervised.Config]
    minillm: distill.Config
    decided: tuple[str, ...] = ()  # which models are fine-tuned first, and why


def has_learned(name: str) -> tuple[bool, str]:
    """Whether a model has learned to follow instructions, and what tells so: its own note of how it
    was made, the hub's repository, the form of its weights, but not what its folder is called."""
    folder = Path(name)
    cached = re.search(r"models--([^/]+)/snapshots/[0-9a-f]+$", str(folder.resolve()))
    trained_on = None
    if (folder / "run.json").is_file():
        trained_on = read_json(folder / "run.json").get("data")
        if not (folder / "results.json").is_file():
            raise UserError(f"{name} holds an unfinished run: finish it with --resume first")
    if isinstance(trained_on, str):  # not data.is_text(), as a folder of text may be gone
        learned = is_file_of_rows(trained_on) or trained_on in ("tiny", *data.HUB_SETS)
        return learned, f"its run.json says that it learned {trained_on}"
    repository = cached[1].replace("--", "/") if cached else name
    if repository in AS_RELEASED and (cached or not folder.is_dir()):
        return False, f"{repository} on the hub is as released"
    if not is_gpt2(name):
        chats = data.load_tokenizer(name).whole.chat_template is not None
        return chats, f"its tokenizer has {'a' if chats else 'no'} chat template"
    if cached or not folder.is_dir():
        return True, f"{repository} on the hub is not as released"
    if "wte.weight" in tensor_names(weight_files(name)[0]):
        return False, "its weights have the names of those released"
    return True, "its weights have been saved by a trainer"


def is_raw(name: str, role: str, cfg: distill.Config) -> tuple[bool, str]:
    """Whether a model is fine-tuned on D first, and, unless it is new, a line that says why."""
    if is_shape(name):
        if cfg.finetune not in ("auto", "both", role):
            raise UserError(f"--{role}={name} is new and has to be trained: leave --finetune as it "
                            "is")
        return True, ""
    learned, reason = has_learned(name)
    raw = not learned
    if cfg.finetune != "auto":
        raw, reason = cfg.finetune in ("both", role), f"--finetune={cfg.finetune}"
    done = "is fine-tuned first" if raw else "is taken as it is"
    return raw, f"{role} {name} {done}: {reason}; --finetune=both, teacher, student or none decides"


def stages(cfg: distill.Config) -> Stages:
    """What comes before phase 2 and beside it. Raises UserError for settings that cannot work."""
    result = os.path.realpath(f"{cfg.out}/minillm")
    if result in (os.path.realpath(cfg.teacher), os.path.realpath(cfg.student)):
        raise UserError(f"{result} would overwrite --teacher or --student: give another --out")
    if runs.same(cfg.teacher, cfg.student) and cfg.finetune != "student" and not is_raw(
            cfg.teacher, "teacher", cfg)[0]:
        raise UserError(f"--teacher and --student are both {cfg.teacher}: it has nothing to learn "
                        "from itself")
    if cfg.pt_kd and not cfg.pt_coef and cfg.recipe == "paper":
        raise UserError(f"--pt_kd={cfg.pt_kd} is a share of L_PT, which --pt_coef=0 leaves out: "
                        "give --pt_coef too")
    wanted = cfg.baselines.split(",") if cfg.baselines else []
    if not set(wanted) <= {"sft", "kd", "seqkd"} or len(wanted) > len(set(wanted)):
        raise UserError(f"--baselines={cfg.baselines}: give some of sft, kd, seqkd, once each")
    out, tiny = cfg.out, cfg.preset == "tiny"
    same = ("data", "template", "max_prompt_tokens", "max_tokens", "seed", "micro_batch",
            "sample_batch", "recompute", "compile", "shard", "resume", "device", "dtype")
    common = {name: getattr(cfg, name) for name in same} | {"decoder": cfg.one_model_decoder}

    def training(name: str, **settings) -> supervised.Config:
        return make(supervised.Config, common | {"out": f"{out}/{name}"} | settings)

    teacher = init = answers = None
    names = {"teacher": cfg.teacher, "student": cfg.student}
    teacher_is_raw, why_teacher = is_raw(cfg.teacher, "teacher", cfg)
    student_is_raw, why_student = is_raw(cfg.student, "student", cfg)
    if teacher_is_raw:
        teacher = training("teacher", model=cfg.teacher, **(TINY_TEACHER if tiny else {}))
        names["teacher"] = teacher.out
    if student_is_raw:
        recipe = TINY_INIT if tiny else {"epochs": 3}
        init = training("init", model=cfg.student, select="loss", **recipe)
        names["student"] = init.out
    # In the built-in world a baseline goes on from phase 1 for as many updates as MiniLLM. Else it
    # begins with --student and has its own recipe.
    recipe = dict(model=names["student"], updates=cfg.steps, **TINY_BASELINE)
    recipe = recipe if tiny else dict(model=cfg.student)
    baselines = {}
    for name in wanted:
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
                dtype=cfg.dtype, template=cfg.template)
            more = {"data": answers.out, "valid_data": cfg.data}
        if tiny:
            more["lr"] = TINY_RATES[name]
        baselines[name] = training(name, **recipe | more)
    return Stages(teacher, init, answers, baselines, replace(cfg, **names),
                  tuple(line for line in (why_teacher, why_student) if line))


def evaluate(cfg: distill.Config) -> list[dict]:
    """Evaluates every model of a run on held-out rows, and writes and prints the table."""
    m = machine(cfg.device, cfg.dtype)
    out = Path(cfg.out)
    models = {"teacher": cfg.teacher, "init": cfg.student}
    asked = cfg.baselines.split(",")
    for name in ("sft", "kd", "seqkd", "minillm"):
        if (out / name / "results.json").is_file():
            if name == "minillm" or name in asked:
                models[name] = str(out / name)
            else:
                m.say(f"{out / name} is not evaluated, as --baselines does not name it")
    split = "valid" if is_file_of_rows(cfg.data) else "test"  # of a file the held-out rows
    sees = 100.0
    table = []
    for method, model in models.items():
        settings = evaluation.Config(
            model=model, data=cfg.data, split=split, teacher=cfg.teacher, device=cfg.device,
            out=f"{out}/test/{method}", max_prompt_tokens=cfg.max_prompt_tokens,
            max_response_tokens=cfg.response_tokens, sample_batch=cfg.sample_batch,
            decoder=cfg.one_model_decoder, dtype=cfg.dtype, template=cfg.template)
        results = evaluation.main(settings, own=True)
        scores, sees = results["scores"], results["rouge_sees"]
        spread = {name: float(np.std(x, ddof=1)) for name, x in scores.items() if len(x) > 1}
        means = {name: float(np.mean(x)) for name, x in scores.items()}
        table.append({"method": method, **means, "std": spread})
    if m.rank == 0:
        write_json(out / "results.json", table)
    columns = ("valid", "covered", "rouge_l", "reverse_kl", "forward_kl", "loss", "tokens")
    columns = [name for name in columns if name in table[0]]
    m.say(f"\n{'method':10}" + "".join(f"{name:>12}" for name in columns))
    for row in table:
        m.say(f"{row['method']:10}" + "".join(f"{row[name]:12.3f}" for name in columns))
    if m.rank == 0 and "covered" in table[0]:
        from measure.report import trade_figure  # it imports distill.py
        points = {row["method"]: ([row["covered"]], [row["valid"]]) for row in table}
        with written_aside(out / "first-run.png") as aside:
            aside.write_bytes(trade_figure([], points).png)
    if sees < 50:
        m.say(f"rouge_l is blind here: it sees {sees:.0f}% of the references' letters; eval.py "
              "--rouge=unicode reads any script")
    m.say(f"written to {out / 'results.json'}; the student is {out / 'minillm'}")
    return table
