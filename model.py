"""GPT-2 by hand: the forward pass, its key-value cache, and released weights read and written.

Paper:    arXiv 2306.08543v4, Section 3.1, GPT-2s of 120M to 1.5B parameters. As in Radford et
          al. 2019: layer norm before each part, tanh GELU, learned positions, tied embeddings.
Run:      python sample.py --model=gpt2 --prompt="Name three colours."    (this file is imported)
Shapes:   B rows, T tokens fed now, S tokens seen so far, D width, H heads, V vocabulary.
Left out: other families, which families/ reads; tensor parallelism; quantisation.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import UserError
from families import or_family
from safe.files import read_json, written_aside
from safe.hub import read_weights, require, weight_files, write_weights


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. Fields have the names of the hub's config.json."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    n_positions: int = 1024
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int = 50256
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1

    def __post_init__(self):
        for name, most in (("n_layer", 10**3), ("n_head", 10**3), ("n_embd", 10**5),
                           ("vocab_size", 10**7), ("n_positions", 10**6)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise UserError(f"{name} must be an integer from 1 to {most}, not {value!r}")
        for name in ("layer_norm_epsilon", "embd_pdrop", "attn_pdrop", "resid_pdrop"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise UserError(f"{name} must be a number from 0 to below 1, not {value!r}")
        if self.n_embd % self.n_head:
            raise UserError(f"a width of {self.n_embd} does not divide into {self.n_head} heads")

    @property
    def parameters(self) -> int:
        """The number of weights. The tied embedding counts once."""
        per_layer = 12 * self.n_embd**2 + 13 * self.n_embd
        return (self.vocab_size + self.n_positions + 2) * self.n_embd + self.n_layer * per_layer


# ---- the cache and the mask -------------------------------------------------------------------

class KVCache:
    """Keys and values of every layer, allocated once; `length` counts the tokens it holds."""

    def __init__(self, config: GPTConfig, batch: int, length: int, device: torch.device,
                 dtype: torch.dtype):
        dtype = torch.float32 if device.type == "cpu" else dtype  # 5 times as fast for one token
        shape = (2, batch, config.n_head, length, config.n_embd // config.n_head)
        self.layers = [torch.zeros(shape, device=device, dtype=dtype)
                       for _ in range(config.n_layer)]
        self.length = 0

    def positions(self, T: int) -> Tensor:
        """The columns (T,) of the next T tokens."""
        return torch.arange(self.length, self.length + T, device=self.layers[0].device)

    def columns(self, T: int) -> int:
        """How many columns T more tokens may attend to."""
        return self.length + T

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values (B, H, T, D/H) behind those held, and returns all of them."""
        end = self.length + k.size(2)
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, T: int) -> None:
        self.length += T

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, in place: there may be no room for a second cache."""
        for layer, kv in enumerate(self.layers):
            kv[:, : len(rows)] = kv[:, rows]
            self.layers[layer] = kv[:, : len(rows)]


def causal_mask(positions: Tensor, columns: int, starts: Tensor | None) -> Tensor:
    """Which columns (S) the tokens at these positions (T,) may see: 0 where they may, else -inf.

    starts (B,) counts the padding at the left of each row. (T, S), or (B, 1, T, S) with starts."""
    column = torch.arange(columns, device=positions.device)  # (S,)
    visible = column <= positions[:, None]  # (T, S)
    if starts is not None:
        visible = visible & (column >= starts[:, None, None])  # (B, T, S)
        # a token of padding sees itself: a row of nothing but -inf would become NaN
        visible = (visible | (column == positions[:, None]))[:, None]  # (B, 1, T, S)
    return torch.zeros(visible.shape, device=column.device).masked_fill(~visible, -torch.inf)


# ---- the forward pass -------------------------------------------------------------------------

class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, nn.Dropout(config.attn_pdrop)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        B, T, D = x.shape
        heads = (B, T, self.n_head, D // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(D, dim=2))
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, H, S, D/H) each
        dropout = self.dropout.p if self.training else 0.0
        causal = True if mask is None and T > 1 else False  # a plain bool: compiled, T is a symbol
        with torch.autocast(x.device.type, enabled=False):  # it computes in the cache's dtype
            mask = None if mask is None else mask.to(k.dtype)
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, mask, dropout, causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), mask, cache, layer))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    new_cache = KVCache

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.recompute = False  # make each layer's activations again in the backward pass

    def forward(self, tokens: Tensor, starts: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """The last hidden states, after ln_f, (B, T, D). `logits` goes on from there.

        tokens (B, T) follow those that the cache holds. starts (B,) counts the padding at the left
        of each row. Padding at the right needs nothing: no token before it sees it."""
        T = tokens.size(1)
        past = cache.length if cache else 0
        if past + T > self.config.n_positions:
            raise UserError(f"{past + T} tokens exceed the {self.config.n_positions} positions")
        positions = cache.positions(T) if cache else torch.arange(T, device=tokens.device)  # (T,)
        mask = None  # attention is causal by itself where a row begins with its first token
        if starts is not None or (past and T > 1):
            mask = causal_mask(positions, cache.columns(T) if cache else T, starts)
        if starts is not None:
            positions = (positions - starts[:, None]).clamp(min=0)  # (B, T)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, D)
        for layer, block in enumerate(self.h):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, cache, layer, use_reentrant=False)
            else:
                x = block(x, mask, cache, layer)
        if cache:
            cache.advance(T)
        return self.ln_f(x)

    def head(self) -> Tensor:
        """The output embedding (V, D). Under autocast its mean row is subtracted, which softmax
        does not notice: GPT-2's logits lie near -100, where bfloat16 has steps of 0.5."""
        weight = self.wte.weight
        if not torch.is_autocast_enabled(weight.device.type):
            return weight
        return (weight - weight.detach().mean(0)).to(torch.get_autocast_dtype(weight.device.type))

    def logits(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., V), in float32 at least. A loop over chunks makes the head() once."""
        logits = F.linear(hidden, self.head() if head is None else head)
        return logits if logits.dtype == torch.float64 else logits.float()

    def ends(self, token: Tensor) -> Tensor:
        return token == self.config.eos_token_id

    def set_dropout(self, dropout: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout


# ---- a new model ------------------------------------------------------------------------------

def is_shape(name: str) -> bool:
    return re.fullmatch(r"\d+x\d+x\d+", name) is not None


def new_config(shape: str, tokenizer) -> GPTConfig:
    """LAYERSxHEADSxWIDTH, such as 4x4x128, with a tokenizer's vocabulary and without dropout."""
    n_layer, n_head, n_embd = map(int, shape.split("x"))
    n_positions = 1024 if tokenizer.n_vocab > 1000 else 64
    return GPTConfig(n_layer, n_head, n_embd, tokenizer.n_vocab, n_positions, 1e-5,
                     tokenizer.eot_token, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def new(config: GPTConfig, seed: int) -> GPT:
    """Random weights, drawn as GPT-2's; wider in a narrow model, whose logits would be too flat."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    std = 0.02 * math.sqrt(768 / min(config.n_embd, 768))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.dim() == 2:
            residual = name.endswith("c_proj.weight")  # scaled down by the number of branches
            scale = std / math.sqrt(2 * config.n_layer) if residual else std
            nn.init.normal_(p, std=scale, generator=generator)
    return model


# ---- released weights -------------------------------------------------------------------------

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SUPPORTED = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "tie_word_embeddings": (True,), "add_cross_attention": (False,)}
PADDED = range(50304, 50433, 64)  # GPT-2's tokens and rows for none, which some trainers add


@or_family
def read_config(name: str) -> GPTConfig:
    """The shape of a model. Raises UserError if it is not there, or is not a GPT-2."""
    path = require(name, "config.json")
    raw = read_json(path)
    for key, allowed in SUPPORTED.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise UserError(f"{name}: only GPT-2 is read; its config.json has {key}={raw[key]!r}")
    if raw.get("vocab_size") in PADDED:  # load() leaves the padding out
        raw["vocab_size"] = GPTConfig.vocab_size
    try:
        known = GPTConfig.__dataclass_fields__
        return GPTConfig(**{key: value for key, value in raw.items() if key in known})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@or_family
def load(name: str, device: torch.device | str = "cpu", dtype=None) -> GPT:
    """A GPT-2 in float32, whatever the dtype: gpt2, gpt2-xl, OWNER/NAME on the hub, or a folder.

    Raises UserError, naming the tensor, where the weights do not fit their config.json."""
    config = read_config(name)
    with torch.device("meta"):
        model = GPT(config)
    weights = {}
    for path in weight_files(name):
        for key, tensor in read_weights(path).items():
            key = re.sub(r"^((_orig_mod|model|module|transformer)\.)+", "", key)  # of trainers
            if key.endswith((".attn.bias", ".attn.masked_bias")):  # buffers, not weights
                continue
            if not tensor.is_floating_point():
                raise UserError(f"{path} has {key} in {tensor.dtype}, which is not floating point")
            if key in ("wte.weight", "lm_head.weight") and tensor.shape[:1].numel() in PADDED:
                tensor = tensor[: config.vocab_size]
            if key.endswith(TRANSPOSED) and tensor.dim() == 2:  # they are stored (in, out)
                tensor = tensor.t()
            weights[key] = tensor.to(device, torch.float32, copy=True).contiguous()
    head = weights.pop("lm_head.weight", None)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{name}: {' '.join(str(error).split())[:300]}") from None
    if head is not None and not torch.equal(head, model.wte.weight):
        raise UserError(f"{name}: its output, lm_head.weight, is not tied to its input embedding")
    return model.eval()


@or_family
def save(model: GPT, folder: Path) -> None:
    """Writes model.safetensors, with a checksum, and config.json, as `transformers` has them."""
    tensors = {}
    for key, p in model.named_parameters():
        p = p.detach().t() if key.endswith(TRANSPOSED) else p.detach()
        tensors["transformer." + key] = p.to("cpu", torch.float32).contiguous()
    raw = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "torch_dtype": "float32",
           "activation_function": "gelu_new", "tie_word_embeddings": True,
           "bos_token_id": model.config.eos_token_id, **asdict(model.config)}
    write_weights(folder / "model.safetensors", tensors)
    with written_aside(folder / "config.json") as aside:
        aside.write_text(json.dumps(raw, indent=1) + "\n")
