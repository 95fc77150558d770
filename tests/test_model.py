"""GPT-2 against `transformers`, against itself with cache and padding, and against files in every form in use."""

import argparse
import errno
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import random_gpt, refused
from safetensors import safe_open
from safetensors.torch import save_file

import model
from config import Machine, UserError
from model import GPTConfig, KVCache, causal_mask, load, new, save
from safe import hub

CPU = torch.device("cpu")


def their_gpt(folder=None, **shape):
    """A GPT-2 of transformers with random biases and layer-norm gains: a loader that swaps two cannot pass."""
    transformers = pytest.importorskip("transformers")
    ends = dict(bos_token_id=30, eos_token_id=30)
    shape = dict(n_layer=2, n_head=2, n_embd=12, vocab_size=31, n_positions=24) | ends | shape
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    for p in theirs.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    if folder is not None:
        theirs.save_pretrained(folder)
    return theirs


def tokens_for(config, rows=2, length=9):
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(gpt, tokens, **more):
    return gpt.logits(gpt(tokens, **more))


# ---- the forward pass -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [
    dict(n_layer=2, n_head=12, n_embd=768, n_positions=1024),  # gpt2, 2 of 12 layers
    dict(n_layer=1, n_head=25, n_embd=1600),  # gpt2-xl, 1 of 48
    dict(n_layer=12, n_head=3, n_embd=15, vocab_size=7, n_positions=11),
    dict(n_layer=1, n_head=1, n_embd=8, layer_norm_epsilon=0.1),
], ids=["gpt2", "xl", "deep", "epsilon"])
def test_logits_equal_transformers(shape, tmp_path):
    theirs = their_gpt(tmp_path, **shape)
    ours = load(str(tmp_path))
    tokens = tokens_for(ours.config)
    with torch.no_grad():
        assert (logits(ours, tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert ours.config.parameters == sum(p.numel() for p in ours.parameters())


def test_cached_equals_uncached():
    gpt = random_gpt()
    tokens, cache = tokens_for(gpt.config, length=12), KVCache(gpt.config, 2, 12, CPU, torch.float32)
    parts = [logits(gpt, part, cache=cache) for part in tokens.split([5, 1, 1, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(gpt, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cached", [False, True])
def test_a_padded_row_equals_the_same_row_alone(cached):
    """Whatever lies in the padding, left or right, and whoever shares the batch."""
    gpt = random_gpt()
    rows = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    width, starts = 4, torch.tensor([0, 2, 1])
    left = torch.tensor([[9] * (width - len(r)) + r for r in rows])
    cache = KVCache(gpt.config, 3, 6, CPU, torch.float32) if cached else None
    got = logits(gpt, left, starts=starts, cache=cache)
    assert got.isfinite().all()
    if cached:  # rows go on, and one leaves
        more = torch.tensor([[3], [4], [5]])
        got = torch.cat([got, logits(gpt, more, starts=starts, cache=cache)], 1)
        cache.keep(torch.tensor([0, 2]))
        last = logits(gpt, torch.tensor([[6], [7]]), starts=starts[[0, 2]], cache=cache)
        torch.testing.assert_close(last[1, 0], logits(gpt, torch.tensor([[7, 8, 9, 5, 7]]))[0, -1], atol=1e-5, rtol=0)
        rows = [r + more[i].tolist() for i, r in enumerate(rows)]
    for i, r in enumerate(rows):
        torch.testing.assert_close(got[i, starts[i] :], logits(gpt, torch.tensor([r]))[0], atol=1e-5, rtol=0)
    right = torch.tensor([r + [9] * (width + cached - len(r)) for r in rows])
    for i, r in enumerate(rows):
        alone = logits(gpt, torch.tensor([r]))[0]
        torch.testing.assert_close(logits(gpt, right)[i, : len(r)], alone, atol=1e-5, rtol=0)


def test_the_cache_holds_what_was_fed_and_drops_rows_in_place():
    cache = KVCache(random_gpt().config, 3, 6, CPU, torch.bfloat16)
    assert [kv.shape for kv in cache.layers] == [(2, 3, 2, 6, 4)] * 2
    assert cache.layers[0].dtype == torch.float32  # on a CPU, whatever autocast computes in
    fed = torch.arange(2 * 3 * 2 * 3 * 4.0).view(2, 3, 2, 3, 4)
    for first, last in ((0, 2), (2, 3)):
        T = last - first
        assert cache.positions(T).tolist() == list(range(first, last)) and cache.columns(T) == last
        for layer in range(2):
            held = cache.extend(layer, *(fed[:, :, :, first:last] + layer))
            assert torch.equal(torch.stack(held), fed[:, :, :, :last] + layer)
        assert cache.length == first  # both layers write in the same place
        cache.advance(T)
    places = [kv.data_ptr() for kv in cache.layers]
    cache.keep(torch.tensor([0, 2]))
    held = cache.extend(1, *(fed[:, [0, 2], :, :1] - 1))
    assert torch.equal(torch.stack(held), torch.cat([fed[:, [0, 2]] + 1, fed[:, [0, 2], :, :1] - 1], 3))
    assert [kv.data_ptr() for kv in cache.layers] == places and cache.length == 3


def test_a_token_sees_itself_and_what_is_before_it_but_for_padding():
    seen = lambda mask: (mask == 0).int().tolist()
    assert seen(causal_mask(torch.tensor([1, 2]), 4, None)) == [[1, 1, 0, 0], [1, 1, 1, 0]]
    mask = causal_mask(torch.tensor([0, 2]), 3, torch.tensor([0, 1]))
    assert seen(mask) == [[[[1, 0, 0], [1, 1, 1]]], [[[1, 0, 0], [0, 1, 1]]]]  # padding sees itself
    assert set(mask.flatten().tolist()) == {0.0, -torch.inf}


def test_too_many_tokens_are_refused():
    gpt = random_gpt()
    refused(lambda: logits(gpt, torch.zeros(1, 33, dtype=torch.long)), "33 tokens", "32 positions")
    cache = KVCache(gpt.config, 1, 40, CPU, torch.float32)
    logits(gpt, torch.zeros(1, 30, dtype=torch.long), cache=cache)
    refused(lambda: logits(gpt, torch.zeros(1, 3, dtype=torch.long), cache=cache), "33 tokens", "32 positions")


@pytest.mark.parametrize("names", [["embd_pdrop"], ["attn_pdrop"], ["resid_pdrop"],
                                   ["embd_pdrop", "attn_pdrop", "resid_pdrop"]], ids="-".join)
def test_each_dropout_of_a_config_acts_where_transformers_has_it(names, tmp_path):
    """The same draws drop the same activations while training, and none in evaluation."""
    none = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    theirs = their_gpt(tmp_path, **none | {name: 0.1 * (n + 2) for n, name in enumerate(names)})
    ours = load(str(tmp_path))
    tokens = tokens_for(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
        torch.manual_seed(3)
        want = theirs.train()(tokens).logits
        torch.manual_seed(3)
        got = logits(ours.train(), tokens)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (got - logits(ours.eval(), tokens)).abs().max() > 1e-3
    ours.set_dropout(0.0)
    torch.testing.assert_close(logits(ours.train(), tokens), logits(ours.eval(), tokens), atol=1e-5, rtol=0)


def test_the_dropouts_of_a_config_are_read_kept_and_set(tmp_path):
    dropouts = lambda gpt: [gpt.drop.p, *(x for h in gpt.h for x in (h.attn.dropout.p, h.dropout.p))]
    save(random_gpt(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3), tmp_path / "a")
    save(load(str(tmp_path / "a")), tmp_path / "b")
    gpt = load(str(tmp_path / "b"))
    assert dropouts(gpt) == [0.1, 0.2, 0.3, 0.2, 0.3]
    gpt.set_dropout(0.4)
    assert dropouts(gpt) == [0.4] * 5


def test_under_autocast_the_head_is_less_its_mean_row():
    """And its gradient is the output's: the mean is a constant, which softmax does not notice."""
    gpt = random_gpt(vocab_size=5000)
    assert gpt.head() is gpt.wte.weight
    with torch.autocast("cpu", torch.bfloat16):
        head = gpt.head()
    weight = gpt.wte.weight.detach()
    assert torch.equal(head.detach(), (weight - weight.mean(0)).bfloat16())
    head.sum().backward()
    assert torch.equal(gpt.wte.weight.grad, torch.ones_like(weight))


def test_recomputed_layers_change_nothing_and_are_not_kept():
    """Values and gradients in float64, dropout's draws included; and how many tensors wait for the backward pass."""
    dropouts = dict(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.2)
    gpt, kept = random_gpt(n_layer=4, **dropouts).double().train(), []
    results, counts = [], []
    for recompute in (False, True):
        gpt.recompute = recompute
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = gpt.logits(gpt(tokens_for(gpt.config))).log_softmax(-1)[..., 0].sum()
        counts.append(len(kept))
        results.append((loss, *torch.autograd.grad(loss, list(gpt.parameters()))))
        kept.clear()
    for plain, again in zip(*results):
        torch.testing.assert_close(plain, again, atol=1e-12, rtol=0)
    assert counts[1] < counts[0] / 4


def test_logits_far_from_zero_survive_bfloat16():
    """GPT-2's lie near -100, where neighbours in bfloat16 are 0.5 apart; the output embedding is centred before."""
    gpt, m = random_gpt(n_embd=64, vocab_size=200), Machine(CPU, torch.bfloat16)
    gpt.ln_f.bias.data[0] += 100.0
    gpt.wte.weight.data[:, 0] = -1.0
    tokens = tokens_for(gpt.config)
    exact = logits(gpt, tokens)
    assert exact.mean() < -90
    with m.autocast():
        hidden = gpt(tokens).detach()
        ours = gpt.logits(hidden).log_softmax(-1)
        plain = torch.nn.functional.linear(hidden, gpt.wte.weight).float().log_softmax(-1)
    error = lambda got: (got - exact.log_softmax(-1)).abs().mean()
    assert error(ours) < 0.3 * error(plain)


# ---- files ----------------------------------------------------------------------------------------------------------

def released_form(gpt, dtype=torch.float32, prefix=""):
    """The tensors as openai-community/gpt2 has them: linear weights (in, out), no prefix, attention buffers."""
    tensors = {}
    for key, p in gpt.named_parameters():
        p = p.detach().to(dtype)
        tensors[prefix + key] = p.t().contiguous() if key.endswith(model.TRANSPOSED) else p.clone()
    for layer in range(gpt.config.n_layer):
        tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=dtype)
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def write_config(folder, gpt, **more):
    raw = {key: getattr(gpt.config, key) for key in GPTConfig.__dataclass_fields__} | {"model_type": "gpt2"} | more
    (folder / "config.json").write_text(json.dumps(raw))


def write_weights(folder, tensors, kind, shards):
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    write = (lambda part, path: save_file(part, path)) if kind == "safetensors" else torch.save
    if shards == 1:
        return write(tensors, folder / f"{stem}.{suffix}")
    keys, where = list(tensors), {}
    for n in range(shards):
        name = f"{stem}-{n + 1:05d}-of-{shards:05d}.{suffix}"
        write({key: tensors[key] for key in keys[n::shards]}, folder / name)
        where |= dict.fromkeys(keys[n::shards], name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", ["released", "transformers", "float16", "compiled"])
def test_every_form_in_the_wild_loads(kind, shards, form, tmp_path):
    gpt = random_gpt()
    prefix = {"transformers": "transformer.", "compiled": "module._orig_mod.transformer."}.get(form, "")
    tensors = released_form(gpt, torch.float16 if form == "float16" else torch.float32, prefix)
    if prefix:  # older files carry the tied output too
        tensors[prefix.removesuffix("transformer.") + "lm_head.weight"] = gpt.wte.weight.detach().clone()
    write_config(tmp_path, gpt)
    write_weights(tmp_path, tensors, kind, shards)
    loaded, tokens = load(str(tmp_path)), tokens_for(gpt.config)
    assert loaded.wte.weight.dtype == torch.float32 and not loaded.training
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())
    atol = 0.1 if form == "float16" else 0
    torch.testing.assert_close(logits(loaded, tokens), logits(gpt, tokens), rtol=0, atol=atol)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "transformer.", "_orig_mod.transformer.",
                                    "_orig_mod.module.", "module._orig_mod.module.transformer.",
                                    "model.transformer."])
def test_prefixes_of_other_trainers_are_taken_off(prefix, tmp_path):
    gpt = random_gpt()
    write_config(tmp_path, gpt)
    write_weights(tmp_path, released_form(gpt, prefix=prefix), "safetensors", shards=1)
    for one, other in zip(load(str(tmp_path)).parameters(), gpt.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_saved_transformers_opens(tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt = random_gpt(n_head=4)
    save(gpt, tmp_path)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = tokens_for(gpt.config)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens).logits, logits(gpt, tokens), atol=1e-5, rtol=0)
    assert torch.equal(logits(load(str(tmp_path)), tokens), logits(gpt, tokens))
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1 and len([*tmp_path.iterdir()]) == 2  # who can read the one can read the other


def test_weights_that_do_not_fit_are_named(tmp_path):
    gpt = random_gpt()
    good = released_form(gpt)
    write_config(tmp_path, gpt)
    for change, words in [
        (lambda t: t.pop("h.1.ln_2.bias"), ["Missing", "h.1.ln_2.bias"]),
        (lambda t: [t.pop("ln_f.bias"), t.pop("wpe.weight")], ["Missing", "ln_f.bias", "wpe.weight"]),
        (lambda t: t.update({"wpe.weight": torch.zeros(5, 8)}), ["wpe.weight", "[5, 8]", "[32, 8]"]),
        (lambda t: t.update({"h.2.ln_1.bias": torch.zeros(8)}), ["Unexpected", "h.2.ln_1.bias"]),
        (lambda t: t.update({"h.0.mlp.c_fc.weight": torch.zeros(32, 8)}), ["h.0.mlp.c_fc.weight", "[8, 32]"]),
        (lambda t: t.update({"lm_head.weight": torch.zeros(11, 8)}), ["lm_head.weight", "not tied"]),
        (lambda t: t.update({"wte.weight": torch.zeros(11, 8).int()}), ["wte.weight in torch.int32", "floating point"]),
    ]:
        tensors = dict(good)
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        refused(lambda: load(str(tmp_path)), str(tmp_path), *words)


def test_folders_that_hold_no_gpt2(tmp_path):
    here = str(tmp_path)
    refused(lambda: load(here), here, "folder has no config.json")
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        refused(lambda: load(here), "config.json", "not a JSON object")
    write_config(tmp_path, random_gpt(), model_type="llama")
    pytest.importorskip("transformers")
    refused(lambda: load(here), here, "has no tokenizer")
    write_config(tmp_path, random_gpt(), n_head=3)
    refused(lambda: load(here), "width of 8 does not divide into 3 heads")
    write_config(tmp_path, random_gpt(), n_layer="2")
    refused(lambda: load(here), "n_layer must be an integer from 1 to", "'2'")
    write_config(tmp_path, random_gpt())
    refused(lambda: load(here), here, "has neither model.safetensors nor pytorch_model.bin")
    refused(lambda: load("no such thing"), "'no such thing'", "folder", "hub")
    refused(lambda: load(f"{here}/config.json"), f"'{here}/config.json'", "folder")


def test_of_two_files_of_weights_the_one_that_is_read_is_named(tmp_path, capsys):
    save(random_gpt(), tmp_path)
    load(str(tmp_path))
    assert capsys.readouterr().err == ""
    (tmp_path / "pytorch_model.bin").touch()
    load(str(tmp_path))
    assert capsys.readouterr().err == f"{tmp_path} holds model.safetensors and pytorch_model.bin: the first is read\n"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_damaged_files_are_named(kind, tmp_path):
    gpt = random_gpt()
    write_config(tmp_path, gpt)
    write_weights(tmp_path, released_form(gpt), kind, shards=2)
    _, second = sorted(tmp_path.glob(f"*0000*.{kind}"))
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    refused(lambda: load(str(tmp_path)), second.name, "is damaged", "fetch it again")
    second.unlink()
    refused(lambda: load(str(tmp_path)), f"this folder has no {second.name}")


def saved_again(path, change):
    """Casts or changes the tensors of a file as others do, who keep its metadata."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("change, at, atol", [
    (lambda t: t.update({key: tensor.bfloat16() for key, tensor in t.items()}), 0.0, 0.05),
    (lambda t: t.update({key: tensor.half() for key, tensor in t.items()}), 0.0, 0.01),
    (lambda t: t.update({key: tensor.double() for key, tensor in t.items()}), 0.0, 0.0),
    (lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}), 0.0, 0.0),
    (lambda t: t["transformer.wpe.weight"].add_(1.0), 1.0, 1e-6)], ids=["bfloat16", "half", "double", "more", "merged"])
def test_a_file_of_ours_that_others_have_saved_again_is_not_damaged(change, at, atol, tmp_path):
    """The checksum in its metadata is of other bytes."""
    gpt = random_gpt()
    save(gpt, tmp_path)
    saved_again(tmp_path / "model.safetensors", change)
    loaded = load(str(tmp_path))
    torch.testing.assert_close(loaded.wpe.weight, gpt.wpe.weight + at, rtol=0, atol=atol)
    torch.testing.assert_close(loaded.h[1].mlp.c_fc.weight, gpt.h[1].mlp.c_fc.weight, rtol=0, atol=atol)


def test_a_flipped_bit_in_any_tensor_of_ours_is_found(tmp_path):
    save(random_gpt(), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8:begin])
    del table["__metadata__"]
    for place in table.values():
        for at in (place["data_offsets"][0], place["data_offsets"][1] - 1):
            flipped = bytearray(whole)
            flipped[begin + at] ^= 1
            path.write_bytes(flipped)
            refused(lambda: load(str(tmp_path)), "model.safetensors is damaged", "checksum")
    path.write_bytes(whole)
    load(str(tmp_path))


@pytest.mark.parametrize("key", ["model", "module", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "model.transformer."])
def test_weights_in_a_trainer_s_checkpoint_are_read(key, prefix, tmp_path):
    gpt = random_gpt()
    write_config(tmp_path, gpt)
    checkpoint = {"step": 3, "optimizer": {"lr": 0.1}, key: released_form(gpt, prefix=prefix)}
    torch.save(checkpoint, tmp_path / "pytorch_model.bin")
    for one, other in zip(load(str(tmp_path)).parameters(), gpt.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("content, words", [
    ({"epoch": 3, "weights": {"wte.weight": torch.ones(11, 8)}}, ["holds 'epoch' of type int", "state_dict() alone"]),
    ({"model": {"wte.weight": [1.0]}}, ["holds 'wte.weight' of type list"]),
    ({5: torch.ones(3)}, ["holds 5 of type Tensor"]),
    ([torch.ones(3)], ["holds a list, not a table of tensors"]),
    ({"model": {}, "args": argparse.Namespace()}, ["holds argparse.Namespace", "could run code", "state_dict() alone"]),
])
def test_a_checkpoint_of_another_form_is_named_for_what_it_is(content, words, tmp_path):
    write_config(tmp_path, random_gpt())
    torch.save(content, tmp_path / "pytorch_model.bin")
    line = refused(lambda: load(str(tmp_path)), "pytorch_model.bin holds", *words)
    assert "damaged" not in line


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
                                  "config.json"])
def test_a_pointer_of_git_lfs_in_the_place_of_a_file_is_named(name, tmp_path):
    write_config(tmp_path, random_gpt())
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    line = refused(lambda: load(str(tmp_path)), f"{name} is a Git LFS pointer", "`git lfs pull`")
    assert "damaged" not in line
    if name in ("model.safetensors", "pytorch_model.bin"):
        refused(lambda: hub.tensor_names(tmp_path / name), "is a Git LFS pointer")


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_disk_that_cannot_be_read_is_not_a_damaged_file(kind, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    gpt = random_gpt()
    write_config(tmp_path, gpt)
    write_weights(tmp_path, released_form(gpt), kind if kind == "safetensors" else "bin", 1)
    monkeypatch.setattr(hub, f"read_{kind}", fail)
    refused(lambda: load(str(tmp_path)), "cannot be read: Input/output error")


def test_files_of_before_torch_1_6_are_read(tmp_path):
    gpt = random_gpt()
    write_config(tmp_path, gpt)
    torch.save(released_form(gpt), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    tokens = tokens_for(gpt.config)
    assert torch.equal(logits(load(str(tmp_path)), tokens), logits(gpt, tokens))


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "owned", "x"))

    write_config(tmp_path, random_gpt())
    torch.save({"wte.weight": Evil()}, tmp_path / "pytorch_model.bin")
    refused(lambda: load(str(tmp_path)), "pytorch_model.bin")
    assert not (tmp_path / "owned").exists()


def test_a_new_model_is_the_same_for_the_same_seed():
    config = GPTConfig(2, 2, 8, 11, 16, eos_token_id=10)
    first, again, other = new(config, 0), new(config, 0), new(config, 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.wte.weight, other.wte.weight)
    std = {name: p.std().item() for name, p in new(GPTConfig(3, 4, 768, 100, 50), 0).named_parameters()}
    assert abs(std["wte.weight"] - 0.02) < 0.001 and abs(std["h.0.mlp.c_proj.weight"] - 0.02 / 6**0.5) < 0.001


# ---- the hub --------------------------------------------------------------------------------------------------------

class Hub(SimpleHTTPRequestHandler):
    """Serves ROOT/OWNER/NAME/FILE at the hub's addresses, enough for the real client; `gated` names a gated owner."""

    def do_HEAD(self):
        path = Path(self.directory) / self.path.strip("/").replace("/resolve/main/", "/")
        code, error = 404, "EntryNotFound" if path.parent.is_dir() else "RepoNotFound"
        if path.is_file():
            code, error = 200, None
        elif "gated" in self.path:
            code, error = 401, "GatedRepo"
        elif "broken" in self.path:
            code, error = 500, "Broken"
        body = path.read_bytes() if code == 200 else b""
        self.send_response(code)
        for name, value in {"Content-Length": len(body), "ETag": f'"{hash(body)}"', "X-Repo-Commit": "0" * 40}.items():
            self.send_header(name, str(value))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *words):
        pass


def ask_the_hub(names: tuple[str, ...], env: dict[str, str], pipe) -> None:
    """In a process of its own, for the client reads the environment, the user's own settings too, when it is
    imported."""
    for name in list(os.environ):
        if re.match(r"HF_|HUGGING|XDG_CACHE_HOME$|(HTTPS?|ALL)_PROXY$", name, re.IGNORECASE):
            del os.environ[name]
    os.environ.update(env)
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    time.sleep = lambda seconds: None  # the client asks a broken hub again for half a minute
    for name in names:
        try:
            pipe.send(f"{name} {load(name).wte.weight.sum().item()}")
        except UserError as error:
            pipe.send(str(error))


def test_the_hub_its_cache_and_its_failures(tmp_path, monkeypatch):
    """Whatever of the client's settings a user has in the environment; and a local folder that has the name of an
    owner does not hide what that owner has on the hub."""
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "nowhere", "HF_TOKEN": "x", "HF_HOME": "/dev/null",
                        "HTTP_PROXY": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    fork, folder = multiprocessing.get_context("fork"), tmp_path / "hub" / "owner" / "name"
    folder.mkdir(parents=True)
    gpt = random_gpt()
    save(gpt, folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Hub(*a, directory=str(tmp_path / "hub")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
           "HF_HUB_DISABLE_XET": "1"}

    def run(*names, **more):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=ask_the_hub, args=(names, env | more, theirs), daemon=True)
        process.start()
        theirs.close()
        said = [ours.recv() for _ in names if ours.poll(120)]
        process.join(120)
        assert process.exitcode == 0
        return said

    found, gated, absent, broken = run("owner/name", "owner/gated", "owner/absent", "owner/broken")
    assert found == f"owner/name {gpt.wte.weight.sum().item()}"
    assert "owner/gated on the hub is gated" in gated and "hf auth login" in gated
    assert "owner/absent is neither a folder here nor a model on the hub" in absent
    assert "owner/broken: the hub could not be reached for config.json" in broken and "500" in broken
    server.shutdown()
    server.server_close()
    cached, unknown = run("owner/name", "owner/other", HF_HUB_OFFLINE="1")
    assert cached == found and "or its cache if HF_HUB_OFFLINE is set, has no config.json" in unknown
    (unreachable,) = run("owner/other")
    assert "could not be reached for config.json" in unreachable and "HF_ENDPOINT" in unreachable
    (no_address,) = run("owner/other", HF_ENDPOINT="nowhere")
    assert "could not be reached for config.json" in no_address and "HF_ENDPOINT" in no_address
    (tmp_path / "owner" / "name").mkdir()
    (empty,) = run("owner/name")
    assert empty == "owner/name: this folder has no config.json"


def test_a_padded_vocabulary_is_cut_to_gpt2s_tokens(tmp_path):
    """50,304 rows, of which 50,257 are tokens: logits of the tokens are the same, and the rest is gone."""
    padded = random_gpt(vocab_size=50304, eos_token_id=50256)
    save(padded, tmp_path)
    cut, tokens = load(str(tmp_path)), torch.tensor([[1, 50256, 7]])
    assert cut.config.vocab_size == 50257 == len(cut.wte.weight)
    with torch.no_grad():
        torch.testing.assert_close(cut.logits(cut(tokens)), padded.logits(padded(tokens))[..., :50257])


def test_equal_weights_make_equal_files(tmp_path):
    """The header's entries have one order, so that runs can be compared by their files."""
    for n in range(8):
        save(random_gpt(), tmp_path / str(n))
    assert len({(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(8)}) == 1


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("out/nowhere", "out/nowhere/deeper"):
        refused(lambda name=name: load(name), f"'{name}' is neither a folder", "`python distill.py` makes")
