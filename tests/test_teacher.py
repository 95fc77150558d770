"""The supervised loop: the loss on the right tokens, one normaliser however the batch is split, exact resuming."""

import dataclasses
import json
import math
import os
import re
import shutil

import pytest
import torch
from conftest import random_gpt, refused, weights
from torch._dynamo.utils import counters

import teacher as supervised
from config import make
from data import Example, Row
from model import GPTConfig, load, save
from teacher import answer_loss, keep_best, schedule

pytestmark = pytest.mark.usefixtures("few_rows")


@pytest.fixture
def config(tiny_models, tmp_path):
    def make_config(**settings):
        small = dict(model=tiny_models["student"], data="tiny", out=str(tmp_path / "run"), updates=6, evals=3, lr=1e-2,
                     batch_size=6, valid_limit=5, max_prompt_tokens=16, max_tokens=44, dtype="float32", device="cpu")
        return make(supervised.Config, small | settings, supervised.presets)
    return make_config


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ---- the loss -------------------------------------------------------------------------------------------------------

def test_the_gradient_is_that_of_the_mean_over_tokens(config, m):
    """Not over samples: AdamW would hide the factor, and clipping would not."""
    gpt, scaler = random_gpt(1).double(), torch.amp.GradScaler("cpu", enabled=False)
    batch = [Example(Row("a"), [1, 2, 3], [4, 10]), Example(Row("b"), [5], [6, 7, 8, 10])]
    supervised.accumulate(1, batch, 6, 0, gpt, None, config(), m, scaler)
    got = [p.grad for p in gpt.parameters()]
    gpt.zero_grad()
    (answer_loss(gpt, batch, m)[1] / 6).backward()
    for one, p in zip(got, gpt.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_the_answer_and_its_end(kd_ratio, m):
    """Against a loop over tokens. The prompt is not in the loss; the end token is."""
    student, teacher = random_gpt(1), random_gpt(2)
    batch = [Example(Row("a"), [1, 2, 3], [4, 10]), Example(Row("b"), [5], [6, 7, 8, 10])]
    gold = kl = 0.0
    for e in batch:
        for t, token in enumerate(e.response):
            context = torch.tensor([e.prompt + e.response[:t]])
            log_q, log_p = (g.logits(g(context))[0, -1].log_softmax(-1).detach() for g in (student, teacher))
            gold -= log_q[token].item()
            kl += sum((log_p[v].exp() * (log_p[v] - log_q[v])).item() for v in range(11))
    for chunk in (2, 100):
        machine = dataclasses.replace(m, vocab_chunk=chunk)
        got_gold, got = answer_loss(student, batch, machine, teacher, kd_ratio)
        assert got_gold.item() == pytest.approx(gold, abs=1e-4)
        assert got.item() == pytest.approx((1 - kd_ratio) * gold + kd_ratio * kl, abs=1e-4)
        student.zero_grad()
        (got / 3).backward()
        want = [p.grad.clone() for p in student.parameters()]
        student.zero_grad()
        sums = answer_loss(student, batch, machine, teacher, kd_ratio, lambda loss: (loss / 3).backward())
        torch.testing.assert_close(sums, (got_gold, got.detach()))
        for p, whole in zip(student.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, whole, atol=1e-5, rtol=0)
    assert answer_loss(student, batch, m)[1].item() == pytest.approx(gold, abs=1e-4)


no_compiler = not any(map(shutil.which, ("c++", "g++", "clang++")))
FASTER_OR_SMALLER = [dict(micro_batch=1), dict(micro_batch=4), dict(recompute=True),
                     pytest.param(dict(compile=True, recompute=True),
                                  marks=pytest.mark.skipif(no_compiler, reason="no C++ compiler"))]


@pytest.mark.parametrize("settings", FASTER_OR_SMALLER, ids=str)
def test_how_a_batch_is_computed_changes_nothing(config, tmp_path, settings):
    """A mean of means over micro-batches would weigh short answers more."""
    counters.clear()
    for name, how in (("plain", {}), ("other", settings)):
        supervised.main(config(out=str(tmp_path / name), updates=2, evals=1, **how))
    if settings.get("compile"):
        assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    for other, plain in zip(lines(tmp_path / "other"), lines(tmp_path / "plain"), strict=True):
        assert other["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


# ---- the recipe -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, lr, epochs", [
    ((12, 12, 768), 5e-4, 20), ((24, 16, 1024), 1e-4, 20), ((36, 20, 1280), 1e-4, 10), ((48, 25, 1600), 5e-5, 10)])
