"""Attention that keeps a prompt's keys once for its whole group: rotary positions, masks, the two softmaxes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from drirl_jax.models.architecture import Config
from drirl_jax.types import Array, length_mask


def einsum_f32(equation: str, *arrays: Array) -> Array:
    """An einsum whose sums and result are float32, whatever the dtype of the arrays."""
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def softcap(x: Array, cap: float) -> Array:
    """cap · tanh(x / cap), which keeps x within ±cap; x itself where cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def rope_cos_sin(config: Config, position_PN: Array) -> tuple[Array, Array]:
    """(cos, sin), each [P, N, 1, hd/2], of the angles position·θ^(-2i/hd), computed once for all layers.

    If local layers have their own θ, each is a stack of two, global first: see `layer_cos_sin`.
    """
    half = config.head_dim // 2

    def compute_frequencies(theta):
        return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)

    frequency_d = compute_frequencies(config.rope_theta)
    if config.rope_scaling:
        frequency_d = config.rope_scaling(frequency_d)
    position, frequency = position_PN[..., None, None], frequency_d[None, None, None]
    if config.local_rope_theta:
        local_frequency_d = compute_frequencies(config.local_rope_theta)
        position, frequency = position[None], jnp.stack([frequency_d, local_frequency_d])[:, None, None, None]
    angle = position * frequency
    return jnp.cos(angle).astype(config.dtype), jnp.sin(angle).astype(config.dtype)


def layer_cos_sin(config: Config, cos_sin: tuple[Array, Array], local: Array | None) -> tuple[Array, Array]:
    """The (cos, sin) of one layer, from those of `rope_cos_sin`; `local` is the layer's entry of `local_layers`."""
    return tuple(x[local.astype(int)] for x in cos_sin) if config.local_rope_theta else cos_sin


