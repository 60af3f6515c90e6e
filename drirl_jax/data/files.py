"""Reads rows of published data sets: from JSON, CSV and Parquet files, and from the hub."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import pathlib
from typing import Any, Iterable, Mapping

from drirl_jax.data import encodings, records
from drirl_jax.errors import InputError
from drirl_jax.runtime.surrogates import without_half_pairs

csv.field_size_limit(2**24)  # some published prompts are longer than csv's own limit

Row = Mapping[str, Any]
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")


def read_table(path: pathlib.Path, whole_characters: bool = True) -> list[tuple[str, Row]]:
    """("file, row n", row) for each row of a JSON, JSONL, CSV, TSV or Parquet file, also compressed by gzip or xz.

    JSON holds a list of rows, or lists of rows by name; this name becomes the field "subset" of its rows. A file named
    JSON may hold JSON lines, and the other way round.

    Args:
        path: the file.
        whole_characters: whether half a surrogate pair (an emoji that was cut) becomes a replacement character.

    Raises:
        InputError: it cannot be read, or does not hold rows with named columns.
    """
    if encodings.kind(path) == ".parquet":
        return _numbered(path, _parquet(path))
    data = encodings.read_utf8(path)
    if delimiter := DELIMITERS.get(encodings.kind(path)):
        return _numbered(path, _separated(path, data, delimiter))
    numbered_rows = _json(path, data)
    if whole_characters and b"\\ud" in data.lower():  # JSON has no other way to write a surrogate
        numbered_rows = [(location, _replaced(row)) for location, row in numbered_rows]
    return numbered_rows


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return without_half_pairs(value)
    if isinstance(value, dict):
        return {_replaced(key): _replaced(sub) for key, sub in value.items()}
    return [_replaced(sub) for sub in value] if isinstance(value, list) else value


def _numbered(path: pathlib.Path, rows: Iterable[Row]) -> list[tuple[str, Row]]:
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows, start=1)]


def _parquet(path: pathlib.Path) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path} needs the package pyarrow to be read: pip install pyarrow.") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # Arrow's own errors are subclasses of these
        raise InputError(f"{path} cannot be read ({error}): check the path, or download it anew.") from error


def _separated(path: pathlib.Path, data: bytes, delimiter: str) -> Iterable[Row]:
    """The rows of a table whose first line has the names. Raises InputError if a row has more cells than names."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text ({error.reason}): save the file as UTF-8.") from error
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = [name for name in reader.fieldnames or () if name]
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"{path} is no table of separated values ({error}): save it anew as CSV.") from error
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path} has several columns called {duplicates[0]!r}: give each its own name.")
    for i, row in enumerate(rows, start=1):
        if any(row.pop(None, ())):
            raise InputError(f"{path}, row {i}: more cells than columns: put a text with a {delimiter!r} in quotes.")
    return rows


def _json(path: pathlib.Path, data: bytes) -> list[tuple[str, Row]]:
    """The rows of one JSON value, or of a JSON value a line. The contents decide which of the two, then the name."""
    by_lines = encodings.kind(path) in LINES
    if by_lines and not data.lstrip().startswith(b"["):
        return list(records.lines_of(path, data))
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}): save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        if by_lines or _is_object(data.lstrip().partition(b"\n")[0]):
            return list(records.lines_of(path, data))
        raise InputError(
            f"{path} is not JSON ({error}): save it as a list of rows, or one JSON object a line."
        ) from error
    if not isinstance(value, dict):
        return _objects(path, value)
    parts = {name: part for name, part in value.items() if isinstance(part, list) and any(map(_is_row, part))}
    if not parts:
        if any(isinstance(part, list) and part for part in value.values()):
            raise InputError(f"{path} holds columns, not rows: save it as a list of rows.")
        return _numbered(path, [value] if value else [])
    rows = [{**row, "subset": name} for name, part in parts.items() for _, row in _objects(path, part)]
    return _numbered(path, rows)


def _is_row(value: Any) -> bool:
    return isinstance(value, dict)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _objects(path: pathlib.Path, value: Any) -> list[tuple[str, Row]]:
    """The numbered rows of a list. Raises InputError for any other value, and for a row without named columns."""
    if not isinstance(value, list):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, no rows: save it as a list of rows.")
    numbered_rows = _numbered(path, value)
    for location, row in numbered_rows:
        if not isinstance(row, dict):
            raise InputError(f"{location}: a JSON {type(row).__name__}, not an object with named columns: name them.")
    return numbered_rows


def from_hub(hub: str, instead: str, **options: Any) -> list[tuple[str, Row]]:
    """("data set, row n", row) for each row of a data set on the hub, read by the package `datasets`.

    Args:
        hub: owner/name.
        instead: for the error message, what the user can do without the hub.
        options: passed to `datasets.load_dataset`.

    Raises:
        InputError: the package is not installed, or the data set is not available.
    """
    if importlib.util.find_spec("datasets") is None:
        raise InputError(f"no data: {instead}, or pip install datasets (extra [hub]), which takes {hub} from the hub.")
    import datasets

    try:
        rows = datasets.load_dataset(hub, **options)
    except Exception as error:  # the hub's client raises many kinds of errors: HTTP, cache, offline, name
        raise InputError(f"the hub gave no {hub} ({type(error).__name__}): {instead}.") from error
    return [(f"{hub}, row {i}", row) for i, row in enumerate(rows, start=1)]


def first_column(where: str, row: Row, *names: str) -> Any:
    """The value of the first of these columns that the row has. Raises InputError if it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise InputError(f"{where}: no column {' or '.join(map(repr, names))}: is it the published file?")
