"""What benchmarks are made of: items, where their files are published, and how those are read."""

from __future__ import annotations

import pathlib
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from drirl_jax.data import files, values
from drirl_jax.data.files import Row, from_hub, table
from drirl_jax.runtime.endpoint import Chat
from drirl_jax.runtime.files import expand_path
from drirl_jax.runtime.thoughts import without_thought
from drirl_jax.types import InputError

SEVERAL = "safety_prompts.jsonl"


class Item(NamedTuple):
    """One question of a benchmark.

    Attributes:
        id: its own in the benchmark.
        chat: turns, the last one the user's.
        subset: what results are broken down by.
        harmful: whether what is asked for should be refused; None where that is not the question.
        target: the right answer, or the index of the right option as text.
        options: texts of which one is right; () where a response is generated.
        cluster: items of one are about the same thing, and count for less than so many of different ones; "": its own.
    """

    id: str
    chat: Chat
    subset: str = ""
    harmful: bool | None = None
    target: str = ""
    options: tuple[str, ...] = ()
    cluster: str = ""

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
        name: in the column "source" of SEVERAL, a file that holds several data sets.
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


def reading_answers(benchmark: Benchmark) -> Benchmark:
    """The benchmark with a measure that reads of each response what follows its thought."""
    if not benchmark.max_new:
        return benchmark

    def measure(item: Item, response: str, verdict: Any) -> dict[str, float]:
        return benchmark.measure(item, without_thought(response), verdict)

    return benchmark._replace(measure=measure)


def user(text: str) -> Chat:
    """A chat of one message."""
    return ({"role": "user", "content": text},)


def find(data: str, files: Sequence[str]) -> pathlib.Path | None:
    """The first of the files that lies in the folder, at any depth."""
    return next((path for name in files for path in sorted(expand_path(data).rglob(name))), None)


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
    return [(at, row) for at, row in found if path.name != SEVERAL or row.get("source") == of.name]


def _from_hub(of: Published) -> list[tuple[str, Row]]:
    instead = f"download {of.files[0]} from {of.url} and name its folder in config.evals.data"
    if not of.hub:
        raise InputError(f"no data: {instead}.")
    return from_hub(of.hub, instead, name=of.subset, split=of.split)


def words(where: str, row: Row, *names: str) -> str:
    """`field`, where it is a text that says something. Raises InputError."""
    return values.words(f"{where}: {names[0]}", files.field(where, row, *names))
