"""Log-probabilities of response tokens, sums of a loss over them, and KL, from a few rows of logits at a time."""

from __future__ import annotations

from functools import partial
from typing import Callable

import jax
import jax.numpy as jnp

from drirl_jax.models.attention import einsum_f32, softcap
from drirl_jax.models.transformer import Transformer, cast, predicting_states
from drirl_jax.runtime.sharding import axis_size
from drirl_jax.types import Array, Group, PyTree

CHUNK = 256  # about this many positions at a time on each device, of all prompts together


def token_logprobs(
    model: Transformer, hidden, group: Group, temperature: float | Array, chunk: int = CHUNK
) -> tuple[Array, Array]:
    """Log-probability of each response token, and entropy of its distribution, under softmax(z / temperature).

    The logits are z = h Eᵀ; some models cap them: see `attention.softcap`.

    Args:
        hidden, group: as in `transformer.predicting_states`.
        temperature: > 0, one for all responses or [G].
        chunk: see CHUNK; nothing of size T x V is kept.

    Returns:
        ([P, G, T] log-probabilities, [P, G, T] entropies without gradient), nats, float32. Values at padding are
        finite and have no meaning.
    """
    P, G, T = group.response.shape
    predictor_PND = predicting_states(hidden, group).reshape(P, G * T, -1)
    inverse_PN = _inverse_temperature(temperature, (P, G, T)).reshape(P, G * T)
    flat_results = logprobs(
        cast(model.unembed, model.config), predictor_PND, group.response.reshape(P, G * T), inverse_PN, chunk,
        model.config.final_softcap,
    )  # fmt: skip
    return tuple(x_PN.reshape(P, G, T) for x_PN in flat_results)


def token_sum(
    model: Transformer,
    hidden,
    group: Group,
    temperature: float | Array,
    function: Callable,
    arrays: PyTree,
    chunk: int = CHUNK,
) -> tuple[Array, dict[str, Array]]:
    """function(*token_logprobs(model, hidden, group, temperature), arrays), for a function that sums over tokens.

    The function gets a few tokens of all responses at a time, at least one. So its derivative by the log-probabilities
    is computed while their logits exist, and logits are computed once. This takes three products with the vocabulary;
    `token_logprobs`, whose derivative comes later, takes four.

    Args:
        hidden, group, temperature, chunk: as in `token_logprobs`.
        function: ([P, G, t] log-probabilities, [P, G, t] entropies, arrays [P, ..., t]) -> (scalar, {name: scalar}).
            Both are sums over tokens; a token where the arrays are 0 adds 0. The scalar is differentiable in the
            log-probabilities. The scalars of the dict have no gradient.
        arrays: [P, ..., T] constants.
    """
    (P, G, T), config = group.response.shape, model.config
    chunk_count = -(-T // max(1, chunk * axis_size("prompts") // (P * G)))
    token_arrays = group.response, _inverse_temperature(temperature, (P, G, T)), arrays
    token_arrays_PT = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 1), token_arrays)
    predictor_PTGD = jnp.moveaxis(predicting_states(hidden, group), 2, 1)
    return _sum_chunks(
        cast(model.unembed, config), predictor_PTGD, token_arrays_PT, function, chunk_count, config.final_softcap
    )


def token_kl(
    model: Transformer, hidden, reference: Transformer, reference_hidden, group: Group, chunk: int = CHUNK
) -> Array:
    """KL(π ‖ π_ref) of the distributions from which each response token comes, at temperature 1.

    KL = Σ_v π(v) (log π(v) - log π_ref(v)), exactly, over the whole vocabulary (S. Kullback, R. A. Leibler 1951).

    Args:
        model, hidden: π, and its states of the group: see `transformer.predicting_states`.
        reference, reference_hidden: the same of π_ref, which has the same vocabulary.
        group: the responses.
        chunk: see CHUNK; nothing of size T x V is kept.

    Returns:
        [P, G, T] nats, float32. Values at padding are finite and have no meaning.
    """
    P, G, T = group.response.shape
    unembeds = [cast(policy.unembed, policy.config) for policy in (model, reference)]
    caps = model.config.final_softcap, reference.config.final_softcap

    def chunk_kl(states):
        logits = (softcap(einsum_f32("pnd,vd->pnv", *pair), cap) for *pair, cap in zip(states, unembeds, caps))
        logp, logp_ref = map(jax.nn.log_softmax, logits)
        return jnp.sum(jnp.exp(logp) * (logp - logp_ref), axis=-1)

    states = (predicting_states(x, group).reshape(P, G * T, -1) for x in (hidden, reference_hidden))
    return _join_chunks(jax.lax.map(chunk_kl, _cut_rows(chunk, *states)), G * T).reshape(P, G, T)


