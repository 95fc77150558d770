"""The equations against loops written from the paper, the official recipe against numbers worked by hand, and
Algorithm 1: an update against its equations, flags that act, batches that split, runs that resume to the same bits,
processes that change nothing."""

import copy
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, interrupt_after, lines, random_gpt, refused, weights
from safetensors.torch import save_file

import config
import data
import distill
import teacher as supervised
import world
from config import Machine, make, parse
from data import Example, Row
from distill import (
    OBJECTIVES,
    OFFICIAL,
    PAPER,
    Config,
    divergence,
    future_reward,
    importance_weights,
    long_term_loss,
    minibatches,
    minillm_loss,
    reverse_kl,
    token_reward,
    whiten,
)
from model import load, save
from safe import files, runs
from safe.texts import END
from sample import decoder, follow, restrict, sample, uniforms
from tools import plan, stages

pytestmark = pytest.mark.usefixtures("few_rows")
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()  # an answer of one token among them
WEIGHTS = ("per_token", "long_only", "product", "exact", "none")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- each equation against its slow twin ----------------------------------------------------------------------------

def test_reverse_kl_is_eq_1_at_a_position():
    log_q, log_p = rand(2, 3, 7, seed=1).log_softmax(-1), rand(2, 3, 7, seed=2).log_softmax(-1)
    for b in range(2):
        for t in range(3):
            slow = sum(math.exp(q) * (q - p) for q, p in zip(log_q[b, t].tolist(), log_p[b, t].tolist()))
            assert reverse_kl(log_q, log_p)[b, t].item() == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("kind", ["reverse", "forward", "js", "skew"])
def test_divergences_against_sums_over_the_vocabulary(kind):
    q, p = torch.rand(2, 5, 7, dtype=torch.float64).softmax(-1)
    got = divergence(q.log(), p.log(), kind)
    for row in range(5):
        assert got[row].item() == pytest.approx(slow_divergence(q[row], p[row], kind).item(), abs=1e-12)
    assert divergence(q.log(), q.log(), kind).abs().max() < 1e-12


def slow_divergence(q, p, kind: str):
    """The divergence of two distributions over words, (V,) each, as a sum of words."""
    kl = lambda a, b: sum(a[v] * (a[v] / b[v]).log() for v in range(len(a)))
    if kind == "none":
        return torch.zeros((), dtype=q.dtype)
    if kind == "js":
        return (kl(q, (p + q) / 2) + kl(p, (p + q) / 2)) / 2
    return {"reverse": lambda: kl(q, p), "forward": lambda: kl(p, q), "skew": lambda: kl(p, 0.1 * p + 0.9 * q)}[kind]()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("return_from", ["next", "current"])
def test_future_reward_is_eq_6(gamma, length_norm, return_from):
    """Sums over t' > t, or t' >= t, of gamma^(t'-t) r_t', divided by their number; 0 where there is nothing to come."""
    reward = rand(3, 5) * MASK
    got = future_reward(reward, MASK, gamma, length_norm, return_from)
    for b, row in enumerate(MASK.sum(1).tolist()):
        slow = slow_returns(reward[b, :row].tolist(), gamma, length_norm, return_from) + [0.0] * (5 - row)
        assert got[b].tolist() == pytest.approx(slow, abs=1e-12)


def slow_returns(r: list[float], gamma: float, length_norm: bool, return_from: str) -> list[float]:
    """R_{t+1}, or R_t, at each token of one answer."""
    if return_from == "none":
        return [0.0] * len(r)
    returns = []
    for t in range(len(r)):
        later = range(t + (return_from == "next"), len(r))
        total = sum(gamma ** (k - t) * r[k] for k in later)
        returns.append(total / len(later) if length_norm and len(later) else total)
    return returns


def test_importance_weights_are_the_products_they_are_called():
    log_q, log_mix = rand(3, 5, seed=1), rand(3, 5, seed=2)  # junk in the padding
    for kind in WEIGHTS:
        got = importance_weights(log_q, log_mix, MASK, kind)
        for b, n in enumerate(MASK.sum(1).tolist()):
            w = [math.exp(log_q[b, t].item() - log_mix[b, t].item()) for t in range(n)]
            for t, want in enumerate(slow_weights(w, kind)):
                assert [x[b, t].item() for x in got] == pytest.approx(list(want))
    assert not any(x.requires_grad for x in importance_weights(log_q.requires_grad_(), log_mix, MASK, "exact"))


def slow_weights(w: list[float], kind: str) -> list[tuple[float, float]]:
    """The weights of L_Single and L_Long at each token of one answer, from w_t = q / p~ at each."""
    pairs = []
    for t in range(len(w)):
        before, others = math.prod(w[:t]), math.prod(w[:t] + w[t + 1 :])
        pairs.append({"per_token": (w[t], 1), "product": (before * w[t], before), "exact": (before, others)}.get(
            kind, (1, 1)))
    return pairs


@pytest.mark.parametrize("R, ratio, loss, slope", [
    (2.0, 1.0, -2.0, -2.0), (2.0, 1.3, -2.4, 0.0), (2.0, 0.7, -1.4, -2.0),  # a gain is not counted beyond 1 + eps
    (-2.0, 1.0, 2.0, 2.0), (-2.0, 0.7, 1.6, 0.0), (-2.0, 1.3, 2.6, 2.0)])  # nor a loss below 1 - eps
def test_clipping_is_ppos_lower_bound(R, ratio, loss, slope):
    """Not min(rho, clip(rho)) times R: for negative R that would be an upper bound."""
    rho = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
    got, clipped = long_term_loss(rho.log(), torch.zeros(1, 1), torch.tensor([[R]]), torch.ones(1, 1), 0.2)
    assert got.item() == pytest.approx(loss) and clipped.item() == (slope == 0)
    assert torch.autograd.grad(got.sum(), rho)[0].item() == pytest.approx(slope)
    unclipped, never = long_term_loss(rho.log(), torch.zeros(1, 1), torch.tensor([[R]]), torch.ones(1, 1), math.inf)
    assert unclipped.item() == pytest.approx(-R * ratio) and not never.item()


def test_the_loss_has_the_gradient_of_eq_7():
    """w_t (grad sum_y q log(q/p) - R_{t+1} grad q(y_t) / q(y_t)), written out in loops."""
    logits, log_p = rand(3, 5, 4, seed=1).requires_grad_(), rand(3, 5, 4, seed=2).log_softmax(-1)
    y, R = torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(0)), rand(3, 5, seed=3)
    log_q = logits.log_softmax(-1)
    take = lambda logp: logp.gather(-1, y[..., None]).squeeze(-1)
    mixed = (0.2 * log_p.exp() + 0.8 * log_q.exp()).log().detach()
    single, long, _ = minillm_loss(take(log_q), reverse_kl(log_q, log_p), take(log_q).detach(), take(mixed), R, MASK,
                                   clip_eps=math.inf)
    got = torch.autograd.grad((single + long).sum(), logits)[0]
    want = torch.zeros_like(got)
    for b in range(3):
        for t in range(5):
            if MASK[b, t]:
                q = logits[b, t].softmax(-1)
                w = (q[y[b, t]] / mixed[b, t, y[b, t]].exp()).item()
                surrogate = (q * (q.log() - log_p[b, t])).sum() - R[b, t] * q[y[b, t]] / q[y[b, t]].item()
                want += w * torch.autograd.grad(surrogate, logits, retain_graph=True)[0]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_without_weights_the_ratio_is_to_the_student_that_sampled():
    log_q, old, mixed, R = (rand(3, 5, seed=s) for s in range(4))
    for kind, behaviour in (("none", old), ("per_token", mixed), ("long_only", mixed)):
        _, long, _ = minillm_loss(log_q, log_q, old, mixed, R, MASK, kind, clip_eps=math.inf)
        torch.testing.assert_close(long, -(log_q - behaviour).exp() * R * MASK)


