"""A run as a process: alone in its workdir, and ready to leave when its machine is taken away."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import logging
import os
import pathlib
import signal
import threading
from typing import Callable, Iterator, TextIO

import jax
from jax.experimental import multihost_utils

from drirl_jax import status
from drirl_jax.types import InputError

log = logging.getLogger(__name__)

PREEMPTED = 75  # exit code (EX_TEMPFAIL): started again, the run goes on
ASKED = itertools.count(1)  # JAX agrees on one of these, so they must not begin anew with every stage
TAKEN = "another run is at work in {}: wait until it has ended, or take another --workdir."
# glibc's mallopt: no array in a mapping of its own, nothing given back, one heap for all threads. (malloc.h)
KEEP = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}


class Preempted(BaseException):
    """The machine is taken away; what was done is kept. No error, which something on the way could take for its own."""


def keep_memory() -> None:
    """Lets this process keep the memory that it has freed, for what it allocates next; does nothing without glibc.

    XLA allocates a function's temporary arrays at every call. glibc would map them and give them back each time, and
    the kernel clear every page again: a third of an update on two CPU cores (docs/PERFORMANCE.md). To be called
    before JAX has started its threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option in KEEP.values() if mallopt else ():
        mallopt(*option)


def leave(*_) -> None:
    """The handler of SIGTERM where nothing is at work that is not kept already."""
    raise Preempted("the run was asked to end")


@contextlib.contextmanager
def notice() -> Iterator[Callable[[int], bool]]:
    """Inside, SIGTERM is noted and does no more.

    Yields:
        number of finished steps -> whether to leave now, on all processes alike; asked once after every step.
    """
    if jax.process_count() > 1:  # jax notes the signal itself, and agrees on a step with the other processes
        yield lambda step: multihost_utils.reached_preemption_sync_point(next(ASKED))
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def require_free(workdir: pathlib.Path) -> None:
    """Raises InputError where `lock` would, but takes and makes nothing."""
    place = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise InputError(f"the workdir {workdir} cannot be written: take another --workdir.")
    if status.held(workdir):
        raise InputError(TAKEN.format(workdir))


def lock(workdir: pathlib.Path) -> TextIO:
    """Makes the workdir and takes it for this process, until the file that is returned is closed or the process dies.

    Raises:
        InputError: another process has it, or nothing can be written there.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a")
    except OSError as error:
        raise InputError(
            f"the workdir {workdir} cannot be written ({error.strerror}): take another --workdir."
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(TAKEN.format(workdir)) from error
    except OSError as error:  # a file system without locks
        log.warning("%s cannot be locked (%s): see that no second run is started there", workdir, error.strerror)
    return file
