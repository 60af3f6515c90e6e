"""Checks the header of a GGUF file without allocating the sizes that it claims.

The reader of the package gguf makes an object for each value that a header claims, even if the file is too short for
it. A file of a few bytes may claim 2^40 values.
"""

from __future__ import annotations

import mmap
import pathlib
import struct

# Bytes of a value, by the number of its type. Strings and arrays give their own length.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
FIELD_BYTES, TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8  # the least that a field or a tensor takes in the header
VALUES = 2**22  # the most values of all fields: words, types and merges of a vocabulary of a million


class Walk:
    """A position in a header that moves forward over values.

    Raises:
        ValueError: the header claims more than the file holds, or more than any model has.
    """

    def __init__(self, data: bytes | mmap.mmap):
        self.data, self.position, self.values = data, 4, 0
        version = struct.unpack("<I", self.pass_bytes(4))[0]
        self.order = ">" if version & 65535 == 0 else "<"

    def pass_bytes(self, count: int) -> bytes:
        """The next bytes."""
        self.skip(count)
        return self.data[self.position - count : self.position]

    def skip(self, count: int) -> None:
        """Moves forward by `count` bytes."""
        if count > len(self.data) - self.position:
            raise ValueError("its header claims more than the file holds")
        self.position += count

    def number(self, form: str) -> int:
        """The next whole number: of 4 bytes for the form "I", of 8 bytes for "Q"."""
        return struct.unpack(self.order + form, self.pass_bytes(4 if form == "I" else 8))[0]

    def count(self, min_bytes: int) -> int:
        """The next number, a count of items that follow, each of at least `min_bytes` bytes."""
        count = self.number("Q")
        if count * min_bytes > len(self.data) - self.position:
            raise ValueError("its header claims more than the file holds")
        return count

    def string(self) -> None:
        """Moves forward over a string."""
        self.skip(self.number("Q"))

    def value(self, kind: int) -> None:
        """Moves forward over a value of type `kind`."""
        self.values += 1
        if self.values > VALUES:
            raise ValueError(f"its header holds more than {VALUES} values")
        if kind in SCALARS:
            self.skip(SCALARS[kind])
        elif kind == STRING:
            self.string()
        elif kind == ARRAY:
            self.array()
        else:
            raise ValueError(f"its header has a value of the unknown type {kind}")

    def array(self) -> None:
        """Moves forward over an array. Raises ValueError for an array of arrays."""
        kind = self.number("I")
        if kind == ARRAY:
            raise ValueError("its header has an array of arrays")
        count = self.count(SCALARS.get(kind, 8))
        if self.values + count > VALUES:
            raise ValueError(f"its header holds more than {VALUES} values")
        for _ in range(count):
            self.value(kind)


def need_bounded(path: pathlib.Path) -> None:
    """Raises ValueError if a GGUF file's header claims more than the file holds, or more than any model has."""
    if path.stat().st_size < 24:
        raise ValueError("it ends before its header does")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = Walk(data)
        tensors, fields = walk.count(TENSOR_BYTES), walk.count(FIELD_BYTES)
        for _ in range(fields):
            walk.string()
            walk.value(walk.number("I"))
        for _ in range(tensors):
            walk.string()
            walk.skip(8 * walk.number("I") + 4 + 8)
