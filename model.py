"""GPT-2 by hand: the forward pass, its key-value cache, and the released weights read and written.

Paper:    arXiv 2306.08543v4, Section 3.1: teacher and students are GPT-2s of 120M to 1.5B parameters. Their shape is
          that of Radford et al. 2019: pre-norm, tanh GELU, learned positions, output tied to the input embedding.
Run:      python sample.py --model=gpt2 --prompt="Name three colours."         (this file has no command of its own)
Shapes:   B rows, T tokens fed now, S tokens seen so far, D width, H heads, V vocabulary, N positions of several rows.
Left out: other families (OPT and LLaMA add names, not ideas); tensor parallelism; quantised weights.
"""

import contextlib
import hashlib
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import Stopped, UserError, read_json, written_aside


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. Field names are those of config.json on the hub."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    n_positions: int = 1024
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int = 50256
    resid_pdrop: float = 0.1  # dropout of embedding, attention and residual, when training

    def __post_init__(self):
        for name, most in {"n_layer": 10**3, "n_head": 10**3, "n_embd": 10**5, "vocab_size": 10**7,
                           "n_positions": 10**6}.items():
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name} must be an integer from 1 to {most}, not {getattr(self, name)!r}")
        for name in ("layer_norm_epsilon", "resid_pdrop"):
            if type(getattr(self, name)) not in (int, float) or not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be a number from 0 to below 1, not {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise UserError(f"a width of {self.n_embd} does not divide into {self.n_head} heads")

    @property
    def parameters(self) -> int:
        """Number of weights; the embedding is tied, so it counts once."""
        per_layer = 12 * self.n_embd**2 + 13 * self.n_embd
        return (self.vocab_size + self.n_positions + 2) * self.n_embd + self.n_layer * per_layer


class KVCache:
    """Keys and values of every layer, allocated once and written in place; `length` is the number of tokens held. Each
    layer has its own tensor: a GPU that is nearly full may lack a single piece of memory for all. On a CPU they are
    float32 even under autocast: there attention of one token takes five times as long in bfloat16.

    A recorded step cannot depend on numbers that the host counts. With `recorded`, a single token's place is read from
    the tensor `position`, and the first `width` columns are attended to, masked beyond it."""

    def __init__(self, config: GPTConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype,
                 recorded: bool = False):
        head_width, dtype = config.n_embd // config.n_head, torch.float32 if device.type == "cpu" else dtype
        new = torch.zeros if recorded else torch.empty  # what is masked may be anything but NaN
        self.kv = [new(2, batch, config.n_head, length, head_width, device=device, dtype=dtype)
                   for _ in range(config.n_layer)]
        self.length, self.width = 0, length
        self.position = torch.zeros(1, dtype=torch.int64, device=device) if recorded else None

    def extend(self, layer: int, kv: Tensor) -> Tensor:
        """Writes keys and values (2, B, H, T, D/H) behind what is held, and returns all, (2, B, H, S, D/H)."""
        held, end = self.kv[layer], self.length + kv.size(3)
        if self.position is not None and kv.size(3) == 1:
            held.index_copy_(3, self.position, kv.to(held.dtype))
            return held[:, :, :, : self.width]
        held[:, :, :, self.length : end] = kv
        return held[:, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these indices (b,), in place: there may be no room for a second cache."""
        for kv in self.kv:
            kv[:, : len(rows)] = kv[:, rows]
        self.kv = [kv[:, : len(rows)] for kv in self.kv]


class PackedLinear(nn.Module):
    """A linear map for inference on a CPU, a GELU behind it if asked for. Its weights (out, in) are reordered once for
    the few rows of a decoding step, which then takes a third of the time in float32, and two thirds in bfloat16. The
    operations are those that PyTorch's own compiler calls; `fits` says whether they run here."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, gelu: bool = False):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight, 8), bias
        self.then = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, *self.then)

    @staticmethod
    def fits(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> bool:
        wide = config.n_embd >= 256  # below, the call itself costs more
        return wide and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and runs_packed(dtype)


@cache
def runs_packed(dtype: torch.dtype) -> bool:
    """Whether this processor and this PyTorch can run PackedLinear. It is tried: with AVX2 alone the operations exist,
    and fail in bfloat16 once they are called."""
    try:
        PackedLinear(torch.zeros(64, 64, dtype=dtype))(torch.zeros(8, 64))
        return True
    except (RuntimeError, AttributeError):
        return False


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x)). Parts are named as in the released files."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        D, eps = config.n_embd, config.layer_norm_epsilon
        self.n_head, self.dropout = config.n_head, config.resid_pdrop
        self.ln_1, self.ln_2 = nn.LayerNorm(D, eps=eps), nn.LayerNorm(D, eps=eps)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D), "c_proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})
        self.gelu = nn.GELU("tanh")

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int,
                where: tuple | None = None) -> Tensor:
        B, T, D = x.shape
        dropout = self.dropout if self.training else 0.0
        qkv = self.attn["c_attn"](self.ln_1(x)).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # (B, H, T, D/H) each
        if cache is not None:
            k, v = cache.extend(layer, qkv[1:])  # (B, H, S, D/H) each
        wide = cache is not None and x.device.type == "cpu"  # on a GPU a cache is in autocast's own dtype
        with torch.autocast("cpu", enabled=False) if wide else contextlib.nullcontext():
            causal = True if mask is None and T > 1 else False  # a plain bool: torch.compile's T is a symbol
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, mask, dropout, causal)
        y = y.transpose(1, 2).reshape(B, T, D)
        if where is not None:  # only the last layer's output can go unread
            x, y = x[where], y[where]  # (N, D) each
        x = x + F.dropout(self.attn["c_proj"](y), dropout)
        y = self.mlp["c_proj"](self.gelu(self.mlp["c_fc"](self.ln_2(x))))
        return x + F.dropout(y, dropout)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.dropout, self.recompute = config, config.resid_pdrop, False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.frozen_head: Tensor | PackedLinear | None = None

    def forward(self, tokens: Tensor, starts: Tensor | None = None, cache: KVCache | None = None,
                where: tuple | None = None) -> Tensor:
        """The last hidden states, after ln_f: tokens (B, T) int64 -> (B, T, D); `logits` goes on from there. With
        where, an index into (B, T) such as (rows (N,), columns (N,)), only the states there, (N, D), for which alone
        most of the last layer is computed.

        starts (B,) counts the padding at the left of each row. Without it rows begin in column 0, and may be padded at
        their right, which no token before it sees. With a cache, the tokens follow those that it holds."""
        T, past = tokens.size(1), cache.length if cache else 0
        if past + T > self.config.n_positions:
            raise UserError(f"{past + T} tokens do not fit into this model's {self.config.n_positions} positions")
        recorded = cache is not None and cache.position is not None and T == 1
        S = cache.width if recorded else past + T
        columns = torch.arange(-(-S // 8) * 8, device=tokens.device)  # a GPU's attention wants rows of a mask aligned
        positions, mask = cache.position if recorded else columns[past:S], None  # (T,)
        if starts is not None or (past and T > 1) or recorded:
            first = (torch.zeros_like(tokens[:, 0]) if starts is None else starts)[:, None]  # (B, 1)
            query = positions[:, None]
            # padding may see itself: a row of nothing but -inf would become NaN
            mask = (columns <= query) & ((columns >= first[..., None]) | (columns == query))  # (B, T, S)
            positions = (positions - first).clamp(min=0)  # (B, T)
            if cache is not None:  # as attention wants it, made once and not in each layer
                mask = torch.zeros_like(mask, dtype=cache.kv[0].dtype).masked_fill_(~mask, -torch.inf)
            mask = mask[:, None, :, :S]  # (B, 1, T, S)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, D)
        x = F.dropout(x, self.dropout, self.training)
        for layer, block in enumerate(self.h):
            given = x, mask, cache, layer, where if layer == len(self.h) - 1 else None
            if self.recompute and torch.is_grad_enabled():  # the backward pass makes it again, from x
                x = checkpoint(block, *given, use_reentrant=False)
            else:
                x = block(*given)
        if cache is not None:
            cache.length += T
            if cache.position is not None:
                cache.position += T
        return self.ln_f(x)

    def head(self) -> Tensor | PackedLinear:
        """The output embedding (V, D). Under autocast its mean row is subtracted, which softmax does not notice: logits
        of GPT-2 lie near -100, where neighbours in bfloat16 are 0.5 apart, and centred ones near 0. On a GPU it is then
        padded with rows of zeros, which `logits` leaves out."""
        if self.frozen_head is not None:
            return self.frozen_head
        weight, device = self.wte.weight, self.wte.weight.device.type
        if not torch.is_autocast_enabled(device):
            return weight
        mean, dtype = weight.detach().mean(0), torch.get_autocast_dtype(device)
        pieces = [(rows - mean).to(dtype) for rows in weight.split(4096)]  # the whole would be 154 MB in float32
        if device == "cuda":  # tensor cores want rows of logits, 50,257 of them, in whole pieces of 16 bytes
            pieces.append(torch.zeros(-len(weight) % 64, weight.size(1), dtype=dtype, device=weight.device))
        return torch.cat(pieces)

    def logits(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., V) in float32 or wider. A loop over chunks passes a `head()` made once."""
        head = self.head() if head is None else head
        logits = head(hidden) if isinstance(head, PackedLinear) else F.linear(hidden, head)
        logits = logits[..., : self.config.vocab_size]
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def set_dropout(self, dropout: float) -> None:
        for module in (self, *self.h):
            module.dropout = dropout


def predicting(prompts: list[list[int]], response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where in right-padded rows of prompt and response the response tokens are predicted from: rows (N,) and columns
    (N,), row by row. response_mask (B, T)"""
    rows, t = response_mask.nonzero(as_tuple=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=rows.device)
    return rows, lengths[rows] - 1 + t  # the prompt's last token predicts y_1


def by_chunks(function: Callable, chunk: int | list[int], *rows: Tensor) -> tuple[Tensor, ...]:
    """function(*rows), from tensors of N rows to a tuple of tensors (N,), made `chunk` rows at a time, or as many as a
    list says: what arises on the way, such as logits (N, V), takes one chunk's memory."""
    parts = [function(*part) for part in zip(*(r.split(chunk) for r in rows))]
    return tuple(torch.cat(column) for column in zip(*parts))


def learn_by_chunks(function: Callable, chunk: int | list[int], backward: Callable, model: GPT, hidden: Tensor,
                    *rows: Tensor) -> tuple[Tensor, ...]:
    """function(head, hidden, *rows) by chunks, its results without gradients. The first result is the loss: its sum
    over a chunk goes to `backward` at once, so that the model's output embedding, and whatever hidden (N, D) was made
    of, get their gradients while logits are made once and kept for one chunk: 0.2 GB for 1,024 positions of GPT-2's
    vocabulary, where a minibatch of the paper has 3 GB."""
    gradients, parts = [], []
    with torch.no_grad():
        head = model.head()
    for part in reversed(list(zip(*(r.detach().split(chunk) for r in (hidden, *rows))))):  # as autograd would go back
        top, states = head.detach().requires_grad_(), part[0].requires_grad_()
        values = function(top, states, *part[1:])
        with torch.autocast(hidden.device.type, enabled=False):  # autocast is for the way forward
            backward(values[0].sum())
        add_to_gradient(model.wte.weight, top.grad[: len(model.wte.weight)])
        gradients.append(states.grad)
        parts.append([value.detach() for value in values])
        top = values = None  # their graph holds the head and its gradient, 77 MB each
    head = None  # its memory is free for the way back through the layers
    with torch.autocast(hidden.device.type, enabled=False):
        hidden.backward(torch.cat(gradients[::-1]))
    return tuple(torch.cat(column[::-1]) for column in zip(*parts))


def add_to_gradient(p: nn.Parameter, gradient: Tensor) -> None:
    """Adds to p's gradient in p's dtype: a sum of many in bfloat16 would lose what is small."""
    if p.grad is None:
        p.grad = gradient.to(p.dtype)
        return
    for held, more in zip(p.grad.split(4096), gradient.split(4096)):  # a cast copy of the whole would be 154 MB
        held += more


def frozen(model: GPT, dtype: torch.dtype) -> GPT:
    """A copy for inference. Linear maps are held in `dtype`, so that autocast need not cast them at each call, and
    packed on a CPU; all else is shared with the model."""
    with torch.device("meta"):
        copy = GPT(model.config)
    packed = PackedLinear.fits(model.config, model.wte.weight.device, dtype)
    cast = lambda name: name.startswith("h.") and ".ln_" not in name and not packed  # packing casts one by one
    weights = {name: p.detach().to(dtype) if cast(name) else p.detach() for name, p in model.named_parameters()}
    copy.load_state_dict(weights, assign=True)
    if dtype != model.wte.weight.dtype:
        with torch.autocast(model.wte.weight.device.type, dtype):
            copy.frozen_head = model.head().detach()
    if packed:
        copy.frozen_head = PackedLinear(copy.head().detach())
        for block in copy.h:
            for part in (block.attn, block.mlp):
                for name, linear in part.items():
                    part[name] = PackedLinear(linear.weight.detach().to(dtype), linear.bias.detach(), name == "c_fc")
            block.gelu = nn.Identity()  # c_fc ends with it
    return copy.requires_grad_(False).eval()


def trained(model: GPT, recompute: bool, compile: bool) -> GPT:
    """The model, prepared for training. With `recompute` each layer is made again in the backward pass, from its input
    alone: a third more time, little memory. With `compile` it is compiled, for samples of any length.

    On a CPU the input embedding's gradient is sparse, of the rows that were read, instead of 154 MB of mostly zeros.
    It is added to that of the output embedding, which learn_by_chunks makes first."""
    model.recompute = recompute
    model.wte.sparse = not compile and model.wte.weight.device.type == "cpu"
    if compile:
        torch._dynamo.reset()  # versions that an earlier stage compiled count towards its limit of eight
        model.compile(dynamic=True)
    return model


# ---- a new model ----------------------------------------------------------------------------------------------------

def is_shape(name: str) -> bool:
    return re.fullmatch(r"\d+x\d+x\d+", name) is not None


def new_config(shape: str, tokenizer) -> GPTConfig:
    """The shape "LAYERSxHEADSxWIDTH", say "4x4x128", with this tokenizer's vocabulary and no dropout."""
    n_layer, n_head, n_embd = map(int, shape.split("x"))
    return GPTConfig(n_layer, n_head, n_embd, tokenizer.n_vocab, 1024 if tokenizer.n_vocab > 1000 else 64,
                     eos_token_id=tokenizer.eot_token, resid_pdrop=0.0)


def new(config: GPTConfig, seed: int) -> GPT:
    """Random weights, drawn as GPT-2's were, but wider for a narrow model, so that its logits begin no flatter."""
    model, generator = GPT(config), torch.Generator().manual_seed(seed)
    std = 0.02 * math.sqrt(768 / min(config.n_embd, 768))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.dim() == 2:
            residual = name.endswith("c_proj.weight")  # scaled down by the number of residual branches
            nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if residual else std, generator=generator)
    return model


# ---- released weights -----------------------------------------------------------------------------------------------

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored (in, out)
SUPPORTED = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "tie_word_embeddings": (True,), "add_cross_attention": (False,)}


