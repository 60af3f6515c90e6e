"""What identifies contents: a hash of what a file, a model, a tokenizer or a data set holds, wherever it lies.

A path, a name or a date identifies nothing: the same contents copied elsewhere have the same hash, and a file that was
edited in place has another one. Each file is hashed once in a process, and again once its size, times or inode change.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import weakref
from typing import Any, Iterable, Mapping, Sequence

import numpy as np

BYTES = 16  # of a hash
# What config.json holds beside the model.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype")


def of_bytes(data: bytes | memoryview) -> str:
    """The hash of these bytes."""
    return hashlib.blake2b(data, digest_size=BYTES).hexdigest()


def of_value(value: Any) -> str:
    """The hash of what JSON can say, in whatever order its names stand."""
    return of_bytes(json.dumps(value, sort_keys=True, default=str).encode("utf-8"))


def of_file(path: str | os.PathLike) -> str:
    """The hash of a file's bytes."""
    return _of_file(*_state(pathlib.Path(path)))


def of_folder(folder: pathlib.Path, patterns: Sequence[str]) -> str:
    """The hash of a folder's files that match a pattern, with their names in the folder."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    with concurrent.futures.ThreadPoolExecutor() as pool:
        hashes = pool.map(of_file, files)
        return of_value([[file.relative_to(folder).as_posix(), of] for file, of in zip(files, hashes)])


def of_records(records: Iterable[Sequence[str]]) -> str:
    """The hash of rows of text, in whatever order they stand."""
    return of_value(sorted(list(row) for row in records))


def of_tensors(tensors: Mapping[str, np.ndarray]) -> str:
    """The hash of arrays by name, in however many files they lie; one of them at a time is in memory for each core."""

    def of(name: str) -> list:
        array = np.ascontiguousarray(tensors[name])
        return [name, array.dtype.name, list(array.shape), of_bytes(memoryview(array.reshape(-1).view(np.uint8)))]

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return of_value(list(pool.map(of, sorted(tensors))))


def of_weights(path: pathlib.Path, tensors: Mapping[str, np.ndarray] | None) -> str:
    """The hash of a model's weights.

    Args:
        path: the model's folder or file; while its files stay as they are, their tensors are not hashed again.
        tensors: by name; None for a file that is hashed as it stands.
    """
    if tensors is None:
        return of_file(path)
    state = tuple(_state(file) for file in sorted(path.glob("*")) if file.is_file())
    if state not in _weights:
        _weights[state] = of_tensors(tensors)
    return _weights[state]


def of_model_config(config: Mapping[str, Any]) -> str:
    """The hash of a model's config.json as Hugging Face writes it, without what does not change the model."""
    return of_value({name: value for name, value in config.items() if name not in NOT_THE_MODEL})


def of_tokenizer(tokenizer: Any) -> str:
    """The hash of a transformers tokenizer in its serialised form, without the state that calls leave in it; computed
    once for each."""
    if tokenizer not in _tokenizers:
        _tokenizers[tokenizer] = _of_tokenizer(tokenizer)
    return _tokenizers[tokenizer]


def _of_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return of_value(tokenizer.get_vocab())
    state = json.loads(backend.to_str())
    return of_value({name: value for name, value in state.items() if name not in ("truncation", "padding")})


def of_template(tokenizer: Any) -> str:
    """The hash of the text of its chat template, or of each by name; special tokens, which templates write, count."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return of_value([tokenizer.chat_template, special])


_weights: dict[tuple, str] = {}
_tokenizers: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _state(path: pathlib.Path) -> tuple:
    """What differs once a file has been changed; a file that was replaced has another inode or another change time."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@functools.lru_cache(maxsize=4096)
def _of_file(path: str, *state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=BYTES)).hexdigest()
