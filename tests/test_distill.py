"""The equations against loops written from the paper, the official recipe against numbers worked by hand, and
Algorithm 1: flags that act, batches that split, runs that resume to the same bits, processes that change nothing."""

import dataclasses
import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import random_gpt, refused, weights
from test_teacher import interrupt_after, lines

import config
import data
import distill
import teacher as supervised
import world
from config import Machine, make, parse
from data import Example, Row
from distill import (
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
    score,
    token_reward,
    whiten,
)
from model import load, save
from sample import Config as SampleConfig
from sample import follow, sample, uniforms

pytestmark = pytest.mark.usefixtures("few_rows")
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()  # an answer of one token among them


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- each equation against its slow twin ----------------------------------------------------------------------------

def test_reverse_kl_is_eq_1_at_a_position():
    log_q, log_p = rand(2, 3, 7, seed=1).log_softmax(-1), rand(2, 3, 7, seed=2).log_softmax(-1)
    for b in range(2):
        for t in range(3):
            slow = sum(math.exp(q) * (q - p) for q, p in zip(log_q[b, t].tolist(), log_p[b, t].tolist()))
            assert reverse_kl(log_q, log_p)[b, t].item() == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("return_from", ["next", "current"])
def test_future_reward_is_eq_6(gamma, length_norm, return_from):
    """Sums over t' > t, or t' >= t, of gamma^(t'-t) r_t', divided by their number; 0 where there is nothing to come."""
    reward = rand(3, 5) * MASK
    got = future_reward(reward, MASK, gamma, length_norm, return_from)
    for b, row in enumerate(MASK.sum(1).tolist()):
        for t in range(5):
            later = range(t + (return_from == "next"), row) if t < row else range(0)
            slow = sum(gamma ** (k - t) * reward[b, k].item() for k in later)
            slow /= len(later) if length_norm and len(later) else 1
            assert got[b, t].item() == pytest.approx(slow, abs=1e-12)
    junk = reward + 100 * ~MASK
    if gamma == 1.0:
        assert future_reward(junk * MASK, MASK, gamma, length_norm, return_from).equal(got)


def test_importance_weights_are_the_products_they_are_called():
    log_q, log_mix = rand(3, 5, seed=1), rand(3, 5, seed=2)  # junk in the padding
    w = lambda b, ks: math.prod(math.exp(log_q[b, k].item() - log_mix[b, k].item()) for k in ks)
    got = {kind: importance_weights(log_q, log_mix, MASK, kind) for kind in ("none", "per_token", "product", "exact")}
    for b, n in enumerate(MASK.sum(1).tolist()):
        for t in range(n):
            others = [k for k in range(n) if k != t]
            want = {"none": (1, 1), "per_token": (w(b, [t]), 1), "product": (w(b, range(t + 1)), w(b, range(t))),
                    "exact": (w(b, range(t)), w(b, others))}
            for kind, pair in want.items():
                assert [x[b, t].item() for x in got[kind]] == pytest.approx(list(pair))
    assert not any(x.requires_grad for x in importance_weights(log_q.requires_grad_(), log_mix, MASK, "exact"))


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
    single, long, weight, _ = minillm_loss(take(log_q), reverse_kl(log_q, log_p), take(log_q).detach(), take(mixed), R,
                                           MASK, clip_eps=math.inf)
    got = torch.autograd.grad((single + long).sum(), logits)[0]
    want = torch.zeros_like(got)
    for b in range(3):
        for t in range(5):
            if MASK[b, t]:
                q = logits[b, t].softmax(-1)
                w = (q[y[b, t]] / mixed[b, t, y[b, t]].exp()).item()
                assert weight[b, t].item() == pytest.approx(w)
                surrogate = (q * (q.log() - log_p[b, t])).sum() - R[b, t] * q[y[b, t]] / q[y[b, t]].item()
                want += w * torch.autograd.grad(surrogate, logits, retain_graph=True)[0]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_without_weights_the_ratio_is_to_the_student_that_sampled():
    log_q, old, mixed, R = (rand(3, 5, seed=s) for s in range(4))
    for kind, behaviour in (("none", old), ("per_token", mixed)):
        _, long, _, _ = minillm_loss(log_q, log_q, old, mixed, R, MASK, kind, clip_eps=math.inf)
        torch.testing.assert_close(long, -(log_q - behaviour).exp() * R * MASK)


def test_padding_is_in_no_loss():
    values = [rand(3, 5, seed=s) for s in range(5)]
    outside = [v + 50 * ~MASK for v in values]
    for kind in ("none", "per_token", "product", "exact"):
        for a, b in zip(minillm_loss(*values, MASK, kind), minillm_loss(*outside, MASK, kind)):
            assert a.equal(b) and not a[~MASK].any()
    for kind in ("responses", "all"):
        assert not whiten(values[0] * MASK, MASK, kind)[~MASK].any()


# ---- --recipe=official, worked by hand for one answer of two tokens in three places ---------------------------------

