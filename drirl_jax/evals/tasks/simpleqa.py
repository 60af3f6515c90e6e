"""SimpleQA (arXiv 2411.04368): 4,326 short questions of fact. An answer is correct, incorrect or not attempted."""

from __future__ import annotations

import re
from typing import Sequence

from ml_collections import ConfigDict

from drirl_jax.data.files import first_column
from drirl_jax.evals.items import Benchmark, Item, Published, commonest_answer_chance, rows, text_field, user_chat
from drirl_jax.types import InputError

DATA = Published(
    ("simple_qa_test_set.csv", "simpleqa.jsonl"),
    hub="basicv8vc/SimpleQA",
    url="https://openaipublic.blob.core.windows.net/simple-evals/simple_qa_test_set.csv",
    name="simpleqa",
)


def load_items(config: ConfigDict) -> list[Item]:
    """Reads the columns problem, answer and metadata. The metadata holds the topic."""
    items = []
    for i, (where, row) in enumerate(rows(config.evals.data, DATA)):
        question, answer = text_field(where, row, "problem"), str(first_column(where, row, "answer"))
        if not re.search(r"\w", answer):
            raise InputError(f"{where}: the answer {answer!r} has no letter and no digit: remove the row.")
        topic = re.search(r"'topic': '([^']*)'", row.get("metadata") or "")
        items.append(Item(str(row.get("id", i)), user_chat(question), topic[1] if topic else "", target=answer))
    return items


def measure(item: Item, response: str, grade: int) -> dict[str, float]:
    grades = {name: float(grade == i) for i, name in enumerate(("correct", "incorrect", "not_attempted"))}
    attempted = {} if grades["not_attempted"] else {"correct_of_attempted": grades["correct"]}
    return grades | attempted


METRICS = {"correct": True, "correct_of_attempted": True, "not_attempted": True, "incorrect": False}


def chance(items: Sequence[Item]) -> float:
    return commonest_answer_chance([item.target for item in items])


SIMPLEQA = Benchmark(load_items, measure, metrics=METRICS, verdict="grade", max_new=64, tax={"correct": chance})
