"""The mesh of devices, and the one table of what lies where on it: logical axis -> mesh axes.

`place` puts parameters on the mesh by their paths, `deal` a batch's prompts, and `constrain` says inside a jitted
function where a value lies. All else follows from these by XLA's propagation. With one device nothing changes.

Several processes run the same program on one mesh: what the host computes, all of them compute alike from `fetch`ed
values, and only the first one writes (`writes`) and asks servers (`told`). What takes long and is one item's alone they
share (`shared`); where one may fail alone, all hear of it (`together`).
"""

from __future__ import annotations

import logging
import math
from typing import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from drirl_jax.types import Array, InputError, PyTree

log = logging.getLogger(__name__)


# data: weights whole on each; fsdp: weights cut, and gathered layer by layer; tensor: the products themselves are cut.
AXES = ("data", "fsdp", "tensor")
RULES = {
    "prompts": ("data", "fsdp"),
    "weights_stay": ("data",),  # prompts where it is they that are gathered, not the weights: if a prompt has few rows
    "width": ("fsdp",),
    "spread_width": ("data", "fsdp"),  # on the way from one mesh to another
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "spread_vocab": ("fsdp", "tensor"),  # of the sampler's logits, whose rows are few
    "categories": ("data",),  # of rewards; where they are not divisible, every device holds all
}
MATRICES = {  # [out, in]
    "q": ("heads", "width"),
    "k": ("heads", "width"),
    "v": ("heads", "width"),
    "o": ("width", "heads"),
    "gate": ("ffn", "width"),
    "up": ("ffn", "width"),
    "down": ("width", "ffn"),
    "embed": ("vocab", "width"),
    "head": ("vocab", "width"),
    "heads": ("categories", "width"),
}


