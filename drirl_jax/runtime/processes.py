"""What several processes of one run do together: one writes and asks servers, all know the results.

All of them run the same program. The first one writes files and speaks (`is_writer`) and asks servers (`ask_once`).
They share long work on separate items (`map_shares`). An error of one process is raised on all (`all_or_none`).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
from typing import Any, Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from drirl_jax.types import InputError

JSON = Any  # what a JSON file can hold


LONGEST_WAIT = 24 * 60 * 60 * 1000  # milliseconds that processes wait for the last of them


MOST_AT_ONCE = 1 << 22  # bytes of each process that lie on every device while they are gathered


_turn = itertools.count()  # the same on all processes


def connect(section: ConfigDict) -> None:
    """Joins this process to the others of config.distributed, before jax is asked for its devices."""
    if section.auto:
        jax.distributed.initialize()
    elif section.processes > 1:
        jax.distributed.initialize(section.coordinator, section.processes, section.process)


def is_writer() -> bool:
    """Whether this process is the one of all that writes files and speaks."""
    return jax.process_index() == 0


def writers_value(value: bool) -> bool:
    """What the process that writes has found, on all: files may appear on the others a moment later."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def gather_json(value: JSON) -> list[JSON]:
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
def all_or_none() -> Iterator[None]:
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
    found = gather_json(None if own is None else [wrong, str(own) if wrong else repr(own)])
    if own is not None and not wrong:
        raise own
    for process, (is_input, why) in ((i, error) for i, error in enumerate(found) if error):
        raise (InputError(why) if is_input else RuntimeError(f"process {process} failed: {why}")) from own


def ask_once(ask: Callable[[], JSON]) -> JSON:
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
    with all_or_none():
        if is_writer():
            found = ask()
    return gather_json(found)[0]


def map_shares(items: Sequence, do: Callable[[Sequence], Iterable[JSON]]) -> list[JSON]:
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
    with all_or_none():
        mine = list(do(items[first:last]))
    return [result for part in gather_json(mine) for result in part]


# glibc's mallopt: no array in a mapping of its own, nothing given back, one heap for all threads. (malloc.h)
KEEP = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it has freed, for what it allocates next; does nothing without glibc.

    XLA allocates a function's temporary arrays at every call. glibc would map them and give them back each time, and
    the kernel clear every page again: a third of an update on two CPU cores (docs/PERFORMANCE.md). To be called
    before JAX has started its threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option in KEEP.values() if mallopt else ():
        mallopt(*option)
