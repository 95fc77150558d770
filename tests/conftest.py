"""What several test files share: one machine, and small random models in folders of their own."""

import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch

import data
import distill
import world
from config import Machine, UserError, make
from model import GPT, GPTConfig, load, new, new_config, save
from safe import runs, texts

collect_ignore = []
asked_for = [word.partition("::")[0] for word in sys.argv if word[:1] != "-"]
if not any(word.endswith("test_gpu.py") for word in asked_for):  # the others fork, which CUDA does not survive
    collect_ignore.append("test_gpu.py")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(1)  # the models are tiny, and a second thread would wait for whatever else runs
CPU = Machine(torch.device("cpu"), torch.float32)


@pytest.fixture
def m() -> Machine:
    return CPU


def random_gpt(seed: int = 0, **shape) -> GPT:
    """A small GPT-2 all of whose weights are random, biases and layer-norm gains too."""
    shape = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=32, eos_token_id=10, embd_pdrop=0.0,
                 attn_pdrop=0.0, resid_pdrop=0.0) | shape
    model, generator = GPT(GPTConfig(**shape)), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=generator) + (1.0 if p.dim() == 1 else 0.0)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, str]:
    """Untrained student and teacher of the built-in world, as folders."""
    tokenizer, folders = data.world_tokenizer(), {}
    for name, shape in (("student", "1x2x8"), ("teacher", "2x2x16")):
        folder = tmp_path_factory.mktemp(name)
        save(new(new_config(shape, tokenizer), seed=len(name)), folder)
        data.save_tokenizer(tokenizer, folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="module")
def few_rows():
    """The built-in world with few of its rows and of its text, which every stage of a run tokenises anew."""
    rows = {split: world.instructions(split)[:few] for split, few in (("train", 800), ("valid", 6), ("test", 12))}
    lines = world.text()[:2000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "instructions", rows.get)
        patch.setattr(world, "text", lambda: lines)
        yield


@pytest.fixture
def distill_config(tiny_models, tmp_path):
    """A function that makes a Config of distill.py for a few updates of the small models."""
    def config(**settings) -> distill.Config:
        small = dict(preset="tiny", **tiny_models, out=str(tmp_path / "run"), baselines="", steps=4, rollouts=16,
                     minibatch=8, inner_epochs=2, eval_every=4, plan="off", device="cpu", pt_coef=0.2)
        return make(distill.Config, small | settings, distill.presets)
    return config


@pytest.fixture
def gpt2():
    """The real vocabulary. Skipped where it cannot be had without network, but never in CI, which has it."""
    if not os.environ.get("CI") and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("set TIKTOKEN_CACHE_DIR to a folder with the GPT-2 vocabulary")
    return data.gpt2_tokenizer()


def in_two_processes(monkeypatch, function) -> None:
    """Calls function(rank) in two forks, as torchrun starts two processes. Both have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ["RANK"] = str(rank)
            code = 1
            try:
                function(rank)
                code = 0
            finally:
                os._exit(code)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file
    return load_file(Path(folder) / "model.safetensors")


def another_vocabulary(folder: Path) -> str:
    """A model with a vocabulary of words of its own, 77 and the end token."""
    tokenizer = texts.word_tokenizer([f" word{n}" for n in range(77)])
    save(random_gpt(vocab_size=78, eos_token_id=77, n_positions=64), folder)
    data.save_tokenizer(tokenizer, folder)
    return str(folder)


def change_weights(folder: str | Path) -> None:
    """Other weights in the place of a folder's."""
    model = load(str(folder))
    model.wte.weight.data[0] += 0.1
    save(model, Path(folder))


def refused(function, *words: str) -> str:
    """Calls function, which must raise a UserError of one line that holds all these words."""
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert re.search(re.escape(word), message), f"{word!r} is missing in: {message}"
    return message


def lines(out: Path) -> list[dict]:
    """The log of a run."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def interrupt_after(monkeypatch, saves: int) -> None:
    """Makes a run end, as if killed, behind its n-th checkpoint."""
    save_state, left = runs.save_state, [saves]

    def save_then_die(*given):
        save_state(*given)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_state", save_then_die)
