"""Rotary embeddings in a config.json: brings all forms that transformers 4 and 5 read into one form.

transformers 4 has "rope_theta" and "rope_scaling" at the top level, and "rope_local_base_freq" for local layers.
transformers 5 has "rope_parameters", which may lack rope_theta; for Gemma 3 it has one such table for each kind of
layer. It also reads "rope_theta" inside "rope_scaling". A config may have both tables if they say the same.
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
THETA_BY_FAMILY = {"gemma3_text": 1_000_000.0}
# Fields of a table for which only one value is supported.
ONLY = {"partial_rotary_factor": 1, "attention_factor": 1}


def standardise_config(hf: Mapping) -> dict[str, Any]:
    """The config with its RoPE at the top level, as transformers 4 writes it.

    Args:
        hf: a Hugging Face config in either form.

    Returns:
        The config without "rope_parameters". If it had a table, it now has "rope_theta", "rope_scaling" if RoPE is
        scaled, and "rope_local_base_freq" if local layers have their own.

    Raises:
        InputError: a table asks for something that is not implemented, or two places say different things.
    """
    config = {name: value for name, value in hf.items() if name != "rope_parameters"}
    if config.get("partial_rotary_factor") not in (None, 1):
        raise InputError(_partial_rotary_message(config["partial_rotary_factor"]))
    parameters, scaling_table = (_table(hf, name) for name in ("rope_parameters", "rope_scaling"))
    global_table, local_table = _tables_by_layer(hf, parameters)
    if "type" in scaling_table and "rope_type" not in scaling_table and hf.get("model_type") in BY_LAYER:
        raise InputError(
            "config.json names the kind of its rope_scaling by type, which transformers 4 and 5 read differently for "
            f"{hf['model_type']}: call it rope_type."
        )
    default = THETA_BY_FAMILY.get(str(hf.get("model_type")), THETA)
    readings = [_read_table(table, hf, "rope_theta", default) for table in (global_table, scaling_table) if table]
    if any(reading != readings[0] for reading in readings):
        raise InputError(
            "config.json has a rope_scaling and a rope_parameters that say different things: remove one of them."
        )
    if readings:
        (theta, scaling), *_ = readings
        config["rope_theta"] = theta
        config.pop("rope_scaling", None)
        config |= {"rope_scaling": scaling} if scaling else {}
    elif "rope_theta" in config:
        _need_positive(config, "rope_theta")
    if parameters and hf.get("model_type") in BY_LAYER:
        config["rope_local_base_freq"] = _local_theta(hf, local_table)
    return config


def in_both_forms(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of `standardise_config`, with "rope_parameters" added as transformers 5 writes them."""
    if "rope_theta" not in config:
        return dict(config)
    global_table = (config.get("rope_scaling") or {"rope_type": "default"}) | {"rope_theta": config["rope_theta"]}
    if config.get("model_type") not in BY_LAYER:
        return dict(config) | {"rope_parameters": global_table}
    local_table = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq", LOCAL_THETA)}
    return dict(config) | {"rope_parameters": {"full_attention": global_table, "sliding_attention": local_table}}


def read_scaling(hf: Mapping) -> Linear | Llama3 | None:
    """The scaling of the frequencies in a config of `standardise_config`; None for plain RoPE."""
    table = hf.get("rope_scaling") or {}
    kind = table.get("rope_type", "default")
    return ROPE_SCALING[kind](*(table[name] for name in ROPE_SCALING[kind]._fields)) if kind != "default" else None


def _table(hf: Mapping, name: str) -> dict:
    table = hf.get(name)
    if table is not None and not isinstance(table, dict):
        raise InputError(f"config.json has {name}={quoted(table)}: an object is needed.")
    return table or {}


def _tables_by_layer(hf: Mapping, parameters: Mapping) -> tuple[dict, dict]:
    """The table of the global layers and the table of the local layers."""
    layer_kinds = [name for name in parameters if name in KINDS]
    if hf.get("model_type") not in BY_LAYER:
        if layer_kinds:
            raise InputError(
                f"config.json has rope_parameters for each kind of layer ({', '.join(layer_kinds)}), which only "
                f"{', '.join(BY_LAYER)} has."
            )
        return dict(parameters), {}
    if len(layer_kinds) < len(parameters):
        raise InputError(
            f"config.json has rope_parameters with {quoted(sorted(set(parameters) - set(layer_kinds)))}: a "
            f"{hf['model_type']} model has one table for each of {' and '.join(KINDS)}."
        )
    global_table, local_table = (_table(parameters, kind) for kind in KINDS)
    return global_table, local_table


