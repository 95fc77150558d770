"""GPT-2 against `transformers`, against itself with cache and padding, and against files in every form in use."""

import json
import multiprocessing
import os
import sys
import threading
import time
import weakref
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import random_gpt, refused
from safetensors.torch import save_file

import model
from config import Machine, UserError
from model import (
    GPTConfig,
    KVCache,
    PackedLinear,
    by_chunks,
    frozen,
    learn_by_chunks,
    load,
    new,
    predicting,
    same_vocabulary,
    save,
    trained,
)


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
    tokens, cache = tokens_for(gpt.config, length=12), KVCache(gpt.config, 2, 12, torch.device("cpu"), torch.float32)
    parts = [logits(gpt, part, cache=cache) for part in tokens.split([5, 1, 1, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(gpt, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cached", [False, True])
def test_a_padded_row_equals_the_same_row_alone(cached):
    """Whatever lies in the padding, left or right, and whoever shares the batch."""
    gpt = random_gpt()
    rows = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    width, starts = 4, torch.tensor([0, 2, 1])
    left = torch.tensor([[9] * (width - len(r)) + r for r in rows])
    cache = KVCache(gpt.config, 3, 6, torch.device("cpu"), torch.float32) if cached else None
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


def test_too_many_tokens_are_refused():
    refused(lambda: logits(random_gpt(), torch.zeros(1, 33, dtype=torch.long)), "33 tokens", "32 positions")


def test_the_states_that_predict_a_response():
    hidden = torch.arange(12.0).view(2, 6, 1)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert hidden[predicting([[0] * 2, [0] * 4], mask)].squeeze(1).tolist() == [1, 2, 3, 9]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("where", [predicting([[1], [2, 3, 4]], torch.ones(2, 2).bool()), (slice(None), -1),
                                   (slice(None), slice(2, None))], ids=["predicting", "last", "from"])
def test_only_what_is_read_is_made_in_the_last_layer(where, recompute):
    """The same states, and the same gradients of all weights, in float64."""
    tokens, found = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]]), []
    for states in (lambda model: model(tokens)[where], lambda model: model(tokens, where=where)):
        model, made = random_gpt().double(), []
        model.recompute = recompute
        model.h[-1].ln_2.register_forward_hook(lambda layer, given, x, made=made: made.append(x.numel()))
        hidden = states(model)
        hidden.sin().sum().backward()
        found.append((hidden.detach(), made[0] // 8, [p.grad for p in model.parameters()]))
    (whole, everywhere, grads), (some, read, same) = found
    torch.testing.assert_close((some, same), (whole, grads), atol=1e-12, rtol=0)
    assert everywhere == 10 and read == some.numel() // 8 < 10


@pytest.mark.parametrize("chunk, vocab_size", [(100, 11), (3, 11), ([4, 1, 5], 11), (3, 5000)])
def test_chunks_taken_backward_at_once_change_nothing(chunk, vocab_size):
    """Values and gradients in float64, of the embedding too, also of one that is added up in several pieces, against
    the whole taken backward at the end; and logits are made once for each row."""
    gpt, tokens = random_gpt(vocab_size=vocab_size).double(), torch.arange(10)[None]
    weights, made = torch.arange(10.0, dtype=torch.float64), []

    def terms(head, hidden, weight):
        made.append(len(hidden))
        kl = gpt.logits(hidden, head).log_softmax(-1).exp().square().sum(-1)
        return weight * kl, kl, hidden.sum(-1)

    hidden = gpt(tokens)[0]
    loss, *values = terms(gpt.head(), hidden, weights)
    (loss.sum() / 7).backward()
    want = [p.grad for p in gpt.parameters()]
    gpt.zero_grad()
    made.clear()
    trained(gpt, recompute=False, compile=False)
    got = learn_by_chunks(terms, chunk, lambda loss: (loss / 7).backward(), gpt, gpt(tokens)[0], weights)
    assert sum(made) == 10 and not any(value.requires_grad for value in got)
    for one, other in zip((loss, *values), got, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    for one, p in zip(want, gpt.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, atol=1e-12, rtol=0)
    parts = by_chunks(lambda hidden: terms(gpt.head(), hidden, 1.0), chunk, hidden)
    torch.testing.assert_close(parts[1], values[0], atol=1e-12, rtol=0)


def test_the_head_is_less_its_mean_row_however_many_pieces_it_is_made_in():
    gpt = random_gpt(vocab_size=5000)
    with torch.autocast("cpu", torch.bfloat16):
        head = gpt.head()
    weight = gpt.wte.weight.detach()
    assert torch.equal(head.detach(), (weight - weight.mean(0)).bfloat16())


def test_a_chunk_is_let_go_of_before_the_next_and_before_the_layers():
    """Its head stands for the head's gradient and its graph, which hang together."""
    gpt, heads, alive = random_gpt(n_embd=32), [], []

    def terms(head, hidden):
        alive.append(sum(before() is not None for before in heads))
        heads.append(weakref.ref(head))
        return (gpt.logits(hidden, head)[:, 3],)

    hidden = gpt(torch.arange(10)[None])[0]
    hidden.register_hook(lambda gradient: alive.append(sum(head() is not None for head in heads)))
    learn_by_chunks(terms, 4, lambda loss: loss.backward(), gpt, hidden)
    assert alive == [0, 0, 0, 0]


def test_the_way_back_is_not_under_autocast():
    """What learns by chunks under autocast has the gradients of what is taken backward outside of it."""
    gpt, tokens, grads, under = random_gpt(n_embd=32), torch.arange(10)[None], [], []
    terms = lambda head, hidden: (gpt.logits(hidden, head).log_softmax(-1)[:, 3],)
    note = lambda *of: under.append(torch.is_autocast_enabled("cpu"))
    for learn in (False, True):
        gpt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = gpt(tokens)[0]
            if learn:
                hidden.register_hook(note)
                learn_by_chunks(terms, 4, lambda loss: (note(), loss.backward()), gpt, hidden)
            else:
                loss = terms(gpt.head(), hidden)[0].sum()
        if not learn:
            loss.backward()
        grads.append([p.grad.clone() for p in gpt.parameters()])
    assert under == [False] * 4  # three chunks and what is below them
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)


def test_many_chunks_under_autocast_lose_nothing():
    """The embedding's gradient is as near to float32's as that of one product over all rows. Summed in bfloat16, which
    it was once, they were off by 18%."""
    gpt, grads = trained(random_gpt(n_embd=32, n_positions=512), recompute=False, compile=False), {}
    tokens = torch.arange(512)[None] % gpt.config.vocab_size
    terms = lambda head, hidden: (-gpt.logits(hidden, head).log_softmax(-1)[:, 3],)
    for name, chunk in {"float32": 512, "one": 512, "many": 1}.items():
        gpt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "float32"):
            learn_by_chunks(terms, chunk, lambda loss: loss.backward(), gpt, gpt(tokens)[0])
        grads[name] = gpt.wte.weight.grad
    off = lambda name: (grads[name] - grads["float32"]).norm() / grads["float32"].norm()
    assert off("many") < 1.2 * off("one")


def test_recomputed_layers_change_nothing_and_are_not_kept():
    """Values and gradients in float64, dropout's draws included; and how many tensors wait for the backward pass."""
    gpt, kept = random_gpt(n_layer=4, resid_pdrop=0.2).double().train(), []
    results, counts = [], []
    for recompute in (False, True):
        trained(gpt, recompute, compile=False)
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = gpt.logits(gpt(tokens_for(gpt.config))).log_softmax(-1)[..., 0].sum()
        counts.append(len(kept))
        results.append((loss, *torch.autograd.grad(loss, list(gpt.parameters()))))
        kept.clear()
    for plain, again in zip(*results):
        torch.testing.assert_close(plain, again, atol=1e-12, rtol=0)
    assert counts[1] < counts[0] / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_model_computes_what_autocast_does(dtype):
    gpt, m = random_gpt(), Machine(torch.device("cpu"), dtype)
    copy, tokens = frozen(gpt, dtype), tokens_for(gpt.config)
    with m.autocast(), torch.no_grad():
        assert torch.equal(logits(copy, tokens), logits(gpt, tokens))
    assert copy.wte.weight.data_ptr() == gpt.wte.weight.data_ptr()  # shared, not copied
    assert not any(p.requires_grad for p in copy.parameters())


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_packed_weights_compute_the_same(dtype, atol):
    """Where a CPU's weights are packed, a frozen model's log-probabilities are those of the plain one."""
    config = GPTConfig(2, 4, 256, 300, 32, eos_token_id=299)
    if not PackedLinear.fits(config, torch.device("cpu"), dtype):
        return  # no oneDNN: frozen() leaves the plain weights, and another test has them
    gpt, m = new(config, 0).eval(), Machine(torch.device("cpu"), dtype)
    copy, tokens = frozen(gpt, dtype), tokens_for(config)
    assert isinstance(copy.head(), PackedLinear) and isinstance(copy.h[1].mlp["c_fc"], PackedLinear)
    with m.autocast(), torch.no_grad():
        got, want = logits(copy, tokens).log_softmax(-1), logits(gpt, tokens).log_softmax(-1)
        cache = KVCache(config, len(tokens), tokens.size(1), m.device, dtype)
        steps = [copy.logits(copy(column[:, None], None, cache))[:, 0].log_softmax(-1) for column in tokens.T]
    torch.testing.assert_close(got, want, atol=atol, rtol=0)
    torch.testing.assert_close(torch.stack(steps, 1), want, atol=atol, rtol=0)


def test_logits_far_from_zero_survive_bfloat16():
    """GPT-2's lie near -100, where neighbours in bfloat16 are 0.5 apart; the output embedding is centred before."""
    gpt, m = random_gpt(n_embd=64, vocab_size=200), Machine(torch.device("cpu"), torch.bfloat16)
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
@pytest.mark.parametrize("form", ["released", "transformers", "float16"])
def test_every_form_in_the_wild_loads(kind, shards, form, tmp_path):
    gpt = random_gpt()
    tensors = released_form(gpt, torch.float16 if form == "float16" else torch.float32,
                            "transformer." if form == "transformers" else "")
    if form == "transformers":  # older files carry the tied output too
        tensors["lm_head.weight"] = gpt.wte.weight.detach().clone()
    write_config(tmp_path, gpt)
    write_weights(tmp_path, tensors, kind, shards)
    loaded, tokens = load(str(tmp_path)), tokens_for(gpt.config)
    assert loaded.wte.weight.dtype == torch.float32 and not loaded.training
    atol = 0.1 if form == "float16" else 0
    torch.testing.assert_close(logits(loaded, tokens), logits(gpt, tokens), rtol=0, atol=atol)


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
        (lambda t: t.pop("h.1.ln_2.bias"), ["lack h.1.ln_2.bias"]),
        (lambda t: [t.pop("ln_f.bias"), t.pop("wpe.weight")], ["lack ln_f.bias and 1 more"]),
        (lambda t: t.update({"wpe.weight": torch.zeros(5, 8)}), ["wpe.weight of shape (5, 8)", "(32, 8)"]),
        (lambda t: t.update({"h.2.ln_1.bias": torch.zeros(8)}), ["h.2.ln_1.bias", "no such tensor"]),
        (lambda t: t.update({"lm_head.weight": torch.zeros(11, 8)}), ["not tied"]),
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
    refused(lambda: load(here), "GPT-2", "model_type='llama'")
    write_config(tmp_path, random_gpt(), n_head=3)
    refused(lambda: load(here), "width of 8 does not divide into 3 heads")
    write_config(tmp_path, random_gpt(), n_layer="2")
    refused(lambda: load(here), "n_layer must be an integer from 1 to", "'2'")
    write_config(tmp_path, random_gpt())
    refused(lambda: load(here), "has no model.safetensors or pytorch_model.bin")
    refused(lambda: load("no such thing"), "'no such thing'", "folder", "hub")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_damaged_files_are_named(kind, tmp_path):
    gpt = random_gpt()
    write_config(tmp_path, gpt)
    write_weights(tmp_path, released_form(gpt), kind, shards=2)
    _, second = sorted(tmp_path.glob(f"*0000*.{kind}"))
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    refused(lambda: load(str(tmp_path)), second.name, "damaged or incomplete", "fetch it again")
    second.unlink()
    refused(lambda: load(str(tmp_path)), second.name, "which its index names")


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
    """In a process of its own, for the client reads HF_ENDPOINT when it is imported."""
    os.environ.update(env)
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    time.sleep = lambda seconds: None  # the client asks a broken hub again for half a minute
    for name in names:
        try:
            pipe.send(f"{name} {load(name).wte.weight.sum().item()}")
        except UserError as error:
            pipe.send(str(error))


def test_the_hub_its_cache_and_its_failures(tmp_path):
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
    assert "owner/broken: the hub" in broken and ("500" in broken or "could not be reached" in broken)
    server.shutdown()
    server.server_close()
    cached, unknown = run("owner/name", "owner/other", HF_HUB_OFFLINE="1")
    assert cached == found and "owner/other: this cached copy (HF_HUB_OFFLINE is set) has no config.json" in unknown
    (unreachable,) = run("owner/other")
    assert "could not be reached for config.json" in unreachable and "HF_ENDPOINT" in unreachable


def test_a_padded_vocabulary_is_cut_to_gpt2s_tokens(tmp_path):
    """50,304 rows, of which 50,257 are tokens: logits of the tokens are the same, and the rest is gone."""
    padded = random_gpt(vocab_size=50304, eos_token_id=50256)
    save(padded, tmp_path)
    cut, tokens = load(str(tmp_path)), torch.tensor([[1, 50256, 7]])
    assert cut.config.vocab_size == 50257 == len(cut.wte.weight)
    with torch.no_grad():
        torch.testing.assert_close(cut.logits(cut(tokens)), padded.logits(padded(tokens))[..., :50257])
    same_vocabulary(cut.config, GPTConfig())
    save(random_gpt(vocab_size=50300, eos_token_id=50256), tmp_path)
    refused(lambda: same_vocabulary(load(str(tmp_path)).config, GPTConfig()), "50,300")


def test_equal_weights_make_equal_files(tmp_path):
    """The header's entries have one order, so that runs can be compared by their files."""
    for n in range(8):
        save(random_gpt(), tmp_path / str(n))
    assert len({(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(8)}) == 1


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    refused(lambda: load("out/nowhere"), "'out/nowhere' is neither a folder")
