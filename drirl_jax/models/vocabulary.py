"""Log-probabilities of response tokens, and sums of what a loss makes of them: a few rows of logits at a time."""

from __future__ import annotations

from functools import partial
from typing import Callable

import jax
import jax.numpy as jnp

from drirl_jax.models.attention import einsum_f32, softcap
from drirl_jax.models.transformer import Transformer, cast, predicting_states
from drirl_jax.runtime.sharding import axis_size
from drirl_jax.types import Array, Group, PyTree

CHUNK = 256  # about so many positions at a time, all prompts' together, on each device


def token_logprobs(
    model: Transformer, hidden, group: Group, temperature: float | Array, chunk: int = CHUNK
) -> tuple[Array, Array]:
    """Log-probability of each response token, and the entropy of its distribution, under softmax(z / temperature) of
    the logits z = h Eᵀ, which some models cap: see `attention.softcap`.

    Args:
        hidden, group: as of `transformer.predictors`.
        temperature: > 0, one for all or [G].
        chunk: see CHUNK; nothing of size T x V is kept.

    Returns:
        ([P, G, T] log-probabilities, [P, G, T] entropies without gradient), nats, float32; padding holds finite,
        meaningless values.
    """
    P, G, T = group.response.shape
    predictor_PND = predicting_states(hidden, group).reshape(P, G * T, -1)
    inverse_PN = _inverse(temperature, (P, G, T)).reshape(P, G * T)
    out = logprobs(
        cast(model.unembed, model.config), predictor_PND, group.response.reshape(P, G * T), inverse_PN, chunk,
        model.config.final_softcap,
    )  # fmt: skip
    return tuple(x_PN.reshape(P, G, T) for x_PN in out)


def token_sum(
    model: Transformer,
    hidden,
    group: Group,
    temperature: float | Array,
    function: Callable,
    arrays: PyTree,
    chunk: int = CHUNK,
) -> tuple[Array, dict[str, Array]]:
    """function(*token_logprobs(model, hidden, group, temperature), arrays), of a function that sums over tokens.

    It is given a few tokens of all responses at a time, one at least. So its derivative by their log-probabilities is
    known while their logits are there, and these are made once: three products with the vocabulary, where the
    log-probabilities alone, whose derivative is asked for later, need four.

    Args:
        hidden, group, temperature, chunk: as of `token_logprobs`.
        function: ([P, G, t] log-probabilities, [P, G, t] entropies, arrays [P, ..., t]) -> (scalar, {name: scalar}),
            sums over tokens, 0 where the arrays are; differentiable in the log-probabilities. The scalars of the dict
            have no gradient.
        arrays: [P, ..., T] constants.
    """
    (P, G, T), config = group.response.shape, model.config
    number = -(-T // max(1, chunk * axis_size("prompts") // (P * G)))
    read = group.response, _inverse(temperature, (P, G, T)), arrays
    of_tokens = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 1), read)
    predictor_PTGD = jnp.moveaxis(predicting_states(hidden, group), 2, 1)
    return _summed(cast(model.unembed, config), predictor_PTGD, of_tokens, function, number, config.final_softcap)


