"""Prints how far a run is. It only reads the run's workdir.

python -m drirl_jax status runs/quickstart          # a few lines
python -m drirl_jax status runs/quickstart --json   # one JSON object, for scripts
"""

from __future__ import annotations

import json
import sys

from drirl_jax.commands.arguments import Parser
from drirl_jax.reports import status
from drirl_jax.runtime import console
from drirl_jax.runtime.files import expand_path


def main(argv: list[str]) -> None:
    parser = Parser("status", __doc__, "python -m drirl_jax status runs/quickstart")
    parser.add_argument("run", help="the workdir of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    try:
        run_state = status.run_status(expand_path(options.run))
    except ValueError as error:
        sys.exit(f"drirl_jax: {error}")
    print(json.dumps(run_state) if options.json else status.text(run_state))


if __name__ == "__main__":
    console.outlive_readers()
    main(sys.argv[1:])
