"""Decoding with two caches of keys and values: one of each prompt for its whole group, and one of each response."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from drirl_jax.models.architecture import Config
from drirl_jax.models.attention import (
    layer_cos_sin,
    limit_to_window,
    local_layers,
    response_attention,
    response_heads_first,
    rope_cos_sin,
)
from drirl_jax.models.transformer import (
    Transformer,
    attention_inputs,
    cast,
    embed,
    finish_layer,
    norm_sizes,
    prompt_layer,
    rms_norm,
)
from drirl_jax.runtime.sharding import constrain
from drirl_jax.types import Array

FILLED = 64  # a CPU reads a response's cache in steps of 64 entries, or of a quarter of the cache if that is more


def prefill(model: Transformer, prompt_PS: Array, prefix: tuple[int, ...] = ()):
    """Hidden states [P, S, D] of the prompts; keys and values of prefix and prompts, each [L, P, KV, R + S, hd]."""
    config, R = model.config, len(prefix)
    prefix_cos_sin, cos_sin = (
        rope_cos_sin(config, position[None]) for position in (jnp.arange(R), R + jnp.arange(prompt_PS.shape[1]))
    )

    def run_layer(carry, inputs):
        prefix_1RD, x_PSD = carry
        block, local = inputs
        block, prefix_kv = cast(block, config), None
        if R:
            prefix_1RD, prefix_kv = prompt_layer(config, block, prefix_1RD, prefix_cos_sin, local, None, {}, None)
        x_PSD, cache = prompt_layer(config, block, x_PSD, cos_sin, local, prefix_kv, {}, None)
        return (prefix_1RD, x_PSD), cache

    embedded = (embed(model, jnp.array([prefix], jnp.int32)), embed(model, prompt_PS))
    (_, x_PSD), cache = jax.lax.scan(run_layer, embedded, (model.blocks, local_layers(config)))
    return rms_norm(x_PSD, model.norm[...], config), cache


class DecodeBlock(NamedTuple):
    """A block's weights for decoding, stacked over layers: matrices with the same input are joined into one.

    A few rows and small matrices do not keep a processor busy: with joined matrices a decoding step takes two thirds of
    the time. The matrices are [in, out], because products of a few rows are faster so. What is cut among devices has an
    axis of its own.

    Attributes:
        qkv: [L, D, KV, (H / KV + 2)·hd]; for each key head its queries, then the key, then the value.
        o: [L, H·hd, D].
        gate_up: [L, D, 2, F].
        down: [L, F, D].
        norms: the norms that `transformer.norm_sizes` lists, each [L, size].
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
        bias = jnp.concatenate(
            [rearrange(projection_bias, "l (k o) -> l k o", k=config.kv_heads) for projection_bias in biases], axis=2
        )
    return DecodeBlock(
        qkv=constrain(jnp.concatenate(qkv, axis=3), None, "width", "heads"),
        o=constrain(transposed("o"), None, "heads", "width"),
        gate_up=constrain(jnp.stack([transposed("gate"), transposed("up")], axis=2), None, "width", None, "ffn"),
        down=constrain(transposed("down"), None, "ffn", "width"),
        norms={name: getattr(blocks, name)[...] for name in norm_sizes(config)},
        qkv_bias=bias,
    )


class DecodeLayer(NamedTuple):
    """A `transformer.Layer` of a `DecodeBlock` without the axis of the layers, for states [P, G, D]."""

    config: Config
    block: DecodeBlock

    def norm(self, name: str, x: Array) -> Array:
        return rms_norm(x, self.block.norms[name], self.config)

    def qkv(self, x: Array) -> tuple[Array, Array, Array]:
        config, hd = self.config, self.config.head_dim
        qkv = jnp.einsum("pgi,iko->pgko", constrain(x, "weights_stay"), self.block.qkv)
        qkv = constrain(qkv, "weights_stay", None, "heads")
        qkv = constrain(qkv if self.block.qkv_bias is None else qkv + self.block.qkv_bias, "prompts", None, "heads")
        query_width = config.heads // config.kv_heads * hd
        q, k, v = jnp.split(qkv, (query_width, query_width + hd), axis=-1)
        return rearrange(q, "p g k (r d) -> p g (k r) d", d=hd), k, v

    def output(self, attended: Array) -> Array:
        attended = constrain(rearrange(attended, "p g h d -> p g (h d)"), "weights_stay", None, "heads")
        return constrain(jnp.einsum("pgi,io->pgo", attended, self.block.o), "weights_stay", None, "width")

    def gate_up(self, x: Array) -> tuple[Array, Array]:
        gate_up = jnp.einsum("pgi,ico->pgco", constrain(x, "weights_stay"), self.block.gate_up)
        gate_up = constrain(gate_up, "weights_stay", None, None, "ffn")
        return gate_up[:, :, 0], gate_up[:, :, 1]

    def down(self, x: Array) -> Array:
        return constrain(jnp.einsum("pgi,io->pgo", x, self.block.down), "weights_stay", None, "width")


