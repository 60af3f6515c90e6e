"""Workdirs in buckets (gs://): orbax writes checkpoints directly there, all other files pass through a local folder.

An object in a bucket appears whole or not at all, but nothing can be appended to it. So files are written locally and
uploaded whole before each checkpoint. If the machine is lost, the run repeats the steps since that checkpoint anyway.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import re
import tempfile
import uuid
from typing import Iterator, TypeAlias

import fsspec
from etils import epath

from drirl_jax.runtime import files, lock, names, processes
from drirl_jax.types import InputError

SCHEME = "gs://"
# Files that a resumed run reads. An exported model is not among them: it may lack files, so it is written again.
READ_AGAIN = ("*.json", "*.jsonl", "evals/*.json")

Path: TypeAlias = pathlib.Path | epath.Path


def parse_path(name: str | Path) -> Path:
    """The local folder or the place in a bucket of this name.

    Raises:
        InputError: it is neither, it cannot be a run's workdir (`names.need_place_of_run`), or the package that reads
            buckets is not installed.
    """
    if "://" not in str(name):
        folder = files.expand_path(name)
        names.need_place_of_run(folder.absolute())
        return folder
    names.need_place_of_run(name)
    if not re.fullmatch(r"gs://[^/]+/.*[^/].*", str(name)):
        raise InputError(f"{name} is neither a folder nor a place in a bucket: those are written gs://BUCKET/PATH.")
    _files()
    return epath.Path(name)


def local_folder(name: str | Path) -> pathlib.Path:
    """The local folder of this name. Raises InputError for a place in a bucket."""
    if "://" in str(name):
        raise InputError(f"{name} is no folder, and this command takes no bucket: give a folder here.")
    return files.expand_path(name)


@functools.cache
def _files() -> fsspec.AbstractFileSystem:
    # Holds for the clients of epath and orbax too: tensorstore and other processes change folders after a listing.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    try:
        return fsspec.filesystem("gcs")
    except ImportError as error:
        raise InputError(f"buckets need the package gcsfs ({error}): pip install 'drirl_jax[gcs]'.") from error


def rename_folder(source: Path, target: Path) -> None:
    """Renames a folder; in a bucket one object after the other."""
    if isinstance(source, pathlib.Path):
        target.parent.mkdir(exist_ok=True)
        source.replace(target)
    else:
        _files().mv(str(source), str(target), recursive=True)


def local_copy(source: Path) -> pathlib.Path:
    """The folder itself if it is local; else a local copy of it, which is removed when the process ends.

    Raises:
        InputError: the bucket has no such folder.
    """
    if isinstance(source, pathlib.Path):
        return source
    return _copy(str(source))


@functools.cache
def _copy(url: str) -> pathlib.Path:
    target = pathlib.Path(_scratch().name) / uuid.uuid4().hex
    try:
        _files().get(f"{url}/", f"{target}/", recursive=True)
    except FileNotFoundError as error:
        raise InputError(f"there is nothing in {url}: give a folder that is there.") from error
    return target


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    """A temporary folder, which is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="drirl_jax-")


class Workdir:
    """The place where a run keeps its files.

    Args:
        name: a folder, or gs://BUCKET/PATH.

    Attributes:
        path: that place; the orbax of each process writes there.
        local: the same folder; for a bucket a local folder, which `take` fills and `push` uploads.
    """

    def __init__(self, name: str | Path):
        self.path = parse_path(name)
        self.is_remote = not isinstance(self.path, pathlib.Path)
        self.local = pathlib.Path(_scratch().name) / uuid.uuid4().hex if self.is_remote else self.path
        self.owner, self._pushed = uuid.uuid4().hex.encode(), {}
        self.lock: lock.Lock | None = None

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Holds the workdir (see `take`) during the block. If the folder was removed meanwhile, an error says so."""
        taken = self.take()
        try:
            yield
        except Exception:
            if taken:
                taken.check_held()
            raise
        finally:
            if taken:
                taken.close()

    def check_taken(self) -> None:
        """Raises InputError if this process no longer has the workdir, or its folder is gone."""
        if self.lock:
            self.lock.check_held()
        elif self.is_remote and _files().cat_file(f"{self.path}/.owner") != self.owner:
            raise InputError(f"a newer run is at work in {self.path}: this one ends.")

    def take(self) -> lock.Lock | None:
        """Takes the workdir for this process, and downloads from a bucket the files that a resumed run reads.

        A folder is locked until the returned lock is closed or the process dies. A bucket has no locks: there the
        newest run has the workdir, and the run before it notices that at its next `push`.

        Raises:
            InputError: another run has the folder, or nothing can be written there.
        """
        if not self.is_remote:
            self.lock = lock.acquire(self.local)
            return self.lock
        self.local.mkdir(parents=True)
        try:
            _files().pipe_file(f"{self.path}/.owner", self.owner)
            for source in [name for glob in READ_AGAIN for name in _files().glob(f"{self.path}/{glob}")]:
                target = self.local / source.removeprefix(str(self.path).removeprefix(SCHEME)).lstrip("/")
                target.parent.mkdir(exist_ok=True)
                _files().get_file(source, str(target))
                self._pushed[target] = _state(target)
        except Exception as error:  # the client raises many kinds: HTTP, credentials, network
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            raise InputError(
                f"the workdir {self.path} cannot be read and written ({reason}): is the bucket there, and may this "
                "account write to it?"
            ) from error
        return None

    def push(self) -> None:
        """Checks that this process still has the workdir, and uploads to a bucket each file that has changed since the
        last time, whole. Only the process that writes does this.

        Raises:
            InputError: another run has taken the workdir, or its folder is gone.
        """
        if not processes.is_writer():
            return
        self.check_taken()
        if not self.is_remote:
            return
        for file in sorted(file for file in self.local.rglob("*") if file.is_file()):
            if self._pushed.get(file) != (state := _state(file)):
                _files().put_file(str(file), f"{self.path}/{file.relative_to(self.local)}")
                self._pushed[file] = state


def _state(file: pathlib.Path) -> tuple[int, int]:
    """Values that differ after a change of the file: its size in bytes, its time of change in nanoseconds."""
    return file.stat().st_size, file.stat().st_mtime_ns