def fetch(name: str, file: str, repo_type: str = "model", revision: str | None = None) -> Path | None:
    """The local path of a file from a folder or a hub repository, by the hub's own client; None if it has no such file.

    Raises UserError, with what to do, if the repository cannot be reached."""
    path = Path(name)
    if path.is_dir():
        return path / file if (path / file).is_file() else None
    local = len(path.parts) > 1 and Path(path.parts[0]).is_dir()  # out/nowhere is no name on the hub
    if local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        made = "; `python distill.py` makes it" if name.startswith("out/tiny") else ""
        raise UserError(f"{name!r} is neither a folder nor a name on the hub (NAME or OWNER/NAME){made}")
    from huggingface_hub import errors, hf_hub_download
    if repo_type == "model" and path.suffix and path.is_file():
        raise UserError(f"{name} is a file: a model is a folder, with config.json and weights, or a name on the hub")
    try:
        return intact(Path(hf_hub_download(name, file, repo_type=repo_type, revision=revision)))
    except errors.GatedRepoError:
        raise UserError(f"{name} on the hub is gated: ask for access on its page, then `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{name} is neither a folder here nor a {repo_type} on the hub (a private one needs "
                        "`hf auth login`)") from None
    except errors.LocalEntryNotFoundError as error:
        if offline():
            return None
        raise UserError(f"{name}: the hub could not be reached for {file} ({type(error.__cause__ or error).__name__}); "
                        "check the network and HF_ENDPOINT, or give a local folder") from None
    except errors.EntryNotFoundError:
        return None
    except errors.HfHubHTTPError as error:
        raise UserError(f"{name}: the hub answered {error.response.status_code} for {file}; try again later, or give a "
                        "local folder") from None
    except (UserError, OSError, Stopped):
        raise
    except Exception as error:  # of the client below huggingface_hub's own: an HF_ENDPOINT that is no address, say
        raise UserError(f"{name}: the hub could not be asked for {file} ({type(error).__name__}); is HF_ENDPOINT, if "
                        "it is set, an address like https://huggingface.co?") from None


