"""Makes demonstrations by Chain of Draft (arXiv 2502.18600): templates, parsing of replies, filters, balance.

A generator gets a prompt inside its category's template. It writes short steps, a separator and an answer. A reply that
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
from drirl_jax.data.records import SEPARATOR, Record
from drirl_jax.runtime.endpoint import Chat, Reply
from drirl_jax.runtime.thoughts import without_thought
from drirl_jax.types import InputError

# By language: "hints" by category ("" for any other): what a refusal names and what it can offer instead. "forms": the
# kind of answer (explain: refuse and say why; direct: refuse; answer: help, for harmless prompts). "styles": how the
# model thinks first (draft; thought: Chain of Thought, to measure the difference). "request": text around the prompt.
TEXTS = json.loads((importlib.resources.files("drirl_jax.data") / "draft_templates.json").read_text("utf-8"))
CHARACTERS_OF_A_WORD = 2  # in Chinese, where word_count counts characters


def template(record: Record, harmless: bool, section: ConfigDict) -> Chat:
    """The chat that asks for a demonstration of the record's prompt, in its language (English if TEXTS lacks it).

    Args:
        record: a prompt; its response is not used.
        harmless: whether the prompts of its category should be answered.
        section: config.demos.
    """
    texts = TEXTS[record.lang if record.lang in TEXTS else "en"]
    hint = texts["hints"].get(record.category, texts["hints"][""])
    step_words_limit = section.step_words
    lines = (
        texts["forms"]["answer" if harmless else section.form].format(hint=hint),
        texts["styles"][section.style].format(
            words=step_words_limit, characters=step_words_limit * CHARACTERS_OF_A_WORD, separator=SEPARATOR
        ),
        texts["request"].format(prompt=record.prompt),
    )
    return [{"role": "user", "content": "\n\n".join(lines)}]


class Candidate(NamedTuple):
    """A parsed reply to `template`; draft and response are "" if the separator is missing."""

    record: Record
    harmless: bool
    draft: str
    response: str
    reply: Reply


def parse_reply(record: Record, harmless: bool, reply: Reply) -> Candidate:
    """The steps before the first separator, without list marks, and the answer after it; a thought is dropped."""
    draft, separator, response = without_thought(reply.text).partition(SEPARATOR)
    if not separator:
        return Candidate(record, harmless, "", "", reply)
    steps = [re.sub(r"^\s*(?:[-*•]|\d+[.)、])\s*", "", line).strip() for line in draft.splitlines()]
    return Candidate(record, harmless, "\n".join(step for step in steps if step), response.strip(), reply)


def step_words(step: str) -> int:
    """Words of a draft's step; two Chinese characters count as one word."""
    chinese = len(re.findall(r"[\u3400-\u9fff]", step))
    return word_count(step) - chinese + -(-chinese // CHARACTERS_OF_A_WORD)


def longest_echo(prompt: str, response: str) -> int:
    """Length in words of the longest run that the response repeats from the prompt. It compares letters and digits in
    lower case; a Chinese character is a word."""
    prompt_words, response_words = (
        re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower()) for text in (prompt, response)
    )
    longest, run_lengths = 0, [0] * (len(response_words) + 1)
    for word in prompt_words:
        run_lengths = [
            0,
            *(run_lengths[j] + 1 if word == response_word else 0 for j, response_word in enumerate(response_words)),
        ]
        longest = max(longest, *run_lengths)
    return longest


# Reason for leaving a candidate out -> (candidate, config.demos, judge) -> whether it applies. The first one counts.
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
    """The result of `make`: records, number of replies requested, left-out replies by reason, tokens and seconds."""

    records: list[Record] = dataclasses.field(default_factory=list)
    requested: int = 0
    left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    tokens: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        """The counts, one a line, then the mean tokens and seconds of a reply."""
        lines = [f"{len(self.records)} demonstrations of {self.requested} replies"]
        lines += [f"left out {count}: {reason}" for reason, count in self.left_out.most_common()]
        if self.tokens:
            mean = f"{np.mean(self.tokens):.0f} tokens and {np.mean(self.seconds):.2f} s"
            lines.append(f"mean of a reply: {mean}")
        return "\n".join(lines)


