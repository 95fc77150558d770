"""Speed and memory of our own parts, one JSON line each, beside this machine's floor or a peer.

Weights and prompts are random, so nothing is downloaded. There is no end token, so every answer has
full length. We and the peer take turns, each in its own process. The second of a turn's two runs
counts, because after a pause the same work took up to a third longer. Figures are medians, and only
their ratio means much.

Run:      python -m tools.bench --parts=sample_q,sample_mixed
          python -m tools.bench --against=transformers
          python -m tools.bench --parts=sample_q --student=Qwen/Qwen3-0.6B --against=transformers
          python -m tools.bench --parts=sample_q --decoder=fast --against=ctranslate2
          python -m tools.bench --parts=sample_mixed,update --response_tokens=64,128,256
Peers:    transformers; ctranslate2, which only decodes; trl, whose MiniLLM trainer is gone from
          1.16 (pip install trl==1.14.2); nanogpt, from a clone: --nanogpt=FOLDER.
Shapes:   B answers, P prompt tokens, T response tokens.
Left out: scaling over several GPUs (log.jsonl of a run has the seconds); whether what is computed
          is right (the tests check that).
"""

import contextlib
import copy
import importlib.util
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import data
import distill
import teacher as supervised
from config import Machine, UserError, check, flag, machine, run
from data import Example, Row
from eval import rouge_l
from families import is_gpt2
from model import GPT, GPTConfig, is_shape, load
from safe.files import check_place
from safe.runs import peak_gib
from sample import decoder, uniforms
from tools.plan import apply_update, seconds

ALPHA = 0.2  # of Eq. (4)
UNCOUNTED = 1  # first turns, in which what is made once is made and memory settles
PARTS = ("sample_q", "sample_p", "sample_mixed", "update", "cycle", "collection", "sft", "rouge")
NEEDS = {"transformers": ["transformers"], "trl": ["trl==1.14.2"], "nanogpt": [], "none": [],
         "ctranslate2": ["ctranslate2", "transformers"]}  # what pip installs


@dataclass(frozen=True)
class Config:
    parts: str = flag(",".join(PARTS), "what to time")
    student: str = flag("12x12x768", "LAYERSxHEADSxWIDTH, with GPT-2's vocabulary (gpt2's shape), "
                                     "or the name of a model of another family")
    teacher: str = flag("24x16x1024", "likewise: gpt2-medium's shape; gpt2-xl's is 48x25x1600")
    batch: int = flag(8, "answers that are decoded together, and answers of an update, B")
    micro_batch: int | None = flag(None, "answers of a forward pass in an update; default all")
    decoder: Literal["fast", "turns", "captured", "plain"] = flag(
        "turns", "of the mixture; for one model alone, turns is fast")
    recompute: bool = flag(False, "make each layer again in the backward pass")
    compile: bool = flag(False, "torch.compile the model that is trained")
    prompt_tokens: int = flag(64, "P")
    response_tokens: str = flag("64", "T; or several lengths, as in 64,128,256,512")
    pt_tokens: int = flag(0, "length of the pieces of D_PT, as many as answers; 0 for none")
    rollouts: int | None = flag(None, "answers of a collection; default four batches")
    inner_epochs: int = flag(4, "passes over a collection")
    sft_tokens: int = flag(256, "length of a sample of supervised training")
    repeats: int = flag(3, "turns of each side, after one that does not count")
    against: Literal["none", "transformers", "ctranslate2", "trl", "nanogpt"] = flag(
        "none", "time the same shapes there too, in turn")
    nanogpt: str | None = flag(None, "folder of nanoGPT's repository")
    peer_dtype: Literal["same", "float32", "bfloat16"] = flag("same", "what the peer computes in")
    figure: str | None = flag(None, "draw seconds over T there, .svg or .png")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "what autocast computes in")

    def __post_init__(self):
        check(self, batch=(1, 10**5), micro_batch=(1, 10**5), prompt_tokens=(1, 1022),
              pt_tokens=(0, 1024), rollouts=(1, 10**5), inner_epochs=(1, 1000),
              sft_tokens=(2, 1024), repeats=(1, 1000))
        check_place(self, file="figure")
        for part in self.parts.split(","):
            if part not in PARTS:
                raise UserError(f"--parts={self.parts}: {part!r} is none of {', '.join(PARTS)}")
        for name in (self.student, self.teacher):
            if is_shape(name):
                shape_of(name)
            elif "/" not in name:
                raise UserError(f"{name!r} is no LAYERSxHEADSxWIDTH, such as 12x12x768, as which a "
                                "GPT-2 is given, and no model of another family")
        room = 1024 - self.prompt_tokens
        for length in self.response_tokens.split(","):
            if not length.isdecimal() or not 0 < int(length) <= room:
                raise UserError(f"--response_tokens={self.response_tokens}: {length!r} is not a "
                                f"number from 1 to {room}, the room that --prompt_tokens leaves")
        if self.pt_tokens == 1:
            raise UserError("--pt_tokens=1: a piece of one token predicts nothing; give 0 for none")
        if self.answers % self.batch:
            raise UserError(f"--rollouts={self.rollouts} is not a multiple of "
                            f"--batch={self.batch}")
        if self.against == "nanogpt":
            if self.nanogpt is None or not (Path(self.nanogpt) / "model.py").is_file():
                raise UserError(f"--nanogpt={self.nanogpt}: give the folder of nanoGPT's "
                                "repository, with its model.py")
        if self.pt_tokens and self.against != "none":
            raise UserError(f"--pt_tokens={self.pt_tokens} and --against={self.against}: no peer "
                            "trains on D_PT; give one of the two")
        if self.figure and Path(self.figure).suffix not in (".svg", ".png"):
            raise UserError(f"--figure={self.figure} must end in .svg or .png")

    @property
    def answers(self) -> int:
        return self.rollouts or 4 * self.batch


