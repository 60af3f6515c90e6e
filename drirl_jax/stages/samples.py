"""What a few steps of the alignment sampled, each response with its coefficients: the rows of samples.jsonl."""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence, TypeAlias

import numpy as np

from drirl_jax.data.examples import Examples
from drirl_jax.data.text import ChatTokens

# (number of steps done with this one, rows): takes a step's rows; every process calls it, the one that writes keeps.
Keep: TypeAlias = Callable[[int, list[dict[str, Any]]], None]


def steps_kept(steps: int, count: int) -> set[int]:
    """`count` of the steps 1 to `steps`, evenly spread: one is the last, two the last and the first."""
    return set(np.linspace(steps, 1, count).round().astype(int).tolist())


def rows(
    names: Sequence[str],
    text: ChatTokens,
    examples: Examples,
    response_PGT: np.ndarray,
    length_PG: np.ndarray,
    values: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """A row for each category in the batch: its first prompt by id, a fixed rule so that nobody picks, and its group.

    Args:
        names: of the categories.
        examples: the batch.
        response_PGT, length_PG: what was sampled, with its end-of-sequence token.
        values: numbers of each prompt [P], which stand in the row, and of each response [P, G], which stand beside it.

    Returns:
        What JSON can hold: {"category", "id", "prompt", "demonstration", ..., "responses": [{"text", ...}, ...]}; None
        for a number that is not finite.
    """
    found = []
    for c in np.unique(examples.category):
        p: int = min(np.flatnonzero(examples.category == c).tolist(), key=lambda p: examples.id[p])
        row = {"category": names[c], "id": examples.id[p], "prompt": examples.prompt_text[p]}
        row |= {"demonstration": examples.demo_text[p]}
        row |= {name: _plain(of[p]) for name, of in values.items() if of.ndim == 1}
        row["responses"] = [
            {"text": text.decode(ids, length)} | {name: _plain(of[p, g]) for name, of in values.items() if of.ndim == 2}
            for g, (ids, length) in enumerate(zip(response_PGT[p], length_PG[p]))
        ]
        found.append(row)
    return found


def _plain(value: np.generic) -> bool | float | None:
    if value.dtype == bool:
        return bool(value)
    return float(value) if np.isfinite(value) else None