def test_padding_is_in_no_loss():
    values = [rand(3, 5, seed=s) for s in range(5)]
    outside = [v + 50 * ~MASK for v in values]
    for kind in WEIGHTS:
        for a, b in zip(minillm_loss(*values, MASK, kind), minillm_loss(*outside, MASK, kind)):
            assert a.equal(b) and not a[~MASK].any()
    for kind in ("responses", "all"):
        assert not whiten(values[0] * MASK, MASK, kind)[~MASK].any()


def test_whitening_over_responses_has_mean_0_and_variance_1():
    white = whiten(rand(3, 5) * MASK, MASK, "responses")[MASK]
    assert white.mean().item() == pytest.approx(0, abs=1e-12)
    assert white.var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert whiten(rand(3, 5), MASK, "none").equal(rand(3, 5))


# ---- --recipe=official, worked by hand for one answer of two tokens in three places ---------------------------------

def test_the_official_recipe_by_hand():
    cfg = make(Config, {"recipe": "official"}, distill.presets)
    two = torch.tensor([[True, True, False]])
    log_p, log_q = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -60.0, 0.0]])
    r = token_reward(log_p, log_q, cfg.reward_clip) * two
    assert r.tolist() == [[0.5, 50.0, 0.0]]  # deviation 5: half of twice 0.5, and of twice 58 clipped at 100
    R = future_reward(r, two, cfg.gamma, cfg.length_norm, cfg.return_from)
    # 1 to 3: gamma 0.95, r_t inside, divided by the remaining length with t: (0.5 + 0.95 * 50) / 2, 50 / 1
    assert R.tolist() == [[24.0, 50.0, 0.0]]
    white = whiten(R, two, cfg.whiten)  # 4: over all three places, and as that of the released [48, 100, 0]
    mean, std = 148 / 3, math.sqrt((48**2 + 100**2) / 3 - (148 / 3) ** 2)
    assert white.tolist()[0] == pytest.approx([(48 - mean) / std, (100 - mean) / std, 0.0], abs=1e-6)
    kl, mixed = torch.tensor([[0.3, 0.4, 9.0]]), torch.tensor([[-1.5 - math.log(1.1), -60 + math.log(2), 0.0]])
    single, long, clipped = minillm_loss(log_q, kl, log_q, mixed, white, two, cfg.weight, cfg.clip_eps)
    assert single.tolist()[0] == pytest.approx([0.3, 0.4, 0.0])  # 7: the exact KL, not weighted
    a, b = white.tolist()[0][:2]
    # 8: w, of 1.1 and 0.5, is inside of the ratio, then clipped
    assert a < 0 < b and long.tolist()[0] == pytest.approx([-1.1 * a, -0.5 * b, 0.0], abs=1e-5)
    assert not clipped.any()  # a < 0 with ratio above 1 - eps and b > 0 with ratio below 1 + eps keep their gradient
    *_, clipped = minillm_loss(log_q, kl, log_q, mixed, -white, two, cfg.weight, cfg.clip_eps)
    assert clipped.tolist() == [[False, True, False]]  # 8: no gradient at the first step, where w < 0.8 and A < 0
    assert cfg.normalize == "token" and cfg.pt_kd == 0.5  # 6 and 10, of which the next two tests


def test_means_over_sequences_or_over_tokens(phase_2):
    """Deviation 6. The same first update, logged both ways: sums over 8 answers, or over their tokens."""
    by_sequence, by_token = (next(phase_2(normalize=kind).updates) for kind in ("sequence", "token"))
    tokens = by_sequence["response_tokens"]
    for name, per_answer in (("loss_single", tokens), ("loss_long", tokens), ("loss_pt", 43)):  # 43 of 44 are predicted
        assert by_sequence[name] == pytest.approx(by_token[name] * per_answer, rel=1e-4)
    assert by_sequence["reverse_kl"] == pytest.approx(by_token["reverse_kl"], rel=1e-4)  # in nats an answer, either way


def test_half_of_the_plain_text_loss_is_kd(phase_2):
    """Deviation 10: 0.5 CE + 0.5 KL[p || q] on plain text, against the two of them alone."""
    loss = {share: next(phase_2(pt_kd=share).updates)["loss_pt"] for share in (0.0, 0.5, 1.0)}
    assert loss[0.5] == pytest.approx((loss[0.0] + loss[1.0]) / 2, rel=1e-5) and loss[1.0] < loss[0.0]


# ---- settings -------------------------------------------------------------------------------------------------------

def test_what_a_teacher_and_a_recipe_imply():
    tiny, paper = make(Config, {}, distill.presets), make(Config, {"teacher": "gpt2-xl"}, distill.presets)
    assert tiny == Config() and tiny.preset == "tiny"
    for name, value in PAPER.items():
        assert getattr(paper, name) == value
    assert paper.out == "out/gpt2-xl-to-gpt2" and paper.recipe == "paper" and paper.whiten == "none"
    official = make(Config, {"teacher": "x/y", "recipe": "official", "gamma": 1.0}, distill.presets)
    assert official.gamma == 1.0 and official.out == "out/y-to-gpt2"
    assert all(getattr(official, name) == value for name, value in OFFICIAL.items() if name != "gamma")
    gold = make(Config, {"source": "gold", "objective": "forward"}, distill.presets)
    assert gold.weight == "none" and gold.divergence == "forward" and gold.return_from == "none"
    assert make(Config, {"source": "gold"}, distill.presets).objective == "single"


def test_what_an_objective_is_made_of():
    """Eq. (3) or (2), or one term alone. Only reverse KL has a long term."""
    of = {name: (Config(objective=name).divergence, Config(objective=name).return_from) for name in OBJECTIVES}
    assert of["eq3"] == ("reverse", "next") and of["eq2"] == ("none", "current")
    assert of["double"] == ("reverse", "current") and of["unpaid"] == ("none", "next")
    assert all(of[kind] == (kind, "none") for kind in ("forward", "js", "skew")) and of["single"] == ("reverse", "none")


def test_settings_that_cannot_work(monkeypatch):
    monkeypatch.setattr(stages, "is_gpt2", lambda name: True)  # out/p need not be there
    refused(lambda: Config(rollouts=100), "--rollouts=100 is not a multiple of --minibatch=64")
    refused(lambda: Config(max_tokens=16), "--max_tokens=16 is out of range", "give 17 to 1048576")
    for names in ("sft,dpo", "sft,sft"):
        refused(lambda names=names: stages.stages(Config(baselines=names)), f"--baselines={names}", "once each")
    refused(lambda: Config(mix_alpha=1.5), "--mix_alpha=1.5 is out of range")
    refused(lambda: Config(clip_eps=-1.0), "--clip_eps=-1.0 is out of range")
    of = lambda **given: lambda: make(Config, given, distill.presets)
    refused(of(source="gold", weight="per_token"), "--source=gold", "--weight=per_token")
    for objective in ("eq3", "eq2", "double", "unpaid"):
        refused(of(source="gold", objective=objective), "--source=gold", f"--objective={objective}")
    for role, choice in (("teacher", "student"), ("student", "teacher"), ("teacher", "none"), ("student", "none")):
        given = {"teacher": "out/p", "student": "out/q", role: "1x2x8", "finetune": choice}
        cfg = make(Config, given, distill.presets)
        refused(lambda cfg=cfg: stages.stages(cfg), f"--{role}=1x2x8 is new", "--finetune")
    itself = make(Config, dict(teacher="out/x/teacher", finetune="teacher", out="out/x"), distill.presets)
    refused(lambda: stages.stages(itself), "--model=out/x/teacher would be written over")
    for role in ("teacher", "student"):
        cfg = make(Config, {role: "out/x/../y/minillm", "out": "out/y"}, distill.presets)
        refused(lambda cfg=cfg: stages.stages(cfg), "would overwrite --teacher or --student", "--out")