def _local_theta(hf: Mapping, local_table: Mapping) -> float:
    if local_table.get("rope_type", local_table.get("type", "default")) != "default":
        raise InputError("config.json scales the RoPE of its sliding_attention layers, which is not supported.")
    return _read_table(local_table, hf, "rope_local_base_freq", LOCAL_THETA)[0]


def _read_table(table: Mapping, hf: Mapping, outside_field: str, default: float) -> tuple[float, dict | None]:
    """A table's base, and its scaling with its rope_type; the scaling is None for plain RoPE.

    Args:
        table: of the global or of the local layers.
        hf: the whole config.
        outside_field: the field of the whole config that may give the base.
        default: the base if neither the table nor the field gives one.
    """
    rope_types = {table[name] for name in ("rope_type", "type") if isinstance(table.get(name), str)}
    rope_type = rope_types.pop() if rope_types else table.get("rope_type", table.get("type", "default"))
    if rope_types or (rope_type != "default" and rope_type not in list(ROPE_SCALING)):
        quoted_types = quoted(rope_type) if not rope_types else f"{quoted(rope_type)} and {quoted(rope_types.pop())}"
        raise InputError(
            f"config.json has the rope_type {quoted_types}: supported are default, {', '.join(ROPE_SCALING)}."
        )
    _need_known_fields(table, rope_type)
    outside_theta = hf.get(outside_field)
    theta = next((base for base in (table.get("rope_theta"), outside_theta) if base is not None), default)
    _need_positive({"rope_theta": theta}, "rope_theta")
    if outside_theta not in (None, theta):
        raise InputError(
            f"config.json gives RoPE two bases, {outside_field}={quoted(outside_theta)} and {quoted(theta)}: remove "
            "one of them."
        )
    if rope_type == "default":
        return theta, None
    scaling = {"rope_type": rope_type} | {
        name: _original_positions(table, hf)
        if name == "original_max_position_embeddings"
        else _need_positive(table, name)
        for name in ROPE_SCALING[rope_type]._fields
    }
    if rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError("config.json scales RoPE with a low_freq_factor that is not below its high_freq_factor.")
    return theta, scaling


def _need_known_fields(table: Mapping, rope_type: str) -> None:
    known_fields = ["rope_type", "type", "rope_theta", "original_max_position_embeddings"]
    known_fields += ROPE_SCALING[rope_type]._fields if rope_type != "default" else []
    for name, value in table.items():
        if name in known_fields or value is None or value == ONLY.get(name):
            continue
        if name == "partial_rotary_factor":
            raise InputError(_partial_rotary_message(value))
        raise InputError(
            f"config.json has {name}={quoted(value)} in a RoPE of the rope_type {rope_type!r}, where it is not "
            "understood: remove it, or take a model without it."
        )


def _original_positions(table: Mapping, hf: Mapping) -> int:
    """The number of positions in pretraining, from the table; max_position_embeddings if the table lacks it."""
    # transformers 5 is not consistent: in one place it uses a value outside the table, in another it ignores it.
    name = "original_max_position_embeddings"
    value, outside_value = table.get(name), hf.get(name)
    if outside_value not in (None, value):
        raise InputError(
            f"config.json has {name}={quoted(outside_value)} beside its RoPE, and {quoted(value)} in it: write the "
            "right value into the RoPE, and remove the other."
        )
    value = hf.get("max_position_embeddings") if value is None else value
    if type(value) is not int:
        raise InputError(f"config.json has {name}={quoted(value)}: a whole number is needed.")
    return _need_positive({name: value}, name)


def _need_positive(table: Mapping, name: str) -> Any:
    if name not in table:
        raise InputError(f"config.json lacks the field {name!r} of its RoPE.")
    value = table[name]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(f"config.json has {name}={quoted(value)} in its RoPE: a positive number is needed.")
    return value


def _partial_rotary_message(value: object) -> str:
    return f"config.json has partial_rotary_factor={quoted(value)}: partly rotated heads are not supported."
