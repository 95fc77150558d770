"""The supervised loop: the loss on the right tokens, one normaliser however the batch is split, exact resuming."""

import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import another_vocabulary, change_weights, interrupt_after, lines, random_gpt, refused, weights
from torch._dynamo.utils import counters

import data
import distill
import teacher as supervised
from config import Machine, make
from data import Example, Row
from model import GPTConfig, load, save
from safe import runs
from safe.files import write_json
from sample import sample, uniforms
from teacher import add_gradient, clip_gradient, keep_best, optimizer_of, schedule, summed

pytestmark = pytest.mark.usefixtures("few_rows")
BATCH = [Example(Row("a"), [1, 2, 3], [4, 10]), Example(Row("b"), [5], [6, 7, 8, 10])]

WORLD = dict(vocab_size=data.world_tokenizer().n_vocab, eos_token_id=data.world_tokenizer().eot_token, n_positions=64)


@pytest.fixture
def config(tiny_models, tmp_path):
    def make_config(**settings):
        small = dict(model=tiny_models["student"], data="tiny", out=str(tmp_path / "run"), updates=6, evals=3, lr=1e-2,
                     batch_size=6, max_prompt_tokens=16, max_tokens=44, dtype="float32", device="cpu")
        return make(supervised.Config, small | settings, supervised.presets)
    return make_config


# ---- the loss and its gradient --------------------------------------------------------------------------------------

SCALER = torch.amp.GradScaler("cpu", enabled=False)


def learned(gpt, examples, m, divisor=1.0, teacher=None, kd_ratio=0.0, batch=None):
    """The sums that add_gradient returns, and the gradients that it adds."""
    gpt.zero_grad()
    sums = add_gradient(gpt, batch or data.batch_of(examples, m.device), divisor, m, SCALER, teacher, kd_ratio)
    return sums, [p.grad.clone() for p in gpt.parameters()]


def whole(gpt, examples, divisor=1.0, teacher=None, kd_ratio=0.0):
    """The same, by one graph of all logits, an example after the other."""
    gpt.zero_grad()
    gold = kl = torch.zeros((), dtype=torch.float64)
    for e in examples:
        tokens, predicted = torch.tensor([e.prompt + e.response]), slice(len(e.prompt) - 1, -1)
        log_q = gpt.logits(gpt(tokens))[0, predicted].log_softmax(-1)
        gold = gold - log_q[range(len(e.response)), e.response].sum()
        if teacher is not None:
            log_p = teacher.logits(teacher(tokens))[0, predicted].log_softmax(-1).detach()
            kl = kl + (log_p.exp() * (log_p - log_q)).sum()
    loss = (1 - kd_ratio) * gold + kd_ratio * kl if teacher is not None else gold
    (loss / divisor).backward()
    return torch.stack([loss, gold]).detach(), [p.grad.clone() for p in gpt.parameters()]


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_the_answer_and_its_end(kd_ratio, m):
    """Against a loop over tokens. The prompt is not in the loss; the end token is."""
    student, teacher = random_gpt(1), random_gpt(2)
    gold = kl = 0.0
    for e in BATCH:
        for t, token in enumerate(e.response):
            context = torch.tensor([e.prompt + e.response[:t]])
            log_q, log_p = (g.logits(g(context))[0, -1].log_softmax(-1).detach() for g in (student, teacher))
            gold -= log_q[token].item()
            kl += sum((log_p[v].exp() * (log_p[v] - log_q[v])).item() for v in range(11))
    sums, _ = learned(student, BATCH, m, 3, teacher, kd_ratio)
    assert sums.tolist() == pytest.approx([(1 - kd_ratio) * gold + kd_ratio * kl, gold], abs=1e-4)
    sums, _ = learned(student, BATCH, m)
    assert sums.tolist() == pytest.approx([gold, gold], abs=1e-4)


