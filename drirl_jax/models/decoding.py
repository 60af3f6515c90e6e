"""Decoding with a cache: the prompts' keys and values, held once a group, and the responses' own."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from drirl_jax.models.attention import (
    layer_cos_sin,
    local_layers,
    own_heads_first,
    response_attention,
    rope,
    rope_cos_sin,
    visible,
)
from drirl_jax.models.transformer import ACTIVATIONS, Transformer, cast, embed, norms, prompt_layer, rms_norm
from drirl_jax.runtime.sharding import constrain
from drirl_jax.types import Array

FILLED = 64  # a CPU reads the own cache in steps of so many entries, or of a quarter if that is more


def prefill(model: Transformer, prompt_PS: Array, prefix: tuple[int, ...] = ()):
    """Hidden states [P, S, D] of the prompts, and keys and values of prefix and prompts, each [L, P, KV, R + S, hd]."""
    config, R = model.config, len(prefix)
    prefix_turns, turns = (rope_cos_sin(config, n[None]) for n in (jnp.arange(R), R + jnp.arange(prompt_PS.shape[1])))

    def layer(carry, inputs):
        prefix_1RD, x_PSD = carry
        block, local = inputs
        block, before = cast(block, config), None
        if R:
            prefix_1RD, before = prompt_layer(config, block, prefix_1RD, prefix_turns, local, None, {}, None)
        x_PSD, cache = prompt_layer(config, block, x_PSD, turns, local, before, {}, None)
        return (prefix_1RD, x_PSD), cache

    first = (embed(model, jnp.array([prefix], jnp.int32)), embed(model, prompt_PS))
    (_, x_PSD), cache = jax.lax.scan(layer, first, (model.blocks, local_layers(config)))
    return rms_norm(x_PSD, model.norm[...], config), cache


class DecodeBlock(NamedTuple):
    """A block's weights for decoding, stacked over layers: products that share their input are one matrix.

    A few rows against small matrices leave a processor idle; fused, a decoding step takes two thirds of the time. They
    are [in, out], as products of a few rows are faster so; what is cut among devices has its own axis.

    Attributes:
        qkv: [L, D, KV, (H / KV + 2)·hd], for each key head its queries, the key, the value.
        o: [L, H·hd, D].
        gate_up: [L, D, 2, F].
        down: [L, F, D].
        norms: those that `transformer.norms` names, each [L, size].
        qkv_bias: [L, KV, (H / KV + 2)·hd], or None.
    """

    qkv: Array
    o: Array
    gate_up: Array
    down: Array
    norms: dict[str, Array]
    qkv_bias: Array | None


def fuse(model: Transformer) -> DecodeBlock:
    """The model's blocks with q, k, v joined and gate, up joined."""
    config, bias = model.config, None
    blocks = cast(model.blocks, config)

    def transposed(name):
        return jnp.swapaxes(getattr(blocks, name)[...], 1, 2)

    qkv = [rearrange(transposed(name), "l i (k o) -> l i k o", k=config.kv_heads) for name in "qkv"]
    if config.qkv_bias:
        biases = [getattr(blocks, f"{name}_bias")[...] for name in "qkv"]
        bias = jnp.concatenate([rearrange(b, "l (k o) -> l k o", k=config.kv_heads) for b in biases], axis=2)
    return DecodeBlock(
        qkv=constrain(jnp.concatenate(qkv, axis=3), None, "width", "heads"),
        o=constrain(transposed("o"), None, "heads", "width"),
        gate_up=constrain(jnp.stack([transposed("gate"), transposed("up")], axis=2), None, "width", None, "ffn"),
        down=constrain(transposed("down"), None, "ffn", "width"),
        norms={name: getattr(blocks, name)[...] for name in norms(config)},
        qkv_bias=bias,
    )


