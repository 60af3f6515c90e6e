"""Writes the report of a run again, or compares several runs.

python -m drirl_jax report RUN                    writes RUN/report.html
python -m drirl_jax report --compare RUN RUN ...  writes compared/compare.html and compare.md beside the first

RUN is a run's workdir, finished or not: the report leaves out what the run does not hold yet. Runs can be compared if
they were evaluated on some prompts of the first.
"""

from __future__ import annotations

import argparse
import sys
from typing import Sequence

from drirl_jax.reports import compare, single
from drirl_jax.reports.pages import read
from drirl_jax.runtime import console
from drirl_jax.runtime.files import expand_path
from drirl_jax.types import InputError


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m drirl_jax report", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", help="workdir of the run")
    others = "workdirs of several; the first is the one that the others are compared with"
    parser.add_argument("--compare", nargs="+", metavar="RUN", help=others)
    parser.add_argument("--out", help="where the comparison goes; else compared/ beside the first run")
    parser.error = lambda message: sys.exit(f"drirl_jax: {message}: python -m drirl_jax report runs/quickstart")
    given = parser.parse_args(argv)
    try:
        if (given.run is None) == (given.compare is None):
            raise InputError("give RUN, or --compare RUN RUN ...: see python -m drirl_jax report --help.")
        if given.run:
            console.print_result(f"report: {single.report(read(expand_path(given.run)))}")
        else:
            runs = [expand_path(name) for name in given.compare]
            out = expand_path(given.out) if given.out else runs[0].parent / "compared"
            console.print_result(compare.compare([read(workdir) for workdir in runs], out))
    except InputError as error:
        sys.exit(f"drirl_jax: {error}")


if __name__ == "__main__":
    console.outlive_readers()
    main()