def _inverse_temperature(temperature, shape) -> Array:
    """1 / temperature of each token. (The rows that fill up chunks later have 0 here.)"""
    return jnp.broadcast_to(1 / jnp.reshape(jnp.asarray(temperature, jnp.float32), (-1, 1)), shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def logprobs(unembed_VD, hidden_PND, target_PN, inverse_PN, chunk: int = CHUNK, cap: float = 0.0):
    """([P, N] log softmax(z / τ) at the target, [P, N] entropies), about `chunk` rows of logits at a time.

    z = h Eᵀ. If c = `cap` is not 0, z = c·tanh(h Eᵀ / c), with the derivative z' = 1 - (z / c)².

    The derivative by the hidden states needs no second pass over the vocabulary:
    ∂logp/∂h = (z'_target E_target - Σ_v p_v z'_v E_v) / τ, z' = 1 without a cap, is [P, N, D] and is computed
    while the logits exist. Entropies have no gradient.

    Args:
        inverse_PN: [P, N] 1 / τ, for the temperature τ.
    """

    def score_chunk(rows):
        logit, *_ = _logits(unembed_VD, *rows, cap)
        return _row_logprobs(logit, rows[1])[:2]

    return _join_chunks(
        jax.lax.map(score_chunk, _cut_rows(chunk, hidden_PND, target_PN, inverse_PN)), target_PN.shape[1]
    )


def _logits(unembed_VD, hidden, target, inverse, cap):
    """Logits z / τ [..., V], z' [..., V] and z'_target [..., 1] of one chunk with rows [...]; z' is 1 without a cap."""
    capped = softcap(einsum_f32("...d,vd->...v", hidden, unembed_VD), cap)
    if not cap:
        return capped * inverse[..., None], 1, 1
    slope = 1 - (capped / cap) ** 2
    return capped * inverse[..., None], slope, jnp.take_along_axis(slope, target[..., None], axis=-1)


def _row_logprobs(logit, target):
    """Log-probabilities, entropies and log-normalisers (logsumexp of the logits) of one chunk, each [...]."""
    norm = jax.nn.logsumexp(logit, axis=-1)
    entropy = norm - jnp.einsum("...v,...v->...", jnp.exp(logit - norm[..., None]), logit)
    return jnp.take_along_axis(logit, target[..., None], axis=-1)[..., 0] - norm, entropy, norm


def _hidden_gradient(unembed_VD, target, inverse, weight, target_slope):
    """∂logp/∂h of one chunk, [..., D]; `weight` is p z'."""
    mean_embedding = einsum_f32("...v,vd->...d", weight.astype(unembed_VD.dtype), unembed_VD)
    return (target_slope * unembed_VD[target] - mean_embedding) * inverse[..., None]


def _subtract_rows(gradient_DV, weighted_hidden, weight):
    """gradient_DV - Σ_rows weighted_hidden · weight; as [D, V], so that no chunk's probabilities are transposed."""
    weighted_hidden_MD, weight_MV = (x.reshape(-1, x.shape[-1]) for x in (weighted_hidden, weight))
    return gradient_DV - jnp.einsum("md,mv->dv", weighted_hidden_MD, weight_MV)


def _cut_chunks(count: int, arrays: PyTree) -> PyTree:
    """Arrays [P, N, ...] as [K, P, N / K, ...], K = count; zero rows fill up the last chunk.

    Every chunk has rows of all prompts, so that devices that divide the prompts work on each chunk together.
    """

    def cut(x):
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % count)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def _cut_rows(chunk: int, *arrays):
    """Arrays [P, N, ...] cut by `_cut_chunks` into chunks of about `chunk` rows a device."""
    P, N = arrays[0].shape[:2]
    return _cut_chunks(-(-N // max(1, chunk * axis_size("prompts") // P)), arrays)


def _join_chunks(chunks: PyTree, length: int) -> PyTree:
    """The inverse of `_cut_chunks`: it removes the rows that fill up the last chunk."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length], chunks)


def _logprobs_forward(unembed_VD, hidden_PND, target_PN, inverse_PN, chunk, cap):
    def score_chunk(rows):
        _, target, inverse = rows
        logit, slope, target_slope = _logits(unembed_VD, *rows, cap)
        logp, entropy, norm = _row_logprobs(logit, target)
        weight = slope * jnp.exp(logit - norm[..., None])
        return logp, entropy, norm, _hidden_gradient(unembed_VD, target, inverse, weight, target_slope)

    chunk_results = jax.lax.map(score_chunk, _cut_rows(chunk, hidden_PND, target_PN, inverse_PN))
    logp, entropy, *residuals = _join_chunks(chunk_results, target_PN.shape[1])
    return (logp, entropy), (unembed_VD, hidden_PND, target_PN, inverse_PN, *residuals)


def _logprobs_backward(chunk, cap, residuals, cotangents):
    unembed_VD, hidden_PND, target_PN, inverse_PN, norm_PN, slope_PND = residuals
    g_PN = cotangents[0]

    # The gradient of the embedding needs the logits again. If the embedding is frozen, XLA removes this loop as dead.
    def add_chunk(gradient_DV, rows):
        hidden, target, inverse, norm, cotangent = rows
        logit, slope, target_slope = _logits(unembed_VD, hidden, target, inverse, cap)
        weighted_hidden = ((cotangent * inverse)[..., None] * hidden).astype(jnp.float32)
        return _subtract_rows(
            gradient_DV, weighted_hidden, slope * jnp.exp(logit - norm[..., None])
        ), target_slope * weighted_hidden

    chunks = _cut_rows(chunk, hidden_PND, target_PN, inverse_PN, norm_PN, g_PN)
    gradient_DV, target_gradient = jax.lax.scan(add_chunk, jnp.zeros(unembed_VD.shape[::-1], jnp.float32), chunks)
    gradient_VD = gradient_DV.T.at[chunks[1]].add(target_gradient)
    return (
        gradient_VD.astype(unembed_VD.dtype),
        (g_PN[..., None] * slope_PND).astype(hidden_PND.dtype),
        None,
        None,
    )


logprobs.defvjp(_logprobs_forward, _logprobs_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _sum_chunks(unembed_VD, hidden_PTGD, token_arrays, function: Callable, chunk_count: int, cap: float):
    """`token_sum`; token_arrays holds targets and inverse temperatures [P, T, G], and arrays [P, T, ...]."""

    def apply_to_rows(rows):
        hidden, (target, inverse, arrays) = rows
        logit, *_ = _logits(unembed_VD, hidden, target, inverse, cap)
        return _apply_to_chunk(function, *_row_logprobs(logit, target)[:2], arrays)

    chunks = _cut_chunks(chunk_count, (hidden_PTGD, token_arrays))
    return jax.tree.map(lambda x: x.sum(axis=0), jax.lax.map(apply_to_rows, chunks))


def _apply_to_chunk(function, logp_PtG, entropy_PtG, arrays):
    """The function's value for a chunk; moves the token axis to the last place, where the function expects it."""
    return function(*jax.tree.map(lambda x: jnp.moveaxis(x, 1, -1), (logp_PtG, entropy_PtG, arrays)))


def _sum_chunks_forward(unembed_VD, hidden_PTGD, token_arrays, function, chunk_count, cap):
    def add_chunk(gradient_DV, rows):
        hidden, (target, inverse, arrays) = rows
        logit, slope, target_slope = _logits(unembed_VD, hidden, target, inverse, cap)
        logp, entropy, norm = _row_logprobs(logit, target)
        value, pullback, scalars = jax.vjp(
            lambda logp: _apply_to_chunk(function, logp, entropy, arrays), logp, has_aux=True
        )
        (logp_gradient,) = pullback(jnp.ones_like(value))
        weight = slope * jnp.exp(logit - norm[..., None])
        weighted_hidden = ((logp_gradient * inverse)[..., None] * hidden).astype(jnp.float32)
        hidden_gradient = logp_gradient[..., None] * _hidden_gradient(unembed_VD, target, inverse, weight, target_slope)
        return _subtract_rows(gradient_DV, weighted_hidden, weight), (
            (value, scalars),
            hidden_gradient,
            target_slope * weighted_hidden,
        )

    chunks = _cut_chunks(chunk_count, (hidden_PTGD, token_arrays))
    zeros_DV = jnp.zeros(unembed_VD.shape[::-1], jnp.float32)  # if the embedding is frozen, XLA removes it as dead
    gradient_DV, (totals, hidden_gradient, target_gradient) = jax.lax.scan(add_chunk, zeros_DV, chunks)
    totals = jax.tree.map(lambda x: x.sum(axis=0), totals)
    gradients = gradient_DV, target_gradient, chunks[1][0], _join_chunks(hidden_gradient, hidden_PTGD.shape[1])
    return totals, (unembed_VD, hidden_PTGD, gradients)


def _sum_chunks_backward(function, chunk_count, cap, residuals, cotangents):
    unembed_VD, hidden_PTGD, (gradient_DV, target_gradient, target, hidden_gradient) = residuals
    gradient_VD = cotangents[0] * gradient_DV.T.at[target].add(target_gradient)
    return gradient_VD.astype(unembed_VD.dtype), (cotangents[0] * hidden_gradient).astype(hidden_PTGD.dtype), None


_sum_chunks.defvjp(_sum_chunks_forward, _sum_chunks_backward)
