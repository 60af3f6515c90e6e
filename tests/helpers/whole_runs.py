"""Whole runs as a user starts them, and whether two of them are the same."""

import os
import pathlib
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file

from drirl_jax import main
from helpers import commands

ROOT = pathlib.Path(__file__).parents[2]


def flags_of(policy, workdir, *flags, config="configs/tiny.py"):
    """The flags of `drirl_jax.main`: a tiny run of this policy."""
    cache = f"--config.compilation_cache={os.environ['TESTS_CACHE']}"
    return [f"--config={config}", f"--workdir={workdir}", f"--config.policy.init={policy}", cache, *flags]


def command(*args, **kwargs):
    return [sys.executable, "-m", "drirl_jax.main", *flags_of(*args, **kwargs)]


def run_here(*args, **kwargs):
    """A run in the tests' own process, to its end."""
    commands.run(main, *flags_of(*args, **kwargs))


# On few cores XLA's threads, one a core, would wait for each other in collectives without end.
EIGHT_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "64"}


def start(*args, environment=None, **kwargs):
    """A run in a process of its own, and how it ended."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | (environment or {})
    return subprocess.run(command(*args, **kwargs), cwd=ROOT, env=environment, capture_output=True, text=True)


def same_run(a: pathlib.Path, b: pathlib.Path):
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    one, other = (load_file(x / "aligned" / "model.safetensors") for x in (a, b))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    for name in ("base", "aligned"):
        assert (a / "evals" / f"{name}.json").read_text() == (b / "evals" / f"{name}.json").read_text()
