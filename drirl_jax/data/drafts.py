"""Demonstrations by Chain of Draft (arXiv 2502.18600): templates, reading what a model wrote, filters, balance.

A generator is given a category's template around a prompt and writes short steps, a separator and an answer. What
passes the filters becomes a record (see `records.py`) with its provenance. (DR-IRL section 1)
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.resources
import json
import re
from typing import Callable, NamedTuple, Sequence

import numpy as np
from ml_collections import ConfigDict

from drirl_jax.data.convert import word_count
from drirl_jax.data.records import Record
from drirl_jax.runtime.endpoint import Chat, Reply
from drirl_jax.runtime.thoughts import without_thought
from drirl_jax.types import InputError

# By language: "hints" by category ("" for any other), what a refusal names and what it can offer instead; "forms", what
# is asked for (explain: why it was refused; direct: to refuse; answer: of harmless prompts, to help); "styles", how it
# thinks first (draft; thought: Chain of Thought, to measure the difference); "request", around the prompt.
TEXTS = json.loads((importlib.resources.files("drirl_jax.data") / "draft_templates.json").read_text("utf-8"))
CHARACTERS_OF_A_WORD = 2  # in Chinese, where word_count counts characters


def template(record: Record, harmless: bool, section: ConfigDict) -> Chat:
    """The chat that asks for a demonstration of the record's prompt, in its language (English for one not known).

    Args:
        record: a prompt; its response does not matter.
        harmless: whether its category's prompts should be answered.
        section: config.demos.
    """
    texts = TEXTS[record.lang if record.lang in TEXTS else "en"]
    hint = texts["hints"].get(record.category, texts["hints"][""])
    words = section.step_words
    lines = (
        texts["forms"]["answer" if harmless else section.form].format(hint=hint),
        texts["styles"][section.style].format(
            words=words, characters=words * CHARACTERS_OF_A_WORD, separator=section.separator
        ),
        texts["request"].format(prompt=record.prompt),
    )
    return [{"role": "user", "content": "\n\n".join(lines)}]


class Candidate(NamedTuple):
    """A reply to `template`, read: draft "" and response "" where the separator is missing."""

    record: Record
    harmless: bool
    draft: str
    response: str
    reply: Reply


def parsed(record: Record, harmless: bool, reply: Reply, separator: str) -> Candidate:
    """The steps before the first separator, without list marks, and the answer behind it; a thought is neither."""
    draft, found, response = without_thought(reply.text).partition(separator)
    if not found:
        return Candidate(record, harmless, "", "", reply)
    steps = [re.sub(r"^\s*(?:[-*•]|\d+[.)、])\s*", "", line).strip() for line in draft.splitlines()]
    return Candidate(record, harmless, "\n".join(step for step in steps if step), response.strip(), reply)


def step_words(step: str) -> int:
    """Words of a draft's step; two Chinese characters count as one."""
    chinese = len(re.findall(r"[\u3400-\u9fff]", step))
    return word_count(step) - chinese + -(-chinese // CHARACTERS_OF_A_WORD)


def longest_echo(prompt: str, response: str) -> int:
    """Words of the longest run that the response repeats from the prompt, letters and digits alone, in lower case; a
    Chinese character is a word."""
    source, target = (re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower()) for text in (prompt, response))
    longest, row = 0, [0] * (len(target) + 1)
    for word in source:
        row = [0, *(row[j] + 1 if word == other else 0 for j, other in enumerate(target))]
        longest = max(longest, *row)
    return longest


# Why a candidate is left out, in the order in which it is asked: (candidate, config.demos, judge) -> whether it is.
FILTERS: dict[str, Callable[[Candidate, ConfigDict, Callable], bool]] = {
    "cut off at the most tokens": lambda c, section, judge: c.reply.finish == "length",
    "without a separator and an answer": lambda c, section, judge: not c.response,
    "without a draft": lambda c, section, judge: not c.draft,
    "a step of too many words": lambda c, section, judge: (
        section.style == "draft" and any(step_words(step) > section.step_words for step in c.draft.splitlines())
    ),
    "not the answer that its kind asks for": lambda c, section, judge: (
        judge(c.record.prompt, c.response) is not (not c.harmless)  # None: no verdict
    ),
    "an echo of the prompt": lambda c, section, judge: (
        not c.harmless and longest_echo(c.record.prompt, c.response) > section.echo_words
    ),
}
DUPLICATE, NOT_NEEDED = "too like one that is kept", "not needed"


