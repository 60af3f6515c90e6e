"""Turns records into token arrays of fixed shape. The stages take their batches from these arrays."""

from __future__ import annotations

import logging
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np

from drirl_jax.data import overlap, records, text
from drirl_jax.runtime import processes
from drirl_jax.runtime.progress import with_progress
from drirl_jax.types import InputError

log = logging.getLogger(__name__)


class Examples(NamedTuple):
    """N tokenised records, right-padded: each prompt with its demonstration.

    Attributes:
        prompt: [N, S] int32; prompt_len: [N] int32; both without the prefix.
        demo: [N, T] int32; demo_len: [N] int32.
        category: [N] int32 index into config.data.categories.
        harmless: [N] bool, whether the prompt should be answered: its category is one of config.data.harmless.
        number: [N] int32, the record's number in the whole data set; it is the key of the record's random numbers.
        prompt_text, demo_text, id: lists of N strings.
        prefix: the ids with which every prompt begins.
    """

    prompt: np.ndarray
    prompt_len: np.ndarray
    demo: np.ndarray
    demo_len: np.ndarray
    category: np.ndarray
    harmless: np.ndarray
    number: np.ndarray
    prompt_text: Sequence[str]
    demo_text: Sequence[str]
    id: Sequence[str]
    prefix: tuple[int, ...] = ()

    def take(self, rows) -> "Examples":
        """The records at these row numbers, in this order."""
        columns = self._asdict()
        prefix = columns.pop("prefix")
        taken: dict[str, Any] = {
            name: column[rows] if isinstance(column, np.ndarray) else [column[i] for i in rows]
            for name, column in columns.items()
        }
        return Examples(**taken, prefix=prefix)

    def rows_by_category(self, categories: int) -> list[np.ndarray]:
        """The row numbers of each category, in order."""
        return [np.flatnonzero(self.category == c) for c in range(categories)]


def other_kind_demonstrations(examples: Examples, pool: Examples, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws for each prompt a demonstration of the other kind from the pool, as a wrong answer (ours).

    A harmful prompt gets help, a harmless one a refusal. The policy's samples differ from demonstrations in style and
    in content. Style is easier to learn, so a reward that sees only samples ranks by style. These negatives have the
    style of demonstrations: only their content is wrong. The reward must learn content, which ranks the samples too.

    Returns:
        ([P, T] tokens, [P] lengths).
    """
    rng = np.random.default_rng(seed)
    rows = [rng.choice(np.flatnonzero(pool.harmless != harmless)) for harmless in examples.harmless]
    return pool.demo[rows], pool.demo_len[rows]


def require_both_kinds(examples: Examples, split: str) -> None:
    """Raises InputError if the split lacks harmful or harmless prompts (long prompts may have been dropped)."""
    if len(set(examples.harmless.tolist())) < 2:
        raise InputError(
            f"split {split} has prompts of one kind alone, but the contrast of config.irl or config.group needs "
            "harmful and harmless ones: add prompts of the missing kind, or raise config.data.max_prompt if they were "
            "dropped."
        )


def tokenise(by_split: dict[str, list[records.Record]], tokens: text.ChatTokens, config) -> dict[str, Examples]:
    """Tokenises the records of each split and moves the common beginning of all prompts to `prefix`.

    All splits are padded to the same S (a multiple of 4) and T = sampler.max_new. All processes must call it alike;
    each tokenises its share of the records.

    Raises:
        InputError: a prompt is longer than data.max_prompt and data.long_prompts is "error".
    """
    category_index = {name: i for i, name in enumerate(config.data.categories)}
    rows: dict[str, list] = {split: [] for split in by_split}
    number, dropped, truncated = 0, 0, 0
    all_records = [(split, record) for split, split_records in by_split.items() for record in split_records]
    ids = processes.map_shares([record for _, record in all_records], lambda share: _ids(share, tokens, config))
    for (split, record), (prompt, demo) in zip(all_records, ids, strict=True):
        if len(prompt) > config.data.max_prompt:
            dropped += 1
            continue
        truncated += demo[-1] not in tokens.eos_ids
        kind = category_index[record.category], record.category in config.data.harmless
        rows[split].append((prompt, demo, *kind, number, record.prompt, _demonstration(record, config), record.id))
        number += 1
    if dropped:
        log.warning("dropped %d prompts longer than %d tokens", dropped, config.data.max_prompt)
    if truncated:
        log.warning("cut %d of %d demonstrations to %d tokens", truncated, number, config.sampler.max_new)
    prompts = [row[0] for split in rows.values() for row in split]
    prefix = common_prefix(prompts)
    prompt_size = -(-(max(map(len, prompts)) - len(prefix)) // 4) * 4
    padded = {split: _pad(batch, prefix, prompt_size, config.sampler.max_new) for split, batch in rows.items() if batch}
    if (overlaps := overlap.describe_repeats(padded)) and processes.is_writer():
        log.warning("%s: the figures of these held-out prompts describe prompts that were trained on", overlaps)
    return padded


def _ids(share: Sequence[records.Record], tokens: text.ChatTokens, config) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the ids of each record's prompt and demonstration. Raises InputError for a prompt that is too long."""
    for record in with_progress(share, "tokens", "record"):
        prompt = tokens.prompt_ids(record.prompt)
        if len(prompt) > config.data.max_prompt and config.data.long_prompts == "error":
            raise InputError(
                f"the prompt of record {record.id} has {len(prompt)} tokens, above config.data.max_prompt = "
                f"{config.data.max_prompt}: raise it, shorten the prompt, or set data.long_prompts='drop'."
            )
        yield prompt, tokens.response_ids(_demonstration(record, config), config.sampler.max_new)


def _demonstration(record: records.Record, config) -> str:
    return records.demonstration(record, config.demos.keep_draft)


def common_prefix(prompts: list[list[int]]) -> tuple[int, ...]:
    """The ids with which all prompts begin (a system turn, say). It leaves at least one id of each prompt."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return tuple(first[: next((i for i in range(limit) if first[i] != last[i]), limit)])


def _pad(rows: list, prefix: tuple[int, ...], prompt_size: int, response_size: int) -> Examples:
    prompt_ids, demo_ids, category, harmless, number, prompt_text, demo_text, ids = map(list, zip(*rows))
    return Examples(
        *text.pad([row[len(prefix) :] for row in prompt_ids], prompt_size),
        *text.pad(demo_ids, response_size),
        category=np.asarray(category, np.int32),
        harmless=np.asarray(harmless, bool),
        number=np.asarray(number, np.int32),
        prompt_text=prompt_text,
        demo_text=demo_text,
        id=ids,
        prefix=prefix,
    )