def _inverse(temperature, shape) -> Array:
    """1 / temperature of each token, which at rows that fill chunks up may be 0."""
    return jnp.broadcast_to(1 / jnp.reshape(jnp.asarray(temperature, jnp.float32), (-1, 1)), shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def logprobs(unembed_VD, hidden_PND, target_PN, inverse_PN, chunk: int = CHUNK, cap: float = 0.0):
    """([P, N] log softmax(z / τ) at the target, [P, N] entropies), about `chunk` rows of logits at a time.

    z = h Eᵀ, or c·tanh(h Eᵀ / c) where c = `cap` is not 0, whose derivative is 1 - (z / c)².

    Its derivative needs no second pass over the vocabulary for the hidden states:
    ∂logp/∂h = (z'_target E_target - Σ_v p_v z'_v E_v) / τ, z' = 1 without a cap, is [P, N, D] and is computed
    while the logits are there. Entropies carry no gradient.

    Args:
        inverse_PN: [P, N] 1 / τ of the temperature τ.
    """

    def one(part):
        logit, *_ = _logits(unembed_VD, *part, cap)
        return _row_logprobs(logit, part[1])[:2]

    return _joined(jax.lax.map(one, _rows(chunk, hidden_PND, target_PN, inverse_PN)), target_PN.shape[1])


def _logits(unembed_VD, h, y, inverse, cap):
    """Of one chunk, rows [...]: logits z / τ [..., V], z' [..., V] and z'_target [..., 1]; the last two 1
    without a cap."""
    capped = softcap(einsum_f32("...d,vd->...v", h, unembed_VD), cap)
    if not cap:
        return capped * inverse[..., None], 1, 1
    slope = 1 - (capped / cap) ** 2
    return capped * inverse[..., None], slope, jnp.take_along_axis(slope, y[..., None], axis=-1)


def _row_logprobs(logit, y):
    """Of one chunk: log-probabilities, entropies, and the norms that make probabilities of logits, each [...]."""
    norm = jax.nn.logsumexp(logit, axis=-1)
    entropy = norm - jnp.einsum("...v,...v->...", jnp.exp(logit - norm[..., None]), logit)
    return jnp.take_along_axis(logit, y[..., None], axis=-1)[..., 0] - norm, entropy, norm


def _by_hidden(unembed_VD, y, inverse, weight, at_target):
    """∂logp/∂h of one chunk, [..., D]; `weight` is p z'."""
    mean = einsum_f32("...v,vd->...d", weight.astype(unembed_VD.dtype), unembed_VD)
    return (at_target * unembed_VD[y] - mean) * inverse[..., None]


def _less(total_DV, gh, weight):
    """total_DV - Σ_rows gh weight: a sum as [D, V], so that no chunk's probabilities are transposed."""
    gh_MD, weight_MV = (x.reshape(-1, x.shape[-1]) for x in (gh, weight))
    return total_DV - jnp.einsum("md,mv->dv", gh_MD, weight_MV)


def _chunks(number: int, arrays: PyTree) -> PyTree:
    """Arrays [P, N, ...] as [K, P, N / K, ...], K = number; zero rows fill the last up.

    Every chunk has rows of all prompts, so that devices among which the prompts are dealt out work on each together.
    """

    def cut(x):
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % number)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], number, -1, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def _rows(chunk: int, *arrays):
    """`_chunks` of about `chunk` rows a device."""
    P, N = arrays[0].shape[:2]
    return _chunks(-(-N // max(1, chunk * axis_size("prompts") // P)), arrays)


def _joined(chunks: PyTree, length: int) -> PyTree:
    """What `_chunks` has cut, without the rows that fill up."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length], chunks)


def _logprobs_forward(unembed_VD, hidden_PND, target_PN, inverse_PN, chunk, cap):
    def one(part):
        _, y, inverse = part
        logit, slope, at_target = _logits(unembed_VD, *part, cap)
        logp, entropy, norm = _row_logprobs(logit, y)
        weight = slope * jnp.exp(logit - norm[..., None])
        return logp, entropy, norm, _by_hidden(unembed_VD, y, inverse, weight, at_target)

    read = jax.lax.map(one, _rows(chunk, hidden_PND, target_PN, inverse_PN))
    logp, entropy, *kept = _joined(read, target_PN.shape[1])
    return (logp, entropy), (unembed_VD, hidden_PND, target_PN, inverse_PN, *kept)


def _logprobs_backward(chunk, cap, saved, cotangents):
    unembed_VD, hidden_PND, target_PN, inverse_PN, norm_PN, slope_PND = saved
    g_PN = cotangents[0]

    # For the embedding the logits are needed again; where it is frozen, XLA drops this loop as dead.
    def add(total_DV, part):
        h, y, inverse, norm, g = part
        logit, slope, at_target = _logits(unembed_VD, h, y, inverse, cap)
        gh = ((g * inverse)[..., None] * h).astype(jnp.float32)
        return _less(total_DV, gh, slope * jnp.exp(logit - norm[..., None])), at_target * gh

    chunks = _rows(chunk, hidden_PND, target_PN, inverse_PN, norm_PN, g_PN)
    total_DV, of_target = jax.lax.scan(add, jnp.zeros(unembed_VD.shape[::-1], jnp.float32), chunks)
    total_VD = total_DV.T.at[chunks[1]].add(of_target)
    return total_VD.astype(unembed_VD.dtype), (g_PN[..., None] * slope_PND).astype(hidden_PND.dtype), None, None


logprobs.defvjp(_logprobs_forward, _logprobs_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _summed(unembed_VD, hidden_PTGD, of_tokens, function: Callable, number: int, cap: float):
    """`token_sum`; of_tokens holds targets and inverse temperatures [P, T, G], and arrays [P, T, ...]."""

    def one(part):
        h, (y, inverse, arrays) = part
        logit, *_ = _logits(unembed_VD, h, y, inverse, cap)
        return _called(function, *_row_logprobs(logit, y)[:2], arrays)

    chunks = _chunks(number, (hidden_PTGD, of_tokens))
    return jax.tree.map(lambda x: x.sum(axis=0), jax.lax.map(one, chunks))


def _called(function, logp_PtG, entropy_PtG, arrays):
    """The function's value of a chunk, tokens last as it wants them."""
    return function(*jax.tree.map(lambda x: jnp.moveaxis(x, 1, -1), (logp_PtG, entropy_PtG, arrays)))


def _summed_forward(unembed_VD, hidden_PTGD, of_tokens, function, number, cap):
    def add(total_DV, part):
        h, (y, inverse, arrays) = part
        logit, slope, at_target = _logits(unembed_VD, h, y, inverse, cap)
        logp, entropy, norm = _row_logprobs(logit, y)
        value, by_logp, scalars = jax.vjp(lambda logp: _called(function, logp, entropy, arrays), logp, has_aux=True)
        (g,) = by_logp(jnp.ones_like(value))
        weight = slope * jnp.exp(logit - norm[..., None])
        gh = ((g * inverse)[..., None] * h).astype(jnp.float32)
        by_hidden = g[..., None] * _by_hidden(unembed_VD, y, inverse, weight, at_target)
        return _less(total_DV, gh, weight), ((value, scalars), by_hidden, at_target * gh)

    chunks = _chunks(number, (hidden_PTGD, of_tokens))
    start = jnp.zeros(unembed_VD.shape[::-1], jnp.float32)  # where the embedding is frozen, XLA drops it as dead
    total_DV, (out, by_hidden, of_target) = jax.lax.scan(add, start, chunks)
    out = jax.tree.map(lambda x: x.sum(axis=0), out)
    slopes = total_DV, of_target, chunks[1][0], _joined(by_hidden, hidden_PTGD.shape[1])
    return out, (unembed_VD, hidden_PTGD, slopes)


def _summed_backward(function, number, cap, saved, cotangents):
    unembed_VD, hidden_PTGD, (total_DV, of_target, target, by_hidden) = saved
    total_VD = cotangents[0] * total_DV.T.at[target].add(of_target)
    return total_VD.astype(unembed_VD.dtype), (cotangents[0] * by_hidden).astype(hidden_PTGD.dtype), None


_summed.defvjp(_summed_forward, _summed_backward)
