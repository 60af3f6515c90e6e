"""Prompts that stand where they should not: held-out ones in training, and one prompt as harmful and as harmless."""

from __future__ import annotations

import unicodedata
from typing import Any, Mapping, Sequence

import numpy as np
import scipy.sparse

TRAIN = "train"
SHINGLE = 4  # characters
NEAR = 0.8  # least Jaccard similarity of two prompts' shingles at which they count as nearly the same
MOST_PAIRS = 200_000_000  # of prompts that are compared by their shingles


def normal(prompt: str) -> str:
    """The prompt without case, Unicode form, blanks, punctuation and what does not print; itself if nothing is left."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())
    return "".join(c for c in folded if unicodedata.category(c)[0] not in "PZC") or prompt.strip()


def shingles(prompts: Sequence[str], column: dict[str, int]) -> scipy.sparse.csr_matrix:
    """[N, shingles] 1 where a `normal` prompt holds that run of SHINGLE characters; unknown runs get new columns."""
    rows = [{text[i : i + SHINGLE] for i in range(max(len(text) - SHINGLE + 1, 1))} for text in prompts]
    columns = [[column.setdefault(run, len(column)) for run in row] for row in rows]
    ends = np.cumsum([0, *map(len, columns)])
    data = np.ones(ends[-1], np.int32)
    return scipy.sparse.csr_matrix((data, np.concatenate([*columns, []]).astype(int), ends), (len(rows), len(column)))


def nearly(prompts: Sequence[str], train: Sequence[str]) -> int:
    """How many prompts have a training prompt with J >= NEAR, J = |A ∩ B| / |A ∪ B| of their shingles A and B.

    Args:
        prompts, train: as `normal` gives them.
    """
    column: dict[str, int] = {}
    known = shingles(train, column)
    rows = shingles(prompts, column)
    known.resize(known.shape[0], len(column))
    size_N, size_M = (np.asarray(x.sum(axis=1)).ravel() for x in (rows, known))
    shared = (rows @ known.T).tocoo()
    jaccard = shared.data / (size_N[shared.row] + size_M[shared.col] - shared.data)
    return len(np.unique(shared.row[jaccard >= NEAR]))


def summary(examples: Mapping[str, Any], harmless: Sequence[int]) -> str:
    """What is wrong, in words, with its counts; "" where nothing is.

    A held-out prompt is counted once: where a training prompt is the same but for what `normal` leaves out, else where
    one is nearly the same.

    Args:
        examples: split -> `data.examples.Examples`.
        harmless: the indices of the categories whose prompts should be answered.
    """
    whole = set(examples[TRAIN].prompt_text) if TRAIN in examples else set()
    train = {normal(prompt) for prompt in whole}
    kinds: dict[str, set[bool]] = {}
    parts = []
    for split, rows in examples.items():
        prompts = {prompt: normal(prompt) for prompt in rows.prompt_text}
        for prompt, answered in zip(rows.prompt_text, np.isin(rows.category, harmless).tolist()):
            kinds.setdefault(prompts[prompt], set()).add(answered)
        if split == TRAIN or not train:
            continue
        total = f"of {len(rows.prompt_text)} prompts of split {split}"
        again = [prompt for prompt in rows.prompt_text if prompts[prompt] in train]
        others = [prompts[prompt] for prompt in rows.prompt_text if prompts[prompt] not in train]
        if again:
            exact = sum(prompt in whole for prompt in again)
            parts.append(
                f"{len(again)} {total} stand in train too ({exact} word for word, the others but for case, blanks, "
                "punctuation or Unicode form)"
            )
        if len(others) * len(train) > MOST_PAIRS:
            parts.append(f"split {split} has too many prompts to look for training prompts that are nearly the same")
        elif others and (near := nearly(others, sorted(train))):
            parts.append(f"{near} {total} are nearly those of a training prompt")
    if both := sum(len(answered) == 2 for answered in kinds.values()):
        parts.append(f"{both} prompts stand as harmful and as harmless")
    return "; ".join(parts)