def rope(x_PNHd: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Rotates the pair (i, i + hd/2) of each head by its angle: half-split, as in Hugging Face's Llama."""
    cos, sin = cos_sin
    half = x_PNHd.shape[-1] // 2
    first_half, second_half = x_PNHd[..., :half], x_PNHd[..., half:]
    return jnp.concatenate([first_half * cos - second_half * sin, second_half * cos + first_half * sin], axis=-1)


def local_layers(config: Config, layers: slice = slice(None)) -> Array | None:
    """[L] bool, True at local layers, for the scan over the blocks; None if every layer sees all tokens."""
    return jnp.array(config.local[layers]) if config.local else None


def limit_to_window(
    config: Config, local: Array | None, mask: Array, query_position: Array, key_position: Array
) -> Array:
    """The mask [..., Q, U] of keys that queries may see; in a local layer, keys outside the window are removed.

    Args:
        local: scalar bool, the layer's entry of `local_layers`; None if no layer is local.
        mask: bool, broadcast against [..., Q, U].
        query_position, key_position: positions [..., Q] and [U], counted from the same origin.
    """
    return mask if local is None else mask & (~local | (query_position[..., None] - key_position < config.window))


def heads_first(x_NKd: Array) -> Array:
    """Keys or values [..., N, KV, hd] as [..., KV, N, hd]: in this order einsum copies nothing."""
    return jnp.swapaxes(x_NKd, -2, -3)


def response_heads_first(x_PGTKd: Array) -> Array:
    """Keys or values of responses, [P, G, T, KV, hd], as [P, KV, G, T, hd]."""
    return rearrange(x_PGTKd, "p g t k d -> p k g t d")


def scale_queries(config: Config, q: Array) -> Array:
    return q * (config.query_pre_attn_scalar or config.head_dim) ** -0.5


def prompt_attention(config: Config, q_PSHd, k_PKUd, v_PKUd, local=None) -> Array:
    """Causal attention of the prompt's S tokens, [P, S, H, hd]; they are the last S of the U tokens that have keys.

    Padding needs no mask: it comes after every real query. For `local` see `limit_to_window`.
    """
    (P, S, H, _), (_, K, U, _) = q_PSHd.shape, k_PKUd.shape
    q_PKNd = rearrange(scale_queries(config, q_PSHd), "p s (k r) d -> p k (r s) d", k=K)
    score = softcap(einsum_f32("pknd,pkud->pknu", q_PKNd, k_PKUd), config.attn_softcap).reshape(P, K, H // K, S, U)
    causal = limit_to_window(config, local, jnp.tril(jnp.ones((S, U), bool), U - S), np.arange(U - S, U), np.arange(U))
    weight = jax.nn.softmax(jnp.where(causal, score, -jnp.inf), axis=-1).astype(v_PKUd.dtype)
    attended = jnp.einsum("pknu,pkud->pknd", weight.reshape(P, K, -1, U), v_PKUd)
    return rearrange(attended, "p k (r s) d -> p s (k r) d", s=S)


def response_attention(
    config: Config, q_PGQHd, prompt_k, prompt_v, prompt_mask_PQS, response_k, response_v, response_mask_QU
) -> Array:
    """Attention of response queries to the shared prompt and to their own response, in one softmax.

    Args:
        q_PGQHd: [P, G, Q, H, hd] queries.
        prompt_k, prompt_v: [P, KV, S, hd], kept once for the group.
        prompt_mask_PQS: [P, Q or 1, S] bool, True where query q may see prompt token s.
        response_k, response_v: [P, KV, G, U, hd], of the response itself.
        response_mask_QU: [Q, U] bool, True where query q may see key u of its response; each query sees at least one.

    Returns:
        [P, G, Q, H, hd].
    """
    (P, G, Q, H, hd), K = q_PGQHd.shape, response_k.shape[1]
    scores_shape = (P, K, G, H // K, Q, -1)
    q = rearrange(scale_queries(config, q_PGQHd), "p g q (k r) d -> p k g (r q) d", k=K)
    prompt_score = einsum_f32("pknd,pksd->pkns", q.reshape(P, K, -1, hd), prompt_k).reshape(scores_shape)
    response_score = einsum_f32("pkgnd,pkgud->pkgnu", q, response_k).reshape(scores_shape)
    prompt_score = softcap(prompt_score, config.attn_softcap)
    response_score = softcap(response_score, config.attn_softcap)
    prompt_score = jnp.where(prompt_mask_PQS[:, None, None, None], prompt_score, -jnp.inf)
    response_score = jnp.where(response_mask_QU, response_score, -jnp.inf)
    max_score = jnp.maximum(prompt_score.max(-1, keepdims=True), response_score.max(-1, keepdims=True))
    max_score = jax.lax.stop_gradient(max_score)
    prompt_weight, response_weight = jnp.exp(prompt_score - max_score), jnp.exp(response_score - max_score)
    total = (prompt_weight.sum(-1) + response_weight.sum(-1))[..., None].astype(response_v.dtype)
    prompt_weight = prompt_weight.astype(prompt_v.dtype).reshape(P, K, -1, prompt_v.shape[2])
    response_weight = response_weight.astype(response_v.dtype).reshape(P, K, G, -1, response_v.shape[3])
    attended = jnp.einsum("pkns,pksd->pknd", prompt_weight, prompt_v).reshape(P, K, G, -1, hd)
    attended += jnp.einsum("pkgnu,pkgud->pkgnd", response_weight, response_v)
    return rearrange(attended.reshape(P, K, G, -1, Q, hd) / total, "p k g r q d -> p g q (k r) d")


class Layout(NamedTuple):
    """The N = S + G·T positions of a group: S of the prompt, T of each response; a shared prefix of R comes first."""

    prefix: int
    prompt: int
    group_size: int
    response: int
    prompt_len_P: Array

    def split(self, x_PN: Array) -> tuple[Array, Array]:
        """x_PN [P, N, ...] cut into the prompts' part [P, S, ...] and the responses' part [P, G, T, ...]."""
        S = self.prompt
        return x_PN[:, :S], rearrange(x_PN[:, S:], "p (g t) ... -> p g t ...", g=self.group_size)

    def join(self, x_PS: Array, x_PGT: Array) -> Array:
        """The inverse of `split`."""
        return jnp.concatenate([x_PS, rearrange(x_PGT, "p g t ... -> p (g t) ...")], axis=1)

    def position_PN(self) -> Array:
        """[P, N] the position of each token in its own sequence; the first token of the prefix has position 0."""
        P, S, G = len(self.prompt_len_P), self.prompt, self.group_size
        response_position = self.prompt_len_P[:, None] + jnp.tile(jnp.arange(self.response), G)[None]
        return self.prefix + jnp.concatenate([jnp.broadcast_to(jnp.arange(S), (P, S)), response_position], axis=1)


def with_prefix(prefix_kv, k_PKSd: Array, v_PKSd: Array) -> tuple[Array, Array]:
    """Keys and values [P, KV, R + S, hd] of prefix and prompts.

    `prefix_kv` has the prefix's keys and values, once for all prompts or once for each; None without a prefix.
    """
    if prefix_kv is None:
        return k_PKSd, v_PKSd

    def prepend(prefix, prompt):
        return jnp.concatenate([jnp.broadcast_to(prefix, (prompt.shape[0], *prefix.shape[1:])), prompt], axis=2)

    return prepend(prefix_kv[0], k_PKSd), prepend(prefix_kv[1], v_PKSd)


def group_attention(config: Config, layout: Layout, q_PNHd, k_PNKd, v_PNKd, prefix_kv=None, local=None) -> Array:
    """Attention of prompts and their responses, [P, N, H, hd]: the reference for the other rows of `flash.ATTENTION`.

    Args:
        q_PNHd, k_PNKd, v_PNKd: rotated queries and keys, and values, of the layout's positions.
        prefix_kv: keys and values of the prefix: see `with_prefix`.
        local: see `limit_to_window`.
    """
    (q_s, q_t), (k_s, k_t), (v_s, v_t) = (layout.split(x) for x in (q_PNHd, k_PNKd, v_PNKd))
    k_s, v_s = with_prefix(prefix_kv, heads_first(k_s), heads_first(v_s))
    attended_s = prompt_attention(config, q_s, k_s, v_s, local)
    R, S, _, T, prompt_len_P = layout
    position_PT = layout.position_PN()[:, S : S + T]
    prompt_mask_PTU = length_mask(R + prompt_len_P, R + S)[:, None]
    prompt_mask_PTU = limit_to_window(config, local, prompt_mask_PTU, position_PT, np.arange(R + S))
    response_mask_TT = limit_to_window(config, local, jnp.tril(jnp.ones((T, T), bool)), np.arange(T), np.arange(T))
    response_k, response_v = response_heads_first(k_t), response_heads_first(v_t)
    attended_t = response_attention(config, q_t, k_s, v_s, prompt_mask_PTU, response_k, response_v, response_mask_TT)
    return layout.join(attended_s, attended_t)