def test_which_models_are_fine_tuned_first(tmp_path, tiny_models, monkeypatch):
    """By what they are, whatever their folders are called; and a line says why, and which flag turns it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "is_gpt2", lambda name: True)  # the hub is not asked
    save(random_gpt(), Path("gpt2"))  # saved by a trainer, under the name of a released model
    save(random_gpt(), Path("text"))
    Path("text/run.json").write_text('{"data": "mine.txt"}')
    save(random_gpt(), Path("dolly"))
    Path("dolly/run.json").write_text('{"data": "dolly"}')
    save(random_gpt(), Path("folder"))
    Path("folder/run.json").write_text('{"data": "texts"}')  # a folder of texts, which is not here now
    for folder in ("text", "dolly", "folder"):
        Path(folder, "results.json").write_text("{}")
    hub = Path("models--openai-community--gpt2-xl/snapshots/15ea56dee5df4983c59b2538573817e1667135e2")
    mine = Path("models--me--gpt2-mine/snapshots/15ea56dee5df4983c59b2538573817e1667135e2")
    for folder in (Path("base"), Path("pickled"), hub, mine):
        save(random_gpt(), folder)
    released = {key.removeprefix("transformer."): tensor for key, tensor in weights("base").items()}
    save_file(released, "base/model.safetensors")
    Path("pickled/model.safetensors").unlink()
    torch.save(released, "pickled/pytorch_model.bin")
    raw = {"gpt2-xl": "on the hub is as released", "openai-community/gpt2": "as released", "4x4x128": "",
           "base": "names of those released", "pickled": "names of those released", "text": "learned mine.txt",
           "folder": "learned texts",
           str(hub): "openai-community/gpt2-xl on the hub is as released"}
    learned = {"MiniLLM/teacher-gpt2-1.5B": "not as released", "gpt2": "by a trainer", "dolly": "learned dolly",
               tiny_models["teacher"]: "by a trainer", str(mine): "me/gpt2-mine on the hub is not as released"}
    for name, why in (raw | learned).items():
        first, line = stages.is_raw(name, "teacher", Config())
        assert first == (name in raw) and why in line and ("--finetune=" in line) == bool(why), name
    Path("dolly/results.json").unlink()
    refused(lambda: stages.is_raw("dolly", "teacher", Config()), "dolly holds an unfinished run", "--resume")
    Path("dolly/results.json").write_text("{}")
    Path("base/model.safetensors").write_bytes(Path("base/model.safetensors").read_bytes()[:99])
    refused(lambda: stages.is_raw("base", "teacher", Config()), "base/model.safetensors is damaged")
    save_file(released, "base/model.safetensors")
    for finetune, asked in (("both", True), ("teacher", True), ("student", False), ("none", False)):
        cfg = Config(finetune=finetune)
        assert stages.is_raw("dolly", "teacher", cfg)[0] == stages.is_raw("base", "teacher", cfg)[0] == asked


def test_a_share_of_no_loss_on_plain_text_is_refused(distill_config):
    refused(lambda: stages.stages(distill_config(pt_kd=0.5, pt_coef=0.0)), "--pt_kd=0.5 is a share of L_PT",
            "--pt_coef")
    stages.stages(distill_config(recipe="official", pt_coef=0.0))
    stages.stages(distill_config(pt_kd=0.5))


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(distill_config, tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_models["teacher"], "p")
    refused(lambda: stages.stages(distill_config(teacher="p", student="./p")), "--teacher and --student are both p")
    for finetune in ("teacher", "student", "both"):
        stages.stages(distill_config(teacher="p", student="p", finetune=finetune))
    stages.stages(distill_config(teacher="1x2x8", student="1x2x8"))


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: save(random_gpt(), folder), ["Error(s) in loading state_dict"]),
    (lambda folder: (folder / "adapter_model.safetensors").touch(), ["holds an adapter", "merge_and_unload"])])
def test_weights_that_cannot_be_used_are_told_before_any_stage(spoil, words, distill_config, tiny_models, tmp_path):
    shutil.copytree(tiny_models["student"], tmp_path / "q")
    config = (tmp_path / "q" / "config.json").read_bytes()
    spoil(tmp_path / "q")
    (tmp_path / "q" / "config.json").write_bytes(config)  # the header is whole, but of another shape
    refused(lambda: distill.main(distill_config(teacher="2x2x16", student=str(tmp_path / "q"), plan="off")), *words)
    assert not (tmp_path / "run" / "teacher").exists()


# ---- an update of Algorithm 1 against its equations -----------------------------------------------------------------

EXAMPLES = [Example(Row(""), prompt, answer) for prompt, answer in [
    ([1, 2, 3], [4, 5, 10]), ([4], [10]), ([5, 6], [7, 8, 9, 1, 2, 3, 10]), ([7, 8], [9, 9, 10]), ([2], [1, 1, 10])]]
TEXT = data.Pieces(np.arange(7 * 12, dtype=np.uint16) % 7, 12)  # seven of --max_tokens
SMALL = dict(preset="tiny", rollouts=8, minibatch=4, inner_epochs=2, steps=4, lr=0.5, mix_alpha=0.4, pt_coef=0.3,
             max_prompt_tokens=3, max_tokens=12, device="cpu")


class Noting(torch.optim.SGD):
    """Keeps the gradient of its last step."""
    def step(self):
        self.gradient = [p.grad.clone() for p in self.param_groups[0]["params"]]
        super().step()


@pytest.fixture
def small(m, monkeypatch):
    """A function that begins phase 2 of models with eleven words. It gives the settings, the optimizer, the updates,
    and the rollouts of all runs in the order in which they were made."""
    collect, rollouts = distill.collect, []

    def noting(*given):
        rollouts.append(collect(*given))
        return rollouts[-1]

    def begin(student, teacher, logits=2**25, **settings):
        cfg = make(Config, SMALL | settings, distill.presets)
        optimizer, scaler = Noting(student.parameters()), torch.amp.GradScaler("cpu", enabled=False)
        updates = distill.algorithm_1(student, teacher, EXAMPLES, TEXT if cfg.pt_coef else [], optimizer, scaler, cfg,
                                      dataclasses.replace(m, logits=logits), 0)
        return SimpleNamespace(cfg=cfg, optimizer=optimizer, updates=updates, rollouts=rollouts)

    monkeypatch.setattr(distill, "collect", noting)
    return begin


def log_probabilities(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of every word at each position of one answer, by a pass over it alone, (n, V)."""
    hidden = model(torch.tensor([prompt + answer]))
    return model.logits(hidden)[0, len(prompt) - 1 : -1].log_softmax(-1)


