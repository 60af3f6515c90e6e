"""Attention of groups by kernels that keep no scores: splash attention on a TPU, cuDNN's on a GPU.

A prompt and its responses are one sequence here, prefix, prompt, responses, of which every token sees what the mask
tells it. Splash attention skips the blocks of the mask in which nothing is seen: most of those between two responses.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from drirl_jax.models.architecture import Config
from drirl_jax.models.attention import Layout, group_attention, heads_first, scale_queries, visible
from drirl_jax.runtime.sharding import axis_size, partition_spec
from drirl_jax.types import Array, InputError, length_mask

ATTENDED = "attended"  # names what the backward pass of a kernel needs of its forward one
LANES, BLOCK = 128, 512  # sizes of a splash kernel's blocks: multiples of the first, at most the second
BLOCKS = "block_q block_kv block_q_dkv block_kv_dkv block_q_dq block_kv_dq".split()


def sees(layout: Layout) -> np.ndarray:
    """[N, R + N] bool: which query may see which key, of the prefix, the prompt and all responses, by place alone."""
    R, S, G, T, _ = layout
    response = np.arange(S + G * T) - S
    query, key = response[:, None], response[None]
    own = (query // T == key // T) | (key < 0)
    return np.concatenate([np.ones((S + G * T, R), bool), own & (key <= query)], axis=1)


def _keys(before, k_PNKd: Array) -> Array:
    """[P, KV, R + N, hd]: the prefix's before the others."""
    k_PKNd = heads_first(k_PNKd)
    if before is None:
        return k_PKNd
    return jnp.concatenate([jnp.broadcast_to(before, (len(k_PKNd), *before.shape[1:])), k_PKNd], axis=2)


def by_device(attend: Callable, q: Array, k: Array, v: Array, seen_P: Array, axis: int) -> Array:
    """attend(q, k, v, seen_P), where there are several devices by each for its prompts and its heads, as XLA cannot cut
    a kernel: `axis` is the one of the heads, and `seen_P`, whose first axis is the prompts', is of all of them."""
    if jax.sharding.get_abstract_mesh().size < 2:
        return attend(q, k, v, seen_P)
    heads = "heads" if k.shape[axis] % axis_size("heads") == 0 else None
    where = partition_spec(q.shape, ("prompts", *(None,) * (axis - 1), heads))
    by_prompt = PartitionSpec(*where[:1])
    cut = jax.shard_map(attend, in_specs=(where, where, where, by_prompt), out_specs=where, check_vma=False)
    return cut(q, k, v, seen_P)


def splash(config: Config, layout: Layout, q_PNHd, k_PNKd, v_PNKd, before=None, local=None, interpret=False) -> Array:
    """`group_attention` by the TPU's splash attention; no local layers, whose windows move with a prompt's length."""
    R, S, _, _, prompt_len_P = layout
    N = q_PNHd.shape[1]
    k, v = (_keys(before and before[i], x) for i, x in enumerate((k_PNKd, v_PNKd)))
    q = heads_first(scale_queries(config, q_PNHd))
    # Only tokens of the same segment see each other: a prompt's padding is a segment of its own.
    segment_PU = jnp.ones((len(k), R + N), jnp.int32).at[:, R : R + S].set(length_mask(prompt_len_P, S))
    block = min(BLOCK, -(-(R + N) // LANES) * LANES)
    more_q, more_k = -N % block, -(R + N) % block
    mask = np.pad(sees(layout), ((0, more_q), (0, more_k)))
    mask[N:, 0] = True  # rows of padding must see something too: a softmax of nothing is no number

    def attend(q, k, v, segment_PU):
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([splash_attention.NumpyMask(mask)] * q.shape[1]),
            block_sizes=splash_attention.BlockSizes(**dict.fromkeys(BLOCKS, block)),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=config.attn_softcap or None,
            interpret=interpret,
            residual_checkpoint_name=ATTENDED,
        )
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0))) for x in (q, k, v))
        own = jnp.pad(segment_PU[:, R:], ((0, 0), (0, more_q)), constant_values=1)
        every = jnp.pad(segment_PU, ((0, 0), (0, more_k)))
        return jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(own, every))

    return heads_first(by_device(attend, q, k, v, segment_PU, axis=1)[:, :, :N])


def cudnn(
    config: Config, layout: Layout, q_PNHd, k_PNKd, v_PNKd, before=None, local=None, implementation="cudnn"
) -> Array:
    """`group_attention` by jax.nn.dot_product_attention; no soft-capped scores, which it does not know."""
    R, S, _, _, prompt_len_P = layout
    k, v = (heads_first(_keys(before and before[i], x)) for i, x in enumerate((k_PNKd, v_PNKd)))
    position_PN = layout.position_PN()
    position_PU = jnp.concatenate([jnp.broadcast_to(jnp.arange(R), (len(k), R)), position_PN], axis=1)
    real_PU = jnp.ones(position_PU.shape, bool).at[:, R : R + S].set(length_mask(prompt_len_P, S))
    # A prompt's padding sees itself: a row that sees nothing has no softmax.
    mask_PNU = sees(layout) & (real_PU[:, None] | ~real_PU[:, R:, None])
    mask_PNU = visible(config, local, mask_PNU, position_PN, position_PU[:, None])
    q, N = scale_queries(config, q_PNHd), q_PNHd.shape[1]
    more_q, more_k = N % 2, (R + N) % 2  # cuDNN's gradient takes even lengths alone
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x, more in ((q, more_q), (k, more_k), (v, more_k)))
    mask_PNU = jnp.pad(mask_PNU, ((0, 0), (0, more_q), (0, more_k))).at[:, N:, 0].set(True)

    def attend(q, k, v, mask_P1NU):
        return jax.nn.dot_product_attention(q, k, v, mask=mask_P1NU, scale=1.0, implementation=implementation)

    return by_device(attend, q, k, v, mask_PNU[:, None], axis=2)[:, :N]


class Attention(NamedTuple):
    """A way to compute `group_attention`, the platform that has it (None: all), and what of a config it can do."""

    function: Callable
    platform: str | None = None
    windows: bool = True
    softcap: bool = True


def require(config: Config, platform: str) -> None:
    """Raises InputError unless the config's attention runs on this platform and can do what its layers need."""
    name, row = config.attention, ATTENTION[config.attention]
    wanted = {"softcap": config.attn_softcap > 0, "windows": any(config.local)}
    lacking = [what for what, needed in wanted.items() if needed and not getattr(row, what)]
    if lacking or row.platform not in (None, platform):
        why = f"has no {lacking[0]}, which this model needs" if lacking else f"needs a {row.platform}, not a {platform}"
        raise InputError(f"config.policy.attention={name!r} {why}: choose 'einsum'.")


ATTENTION = {
    "einsum": Attention(group_attention),
    "splash": Attention(splash, "tpu", windows=False),
    "cudnn": Attention(cudnn, "gpu", softcap=False),
}
