"""Speed and memory of our own parts, one JSON line each, beside this machine's floor and, on demand, beside a peer.

Weights and prompts are random, so nothing is downloaded, and end tokens are off, so every answer has full length. We
and the peer take turns, each in a process of its own. The second of a turn's two runs counts: after a pause the same
work took up to a third longer. Figures are medians, and only their ratio means much.

Run:      python bench.py --parts=sample_q,sample_mixed
          python bench.py --against=transformers
          python bench.py --student=6x12x768 --teacher=12x12x768 --parts=cycle --against=trl
          python bench.py --parts=sample_mixed,update --response_tokens=64,128,256,512 --figure=out/growth.svg
Peers:    transformers; trl, whose MiniLLM trainer is gone from 1.16 (pip install trl==1.14.2); nanogpt, which is no
          package: --nanogpt=FOLDER of its repository.
Shapes:   B answers, P prompt tokens, T response tokens.
Left out: multi-GPU scaling (log.jsonl of a run has the seconds); the quality of what is computed (the tests').
"""

import contextlib
import copy
import importlib.util
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import distill
import teacher as supervised
from config import Machine, UserError, check, check_place, flag, machine, run
from data import Example, Row
from eval import rouge_l
from model import GPT, GPTConfig, frozen, is_shape, trained
from sample import Rollout, sample, turns, uniforms

ALPHA = 0.2  # of Eq. (4)
UNCOUNTED = 1  # first turns, in which what is made once is made and memory settles
PARTS = ("sample_q", "sample_p", "sample_mixed", "update", "cycle", "collection", "sft", "rouge")


@dataclass(frozen=True)
class Config:
    parts: str = flag(",".join(PARTS), "what to time")
    student: str = flag("12x12x768", "LAYERSxHEADSxWIDTH, with GPT-2's vocabulary; gpt2 is 12x12x768")
    teacher: str = flag("24x16x1024", "likewise; gpt2-medium is 24x16x1024, gpt2-xl 48x25x1600")
    batch: int = flag(8, "answers decoded together, and answers of an update, B")
    micro_batch: int | None = flag(None, "answers of a forward pass in an update; default all of them")
    turns: bool = flag(True, "in the mixture p or q draws a token of all answers of a batch; else each from p~")
    capture: bool = flag(False, "on a GPU: record a decoding step as a CUDA graph, and replay it")
    recompute: bool = flag(False, "make each layer again in the backward pass")
    compile: bool = flag(False, "torch.compile what is trained")
    prompt_tokens: int = flag(64, "P")
    response_tokens: str = flag("64", "T; or several, as in 64,128,256,512")
    pt_tokens: int = flag(0, "length of the pieces of D_PT in an update, as many as answers; 0 for none")
    rollouts: int | None = flag(None, "answers of a collection; default twice --batch")
    inner_epochs: int = flag(4, "passes over a collection")
    sft_tokens: int = flag(256, "length of a sample of supervised training")
    repeats: int = flag(3, "turns of each side, after one that does not count")
    against: Literal["none", "transformers", "trl", "nanogpt"] = flag("none", "time the same shapes there too, in turn")
    nanogpt: str | None = flag(None, "folder of nanoGPT's repository")
    peer_dtype: Literal["same", "float32", "bfloat16"] = flag("same", "what the peer computes in")
    figure: str | None = flag(None, "draw seconds over T there, .svg or .png")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "what autocast computes in")

    def __post_init__(self):
        check(self, batch=(1, 10**5), micro_batch=(1, 10**5), prompt_tokens=(1, 1022), pt_tokens=(0, 1024),
              rollouts=(1, 10**5), inner_epochs=(1, 1000), sft_tokens=(2, 1024), repeats=(1, 1000))
        check_place(self, file="figure")
        for part in self.parts.split(","):
            if part not in PARTS:
                raise UserError(f"--parts={self.parts}: {part!r} is none of {', '.join(PARTS)}")
        for name in (self.student, self.teacher):
            if not is_shape(name):
                raise UserError(f"{name!r} is no LAYERSxHEADSxWIDTH, such as 12x12x768")
            GPTConfig(*map(int, name.split("x")))
        for length in self.response_tokens.split(","):
            if not length.isdecimal() or not 0 < int(length) <= 1024 - self.prompt_tokens:
                raise UserError(f"--response_tokens={self.response_tokens}: {length!r} is no number from 1 to "
                                f"{1024 - self.prompt_tokens}, which is what --prompt_tokens leaves of 1024 positions")
        if self.pt_tokens == 1:
            raise UserError("--pt_tokens=1: nothing is predicted in a piece of one token; give 0 for none")
        if self.capture and self.turns:
            raise UserError("--capture records a step of both models, and turns take one of either: give --turns=False")
        if self.answers % self.batch:
            raise UserError(f"--rollouts={self.rollouts} is not a multiple of --batch={self.batch}")
        if self.against == "nanogpt" and not (self.nanogpt and (Path(self.nanogpt) / "model.py").is_file()):
            raise UserError(f"--nanogpt={self.nanogpt}: give the folder of nanoGPT's repository, with its model.py")
        if self.pt_tokens and self.against != "none":
            raise UserError(f"--pt_tokens={self.pt_tokens} and --against={self.against}: no peer has D_PT; give one")
        if self.figure and Path(self.figure).suffix not in (".svg", ".png"):
            raise UserError(f"--figure={self.figure} must end in .svg or .png")

    @property
    def answers(self) -> int:
        return self.rollouts or 2 * self.batch


