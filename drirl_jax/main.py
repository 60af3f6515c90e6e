"""python -m drirl_jax.main --config configs/quickstart.py --workdir runs/quickstart [--config.align.steps=10]

    ... --dry_run                       # checks everything, prints steps, shapes, memory and time; starts nothing
    ... --config.data.path=mine.jsonl   # any option of drirl_jax/config.py is a flag
    ... --quiet                         # prints only warnings and the result
    ... --log=json                      # prints one JSON object a line on stdout, for scripts
    python -m drirl_jax status runs/quickstart      # where a run is, and how long it will take

The same command again resumes the run. Exit codes:

    0    all is done
    1    your input is wrong, or a guard has stopped the run: one sentence says what to do; a traceback is a bug
    75   ended by SIGTERM: the same command resumes the run
    130  interrupted (Ctrl-C): the same command resumes the run from its last checkpoint
"""

from __future__ import annotations

import errno
import importlib
import os
import pathlib
import pkgutil
import signal
import sys
from functools import partial
from types import ModuleType
from typing import Callable, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

import drirl_jax.configs
from drirl_jax import checks, train
from drirl_jax.costs import dry_run
from drirl_jax.runtime import bucket, console, preemption, processes
from drirl_jax.runtime.files import expand_path
from drirl_jax.types import InputError

INTERRUPTED = 128 + signal.SIGINT  # the exit code that shells use

CONFIG = config_flags.DEFINE_config_file("config", None, "A config file, or file:variant.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its checkpoints, metrics, model and report.")
DRY_RUN = flags.DEFINE_boolean(
    "dry_run", False, "Check everything and print the plan of the run; start and write nothing."
)
QUIET = flags.DEFINE_boolean("quiet", False, "Print only warnings and the result, no bars: the same as --log=quiet.")
LOG = flags.DEFINE_enum("log", "text", console.MODES, "Form of the output; json: one object a line on stdout.")
REPLAY = flags.DEFINE_string("replay", None, "Repeat only the step that a guard saved in this folder.")

# Errors of a file system -> what to do. Orbax and safetensors name them only in the error's text.
DISK = {
    errno.ENOSPC: "make room and start the same command again",
    errno.EDQUOT: "make room and start the same command again",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that can be read and written",
}


def run_command(do: Callable[[list[str]], None], resumes: bool = True, files: tuple = (CONFIG,)) -> None:
    """Runs a command: parses its flags and config files, then calls `main`."""
    console.outlive_readers()
    app.run(lambda argv: main(argv, do, resumes), flags_parser=partial(parse, files=files))


def main(argv: list[str], do: Callable[[list[str]], None] | None = None, resumes: bool = True) -> None:
    """Calls `do`, or `run` if it is None. On failure ends the process with one of the exit codes above.

    Args:
        argv: the rest of the command line after the flags.
        do: the command's own part; raises InputError for wrong input of the user.
        resumes: whether the same command can resume its work; SIGTERM ends any other command at once.
    """
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax logs every file at INFO
    if resumes:
        signal.signal(signal.SIGTERM, preemption.raise_preempted)
    try:
        if do and (DRY_RUN.value or REPLAY.value):
            raise InputError("--dry_run and --replay are flags of drirl_jax.main: leave them out here.")
        (do or run)(argv)
    except InputError as error:
        exit_with(f"{error}")
    except preemption.Preempted as notice:
        exit_with(f"asked to end: {notice}; started again, it goes on", preemption.PREEMPTED)
    except KeyboardInterrupt:
        exit_with("interrupted" + "; started again, it goes on with what is kept" * resumes, INTERRUPTED)
    except Exception as error:
        if WORKDIR.value and "://" not in WORKDIR.value and isinstance(error, FileNotFoundError):
            if not expand_path(WORKDIR.value).exists():
                exit_with(f"the workdir {WORKDIR.value} was removed or moved meanwhile: put it back, and start again.")
        codes = [code for code in DISK if code == getattr(error, "errno", None) or os.strerror(code) in str(error)]
        if not codes:
            raise
        path = getattr(error, "filename", None) or WORKDIR.value
        exit_with(f"{path}: {os.strerror(codes[0])}: {DISK[codes[0]]}.")
    if console.mode() == "json":
        console.print_event("end", exit=0)


