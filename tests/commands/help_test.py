"""--help: every flag and every option of the config, read from the sources within two seconds."""

import importlib
import importlib.util
import resource
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from drirl_jax import __main__ as commands
from drirl_jax import config as config_lib
from drirl_jax import train  # noqa: F401  so that a command's file, run once more below, finds its imports loaded
from drirl_jax.attacks import options as attack_options
from drirl_jax.commands import cli, help_text, source  # noqa: F401

BY_ABSL = sorted(commands.COMMANDS.keys() - set(commands.OWN_HELP))
DEFINITIONS = ("DEFINE_string", "DEFINE_boolean", "DEFINE_integer", "DEFINE_list", "DEFINE_enum")


def keys(config, prefix=""):
    """Every dotted key of a config, sections too."""
    for name, value in config.items():
        yield f"{prefix}{name}"
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{name}.")


@pytest.mark.parametrize(
    "module, make", [("drirl_jax.config", config_lib.default), ("drirl_jax.attacks.options", attack_options.default)]
)
def test_every_option_and_section_has_a_meaning(module, make):
    meanings = source.module(module).meanings()
    assert set(meanings) == set(keys(make()))
    assert not [key for key, meaning in meanings.items() if not meaning]


def test_the_help_has_every_option_with_its_default_and_meaning():
    page = " ".join(help_text.usage("train").split())
    meanings, config = source.module("drirl_jax.config").meanings(), config_lib.default()
    for key in keys(config):
        value = config_lib.get_option(config, key)
        if isinstance(value, ConfigDict):
            shown = f" config.{key}: "
        else:
            shown = f" --config.{key} " if value is None else f" --config.{key}={help_text.written(value)} "
        assert shown + " ".join(meanings[key].split()) in page, key


def defined_flags(module, monkeypatch):
    """Name, default and meaning of the flags that a module defines, by running it with absl's functions replaced."""
    defined = []

    def define(name, default, *rest, **options):
        defined.append((name, default, rest[-1]))

    with monkeypatch.context() as patch:
        for owner, name in [*((flags, name) for name in DEFINITIONS), (config_flags, "DEFINE_config_file")]:
            patch.setattr(
                owner, name, lambda name, default, *rest, **options: defined.append((name, default, rest[-1]))
            )
        spec = importlib.util.find_spec(module)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return defined


@pytest.mark.parametrize("module", ["cli", *(name for name in BY_ABSL if name != "train")])
def test_flags_read_from_the_source_are_those_that_are_defined(module, monkeypatch):
    read = [flag[:3] for flag in source.module(f"drirl_jax.commands.{module}").flags()]
    assert read == defined_flags(f"drirl_jax.commands.{module}", monkeypatch)
    assert bool(read) == (module != "study")


@pytest.mark.parametrize("command", BY_ABSL)
def test_each_command_shows_its_own_flags_and_the_config_where_it_reads_one(command):
    page = help_text.usage(command)
    assert ("\n  --replay\n" in page) == (command == "train") and "\n  --workdir\n" in page
    prefix = "config.base" if command == "study" else "config"
    assert (f"\n  --{prefix}.align.steps=50\n" in page) == (command != "score")
    assert ("\n  --options.gcg.steps=500\n" in page) == (command == "attack")


def test_a_comment_above_and_one_behind_are_one_meaning(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "def inner():\n"
        '    """A part.\n\n    More."""\n'
        "    c.b1, c.b2 = 1, 2  # both\n"
        "def default():\n"
        "    # above, in\n"
        "    # two lines\n"
        "    c.a = 1  # behind\n"
        "    # for none\n\n"
        "    c.bare = 2\n"
        '    c.text = "# no comment"\n'
        "    c.part = inner()\n"
        "    c.other = inner()  # named\n"
    )
    assert source.Source(path).meanings() == {
        "a": "above, in two lines. behind",
        "part": "A part.", "part.b1": "both", "part.b2": "both",
        "other": "named", "other.b1": "both", "other.b2": "both",
    }  # fmt: skip


@pytest.mark.parametrize("arguments", [["drirl_jax.main"], *(["drirl_jax", name] for name in commands.COMMANDS)])
def test_help_needs_no_jax_and_no_two_seconds(arguments):
    run = "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('jax' in sys.modules, file=sys.stderr)); "
        f"sys.argv = {[*arguments, '--help']}; {run}"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "False\n") and "--" in done.stdout
    # Of the processor, which other work on the machine does not change.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