def decode(model: Transformer, fused: DecodeBlock, token_PG, t, prompt_len_P, prompt_mask_PS, prompt_cache, own_cache):
    """One decoding step: response token t of every row passes through the network.

    Args:
        fused: `fuse(model)`, computed once before the loop.
        token_PG: [P, G] ids of response token t.
        t: scalar int32, its index in the response.
        prompt_len_P, prompt_mask_PS: lengths and mask of the prompts, the prefix included.
        prompt_cache: (k, v) of `prefill`.
        own_cache: (k, v), each [L, P, KV, G, T, hd], filled below t.

    Returns:
        ([P, G, D] final hidden states, own_cache with entry t written).
    """
    config = model.config
    P, G = token_PG.shape
    T = own_cache[0].shape[4]
    position_P1 = (prompt_len_P + t)[:, None]
    turns = rope_cos_sin(config, jnp.broadcast_to(position_P1, (P, G)))
    step = max(FILLED, -(-T // 4))
    sizes = (*range(step, T, step), T)
    queries = config.heads // config.kv_heads * config.head_dim

    def attend_to_first(size: int):
        """Attention that reads no more than the first `size` entries of the own cache."""

        def attend(q_PG1Hd, prompt_k, prompt_v, own_k, own_v, i, local):
            shape = (1, *own_k.shape[1:4], size, config.head_dim)
            own = (jax.lax.dynamic_slice(cache, (i, 0, 0, 0, 0, 0), shape)[0] for cache in (own_k, own_v))
            key_S = np.arange(prompt_mask_PS.shape[1])
            prompt_mask_P1S = visible(config, local, prompt_mask_PS[:, None], position_P1, key_S)
            own_mask_1U = visible(config, local, (jnp.arange(size) <= t)[None], jnp.reshape(t, 1), np.arange(size))
            return response_attention(config, q_PG1Hd, prompt_k, prompt_v, prompt_mask_P1S, *own, own_mask_1U)

        return attend

    def layer(carry, inputs):
        x_PGD, own_k, own_v = carry
        i, block, prompt_k, prompt_v, local = inputs

        def norm(name, x):
            return rms_norm(x, block.norms[name], config)

        normed = constrain(norm("attn_norm", x_PGD), "weights_stay")
        qkv = constrain(jnp.einsum("pgi,iko->pgko", normed, block.qkv), "weights_stay", None, "heads")
        qkv = constrain(qkv + block.qkv_bias if config.qkv_bias else qkv, "prompts", None, "heads")
        q, k, v = jnp.split(qkv, (queries, queries + config.head_dim), axis=-1)
        q = rearrange(q, "p g k (r d) -> p g (k r) d", d=config.head_dim)
        if config.qk_norm:
            q, k = norm("q_norm", q), norm("k_norm", k)
        own_turns = layer_cos_sin(config, turns, local)
        q, k = rope(q, own_turns), rope(k, own_turns)
        at = (i, 0, 0, 0, t, 0)
        own_k = jax.lax.dynamic_update_slice(own_k, own_heads_first(k[:, :, None])[None], at)
        own_v = jax.lax.dynamic_update_slice(own_v, own_heads_first(v[:, :, None])[None], at)
        attend = [attend_to_first(size) for size in sizes]
        given = (q[:, :, None], prompt_k, prompt_v, own_k, own_v, i, local)
        # For a branch a TPU copies the whole cache, in every layer, which costs more than reading one layer's whole.
        filled = partial(jax.lax.switch, t // step, attend)
        attended = jax.lax.platform_dependent(*given, cpu=filled, default=attend[-1])
        attended = constrain(rearrange(attended[:, :, 0], "p g h d -> p g (h d)"), "weights_stay", None, "heads")
        out = constrain(jnp.einsum("pgi,io->pgo", attended, block.o), "weights_stay", None, "width")
        x_PGD += norm("attn_post_norm", out) if config.post_norms else out
        normed = constrain(norm("mlp_norm", x_PGD), "weights_stay")
        gate_up = constrain(jnp.einsum("pgi,ico->pgco", normed, block.gate_up), "weights_stay", None, None, "ffn")
        up = ACTIVATIONS[config.activation](gate_up[:, :, 0]) * gate_up[:, :, 1]
        out = constrain(jnp.einsum("pgi,io->pgo", up, block.down), "weights_stay", None, "width")
        x_PGD += norm("mlp_post_norm", out) if config.post_norms else out
        return (x_PGD, own_k, own_v), None

    # The cache is carried, not scanned over, so that XLA updates it in place.
    inputs = (jnp.arange(config.layers), fused, *prompt_cache, local_layers(config))
    (x_PGD, *own_cache), _ = jax.lax.scan(layer, (embed(model, token_PG), *own_cache), inputs)
    return rms_norm(x_PGD, model.norm[...], config), tuple(own_cache)
