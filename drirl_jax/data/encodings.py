"""Reads a data file as UTF-8 text, whatever its compression and its Unicode encoding."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import pathlib
import zlib
from typing import Callable

from drirl_jax.errors import InputError

# By the first bytes of a file: names can mislead, for example if a browser has unpacked a download.
PACKED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
}
ENDINGS = (".gz", ".xz")  # of compressed files


def kind(path: pathlib.Path) -> str:
    """The ending that says what a file holds, in lower case, without that of a compressor: ".jsonl" for X.JSONL.gz."""
    name = path.name.lower()
    return pathlib.Path(name.removesuffix(next(filter(name.endswith, ENDINGS), ""))).suffix


def read_utf8(path: pathlib.Path) -> bytes:
    """The contents of a file, unpacked, as UTF-8 without a byte order mark. Bytes that look like UTF-8 are not checked.

    Raises:
        InputError: there is no such file; it cannot be read or unpacked; or it is not valid UTF-16 or UTF-32.
    """
    if not path.is_file():
        raise InputError(f"no file {path}: check the path")
    try:
        data = path.read_bytes()
        for magic, unpack in PACKED.items():
            if data.startswith(magic):
                data = unpack(data)
                break
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise InputError(f"{path} cannot be unpacked ({error}): download it anew") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the path") from error
    encoding = json.detect_encoding(data)
    if encoding.startswith("utf-8"):
        return data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode(encoding).encode("utf-8")
    except UnicodeError as error:
        raise InputError(f"{path} is no text in {encoding.upper()} ({error}): save it as UTF-8") from error
