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
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import UserError
from families import gathered
from safe.files import read_json, written_aside
from safe.hub import fetch, require, weight_files


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
        for part in self.modules():
            if isinstance(part, nn.Dropout):
                part.p = dropout
            elif isinstance(getattr(part, "dropout", None), float):
                part.dropout = dropout


# ---- files ------------------------------------------------------------------------------------

PLACE = "\ue000"  # where the user's words stand in a chat template
TRAINED_WITH = "minillm_template"  # in tokenizer_config.json: the template of the prompts
VOCABULARY = ("tokenizer.json", "vocab.json", "tokenizer.model")  # one of them is enough
TOKENIZER = (*VOCABULARY, "tokenizer_config.json", "special_tokens_map.json",
             "chat_template.jinja", "merges.txt")


def folder_of(name: str) -> Path:
    """The folder with a model's files, those of a hub repository fetched first."""
    config = require(name, "config.json")
    for file in TOKENIZER:
        fetch(name, file)
    return config.parent


def transformers_config(name: str):
    try:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    except ImportError:
        raise UserError(f"{name} is no GPT-2: `pip install transformers` opens other "
                        "families") from None
    try:
        return transformers.AutoConfig.from_pretrained(folder_of(name), local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())[:200]}") from None


def refused(name: str, config) -> None:
    """Raises UserError for a model whose layers are not those of a plain decoder."""
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


def kv_width(config) -> int:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return size * (getattr(config, "num_key_value_heads", None) or heads)


@once
def read_config(name: str) -> FamilyConfig:
    """The shape of a model. Raises UserError if it is not there, or cannot be distilled."""
    from transformers import AutoModelForCausalLM
    config = transformers_config(name)
    refused(name, config)
    try:
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise UserError(f"{name} is of type {config.model_type}, which is no causal language "
                        "model") from None
    if getattr(whole, "_is_stateful", False):
        raise UserError(f"{name} is of type {config.model_type}, whose layers hold a state: only "
                        "attention is read")
    tokenizer = load_tokenizer(name)
    rows, width = whole.get_output_embeddings().weight.shape  # OPT-350M's is narrower than it is
    if rows < tokenizer.n_vocab:
        raise UserError(f"{name} has {rows:,} tokens, and its tokenizer {tokenizer.n_vocab:,}")
    return FamilyConfig(name, config.model_type, config.num_hidden_layers,
                        config.num_attention_heads, width, tokenizer.n_vocab,
                        config.max_position_embeddings, tokenizer.ends, whole.num_parameters(),
                        kv_width(config), sum(p.numel() for layer in layers_of(whole)
                                              for p in layer.parameters()))


def load(name: str, device: torch.device | str = "cpu", dtype=torch.float32) -> Family:
    """A model in eval(), whose linear maps are in `dtype` and all else in float32, as under
    autocast. Raises UserError where its logits are more than its output embedding times its last
    hidden states."""
    from transformers import AutoModelForCausalLM
    config = read_config(name)
    weight_files(name)  # fetched, and not damaged
    try:
        whole = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=dtype,
                                                     local_files_only=True)
        for part in whole.modules():
            if not isinstance(part, nn.Linear):
                for p in part.parameters(recurse=False):
                    p.data = p.data.float()
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())[:200]}") from None
    model = Family(whole.to(device), config).eval()
    some = torch.arange(min(8, config.vocab_size), device=device)[None]
    with torch.no_grad(), torch.autocast(torch.device(device).type, dtype, dtype != torch.float32):
        ours = model.logits(model(some))
        theirs = whole(some).logits[..., : config.vocab_size].float()
    near = 1e-3 if dtype == torch.float32 else 0.05
    if not torch.allclose(ours, theirs, rtol=0, atol=near * theirs.abs().max().item()):
        raise UserError(f"{name} is of type {config.model_type}, whose logits are more than its "
                        "output embedding times its last states: not read")
    return model