@pytest.mark.parametrize("vocab_size", [11, 5000])
@pytest.mark.parametrize("kd_ratio", [None, 0.3])
def test_chunks_taken_backward_at_once_change_nothing(kd_ratio, vocab_size, m, monkeypatch):
    """The gradients of all weights in float64, of the embedding too, however few logits have room, are those of one
    graph; they are divided by what is given, here the number of tokens: AdamW would hide a factor, and clipping would
    not. Logits are made once for each row."""
    gpt, teacher = random_gpt(1, vocab_size=vocab_size).double(), random_gpt(2, vocab_size=vocab_size).double()
    examples = [*BATCH, Example(Row("c"), [9, 9], [10]), Example(Row("d"), [2], [3, 4, 5, 6, 7, 8])]
    settings = dict(divisor=13) if kd_ratio is None else dict(divisor=13, teacher=teacher, kd_ratio=kd_ratio)
    sums, grads = whole(gpt, examples, **settings)
    made, logits = [], gpt.logits
    monkeypatch.setattr(gpt, "logits", lambda hidden, *head: made.append(len(hidden)) or logits(hidden, *head))
    for positions, rows in ((1, [1] * 4), (12, [2, 2]), (20, [3, 1]), (10**6, [4])):
        got, added = learned(gpt, examples, dataclasses.replace(m, logits=vocab_size * positions), **settings)
        assert made == rows
        made.clear()
        torch.testing.assert_close(got.double(), sums, atol=1e-4, rtol=1e-6)  # which are kept in float32
        for one, other in zip(added, grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_gradients_are_added_to_those_before(m):
    gpt = random_gpt(1).double()
    first, second = learned(gpt, BATCH[:1], m)[1], learned(gpt, BATCH[1:], m)[1]
    gpt.zero_grad()
    for example in BATCH:
        add_gradient(gpt, data.batch_of([example], m.device), 1.0, m, SCALER)
    for p, one, other in zip(gpt.parameters(), first, second, strict=True):
        torch.testing.assert_close(p.grad, one + other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5])
