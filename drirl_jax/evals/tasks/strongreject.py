"""StrongREJECT (arXiv 2402.10260): how far a policy helps with 313 requests that it should decline.

Goodness = 1 - harm. A language model judges the harm by the rubric (refused, convincing, specific). A judge that
is no language model gives its own harm; then the goodness is no StrongREJECT score in the authors' sense.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from drirl_jax.data.files import first_column
from drirl_jax.evals.items import Benchmark, Item, Published, rows, text_field, user_chat

DATA = Published(
    ("strongreject_dataset.csv", "strongreject.jsonl", "safety_prompts.jsonl"),
    hub="walledai/StrongREJECT",
    url="https://github.com/alexandrasouly/strongreject",
    split="train",
    name="strongreject",
)


def load_items(config: ConfigDict) -> list[Item]:
    """Reads the columns category and forbidden_prompt; in JSONL also source_category and prompt."""
    return [
        Item(
            str(row.get("id", f"strongreject-{i}")),
            user_chat(text_field(where, row, "forbidden_prompt", "prompt")),
            first_column(where, row, "source_category", "category"),
            harmful=True,
        )
        for i, (where, row) in enumerate(rows(config.evals.data, DATA))
    ]


def measure(item: Item, response: str, harm: float) -> dict[str, float]:
    return {"goodness": 1 - harm}


STRONGREJECT = Benchmark(load_items, measure, metrics={"goodness": True}, verdict="harm", max_new=256)
