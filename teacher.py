"""Supervised training: the teacher p, the student's phase 1, and the baselines SFT, KD and SeqKD.

Paper:    arXiv 2306.08543v4, Section 3.1, Appendix B.1 (recipes by size), phase 1 of Algorithm 1.
          distill.py uses the optimizer and the validation of this file too.
Run:      python teacher.py --model=gpt2-xl --out=out/teacher                   the teacher, or SFT
          python teacher.py --model=gpt2 --select=loss --epochs=3 --out=out/init           phase 1
          python teacher.py --model=gpt2 --teacher=out/teacher --out=out/kd                     KD
          python teacher.py --model=gpt2 --data=out/answers.jsonl --valid_data=dolly --out=out/seqkd
          python teacher.py --model=4x4x128 --data=text.txt --updates=2000 --out=out/base  from text
Shapes:   b rows of a micro-batch, T response tokens, D width, V vocabulary.
Left out: the paper's search over learning rates (give --lr); LoRA.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch
from torch import Tensor

import data
from config import Machine, UserError, check, flag, machine, run
from data import Batch, Example
from eval import evaluate, held_out_loss
from families import adamw, clip_grad_norm, gathered, split
from model import GPT, GPTConfig, is_shape, load, new, new_config, read_config, save
from safe import runs
from safe.files import check_place, read_json
from safe.rows import apart
from safe.texts import letters_seen
from sample import decoder, taken


@dataclass(frozen=True)
class Config:
    model: str = flag("gpt2", "begin with a folder, gpt2 ... gpt2-xl, OWNER/NAME, or a new "
                              "LAYERSxHEADSxWIDTH")
    out: str = flag("out/sft", "folder of the result")
    data: str = flag("dolly", "instructions (dolly, tiny, FILE.jsonl) or plain text (FILE.txt, a "
                              "folder, openwebtext)")
    valid_data: str | None = flag(None, "validate on this instruction set, not on rows of --data")
    template: Literal["auto", "paper", "chat"] = flag("auto", "chat: the model's; families/README")
    teacher: str | None = flag(None, "p of word-level KD; without one, the data alone teach")
    kd_ratio: float = flag(0.5, "share of KL[p || q] in the loss if there is a teacher", 0, 1)
    lr: float | None = flag(None, "peak learning rate; default by RECIPES", 0, 10)
    lr_end: float = flag(1e-7, "learning rate at the end of the cosine", 0, 10)
    epochs: int | None = flag(None, "passes over the data; default by the model's size", 1)
    updates: int | None = flag(None, "optimizer steps, instead of --epochs", 1)
    batch_size: int = flag(32, "samples of an update", 1)
    micro_batch: int = flag(8, "samples of a forward pass; changes memory and speed only", 1)
    sample_batch: int = flag(64, "answers decoded together in validation", 1)
    recompute: bool = flag(False, "make each layer again in the backward pass, to save memory")
    compile: bool = flag(False, "torch.compile the forward pass")
    shard: bool = flag(False, "split the model in training over torchrun's processes")
    weight_decay: float = flag(0.01, "weight decay of AdamW", 0, 10)
    grad_clip: float = flag(1.0, "largest norm of the gradient", 1e-9)
    dropout: float | None = flag(None, "while training; default that of config.json", 0, 0.99)
    select: Literal["rouge_l", "loss", "last"] = flag("rouge_l", "what picks the weights")
    evals: int | None = flag(None, "validations; default one an epoch, or ten with --updates", 1)
    max_prompt_tokens: int = flag(256, "longer prompts are dropped", 1, 2**20)
    max_tokens: int = flag(512, "longer samples are dropped; length of a piece of text", 2, 2**20)
    seed: int = flag(10, "seed of order, dropout and new weights", 0, 2**62)
    decoder: Literal["fast", "captured", "plain"] = flag("fast", "how validation samples answers")
    resume: bool = flag(False, "go on with an unfinished run")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "autocast's dtype")

    def __post_init__(self):
        check(self)
        check_place(self, "out")
        if os.path.realpath(self.model) == os.path.realpath(self.out):
            raise UserError(f"--model={self.model} would be written over: give another --out")
        if self.compile and self.decoder == "plain":
            raise UserError("--compile would compile every step of --decoder=plain: give one")
        if self.kd_ratio != 0.5 and not self.teacher:
            raise UserError(f"--kd_ratio={self.kd_ratio} weighs a teacher's KL: give --teacher too")
        if self.epochs and self.updates:
            raise UserError("--epochs and --updates both say how long to train: give one")
        if data.is_text(self.data):
            if self.select == "rouge_l" or self.valid_data:
                raise UserError(f"--data={self.data} is plain text, whose last pieces validate: "
                                "give --select=loss or last, and no --valid_data")
        elif self.max_prompt_tokens >= self.max_tokens:
            raise UserError(f"--max_prompt_tokens={self.max_prompt_tokens} leaves no room for an "
                            f"answer in --max_tokens={self.max_tokens}")


# parameters up to, learning rate, epochs: the released scripts' choices from Appendix B.1's grids
RECIPES = ((200e6, 5e-4, 20), (600e6, 1e-4, 20), (1.3e9, 1e-4, 10), (math.inf, 5e-5, 10))
# Flags that change results by rounding and dropout's draws at most: a run resumes with others.
FREE = {"resume", "device", "micro_batch", "sample_batch", "recompute", "compile", "decoder", "out"}
LOWER = "lower --lr, or give --dtype=float32"


def presets(given: dict) -> dict:
    """Plain text has no answers to compare, so its weights are chosen by loss."""
    return {"select": "loss"} if data.is_text(given.get("data", "dolly")) else {}


def schedule(cfg: Config, config: GPTConfig, rows: int) -> tuple[int, int, float]:
    """(updates, validations, peak learning rate) by the flags, or else by RECIPES."""
    _, lr, epochs = next(recipe for recipe in RECIPES if config.parameters <= recipe[0])
    epochs = cfg.epochs or epochs
    updates = cfg.updates or math.ceil(epochs * rows / cfg.batch_size)
    evals = cfg.evals or (10 if cfg.updates else epochs)
    return updates, min(updates, evals), lr if cfg.lr is None else cfg.lr


def add_gradient(model: GPT, batch: Batch, divisor: float, m: Machine,
                 scaler: torch.amp.GradScaler, teacher: GPT | None = None,
                 kd_ratio: float = 0.0) -> Tensor:
    """Adds a micro-batch's gradient to the model's: that of its loss, summed over response tokens
    and divided by `divisor`. Returns two sums over tokens, of the loss and of -log q(y_t), (2,).

    The loss is -log q(y_t), or (1 - kd_ratio) (-log q(y_t)) + kd_ratio KL[p || q]."""
    sums = torch.zeros(2, device=m.device)
    with m.autocast():
        hidden = batch.predicting(model(batch.tokens))  # (b, T, D)
        head = model.head()  # (V, D)
        if teacher is not None:
            with torch.no_grad():
                teacher_hidden = batch.predicting(teacher(batch.tokens))  # (b, T, D)
    # Logits of all rows would not fit: a few rows at a time give `states` their gradient, which
    # then goes back through the layers at once.
    states = hidden.detach().requires_grad_()
    for rows in data.slices(range(len(states)), m.room(states.size(1), len(head))):
        with m.autocast():
            log_q = model.logits(states[rows], head).log_softmax(-1)  # (c, T, V)
            gold = -taken(log_q, batch.response[rows])  # (c, T)
            loss = gold
            if teacher is not None:
                log_p = teacher.logits(teacher_hidden[rows]).log_softmax(-1)
                forward_kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # (c, T)
                loss = (1 - kd_ratio) * gold + kd_ratio * forward_kl
        loss = (loss * batch.response_mask[rows]).sum()
        gold = (gold * batch.response_mask[rows]).sum()
        scaler.scale(loss / divisor).backward()
        sums += torch.stack([loss.detach(), gold.detach()])
    hidden.backward(states.grad)
    return sums


# ---- optimizer and validation, for distill.py too ---------------------------------------------

def trained(model: GPT, cfg, m: Machine) -> GPT:
    """The model, prepared for training. --compile compiles the forward pass for any length."""
    model.recompute = cfg.recompute
    if cfg.compile:
        torch._dynamo.reset()  # versions that an earlier stage compiled count towards its limit
        model.compile(dynamic=True)
    return split(model, cfg, m)


def optimizer_of(model: GPT, m: Machine, betas: tuple[float, float],
                 weight_decay: float) -> tuple[torch.optim.AdamW, torch.amp.GradScaler]:
    """AdamW over all weights, and the scaling of the loss, which float16 alone needs."""
    optimizer = adamw(model, betas=betas, weight_decay=weight_decay, fused=True)
    return optimizer, torch.amp.GradScaler(m.device.type, enabled=m.dtype == torch.float16)


def summed(sums: dict[str, Tensor], m: Machine, where: str) -> dict[str, float]:
    """The sums of all processes. Raises UserError, naming the first that is not finite."""
    totals = torch.stack(list(sums.values()))
    m.sum(totals)
    for name, total in zip(sums, totals.tolist()):
        if not math.isfinite(total):
            raise UserError(f"{where}: {name} is {total}; the last state is kept; {LOWER}, and "
                            "begin anew")
    return dict(zip(sums, totals.tolist()))


def clip_gradient(model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                  m: Machine, largest: float = 1.0, where: str = "stopped") -> float | None:
    """Sums the gradients of all processes and clips their norm. Returns the norm before, or None
    where float16 has overflowed. In other dtypes it raises UserError if it is not finite."""
    scaler.scale(torch.zeros((), device=m.device))  # unscale_() needs one, even without any rows
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        m.sum(p.grad)
    scaler.unscale_(optimizer)
    norm = clip_grad_norm(model, m, largest)
    if math.isfinite(norm):
        return norm
    if not scaler.is_enabled():
        raise UserError(f"{where}: the gradient's norm is {norm}: {LOWER}")
    return None


def validate(model: GPT, tokenizer: tiktoken.Encoding, examples: Sequence[Example], m: Machine,
             draw: Callable, T: int, teacher: GPT | None = None) -> tuple[dict, list[dict]]:
    """The held-out loss, on instructions with the metrics of one answer to each prompt, and the
    answers. The draws are the same each time."""
    scores, answers = {"loss": held_out_loss(model, examples, m)}, []
    if not math.isfinite(scores["loss"]):  # no later one would be better than NaN
        raise UserError(f"the validation loss is {scores['loss']}: {LOWER}")
    if not isinstance(examples, data.Pieces):
        means, answers = evaluate(model, tokenizer, examples, m, draw, teacher, T=T)
        scores |= {name: values[0] for name, values in means.items()}
    return scores, answers


def selection(select: str, examples: Sequence[Example], m: Machine) -> str:
    """What picks the weights: the loss instead of a Rouge-L that cannot see the references."""
    if select != "rouge_l" or (sees := letters_seen(examples)) >= 50:
        return select
    m.say(f"Rouge-L sees {sees:.0f}% of the references' letters: the loss picks the weights")
    return "loss"


def keep_best(model: GPT, tokenizer: tiktoken.Encoding, out: Path, m: Machine, select: str,
              scores: dict, best: dict | None) -> dict:
    """Saves the model unless an earlier validation was better, and returns the best. Of equals the
    later is kept, which has learned for longer."""
    sign = -1 if select == "loss" else 1
    if best is not None and select != "last" and sign * scores[select] < sign * best[select]:
        return best
    model = gathered(model)
    if m.rank == 0:
        save(model, out)
        data.save_tokenizer(tokenizer, out)
    return scores


# ---- command ----------------------------------------------------------------------------------

def main(cfg: Config) -> dict:
    with runs.held(Path(cfg.out)), runs.Stop("after this update") as stop:
        return runs.within_memory(train, cfg, stop)


def load_data(cfg: Config, tokenizer: tiktoken.Encoding, m: Machine) -> tuple[Sequence, Sequence]:
    """What is trained on, and what validates: instructions, or pieces of plain text."""
    if data.is_text(cfg.data):
        pieces = data.load_pieces(cfg.data, tokenizer, Path(cfg.out), cfg.max_tokens, m)
        split = len(pieces) - min(1000, math.ceil(len(pieces) / 50))  # the last pieces validate
        if split == 0:
            raise UserError(f"--data={cfg.data}: one piece of text cannot train and validate too")
        return pieces[:split], pieces[split:]
    limits = cfg.max_prompt_tokens, cfg.max_tokens
    valid_name = cfg.valid_data or cfg.data
    one = runs.same(valid_name, cfg.data)
    examples = data.load_examples(cfg.data, "train" if one else "all", tokenizer, *limits, m.say)
    valid = data.load_examples(valid_name, "valid", tokenizer, *limits, m.say)
    return examples if one else apart(cfg.data, examples, valid_name, valid, m.say), valid


def train(cfg: Config, stop: runs.Stop) -> dict:
    """Trains a model on instructions or on plain text. The result is a model folder, --out."""
    m, out = machine(cfg.device, cfg.dtype, cfg.sample_batch), Path(cfg.out)
    if runs.begin(out, cfg, FREE, m):
        return read_json(out / "results.json")
    is_new = is_shape(cfg.model)
    known = None if is_new else data.load_tokenizer(cfg.model, cfg.template)
    tokenizer = known or data.tokenizer_for(cfg.data)
    config = new_config(cfg.model, tokenizer) if is_new else read_config(cfg.model)
    if cfg.max_tokens > config.n_positions:
        raise UserError(f"--max_tokens={cfg.max_tokens} is more than this model's "
                        f"{config.n_positions} positions")
    if cfg.teacher:  # a mistake is told before the data are fetched
        data.same_vocabulary(tokenizer, data.load_tokenizer(cfg.teacher, cfg.template))
    examples, valid = load_data(cfg, tokenizer, m)
    model = new(config, cfg.seed).to(m.device) if is_new else load(cfg.model, m.device)
    model = trained(model, cfg, m)
    if cfg.dropout is not None:
        model.set_dropout(cfg.dropout)
    draw, ready = decoder(cfg.decoder)
    teacher = ready(load(cfg.teacher, m.device, m.dtype), m.dtype) if cfg.teacher else None
    updates, evals, lr = schedule(cfg, config, len(examples))
    select = selection(cfg.select, valid, m)
    eval_steps = {round(updates * (n + 1) / evals) for n in range(evals)}
    optimizer, scaler = optimizer_of(model, m, (0.9, 0.999), cfg.weight_decay)
    run = runs.Run(out, cfg, m, stop, updates, model, optimizer, scaler)
    step, best = run.step, run.best
    m.say(f"{out}: {cfg.model}, {config.parameters:,} parameters, updates {step:,} to {updates:,} "
          f"of {cfg.batch_size} samples at {lr:g}, on {m.device} in {str(m.dtype)[6:]}")
    while step < updates:
        model.train()
        picks = data.picks(step * cfg.batch_size, cfg.batch_size, len(examples), cfg.seed)
        batch = sorted([examples[i] for i in picks], key=lambda e: -len(e.prompt) - len(e.response))
        tokens = sum(len(e.response) for e in batch)  # one normaliser, however the batch is split
        torch.manual_seed(hash((cfg.seed, step, m.rank)) % 2**63)  # of dropout
        totals = torch.zeros(2, device=m.device)
        for some in data.slices(batch[m.rank :: m.world], cfg.micro_batch):
            micro = data.batch_of(some, m.device)
            totals += add_gradient(model, micro, tokens, m, scaler, teacher, cfg.kd_ratio)
        sums = {"the loss": totals[0], "its share of the data": totals[1]}
        where = f"{out}: stopped at update {step + 1}"
        loss, gold_loss = summed(sums, m, where).values()
        rate = cfg.lr_end + (lr - cfg.lr_end) * (1 + math.cos(math.pi * step / updates)) / 2
        optimizer.param_groups[0]["lr"] = rate
        norm = clip_gradient(model, optimizer, scaler, m, cfg.grad_clip, where)
        scaler.step(optimizer)  # optimizer.step(), unless float16 has overflowed
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        run.log({"step": step, "loss": loss / tokens, "gold_loss": gold_loss / tokens, "lr": rate,
                 "grad_norm": norm})
        if step in eval_steps:
            q, T = ready(model.eval(), m.dtype), cfg.max_tokens - cfg.max_prompt_tokens
            scores, answers = validate(q, tokenizer, valid, m, draw, T, teacher)
            run.log_validation(step, scores, answers[:1])
            best = keep_best(model, tokenizer, out, m, select, scores | {"step": step}, best)
        run.save(step, best, due=step in eval_steps)
    return runs.finish(out, m, {"updates": updates, "lr": lr, "best": best})


if __name__ == "__main__":
    run(main, Config, presets)
