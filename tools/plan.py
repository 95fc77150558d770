"""What a run will take: memory and time of each stage, measured before a model is loaded.

Training and decoding are timed on this machine with one and with two layers of each width. The
layers of a model, the lengths of the data and the number of devices are extrapolated from there.

Paper:    none; arXiv 2306.08543v4 gives neither minutes nor gigabytes for GPT-2.
Run:      python distill.py --teacher=gpt2-xl --plan=only     the stages of a run
          python -m tools.plan                                phase 2 for each pair of GPT-2s
          python -m tools.plan --pairs=opt                    memory of the paper's; also llama
Left out: downloads; answers that end early, so the time to decode is an upper bound.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import torch

import data
import distill
import sample as sampling
import teacher as supervised
from config import Machine, UserError, flag, machine, make, run
from config import check as check_ranges
from data import Example, Row
from families.causal import FamilyConfig
from model import GPT, GPTConfig, is_shape, load, new_config, read_config
from safe import runs, texts
from safe.rows import is_file_of_rows
from safe.runs import clock
from sample import decoder, uniforms
from tools import stages

# Copies of a chunk of logits in an update, counted with PyTorch's profiler: of supervised training,
# with the KL to a teacher besides, and of Eq. (7).
GOLD, KD, MINILLM = 3, 5, 6
# A CPU's allocator leaves holes between tensors: memory taken over memory held, in real updates.
HOLES, HOLES_FLOAT32, HOLES_FAMILY = 3, 2, 2
GROUPS = 4  # whose answers share turns: the default of fast.decode.turns
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# The files of a control group's memory limit and of its use, and in memory.stat what is a cache.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
             "total_active_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file", "active_file")
SEEDS = 5  # of the evaluation: the default of eval.py


# ---- what is measured ---------------------------------------------------------------------------

def seconds(function: Callable, device: torch.device) -> float:
    """How long a call takes, with what it tells the device to do."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def apply_update(model: GPT, optimizer, scaler: torch.amp.GradScaler, m: Machine) -> None:
    """The end of an update, as distill.py and teacher.py have it, at a rate that changes little."""
    optimizer.param_groups[0]["lr"] = 1e-6
    supervised.clip_gradient(model, optimizer, scaler, m)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Measured:
    """What models of one width cost: a layer, and all the rest, called the output."""
    layer: float  # seconds to train on one token: forward and backward
    output: float  # seconds to train on one predicted token
    layer_forward: float  # seconds to read one token
    layer_bytes: float  # activations of one token, kept for the backward pass
    step_layer: float  # seconds of a decoding step
    step_output: float
    update_layer: float  # seconds of the optimizer
    update_output: float

    def train(self, layers: int, samples: float, tokens: float, predicted: float,
              recompute: bool) -> float:
        layer = self.layer + self.layer_forward if recompute else self.layer
        return samples * (tokens * layers * layer + predicted * self.output)

    def read(self, layers: int, samples: float, tokens: float, predicted: float) -> float:
        """A forward pass, for whose output training's backward pass takes twice as long."""
        return samples * (tokens * layers * self.layer_forward + predicted * self.output / 3)

    def step(self, layers: int) -> float:
        return layers * self.step_layer + self.step_output

    def update(self, layers: int) -> float:
        return layers * self.update_layer + self.update_output


def measure(config: GPTConfig, m: Machine, rows: int, length: int, longest: int,
            kind: str) -> Measured:
    """Times training steps on `rows` samples of this length, and decoding steps of m.sample_batch
    answers. Bytes are those of the longest sample, because attention with dropout keeps its square.
    One more layer tells what a layer costs, and the rest of one layer's time is the output's."""
    one = measure_layers(replace(config, n_layer=1), m, rows, length, longest, kind)
    two = measure_layers(replace(config, n_layer=2), m, rows, length, longest, kind)
    layer = {name: max(two[name] - one[name], 0.0) for name in one}
    output = {name: max(one[name] - layer[name], 0.0) for name in one}
    tokens = rows * length
    return Measured(
        layer=layer["train"] / tokens, output=output["train"] / (rows * (length - 1)),
        layer_forward=layer["forward"] / tokens, layer_bytes=layer["bytes"] / longest,
        step_layer=layer["step"], step_output=output["step"],
        update_layer=layer["update"], update_output=output["update"])


