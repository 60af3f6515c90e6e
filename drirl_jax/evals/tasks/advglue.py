"""AdvGLUE (arXiv 2111.02840): GLUE's tasks on sentences that were changed to mislead. The label words are scored.

Labels are published for the development set only (738 sentences). The question asks for one of two or three words. The
policy's answer is the word with the highest log-probability, so that nothing is parsed and every item has an answer.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from drirl_jax.data import values
from drirl_jax.data.files import first_column
from drirl_jax.evals.items import Benchmark, Item, Published, option_chance, rows, user_chat
from drirl_jax.types import InputError

TASKS = {  # task: (columns, question about them, words in the order of the labels)
    "sst2": (("sentence",), "Is the mood of this sentence positive or negative?", ("negative", "positive")),
    "qqp": (("question1", "question2"), "Do these two questions ask the same, yes or no?", ("no", "yes")),
    "mnli": (
        ("premise", "hypothesis"),
        "Does the hypothesis follow from the premise: yes, maybe or no?",
        ("yes", "maybe", "no"),
    ),
    "qnli": (("question", "sentence"), "Does the sentence answer the question, yes or no?", ("yes", "no")),
    "rte": (("sentence1", "sentence2"), "Does the second sentence follow from the first, yes or no?", ("yes", "no")),
}
TASKS["mnli-mm"] = TASKS["mnli_mismatched"] = TASKS["mnli"]
DATA = Published(
    ("dev.json", "dev_ann.json", "advglue.jsonl"),
    hub="",
    url="https://adversarialglue.github.io (dev.zip)",
    name="advglue",
)


def load_items(config: ConfigDict) -> list[Item]:
    """Reads {task: [{columns of the task, label, idx}]}. In JSONL the field subset holds the task."""
    items = []
    for i, (where, row) in enumerate(rows(config.evals.data, DATA)):
        task = first_column(where, row, "subset").removeprefix("adv_")
        if task not in TASKS:
            raise InputError(f"{where}: unknown task {task!r}: known are {', '.join(TASKS)}.")
        columns, question, words = TASKS[task]
        parts = [f"{name.rstrip('12').capitalize()}: {first_column(where, row, name)}" for name in columns]
        text = "\n".join([*parts, f"{question} Answer with one word."])
        label = values.whole_number(f"{where}: label", first_column(where, row, "label"), len(words))
        items.append(Item(f"{task}-{row.get('idx', i)}-{i}", user_chat(text), task, target=str(label), options=words))
    return items


def measure(item: Item, scores, verdict: None) -> dict[str, float]:
    return {"accuracy": float(scores.total.argmax() == int(item.target))}


ADVGLUE = Benchmark(
    load_items, measure, metrics={"accuracy": True}, verdict="", max_new=0, tax={"accuracy": option_chance}
)
