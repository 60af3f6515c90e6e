"""How alike a policy's responses are: does alignment collapse them into one refusal?"""

from __future__ import annotations

import collections
from typing import Sequence

import sacrebleu

WORDS_OF_AN_OPENING = 4


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words by the number of all (arXiv 1510.03055); 1 where none repeats, 0 without any."""
    grams = [gram for text in texts for gram in zip(*(text.lower().split()[i:] for i in range(n)))]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 of each text against all others as its references (arXiv 1802.01886), in [0, 1]; 1: all the same."""
    scores = [sacrebleu.sentence_bleu(text, [*texts[:i], *texts[i + 1 :]]).score / 100 for i, text in enumerate(texts)]
    return sum(scores) / len(scores)


def commonest_opening(texts: Sequence[str]) -> tuple[str, float]:
    """The first words that most texts share, in lower case, and what share of them begins so."""
    openings = collections.Counter(" ".join(text.lower().split()[:WORDS_OF_AN_OPENING]) for text in texts)
    words, count = openings.most_common(1)[0]
    return words, count / len(texts)
