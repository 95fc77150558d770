"""Any causal language model that `transformers` opens, as a model.GPT: Llama, Qwen, OPT, Pythia.

Paper:    arXiv 2306.08543v4, Section 3.1, distils OPT and LLaMA too. MiniLLM asks a model for its
          last hidden states, for the output embedding that makes logits of them, and for a cache.
Run:      pip install transformers
          python distill.py --teacher=Qwen/Qwen3-1.7B --student=Qwen/Qwen3-0.6B
Shapes:   B rows, T tokens fed now, S tokens seen so far, D width, V vocabulary.
Left out: models whose logits are more than one linear map of their last states (Gemma 2, Granite),
          attention to a window, recurrent states, encoders, quantised weights.
"""

import copy
import inspect
import re
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import UserError
from families import gathered
from families.tokens import folder_of, load_tokenizer, put, refusal, transformers_config
from safe.files import refuse_pointer
from safe.hub import weight_files


@dataclass(frozen=True)
class FamilyConfig:
    """The shape of a model, in the names of model.GPTConfig."""
    name: str  # of the folder or repository
    model_type: str
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int  # of the tokenizer: a model may have rows for tokens that do not exist
    n_positions: int
    ends: tuple[int, ...]  # the end tokens; training has the first of them
    parameters: int
    kv_width: int = 0  # of a token's keys, and of its values, in a layer
    in_layers: int = 0  # parameters that --shard splits

    def new(self) -> "Family":
        """Random weights in this shape, of which the plan measures what they cost."""
        from transformers import AutoModelForCausalLM
        shape = transformers_config(self.name)
        shape.num_hidden_layers = self.n_layer
        return Family(AutoModelForCausalLM.from_config(shape), self).eval()


class Cache:
    """model.KVCache's place, taken by the cache of `transformers`, which grows by itself."""

    def __init__(self, config: FamilyConfig, batch: int, length: int, device: torch.device,
                 dtype: torch.dtype):
        from transformers import DynamicCache
        self.kept, self.length = DynamicCache(), 0

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        self.kept.batch_select_indices(rows)


