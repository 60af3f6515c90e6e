"""Converts published data sets to this package's schema (see `drirl_jax.data.records`).

    python -m drirl_jax convert FORMAT SOURCE OUT.jsonl [--max-words N] [--category NAME]

FORMAT is a key of `published.PUBLISHED`. SOURCE is a published file, a folder of such files, or a name on the hub, as
in `beavertails PKU-Alignment/BeaverTails`; the hub needs the package `datasets`.

The shortest safe answer to a prompt becomes its demonstration, with an empty draft: long demonstrations teach a reward
model to judge by length. A prompt gets the category of ours that most of its rows name.

The command counts the prompts that it leaves out, with the reason: no safe answer, no safe answer of at most N words (a
Chinese character counts as a word), or no category of ours. With --category NAME, prompts without a category of ours
are kept, as category NAME.

The splits are the data set's if it has the same ones. Otherwise the hash of a prompt's text decides: about 8 of 10 go
to train, 1 to valid, 1 to test.
"""

from __future__ import annotations

import collections
import json
import sys
from typing import Sequence

from drirl_jax.commands.arguments import Parser
from drirl_jax.data.published import PUBLISHED
from drirl_jax.errors import InputError
from drirl_jax.runtime import console
from drirl_jax.runtime.files import expand_path, replace_file


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and writes the demonstrations."""
    parser = Parser("convert", __doc__, "see python -m drirl_jax convert --help")
    parser.add_argument("format", choices=PUBLISHED, help="the data set that SOURCE holds")
    parser.add_argument("source", metavar="SOURCE", help="a file, a folder, or a name on the hub")
    parser.add_argument("target", metavar="OUT.jsonl")
    parser.add_argument("--max-words", type=int, help="leave out longer answers")
    parser.add_argument("--category", default="", help="category for prompts that have none of ours")
    args = parser.parse_args(argv)
    from drirl_jax.data import convert  # it loads jax, which --help does not need

    try:
        target = expand_path(args.target)
        rows, left_out_counts = convert.demonstrations(args.format, args.source, args.max_words, args.category, target)
        if not rows:
            reasons = "; ".join(f"left out {reason}: {count}" for reason, count in left_out_counts.items())
            raise InputError(
                f"no demonstration in {args.source} ({reasons or 'it holds no rows'}): {target} is not written."
            )
        lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows]
        replace_file(target, "".join(lines))
    except InputError as error:
        sys.exit(f"drirl_jax: {error}")
    except OSError as error:
        sys.exit(f"drirl_jax: {error.filename}: {error.strerror}: take another place for the result.")
    for category, count in sorted(collections.Counter(row.category for row in rows).items()):
        print(f"{category}: {count}")
    for reason, count in left_out_counts.items():
        print(console.printable(f"left out {reason}: {count}"))
    print(f"{len(rows)} demonstrations in {target}; terms of the data: {PUBLISHED[args.format].terms}")


if __name__ == "__main__":
    console.outlive_readers()
    main()
