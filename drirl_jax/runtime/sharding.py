"""The mesh of devices, and the one table that says how arrays are sharded on it: logical axis -> mesh axes.

`place` puts parameters on the mesh by their paths, and `shard_prompts` puts a batch's prompts there. `constrain` gives
the sharding of a value inside a jitted function. XLA derives all other shardings from these. With one device nothing
changes.

Several processes run the same program on one mesh. Each of them does all computations of the host, from values that
`fetch` returns alike on all. What they do together is in processes.py.
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


# data: every device has whole weights; fsdp: weights are cut, and gathered layer by layer; tensor: matrix products are
# cut.
AXES = ("data", "fsdp", "tensor")
RULES = {
    "prompts": ("data", "fsdp"),
    "weights_stay": ("data",),  # prompts, where a prompt has few rows: these are gathered instead of the weights
    "width": ("fsdp",),
    "spread_width": ("data", "fsdp"),  # the width on the way from one mesh to another
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "spread_vocab": ("fsdp", "tensor"),  # the vocabulary of the sampler's logits, which have few rows
    "categories": ("data",),  # of rewards; if their number is not divisible, every device has all of them
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
    """The mesh that config.mesh, or another section, describes.

    Args:
        section: data, fsdp and tensor; data = 0 takes as many of the remaining devices as can share the prompts.
        prompts: the numbers of prompts in the micro-batches of the run; each is shared out evenly.
        devices: all available devices.
        name: of the section, for messages.

    Raises:
        InputError: there are too few devices, or prompts cannot be shared out evenly.
    """
    count, model_devices = len(devices), section.fsdp * section.tensor
    if section.data == 0:
        sizes = [
            n for n in range(1, count // model_devices + 1) if all(batch % (n * section.fsdp) == 0 for batch in prompts)
        ]
        data = max(sizes, default=1)
    else:
        data = section.data
    if data * model_devices > count:
        raise InputError(
            f"{name} asks for {data} x {section.fsdp} x {section.tensor} devices and there are {count}: lower one."
        )
    for batch in prompts:
        if batch % (data * section.fsdp):
            raise InputError(
                f"{name} deals prompts out to {data * section.fsdp} (data x fsdp), which does not divide the {batch} "
                "of a micro-batch: change it, or align.batch, align.minibatches, irl.batch or an accumulate."
            )
    if data * model_devices < count:
        log.warning(
            "%d of %d devices are used: %s and the batch sizes allow no more", data * model_devices, count, name
        )
    grid = np.array(devices[: data * model_devices]).reshape(data, section.fsdp, section.tensor)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def sampling_mesh(section: ConfigDict, prompts: int, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh | None:
    """The mesh of config.sampler.mesh, on the same devices; None if that section has tensor = 0.

    Raises:
        InputError: it does not use all devices of `mesh`, or the prompts cannot be shared out evenly.
    """
    if section.tensor == 0:
        return None
    sampler = make_mesh(section, [prompts], list(mesh.devices.flat), "config.sampler.mesh")
    if sampler.size != mesh.size:
        raise InputError(
            f"config.sampler.mesh is of {sampler.size} devices, config.mesh of {mesh.size}: they must be the same ones."
        )
    return sampler


def axis_size(axis: str | None) -> int:
    """The number of pieces into which the current mesh cuts a logical axis."""
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(mesh_shape.get(name, 1) for name in RULES.get(axis, ())) if axis else 1


def round_up_prompts(prompts: int) -> int:
    """The least number of prompts, not less than `prompts`, that the mesh can share out evenly."""
    return prompts + -prompts % axis_size("prompts")


def partition_spec(shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """The sharding of an array whose first axes have these logical names. An axis that is not divisible is not cut."""

    def mesh_axes(n: int, axis: str | None) -> tuple[str, ...] | None:
        return RULES[axis] if axis and axis_size(axis) > 1 and n % axis_size(axis) == 0 else None

    return PartitionSpec(*map(mesh_axes, shape, axes))


def constrain(x: Array, *axes: str | None) -> Array:
    """x, inside a jitted function, sharded by its logical axes; further axes are not cut."""
    if jax.sharding.get_abstract_mesh().size < 2:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes))


def logical_axes(path: Sequence, rank: int) -> tuple[str | None, ...]:
    """The logical axes of a parameter, or of its optimiser state, by its path in any tree."""
    names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
    names = [name for name in names if name != "value"]  # added by nnx
    matrix = next((name for name in reversed(names) if name in MATRICES), None)
    if matrix is None:
        return ()
    out, into = MATRICES[matrix]
    if names[-1] in ("a", "b"):  # a LoRA pair, [r, in] and [r, out]; in a bank [L, C, ...]
        last_axes: tuple[str | None, ...] = (None, into if names[-1] == "a" else out)
        first_axes: tuple[str | None, ...] = (None, "categories")[: rank - 2]
    else:
        last_axes = (out, into)
        first_axes = ("categories",) if "models" in names else ()
    return (*first_axes, *(None,) * (rank - len(first_axes) - len(last_axes)), *last_axes)


def place(tree: PyTree) -> PyTree:
    """The tree with its jax arrays sharded on the mesh; numpy arrays stay on the host.

    The arrays are committed to their devices, as results of jitted functions are. Otherwise each function would be
    compiled twice: for the first step, whose arrays are not committed, and for all others.

    Raises:
        InputError: a matrix cannot be cut as config.mesh says.
    """

    def put(path, x):
        return _put(x, _cut(path, x)) if isinstance(x, Array) else x

    return jax.tree_util.tree_map_with_path(put, tree)


def _cut(path: Sequence, x) -> tuple[str | None, ...]:
    """The `logical_axes` of a parameter. Raises InputError where the mesh does not divide its size."""
    axes = logical_axes(path, x.ndim)
    for n, axis in zip(x.shape, axes):
        if axis and axis != "categories" and n % axis_size(axis):
            raise InputError(
                f"the mesh cuts {axis} into {axis_size(axis)} ({' x '.join(RULES[axis])}), which does not divide the "
                f"{n} of {jax.tree_util.keystr(path)}: choose other sizes."
            )
    return axes


def sharded_zeros(shapes: PyTree) -> PyTree:
    """Zeros in the shapes and types of a tree, made directly on their devices."""
    return jax.jit(lambda: constrain_tree(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)))()


def replicate(tree: PyTree) -> PyTree:
    """The tree with its jax arrays whole on every device."""
    return jax.tree.map(lambda x: _put(x, ()), tree)


def _put(x: Array | np.ndarray, axes: Sequence[str | None]) -> Array:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(x, jax.devices()[0])
    sharding = NamedSharding(mesh, partition_spec(x.shape, axes))
    if jax.process_count() > 1 and (isinstance(x, np.ndarray) or x.is_fully_addressable):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index]))
    return jax.device_put(x, sharding)


def constrain_tree(tree: PyTree) -> PyTree:
    """`place` inside a jitted function."""
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(x, *logical_axes(path, x.ndim)), tree)


def sharded_shapes(tree: PyTree, axes: Callable = _cut) -> PyTree:
    """Shapes and types of a tree with their shardings on the current mesh.

    Args:
        axes: (path, leaf) -> logical axes; by default those of parameters.

    Raises:
        InputError: see `place`.
    """
    mesh = jax.sharding.get_mesh()

    def sharded_shape(path, x):
        sharding = NamedSharding(mesh, partition_spec(x.shape, axes(path, x)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(sharded_shape, tree)


def bytes_per_device(tree: PyTree) -> float:
    """Bytes that the tree's arrays, or shapes of arrays, take on each device."""
    # The few random keys have no sharding.
    sharded = [x for x in jax.tree.leaves(tree) if getattr(x, "sharding", None) is not None]
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in sharded))


def shard_prompts(x: Array | np.ndarray) -> Array:
    """A batch's array on the devices, with the prompts, its first axis, shared out among them."""
    return _put(x, ("prompts",))


def fetch(tree: PyTree) -> PyTree:
    """The whole tree as numpy arrays, on every process."""

    def fetch_leaf(x):
        if isinstance(x, Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(fetch_leaf, tree)
