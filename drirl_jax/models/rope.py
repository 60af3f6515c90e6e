"""Rotary embeddings in a config.json: every form that transformers 4 and 5 read, brought to one.

transformers 4 has "rope_theta" and "rope_scaling" at the top level, and "rope_local_base_freq" for local layers.
transformers 5 has "rope_parameters", which may leave out rope_theta, and for Gemma 3 one such table for each kind of
layer; it takes "rope_theta" out of "rope_scaling" too. The two tables may stand together where they say the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from drirl_jax.models.architecture import ROPE_SCALING, Linear, Llama3
from drirl_jax.models.fields import quoted
from drirl_jax.types import InputError

BY_LAYER = ("gemma3_text",)  # families with one table for each kind of layer
KINDS = ("full_attention", "sliding_attention")
THETA, LOCAL_THETA = 10_000.0, 10_000.0
THETA_OF = {"gemma3_text": 1_000_000.0}
# Fields of a table that may stand there with one value alone.
ONLY = {"partial_rotary_factor": 1, "attention_factor": 1}


def standard(hf: Mapping) -> dict[str, Any]:
    """The config with its RoPE at the top level, as transformers 4 writes it.

    Args:
        hf: a Hugging Face config in either form.

    Returns:
        The config without "rope_parameters"; where a table was given, with "rope_theta", with "rope_scaling" if RoPE is
        scaled, and with "rope_local_base_freq" if local layers have their own.

    Raises:
        InputError: a table holds what is not implemented, or two places say different things.
    """
    config = {name: value for name, value in hf.items() if name != "rope_parameters"}
    if config.get("partial_rotary_factor") not in (None, 1):
        raise InputError(_partial(config["partial_rotary_factor"]))
    parameters, scaling = (_table(hf, name) for name in ("rope_parameters", "rope_scaling"))
    whole, local = _by_layer(hf, parameters)
    if "type" in scaling and "rope_type" not in scaling and hf.get("model_type") in BY_LAYER:
        raise InputError(
            "config.json names the kind of its rope_scaling by type, which transformers 4 and 5 read differently for "
            f"{hf['model_type']}: call it rope_type."
        )
    default = THETA_OF.get(str(hf.get("model_type")), THETA)
    given = [_read_table(table, hf, "rope_theta", default) for table in (whole, scaling) if table]
    if any(one != given[0] for one in given):
        raise InputError(
            "config.json has a rope_scaling and a rope_parameters that say different things: leave one of them out."
        )
    if given:
        (theta, scaled), *_ = given
        config["rope_theta"] = theta
        config.pop("rope_scaling", None)
        config |= {"rope_scaling": scaled} if scaled else {}
    elif "rope_theta" in config:
        _positive(config, "rope_theta")
    if parameters and hf.get("model_type") in BY_LAYER:
        config["rope_local_base_freq"] = _local_theta(hf, local)
    return config


def in_both_forms(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `standard` gives, with "rope_parameters" too, which transformers 5 writes."""
    if "rope_theta" not in config:
        return dict(config)
    whole = (config.get("rope_scaling") or {"rope_type": "default"}) | {"rope_theta": config["rope_theta"]}
    if config.get("model_type") not in BY_LAYER:
        return dict(config) | {"rope_parameters": whole}
    local = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq", LOCAL_THETA)}
    return dict(config) | {"rope_parameters": {"full_attention": whole, "sliding_attention": local}}


def scaling_of(hf: Mapping) -> Linear | Llama3 | None:
    """How the frequencies are scaled, from a config that `standard` gives."""
    table = hf.get("rope_scaling") or {}
    kind = table.get("rope_type", "default")
    return ROPE_SCALING[kind](*(table[name] for name in ROPE_SCALING[kind]._fields)) if kind != "default" else None


def _table(hf: Mapping, name: str) -> dict:
    table = hf.get(name)
    if table is not None and not isinstance(table, dict):
        raise InputError(f"config.json has {name}={quoted(table)}: an object is needed.")
    return table or {}


