"""Converts other data sets of safety demonstrations to this package's schema (see `drirl_jax.data.records`).

    python -m drirl_jax.data.convert safety7 IN.jsonl OUT.jsonl [--max-words N]

safety7: prompts in seven harm categories with answers judged safe and unsafe, one object a line:
`{"id", "category", "lang", "split": "train" | "valid", "prompt", "safe": [{"text", ...}, ...], ...}`.
The shortest safe answer becomes the demonstration (long ones teach a reward model to read length), with an
empty draft; category and split are kept, and the language is added to the id so that several languages can
be read together. A prompt without a safe answer, or whose shortest one is longer than N words (a Chinese
character counts as a word), is left out and counted. Prints the number of demonstrations of each category.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
from typing import Any, Sequence

from drirl_jax.data.records import PathLike, Record, json_lines
from drirl_jax.types import InputError


def word_count(text: str) -> int:
    """The number of words; each Chinese character counts as one, Chinese punctuation as none."""
    return len(re.findall(r"[\u3400-\u9fff]|[^\s\u3000-\u303f\u3400-\u9fff\uff00-\uff20]+", text))


def safety7(source: PathLike, max_words: int | None = None) -> tuple[list[Record], collections.Counter[str]]:
    """The demonstrations of a safety7 file, and how many prompts were left out for each reason.

    Raises:
        InputError: the file is missing, or a line is not of its shape.
    """
    rows, left_out = [], collections.Counter()
    for where, value in json_lines(source):
        record, safe = _parse(value, where)
        if not safe:
            left_out["without a safe answer"] += 1
            continue
        response = min(safe, key=word_count)
        if max_words is not None and word_count(response) > max_words:
            left_out[f"with no safe answer of at most {max_words} words"] += 1
            continue
        rows.append(record._replace(response=response))
    return rows, left_out


def _parse(value: dict[str, Any], where: str) -> tuple[Record, list[str]]:
    """The record without its response, and the safe answers that are not blank."""
    try:
        fields = {field: value[field] for field in ("category", "lang", "split", "prompt")}
        record = Record(id=f"{value['id']}-{value['lang']}", draft="", response="", **fields)
        return record, [text for answer in value["safe"] if (text := answer["text"].strip())]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: not a safety7 record ({error!r}): see the module's docstring") from error


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m drirl_jax.data.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("format", choices=["safety7"], help="what IN is")
    parser.add_argument("source", metavar="IN.jsonl", type=pathlib.Path)
    parser.add_argument("target", metavar="OUT.jsonl", type=pathlib.Path)
    parser.add_argument("--max-words", type=int, help="leave out longer demonstrations")
    args = parser.parse_args(argv)
    try:
        rows, left_out = safety7(args.source, args.max_words)
    except InputError as error:
        parser.exit(1, f"error: {error}\n")
    lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows]
    args.target.parent.mkdir(parents=True, exist_ok=True)
    args.target.write_text("".join(lines), encoding="utf-8")
    for category, count in sorted(collections.Counter(row.category for row in rows).items()):
        print(f"{category}: {count}")
    for reason, count in left_out.items():
        print(f"left out {reason}: {count}")
    print(f"{len(rows)} demonstrations in {args.target}")


if __name__ == "__main__":
    main()
