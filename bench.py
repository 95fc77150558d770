"""Speed and memory of our own parts, one JSON line each, beside this machine's floor and, on demand, beside a peer.

Weights and prompts are random, so nothing is downloaded; end tokens are off, so that answers are of full length.
Ours and the peer's run in turn, in one process; the figures are medians, and only their ratio is worth much.

Run:      python bench.py --parts=sample_q,sample_mixed
          python bench.py --against=transformers --memory      also peak memory, each side in a process of its own
          python bench.py --student=6x12x768 --teacher=12x12x768 --parts=cycle --against=transformers
Shapes:   B answers, P prompt tokens, T response tokens.
Left out: multi-GPU scaling (torchrun's log has the seconds); the quality of what is computed (the tests').
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import distill
import teacher as supervised
from config import Machine, UserError, check, flag, machine, run
from data import Example, Row
from eval import rouge_l
from model import GPT, GPTConfig, frozen, is_shape, new
from sample import Rollout, sample, uniforms

PARTS = ("sample_q", "sample_p", "sample_mixed", "update", "cycle", "sft", "rouge")


@dataclass(frozen=True)
class Config:
    parts: str = flag(",".join(PARTS), "what to time")
    student: str = flag("12x12x768", "LAYERSxHEADSxWIDTH, with GPT-2's vocabulary; gpt2 is 12x12x768")
    teacher: str = flag("24x16x1024", "likewise; gpt2-medium is 24x16x1024, gpt2-xl 48x25x1600")
    batch: int = flag(8, "answers, B")
    prompt_tokens: int = flag(64, "P")
    response_tokens: int = flag(64, "T")
    sft_tokens: int = flag(256, "length of a sample of supervised training")
    repeats: int = flag(3, "runs of each side, after one that does not count")
    against: Literal["none", "transformers"] = flag("none", "time the same shapes there too, in turn")
    peer_dtype: Literal["same", "float32", "bfloat16"] = flag("same", "what the peer computes in")
    memory: bool = flag(False, "peak memory too, each part and side in a process of its own")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "what autocast computes in")

    def __post_init__(self):
        check(self, batch=(1, 10**5), prompt_tokens=(1, 1022), response_tokens=(1, 1022), sft_tokens=(2, 1024),
              repeats=(1, 1000))
        for part in self.parts.split(","):
            if part not in PARTS:
                raise UserError(f"--parts={self.parts}: {part!r} is none of {', '.join(PARTS)}")
        for name in (self.student, self.teacher):
            if not is_shape(name):
                raise UserError(f"{name!r} is no LAYERSxHEADSxWIDTH, such as 12x12x768")


# ---- ours -----------------------------------------------------------------------------------------------------------

class Ours:
    """Each part as a function of nothing."""

    def __init__(self, cfg: Config, m: Machine):
        self.cfg, self.m = cfg, m
        shape = lambda name: GPTConfig(*map(int, name.split("x")), eos_token_id=-1, resid_pdrop=0.0)
        self.student, self.teacher = (new(shape(name), seed).to(m.device) for seed, name in
                                      enumerate((cfg.student, cfg.teacher)))
        self.q, self.p = (frozen(model, m.dtype) for model in (self.student, self.teacher))
        draw = lambda length: np.random.default_rng(0).integers(0, 50257, length).tolist()
        self.prompts = [draw(cfg.prompt_tokens)] * cfg.batch
        self.samples = [Example(Row(""), draw(1), draw(cfg.sft_tokens - 1))] * cfg.batch
        self.optimizer, self.scaler = supervised.optimizer_of(self.student, m, (0.9, 0.95), 0.0)
        self.rollout: Rollout | None = None

    def decode(self, model: GPT, teacher: GPT | None = None, keep_hidden: bool = False) -> Rollout:
        uniform = uniforms(0, range(self.cfg.batch), self.cfg.response_tokens)
        return sample(model, self.prompts, uniform, self.m, teacher, 0.2 if teacher else 0.0, self.cfg.batch,
                      keep_hidden=keep_hidden)

    def sample_q(self) -> None:
        self.decode(self.q)

    def sample_p(self) -> None:
        self.decode(self.p)

    def sample_mixed(self) -> None:
        self.rollout = self.decode(self.q, self.p, keep_hidden=True)

    def update(self) -> None:
        """One inner step on all answers, as distill.py takes it, without L_PT."""
        if self.rollout is None:
            self.sample_mixed()
        rollout, m = self.rollout, self.m
        student_logp, kl, mask = distill.score(self.student, self.p, rollout, list(range(self.cfg.batch)), m)
        reward = distill.token_reward(rollout.teacher_logp, rollout.student_logp)
        R = distill.future_reward(reward, mask)
        single, long, _, _ = distill.minillm_loss(student_logp, kl, rollout.student_logp, rollout.mixed_logp, R, mask)
        self.scaler.scale((single + long).sum() / mask.sum()).backward()
        supervised.apply_update(self.student, self.optimizer, self.scaler, m, 1e-6, 1.0)

    def cycle(self) -> None:
        """A collection, and one update on it."""
        self.q = frozen(self.student, self.m.dtype)
        self.sample_mixed()
        self.update()

    def sft(self) -> None:
        _, loss = supervised.answer_loss(self.student, self.samples, self.m)
        self.scaler.scale(loss / (self.cfg.batch * (self.cfg.sft_tokens - 1))).backward()
        supervised.apply_update(self.student, self.optimizer, self.scaler, self.m, 1e-6, 1.0)

    def rouge(self) -> None:
        for n in range(100):
            rouge_l(" ".join(f"word{(n * i) % 97}" for i in range(64)), [" ".join(f"word{i % 89}" for i in range(64))])


# ---- the peer: `transformers` as one would use it -------------------------------------------------------------------

class Transformers:
    """generate() for one model; for two the plain loop over tokens; for a cycle the calls that the released code of the
    paper makes: two generations, three passes of each model over the answers, and the teacher again in the update."""

    def __init__(self, cfg: Config, m: Machine):
        from transformers import GPT2Config, GPT2LMHeadModel
        self.cfg, self.m = cfg, m
        dtype = m.dtype if cfg.peer_dtype == "same" else getattr(torch, cfg.peer_dtype)
        drops = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = lambda name: GPT2LMHeadModel(GPT2Config(**dict(zip(("n_layer", "n_head", "n_embd"),
                                                                   map(int, name.split("x")))), **drops)).to(m.device)
        self.dtype, self.student, self.teacher = dtype, model(cfg.student), model(cfg.teacher).to(dtype).eval()
        self.tokens = torch.randint(0, 50257, (cfg.batch, cfg.prompt_tokens), device=m.device)
        self.samples = torch.randint(0, 50257, (cfg.batch, cfg.sft_tokens), device=m.device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6)

    def autocast(self):
        return torch.autocast(self.m.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def light(self):
        """The student for decoding: in the dtype itself, as one would load it."""
        import copy
        return copy.deepcopy(self.student).to(self.dtype).eval()

    def generate(self, model) -> Tensor:
        return model.generate(self.tokens, attention_mask=torch.ones_like(self.tokens), do_sample=True, top_k=0,
                              max_new_tokens=self.cfg.response_tokens, min_new_tokens=self.cfg.response_tokens,
                              pad_token_id=50256)

    def sample_q(self) -> None:
        if not hasattr(self, "q"):
            self.q = self.light()
        self.generate(self.q)

    def sample_p(self) -> None:
        self.generate(self.teacher)

    @torch.no_grad()
    def mixed(self, student) -> Tensor:
        tokens, feed, caches = self.tokens, self.tokens, [None, None]
        for _ in range(self.cfg.response_tokens):
            outputs = [model(feed, past_key_values=cache, use_cache=True)
                       for model, cache in zip((student, self.teacher), caches)]
            caches = [output.past_key_values for output in outputs]
            q, p = (output.logits[:, -1].float().softmax(-1) for output in outputs)
            feed = torch.multinomial(0.8 * q + 0.2 * p, 1)
            tokens = torch.cat([tokens, feed], 1)
        return tokens

    def sample_mixed(self) -> None:
        if not hasattr(self, "q"):
            self.q = self.light()
        self.whole = self.mixed(self.q)

    def update(self) -> None:
        if not hasattr(self, "whole"):
            self.sample_mixed()
        response, at = self.whole[:, self.cfg.prompt_tokens :], slice(self.cfg.prompt_tokens - 1, -1)
        with self.autocast():
            with torch.no_grad():
                log_p = self.teacher(self.whole).logits[:, at].float().log_softmax(-1)
            log_q = self.student(self.whole).logits[:, at].float().log_softmax(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            logp = log_q.gather(-1, response[..., None]).squeeze(-1)
            (kl - logp).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def cycle(self) -> None:
        student = self.light()
        self.whole = self.mixed(student)
        other = self.generate(student)
        with torch.no_grad():
            for tokens in (self.whole, self.whole, other):
                self.teacher(tokens).logits.float().log_softmax(-1)
                student(tokens).logits.float().log_softmax(-1)
        self.update()

    def sft(self) -> None:
        with self.autocast():
            self.student(self.samples, labels=self.samples).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


# ---- the machine's floor --------------------------------------------------------------------------------------------

def seconds(m: Machine, function: Callable) -> float:
    began = time.perf_counter()
    function()
    if m.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_machine(m: Machine) -> tuple[float, float]:
    """FLOP/s of a large matrix product in the dtype of autocast, and bytes/s of reading memory: the best of five."""
    a, b = torch.randn(2, 2048, 2048, device=m.device).to(m.dtype)
    words = torch.zeros(2**28 // 4, dtype=torch.int32, device=m.device)  # 256 MB
    rate = max(2 * 2048**3 / seconds(m, lambda: a @ b) for _ in range(5))
    return rate, max(words.nbytes / seconds(m, lambda: words.max()) for _ in range(5))


def floor(cfg: Config, m: Machine, part: str, rate: float, bandwidth: float) -> float | None:
    """Seconds that a part must take on this machine: its products at the full rate, or its weights read once a step."""
    shape = lambda name: GPTConfig(*map(int, name.split("x")))
    matrices = {name: shape(name).n_layer * 12 * shape(name).n_embd**2 for name in (cfg.student, cfg.teacher)}
    heads = {name: 50257 * shape(name).n_embd for name in matrices}
    size, B = m.dtype.itemsize, cfg.batch

    def decode(name: str) -> float:
        step = max(size * (matrices[name] + heads[name]) / bandwidth, 2 * B * (matrices[name] + heads[name]) / rate)
        return 2 * B * cfg.prompt_tokens * matrices[name] / rate + cfg.response_tokens * step

    def train(name: str, tokens: int, predicted: int) -> float:
        return 6 * B * (tokens * matrices[name] + predicted * heads[name]) / rate

    both = decode(cfg.student) + decode(cfg.teacher)
    update = train(cfg.student, cfg.prompt_tokens + cfg.response_tokens, cfg.response_tokens)
    update += 2 * B * cfg.response_tokens * heads[cfg.teacher] / rate
    return {"sample_q": decode(cfg.student), "sample_p": decode(cfg.teacher), "sample_mixed": both, "update": update,
            "cycle": both + update, "sft": train(cfg.student, cfg.sft_tokens, cfg.sft_tokens)}.get(part)


# ---- command --------------------------------------------------------------------------------------------------------

SIDES = {"ours": Ours, "transformers": Transformers}


def peak(side: str, part: str, cfg: Config) -> float:
    """GiB at most, of a process that does nothing else. On a CPU resident memory, which Linux alone tells."""
    m = machine(cfg.device, cfg.dtype)
    function = getattr(SIDES[side](cfg, m), part)
    for _ in range(2):
        function()
    if m.device.type == "cuda":
        return torch.cuda.max_memory_allocated(m.device) / 2**30
    with open("/proc/self/status") as file:  # not getrusage, to whose figure a child inherits its parent's
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20


def main(cfg: Config) -> list[dict]:
    m = machine(cfg.device, cfg.dtype)
    rate, bandwidth = measure_machine(m)
    print(json.dumps({"device": str(m.device), "threads": torch.get_num_threads(), "dtype": str(m.dtype)[6:],
                      "gflops": round(rate / 1e9), "read_gb_per_s": round(bandwidth / 1e9, 1)}), flush=True)
    made, lines = {side: SIDES[side](cfg, m) for side in ("ours", cfg.against) if side != "none"}, []
    for part in cfg.parts.split(","):
        functions = {side: getattr(owner, part) for side, owner in made.items() if hasattr(owner, part)}
        times = {side: [] for side in functions}
        for n in range(cfg.repeats + 1):
            for side, function in functions.items():
                taken = seconds(m, function)
                if n:
                    times[side].append(taken)
        median = {side: statistics.median(values) for side, values in times.items()}
        count = cfg.batch * (cfg.sft_tokens if part == "sft" else cfg.response_tokens)
        least = floor(cfg, m, part, rate, bandwidth)
        line = {"part": part, "student": cfg.student, "teacher": cfg.teacher, "batch": cfg.batch,
                "prompt_tokens": cfg.prompt_tokens, "response_tokens": cfg.response_tokens,
                "seconds": round(median["ours"], 4), "tokens_per_second": round(count / median["ours"], 1)}
        if part == "rouge":
            line = {"part": part, "answers_per_second": round(100 / median["ours"])}
        if least:
            line["share_of_floor"] = round(least / median["ours"], 3)
        if cfg.against in median:
            line |= {"against": cfg.against, "peer_seconds": round(median[cfg.against], 4),
                     "ratio": round(median[cfg.against] / median["ours"], 2)}
        if cfg.memory and part != "rouge":
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                for side in functions:
                    line["peak_gib" if side == "ours" else "peer_peak_gib"] = round(
                        pool.apply(peak, (side, part, cfg)), 2)
        print(json.dumps(line), flush=True)
        lines.append(line)
    return lines


if __name__ == "__main__":
    run(main, Config)