def _by_layer(hf: Mapping, parameters: Mapping) -> tuple[dict, dict]:
    """The tables of global and of local layers."""
    nested = [name for name in parameters if name in KINDS]
    if hf.get("model_type") not in BY_LAYER:
        if nested:
            raise InputError(
                f"config.json has rope_parameters for each kind of layer ({', '.join(nested)}), which only "
                f"{', '.join(BY_LAYER)} has."
            )
        return dict(parameters), {}
    if len(nested) < len(parameters):
        raise InputError(
            f"config.json has rope_parameters with {quoted(sorted(set(parameters) - set(nested)))}: a "
            f"{hf['model_type']} model has one table for each of {' and '.join(KINDS)}."
        )
    whole, local = (_table(parameters, kind) for kind in KINDS)
    return whole, local


def _local_theta(hf: Mapping, local: Mapping) -> float:
    if local.get("rope_type", local.get("type", "default")) != "default":
        raise InputError("config.json scales the RoPE of its sliding_attention layers, which is not supported.")
    return _read_table(local, hf, "rope_local_base_freq", LOCAL_THETA)[0]


def _read_table(table: Mapping, hf: Mapping, beside: str, default: float) -> tuple[float, dict | None]:
    """A table's base, and its scaling with the name of its kind; None for plain RoPE.

    Args:
        table: of global or of local layers.
        hf: the whole config.
        beside: the field of the whole config that may give the base.
        default: the base that counts where neither gives one.
    """
    kinds = {table[name] for name in ("rope_type", "type") if isinstance(table.get(name), str)}
    kind = kinds.pop() if kinds else table.get("rope_type", table.get("type", "default"))
    if kinds or (kind != "default" and kind not in list(ROPE_SCALING)):
        names = quoted(kind) if not kinds else f"{quoted(kind)} and {quoted(kinds.pop())}"
        raise InputError(f"config.json has the rope_type {names}: supported are default, {', '.join(ROPE_SCALING)}.")
    _need_known_fields(table, kind)
    outside = hf.get(beside)
    theta = next((x for x in (table.get("rope_theta"), outside) if x is not None), default)
    _positive({"rope_theta": theta}, "rope_theta")
    if outside not in (None, theta):
        raise InputError(
            f"config.json gives RoPE two bases, {beside}={quoted(outside)} and {quoted(theta)}: leave one of them out."
        )
    if kind == "default":
        return theta, None
    scaling = {"rope_type": kind} | {
        name: _original(table, hf) if name == "original_max_position_embeddings" else _positive(table, name)
        for name in ROPE_SCALING[kind]._fields
    }
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError("config.json scales RoPE with a low_freq_factor that is not below its high_freq_factor.")
    return theta, scaling


def _need_known_fields(table: Mapping, kind: str) -> None:
    known = ["rope_type", "type", "rope_theta", "original_max_position_embeddings"]
    known += ROPE_SCALING[kind]._fields if kind != "default" else []
    for name, value in table.items():
        if name in known or value is None or value == ONLY.get(name):
            continue
        if name == "partial_rotary_factor":
            raise InputError(_partial(value))
        raise InputError(
            f"config.json has {name}={quoted(value)} in a RoPE of the rope_type {kind!r}, where it is not understood: "
            "remove it, or take a model without it."
        )


def _original(table: Mapping, hf: Mapping) -> int:
    """The positions of pretraining, from the table, or all of them."""
    # A value beside the table transformers 5 takes in one place and leaves out in another.
    name = "original_max_position_embeddings"
    value, beside = table.get(name), hf.get(name)
    if beside not in (None, value):
        raise InputError(
            f"config.json has {name}={quoted(beside)} beside its RoPE, and {quoted(value)} in it: write the right one "
            "in it, and leave the other out."
        )
    value = hf.get("max_position_embeddings") if value is None else value
    if type(value) is not int:
        raise InputError(f"config.json has {name}={quoted(value)}: a whole number is needed.")
    return _positive({name: value}, name)


def _positive(table: Mapping, name: str) -> Any:
    if name not in table:
        raise InputError(f"config.json lacks the field {name!r} of its RoPE.")
    value = table[name]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(f"config.json has {name}={quoted(value)} in its RoPE: a positive number is needed.")
    return value


def _partial(value: object) -> str:
    return f"config.json has partial_rotary_factor={quoted(value)}: heads that are rotated in part are not supported."
