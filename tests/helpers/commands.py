"""Commands in the tests' own process, which has the imports behind it."""

import re
import signal
import sys

import pytest
from absl.testing import flagsaver

from drirl_jax import main
from drirl_jax.commands import cli


def run(command, *flags):
    """The command, a module with `main`, in this process to its end."""
    argv = [command.__name__, *flags]
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)  # where config_flags looks for --config.name=value
        handler = signal.getsignal(signal.SIGTERM)
        try:
            cli.call(cli.parse(argv), command.main, trains=command is main)
        finally:
            signal.signal(signal.SIGTERM, handler)  # a run's own would outlive it here


def refused(message, command, *flags):
    """The command refuses these flags with one sentence in which `message` is found, and the exit code 1."""
    with pytest.raises(SystemExit) as stop:
        run(command, *flags)
    said = stop.value.code
    assert isinstance(said, str) and re.search(message, said), said
    assert len(said.splitlines()) == 1 and len(said) < 900