def make_mesh(
    section: ConfigDict, prompts: Sequence[int], devices: Sequence[jax.Device], name: str = "config.mesh"
) -> jax.sharding.Mesh:
    """The mesh that config.mesh asks for, or another section of this name.

    Args:
        section: data, fsdp and tensor; data = 0 takes as many of the remaining devices as can share the prompts.
        prompts: of how many prompts the micro-batches of the run are, each of which is dealt out evenly.
        devices: all that there are.

    Raises:
        InputError: there are too few devices, or prompts cannot be dealt out.
    """
    count, cut = len(devices), section.fsdp * section.tensor
    if section.data == 0:
        fit = [n for n in range(1, count // cut + 1) if all(of % (n * section.fsdp) == 0 for of in prompts)]
        data = max(fit, default=1)
    else:
        data = section.data
    if data * cut > count:
        raise InputError(
            f"{name} asks for {data} x {section.fsdp} x {section.tensor} devices and there are {count}: lower one."
        )
    for of in prompts:
        if of % (data * section.fsdp):
            raise InputError(
                f"{name} deals prompts out to {data * section.fsdp} (data x fsdp), which does not divide the {of} "
                "of a micro-batch: change it, or align.batch, align.minibatches, irl.batch or an accumulate."
            )
    if data * cut < count:
        log.warning("%d of %d devices are used: %s and the batch sizes allow no more", data * cut, count, name)
    grid = np.array(devices[: data * cut]).reshape(data, section.fsdp, section.tensor)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def sampling_mesh(section: ConfigDict, prompts: int, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh | None:
    """The mesh of the same devices that config.sampler.mesh asks for; None where it leaves them as they are.

    Raises:
        InputError: it is not of all of them, or the prompts cannot be dealt out.
    """
    if section.tensor == 0:
        return None
    other = make_mesh(section, [prompts], list(mesh.devices.flat), "config.sampler.mesh")
    if other.size != mesh.size:
        raise InputError(
            f"config.sampler.mesh is of {other.size} devices, config.mesh of {mesh.size}: they must be the same ones."
        )
    return other


def axis_size(axis: str | None) -> int:
    """On how many devices a logical axis is cut, on the mesh that is set."""
    of = jax.sharding.get_abstract_mesh().shape
    return math.prod(of.get(name, 1) for name in RULES.get(axis, ()))


def round_up_prompts(prompts: int) -> int:
    """The least number of prompts, at least so many, that can be dealt out evenly."""
    return prompts + -prompts % axis_size("prompts")


def partition_spec(shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """Where an array lies whose first axes have these logical names; an axis that is not divisible lies whole."""
    return PartitionSpec(
        *(RULES[axis] if axis_size(axis) > 1 and n % axis_size(axis) == 0 else None for n, axis in zip(shape, axes))
    )


def constrain(x: Array, *axes: str | None) -> Array:
    """x, which lies as its logical axes say, inside a jitted function; further axes lie whole."""
    if jax.sharding.get_abstract_mesh().size < 2:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes))


def logical_axes(path: Sequence, rank: int) -> tuple[str | None, ...]:
    """The logical axes of a parameter, or of what an optimiser keeps beside it, by its path in any tree."""
    names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
    names = [name for name in names if name != "value"]  # nnx's own
    matrix = next((name for name in reversed(names) if name in MATRICES), None)
    if matrix is None:
        return ()
    out, into = MATRICES[matrix]
    if names[-1] in ("a", "b"):  # a LoRA pair, [r, in] and [r, out]; a bank has [L, C, ...]
        last = (None, into if names[-1] == "a" else out)
        first = (None, "categories")[: rank - 2]
    else:
        last = (out, into)
        first = ("categories",) if "models" in names else ()
    return (*first, *(None,) * (rank - len(first) - len(last)), *last)


def place(tree: PyTree) -> PyTree:
    """The tree with its jax arrays where they belong; numpy arrays stay with the host.

    Committed to their devices, as the results of jitted functions are: else each function would be compiled twice, for
    the first step's free arrays and for all others.

    Raises:
        InputError: a matrix cannot be cut as config.mesh says.
    """

    def put(path, x):
        return _put(x, _cut(path, x)) if isinstance(x, Array) else x

    return jax.tree_util.tree_map_with_path(put, tree)


def _cut(path: Sequence, x) -> tuple[str | None, ...]:
    """`axes_of` a parameter. Raises InputError where the mesh does not divide it."""
    axes = logical_axes(path, x.ndim)
    for n, axis in zip(x.shape, axes):
        if axis != "categories" and n % axis_size(axis):
            raise InputError(
                f"the mesh cuts {axis} into {axis_size(axis)} ({' x '.join(RULES[axis])}), which does not divide the "
                f"{n} of {jax.tree_util.keystr(path)}: choose other sizes."
            )
    return axes


def sharded_zeros(shapes: PyTree) -> PyTree:
    """Zeros in the shapes and types of a tree, made where they belong."""
    return jax.jit(lambda: constrain_tree(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)))()


def replicate(tree: PyTree) -> PyTree:
    """The tree with its jax arrays whole on every device."""
    return jax.tree.map(lambda x: _put(x, ()), tree)


def _put(x: Array | np.ndarray, axes: Sequence[str | None]) -> Array:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(x, jax.devices()[0])
    where = NamedSharding(mesh, partition_spec(x.shape, axes))
    if jax.process_count() > 1 and (isinstance(x, np.ndarray) or x.is_fully_addressable):
        return jax.make_array_from_callback(x.shape, where, lambda part: np.asarray(x[part]))
    return jax.device_put(x, where)


def constrain_tree(tree: PyTree) -> PyTree:
    """`place` inside a jitted function."""
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(x, *logical_axes(path, x.ndim)), tree)


def sharded_shapes(tree: PyTree, axes: Callable = _cut) -> PyTree:
    """Shapes and types of a tree with their places on the mesh that is set: parameters by their paths, or as `axes`
    (path, leaf) -> logical axes says.

    Raises:
        InputError: see `place`.
    """
    mesh = jax.sharding.get_mesh()

    def one(path, x):
        where = NamedSharding(mesh, partition_spec(x.shape, axes(path, x)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(one, tree)


def bytes_per_device(tree: PyTree) -> float:
    """Bytes on each device of what is described."""
    placed = [x for x in jax.tree.leaves(tree) if getattr(x, "sharding", None) is not None]  # not the few random keys
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in placed))


def shard_prompts(x: Array | np.ndarray) -> Array:
    """A batch's array on the devices, its first axis, the prompts, dealt out."""
    return _put(x, ("prompts",))


def fetch(tree: PyTree) -> PyTree:
    """The whole tree as numpy arrays, on every process."""

    def fetched(x):
        if isinstance(x, Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(fetched, tree)
