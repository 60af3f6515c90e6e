"""What the commands share: flags, config files, exit codes, the last line of --log=json.

Nothing here loads jax before the flags are read, so that --help and a misspelt flag take no time.
"""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import sys
from functools import partial
from typing import Callable, NoReturn, Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from drirl_jax import config as config_lib
from drirl_jax.attacks import options as attack_options
from drirl_jax.commands import help_text
from drirl_jax.errors import InputError
from drirl_jax.runtime import console, keys
from drirl_jax.runtime.files import expand_path

INTERRUPTED = 128 + signal.SIGINT  # the exit code that shells use

CONFIG = config_flags.DEFINE_config_file("config", None, "A config file, or file:variant.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its checkpoints, metrics, model and report.")
DRY_RUN = flags.DEFINE_boolean(
    "dry_run", False, "Check everything and print the plan of the run; start and write nothing."
)
QUIET = flags.DEFINE_boolean("quiet", False, "Print only warnings and the result, no bars: the same as --log=quiet.")
LOG = flags.DEFINE_enum("log", "text", console.MODES, "Form of the output; json: one object a line on stdout.")
REPLAY = flags.DEFINE_string("replay", None, "Repeat only the step that a guard saved in this folder.")

# Flag of a file -> the defaults of its options.
OPTIONS_OF = {"config": config_lib.default, "options": attack_options.default}
# Errors of a file system -> what to do. Orbax and safetensors name them only in the error's text.
DISK = {
    errno.ENOSPC: "make room and start the same command again",
    errno.EDQUOT: "make room and start the same command again",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that can be read and written",
}


def run_command(
    do: Callable[[list[str]], None], *, resumes: bool = True, trains: bool = False, files: tuple = (CONFIG,)
) -> None:
    """Runs a command: parses its flags and config files, then calls `do` by `call`."""
    console.outlive_readers()
    app.run(lambda argv: call(argv, do, resumes=resumes, trains=trains), flags_parser=partial(parse, files=files))


def call(argv: list[str], do: Callable[[list[str]], None], *, resumes: bool = True, trains: bool = False) -> None:
    """Calls the command. On failure ends the process with an exit code of `drirl_jax.main`.

    Args:
        argv: the rest of the command line after the flags.
        do: the command's own part; raises InputError for wrong input of the user.
        resumes: whether the same command can resume its work; SIGTERM ends any other command at once.
        trains: whether it is `drirl_jax.main`, which alone knows --dry_run and --replay.
    """
    from drirl_jax.runtime import preemption  # it loads jax

    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax logs every file at INFO
    if resumes:
        signal.signal(signal.SIGTERM, preemption.raise_preempted)
    try:
        if not trains and (DRY_RUN.value or REPLAY.value):
            raise InputError("--dry_run and --replay are flags of drirl_jax.main: leave them out here.")
        do(argv)
    except InputError as error:
        exit_with(f"{error}")
    except preemption.Preempted as notice:
        exit_with(f"asked to end: {notice}; started again, it goes on", preemption.PREEMPTED)
    except KeyboardInterrupt:
        exit_with("interrupted" + "; started again, it goes on with what is kept" * resumes, INTERRUPTED)
    except Exception as error:
        sentence = disk_error(error)
        if sentence is None:
            raise
        exit_with(sentence)
    if console.mode() == "json":
        console.print_event("end", exit=0)


def disk_error(error: Exception) -> str | None:
    """The sentence for an error of the file system: what is wrong, and what to do. None for any other error."""
    workdir = WORKDIR.value
    if workdir and "://" not in workdir and isinstance(error, FileNotFoundError) and not expand_path(workdir).exists():
        return f"the workdir {workdir} was removed or moved meanwhile: put it back, and start again."
    for code, advice in DISK.items():
        if code == getattr(error, "errno", None) or os.strerror(code) in str(error):
            return f"{getattr(error, 'filename', None) or workdir}: {os.strerror(code)}: {advice}."
    return None


def require_flags(page: str | None, *given: flags.FlagHolder) -> None:
    """Raises InputError for the first of these flags that is missing, with the example of the command's page.

    Args:
        page: the docstring of the command's module; its first line that begins with "python -m" is the example.
        given: the flags that the command needs.
    """
    example = help_text.example(page or "")
    for flag in given:
        if flag.value is None:
            files = help_text.config_files(help_text.command_of(example)) if flag is CONFIG else {}
            raise missing_flag(flag.name, example + (f"; there are {', '.join(files)}." if files else ""))


def missing_flag(name: str, advice: str) -> InputError:
    """The error that says which flag is missing, with an example or the values that it can have."""
    return InputError(f"--{name} is missing: {advice}")


def exit_with(sentence: str, code: int = 1) -> NoReturn:
    """Prints the sentence and ends the process with this exit code."""
    if console.mode() == "json":
        console.print_event("end", exit=code, message=sentence)
    if code == 1:
        sys.exit(f"drirl_jax: {sentence}")
    print(f"drirl_jax: {sentence}", file=sys.stderr)
    sys.exit(code)


def _home_in_full(argument: str, files: tuple) -> str:
    """The argument; if it names a config file, with ~ expanded. absl itself reads config files while it parses."""
    name, _, value = argument.partition("=")
    is_file = name.lstrip("-") in {file.name for file in files} and value.startswith("~")
    return f"{name}={expand_path(value)}" if is_file else argument


def parse(argv: list[str], *, files: tuple = (CONFIG,)) -> list[str]:
    """Parses absl's flags, with those of config files. A wrong flag ends the process with one sentence."""
    if {"--help", "-help", "-h", "-?"} & set(argv[1:]):
        print(help_text.usage(pathlib.Path(sys.argv[0]).stem))
        sys.exit(0)
    from drirl_jax.runtime import processes  # it loads jax

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
        message = " ".join(str(error).split())
        exit_with(unknown_option(argv, message) or f"the config or a --config flag is wrong: {message}")


def unknown_option(argv: Sequence[str], message: str) -> str | None:
    """The sentence for the first flag that names no option of a config; None if each names one.

    Args:
        argv: the command line.
        message: the error of ml_collections. It quotes the part of the key that does not exist.
    """
    for argument in argv[1:]:
        file, _, key = argument.lstrip("-").partition("=")[0].partition(".")
        if file in OPTIONS_OF and key:
            option, known = (
                key.removeprefix("base."),
                list(keys.dotted(OPTIONS_OF[file]())),
            )  # a study's config has base
            if option not in known and any(part in message for part in key.split(".")):
                return f"--{file}.{key}: there is no such option: {keys.advice(option, known)}"
    return None
