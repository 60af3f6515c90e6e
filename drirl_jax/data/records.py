"""Demonstrations as JSON lines: the schema, its validation, and the starter set in this package.

A file has one JSON object a line. Every field is a string:

    {"id": "insult-001", "category": "insult", "lang": "en", "split": "train" | "valid" | "test",
     "prompt": "...", "draft": "Wants an insult.\\nInsults hurt.", "response": "I can't ..."}

`draft` holds the Chain-of-Draft steps, one a line, and may be empty. "provenance" (who wrote it, and how) is optional.
Other fields are ignored. A training record of a harmless category may be unanswered: its `response` is empty. A stage
that learns from the model's own answers uses such records; all other readers skip them.
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

from drirl_jax.data import encodings
from drirl_jax.errors import InputError
from drirl_jax.runtime.files import expand_path, is_replies_file
from drirl_jax.runtime.names import file_name

log = logging.getLogger(__name__)

STARTER = "starter"  # given instead of a path, it means the packaged files
HARMLESS = ("harmless",)  # default of the categories whose prompts should be answered
SEPARATOR = "####"  # between the draft and the answer of a demonstration
SPLITS = ("train", "valid", "test")
MAX_QUOTED = 80  # an error message quotes at most so many characters of a text

PathLike = str | os.PathLike


class Record(NamedTuple):
    """A prompt of a category and its demonstration: a safe answer."""

    id: str
    category: str
    lang: str
    split: str
    prompt: str
    draft: str
    response: str
    provenance: str = ""


def demonstration(record: Record, keep_draft: bool) -> str:
    """The demonstration's text: the draft, the separator and the response; or the response alone."""
    if keep_draft and record.draft.strip():
        return f"{record.draft}\n{SEPARATOR} {record.response}"
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
        paths: "starter" for the packaged files of `categories`; or a file; or a folder, whose *.jsonl files are all
            read, also compressed ones; or several of these.
        categories: the categories in use; a record's category is one of them.
        optional: fields that may be missing or empty; ("draft", "response") for files of prompts alone.
        harmless: the categories whose training records may be unanswered.
        unanswered: whether to keep unanswered records; otherwise they are skipped, and the log gives their number.

    Raises:
        InputError: a file is missing, or a record breaks the schema; the message gives file and line.
    """
    path_list = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    records, first_location, skipped = [], {}, 0
    for file in [file for path in path_list for file in _files(path, categories)]:
        for location, fields in json_lines(file):
            record = _record(fields, location, categories, optional, harmless)
            if record.id in first_location:
                raise InputError(
                    f"{location}: the id {_quoted(record.id)} was used before at {first_location[record.id]}: "
                    "give each record its own"
                )
            first_location[record.id] = location
            if unanswered or "response" in optional or record.response.strip():
                records.append(record)
            else:
                skipped += 1
    if skipped:
        log.info("left out %d training prompts that have no answer", skipped)
    if not records:
        kind = "answered records" if skipped else "records"
        raise InputError(f"no {kind} in {', '.join(map(str, path_list))}: write one JSON object a line")
    return records


def by_split(
    paths: PathLike | Sequence[PathLike],
    categories: Sequence[str],
    harmless: Sequence[str] = HARMLESS,
    unanswered: bool = False,
) -> dict[str, list[Record]]:
    """The records of `read_records` by split, in their order; a split without records is absent."""
    splits = collections.defaultdict(list)
    for record in read_records(paths, categories, harmless=harmless, unanswered=unanswered):
        splits[record.split].append(record)
    return dict(splits)


def require(records: Sequence[Record], categories: Sequence[str], split: str, minimum: int) -> None:
    """Checks that each category has at least `minimum` demonstrations in `split`.

    Raises:
        InputError: a category has fewer; the message names each such category and how many it lacks.
    """
    counts = collections.Counter(r.category for r in records if r.split == split)
    short = [f"{c} has {counts[c]} and lacks {minimum - counts[c]}" for c in categories if counts[c] < minimum]
    if short:
        raise InputError(
            f"too few demonstrations in split {split!r}, where each category needs {minimum}: "
            f"{'; '.join(short)}: add records or lower the number"
        )


def in_turn(records: Sequence[Record]) -> list[Record]:
    """The records of the categories in turn: the first of each category, then the second of each, and so on.

    So the first n of them are spread evenly over the categories, whose order is that of their names.
    """
    counts: collections.Counter[str] = collections.Counter()
    ranked = []
    for record in records:
        ranked.append((counts[record.category], record.category, record))
        counts[record.category] += 1
    return [record for *_, record in sorted(ranked)]


def first_share(records: Sequence[Record], share: dict[str, float]) -> list[Record]:
    """The first ⌈share · n⌉ of each category's n records, in order; all records of a category that `share` lacks."""
    totals = collections.Counter(r.category for r in records)
    limit = {category: math.ceil(share.get(category, 1.0) * n) for category, n in totals.items()}
    counts: collections.Counter[str] = collections.Counter()
    selected = []
    for record in records:
        counts[record.category] += 1
        if counts[record.category] <= limit[record.category]:
            selected.append(record)
    return selected


