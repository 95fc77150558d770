"""What a run will take: memory and time of each stage, from steps measured on this machine before anything is loaded.

Paper:    none; arXiv 2306.08543v4 gives neither minutes nor gigabytes for GPT-2.
Run:      python distill.py --teacher=gpt2-xl --plan
Left out: downloads; that answers may end early, so the time to decode is an upper bound.
"""

import gc
import math
import os
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import data
import teacher as supervised
from config import Machine, UserError, clock
from data import Example, Row
from model import GPT, GPTConfig, PackedLinear, frozen, is_shape, new_config, read_config, same_vocabulary, trained
from sample import sample, uniforms


@dataclass(frozen=True)
class Measured:
    """What models of a width cost. A layer is what two layers take more than one; what is left of one is output."""
    layer: float  # seconds for one token, forward and backward
    output: float  # seconds for one predicted token, likewise
    layer_forward: float  # seconds for one token, forward only
    layer_bytes: float  # activations of one token of a sample, kept for the backward pass
    step_layer: float  # seconds of a decoding step
    step_output: float
    update_layer: float  # seconds of the optimizer
    update_output: float

    def train(self, layers: int, samples: float, tokens: float, predicted: float, recompute: bool) -> float:
        return samples * (tokens * layers * (self.layer + recompute * self.layer_forward) + predicted * self.output)

    def judge(self, layers: int, samples: float, tokens: float, predicted: float) -> float:
        """A forward pass: of the output a third of the time of training, whose way back takes two thirds."""
        return samples * (tokens * layers * self.layer_forward + predicted * self.output / 3)

    def step(self, layers: int) -> float:
        return layers * self.step_layer + self.step_output

    def update(self, layers: int) -> float:
        return layers * self.update_layer + self.update_output


def measure(config: GPTConfig, m: Machine, rows: int, length: int, sample_batch: int) -> Measured:
    """Times training steps on `rows` samples and decoding steps of `sample_batch` rows, with one layer and with two."""
    one, two = (measure_layers(replace(config, n_layer=layers), m, rows, length, sample_batch) for layers in (1, 2))
    layer = [max(b - a, 0.0) for a, b in zip(one, two)]
    rest = [max(2 * a - b, 0.0) for a, b in zip(one, two)]
    tokens = rows * length
    return Measured(layer[0] / tokens, rest[0] / (rows * (length - 1)), layer[1] / tokens, layer[2] / length, layer[3],
                    rest[3], layer[4], rest[4])


def measure_layers(config: GPTConfig, m: Machine, rows: int, length: int, sample_batch: int) -> list[float]:
    """Seconds of forward and backward and of forward alone, bytes of one sample's activations, seconds of a decoding
    step and of AdamW. All tokens but the first are predicted: a last layer skips those that predict nothing, which
    would make the output look cheap."""
    draw = lambda count: np.random.default_rng(0).integers(0, config.vocab_size, count).tolist()
    batch = [Example(Row(""), draw(1), draw(length - 1))] * rows
    text = torch.tensor([draw(length)] * rows, device=m.device)
    model = trained(GPT(config).to(m.device), recompute=False, compile=False)
    light, (optimizer, scaler) = frozen(model, m.dtype), supervised.optimizer_of(model, m, (0.9, 0.95), 0.0)
    alone = replace(m, rank=0, world=1, capture=False)
    steps, times = (32, 8) if m.device.type == "cuda" else (4, 2)  # a GPU's are short, and the host's noise is not

    def kept(text: torch.Tensor) -> int:
        """Bytes that the forward pass keeps for the backward pass."""
        storages = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), m.autocast():
            model(text)
        return sum(storages.values())

    def forward() -> None:
        with m.autocast():
            light(text)

    train = lambda: supervised.answer_loss(model, batch, m, backward=lambda loss: scaler.scale(loss).backward())
    decode = lambda length: sample(light, [draw(8)] * sample_batch, uniforms(0, range(sample_batch), length), alone,
                                   batch_size=sample_batch)
    seconds = lambda function: min(m.seconds(function) for _ in range(times))
    prefill = seconds(lambda: decode(1))
    return [seconds(train), seconds(forward), kept(torch.cat([text, text[:1]])) - kept(text),  # weights cancel
            (seconds(lambda: decode(1 + steps)) - prefill) / steps,
            seconds(lambda: supervised.apply_update(model, optimizer, scaler, alone, 0.0, 1.0))]


