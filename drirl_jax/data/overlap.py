"""Finds repeated prompts: held-out prompts that are also in training, and prompts both harmful and harmless."""

from __future__ import annotations

import unicodedata
from typing import Any, Mapping, Sequence

import numpy as np
import scipy.sparse

TRAIN, UNANSWERED = "train", "unanswered"  # the splits that a run trains on
SHINGLE = 4  # characters
NEAR = 0.8  # two prompts count as nearly the same from this Jaccard similarity of their shingles
MOST_PAIRS = 200_000_000  # at most so many pairs of prompts are compared by their shingles


def normalise(prompt: str) -> str:
    """The prompt without case, Unicode form, blanks, punctuation and unprintable characters; itself if none is left."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())
    return "".join(c for c in folded if unicodedata.category(c)[0] not in "PZC") or prompt.strip()


def shingles(prompts: Sequence[str], column: dict[str, int]) -> scipy.sparse.csr_matrix:
    """[N, shingles] matrix: 1 if a `normal` prompt has that run of SHINGLE characters. New runs get new columns."""
    rows = [{text[i : i + SHINGLE] for i in range(max(len(text) - SHINGLE + 1, 1))} for text in prompts]
    columns = [[column.setdefault(run, len(column)) for run in row] for row in rows]
    ends = np.cumsum([0, *map(len, columns)])
    data = np.ones(ends[-1], np.int32)
    return scipy.sparse.csr_matrix((data, np.concatenate([*columns, []]).astype(int), ends), (len(rows), len(column)))


def count_near_repeats(prompts: Sequence[str], train: Sequence[str]) -> int:
    """Counts the prompts that have a training prompt with J >= NEAR, J = |A ∩ B| / |A ∪ B| of their shingles A and B.

    Args:
        prompts, train: texts from `normal`.
    """
    column: dict[str, int] = {}
    train_rows = shingles(train, column)
    prompt_rows = shingles(prompts, column)
    train_rows.resize(train_rows.shape[0], len(column))
    size_N, size_M = (np.asarray(x.sum(axis=1)).ravel() for x in (prompt_rows, train_rows))
    shared = (prompt_rows @ train_rows.T).tocoo()
    jaccard = shared.data / (size_N[shared.row] + size_M[shared.col] - shared.data)
    return len(np.unique(shared.row[jaccard >= NEAR]))


def describe_repeats(examples: Mapping[str, Any]) -> str:
    """Describes the repeated prompts in words, with counts; "" if there are none.

    A held-out prompt is counted once: as repeated if a training prompt has the same `normal` text, otherwise as nearly
    the same if one is.

    Args:
        examples: split -> `data.examples.Examples`.
    """
    trained_splits = [examples[split] for split in (TRAIN, UNANSWERED) if split in examples]
    train_texts = {prompt for rows in trained_splits for prompt in rows.prompt_text}
    train_normals = {normalise(prompt) for prompt in train_texts}
    kinds: dict[str, set[bool]] = {}
    parts = []
    for split, rows in examples.items():
        normal_by_prompt = {prompt: normalise(prompt) for prompt in rows.prompt_text}
        for prompt, is_harmless in zip(rows.prompt_text, rows.harmless.tolist()):
            kinds.setdefault(normal_by_prompt[prompt], set()).add(is_harmless)
        if split in (TRAIN, UNANSWERED) or not train_normals:
            continue
        split_total = f"of {len(rows.prompt_text)} prompts of split {split}"
        repeats = [prompt for prompt in rows.prompt_text if normal_by_prompt[prompt] in train_normals]
        new_normals = [
            normal_by_prompt[prompt] for prompt in rows.prompt_text if normal_by_prompt[prompt] not in train_normals
        ]
        if repeats:
            verbatim = sum(prompt in train_texts for prompt in repeats)
            parts.append(
                f"{len(repeats)} {split_total} stand in train too ({verbatim} word for word, the others but for case, "
                "blanks, punctuation or Unicode form)"
            )
        if len(new_normals) * len(train_normals) > MOST_PAIRS:
            parts.append(f"split {split} has too many prompts to look for training prompts that are nearly the same")
        elif new_normals and (near_count := count_near_repeats(new_normals, sorted(train_normals))):
            parts.append(f"{near_count} {split_total} are nearly those of a training prompt")
    if contradictions := sum(len(prompt_kinds) == 2 for prompt_kinds in kinds.values()):
        parts.append(f"{contradictions} prompts stand as harmful and as harmless")
    return "; ".join(parts)
