"""Fields of a model's config.json: each has one type; what would change the numbers is understood or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from drirl_jax.types import InputError

# Names of fields that make some model scale, rotate or mask. A family lists the fields that it understands.
COMPUTES = re.compile(
    "rope|rotary|window|layer_types|layer_pattern|softcap|multiplier|scale|scaling|attention_factor|mscale|"
    "query_pre_attn|bidirectional|causal|alibi|chunk_size|clip|attn_temp|position_embedding_type|logit_cap"
)
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
# Values of such a field that change nothing, and so are accepted.
NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})
NEUTRAL_BY_FIELD = {"is_causal": (None, True), "position_embedding_type": (None, "rope")}
# Families whose embeddings are tied if config.json does not say.
TIED = ("gemma2", "gemma3_text")


def quoted(value: object) -> str:
    """A value for an error message, at most 80 characters."""
    return repr(value)[:80]


def number(hf: Mapping, name: str, default: float) -> float:
    """A finite number above 0; the default if the field is absent.

    Raises:
        InputError: the field holds something else, such as a number in quotes, true, false or null.
    """
    value = hf.get(name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(f"config.json has {name}={quoted(value)}: a number above 0 is needed.")
    return float(value)


def boolean(hf: Mapping, name: str, default: bool) -> bool:
    """True or False; the default if the field is absent. Raises InputError for everything else."""
    value = hf.get(name, default)
    if type(value) is not bool:
        raise InputError(f"config.json has {name}={quoted(value)}: true or false is needed.")
    return value


def size(hf: Mapping, name: str, default: int | None) -> int | None:
    """A positive whole number or null; the default if the field is absent. Raises InputError for everything else."""
    value = hf.get(name, default)
    if value is not None and (type(value) is not int or value <= 0):
        raise InputError(f"config.json has {name}={quoted(value)}: a positive whole number is needed.")
    return value


def tied(hf: Mapping) -> bool:
    """Whether the embedding also gives the logits. Raises InputError if the field is not true or false."""
    return boolean(hf, "tie_word_embeddings", hf.get("model_type") in TIED)


def need_understood(hf: Mapping, understood: Collection[str]) -> None:
    """Raises InputError for a field that asks for a computation which this family does not have.

    Args:
        hf: a Hugging Face config.
        understood: names of such fields that the family reads or checks itself.
    """
    for name, value in hf.items():
        if name in understood or name in ROPE or not COMPUTES.search(name):
            continue
        neutral = value in NEUTRAL_BY_FIELD.get(name, NEUTRAL)
        neutral |= name == "sliding_window_size" and value == hf.get("sliding_window")  # some Gemma 2 have both
        neutral |= bool(re.search("multiplier|scale|scaling|factor", name)) and value == 1
        if not neutral:
            raise InputError(
                f"config.json has {name}={quoted(value)}, which is not implemented for a {hf.get('model_type')} model: "
                "take a model without it, or remove the field if its weights were trained without it."
            )
