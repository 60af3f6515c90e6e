"""The rows of samples.jsonl: samples of a few steps of the alignment, each response with its coefficients."""

from __future__ import annotations

import math
from typing import Any, Callable, Mapping, Sequence, TypeAlias

import numpy as np

from drirl_jax.data.examples import Examples
from drirl_jax.data.text import ChatTokens

# (number of steps done with this one, rows): stores a step's rows. All processes call it, only the writer stores them.
Keep: TypeAlias = Callable[[int, list[dict[str, Any]]], None]


def steps_kept(steps: int, count: int) -> set[int]:
    """`count` of the steps 1 to `steps`, evenly spread: 1 gives the last step, 2 the first and the last."""
    return set(np.linspace(steps, 1, count).round().astype(int).tolist())


def rows(
    names: Sequence[str],
    text: ChatTokens,
    examples: Examples,
    response_PGT: np.ndarray,
    length_PG: np.ndarray,
    values: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """A row for each category in the batch: its prompt with the lowest id, and the group of this prompt.

    The rule is fixed, so that nobody picks the prompts.

    Args:
        names: the categories' names.
        examples: the batch.
        response_PGT, length_PG: the samples, with their end-of-sequence tokens.
        values: numbers of each prompt [P] for the row, and of each response [P, G] for its entry in the row.

    Returns:
        Rows for JSON: {"category", "id", "prompt", "demonstration", ..., "responses": [{"text", ...}, ...]}; None in
        place of a number that is not finite.
    """
    all_rows = []
    for c in np.unique(examples.category):
        p: int = min(np.flatnonzero(examples.category == c).tolist(), key=lambda p: examples.id[p])
        row = {"category": names[c], "id": examples.id[p], "prompt": examples.prompt_text[p]}
        row |= {"demonstration": examples.demo_text[p]}
        row |= {name: _json_value(value_P[p].item()) for name, value_P in values.items() if value_P.ndim == 1}
        row["responses"] = [
            {"text": text.decode(ids, length)}
            | {name: _json_value(value_PG[p, g].item()) for name, value_PG in values.items() if value_PG.ndim == 2}
            for g, (ids, length) in enumerate(zip(response_PGT[p], length_PG[p]))
        ]
        all_rows.append(row)
    return all_rows


def _json_value(value: bool | float) -> bool | float | None:
    return value if isinstance(value, bool) or math.isfinite(value) else None