def shape_of(name: str) -> GPTConfig:
    """The config of LAYERSxHEADSxWIDTH, without dropout and without an end token."""
    n_layer, n_head, n_embd = map(int, name.split("x"))
    return GPTConfig(n_layer, n_head, n_embd, eos_token_id=-1, resid_pdrop=0.0, embd_pdrop=0.0,
                     attn_pdrop=0.0)


def draw(count: int, length: int) -> list[list[int]]:
    """Rows of random tokens that GPT-2's vocabulary has, and LLaMA's, without the special ones."""
    return np.random.default_rng(0).integers(3, 32000, (count, length)).tolist()


# ---- ours ---------------------------------------------------------------------------------------

class Ours:
    """Each part as a method without arguments. What a part needs is made on first use."""

    def __init__(self, cfg: Config, m: Machine, response_tokens: int):
        self.cfg = cfg
        self.m = m
        self.T = response_tokens
        self.drawn = 0  # batches of answers
        self.spent = {}
        self.prompts = draw(cfg.batch, cfg.prompt_tokens)
        samples = draw(cfg.batch, cfg.sft_tokens)
        self.samples = [Example(Row(""), sample[:1], sample[1:]) for sample in samples]

    def new(self, name: str) -> GPT:
        if not is_shape(name):
            model = load(name, self.m.device)
            model.config = replace(model.config, ends=())
            return model
        torch.manual_seed(0)
        with self.m.device:  # a CPU takes 15 s to draw GPT-2 XL
            model = GPT(shape_of(name))
        for p in model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.02)
        return model

    def ready(self, model: GPT) -> GPT:
        _, ready = decoder(self.cfg.decoder)
        return ready(model, self.m.dtype)

    @cached_property
    def student(self) -> GPT:
        return supervised.trained(self.new(self.cfg.student), self.cfg, self.m)

    @cached_property
    def q(self) -> GPT:
        return self.ready(self.new(self.cfg.student)).requires_grad_(False)

    @cached_property
    def p(self) -> GPT:
        return self.ready(self.new(self.cfg.teacher)).requires_grad_(False)

    @cached_property
    def optimizer(self):
        return supervised.optimizer_of(self.student, self.m, (0.9, 0.95), 0.0)

    def phase_2(self, rollouts: int, inner_epochs: int) -> Iterator[dict]:
        """The updates of distill.py, on these prompts and on random pieces of text."""
        cfg = self.cfg
        settings = distill.Config(
            steps=10**9, lr=1e-6, rollouts=rollouts, minibatch=cfg.batch, inner_epochs=inner_epochs,
            mix_alpha=ALPHA, pt_coef=1.0 if cfg.pt_tokens else 0.0, decoder=cfg.decoder,
            max_prompt_tokens=cfg.prompt_tokens, max_tokens=cfg.prompt_tokens + self.T,
            micro_batch=cfg.micro_batch or cfg.batch)
        instructions = [Example(Row(""), prompt, []) for prompt in self.prompts]
        corpus = []
        if cfg.pt_tokens:
            corpus = data.Pieces(np.array(draw(cfg.batch, cfg.pt_tokens)).flatten(), cfg.pt_tokens)
        return distill.algorithm_1(self.student, self.p, instructions, corpus, *self.optimizer,
                                   settings, self.m, step=0)

    @cached_property
    def collections(self) -> Iterator[dict]:
        return self.phase_2(self.cfg.answers, self.cfg.inner_epochs)

    @cached_property
    def updates(self) -> Iterator[dict]:
        """One collection for all the updates to be timed, which is drawn with the first."""
        updates = self.phase_2(self.cfg.batch, 1 + 2 * (UNCOUNTED + self.cfg.repeats))
        next(updates)
        return updates

    def sample(self, model: GPT) -> None:
        """An answer of this model alone to each prompt."""
        sample, _ = decoder("fast" if self.cfg.decoder == "turns" else self.cfg.decoder)
        sample(model, self.prompts, uniforms(0, range(self.cfg.batch), self.T), self.m)

    def mix(self, student: GPT) -> None:
        """An answer of the mixture to each prompt. All of them are decoded together."""
        self.drawn += 1
        answers = range(self.cfg.batch)
        sample, _ = decoder(self.cfg.decoder)
        if self.cfg.decoder == "turns":
            from fast.decode import turns
            sample = partial(sample, turn=turns(0, self.drawn, answers, self.T, ALPHA, groups=1))
        sample(student, self.prompts, uniforms(0, answers, self.T), self.m, self.p, ALPHA)

    def sample_q(self) -> None:
        self.sample(self.q)

    def sample_p(self) -> None:
        self.sample(self.p)

    def sample_mixed(self) -> None:
        self.mix(self.q)

    def update(self) -> None:
        next(self.updates)

    def cycle(self) -> None:
        """B answers of the student as it is now, and an update on B answers drawn before."""
        self.spent["sample"] = seconds(lambda: self.mix(self.ready(self.student)), self.m.device)
        self.spent["update"] = seconds(self.update, self.m.device)

    def collection(self) -> None:
        updates = self.cfg.inner_epochs * self.cfg.answers // self.cfg.batch
        lines = list(islice(self.collections, updates))
        self.spent["sample"] = sum(line["sample_seconds"] for line in lines)
        self.spent["update"] = sum(line["update_seconds"] for line in lines)

    def sft(self) -> None:
        optimizer, scaler = self.optimizer
        tokens = self.cfg.batch * (self.cfg.sft_tokens - 1)
        for some in data.slices(self.samples, self.cfg.micro_batch or self.cfg.batch):
            batch = data.batch_of(some, self.m.device)
            supervised.add_gradient(self.student, batch, tokens, self.m, scaler)
        apply_update(self.student, optimizer, scaler, self.m)

    def rouge(self) -> None:
        reference = " ".join(f"word{i % 89}" for i in range(64))
        for n in range(100):
            rouge_l(" ".join(f"word{(n * i) % 97}" for i in range(64)), [reference])


