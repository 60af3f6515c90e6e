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

from drirl_jax.reports import status
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


class Lock:
    """A workdir that this process has taken, until `close` or its death.

    The folder itself is locked, so that no one who removes files in it lets a second run in. So is .lock in it: some
    file systems lock files alone, and older versions know no other lock.

    Raises:
        InputError: another process has it, or nothing can be written there.
    """

    def __init__(self, workdir: pathlib.Path):
        self.workdir = workdir
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self.folder = os.open(workdir, os.O_RDONLY)
        except OSError as error:
            raise InputError(
                f"the workdir {workdir} cannot be written ({error.strerror}): take another --workdir."
            ) from error
        try:
            alone = self._taken(self.folder)
            self.file = self._file()
            if not (alone or self._taken(self.file.fileno())):
                log.warning("%s cannot be locked: see that no second run is started there", workdir)
        except BaseException:
            os.close(self.folder)
            raise

    def require(self) -> None:
        """Takes .lock again where it was removed. Raises InputError where the folder is no longer there, or another run
        has taken it."""
        if not _is_same(self.workdir, self.folder):
            raise InputError(
                f"the workdir {self.workdir} was removed or moved during the run: put it back, and start the same "
                "command again."
            )
        if not _is_same(self.workdir / ".lock", self.file.fileno()):
            self.file.close()
            self.file = self._file()

    def close(self) -> None:
        """Leaves the workdir to others."""
        self.file.close()
        os.close(self.folder)

    def _file(self) -> TextIO:
        try:
            file = (self.workdir / ".lock").open("a")
        except OSError as error:
            raise InputError(
                f"the workdir {self.workdir} cannot be written ({error.strerror}): take another --workdir."
            ) from error
        try:
            self._taken(file.fileno())
        except InputError:
            file.close()
            raise
        return file

    def _taken(self, descriptor: int) -> bool:
        """Whether it is locked now; False on a file system that locks no such thing. Raises InputError where another
        process has it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(TAKEN.format(self.workdir)) from error
        except OSError:
            return False
        return True


def _is_same(path: pathlib.Path, descriptor: int) -> bool:
    """Whether the path still leads to what was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def lock(workdir: pathlib.Path) -> Lock:
    """Makes the workdir and takes it for this process. Raises InputError like `Lock`."""
    return Lock(workdir)
