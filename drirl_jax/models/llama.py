"""The Llama family (Llama 2 and 3, SmolLM2, TinyLlama), and what other families share with it: config, tensor names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from drirl_jax.models import fields, rope
from drirl_jax.models.architecture import Config, Llama3
from drirl_jax.types import InputError

# The tensors of one layer: our name, and Hugging Face's name with {} for the number of the layer.
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
    """The decoder from a Llama's config. Raises InputError if it is not implemented, KeyError if a field is missing."""
    config = shape(hf, ONLY, ("layer_types",))
    if any(name != "full_attention" for name in hf.get("layer_types") or ()):
        raise InputError(
            "config.json has layer_types other than full_attention, which transformers ignores in a llama model: "
            "remove the field, or take a model of another family."
        )
    return config


def shape(hf: Mapping, only: Mapping, understood: Collection[str] = (), rope_theta: float = rope.THETA) -> Config:
    """The Config from the fields that all families have in common.

    Args:
        hf: a Hugging Face config as `rope.standardise_config` returns it.
        only: fields that change the computation, each with the only value that is implemented for this family.
        understood: names of fields that change the computation and that the family's file reads itself.
        rope_theta: the family's default.

    Raises:
        InputError: the config asks for something that is not implemented, or a field has a wrong type.
        KeyError: a field is missing.
    """
    for name, wanted in only.items():
        if (hf.get(name, wanted) or False) != wanted:
            raise InputError(f"config.json has {name}={hf[name]!r}: only {wanted!r} is supported.")
    fields.need_understood(hf, [*only, *understood])
    heads = hf["num_attention_heads"]
    return Config(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        ffn=hf["intermediate_size"],
        rope_theta=fields.number(hf, "rope_theta", rope_theta),
        norm_eps=fields.number(hf, "rms_norm_eps", 1e-6),
        tied=fields.tied(hf),
        rope_scaling=rope.read_scaling(hf),
    )


def windows(hf: Mapping, window: int | None, is_local: Callable[[int], bool]) -> dict:
    """The fields `window` and `local` of a Config.

    Args:
        window: the window of the local layers.
        is_local: which layers are local if the config has no "layer_types".

    Raises:
        InputError: the config's "layer_types" do not fit the layers, or a local layer has no window.
    """
    layers, types = hf["num_hidden_layers"], hf.get("layer_types")
    if types is None:
        types = [list(TYPES)[is_local(i)] for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(name not in list(TYPES) for name in types):
        kinds = sorted({str(name) for name in types}) if isinstance(types, list) else [str(types)]
        raise InputError(
            f"config.json has layer_types of {len(types) if isinstance(types, list) else 0} layers and of the kinds "
            f"{', '.join(kinds)[:80]}: one for each of the {layers} layers is needed, {' or '.join(TYPES)}."
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
