"""The plan: what it adds up from steps measured on one and two layers, and the shapes it counts bytes by."""

import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import CPU, another_vocabulary, random_gpt, refused

import distill
from config import Machine, make
from model import GPTConfig, new_config
from sample import decoder
from tools import bench, plan, stages
from tools.plan import Draft, Lengths, Measured, decode_bytes, frozen_bytes, measure

pytestmark = pytest.mark.usefixtures("few_rows")
COST = Measured(layer=2.0, output=3.0, layer_forward=0.5, layer_bytes=10.0, step_layer=0.1, step_output=0.2,
                update_layer=0.3, update_output=0.4)
PLAIN = GPTConfig(2, 2, 16, 50, 64, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
LENGTHS = Lengths(prompt=6.0, answer=4.0, train=100, valid=50, test=20)
TWO, FOUR = GPTConfig(2, 2, 16, 90, 64), GPTConfig(4, 2, 16, 90, 64)


def draft(cfg: distill.Config, m: Machine) -> Draft:
    """The plan of a run whose student has two layers and whose teacher has four, at the costs above."""
    shapes = {cfg.student: TWO, cfg.teacher: FOUR}
    return Draft(stages.Stages(None, None, None, {}, cfg), m, LENGTHS, shapes, {16: COST})


def test_a_cost_grows_with_layers_samples_and_tokens():
    assert COST.train(layers=4, samples=5, tokens=7, predicted=2, recompute=False) == 5 * (7 * 4 * 2.0 + 2 * 3.0)
    assert COST.train(layers=4, samples=5, tokens=7, predicted=2, recompute=True) == 5 * (7 * 4 * 2.5 + 2 * 3.0)
    assert COST.read(layers=4, samples=5, tokens=7, predicted=2) == 5 * (7 * 4 * 0.5 + 2 * 3.0 / 3)
    assert COST.step(4) == 4 * 0.1 + 0.2 and COST.update(4) == 4 * 0.3 + 0.4


def test_a_layer_is_told_from_the_rest_by_one_more(m, monkeypatch):
    names = ("train", "forward", "bytes", "step", "update")
    layers = lambda config, *settings: {name: n * config.n_layer + n / 2 for n, name in enumerate(names, 1)}
    monkeypatch.setattr(plan, "measure_layers", layers)
    cost = measure(GPTConfig(7, 2, 16, 50, 64), m, rows=4, length=5, longest=6, kind="plain")
    assert cost == Measured(layer=1 / 20, output=0.5 / 16, layer_forward=2 / 20, layer_bytes=3 / 6, step_layer=4.0,
                            step_output=2.0, update_layer=5.0, update_output=2.5)


def test_what_is_measured_is_what_training_does_and_activations_are_those_of_a_layer(m, monkeypatch):
    batches, add_gradient = [], plan.supervised.add_gradient
    monkeypatch.setattr(plan.supervised, "add_gradient",
                        lambda model, batch, *more: batches.append(batch) or add_gradient(model, batch, *more))
    cost = measure(PLAIN, replace(m, sample_batch=4), rows=4, length=32, longest=32, kind="plain")
    assert {batch.tokens.shape for batch in batches} == {(4, 32)}
    assert {batch.response_mask.sum().item() for batch in batches} == {4 * 31}
    # float32 kept for the backward pass of a layer: of width D at least the inputs of its 2 norms and 4 matrices
    # (D, D, D, D, D, 4D) and q, k, v; at most a score for each of 32 tokens and 2 heads besides
    assert 4 * (5 + 4 + 3) * 16 <= cost.layer_bytes <= 4 * (40 * 16 + 2 * 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_are_counted_by_the_token_and_weights_are_not(dtype):
    """Autocast's copies of the matrices are saved for the backward pass too, but are as large for one token."""
    m, config = Machine(torch.device("cpu"), dtype, sample_batch=2), replace(PLAIN, n_embd=128, n_positions=300)
    short, long = (measure(config, m, 2, 32, length, "plain").layer_bytes for length in (32, 256))
    assert short == pytest.approx(long, rel=0.1)
    with_dropout = replace(config, attn_pdrop=0.1)
    assert measure(with_dropout, m, 2, 32, 256, "plain").layer_bytes > 1.5 * long  # attention keeps its square


def test_recomputed_layers_leave_their_inputs_and_one_layer_s_activations(m):
    config = GPTConfig(5, 2, 16, 50, 64)
    kept, again = (plan.update_bytes(config, COST, m, 2, 8, 0.0, recompute) for recompute in (False, True))
    assert kept - again == plan.HOLES_FLOAT32 * 2 * 8 * (5 * 10.0 - (5 * 16 * 4 + 10.0))


def test_logits_are_counted_for_as_many_rows_as_have_room_and_at_least_one():
    gpu = Machine(torch.device("cuda"), torch.bfloat16, logits=1024 * 90)
    for rows, predicted, positions in ((64, 40, 1024), (8, 40, 8 * 40), (64, 2000, 2000), (64, 600, 1024)):
        assert plan.logits_bytes(3, TWO, gpu, rows, predicted) == 3 * 4 * positions * 90


def copies_held(function, positions: int, vocab_size: int) -> float:
    """The most float32 logits that a call holds at a time, by PyTorch's profiler, in chunks of so many positions."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / (4 * positions * vocab_size)


@pytest.mark.parametrize("kind", ["gold", "kd"])
def test_supervised_training_holds_as_many_copies_of_logits_as_are_counted(kind, m):
    student, teacher = (random_gpt(vocab_size=5000, n_positions=64) for _ in range(2))
    m, scaler = replace(m, logits=40 * 5000), torch.amp.GradScaler("cpu", enabled=False)
    batch = plan.data.pad_right([[1], [1]], [list(range(40))] * 2, m.device)
    taught = [teacher.requires_grad_(False), 0.5] if kind == "kd" else []
    copies = copies_held(lambda: plan.supervised.add_gradient(student, batch, 80, m, scaler, *taught), 40, 5000)
    assert copies == pytest.approx(plan.KD if taught else plan.GOLD, abs=0.9)


def test_an_update_of_phase_2_holds_as_many_copies_of_logits_as_are_counted(m):
    cfg = bench.Config(student="1x2x8", teacher="1x2x8", batch=2, prompt_tokens=2, decoder="plain", device="cpu")
    ours = bench.Ours(cfg, replace(m, logits=40 * 50257), 40)
    ours.update()
    assert copies_held(ours.update, 40, 50257) == pytest.approx(plan.MINILLM, abs=0.9)


def tensors_in(thing) -> list[torch.Tensor]:
    """All that an object holds, in its fields, in what they hold, and in functions with arguments of their own."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    held = list(thing.values()) if isinstance(thing, dict) else []
    held += [thing.keywords] if isinstance(thing, partial) else []
    held += [vars(thing)] if hasattr(thing, "__dict__") and not isinstance(thing, type) else []
    return [tensor for part in held for tensor in tensors_in(part)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_model_for_decoding_are_those_it_holds(dtype):
    gpt, m = random_gpt(n_embd=256, vocab_size=300), Machine(torch.device("cpu"), dtype)
    _, ready = decoder("fast")
    light = ready(gpt, dtype)
    with torch.no_grad(), m.autocast():
        light.logits(light(torch.zeros(2, 2, dtype=torch.int64)))  # after which nothing is packed any more
    held = sum({id(tensor): tensor.nbytes for tensor in tensors_in(light)}.values())
    assert frozen_bytes(gpt.config, m, "fast") == pytest.approx(held, rel=0.02)  # but for biases and norms


def test_the_bytes_of_decoding_hold_both_caches(m):
    one, two = (decode_bytes([GPTConfig(2, 2, 16, 50, 64)] * n, m, rows=3, tokens=20) for n in (1, 2))
    assert two - one == 2 * 2 * 16 * 3 * 20 * 4  # layers, keys and values, width, rows, tokens, float32


def test_what_a_later_stage_would_stumble_over_is_told_first(distill_config, tmp_path, monkeypatch):
    """Even where there is no plan."""
    def check(**settings):
        cfg = distill_config(**settings)
        plan.check(cfg, stages.stages(cfg))

    refused(lambda: check(corpus="nowhere.txt"), "nowhere.txt", "no such .txt file")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: check(corpus="openwebtext"), "pip install pyarrow", "--pt_coef=0")
    refused(lambda: check(max_tokens=100), "--max_tokens=100", "64 positions")
    (tmp_path / "bad.jsonl").write_text("{")
    monkeypatch.setattr(plan.data, "tokenizer_for", None)  # no vocabulary is fetched before that is told
    refused(lambda: check(data=str(tmp_path / "bad.jsonl"), student="1x2x8"), "bad.jsonl:1: not JSON")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: check(student="out/no/such/folder"), "out/no/such/folder")
    another_vocabulary(tmp_path / "other")
    refused(lambda: check(teacher=str(tmp_path / "other")), "tokens and the teacher other 78", "one vocabulary")
    check(corpus="openwebtext", pt_coef=0.0)


def test_a_folder_of_something_else_is_told_before_there_is_work(distill_config, tmp_path):
    cfg, out = distill_config(), tmp_path / "run"
    out.mkdir()
    (out / "results.json").write_text("{}")
    refused(lambda: plan.check(cfg, stages.stages(cfg)), "results of something else")
    plan.check(replace(cfg, plan="only"), stages.stages(cfg))  # which writes nothing
    (out / "results.json").write_text("[]")
    (out / "run.json").write_text("{}")
    refused(lambda: plan.check(cfg, stages.stages(cfg)), "the folder of a single stage")


@pytest.mark.parametrize("stage", ["minillm", "sft", "init"])
def test_a_stage_of_other_settings_is_told_before_there_is_work(stage, distill_config, tmp_path):
    cfg = distill_config(student="1x2x8", baselines="sft")
    (tmp_path / "run" / stage).mkdir(parents=True)
    (tmp_path / "run" / stage / "run.json").write_text('{"seed": 7}')
    refused(lambda: plan.check(cfg, stages.stages(cfg)), f"{stage} was made with", "choose another --out")


def test_a_stage_that_needs_more_memory_than_is_free_is_refused(distill_config, monkeypatch, capsys, tmp_path):
    cfg = distill_config(decoder="plain", plan="auto", pt_coef=0.0)
    monkeypatch.setattr(plan, "free_memory", lambda m: 2**10)
    monkeypatch.setattr(Draft, "minillm", lambda self: plan.Line("minillm", "", 1, 0.6 * 2**30, 1.0))
    monkeypatch.setattr(Draft, "evaluation", lambda self, models: plan.Line("evaluate", "", 0, 0.0, 1.0))
    refused(lambda: distill.main(cfg), "minillm needs about 0.6 GiB", "0.0 GiB are free", "--plan=off")
    assert "evaluate" in capsys.readouterr().out and not (tmp_path / "run").exists()
    refused(lambda: distill.main(replace(cfg, plan="only")), "minillm needs about 0.6 GiB")
    monkeypatch.setattr(plan, "free_memory", lambda m: 2**30)
    assert distill.main(replace(cfg, plan="only")) == []


def test_memory_is_shared_by_the_processes_of_one_machine(m):
    alone, shared = (plan.free_memory(replace(m, world=world)) for world in (1, 4))
    assert alone == pytest.approx(4 * shared, rel=0.1)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that makes /proc and /sys/fs/cgroup of files with these texts. 1000 kB are available."""
    monkeypatch.setattr(plan, "PROC", tmp_path / "proc")
    monkeypatch.setattr(plan, "CGROUPS", tmp_path / "cgroup")

    def make_files(cgroup: str, meminfo: str = "MemTotal: 4000 kB\nMemAvailable:   1000 kB\n", **folders: dict) -> None:
        texts = {"proc/self/cgroup": cgroup, "proc/meminfo": meminfo}
        for folder, files in folders.items():
            texts |= {f"cgroup/{folder.replace('_', '/')}/{name}": text for name, text in files.items()}
        for name, text in texts.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    return make_files


def version_2(limit: object, used: int = 300_000) -> dict[str, str]:
    stat = "anon 1\ninactive_file 20000\nactive_file 1000\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def version_1(limit: int, used: int = 300_000) -> dict[str, str]:
    stat = "inactive_file 7\nactive_file 7\ntotal_inactive_file 20000\ntotal_active_file 1000\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}


V1 = "12:cpu,cpuacct:/box\n9:name=systemd:/box\n4:hugetlb,memory:/box/inner\n0::/box\n"


@pytest.mark.parametrize("cgroup, folders, free", [
    ("0::/\n", {"": version_2(500_000)}, 500_000 - 300_000 + 21_000),  # within a container
    ("0::/\n", {"": version_2("max")}, 1_024_000),
    ("0::/\n", {"": version_2(2**40)}, 1_024_000),  # the machine has less
    ("0::/a/b\n", {"a_b": version_2("max"), "a": version_2(400_000)}, 121_000),  # as systemd and Slurm nest them
    ("0::/a/b\n", {"a_b": version_2(350_000, 290_000), "a": version_2(400_000)}, 81_000),
    ("0::/a\n", {"a": version_2(200_000)}, 0),
    ("0::/a\n", {"b": version_2(400_000)}, 1_024_000),  # the group of others
    (V1, {"memory_box_inner": version_1(2**63 - 4096), "memory_box": version_1(400_000)}, 121_000),
    (V1, {"memory": version_1(400_000)}, 121_000),  # Docker's, which knows the path outside, and mounts its own group
    (V1, {"memory_box_inner": version_1(2**63 - 4096)}, 1_024_000),
    (V1, {"memory_box": {"memory.limit_in_bytes": "400000"}, "cpu_box": version_1(400_000)}, 1_024_000),
])
def test_the_memory_there_is_is_what_a_container_may_take(cgroup, folders, free, system, m):
    system(cgroup, **folders)
    assert plan.free_memory(m) == free and plan.free_memory(replace(m, world=4)) == free / 4


def test_where_the_system_does_not_tell_what_is_free_it_is_all_there_is_or_unknown(system, distill_config, monkeypatch,
                                                                                   capsys, m):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(plan.os, "sysconf", pages.get, raising=False)
    assert plan.free_memory(m) == 4096 * 1000  # there is no /proc: macOS
    system("0::/\n", meminfo="MemTotal: 4000 kB\nMemFree: 1000 kB\n")
    assert plan.free_memory(m) == 4096 * 1000  # an old kernel
    monkeypatch.delattr(plan.os, "sysconf")
    assert plan.free_memory(m) == math.inf  # Windows
    monkeypatch.setattr(Draft, "lines", lambda self: [plan.Line("minillm", "", 1, 2.0**40, 1.0)])
    distill.main(distill_config(decoder="plain", plan="only", pt_coef=0.0))
    assert "; free memory is unknown\n" in capsys.readouterr().out


def test_a_stage_that_is_done_is_not_planned_again(distill_config, tmp_path, m):
    cfg = distill_config(teacher="1x2x12", student="1x2x8", baselines="sft,seqkd", decoder="plain", sample_batch=16)
    work = stages.stages(cfg)
    shapes = plan.shapes_of(work, plan.tokenizer_of(work, work.minillm.student))
    costs = {8: COST, 12: COST}
    planned = lambda: [line.stage for line in Draft(work, m, LENGTHS, shapes, costs).lines()]
    assert planned() == ["teacher", "init", "sft", "answers", "seqkd", "minillm", "evaluate"]
    for name in ("teacher", "minillm"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "results.json").write_text("{}")
    plan.Path(work.answers.out).write_text("")
    assert planned() == ["init", "sft", "seqkd", "evaluate"]


def test_models_that_do_not_exist_yet_have_the_shape_they_will_have(distill_config):
    work = stages.stages(distill_config(teacher="1x2x12", student="1x2x8"))
    tokenizer = plan.tokenizer_of(work, work.minillm.student)
    assert work.minillm.student.endswith("init")
    assert plan.shapes_of(work, tokenizer)[work.minillm.student] == new_config("1x2x8", tokenizer)


def test_the_mean_lengths_are_those_of_the_rows_to_train_on(distill_config, tmp_path):
    cfg = distill_config()
    work = stages.stages(cfg)
    tokenizer = plan.tokenizer_of(work, work.minillm.student)
    examples = plan.data.load_examples("tiny", "train", tokenizer, 16, 44, lambda *words: None)
    lengths = plan.lengths_of(cfg, tokenizer)
    assert (lengths.train, lengths.valid, lengths.test) == (len(examples), 6, 12)
    assert lengths.answer == pytest.approx(sum(len(e.response) for e in examples) / len(examples))


@pytest.mark.parametrize("world, batches", [(1, 4), (4, 1), (2, 2), (8, 1)])
def test_taking_turns_costs_each_model_its_share_of_steps_and_a_pass_over_the_rest(world, batches, distill_config, m):
    """64 answers in 4 groups: processes may own a part of each group, or one group alone."""
    cfg = distill_config(rollouts=64, minibatch=64, mix_alpha=0.25, max_prompt_tokens=16, max_tokens=24)
    of_student = 6 * batches * COST.step(2) + COST.read(2, 64 / world, 2, 2)  # 6 of 8 tokens are its own
    of_teacher = 2 * batches * COST.step(4) + COST.read(4, 64 / world, 6, 6)
    assert draft(cfg, replace(m, world=world)).take_turns(64) == pytest.approx(of_student + of_teacher)


def test_comparing_decodes_with_one_model_and_reads_once_with_both(distill_config, m):
    cfg = distill_config(max_prompt_tokens=32, max_tokens=40)
    of_two = 3 * 8 * COST.step(2) + COST.read(2, 50, 40, 8) + COST.read(4, 50, 40, 8)  # the third batch is of 10
    plans = draft(cfg, replace(m, sample_batch=20))
    assert plans.compare([cfg.student, cfg.teacher], 50, 7) == pytest.approx(7 * of_two)
    assert plans.compare([cfg.student], 50, 1) == pytest.approx(3 * 8 * COST.step(2))


def test_small_collections_are_not_decoded_together(distill_config, m):
    """Four collections of 24 answers, of which each of two processes decodes its 12 at once."""
    cfg = distill_config(max_prompt_tokens=32, max_tokens=40)
    seconds = draft(cfg, replace(m, world=2, sample_batch=20)).decode([cfg.student, cfg.student], 4 * 24, 24)
    assert seconds == pytest.approx(4 * 8 * 2 * COST.step(2))


def test_every_pair_on_one_to_eight_devices(monkeypatch, capsys):
    """Of small shapes: six pairs, and twice the devices take half the time; a larger teacher takes more memory."""
    small = {f"s{n}": GPTConfig(2, 2, 16 * n, 90, 1024) for n in (1, 2, 3)}
    monkeypatch.setattr(plan, "GPT2S", small)
    lines = plan.main(make(plan.Config, dict(decoder="plain", device="cpu", micro_batch=2, sample_batch=4)))
    printed = capsys.readouterr().out
    assert printed.count(" GiB ") == 6 * 4 and "extrapolated" in printed
    assert len(lines) == 6 and set(lines) >= {("s3", "s1"), ("s1", "s1")} and ("s1", "s3") not in lines
    assert lines["s3", "s1"][0].bytes > lines["s1", "s1"][0].bytes
    for of in lines.values():
        assert of[0].bytes >= of[3].bytes and of[0].seconds > of[1].seconds > of[3].seconds


# ---- other families, and models that are split ----------------------------------------------------------------------

def test_what_is_split_is_counted_in_parts():
    config = GPTConfig(n_layer=4, n_embd=64, n_head=4)
    embeddings = (config.vocab_size + config.n_positions) * 64
    layers = config.parameters - embeddings
    for world in (1, 2, 8):
        m = replace(CPU, world=world)
        assert plan.trained_bytes(config, False, m) == 16 * config.parameters
        one_layer = layers / 4  # as it is computed with, and its gradient
        assert plan.trained_bytes(config, True, m) == 16 * (embeddings + layers / world) + 8 * one_layer


def test_the_papers_larger_pairs_are_estimated(capsys):
    found = plan.estimate(plan.Config(pairs="opt", sample_batch=16))
    assert len(found) == 3 * 4 and "nothing was measured" in capsys.readouterr().out
    for (teacher, student, more), sizes in found.items():
        q, p = plan.LARGE[student]["shape"], plan.LARGE[teacher]["shape"]
        assert sizes == sorted(sizes, reverse=True)
        least = 2 * (p.parameters + q.parameters) + 16 * (q.parameters - (q.in_layers if "shard" in more else 0))
        assert all(size > least for size in sizes)
        if "shard" in more:
            whole = found[teacher, student, more.replace("--shard", "").strip()]
            saved = whole[-1] - sizes[-1]
            assert saved == pytest.approx(16 * q.in_layers * 7 / 8 - 8 * q.in_layers / q.n_layer)
