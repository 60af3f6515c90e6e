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
from drirl_jax.runtime.files import expand_path, is_beside, need_apart
from drirl_jax.runtime.progress import with_progress
from drirl_jax.runtime.surrogates import torn
from drirl_jax.types import InputError


def word_count(text: str) -> int:
    """The number of words; each Chinese character counts as one, Chinese punctuation as none."""
    return len(re.findall(r"[\u3400-\u9fff]|[^\s\u3000-\u303f\u3400-\u9fff\uff00-\uff20]+", text))


def demonstrations(
    name: str, source: str, max_words: int | None = None, category: str = "", target: pathlib.Path | None = None
) -> tuple[list[Record], collections.Counter[str]]:
    """The demonstrations of a published data set, and how many prompts (or rows) were left out for each reason.

    Args:
        name: of `PUBLISHED`.
        source: a file, a folder, or a name on the hub.
        max_words: longer answers are no demonstrations; None: all lengths.
        category: of the prompts whose category is none of ours; "": they are left out.
        target: the file that is to hold them; it may be none of those that are read.

    Raises:
        InputError: the data cannot be had, a row is not of its form, or the target would be read.
    """
    of = PUBLISHED[name]
    ours = {theirs.lower(): mine for theirs, mine in of.categories.items()}
    answers: dict[tuple[str, str], list[Answer]] = {}
    left_out: collections.Counter[str] = collections.Counter()
    for where, part, row in with_progress(list(_rows(name, source, target)), "import", "row"):
        try:
            parsed = of.parse(row, part)
            if isinstance(parsed, str):
                left_out[parsed] += 1
                continue
            for answer in parsed:
                answer = answer._replace(prompt=answer.prompt.strip(), text=answer.text.strip())
                texts = (answer.prompt, answer.text, answer.id, answer.by, answer.lang, *answer.labels)
                if any(map(torn, texts)):
                    left_out["with half a surrogate pair, as of an emoji that was cut"] += 1
                    continue
                answers.setdefault((answer.id, answer.prompt), []).append(answer)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{where}: not a {name} record ({error!r}): is it the published file?") from error
    rows = []
    for (key, prompt), told in answers.items():
        labels = collections.Counter(label for answer in told for label in answer.labels)
        mapped = collections.Counter(ours[label.lower()] for label in labels.elements() if label.lower() in ours)
        chosen = mapped.most_common(1)[0][0] if mapped else category
        safe = [answer for answer in told if answer.safe and answer.text]
        best = min(safe, key=lambda answer: word_count(answer.text), default=None)
        if not chosen:
            first = next(iter(labels), "")
            left_out[f"of a category that is none of ours ({first})" if first else "without a category"] += 1
        elif best is None:
            left_out["without a safe answer"] += 1
        elif max_words is not None and word_count(best.text) > max_words:
            left_out[f"with no safe answer of at most {max_words} words"] += 1
        else:
            digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
            split = {0: "test", 1: "valid"}.get(int(digest, 16) % 10, "train")
            rows.append(
                Record(
                    id=key or f"{name}-{digest[:16]}", category=chosen, lang=best.lang, split=best.split or split,
                    prompt=prompt, draft="", response=best.text, provenance=f"{of.url}; answer {best.by}",
                )
            )  # fmt: skip
    return rows, left_out


def _rows(name: str, source: str, target: pathlib.Path | None) -> Iterator[tuple[str, str, Row]]:
    """(where, name of the part, row) of a file, of a folder's files, or of the hub."""
    of, path = PUBLISHED[name], expand_path(source)
    instead = f"download {' or '.join(of.files)} from {of.url} and name the file or its folder"
    if not path.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", source) and ".json" not in source and of.parts:
        for part, options in of.parts.items():
            yield from ((where, part, row) for where, row in files.from_hub(source, instead, **options))
        return
    paths = (
        sorted({file for pattern in of.files for file in path.rglob(pattern) if not is_beside(file)})
        if path.is_dir()
        else [path]
    )
    if not paths:
        raise InputError(f"none of {', '.join(of.files)} in {path}: {instead}.")
    if target:
        need_apart(target, *paths)
    for file in paths:
        yield from (
            (where, file.absolute().parent.name, row) for where, row in files.table(file, whole_characters=False)
        )