def slow_update(q, old_q, p, answers, pieces, cfg) -> dict:
    """An update as the paper has it, an answer and a token after the other. It leaves its gradient in q, and returns
    what is logged. answers are pairs of a prompt and an answer; old_q is the student that has sampled them."""
    divisor = sum(len(y) for _, y in answers) if cfg.normalize == "token" else len(answers)
    known = []
    for x, y in answers:
        log_q, old, log_p = (log_probabilities(model, x, y) for model in (q, old_q, p))
        at = range(len(y)), y
        share = 0.0 if cfg.source == "gold" else cfg.mix_alpha
        mixed = (share * log_p.exp() + (1 - share) * old.exp()).log()[at].tolist()
        r = [max(-cfg.reward_clip, min(cfg.reward_clip, value)) for value in (log_p - old)[at].tolist()]
        R = slow_returns(r, cfg.gamma, cfg.length_norm, cfg.return_from)
        known.append((log_q, log_p, log_q[at], old[at].tolist(), mixed, r, R))
    counted = [value for *_, R in known for value in R]
    if cfg.whiten == "all":
        counted += [0.0] * (len(answers) * cfg.response_tokens - len(counted))
    mean, std = (np.mean(counted), math.sqrt(np.var(counted) + 1e-8)) if cfg.whiten != "none" else (0.0, 1.0)
    sums = dict.fromkeys(("loss_single", "loss_long", "reverse_kl", "weight_mean", "clip_fraction", "logp_gap"), 0.0)
    for log_q, log_p, logp, old, mixed, r, R in known:
        w = [math.exp(logp[t].item() - mixed[t]) for t in range(len(r))]
        for t, (of_single, of_long) in enumerate(slow_weights(w, cfg.weight)):
            kl = slow_divergence(log_q[t].exp(), log_p[t].exp(), cfg.divergence)
            ratio = (logp[t] - (old[t] if cfg.weight == "none" else mixed[t])).exp()
            advantage = (R[t] - mean) / std * of_long
            bounded = ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps)
            sums["loss_single"] += of_single * kl
            sums["loss_long"] -= torch.minimum(ratio * advantage, bounded * advantage)
            sums["reverse_kl"] += slow_divergence(log_q[t].exp(), log_p[t].exp(), "reverse").item()
            sums["weight_mean"] += w[t]
            sums["clip_fraction"] += (bounded * advantage < ratio * advantage).item()
            sums["logp_gap"] += abs(logp[t].item() - old[t])
    (cfg.pt_coef * add_text(q, p, pieces, cfg, sums) + (sums["loss_single"] + sums["loss_long"]) / divisor).backward()
    tokens = sum(len(y) for _, y in answers)
    line = {name: sums[name].item() / divisor for name in ("loss_single", "loss_long")}
    line |= {name: sums[name] / tokens for name in ("weight_mean", "clip_fraction", "logp_gap")}
    return line | {"loss_pt": sums["loss_pt"].item(), "reverse_kl": sums["reverse_kl"] / len(answers),
                   "reward": sum(sum(r) for *_, r, _ in known) / len(answers),
                   "response_tokens": tokens / len(answers),
                   "ended_fraction": sum(y[-1] == 10 for _, y in answers) / len(answers)}


def add_text(q, p, pieces, cfg, sums: dict) -> torch.Tensor:
    """L_PT, which is noted among the sums."""
    loss = torch.zeros(())
    for first, rest in pieces:
        log_q, log_p = log_probabilities(q, first, rest), log_probabilities(p, first, rest)
        for t, token in enumerate(rest):
            kl = slow_divergence(log_q[t].exp(), log_p[t].exp(), "forward")
            loss = loss - (1 - cfg.pt_kd) * log_q[t, token] + cfg.pt_kd * kl
    sums["loss_pt"] = loss / max(1, sum(len(rest) if cfg.normalize == "token" else 1 for _, rest in pieces))
    return sums["loss_pt"]


@pytest.mark.parametrize("settings", [
    *(dict(weight=kind) for kind in WEIGHTS), *(dict(objective=name) for name in OBJECTIVES if name != "eq3"),
    dict(objective="js", weight="product"), dict(source="gold"), dict(source="gold", objective="forward"),
    dict(recipe="official"), dict(recipe="official", clip_eps=math.inf, weight="exact"),
    dict(whiten="responses", gamma=0.8, length_norm=False), dict(whiten="all", reward_clip=0.5),
    dict(normalize="sequence", pt_kd=0.5), dict(mix_alpha=0.0), dict(mix_alpha=1.0), dict(pt_coef=0.0),
], ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()))
def test_an_update_is_that_of_the_equations(settings, small):
    """Gradient and log line against loops over whole answers in float64, at the first update and once the student has
    moved; and those of four updates whose batches are split against them."""
    student, teacher = random_gpt(1), random_gpt(2, n_embd=4).requires_grad_(False)
    old_q, p = copy.deepcopy(student).double().requires_grad_(False), copy.deepcopy(teacher).double()
    split = small(copy.deepcopy(student), teacher, **settings, micro_batch=3, logits=20 * 11)
    whole = small(student, teacher, **settings)
    for n, minibatch in enumerate(minibatches(whole.cfg, 0)):
        q = copy.deepcopy(student).double()
        line, of_split = next(whole.updates), next(split.updates)
        assert line["step"] == of_split["step"] == n + 1 and line["lr"] == 0.5
        same_update(of_split, split.optimizer.gradient, line, whole.optimizer.gradient)
        if n in (0, 3):
            rollout = whole.rollouts[0]
            answers = [(rollout.prompts[i], rollout.answers[i]) for i in minibatch]
            picks = data.picks(4 * n, 4, len(TEXT), whole.cfg.seed) if whole.cfg.pt_coef else []
            want = slow_update(q, old_q, p, answers, [(TEXT[i].prompt, TEXT[i].response) for i in picks], whole.cfg)
            gradient = [torch.zeros_like(w) if w.grad is None else w.grad for w in q.parameters()]
            want["grad_norm"] = math.sqrt(sum(g.square().sum().item() for g in gradient))
            clipped = [g * min(1.0, 1.0 / want["grad_norm"]) for g in gradient]
            same_update(line, whole.optimizer.gradient, want, clipped)
    if whole.cfg.return_from == "none":
        assert line["clip_fraction"] == 0
    elif whole.cfg.clip_eps < 1:  # the test reaches what it is about
        assert 0 < line["clip_fraction"] < 1 and line["logp_gap"] > 0.01


def same_update(line: dict, gradient: list, want: dict, gradient_wanted: list) -> None:
    names = [name for name in want if not name.endswith("seconds")]
    assert [line[name] for name in names] == pytest.approx([want[name] for name in names], rel=1e-4, abs=1e-5), names
    for got, slow in zip(gradient, gradient_wanted, strict=True):
        torch.testing.assert_close(got.double(), slow.double(), rtol=1e-4, atol=1e-5)


def test_the_teachers_layers_stay_idle_in_an_update(small, monkeypatch):
    """Its last hidden states were kept when it sampled."""
    student, teacher = random_gpt(1), random_gpt(2, n_embd=4).requires_grad_(False)
    run = small(student, teacher)
    collect = distill.collect

    def then_rest(*given):
        rollout = collect(*given)
        teacher.forward = None
        return rollout

    monkeypatch.setattr(distill, "collect", then_rest)
    assert [line["step"] for line in run.updates] == [1, 2, 3, 4]