def free_memory(m: Machine) -> int:
    """Bytes that can still be allocated on the device."""
    gc.collect()
    if m.device.type == "cuda":
        torch.cuda.empty_cache()  # what measuring took
        return torch.cuda.mem_get_info(m.device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:  # not Linux: all the memory there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- bytes ----------------------------------------------------------------------------------------------------------

def frozen_bytes(config: GPTConfig, m: Machine) -> int:
    """A model for inference: matrices and output embedding in autocast's dtype, all else in float32."""
    packed = PackedLinear.fits(config, m.device, m.dtype)
    if m.dtype == torch.float32:
        return 4 * (config.parameters + packed * config.vocab_size * config.n_embd)
    embeddings = (config.vocab_size + config.n_positions) * config.n_embd
    return 2 * (config.parameters - embeddings) + 4 * embeddings + 2 * config.vocab_size * config.n_embd


def update_bytes(config: GPTConfig, cost: Measured, m: Machine, micro_batch: int, tokens: int,
                 recompute: bool) -> float:
    """The activations of a micro-batch of the longest samples, or with `recompute` every layer's input and one layer's
    activations; autocast's copies of the matrices; and five copies of one chunk's logits."""
    positions = micro_batch * tokens
    copies = 2 * config.parameters if m.dtype != torch.float32 else 0
    activations = positions * config.n_layer * cost.layer_bytes
    if recompute:
        activations = positions * (config.n_layer * config.n_embd * 4 + cost.layer_bytes)
    return activations + copies + 5 * 4 * min(m.vocab_chunk, positions) * config.vocab_size


def decode_bytes(configs: list[GPTConfig], m: Machine, rows: int, tokens: int) -> float:
    """Key-value caches, and 40 bytes a row and word of the vocabulary: float32 log-probabilities, a float64 CDF."""
    size = 4 if m.device.type == "cpu" else m.dtype.itemsize
    caches = sum(2 * config.n_layer * config.n_embd * rows * tokens * size for config in configs)
    return caches + 40 * rows * configs[0].vocab_size


# ---- stages ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Line:
    stage: str
    what: str
    updates: int
    bytes: float
    seconds: float


class Draft:
    """The plan of a run: the shapes of models that may not exist yet, the lengths of the data, the measured costs.

    cfg is distill.py's, and work is what its stages() returned. Raises UserError now for what a later stage would
    stumble over."""

    def __init__(self, cfg, work: list, m: Machine):
        self.cfg, self.work, self.m, self.costs = cfg, work, m, {}
        if cfg.data.endswith(".jsonl"):
            data.load_rows(cfg.data, "train")  # a bad row is told before a vocabulary is fetched
        self.origin = {settings.out: settings.model for _, _, settings in work}
        first = self.root(cfg.student)
        self.tokenizer = data.tokenizer_for(cfg.data) if is_shape(first) else data.load_tokenizer(first)
        student, teacher = self.config(cfg.student), self.config(cfg.teacher)
        same_vocabulary(student, teacher)
        room = min(student.n_positions, teacher.n_positions)
        if cfg.max_tokens > room:
            raise UserError(f"--max_tokens={cfg.max_tokens} is more than these models' {room} positions; "
                            "--preset=tiny has lengths for the built-in world")
        if cfg.pt_coef:
            data.text_files(cfg.corpus)
        examples = data.load_examples(cfg.data, "train", self.tokenizer, cfg.max_prompt_tokens, cfg.max_tokens,
                                      lambda *words: None)
        self.rows, self.longest = len(examples), cfg.max_tokens - cfg.max_prompt_tokens
        self.answer_tokens = sum(len(e.response) for e in examples) / self.rows
        self.tokens = self.answer_tokens + sum(len(e.prompt) for e in examples) / self.rows

    def root(self, name: str) -> str:
        """The model that a stage begins with, if this is the result of one."""
        while name in self.origin:
            name = self.origin[name]
        return name

    def config(self, name: str) -> GPTConfig:
        name = self.root(name)
        return new_config(name, self.tokenizer) if is_shape(name) else read_config(name)

    def shape(self, name: str) -> tuple[GPTConfig, Measured]:
        config, cfg = self.config(name), self.cfg
        slow = self.m.device.type == "cpu" and config.n_embd > 256
        rows = min(cfg.micro_batch, 2) if slow else cfg.micro_batch
        while config.n_embd not in self.costs:
            try:
                self.costs[config.n_embd] = measure(config, self.m, rows, max(2, round(self.tokens)), cfg.sample_batch)
            except torch.cuda.OutOfMemoryError:  # the run will halve its micro-batch too
                if rows == 1:
                    raise
                rows //= 2
        return config, self.costs[config.n_embd]

    def decode(self, names: list[str], answers: float, together: int) -> float:
        """Seconds to decode answers of full length with these models in step: `together` of them are sampled at a time,
        in as many batches as that takes."""
        batches = answers / together * math.ceil(together / self.m.world / self.cfg.sample_batch)
        return batches * self.longest * sum(cost.step(config.n_layer) for config, cost in map(self.shape, names))

    def take_turns(self, answers: float) -> float:
        """Seconds to decode answers of full length by turns: each model reads what the other drew in a forward pass."""
        cfg, time, samples, world = self.cfg, 0.0, answers / self.m.world, self.m.world
        groups = cfg.turns // math.gcd(cfg.turns, world)  # of a process
        batches = groups * math.ceil(cfg.rollouts / world / groups / cfg.sample_batch) * answers / cfg.rollouts
        for name, share in ((cfg.student, 1 - cfg.mix_alpha), (cfg.teacher, cfg.mix_alpha)):
            (config, cost), read = self.shape(name), (1 - share) * self.longest
            time += batches * share * self.longest * cost.step(config.n_layer)
            time += cost.judge(config.n_layer, samples, read, read)
        return time

    def compare(self, names: list[str], rows: int, times: float) -> float:
        """Seconds to answer so many rows with the first of these models, so many times, and to read the answers with
        both if there are two."""
        passes = (cost.judge(config.n_layer, rows / self.m.world, self.cfg.max_tokens, self.longest)
                  for config, cost in map(self.shape, names) if len(names) > 1)
        return times * (self.decode(names[:1], rows, rows) + sum(passes))

    def supervised(self, name: str, s: supervised.Config) -> Line:
        config, cost = self.shape(s.model)
        updates, evals, lr = supervised.schedule(s, config, self.rows)
        samples = updates * s.batch_size / self.m.world
        time = cost.train(config.n_layer, samples, self.tokens, self.answer_tokens, s.recompute)
        time += updates * cost.update(config.n_layer)
        time += self.compare([s.model, s.teacher][: 1 + bool(s.teacher)], min(s.valid_limit, self.rows), evals)
        size = 16 * config.parameters + update_bytes(config, cost, self.m, s.micro_batch, s.max_tokens, s.recompute)
        if s.teacher:
            judge, judge_cost = self.shape(s.teacher)
            time += judge_cost.judge(judge.n_layer, samples, self.tokens, self.answer_tokens)
            size += frozen_bytes(judge, self.m)
        return Line(name, f"{s.model} on {s.data} at {lr:g}", updates, size, time)

    def sampling(self, name: str, s) -> Line:
        config = self.config(s.model)
        size = 4 * config.parameters + frozen_bytes(config, self.m)
        size += decode_bytes([config], self.m, s.batch_size, self.cfg.max_tokens)
        what = f"the teacher answers each of {self.rows:,} prompts"
        return Line(name, what, 0, size, self.decode([s.model], self.rows, self.rows))

    def minillm(self) -> Line:
        cfg, m = self.cfg, self.m
        (student, cost), (judge, judge_cost) = self.shape(cfg.student), self.shape(cfg.teacher)
        samples, both = cfg.steps * cfg.minibatch / m.world, [cfg.student, cfg.teacher]
        answers = cfg.rollouts * math.ceil(cfg.steps * cfg.minibatch / cfg.rollouts / cfg.inner_epochs)
        time = self.compare(both, min(cfg.valid_limit, self.rows), cfg.steps / cfg.eval_every + 1)
        time += self.take_turns(answers) if cfg.turns else self.decode(both, answers, cfg.rollouts)
        time += cfg.steps * cost.update(student.n_layer)
        time += cost.train(student.n_layer, samples, self.tokens, self.answer_tokens, cfg.recompute)
        time += judge_cost.judge(0, samples, 0, self.answer_tokens)
        if cfg.pt_coef:
            time += cost.train(student.n_layer, samples, cfg.max_tokens, cfg.max_tokens, cfg.recompute)
            time += judge_cost.judge(judge.n_layer, samples, cfg.max_tokens, cfg.max_tokens) if cfg.pt_kd else 0.0
        rows = -(-cfg.rollouts // m.world)
        size = 16 * student.parameters + frozen_bytes(student, m) + frozen_bytes(judge, m)
        size += rows * self.longest * (judge.n_embd * m.dtype.itemsize + 40)
        if cfg.weight in ("product", "exact"):
            m = replace(m, vocab_chunk=self.longest)
        size += max(decode_bytes([student, judge], m, min(rows, cfg.sample_batch), cfg.max_tokens),
                    update_bytes(student, cost, m, cfg.micro_batch, cfg.max_tokens, cfg.recompute))
        source = {"mixed": "the mixture", "gold": "the references"}.get(cfg.source, f"the {cfg.source}")
        what = f"{answers:,.0f} answers from {source}, {cfg.inner_epochs} inner epochs"
        return Line("minillm", what, cfg.steps, size, time)

    def evaluation(self, models: int) -> Line:
        cfg, m, both = self.cfg, self.m, [self.cfg.student, self.cfg.teacher]
        rows, times = len(data.load_rows(*cfg.test_split)), cfg.eval_seeds * models
        student, judge = (self.config(name) for name in both)
        size = 4 * student.parameters + frozen_bytes(student, m) + frozen_bytes(judge, m)
        size += decode_bytes([student, judge], m, cfg.sample_batch, cfg.max_tokens)
        what = f"{models} models, {cfg.eval_seeds} seeds: {rows * times:,} answers, and as many of the teacher"
        return Line("evaluate", what, 0, size, self.compare(both, rows, times) + self.compare(both[::-1], rows, times))

    def lines(self) -> list[Line]:
        """The stages that are still to do."""
        lines, cfg = [], self.cfg
        for name, _, s in self.work:
            if not (Path(s.out) / "results.json").is_file() and not Path(s.out).is_file():
                lines.append(self.supervised(name, s) if isinstance(s, supervised.Config) else self.sampling(name, s))
        if cfg.explain:
            return lines
        if not (Path(cfg.out) / "minillm" / "results.json").is_file():
            lines.append(self.minillm())
        if not (Path(cfg.out) / "results.json").is_file():
            lines.append(self.evaluation(3 + len(cfg.baselines.split(",")) * bool(cfg.baselines)))
        return lines


GPT2S = {"gpt2": GPTConfig(), "gpt2-medium": GPTConfig(24, 16, 1024), "gpt2-large": GPTConfig(36, 20, 1280),
         "gpt2-xl": GPTConfig(48, 25, 1600)}  # shapes as released


def pairs(draft: Draft) -> Iterator[tuple[str, str, list[Line]]]:
    """Phase 2 for every GPT-2 with every teacher of its size or more, on 1, 2, 4 and 8 devices like this one."""
    for teacher, student in [(t, s) for s in GPT2S for t in GPT2S if GPT2S[t].parameters >= GPT2S[s].parameters]:
        lines = []
        for world in (1, 2, 4, 8):
            one = copy(draft)  # which shares the costs measured
            one.cfg, one.m = replace(draft.cfg, teacher=teacher, student=student), replace(draft.m, world=world)
            one.config = GPT2S.__getitem__
            lines.append(one.minillm())
        yield teacher, student, lines


def show_pairs(draft: Draft, m: Machine) -> None:
    m.say(f"phase 2, {draft.cfg.steps:,} updates, memory of a device and time, on so many devices like this one: "
          f"{m.device} in {str(m.dtype)[6:]}")
    m.say(f"  {'teacher':12}{'student':12}" + "".join(f"{world:>19}" for world in (1, 2, 4, 8)))
    for teacher, student, lines in pairs(draft):
        cells = [f"{line.bytes / 2**30:.1f} GiB {clock(line.seconds)}" for line in lines]
        m.say(f"  {teacher:12}{student:12}" + "".join(f"{cell:>19}" for cell in cells))
    m.say("  measured just now on one device: training and decoding at these widths, on one layer and on two.\n"
          "  extrapolated: the number of layers; several devices, as equal shares, without the time to sum gradients")


def show(lines: list[Line], m: Machine, what: str, ignore_memory: bool) -> None:
    """Prints the plan. Raises UserError, in every process, if a stage needs more memory than one of them has free."""
    free, world = free_memory(m), f", {m.world} processes" * (m.world > 1)
    if m.device.type == "cpu":
        free //= m.world
    m.say(f"plan: {what}, on {m.device} in {str(m.dtype)[6:]}{world}; {free / 2**30:.1f} GiB free")
    m.say(f"  {'stage':9}{'updates':>9}{'memory':>11}{'time':>11}   what" if lines else "  everything is done already")
    for line in lines:
        memory, time = f"{line.bytes / 2**30:.2f} GiB", clock(line.seconds)
        m.say(f"  {line.stage:9}{line.updates or '':9}{memory:>11}{time:>11}   {line.what}")
    if lines:
        m.say("  measured on one and two layers just now; samples of mean length, answers decoded to full length\n")
    for line in lines:
        short = torch.tensor(float(line.bytes > free), device=m.device)
        m.max(short)
        if short and not ignore_memory:
            raise UserError(f"{line.stage} needs about {line.bytes / 2**30:.1f} GiB and {free / 2**30:.1f} are free: "
                            "lower --micro_batch, --sample_batch or --vocab_chunk, give --recompute, choose smaller "
                            "models, or try all the same with --ignore_memory")
