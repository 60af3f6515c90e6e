"""How several processes of one run work together: one writes files and asks servers, all get the results.

All processes run the same program. Only the first one writes files, prints (`is_writer`) and asks servers (`ask_once`).
They share long work on separate items (`map_shares`). An error of one process is raised on all (`all_or_none`).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import pathlib
from typing import Any, Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from drirl_jax.runtime import lock
from drirl_jax.types import InputError

JSON = Any  # what a JSON file can hold


LONGEST_WAIT = 24 * 60 * 60 * 1000  # milliseconds that processes wait for the last one


MOST_AT_ONCE = 1 << 22  # bytes of each process that every device holds at a time while results are gathered


_gather_number = itertools.count()  # the same on all processes


def connect(section: ConfigDict) -> None:
    """Joins this process to the others of config.distributed, before jax is asked for its devices."""
    if section.auto:
        jax.distributed.initialize()
    elif section.processes > 1:
        jax.distributed.initialize(section.coordinator, section.processes, section.process)


def is_writer() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def writers_value(value: bool) -> bool:
    """The value of the process that writes, on all processes: the others may see its files a moment later."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def gather_json(value: JSON) -> list[JSON]:
    """The value of each process, on all of them, in their order. They wait a day for the last one.

    Every process must call it.

    Args:
        value: anything that JSON can hold.
    """
    if not jax.distributed.is_initialized():  # unlike the number of processes, this needs no devices
        return [value]
    message = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # A server may take minutes, but the first collective of some processes waits for only 30 seconds.
    ocp.multihost.get_barrier_sync_fn()(key=f"gathered {next(_gather_number)}", timeout_ms=LONGEST_WAIT)
    sizes = multihost_utils.process_allgather(np.array(len(message)))
    longest = int(sizes.max())
    piece = min(1 << longest.bit_length(), MOST_AT_ONCE)  # only few sizes, because each one is compiled
    padded = np.zeros(-(-longest // piece) * piece, np.uint8)
    padded[: len(message)] = message
    pieces = [multihost_utils.process_allgather(part) for part in padded.reshape(-1, piece)]
    return [json.loads(row[:size].tobytes()) for row, size in zip(np.concatenate(pieces, axis=1), sizes)]


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """All processes complete the block, or none does: an error of one is raised on all, once all have reached the end.

    Otherwise the others would wait, at the next thing that they do together, for a process that has ended. Nothing may
    be gathered inside the block: a process that had failed before would not take part.

    Raises:
        InputError: that of the first process which has one.
        RuntimeError: another process failed with another error; that process raises its own error.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    own_error = None
    try:
        yield
    except Exception as error:
        own_error = error
    is_own_input = isinstance(own_error, InputError)
    errors = gather_json(
        None if own_error is None else [is_own_input, str(own_error) if is_own_input else repr(own_error)]
    )
    if own_error is not None and not is_own_input:
        raise own_error
    for process, (is_input, reason) in ((i, error) for i, error in enumerate(errors) if error):
        raise (InputError(reason) if is_input else RuntimeError(f"process {process} failed: {reason}")) from own_error


@contextlib.contextmanager
def locked_by_writer(workdir: pathlib.Path) -> Iterator[None]:
    """The process that writes makes the workdir and holds its lock during the block.

    Every process must call it.

    Raises:
        InputError: another command holds the lock, or nothing can be written there; then on all processes.
    """
    with contextlib.ExitStack() as stack:
        with all_or_none():
            if is_writer():
                stack.enter_context(contextlib.closing(lock.acquire(workdir)))
        yield


def ask_once(ask: Callable[[], JSON]) -> JSON:
    """Calls `ask` on the process that writes, and returns the result on all of them. So a server is asked only once.

    Every process must call it.

    Args:
        ask: returns anything that JSON can hold.

    Raises:
        InputError: that of `ask`, then on all processes.
    """
    if not jax.distributed.is_initialized():
        return ask()
    result = None
    with all_or_none():
        if is_writer():
            result = ask()
    return gather_json(result)[0]


def map_shares(items: Sequence, function: Callable[[Sequence], Iterable[JSON]]) -> list[JSON]:
    """One result for each item, in their order, on all processes. Each process works on an equal range of the items.

    Every process must call it, with the same items; each reads only the items of its own range.

    Args:
        function: items -> for each of them anything that JSON can hold (a tuple comes back as a list).

    Raises:
        InputError: that of `function` for the first bad item of the first process that has one, then on all processes.
    """
    if not jax.distributed.is_initialized():
        return list(function(items))
    first, last = (len(items) * i // jax.process_count() for i in (jax.process_index(), jax.process_index() + 1))
    own_results: list[JSON] = []
    with all_or_none():
        own_results = list(function(items[first:last]))
    return [result for share in gather_json(own_results) for result in share]


# Options of glibc's mallopt (malloc.h): no array has its own mapping, no memory is returned, all threads share a heap.
KEEP = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}


def keep_freed_memory() -> None:
    """Makes this process reuse the memory that it has freed; does nothing without glibc.

    XLA allocates a function's temporary arrays at every call. By default glibc maps and unmaps them each time, and the
    kernel clears every page again. This takes a third of an update on two CPU cores (docs/PERFORMANCE.md). Call it
    before JAX starts its threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option in KEEP.values() if mallopt else ():
        mallopt(*option)
