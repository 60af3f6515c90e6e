"""The sampler: it prefills a prompt once for its group, then one compiled loop decodes until every row has ended.

End-of-sequence tokens are part of a response and count in its length. Log-probabilities are those of the distribution
that tokens are sampled from. Every random number depends on (row key, token index) alone, not on the layout or the
history of the batch.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from drirl_jax.models import decoding, transformer
from drirl_jax.models.architecture import Config
from drirl_jax.models.attention import einsum_f32, softcap
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime.sharding import axis_size, constrain
from drirl_jax.types import Array, length_mask

FINISH = ("length", "stop")  # what the values of Rollout.finish mean
COMPACT = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)  # see `sample`
MIN_ROWS = 4  # fewer rows take as long
MIN_TOKENS = 48  # in shorter responses a further loop does not save the time of its compilation


class Rollout(NamedTuple):
    """The responses that the policy sampled.

    Attributes:
        response: [P, G, T] int32 ids; a sampled end-of-sequence token is part of the response.
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

    It takes two short cumulative sums instead of V random numbers a row: 20 times faster for V = 49,152. The sum of all
    mass also gives the log-probability of the sample.

    Args:
        uniform_N2: [N, 2] uniforms in [0, 1).
        logit_NV: [N, V].

    Returns:
        ([N] int32 tokens, [N] their log-probabilities, nats).
    """
    rows, vocab = logit_NV.shape
    max_N1 = logit_NV.max(-1, keepdims=True)
    mass = jnp.exp(logit_NV - max_N1)
    mass_NCK = jnp.pad(mass, ((0, 0), (0, -vocab % chunk))).reshape(rows, -1, chunk)

    def pick(mass_NM, uniform_N):
        cumulative = jnp.cumsum(mass_NM, axis=-1)
        return jnp.argmax(cumulative > uniform_N[:, None] * cumulative[:, -1:], axis=-1)

    mass_NC = mass_NCK.sum(-1)
    chunk_N = pick(mass_NC, uniform_N2[:, 0])
    chunk_mass_NK = jnp.take_along_axis(mass_NCK, chunk_N[:, None, None], axis=1)[:, 0]
    token_N = (chunk_N * chunk + pick(chunk_mass_NK, uniform_N2[:, 1])).astype(jnp.int32)
    return token_N, entry(logit_NV, token_N) - max_N1[:, 0] - jnp.log(mass_NC.sum(-1))


def entry(x_NV: Array, index_N: Array) -> Array:
    """[N] the entry x[n, index[n]] of each row n."""
    return jnp.take_along_axis(x_NV, index_N[:, None], axis=-1)[:, 0]


class Slots(NamedTuple):
    """The rows that a decoding loop works on, B of each of A prompts, with the keys and values that they attend to.

    Attributes:
        row: [A, B] int32, the index of each row in the whole batch.
        prompt_len, prompt_mask: [A] and [A, R + S], with the prefix.
        prompt_cache: keys and values of the prompts, each [L, A, KV, R + S, hd].
        response_cache: keys and values of the responses, each [L, A, KV, B, T, hd].
    """

    row: Array
    prompt_len: Array
    prompt_mask: Array
    prompt_cache: tuple[Array, Array]
    response_cache: tuple[Array, Array]


def compact_slots(slots: Slots, done_N: Array, slot_count: int, parts: int) -> Slots:
    """`slot_count` slots of each part, first those whose rows have not ended; each slot now has its own prompt.

    Args:
        slots, done_N: the slots, and True for each row of the whole batch that has ended.
        parts: the number of equal parts into which the devices divide the slots; every slot stays in its part.
    """
    B = slots.row.shape[1]
    row_MB = slots.row.reshape(parts, -1)
    keep_MC = jnp.argsort(done_N[row_MB], axis=1, stable=True)[:, :slot_count]

    def keep_rows(x, index_MC, axis):
        by_part = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
        rows = jax.vmap(lambda x, index: jnp.take(x, index, axis=axis), (axis, 0), axis)(by_part, index_MC)
        return rows.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    return Slots(
        keep_rows(slots.row.reshape(-1), keep_MC, 0)[:, None],
        keep_rows(slots.prompt_len, keep_MC // B, 0),
        keep_rows(slots.prompt_mask, keep_MC // B, 0),
        jax.tree.map(lambda x: keep_rows(x, keep_MC // B, 1), slots.prompt_cache),
        jax.tree.map(
            lambda x: keep_rows(rearrange(x, "l a k b t d -> l (a b) k 1 t d"), keep_MC, 1), slots.response_cache
        ),
    )


def first_slots(config: Config, prompt_len_P: Array, prompt_cache, group_size: int, max_new: int) -> Slots:
    """Slots of all rows; the responses' keys and values are empty.

    Args:
        prompt_len_P: with the prefix.
        prompt_cache: of `decoding.prefill`.
        group_size, max_new: G and T.
    """
    P, prompt_size = prompt_cache[0].shape[1], prompt_cache[0].shape[3]
    kv_shape = (config.layers, P, config.kv_heads, group_size, max_new, config.head_dim)
    empty = jnp.zeros(kv_shape, prompt_cache[0].dtype), jnp.zeros(kv_shape, prompt_cache[0].dtype)
    caches = jax.tree.map(lambda x: constrain(x, None, "prompts", "heads"), ((*prompt_cache,), empty))
    row_PG = jnp.arange(P * group_size).reshape(P, group_size)
    return Slots(row_PG, prompt_len_P, length_mask(prompt_len_P, prompt_size), *caches)


class LoopState(NamedTuple):
    """What a decoding step replaces.

    Attributes:
        t: scalar int32, the index of the next token.
        rollout: of all rows, with the axis N in the place of P and G.
        done: [N] bool, True for a row that has ended.
    """

    t: Array
    rollout: Rollout
    done: Array


class Sampler(NamedTuple):
    """What all decoding steps share: the weights in the form for decoding, the rows' keys, options of `sample`."""

    model: Transformer
    fused: decoding.DecodeBlock
    unembed_VD: Array
    key_N: Array
    max_new: int
    temperature: float
    eos: tuple[int, ...]

    def choose(self, hidden_CD: Array, t, key_C: Array) -> tuple[Array, Array]:
        """([C] token t of each row, [C] its log-probability) from the states that predict it."""
        logit_CV = einsum_f32("cd,vd->cv", constrain(hidden_CD, "weights_stay"), self.unembed_VD)
        logit_CV = constrain(logit_CV, "weights_stay", "spread_vocab")
        logit_CV = softcap(logit_CV, self.model.config.final_softcap) / (self.temperature or 1.0)
        if self.temperature:
            uniform_C2 = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t), (2,)))(key_C)
            return sample_categorical(uniform_C2, logit_CV)
        token_C = jnp.argmax(logit_CV, axis=-1).astype(jnp.int32)
        return token_C, entry(logit_CV, token_C) - jax.nn.logsumexp(logit_CV, axis=-1)

    def add_token(self, t, rollout: Rollout, done_N: Array, hidden_ABD: Array, row_AB: Array) -> tuple[Rollout, Array]:
        """(rollout, done) with token t of these rows; a row that has ended gets none."""
        row_C = row_AB.reshape(-1)
        token_C, logp_C = self.choose(hidden_ABD.reshape(-1, hidden_ABD.shape[-1]), t, self.key_N[row_C])
        done_C = done_N[row_C]
        token_C = jnp.where(done_C, self.eos[0], token_C)
        stops_C = ~done_C & jnp.isin(token_C, jnp.array(self.eos))
        rollout = Rollout(
            response=rollout.response.at[row_C, t].set(token_C),
            response_len=rollout.response_len.at[row_C].add(~done_C),
            finish=rollout.finish.at[row_C].add(stops_C),
            logp=rollout.logp.at[row_C, t].set(jnp.where(done_C, 0.0, logp_C)),
        )
        return rollout, done_N.at[row_C].set(done_C | stops_C)

    def first_state(self, hidden_PSD: Array, prompt_len_P: Array, row_PG: Array) -> LoopState:
        """The state after token 0, which the prompts' last states predict; `prompt_len_P` is without the prefix."""
        N, (P, G), D = row_PG.size, row_PG.shape, hidden_PSD.shape[-1]
        empty_rollout = Rollout(
            response=jnp.full((N, self.max_new), self.eos[0], jnp.int32),
            response_len=jnp.zeros(N, jnp.int32),
            finish=jnp.zeros(N, jnp.int32),
            logp=jnp.zeros((N, self.max_new)),
        )
        first_PGD = jnp.broadcast_to(transformer.last_token(hidden_PSD, prompt_len_P)[:, None], (P, G, D))
        return LoopState(
            jnp.ones((), jnp.int32), *self.add_token(0, empty_rollout, jnp.zeros(N, bool), first_PGD, row_PG)
        )

    def decode_until(self, slot_count: int, parts: int, slots: Slots, state: LoopState) -> tuple[Slots, LoopState]:
        """Decodes until at most `slot_count` rows of each of `parts` equal parts of the batch have not ended."""

        def step(carry):
            (t, rollout, done_N), response_cache = carry
            hidden_ABD, response_cache = decoding.decode(
                self.model, self.fused, rollout.response[slots.row, t - 1], t - 1,
                slots.prompt_len, slots.prompt_mask, slots.prompt_cache, response_cache,
            )  # fmt: skip
            state = LoopState(t + 1, *self.add_token(t, rollout, done_N, hidden_ABD, slots.row))
            return state, response_cache

        def any_running(carry):
            state, _ = carry
            return (state.t < self.max_new) & (jnp.sum(~state.done.reshape(parts, -1), axis=1).max() > slot_count)

        state, response_cache = jax.lax.while_loop(any_running, step, (state, slots.response_cache))
        return slots._replace(response_cache=response_cache), state


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
        temperature: of the softmax; 0 takes the most likely token, with log-probabilities at temperature 1.
        eos: ids that end a response.
        prefix: ids that stand before every prompt: see `types.Group`.
        compact: falling shares of the batch's rows. When at most this share of the rows has not ended, only these rows
            are decoded further, so that ended rows cost nothing. Each share is one more loop to compile.
    """
    P, G = key_PG.shape
    parts = axis_size("prompts") if P % axis_size("prompts") == 0 else 1
    key_N = key_PG.reshape(-1)
    hidden_PSD, prompt_cache = decoding.prefill(model, prompt_PS, prefix)
    fused = decoding.fuse(model)
    unembed_VD = constrain(transformer.cast(model.unembed, model.config), "spread_vocab")
    sampler = Sampler(model, fused, unembed_VD, key_N, max_new, temperature, eos)
    slots = first_slots(model.config, len(prefix) + prompt_len_P, prompt_cache, G, max_new)
    state = sampler.first_state(hidden_PSD, prompt_len_P, slots.row)
    for slot_count in (int(share * P * G / parts) for share in compact):
        if slot_count >= MIN_ROWS and max_new >= MIN_TOKENS:
            slots, state = sampler.decode_until(slot_count, parts, slots, state)
            slots = compact_slots(slots, state.done, slot_count, parts)
    _, state = sampler.decode_until(0, parts, slots, state)
    return jax.tree.map(lambda x: x.reshape(P, G, *x.shape[1:]), state.rollout)


def response_keys(key: Array, prompt_index_P: Array, group_size: int) -> Array:
    """[P, G] keys from (key, prompt index, response index), so that a response does not depend on its batch.

    If a prompt stands n times earlier in the batch, its response indices begin at n·G. So each of its groups has other
    indices than the earlier ones, and no two groups hold the same tokens.

    Args:
        prompt_index_P: [P] int32, of the whole batch before the devices divide it.
        group_size: G.
    """
    earlier_PP = jnp.tril(prompt_index_P[:, None] == prompt_index_P[None, :], k=-1)
    response_PG = earlier_PP.sum(axis=1)[:, None] * group_size + jnp.arange(group_size)
    prompt_key_P = jax.vmap(lambda i: jax.random.fold_in(key, i))(prompt_index_P)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(prompt_key_P, response_PG)
