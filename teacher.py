"""Supervised training: the teacher p, the student's phase 1, and the baselines SFT, KD and SeqKD.

Paper:    arXiv 2306.08543v4, Section 3.1, Appendix B.1 (recipes by size), and phase 1 of Algorithm 1. The optimizer's
          step, and what a run is resumed from, are here for distill.py too.
Run:      python teacher.py --model=gpt2-xl --out=out/teacher                                the teacher; SFT likewise
          python teacher.py --model=gpt2 --select=loss --epochs=3 --out=out/init             phase 1 of the student
          python teacher.py --model=gpt2 --teacher=out/teacher --out=out/kd                  KD
          python teacher.py --model=gpt2 --data=out/answers.jsonl --valid_data=dolly --out=out/seqkd         SeqKD
          python teacher.py --model=4x4x128 --data=text.txt --updates=2000 --out=out/base    a new GPT-2, from text
Shapes:   B rows, T response tokens, N response tokens of several rows, D width, V vocabulary.
Left out: the paper's search over learning rates (give --lr); LoRA; ZeRO and FSDP.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tiktoken
import torch
from torch import Tensor

import data
from config import (
    Machine,
    Stop,
    Stopped,
    UserError,
    check,
    check_place,
    checksum,
    clock,
    command,
    flag,
    held,
    machine,
    read_json,
    run,
    write_json,
    written_aside,
)
from data import Example
from eval import evaluate, held_out_loss
from model import (
    GPT,
    GPTConfig,
    by_chunks,
    check_zip,
    frozen,
    is_shape,
    learn_by_chunks,
    load,
    new,
    new_config,
    predicting,
    read_config,
    same_vocabulary,
    save,
    trained,
)
from sample import taken


@dataclass(frozen=True)
class Config:
    model: str = flag("gpt2", "begin with: a folder, gpt2 ... gpt2-xl, OWNER/NAME, or LAYERSxHEADSxWIDTH for a new one")
    out: str = flag("out/sft", "folder of the result")
    data: str = flag("dolly", "instructions: dolly, tiny, FILE.jsonl; or plain text: FILE.txt, a folder, openwebtext")
    valid_data: str | None = flag(None, "validate on this instruction set instead of the data's own rows")
    teacher: str | None = flag(None, "p of word-level KD; without one the loss is that of the data alone")
    kd_ratio: float = flag(0.5, "share of KL[p || q] in the loss if there is a teacher; the rest is the data's")
    lr: float | None = flag(None, "peak learning rate; default by the model's size, see RECIPES")
    lr_end: float = flag(1e-7, "learning rate at the end of the cosine")
    epochs: int | None = flag(None, "passes over the data; default by the model's size")
    updates: int | None = flag(None, "optimizer steps, instead of epochs")
    batch_size: int = flag(32, "samples of an update")
    micro_batch: int = flag(8, "samples of a forward pass; changes memory and speed only, and the draws of dropout")
    sample_batch: int = flag(64, "answers decoded together in validation; changes memory and speed only")
    vocab_chunk: int | None = flag(None, "positions whose logits exist at a time; likewise; default by device")
    recompute: bool = flag(False, "make each layer again in the backward pass: less memory, a third more time")
    compile: bool = flag(False, "torch.compile the trained model; changes speed, rounding and dropout's draws only")
    weight_decay: float = flag(0.01, "of AdamW")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    dropout: float | None = flag(None, "while training; default as in the model's config.json")
    select: Literal["rouge_l", "loss", "last"] = flag("rouge_l", "validation that picks the weights to keep")
    valid_limit: int = flag(1000, "validation rows used")
    evals: int | None = flag(None, "validations in all; default one an epoch, or ten if --updates is given")
    max_prompt_tokens: int = flag(256, "longer prompts are dropped")
    max_tokens: int = flag(512, "longer samples are dropped; length of a piece of plain text")
    seed: int = flag(10, "of order, dropout and new weights")
    log_every: int = flag(1, "updates between printed lines; log.jsonl has them all")
    resume: bool = flag(False, "go on with an unfinished run")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "what autocast computes in")

    def __post_init__(self):
        check(self, kd_ratio=(0, 1), lr=(0, 10), lr_end=(0, 10), epochs=(1, 10**6), updates=(1, 10**9),
              batch_size=(1, 10**6), micro_batch=(1, 10**6), sample_batch=(1, 10**6), vocab_chunk=(1, 10**9),
              weight_decay=(0, 10), grad_clip=(1e-9, math.inf), dropout=(0, 0.99), valid_limit=(1, 10**9),
              evals=(1, 10**6), max_prompt_tokens=(1, 1022), max_tokens=(2, 1024), seed=(0, 2**62),
              log_every=(1, 10**9))
        check_place(self, "out")
        if os.path.realpath(self.model) == os.path.realpath(self.out):
            raise UserError(f"--model={self.model} would be overwritten by its own result: give another --out")
        if self.epochs and self.updates:
            raise UserError("--epochs and --updates both say how long to train: give one")
        if not data.is_text(self.data):
            if self.max_prompt_tokens >= self.max_tokens:
                raise UserError(f"--max_prompt_tokens={self.max_prompt_tokens} leaves no room for an answer in "
                                f"--max_tokens={self.max_tokens}")
        elif self.select == "rouge_l":
            raise UserError(f"--data={self.data} is plain text, without answers to compare: give --select=loss or last")
        elif self.valid_data:
            raise UserError(f"--valid_data={self.valid_data} goes with instructions; --data={self.data} is plain text, "
                            "whose last pieces validate")


# (parameters up to, learning rate, epochs): what the released scripts chose from Appendix B.1's grids
RECIPES = ((200e6, 5e-4, 20), (600e6, 1e-4, 20), (1.3e9, 1e-4, 10), (math.inf, 5e-5, 10))
# Flags that change no result but by rounding and dropout's draws: a run may be resumed with others, or found finished.
FREE = {"resume", "device", "log_every", "micro_batch", "sample_batch", "vocab_chunk", "recompute", "compile", "out"}


def schedule(cfg: Config, config: GPTConfig, rows: int) -> tuple[int, int, float]:
    """(updates, validations, peak learning rate) by the flags, and where those are silent by RECIPES."""
    _, lr, epochs = next(recipe for recipe in RECIPES if config.parameters <= recipe[0])
    epochs = cfg.epochs or epochs
    updates = cfg.updates or math.ceil(epochs * rows / cfg.batch_size)
    evals = cfg.evals or (10 if cfg.updates else epochs)
    return updates, min(updates, evals), lr if cfg.lr is None else cfg.lr


def answer_loss(model: GPT, batch: Sequence[Example], m: Machine, teacher: GPT | None = None, kd_ratio: float = 0.0,
                backward: Callable | None = None) -> tuple[Tensor, Tensor]:
    """Two sums over the response tokens of a batch, end tokens included: of -log q(y_t), and of the loss to train with,
    (1 - kd_ratio) (-log q(y_t)) + kd_ratio KL[p || q]. `backward`, if given, is called with sums of that loss over a
    chunk of tokens and takes them backward; the results have no gradients then."""
    tokens, response, mask = data.pad_right([e.prompt for e in batch], [e.response for e in batch], m.device)
    where = predicting([e.prompt for e in batch], mask)

    def terms(head: Tensor, hidden: Tensor, y: Tensor, teacher_hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_q = model.logits(hidden, head).log_softmax(-1)  # (chunk, V)
        gold = -taken(log_q, y)
        if teacher_hidden is None:
            return gold, gold
        log_p = teacher.logits(teacher_hidden).log_softmax(-1)
        return (1 - kd_ratio) * gold + kd_ratio * (log_p.exp() * (log_p - log_q)).sum(-1), gold

    with m.autocast():
        rows = [model(tokens, where=where), response[mask]]  # (N, D), (N,)
        if teacher is not None:
            with torch.no_grad():
                rows.append(teacher(tokens, where=where))  # (N, D)
        if backward:
            loss, gold = learn_by_chunks(terms, m.vocab_chunk, backward, model, *rows)  # (N,) each
        else:
            loss, gold = by_chunks(partial(terms, model.head()), m.vocab_chunk, *rows)
    return gold.detach().sum(), loss.sum()


def accumulate(micro_batch: int, batch: Sequence[Example], count: int, seed: int, model: GPT, teacher: GPT | None,
               cfg: Config, m: Machine, scaler: torch.amp.GradScaler) -> Tensor:
    """Adds the gradient of a batch's loss, `micro_batch` samples at a time. Returns answer_loss's sums over `count`."""
    torch.manual_seed(seed)
    totals, backward = torch.zeros(2, device=m.device), lambda loss: scaler.scale(loss / count).backward()
    for at in range(0, len(batch), micro_batch):
        sums = answer_loss(model, batch[at : at + micro_batch], m, teacher, cfg.kd_ratio, backward)
        totals += torch.stack(sums) / count
    return totals


# ---- an update, and what is kept between updates, here and in distill.py --------------------------------------------

def optimizer_of(model: GPT, m: Machine, betas: tuple[float, float],
                 weight_decay: float) -> tuple[torch.optim.AdamW, torch.amp.GradScaler]:
    """AdamW over all weights, and the scaling of the loss, which float16 alone needs."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=weight_decay, fused=True)
    return optimizer, torch.amp.GradScaler(m.device.type, enabled=m.dtype == torch.float16)


