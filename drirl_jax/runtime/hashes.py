"""Hashes of the contents of files, models, tokenizers and data sets.

A hash does not depend on a path, a name or a date: a copy has the same hash, and a file that was edited in place has
another one. A process hashes each file once, and again if its size, times or inode change.
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

BYTES = 16  # size of a hash
# Entries of config.json that do not describe the model.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype")


def hash_bytes(data: bytes | memoryview) -> str:
    """The hash of these bytes."""
    return hashlib.blake2b(data, digest_size=BYTES).hexdigest()


def hash_value(value: Any) -> str:
    """The hash of a value that JSON can hold. The order of an object's names does not matter."""
    return hash_bytes(json.dumps(value, sort_keys=True, default=str).encode("utf-8"))


def hash_file(path: str | os.PathLike) -> str:
    """The hash of a file's bytes."""
    return _of_file(*_state(pathlib.Path(path)))


def hash_folder(folder: pathlib.Path, patterns: Sequence[str]) -> str:
    """The hash of a folder's files that match a pattern, with their names in the folder."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    with concurrent.futures.ThreadPoolExecutor() as pool:
        hashes = pool.map(hash_file, files)
        return hash_value([[file.relative_to(folder).as_posix(), digest] for file, digest in zip(files, hashes)])


def hash_records(records: Iterable[Sequence[str]]) -> str:
    """The hash of rows of text. Their order does not matter."""
    return hash_value(sorted(list(row) for row in records))


def hash_tensors(tensors: Mapping[str, np.ndarray]) -> str:
    """The hash of arrays by name. The number of files does not matter. Each core has one array at a time in memory."""

    def entry(name: str) -> list:
        array = np.ascontiguousarray(tensors[name])
        return [name, array.dtype.name, list(array.shape), hash_bytes(memoryview(array.reshape(-1).view(np.uint8)))]

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hash_value(list(pool.map(entry, sorted(tensors))))


def hash_weights(path: pathlib.Path, tensors: Mapping[str, np.ndarray] | None) -> str:
    """The hash of a model's weights.

    Args:
        path: the model's folder or file; while its files do not change, their tensors are not hashed again.
        tensors: by name; None to hash the file itself.
    """
    if tensors is None:
        return hash_file(path)
    state = tuple(_state(file) for file in sorted(path.glob("*")) if file.is_file())
    if state not in _weights:
        _weights[state] = hash_tensors(tensors)
    return _weights[state]


def hash_model_config(config: Mapping[str, Any]) -> str:
    """The hash of a model's config.json in Hugging Face's form, without the entries NOT_THE_MODEL."""
    return hash_value({name: value for name, value in config.items() if name not in NOT_THE_MODEL})


def hash_tokenizer(tokenizer: Any) -> str:
    """The hash of a transformers tokenizer in its serialised form, without the state that calls change. It is computed
    once for each tokenizer."""
    if tokenizer not in _tokenizers:
        _tokenizers[tokenizer] = _of_tokenizer(tokenizer)
    return _tokenizers[tokenizer]


def _of_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hash_value(tokenizer.get_vocab())
    state = json.loads(backend.to_str())
    return hash_value({name: value for name, value in state.items() if name not in ("truncation", "padding")})


def hash_template(tokenizer: Any) -> str:
    """The hash of the tokenizer's chat template, or templates by name, and of the special tokens that they write."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hash_value([tokenizer.chat_template, special])


_weights: dict[tuple, str] = {}
_tokenizers: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _state(path: pathlib.Path) -> tuple:
    """Values that differ after a change of the file. A replaced file has another inode or another change time."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@functools.lru_cache(maxsize=4096)
def _of_file(path: str, *state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=BYTES)).hexdigest()
