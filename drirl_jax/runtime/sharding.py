"""The mesh of devices, and the one table of what lies where on it: logical axis -> mesh axes.

`place` puts parameters on the mesh by their paths, `deal` a batch's prompts, and `constrain` says inside a jitted
function where a value lies. All else follows from these by XLA's propagation. With one device nothing changes.

Several processes run the same program on one mesh: what the host computes, all of them compute alike from `fetch`ed
values, and only the first one writes (`writes`) and asks servers (`told`). What takes long and is one item's alone they
share (`shared`); where one may fail alone, all hear of it (`together`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
from typing import Any, Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from drirl_jax.types import Array, InputError, PyTree

log = logging.getLogger(__name__)

JSON = Any  # what a JSON file can hold
LONGEST_WAIT = 24 * 60 * 60 * 1000  # milliseconds that processes wait for the last of them
MOST_AT_ONCE = 1 << 22  # bytes of each process that lie on every device while they are gathered
_turn = itertools.count()  # the same on all processes

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


def connect(section: ConfigDict) -> None:
    """Joins this process to the others of config.distributed, before jax is asked for its devices."""
    if section.auto:
        jax.distributed.initialize()
    elif section.processes > 1:
        jax.distributed.initialize(section.coordinator, section.processes, section.process)


def writes() -> bool:
    """Whether this process is the one of all that writes files and speaks."""
    return jax.process_index() == 0


def agreed(value: bool) -> bool:
    """What the process that writes has found, on all: files may appear on the others a moment later."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def gathered(value: JSON) -> list[JSON]:
    """What each process says, on all of them, in their order; they wait a day for the last. All call it alike.

    Args:
        value: what JSON can say.
    """
    if not jax.distributed.is_initialized():  # which, unlike the number of processes, needs no devices
        return [value]
    said = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # A server may take minutes, and the first collective of some processes waits for 30 seconds alone.
    ocp.multihost.get_barrier_sync_fn()(key=f"gathered {next(_turn)}", timeout_ms=LONGEST_WAIT)
    sizes = multihost_utils.process_allgather(np.array(len(said)))
    longest = int(sizes.max())
    piece = min(1 << longest.bit_length(), MOST_AT_ONCE)  # few sizes, each of which is compiled for
    padded = np.zeros(-(-longest // piece) * piece, np.uint8)
    padded[: len(said)] = said
    pieces = [multihost_utils.process_allgather(part) for part in padded.reshape(-1, piece)]
    return [json.loads(row[:n].tobytes()) for row, n in zip(np.concatenate(pieces, axis=1), sizes)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is done inside is done by all processes, or by none: an error of one is raised on all, once all are there.

    Else the others would wait, in what they do together next, for one that has ended. Inside nothing is gathered: one
    that had failed before would not take part.

    Raises:
        InputError: that of the first process which has one.
        RuntimeError: another process failed otherwise; that one raises its own error.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    own = None
    try:
        yield
    except Exception as error:
        own = error
    wrong = isinstance(own, InputError)
    found = gathered(None if own is None else [wrong, str(own) if wrong else repr(own)])
    if own is not None and not wrong:
        raise own
    for process, (is_input, why) in ((i, error) for i, error in enumerate(found) if error):
        raise (InputError(why) if is_input else RuntimeError(f"process {process} failed: {why}")) from own


def told(ask: Callable[[], JSON]) -> JSON:
    """What `ask` gives on the process that writes, on all of them: so that a server is asked once, not by each.

    All processes call it alike.

    Args:
        ask: gives what JSON can say.

    Raises:
        InputError: as `ask` does, then on all.
    """
    if not jax.distributed.is_initialized():
        return ask()
    found = None
    with together():
        if writes():
            found = ask()
    return gathered(found)[0]


def shared(items: Sequence, do: Callable[[Sequence], Iterable[JSON]]) -> list[JSON]:
    """One result for each of the items, in their order, on all processes, each of which does an equal range of them.

    All processes call it alike, with the same items; only its own are read.

    Args:
        do: items -> for each of them what JSON can say (a tuple comes back as a list).

    Raises:
        InputError: as `do` does for the first bad item of the first process that meets one, then on all.
    """
    if not jax.distributed.is_initialized():
        return list(do(items))
    first, last = (len(items) * i // jax.process_count() for i in (jax.process_index(), jax.process_index() + 1))
    mine: list[JSON] = []
    with together():
        mine = list(do(items[first:last]))
    return [result for part in gathered(mine) for result in part]


def mesh_of(
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
    other = mesh_of(section, [prompts], list(mesh.devices.flat), "config.sampler.mesh")
    if other.size != mesh.size:
        raise InputError(
            f"config.sampler.mesh is of {other.size} devices, config.mesh of {mesh.size}: they must be the same ones."
        )
    return other


def size(axis: str | None) -> int:
    """On how many devices a logical axis is cut, on the mesh that is set."""
    of = jax.sharding.get_abstract_mesh().shape
    return math.prod(of.get(name, 1) for name in RULES.get(axis, ()))


def dealt(prompts: int) -> int:
    """The least number of prompts, at least so many, that can be dealt out evenly."""
    return prompts + -prompts % size("prompts")


def spec(shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """Where an array lies whose first axes have these logical names; an axis that is not divisible lies whole."""
    return PartitionSpec(
        *(RULES[axis] if size(axis) > 1 and n % size(axis) == 0 else None for n, axis in zip(shape, axes))
    )


def constrain(x: Array, *axes: str | None) -> Array:
    """x, which lies as its logical axes say, inside a jitted function; further axes lie whole."""
    if jax.sharding.get_abstract_mesh().size < 2:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes))


def axes_of(path: Sequence, rank: int) -> tuple[str | None, ...]:
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
    axes = axes_of(path, x.ndim)
    for n, axis in zip(x.shape, axes):
        if axis != "categories" and n % size(axis):
            raise InputError(
                f"the mesh cuts {axis} into {size(axis)} ({' x '.join(RULES[axis])}), which does not divide the "
                f"{n} of {jax.tree_util.keystr(path)}: choose other sizes."
            )
    return axes


def zeros(shapes: PyTree) -> PyTree:
    """Zeros in the shapes and types of a tree, made where they belong."""
    return jax.jit(lambda: constrained(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)))()


def whole(tree: PyTree) -> PyTree:
    """The tree with its jax arrays whole on every device."""
    return jax.tree.map(lambda x: _put(x, ()), tree)


def _put(x: Array | np.ndarray, axes: Sequence[str | None]) -> Array:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(x, jax.devices()[0])
    where = NamedSharding(mesh, spec(x.shape, axes))
    if jax.process_count() > 1 and (isinstance(x, np.ndarray) or x.is_fully_addressable):
        return jax.make_array_from_callback(x.shape, where, lambda part: np.asarray(x[part]))
    return jax.device_put(x, where)


def constrained(tree: PyTree) -> PyTree:
    """`place` inside a jitted function."""
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(x, *axes_of(path, x.ndim)), tree)


def described(tree: PyTree, axes: Callable = _cut) -> PyTree:
    """Shapes and types of a tree with their places on the mesh that is set: parameters by their paths, or as `axes`
    (path, leaf) -> logical axes says.

    Raises:
        InputError: see `place`.
    """
    mesh = jax.sharding.get_mesh()

    def one(path, x):
        where = NamedSharding(mesh, spec(x.shape, axes(path, x)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(one, tree)


def held(tree: PyTree) -> float:
    """Bytes on each device of what is described."""
    placed = [x for x in jax.tree.leaves(tree) if getattr(x, "sharding", None) is not None]  # not the few random keys
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in placed))


def deal(x: Array | np.ndarray) -> Array:
    """A batch's array on the devices, its first axis, the prompts, dealt out."""
    return _put(x, ("prompts",))


def fetch(tree: PyTree) -> PyTree:
    """The whole tree as numpy arrays, on every process."""

    def fetched(x):
        if isinstance(x, Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(fetched, tree)