def test_forward_kl_on_references_is_word_level_kd(small, m):
    """--source=gold --objective=forward, and teacher.py's loss with --kd_ratio=1; reverse_kl is known too."""
    student, teacher = random_gpt(1), random_gpt(2).requires_grad_(False)
    run = small(copy.deepcopy(student), teacher, source="gold", objective="forward", pt_coef=0.0)
    line = next(run.updates)
    of_update = [EXAMPLES[data.picks(0, 8, 5, run.cfg.seed)[i]] for i in minibatches(run.cfg, 0)[0]]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    tokens = sum(len(e.response) for e in of_update)
    loss, _ = supervised.add_gradient(student, data.batch_of(of_update, m.device), tokens, m, scaler, teacher, 1.0)
    supervised.clip_gradient(student, None, scaler, m)
    assert line["loss_single"] * tokens == pytest.approx(loss.item(), rel=1e-5) and line["loss_long"] == 0
    for got, p in zip(run.optimizer.gradient, student.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-6)
    known = follow(student, [e.prompt for e in of_update], [e.response for e in of_update], 9, m, teacher)
    assert line["reverse_kl"] == pytest.approx(known.reverse_kl.sum().item() / 4, rel=1e-5)


def test_an_answer_depends_on_its_number_alone(m):
    """The ninth is the same, whether it is in the first collection or the second, and whatever its process makes."""
    student, teacher = random_gpt(1), random_gpt(2)
    of = lambda rollouts, collection, mine: distill.collect(
        make(Config, SMALL | dict(rollouts=rollouts), distill.presets), collection, mine, EXAMPLES, student, teacher, m)
    whole = of(16, 0, range(16))
    for collection in (0, 1):
        part = of(8, collection, [6, 1, 3])
        numbers = [8 * collection + i for i in (6, 1, 3)]
        assert part.prompts == [whole.prompts[i] for i in numbers]
        assert part.answers == [whole.answers[i] for i in numbers]


# ---- answers that were drawn, or are given --------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1, 2]]


def test_a_rollout_of_given_answers_is_that_of_drawing_them(m):
    student, teacher = random_gpt(1, eos_token_id=2), random_gpt(2, n_embd=4)
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    drawn = sample(student, prompts, uniforms(0, range(4), 10), m, teacher, 0.0)
    assert not drawn.ended.all() and drawn.ended.any()
    # an answer that ran out of length is one whose reference is longer
    answers = [answer + [1] * (not ended) for answer, ended in zip(drawn.answers, drawn.ended)]
    for positions in (1, 30, 256):
        given = follow(student, prompts, answers, 10, dataclasses.replace(m, logits=11 * positions), teacher,
                       keep_hidden=True)
        assert given.answers == drawn.answers and given.ended.equal(drawn.ended)
        for name in ("student_logp", "mixed_logp", "teacher_logp"):
            torch.testing.assert_close(getattr(given, name), getattr(drawn, name), atol=1e-5, rtol=0)
        for row, (prompt, answer) in enumerate(zip(prompts, given.answers)):
            with torch.no_grad():
                kl = reverse_kl(log_probabilities(student, prompt, answer), log_probabilities(teacher, prompt, answer))
            torch.testing.assert_close(given.reverse_kl[row, : len(answer)], kl, atol=1e-5, rtol=0)
        assert not given.reverse_kl[~drawn.response_mask].any()
        mask = drawn.response_mask
        torch.testing.assert_close(given.teacher_hidden[mask], drawn.teacher_hidden[mask], atol=1e-5, rtol=0)


def test_an_answer_that_fills_all_positions_is_scored(m):
    """The last token of prompt and answer is drawn, and never read: it needs no position."""
    student, teacher = (random_gpt(seed, eos_token_id=-1) for seed in (1, 2))  # 32 positions
    drawn = sample(student, [[1] * 30, [2] * 4], uniforms(0, range(2), 3), m, teacher)
    given = follow(student, drawn.prompts, drawn.answers, 3, m, teacher)
    for name in ("student_logp", "teacher_logp"):
        torch.testing.assert_close(getattr(given, name), getattr(drawn, name), atol=1e-5, rtol=0)
    assert given.answers == drawn.answers and not given.ended.any()


@pytest.mark.parametrize("temperature", [1e-4, 1e-3])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature, m):
    student = random_gpt(3)
    rollout = sample(student, PROMPTS, uniforms(0, range(len(PROMPTS)), 6), m,
                     adjust=lambda logp_vocab, rows, said: restrict(logp_vocab, temperature, 0, 1.0))
    for prompt, answer in zip(PROMPTS, rollout.answers):
        with torch.no_grad():
            assert log_probabilities(student, prompt, answer).argmax(-1).tolist() == answer
    assert rollout.mixed_logp.isfinite().all()


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_a_teacher_whose_probabilities_underflow(scale, small):
    """p(y) of e^-300 and less is 0 in float32; its logarithm is not: equal to a computation in float64."""
    student, teacher = random_gpt(1), random_gpt(2).requires_grad_(False)
    teacher.ln_f.weight.data *= scale
    q, p = copy.deepcopy(student).double().requires_grad_(False), copy.deepcopy(teacher).double()
    run = small(student, teacher, mix_alpha=0.0)
    line = next(run.updates)
    rollout, want = run.rollouts[0], 0.0
    assert rollout.teacher_logp.min() < -300
    for i in minibatches(run.cfg, 0)[0]:
        log_q, log_p = (log_probabilities(model, rollout.prompts[i], rollout.answers[i]) for model in (q, p))
        want += (log_q.exp() * (log_q - log_p)).sum().item()
    assert line["reverse_kl"] == pytest.approx(want / 4, rel=1e-5) and math.isfinite(line["grad_norm"])


# ---- Algorithm 1 in the built-in world ------------------------------------------------------------------------------

def test_the_optimizer_is_that_of_the_released_scripts(distill_config, monkeypatch):
    """AdamW with their betas and weight decay, which the paper does not name."""
    class Made(Exception):
        pass

    def made(model, m, betas, weight_decay):
        raise Made(betas, weight_decay)

    monkeypatch.setattr(supervised, "optimizer_of", made)
    with pytest.raises(Made) as caught:
        distill.distil(distill_config())
    assert caught.value.args == ((0.9, 0.95), 1e-6)


@pytest.fixture(scope="module")
def phase_2(tiny_models, few_rows):
    """A function that begins phase 2 of small models, in memory. It gives the student and the updates."""
    tokenizer = data.world_tokenizer()
    instructions = data.load_examples("tiny", "train", tokenizer, 16, 44, print)
    corpus = data.load_pieces("tiny-text", tokenizer, Path("nowhere"), 44, CPU)

    def begin(logits=2**25, step=0, **settings):
        few = dict(preset="tiny", **tiny_models, steps=5, rollouts=16, minibatch=8, inner_epochs=2, pt_coef=0.5)
        cfg = make(Config, few | settings, distill.presets)
        m = Machine(torch.device("cpu"), getattr(torch, cfg.dtype), 0, 1, cfg.sample_batch, logits)
        student = load(cfg.student)
        teacher = decoder(cfg.decoder)[1](load(cfg.teacher), m.dtype).requires_grad_(False)
        optimizer, scaler = supervised.optimizer_of(student, m, (0.9, 0.95), 1e-6)
        return SimpleNamespace(student=student, updates=distill.algorithm_1(
            student, teacher, instructions, corpus if cfg.pt_coef else [], optimizer, scaler, cfg, m, step))
    return begin