class Selection:
    """The candidates that have passed so far, by the place of their prompt, and what is still lacking.

    Args:
        prompts: records; their responses are not used.
        section: config.demos.
        judge: (prompt, response) -> whether it is a refusal; None means no verdict.
    """

    def __init__(self, prompts: Sequence[Record], section: ConfigDict, judge: Callable[[str, str], bool | None]):
        self.prompts, self.section, self.judge = prompts, section, judge
        self.accepted: dict[int, Record] = {}
        self._vectors: dict[str, list[np.ndarray]] = collections.defaultdict(list)

    def lacking(self, category: str) -> int:
        """The number of training demonstrations that a category lacks."""
        count = sum(record.category == category and record.split == "train" for record in self.accepted.values())
        return self.section.per_category - count

    def wants(self, i: int) -> bool:
        """Whether prompt i still needs a demonstration."""
        prompt = self.prompts[i]
        return i not in self.accepted and (prompt.split != "train" or self.lacking(prompt.category) > 0)

    def reason_against(self, i: int, candidate: Candidate, embedding: np.ndarray) -> str | None:
        """The first reason to leave the candidate for prompt i out; None if it passes."""
        for reason, applies in FILTERS.items():
            if applies(candidate, self.section, self.judge):
                return reason
        if any(float(embedding @ other) > self.section.duplicate for other in self._vectors[candidate.record.category]):
            return DUPLICATE
        return None if self.wants(i) else NOT_NEEDED

    def accept(self, i: int, record: Record, embedding: np.ndarray) -> None:
        """Keeps the demonstration of prompt i."""
        self.accepted[i] = record
        self._vectors[record.category].append(embedding)


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
    """Makes demonstrations for prompts. For training it keeps exactly section.per_category of each category: the first
    that pass, in the prompts' order. For the other splits it keeps all that pass.

    If a reply is left out, its prompt is tried again with another seed, at most section.attempts times in all.

    Args:
        prompts: records; their responses are not used.
        section: config.demos.
        categories, harmless: the categories that need demonstrations, and those whose prompts should be answered.
        generate: (chats, seed) -> replies.
        embed: texts -> [N, E] unit embeddings.
        judge: (prompt, response) -> whether it is a refusal; None means no verdict.
        model, seed: written into the provenance; the first attempt uses this seed, each further one adds 1.

    Raises:
        InputError: some categories have too few; the message names each and how many it lacks.
    """
    outcome, selection = Outcome(), Selection(prompts, section, judge)
    for attempt_seed in range(seed, seed + section.attempts):
        attempted = [i for i in range(len(prompts)) if selection.wants(i)]
        if not attempted:
            break
        candidates = _candidates([prompts[i] for i in attempted], section, harmless, generate, attempt_seed)
        outcome.requested += len(candidates)
        embeddings = embed([candidate.response or "-" for candidate in candidates])
        for i, candidate, embedding in zip(attempted, candidates, embeddings):
            outcome.tokens.append(candidate.reply.tokens)
            outcome.seconds.append(candidate.reply.seconds)
            reason = selection.reason_against(i, candidate, embedding)
            if reason is not None:
                outcome.left_out[reason] += 1
            else:
                selection.accept(i, _as_record(candidate, section, model, attempt_seed), embedding)
    short = [f"{name} lacks {selection.lacking(name)}" for name in categories if selection.lacking(name) > 0]
    if short:
        raise InputError(
            f"too few demonstrations passed, where each category needs {section.per_category} for training: "
            f"{'; '.join(short)}: add prompts, raise config.demos.attempts, or take a better generator. "
            + outcome.summary().replace("\n", "; ")
        )
    outcome.records = [record for _, record in sorted(selection.accepted.items())]
    return outcome


def _candidates(
    prompts: Sequence[Record],
    section: ConfigDict,
    harmless: Sequence[str],
    generate: Callable[[list[Chat], int], list[Reply]],
    seed: int,
) -> list[Candidate]:
    """A candidate for each prompt, from one reply each."""
    are_harmless = [prompt.category in harmless for prompt in prompts]
    chats = [template(prompt, is_harmless, section) for prompt, is_harmless in zip(prompts, are_harmless)]
    return [parse_reply(*row) for row in zip(prompts, are_harmless, generate(chats, seed))]


def _as_record(candidate: Candidate, section: ConfigDict, model: str, seed: int) -> Record:
    """The demonstration that a candidate becomes, with its provenance."""
    form = "answer" if candidate.harmless else section.form
    provenance = {"model": model, "form": form, "style": section.style, "seed": seed}
    return candidate.record._replace(
        draft=candidate.draft, response=candidate.response, provenance=json.dumps(provenance)
    )