def draw(count: int, length: int) -> list[list[int]]:
    """Rows of random tokens from GPT-2's vocabulary, without its end token."""
    return np.random.default_rng(0).integers(0, 50256, (count, length)).tolist()


# ---- ours -----------------------------------------------------------------------------------------------------------

class Ours:
    """Each part as a method without arguments. What a part needs is made on first use."""

    def __init__(self, cfg: Config, m: Machine, response_tokens: int):
        self.cfg, self.m, self.T, self.spent, self.collections = cfg, m, response_tokens, {}, 0
        self.prompts = draw(cfg.batch, cfg.prompt_tokens)
        self.samples = [Example(Row(""), row[:1], row[1:]) for row in draw(cfg.batch, cfg.sft_tokens)]
        self.pieces = [Example(Row(""), row[:1], row[1:]) for row in draw(cfg.batch, cfg.pt_tokens) if row]

    def new(self, shape: str) -> GPT:
        torch.manual_seed(0)
        with self.m.device:  # a CPU takes 15 s to draw GPT-2 XL
            model = GPT(GPTConfig(*map(int, shape.split("x")), eos_token_id=-1, resid_pdrop=0.0))
        for p in model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.02)
        return model

    @cached_property
    def student(self) -> GPT:
        return trained(self.new(self.cfg.student), self.cfg.recompute, self.cfg.compile)

    @cached_property
    def q(self) -> GPT:
        return frozen(self.new(self.cfg.student), self.m.dtype)

    @cached_property
    def p(self) -> GPT:
        return frozen(self.new(self.cfg.teacher), self.m.dtype)

    @cached_property
    def optimizer(self):
        return supervised.optimizer_of(self.student, self.m, (0.9, 0.95), 0.0)

    @cached_property
    def rollout(self) -> Rollout:
        return self.decode(self.q, self.p)

    @cached_property
    def R(self) -> Tensor:
        return self.returns(self.rollout)

    @contextlib.contextmanager
    def clocked(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.m.synchronize()
        self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - began

    def decode(self, model: GPT, teacher: GPT | None, groups: int = 1) -> Rollout:
        """An answer of each group to each prompt."""
        self.collections += 1
        answers, alpha = range(groups * self.cfg.batch), ALPHA if teacher else 0.0
        turn = turns(0, self.collections, answers, self.T, alpha, groups) if teacher and self.cfg.turns else None
        with self.clocked("decode"):
            return sample(model, self.prompts * groups, uniforms(0, answers, self.T), self.m, teacher, alpha,
                          self.cfg.batch, keep_hidden=teacher is not None, turn=turn)

    def sample_q(self) -> None:
        self.decode(self.q, None)

    def sample_p(self) -> None:
        self.decode(self.p, None)

    def sample_mixed(self) -> None:
        self.decode(self.q, self.p)

    def returns(self, rollout: Rollout) -> Tensor:
        reward = distill.token_reward(rollout.teacher_logp, rollout.student_logp)
        return distill.future_reward(reward, rollout.response_mask)

    def learn(self, rollout: Rollout, R: Tensor, rows: list[int]) -> None:
        """One update on these answers, and on as many pieces of D_PT, as distill.py takes it."""
        (optimizer, scaler), cfg, B = self.optimizer, self.cfg, len(rows)
        with self.clocked("gradient"):
            distill.accumulate(cfg.micro_batch or cfg.batch, self.student, self.p, rollout, rows, R, self.pieces,
                               B * self.T, B * (cfg.pt_tokens - 1), distill.Config(), self.m, scaler)
        with self.clocked("optimizer"):
            supervised.apply_update(self.student, optimizer, scaler, self.m, 1e-6, 1.0)

    def update(self) -> None:
        self.learn(self.rollout, self.R, list(range(self.cfg.batch)))

    def collect(self, groups: int, epochs: int) -> None:
        rollout = self.decode(frozen(self.student, self.m.dtype), self.p, groups)
        R = self.returns(rollout)
        for epoch in range(epochs):
            for batch in distill.minibatches(len(R), self.cfg.batch, (0, epoch)):
                self.learn(rollout, R, batch)

    def cycle(self) -> None:
        """B answers, and one update on them."""
        self.collect(1, 1)

    def collection(self) -> None:
        self.collect(self.cfg.answers // self.cfg.batch, self.cfg.inner_epochs)

    def sft(self) -> None:
        optimizer, scaler = self.optimizer
        with self.clocked("gradient"):
            backward = lambda loss: scaler.scale(loss / (self.cfg.batch * (self.cfg.sft_tokens - 1))).backward()
            supervised.answer_loss(self.student, self.samples, self.m, backward=backward)
        with self.clocked("optimizer"):
            supervised.apply_update(self.student, optimizer, scaler, self.m, 1e-6, 1.0)

    def rouge(self) -> None:
        for n in range(100):
            rouge_l(" ".join(f"word{(n * i) % 97}" for i in range(64)), [" ".join(f"word{i % 89}" for i in range(64))])


# ---- peers, as one would use them -----------------------------------------------------------------------------------

class Peer:
    """What all peers share. Each has a `student` and its `optimizer`."""

    def __init__(self, cfg: Config, m: Machine, response_tokens: int):
        self.cfg, self.m, self.T = cfg, m, response_tokens
        self.dtype = m.dtype if cfg.peer_dtype == "same" else getattr(torch, cfg.peer_dtype)
        self.tokens = torch.tensor(draw(cfg.batch, cfg.prompt_tokens), device=m.device)
        self.samples = torch.tensor(draw(cfg.batch, cfg.sft_tokens), device=m.device)

    def autocast(self):
        return torch.autocast(self.m.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Transformers(Peer):
    """generate() for one model; for two the plain loop over tokens; for a cycle the calls that the released code of the
    paper makes: two generations, three passes of each model over the answers, and the teacher again in the update."""

    def new(self, shape: str):
        from transformers import GPT2Config, GPT2LMHeadModel
        n_layer, n_head, n_embd = map(int, shape.split("x"))
        with self.m.device:
            return GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, resid_pdrop=0.0,
                                              embd_pdrop=0.0, attn_pdrop=0.0))

    @cached_property
    def student(self):
        return self.new(self.cfg.student)

    @cached_property
    def teacher(self):
        return self.new(self.cfg.teacher).to(self.dtype).eval()

    @cached_property
    def q(self):
        """The student for decoding, loaded in the dtype itself, as one would."""
        return self.new(self.cfg.student).to(self.dtype).eval()

    @cached_property
    def optimizer(self):
        return torch.optim.AdamW(self.student.parameters(), lr=1e-6)

    @cached_property
    def whole(self) -> Tensor:
        return self.mixed(self.q)

    def generate(self, model) -> Tensor:
        return model.generate(self.tokens, attention_mask=torch.ones_like(self.tokens), do_sample=True, top_k=0,
                              max_new_tokens=self.T, min_new_tokens=self.T, pad_token_id=50256)

    def sample_q(self) -> None:
        self.generate(self.q)

    def sample_p(self) -> None:
        self.generate(self.teacher)

    @torch.no_grad()
    def mixed(self, student) -> Tensor:
        tokens, feed, caches = self.tokens, self.tokens, [None, None]
        for _ in range(self.T):
            outputs = [model(feed, past_key_values=cache, use_cache=True)
                       for model, cache in zip((student, self.teacher), caches)]
            caches = [output.past_key_values for output in outputs]
            q, p = (output.logits[:, -1].float().softmax(-1) for output in outputs)
            feed = torch.multinomial((1 - ALPHA) * q + ALPHA * p, 1)
            tokens = torch.cat([tokens, feed], 1)
        return tokens

    def sample_mixed(self) -> None:
        self.mixed(self.q)

    def update(self) -> None:
        self.learn(self.whole)

    def learn(self, tokens: Tensor) -> None:
        response, at = tokens[:, self.cfg.prompt_tokens :], slice(self.cfg.prompt_tokens - 1, -1)
        with self.autocast():
            with torch.no_grad():
                log_p = self.teacher(tokens).logits[:, at].float().log_softmax(-1)
            log_q = self.student(tokens).logits[:, at].float().log_softmax(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            logp = log_q.gather(-1, response[..., None]).squeeze(-1)
            (kl - logp).mean().backward()
        self.step()

    def cycle(self) -> None:
        student = copy.deepcopy(self.student).to(self.dtype).eval()
        tokens, other = self.mixed(student), self.generate(student)
        with torch.no_grad():
            for scored in (tokens, tokens, other):
                self.teacher(scored).logits.float().log_softmax(-1)
                student(scored).logits.float().log_softmax(-1)
        del student
        self.learn(tokens)

    def sft(self) -> None:
        with self.autocast():
            self.student(self.samples, labels=self.samples).loss.backward()
        self.step()


class Trl(Transformers):
    """A step of TRL's MiniLLM trainer, which neither mixes nor has D_PT; its return is the default, or Eq. (2)'s."""

    @cached_property
    def trainer(self):
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from trl.experimental.minillm import MiniLLMConfig, MiniLLMTrainer
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50257)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w50256", pad_token="w50256")
        rows = [{"prompt": " ".join(f"w{token}" for token in row)} for row in self.tokens.tolist()] * 2
        self.folder = tempfile.TemporaryDirectory()  # removed with this object
        args = MiniLLMConfig(
            output_dir=self.folder.name, per_device_train_batch_size=self.cfg.batch, num_generations=2, max_steps=1,
            max_completion_length=self.T, generation_kwargs={"min_new_tokens": self.T}, temperature=1.0, gamma=1.0,
            bf16=self.dtype == torch.bfloat16, gradient_checkpointing=False, learning_rate=1e-6, report_to=[],
            use_cpu=self.m.device.type == "cpu", save_strategy="no", logging_strategy="no", disable_tqdm=True)
        trainer = MiniLLMTrainer(self.student, self.new(self.cfg.teacher), args=args, processing_class=tokenizer,
                                 train_dataset=Dataset.from_list(rows))
        trainer.train()  # makes the optimizer
        return trainer

    @property
    def optimizer(self):
        return self.trainer.optimizer

    def cycle(self) -> None:
        batch = next(iter(self.trainer.get_train_dataloader()))
        self.trainer.training_step(self.trainer.model_wrapped, batch, None)
        self.step()


class NanoGPT(Peer):
    """nanoGPT's model and optimizer; it generates without a cache, and on a CPU its AdamW is not fused."""

    def __init__(self, cfg: Config, m: Machine, response_tokens: int):
        super().__init__(cfg, m, response_tokens)
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(cfg.nanogpt) / "model.py")
        self.code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.code)

    @cached_property
    def student(self):
        n_layer, n_head, n_embd = map(int, self.cfg.student.split("x"))
        with contextlib.redirect_stdout(None):
            return self.code.GPT(self.code.GPTConfig(1024, 50257, n_layer, n_head, n_embd, 0.0)).to(self.m.device)

    @cached_property
    def optimizer(self):
        with contextlib.redirect_stdout(None):
            return self.student.configure_optimizers(0.0, 1e-6, (0.9, 0.95), self.m.device.type)

    def sample_q(self) -> None:
        with torch.no_grad(), self.autocast():
            self.student.generate(self.tokens, self.T)

    def sft(self) -> None:
        with self.autocast():
            _, loss = self.student(self.samples[:, :-1], self.samples[:, 1:].contiguous())
        loss.backward()
        self.step()