@cache
def intact(path: Path) -> Path:
    """The path of a file in the hub's cache, where a large one's name is the SHA-256 of its content.

    Raises UserError if that is not so."""
    sha256, real = hashlib.sha256(), path.resolve()
    if re.fullmatch("[0-9a-f]{64}", real.name):
        with open(real, "rb") as file:
            while piece := file.read(2**20):
                sha256.update(piece)
        if sha256.hexdigest() != real.name:
            raise UserError(f"{path} is damaged: remove {real}, and it is fetched again")
    return path


def offline() -> bool:
    from huggingface_hub import constants
    return constants.HF_HUB_OFFLINE


def missing(name: str, what: str) -> UserError:
    where = "cached copy (HF_HUB_OFFLINE is set)" if offline() else "hub repository"
    where = "folder" if Path(name).is_dir() else where
    return UserError(f"{name}: this {where} has no {what}")


# GPT-2's vocabulary, padded to a multiple of 64 by rows that are no token, as some train it: a teacher so padded and a
# student that is not are distributions over the same tokens.
PADDED = range(50304, 50433, 64)


def read_config(name: str) -> GPTConfig:
    """The shape of a model by name or folder. Raises UserError if it is not there, or no GPT-2."""
    path = fetch(name, "config.json")
    if path is None:
        raise missing(name, "config.json")
    raw = read_json(path)
    for key, allowed in SUPPORTED.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise UserError(f"{name}: this is written for GPT-2, but its config.json says {key}={raw[key]!r}")
    if raw.get("vocab_size") in PADDED:  # load() leaves the padding out
        raw["vocab_size"] = GPTConfig.vocab_size
    try:
        return GPTConfig(**{field: raw[field] for field in GPTConfig.__dataclass_fields__ if field in raw})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def weight_files(name: str) -> list[Path]:
    """The file that holds a model's weights, or its shards."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if path := fetch(name, whole):
            return [path]
        if index := fetch(name, whole + ".index.json"):
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
                raise UserError(f"{index}: there is no table of shards in it, weight_map: fetch it again")
            shards = sorted(set(names.values()))
            paths = [fetch(name, shard) for shard in shards]
            if None in paths:
                raise missing(name, f"{shards[paths.index(None)]}, which its index names")
            return paths
    raise missing(name, "model.safetensors or pytorch_model.bin, whole or in shards")


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) one after the other. A .bin is unpickled with weights_only=True: it can run no code."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open
            with safe_open(path, "pt") as file:
                crc, noted = 0, (file.metadata() or {}).get("crc32")  # save() notes it
                for key in sorted(file.keys()):
                    tensor = file.get_tensor(key)
                    crc = zlib.crc32(tensor.numpy(), crc) if noted else 0
                    yield key, tensor
                if noted and int(noted) != crc:
                    raise ValueError("its checksum is another")
        else:
            check_zip(path)
            mmap = zipfile.is_zipfile(path)  # files from before 2020 are not
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()):
                raise ValueError("it holds something else than tensors by their names")
            yield from tensors.items()
    except Stopped:
        raise
    except Exception as error:  # each reader has its own errors for a broken file, and they all mean this
        raise UserError(f"{path} is damaged or incomplete: remove it and fetch it again "
                        f"({type(error).__name__}: {str(error).partition(chr(10))[0][:80]})") from None


def check_zip(path: Path) -> None:
    """Raises ValueError if a file of torch.save is not as it was written, which torch.load does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if part := file.testzip():
                raise ValueError(f"the checksum of {part} is another")