def measure_layers(config: GPTConfig, m: Machine, rows: int, length: int, longest: int,
                   kind: str) -> dict[str, float]:
    """Seconds to train on a batch, to read it, of a decoding step and of AdamW, and the bytes of
    the longest sample's activations."""
    words = np.random.default_rng(0).integers(0, config.vocab_size, length).tolist()
    batch = data.batch_of([Example(Row(""), words[:1], words[1:])] * rows, m.device)
    text = torch.tensor([words] * rows, device=m.device)
    alone = replace(m, rank=0, world=1)
    steps, times = (32, 8) if m.device.type == "cuda" else (4, 2)  # a GPU's steps are short
    sample, ready = decoder(kind)
    model = (GPT(config) if isinstance(config, GPTConfig) else config.new()).to(m.device)
    light = ready(model, m.dtype)
    optimizer, scaler = supervised.optimizer_of(model, m, (0.9, 0.95), 0.0)

    def train() -> None:
        supervised.add_gradient(model, batch, rows * (length - 1), m, scaler)

    @torch.no_grad()
    def read() -> None:
        with m.autocast():
            light(text)

    def decode(length: int) -> None:
        prompts = [words[:8]] * m.sample_batch
        sample(light, prompts, uniforms(0, range(m.sample_batch), length), alone)

    def update() -> None:
        apply_update(model, optimizer, scaler, alone)

    def fastest(function: Callable) -> float:
        return min(seconds(function, m.device) for _ in range(times))

    prefill = fastest(lambda: decode(1))
    two_rows, one_row = (kept_bytes(model, n, longest, m) for n in (2, 1))  # weights cancel out
    return {
        "train": fastest(train),
        "forward": fastest(read),
        "bytes": two_rows - one_row,
        "step": (fastest(lambda: decode(1 + steps)) - prefill) / steps,
        "update": fastest(update)}


def kept_bytes(model: GPT, rows: int, length: int, m: Machine) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights among them."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), m.autocast():
        model(torch.zeros(rows, length, dtype=torch.int64, device=m.device))
    return sum(storages.values())


def free_memory(m: Machine) -> float:
    """Bytes that each process can still allocate on its device; infinity if nothing tells."""
    if m.device.type == "cuda":
        return torch.cuda.mem_get_info(m.device)[0]
    return min(free_of_machine(), free_of_container()) / m.world


def free_of_machine() -> float:
    """The free bytes, or all there are where the system does not tell which are free."""
    try:
        lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines()
        sizes = dict(line.split(":") for line in lines)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, LookupError, ValueError):  # this is not Linux
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # this is Windows
        return math.inf


