"""The text of a command's --help: its page, the config files, its flags, and every option of the config."""

from __future__ import annotations

import json
import pathlib
import pkgutil
import re
import shlex
import textwrap
from typing import Any, Iterator

from ml_collections import ConfigDict

import drirl_jax.configs
from drirl_jax import config as config_lib
from drirl_jax.attacks import options as attack_options
from drirl_jax.commands import source

WIDTH = 110
TRAINING_ONLY = ("dry_run", "replay")  # flags that only `drirl_jax.main` knows


def usage(command: str) -> str:
    """The text of --help of a command whose flags are absl's; "main" is the training command."""
    name = "main" if command == "train" else command
    module = source.module("drirl_jax.main" if name == "main" else f"drirl_jax.commands.{name}")
    reads_config = "--config" in module.docstring
    hidden = (() if name == "main" else TRAINING_ONLY) + (() if reads_config else ("config",))
    shared = [flag for flag in source.module("drirl_jax.commands.cli").flags() if flag.name not in hidden]
    lines = [module.docstring, "", "Config files:", *_config_file_lines(name), "", "Flags:"]
    for flag in [*module.flags(), *shared]:
        lines += _row(f"--[no]{flag.name}" if flag.is_switch else f"--{flag.name}", flag.default, flag.meaning)
    if reads_config:
        lines += ["", "Options of a config. The defaults are those of drirl_jax/config.py; a config file changes some:"]
        prefix = "config.base" if name == "study" else "config"  # a study's config holds that of its runs
        lines += options(prefix, config_lib.default(), source.module("drirl_jax.config").meanings())
    if name == "attack":
        lines += ["", "Options of a file for --options. The defaults are those of drirl_jax/attacks/options.py:"]
        lines += options("options", attack_options.default(), source.module("drirl_jax.attacks.options").meanings())
    return "\n".join(lines)


def options(prefix: str, config: ConfigDict, meanings: dict[str, str]) -> Iterator[str]:
    """Yields lines with every option of a config: its flag with the default, and its meaning.

    Args:
        prefix: of the flags, such as "config".
        config: the defaults.
        meanings: by dotted key in the order of the lines, from `source.Source.meanings`.
    """
    places = {name: place for place, name in enumerate(meanings)}

    def place(name: str) -> tuple[bool, int]:  # a section's own options come before its inner sections
        return isinstance(config[name], ConfigDict), places.get(name, len(places))

    for name in sorted(config, key=place):
        value = config[name]
        if isinstance(value, ConfigDict):
            inner = {key.partition(".")[2]: text for key, text in meanings.items() if key.startswith(f"{name}.")}
            yield ""
            yield from _wrapped(f"{prefix}.{name}: {meanings.get(name, '')}", "  ")
            yield from options(f"{prefix}.{name}", value, inner)
        else:
            yield from _row(f"--{prefix}.{name}", value, meanings.get(name, ""))


def _row(flag: str, default: Any, meaning: str) -> list[str]:
    """The lines of one flag. The default is written as a shell takes it; a flag without a default has none."""
    assignment = flag if default is None or flag.startswith("--[no]") else f"{flag}={written(default)}"
    return [f"  {assignment}", *_wrapped(meaning, " " * 6)]


def written(value: Any) -> str:
    """A value as it is written behind --name= in a shell."""
    if isinstance(value, tuple):
        comma = "," if len(value) == 1 else ""
        return shlex.quote(f"({', '.join(map(json.dumps, value))}{comma})")
    return shlex.quote(",".join(value) if isinstance(value, list) else str(value))


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _config_file_lines(command: str) -> Iterator[str]:
    """Yields a line for each config file of a command, and one for its variants; all files if none names it."""
    for path, module in (config_files(command) or config_files()).items():
        yield f"  {path}: {module.docstring.splitlines()[0]}"
        if parts := module.table("PARTS"):
            yield f"      variants, as {path}:{next(iter(parts))}: {', '.join(parts)}"


def config_files(command: str = "main") -> dict[str, source.Source]:
    """The config files that come along and name this command in their docstring: path, as --config takes it here ->
    source."""
    folder, here = pathlib.Path(drirl_jax.configs.__path__[0]), pathlib.Path("configs")
    by_path = {}
    for name in sorted(module.name for module in pkgutil.iter_modules([str(folder)])):
        module = source.module(f"drirl_jax.configs.{name}")
        if f"python -m drirl_jax{'.' if command == 'main' else ' '}{command} " in module.docstring:
            by_path[str((here if (here / f"{name}.py").exists() else folder) / f"{name}.py")] = module
    return by_path


def example(page: str) -> str:
    """The first command line in a page; "" if it has none."""
    return next((line.strip() for line in page.splitlines() if "python -m drirl_jax" in line), "")


def command_of(line: str) -> str:
    """The command of a command line, such as "bench"; "main" is the training command; "" if it names none."""
    match = re.search(r"python -m drirl_jax[. ](\w+)", line)
    return match[1] if match else ""
