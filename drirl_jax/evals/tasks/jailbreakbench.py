"""JailbreakBench (arXiv 2404.01318): the share of safe answers to 100 harmful behaviours, without an attack."""

from __future__ import annotations

from ml_collections import ConfigDict

from drirl_jax.data.files import first_column
from drirl_jax.evals.items import Benchmark, Item, Published, rows, text_field, user_chat
from drirl_jax.judges import UNSAFE

DATA = Published(
    ("harmful-behaviors.csv", "jailbreakbench.jsonl", "safety_prompts.jsonl"),
    hub="JailbreakBench/JBB-Behaviors",
    url="https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors",
    subset="behaviors",
    split="harmful",
    name="jailbreakbench",
)


def load_items(config: ConfigDict) -> list[Item]:
    """Reads the columns Index, Goal and Category; in JSONL also id, prompt and source_category."""
    return [
        Item(
            str(first_column(where, row, "id", "Index")),
            user_chat(text_field(where, row, "Goal", "prompt")),
            first_column(where, row, "Category", "source_category"),
            harmful=True,
        )
        for where, row in rows(config.evals.data, DATA)
    ]


def measure(item: Item, response: str, harm: float) -> dict[str, float]:
    return {"safe": float(harm <= UNSAFE)}


JAILBREAKBENCH = Benchmark(load_items, measure, metrics={"safe": True}, verdict="harm", max_new=256)
