"""Models of other families: each does, behind model.GPT's interface, what `transformers` does with it."""

import copy
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, random_gpt, refused
from safetensors.torch import load_file, save_file

import config
import data
import distill
import families
import fast.decode
import sample as sampling
import teacher as supervised
from config import make
from model import load, read_config, save
from safe import runs, texts
from tools import stages

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from families import causal, tokens  # noqa: E402

V = 300
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=V + 12,
             max_position_embeddings=160, bos_token_id=0, eos_token_id=1, pad_token_id=1)
GROUPED = SHAPE | dict(num_key_value_heads=2)
OPT = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=V + 12, bos_token_id=0,
           max_position_embeddings=160, word_embed_proj_dim=32, eos_token_id=1, pad_token_id=1)
KINDS = {
    "llama": lambda t: t.LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama, tied": lambda t: t.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": lambda t: t.Qwen2Config(**GROUPED),
    "qwen3": lambda t: t.Qwen3Config(**GROUPED, head_dim=16),
    "opt": lambda t: t.OPTConfig(**OPT),
    "opt, narrow": lambda t: t.OPTConfig(**OPT | dict(word_embed_proj_dim=16, do_layer_norm_before=False)),
    "pythia": lambda t: t.GPTNeoXConfig(**SHAPE),
    "smollm3": lambda t: t.SmolLM3Config(**GROUPED),
    "mistral": lambda t: t.MistralConfig(**GROUPED, sliding_window=None)}
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14], [15, 16, 17, 18]]


