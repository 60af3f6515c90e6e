"""Workdirs in buckets (gs://): orbax writes its checkpoints there itself, all else passes through a folder here.

An object of a bucket appears whole or not at all, but nothing can be appended to it. So files are written here and
uploaded whole before each checkpoint: what a lost machine takes with it is what the run repeats from there on.
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
# What a run that goes on reads again. A model that was exported may lack files, so it is written anew.
READ_AGAIN = ("*.json", "*.jsonl", "evals/*.json")

Path: TypeAlias = pathlib.Path | epath.Path


def parse_path(name: str | Path) -> Path:
    """The folder or the place in a bucket of this name.

    Raises:
        InputError: it is neither, no run can have it (`names.need_place_of_run`), or what reads buckets is not
            installed.
    """
    if "://" not in str(name):
        folder_here = files.expand_path(name)
        names.need_place_of_run(folder_here.absolute())
        return folder_here
    names.need_place_of_run(name)
    if not re.fullmatch(r"gs://[^/]+/.*[^/].*", str(name)):
        raise InputError(f"{name} is neither a folder nor a place in a bucket: those are written gs://BUCKET/PATH.")
    _files()
    return epath.Path(name)


def local_folder(name: str | Path) -> pathlib.Path:
    """The folder of this name, for what works in no bucket. Raises InputError for a place in one."""
    if "://" in str(name):
        raise InputError(f"{name} is no folder, and this command takes no bucket: give a folder here.")
    return files.expand_path(name)


@functools.cache
def _files() -> fsspec.AbstractFileSystem:
    # Of epath's and orbax's clients too: tensorstore and other processes change folders that these have listed.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    try:
        return fsspec.filesystem("gcs")
    except ImportError as error:
        raise InputError(f"buckets need the package gcsfs ({error}): pip install 'drirl_jax[gcs]'.") from error


def rename_folder(source: Path, target: Path) -> None:
    """Gives a folder another name, in a bucket object by object."""
    if isinstance(source, pathlib.Path):
        target.parent.mkdir(exist_ok=True)
        source.replace(target)
    else:
        _files().mv(str(source), str(target), recursive=True)


def local_copy(source: Path) -> pathlib.Path:
    """The folder itself, or a copy here of one in a bucket, which is kept until the process ends.

    Raises:
        InputError: there is none in the bucket.
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
    """A folder of this process, which goes when it ends."""
    return tempfile.TemporaryDirectory(prefix="drirl_jax-")


class Workdir:
    """Where a run keeps what it makes.

    Args:
        name: a folder, or gs://BUCKET/PATH.

    Attributes:
        kept: that place; what orbax writes goes there, by all processes alike.
        local: the same folder; for a bucket one here, which `take` fills and `push` uploads.
    """

    def __init__(self, name: str | Path):
        self.kept = parse_path(name)
        self.remote = not isinstance(self.kept, pathlib.Path)
        self.local = pathlib.Path(_scratch().name) / uuid.uuid4().hex if self.remote else self.kept
        self.owner, self._pushed = uuid.uuid4().hex.encode(), {}
        self.lock: lock.Lock | None = None

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """`take` for what is done inside; an error that comes of a folder that was removed meanwhile says so."""
        lock = self.take()
        try:
            yield
        except Exception:
            if lock:
                lock.require()
            raise
        finally:
            if lock:
                lock.close()

    def require(self) -> None:
        """Raises InputError where this process has the workdir no longer, or its folder is gone."""
        if self.lock:
            self.lock.require()
        elif self.remote and _files().cat_file(f"{self.kept}/.owner") != self.owner:
            raise InputError(f"a newer run is at work in {self.kept}: this one ends, and leaves it to that.")

    def take(self) -> lock.Lock | None:
        """Takes the workdir for this process, and fetches from a bucket what a run that goes on reads again.

        A folder is locked until what is returned is closed or the process dies. A bucket knows no locks: there the
        newest run has the workdir, and the one before it finds that at its next `push`.

        Raises:
            InputError: another run has the folder, or nothing can be written there.
        """
        if not self.remote:
            self.lock = lock.acquire(self.local)
            return self.lock
        self.local.mkdir(parents=True)
        try:
            _files().pipe_file(f"{self.kept}/.owner", self.owner)
            for found in [name for glob in READ_AGAIN for name in _files().glob(f"{self.kept}/{glob}")]:
                target = self.local / found.removeprefix(str(self.kept).removeprefix(SCHEME)).lstrip("/")
                target.parent.mkdir(exist_ok=True)
                _files().get_file(found, str(target))
                self._pushed[target] = _state(target)
        except Exception as error:  # the client raises many kinds: HTTP, credentials, network
            why = " ".join(f"{type(error).__name__} {error}".split())[:200]
            raise InputError(
                f"the workdir {self.kept} cannot be read and written ({why}): is the bucket there, and may this "
                "account write to it?"
            ) from error
        return None

    def push(self) -> None:
        """Sees that the workdir is still this process's, and uploads to a bucket what has changed here since the last
        time, each file whole; only from the process that writes.

        Raises:
            InputError: another run has taken the workdir, or its folder is gone.
        """
        if not processes.is_writer():
            return
        self.require()
        if not self.remote:
            return
        for file in sorted(file for file in self.local.rglob("*") if file.is_file()):
            if self._pushed.get(file) != (state := _state(file)):
                _files().put_file(str(file), f"{self.kept}/{file.relative_to(self.local)}")
                self._pushed[file] = state


def _state(file: pathlib.Path) -> tuple[int, int]:
    """What differs once a file has changed: its bytes and nanoseconds."""
    return file.stat().st_size, file.stat().st_mtime_ns
