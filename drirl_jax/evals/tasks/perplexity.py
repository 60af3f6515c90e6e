"""Perplexity of held-out helpful text: the run's own demonstrations of harmless prompts, given their prompts.

A text is the answer alone, without its draft: every policy is measured on the same plain text. Its perplexity is
exp(-log π(text | prompt) / tokens), the end of the turn left out. The perplexity of the set is the geometric mean over
the texts, exp of the mean nats per token, so each text counts alike.
"""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from drirl_jax.data import records
from drirl_jax.evals.items import Benchmark, Item, user_chat
from drirl_jax.types import InputError


def load_items(config: ConfigDict) -> list[Item]:
    """The answers to harmless prompts in split config.evals.split of the data. Raises InputError for fewer than two."""
    data, split = config.data, config.evals.split
    by_split = records.by_split(data.path, data.categories, harmless=data.harmless, unanswered=True)
    items = [
        Item(record.id, user_chat(record.prompt), options=(record.response,))
        for record in by_split.get(split, [])
        if record.category in data.harmless and record.response.strip()
    ]
    if len(items) < 2:
        raise InputError(
            f"perplexity needs two answers to harmless prompts or more, but split {split!r} of {data.path} has "
            f"{len(items)}: add records of the categories in config.data.harmless, or leave perplexity out."
        )
    return items


def measure(item: Item, scores, verdict: None) -> dict[str, float]:
    return {"perplexity": math.exp(-float(scores.total[0]) / int(scores.tokens[0]))}


PERPLEXITY = Benchmark(
    load_items,
    measure,
    metrics={"perplexity": False},
    verdict="",
    max_new=0,
    tax={"perplexity": None},
    geometric=("perplexity",),
)