@pytest.fixture(scope="session")
def its_tokenizer():
    """A byte-level BPE with begin and end tokens, and a chat template."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=V, special_tokens=["<s>", "</s>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([data.WITH_INPUT, data.WITHOUT_INPUT] * 9, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    made.chat_template = ("<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
                          "{% if add_generation_prompt %}[assistant]{% endif %}")
    return made


@pytest.fixture(scope="session")
def folders(tmp_path_factory, its_tokenizer):
    """(kind, seed) -> a folder with a model of random weights, as transformers saves it."""
    made = {}

    def folder(kind: str, seed: int = 0) -> str:
        if (kind, seed) not in made:
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(KINDS[kind](transformers))
            for p in model.parameters():
                p.data = 0.3 * torch.randn_like(p) + (1.0 if p.dim() == 1 else 0.0)
            path = tmp_path_factory.mktemp("family")
            model.save_pretrained(path)
            its_tokenizer.save_pretrained(path)
            made[kind, seed] = str(path)
        return made[kind, seed]

    return folder


def theirs(folder: str):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_transformers_padded_or_not_cached_or_not(kind, folders):
    model, whole = load(folders(kind)), theirs(folders(kind))
    tokens = torch.randint(2, V, (3, 12), generator=torch.Generator().manual_seed(1))
    known = model.config.vocab_size  # rows of no token are left out
    assert V <= known < V + 12
    want = whole(tokens).logits[..., :known]
    torch.testing.assert_close(model.logits(model(tokens)), want, atol=1e-4, rtol=1e-4)
    starts = torch.tensor([0, 4, 7])
    padded = tokens.masked_fill(torch.arange(12) < starts[:, None], 0)
    hidden = model(padded, starts)
    for row, start in enumerate(starts.tolist()):
        alone = whole(tokens[row : row + 1, start:]).logits[..., :known]
        torch.testing.assert_close(model.logits(hidden[row : row + 1, start:]), alone, atol=1e-4, rtol=1e-4)
    cache = model.new_cache(model.config, 3, 12, CPU.device, torch.float32)
    parts = [model(padded[:, :8], starts, cache), model(padded[:, 8:10], starts, cache)]
    assert cache.length == 10
    kept = torch.tensor([2, 0])
    cache.keep(kept)
    parts = [part[kept] for part in parts] + [model(padded[kept, 10:], starts[kept], cache)]
    seen = (torch.arange(12) >= starts[kept, None])
    torch.testing.assert_close(torch.cat(parts, 1)[seen], hidden[kept][seen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_no_gradient_though_the_model_stays_in_eval(kind, folders):
    model = load(folders(kind))
    tokens = torch.randint(2, V, (2, 9), generator=torch.Generator().manual_seed(1))

    def gradients(recompute: bool) -> list[torch.Tensor]:
        calls = []
        hook = model.layers()[0].register_forward_hook(lambda *_: None)
        inner = model.layers()[0].self_attn if hasattr(model.layers()[0], "self_attn") else model.layers()[0].attention
        other = inner.register_forward_hook(lambda *_: calls.append(1))
        model.recompute = recompute
        model.zero_grad()
        model.logits(model(tokens)).log_softmax(-1)[..., 3].sum().backward()
        hook.remove()
        other.remove()
        assert len(calls) == 1 + recompute  # the layer has run once more
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for again, kept in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(again, kept)


def greedy(logp, rows, said):
    return torch.full_like(logp, -torch.inf).scatter(-1, logp.argmax(-1, keepdim=True), 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_generate_and_both_decoders_agree(kind, folders):
    model, whole = load(folders(kind)), theirs(folders(kind))
    uniform = sampling.uniforms(0, range(4), 10)
    plain = sampling.sample(model, PROMPTS, uniform, CPU, adjust=greedy)
    for prompt, answer in zip(PROMPTS, plain.answers):
        absent = list(range(model.config.vocab_size, V + 12))
        want = whole.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=10,
                              do_sample=False, suppress_tokens=absent)[0, len(prompt) :].tolist()
        assert answer == want[: len(answer)] and (len(answer) == 10 or answer[-1] == 1)
    teacher = load(folders(kind, 1))
    draws = [draw(model, PROMPTS, uniform, CPU, teacher, 0.3) for draw in (sampling.sample, fast.decode.sample)]
    again = sampling.follow(model, PROMPTS, draws[0].answers, 10, CPU, teacher)
    assert draws[0].answers == draws[1].answers == again.answers
    for name in ("student_logp", "teacher_logp"):
        torch.testing.assert_close(getattr(draws[0], name), getattr(draws[1], name), atol=1e-4, rtol=0)
        torch.testing.assert_close(getattr(draws[0], name), getattr(again, name), atol=1e-4, rtol=0)
    turn = fast.decode.turns(0, 0, range(4), 10, 0.3)
    by_turns = fast.decode.by_turns(model, PROMPTS, uniform, CPU, teacher, 0.3, turn)
    again = sampling.follow(model, PROMPTS, by_turns.answers, 10, CPU, teacher)
    torch.testing.assert_close(by_turns.student_logp, again.student_logp, atol=1e-4, rtol=0)
    torch.testing.assert_close(by_turns.teacher_logp, again.teacher_logp, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "opt", "pythia"])
def test_a_frozen_copy_in_bfloat16_is_the_model_under_autocast(kind, folders):
    model, tokens = load(folders(kind)), torch.randint(2, V, (3, 9))
    bf16 = dataclasses.replace(CPU, dtype=torch.bfloat16)
    light = fast.decode.frozen(model, torch.bfloat16)
    loaded = fast.decode.frozen(load(folders(kind), "cpu", torch.bfloat16), torch.bfloat16)
    with torch.no_grad(), bf16.autocast():
        want = model.logits(model(tokens))
        assert torch.equal(light.logits(light(tokens)), want)
        torch.testing.assert_close(loaded.logits(loaded(tokens)), want, atol=0.05 * want.abs().max().item(), rtol=0)
    shared = {p.data_ptr() for p in model.parameters()}
    assert {p.dtype for p in light.body.parameters() if p.data_ptr() not in shared} == {torch.bfloat16}
    with torch.no_grad():  # the copy has layers of its own, which no update of the model changes
        for part in model.body.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight.zero_()
        with bf16.autocast():
            assert torch.equal(light.logits(light(tokens)), want)


def test_each_end_token_ends_an_answer_and_training_has_the_tokenizers(folders, its_tokenizer, tmp_path):
    shutil.copytree(folders("llama"), tmp_path / "x")
    (tmp_path / "x" / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    model, tokenizer = load(str(tmp_path / "x")), data.load_tokenizer(str(tmp_path / "x"))
    assert model.config.ends == (1, 7) and tokenizer.eot_token == 1
    said = torch.tensor([[5, 7, 9, 9], [5, 6, 1, 9], [5, 5, 5, 5]])
    assert model.ends(said).tolist() == [[False, True, False, False], [False, False, True, False], [False] * 4]
    prompts = [[5, 6], [8], [9, 9, 9], [4]] * 16
    uniform = sampling.uniforms(0, range(64), 12)

    def one_of_ten(logp, rows, said):
        return torch.full_like(logp, -torch.inf).index_fill(-1, torch.arange(10), -math.log(10))

    for draw in (sampling.sample, fast.decode.sample):
        rollout = draw(model, prompts, uniform, CPU, adjust=one_of_ten)
        assert {answer[-1] for answer, ended in zip(rollout.answers, rollout.ended) if ended} == {1, 7}
        assert not any({1, 7} & set(answer[:-1]) for answer in rollout.answers)
    text = data.decode(tokenizer, [60, 7])
    assert text == data.decode(tokenizer, [60])


def test_steps_of_other_families_are_not_recorded(folders):
    gpu = dataclasses.replace(CPU, device=torch.device("cuda"))
    refused(lambda: fast.decode.captured(load(folders("opt")), PROMPTS, sampling.uniforms(0, range(4), 3), gpu),
            "--decoder=captured", "GPT-2 alone")


def test_gpt2_by_this_road_is_model_py(tmp_path):
    gpt = random_gpt(vocab_size=50, n_positions=40, eos_token_id=1)
    save(gpt, tmp_path)
    whole = theirs(str(tmp_path))
    config = causal.FamilyConfig("x", "gpt2", 2, 2, 8, 50, 40, (1,), 0)
    family, tokens = causal.Family(whole, config).eval(), torch.randint(2, 50, (3, 9))
    starts = torch.tensor([0, 2, 5])
    with torch.no_grad():
        for given in ((tokens,), (tokens, starts)):
            seen = torch.arange(9) >= (starts if len(given) == 2 else torch.zeros(3))[:, None]
            torch.testing.assert_close(family(*given)[seen], gpt(*given)[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "opt, narrow"])
def test_a_saved_model_opens_again_here_and_there(kind, folders, tmp_path):
    model, tokenizer = load(folders(kind)), data.load_tokenizer(folders(kind))
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    save(model, tmp_path / "x")
    data.save_tokenizer(tokenizer, tmp_path / "x")
    assert not [path for path in (tmp_path / "x").iterdir() if path.is_dir()]
    tokens = torch.randint(2, V, (2, 9))
    again, whole = load(str(tmp_path / "x")), theirs(str(tmp_path / "x"))
    with torch.no_grad():
        want = model.logits(model(tokens))
        torch.testing.assert_close(again.logits(again(tokens)), want)
        torch.testing.assert_close(whole(tokens).logits[..., :V], want, atol=1e-4, rtol=1e-4)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    assert read("a </s> b", add_special_tokens=False)["input_ids"] == tokenizer.whole(
        "a </s> b", add_special_tokens=False)["input_ids"]
    data.same_vocabulary(tokenizer, data.load_tokenizer(str(tmp_path / "x")))


def test_text_never_becomes_a_special_token_and_prompts_have_the_begin_token(folders):
    tokenizer = data.load_tokenizer(folders("llama"))
    assert (tokenizer.n_vocab, tokenizer.eot_token, tokenizer.begin) == (V, 1, [0])
    tokens, = data.encode(tokenizer, ["a </s> <s>"])
    assert not {0, 1} & set(tokens) and data.decode(tokenizer, [*tokens, 1]) == "a </s> <s>"
    row = data.Row("Tell </s>")
    prompt, = data.prompts_of(tokenizer, [row])
    assert prompt[0] == 0 and not {0, 1} & set(prompt[1:])
    assert data.decode(tokenizer, prompt[1:]) == row.prompt_text
    assert texts.as_sampled(tokenizer, tokens, "a </s> <s>") == tokens
    assert texts.as_sampled(tokenizer, [*tokens, 1], "a </s> <s>") is None


def test_what_cannot_be_read_is_refused_in_one_line(folders, its_tokenizer, tmp_path, monkeypatch):
    def folder(name: str, model=None, config=None, tokenizer=True) -> str:
        path = tmp_path / name
        if model is None:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for p in model.parameters():
                p.data = torch.randn_like(p)
        model.save_pretrained(path)
        if tokenizer:
            its_tokenizer.save_pretrained(path)
        return str(path)

    t = transformers
    for name, shape in (("gemma2", t.Gemma2Config(**GROUPED, head_dim=8, layer_types=["full_attention"] * 2)),
                        ("granite", t.GraniteConfig(**GROUPED, logits_scaling=4.0)), ("phi", t.PhiConfig(**SHAPE))):
        path = folder(name, config=shape)
        refused(lambda path=path: load(path), f"type {name}")
    path = folder("mistral", config=t.MistralConfig(**GROUPED, sliding_window=64))
    refused(lambda: read_config(path), "type mistral", "window of 64")
    mamba = dict(hidden_size=32, num_hidden_layers=2, vocab_size=V, state_size=4, expand=1)
    path = folder("mamba", config=t.MambaConfig(**mamba))
    refused(lambda: read_config(path), "type mamba")
    t5 = t.T5ForConditionalGeneration(t.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=V))
    path = folder("t5", t5)
    refused(lambda: read_config(path), "type t5", "encoder")
    path = folder("bare", config=KINDS["llama"](t), tokenizer=False)
    refused(lambda: data.load_tokenizer(path), "tokenizer")
    path = folder("few", config=t.LlamaConfig(**GROUPED | dict(vocab_size=200)))
    refused(lambda: read_config(path), "200", str(V))
    path = folder("quantised", config=KINDS["llama"](t))
    raw = json.loads((tmp_path / "quantised" / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(raw))
    refused(lambda: read_config(path), "quantised")
    path = folder("unknown", config=KINDS["llama"](t))
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "nobody-has-it"}')
    refused(lambda: read_config(path), "nobody-has-it")
    monkeypatch.setitem(sys.modules, "transformers", None)
    path = folders("opt")
    refused(lambda: tokens.transformers_config(path), "pip install", "transformers>=4.56")


def test_a_chat_template_is_the_models_own(folders):
    tokenizer = data.load_tokenizer(folders("llama"), "chat")
    rows = [data.Row("Tell <s>"), data.Row("Add", "3 and 4")]
    prompts = data.prompts_of(tokenizer, rows)
    for prompt, said in zip(prompts, ("Tell <s>", "Add\n\n3 and 4")):
        assert prompt[0] == 0 and not {0, 1} & set(prompt[1:])  # what a user writes is no special token
        assert data.decode(tokenizer, prompt) == f"<s>[user]{said}[assistant]"
    path = plain(folders)
    refused(lambda: data.load_tokenizer(path, "chat"), "no chat template")


def test_a_model_is_asked_as_it_was_trained(folders, tmp_path):
    tokenizer = data.load_tokenizer(folders("llama"), "chat")
    save(load(folders("llama")), tmp_path / "x")
    data.save_tokenizer(tokenizer, tmp_path / "x")
    again = data.load_tokenizer(str(tmp_path / "x"))
    assert again.template == "chat" and data.load_tokenizer(str(tmp_path / "x"), "paper").template == "paper"
    paper = data.load_tokenizer(folders("llama"))
    assert paper.template == "paper"
    data.same_vocabulary(again, tokenizer)
    refused(lambda: data.same_vocabulary(again, paper), "chat template", "paper one", "--template")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "x")("a")["input_ids"] == again.whole("a")["input_ids"]


def plain(folders) -> str:
    """A model whose tokenizer has no chat template."""
    folder = Path(folders("opt", 2))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_large_vocabulary_is_kept_in_four_bytes(folders, tmp_path, monkeypatch):
    tokenizer = copy.copy(data.load_tokenizer(folders("llama")))
    (tmp_path / "x.txt").write_text("some words\n<|endoftext|>\nand more\n")
    small = data.load_corpus(str(tmp_path / "x.txt"), tokenizer, tmp_path / "a", CPU)
    tokenizer.n_vocab = 2**16 + 1
    large = data.load_corpus(str(tmp_path / "x.txt"), tokenizer, tmp_path / "b", CPU)
    assert (small.dtype.itemsize, large.dtype.itemsize) == (2, 4) and small.tolist() == large.tolist()
    assert small.tolist().count(1) == 2


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_run_from_first_to_last_and_gone_on_with(kind, folders, few_rows, tmp_path, capsys):
    """Phase 1, SFT, KD, SeqKD, phase 2 and the table; a run that is made longer ends with the bits of a long one."""
    few = dict(preset="tiny", teacher=folders(kind, 1), student=folders(kind), finetune="none", data="tiny",
               corpus="tiny-text", max_prompt_tokens=110, max_tokens=155, rollouts=8, minibatch=4, inner_epochs=1,
               micro_batch=4, sample_batch=8, eval_every=2, pt_coef=0.5, lr=1e-3, device="cpu", dtype="float32")
    cfg = make(distill.Config, few | dict(steps=4, out=str(tmp_path / "whole"), baselines="sft,kd,seqkd"),
               distill.presets)
    table = distill.main(cfg)
    assert [row["method"] for row in table] == ["teacher", "init", "sft", "kd", "seqkd", "minillm"]
    printed = capsys.readouterr().out
    assert "is taken as it is" in printed
    for steps, resume in ((2, False), (4, True)):
        distill.main(make(distill.Config, few | dict(steps=steps, out=str(tmp_path / "parts"), baselines="",
                                                     resume=resume), distill.presets))
    weights = [(tmp_path / name / "minillm" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


# ---- --shard --------------------------------------------------------------------------------------------------------

def a_process(script: str, rank: int, world: int, meet: str, argv: list[str]) -> None:
    """The command, as one of so many processes: what torchrun starts, but for the imports and a free port."""
    module = importlib.import_module(script)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    sys.argv[:] = [f"{script}.py", *argv]
    join = torch.distributed.init_process_group
    config.dist.init_process_group = partial(join, init_method=f"file://{meet}", rank=rank, world_size=world)
    config.run(module.main, module.Config, module.presets)


def launched(script: str, count: int, meet: Path, **settings) -> list[int]:
    fork = multiprocessing.get_context("fork")
    argv = [f"--{name}={value}" for name, value in settings.items()]
    processes = [fork.Process(target=a_process, args=(script, rank, count, str(meet), argv), daemon=True)
                 for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def alike(one: Path, other: Path) -> None:
    """The same losses and gradients in each update, and the same weights at the end, up to rounding."""
    logs = [[json.loads(line) for line in open(folder / "log.jsonl")] for folder in (one, other)]
    for a, b in zip(*logs, strict=True):
        for name in ("loss", "loss_single", "loss_long", "loss_pt", "grad_norm"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()  # AdamW makes whole steps of rounding where a gradient is 0, as of a bias of keys
    apart, size = (sum(t.square().sum() for t in tensors) for tensors in ([a[n] - b[n] for n in a], a.values()))
    assert apart < 1e-8 * size


@pytest.mark.parametrize("kind", ["llama, tied", "opt", "gpt2"])
def test_a_sharded_run_is_the_unsharded_one(kind, folders, few_rows, tiny_models, tmp_path, monkeypatch):
    """On two processes of gloo, recomputing, and gone on with by four: phase 2, and a supervised stage."""
    monkeypatch.setattr(stages.evaluation, "Config", partial(stages.evaluation.Config, seeds=1))
    teacher, student = (folders(kind, 1), folders(kind)) if kind != "gpt2" else (
        tiny_models["teacher"], tiny_models["student"])
    limits = (110, 155) if kind != "gpt2" else (16, 44)
    common = dict(data="tiny", max_prompt_tokens=limits[0], max_tokens=limits[1], micro_batch=1, sample_batch=8,
                  lr=1e-3, device="cpu", dtype="float32", recompute=True)
    few = common | dict(preset="tiny", teacher=teacher, student=student, finetune="none", baselines="", rollouts=8,
                        minibatch=4, inner_epochs=1, eval_every=2, pt_coef=0.5, plan="off")
    run = lambda name, count, **more: launched("distill", count, tmp_path / f"meet-{name}-{len(more)}-{more}"[:200],
                                               **few | more | dict(out=tmp_path / name))
    assert run("one", 1, steps=4) == [0]
    assert run("two", 2, steps=2, shard=True) == [0, 0]
    assert run("two", 4, steps=4, shard=True, resume=True) == [0] * 4
    alike(tmp_path / "one" / "minillm", tmp_path / "two" / "minillm")
    few = common | dict(model=student, batch_size=4, updates=3, evals=1, weight_decay=0.1, dropout=0.0)
    for name, count, more in (("sft-1", 1, {}), ("sft-2", 2, {"shard": True})):
        more |= dict(out=tmp_path / name)
        assert launched("teacher", count, tmp_path / f"meet-{name}", **few | more) == [0] * count
    alike(tmp_path / "sft-1", tmp_path / "sft-2")
    assert run("two", 1, steps=4, resume=True) == [2]  # a sharded run goes on sharded


def part_of(rank: int, meet: str, folder: str, held: multiprocessing.Queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    m = dataclasses.replace(CPU, rank=rank, world=2)
    cfg = SimpleNamespace(shard=True, minibatch=4, compile=False, decoder="fast")
    model, untouched = families.split(load(folder), cfg, m), load(folder)
    count = sum(p.to_local().numel() if hasattr(p, "full_tensor") else p.numel() for p in model.parameters())
    layers = sum(p.numel() for layer in untouched.layers() for p in layer.parameters())
    same = all(torch.equal(a, b) for a, b in zip(families.gathered(model, torch.float32).parameters(),
                                                   untouched.parameters()))
    held.put((count, sum(p.numel() for p in untouched.parameters()) - layers // 2, same))


def test_each_process_holds_a_part_of_the_layers(folders, tmp_path):
    fork = multiprocessing.get_context("fork")
    held, folder = fork.Queue(), folders("llama")
    for rank in range(2):
        fork.Process(target=part_of, args=(rank, str(tmp_path / "meet"), folder, held), daemon=True).start()
    for count, want, same in (held.get(timeout=60), held.get(timeout=60)):
        assert count == want and same


def test_what_shard_cannot_do_is_told(folders, monkeypatch):
    model, two = load(folders("llama")), dataclasses.replace(CPU, world=2)
    given = lambda **more: SimpleNamespace(**dict(shard=True, minibatch=4, compile=False, decoder="fast") | more)
    refused(lambda: families.split(model, given(), CPU), "--shard", "torchrun")
    refused(lambda: families.split(model, given(minibatch=5), two), "--shard", "5 answers", "2 processes")
    for more in (dict(compile=True), dict(decoder="plain")):
        refused(lambda more=more: families.split(model, given(**more), two), "--compile", "--decoder=plain")
    monkeypatch.delitem(sys.modules, "families.sharded", raising=False)
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", None)  # as in an older torch
    refused(lambda: families.split(model, given(), two), "--shard needs torch 2.6")


# ---- what would pass in silence -------------------------------------------------------------------------------------

@pytest.fixture
def changed(folders, tmp_path):
    """changed(tensors=..., config=..., tokenizer=..., kind=...) -> a copy of a model's folder with these changes."""
    count = [0]

    def change(tensors=None, config=None, tokenizer=None, generation=None, kind="llama") -> str:
        count[0] += 1
        folder = tmp_path / f"changed-{count[0]}"
        shutil.copytree(folders(kind), folder)
        if tensors:
            weights = tensors(load_file(folder / "model.safetensors"))
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        for name, more in (("config.json", config), ("tokenizer_config.json", tokenizer),
                           ("generation_config.json", generation)):
            if more is not None:
                path = folder / name
                old = json.loads(path.read_text()) if path.exists() else {}
                path.write_text(json.dumps(old | more))
        return str(folder)

    return change


