"""The tree as `pre-commit run --all-files` wants it: ruff's rules and form, and mypy as far as mypy.ini says."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy"])
def test_a_checker_has_nothing_to_say(command, tmp_path):
    name, *flags = command.split()
    if not importlib.util.find_spec(name):
        pytest.skip(f"no {name} here")
    cache = {"ruff": ["--no-cache"], "mypy": [f"--cache-dir={tmp_path}"]}[name]
    told = subprocess.run([sys.executable, "-m", name, *flags, *cache], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
