"""Models of other families, which `transformers` opens, behind the interface of model.GPT."""

import functools

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
    the same name in families/causal.py, if its first argument is of one."""
    @functools.wraps(of_gpt2)
    def pick(first, *given, **named):
        if is_gpt2(first):
            return of_gpt2(first, *given, **named)
        from families import causal  # which needs `transformers`
        return getattr(causal, of_gpt2.__name__)(first, *given, **named)
    return pick
