"""Converts published data sets to this package's schema (see `drirl_jax.data.records`)."""

from __future__ import annotations

import collections
import hashlib
import pathlib
import re
from typing import Iterator

from drirl_jax.data import files
from drirl_jax.data.files import Row
from drirl_jax.data.published import PUBLISHED, Answer
from drirl_jax.data.records import Record
from drirl_jax.errors import InputError
from drirl_jax.runtime.files import expand_path, is_replies_file, need_apart
from drirl_jax.runtime.progress import with_progress
from drirl_jax.runtime.surrogates import has_half_pair


def word_count(text: str) -> int:
    """The number of words; each Chinese character counts as one word, Chinese punctuation as none."""
    return len(re.findall(r"[\u3400-\u9fff]|[^\s\u3000-\u303f\u3400-\u9fff\uff00-\uff20]+", text))


def demonstrations(
    name: str, source: str, max_words: int | None = None, category: str = "", target: pathlib.Path | None = None
) -> tuple[list[Record], collections.Counter[str]]:
    """The demonstrations of a published data set, and by reason the number of prompts (or rows) left out.

    Args:
        name: a key of `PUBLISHED`.
        source: a file, a folder, or a name on the hub.
        max_words: longer answers do not become demonstrations; None allows all lengths.
        category: given to prompts whose category is none of ours; "" leaves them out.
        target: the file to write later; it must not be one of the files to read.

    Raises:
        InputError: the data is not available, a row has another form, or `target` is one of the files to read.
    """
    left_out_counts: collections.Counter[str] = collections.Counter()
    answers = _answers_by_prompt(name, source, target, left_out_counts)
    demos = []
    for (key, prompt), prompt_answers in answers.items():
        demonstration = _demonstration(name, prompt_answers, max_words, category)
        if isinstance(demonstration, str):
            left_out_counts[demonstration] += 1
            continue
        answer, chosen_category = demonstration
        digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
        split = {0: "test", 1: "valid"}.get(int(digest, 16) % 10, "train")
        demos.append(
            Record(
                id=key or f"{name}-{digest[:16]}", category=chosen_category, lang=answer.lang,
                split=answer.split or split, prompt=prompt, draft="", response=answer.text,
                provenance=f"{PUBLISHED[name].url}; answer {answer.by}",
            )
        )  # fmt: skip
    return demos, left_out_counts


def _answers_by_prompt(
    name: str, source: str, target: pathlib.Path | None, left_out_counts: collections.Counter[str]
) -> dict[tuple[str, str], list[Answer]]:
    """The answers of a published data set by (id, prompt). It adds the rows that it leaves out to the counts."""
    dataset = PUBLISHED[name]
    answers: dict[tuple[str, str], list[Answer]] = {}
    for location, part, row in with_progress(list(_rows(name, source, target)), "import", "row"):
        try:
            answers_or_reason = dataset.parse(row, part)
            if isinstance(answers_or_reason, str):
                left_out_counts[answers_or_reason] += 1
                continue
            for answer in answers_or_reason:
                answer = answer._replace(prompt=answer.prompt.strip(), text=answer.text.strip())
                texts = (answer.prompt, answer.text, answer.id, answer.by, answer.lang, *answer.labels)
                if any(map(has_half_pair, texts)):
                    left_out_counts["with half a surrogate pair, as of an emoji that was cut"] += 1
                    continue
                answers.setdefault((answer.id, answer.prompt), []).append(answer)
        except InputError as error:
            raise InputError(f"{location}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{location}: not a {name} record ({error!r}): is it the published file?") from error
    return answers


def _demonstration(name: str, answers: list[Answer], max_words: int | None, category: str) -> tuple[Answer, str] | str:
    """(The shortest safe answer to a prompt, the category that most of its labels name), or the reason for none."""
    our_category = {their_name.lower(): our_name for their_name, our_name in PUBLISHED[name].categories.items()}
    label_counts = collections.Counter(label for answer in answers for label in answer.labels)
    our_counts = collections.Counter(
        our_category[label.lower()] for label in label_counts.elements() if label.lower() in our_category
    )
    chosen_category = our_counts.most_common(1)[0][0] if our_counts else category
    if not chosen_category:
        first = next(iter(label_counts), "")
        return f"of a category that is none of ours ({first})" if first else "without a category"
    safe_answers = [answer for answer in answers if answer.safe and answer.text]
    if not safe_answers:
        return "without a safe answer"
    best = min(safe_answers, key=lambda answer: word_count(answer.text))
    if max_words is not None and word_count(best.text) > max_words:
        return f"with no safe answer of at most {max_words} words"
    return best, chosen_category


def _rows(name: str, source: str, target: pathlib.Path | None) -> Iterator[tuple[str, str, Row]]:
    """Yields (location, part name, row) of a file, of the files in a folder, or of a data set on the hub."""
    dataset, path = PUBLISHED[name], expand_path(source)
    advice = f"download {' or '.join(dataset.files)} from {dataset.url} and name the file or its folder"
    if not path.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", source) and ".json" not in source and dataset.parts:
        for part, options in dataset.parts.items():
            yield from ((location, part, row) for location, row in files.from_hub(source, advice, **options))
        return
    paths = (
        sorted({file for pattern in dataset.files for file in path.rglob(pattern) if not is_replies_file(file)})
        if path.is_dir()
        else [path]
    )
    if not paths:
        raise InputError(f"none of {', '.join(dataset.files)} in {path}: {advice}.")
    if target:
        need_apart(target, *paths)
    for file in paths:
        yield from (
            (location, file.absolute().parent.name, row)
            for location, row in files.read_table(file, whole_characters=False)
        )
