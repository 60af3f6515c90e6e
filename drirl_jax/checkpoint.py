"""Orbax checkpoints: all that a resumed run needs, in one place.

Any pytree is stored flat, by the path of each leaf, and restored into a template of the same shape: so that what
is on disk does not depend on the classes that hold it in memory.
"""

from __future__ import annotations

import pathlib

import jax
import orbax.checkpoint as ocp

from drirl_jax.types import InputError, PyTree


def _flat(tree: PyTree) -> dict:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


class Checkpoints:
    """The checkpoints of one stage: the newest few, each complete or absent whenever the process dies."""

    def __init__(self, folder: pathlib.Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The number of finished steps in the newest checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Writes the tree as that of `step` finished steps."""
        self.manager.save(step, args=ocp.args.StandardSave(_flat(tree)))

    def restore(self, template: PyTree) -> PyTree:
        """The newest checkpoint, in the template's structure, types and shardings.

        Raises:
            InputError: the checkpoint does not have the template's leaves or shapes.
        """
        try:
            flat = self.manager.restore(self.latest(), args=ocp.args.StandardRestore(_flat(template)))
        except (ValueError, KeyError) as error:
            raise InputError(f"the checkpoint in {self.manager.directory} does not fit this run: {error}") from error
        return jax.tree.unflatten(jax.tree.structure(template), [flat[path] for path in _flat(template)])

    def close(self) -> None:
        self.manager.close()