def frozen(model: Family, dtype: torch.dtype) -> Family:
    """For inference: the model itself in float32, else a copy whose linear maps are in `dtype`, so
    that autocast need not cast them at each call. All else is shared with the model."""
    model = gathered(model, dtype)
    if dtype == torch.float32:
        return model
    memo = {id(p): p for p in model.parameters()}
    for part in model.body.modules():
        if isinstance(part, nn.Linear):
            for p in part.parameters(recurse=False):
                memo[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    light = Family(copy.deepcopy(model.whole, memo), model.config).eval()
    light.output = model.head().detach().to(dtype)
    return light


def save(model: Family, folder: Path) -> None:
    """Writes the files that `transformers` reads, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as aside:
        model.whole.save_pretrained(aside, max_shard_size="1TB")
        for file in sorted(Path(aside).iterdir(), reverse=True):  # config.json last
            os.replace(file, folder / file.name)


# ---- tokenizers -------------------------------------------------------------------------------

class FamilyTokenizer:
    """A tokenizer of `transformers` with what data.py asks of a tiktoken.Encoding."""

    def __init__(self, name: str, whole, template: str):
        self.name, self.model, self.whole, self.template = "family", name, whole, template
        self.n_vocab, self.eot_token = len(whole), whole.eos_token_id
        more = settings(name, "generation_config.json").get("eos_token_id") or []
        more = [more] if isinstance(more, int) else more
        self.ends = (self.eot_token, *(end for end in more if end != self.eot_token))
        self._mergeable_ranks = whole.get_vocab()
        probe = whole("a")["input_ids"]
        plain = whole("a", add_special_tokens=False)["input_ids"]
        self.begin = probe[: probe.index(plain[0])] if plain[0] in probe else []

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text. What looks like a special token in it is text."""
        if not texts:
            return []
        return self.whole(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, tokens) -> str:
        tokens = [token for token in tokens if token not in self.ends]
        return self.whole.decode(tokens, clean_up_tokenization_spaces=False)


def prompts_of(tokenizer: FamilyTokenizer, rows: Sequence) -> list[list[int]]:
    """The tokens of each row's prompt: behind the family's begin tokens the paper's template, or
    with --template=chat the model's own, in which the instruction is what a user says."""
    if tokenizer.template == "paper":
        texts = tokenizer.encode_ordinary_batch([row.prompt_text for row in rows])
        return [[*tokenizer.begin, *tokens] for tokens in texts]
    asked = [{"role": "user", "content": PLACE}]
    text = tokenizer.whole.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    before, after = (tokenizer.whole(part, add_special_tokens=False)["input_ids"]
                     for part in text.split(PLACE))
    said = ["\n\n".join(filter(None, (row.instruction, row.input))) for row in rows]
    return [[*before, *tokens, *after] for tokens in tokenizer.encode_ordinary_batch(said)]


def settings(name: str, file: str) -> dict:
    path = fetch(name, file)
    return read_json(path) if path else {}


@once
def load_tokenizer(name: str, template: str = "auto") -> FamilyTokenizer:
    """The tokenizer of a model, which makes its prompts by this template; "auto" is the one that
    the model was trained with here, else the paper's."""
    from transformers import AutoTokenizer
    folder = folder_of(name)
    if not any((folder / file).is_file() for file in VOCABULARY):
        raise UserError(f"{name} has no tokenizer: one of {', '.join(VOCABULARY)} is needed")
    if template == "auto":
        template = settings(name, "tokenizer_config.json").get(TRAINED_WITH, "paper")
    try:
        whole = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each kind of tokenizer has its own
        raise UserError(f"{name}: its tokenizer cannot be read "
                        f"({' '.join(str(error).split())[:120]})") from None
    if whole.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer names no end token")
    if template == "chat" and not whole.chat_template:
        raise UserError(f"{name} has no chat template: leave out --template=chat")
    return FamilyTokenizer(name, whole, template)


def save_tokenizer(tokenizer: FamilyTokenizer, folder: Path) -> None:
    """Copies the files that the tokenizer was read from, and notes its template in them."""
    for file in TOKENIZER:
        if path := fetch(tokenizer.model, file):
            content = path.read_bytes()
            if file == "tokenizer_config.json":
                noted = read_json(path) | {TRAINED_WITH: tokenizer.template}
                content = json.dumps(noted, indent=1).encode()
            with written_aside(folder / file) as aside:
                aside.write_bytes(content)


def same_vocabulary(student: FamilyTokenizer, teacher: FamilyTokenizer) -> None:
    """Raises UserError unless q and p are distributions over the same tokens, asked alike."""
    if student._mergeable_ranks != teacher._mergeable_ranks:
        raise UserError(f"the student has {student.n_vocab:,} tokens and the teacher other "
                        f"{teacher.n_vocab:,}: distillation needs one vocabulary")
    if student.template != teacher.template:
        raise UserError(f"the student is asked by the {student.template} template and the teacher "
                        f"by the {teacher.template} one: give --template")
