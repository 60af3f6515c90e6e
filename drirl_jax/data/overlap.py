"""Prompts that stand where they should not: held-out ones in training, and one prompt as harmful and as harmless."""

from __future__ import annotations

import unicodedata
from typing import Mapping, Sequence

import numpy as np

from drirl_jax.data.examples import Examples

TRAIN = "train"


def normal(prompt: str) -> str:
    """The prompt without case, Unicode form, blanks, punctuation and what does not print; itself if nothing is left."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())
    return "".join(c for c in folded if unicodedata.category(c)[0] not in "PZC") or prompt.strip()


def summary(examples: Mapping[str, Examples], harmless: Sequence[int]) -> str:
    """What is wrong, in words, with its counts; "" where nothing is.

    A held-out prompt is counted once, where a training prompt is the same but for what `normal` leaves out; beside it
    how many of these are the same word for word.

    Args:
        examples: by split.
        harmless: the indices of the categories whose prompts should be answered.
    """
    train = examples[TRAIN].prompt_text if TRAIN in examples else ()
    whole, alike = set(train), set(map(normal, train))
    kinds: dict[str, set[bool]] = {}
    parts = []
    for split, of in examples.items():
        for prompt, answered in zip(of.prompt_text, np.isin(of.category, harmless).tolist()):
            kinds.setdefault(normal(prompt), set()).add(answered)
        if split != TRAIN and (again := [prompt for prompt in of.prompt_text if normal(prompt) in alike]):
            exact = sum(prompt in whole for prompt in again)
            parts.append(
                f"{len(again)} of {len(of.prompt_text)} prompts of split {split} stand in train too ({exact} word for "
                "word, the others but for case, blanks, punctuation or Unicode form)"
            )
    if both := sum(len(answered) == 2 for answered in kinds.values()):
        parts.append(f"{both} prompts stand as harmful and as harmless")
    return "; ".join(parts)
