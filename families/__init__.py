"""Models of other families, which `transformers` opens, behind the interface of model.GPT, and
models in training that are split over processes. What is rare is imported where it is used."""

import functools

import torch

from config import UserError
from safe.files import read_json
from safe.hub import require


def is_gpt2(thing) -> bool:
    """Whether a model, a tokenizer or the name of a model is of GPT-2's family."""
    if isinstance(thing, str):
        thing = require(thing, "config.json")
        return read_json(thing).get("model_type", "gpt2") == "gpt2"
    return not type(thing).__module__.startswith("families")


def or_family(of_gpt2):
    """Makes of a function of GPT-2 one that does the same for other families, by the function of
    the same name in causal.py or tokens.py, if its first argument is of one."""
    @functools.wraps(of_gpt2)
    def pick(first, *given, **named):
        if is_gpt2(first):
            return of_gpt2(first, *given, **named)
        from families import causal, tokens  # which need `transformers`
        module = causal if hasattr(causal, of_gpt2.__name__) else tokens
        return getattr(module, of_gpt2.__name__)(first, *given, **named)
    return pick


def split(model, cfg, m):
    """The model, split over the processes under --shard."""
    if not getattr(cfg, "shard", False):
        return model
    try:
        from families.sharded import shard
    except ImportError:
        raise UserError("--shard needs torch 2.6 or later") from None
    return shard(model, cfg, m)


def gathered(model, dtype: torch.dtype | None = None):
    """The model itself, or of one that is split a whole copy."""
    if not hasattr(model, "skeleton"):
        return model
    from families import sharded
    return sharded.gathered(model, dtype)


def adamw(model, **given) -> torch.optim.AdamW:
    if not hasattr(model, "skeleton"):
        return torch.optim.AdamW(model.parameters(), **given)
    from families import sharded
    return sharded.adamw(model, **given)


def clip_grad_norm(model, m, largest: float) -> float:
    """Clips the norm of the gradients, which m.sum() has summed. Returns what it was."""
    if not hasattr(model, "skeleton"):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), largest).item()
    from families import sharded
    return sharded.clip_grad_norm(model, m, largest)
