"""The sampler: the prompt is prefilled once for its group, then one compiled loop decodes until every row has ended.

End-of-sequence tokens are kept and counted, log-probabilities are those of the distribution sampled from, and
every random number is a function of (row key, token index) alone: not of the batch's layout nor of its history.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from drirl_jax.models import transformer
from drirl_jax.models.transformer import Transformer
from drirl_jax.types import Array, length_mask

FINISH = ("length", "stop")  # what the values of Rollout.finish mean


class Rollout(NamedTuple):
    """What the policy said.

    Attributes:
        response: [P, G, T] int32 ids; an end-of-sequence token that was sampled is part of the response.
        response_len: [P, G] int32.
        finish: [P, G] int32 index into FINISH.
        logp: [P, G, T] float32 log-probabilities, 0 at padding.
    """

    response: Array
    response_len: Array
    finish: Array
    logp: Array


def sample_categorical(uniform_N2: Array, logit_NV: Array, chunk: int = 256) -> Array:
    """Exact sample from softmax(logit): choose a chunk by its mass, then a token inside it, by inverse CDF.

    Two short cumulative sums instead of V random numbers a row: 20 times faster for V = 49,152.

    Args:
        uniform_N2: [N, 2] uniforms in [0, 1).
        logit_NV: [N, V].

    Returns:
        [N] int32.
    """
    rows, vocab = logit_NV.shape
    mass = jnp.exp(logit_NV - logit_NV.max(-1, keepdims=True))
    mass_NCK = jnp.pad(mass, ((0, 0), (0, -vocab % chunk))).reshape(rows, -1, chunk)

    def pick(mass_NM, uniform_N):
        cumulative = jnp.cumsum(mass_NM, axis=-1)
        return jnp.argmax(cumulative > uniform_N[:, None] * cumulative[:, -1:], axis=-1)

    chosen_N = pick(mass_NCK.sum(-1), uniform_N2[:, 0])
    inside_NK = jnp.take_along_axis(mass_NCK, chosen_N[:, None, None], axis=1)[:, 0]
    return (chosen_N * chunk + pick(inside_NK, uniform_N2[:, 1])).astype(jnp.int32)


@partial(jax.jit, static_argnames=("max_new", "temperature", "eos"))
def sample(
    model: Transformer,
    prompt_PS: Array,
    prompt_len_P: Array,
    key_PG: Array,
    *,
    max_new: int,
    temperature: float,
    eos: tuple[int, ...],
) -> Rollout:
    """Samples a group of responses for every prompt.

    Args:
        model: the policy, adapters merged.
        prompt_PS, prompt_len_P: right-padded prompts and their lengths.
        key_PG: [P, G] PRNG keys, one a response.
        max_new: T, the most tokens a response may have.
        temperature: of the softmax; 0 takes the most likely token (log-probabilities then at temperature 1).
        eos: ids that end a response.
    """
    P, G = key_PG.shape
    config = model.config
    prompt_mask_PS = length_mask(prompt_len_P, prompt_PS.shape[1])
    hidden_PSD, prompt_cache = transformer.prefill(model, prompt_PS)
    fused, unembed_VD = transformer.fuse(model), transformer.cast(model.unembed, config)
    first_PGD = jnp.broadcast_to(transformer.last_real(hidden_PSD, prompt_len_P)[:, None], (P, G, config.width))

    def choose(hidden_PGD, t):
        logit_NV = transformer.product("pgd,vd->pgv", hidden_PGD, unembed_VD).reshape(P * G, -1) / (temperature or 1.0)
        if temperature:
            uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, t), (2,)))(key_PG.reshape(-1))
            token_N = sample_categorical(uniform, logit_NV)
        else:
            token_N = jnp.argmax(logit_NV, axis=-1).astype(jnp.int32)
        picked_N = jnp.take_along_axis(logit_NV, token_N[:, None], axis=-1)[:, 0]
        logp_N = picked_N - jax.nn.logsumexp(logit_NV, axis=-1)
        return token_N.reshape(P, G), logp_N.reshape(P, G)

    def record(state, t, hidden_PGD):
        rollout, done_PG, own_cache = state
        token_PG, logp_PG = choose(hidden_PGD, t)
        token_PG = jnp.where(done_PG, eos[0], token_PG)
        ends_PG = ~done_PG & jnp.isin(token_PG, jnp.array(eos))
        rollout = Rollout(
            response=rollout.response.at[:, :, t].set(token_PG),
            response_len=rollout.response_len + ~done_PG,
            finish=rollout.finish + ends_PG,
            logp=rollout.logp.at[:, :, t].set(jnp.where(done_PG, 0.0, logp_PG)),
        )
        return rollout, done_PG | ends_PG, own_cache

    def step(carry):
        t, (rollout, done_PG, own_cache) = carry
        hidden_PGD, own_cache = transformer.decode(
            model,
            fused,
            rollout.response[:, :, t - 1],
            t - 1,
            prompt_len_P,
            prompt_mask_PS,
            prompt_cache,
            own_cache,
        )
        return t + 1, record((rollout, done_PG, own_cache), t, hidden_PGD)

    kv_shape = (config.layers, P, G, max_new, config.kv_heads, config.head_dim)
    empty = Rollout(
        response=jnp.full((P, G, max_new), eos[0], jnp.int32),
        response_len=jnp.zeros((P, G), jnp.int32),
        finish=jnp.zeros((P, G), jnp.int32),
        logp=jnp.zeros((P, G, max_new)),
    )
    own_cache = (jnp.zeros(kv_shape, hidden_PSD.dtype), jnp.zeros(kv_shape, hidden_PSD.dtype))
    state = record((empty, jnp.zeros((P, G), bool), own_cache), 0, first_PGD)
    _, (rollout, _, _) = jax.lax.while_loop(
        lambda carry: (carry[0] < max_new) & ~jnp.all(carry[1][1]), step, (1, state)
    )
    return rollout


def row_keys(key: Array, prompt_index_P: Array, group: int) -> Array:
    """[P, G] keys from (key, prompt index, response index), so that a response does not depend on its batch."""
    prompt_key_P = jax.vmap(lambda i: jax.random.fold_in(key, i))(prompt_index_P)
    return jax.vmap(lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(jnp.arange(group)))(prompt_key_P)
