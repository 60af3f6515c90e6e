"""The parts of a benchmark: its items, where its files are published, and how they are read."""

from __future__ import annotations

import collections
import pathlib
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from ml_collections import ConfigDict

from drirl_jax.data import files, values
from drirl_jax.data.files import Row, from_hub, read_table
from drirl_jax.runtime.endpoint import Chat
from drirl_jax.runtime.files import expand_path
from drirl_jax.runtime.thoughts import without_thought
from drirl_jax.types import InputError

COMBINED_FILE = "safety_prompts.jsonl"


class Item(NamedTuple):
    """One question of a benchmark.

    Attributes:
        id: unique in the benchmark.
        chat: turns; the last one is the user's.
        subset: the part of the benchmark; results are also given by subset.
        harmful: whether the policy should refuse the request; None where the benchmark does not ask that.
        target: the right answer, or the index of the right option as text.
        options: texts of which one is right; () where the policy generates a response.
        cluster: items of one cluster are about the same thing. They count for less than as many items of different
            clusters. "": the item is a cluster of its own.
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
        """The user's last message."""
        return self.chat[-1]["content"]


class Published(NamedTuple):
    """Where a data set is published.

    Attributes:
        files: names that its file may have, in any folder below config.evals.data; the authors' own name comes first.
        hub: its name on the hub, for the package `datasets`; "": the hub does not have it.
        url: a page to download it from.
        subset, split: the part to read from the hub.
        name: its value in the column "source" of COMBINED_FILE, a file that holds several data sets.
    """

    files: tuple[str, ...]
    hub: str
    url: str
    subset: str | None = None
    split: str = "test"
    name: str = ""


class Benchmark(NamedTuple):
    """A benchmark: its items, and how the answers are measured.

    Attributes:
        load_items: (config) -> items. Raises InputError where the data is absent.
        measure: (item, answer, verdict) -> {metric: value}, without the metrics that do not apply to this item. The
            answer is the response, or the Scores of the options. `verdict` names its kind; it is None
            where `verdict` is "".
        metrics: {metric: whether higher is better}; the first metric is the main one.
        verdict: the verdict that the benchmark needs: "harm", "refusal" or "grade" (see `judges.Judge`); "": none.
        max_new: maximum number of response tokens; 0 where options are scored.
        tax: {metric: (items) -> chance level}: the metrics in which an alignment may pay for safety. The chance level
            is what guessing gives; None where guessing has no level. A metric with a level is better if it is higher.
        geometric: metrics with positive values and no upper bound; their mean is geometric, and policies are compared
            by the ratio of the means.
    """

    load_items: Callable[[ConfigDict], list[Item]]
    measure: Callable[[Item, Any, Any], dict[str, float]]
    metrics: Mapping[str, bool]
    verdict: str
    max_new: int
    tax: Mapping[str, Callable[[Sequence[Item]], float] | None] = {}
    geometric: tuple[str, ...] = ()


def option_chance(items: Sequence[Item]) -> float:
    """The accuracy of a random choice among each item's options."""
    return sum(1 / len(item.options) for item in items) / len(items)


def commonest_answer_chance(right_answers: Sequence[str]) -> float:
    """The accuracy of the same answer to every question: the commonest right one."""
    return max(collections.Counter(right_answers).values()) / len(right_answers)


def without_thoughts(benchmark: Benchmark) -> Benchmark:
    """The same benchmark, but its measure reads only the part of each response after the thought."""
    if not benchmark.max_new:
        return benchmark

    def measure(item: Item, response: str, verdict: Any) -> dict[str, float]:
        return benchmark.measure(item, without_thought(response), verdict)

    return benchmark._replace(measure=measure)


def user_chat(text: str) -> Chat:
    """A chat of one message."""
    return ({"role": "user", "content": text},)


def find(data: str, files: Sequence[str]) -> pathlib.Path | None:
    """The path of the first of these files that exists in the folder, at any depth; None where none exists."""
    return next((path for name in files for path in sorted(expand_path(data).rglob(name))), None)


def rows(data: str, published: Published) -> list[tuple[str, Row]]:
    """("file, row n", row) of a published data set.

    Args:
        data: config.evals.data: a folder, or "" for the hub.
        published: the data set.

    Raises:
        InputError: the data is absent or not readable; the message says where to download it.
    """
    numbered_rows = _from_folder(data, published) if data else _from_hub(published)
    if not numbered_rows:
        raise InputError(f"{published.files[0]} holds no rows: download it again from {published.url}.")
    return numbered_rows


def _from_folder(data: str, published: Published) -> list[tuple[str, Row]]:
    path = find(data, published.files)
    if path is None:
        raise InputError(
            f"none of {', '.join(published.files)} in {data}: download it from {published.url} into this folder."
        )
    numbered_rows = read_table(path)
    return [
        (where, row)
        for where, row in numbered_rows
        if path.name != COMBINED_FILE or row.get("source") == published.name
    ]


def _from_hub(published: Published) -> list[tuple[str, Row]]:
    advice = f"download {published.files[0]} from {published.url} and name its folder in config.evals.data"
    if not published.hub:
        raise InputError(f"no data: {advice}.")
    return from_hub(published.hub, advice, name=published.subset, split=published.split)


def text_field(where: str, row: Row, *names: str) -> str:
    """The value of `field`, a text that is not blank. Raises InputError for any other value."""
    return values.nonblank_text(f"{where}: {names[0]}", files.first_column(where, row, *names))