def run(argv: list[str]) -> None:
    """Starts the run, prints its plan (--dry_run) or repeats one step (--replay). Raises InputError."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: options are written --name=value.")
    if CONFIG.value is None:
        raise InputError(f"--config is missing: {__doc__.splitlines()[0]}; there are {', '.join(config_files())}.")
    if WORKDIR.value is None:
        raise InputError(f"--workdir is missing: {__doc__.splitlines()[0]}")
    checks.refuse_ignored(CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"]))
    workdir = bucket.parse_path(WORKDIR.value)
    if REPLAY.value:
        train.replay(CONFIG.value, workdir, bucket.parse_path(REPLAY.value))
    elif DRY_RUN.value:
        plan = dry_run.plan_run(CONFIG.value, bucket.local_folder(WORKDIR.value))
        if processes.is_writer():
            console.print_result(dry_run.text(plan), **plan)
    else:
        train.run(CONFIG.value, workdir)


def exit_with(sentence: str, code: int = 1) -> NoReturn:
    """Prints the sentence and ends the process with this exit code."""
    if console.mode() == "json":
        console.print_event("end", exit=code, message=sentence)
    if code == 1:
        sys.exit(f"drirl_jax: {sentence}")
    print(f"drirl_jax: {sentence}", file=sys.stderr)
    sys.exit(code)


def config_files(command: str = "main") -> dict[str, ModuleType]:
    """The config files that come along and name this command in their docstring: path, as --config takes it here ->
    module."""
    folder = pathlib.Path(drirl_jax.configs.__path__[0])
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]))
    here, found = pathlib.Path("configs"), {}
    for name in names:
        module = importlib.import_module(f"drirl_jax.configs.{name}")
        page, dot = module.__doc__ or "", "." if command == "main" else " "
        if f"python -m drirl_jax{dot}{command} " in page:
            found[str((here if (here / f"{name}.py").exists() else folder) / f"{name}.py")] = module
    return found


def usage() -> str:
    """The text of --help: the command's own page, the config files with their variants, the flags."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Config files:"]
    for path, module in (config_files(pathlib.Path(sys.argv[0]).stem) or config_files()).items():
        lines.append(f"    {path}: {module.__doc__.splitlines()[0]}")
        if parts := getattr(module, "PARTS", None):
            lines.append(f"        variants, as {path}:{next(iter(parts))}: {', '.join(parts)}")
    flags_by_module = flags.FLAGS.flags_by_module_dict()
    modules = [module for module in (sys.argv[0], "drirl_jax.main") if module in flags_by_module]
    return "\n".join([*lines, "", *(flags.FLAGS.module_help(module) for module in modules)])


def _home_in_full(argument: str, files: tuple) -> str:
    """The argument; if it names a config file, with ~ expanded. absl itself reads config files while it parses."""
    name, _, value = argument.partition("=")
    is_file = name.lstrip("-") in {file.name for file in files} and value.startswith("~")
    return f"{name}={expand_path(value)}" if is_file else argument


def parse(argv: list[str], *, files: tuple = (CONFIG,)) -> list[str]:
    """Parses absl's flags, with those of config files. A wrong flag ends the process with one sentence."""
    if {"--help", "-help", "-h", "-?"} & set(argv[1:]):
        print(usage())
        sys.exit(0)
    try:
        remaining = flags.FLAGS([_home_in_full(argument, files) for argument in argv])
        console.set_mode("quiet" if QUIET.value else LOG.value)
        for file in files:
            if file.value is not None:
                file.value.lock()  # a file that failed to load raises its error at the first access
        processes.keep_freed_memory()
        return remaining
    except flags.Error as error:  # its text is the whole traceback where a config file raises
        exit_with(str(error).strip().splitlines()[-1])
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        exit_with(f"the config or a --config flag is wrong: {' '.join(str(error).split())}")


if __name__ == "__main__":
    console.outlive_readers()
    app.run(main, flags_parser=parse)
