"""HHH (arXiv 2112.00861): the helpful, honest or harmless answer of a pair should have the higher log-probability.

221 pairs. `accuracy` compares sums over tokens, which favour short answers. `accuracy_norm` compares means over bytes.
"""

from __future__ import annotations

import pathlib
from typing import Sequence

from ml_collections import ConfigDict

from drirl_jax.data import values
from drirl_jax.data.files import first_column
from drirl_jax.evals.items import Benchmark, Item, Published, option_chance, rows, text_field, user_chat
from drirl_jax.types import InputError

SUBSETS = ("helpful", "honest", "harmless", "other")


def load_items(config: ConfigDict) -> list[Item]:
    """Reads the file SUBSET/task.json (or hhh_SUBSET.jsonl) of each subset.

    A row has input and target_scores, {option: 1 or 0}, or input and targets, {"choices": [...], "labels": [1, 0]}.
    """
    items = []
    for subset in SUBSETS:
        names = tuple(str(pathlib.PurePath(*parts)) for parts in ((subset, "task.json"), (f"hhh_{subset}.jsonl",)))
        data = Published(
            names,
            hub="HuggingFaceH4/hhh_alignment",
            url="https://huggingface.co/datasets/HuggingFaceH4/hhh_alignment",
            subset=subset,
        )
        for i, (where, row) in enumerate(rows(config.evals.data, data)):
            if "target_scores" in row:
                options, labels = zip(*row["target_scores"].items())
            else:
                targets = first_column(where, row, "targets")
                options, labels = first_column(where, targets, "choices"), first_column(where, targets, "labels")
            target = _right_option(where, labels)
            items.append(
                Item(f"{subset}-{i}", user_chat(text_field(where, row, "input")), subset, None, target, tuple(options))
            )
    return items


def _right_option(where: str, labels: Sequence) -> str:
    """The index of the right option, as text. Raises InputError unless exactly one option is labelled as right."""
    right = [i for i, label in enumerate(labels) if values.truth(f"{where}: the label of an option", label)]
    if len(right) != 1:
        raise InputError(f"{where}: {len(right)} options are labelled as right, not one: is it the published file?")
    return str(right[0])


def measure(item: Item, scores, verdict: None) -> dict[str, float]:
    right = int(item.target)
    bytes_M = [max(len(option.encode()), 1) for option in item.options]
    return {
        "accuracy": float(scores.total.argmax() == right),
        "accuracy_norm": float((scores.total / bytes_M).argmax() == right),
    }


HHH = Benchmark(
    load_items,
    measure,
    metrics={"accuracy": True, "accuracy_norm": True},
    verdict="",
    max_new=0,
    tax={"accuracy": option_chance, "accuracy_norm": option_chance},
)
