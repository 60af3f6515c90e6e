"""Locks a workdir, so that only one run at a time uses it."""

from __future__ import annotations

import fcntl
import logging
import os
import pathlib
from typing import TextIO

from drirl_jax.errors import InputError

log = logging.getLogger(__name__)

TAKEN = "another run is at work in {}: wait until it has ended, or take another --workdir."


def require_free(workdir: pathlib.Path) -> None:
    """Raises InputError where `acquire` would, but locks and makes nothing."""
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise InputError(f"the workdir {workdir} cannot be written: take another --workdir.")
    if is_locked(workdir):
        raise InputError(TAKEN.format(workdir))


class Lock:
    """The lock of a workdir by this process, until `close` or until the process dies.

    The folder itself is locked, so that a user who removes its files does not let a second run in. The file .lock in it
    is locked too: some file systems lock only files, and older versions lock only this file.

    Raises:
        InputError: another process has the lock, or nothing can be written there.
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
            folder_is_locked = self._taken(self.folder)
            self.file = self._file()
            if not (folder_is_locked or self._taken(self.file.fileno())):
                log.warning("%s cannot be locked: do not start a second run there", workdir)
        except BaseException:
            os.close(self.folder)
            raise

    def check_held(self) -> None:
        """Makes and locks .lock again if it was removed. Raises InputError if the folder is gone, or if another run has
        locked it."""
        if not _is_same(self.workdir, self.folder):
            raise InputError(
                f"the workdir {self.workdir} was removed or moved during the run: put it back, and start the same "
                "command again."
            )
        if not _is_same(self.workdir / ".lock", self.file.fileno()):
            self.file.close()
            self.file = self._file()

    def close(self) -> None:
        """Releases the lock."""
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
        """Locks an open file or folder. False if the file system cannot lock it. Raises InputError if another process
        has locked it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(TAKEN.format(self.workdir)) from error
        except OSError:
            return False
        return True


def _is_same(path: pathlib.Path, descriptor: int) -> bool:
    """Whether the path still leads to the file or folder that was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def acquire(workdir: pathlib.Path) -> Lock:
    """Makes the workdir and locks it for this process. Raises InputError like `Lock`."""
    return Lock(workdir)


def is_locked(workdir: pathlib.Path) -> bool:
    """Whether a process of this machine has locked the workdir, as `Lock` does."""
    return any(_locked(path) for path in (workdir, workdir / ".lock"))


def _locked(path: pathlib.Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # no run has been there
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False
