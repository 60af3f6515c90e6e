"""Attention of groups by kernels that store no scores: splash attention on a TPU, cuDNN on a GPU.

A prompt and its responses are one sequence here: prefix, prompt, responses. A mask says which tokens each token sees.
Splash attention skips the blocks of the mask in which no token sees another: most blocks between two responses.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from drirl_jax.models.architecture import Config
from drirl_jax.models.attention import Layout, group_attention, heads_first, limit_to_window, scale_queries
from drirl_jax.runtime.sharding import axis_size, partition_spec
from drirl_jax.types import Array, InputError, length_mask

ATTENDED = "attended"  # the name of results that the backward pass of a kernel needs from its forward pass
LANES, BLOCK = 128, 512  # sizes of a splash kernel's blocks: multiples of the first, at most the second
BLOCKS = "block_q block_kv block_q_dkv block_kv_dkv block_q_dq block_kv_dq".split()


def visibility_mask(layout: Layout) -> np.ndarray:
    """[N, R + N] bool, True where a query may see a key of prefix, prompt and responses; it ignores lengths."""
    R, S, G, T, _ = layout
    response = np.arange(S + G * T) - S
    query, key = response[:, None], response[None]
    same_response = (query // T == key // T) | (key < 0)
    return np.concatenate([np.ones((S + G * T, R), bool), same_response & (key <= query)], axis=1)


def _prepend_prefix(prefix_PKRd, k_PNKd: Array) -> Array:
    """[P, KV, R + N, hd]: keys or values with those of the prefix before them."""
    k_PKNd = heads_first(k_PNKd)
    if prefix_PKRd is None:
        return k_PKNd
    return jnp.concatenate([jnp.broadcast_to(prefix_PKRd, (len(k_PKNd), *prefix_PKRd.shape[1:])), k_PKNd], axis=2)


def attend_by_device(attend: Callable, q: Array, k: Array, v: Array, visibility_P: Array, axis: int) -> Array:
    """attend(q, k, v, visibility_P). XLA cannot cut a kernel: every device computes its own prompts and heads.

    Args:
        visibility_P: the kernel's mask or segments, which say which tokens see each other; prompts are the first axis.
        axis: the axis of the heads in q, k and v.
    """
    if jax.sharding.get_abstract_mesh().size < 2:
        return attend(q, k, v, visibility_P)
    heads = "heads" if k.shape[axis] % axis_size("heads") == 0 else None
    spec = partition_spec(q.shape, ("prompts", *(None,) * (axis - 1), heads))
    prompt_spec = PartitionSpec(*spec[:1])
    sharded_attend = jax.shard_map(attend, in_specs=(spec, spec, spec, prompt_spec), out_specs=spec, check_vma=False)
    return sharded_attend(q, k, v, visibility_P)


def splash(
    config: Config, layout: Layout, q_PNHd, k_PNKd, v_PNKd, prefix_kv=None, local=None, interpret=False
) -> Array:
    """`group_attention` by the TPU's splash attention; no local layers: their windows move with a prompt's length."""
    R, S, _, _, prompt_len_P = layout
    N = q_PNHd.shape[1]
    k, v = (_prepend_prefix(prefix_kv and prefix_kv[i], x) for i, x in enumerate((k_PNKd, v_PNKd)))
    q = heads_first(scale_queries(config, q_PNHd))
    # Only tokens of the same segment see each other, so a prompt's padding has a segment of its own.
    segment_PU = jnp.ones((len(k), R + N), jnp.int32).at[:, R : R + S].set(length_mask(prompt_len_P, S))
    block_size = min(BLOCK, -(-(R + N) // LANES) * LANES)
    pad_q, pad_k = -N % block_size, -(R + N) % block_size
    mask = np.pad(visibility_mask(layout), ((0, pad_q), (0, pad_k)))
    mask[N:, 0] = True  # rows of padding must see something too: a softmax over nothing is NaN

    def attend(q, k, v, segment_PU):
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([splash_attention.NumpyMask(mask)] * q.shape[1]),
            block_sizes=splash_attention.BlockSizes(**dict.fromkeys(BLOCKS, block_size)),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=config.attn_softcap or None,
            interpret=interpret,
            residual_checkpoint_name=ATTENDED,
        )
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block_size), (0, 0))) for x in (q, k, v))
        query_segment = jnp.pad(segment_PU[:, R:], ((0, 0), (0, pad_q)), constant_values=1)
        key_segment = jnp.pad(segment_PU, ((0, 0), (0, pad_k)))
        return jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(query_segment, key_segment))

    return heads_first(attend_by_device(attend, q, k, v, segment_PU, axis=1)[:, :, :N])


def cudnn(
    config: Config, layout: Layout, q_PNHd, k_PNKd, v_PNKd, prefix_kv=None, local=None, implementation="cudnn"
) -> Array:
    """`group_attention` by jax.nn.dot_product_attention, which cannot soft-cap scores."""
    R, S, _, _, prompt_len_P = layout
    k, v = (heads_first(_prepend_prefix(prefix_kv and prefix_kv[i], x)) for i, x in enumerate((k_PNKd, v_PNKd)))
    position_PN = layout.position_PN()
    position_PU = jnp.concatenate([jnp.broadcast_to(jnp.arange(R), (len(k), R)), position_PN], axis=1)
    real_PU = jnp.ones(position_PU.shape, bool).at[:, R : R + S].set(length_mask(prompt_len_P, S))
    # A prompt's padding sees itself: a softmax over nothing is NaN.
    mask_PNU = visibility_mask(layout) & (real_PU[:, None] | ~real_PU[:, R:, None])
    mask_PNU = limit_to_window(config, local, mask_PNU, position_PN, position_PU[:, None])
    q, N = scale_queries(config, q_PNHd), q_PNHd.shape[1]
    pad_q, pad_k = N % 2, (R + N) % 2  # cuDNN's gradient needs even lengths
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x, pad in ((q, pad_q), (k, pad_k), (v, pad_k)))
    mask_PNU = jnp.pad(mask_PNU, ((0, 0), (0, pad_q), (0, pad_k))).at[:, N:, 0].set(True)

    def attend(q, k, v, mask_P1NU):
        return jax.nn.dot_product_attention(q, k, v, mask=mask_P1NU, scale=1.0, implementation=implementation)

    return attend_by_device(attend, q, k, v, mask_PNU[:, None], axis=2)[:, :N]


class Attention(NamedTuple):
    """A way to compute `group_attention`, its platform (None: all), and the features of a config that it supports."""

    function: Callable
    platform: str | None = None
    windows: bool = True
    softcap: bool = True


def check_attention(config: Config, platform: str) -> None:
    """Raises InputError unless the config's attention runs on this platform and supports what the layers need."""
    name, row = config.attention, ATTENTION[config.attention]
    needs = {"softcap": config.attn_softcap > 0, "windows": any(config.local)}
    missing = [feature for feature, needed in needs.items() if needed and not getattr(row, feature)]
    if missing or row.platform not in (None, platform):
        reason = (
            f"has no {missing[0]}, which this model needs" if missing else f"needs a {row.platform}, not a {platform}"
        )
        raise InputError(f"config.policy.attention={name!r} {reason}: choose 'einsum'.")


ATTENTION = {
    "einsum": Attention(group_attention),
    "splash": Attention(splash, "tpu", windows=False),
    "cudnn": Attention(cudnn, "gpu", softcap=False),
}