SIDES = {"ours": (Ours, PARTS), "nanogpt": (NanoGPT, ("sample_q", "sft")), "trl": (Trl, ("cycle",)),
         "transformers": (Transformers, ("sample_q", "sample_p", "sample_mixed", "update", "cycle", "sft"))}


# ---- the machine's floor --------------------------------------------------------------------------------------------

def measure_machine(m: Machine) -> tuple[float, float]:
    """FLOP/s of a large matrix product in autocast's dtype, and bytes/s of reading memory: the best of 20 each."""
    n, size = (8192, 2**31) if m.device.type == "cuda" else (2048, 2**28)
    a, b = torch.randn(2, n, n, device=m.device).to(m.dtype)
    words = torch.zeros(size // 4, dtype=torch.int32, device=m.device)
    rate = max(2 * n**3 / m.seconds(lambda: a @ b) for _ in range(20))
    bandwidth = max(words.nbytes / m.seconds(lambda: words.max()) for _ in range(20))
    if m.device.type == "cuda":  # 3 GB, which the processes to be timed may want
        del a, b, words
        torch.cuda.empty_cache()
    return rate, bandwidth


def floor(cfg: Config, m: Machine, part: str, T: int, rate: float, bandwidth: float) -> float | None:
    """The least seconds a part can take on this machine: for its products at the full rate, or to read, once a step,
    the weights and the keys and values so far, whichever is longer."""
    shapes = {name: GPTConfig(*map(int, name.split("x"))) for name in (cfg.student, cfg.teacher)}
    matrices = {name: shape.n_layer * 12 * shape.n_embd**2 for name, shape in shapes.items()}
    heads = {name: 50257 * shape.n_embd for name, shape in shapes.items()}
    size, B = m.dtype.itemsize, cfg.batch

    def products(name: str, tokens: float, predicted: float) -> float:
        unread = (tokens - predicted) * 9 * shapes[name].n_embd**2  # the last layer's, behind its attention
        return 2 * B * (tokens * matrices[name] - unread + predicted * heads[name]) / rate

    def read(name: str, tokens: float, predicted: float, held: float = 0.0) -> float:
        cache = 2 * shapes[name].n_layer * shapes[name].n_embd * B * held
        reading = size * (matrices[name] + heads[name] + cache) / bandwidth
        return max(reading, products(name, tokens, predicted))

    def decode(name: str, share: float = 1.0) -> float:  # of the tokens, in as many passes
        held = cfg.prompt_tokens + T / 2  # on average, with the token being read
        return read(name, cfg.prompt_tokens, 1) + share * (T - 1) * read(name, 1 / share, 1 / share, held)

    both = decode(cfg.student, 1 - ALPHA * cfg.turns) + decode(cfg.teacher, ALPHA if cfg.turns else 1.0)
    text = products(cfg.student, cfg.pt_tokens, cfg.pt_tokens - 1) if cfg.pt_tokens else 0.0
    update = 3 * (products(cfg.student, cfg.prompt_tokens + T, T) + text) + 2 * B * T * heads[cfg.teacher] / rate
    return {"sample_q": decode(cfg.student), "sample_p": decode(cfg.teacher), "sample_mixed": both, "update": update,
            "cycle": both + update, "collection": cfg.answers // B * (both + cfg.inner_epochs * update),
            "sft": 3 * products(cfg.student, cfg.sft_tokens, cfg.sft_tokens - 1)}.get(part)


# ---- command --------------------------------------------------------------------------------------------------------

def serve(side: str, part: str, T: int, cfg: Config, m: Machine, pipe: Connection) -> None:
    """Runs a part whenever it is asked to, and answers with seconds, what they went to, and peak GiB. Each side does so
    in a process of its own: neither the allocator's settings, which `machine` makes for ours, nor memory are shared."""
    owner = SIDES[side][0](cfg, machine(cfg.device, cfg.dtype, capture=cfg.capture) if side == "ours" else m, T)
    while pipe.recv():
        owner.spent = {}
        taken = m.seconds(getattr(owner, part))
        pipe.send((taken, owner.spent, m.peak_gib()))


def second_run(pipe: Connection) -> tuple[float, dict, float]:
    """Asks for two runs, and returns the answer to the second."""
    for _ in range(2):
        pipe.send(True)
        said = pipe.recv()
    return said


def measure(cfg: Config, m: Machine, part: str, T: int, rate: float, bandwidth: float) -> dict:
    """The line of one part, which both sides run in turn."""
    spawn, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for side in ("ours", cfg.against):
        if side != "none" and part in SIDES[side][1]:
            pipes[side], end = spawn.Pipe()
            processes.append(spawn.Process(target=serve, args=(side, part, T, cfg, m, end), daemon=True))
            processes[-1].start()
            end.close()
    runs = {side: [] for side in pipes}
    for turn in range(UNCOUNTED + cfg.repeats):
        for side, pipe in pipes.items():
            try:
                said = second_run(pipe)
            except (EOFError, ConnectionError):
                raise UserError(f"{part}: {side} failed; what it said stands above") from None
            if turn >= UNCOUNTED:
                runs[side].append(said)
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(False)
        process.join()
    ours, *peers = (statistics.median(seconds for seconds, _, _ in run) for run in runs.values())
    if part == "rouge":
        return {"part": part, "answers_per_second": round(100 / ours)}
    _, parts, gib = runs["ours"][-1]
    spent = {name: statistics.median(spent[name] for _, spent, _ in runs["ours"]) for name in parts}
    count = {"sft": cfg.batch * cfg.sft_tokens, "collection": cfg.answers * T}.get(part, cfg.batch * T)
    line = {"part": part, "student": cfg.student, "teacher": cfg.teacher, "turns": cfg.turns, "batch": cfg.batch,
            "prompt_tokens": cfg.prompt_tokens, "response_tokens": T, "seconds": round(ours, 4),
            "seconds_by_part": {name: round(value, 4) for name, value in spent.items()},
            "tokens_per_second": round(count / ours, 1),
            "share_of_floor": round(floor(cfg, m, part, T, rate, bandwidth) / ours, 3), "peak_gib": round(gib, 2)}
    if peers:
        line |= {"against": cfg.against, "peer_seconds": round(peers[0], 4), "ratio": round(peers[0] / ours, 2),
                 "peer_peak_gib": round(runs[cfg.against][-1][2], 2)}
    return line


def plot(lines: list[dict], path: Path) -> None:
    """Seconds over the length of answers, one line a part."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 4))
    for part in dict.fromkeys(line["part"] for line in lines if "seconds" in line):
        points = [(line["response_tokens"], line["seconds"]) for line in lines if line["part"] == part]
        (T, seconds), (longest, _) = points[0], points[-1]
        (drawn,) = axes.plot(*zip(*points), "o-", label=part)
        axes.plot([0, longest], [0, seconds / T * longest], ":", color=drawn.get_color())
    axes.set(xlabel="response tokens, T", ylabel="seconds (dotted: the first point, in proportion)", xlim=0, ylim=0)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def main(cfg: Config) -> list[dict]:
    if cfg.against in ("transformers", "trl") and importlib.util.find_spec(cfg.against) is None:
        raise UserError(f"--against={cfg.against} is not installed: pip install {cfg.against}"
                        + "==1.14.2" * (cfg.against == "trl"))
    m = machine(cfg.device, cfg.dtype, capture=cfg.capture)
    rate, bandwidth = measure_machine(m)
    print(json.dumps({"device": str(m.device), "threads": torch.get_num_threads(), "dtype": str(m.dtype)[6:],
                      "gflops": round(rate / 1e9), "read_gb_per_s": round(bandwidth / 1e9, 1)}), flush=True)
    lines = []
    for T in map(int, cfg.response_tokens.split(",")):
        for part in cfg.parts.split(","):
            lines.append(measure(cfg, m, part, T, rate, bandwidth))
            print(json.dumps(lines[-1]), flush=True)
    if cfg.figure:
        plot(lines, Path(cfg.figure))
    return lines


if __name__ == "__main__":
    run(main, Config)