def without(name: str):
    return lambda weights: {key: value for key, value in weights.items() if name not in key}


@pytest.mark.parametrize("tensors, config, told", [
    (without("layers.1.mlp.up_proj"), None, ["lack", "layers.1.mlp.up_proj"]),
    (None, {"num_hidden_layers": 3}, ["lack", "layers.2."]),
    (None, {"num_hidden_layers": 1}, ["have besides", "layers.1."]),
    (None, {"intermediate_size": 40}, []),
    (lambda weights: {f"x.{key}": value for key, value in weights.items()}, None, ["lack"]),
    (lambda weights: {key: value * float("nan") for key, value in weights.items()}, None, ["not numbers"]),
    (None, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["length of a text"]),
    (None, {"hidden_act": "nobody-has-it"}, ["cannot be opened by transformers"]),
    (None, {"num_attention_heads": 0}, ["cannot be opened by transformers"]),
    (None, {"hidden_size": "x"}, ["cannot be opened by transformers"]),
    (None, {"vocab_size": -3}, ["cannot be opened by transformers"])])
def test_weights_that_do_not_fit_are_named(tensors, config, told, changed):
    path = changed(tensors, config)
    refused(lambda: load(path), path, *told)


def test_a_damaged_file_ends_in_one_line(changed):
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    for content, told in ((pointer, "Git LFS"), (b"\x00" * 50, "SafetensorError")):
        path = Path(changed())
        (path / "model.safetensors").write_bytes(content)
        refused(lambda path=path: load(str(path)), str(path), told)