@pytest.fixture(scope="module")
def after(phase_2):
    """A function: the weights after a few updates with these settings, over more than one collection of answers."""
    done = {}

    def run(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in done:
            begun = phase_2(**settings)
            assert sum(1 for _ in begun.updates) == 5
            done[key] = torch.cat([p.detach().flatten() for p in begun.student.parameters()])
        return done[key]
    return run


def test_an_inner_epoch_takes_each_answer_once_and_each_column_once_a_minibatch():
    cfg = Config(rollouts=24, minibatch=6, inner_epochs=2)
    one, two = minibatches(cfg, 3)[:4], minibatches(cfg, 3)[4:]
    for epoch in (one, two):
        assert sorted(i for batch in epoch for i in batch) == list(range(24)) and len(epoch) == 4
        assert all(sorted(i % 6 for i in batch) == list(range(6)) for batch in epoch)
    assert one != two and minibatches(cfg, 3) == one + two != minibatches(cfg, 4)
    assert minibatches(dataclasses.replace(cfg, seed=2), 3) != one + two


@pytest.mark.parametrize("settings", [
    *(dict(objective=name) for name in OBJECTIVES if name != "eq3"),
    *(dict(weight=kind) for kind in WEIGHTS if kind != "per_token"), dict(mix_alpha=0.0), dict(mix_alpha=0.6),
    dict(mix_alpha=1.0), dict(length_norm=False), dict(gamma=0.5), dict(whiten="responses"), dict(whiten="all"),
    dict(reward_clip=0.5), dict(clip_eps=0.01), dict(inner_epochs=1), dict(pt_coef=0.0), dict(pt_coef=1.0),
    dict(pt_kd=0.5), dict(normalize="sequence"), dict(lr=1e-3), dict(seed=2), dict(recipe="official"),
    dict(source="gold"), dict(decoder="turns"),
], ids=lambda settings: next(f"{name}={value}" for name, value in settings.items()))
def test_each_flag_acts(settings, after):
    assert (after(**settings) - after()).abs().max() > 1e-5


def test_in_a_mixture_of_one_it_is_always_its_turn(after):
    for alpha in (0.0, 1.0):
        alone, by_turns = after(mix_alpha=alpha), after(mix_alpha=alpha, decoder="turns")
        torch.testing.assert_close(by_turns, alone, atol=2e-3, rtol=0)


@pytest.mark.parametrize("settings", [dict(micro_batch=3), dict(sample_batch=5), dict(logits=300 * 123),
                                      dict(decoder="plain")], ids=str)
def test_what_changes_memory_and_speed_changes_nothing_else(settings, after):
    torch.testing.assert_close(after(**settings), after(), atol=2e-3, rtol=0)  # rounding, through AdamW's signs


def test_a_run_that_goes_on_within_a_collection_takes_the_minibatches_that_are_left(phase_2):
    """As one of 6 updates does that is made longer, where four learn from the same answers."""
    rewards = lambda step: [line["reward"] for line in phase_2(steps=8, step=step, lr=0.0).updates]
    assert rewards(6) == pytest.approx(rewards(0)[6:]) and len(set(rewards(4))) > 1


def test_the_learning_rate_rises_and_stays(phase_2):
    """Over a 32nd of the updates, a hundred at most."""
    rates = [line["lr"] for _, line in zip(range(5), phase_2(steps=96, lr=0.3).updates)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])
    assert next(phase_2(steps=10**6, lr=0.3).updates)["lr"] == pytest.approx(0.003)


def test_reverse_kl_falls(phase_2):
    updates = phase_2(steps=16, lr=1e-2, rollouts=32, minibatch=16, pt_coef=0.0).updates
    kl = [line["reverse_kl"] / line["response_tokens"] for line in updates]
    assert sum(kl[-4:]) < 0.7 * sum(kl[:4])


def test_a_loss_that_is_no_number_is_named(phase_2, monkeypatch):
    first = lambda: next(phase_2().updates)
    with monkeypatch.context() as patch:
        patch.setattr(distill, "single_step_loss", lambda kl, weight: kl * float("nan"))
        refused(first, "stopped at update 1", "loss_single is nan", "--lr")
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "add_gradient", lambda *given: torch.tensor([math.inf, 0.0]))
        refused(first, "stopped at update 1", "loss_pt is inf")
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: torch.tensor(math.inf))
        refused(first, "the gradient's norm is inf", "--lr")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ends", ["at once", "never"])
def test_answers_that_all_end_at_once_or_never(ends, dtype, phase_2, tiny_models, tmp_path):
    """One token each, so that nothing comes after it; or as many as there is room for, none of them ended."""
    student = load(tiny_models["student"])
    student.ln_f.weight.data.zero_()
    student.ln_f.bias.data.fill_(1.0)  # logits are the sums of the embedding's rows
    student.wte.weight.data[-1] = 5.0 if ends == "at once" else -5.0
    save(student, tmp_path)
    for line in phase_2(student=str(tmp_path), dtype=dtype, steps=2, mix_alpha=0.0, lr=0.0).updates:
        assert all(math.isfinite(value) for value in line.values())
        assert line["response_tokens"] == (1.0 if ends == "at once" else 28.0)
        assert line["ended_fraction"] == (1.0 if ends == "at once" else 0.0)
        assert (line["loss_long"] == 0.0) == (ends == "at once")


# ---- phase 2 as a run -----------------------------------------------------------------------------------------------

def test_three_updates_log_every_metric_and_leave_a_model(distill_config, tmp_path):
    results = distill.distil(distill_config(steps=3))
    out = tmp_path / "run" / "minillm"
    log = lines(out)
    assert [line["step"] for line in log] == [0, 1, 2, 3, 3] and "valid" in log[0] and "valid" in log[-1]
    for line in log[1:4]:
        assert set(line) == {
            "step", "loss_single", "loss_long", "loss_pt", "reverse_kl", "reward", "weight_mean", "clip_fraction",
            "response_tokens", "ended_fraction", "logp_gap", "grad_norm", "lr", "sample_seconds", "update_seconds"}
        assert line["reverse_kl"] > 0 and 0 <= line["clip_fraction"] <= 1
    assert log[1]["logp_gap"] < 1e-5 < log[2]["logp_gap"] and log[1]["sample_seconds"] > 0 == log[2]["sample_seconds"]
    assert log[1]["weight_mean"] == pytest.approx(1, abs=0.2)
    assert results["best"]["step"] == 3 and json.loads((out / "run.json").read_text())["steps"] == 3
    assert len((out / "samples.jsonl").read_text().splitlines()) == 6


def test_a_run_does_not_go_on_with_what_learns_something_else(distill_config, tmp_path):
    """Other decoders draw the same answers, but those of --decoder=turns are others."""
    out = tmp_path / "run" / "minillm"
    files.write_json(out / "run.json", runs.made_with(distill_config(decoder="turns")))
    same = dict(micro_batch=1, sample_batch=2, recompute=True, baselines="kd", plan="only", resume=True)
    assert not runs.is_finished(out, distill_config(decoder="turns", **same), distill.FREE)
    for flag, value in (("decoder", "fast"), ("gamma", 0.5), ("seed", 2), ("dtype", "bfloat16")):
        cfg = distill_config(**{"decoder": "turns", "resume": True, flag: value})
        refused(lambda cfg=cfg: runs.is_finished(out, cfg, distill.FREE), f"was made with {flag}=", "another --out")


