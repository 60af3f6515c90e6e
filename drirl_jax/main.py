"""python -m drirl_jax.main --config configs/quickstart.py --workdir runs/quickstart [--config.align.steps=10]

Exits with 0 when all is done, 1 with one sentence for what the user must change, and 75 when it was asked to end by
SIGTERM: started again, it goes on.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from drirl_jax import bucket, process, train
from drirl_jax.types import InputError

CONFIG = config_flags.DEFINE_config_file("config", None, "A config file, or file:variant.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its checkpoints, metrics, model and report.")
REPLAY = flags.DEFINE_string("replay", None, "Run only the step that a guard has kept in this folder.")

# Of a file system, not of the program: what to do about them. Orbax and safetensors tell of them in words alone.
DISK = {
    errno.ENOSPC: "make room and start the same command again",
    errno.EDQUOT: "make room and start the same command again",
    errno.EROFS: "take a place that can be written",
    errno.EACCES: "take a place that can be read and written",
}


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells of every file at INFO
    logging.getLogger("drirl_jax").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, process.leave)
    try:
        if len(argv) > 1:
            raise InputError(f"unexpected argument {argv[1]!r}: options are written --name=value.")
        for flag in (CONFIG, WORKDIR):
            if flag.value is None:
                raise InputError(f"--{flag.name} is missing: {__doc__.splitlines()[0]}")
        workdir = bucket.path(WORKDIR.value)
        if REPLAY.value:
            train.replay(CONFIG.value, workdir, bucket.path(REPLAY.value))
        else:
            train.run(CONFIG.value, workdir)
    except InputError as error:
        sys.exit(f"drirl_jax: {error}")
    except process.Preempted as notice:
        logging.getLogger(__name__).warning("drirl_jax: asked to end: %s; started again, it goes on", notice)
        sys.exit(process.PREEMPTED)
    except Exception as error:
        disk = [code for code in DISK if code == getattr(error, "errno", None) or os.strerror(code) in str(error)]
        if not disk:
            raise
        where = getattr(error, "filename", None) or WORKDIR.value
        sys.exit(f"drirl_jax: {where}: {os.strerror(disk[0])}: {DISK[disk[0]]}.")


def parse(argv: list[str], *, files: tuple = (CONFIG,)) -> list[str]:
    """Absl's flags, config files among them; what is wrong with them is one sentence, as everywhere."""
    try:
        rest = flags.FLAGS(argv)
        for file in files:
            if file.value is not None:
                file.value.lock()  # a file that failed to load says so when it is first touched
        return rest
    except flags.Error as error:  # of a config file that raises, the whole traceback
        sys.exit(f"drirl_jax: {str(error).strip().splitlines()[-1]}")
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        sys.exit(f"drirl_jax: the config or a --config flag is wrong: {' '.join(str(error).split())}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
