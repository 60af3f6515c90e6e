"""Commands in the tests' own process, which has the imports behind it."""

import re
import sys

import pytest
from absl.testing import flagsaver

from drirl_jax import main
from drirl_jax.commands import cli


def refused(message, command, *flags):
    """The command, a module with `main`, refuses these flags with one sentence in which `message` is found."""
    argv = [command.__name__, *flags]
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", argv)  # where config_flags looks for --config.name=value
        cli.call(cli.parse(argv), command.main, trains=command is main)
    said = stop.value.code
    assert isinstance(said, str) and re.search(message, said), said
    assert len(said.splitlines()) == 1 and len(said) < 900