def free_of_container() -> float:
    """The bytes left below the memory limits of this process's control group, by which containers
    and batch systems limit it, and of the groups that hold that one."""
    try:
        lines = (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    free = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for group in (Path(path), *Path(path).parents):
            if controllers == "":
                free = min(free, free_of_group(CGROUPS / group.relative_to("/"), VERSION_2))
            elif "memory" in controllers.split(","):
                folder = CGROUPS / "memory" / group.relative_to("/")
                free = min(free, free_of_group(folder, VERSION_1))
    return free


def free_of_group(folder: Path, names: tuple[str, ...]) -> float:
    """The bytes below a control group's limit that are not used, or hold what files hold too."""
    limit, used, *files = names
    try:
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        sizes = dict(line.split() for line in lines)
        return max(left + sum(int(sizes[name]) for name in files), 0)
    except (OSError, LookupError, ValueError):  # there is no limit, or it is "max"
        return math.inf


# ---- bytes --------------------------------------------------------------------------------------

def frozen_bytes(config: GPTConfig, m: Machine, kind: str) -> int:
    """A model that is ready for decoding. The plain decoder has matrices in float32, of which
    autocast makes copies. The others have them in autocast's dtype, and the output embedding once
    more; on a CPU that is packed in float32 too."""
    if not isinstance(config, GPTConfig):  # of another family, which is not packed
        head = config.vocab_size * config.n_embd * m.dtype.itemsize
        others = config.parameters - config.in_layers  # embeddings, which stay float32
        return config.in_layers * m.dtype.itemsize + 4 * others + head
    embeddings = (config.vocab_size + config.n_positions) * config.n_embd
    head = config.vocab_size * config.n_embd
    if m.dtype == torch.float32:
        packed = kind != "plain" and m.device.type == "cpu"
        return 4 * (config.parameters + (head if packed else 0))
    if kind == "plain":
        return 4 * config.parameters + 2 * (config.parameters - embeddings + head)
    return 2 * (config.parameters - embeddings + head) + 4 * embeddings


def update_bytes(config: GPTConfig, cost: Measured, m: Machine, rows: int, tokens: int,
                 logits: float, recompute: bool) -> float:
    """What an update holds besides 16 bytes of each weight: the activations of a micro-batch, or
    with `recompute` the inputs of its layers and the activations of one; the output embedding and
    its gradient, and autocast's copies of the matrices; and some logits."""
    layers = config.n_layer * cost.layer_bytes
    if recompute:
        layers = config.n_layer * config.n_embd * 4 + cost.layer_bytes
    held = rows * tokens * layers + 4 * config.vocab_size * config.n_embd + logits
    if m.dtype != torch.float32:
        held += 2 * config.parameters
    if m.device.type == "cpu" and not isinstance(config, GPTConfig):
        held *= HOLES_FAMILY
    elif m.device.type == "cpu":
        held *= HOLES_FLOAT32 if m.dtype == torch.float32 else HOLES
    return held


def trained_bytes(config: GPTConfig, shard: bool, m: Machine) -> float:
    """Weights in float32, their gradients and AdamW's moments; with --shard this process's part of
    those in layers, and one layer whole with its gradient."""
    if not shard:
        return 16 * config.parameters
    embeddings = (config.vocab_size + getattr(config, "n_positions", 0)) * config.n_embd
    split = getattr(config, "in_layers", 0) or config.parameters - embeddings
    return 16 * (config.parameters - split + split / m.world) + 8 * split / config.n_layer


def logits_bytes(copies: int, config: GPTConfig, m: Machine, rows: int, predicted: int) -> int:
    """Copies in float32 of the logits that exist at a time: of all rows, if there is room, and of
    one at least. Rows shorter than the longest fill the room better."""
    row = predicted * config.vocab_size
    return copies * 4 * min(rows * row, max(m.logits, row))


def decode_bytes(configs: list[GPTConfig], m: Machine, rows: int, tokens: int) -> float:
    """Key-value caches, and 40 bytes for each row and word of the vocabulary: log-probabilities in
    float32, and a distribution function in float64."""
    size = 4 if m.device.type == "cpu" else m.dtype.itemsize
    width = sum(2 * config.n_layer * getattr(config, "kv_width", config.n_embd)
                for config in configs)
    return rows * (tokens * width * size + 40 * configs[0].vocab_size)


# ---- stages -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Lengths:
    """Rows of the data, and the mean length of those to train on, in tokens."""
    prompt: float
    answer: float
    train: int
    valid: int
    test: int

    @property
    def tokens(self) -> float:
        return self.prompt + self.answer


def lengths_of(cfg: distill.Config, tokenizer) -> Lengths:
    limits = (cfg.max_prompt_tokens, cfg.max_tokens)
    train = data.load_examples(cfg.data, "train", tokenizer, *limits, lambda *words: None)
    prompt = sum(len(example.prompt) for example in train) / len(train)
    answer = sum(len(example.response) for example in train) / len(train)
    split = "valid" if is_file_of_rows(cfg.data) else "test"  # of the evaluation
    rows = [len(data.load_rows(cfg.data, name)) for name in ("valid", split)]
    return Lengths(prompt, answer, len(train), *rows)


@dataclass(frozen=True)
class Line:
    stage: str
    what: str
    updates: int
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Draft:
    """The plan of a run, whose models may not exist yet."""
    work: stages.Stages
    m: Machine
    lengths: Lengths
    shapes: dict[str, GPTConfig]  # by the name of a model
    costs: dict[int, Measured]  # by width; what is not there yet is measured

    @property
    def cfg(self) -> distill.Config:
        return self.work.minillm

    def cost(self, name: str) -> Measured:
        """What models of this one's width cost."""
        config = self.shapes[name]
        slow = self.m.device.type == "cpu" and config.n_embd > 256
        rows = min(self.cfg.micro_batch, 2) if slow else self.cfg.micro_batch
        length = max(2, round(self.lengths.tokens))
        alike = config.n_embd if isinstance(config, GPTConfig) else config.name or name
        while alike not in self.costs:
            try:
                cost = measure(config, self.m, rows, length, self.cfg.max_tokens,
                               self.cfg.one_model_decoder)
                self.costs[alike] = cost
            except torch.cuda.OutOfMemoryError:  # the run will halve its micro-batch too
                if rows == 1:
                    raise
                rows //= 2
        return self.costs[alike]

    def step(self, names: list[str]) -> float:
        """Seconds of a decoding step of these models."""
        return sum(self.cost(name).step(self.shapes[name].n_layer) for name in names)

    def read(self, name: str, samples: float, tokens: float, predicted: float) -> float:
        return self.cost(name).read(self.shapes[name].n_layer, samples, tokens, predicted)

    def decode(self, names: list[str], answers: float, together: int) -> float:
        """Seconds to decode answers of full length with these models in step. A collection of
        `together` answers takes as many batches as it needs."""
        batches = math.ceil(together / self.m.world / self.m.sample_batch) * answers / together
        return batches * self.cfg.response_tokens * self.step(names)

    def take_turns(self, answers: float) -> float:
        """Seconds to decode answers of full length by turns: each model draws its share of the
        tokens, and reads what the other has drawn in a forward pass."""
        cfg, world = self.cfg, self.m.world
        groups = GROUPS // math.gcd(GROUPS, world)  # of one process
        batches = groups * math.ceil(cfg.rollouts / world / groups / self.m.sample_batch)
        total = 0.0
        for name, share in ((cfg.student, 1 - cfg.mix_alpha), (cfg.teacher, cfg.mix_alpha)):
            steps = batches * answers / cfg.rollouts * share * self.cfg.response_tokens
            read = (1 - share) * self.cfg.response_tokens
            total += steps * self.step([name]) + self.read(name, answers / world, read, read)
        return total

    def compare(self, names: list[str], rows: int, times: float) -> float:
        """Seconds to answer so many rows, so many times, with the first of these models, and to
        read the answers with both if there are two."""
        cfg, each = self.cfg, self.decode(names[:1], rows, rows)
        if len(names) > 1:
            each += sum(self.read(name, rows / self.m.world, cfg.max_tokens, cfg.response_tokens)
                        for name in names)
        return times * each

    def supervised(self, name: str, s: supervised.Config) -> Line:
        config, cost, m = self.shapes[s.model], self.cost(s.model), self.m
        updates, evals, lr = supervised.schedule(s, config, self.lengths.train)
        samples = updates * s.batch_size / m.world
        names = [s.model, s.teacher] if s.teacher else [s.model]
        tokens, answer = self.lengths.tokens, self.lengths.answer
        time = cost.train(config.n_layer, samples, tokens, answer, s.recompute)
        time += updates * cost.update(config.n_layer)
        time += self.compare(names, self.lengths.valid, evals)
        size = trained_bytes(config, s.shard, m)
        logits = logits_bytes(KD if s.teacher else GOLD, config, m, s.micro_batch,
                              s.max_tokens)
        size += update_bytes(config, cost, m, s.micro_batch, s.max_tokens, logits, s.recompute)
        if s.teacher:
            time += self.read(s.teacher, samples, tokens, answer)
            size += frozen_bytes(self.shapes[s.teacher], m, self.cfg.decoder)
        return Line(name, f"{s.model} on {s.data} at {lr:g}", updates, size, time)

    def answers(self, s: sampling.Config) -> Line:
        config, rows = self.shapes[s.model], self.lengths.train
        size = 4 * config.parameters + frozen_bytes(config, self.m, self.cfg.decoder)
        size += decode_bytes([config], self.m, self.m.sample_batch, self.cfg.max_tokens)
        what = f"the teacher answers each of {rows:,} prompts"
        return Line("answers", what, 0, size, self.decode([s.model], rows, rows))

    def minillm(self) -> Line:
        cfg, m, both = self.cfg, self.m, [self.cfg.student, self.cfg.teacher]
        student, teacher = self.shapes[cfg.student], self.shapes[cfg.teacher]
        cost, layers = self.cost(cfg.student), student.n_layer
        samples, longest = cfg.steps * cfg.minibatch / m.world, cfg.response_tokens
        tokens, answer = self.lengths.tokens, self.lengths.answer
        collections = math.ceil(cfg.steps * cfg.minibatch / cfg.rollouts / cfg.inner_epochs)
        answers = cfg.rollouts * collections

        time = self.compare(both, self.lengths.valid, cfg.steps / cfg.eval_every + 1)
        if cfg.source == "gold":
            time += sum(self.read(name, answers / m.world, tokens, answer) for name in both)
        elif cfg.decoder == "turns":
            time += self.take_turns(answers)
        else:
            time += self.decode(both, answers, cfg.rollouts)
        time += cfg.steps * cost.update(layers)
        time += cost.train(layers, samples, tokens, answer, cfg.recompute)
        time += self.cost(cfg.teacher).read(0, samples, 0, answer)  # its output only
        if cfg.pt_coef:
            time += cost.train(layers, samples, cfg.max_tokens, cfg.max_tokens, cfg.recompute)
        if cfg.pt_coef and cfg.pt_kd:
            time += self.read(cfg.teacher, samples, cfg.max_tokens, cfg.max_tokens)

        rows = math.ceil(cfg.rollouts / m.world)
        size = trained_bytes(student, cfg.shard, m)
        size += frozen_bytes(student, m, cfg.decoder) + frozen_bytes(teacher, m, cfg.decoder)
        size += rows * longest * (teacher.n_embd * m.dtype.itemsize + 40)  # the rollout
        decoding = decode_bytes([student, teacher], m, min(rows, m.sample_batch), cfg.max_tokens)
        logits = logits_bytes(MINILLM, student, m, cfg.micro_batch, longest)
        if cfg.pt_coef:
            copies = KD if cfg.pt_kd else GOLD
            of_text = logits_bytes(copies, student, m, cfg.micro_batch, cfg.max_tokens)
            logits = max(logits, of_text)
        update = update_bytes(student, cost, m, cfg.micro_batch, cfg.max_tokens, logits,
                              cfg.recompute)
        source = "references" if cfg.source == "gold" else "answers from the mixture"
        what = f"{answers:,} {source}, {cfg.inner_epochs} inner epochs"
        return Line("minillm", what, cfg.steps, size + max(decoding, update), time)

    def evaluation(self, models: int) -> Line:
        cfg, m, both = self.cfg, self.m, [self.cfg.student, self.cfg.teacher]
        student, teacher = self.shapes[cfg.student], self.shapes[cfg.teacher]
        rows, times = self.lengths.test, SEEDS * models
        size = 4 * student.parameters
        size += frozen_bytes(student, m, cfg.decoder) + frozen_bytes(teacher, m, cfg.decoder)
        size += decode_bytes([student, teacher], m, m.sample_batch, cfg.max_tokens)
        time = self.compare(both, rows, times) + self.compare(both[::-1], rows, times)
        what = (f"{models} models, {SEEDS} seeds: {rows * times:,} answers, and as many of "
                "the teacher")
        return Line("evaluate", what, 0, size, time)

    def lines(self) -> list[Line]:
        """The stages that are still to do."""
        work, out = self.work, Path(self.cfg.out)
        training = {"teacher": work.teacher, "init": work.init} | work.baselines
        lines = []
        for name, settings in training.items():
            if name == "seqkd" and not Path(work.answers.out).is_file():
                lines.append(self.answers(work.answers))
            if settings is not None and is_to_do(settings.out, settings):
                lines.append(self.supervised(name, settings))
        if is_to_do(out / "minillm", work.minillm):
            lines.append(self.minillm())
        if lines or not (out / "results.json").is_file():
            lines.append(self.evaluation(3 + len(work.baselines)))
        return lines


def is_to_do(out: str | Path, cfg) -> bool:
    finished = (Path(out) / "results.json").is_file()
    return not finished or runs.to_be_longer(Path(out), cfg)


def first_of(work: stages.Stages, name: str) -> str:
    """The model that a stage begins with if this is its result, else the model itself."""
    origin = {s.out: s.model for s in (work.teacher, work.init) if s is not None}
    return origin.get(name, name)


def tokenizer_of(work: stages.Stages, model: str) -> tiktoken.Encoding:
    first, cfg = first_of(work, model), work.minillm
    return (data.tokenizer_for(cfg.data) if is_shape(first)
            else data.load_tokenizer(first, cfg.template))


def shapes_of(work: stages.Stages, tokenizer: tiktoken.Encoding) -> dict[str, GPTConfig]:
    """The config of each model that is trained, or teaches. A model that does not exist yet has the
    shape of the one that its stage begins with."""
    names = {work.minillm.student, work.minillm.teacher}
    names |= {s.model for s in (work.teacher, work.init, *work.baselines.values()) if s is not None}
    shapes = {}
    for name in names:
        first = first_of(work, name)
        shapes[name] = new_config(first, tokenizer) if is_shape(first) else read_config(first)
    return shapes


# ---- what distill.py calls ----------------------------------------------------------------------

def check(cfg: distill.Config, work: stages.Stages) -> None:
    """Raises UserError, before there is any work, for what a later stage would stumble over."""
    m, out = machine(cfg.device, cfg.dtype, cfg.sample_batch), Path(cfg.out)
    if is_file_of_rows(cfg.data):
        data.load_rows(cfg.data, "train")  # a bad row is told before the vocabulary is fetched
    tokenizer = tokenizer_of(work, work.minillm.student)
    shapes = shapes_of(work, tokenizer)
    student, teacher = shapes[work.minillm.student], shapes[work.minillm.teacher]
    data.same_vocabulary(tokenizer, tokenizer_of(work, work.minillm.teacher))
    room = min(student.n_positions, teacher.n_positions)
    if cfg.max_tokens > room:
        raise UserError(f"--max_tokens={cfg.max_tokens} is more than these models' {room} "
                        "positions; --preset=tiny has the built-in world's lengths")
    if cfg.pt_coef:
        texts.text_files(cfg.corpus)
    for line in work.decided:
        m.say(line)
    if cfg.plan == "only":
        return
    for settings in (work.teacher, work.init, *work.baselines.values()):
        if settings is not None:
            runs.is_finished(Path(settings.out), settings, supervised.FREE)
    runs.is_finished(out / "minillm", work.minillm, distill.FREE)
    results = out / "results.json"
    if results.is_file() and results.read_text(encoding="utf-8")[:1] != "[":
        raise UserError(f"--out={out} holds results of something else: give another folder")
    if (out / "run.json").is_file():
        raise UserError(f"--out={out} is the folder of a single stage: give another folder")
    for name in {cfg.teacher, cfg.student}:
        if Path(name).is_dir():
            load(name)  # what is wrong with weights is told before any are trained
    m.barrier()  # all processes have looked before one writes
    if cfg.pt_coef and not (out / "minillm" / "results.json").is_file():
        data.load_pieces(cfg.corpus, tokenizer, out / "minillm", cfg.max_tokens, m)


def show(work: stages.Stages, what: str) -> None:
    """Prints the plan of what is still to do. Raises UserError, in every process, if a stage needs
    more memory than one of them has free."""
    cfg = work.minillm
    m = machine(cfg.device, cfg.dtype, cfg.sample_batch)
    free = free_memory(m)
    m.barrier()  # all have looked before one measures
    tokenizer = tokenizer_of(work, work.minillm.student)
    draft = Draft(work, m, lengths_of(cfg, tokenizer), shapes_of(work, tokenizer), {})
    lines = draft.lines()

    processes = f", {m.world} processes" if m.world > 1 else ""
    room = f"{free / 2**30:.1f} GiB are free" if free < math.inf else "free memory is unknown"
    m.say(f"plan: {what}, on {m.device} in {str(m.dtype)[6:]}{processes}; {room}")
    if not lines:
        m.say("  everything is done already")
        return
    m.say(f"  {'stage':9}{'updates':>9}{'memory':>11}{'time':>18}   what")
    for line in lines:
        memory = f"{line.bytes / 2**30:.2f} GiB"
        m.say(f"  {line.stage:9}{line.updates or '':9}{memory:>11}{clock(line.seconds):>18}   "
              f"{line.what}")
    m.say("  measured just now, on one and two layers, for samples of mean length and answers of "
          "full length\n")
    for line in lines:
        short = torch.tensor(float(line.bytes > free), device=m.device)
        m.max(short)
        if short:
            raise UserError(f"{line.stage} needs about {line.bytes / 2**30:.1f} GiB, and {room}: "
                            "lower --micro_batch or --sample_batch, give --recompute, choose "
                            "smaller models, or go on regardless with --plan=off")


# ---- command ------------------------------------------------------------------------------------

GPT2S = {"gpt2": GPTConfig(), "gpt2-medium": GPTConfig(24, 16, 1024),
         "gpt2-large": GPTConfig(36, 20, 1280), "gpt2-xl": GPTConfig(48, 25, 1600)}
DEVICES = (1, 2, 4, 8)


def large(D: int, layers: int, vocab: int, parameters: int, activations: int) -> dict:
    """A model of the paper that is not read here: its shape, and the bytes of activations of a
    token in a layer, which are so many times its width in small models of its family."""
    return dict(shape=FamilyConfig("", "", layers, 1, D, vocab, 2048, (), parameters, D,
                                   12 * layers * D**2), activations=activations * D)


# (teacher, student) of the paper's Table 1
PAIRS = {"opt": [("opt-13b", "opt-1.3b"), ("opt-13b", "opt-2.7b"), ("opt-13b", "opt-6.7b")],
         "llama": [("llama-13b", "llama-7b")]}
LARGE = {"opt-1.3b": large(2048, 24, 50272, 1_315_758_080, 33),
         "opt-2.7b": large(2560, 32, 50272, 2_651_596_800, 33),
         "opt-6.7b": large(4096, 32, 50272, 6_658_473_984, 33),
         "opt-13b": large(5120, 40, 50272, 12_853_473_280, 33),
         "llama-7b": large(4096, 32, 32000, 6_738_415_616, 56),
         "llama-13b": large(5120, 40, 32000, 13_015_864_320, 56)}


@dataclass(frozen=True)
class Config:
    pairs: Literal["gpt2", "opt", "llama"] = flag("gpt2", "whose; of opt and llama memory only")
    prompt_tokens: int = flag(71, "mean length of a prompt; Dolly's")
    response_tokens: int = flag(68, "mean length of an answer; Dolly's")
    steps: int = flag(distill.PAPER["steps"], "updates of phase 2")
    micro_batch: int = flag(distill.PAPER["micro_batch"], "answers of a forward pass")
    sample_batch: int = flag(distill.PAPER["sample_batch"], "answers that are decoded together")
    decoder: Literal["fast", "turns", "captured", "plain"] = flag("turns", "how answers are drawn")
    recompute: bool = flag(False, "make each layer again in the backward pass, to save memory")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "autocast's dtype")

    def __post_init__(self):
        check_ranges(self, prompt_tokens=(1, 256), response_tokens=(1, 256), steps=(1, 10**9),
                     micro_batch=(1, 10**6), sample_batch=(1, 10**6))


