"""Batches of lessons of similar length: prompt, opening and answer are one row, so little of a batch is padding."""

from __future__ import annotations

import functools
from typing import NamedTuple, Sequence

import jax.numpy as jnp
import numpy as np

from drirl_jax.data.examples import Examples
from drirl_jax.runtime.sharding import shard_prompts
from drirl_jax.types import Array, Group

WINDOW = 8  # batches among which lessons of similar length are put together
WIDTHS = (1 / 2, 5 / 8, 3 / 4, 1)  # widths of a batch as shares of the longest lesson: each is compiled once
ROUND = 8  # a width is a multiple of it


class Lessons(NamedTuple):
    """What the stage `sft` trains on.

    Attributes:
        examples: N prompts, each with the whole answer that is taught.
        openings: for each prompt the token ids of an answer of the other kind; () if there is none.
    """

    examples: Examples
    openings: Sequence[Sequence[int]]


class LessonBatch(NamedTuple):
    """P lessons as a group: the prompt is its first token alone, and the response is all that follows.

    Attributes:
        group: [P, 1] the lessons; a response holds the rest of the prompt, the opening and the answer.
        answer_P1T: [P, 1, T] bool, the answer's tokens, which alone carry a loss.
        answer_len_P: [P] tokens of the answers.
        opening_len_P: [P] tokens of the openings; 0 without one.
    """

    group: Group
    answer_P1T: Array
    answer_len_P: np.ndarray
    opening_len_P: np.ndarray


def with_openings(
    examples: Examples, openings: Sequence[Sequence[int]], share: float, rng: np.random.Generator, longest: int
) -> tuple[list[list[int]], np.ndarray]:
    """Puts the first k tokens of an opening before some of the answers, k ~ U{1, ..., K} (arXiv 2406.05946).

    max log π(answer | prompt, first k tokens of an answer of the other kind)

    Args:
        examples: P prompts with their answers.
        openings: token ids for each prompt; () for none.
        share: the probability of an opening, in [0, 1].
        longest: K.

    Returns:
        (the tokens of prompt, opening and answer for each prompt, k [P]).
    """
    rows, opening_len_P = [], np.zeros(len(examples.id), np.int32)
    for p, opening in enumerate(openings):
        drawn, k = rng.random() < share, int(rng.integers(1, longest + 1))
        opening = list(opening[:k]) if drawn else []
        prompt = examples.prompt[p, : examples.prompt_len[p]].tolist()
        rows.append([*prompt, *opening, *examples.demo[p, : examples.demo_len[p]].tolist()])
        opening_len_P[p] = len(opening)
    return rows, opening_len_P


def group_by_length(length_N: np.ndarray, harmless_N: np.ndarray, batches: int, rng: np.random.Generator) -> np.ndarray:
    """[batches, N / batches] the row numbers 0..N-1, rows of similar length together, batches in random order.

    A row's place is the rank of its length among the rows of its kind. So each batch has harmful and harmless rows in
    the share of all N, though answers of one kind may be longer.
    """
    rank_N = np.zeros(len(length_N))
    for kind in (False, True):
        rows = np.flatnonzero(harmless_N == kind)
        rows = rows[np.argsort(length_N[rows], kind="stable")]
        rank_N[rows] = (np.arange(len(rows)) + 0.5) / max(1, len(rows))
    return np.argsort(rank_N, kind="stable").reshape(batches, -1)[rng.permutation(batches)]


def choose_width(longest_row: int, longest_lesson: int) -> int:
    """The smallest of the WIDTHS of the longest lesson that holds a batch's longest row, in tokens."""
    widths = (-(-int(share * longest_lesson) // ROUND) * ROUND for share in WIDTHS)
    return next(width for width in widths if width >= longest_row)


def make_batches(lessons: Lessons, batches, section, seed: int):
    """A function step -> LessonBatch.

    Args:
        batches: batches[i] are the row numbers of batch i before lessons of similar length are put together.
        section: config.sft.
        seed: of the openings and of the order of batches.
    """
    examples, longest_opening = lessons.examples, section.recovery_tokens
    longest_lesson = int((examples.prompt_len + examples.demo_len).max()) + (longest_opening if section.recovery else 0)

    @functools.lru_cache(maxsize=1)
    def window(number: int):
        drawn = range(number * WINDOW, (number + 1) * WINDOW)
        chosen = np.concatenate([np.asarray(batches[i]) for i in drawn])
        rng = np.random.default_rng([seed, number])
        taken, openings = examples.take(chosen), [lessons.openings[row] for row in chosen]
        rows, opening_len_N = with_openings(taken, openings, section.recovery, rng, longest_opening)
        length_N = np.array([len(row) for row in rows])
        return taken, rows, opening_len_N, group_by_length(length_N, taken.harmless, WINDOW, rng)

    def make(step: int) -> LessonBatch:
        taken, rows, opening_len_N, order = window(step // WINDOW)
        chosen = order[step % WINDOW]
        width = choose_width(max(len(rows[i]) for i in chosen), longest_lesson)
        return join_lessons(taken.take(chosen), [rows[i] for i in chosen], opening_len_N[chosen], width)

    return make


def join_lessons(examples: Examples, rows: Sequence[Sequence[int]], opening_len_P: np.ndarray, width: int):
    """The LessonBatch of these rows of tokens, padded to `width` tokens: 1 of the prompt, width - 1 of the response."""
    P = len(rows)
    token_PN, length_P = np.zeros((P, width), np.int32), np.array([len(row) for row in rows], np.int32)
    for p, row in enumerate(rows):
        token_PN[p, : len(row)] = row
    place_N = np.arange(width)
    answer_PN = (place_N >= (length_P - examples.demo_len)[:, None]) & (place_N < length_P[:, None])
    arrays = token_PN[:, :1], np.ones(P, np.int32), token_PN[:, None, 1:], length_P[:, None] - 1, examples.category
    group = Group(*(shard_prompts(x) for x in arrays), prefix=examples.prefix)
    return LessonBatch(group, jnp.asarray(shard_prompts(answer_PN[:, None, 1:])), examples.demo_len, opening_len_P)
