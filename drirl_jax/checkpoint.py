"""Orbax checkpoints: all that a resumed run needs, in one place.

Any pytree is stored flat, by the path of each leaf, and restored into a template of the same shape: so that what
is on disk does not depend on the classes that hold it in memory.

A checkpoint is written in the background, from copies that are made before `save` returns, and appears whole or not at
all. Beside it stand checksums that were computed on the devices, so that what comes back is known to be what was there.
"""

from __future__ import annotations

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from drirl_jax import bucket, sharding
from drirl_jax.types import Array, InputError, PyTree

log = logging.getLogger(__name__)

# Folders made in the background would leave threads that wait for 20 minutes where one cannot be made.
ASYNC = ocp.AsyncOptions(create_directories_asynchronously=False)


def _flat(tree: PyTree) -> dict:
    """The leaves by path, but for those of no elements, which orbax does not store."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if np.size(leaf)}


@jax.jit
def _checksums(flat: dict) -> dict[str, Array]:
    """uint32 of each leaf: Σ_i (2i + 1) bits_i mod 2^32, bits_i those of element i, in any layout on any mesh.

    An odd factor has an inverse mod 2^32, so no change of one element goes unseen, and other damage once in 2^32 times.
    """

    def of(x):
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        index, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum((2 * index + 1) * bits, dtype=jnp.uint32)

    return jax.tree.map(of, flat)


def checksums(flat: dict) -> dict[str, int]:
    """`_checksums` on the host."""
    return {path: int(value) for path, value in jax.device_get(_checksums(flat)).items()}


class Checkpoints:
    """The checkpoints of one stage: the newest few, each complete or absent whenever the process dies."""

    def __init__(self, folder: bucket.Path, keep: int):
        self.folder = folder.absolute() if isinstance(folder, pathlib.Path) else folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, async_options=ASYNC)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The number of finished steps in the newest checkpoint, or None; waits for one that is being written."""
        self.manager.wait_until_finished()
        return self.manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Begins to write the tree as that of `step` finished steps, once the save before it has ended.

        Its arrays may be donated or changed as soon as this returns.
        """
        flat = _flat(tree)
        metadata = {"checksums": checksums(flat)}
        self.manager.save(step, args=ocp.args.StandardSave(flat), custom_metadata=metadata, force=True)

    def restore(self, template: PyTree) -> tuple[int, PyTree]:
        """The newest checkpoint that is whole: its number of steps, and its tree in the template's structure, types and
        shardings. Newer ones that are damaged are told of and put aside.

        Raises:
            InputError: there is none, or it does not have the template's leaves or shapes.
        """
        self.manager.wait_until_finished()
        flat, damaged = _flat(template), {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                found = self._whole(step, flat)
            except Exception as error:  # what a changed byte breaks is not known beforehand: JSON, zstd, an index
                damaged[step] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                continue
            self._put_aside(damaged)
            return step, jax.tree_util.tree_map_with_path(
                lambda path, leaf: found.get(jax.tree_util.keystr(path), leaf), template
            )
        raise InputError(
            f"no checkpoint in {self.folder} fits this run ({damaged}): damage, or another version of drirl_jax wrote "
            "it; take another --workdir, or remove that folder to begin the stage anew."
        )

    def _whole(self, step: int, flat: dict) -> dict:
        """The leaves of a checkpoint. Raises whatever orbax does, or ValueError for other numbers than were saved."""
        found = self.manager.restore(step, args=ocp.args.StandardRestore(flat))
        saved = (self.manager.metadata(step).custom_metadata or {}).get("checksums")
        if saved is not None and (now := checksums(found)) != saved:
            raise ValueError(
                f"other numbers than were saved in {[path for path in now if now[path] != saved.get(path)]}"
            )
        return found

    def _put_aside(self, damaged: dict[int, str]) -> None:
        """Renames these checkpoints, so that the steps can be saved again."""
        for step, why in damaged.items():
            aside = self.folder.with_name(f"{self.folder.name}.damaged") / str(step)
            if sharding.writes():
                log.warning(
                    "%s/%d is damaged (%s): put aside as %s; one before it is taken", self.folder, step, why, aside
                )
                bucket.move(self.folder / str(step), aside)
        if damaged:
            sharding.agreed(True)  # that is, no process reads the folder before that is done
            self.manager.reload()

    def close(self) -> None:
        """Waits until all is written."""
        self.manager.close()