def estimate(cfg: Config) -> dict[tuple[str, str], list[float]]:
    """Prints the memory that phase 2 takes of each of several GPUs for the paper's larger pairs, by
    formula: nothing is loaded or measured. Returns the bytes, by teacher and student."""
    gpu = Machine(torch.device("cuda"), torch.bfloat16, 0, 1, cfg.sample_batch, int(5.2e7))
    shapes = {name: model["shape"] for name, model in LARGE.items()}
    costs = {name: Measured(0, 0, 0, model["activations"], 0, 0, 0, 0)
             for name, model in LARGE.items()}
    lengths = Lengths(cfg.prompt_tokens, cfg.response_tokens, 11_237, 1000, 500)
    print("phase 2, estimated memory of each GPU in bfloat16, GiB; nothing was measured\n"
          f"  {'teacher':12}{'student':12}{'':22}" + "".join(f"{n:>8}" for n in DEVICES))
    found = {}
    for teacher, student in PAIRS[cfg.pairs]:
        for more in ("", "--recompute", "--shard", "--shard --recompute"):
            minillm = make(distill.Config, dict(
                preset="paper", teacher=teacher, student=student, micro_batch=cfg.micro_batch,
                sample_batch=cfg.sample_batch, recompute="recompute" in more,
                shard="shard" in more), distill.presets)
            work = stages.Stages(None, None, None, {}, minillm)
            drafts = (Draft(work, replace(gpu, world=n), lengths, shapes, costs) for n in DEVICES)
            found[teacher, student, more] = [draft.minillm().bytes for draft in drafts]
            cells = "".join(f"{x / 2**30:8.0f}" for x in found[teacher, student, more])
            print(f"  {teacher:12}{student:12}{more:22}{cells}")
    return found