def load(name: str, device: torch.device | str = "cpu") -> GPT:
    """A released GPT-2 in float32: gpt2, gpt2-xl, OWNER/NAME on the hub, or a folder.

    The prefix `transformer.`, attention buffers, and a copy of the tied output may be there or not. Raises UserError,
    naming the tensor, where the weights do not fit their config.json."""
    config = read_config(name)
    with torch.device("meta"):
        model = GPT(config)
    shapes, weights, head = {key: p.shape for key, p in model.named_parameters()}, {}, None
    for path in weight_files(name):
        for key, tensor in read_weights(path):
            key = key.removeprefix("transformer.")
            if key.endswith((".attn.bias", ".attn.masked_bias")):
                continue
            if not tensor.is_floating_point():
                raise UserError(f"{path} has {key} in {str(tensor.dtype)[6:]}: only weights in floating point are read")
            if key in ("lm_head.weight", "wte.weight") and tensor.dim() == 2 and len(tensor) in PADDED:
                tensor = tensor[: config.vocab_size]
            if key == "lm_head.weight":
                head = tensor
                continue
            tensor = tensor.t() if key.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
            if tensor.shape != shapes.get(key):
                want = tuple(shapes[key]) if key in shapes else "no such tensor"
                raise UserError(f"{path} has {key} of shape {tuple(tensor.shape)}, its config.json asks for {want}")
            weights[key] = nn.Parameter(tensor.to(device, torch.float32, copy=True).contiguous())
    if absent := sorted(set(shapes) - set(weights)):
        raise UserError(f"{name}: the weights lack {absent[0]}" + f" and {len(absent) - 1} more" * (len(absent) > 1))
    if head is not None and not torch.equal(head.float(), weights["wte.weight"].cpu()):
        raise UserError(f"{name}: its output (lm_head.weight) is not tied to its input embedding, as GPT-2's is")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def same_vocabulary(student: GPTConfig, teacher: GPTConfig) -> None:
    """Raises UserError unless q and p are distributions over the same tokens."""
    if teacher.vocab_size != student.vocab_size:
        raise UserError(f"the teacher has {teacher.vocab_size:,} tokens and the student {student.vocab_size:,}: "
                        "distillation needs one vocabulary")