# ---- peers, as one would use them ---------------------------------------------------------------

class Peer:
    """What all peers share. One that trains has a `student` and its `optimizer`."""

    def __init__(self, cfg: Config, m: Machine, response_tokens: int):
        self.cfg = cfg
        self.m = m
        self.T = response_tokens
        self.dtype = dtype_of_peer(cfg, m)
        self.tokens = torch.tensor(draw(cfg.batch, cfg.prompt_tokens), device=m.device)
        self.samples = torch.tensor(draw(cfg.batch, cfg.sft_tokens), device=m.device)

    def autocast(self):
        return torch.autocast(self.m.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def dtype_of_peer(cfg: Config, m: Machine) -> torch.dtype:
    return m.dtype if cfg.peer_dtype == "same" else getattr(torch, cfg.peer_dtype)


def words_of(tokens: list[int]) -> list[str]:
    """Tokens as the words of `word_tokenizer`."""
    return [f"w{token}" for token in tokens]


def word_tokenizer():
    """A tokenizer of transformers with the words w0 to w50256, for peers that are given text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {word: token for token, word in enumerate(words_of(range(50257)))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w50256",
                                   eos_token="w50256", pad_token="w50256")


class Transformers(Peer):
    """generate() for one model, and for two the plain loop over tokens. A cycle makes the calls of
    the paper's released code: two generations, three passes of each model over the answers, and
    the teacher again in the update."""

    def new(self, shape: str):
        from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
        if not is_shape(shape):
            model = AutoModelForCausalLM.from_pretrained(shape, dtype=torch.float32)
            return model.to(self.m.device)
        n_layer, n_head, n_embd = map(int, shape.split("x"))
        with self.m.device:
            return GPT2LMHeadModel(GPT2Config(
                n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))

    @cached_property
    def student(self):
        return self.new(self.cfg.student)

    @cached_property
    def teacher(self):
        return self.new(self.cfg.teacher).to(self.dtype).eval()

    @cached_property
    def q(self):
        """The student for decoding, in the dtype itself, as one would load it."""
        return self.new(self.cfg.student).to(self.dtype).eval()

    @cached_property
    def optimizer(self):
        return torch.optim.AdamW(self.student.parameters(), lr=1e-6)

    @cached_property
    def whole(self) -> Tensor:
        return self.mixed(self.q)

    def generate(self, model) -> Tensor:
        return model.generate(
            self.tokens, attention_mask=torch.ones_like(self.tokens), do_sample=True, top_k=0,
            max_new_tokens=self.T, min_new_tokens=self.T, pad_token_id=50256)

    def sample_q(self) -> None:
        self.generate(self.q)

    def sample_p(self) -> None:
        self.generate(self.teacher)

    @torch.no_grad()
    def mixed(self, student) -> Tensor:
        tokens = feed = self.tokens
        of_q = of_p = None  # caches
        for _ in range(self.T):
            q = student(feed, past_key_values=of_q, use_cache=True)
            p = self.teacher(feed, past_key_values=of_p, use_cache=True)
            of_q, of_p = q.past_key_values, p.past_key_values
            q = q.logits[:, -1].float().softmax(-1)
            p = p.logits[:, -1].float().softmax(-1)
            feed = torch.multinomial((1 - ALPHA) * q + ALPHA * p, 1)
            tokens = torch.cat([tokens, feed], 1)
        return tokens

    def sample_mixed(self) -> None:
        self.mixed(self.q)

    def update(self) -> None:
        self.learn(self.whole)

    def learn(self, tokens: Tensor) -> None:
        response = tokens[:, self.cfg.prompt_tokens :]
        predicting = slice(self.cfg.prompt_tokens - 1, -1)
        with self.autocast():
            with torch.no_grad():
                log_p = self.teacher(tokens).logits[:, predicting].float().log_softmax(-1)
            log_q = self.student(tokens).logits[:, predicting].float().log_softmax(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            logp = log_q.gather(-1, response[..., None]).squeeze(-1)
            (kl - logp).mean().backward()
        self.step()

    def cycle(self) -> None:
        student = copy.deepcopy(self.student).to(self.dtype).eval()
        tokens = self.mixed(student)
        other = self.generate(student)
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


class CTranslate2(Transformers):
    """CTranslate2's generator, of a model of transformers that is written and converted."""

    def generator(self, shape: str):
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
        device = self.m.device
        with tempfile.TemporaryDirectory() as folder:
            self.new(shape).save_pretrained(folder)
            word_tokenizer().save_pretrained(folder)
            converted = TransformersConverter(folder).convert(str(Path(folder) / "converted"))
            return ctranslate2.Generator(
                converted, device.type, device_index=device.index or 0,
                compute_type=str(self.dtype)[6:], intra_threads=torch.get_num_threads())

    @cached_property
    def q(self):
        return self.generator(self.cfg.student)

    @cached_property
    def p(self):
        return self.generator(self.cfg.teacher)

    @cached_property
    def words(self) -> list[list[str]]:
        return [words_of(row) for row in self.tokens.tolist()]

    def generate(self, generator):
        return generator.generate_batch(
            self.words, sampling_topk=0, sampling_temperature=1, min_length=self.T,
            max_length=self.T, include_prompt_in_result=False)

    def sample_p(self) -> None:
        self.generate(self.p)


class Trl(Transformers):
    """A step of TRL's MiniLLM trainer, which neither mixes nor has D_PT."""

    @cached_property
    def trainer(self):
        from datasets import Dataset
        from trl.experimental.minillm import MiniLLMConfig, MiniLLMTrainer
        rows = [{"prompt": " ".join(words_of(row))} for row in self.tokens.tolist()] * 2
        self.folder = tempfile.TemporaryDirectory()  # removed with this object
        args = MiniLLMConfig(
            output_dir=self.folder.name, per_device_train_batch_size=self.cfg.batch,
            num_generations=2, max_steps=1, max_completion_length=self.T,
            generation_kwargs={"min_new_tokens": self.T}, temperature=1.0, gamma=1.0,
            bf16=self.dtype == torch.bfloat16, gradient_checkpointing=False, learning_rate=1e-6,
            report_to=[], use_cpu=self.m.device.type == "cpu", save_strategy="no",
            logging_strategy="no", disable_tqdm=True)
        trainer = MiniLLMTrainer(
            self.student, self.new(self.cfg.teacher), args=args, processing_class=word_tokenizer(),
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
    """nanoGPT's model and optimizer. It generates without a cache, and on a CPU its AdamW is not
    fused."""

    @cached_property
    def code(self):
        path = Path(self.cfg.nanogpt) / "model.py"
        spec = importlib.util.spec_from_file_location("nanogpt_model", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @cached_property
    def student(self):
        n_layer, n_head, n_embd = map(int, self.cfg.student.split("x"))
        config = self.code.GPTConfig(1024, 50257, n_layer, n_head, n_embd, 0.0)
        with contextlib.redirect_stdout(None):
            return self.code.GPT(config).to(self.m.device)

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


# ---- the machine's floor ------------------------------------------------------------------------

def measure_machine(m: Machine) -> tuple[float, float]:
    """FLOP/s of a large matrix product in autocast's dtype, and bytes/s of reading memory. Both are
    the best of 20."""
    n, size = (8192, 2**31) if m.device.type == "cuda" else (2048, 2**28)
    a, b = torch.randn(2, n, n, device=m.device).to(m.dtype)
    words = torch.zeros(size // 4, dtype=torch.int32, device=m.device)
    rate = max(2 * n**3 / seconds(lambda: a @ b, m.device) for _ in range(20))
    bandwidth = max(words.nbytes / seconds(lambda: words.max(), m.device) for _ in range(20))
    if m.device.type == "cuda":  # 3 GB, which the processes to be timed may want
        del a, b, words
        torch.cuda.empty_cache()
    return rate, bandwidth


@dataclass(frozen=True)
class Floor:
    """The least seconds a part can take on this machine: for its products at the full rate, or for
    reading the weights and the keys and values once a step, whichever takes longer."""
    cfg: Config
    size: int  # bytes of a number
    T: int
    rate: float  # FLOP/s
    bandwidth: float  # bytes/s

    def products(self, name: str, tokens: float, predicted: float) -> float:
        """Seconds of B rows' matrix products, forward. What follows attention in the last layer is
        only needed where a token is predicted."""
        shape = shape_of(name)
        layers = tokens * shape.n_layer * 12 * shape.n_embd**2
        unread = (tokens - predicted) * 9 * shape.n_embd**2
        head = predicted * 50257 * shape.n_embd
        return 2 * self.cfg.batch * (layers - unread + head) / self.rate

    def step(self, name: str, tokens: float, predicted: float, held: float = 0.0) -> float:
        """Seconds of a forward pass that also reads the keys and values of `held` tokens."""
        shape = shape_of(name)
        weights = shape.n_layer * 12 * shape.n_embd**2 + 50257 * shape.n_embd
        cache = 2 * shape.n_layer * shape.n_embd * self.cfg.batch * held
        reading = self.size * (weights + cache) / self.bandwidth
        return max(reading, self.products(name, tokens, predicted))

    def decode(self, name: str, share: float = 1.0) -> float:
        """Seconds of decoding, where a model draws a share of the tokens, and reads all of them in
        as many passes as it draws."""
        held = self.cfg.prompt_tokens + self.T / 2  # on average, with the token that is read
        prefill = self.step(name, self.cfg.prompt_tokens, 1)
        return prefill + share * (self.T - 1) * self.step(name, 1 / share, 1 / share, held)

    def mixed(self) -> float:
        by_turns = self.cfg.decoder == "turns"
        student = self.decode(self.cfg.student, 1 - ALPHA if by_turns else 1.0)
        return student + self.decode(self.cfg.teacher, ALPHA if by_turns else 1.0)

    def update(self) -> float:
        cfg = self.cfg
        forward = self.products(cfg.student, cfg.prompt_tokens + self.T, self.T)
        if cfg.pt_tokens:
            forward += self.products(cfg.student, cfg.pt_tokens, cfg.pt_tokens - 1)
        head = 2 * cfg.batch * self.T * 50257 * shape_of(cfg.teacher).n_embd / self.rate
        return 3 * forward + head

    def of(self, part: str) -> float | None:
        cfg = self.cfg
        if not is_shape(cfg.student) or (not is_shape(cfg.teacher) and part != "sample_q"):
            return None  # what other families must compute is not counted here
        match part:
            case "sample_q":
                return self.decode(cfg.student)
            case "sample_p":
                return self.decode(cfg.teacher)
            case "sample_mixed":
                return self.mixed()
            case "update":
                return self.update()
            case "cycle":
                return self.mixed() + self.update()
            case "collection":
                updates = cfg.inner_epochs * self.update()
                return cfg.answers // cfg.batch * (self.mixed() + updates)
            case "sft":
                return 3 * self.products(cfg.student, cfg.sft_tokens, cfg.sft_tokens - 1)
        return None


# ---- command ------------------------------------------------------------------------------------

SIDES = {"ours": (Ours, PARTS), "ctranslate2": (CTranslate2, ("sample_q", "sample_p")),
         "nanogpt": (NanoGPT, ("sample_q", "sft")), "trl": (Trl, ("cycle",)),
         "transformers": (Transformers, ("sample_q", "sample_p", "sample_mixed", "update", "cycle",
                                         "sft"))}


def forget_peak(device: torch.device) -> None:
    """Begins to count the peak of memory anew, which on a CPU Linux alone can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def serve(side: str, part: str, T: int, cfg: Config, m: Machine, pipe: Connection) -> None:
    """Runs a part whenever it is asked to, and answers with its seconds, what they were spent on,
    and the peak of memory in GiB.

    Each side does so in a process of its own, so they share neither memory nor the settings of the
    allocator, which `machine` makes for ours."""
    if side == "ours":
        m = machine(cfg.device, cfg.dtype, cfg.batch)
    owner = SIDES[side][0](cfg, m, T)
    while pipe.recv():
        owner.spent = {}
        forget_peak(m.device)
        taken = seconds(getattr(owner, part), m.device)
        pipe.send((taken, owner.spent, peak_gib(m.device)))


def second_run(pipe: Connection) -> tuple[float, dict, float]:
    """Asks for two runs, and returns the answer to the second."""
    for _ in range(2):
        pipe.send(True)
        answer = pipe.recv()
    return answer


def take_turns(cfg: Config, m: Machine, part: str, T: int) -> dict[str, list[tuple]]:
    """The answers of `serve` for each side that has this part."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in ("ours", cfg.against):
        if side != "none" and part in SIDES[side][1]:
            pipes[side], end = spawn.Pipe()
            given = (side, part, T, cfg, m, end)
            processes.append(spawn.Process(target=serve, args=given, daemon=True))
            processes[-1].start()
            end.close()
    runs = {side: [] for side in pipes}
    for turn in range(UNCOUNTED + cfg.repeats):
        for side, pipe in pipes.items():
            try:
                answer = second_run(pipe)
            except (EOFError, ConnectionError):
                raise UserError(f"{part}: {side} failed; its error stands above") from None
            if turn >= UNCOUNTED:
                runs[side].append(answer)
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(False)
        process.join()
    return runs


def measure(cfg: Config, m: Machine, part: str, T: int, rate: float, bandwidth: float) -> dict:
    """The line of one part."""
    runs = take_turns(cfg, m, part, T)
    median = {side: statistics.median(run[0] for run in of_side) for side, of_side in runs.items()}
    ours = median["ours"]
    if part == "rouge":
        return {"part": part, "answers_per_second": round(100 / ours)}
    tokens = {"sft": cfg.batch * cfg.sft_tokens, "collection": cfg.answers * T}
    floor = Floor(cfg, m.dtype.itemsize, T, rate, bandwidth).of(part)
    line = {"part": part, "student": cfg.student, "teacher": cfg.teacher, "decoder": cfg.decoder,
            "batch": cfg.batch, "prompt_tokens": cfg.prompt_tokens, "response_tokens": T,
            "seconds": round(ours, 4),
            "tokens_per_second": round(tokens.get(part, cfg.batch * T) / ours, 1),
            "share_of_floor": None if floor is None else round(floor / ours, 3),
            "peak_gib": round(runs["ours"][-1][2], 2)}
    if part in ("cycle", "collection"):
        of_part = {name: statistics.median(run[1][name] for run in runs["ours"])
                   for name in ("sample", "update")}
        line["seconds_by_part"] = {name: round(value, 4) for name, value in of_part.items()}
    if cfg.against in runs:
        line["against"] = cfg.against
        line["peer_dtype"] = str(dtype_of_peer(cfg, m))[6:]
        line["peer_seconds"] = round(median[cfg.against], 4)
        line["ratio"] = round(median[cfg.against] / ours, 2)
        if cfg.against != "ctranslate2" or m.device.type == "cpu":  # whose GPU memory torch misses
            line["peer_peak_gib"] = round(runs[cfg.against][-1][2], 2)
    return line


def plot(lines: list[dict], path: Path) -> None:
    """Seconds over the length of answers, one line a part."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 4))
    for part in dict.fromkeys(line["part"] for line in lines if "seconds" in line):
        points = [line for line in lines if line["part"] == part]
        T = [line["response_tokens"] for line in points]
        spent = [line["seconds"] for line in points]
        (drawn,) = axes.plot(T, spent, "o-", label=part)
        proportional = [0, spent[0] / T[0] * T[-1]]
        axes.plot([0, T[-1]], proportional, ":", color=drawn.get_color())
    axes.set(xlabel="response tokens, T", xlim=0, ylim=0,
             ylabel="seconds (dotted: the first point, in proportion)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def check_peer(cfg: Config, m: Machine) -> None:
    """Raises UserError if the peer is not installed, or does not compute in its dtype."""
    for package in NEEDS[cfg.against]:
        if importlib.util.find_spec(package.split("==")[0]) is None:
            raise UserError(f"--against={cfg.against} is not installed: pip install "
                            + " ".join(NEEDS[cfg.against]))
    if cfg.against == "ctranslate2":
        import ctranslate2
        dtype = str(dtype_of_peer(cfg, m))[6:]
        if dtype not in ctranslate2.get_supported_compute_types(m.device.type):
            raise UserError(f"ctranslate2 does not compute in {dtype} on this {m.device.type}: "
                            "give --peer_dtype=float32")


def main(cfg: Config) -> list[dict]:
    m = machine(cfg.device, cfg.dtype, cfg.batch)
    for name in {cfg.student, cfg.teacher}:
        if not is_shape(name) and is_gpt2(name):
            raise UserError(f"{name} is a GPT-2: give its shape, such as 12x12x768")
    check_peer(cfg, m)
    rate, bandwidth = measure_machine(m)
    print(json.dumps({"device": str(m.device), "threads": torch.get_num_threads(),
                      "dtype": str(m.dtype)[6:], "gflops": round(rate / 1e9),
                      "read_gb_per_s": round(bandwidth / 1e9, 1)}), flush=True)
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
