"""What benchmarks are made of: items, where their files are published, and how those are read."""

from __future__ import annotations

import csv
import importlib.util
import json
import pathlib
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from drirl_jax.data.records import json_lines
from drirl_jax.endpoint import Chat
from drirl_jax.types import InputError

csv.field_size_limit(2**24)  # some published prompts are longer than csv's own limit

Row = Mapping[str, Any]


class Item(NamedTuple):
    """One question of a benchmark.

    Attributes:
        id: its own in the benchmark.
        chat: turns, the last one the user's.
        subset: what results are broken down by.
        harmful: whether what is asked for should be refused; None where that is not the question.
        target: the right answer, or the index of the right option as text.
        options: texts of which one is right; () where a response is generated.
    """

    id: str
    chat: Chat
    subset: str = ""
    harmful: bool | None = None
    target: str = ""
    options: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What the user says last."""
        return self.chat[-1]["content"]


class Published(NamedTuple):
    """Where a data set lies.

    Attributes:
        files: names that its file may have in config.evals.data, in any folder there, the authors' own first.
        hub: its name on the hub, for the package `datasets`; "": it is not there.
        url: a page to download it from.
        subset, split: which part of it on the hub.
        name: in the column "source" of a JSONL file that holds several data sets; rows without this column pass.
    """

    files: tuple[str, ...]
    hub: str
    url: str
    subset: str | None = None
    split: str = "test"
    name: str = ""


class Benchmark(NamedTuple):
    """A benchmark: its items, and what is measured of the answers.

    Attributes:
        read: (config.evals) -> items. Raises InputError where data is absent.
        measure: (item, answer, verdict) -> {metric: value}, leaving out those that say nothing of this item. The answer
            is the response, or of options their Scores; the verdict is what `asks` names, None without.
        metrics: whether more of it is better, by metric; the first one says it all.
        asks: what a judge must tell of the responses: "harm", "refusal", "grade" (see `judges.Judge`); "": nothing.
        max_new: most tokens of a response; 0 where options are scored.
    """

    read: Callable[[Any], list[Item]]
    measure: Callable[[Item, Any, Any], dict[str, float]]
    metrics: Mapping[str, bool]
    asks: str
    max_new: int


def user(text: str) -> Chat:
    """A chat of one message."""
    return ({"role": "user", "content": text},)


def find(data: str, files: Sequence[str]) -> pathlib.Path | None:
    """The first of the files that lies in the folder, at any depth."""
    return next((path for name in files for path in sorted(pathlib.Path(data).rglob(name))), None)


def rows(data: str, of: Published) -> list[tuple[str, Row]]:
    """("file, row n", row) of a published data set.

    Args:
        data: config.evals.data: a folder, or "" for the hub.
        of: which.

    Raises:
        InputError: it is not there, or not readable: says where it can be had.
    """
    found = _from_folder(data, of) if data else _from_hub(of)
    if not found:
        raise InputError(f"{of.files[0]} holds no rows: download it anew from {of.url}.")
    return found


def _from_folder(data: str, of: Published) -> list[tuple[str, Row]]:
    path = find(data, of.files)
    if path is None:
        raise InputError(f"none of {', '.join(of.files)} in {data}: download it from {of.url} into this folder.")
    found = table(path)
    return [(at, row) for at, row in found if path.suffix != ".jsonl" or row.get("source", of.name) == of.name]


def table(path: pathlib.Path) -> list[tuple[str, Row]]:
    """("file, row n", row) of a JSONL, CSV or JSON file: a list of rows, or lists by name, which becomes their subset.

    Raises:
        InputError: it cannot be read.
    """
    if path.suffix == ".jsonl":
        return list(json_lines(path))
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                found = list(csv.DictReader(file))
        else:
            found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): check the path, or download it anew.") from error
    if isinstance(found, dict):
        parts = {name: part for name, part in found.items() if isinstance(part, list)}
        found = [row | {"subset": name} for name, part in parts.items() for row in part if isinstance(row, dict)]
    return [(f"{path}, row {i}", row) for i, row in enumerate(found, start=1)]


def _from_hub(of: Published) -> list[tuple[str, Row]]:
    if not of.hub or importlib.util.find_spec("datasets") is None:
        raise InputError(
            f"no data: download {of.files[0]} from {of.url} and name its folder in config.evals.data"
            + (", or pip install datasets, which takes it from the hub." if of.hub else ".")
        )
    import datasets

    try:
        table = datasets.load_dataset(of.hub, of.subset, split=of.split)
    except Exception as error:  # the hub's client raises many kinds: HTTP, cache, offline, name
        raise InputError(
            f"the hub gave no {of.hub} ({type(error).__name__}): download {of.files[0]} from {of.url} and name its "
            "folder in config.evals.data."
        ) from error
    return [(f"{of.hub}, row {i}", row) for i, row in enumerate(table, start=1)]


def field(where: str, row: Row, *names: str) -> Any:
    """The first of these columns that the row has. Raises InputError."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise InputError(f"{where}: no column {' or '.join(map(repr, names))}: is it the published file?")