def json_lines(path: PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file, line n", object) for each line of a JSONL file that is not blank; see `encodings.read_utf8`.

    Raises:
        InputError: the file is missing or damaged, or a line is not UTF-8, not JSON or not an object.
    """
    path = expand_path(path)
    yield from lines_of(path, encodings.read_utf8(path))


def lines_of(path: pathlib.Path, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """`json_lines` for a file whose bytes are already read. Raises InputError."""
    for number, line in enumerate(data.splitlines(), start=1):
        location = f"{path}, line {number}"
        try:
            line_text = line.decode("utf-8-sig")
            value = json.loads(line_text) if line_text.strip() else None
        except UnicodeDecodeError as error:
            raise InputError(f"{location}: not UTF-8 text ({error.reason}): save the file as UTF-8") from error
        except (ValueError, RecursionError) as error:  # also too many digits or too deep brackets
            raise InputError(f"{location}: not JSON ({error}): write one JSON object a line") from error
        if not line_text.strip():
            continue
        if not isinstance(value, dict):
            raise InputError(f"{location}: a JSON {type(value).__name__}, not an object: write one JSON object a line")
        yield location, value


def _files(path: PathLike, categories: Sequence[str]) -> list[pathlib.Path]:
    """The JSONL files of a path, a folder or "starter", in order.

    In a folder it skips hidden files and the files that this package's commands keep beside their results.
    """
    if path == STARTER:
        folder = pathlib.Path(str(importlib.resources.files("drirl_jax.data") / "starter"))
        return [file for name in categories if (file := folder / f"{file_name(name)}.jsonl").is_file()]
    path = expand_path(path)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if not file.is_dir() and encodings.kind(file) == ".jsonl"]
        files = [file for file in files if not file.name.startswith(".") and not is_replies_file(file)]
        if not files:
            raise InputError(f"no *.jsonl file in the folder {path}: check the path")
        return files
    return [path]


def _quoted(text: str) -> str:
    """The text as an error message may quote it: on one line, and shortened."""
    return repr(text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…")


def _record(
    fields: dict[str, Any], location: str, categories: Sequence[str], optional: Sequence[str], harmless: Sequence[str]
) -> Record:
    """The record of a JSON object; InputError if a field breaks the schema. Optional fields may be missing or empty."""
    present = {field: x for field, x in fields.items() if x is not None}  # other tools write null for a missing field
    fields = dict.fromkeys(optional, "") | Record._field_defaults | present
    for field in Record._fields:
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=1)
            hint = f" ({near[0]!r} is there: a slip?)" if near else ""
            raise InputError(f"{location}: the field {field!r} is missing{hint}: add it")
        if not isinstance(fields[field], str):
            kind = type(fields[field]).__name__
            raise InputError(f"{location}: the field {field!r} is of type {kind}: make it a string")
        if any("\ud800" <= c <= "\udfff" for c in fields[field]):
            raise InputError(f"{location}: the field {field!r} holds half a surrogate pair: write valid Unicode")
    record = Record(**{field: fields[field] for field in Record._fields})
    if record.category not in categories:
        near = difflib.get_close_matches(record.category[:MAX_QUOTED], categories, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"{location}: unknown category {_quoted(record.category)}: {hint}known are {', '.join(categories)}"
        )
    if record.split not in SPLITS:
        raise InputError(f"{location}: unknown split {_quoted(record.split)}: use one of {', '.join(SPLITS)}")
    for field in ("id", "prompt"):
        if field not in optional and not getattr(record, field).strip():
            raise InputError(f"{location}: the {field} is empty: write one or drop the line")
    may_lack_answer = "response" in optional or (record.split == "train" and record.category in harmless)
    if not record.response.strip() and not may_lack_answer:
        raise InputError(
            f"{location}: the demonstration (response) is empty, and only training prompts of harmless categories may "
            "lack one: write one or drop the line"
        )
    return record