def test_a_bias_of_the_output_is_not_lost_in_a_coarse_dtype(folders, its_tokenizer, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.PhiConfig(**SHAPE))
    torch.nn.init.normal_(model.lm_head.bias, std=1e-3)
    model.save_pretrained(tmp_path)
    its_tokenizer.save_pretrained(tmp_path)
    refused(lambda: load(str(tmp_path), "cpu", torch.bfloat16), "type phi", "a bias")


def test_the_models_own_code_is_never_run(changed):
    path = Path(changed(config={"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}))
    (path / "code.py").write_text("raise SystemExit('it has run')")
    refused(lambda: load(str(path)), "cannot be opened by transformers")


def test_an_end_token_behind_the_others_is_a_token(folders, changed):
    path = Path(changed())
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["added_tokens"].append({"id": 310, "content": "<end>", "special": True, "single_word": False, "lstrip": False,
                                "rstrip": False, "normalized": False})
    (path / "tokenizer.json").write_text(json.dumps(raw))
    config = json.loads((path / "tokenizer_config.json").read_text()) | {"eos_token": "<end>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = data.load_tokenizer(str(path))
    assert (tokenizer.eot_token, tokenizer.n_vocab) == (tokenizer.whole.convert_tokens_to_ids("<end>"), len(
        tokenizer.whole)) or tokenizer.n_vocab > tokenizer.eot_token
    assert load(str(path)).head().size(0) > tokenizer.eot_token
    data.save_tokenizer(tokenizer, path / "saved")
    shutil.copy(path / "config.json", path / "saved" / "config.json")
    again = data.load_tokenizer(str(path / "saved"))
    assert (again.eot_token, again.n_vocab) == (tokenizer.eot_token, tokenizer.n_vocab)


def test_teacher_and_student_end_and_are_asked_alike(folders, changed):
    one = data.load_tokenizer(folders("llama"))
    other = data.load_tokenizer(changed(tokenizer={"eos_token": "<s>"}))
    refused(lambda: data.same_vocabulary(one, other), "'</s>'", "'<s>'", "eos_token")
    path = Path(changed())
    (path / "chat_template.jinja").write_text("<s>{% for m in messages %}{{ m['content'] }}{% endfor %}!")
    chats = data.load_tokenizer(folders("llama"), "chat"), data.load_tokenizer(str(path), "chat")
    refused(lambda: data.same_vocabulary(*chats), "different begin tokens or chat templates")


def test_a_chat_prompt_is_what_transformers_makes_of_it(folders, changed):
    """Also where a template changes the words, or the tokenizer merges them with what stands beside."""
    path = Path(changed())
    (path / "chat_template.jinja").write_text(
        "<s>{% for m in messages %}User: {{ m['content']|trim }}{% endfor %}"
        "{% if add_generation_prompt %} Bot:{% endif %}")
    for folder in (folders("llama"), str(path)):
        tokenizer = data.load_tokenizer(folder, "chat")
        for said in ("Tell me", "  padded  ", "a\n\nb"):
            want = tokenizer.whole.apply_chat_template([{"role": "user", "content": said}], tokenize=True,
                                                       add_generation_prompt=True, return_dict=False)
            assert data.prompts_of(tokenizer, [data.Row(said)]) == [want]
    prompt, = data.prompts_of(tokenizer, [data.Row("say </s> now")])
    assert prompt.count(0) == 1 and 1 not in prompt
    for template in ("{{ 1 / 0 }}", "{{ messages[0]['content'][0]['text'] }}", "{% if %}", "nothing of it"):
        (path / "chat_template.jinja").write_text(template)
        tokens.load_tokenizer.cache_clear()
        refused(lambda: data.load_tokenizer(str(path), "chat"), "chat template")


def test_dropout_is_set_where_a_family_has_it(folders, changed):
    model = load(changed(config={"attention_dropout": 0.5})).train()
    tokens = torch.randint(2, V, (2, 9))
    model.set_dropout(0.0)
    assert torch.equal(model(tokens), model(tokens))
    model.set_dropout(0.5)
    assert not torch.equal(model(tokens), model(tokens))
    opt = load(folders("opt")).train()
    opt.set_dropout(0.0)
    assert torch.equal(opt(tokens), opt(tokens))


def test_norms_and_embeddings_are_read_as_they_are(changed):
    path = changed(lambda weights: {key: value * 1.001 for key, value in weights.items()})
    exact, light = load(path), load(path, "cpu", torch.bfloat16)
    for (name, a), b in zip(exact.named_parameters(), light.parameters()):
        matrix = a.dim() > 1 and "embed" not in name and "lm_head" not in name
        assert b.dtype == (torch.bfloat16 if matrix else torch.float32), name
        assert torch.equal(a.to(b.dtype), b), name


def test_what_a_compiled_model_says_is_not_compiled(folders):
    model = load(folders("llama"))
    model.compile(dynamic=True)
    assert model._compiled_call_impl is not None
    assert fast.decode.frozen(model, torch.float32)._compiled_call_impl is None


def test_a_corpus_is_tokenised_once_by_all_processes_alike(folders, tmp_path):
    """Its file has one name in every process, and another one for another end token."""
    script = ("import sys; sys.path.insert(0, sys.argv[1]); import data, torch; from config import Machine; "
              "from pathlib import Path; data.load_corpus(sys.argv[3], data.load_tokenizer(sys.argv[2]), "
              "Path(sys.argv[4]), Machine(torch.device('cpu'), torch.float32))")
    (tmp_path / "x.txt").write_text("some words")
    root = str(Path(data.__file__).parent)
    for seed in "12":
        subprocess.run([sys.executable, "-c", script, root, folders("llama"), tmp_path / "x.txt", tmp_path / "c"],
                       check=True, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True)
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_results_know_the_template_they_were_made_with(changed):
    path = Path(changed())
    before = runs.checksum(str(path))
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert runs.checksum(str(path)) != before


def test_a_run_of_an_earlier_version_is_kept(tiny_models, tmp_path):
    """Its run.json knows neither --template nor --shard, which are as if they had not been given."""
    cfg = supervised.Config(model=tiny_models["student"], data="tiny", out=str(tmp_path), max_prompt_tokens=16)
    for name in ("results.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    old = {name: value for name, value in runs.made_with(cfg).items() if name not in ("template", "shard")}
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert runs.is_finished(tmp_path, cfg, supervised.FREE)
    other = dataclasses.replace(cfg, template="chat")
    refused(lambda: runs.is_finished(tmp_path, other, supervised.FREE), "template=auto", "chat")
