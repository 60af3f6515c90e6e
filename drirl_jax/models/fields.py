"""Fields of a model's config.json: each has one type, and what would change the numbers is understood or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from drirl_jax.types import InputError

# Names of fields by which some model scales, rotates or masks. A family lists those that it understands.
COMPUTES = re.compile(
    "rope|rotary|window|layer_types|layer_pattern|softcap|multiplier|scale|scaling|attention_factor|mscale|"
    "query_pre_attn|bidirectional|causal|alibi|chunk_size|clip|attn_temp|position_embedding_type|logit_cap"
)
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
# What such a field may say all the same, as it changes nothing.
NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})
NEUTRAL_OF = {"is_causal": (None, True), "position_embedding_type": (None, "rope")}
# Families whose config.json ties the embeddings where it does not say.
TIED = ("gemma2", "gemma3_text")


def quoted(value: object) -> str:
    """A value as an error quotes it: not longer than a line."""
    return repr(value)[:80]


def number(hf: Mapping, name: str, default: float) -> float:
    """A finite number above 0; the default where the field is absent.

    Raises:
        InputError: the field holds something else, such as a number in quotes, a truth value or null.
    """
    value = hf.get(name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(f"config.json has {name}={quoted(value)}: a number above 0 is needed.")
    return float(value)


def boolean(hf: Mapping, name: str, default: bool) -> bool:
    """True or False; the default where the field is absent. Raises InputError for everything else."""
    value = hf.get(name, default)
    if type(value) is not bool:
        raise InputError(f"config.json has {name}={quoted(value)}: true or false is needed.")
    return value


def size(hf: Mapping, name: str, default: int | None) -> int | None:
    """A positive whole number or null; the default where the field is absent. Raises InputError for all else."""
    value = hf.get(name, default)
    if value is not None and (type(value) is not int or value <= 0):
        raise InputError(f"config.json has {name}={quoted(value)}: a positive whole number is needed.")
    return value


def tied(hf: Mapping) -> bool:
    """Whether the embedding is the matrix of the vocabulary product too. Raises InputError for no truth value."""
    return boolean(hf, "tie_word_embeddings", hf.get("model_type") in TIED)


def need_understood(hf: Mapping, understood: Collection[str]) -> None:
    """Raises InputError for a field that asks for a computation that the family does not have.

    Args:
        hf: a Hugging Face config.
        understood: names of such fields that the family reads or checks.
    """
    for name, value in hf.items():
        if name in understood or name in ROPE or not COMPUTES.search(name):
            continue
        neutral = value in NEUTRAL_OF.get(name, NEUTRAL)
        neutral |= name == "sliding_window_size" and value == hf.get("sliding_window")  # as some Gemma 2 have it
        neutral |= bool(re.search("multiplier|scale|scaling|factor", name)) and value == 1
        if not neutral:
            raise InputError(
                f"config.json has {name}={quoted(value)}, which a {hf.get('model_type')} model does not compute here: "
                "take a model without it, or remove the field if its weights were trained without it."
            )
