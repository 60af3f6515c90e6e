"""The sampler: the prompt is prefilled once for its group, then one compiled loop decodes until every row has ended.

End-of-sequence tokens are kept and counted, log-probabilities are those of the distribution sampled from, and
every random number is a function of (row key, token index) alone: not of the batch's layout nor of its history.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from drirl_jax.models import decoding, transformer
from drirl_jax.models.attention import einsum_f32, softcap
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime.sharding import axis_size, constrain
from drirl_jax.types import Array, length_mask

FINISH = ("length", "stop")  # what the values of Rollout.finish mean
COMPACT = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)  # see `sample`
FEWEST, SHORTEST = 4, 48  # fewer rows take as long as these, and shorter responses do not repay the compiling


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


def sample_categorical(uniform_N2: Array, logit_NV: Array, chunk: int = 256) -> tuple[Array, Array]:
    """Exact sample from softmax(logit): choose a chunk by its mass, then a token inside it, by inverse CDF.

    Two short cumulative sums instead of V random numbers a row: 20 times faster for V = 49,152. The sum of all mass
    tells the sample's log-probability too.

    Args:
        uniform_N2: [N, 2] uniforms in [0, 1).
        logit_NV: [N, V].

    Returns:
        ([N] int32 tokens, [N] their log-probabilities, nats).
    """
    rows, vocab = logit_NV.shape
    top_N1 = logit_NV.max(-1, keepdims=True)
    mass = jnp.exp(logit_NV - top_N1)
    mass_NCK = jnp.pad(mass, ((0, 0), (0, -vocab % chunk))).reshape(rows, -1, chunk)

    def pick(mass_NM, uniform_N):
        cumulative = jnp.cumsum(mass_NM, axis=-1)
        return jnp.argmax(cumulative > uniform_N[:, None] * cumulative[:, -1:], axis=-1)

    mass_NC = mass_NCK.sum(-1)
    chosen_N = pick(mass_NC, uniform_N2[:, 0])
    inside_NK = jnp.take_along_axis(mass_NCK, chosen_N[:, None, None], axis=1)[:, 0]
    token_N = (chosen_N * chunk + pick(inside_NK, uniform_N2[:, 1])).astype(jnp.int32)
    return token_N, entry(logit_NV, token_N) - top_N1[:, 0] - jnp.log(mass_NC.sum(-1))


def entry(x_NV: Array, index_N: Array) -> Array:
    """[N] the entry of each row."""
    return jnp.take_along_axis(x_NV, index_N[:, None], axis=-1)[:, 0]


class Slots(NamedTuple):
    """The rows that a decoding loop works on: B of each of A prompts, and what they attend to.

    Attributes:
        row: [A, B] int32, which row of the whole batch each is.
        prompt_len, prompt_mask: [A] and [A, R + S], the prefix counted in.
        prompt_cache: keys and values of the prompts, each [L, A, KV, R + S, hd].
        own_cache: those of the responses, each [L, A, KV, B, T, hd].
    """

    row: Array
    prompt_len: Array
    prompt_mask: Array
    prompt_cache: tuple[Array, Array]
    own_cache: tuple[Array, Array]


def compact_slots(slots: Slots, done_N: Array, few: int, dealt: int) -> Slots:
    """The slots whose rows have not ended (and some that have, if those are fewer), each with its own prompt.

    Args:
        slots, done_N: the slots, and which rows of the whole batch have ended.
        few: how many slots are left of each part.
        dealt: the number of equal parts in which the slots lie on the devices; none leaves its part.
    """
    B = slots.row.shape[1]
    row_MB = slots.row.reshape(dealt, -1)
    keep_MC = jnp.argsort(done_N[row_MB], axis=1, stable=True)[:, :few]

    def kept(x, index_MC, axis):
        parts = x.reshape(*x.shape[:axis], dealt, -1, *x.shape[axis + 1 :])
        taken = jax.vmap(lambda part, index: jnp.take(part, index, axis=axis), (axis, 0), axis)(parts, index_MC)
        return taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    return Slots(
        kept(slots.row.reshape(-1), keep_MC, 0)[:, None],
        kept(slots.prompt_len, keep_MC // B, 0),
        kept(slots.prompt_mask, keep_MC // B, 0),
        jax.tree.map(lambda x: kept(x, keep_MC // B, 1), slots.prompt_cache),
        jax.tree.map(lambda x: kept(rearrange(x, "l a k b t d -> l (a b) k 1 t d"), keep_MC, 1), slots.own_cache),
    )


@partial(jax.jit, static_argnames=("max_new", "temperature", "eos", "prefix", "compact"))
def sample(
    model: Transformer,
    prompt_PS: Array,
    prompt_len_P: Array,
    key_PG: Array,
    *,
    max_new: int,
    temperature: float,
    eos: tuple[int, ...],
    prefix: tuple[int, ...] = (),
    compact: tuple[float, ...] = COMPACT,
) -> Rollout:
    """Samples a group of responses for every prompt.

    Args:
        model: the policy, adapters merged.
        prompt_PS, prompt_len_P: right-padded prompts and their lengths.
        key_PG: [P, G] PRNG keys, one a response.
        max_new: T, the most tokens a response may have.
        temperature: of the softmax; 0 takes the most likely token (log-probabilities then at temperature 1).
        eos: ids that end a response.
        prefix: ids that stand before every prompt: see `types.Group`.
        compact: falling shares of the batch's rows. When no more than that share of them goes on, decoding goes on
            with these rows alone, so that the others are not paid for. Each share is one more loop to compile.
    """
    P, G = key_PG.shape
    N, config, key_N = P * G, model.config, key_PG.reshape(-1)
    dealt = axis_size("prompts") if P % axis_size("prompts") == 0 else 1
    hidden_PSD, prompt_cache = decoding.prefill(model, prompt_PS, prefix)
    fused = decoding.fuse(model)
    unembed_VD = constrain(transformer.cast(model.unembed, config), "spread_vocab")

    def choose(hidden_CD, t, key_C):
        logit_CV = einsum_f32("cd,vd->cv", constrain(hidden_CD, "weights_stay"), unembed_VD)
        logit_CV = constrain(logit_CV, "weights_stay", "spread_vocab")
        logit_CV = softcap(logit_CV, config.final_softcap) / (temperature or 1.0)
        if temperature:
            uniform_C2 = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t), (2,)))(key_C)
            return sample_categorical(uniform_C2, logit_CV)
        token_C = jnp.argmax(logit_CV, axis=-1).astype(jnp.int32)
        return token_C, entry(logit_CV, token_C) - jax.nn.logsumexp(logit_CV, axis=-1)

    def record(rollout, done_N, t, hidden_ABD, row_AB):
        row_C = row_AB.reshape(-1)
        token_C, logp_C = choose(hidden_ABD.reshape(-1, config.width), t, key_N[row_C])
        done_C = done_N[row_C]
        token_C = jnp.where(done_C, eos[0], token_C)
        ends_C = ~done_C & jnp.isin(token_C, jnp.array(eos))
        rollout = Rollout(
            response=rollout.response.at[row_C, t].set(token_C),
            response_len=rollout.response_len.at[row_C].add(~done_C),
            finish=rollout.finish.at[row_C].add(ends_C),
            logp=rollout.logp.at[row_C, t].set(jnp.where(done_C, 0.0, logp_C)),
        )
        return rollout, done_N.at[row_C].set(done_C | ends_C)

    def decode_until(few: int, slots: Slots, t, rollout, done_N):
        """Decodes until at most `few` rows of each part go on."""

        def step(carry):
            t, rollout, done_N, own_cache = carry
            hidden_ABD, own_cache = decoding.decode(
                model, fused, rollout.response[slots.row, t - 1], t - 1,
                slots.prompt_len, slots.prompt_mask, slots.prompt_cache, own_cache,
            )  # fmt: skip
            return t + 1, *record(rollout, done_N, t, hidden_ABD, slots.row), own_cache

        def goes_on(carry):
            return (carry[0] < max_new) & (jnp.sum(~carry[2].reshape(dealt, -1), axis=1).max() > few)

        t, rollout, done_N, own_cache = jax.lax.while_loop(goes_on, step, (t, rollout, done_N, slots.own_cache))
        return slots._replace(own_cache=own_cache), t, rollout, done_N

    kv_shape = (config.layers, P, config.kv_heads, G, max_new, config.head_dim)
    caches = ((*prompt_cache,), (jnp.zeros(kv_shape, hidden_PSD.dtype), jnp.zeros(kv_shape, hidden_PSD.dtype)))
    prompt_cache, own_cache = jax.tree.map(lambda x: constrain(x, None, "prompts", "heads"), caches)
    slots = Slots(
        jnp.arange(N).reshape(P, G),
        len(prefix) + prompt_len_P,
        length_mask(len(prefix) + prompt_len_P, len(prefix) + prompt_PS.shape[1]),
        prompt_cache,
        own_cache,
    )
    empty = Rollout(
        response=jnp.full((N, max_new), eos[0], jnp.int32),
        response_len=jnp.zeros(N, jnp.int32),
        finish=jnp.zeros(N, jnp.int32),
        logp=jnp.zeros((N, max_new)),
    )
    first_PGD = jnp.broadcast_to(transformer.last_token(hidden_PSD, prompt_len_P)[:, None], (P, G, config.width))
    state = (jnp.ones((), jnp.int32), *record(empty, jnp.zeros(N, bool), 0, first_PGD, slots.row))
    sizes = [int(share * N / dealt) for share in compact if share * N / dealt >= FEWEST and max_new >= SHORTEST]
    for few in sizes:
        slots, *state = decode_until(few, slots, *state)
        slots = compact_slots(slots, state[2], few, dealt)
    _, _, rollout, _ = decode_until(0, slots, *state)
    return jax.tree.map(lambda x: x.reshape(P, G, *x.shape[1:]), rollout)


def response_keys(key: Array, prompt_index_P: Array, group: int) -> Array:
    """[P, G] keys from (key, prompt index, response index), so that a response does not depend on its batch.

    A prompt that stands n times in the batch before has response indices from n·G: each of its groups goes on where the
    one before it ended, and no two hold the same tokens.

    Args:
        prompt_index_P: [P] int32 of the whole batch, before it is dealt out to devices.
        group: G.
    """
    earlier_PP = jnp.tril(prompt_index_P[:, None] == prompt_index_P[None, :], k=-1)
    response_PG = earlier_PP.sum(axis=1)[:, None] * group + jnp.arange(group)
    prompt_key_P = jax.vmap(lambda i: jax.random.fold_in(key, i))(prompt_index_P)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(prompt_key_P, response_PG)