def test_a_rows_padding_changes_nothing(kd_ratio, m):
    """Neither what lies in it, nor how long it is."""
    gpt, teacher = random_gpt(1).double(), random_gpt(2).double()
    _, grads = whole(gpt, BATCH, 1.0, teacher, kd_ratio)
    batch = data.batch_of([*BATCH, Example(Row("long"), [1] * 4, [2] * 9)], m.device)
    junk = dataclasses.replace(batch, tokens=batch.tokens.clone(), response=batch.response.clone())
    junk.response[~junk.response_mask] = 7
    for row, example in enumerate(BATCH):
        junk.tokens[row, len(example.prompt) + len(example.response) :] = 9
    for filled in (batch, junk):
        filled = dataclasses.replace(filled, **{name: getattr(filled, name)[:2] for name in
                                                ("tokens", "response", "response_mask", "columns")})
        _, added = learned(gpt, None, m, 1.0, teacher, kd_ratio, filled)
        for one, other in zip(added, grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_the_way_back_is_not_under_autocast(monkeypatch):
    """Neither a chunk's, nor that through the layers."""
    gpt, under = random_gpt(n_embd=32), []
    note = lambda *of: under.append(torch.is_autocast_enabled("cpu"))
    logits = gpt.logits

    def noted(*given):
        made = logits(*given)
        made.register_hook(note)
        return made

    monkeypatch.setattr(gpt, "logits", noted)
    gpt.ln_f.register_full_backward_hook(note)
    m = Machine(torch.device("cpu"), torch.bfloat16, logits=1)
    add_gradient(gpt, data.batch_of(BATCH, m.device), 1.0, m, SCALER)
    assert under == [False] * 3  # two chunks and what is below them


def nearness(gradients, m):
    """How far the embedding's gradient is from float32's, in one product and in many."""
    found = {}
    for name, dtype, positions in (("float32", torch.float32, 10**6), ("one", torch.bfloat16, 10**6),
                                     ("many", torch.bfloat16, 1)):
        found[name] = gradients(dataclasses.replace(m, dtype=dtype, logits=11 * positions))[0]
    off = lambda name: ((found[name] - found["float32"]).norm() / found["float32"].norm()).item()
    return off("many"), off("one")


def test_many_chunks_under_autocast_lose_nothing(m):
    """The embedding's gradient is as near to float32's as that of one product over all rows. Summed in bfloat16, which
    it was once, they were off by 18%."""
    gpt = random_gpt(n_embd=32)
    assert next(gpt.parameters()) is gpt.wte.weight
    examples = [Example(Row(""), [n % 11], [(n + k * k) % 11 for k in range(4)]) for n in range(200)]
    many, one = nearness(lambda m: learned(gpt, examples, m)[1], m)
    assert 0 < many < 1.2 * one < 0.1


@pytest.fixture
def phase_2(m, monkeypatch):
    """A function from a machine to the gradients of an update of distill.py, and its log; with pieces of plain text."""
    student, teacher = random_gpt(1, n_embd=32), random_gpt(2, n_embd=32)
    prompts = [[n % 10, *[n % 7] * (n % 3)] for n in range(48)]
    rollout = sample(student, prompts, uniforms(0, range(48), 12), m, teacher, 0.3)
    corpus = [Example(Row(""), [n % 11], [(n * k) % 11 for k in range(8)]) for n in range(48)]
    cfg = make(distill.Config, dict(steps=1, rollouts=48, minibatch=48, inner_epochs=1, micro_batch=48, pt_kd=0.5,
                                    pt_coef=0.2, max_prompt_tokens=4, max_tokens=16), distill.presets)
    monkeypatch.setattr(distill, "collect", lambda *given: rollout)
    clip, grads = supervised.clip_gradient, []

    def noting(model, *given, **more):
        grads[:] = [p.grad.clone() for p in model.parameters()]
        return clip(model, *given, **more)

    monkeypatch.setattr(supervised, "clip_gradient", noting)

    def gradients(m, double=False):
        models = [random_gpt(seed, n_embd=32) for seed in (1, 2)]
        models = [model.double() for model in models] if double else models
        rollout.teacher_hidden = rollout.teacher_hidden.to(torch.float64 if double else m.dtype)
        optimizer, scaler = optimizer_of(models[0], m, (0.9, 0.95), 0.0)
        line = next(distill.algorithm_1(*models, [], corpus, optimizer, scaler, cfg, m, 0))
        return [*grads, line]
    return gradients


def test_chunks_of_an_update_of_distill_change_nothing(phase_2, m):
    *want, logged = phase_2(dataclasses.replace(m, logits=10**6), double=True)
    for positions in (1, 30, 200):
        *grads, line = phase_2(dataclasses.replace(m, logits=11 * positions), double=True)
        for one, other in zip(grads, want, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
        for name in line.keys() - {"sample_seconds", "update_seconds"}:
            assert line[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-5)


def test_many_chunks_of_an_update_of_distill_lose_nothing_under_autocast(phase_2, m):
    many, one = nearness(phase_2, m)
    assert 0 < many < 1.2 * one < 0.1


# ---- the step -------------------------------------------------------------------------------------------------------

def test_the_gradients_norm_is_clipped_and_told(m):
    gpt = random_gpt()
    optimizer, scaler = optimizer_of(gpt, m, (0.9, 0.999), 0.0)
    gpt.ln_f.bias.grad = torch.full((8,), 3.0)  # the others have none, as in a process without rows
    assert clip_gradient(gpt, optimizer, scaler, m, 2.0) == pytest.approx(3 * 8**0.5)
    torch.testing.assert_close(gpt.ln_f.bias.grad.norm(), torch.tensor(2.0))
    assert not any(p.grad.any() for p in gpt.parameters() if p is not gpt.ln_f.bias)
    assert clip_gradient(gpt, optimizer, scaler, m, math.inf) == pytest.approx(2.0)
    gpt.ln_f.bias.grad[0] = math.inf
    refused(lambda: clip_gradient(gpt, optimizer, scaler, m), "the gradient's norm is", "--lr", "--dtype=float32")


def test_an_overflow_in_float16_skips_the_step_and_is_told():
    gpt, m = random_gpt(), Machine(torch.device("cpu"), torch.float16)
    optimizer, scaler = optimizer_of(gpt, m, (0.9, 0.999), 0.0)
    before, scale = gpt.ln_f.bias.detach().clone(), scaler.get_scale()
    for value, norm in ((math.inf, None), (1.0, 8**0.5)):
        gpt.ln_f.bias.grad = torch.full((8,), value) * scale
        found = clip_gradient(gpt, optimizer, scaler, m, 10.0)
        assert found is None if norm is None else found == pytest.approx(norm)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(gpt.ln_f.bias, before) == (norm is None)
        scale = scaler.get_scale()
    assert scale == 2.0**15


def test_the_first_sum_that_is_no_number_is_named(m):
    sums = {"one": torch.tensor(1.0), "two": torch.tensor(2.5)}
    assert summed(sums, m, "here") == {"one": 1.0, "two": 2.5}
    sums |= {"three": torch.tensor(math.nan), "four": torch.tensor(math.inf)}
    refused(lambda: summed(sums, m, "here"), "here: three is nan", "--lr")


no_compiler = not any(map(shutil.which, ("c++", "g++", "clang++")))
FASTER_OR_SMALLER = [dict(micro_batch=1), dict(micro_batch=4), dict(recompute=True),
                     dict(decoder="plain", sample_batch=2),
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
        for key in {"loss", "grad_norm"} & set(plain):
            assert other[key] == pytest.approx(plain[key], rel=1e-4)
        assert other.get("valid", {}) == pytest.approx(plain.get("valid", {}), rel=1e-3)


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
    rates = [line["lr"] for line in lines(tmp_path / "run") if "lr" in line]
    assert rates == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-5)


def test_the_best_validation_is_kept(tmp_path, m, tiny_models):
    gpt, kept = random_gpt(), []
    for select, values, best in (("loss", [3, 1, 2], 1), ("rouge_l", [3, 1, 4, 4], 4), ("last", [3, 1, 2], 2)):
        state = None
        for step, value in enumerate(values):
            gpt.wpe.weight.data[:] = step
            state = keep_best(gpt, data.world_tokenizer(), tmp_path, m, select, {select: value, "step": step}, state)
        kept.append(weights(tmp_path)["transformer.wpe.weight"][0, 0].item())
        assert state[select] == best
    assert kept == [1, 3, 2]  # of two equal ones the later


@pytest.mark.parametrize("answer, select", [
    ("She fed the cat.", "rouge_l"), ("Elle a été à la mer, où le thé était prêt.", "rouge_l"),
    ("猫在花园里。", "loss"), ("GPT-2 发布于 2019 年的二月十四日，猫在花园里。", "loss"), ("Кошка в саду.", "loss"),
    ("...", "loss")])
def test_a_rouge_l_that_sees_little_of_the_references_picks_nothing(answer, select, m, capsys):
    examples = [Example(Row("a", "", (answer,)), [1], [2])]
    assert supervised.selection("rouge_l", examples, m) == select
    assert ("the loss picks the weights" in capsys.readouterr().out) == (select == "loss")
    assert supervised.selection("last", examples, m) == "last"


def test_training_learns(config, tmp_path):
    supervised.main(config(updates=60, evals=1, lr=2e-2, batch_size=32, micro_batch=32))
    loss = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert sum(loss[-5:]) < 0.6 * sum(loss[:5])


# ---- a run's files --------------------------------------------------------------------------------------------------

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
    assert not (tmp_path / "run" / "state-before.pt").exists()


def test_one_folder_may_have_several_names(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(random_gpt(**WORLD), Path("w"))
    data.save_tokenizer(data.world_tokenizer(), Path("w"))
    supervised.main(config(model="w", updates=1))
    for name in ("w/", "./w", "../" + tmp_path.name + "/w", str(tmp_path / "w")):
        supervised.main(config(model=name, updates=1))
        assert "finished earlier, kept" in capsys.readouterr().out
    shutil.copytree("w", "another")
    change_weights("another")
    refused(lambda: supervised.main(config(model="another", updates=1)), "made with model=w, and now it is another")


def test_a_run_that_is_there_is_kept_or_refused(config, tmp_path, monkeypatch, capsys):
    interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        supervised.main(config())
    monkeypatch.undo()
    refused(lambda: supervised.main(config()), str(tmp_path / "run"), "unfinished", "--resume")
    refused(lambda: supervised.main(config(resume=True, lr=0.5)), "lr=0.01, and now it is 0.5", "another --out")
    (tmp_path / "run" / "state.pt").write_bytes(b"PK\x03\x04 no state")
    refused(lambda: supervised.main(config(resume=True)), "state.pt is damaged", "remove")
    (tmp_path / "run" / "state.pt").unlink()
    results = supervised.main(config(resume=True, micro_batch=2))
    capsys.readouterr()
    assert supervised.main(config(sample_batch=3)) == results and "finished earlier, kept" in capsys.readouterr().out
    refused(lambda: supervised.main(config(seed=3)), "seed=10, and now it is 3")
    refused(lambda: runs.is_finished(tmp_path / "run", distill.Config(), set()), "run was made with", "another --out")
    (tmp_path / "run" / "results.json").write_text('{"given": {}}')  # of eval.py --out=THERE
    refused(lambda: supervised.main(config()), "holds results of something else")
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "results.json").write_text('{"best": {}}')
    refused(lambda: supervised.main(config()), "holds results of something else")


def test_the_settings_of_a_run_are_json(config, tmp_path, monkeypatch):
    """In which infinity is a word; and the run is known by them."""
    cfg = config(grad_clip=math.inf)
    interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        supervised.main(cfg)
    monkeypatch.undo()
    strict = lambda name: json.loads((tmp_path / "run" / name).read_text(), parse_constant=pytest.fail)
    settings = strict("run.json")
    assert settings["grad_clip"] == "inf" and settings["lr"] == 0.01 and settings["teacher"] is None
    refused(lambda: supervised.main(config(resume=True)), "grad_clip=inf, and now it is 1.0")
    results = supervised.main(dataclasses.replace(cfg, resume=True))
    assert supervised.main(cfg) == results == strict("results.json")


def test_a_validation_is_printed_with_an_answer(config, capsys):
    supervised.main(config(updates=2, evals=1))
    said = capsys.readouterr().out
    (line, answer), = re.findall(r"(run 2/2  \| validation:.*)\n +wrong +(Tell.* -> .*)\n", said)
    assert "loss" in line and "rouge_l" in line and "grad_norm" not in line and len(answer) <= 110


def test_a_run_does_not_go_on_with_other_rows(config, tmp_path, monkeypatch):
    row, rows = {"instruction": "Tell about the cat", "output": "Anna saw a cat."}, tmp_path / "mine.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 20)
    cfg = config(data=str(rows), valid_data="tiny", updates=1, evals=1)
    supervised.main(cfg)
    os.utime(rows, (0, 0))  # copied to another machine, say
    supervised.main(cfg)
    rows.write_text((json.dumps(row) + "\n").replace("cat", "owl") * 20)  # as many bytes
    refused(lambda: supervised.main(cfg), "the content of data=", "choose another --out")
    rows.unlink()
    assert supervised.main(cfg)["updates"] == 1


def test_a_run_does_not_go_on_with_other_weights(config, tmp_path, tiny_models):
    shutil.copytree(tiny_models["teacher"], tmp_path / "p")
    cfg = config(teacher=str(tmp_path / "p"), updates=1, evals=1)
    supervised.main(cfg)
    supervised.main(cfg)
    save(random_gpt(5, **{name: getattr(load(tiny_models["teacher"]).config, name) for name in
                          ("vocab_size", "n_positions", "eos_token_id")}), tmp_path / "p")
    refused(lambda: supervised.main(cfg), "the content of teacher=", "choose another --out")


def test_a_run_does_not_go_on_with_another_shape_of_the_same_weights(config, tmp_path, tiny_models):
    """Nor with another tokenizer."""
    for file in ("config.json", "tokenizer.json"):
        shutil.copytree(tiny_models["teacher"], tmp_path / file / "p")
        cfg = config(teacher=str(tmp_path / file / "p"), updates=1, evals=1)
        before = runs.made_with(cfg)
        (tmp_path / file / "p" / file).write_text("{}")
        assert {name for name in before if before[name] != runs.made_with(cfg)[name]} == {"the content of teacher"}


def test_a_run_on_rows_that_an_earlier_version_held_out_is_not_gone_on_with(config, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"instruction": "Tell about the cat", "output": "Anna saw a cat."}\n')
    cfg = config(data=str(tmp_path / "mine.jsonl"), valid_data="tiny", resume=True)
    noted = runs.made_with(cfg)
    assert noted.pop("rows held out by") == "a hash of the prompt"
    assert "rows held out by" not in runs.made_with(config())
    write_json(Path(cfg.out) / "run.json", noted)
    refused(lambda: supervised.main(cfg), "was made with rows held out by=None")


def test_a_share_of_kd_without_a_teacher_is_refused(config):
    refused(lambda: config(kd_ratio=1.0), "--kd_ratio=1.0 weighs a teacher's KL", "--teacher")


def test_a_validation_that_is_no_number_is_never_the_best(config, monkeypatch, tmp_path):
    monkeypatch.setattr(supervised, "held_out_loss", lambda *given: math.nan)
    refused(lambda: supervised.main(config(updates=1, evals=1, select="loss")), "the validation loss is nan")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_model_is_not_overwritten_by_its_own_result(config, tmp_path):
    refused(lambda: config(model="out/a", out="out/b/../a/"), "--model=out/a would be written over")


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path):
    broken = random_gpt(**WORLD)
    broken.ln_f.weight.data[0] = float("nan")
    save(broken, tmp_path / "broken")
    data.save_tokenizer(data.world_tokenizer(), tmp_path / "broken")
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
    rows = [{"instruction": f"Tell about the {thing}", "input": name, "output": "Anna saw a cat."}
            for thing in ("cat", "owl", "egg", "drum", "knife") for name in ("Anna", "Ella", "Ben", "Leo")]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers, seen = str(tmp_path / "answers.jsonl"), {}
    for valid_data in ("tiny", f"{tmp_path}/./answers.jsonl", None):
        supervised.main(config(data=answers, valid_data=valid_data, updates=1, evals=1, out=f"{tmp_path}/{len(seen)}"))
        seen[valid_data] = int(re.search(rf"data {answers} (all|train): (\d+) rows", capsys.readouterr().out)[2])
    assert list(seen.values()) == [20, 18, 18]


def test_settings_that_cannot_work(config, tmp_path, tiny_models):
    refused(lambda: config(epochs=2), "--epochs and --updates")
    refused(lambda: config(data="tiny-text", select="rouge_l"), "plain text", "--select=loss")
    refused(lambda: config(data="tiny-text", valid_data="tiny"), "--valid_data", "plain text")
    refused(lambda: config(max_prompt_tokens=44), "leaves no room")
    refused(lambda: config(kd_ratio=1.5), "--kd_ratio=1.5 is out of range")
    refused(lambda: supervised.main(config(model=str(tmp_path))), "has no config.json")
    refused(lambda: supervised.main(config(model="1x3x8")), "width of 8 does not divide into 3 heads")
    another_vocabulary(tmp_path / "other")
    refused(lambda: supervised.main(config(teacher=str(tmp_path / "other"))), "tokens and the teacher other 78",
            "one vocabulary")
    assert not (tmp_path / "run").exists()  # a mistake leaves nothing behind
    refused(lambda: supervised.main(config(data="tiny-text", max_tokens=1000)), "--max_tokens=1000",
            "64 positions")