def test_the_recipe_goes_by_size(shape, lr, epochs):
    cfg = supervised.Config()
    assert schedule(cfg, GPTConfig(*shape), 11_435) == (-(-epochs * 11_435 // 32), epochs, lr)
    cfg = supervised.Config(epochs=3, lr=1e-3, select="loss")
    assert schedule(cfg, GPTConfig(*shape), 3200) == (300, 3, 1e-3)


def test_the_learning_rate_follows_a_cosine(config, tmp_path):
    supervised.main(config(lr=1.0, lr_end=0.0, updates=4))
    assert [line["lr"] for line in lines(tmp_path / "run")] == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-5)


def test_the_best_validation_is_kept(tmp_path, m, tiny_models):
    from data import world_tokenizer
    gpt, kept = random_gpt(), []
    for select, values, best in (("loss", [3, 1, 2], 1), ("rouge_l", [3, 1, 4, 4], 4), ("last", [3, 1, 2], 2)):
        state = None
        for step, value in enumerate(values):
            gpt.wpe.weight.data[:] = step
            state = keep_best(gpt, world_tokenizer(), tmp_path, m, select, {select: value, "step": step}, state)
        kept.append(weights(tmp_path)["transformer.wpe.weight"][0, 0].item())
        assert state[select] == best
    assert kept == [1, 2, 2]  # of two equal ones the first


def test_training_learns(config, tmp_path):
    supervised.main(config(updates=60, evals=1, lr=2e-2, batch_size=32, micro_batch=32))
    loss = [line["loss"] for line in lines(tmp_path / "run")]
    assert sum(loss[-5:]) < 0.6 * sum(loss[:5])


# ---- a run's files --------------------------------------------------------------------------------------------------

def interrupt_after(monkeypatch, saves: int):
    """Makes the run end, as if killed, behind its n-th checkpoint."""
    save_state, count = supervised.save_state, [0]

    def save_then_die(*args):
        save_state(*args)
        count[0] += 1
        if count[0] == saves:
            raise KeyboardInterrupt
    monkeypatch.setattr(supervised, "save_state", save_then_die)


def test_a_resumed_run_ends_with_the_same_bits(config, tmp_path, monkeypatch):
    """With dropout, whose draws have to go on too."""
    supervised.main(config(out=str(tmp_path / "whole"), dropout=0.2))
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        supervised.main(config(dropout=0.2))
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"st')  # what a killed process wrote behind its checkpoint
    monkeypatch.undo()
    supervised.main(config(dropout=0.2, resume=True))
    resumed = weights(tmp_path / "run")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(tmp_path / "whole").items())
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_run_that_is_there_is_kept_or_refused(config, tmp_path, monkeypatch, capsys):
    interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        supervised.main(config())
    monkeypatch.undo()
    refused(lambda: supervised.main(config()), str(tmp_path / "run"), "unfinished", "--resume")
    refused(lambda: supervised.main(config(resume=True, lr=0.5)), "--lr=0.01, now it is 0.5", "another --out")
    (tmp_path / "run" / "state.pt").write_bytes(b"PK\x03\x04 no state")
    refused(lambda: supervised.main(config(resume=True)), "state.pt is damaged", "remove")
    (tmp_path / "run" / "state.pt").unlink()
    results = supervised.main(config(resume=True, micro_batch=2))
    capsys.readouterr()
    assert supervised.main(config(log_every=3)) == results and "finished earlier, kept" in capsys.readouterr().out
    refused(lambda: supervised.main(config(seed=3)), "--seed=10, now it is 3")
    from distill import Config
    refused(lambda: supervised.is_finished(tmp_path / "run", Config(), set()), "run was made by `", "has no --preset")
    (tmp_path / "run" / "results.json").write_text('{"given": {}}')  # of eval.py --out=THERE
    refused(lambda: supervised.main(config()), "holds results of something else")
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "results.json").write_text('{"best": {}}')
    refused(lambda: supervised.main(config()), "holds results of something else")


def test_a_run_does_not_go_on_with_other_rows(config, tmp_path, monkeypatch):
    row, rows = {"instruction": "Tell about the cat", "output": "Anna saw a cat."}, tmp_path / "mine.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 20)
    cfg = config(data=str(rows), valid_data="tiny", updates=1, evals=1)
    supervised.main(cfg)
    os.utime(rows, (0, 0))  # copied to another machine, say
    supervised.main(cfg)
    rows.write_text((json.dumps(row) + "\n").replace("cat", "owl") * 20)  # as many bytes
    refused(lambda: supervised.main(cfg), f"another content of --data={rows}", "choose another --out")
    rows.unlink()
    assert supervised.main(cfg)["updates"] == 1


