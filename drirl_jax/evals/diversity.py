"""How similar a policy's responses are. Does alignment collapse them into one refusal?"""

from __future__ import annotations

import collections
from typing import Sequence

import sacrebleu

WORDS_OF_AN_OPENING = 4


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams / all word n-grams (arXiv 1510.03055): 1 where none repeats, 0 where there are none."""
    ngrams = [ngram for text in texts for ngram in zip(*(text.lower().split()[i:] for i in range(n)))]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 of each text with all others as references (arXiv 1802.01886), in [0, 1]; 1: all texts are equal."""
    scores = [sacrebleu.sentence_bleu(text, [*texts[:i], *texts[i + 1 :]]).score / 100 for i, text in enumerate(texts)]
    return sum(scores) / len(scores)


def commonest_opening(texts: Sequence[str]) -> tuple[str, float]:
    """The most frequent first words of the texts, in lower case, and the share of texts that begin with them."""
    openings = collections.Counter(" ".join(text.lower().split()[:WORDS_OF_AN_OPENING]) for text in texts)
    words, count = openings.most_common(1)[0]
    return words, count / len(texts)
