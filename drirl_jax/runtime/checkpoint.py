"""Orbax checkpoints: all that a resumed run needs, in one place.

Any pytree is stored flat, by the path of each leaf, and restored into a template of the same shape. So the files do not
depend on the classes that hold the tree in memory.

A checkpoint is written in the background, from copies that are made before `save` returns, and appears whole or not at
all. It comes with checksums that were computed on the devices: they show whether a restored tree is the saved one.
"""

from __future__ import annotations

import itertools
import logging
import pathlib
from functools import partial
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from drirl_jax.runtime import bucket, json_files, processes
from drirl_jax.types import Array, InputError, PyTree

log = logging.getLogger(__name__)

# With folders made in the background, a folder that cannot be made would leave threads that wait for 20 minutes.
ASYNC = ocp.AsyncOptions(create_directories_asynchronously=False)


def _flat(tree: PyTree) -> dict:
    """The leaves by path, without empty ones, which orbax does not store."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if np.size(leaf)}


@jax.jit
def _checksums(flat: dict) -> dict[str, Array]:
    """uint32 of each leaf: Σ_i (2i + 1) bits_i mod 2^32, with the bits of element i; the same for any mesh and layout.

    An odd factor has an inverse mod 2^32. So every change of a single element is detected; other damage is missed once
    in 2^32 times.
    """

    def checksum(x):
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        index, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum((2 * index + 1) * bits, dtype=jnp.uint32)

    return jax.tree.map(checksum, flat)


def checksums(flat: dict) -> dict[str, int]:
    """`_checksums` on the host."""
    return {path: int(value) for path, value in jax.device_get(_checksums(flat)).items()}


def _unreadable(folder: bucket.Path) -> dict[int, str]:
    """The checkpoints whose metadata is no JSON object with an object `custom_metadata`, and why."""
    errors = {}
    for step in (path for path in folder.iterdir() if path.name.isdigit()):
        try:
            json_files.load(step / "_CHECKPOINT_METADATA", {"custom_metadata": dict})
        except InputError as error:
            errors[int(step.name)] = str(error)
    return errors


class Checkpoints:
    """The checkpoints of one stage: the newest few, each complete or absent whenever the process dies."""

    def __init__(self, folder: bucket.Path, keep: int):
        self.folder = folder.absolute() if isinstance(folder, pathlib.Path) else folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, async_options=ASYNC)
        # Without this handler orbax reads from the newest checkpoint, even a damaged one, how to read all others.
        handler = ocp.StandardCheckpointHandler()
        open_folder = partial(ocp.CheckpointManager, self.folder, item_handlers=handler, options=options)
        try:
            self.manager = open_folder()
        except ValueError:  # orbax already fails here on metadata of another type
            self._rename(_unreadable(self.folder))
            self.manager = open_folder()

    def latest(self) -> int | None:
        """The number of finished steps in the newest checkpoint, or None; waits for one that is being written."""
        self.manager.wait_until_finished()
        return self.manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Begins to write the tree of `step` finished steps, after the save before it has ended.

        The tree's arrays may be donated or changed as soon as this returns.
        """
        flat = _flat(tree)
        metadata = {"checksums": checksums(flat)}
        self.manager.save(step, args=ocp.args.StandardSave(flat), custom_metadata=metadata, force=True)

    def newest_checksums(self) -> dict[str, int]:
        """The checksums of the newest checkpoint: they identify it, also in a copy.

        Raises:
            InputError: there is no checkpoint, or it has no checksums.
        """
        step = self.latest()
        try:
            return self._stored_checksums(step)
        except Exception as error:  # a changed byte may break anything
            raise InputError(f"the newest checkpoint in {self.folder} is damaged ({error}): copy it anew.") from error

    def restore(
        self, template: PyTree, unusable: Callable[[int], str | None] = lambda step: None
    ) -> tuple[int, PyTree]:
        """The newest undamaged checkpoint: its number of steps, and its tree in the template's structure, types and
        shardings. Newer ones are damaged: it warns of them and renames them.

        Args:
            unusable: number of steps -> the reason why such a checkpoint cannot be used, or None; the same on all
                processes.

        Raises:
            InputError: there is no such checkpoint with the template's leaves and shapes.
        """
        self.manager.wait_until_finished()
        flat, damaged = _flat(template), {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                if reason := unusable(step):
                    raise ValueError(reason)
                leaves = self._restore_leaves(step, flat)
            except Exception as error:  # a changed byte may break anything: JSON, zstd, an index
                damaged[step] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                continue
            self._rename_and_reload(damaged)
            return step, jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaves.get(jax.tree_util.keystr(path), leaf), template
            )
        raise InputError(
            f"no checkpoint in {self.folder} fits this run ({damaged}): damage, or another version of drirl_jax wrote "
            "it; put whole copies there, or take another --workdir. To begin the stage anew move that folder elsewhere."
        )

    def _restore_leaves(self, step: int, flat: dict) -> dict:
        """The leaves of a checkpoint. Raises any error of orbax, or ValueError if the checksums differ."""
        saved = self._stored_checksums(step)
        leaves = self.manager.restore(step, args=ocp.args.StandardRestore(flat))
        if (restored := checksums(leaves)) != saved:
            paths = sorted(path for path in restored.keys() | saved.keys() if restored.get(path) != saved.get(path))
            raise ValueError(f"other numbers than were saved in {paths}")
        return leaves

    def _stored_checksums(self, step: int | None) -> dict[str, int]:
        """The checksums that `save` wrote. Raises ValueError if there are none: such a checkpoint counts as damaged."""
        saved = None if step is None else (self.manager.metadata(step).custom_metadata or {}).get("checksums")
        if not saved:
            raise ValueError("it has no checksums: a part of it was not copied, or it was never finished")
        return saved

    def _rename_and_reload(self, damaged: dict[int, str]) -> None:
        """Renames these checkpoints, so that the steps can be saved again."""
        self._rename(damaged)
        if damaged:
            self.manager.reload()

    def _rename(self, damaged: dict[int, str]) -> None:
        for step, reason in damaged.items():
            if processes.is_writer():
                target = self._free_name(step)
                log.warning(
                    "%s/%d is damaged (%s): put aside as %s; one before it is taken", self.folder, step, reason, target
                )
                bucket.rename_folder(self.folder / str(step), target)
        if damaged:
            processes.writers_value(True)  # a barrier: no process reads the folder before the renaming is done

    def _free_name(self, step: int) -> bucket.Path:
        """An unused folder name for a damaged checkpoint of this step."""
        folder = self.folder.with_name(f"{self.folder.name}.damaged")
        names = itertools.chain([str(step)], (f"{step}-{n}" for n in itertools.count(2)))
        return next(path for path in (folder / name for name in names) if not path.exists())

    def close(self) -> None:
        """Waits until everything is written."""
        self.manager.close()