def test_the_official_recipe_by_hand():
    cfg = make(Config, {"recipe": "official"}, distill.presets)
    two = torch.tensor([[True, True, False]])
    log_p, log_q = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -60.0, 0.0]])
    r = token_reward(log_p, log_q, cfg.reward_scale, cfg.reward_clip) * two
    assert r.tolist() == [[1.0, 100.0, 0.0]]  # deviation 5: twice 0.5; twice 58, clipped at 100
    R = future_reward(r, two, cfg.gamma, cfg.length_norm, cfg.return_from)
    # 1 to 3: gamma 0.95, r_t inside, divided by the remaining length with t: (1 + 0.95 * 100) / 2, 100 / 1
    assert R.tolist() == [[48.0, 100.0, 0.0]]
    white = whiten(R, two, cfg.whiten)  # 4: over all three places, mean 148/3, variance (48² + 100²)/3 - (148/3)²
    mean, std = 148 / 3, math.sqrt((48**2 + 100**2) / 3 - (148 / 3) ** 2)
    assert white.tolist()[0] == pytest.approx([(48 - mean) / std, (100 - mean) / std, 0.0], abs=1e-6)
    kl, mixed = torch.tensor([[0.3, 0.4, 9.0]]), torch.tensor([[-1.5 - math.log(1.1), -60 + math.log(2), 0.0]])
    settings = two, cfg.weight, cfg.weight_single, cfg.clip_eps
    single, long, weight, clipped = minillm_loss(log_q, kl, log_q, mixed, white, *settings)
    assert single.tolist()[0] == pytest.approx([0.3, 0.4, 0.0])  # 7: the exact KL, not weighted
    assert weight.tolist()[0][:2] == pytest.approx([1.1, 0.5], abs=1e-5)  # 8: w is inside of the ratio, then clipped
    a, b = white.tolist()[0][:2]
    assert a < 0 < b and long.tolist()[0] == pytest.approx([-1.1 * a, -0.5 * b, 0.0], abs=1e-5)
    assert not clipped.any()  # a < 0 with ratio above 1 - eps and b > 0 with ratio below 1 + eps keep their gradient
    *_, clipped = minillm_loss(log_q, kl, log_q, mixed, -white, *settings)
    assert clipped.tolist() == [[False, True, False]]  # 8: no gradient at the first step, where w < 0.8 and A < 0
    assert cfg.normalize == "token" and cfg.pt_kd == 0.5  # 6 and 10, of which the next two tests


def test_means_over_sequences_or_over_tokens(distill_config, tmp_path, monkeypatch):
    """Deviation 6. The same first update, logged both ways: sums over 8 answers, or over their tokens."""
    logged = {}
    for kind in ("sequence", "token"):
        distill.distil(distill_config(normalize=kind, steps=1, out=str(tmp_path / kind), pt_coef=1.0))
        logged[kind] = lines(tmp_path / kind / "minillm")[1]
    by_sequence, by_token = logged["sequence"], logged["token"]
    tokens = by_sequence["response_tokens"]
    for name, per_answer in (("loss_single", tokens), ("loss_long", tokens), ("loss_pt", 43)):  # 43 of 44 are predicted
        assert by_sequence[name] == pytest.approx(by_token[name] * per_answer, rel=1e-4)
    assert by_sequence["reverse_kl"] == pytest.approx(by_token["reverse_kl"], rel=1e-4)  # in nats an answer, either way


def test_half_of_the_plain_text_loss_is_kd(distill_config, tmp_path):
    """Deviation 10: 0.5 CE + 0.5 KL[p || q] on plain text, against the two of them alone."""
    loss = {}
    for share in (0.0, 0.5, 1.0):
        distill.distil(distill_config(pt_kd=share, steps=1, out=str(tmp_path / str(share)), pt_coef=1.0))
        loss[share] = lines(tmp_path / str(share) / "minillm")[1]["loss_pt"]
    assert loss[0.5] == pytest.approx((loss[0.0] + loss[1.0]) / 2, rel=1e-5) and loss[1.0] < loss[0.0]


def test_whitening_over_responses_has_mean_0_and_variance_1():
    white = whiten(rand(3, 5) * MASK, MASK, "responses")[MASK]
    assert white.mean().item() == pytest.approx(0, abs=1e-12)
    assert white.var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert whiten(rand(3, 5), MASK, "none").equal(rand(3, 5))


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
    assert make(Config, {"single_step": False}, distill.presets).return_from == "current"
    assert make(Config, {"single_step": False, "return_from": "next"}, distill.presets).return_from == "next"


