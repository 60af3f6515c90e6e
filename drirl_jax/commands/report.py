"""Writes the report of a run, or compares several runs.

python -m drirl_jax report RUN                    writes RUN/report.html
python -m drirl_jax report --compare RUN RUN ...  writes compared/compare.html and compare.md beside the first

RUN is the workdir of a run, finished or not. The report leaves out what the run does not have yet. Runs can be compared
with the first if they were evaluated on some of the same prompts.
"""

from __future__ import annotations

import sys
from typing import Sequence

from drirl_jax.commands.arguments import Parser
from drirl_jax.errors import InputError
from drirl_jax.runtime import console
from drirl_jax.runtime.files import expand_path


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("report", __doc__, "python -m drirl_jax report runs/quickstart")
    parser.add_argument("run", nargs="?", help="workdir of the run")
    compare_help = "workdirs of several runs; the others are compared with the first"
    parser.add_argument("--compare", nargs="+", metavar="RUN", help=compare_help)
    parser.add_argument("--out", help="folder of the comparison; default: compared/ beside the first run")
    options = parser.parse_args(argv)
    from drirl_jax.reports import compare, single  # they load jax, which --help does not need
    from drirl_jax.reports.pages import load_run

    try:
        if (options.run is None) == (options.compare is None):
            raise InputError("give RUN, or --compare RUN RUN ...: see python -m drirl_jax report --help.")
        if options.run:
            console.print_result(f"report: {single.report(load_run(expand_path(options.run)))}")
        else:
            runs = [expand_path(name) for name in options.compare]
            out = expand_path(options.out) if options.out else runs[0].parent / "compared"
            console.print_result(compare.compare([load_run(workdir) for workdir in runs], out))
    except InputError as error:
        sys.exit(f"drirl_jax: {error}")


if __name__ == "__main__":
    console.outlive_readers()
    main()