def decode(
    model: Transformer, fused: DecodeBlock, token_PG, t, prompt_len_P, prompt_mask_PS, prompt_cache, response_cache
):
    """One decoding step: runs response token t of every row through the network.

    Args:
        fused: `fuse(model)`, computed once before the loop.
        token_PG: [P, G] ids of response token t.
        t: scalar int32, its index in the response.
        prompt_len_P, prompt_mask_PS: lengths and mask of the prompts, the prefix included.
        prompt_cache: (k, v) of `prefill`.
        response_cache: (k, v), each [L, P, KV, G, T, hd]; the entries before t are filled.

    Returns:
        ([P, G, D] final hidden states, response_cache with entry t filled).
    """
    config = model.config
    position_P1 = (prompt_len_P + t)[:, None]
    cos_sin = rope_cos_sin(config, jnp.broadcast_to(position_P1, token_PG.shape))
    attend = partial(_attend_to_caches, config, t, position_P1, prompt_mask_PS)

    def run_layer(carry, inputs):
        x_PGD, *response_kv = carry
        i, block, prompt_k, prompt_v, local = inputs
        layer = DecodeLayer(config, block)
        q, k, v = attention_inputs(layer, x_PGD, layer_cos_sin(config, cos_sin, local))
        response_k, response_v = (
            jax.lax.dynamic_update_slice(cache, response_heads_first(x[:, :, None])[None], (i, 0, 0, 0, t, 0))
            for cache, x in zip(response_kv, (k, v))
        )
        attended = attend(q[:, :, None], prompt_k, prompt_v, response_k, response_v, i, local)
        return (finish_layer(layer, x_PGD, attended[:, :, 0]), response_k, response_v), None

    # The scan carries the cache, so that XLA updates it in place.
    inputs = (jnp.arange(config.layers), fused, *prompt_cache, local_layers(config))
    (x_PGD, *response_cache), _ = jax.lax.scan(run_layer, (embed(model, token_PG), *response_cache), inputs)
    return rms_norm(x_PGD, model.norm[...], config), tuple(response_cache)


def _attend_to_caches(config: Config, t, position_P1, prompt_mask_PS, *operands) -> Array:
    """[P, G, 1, H, hd] attention of response token t to its prompt and to the tokens up to t of its response.

    Args:
        t, prompt_mask_PS: see `decode`.
        position_P1: position of token t in the whole text.
        operands: queries [P, G, 1, H, hd]; keys and values of the prompts, of one layer, and of the responses, of all
            layers; the layer's index, and its entry of `local_layers`.
    """
    T = operands[3].shape[4]
    step_size = max(FILLED, -(-T // 4))

    def attend_to_first(size: int, q_PG1Hd, prompt_k, prompt_v, response_k, response_v, i, local):
        """Reads only the first `size` entries of the responses' cache."""
        shape = (1, *response_k.shape[1:4], size, config.head_dim)
        start = (i, 0, 0, 0, 0, 0)
        filled_k, filled_v = (jax.lax.dynamic_slice(cache, start, shape)[0] for cache in (response_k, response_v))
        key_S, key_U = np.arange(prompt_mask_PS.shape[1]), np.arange(size)
        prompt_mask_P1S = limit_to_window(config, local, prompt_mask_PS[:, None], position_P1, key_S)
        mask_1U = limit_to_window(config, local, (jnp.arange(size) <= t)[None], jnp.reshape(t, 1), key_U)
        return response_attention(config, q_PG1Hd, prompt_k, prompt_v, prompt_mask_P1S, filled_k, filled_v, mask_1U)

    attend_by_size = [partial(attend_to_first, size) for size in (*range(step_size, T, step_size), T)]
    # For a branch a TPU copies the whole cache in every layer. That costs more than to read all of one layer's.
    attend_filled = partial(jax.lax.switch, t // step_size, attend_by_size)
    return jax.lax.platform_dependent(*operands, cpu=attend_filled, default=attend_by_size[-1])