def test_settings_that_cannot_work():
    refused(lambda: Config(rollouts=100), "--rollouts=100 is not a multiple of --minibatch=64")
    refused(lambda: Config(max_tokens=16), "--max_prompt_tokens=16", "--max_tokens=16")
    refused(lambda: Config(single_step=False, long_term=False, pt_coef=0.0), "nothing to learn from")
    for names in ("sft,dpo", "sft,sft"):
        refused(lambda names=names: Config(baselines=names), f"--baselines={names}", "once each")
    refused(lambda: Config(steps=20, warmup_steps=20), "--warmup_steps=20", "--steps=20")
    refused(lambda: Config(mix_alpha=1.5), "--mix_alpha=1.5 is out of range")
    of = lambda **given: lambda: make(Config, given, distill.presets)
    refused(of(source="teacher", mix_alpha=0.3), "--source=teacher and --mix_alpha=0.3 contradict")
    refused(of(capture=True, turns=4), "--capture", "--turns=4", "give --turns=0")
    refused(of(source="gold", weight="per_token"), "--source=gold", "--weight=per_token")
    refused(of(source="gold", long_term=True), "--source=gold", "--long_term=True")
    refused(of(divergence="js", long_term=True), "--divergence=js has no long term")
    for role, choice in (("teacher", "finetune_teacher"), ("student", "init_student")):
        cfg = make(Config, {role: "1x2x8", choice: "no"}, distill.presets)
        refused(lambda cfg=cfg: distill.stages(cfg), f"--{role}=1x2x8 is new", f"--{choice}")
    itself = make(Config, dict(teacher="out/x/teacher", finetune_teacher="yes", out="out/x"), distill.presets)
    refused(lambda: distill.stages(itself), "--model=out/x/teacher would be overwritten by its own result")
    refused(lambda: Config(clip_eps=-1.0), "--clip_eps=-1.0 is out of range")


def test_which_models_are_raw():
    raw = {name: distill.is_raw(name, "auto") for name in ("gpt2-xl", "openai-community/gpt2", "4x4x128", "models/gpt2",
                                                           "MiniLLM/teacher-gpt2-1.5B", "out/x/teacher")}
    assert list(raw.values()) == [True, True, True, True, False, False]
    assert distill.is_raw("out/x", "yes") and not distill.is_raw("gpt2", "no")


# ---- Algorithm 1 ----------------------------------------------------------------------------------------------------

def test_an_inner_epoch_takes_each_answer_once_and_each_column_once_a_minibatch():
    batches = minibatches(24, 6, (1, 2, 3))
    assert sorted(i for batch in batches for i in batch) == list(range(24)) and len(batches) == 4
    assert all(sorted(i % 6 for i in batch) == list(range(6)) for batch in batches)
    assert batches == minibatches(24, 6, (1, 2, 3)) != minibatches(24, 6, (1, 2, 4))


def test_scores_are_those_of_sampling_and_the_teachers_layers_stay_idle(m):
    """log q recomputed equals log q sampled, the KL that of whole passes; no layer of the teacher runs."""
    student, teacher = random_gpt(1), random_gpt(2, n_embd=4)
    prompts = [[1, 2, 3], [4], [5, 6]]
    rollout = sample(student, prompts, uniforms(0, range(3), 10), m, teacher, 0.2, keep_hidden=True)
    rollout.reverse_kl = follow(student, prompts, rollout.answers, 10, m, teacher).reverse_kl
    teacher.forward = None
    mask = rollout.response_mask[[2, 0]]
    for chunk in (3, 1000):
        again = score(student, teacher, rollout, [2, 0], torch.zeros(3, 10), Config(),
                      dataclasses.replace(m, vocab_chunk=chunk))
        for name in ("student_logp", "reverse_kl"):
            torch.testing.assert_close(again[name], getattr(rollout, name)[[2, 0]][mask], atol=1e-5, rtol=0)
        assert again["gap"].max() < 1e-5


@pytest.mark.parametrize("weight", ["per_token", "product", "exact", "none"])
@pytest.mark.parametrize("kind", ["reverse", "js"])
def test_the_gradient_is_that_of_eq_7_over_whole_answers(weight, kind, m):
    """In float64, against whole (b, T, V) tensors taken backward at the end; whatever the chunk."""
    student, teacher = random_gpt(1), random_gpt(2)
    prompts, rows = [[1, 2, 3], [4], [5, 6], [7]], [3, 0, 2]
    rollout = sample(student, prompts, uniforms(0, range(4), 9), m, teacher, 0.4, keep_hidden=True)
    student, teacher = student.double(), teacher.double()
    for name in ("student_logp", "mixed_logp", "teacher_hidden"):
        setattr(rollout, name, getattr(rollout, name).double())
    R, other = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    rollout.student_logp += 0.5 * other * rollout.response_mask  # drawn by another student: some ratios are clipped
    mask = rollout.response_mask[rows]
    cfg = Config(weight=weight, divergence=kind, long_term=kind == "reverse", clip_eps=0.3)
    log_q, log_p = (torch.zeros(3, 9, 11, dtype=torch.float64) for _ in range(2))
    for n, row in enumerate(rows):
        tokens, at = torch.tensor([prompts[row] + rollout.answers[row]]), len(prompts[row]) - 1
        for where, model in ((log_q, student), (log_p, teacher)):
            where[n, : tokens.size(1) - at - 1] = model.logits(model(tokens)).log_softmax(-1)[0, at:-1]
    logp = log_q.gather(-1, rollout.response[rows][..., None]).squeeze(-1)
    single, long, _, clipped = minillm_loss(logp, divergence(log_q, log_p.detach(), kind), rollout.student_logp[rows],
                                            rollout.mixed_logp[rows], R[rows], mask, weight, True, 0.3)
    loss = single + cfg.long_term * long
    (loss.sum() / 5).backward()
    want = [p.grad for p in student.parameters()]
    assert mask.sum() > 12 and (not cfg.long_term or 0 < clipped.sum() < mask.sum())
    for chunk in (2, 1000):
        student.zero_grad()
        got = score(student, teacher, rollout, rows, R, cfg, dataclasses.replace(m, vocab_chunk=chunk),
                    lambda loss: (loss / 5).backward())
        torch.testing.assert_close(got["loss"], loss[mask], atol=1e-6, rtol=0)
        torch.testing.assert_close(got["gap"], (logp - rollout.student_logp[rows]).abs()[mask], atol=1e-6, rtol=0)
        assert got["clipped"].equal(clipped[mask])
        for one, p in zip(want, student.parameters(), strict=True):
            torch.testing.assert_close(p.grad, one, atol=1e-6, rtol=0)  # the teacher's states were kept in float32