@dataclasses.dataclass
class Outcome:
    """What came of it: the records, how many replies were asked for, why some were left out, tokens and seconds."""

    records: list[Record] = dataclasses.field(default_factory=list)
    asked: int = 0
    left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    tokens: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        """Counts, one a line, then tokens and seconds of a reply."""
        lines = [f"{len(self.records)} demonstrations of {self.asked} replies"]
        lines += [f"left out {count}: {why}" for why, count in self.left_out.most_common()]
        if self.tokens:
            mean = f"{np.mean(self.tokens):.0f} tokens and {np.mean(self.seconds):.2f} s"
            lines.append(f"mean of a reply: {mean}")
        return "\n".join(lines)


def make(
    prompts: Sequence[Record],
    section: ConfigDict,
    *,
    categories: Sequence[str],
    harmless: Sequence[str],
    generate: Callable[[list[Chat], int], list[Reply]],
    embed: Callable[[list[str]], np.ndarray],
    judge: Callable[[str, str], bool | None],
    model: str,
    seed: int,
) -> Outcome:
    """Demonstrations for prompts: for training exactly section.per_category of each category, the first that pass in
    the prompts' order; of the other splits all that pass.

    A prompt whose reply is left out is asked again, with another seed, up to section.attempts times.

    Args:
        prompts: records of which the response does not matter.
        section: config.demos.
        categories, harmless: which need demonstrations, and which of them are to be answered.
        generate: (chats, seed) -> replies.
        embed: texts -> [N, E] unit embeddings.
        judge: (prompt, response) -> whether it is a refusal; None: it gives no verdict.
        model, seed: what is written into the provenance, the latter the first attempt's.

    Raises:
        InputError: some categories fall short: the sentence names each and by how much.
    """
    outcome = Outcome()
    kept: dict[int, Record] = {}
    vectors: dict[str, list[np.ndarray]] = collections.defaultdict(list)

    def missing(category: str) -> int:
        have = sum(r.category == category and r.split == "train" for r in kept.values())
        return section.per_category - have

    def wanted(i: int) -> bool:
        return i not in kept and (prompts[i].split != "train" or missing(prompts[i].category) > 0)

    for attempt in range(section.attempts):
        asked = [i for i in range(len(prompts)) if wanted(i)]
        if not asked:
            break
        answer = [prompts[i].category in harmless for i in asked]
        chats = [template(prompts[i], answered, section) for i, answered in zip(asked, answer)]
        replies = generate(chats, seed + attempt)
        read = [parsed(prompts[i], *of, separator=section.separator) for i, *of in zip(asked, answer, replies)]
        embedded = embed([candidate.response or "-" for candidate in read])
        outcome.asked += len(replies)
        for i, candidate, vector in zip(asked, read, embedded):
            outcome.tokens.append(candidate.reply.tokens)
            outcome.seconds.append(candidate.reply.seconds)
            same = vectors[candidate.record.category]
            why = next((why for why, wrong in FILTERS.items() if wrong(candidate, section, judge)), None)
            if why is None and any(float(vector @ other) > section.duplicate for other in same):
                why = DUPLICATE
            if why is None and not wanted(i):
                why = NOT_NEEDED
            if why is not None:
                outcome.left_out[why] += 1
                continue
            form = "answer" if candidate.harmless else section.form
            provenance = {"model": model, "form": form, "style": section.style, "seed": seed + attempt}
            kept[i] = candidate.record._replace(
                draft=candidate.draft, response=candidate.response, provenance=json.dumps(provenance)
            )
            same.append(vector)
    short = [f"{c} lacks {missing(c)}" for c in categories if missing(c) > 0]
    if short:
        raise InputError(
            f"too few demonstrations passed, where each category needs {section.per_category} for training: "
            f"{'; '.join(short)}: add prompts, raise config.demos.attempts, or take a better generator. "
            + outcome.summary().replace("\n", "; ")
        )
    outcome.records = [kept[i] for i in sorted(kept)]
    return outcome