def layers_of(whole: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer
    return [part for part in whole.modules() if isinstance(part, GradientCheckpointingLayer)]


DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


class Family(nn.Module):
    """A model of `transformers` with the methods of model.GPT."""
    new_cache = Cache

    def __init__(self, whole: nn.Module, config: FamilyConfig):
        super().__init__()
        self.whole, self.config, self.recompute = whole, config, False
        self.output = None  # the output embedding in autocast's dtype, of a frozen model
        accepted = inspect.signature(self.body.forward).parameters
        self.cache_name = "cache" if "cache" in accepted else "past_key_values"
        self.takes_positions = "position_ids" in accepted
        for layer in self.layers():
            vars(layer).pop("forward", None)  # of a copy: it would run the layer that was copied
            layer.forward = self.recomputing(layer.forward)

    @property
    def body(self) -> nn.Module:
        return self.whole.base_model

    def layers(self) -> list[nn.Module]:
        return layers_of(self.whole)

    def recomputing(self, forward):
        """Like `forward`, but it is run again in the backward pass if `recompute` is set, also in
        eval(), in which phase 2 trains and `transformers` would not."""
        def run(*given, **named):
            if self.recompute and torch.is_grad_enabled():
                return checkpoint(forward, *given, use_reentrant=False, **named)
            return forward(*given, **named)
        return run

    def forward(self, tokens: Tensor, starts: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """The last hidden states (B, T, D), as model.GPT.forward has them."""
        B, T = tokens.shape
        past = cache.length if cache else 0
        if past + T > self.config.n_positions:
            raise UserError(f"{past + T} tokens exceed the {self.config.n_positions} positions")
        column = torch.arange(past + T, device=tokens.device)  # (S,)
        given = {"use_cache": cache is not None}
        positions = column[past:].expand(B, T)
        if starts is not None:
            given["attention_mask"] = (column >= starts[:, None]).long()  # (B, S)
            positions = (positions - starts[:, None]).clamp(min=0)  # (B, T)
        if self.takes_positions:
            given["position_ids"] = positions
        if cache:
            given[self.cache_name] = cache.kept
            cache.length += T
        return self.body(tokens, **given)[0]

    def head(self) -> Tensor:
        """The output embedding of the tokenizer's tokens, (V, D)."""
        if self.output is not None:
            return self.output
        weight = self.whole.get_output_embeddings().weight[: self.config.vocab_size]
        if torch.is_autocast_enabled(weight.device.type):
            return weight.to(torch.get_autocast_dtype(weight.device.type))
        return weight

    def logits(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., V), in float32 at least."""
        head = self.head() if head is None else head
        logits = nn.functional.linear(hidden.to(head.dtype), head)
        return logits if logits.dtype == torch.float64 else logits.float()

    def ends(self, token: Tensor) -> Tensor:
        """Whether a token is one of the family's end tokens."""
        return torch.isin(token, torch.tensor(self.config.ends, device=token.device))

    def set_dropout(self, dropout: float) -> None:
        found = False
        for part in self.modules():
            for name in ("p",) if isinstance(part, nn.Dropout) else DROPOUTS:
                if isinstance(vars(part).get(name), float):
                    setattr(part, name, 0.0 if name == "layerdrop" else dropout)
                    found = True
        if dropout and not found:
            raise UserError(f"--dropout={dropout}: a model of type {self.config.model_type} has no "
                            "dropout")


# ---- files ------------------------------------------------------------------------------------

# Of a checkpoint, what no model needs: buffers, and an output that is tied to the input.
UNNEEDED = re.compile(r"inv_freq|masked_bias|attn\.bias$|attention\.bias$|lm_head\.weight$")


def refused(name: str, config) -> None:
    """Raises UserError for a model whose layers are not those of a plain decoder, or whose logits
    are more than a linear map."""
    kind = f"{name} is of type {config.model_type}, "
    if config.is_encoder_decoder:
        raise UserError(f"{kind}an encoder with a decoder: a causal language model is needed")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{name} is quantised: give the weights that it was made from")
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        if window < config.max_position_embeddings:
            raise UserError(f"{kind}whose layers attend to a window of {window} tokens: not read")
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        raise UserError(f"{kind}whose layers are {', '.join(sorted(layers))}: only full attention "
                        "is read")
    rope = str([getattr(config, part, None) for part in ("rope_scaling", "rope_parameters")])
    if "longrope" in rope or "dynamic" in rope:
        raise UserError(f"{kind}whose positions depend on the length of a text: not read")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1.0):
            raise UserError(f"{kind}{MORE_THAN_LINEAR} ({name})")


MORE_THAN_LINEAR = "whose logits are more than its output embedding times its last states: not read"


def kv_width(config) -> int:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return size * (getattr(config, "num_key_value_heads", None) or heads)


@once
def read_config(name: str) -> FamilyConfig:
    """The shape of a model. Raises UserError if it is not there, or cannot be distilled."""
    config = transformers_config(name)
    refused(name, config)
    kind = f"{name} is of type {config.model_type}, "
    from transformers import AutoModelForCausalLM
    try:
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        output = whole.get_output_embeddings()
        shape = dict(n_layer=config.num_hidden_layers, n_head=config.num_attention_heads,
                     n_positions=config.max_position_embeddings, kv_width=kv_width(config))
        rows, width = output.weight.shape  # OPT-350M's is narrower than the model
        in_layers = sum(p.numel() for layer in layers_of(whole) for p in layer.parameters())
    except Exception as error:
        raise refusal(f"{kind}and", error) from None
    if getattr(whole, "_is_stateful", False):
        raise UserError(f"{kind}whose layers hold a state: only attention is read")
    if output.bias is not None:
        raise UserError(f"{kind}{MORE_THAN_LINEAR} (a bias)")
    tokenizer = load_tokenizer(name)
    if rows < tokenizer.n_vocab:
        raise UserError(f"{name} has {rows:,} tokens, and its tokenizer {tokenizer.n_vocab:,}")
    return FamilyConfig(name, config.model_type, n_embd=width, vocab_size=tokenizer.n_vocab,
                        ends=tokenizer.ends, parameters=whole.num_parameters(),
                        in_layers=in_layers, **shape)


def matrices(model: Family) -> list[nn.Parameter]:
    """The weights that autocast computes with in its dtype: all but vectors and embeddings."""
    others = {id(p) for part in model.modules() if isinstance(part, nn.Embedding)
              for p in part.parameters()}
    return [p for p in model.body.parameters() if p.dim() > 1 and id(p) not in others]


def load(name: str, device: torch.device | str = "cpu", dtype=torch.float32) -> Family:
    """A model in eval(), whose matrices are in `dtype` and all else in float32, as under autocast.
    Raises UserError where it is not what its config.json says, or does not compute as model.GPT
    does."""
    config = read_config(name)
    from transformers import AutoModelForCausalLM
    for path in weight_files(name):  # fetched, and not damaged
        refuse_pointer(path)
    try:
        whole, told = AutoModelForCausalLM.from_pretrained(
            folder_of(name), dtype="auto" if dtype != torch.float32 else dtype,
            local_files_only=True, trust_remote_code=False, output_loading_info=True)
    except Exception as error:
        raise refusal(name, error) from None
    unneeded = [key for key in told["unexpected_keys"] if not UNNEEDED.search(key)]
    for keys, what in ((told["missing_keys"], "lack"), (unneeded, "have besides"),
                       (told.get("mismatched_keys"), "have in another shape")):
        if keys:
            raise UserError(f"{name}: by its config.json, its weights {what} {min(map(str, keys))}")
    model = Family(whole, config).eval()
    in_dtype = {id(p) for p in matrices(model)}
    for p in model.parameters():
        p.data = p.data.to(device, dtype if id(p) in in_dtype else torch.float32)
    whole.to(device)  # buffers
    compare(model, name, dtype)
    return model


@torch.no_grad()
def compare(model: Family, name: str, dtype: torch.dtype) -> None:
    """Raises UserError unless the logits of a few tokens are those of `transformers`, and the same
    behind padding, and the same in two parts with a cache."""
    device = next(model.parameters()).device
    some = torch.arange(min(8, model.config.vocab_size), device=device)[None]
    first = len(some[0]) // 2
    kind = f"{name} is of type {model.config.model_type}, "
    try:
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            whole = model.logits(model(some))
            theirs = model.whole(some).logits[..., : whole.size(-1)].float()
            padded = torch.cat([some, some.roll(first, 1)])  # the second row begins at `first`
            starts = torch.tensor([0, first], device=device)
            behind = model.logits(model(padded, starts))[1:, first:]
            cache = model.new_cache(model.config, 1, len(some[0]), device, dtype)
            parts = [model.logits(model(part, None, cache)) for part in
                     (some[:, :first], some[:, first:])]
    except Exception as error:
        raise refusal(f"{kind}and", error) from None
    if not whole.isfinite().all():
        raise UserError(f"{name}: its logits are not numbers: its weights are broken")
    near = (1e-3 if dtype == torch.float32 else 0.05) * theirs.abs().max().item()
    if (whole - theirs).abs().max() > near:
        raise UserError(f"{kind}{MORE_THAN_LINEAR}")
    alone = whole[:, : behind.size(1)]
    if max((behind - alone).abs().max(), (torch.cat(parts, 1) - whole).abs().max()) > near:
        raise UserError(f"{kind}whose logits change with padding or with a cache: not read")


def frozen(model: Family, dtype: torch.dtype) -> Family:
    """For inference: the model itself in float32, else a copy whose matrices are in `dtype`, so
    that autocast need not cast them at each call. All else is shared with the model."""
    model = gathered(model, dtype)
    if dtype == torch.float32:
        light = copy.copy(model)
        light._compiled_call_impl = None  # --compile is for training: lengths change here
        return light
    memo = {id(p): p for p in model.parameters()}
    for p in matrices(model):
        memo[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    light = Family(copy.deepcopy(model.whole, memo), model.config).eval()
    light.output = model.head().detach().to(dtype)
    return light


def save(model: Family, folder: Path) -> None:
    """Writes the files that `transformers` reads, each whole or not at all."""
    put(folder, lambda aside: model.whole.save_pretrained(aside, max_shard_size="1TB"))
