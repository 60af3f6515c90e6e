"""Demonstrations as JSON lines: the schema, its validation, and the starter set that comes with the package.

One JSON object a line, every field a string:

    {"id": "insult-001", "category": "insult", "lang": "en", "split": "train" | "valid" | "test",
     "prompt": "...", "draft": "Wants an insult.\\nInsults hurt.", "response": "I can't ..."}

`draft` holds the Chain-of-Draft steps, one a line, and may be empty. "provenance" (who wrote it, and how) may be left
out. Further fields are ignored. A training record of a harmless category may be unanswered: its `response` is empty.
It is for a stage that learns from the model's own answers, and all other readers leave it out.
"""

from __future__ import annotations

import collections
import difflib
import importlib.resources
import json
import logging
import math
import os
import pathlib
from typing import Any, Iterator, NamedTuple, Sequence

from drirl_jax.data import contents
from drirl_jax.runtime.files import expand_path, is_beside
from drirl_jax.runtime.names import file_name
from drirl_jax.types import InputError

log = logging.getLogger(__name__)

STARTER = "starter"  # in the place of a path: the packaged files
HARMLESS = ("harmless",)  # the categories to be answered, where a caller names no others
SPLITS = ("train", "valid", "test")
SHOWN = 80  # characters of a text that a sentence about it shows

PathLike = str | os.PathLike


class Record(NamedTuple):
    """A prompt of a category and the safe answer that demonstrates what is wanted."""

    id: str
    category: str
    lang: str
    split: str
    prompt: str
    draft: str
    response: str
    provenance: str = ""


def demonstration(record: Record, keep_draft: bool, separator: str = "####") -> str:
    """The demonstration's text: the draft, the separator and the response; or the response alone."""
    if keep_draft and record.draft.strip():
        return f"{record.draft}\n{separator} {record.response}"
    return record.response


def read_records(
    paths: PathLike | Sequence[PathLike],
    categories: Sequence[str],
    optional: Sequence[str] = (),
    harmless: Sequence[str] = HARMLESS,
    unanswered: bool = False,
) -> list[Record]:
    """Reads and checks demonstrations, in the order of the paths and of their lines.

    Args:
        paths: "starter" for the packaged files of `categories`; or a file; or a folder, of which every *.jsonl
            is read, also those that are packed; or several of these.
        categories: the categories in use; a record's category is one of them.
        optional: fields that may be missing or empty, as ("draft", "response") of prompts alone.
        harmless: those of the categories whose training records may be unanswered.
        unanswered: whether to keep unanswered records; otherwise they are left out, and the log counts them.

    Raises:
        InputError: a file is missing, or a record breaks the schema: the sentence gives file and line.
    """
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    records, first_at, left_out = [], {}, 0
    for file in [file for path in several for file in _files(path, categories)]:
        for where, value in json_lines(file):
            record = _record(value, where, categories, optional, harmless)
            if record.id in first_at:
                raise InputError(
                    f"{where}: the id {_shown(record.id)} was used before at {first_at[record.id]}: give each record "
                    "its own"
                )
            first_at[record.id] = where
            if unanswered or "response" in optional or record.response.strip():
                records.append(record)
            else:
                left_out += 1
    if left_out:
        log.info("left out %d training prompts that have no answer", left_out)
    if not records:
        kind = "answered records" if left_out else "records"
        raise InputError(f"no {kind} in {', '.join(map(str, several))}: write one JSON object a line")
    return records


def by_split(
    paths: PathLike | Sequence[PathLike],
    categories: Sequence[str],
    harmless: Sequence[str] = HARMLESS,
    unanswered: bool = False,
) -> dict[str, list[Record]]:
    """The records of `read` by split, each split in their order; a split without records is absent."""
    splits = collections.defaultdict(list)
    for record in read_records(paths, categories, harmless=harmless, unanswered=unanswered):
        splits[record.split].append(record)
    return dict(splits)


def require(records: Sequence[Record], categories: Sequence[str], split: str, minimum: int) -> None:
    """Checks that each category has at least `minimum` demonstrations in `split`.

    Raises:
        InputError: some have fewer: the sentence names every one of them and what it lacks.
    """
    count = collections.Counter(r.category for r in records if r.split == split)
    short = [f"{c} has {count[c]} and lacks {minimum - count[c]}" for c in categories if count[c] < minimum]
    if short:
        raise InputError(
            f"too few demonstrations in split {split!r}, where each category needs {minimum}: "
            f"{'; '.join(short)}: add records or lower the number"
        )


