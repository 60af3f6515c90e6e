"""The one batch type, the train state and the letters in the suffixes of array names.

P prompts, G responses of a prompt, M members of a prompt's group (responses and demonstrations), R tokens of the prefix
that all prompts share, S prompt tokens after the prefix, T response tokens, K parts of a response or negatives of a
demonstration, L parts of a demonstration, E embedding width, D model width, H heads, C categories, V vocabulary, N rows
of a flat view.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from drirl_jax.errors import InputError as InputError

Array: TypeAlias = jax.Array
AnyArray: TypeAlias = jax.Array | np.ndarray  # on a device (or a tracer), or on the host
PyTree: TypeAlias = Any


@struct.dataclass
class Group:
    """A prompt and its group of responses: right-padded ids, masked by length and never by the pad id.

    The pad id may equal the end-of-sequence id. The policy must learn to emit that token, so a response's length counts
    it.

    Attributes:
        prompt: [P, S] int32 token ids.
        prompt_len: [P] int32, 1 <= prompt_len <= S.
        response: [P, G, T] int32 token ids.
        response_len: [P, G] int32, 1 <= response_len <= T.
        category: [P] int32 in [0, C).
        prefix: R ids that begin every prompt (a system turn). `prompt` does not hold them: they pass through the
            network once for all prompts.
    """

    prompt: Array
    prompt_len: Array
    response: Array
    response_len: Array
    category: Array
    prefix: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def members(self, members: slice) -> "Group":
        """The same prompts with some of their responses."""
        return dataclasses.replace(self, response=self.response[:, members], response_len=self.response_len[:, members])

    def take(self, index_PM: Array) -> "Group":
        """The same prompts with M responses of each, chosen by index [P, M]."""
        return dataclasses.replace(
            self,
            response=jnp.take_along_axis(self.response, index_PM[..., None], axis=1),
            response_len=jnp.take_along_axis(self.response_len, index_PM, axis=1),
        )

    def join(self, text_PT: Array, length_P: Array) -> "Group":
        """The group with one more member, its last: [P, G + 1, T]."""
        return dataclasses.replace(
            self,
            response=jnp.concatenate([self.response, text_PT[:, None]], axis=1),
            response_len=jnp.concatenate([self.response_len, length_P[:, None]], axis=1),
        )


class TrainState(NamedTuple):
    """The state that an update replaces.

    Attributes:
        params: the trained parameters.
        opt_state: the optimiser's state.
        step: the number of updates taken.
        skipped: the number of updates skipped because they were not finite.
        skipped_in_a_row: the number of updates skipped since the last one taken.
    """

    params: PyTree
    opt_state: PyTree
    step: Array
    skipped: Array
    skipped_in_a_row: Array


def length_mask(length: Array, size: int) -> Array:
    """[..., size] bool: True at positions below `length` [...]."""
    return jnp.expand_dims(jnp.arange(size), range(length.ndim)) < length[..., None]
