"""The Llama family (Llama 2 and 3, SmolLM2, TinyLlama), and what the others share with it: config, names of tensors."""

from __future__ import annotations

from typing import Callable, Mapping

from drirl_jax.models.architecture import ROPE_SCALING, Config, Linear, Llama3
from drirl_jax.types import InputError

# Of one layer: our name, and Hugging Face's with the layer's number left open.
LAYER = {
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
TYPES = {"full_attention": False, "sliding_attention": True}


def config_from_hf(hf: Mapping) -> Config:
    """The decoder from a Llama's config. Raises InputError for what is not implemented, KeyError for a gap."""
    return shape(hf, ONLY)


def shape(hf: Mapping, only: Mapping, rope_theta: float = 10_000.0, tied: bool = False) -> Config:
    """What all families' configs say in the same words.

    Args:
        hf: a Hugging Face config as `hf.read_config` gives it.
        only: values of fields that change the computation; no others are implemented for this family.
        rope_theta, tied: the family's defaults.

    Raises:
        InputError: the config asks for what is not implemented here.
        KeyError: a field is missing.
    """
    for name, wanted in only.items():
        if (hf.get(name, wanted) or False) != wanted:
            raise InputError(f"config.json has {name}={hf[name]!r}: only {wanted!r} is supported.")
    heads = hf["num_attention_heads"]
    return Config(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        ffn=hf["intermediate_size"],
        rope_theta=float(hf.get("rope_theta", rope_theta)),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tied=bool(hf.get("tie_word_embeddings", tied)),
        rope_scaling=_rope_scaling(hf.get("rope_scaling") or {}),
    )


def _rope_scaling(scaling: Mapping) -> Linear | Llama3 | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ROPE_SCALING:
        raise InputError(f"config.json has the rope_type {kind!r}: supported are default, {', '.join(ROPE_SCALING)}.")
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise InputError("config.json has a partial_rotary_factor: heads that are rotated in part are not supported.")
    return ROPE_SCALING[kind](*(scaling[name] for name in ROPE_SCALING[kind]._fields))


def windows(hf: Mapping, window: int | None, is_local: Callable[[int], bool]) -> dict:
    """The fields `window` and `local` of a Config.

    Args:
        window: of the local layers.
        is_local: which these are where the config does not list the layers' types.

    Raises:
        InputError: the config's "layer_types" do not fit.
    """
    layers = hf["num_hidden_layers"]
    types = hf.get("layer_types") or [list(TYPES)[is_local(i)] for i in range(layers)]
    if len(types) != layers or not TYPES.keys() >= set(types):
        raise InputError(
            f"config.json has layer_types of {len(types)} layers and of the kinds {', '.join(sorted(set(types)))}: one "
            f"for each of the {layers} layers is needed, {' or '.join(TYPES)}."
        )
    local = tuple(TYPES[name] for name in types)
    if not any(local):
        return {}
    if not window:
        raise InputError("config.json has layers of sliding_attention but no sliding_window: give its width.")
    return {"window": window, "local": local}


_LLAMA3 = Llama3(8.0, 1.0, 4.0, 8192)
PRESETS = {
    "llama2-7b": Config(32_000, 4096, 32, 32, 32, 128, 11_008, tied=False),
    "llama3.1-8b": Config(128_256, 4096, 32, 32, 8, 128, 14_336, 5e5, tied=False, rope_scaling=_LLAMA3),
    "llama3.1-70b": Config(128_256, 8192, 80, 64, 8, 128, 28_672, 5e5, tied=False, rope_scaling=_LLAMA3),
    "llama3.2-1b": Config(128_256, 2048, 16, 32, 8, 64, 8192, 5e5, rope_scaling=_LLAMA3._replace(factor=32.0)),
    "llama3.2-3b": Config(128_256, 3072, 28, 24, 8, 128, 8192, 5e5, rope_scaling=_LLAMA3._replace(factor=32.0)),
    "smollm2-135m": Config(49_152, 576, 30, 9, 3, 64, 1536, 1e5),
    "smollm2-360m": Config(49_152, 960, 32, 15, 5, 64, 2560, 1e5),
    "smollm2-1.7b": Config(49_152, 2048, 24, 32, 32, 64, 8192, 130_000.0),
}