def thinned(records: Sequence[Record], share: dict[str, float]) -> list[Record]:
    """The first ⌈share · n⌉ of each category's n records, in their order; of a category that is not named all."""
    total = collections.Counter(r.category for r in records)
    limit = {category: math.ceil(share.get(category, 1.0) * n) for category, n in total.items()}
    seen: collections.Counter[str] = collections.Counter()
    kept = []
    for record in records:
        seen[record.category] += 1
        if seen[record.category] <= limit[record.category]:
            kept.append(record)
    return kept


def json_lines(path: PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file, line n", object) for each line of a JSONL file that is not blank; see `contents.read_utf8`.

    Raises:
        InputError: the file is missing or damaged, or a line is not UTF-8, not JSON or not an object.
    """
    path = expand_path(path)
    yield from lines_of(path, contents.read_utf8(path))


def lines_of(path: pathlib.Path, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """`json_lines` of what the file holds. Raises InputError."""
    for number, line in enumerate(data.splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig")
            value = json.loads(text) if text.strip() else None
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 text ({error.reason}): save the file as UTF-8") from error
        except (ValueError, RecursionError) as error:  # also a number of too many digits, and brackets without end
            raise InputError(f"{where}: not JSON ({error}): write one JSON object a line") from error
        if not text.strip():
            continue
        if not isinstance(value, dict):
            raise InputError(f"{where}: a JSON {type(value).__name__}, not an object: write one JSON object a line")
        yield where, value


def _files(path: PathLike, known: Sequence[str]) -> list[pathlib.Path]:
    """The JSONL files that a path, a folder or "starter" means, in order.

    Of a folder hidden files are no data, and neither is what this package's commands keep beside their results.
    """
    if path == STARTER:
        folder = pathlib.Path(str(importlib.resources.files("drirl_jax.data") / "starter"))
        return [file for name in known if (file := folder / f"{file_name(name)}.jsonl").is_file()]
    path = expand_path(path)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if not file.is_dir() and contents.kind(file) == ".jsonl"]
        files = [file for file in files if not file.name.startswith(".") and not is_beside(file)]
        if not files:
            raise InputError(f"no *.jsonl file in the folder {path}: check the path")
        return files
    return [path]


def _shown(text: str) -> str:
    """The text as a sentence may show it, whatever it holds and however long it is."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")


def _record(
    value: dict[str, Any], where: str, known: Sequence[str], optional: Sequence[str], harmless: Sequence[str]
) -> Record:
    """The record of a JSON object; InputError if a field breaks the schema. Optional fields may be missing or empty."""
    given = {field: x for field, x in value.items() if x is not None}  # other tools write null for what is not there
    value = dict.fromkeys(optional, "") | Record._field_defaults | given
    for field in Record._fields:
        if field not in value:
            near = difflib.get_close_matches(field, value, n=1)
            hint = f" ({near[0]!r} is there: a slip?)" if near else ""
            raise InputError(f"{where}: the field {field!r} is missing{hint}: add it")
        if not isinstance(value[field], str):
            kind = type(value[field]).__name__
            raise InputError(f"{where}: the field {field!r} is of type {kind}: make it a string")
        if any("\ud800" <= c <= "\udfff" for c in value[field]):
            raise InputError(f"{where}: the field {field!r} holds half a surrogate pair: write valid Unicode")
    record = Record(**{field: value[field] for field in Record._fields})
    if record.category not in known:
        near = difflib.get_close_matches(record.category[:SHOWN], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"{where}: unknown category {_shown(record.category)}: {hint}known are {', '.join(known)}")
    if record.split not in SPLITS:
        raise InputError(f"{where}: unknown split {_shown(record.split)}: use one of {', '.join(SPLITS)}")
    for field in ("id", "prompt"):
        if field not in optional and not getattr(record, field).strip():
            raise InputError(f"{where}: the {field} is empty: write one or drop the line")
    may_lack_answer = "response" in optional or (record.split == "train" and record.category in harmless)
    if not record.response.strip() and not may_lack_answer:
        raise InputError(
            f"{where}: the demonstration (response) is empty, and only training prompts of harmless categories may "
            "lack one: write one or drop the line"
        )
    return record
