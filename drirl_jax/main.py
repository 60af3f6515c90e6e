"""python -m drirl_jax.main --config configs/quickstart.py --workdir runs/quickstart [--config.align.steps=10]

    ... --dry_run                       # checks all, tells steps, shapes, memory and time; starts nothing
    ... --config.data.path=mine.jsonl   # any option of drirl_jax/config.py is a flag
    ... --quiet                         # warnings and the result alone
    ... --log=json                      # one JSON object a line on stdout, for scripts
    python -m drirl_jax.status runs/quickstart      # where a run is, and how long it will take

The same command again goes on where the run was. Exit codes:

    0    all is done
    1    what you gave is wrong, or a guard has stopped the run: one sentence says what to do; a traceback is a bug
    75   asked to end by SIGTERM: started again, it goes on
    130  interrupted (Ctrl-C): started again, it goes on from its last checkpoint
"""

from __future__ import annotations

import errno
import importlib
import os
import pathlib
import pkgutil
import signal
import sys
from typing import Callable

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

import drirl_jax.configs
from drirl_jax import bucket, console, preview, process, sharding, train
from drirl_jax.types import InputError

INTERRUPTED = 128 + signal.SIGINT  # as a shell says it

CONFIG = config_flags.DEFINE_config_file("config", None, "A config file, or file:variant.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its checkpoints, metrics, model and report.")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Check all and print the plan of the run; start and write nothing.")
QUIET = flags.DEFINE_boolean("quiet", False, "No bars, only warnings and the result: the same as --log=quiet.")
LOG = flags.DEFINE_enum("log", "text", console.MODES, "How to speak; json: one object a line on stdout, for scripts.")
REPLAY = flags.DEFINE_string("replay", None, "Run only the step that a guard has kept in this folder.")

# Of a file system, not of the program: what to do about them. Orbax and safetensors tell of them in words alone.
DISK = {
    errno.ENOSPC: "make room and start the same command again",
    errno.EDQUOT: "make room and start the same command again",
    errno.EROFS: "take a place that can be written",
    errno.EACCES: "take a place that can be read and written",
}


def main(argv: list[str], do: Callable[[list[str]], None] | None = None) -> None:
    """Does this, `run` if nothing is named, and ends the process with the exit code of how it went."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells of every file at INFO
    signal.signal(signal.SIGTERM, process.leave)
    try:
        (do or run)(argv)
    except InputError as error:
        leave(f"{error}")
    except process.Preempted as notice:
        leave(f"asked to end: {notice}; started again, it goes on", process.PREEMPTED)
    except KeyboardInterrupt:
        leave("interrupted; started again, it goes on from its last checkpoint", INTERRUPTED)
    except Exception as error:
        disk = [code for code in DISK if code == getattr(error, "errno", None) or os.strerror(code) in str(error)]
        if not disk:
            raise
        where = getattr(error, "filename", None) or WORKDIR.value
        leave(f"{where}: {os.strerror(disk[0])}: {DISK[disk[0]]}.")
    if console.mode() == "json":
        console.say("end", exit=0)


def run(argv: list[str]) -> None:
    """The run, its plan or the one step that the flags ask for. Raises InputError."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: options are written --name=value.")
    if CONFIG.value is None:
        raise InputError(f"--config is missing: {__doc__.splitlines()[0]}; there are {', '.join(config_files())}.")
    if WORKDIR.value is None:
        raise InputError(f"--workdir is missing: {__doc__.splitlines()[0]}")
    workdir = bucket.path(WORKDIR.value)
    if REPLAY.value:
        train.replay(CONFIG.value, workdir, bucket.path(REPLAY.value))
    elif DRY_RUN.value:
        found = preview.of(CONFIG.value, bucket.folder(WORKDIR.value))
        if sharding.writes():
            console.result(preview.text(found), **found)
    else:
        train.run(CONFIG.value, workdir)


def leave(sentence: str, code: int = 1) -> None:
    """Ends the process with this code, after the sentence that says why."""
    if console.mode() == "json":
        console.say("end", exit=code, message=sentence)
    if code == 1:
        sys.exit(f"drirl_jax: {sentence}")
    print(f"drirl_jax: {sentence}", file=sys.stderr)
    sys.exit(code)


def config_files() -> dict[str, str]:
    """The config files that come along, as --config takes them here: path -> name."""
    folder = pathlib.Path(drirl_jax.configs.__path__[0])
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]))
    here = pathlib.Path("configs")
    return {str((here if (here / f"{name}.py").exists() else folder) / f"{name}.py"): name for name in names}


def usage() -> str:
    """What --help prints: the command's own page, the config files with their variants, the flags."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Config files:"]
    for path, name in config_files().items():
        module = importlib.import_module(f"drirl_jax.configs.{name}")
        lines.append(f"    {path}: {module.__doc__.splitlines()[0]}")
        if parts := getattr(module, "PARTS", None):
            lines.append(f"        variants, as {path}:{next(iter(parts))}: {', '.join(parts)}")
    known = flags.FLAGS.flags_by_module_dict()
    modules = [module for module in (sys.argv[0], "drirl_jax.main") if module in known]
    return "\n".join([*lines, "", *(flags.FLAGS.module_help(module) for module in modules)])


def parse(argv: list[str], *, files: tuple = (CONFIG,)) -> list[str]:
    """Absl's flags, config files among them; what is wrong with them is one sentence, as everywhere."""
    if {"--help", "-help", "-h", "-?"} & set(argv[1:]):
        print(usage())
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
        for file in files:
            if file.value is not None:
                file.value.lock()  # a file that failed to load says so when it is first touched
        console.speak("quiet" if QUIET.value else LOG.value)
        process.keep_memory()
        return rest
    except flags.Error as error:  # of a config file that raises, the whole traceback
        sys.exit(f"drirl_jax: {str(error).strip().splitlines()[-1]}")
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        sys.exit(f"drirl_jax: the config or a --config flag is wrong: {' '.join(str(error).split())}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
