"""Models for inference: weights in the dtype that is computed in, and packed on a CPU.

Left out: quantised weights. What is drawn would not come from the model that is scored.
"""

from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from families import gathered, or_family
from model import GPT, Block, KVCache


class PackedLinear:
    """A linear map for inference on a CPU. Its weights (out, in) are reordered for the few rows of
    a decoding step, by the operations that PyTorch's own compiler calls.

    A single row of float32 is multiplied as fast as memory is read, in whatever order. So weights
    are packed, and the plain ones let go of, only when several rows come."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = weight
        self.bias = bias
        self.packed = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            if len(x) == 1 and self.weight.dtype == torch.float32:
                return F.linear(x, self.weight, self.bias)
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 8)
            self.weight = None
        x = x.to(self.packed.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether PackedLinear works on this CPU and in this dtype. Only a trial can tell."""
    try:
        PackedLinear(torch.ones(8, 8, dtype=dtype), None)(torch.ones(2, 8))
    except (AttributeError, RuntimeError):  # no such operation, or none for this CPU
        return False
    return True


class PackedBlock(nn.Module):
    """model.Block with packed weights. Modules within modules are gone: in a step of one answer
    the processor's caches are full of weights, and each call of Python's takes long."""

    def __init__(self, block: Block):
        super().__init__()
        self.n_head = block.attn.n_head
        for name, norm in [("ln_1", block.ln_1), ("ln_2", block.ln_2)]:
            setattr(self, name, partial(
                torch.layer_norm, normalized_shape=norm.normalized_shape,
                weight=norm.weight.detach(), bias=norm.bias.detach(), eps=norm.eps))
        for name, linear in [("qkv", block.attn.c_attn), ("out", block.attn.c_proj),
                             ("up", block.mlp.c_fc), ("down", block.mlp.c_proj)]:
            setattr(self, name, PackedLinear(linear.weight.detach(), linear.bias.detach()))

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(self.ln_1(x)).view(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, T, D/H) each
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, H, S, D/H) each
        mask = None if mask is None else mask.to(k.dtype)
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, mask,
                                           is_causal=mask is None and T > 1)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Frozen(GPT):
    """A GPT for inference, whose output embedding is made once."""

    def head(self) -> Tensor | PackedLinear:
        return self.output

    def logits(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        return super().logits(hidden, self.output)


class Packed(Frozen):
    """A Frozen with packed weights. They cast what they are multiplied by, and autocast is off."""

    def forward(self, tokens: Tensor, starts: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(tokens, starts, cache)

    def logits(self, hidden: Tensor, head: PackedLinear | None = None) -> Tensor:
        return self.output(hidden).float()


@or_family
def frozen(model: GPT, dtype: torch.dtype) -> GPT:
    """A copy for inference. Its linear maps are in `dtype`, so that autocast need not cast them at
    each call, and packed on a CPU. All else is shared with the model."""
    model = gathered(model, dtype)
    device = model.wte.weight.device.type
    wide = model.config.n_embd >= 256  # below, a call of PackedLinear costs more than it saves
    packed = wide and device == "cpu" and packs(dtype)
    weights = {}
    for name, p in model.named_parameters():
        linear = name.startswith("h.") and ".ln_" not in name
        weights[name] = p.detach().to(dtype if linear else p.dtype)
    with torch.device("meta"):
        copy = Packed(model.config) if packed else Frozen(model.config)
    copy.load_state_dict(weights, assign=True)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        copy.output = model.head().detach()
    if packed:
        copy.output = PackedLinear(copy.output, None)
        copy.h = nn.ModuleList(map(PackedBlock, copy.h))
    return copy.requires_grad_(False).eval()