def test_a_run_does_not_go_on_with_other_weights(config, tmp_path, tiny_models):
    shutil.copytree(tiny_models["teacher"], tmp_path / "p")
    cfg = config(teacher=str(tmp_path / "p"), updates=1, evals=1)
    supervised.main(cfg)
    supervised.main(cfg)
    save(random_gpt(5, **{name: getattr(load(tiny_models["teacher"]).config, name) for name in
                          ("vocab_size", "n_positions", "eos_token_id")}), tmp_path / "p")
    refused(lambda: supervised.main(cfg), f"another content of --teacher={tmp_path / 'p'}", "choose another --out")


def test_a_validation_that_is_no_number_is_never_the_best(config, monkeypatch, tmp_path):
    monkeypatch.setattr(supervised, "held_out_loss", lambda *given: math.nan)
    refused(lambda: supervised.main(config(updates=1, evals=1, select="loss")), "the validation loss is nan")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_model_is_not_overwritten_by_its_own_result(config, tmp_path):
    refused(lambda: config(model="out/a", out="out/b/../a/"), "--model=out/a would be overwritten")


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path):
    broken = random_gpt(vocab_size=90, n_positions=64, eos_token_id=89)
    broken.ln_f.weight.data[0] = float("nan")
    save(broken, tmp_path / "broken")
    from data import save_tokenizer, world_tokenizer
    save_tokenizer(world_tokenizer(), tmp_path / "broken")
    for dtype in ("float32", "float16"):  # whose scaler would skip such an update
        settings = dict(model=str(tmp_path / "broken"), dtype=dtype, out=str(tmp_path / dtype))
        refused(lambda settings=settings: supervised.main(config(**settings)), "stopped at update 1", "loss is nan")
        assert not (tmp_path / dtype / "model.safetensors").exists()


# ---- what it can be trained on --------------------------------------------------------------------------------------

def test_a_new_model_learns_plain_text(config, tmp_path):
    text = dict(data="tiny-text", max_tokens=16, max_prompt_tokens=256)  # which text has not
    results = supervised.main(config(model="1x2x8", updates=3, evals=1, **text))
    assert results["best"]["loss"] > 0 and "rouge_l" not in results["best"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["n_positions"] == 64


def test_kd_reports_its_distance_to_the_teacher(config, tiny_models):
    results = supervised.main(config(teacher=tiny_models["teacher"], updates=2, evals=1))
    assert results["best"]["reverse_kl"] > 0


def test_answers_that_others_validate_are_all_trained_on(config, tmp_path, capsys):
    """SeqKD: none of the teacher's answers are held out. Of a set that validates itself a tenth is."""
    row = {"instruction": "Tell about the cat", "input": "", "output": "Anna saw a cat."}
    (tmp_path / "answers.jsonl").write_text((json.dumps(row) + "\n") * 20)
    answers, seen = str(tmp_path / "answers.jsonl"), {}
    for valid_data in ("tiny", answers, None):
        supervised.main(config(data=answers, valid_data=valid_data, updates=1, evals=1, out=f"{tmp_path}/{len(seen)}"))
        seen[valid_data] = int(re.search(rf"data {answers} (all|train): (\d+) rows", capsys.readouterr().out)[2])
    assert seen == {"tiny": 20, answers: 18, None: 18}


def test_settings_that_cannot_work(config, tmp_path, tiny_models):
    refused(lambda: config(epochs=2), "--epochs and --updates")
    refused(lambda: config(data="tiny-text", select="rouge_l"), "plain text", "--select=loss")
    refused(lambda: config(data="tiny-text", valid_data="tiny"), "--valid_data=tiny", "plain text")
    refused(lambda: config(max_prompt_tokens=44), "leaves no room")
    refused(lambda: config(kd_ratio=1.5), "--kd_ratio=1.5 is out of range")
    refused(lambda: supervised.main(config(model=str(tmp_path))), "has no config.json")
    refused(lambda: supervised.main(config(model="1x3x8")), "width of 8 does not divide into 3 heads")
    save(random_gpt(vocab_size=77), tmp_path / "other")
    refused(lambda: supervised.main(config(teacher=str(tmp_path / "other"))), "the teacher has 77 tokens",
            "one vocabulary")
    assert not (tmp_path / "run").exists()  # a mistake leaves nothing behind
    refused(lambda: supervised.main(config(data="tiny-text", max_tokens=1000)), "--max_tokens=1000",
            "64 positions")
