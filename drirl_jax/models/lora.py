"""LoRA adapters (arXiv 2106.09685) and banks of them: prompt p of a batch uses adapter route[p], all in one pass.

An adapter is a dict from target ("q", "gate", ...) to a `Pair`. The leaves are stacked over layers like the blocks that
they adapt: a [L, r, in], b [L, r, out]. A bank has one more axis: a [L, C, r, in], b [L, C, r, out]. (b is the
transpose of the paper's B.) An adapter with fewer layers than the model belongs to the last layers.
"""

from __future__ import annotations

from typing import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from drirl_jax.config import ADAPTED
from drirl_jax.models.transformer import LINEAR, Transformer
from drirl_jax.runtime.sharding import constrain_tree
from drirl_jax.types import Array


@struct.dataclass
class Pair:
    """ΔW = scale · B A for one weight matrix, with scale = lora_alpha / r, A = a and B = bᵀ."""

    a: Array
    b: Array
    scale: float = struct.field(pytree_node=False)

    def __call__(self, x_MI: Array, route_P: Array | None) -> Array:
        """scale · B A x, [M, out]; with a bank, the M / P rows of prompt p use adapter route_P[p]."""
        if route_P is None:
            return self.scale * (checkpoint_name(x_MI @ self.a.T, LINEAR) @ self.b)
        x_PNI = x_MI.reshape(len(route_P), -1, x_MI.shape[-1])
        low_PNR = jnp.einsum("pni,pri->pnr", x_PNI, self.a[route_P])
        return self.scale * jnp.einsum("pnr,pro->pno", low_PNR, self.b[route_P]).reshape(len(x_MI), -1)


Adapter = dict[str, Pair]


def init(
    model: Transformer,
    key: Array,
    *,
    rank: int,
    alpha: float,
    targets=ADAPTED,
    layers: int = 0,
    bank: int | None = None,
) -> Adapter:
    """A fresh adapter (or a bank of `bank` adapters): A ~ U(±√(3/in)) and B = 0, so ΔW = 0.

    Args:
        model: the trunk; only its shapes are used.
        rank: r >= 1.
        alpha: lora_alpha; ΔW is scaled by alpha / rank.
        targets: which weight matrices, a subset of ADAPTED.
        layers: how many of the last layers are adapted; 0 for all.
        bank: the number of adapters C; None for a single adapter without the axis C.
    """
    adapter = {}
    for i, target in enumerate(targets):
        all_layers, width_out, width_in = getattr(model.blocks, target).shape
        leading_shape = (layers or all_layers, bank)[: 1 if bank is None else 2]
        bound = (3 / width_in) ** 0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, i), (*leading_shape, rank, width_in), minval=-bound, maxval=bound
        )
        adapter[target] = Pair(a=a, b=jnp.zeros((*leading_shape, rank, width_out)), scale=alpha / rank)
    return adapter


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter with the sum of their ΔW: Σ_i s B_i A_i = s [B_1 B_2 ...] [A_1; A_2; ...], of the summed rank.

    Args:
        adapters: of the same targets and layers, with the same scale s.
    """

    def join(*pairs: Pair) -> Pair:
        a, b = (jnp.concatenate([getattr(pair, name) for pair in pairs], axis=-2) for name in "ab")
        return Pair(a=a, b=b, scale=pairs[0].scale)

    return {target: join(*(adapter[target] for adapter in adapters)) for target in adapters[0]}


def merge(model: Transformer, adapter: Adapter) -> Transformer:
    """The model with W ← W + scale · B A, for sampling and export: computed in float32, stored in W's dtype."""

    def merge_weight(weight_LOI, pair: Pair):
        delta = pair.scale * jnp.einsum("lro,lri->loi", pair.b, pair.a)
        first_layer = weight_LOI.shape[0] - delta.shape[0]
        return weight_LOI.at[first_layer:].set((weight_LOI[first_layer:] + delta).astype(weight_LOI.dtype))

    weights = {name: merge_weight(getattr(model.blocks, name)[...], pair) for name, pair in adapter.items()}
    return constrain_tree(model.replace(blocks=model.blocks.replace(**weights)))
