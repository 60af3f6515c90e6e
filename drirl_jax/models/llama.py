"""The Llama family (Llama 2/3, SmolLM2, TinyLlama): Hugging Face's config and tensor names, both ways."""

from __future__ import annotations

from typing import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from drirl_jax.models.transformer import Config, Transformer
from drirl_jax.types import InputError

TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
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


def config_from_hf(hf: Mapping) -> Config:
    """The decoder's shape from a Hugging Face config. Raises InputError for what is not implemented here."""
    for name, wanted in {"model_type": "llama", "hidden_act": "silu"}.items():
        if hf.get(name, wanted) != wanted:
            raise InputError(f"config.json has {name}={hf[name]!r}: only {wanted!r} is supported.")
    for name in ("attention_bias", "mlp_bias"):
        if hf.get(name):
            raise InputError(f"config.json sets {name}: Llama models with biases are not supported.")
    scaling = hf.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise InputError(f"config.json has rope_scaling {scaling}: only unscaled RoPE is supported.")
    try:
        heads = hf["num_attention_heads"]
        return Config(
            vocab=hf["vocab_size"],
            width=hf["hidden_size"],
            layers=hf["num_hidden_layers"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            ffn=hf["intermediate_size"],
            rope_theta=float(hf.get("rope_theta", 10_000.0)),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise InputError(f"config.json lacks the field {error}: it does not describe a Llama model.") from error


def from_hf(tensors: Mapping[str, np.ndarray], config: Config, dtype=jnp.float32) -> Transformer:
    """The decoder from tensors under Hugging Face names. Raises InputError for a missing or misshapen one."""
    model = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))

    def take(name, shape):
        if name not in tensors:
            raise InputError(f"the weights lack the tensor {name}: is the model folder complete?")
        if tensors[name].shape != tuple(shape):
            raise InputError(
                f"the tensor {name} has shape {list(tensors[name].shape)}, but config.json asks for {list(shape)}."
            )
        return tensors[name]

    for ours, theirs in LAYER.items():
        shape = getattr(model.blocks, ours).shape[1:]
        stacked = np.stack([take(theirs.format(i), shape) for i in range(config.layers)])
        setattr(model.blocks, ours, nnx.Param(jnp.asarray(stacked, dtype)))
    for ours, theirs in TOP.items():
        if hasattr(model, ours):
            setattr(model, ours, nnx.Param(jnp.asarray(take(theirs, getattr(model, ours).shape), dtype)))
    return model


def to_hf(model: Transformer) -> dict[str, np.ndarray]:
    """Tensors under Hugging Face names, the inverse of `from_hf`."""
    tensors = {theirs: np.asarray(getattr(model, ours)[...]) for ours, theirs in TOP.items() if hasattr(model, ours)}
    for ours, theirs in LAYER.items():
        stacked = np.asarray(getattr(model.blocks, ours)[...])
        tensors |= {theirs.format(i): stacked[i] for i in range(model.config.layers)}
    return tensors