def main(cfg: Config) -> dict[tuple[str, str], list[Line]]:
    """Prints memory and time of phase 2 for every GPT-2 with every teacher of its size or more, on
    several numbers of devices like this one. Returns the lines, by teacher and student."""
    if cfg.pairs != "gpt2":
        return estimate(cfg)
    m = machine(cfg.device, cfg.dtype, cfg.sample_batch)
    m.say(f"phase 2, {cfg.steps:,} updates, memory of a device and time, on 1 to 8 devices like "
          f"this one: {m.device} in {str(m.dtype)[6:]}")
    m.say(f"  {'teacher':12}{'student':12}" + "".join(f"{world:>27}" for world in DEVICES))
    lengths = Lengths(cfg.prompt_tokens, cfg.response_tokens, 11_237, 1000, 500)  # Dolly's rows
    given = {"preset": "paper"} | {name: getattr(cfg, name) for name in (
        "steps", "micro_batch", "sample_batch", "decoder", "recompute")}
    costs, pairs = {}, {}
    for student, small in GPT2S.items():
        for teacher, large in GPT2S.items():
            if large.parameters < small.parameters:
                continue
            names = {"teacher": teacher, "student": student}
            minillm = make(distill.Config, given | names, distill.presets)
            work = stages.Stages(None, None, None, {}, minillm)
            lines = []
            for world in DEVICES:
                lines.append(Draft(work, replace(m, world=world), lengths, GPT2S, costs).minillm())
            cells = [f"{line.bytes / 2**30:.1f} GiB {clock(line.seconds)}" for line in lines]
            m.say(f"  {teacher:12}{student:12}" + "".join(f"{cell:>27}" for cell in cells))
            pairs[teacher, student] = lines
    m.say("  measured just now on one device: training and decoding at these widths, on one and on "
          "two layers.\n  extrapolated: the number of layers; several devices, as equal shares, "
          "without the time to sum gradients")
    return pairs


if __name__ == "__main__":
    run(main, Config)
