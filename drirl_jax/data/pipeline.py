"""Batches of prompts with a set share of each category, made by Grain: any batch can be made from its index."""

from __future__ import annotations

from typing import Any, Sequence, TypeAlias

import grain
import numpy as np

from drirl_jax.types import InputError

Rows: TypeAlias = Sequence[Any] | np.ndarray  # the records of a category, or their numbers


def balanced(sources: Sequence[Rows], batch: int, seed: int) -> grain.MapDataset:
    """Endless batches in which every category has an equal share.

    Item k of the stream has category k mod C, and batch i holds items i P to (i+1) P - 1. If P is a multiple of C, each
    batch has exactly P/C prompts of each category. Otherwise the counts differ by at most one, and are equal over any C
    consecutive batches. Each category passes through all its records once an epoch, and each epoch is shuffled anew;
    small categories repeat more often.

    Args:
        sources: for each category its records (or indices: anything with a length and items).
        batch: P, the number of prompts in a batch.
        seed: of the shuffles, a non-negative integer.

    Returns:
        A data set whose item i, a list of P records, depends on (sources, batch, seed, i) alone.

    Raises:
        InputError: a category has no records.
    """
    return grain.MapDataset.mix(_shuffled(sources, seed)).batch(batch, batch_fn=list)


def by_kind(sources: Sequence[Rows], batch: int, seed: int, harmless: Sequence[bool], share: float) -> grain.MapDataset:
    """Like `balanced`, but the harmless categories together have this share of the prompts (ours).

    The harmful categories have the rest. Within each kind the categories are balanced. Reason: with seven harmful
    categories and one harmless, equal shares give only one prompt in eight that teaches the policy to help.

    Args:
        sources, batch, seed: see `balanced`.
        harmless: for each category, whether its prompts should be answered.
        share: of harmless prompts among all, in (0, 1).
    """
    streams = _shuffled(sources, seed)
    harmful = grain.MapDataset.mix([stream for stream, is_harmless in zip(streams, harmless) if not is_harmless])
    helpful = grain.MapDataset.mix([stream for stream, is_harmless in zip(streams, harmless) if is_harmless])
    return grain.MapDataset.mix([harmful, helpful], weights=[1 - share, share]).batch(batch, batch_fn=list)


def single(sources: Sequence[Rows], batch: int, seed: int) -> grain.MapDataset:
    """Like `balanced`, but batch i holds only category i mod C: the categories take turns."""
    return grain.MapDataset.mix([rows.batch(batch, batch_fn=list) for rows in _shuffled(sources, seed)])


def natural(sources: Sequence[Rows], batch: int, seed: int) -> grain.MapDataset:
    """Endless batches of all records together: each category has the share that it has in the data."""
    (all_rows,) = _shuffled([[row for rows in sources for row in rows]], seed)
    return all_rows.batch(batch, batch_fn=list)


# (config.data, sources, batch, seed, which categories are harmless) -> batches
BATCHES = {
    "natural": lambda c, sources, batch, seed, harmless: natural(sources, batch, seed),
    "mixed": lambda c, sources, batch, seed, harmless: balanced(sources, batch, seed),
    "kinds": lambda c, sources, batch, seed, harmless: by_kind(sources, batch, seed, harmless, c.harmless_share),
    "single": lambda c, sources, batch, seed, harmless: single(sources, batch, seed),
}


def batches(section, rows_C: Sequence[np.ndarray], batch: int, seed: int, harmless_N: np.ndarray):
    """The batches that config.data asks for, from the categories that have rows.

    Args:
        section: config.data.
        rows_C: the row numbers of each category.
        batch, seed: see `balanced`.
        harmless_N: bool, which rows are harmless; it is the same for all rows of a category.
    """
    present = [rows for rows in rows_C if len(rows)]
    return BATCHES[section.mixing](section, present, batch, seed, [bool(harmless_N[rows[0]]) for rows in present])


def _shuffled(sources: Sequence[Rows], seed: int) -> list[grain.MapDataset]:
    """Each source as an endless stream, each epoch in another order."""
    empty = [c for c, rows in enumerate(sources) if not len(rows)]
    if empty:
        raise InputError(f"no records for the categories number {empty} of {len(sources)}: add some for each")
    # Grain shuffles epoch e with seed + e: categories need seeds that lie far apart.
    seeds = np.random.SeedSequence(seed).generate_state(len(sources))
    return [grain.MapDataset.source(rows).shuffle(seed=int(s)).repeat() for rows, s in zip(sources, seeds)]
