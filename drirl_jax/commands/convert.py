"""Converts published data sets to this package's schema (see `drirl_jax.data.records`).

    python -m drirl_jax convert FORMAT SOURCE OUT.jsonl [--max-words N] [--category NAME]

FORMAT is a row of `published.PUBLISHED`; SOURCE a file as published, a folder of them, or a name on the hub, as
`beavertails PKU-Alignment/BeaverTails`, which takes the package `datasets`. Of each prompt the shortest safe answer
becomes the demonstration (long ones teach a reward model to read length), with an empty draft. A prompt's category is
the one of ours that most of its rows name. What is left out is counted, with the reason: no safe answer, none of at
most N words (a Chinese character counts as a word), no category of ours; --category takes those of the last kind into
NAME.
Splits are the data set's where it has ours; otherwise a prompt's text decides: about 8 of 10 train, 1 valid, 1 test.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from typing import Sequence

from drirl_jax.data import convert
from drirl_jax.data.published import PUBLISHED
from drirl_jax.runtime import console
from drirl_jax.runtime.files import expand_path, replace_file
from drirl_jax.types import InputError


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m drirl_jax convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("format", choices=PUBLISHED, help="what SOURCE is")
    parser.add_argument("source", metavar="SOURCE", help="a file, a folder, or a name on the hub")
    parser.add_argument("target", metavar="OUT.jsonl")
    parser.add_argument("--max-words", type=int, help="leave out longer demonstrations")
    parser.add_argument("--category", default="", help="of prompts whose category is none of ours")
    parser.error = lambda message: sys.exit(f"drirl_jax: {message}: see python -m drirl_jax convert --help")
    args = parser.parse_args(argv)
    try:
        target = expand_path(args.target)
        rows, left_out = convert.demonstrations(args.format, args.source, args.max_words, args.category, target)
        if not rows:
            why = "; ".join(f"left out {reason}: {count}" for reason, count in left_out.items())
            raise InputError(
                f"no demonstration in {args.source} ({why or 'it holds no rows'}): {target} is not written."
            )
        lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows]
        replace_file(target, "".join(lines))
    except InputError as error:
        sys.exit(f"drirl_jax: {error}")
    except OSError as error:
        sys.exit(f"drirl_jax: {error.filename}: {error.strerror}: take another place for the result.")
    for category, count in sorted(collections.Counter(row.category for row in rows).items()):
        print(f"{category}: {count}")
    for reason, count in left_out.items():
        print(console.printable(f"left out {reason}: {count}"))
    print(f"{len(rows)} demonstrations in {target}; terms of the data: {PUBLISHED[args.format].terms}")


if __name__ == "__main__":
    console.outlive_readers()
    main()
