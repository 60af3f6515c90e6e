"""Any option is a flag: each can be set from the command line, to another value of its kind."""

import json
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from drirl_jax.attacks import options
from drirl_jax.config import default, get_option
from drirl_jax.runtime import workdirs


def leaves(config, prefix=""):
    for name in config:
        value = config[name]
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def parsed(config, *given):
    values, before = flags.FlagValues(), sys.argv
    try:
        sys.argv = ["command", *given]  # where ml_collections looks
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True)
        values(sys.argv)
    finally:
        sys.argv = before
    return values.config


def other(value):
    """(How it is written as a flag, another value of the same kind)."""
    if isinstance(value, bool):
        return str(not value), not value
    if isinstance(value, tuple):
        new = (0.5, 2.0) if all(isinstance(x, float) for x in value) and value else ("a", "b")
        return str(new), new
    if isinstance(value, (int, float)):
        return str(value + 1), value + 1
    return "Be brief, please.", "Be brief, please."


@pytest.mark.parametrize("make", [default, options.default])
def test_every_option_is_a_flag(make):
    others = {key: other(value) for key, value in leaves(make())}
    config = parsed(make(), *(f"--config.{key}={written}" for key, (written, _) in others.items()))
    assert {key: get_option(config, key) for key in others} == {key: value for key, (_, value) in others.items()}


def test_a_system_prompt_is_a_flag_and_may_be_empty(tmp_path):
    assert default().policy.system is None
    for written in ("Be brief.", ""):
        config = parsed(default(), f"--config.policy.system={written}")
        assert config.policy.system == written
        workdirs.record_config(config, tmp_path / (written or "empty"))
        assert workdirs.load_config(tmp_path / (written or "empty")).policy.system == written
    workdirs.record_config(default(), tmp_path / "none")
    assert json.loads((tmp_path / "none" / "config.json").read_text())["policy"]["system"] is None
    assert workdirs.load_config(tmp_path / "none").policy.system is None


def test_thinking_is_a_flag():
    assert not default().policy.enable_thinking
    assert parsed(default(), "--config.policy.enable_thinking").policy.enable_thinking
    assert parsed(default(), "--config.policy.enable_thinking=true").policy.enable_thinking