@pytest.mark.parametrize("kind", ["reverse", "forward", "js", "skew"])
def test_divergences_against_sums_over_the_vocabulary(kind):
    q, p = torch.rand(2, 5, 7, dtype=torch.float64).softmax(-1)
    got = divergence(q.log(), p.log(), kind)
    kl = lambda a, b: sum(a[v] * math.log(a[v] / b[v]) for v in range(7)).item()
    for row in range(5):
        a, b = q[row], p[row]
        want = {"reverse": kl(a, b), "forward": kl(b, a), "skew": kl(b, 0.1 * b + 0.9 * a),
                "js": (kl(a, (a + b) / 2) + kl(b, (a + b) / 2)) / 2}[kind]
        assert got[row].item() == pytest.approx(want, abs=1e-12)
    assert divergence(q.log(), q.log(), kind).abs().max() < 1e-12


def test_a_rollout_of_given_answers_is_that_of_drawing_them(m):
    student, teacher = random_gpt(1, eos_token_id=2), random_gpt(2, n_embd=4)
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    drawn = sample(student, prompts, uniforms(0, range(4), 10), m, teacher, 0.0, keep_hidden=True)
    assert not drawn.ended.all() and drawn.ended.any()
    # an answer that ran out of length is one whose reference is longer
    answers = [answer + [1] * (not ended) for answer, ended in zip(drawn.answers, drawn.ended)]
    for batch_size in (1, 3):
        given = follow(student, prompts, answers, 10, m, teacher, batch_size, keep_hidden=True)
        assert given.answers == drawn.answers and given.ended.equal(drawn.ended)
        for name in ("student_logp", "mixed_logp", "teacher_logp"):
            torch.testing.assert_close(getattr(given, name), getattr(drawn, name), atol=1e-5, rtol=0)
        mask, kl = drawn.response_mask, torch.zeros_like(drawn.student_logp)
        kl[mask] = score(student, teacher, drawn, [0, 1, 2, 3], kl, Config(), m)["reverse_kl"].detach()
        torch.testing.assert_close(given.reverse_kl, kl, atol=1e-5, rtol=0)
        torch.testing.assert_close(given.teacher_hidden[mask], drawn.teacher_hidden[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pt_kd", [0.0, 0.5])
def test_plain_text_adds_its_gradient_with_its_factor(pt_kd, m):
    """L_PT, pt_coef times, over the tokens of the whole batch: towards the text, not away from it."""
    student, teacher = random_gpt(1), random_gpt(2)
    pieces = [Example(Row(""), row[:1], row[1:]) for row in ([1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3])]
    _, loss = supervised.answer_loss(student, pieces, m, teacher if pt_kd else None, pt_kd)
    (0.3 * loss / 9).backward()
    want = [p.grad for p in student.parameters()]
    student.zero_grad()
    sums, _ = distill.accumulate(2, student, teacher, None, [], None, pieces, 1, 9, Config(pt_coef=0.3, pt_kd=pt_kd), m,
                                 torch.amp.GradScaler("cpu", enabled=False))
    assert sums["loss_pt"].item() == pytest.approx(loss.item(), rel=1e-5)
    for one, p in zip(want, student.parameters(), strict=True):
        torch.testing.assert_close(p.grad, one, atol=1e-6, rtol=1e-4)


def test_an_answer_that_fills_all_positions_is_scored(m):
    """The last token of prompt and answer is drawn, and never read: it needs no position."""
    student, teacher = (random_gpt(seed, eos_token_id=-1) for seed in (1, 2))  # 32 positions
    drawn = sample(student, [[1] * 30, [2] * 4], uniforms(0, range(2), 3), m, teacher)
    given = follow(student, drawn.prompts, drawn.answers, 3, m, teacher)
    for name in ("student_logp", "teacher_logp"):
        torch.testing.assert_close(getattr(given, name), getattr(drawn, name), atol=1e-5, rtol=0)
    assert given.answers == drawn.answers and not given.ended.any()


def test_forward_kl_on_references_is_word_level_kd(m):
    """--source=gold --divergence=forward, and teacher.py's loss with --kd_ratio=1; reverse_kl is known too."""
    student, teacher = random_gpt(1), random_gpt(2)
    examples = [Example(Row(""), [1, 2], [3, 4, 10]), Example(Row(""), [5], [6, 10])]
    rollout = follow(student, [e.prompt for e in examples], [e.response for e in examples], 5, m, teacher, 2, True)
    cfg = Config(source="gold", divergence="forward", long_term=False, weight="none")
    of_token = score(student, teacher, rollout, [0, 1], torch.zeros(2, 5), cfg, m)
    _, want = supervised.answer_loss(student, examples, m, teacher, kd_ratio=1.0)
    assert of_token["loss"].sum().item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(of_token["reverse_kl"], rollout.reverse_kl[rollout.response_mask], atol=1e-5, rtol=0)


def test_three_updates_log_every_metric_and_leave_a_model(distill_config, tmp_path):
    results = distill.distil(distill_config(steps=3))
    out = tmp_path / "run" / "minillm"
    log = lines(out)
    assert [line["step"] for line in log] == [0, 1, 2, 3, 3] and "valid" in log[0] and "valid" in log[-1]
    for line in log[1:4]:
        assert set(line) == {
            "step", "loss_single", "loss_long", "loss_pt", "reverse_kl", "reward", "weight_mean", "weight_max",
            "clip_fraction", "response_tokens", "ended_fraction", "logp_gap", "grad_norm", "lr", "sample_seconds",
            "update_seconds"}
        assert line["reverse_kl"] > 0 and line["weight_max"] <= 1.25 * 1.2 and 0 <= line["clip_fraction"] <= 1
    assert log[1]["logp_gap"] < 1e-5 and log[2]["logp_gap"] is None
    assert log[1]["weight_mean"] == pytest.approx(1, abs=0.2)
    assert log[1]["weight_max"] < 1.2501  # q / (0.2 p + 0.8 q), until the student has moved
    assert results["best"]["step"] == 3 and json.loads((out / "run.json").read_text())["steps"] == 3
    assert len((out / "samples.jsonl").read_text().splitlines()) == 6 and not (out / "state.pt").exists()


BASE = dict(steps=5, pt_coef=0.5)


@pytest.fixture(scope="module")
def after(tmp_path_factory, tiny_models, few_rows):
    """A function: the weights after a few updates with these settings, over more than one collection of answers."""
    done = {}

    def run(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in done:
            out = tmp_path_factory.mktemp("after")
            distill.distil(make(Config, dict(
                preset="tiny", **tiny_models, out=str(out), baselines="", rollouts=16, minibatch=8, inner_epochs=2,
                valid_limit=2, eval_every=1000, warmup_steps=1) | BASE | settings, distill.presets))
            done[key] = torch.cat([tensor.flatten() for tensor in weights(out / "minillm").values()])
        return done[key]
    return run


@pytest.mark.parametrize("settings", [
    dict(single_step=False, return_from="next"), dict(single_step=False), dict(long_term=False), dict(mix_alpha=0.0),
    dict(mix_alpha=0.6), dict(weight="none"), dict(weight="product"), dict(weight="exact"), dict(weight_single=False),
    dict(length_norm=False), dict(return_from="current"), dict(gamma=0.5), dict(whiten="responses"),
    dict(whiten="all"), dict(reward_scale=2.0), dict(reward_clip=0.5), dict(clip_eps=0.01), dict(inner_epochs=1),
    dict(pt_coef=0.0), dict(pt_coef=1.0), dict(pt_kd=0.5), dict(normalize="sequence"), dict(lr=1e-3),
    dict(warmup_steps=4), dict(grad_clip=1e-3), dict(weight_decay=1.0), dict(seed=2), dict(recipe="official"),
    dict(source="student"), dict(source="teacher"), dict(source="gold"), dict(divergence="forward"), dict(turns=2),
    dict(divergence="js"), dict(divergence="skew"),
], ids=lambda settings: next(f"{name}={value}" for name, value in settings.items()))
def test_each_flag_acts(settings, after):
    assert (after(**settings) - after()).abs().max() > 1e-5


def test_a_source_alone_is_a_mixture_of_one(after):
    assert after(source="student").equal(after(mix_alpha=0.0))
    assert after(source="teacher").equal(after(mix_alpha=1.0))
    for name in ("student", "teacher"):  # and then it is always its turn
        torch.testing.assert_close(after(source=name, turns=2), after(source=name), atol=2e-3, rtol=0)


@pytest.mark.parametrize("settings", [dict(micro_batch=3), dict(sample_batch=5), dict(vocab_chunk=7)],
                         ids=["micro_batch", "sample_batch", "vocab_chunk"])
def test_what_changes_memory_changes_nothing_else(settings, after):
    torch.testing.assert_close(after(**settings), after(), atol=2e-3, rtol=0)  # rounding, through AdamW's signs


def test_flags_of_speed_reach_what_they_set(distill_config, tiny_models, monkeypatch):
    seen = []
    monkeypatch.setattr(distill, "trained", lambda model, *settings: seen.append(settings) or model)
    distill.distil(distill_config(steps=1, recompute=True))
    assert seen == [(True, False)]
    refused(lambda: distill.distil(distill_config(steps=1, capture=True)), "--capture")
    one = dict(model=tiny_models["student"], device="cpu", capture=True)
    refused(lambda: distill.sampling.main(SampleConfig(**one, prompt="Tell about the cat")), "--capture")
    refused(lambda: distill.evaluation.main(distill.evaluation.Config(**one)), "--capture")


def test_splitting_a_minibatch_changes_no_loss(distill_config, tmp_path):
    """Against per-micro-batch means, which weigh short answers more."""
    first = {}
    for size in (1, 3, 64):
        distill.distil(distill_config(micro_batch=size, steps=1, out=str(tmp_path / str(size))))
        first[size] = lines(tmp_path / str(size) / "minillm")[1]
    for size in (1, 3):
        for name in ("loss_single", "loss_long", "loss_pt", "grad_norm", "reverse_kl", "weight_mean"):
            assert first[size][name] == pytest.approx(first[64][name], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bits(dtype, distill_config, tmp_path, monkeypatch):
    whole = str(tmp_path / "whole")
    distill.distil(distill_config(steps=12, dtype=dtype, out=whole))
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        distill.distil(distill_config(steps=12, dtype=dtype))
    monkeypatch.undo()
    refused(lambda: distill.distil(distill_config(steps=12, dtype=dtype)), "unfinished", "--resume")
    distill.distil(distill_config(steps=12, dtype=dtype, resume=True))
    for name, tensor in weights(tmp_path / "whole" / "minillm").items():
        assert torch.equal(tensor, weights(tmp_path / "run" / "minillm")[name])
    quiet = lambda line: {name: value for name, value in line.items() if not name.endswith("seconds")}
    logs = [[quiet(line) for line in lines(tmp_path / name / "minillm")] for name in ("run", "whole")]
    assert logs[0] == logs[1]


def test_a_run_killed_beside_its_checkpoint_logs_each_line_once(distill_config, tmp_path, monkeypatch):
    """Behind the very last checkpoint; and between the first validation and the first checkpoint."""
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        distill.distil(distill_config())
    monkeypatch.undo()
    distill.distil(distill_config(resume=True))
    assert [line["step"] for line in lines(tmp_path / "run" / "minillm")] == [0, 1, 2, 3, 4, 4]
    monkeypatch.setattr(supervised, "save_state", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distill.distil(distill_config(out=str(tmp_path / "early")))
    monkeypatch.undo()
    distill.distil(distill_config(out=str(tmp_path / "early"), resume=True))
    assert [line["step"] for line in lines(tmp_path / "early" / "minillm")] == [0, 1, 2, 3, 4, 4]


def test_a_loss_that_is_no_number_is_named(distill_config, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "single_step_loss", lambda kl, weight: kl * float("nan"))
    refused(lambda: distill.distil(distill_config()), "stopped at update 1", "loss_single is nan")
    monkeypatch.undo()
    monkeypatch.setattr(supervised, "answer_loss", lambda *a: (torch.zeros(()), torch.tensor(math.inf)))
    refused(lambda: distill.distil(distill_config(out=str(tmp_path / "b"))), "stopped at update 1", "loss_pt is inf")
    monkeypatch.undo()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: torch.tensor(math.inf))
    refused(lambda: distill.distil(distill_config(out=str(tmp_path / "c"))), "c/minillm: stopped at update 1",
            "the gradient's norm is inf")


def test_reverse_kl_falls(distill_config, tmp_path):
    distill.distil(distill_config(steps=60, lr=1e-2, rollouts=64, minibatch=32, pt_coef=0.0, eval_every=60,
                                  valid_limit=100))
    before, after = (line["valid"]["reverse_kl"] for line in lines(tmp_path / "run" / "minillm") if "valid" in line)
    assert after < 0.8 * before


def flags(out: Path, tiny_models: dict, **settings) -> list[str]:
    small = dict(preset="tiny", **tiny_models, out=out, baselines="", steps=4, rollouts=12, minibatch=6, inner_epochs=2,
                 valid_limit=1, eval_seeds=1, warmup_steps=1, ignore_memory=True, device="cpu", sample_batch=16)
    return [f"--{name}={value}" for name, value in (small | settings).items()]


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


@pytest.mark.parametrize("turns", [0, 3])
def test_several_processes_do_what_one_does(turns, tiny_models, tmp_path, capfd):
    """The same global batch over gloo, in one, two and four processes, accumulated one, two and more times."""
    fork = multiprocessing.get_context("fork")
    for count, micro_batch in ((1, 64), (2, 2), (4, 1)):
        argv = flags(tmp_path / str(count), tiny_models, micro_batch=micro_batch, turns=turns)
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
    (tmp_path / "text.txt").write_text(f"\n{data.END}\n".join(world.text()))
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
        monkeypatch.setattr(distill, name, getattr(distill, name) | dict(updates=4, evals=1))
    settings = dict(teacher="1x2x12", student="1x2x8", baselines="sft,kd,seqkd", steps=2, max_tokens=24)
    rows = distill.main(distill_config(**settings))
    printed = capsys.readouterr().out
    assert [row["method"] for row in rows] == ["teacher", "init", "sft", "kd", "seqkd", "minillm"]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == rows
    for row in rows:
        assert {"valid", "distinct", "reverse_kl", "forward_kl", "loss", "rouge_l", "std"} <= set(row)
    assert rows[0]["reverse_kl"] == 0 and all(row["reverse_kl"] > 0 for row in rows[1:])
    assert printed.index("plan: 1x2x12 teaches 1x2x8 tiny") < printed.index("run/teacher: 1x2x12")
    assert distill.main(distill_config(**settings)) == rows
    again = capsys.readouterr().out
    assert again.count("finished earlier, kept") == 6 and again.count("made earlier, kept") == 6
    shutil.rmtree(tmp_path / "run" / "seqkd")  # other flags are told before it is trained anew
    refused(lambda: distill.main(distill_config(**settings, gamma=0.5)), "minillm was made with --gamma=1.0")
    assert not (tmp_path / "run" / "seqkd").exists() and "plan:" not in capsys.readouterr().out
    assert "everything is done already" in again
    refused(lambda: distill.main(distill_config(**settings | dict(steps=3))), "--updates=2, now it is 3")


def test_the_plan_alone_does_nothing(distill_config, tmp_path, capsys):
    assert distill.main(distill_config(plan=True, teacher="1x2x12", student="1x2x8")) == []
    printed = capsys.readouterr().out
    assert all(f"  {stage} " in printed for stage in ("teacher", "init", "minillm", "evaluate")) and "GiB" in printed
    assert "answers from the mixture" in printed and not [*tmp_path.glob("run*")]  # nor a lock
    distill.main(distill_config(plan=True, source="student", mix_alpha=0.0))
    assert "answers from the student" in capsys.readouterr().out


def test_too_little_memory_is_told_before_anything_is_loaded(distill_config, tmp_path, monkeypatch):
    import plan
    monkeypatch.setattr(plan, "free_memory", lambda m: 1000)
    monkeypatch.setattr(distill, "load", None)
    refused(lambda: distill.main(distill_config()), "minillm needs about", "0.0 are free", "--micro_batch")
    assert not (tmp_path / "run").exists()


def test_phase_2_alone_takes_finished_models_as_they_are(tmp_path):
    cfg = make(Config, dict(teacher="MiniLLM/teacher-gpt2-1.5B", student="MiniLLM/init-gpt2-120M"), distill.presets)
    assert distill.stages(cfg) == ([], cfg)
    work, resolved = distill.stages(make(Config, dict(teacher="gpt2-xl", baselines="kd"), distill.presets))
    assert [(name, s.model, s.select, s.epochs) for name, _, s in work] == [
        ("teacher", "gpt2-xl", "rouge_l", None), ("init", "gpt2", "loss", 3), ("kd", "gpt2", "rouge_l", None)]
    assert work[2][2].teacher == resolved.teacher == "out/gpt2-xl-to-gpt2/teacher"
    assert resolved.student == "out/gpt2-xl-to-gpt2/init"


def test_float16_scales_its_loss(distill_config, monkeypatch):
    """Where bfloat16 is missing: the scaler is on, and off for other types; the plan and both loops run with it."""
    gpt = random_gpt()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        m = Machine(torch.device("cpu"), dtype)
        optimizer, scaler = supervised.optimizer_of(gpt, m, (0.9, 0.95), 0.0)
        assert scaler.is_enabled() == (dtype == torch.float16)
        assert supervised.apply_update(gpt, optimizer, scaler, m, 0.1, 1.0) == 0.0  # as without a row of the batch
    small = dict(dtype="float16", student="1x2x8", steps=2, max_tokens=24)
    monkeypatch.setattr(distill, "TINY_INIT", distill.TINY_INIT | dict(updates=2, evals=1))
    assert all(math.isfinite(row["loss"]) for row in distill.main(distill_config(**small)))


def test_every_stage_hears_of_what_saves_memory(tmp_path):
    settings = dict(teacher="gpt2-xl", micro_batch=1, sample_batch=3, baselines="sft,kd,seqkd")
    cfg = make(Config, settings, distill.presets)
    for name, _, settings in distill.stages(cfg)[0]:
        assert name == "answers" or (settings.micro_batch, settings.sample_batch) == (1, 3)
        assert name != "answers" or settings.batch_size == 3


def test_answers_of_another_teacher_are_not_taken(tmp_path, tiny_models):
    settings = dict(data="tiny", split="train", limit=5, max_response_tokens=4, out=str(tmp_path / "a.jsonl"))
    distill.answer_once(SampleConfig(model=tiny_models["teacher"], **settings))
    written = (tmp_path / "a.jsonl").stat().st_mtime_ns
    distill.answer_once(SampleConfig(model=tiny_models["teacher"], batch_size=2, **settings))
    assert (tmp_path / "a.jsonl").stat().st_mtime_ns == written
    other = SampleConfig(model=tiny_models["student"], **settings)
    refused(lambda: distill.answer_once(other), "a.jsonl was made with another teacher")


def test_a_users_file_is_not_tested_on_what_was_trained_on(tmp_path, distill_config):
    cfg = distill_config(data="mine.jsonl")
    assert cfg.test_split == ("mine.jsonl", "valid") and distill_config().test_split == ("tiny", "test")
    assert distill_config(data="mine.jsonl", test_data="other.jsonl").test_split == ("other.jsonl", "test")


def test_explain_shows_the_numbers_of_the_first_update(distill_config, capsys, tmp_path):
    """Each column from those before it, by the equation over it; and the KL of the first answer as the run logs it."""
    cfg = distill_config(explain=True, rollouts=8, minibatch=1, inner_epochs=1, steps=1)
    assert distill.main(cfg) == [] and not (tmp_path / "run" / "minillm").exists()
    found = [re.findall(r"-?\d+\.\d{4}", line) for line in capsys.readouterr().out.splitlines()]
    *rows, sums = [list(map(float, line)) for line in found if len(line) >= 7]
    log_q, log_p, log_mixed, r, kl, R, w, single, long = map(list, zip(*rows))
    for t in range(len(rows)):
        assert r[t] == pytest.approx(log_p[t] - log_q[t], abs=2e-4)
        assert R[t] == pytest.approx(sum(r[t + 1 :]) / max(1, len(r) - t - 1), abs=2e-4)
        assert w[t] == pytest.approx(math.exp(log_q[t] - log_mixed[t]), abs=2e-4)
        assert math.exp(log_mixed[t]) == pytest.approx(0.2 * math.exp(log_p[t]) + 0.8 * math.exp(log_q[t]), abs=2e-4)
        assert single[t] == pytest.approx(w[t] * kl[t], abs=1e-3)
        assert long[t] == pytest.approx(-min(w[t] * R[t], min(max(w[t], 0.8), 1.2) * R[t]), abs=1e-3)
    assert sums[3:5] == pytest.approx([sum(r), sum(kl)], abs=1e-2) and len(sums) == 7
    distill.main(dataclasses.replace(cfg, explain=False))
    assert lines(tmp_path / "run" / "minillm")[1]["reverse_kl"] == pytest.approx(sums[4], abs=1e-3)


def test_explain_says_what_its_settings_make_of_a_column():
    said = lambda **settings: {head: " ".join(of) for head, of in distill.columns(
        make(Config, settings, distill.presets)).items()}
    assert said()["R_t+1"] == "(6) the mean of the r that follow" and said()["L_Single"] == "(7) w_t KL"
    official = said(recipe="official")
    assert official["r_t"] == "(2) log p - log q, times 2, clipped at 100" and official["L_Single"] == "(7) KL"
    assert official["R_t"] == "(6) the mean of r_t and the r that follow, discounted by 0.95, whitened"
    assert "the sum of" in said(length_norm=False)["R_t+1"] and "off" in said(long_term=False)["L_Long"]
    assert "js divergence" in said(divergence="js")["L_Single"] and said()["log p~"].startswith("(4) the mixture's")
    assert said(source="gold")["log p~"] == " the student's as of then: this answer is a reference"
    assert said(source="teacher")["log p~"] == " the teacher's alone, from which it was drawn"


PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1, 2]]


# ---- numbers at the edge --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ends", ["at once", "never"])
def test_answers_that_all_end_at_once_or_never(ends, dtype, distill_config, tiny_models, tmp_path):
    """One token each, so that nothing comes after it; or as many as there is room for, none of them ended."""
    student = load(tiny_models["student"])
    student.ln_f.weight.data.zero_()
    student.ln_f.bias.data.fill_(1.0)  # logits are the sums of the embedding's rows
    student.wte.weight.data[-1] = 5.0 if ends == "at once" else -5.0
    save(student, tmp_path / "student")
    data.save_tokenizer(data.world_tokenizer(), tmp_path / "student")
    distill.distil(distill_config(student=str(tmp_path / "student"), dtype=dtype, steps=2, rollouts=8, minibatch=8,
                                  mix_alpha=0.0, lr=0.0))
    for line in lines(tmp_path / "run" / "minillm")[1:3]:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert line["response_tokens"] == (1.0 if ends == "at once" else 28.0)
        assert line["ended_fraction"] == (1.0 if ends == "at once" else 0.0)
        assert (line["loss_long"] == 0.0) == (ends == "at once")


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_a_teacher_whose_probabilities_underflow(scale, m):
    """p(y) of e^-300 and less is 0 in float32; its logarithm is not: equal to a computation in float64."""
    student, teacher = random_gpt(1), random_gpt(2)
    teacher.ln_f.weight.data *= scale
    rollout = sample(student, PROMPTS, uniforms(0, range(len(PROMPTS)), 8), m, teacher, keep_hidden=True, batch_size=9)
    assert rollout.teacher_logp.min() < -300
    rows = list(range(len(PROMPTS)))
    kl = distill.score(student, teacher, rollout, rows, torch.zeros(len(rows), 8), Config(), m)["reverse_kl"]
    kl = torch.zeros(len(rows), 8).masked_scatter(rollout.response_mask, kl)
    for row in rows:
        prompt, answer = PROMPTS[row], rollout.answers[row]
        tokens = torch.tensor([prompt + answer])
        with torch.no_grad():
            hidden = [gpt(tokens)[0, len(prompt) - 1 : -1].double() for gpt in (student, teacher)]
        log_q, log_p = ((h @ gpt.wte.weight.double().t()).log_softmax(-1)
                        for h, gpt in zip(hidden, (student, teacher)))
        want = (log_q.exp() * (log_q - log_p)).sum(-1)
        torch.testing.assert_close(kl[row, : len(answer)].double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("temperature", [1e-4, 1e-3])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature, m):
    student = random_gpt(3)
    rollout = sample(student, PROMPTS, uniforms(0, range(len(PROMPTS)), 6), m, temperature=temperature)
    for prompt, answer in zip(PROMPTS, rollout.answers):
        with torch.no_grad():
            logits = student.logits(student(torch.tensor([prompt + answer])))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer
    assert rollout.mixed_logp.isfinite().all()