def test_a_validation_comes_with_the_collection_that_reaches_it(distill_config, tmp_path):
    distill.distil(distill_config(steps=11, eval_every=3))  # four updates learn from the same answers
    assert [line["step"] for line in lines(tmp_path / "run" / "minillm") if "valid" in line] == [0, 4, 8, 11]


def test_flags_of_speed_reach_what_they_set(distill_config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(supervised, "split", lambda model, *given: seen.append(model.recompute) or model)
    distill.distil(distill_config(steps=1, recompute=True))
    assert seen == [True]
    on_a_cpu = distill_config(decoder="captured", out=str(tmp_path / "captured"))
    refused(lambda: distill.distil(on_a_cpu), "--decoder=captured", "--decoder=fast")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bits(dtype, distill_config, tmp_path, monkeypatch):
    distill.distil(distill_config(steps=8, dtype=dtype, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            distill.distil(distill_config(steps=8, dtype=dtype))
    refused(lambda: distill.distil(distill_config(steps=8, dtype=dtype)), "unfinished", "--resume")
    distill.distil(distill_config(steps=8, dtype=dtype, resume=True))
    for name, tensor in weights(tmp_path / "whole" / "minillm").items():
        assert torch.equal(tensor, weights(tmp_path / "run" / "minillm")[name])
    quiet = lambda line: {name: value for name, value in line.items() if not name.endswith("seconds")}
    logs = [[quiet(line) for line in lines(tmp_path / name / "minillm")] for name in ("run", "whole")]
    assert logs[0] == logs[1]


def test_a_run_killed_beside_its_checkpoint_logs_each_line_once(distill_config, tmp_path, monkeypatch):
    """Behind the very last checkpoint; and between the first validation and the first checkpoint."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            distill.distil(distill_config())
    distill.distil(distill_config(resume=True))
    assert [line["step"] for line in lines(tmp_path / "run" / "minillm")] == [0, 1, 2, 3, 4, 4]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_state", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill.distil(distill_config(out=str(tmp_path / "early")))
    distill.distil(distill_config(out=str(tmp_path / "early"), resume=True))
    assert [line["step"] for line in lines(tmp_path / "early" / "minillm")] == [0, 1, 2, 3, 4, 4]


# ---- several processes ----------------------------------------------------------------------------------------------

def flags(out: Path, tiny_models: dict, **settings) -> list[str]:
    few = dict(preset="tiny", **tiny_models, out=out, baselines="", steps=4, rollouts=12, minibatch=6, inner_epochs=2,
               plan="off", device="cpu", sample_batch=16, max_tokens=24)
    return [f"--{name}={value}" for name, value in (few | settings).items()]


def a_process(rank: int, world: int, meet: str, argv: list[str]) -> None:
    """The command, as one of so many processes: what torchrun starts, but for the imports and a free port."""
    gc.freeze()  # or each collection would copy all that this process shares with its parent
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    sys.argv[:] = ["distill.py", *argv]
    join = torch.distributed.init_process_group
    config.dist.init_process_group = partial(join, init_method=f"file://{meet}", rank=rank, world_size=world)
    config.run(distill.main, Config, distill.presets)


def same_losses(one: list[dict], two: list[dict]) -> None:
    """Step for step, to rounding."""
    for a, b in zip(one, two, strict=True):
        for name, value in a.items():
            if not name.endswith("seconds") and name != "logp_gap":
                assert b[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize("decoder", ["fast", "turns"])
def test_several_processes_do_what_one_does(decoder, tiny_models, tmp_path, capfd, monkeypatch):
    """The same global batch over gloo, in one, two and four processes, accumulated one, two and more times."""
    monkeypatch.setattr(stages.evaluation, "Config", partial(stages.evaluation.Config, seeds=1))
    fork = multiprocessing.get_context("fork")
    for count, micro_batch in ((1, 64), (2, 2), (4, 1)):
        argv = flags(tmp_path / str(count), tiny_models, micro_batch=micro_batch, decoder=decoder)
        processes = [fork.Process(target=a_process, args=(rank, count, f"{tmp_path}/meet-{count}", argv), daemon=True)
                     for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()  # others would wait for it
        said = capfd.readouterr()
        assert [process.exitcode for process in processes] == [0] * count, said.err
        assert said.out.count("written to") == 1  # one process speaks
        same_losses(lines(tmp_path / "1" / "minillm"), lines(tmp_path / str(count) / "minillm"))
    one, *more = (json.loads((tmp_path / str(world) / "results.json").read_text()) for world in (1, 2, 4))
    for test in more:
        assert [row["method"] for row in one] == ["teacher", "init", "minillm"] == [row["method"] for row in test]
        assert one[0]["rouge_l"] == pytest.approx(test[0]["rouge_l"])


def test_a_process_that_dies_ends_the_run_and_another_number_goes_on(tiny_models, tmp_path):
    """Begun by torchrun, and gone on with by one process."""
    rows = [dict(zip(("instruction", "input", "output"), row)) for row in world.instructions("valid")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text(f"\n{END}\n".join(world.text()))
    settings = dict(steps=24, eval_every=4, data=tmp_path / "rows.jsonl", corpus=tmp_path / "text.txt")
    alone = lambda out, *more: distill.main(parse(Config, [*flags(out, tiny_models, **settings), *more],
                                                  distill.presets))
    alone(tmp_path / "whole")
    out, children = tmp_path / "run", []
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "distill.py"]
    run = subprocess.Popen([*launch, *flags(out, tiny_models, **settings)], stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE, text=True, cwd=Path(distill.__file__).parent,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (out / "minillm" / "state-before.pt").exists():  # two states have been saved
        assert run.poll() is None, run.stderr.read()
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split() or children
        time.sleep(0.01)
    os.kill(int(children[-1]), signal.SIGKILL)
    told = run.communicate(timeout=300)[1]
    assert run.returncode != 0 and "SIGKILL" in told
    alone(out, "--resume")
    same_losses(lines(tmp_path / "whole" / "minillm"), lines(out / "minillm"))


# ---- all stages -----------------------------------------------------------------------------------------------------

def test_every_stage_from_nothing_and_none_of_them_twice(distill_config, tmp_path, monkeypatch, capsys):
    for name in ("TINY_TEACHER", "TINY_INIT"):
        monkeypatch.setattr(stages, name, getattr(stages, name) | dict(updates=4, evals=1))
    settings = dict(teacher="1x2x12", student="1x2x8", baselines="sft,kd,seqkd", steps=2, max_tokens=24, plan="auto")
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    rows = distill.main(distill_config(**settings))
    printed = capsys.readouterr().out
    assert threads == [1]  # so a table does not depend on how many there are
    assert [row["method"] for row in rows] == ["teacher", "init", "sft", "kd", "seqkd", "minillm"]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == rows
    for row in rows:
        assert (tmp_path / "run" / "first-run.png").read_bytes().startswith(b"\x89PNG")
        assert {"valid", "covered", "reverse_kl", "forward_kl", "loss", "rouge_l", "std"} <= set(row)
    assert rows[0]["reverse_kl"] == 0 and all(row["reverse_kl"] > 0 for row in rows[1:])
    assert printed.index("plan: 1x2x12 teaches 1x2x8 tiny") < printed.index("run/teacher: 1x2x12")
    assert distill.main(distill_config(**settings)) == rows
    again = capsys.readouterr().out
    assert again.count("finished earlier, kept") == 6 and again.count("made earlier, kept") == 6
    assert "everything is done already" in again
    shutil.rmtree(tmp_path / "run" / "seqkd")  # other flags are told before it is trained anew
    refused(lambda: distill.main(distill_config(**settings, gamma=0.5)), "minillm was made with gamma=1.0")
    assert not (tmp_path / "run" / "seqkd").exists() and "plan:" not in capsys.readouterr().out
    refused(lambda: distill.main(distill_config(**settings | dict(steps=3))), "updates=2, and now it is 3")


def test_the_plan_alone_does_nothing(distill_config, tmp_path, capsys):
    assert distill.main(distill_config(plan="only", teacher="1x2x12", student="1x2x8")) == []
    printed = capsys.readouterr().out
    assert all(f"  {stage} " in printed for stage in ("teacher", "init", "minillm", "evaluate")) and "GiB" in printed
    assert "answers from the mixture" in printed and not [*tmp_path.glob("run*")]  # nor a lock


def test_too_little_memory_is_told_before_anything_is_loaded(distill_config, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda m: 1000)
    monkeypatch.setattr(distill, "load", None)
    refused(lambda: distill.main(distill_config(plan="auto")), "minillm needs about", "0.0 GiB are free",
            "--micro_batch", "--plan=off")
    assert not (tmp_path / "run" / "minillm").exists()


def trained_stages(work: stages.Stages) -> dict[str, supervised.Config]:
    stages = {"teacher": work.teacher, "init": work.init} | work.baselines
    return {name: settings for name, settings in stages.items() if settings}


def test_phase_2_alone_takes_finished_models_as_they_are(monkeypatch):
    monkeypatch.setattr(stages, "is_gpt2", lambda name: True)  # the hub is not asked
    cfg = make(Config, dict(teacher="MiniLLM/teacher-gpt2-1.5B", student="MiniLLM/init-gpt2-120M"), distill.presets)
    work = stages.stages(cfg)
    assert work == stages.Stages(None, None, None, {}, cfg, work.decided) and "is taken as it is" in work.decided[0]
    work = stages.stages(make(Config, dict(teacher="gpt2-xl", baselines="kd"), distill.presets))
    assert [(name, s.model, s.select, s.epochs) for name, s in trained_stages(work).items()] == [
        ("teacher", "gpt2-xl", "rouge_l", None), ("init", "gpt2", "loss", 3), ("kd", "gpt2", "rouge_l", None)]
    assert work.baselines["kd"].teacher == work.minillm.teacher == "out/gpt2-xl-to-gpt2/teacher"
    assert work.minillm.student == "out/gpt2-xl-to-gpt2/init" and work.answers is None


def test_in_the_built_in_world_each_baseline_has_its_own_rate_and_as_many_updates_as_phase_2():
    work = stages.stages(make(Config, dict(steps=7), distill.presets))
    assert {name: (s.lr, s.updates, s.model) for name, s in work.baselines.items()} == {
        "sft": (8e-3, 7, "out/tiny/init"), "kd": (1.6e-2, 7, "out/tiny/init"), "seqkd": (2e-3, 7, "out/tiny/init")}
    work = stages.stages(make(Config, dict(teacher="gpt2-xl", baselines="sft,kd"), distill.presets))
    assert {(s.lr, s.updates, s.model) for s in work.baselines.values()} == {(None, None, "gpt2")}


def test_every_stage_hears_of_what_saves_memory():
    given = dict(teacher="gpt2-xl", micro_batch=1, sample_batch=3, recompute=True, baselines="sft,kd,seqkd")
    work = stages.stages(make(Config, given, distill.presets))
    assert work.answers.sample_batch == 3 and len(trained_stages(work)) == 5
    for settings in trained_stages(work).values():
        assert (settings.micro_batch, settings.sample_batch, settings.recompute) == (1, 3, True)
        assert settings.decoder == work.answers.decoder == "fast" and work.minillm.decoder == "turns"


def test_float16_scales_its_loss(distill_config, monkeypatch):
    """Where bfloat16 is missing: the scaler is on, and off for other types; the plan and both loops run with it."""
    gpt = random_gpt()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        m = Machine(torch.device("cpu"), dtype)
        optimizer, scaler = supervised.optimizer_of(gpt, m, (0.9, 0.95), 0.0)
        assert scaler.is_enabled() == (dtype == torch.float16)
        assert supervised.clip_gradient(gpt, optimizer, scaler, m) == 0.0  # as without a row of the batch
        scaler.step(optimizer)
        scaler.update()
    few = dict(dtype="float16", student="1x2x8", steps=2, max_tokens=24, plan="auto")
    monkeypatch.setattr(stages, "TINY_INIT", stages.TINY_INIT | dict(updates=2, evals=1))
    assert all(math.isfinite(row["loss"]) for row in distill.main(distill_config(**few)))


def test_other_settings_do_not_take_the_teachers_answers(distill_config, tiny_models, tmp_path):
    """Each setting that SeqKD's answers depend on leads to another file of them; what changes speed does not."""
    rows = tmp_path / "rows.jsonl"
    shutil.copytree(tiny_models["teacher"], tmp_path / "p")
    given = dict(teacher=str(tmp_path / "p"), data=str(rows), baselines="seqkd")
    answers = lambda **settings: stages.stages(distill_config(**given | settings)).answers.out
    rows.write_text(json.dumps({"instruction": "Tell about the cat", "output": "Anna saw a cat."}) + "\n")
    first = answers()
    assert answers(sample_batch=2, micro_batch=3, steps=8, decoder="plain") == first
    others = [answers(**settings) for settings in (
        dict(seed=2), dict(max_tokens=40), dict(max_prompt_tokens=12, max_tokens=44), dict(dtype="bfloat16"),
        dict(data="tiny"), dict(teacher=tiny_models["student"], student="1x2x8"))]
    rows.write_text(rows.read_text().replace("cat", "owl"))
    others.append(answers())
    save(random_gpt(), tmp_path / "p")
    others.append(answers())
    assert len({first, *others}) == 1 + len(others)


def test_which_models_are_evaluated_and_on_which_rows(distill_config, tmp_path, monkeypatch):
    """A baseline that was given up is left out, and a user's file is not tested on what was trained on."""
    seen = []
    scores = {name: [1.0, 2.0] for name in ("rouge_l", "loss")}
    monkeypatch.setattr(stages.evaluation, "main", lambda cfg, own: seen.append(cfg) or {
        "scores": scores, "rouge_sees": 100.0})
    for name in ("kd", "minillm", "sft"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "run.json").write_text("{}")
        (tmp_path / "run" / name / "results.json").write_text("{}")
    (tmp_path / "run" / "sft" / "results.json").unlink()
    for given, split in (("tiny", "test"), ("dolly", "test"), ("mine.jsonl", "valid")):
        table = stages.evaluate(distill_config(data=given, baselines="sft,kd"))
        assert [row["method"] for row in table] == ["teacher", "init", "kd", "minillm"]
        assert {(cfg.data, cfg.split) for cfg in seen} == {(given, split)}
        seen.clear()
    table = stages.evaluate(distill_config(data="tiny"))  # which names no baseline
    assert [row["method"] for row in table] == ["teacher", "init", "minillm"]