def save(model: GPT, folder: Path) -> None:
    """model.safetensors, with a checksum in its metadata, and config.json, as `transformers` writes and reads them."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    config, tensors = model.config, {}
    for key, p in model.named_parameters():
        p = p.detach().t() if key.endswith(TRANSPOSED) else p.detach()
        tensors["transformer." + key] = p.to("cpu", torch.float32).contiguous()
    raw = asdict(config) | {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "n_ctx": config.n_positions, "bos_token_id": config.eos_token_id, "embd_pdrop": config.resid_pdrop,
        "attn_pdrop": config.resid_pdrop, "tie_word_embeddings": True, "torch_dtype": "float32"}
    crc = 0
    for key in sorted(tensors):
        crc = zlib.crc32(tensors[key].numpy(), crc)
    with written_aside(folder / "model.safetensors") as aside:
        aside.touch()
        mode = aside.stat().st_mode
        try:
            save_file(tensors, aside, metadata={"format": "pt", "crc32": str(crc)})
        except SafetensorError as error:  # a full disk, say
            raise UserError(f"{folder / 'model.safetensors'}: {error}") from None
        aside.chmod(mode)  # save_file's own lets nobody else read it
        either = [f'"format":"pt","crc32":"{crc}"'.encode(), f'"crc32":"{crc}","format":"pt"'.encode()]
        with open(aside, "r+b") as file:  # safetensors writes them in either order; equal weights make equal files
            head = file.read(4096)
            file.seek(0)
            file.write(head.replace(either[1], either[0], 1))
    with written_aside(folder / "config.json") as aside:
        aside.write_text(json.dumps(raw, indent=1) + "\n")