def apply_update(model: GPT, optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler, m: Machine, lr: float,
                 grad_clip: float) -> float:
    """Sums the gradients of all processes, clips their norm, takes a step. Returns the norm before clipping.

    Raises UserError for a gradient that is not finite; in float16 the scaler skips the step and scales down instead."""
    # a process to which no row of this batch fell has no gradients, and has not made the scaler begin
    scaler.scale(torch.zeros((), device=m.device))
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    m.sum(*(p.grad for p in model.parameters()))
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    if not math.isfinite(norm) and not scaler.is_enabled():
        raise UserError(f"the gradient's norm is {norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def fitting(function: Callable, micro_batch: int, model: GPT, *rest) -> tuple:
    """function(micro_batch, *rest), which adds to a model's gradients; begun anew with half the micro-batch as long as
    the GPU's memory does not suffice. Returns its result, and the micro-batch that fitted."""
    while True:
        try:
            return function(micro_batch, *rest), micro_batch
        except torch.cuda.OutOfMemoryError:
            if micro_batch == 1:
                raise
        model.zero_grad(set_to_none=True)  # after the handler, in which the failed pass still holds its tensors
        torch.cuda.empty_cache()
        print(f"out of memory: --micro_batch={micro_batch} is {micro_batch // 2} from here on; the batch is the same")
        micro_batch //= 2


def begin(out: Path, cfg, free: set[str], m: Machine) -> bool:
    """Whether the run of this folder is finished. Raises UserError as `is_finished`."""
    finished = is_finished(out, cfg, free)
    if finished:
        m.say(f"{out}: finished earlier, kept")
    m.barrier()  # all have looked before one writes
    return finished


def is_finished(out: Path, cfg, free: set[str]) -> bool:
    """Whether the folder holds a finished run of these settings, the `free` ones aside.

    Raises UserError if it holds something else, a run of other flags or files, or an unfinished one unless --resume is
    given."""
    finished, begun = (out / "results.json").is_file(), (out / "run.json").is_file()
    if finished and (not begun or "given" in read_json(out / "results.json")):
        raise UserError(f"--out={out} holds results of something else: give a folder of its own")
    if begun:
        old = read_json(out / "run.json")
        for name, value in asdict(cfg).items():
            if name in free:
                continue
            if name not in old:
                raise UserError(f"{out} was made by `{old.get('command')}`, which has no --{name}: choose another "
                                "--out")
            if old[name] != value:
                raise UserError(f"{out} was made with --{name}={old[name]}, now it is {value}: choose another --out, "
                                "or remove that folder")
        for name, noted in old.get("checksums", {}).items():
            if checksum(getattr(cfg, name)) not in (noted, None):  # a finished run's may be gone
                raise UserError(f"{out} was made with another content of --{name}={getattr(cfg, name)}: choose another "
                                "--out, or remove that folder")
        if not finished and not cfg.resume:
            raise UserError(f"{out} holds an unfinished run: --resume goes on with it; to begin anew remove the folder")
    return finished


def save_state(out: Path, model: GPT, optimizer, scaler, step: int, best: dict | None) -> None:
    """Writes what a run is resumed from, and keeps the state before, should this one be damaged. The step stands for
    order, draws and dropout, which are functions of it and of the seed."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
             "step": step, "best": best}
    with written_aside(out / "state.pt") as aside:
        with open(aside, "wb") as file:  # given a path, torch does not say that the disk is full
            torch.save(state, file)
        if (out / "state.pt").is_file():
            os.replace(out / "state.pt", out / "state-before.pt")


def load_state(out: Path, cfg, model: GPT, optimizer, scaler, m: Machine) -> tuple[int, dict | None]:
    """(updates done, best validation so far) from state.pt; (0, None) without one. Now that all is loaded, notes the
    flags in run.json, and cuts log.jsonl back to where the run goes on."""
    step, best, logged = 0, None, -1  # without a state even the lines of update 0 will be written again
    path, before = out / "state.pt", out / "state-before.pt"
    if before.is_file() and not path.is_file():  # killed between two names
        path = before
    if path.is_file():
        try:
            check_zip(path)
            state = torch.load(path, map_location="cpu", weights_only=True)  # not beside the model's own
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty unless it was float16
                scaler.load_state_dict(state["scaler"])
            step, best, logged = state["step"], state["best"], state["step"]
        except (Stopped, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # pickle, zip and torch have one each for a broken file
            older = before.is_file() and path != before
            other = f"; {before} is older: remove {path.name}, and --resume takes that" if older else ""
            raise UserError(f"{path} is damaged ({type(error).__name__}): remove {out} to begin anew{other}") from None
    if m.rank == 0:
        names = ("data", "valid_data", "corpus", "model", "teacher", "student")
        noted = {name: checksum(getattr(cfg, name, None)) for name in names}
        noted = {name: value for name, value in noted.items() if value is not None}
        write_json(out / "run.json", asdict(cfg) | {"command": command(), "checksums": noted})
        if (out / "log.jsonl").is_file():
            lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
            with written_aside(out / "log.jsonl") as aside:
                aside.write_bytes(b"".join(line for line in lines if step_of(line) <= logged))
    m.barrier()
    return step, best


def step_of(line: bytes) -> float:
    """The update of a line of log.jsonl; infinity for a line that was not written to its end."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf


def finish(out: Path, m: Machine, results: dict) -> dict:
    """Marks a run as finished, by results.json, and removes its state."""
    if m.rank == 0:
        write_json(out / "results.json", results)
        for name in ("state.pt", "state-before.pt"):
            (out / name).unlink(missing_ok=True)
    m.barrier()
    return results


def log(out: Path, m: Machine, line: dict) -> None:
    if m.rank == 0:
        with open(out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def validate(model: GPT, tokenizer: tiktoken.Encoding, examples: Sequence[Example], m: Machine, cfg,
             teacher: GPT | None = None) -> tuple[dict, list[dict]]:
    """Held-out loss and, on instructions, the metrics of one answer to each prompt, always by the same draws."""
    scores = {"loss": held_out_loss(model, examples, m)}
    if not math.isfinite(scores["loss"]):  # beside NaN no later one would be better
        raise UserError(f"the validation loss is {scores['loss']}: lower --lr, or give --dtype=float32")
    if isinstance(examples, data.Pieces):
        return scores, []
    means, answers = evaluate(model, tokenizer, examples, m, teacher, progress="validating",
                              batch_size=cfg.sample_batch, max_response_tokens=cfg.max_tokens - cfg.max_prompt_tokens)
    return scores | {name: values[0] for name, values in means.items()}, answers


def keep_best(model: GPT, tokenizer: tiktoken.Encoding, out: Path, m: Machine, select: str, scores: dict,
              best: dict | None) -> dict:
    """Saves the model if its validation is the best so far, and returns the best."""
    sign = -1 if select == "loss" else 1
    if best is not None and select != "last" and sign * scores[select] <= sign * best[select]:
        return best
    if m.rank == 0:
        save(model, out)
        data.save_tokenizer(tokenizer, out)
    return scores


# ---- command --------------------------------------------------------------------------------------------------------

def presets(given: dict) -> dict:
    """Plain text has no answers to compare, so its weights are chosen by loss."""
    return {"select": "loss"} if data.is_text(given.get("data", "dolly")) else {}


def main(cfg: Config) -> dict:
    with held(Path(cfg.out)), Stop("after this update") as stop:
        return train(cfg, stop)


def train(cfg: Config, stop: Stop) -> dict:
    """Trains a model on instructions or on plain text; the result is a model folder, OUT."""
    m, out = machine(cfg.device, cfg.dtype, cfg.vocab_chunk), Path(cfg.out)

    # 1 what is there already
    if begin(out, cfg, FREE, m):
        return read_json(out / "results.json")

    # 2 data and models
    tokenizer = data.tokenizer_for(cfg.data) if is_shape(cfg.model) else data.load_tokenizer(cfg.model)
    config = new_config(cfg.model, tokenizer) if is_shape(cfg.model) else read_config(cfg.model)
    if cfg.max_tokens > config.n_positions:
        raise UserError(f"--max_tokens={cfg.max_tokens} is more than this model's {config.n_positions} positions")
    if cfg.teacher:  # told, as a wrong name is, before the data are fetched
        same_vocabulary(config, read_config(cfg.teacher))
    if data.is_text(cfg.data):
        pieces = data.Pieces(data.load_corpus(cfg.data, tokenizer, out.parent / "corpus", m), cfg.max_tokens)
        split = len(pieces) - min(cfg.valid_limit, -(-len(pieces) // 50))  # the last pieces validate
        if split == 0:
            raise UserError(f"--data={cfg.data}: {len(pieces)} piece of {cfg.max_tokens} tokens is too little to train "
                            "on and to validate with")
        train, valid = pieces[:split], pieces[split:]
    else:
        lengths = cfg.max_prompt_tokens, cfg.max_tokens
        judged_by = cfg.valid_data or cfg.data
        split = "train" if judged_by == cfg.data else "all"
        train = data.load_examples(cfg.data, split, tokenizer, *lengths, m.say)
        valid = data.load_examples(judged_by, "valid", tokenizer, *lengths, m.say)[: cfg.valid_limit]
    model = new(config, cfg.seed).to(m.device) if is_shape(cfg.model) else load(cfg.model, m.device)
    model = trained(model, cfg.recompute, cfg.compile)
    if cfg.dropout is not None:
        model.set_dropout(cfg.dropout)
    teacher = frozen(load(cfg.teacher, m.device), m.dtype) if cfg.teacher else None

    # 3 how long and how fast
    updates, evals, lr = schedule(cfg, model.config, len(train))
    eval_steps = {round(updates * (n + 1) / evals) for n in range(evals)}
    optimizer, scaler = optimizer_of(model, m, (0.9, 0.999), cfg.weight_decay)
    step, best = load_state(out, cfg, model, optimizer, scaler, m)
    m.say(f"{out}: {cfg.model}, {model.config.parameters:,} parameters, {updates:,} updates of {cfg.batch_size} at "
          f"{lr:g}, on {m.device} in {str(m.dtype)[6:]}" + f", from update {step} on" * (step > 0))
    began, first, micro_batch = time.perf_counter(), step, cfg.micro_batch  # less once memory did not suffice

    while step < updates:
        # 4 one update
        model.train()
        batch = [train[i] for i in data.picks(step * cfg.batch_size, cfg.batch_size, len(train), cfg.seed)]
        count = sum(len(e.response) for e in batch)  # of the whole batch, whoever works on it
        batch = sorted(batch, key=lambda e: -len(e.prompt) - len(e.response))[m.rank :: m.world]
        seed = hash((cfg.seed, step, m.rank)) % 2**63  # of dropout
        totals, micro_batch = fitting(accumulate, micro_batch, model, batch, count, seed, model, teacher, cfg, m,
                                      scaler)
        m.sum(totals)
        if not totals.isfinite().all():
            raise UserError(f"{out}: stopped at update {step + 1}: the loss is {totals[1].item():g}; --resume with the "
                            "same flags would meet it again: lower --lr, or give --dtype=float32")
        rate = cfg.lr_end + (lr - cfg.lr_end) * (1 + math.cos(math.pi * step / updates)) / 2
        try:
            norm = apply_update(model, optimizer, scaler, m, rate, cfg.grad_clip)
        except UserError as error:
            raise UserError(f"{out}: stopped at update {step + 1}: {error}, the loss {totals[1].item():g}") from None
        step += 1
        line = {"step": step, "loss": totals[1].item(), "gold_loss": totals[0].item(), "lr": rate,
                "grad_norm": norm if math.isfinite(norm) else None}  # in float16 an update may be skipped

        # 5 validate, keep the best, save
        if step in eval_steps:
            line["valid"], _ = validate(model.eval(), tokenizer, valid, m, cfg, teacher)
            best = keep_best(model, tokenizer, out, m, cfg.select, line["valid"] | {"step": step}, best)
        log(out, m, line)
        stopped = stop.asked(m)
        if (step in eval_steps or stopped) and m.rank == 0:
            save_state(out, model, optimizer, scaler, step, best)
        if step % cfg.log_every == 0 or step in eval_steps:
            left = (time.perf_counter() - began) / (step - first) * (updates - step)
            shown = "".join(f"  {name} {value:.3f}" for name, value in line.get("valid", {}).items()
                            if name in ("loss", "rouge_l", "reverse_kl", "valid"))
            m.say(f"{out.name} {step}/{updates}  loss {line['loss']:.3f}  norm {norm:.2f}  lr {rate:.1e}  "
                  f"left {clock(left)}" + f"  | validation:{shown}" * bool(shown))
        if stopped:
            m.barrier()  # saved, before any process ends
            raise Stopped(stop.signum, f"{out}: stopped and saved after update {step}; --resume goes on")
    return finish(out, m, {"updates": updates, "lr": lr, "best": best})


if __name__ == "__main__":
    run(main, Config, presets)
