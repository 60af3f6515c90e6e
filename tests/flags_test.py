"""Any option is a flag: each can be set from the command line, to another value of its kind."""

import json
import sys

import pytest
from absl import flags
from helpers import commands
from ml_collections import ConfigDict, config_flags

from drirl_jax import main
from drirl_jax.attacks import options
from drirl_jax.commands import cli
from drirl_jax.commands import study as study_command
from drirl_jax.config import default, get_option
from drirl_jax.errors import InputError
from drirl_jax.runtime import keys, workdirs


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


@pytest.mark.parametrize(
    "flag, advice",
    [
        ("--config.aling.steps=3", "--config.aling.steps: there is no such option: did you mean align.steps"),
        ("--config.align.stpes=3", "did you mean align.steps\\?"),
        ("--config.steps=3", "did you mean irl.steps or sft.steps or align.steps\\?"),
        ("--config.base.align.stpes=3", "--config.base.align.stpes: .* did you mean align.steps\\?"),
        ("--config.nothing_like_it=3", "--help lists all options"),
        ("--config.grpo.beta_kl=0.1", "it is policy_loss.beta_kl in this version"),
        ("--config.judge.url=http://x", "it is reward.endpoint.url in this version"),
        ("--config.demos.separator=x", "this version has no such option"),
    ],
)
def test_a_flag_of_no_option_names_the_nearest(flag, advice):
    commands.refused(advice, main, "--config=configs/tiny.py", "--config.seed=1", flag)


def test_an_unknown_option_of_attacks_names_the_nearest(capsys):
    message = "'stpes'"
    assert cli.unknown_option(["attack", "--options.gcg.stpes=3"], message).endswith("did you mean gcg.steps?")
    assert cli.unknown_option(["attack", "--options.gcg.steps=3", "--model=stpes"], message) is None


def test_old_keys_are_gone_and_those_that_replace_them_exist():
    known = list(leaves(default()))
    names = {key for key, _ in known}
    sections = {key.rpartition(".")[0] for key in names}
    for old, new in keys.OLD_KEYS.items():
        assert old not in names | sections and (new is None or new in names | sections), old


def test_a_workdir_of_an_older_version_says_what_its_keys_are_now(tmp_path):
    workdirs.record_config(default(), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["grpo"] = {"beta_kl": record["policy_loss"].pop("beta_kl")}
    (tmp_path / "config.json").write_text(json.dumps(record))
    for read in (lambda: workdirs.check_config(default(), tmp_path), lambda: workdirs.load_config(tmp_path)):
        with pytest.raises(InputError, match=r"another version .*\(grpo.beta_kl is now policy_loss.beta_kl\)"):
            read()


def test_a_study_names_the_nearest_option_too():
    study = ConfigDict({"base": default(), "variants": {"one": {"align": {"stpes": 3}}}})
    with pytest.raises(InputError, match=r"variant 'one' .* no option align.stpes: did you mean align.steps\?"):
        study_command.run_config(study, "one", 0)
