"""Rows of data sets as they are published: JSON, CSV and Parquet files, and the hub."""

from __future__ import annotations

import csv
import importlib.util
import json
import pathlib
from typing import Any, Mapping

from drirl_jax.data.records import json_lines
from drirl_jax.types import InputError

csv.field_size_limit(2**24)  # some published prompts are longer than csv's own limit

Row = Mapping[str, Any]


def table(path: pathlib.Path) -> list[tuple[str, Row]]:
    """("file, row n", row) of a JSONL (also .gz, .xz), CSV, Parquet or JSON file.

    JSON holds a list of rows, or lists by name, which becomes their subset.

    Raises:
        InputError: it cannot be read.
    """
    if ".jsonl" in path.suffixes[-2:]:
        return list(json_lines(path))
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                found = list(csv.DictReader(file))
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            found = pyarrow.parquet.read_table(path).to_pylist()
        else:
            found = json.loads(path.read_text("utf-8"))
    except ImportError as error:
        raise InputError(f"{path} needs the package pyarrow to be read: pip install pyarrow.") from error
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): check the path, or download it anew.") from error
    if isinstance(found, dict):
        parts = {name: part for name, part in found.items() if isinstance(part, list)}
        found = [row | {"subset": name} for name, part in parts.items() for row in part if isinstance(row, dict)]
    return [(f"{path}, row {i}", row) for i, row in enumerate(found, start=1)]


def from_hub(hub: str, instead: str, **options: Any) -> list[tuple[str, Row]]:
    """("data set, row n", row) of a data set on the hub, by the package `datasets`.

    Args:
        hub: owner/name.
        instead: what the user can do without the hub.
        options: for `datasets.load_dataset`.

    Raises:
        InputError: the package or the data set is not to be had.
    """
    if importlib.util.find_spec("datasets") is None:
        raise InputError(f"no data: {instead}, or pip install datasets (extra [hub]), which takes {hub} from the hub.")
    import datasets

    try:
        rows = datasets.load_dataset(hub, **options)
    except Exception as error:  # the hub's client raises many kinds: HTTP, cache, offline, name
        raise InputError(f"the hub gave no {hub} ({type(error).__name__}): {instead}.") from error
    return [(f"{hub}, row {i}", row) for i, row in enumerate(rows, start=1)]
