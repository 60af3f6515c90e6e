"""python -m drirl_jax.main --config configs/quickstart.py --workdir runs/quickstart [--config.align.steps=10]"""

from __future__ import annotations

import logging
import pathlib
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from drirl_jax import train
from drirl_jax.types import InputError

CONFIG = config_flags.DEFINE_config_file("config", None, "A config file, or file:variant.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its checkpoints, metrics, model and report.")


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells of every file at INFO
    logging.getLogger("drirl_jax").setLevel(logging.INFO)
    try:
        if len(argv) > 1:
            raise InputError(f"unexpected argument {argv[1]!r}: options are written --name=value.")
        for flag in (CONFIG, WORKDIR):
            if flag.value is None:
                raise InputError(f"--{flag.name} is missing: {__doc__}")
        if "://" in WORKDIR.value:
            raise InputError(
                f"--workdir is {WORKDIR.value}: buckets are not supported yet, mount it and give its path."
            )
        train.run(CONFIG.value, pathlib.Path(WORKDIR.value))
    except InputError as error:
        sys.exit(f"drirl_jax: {error}")


def parse(argv: list[str]) -> list[str]:
    """Absl's flags, the config file among them; what is wrong with them is one sentence, as everywhere."""
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is not None:
            CONFIG.value.lock()  # a file that failed to load says so when it is first touched
        return rest
    except flags.Error as error:  # of a config file that raises, the whole traceback
        sys.exit(f"drirl_jax: {str(error).strip().splitlines()[-1]}")
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        sys.exit(f"drirl_jax: the config or a --config flag is wrong: {' '.join(str(error).split())}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
