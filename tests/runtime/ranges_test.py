"""What each number of a config may be: no number without a row, and no value that cannot be meant."""

import importlib
import math
import pkgutil

import pytest

from drirl_jax import checks, config, configs
from drirl_jax.attacks import options as attack_options
from drirl_jax.runtime import endpoint, ranges
from drirl_jax.types import InputError


def numbers_of(section, prefix=""):
    """Dotted keys of all numbers, and of the tuples of numbers."""
    for key, value in section.items():
        if hasattr(value, "items"):
            yield from numbers_of(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key


TUPLES = {"data.shares", "reward.weights", "scaling.clip"}


def test_every_number_of_a_config_has_its_range():
    assert set(ranges.RANGES) == set(numbers_of(config.default())) | TUPLES
    assert set(attack_options.RANGES) == set(numbers_of(attack_options.default()))


def changed(key, value):
    c = config.default()
    *sections, name = key.split(".")
    section = config.get_option(c, ".".join(sections)) if sections else c
    with c.unlocked(), section.ignore_type():
        section[name] = value
    return c


def test_no_number_may_be_a_bool_infinite_or_no_number():
    for key, row in ranges.RANGES.items():
        for value in (True, math.nan, math.inf, -math.inf, None, "1"):
            assert row.fault(value) in ("give a number", "give a finite number")
        for value in (math.nan, math.inf, -math.inf):
            given = (value,) if key in TUPLES else value
            with pytest.raises(InputError, match=f"config.{key} is .*: give a finite number"):
                ranges.check(changed(key, given), {key: row}, "config")
    for key in ("align.steps", "seed", "policy.layers"):  # of a float, the config makes True 1.0 itself
        with pytest.raises(InputError, match=f"config.{key} is True: give a number"):
            checks.validate(changed(key, True))
    with pytest.raises(InputError, match="config.reward.weights is .*: give a number"):
        checks.validate(changed("reward.weights", (True,) * 8))


def test_whole_numbers_are_whole():
    for key, row in ranges.RANGES.items():
        if row.whole:
            with pytest.raises(InputError, match=f"config.{key} is 2.5: give a whole number"):
                ranges.check(changed(key, 2.5), {key: row}, "config")


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("seed", -1, "must not be negative"),
        ("seed", 2**32, r"must lie in \[0, 4294967295\]"),  # which would be seed 0
        ("align.optimizer.learning_rate", 1e3, r"must lie in \[1e-09, 1\]"),
        ("irl.optimizer.learning_rate", -1e-3, r"must lie in \[1e-09, 1\]"),
        ("align.optimizer.learning_rate", 1e-40, r"must lie in"),
        ("align.optimizer.b1", 1.5, r"must lie in \[0, 1\)"),
        ("irl.optimizer.b2", 1.0, r"must lie in \[0, 1\)"),
        ("align.optimizer.clip_norm", 0.0, "must be above 0"),
        ("irl.optimizer.weight_decay", -0.1, r"must lie in \[0, 1\]"),
        ("align.optimizer.warmup", -1, "must not be negative"),
        ("sampler.temperature", 1e-40, r"must lie in \[0.01, 100\]"),
        ("sampler.temperature", 0.0, r"must lie in \[0.01, 100\]"),
        ("evals.temperature", -1.0, "must not be negative"),
        ("evals.temperature", 1e-40, r"must lie in \[0.01, 100\], or be 0"),
        ("policy_loss.clip_low", -0.1, r"must lie in \(0, 1\]"),
        ("policy_loss.clip_low", 1.5, r"must lie in \(0, 1\]"),
        ("policy_loss.clip_high", -0.2, "must be above 0"),
        ("group.eps", -1.0, r"must lie in \[0, 1\]"),
        ("policy_loss.beta_kl", -0.04, "must not be negative"),
        ("irl.beta", 1e-300, "must lie in"),
        ("dpo.beta", 1e300, "must lie in"),
        ("policy.alpha", 0.0, "must be above 0"),
        ("align.group_size", 0, "must be above 0"),
        ("encoder.max_tokens", 2, "must lie in"),
        ("demos.duplicate", 1.5, r"must lie in \[0, 1\]"),
        ("reward.endpoint.timeout", 0.0, "must be above 0"),
        ("reward.weights", (1.0, -1.0), "must not be negative"),
        ("data.shares", (1.0, 2.0), r"must lie in \[0, 1\]"),
    ],
)
def test_a_number_outside_of_its_range_is_refused(key, value, words):
    with pytest.raises(InputError, match=f"config.{key} is .*: it {words}"):
        checks.validate(changed(key, value))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"reward.weights": (0.0,) * 8}, "every reward would be 0, and nothing could be learned"),
        ({"reward.weights": (1e-40,) * 8}, "must lie in"),
        ({"policy.targets": ()}, r"config.policy.targets is \(\), so that nothing would be trained"),
        ({"reward.targets": ()}, r"config.reward.targets is \(\), so that nothing would be trained"),
        ({"data.shares": (0.0,) * 8}, "one of them above 0"),
    ],
)
def test_what_would_learn_nothing_is_refused(changes, sentence):
    c = config.default()
    c.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=sentence):
        checks.validate(c)


def test_targets_may_be_empty_where_nothing_is_adapted():
    c = config.default()
    c.policy.tune, c.reward.kind = "full", "head"
    c.policy.targets = c.reward.targets = ()
    checks.validate(c)


def test_the_ends_of_a_range_belong_to_it_or_not():
    row = ranges.Range(0, 1, above=True)
    assert row.fault(1) is None and row.fault(0.5) is None and row.fault(0) and row.fault(1.5)
    assert str(row) == "(0, 1]" and str(ranges.BELOW_ONE) == "[0, 1)"
    assert ranges.TEMPERATURE.fault(0) and ranges.TEMPERATURE._replace(zero=True).fault(0) is None


def test_configs_of_the_package_are_in_range():
    for module in pkgutil.iter_modules(configs.__path__):
        if module.name not in ("attack", "evals"):
            found = importlib.import_module(f"drirl_jax.configs.{module.name}").get_config()
            ranges.check(found.get("base", found), ranges.RANGES, "config")


@pytest.mark.parametrize("changes", [{"timeout": math.nan}, {"backoff": math.inf}, {"concurrency": True}])
def test_an_endpoint_s_numbers_are_checked_wherever_it_is_used(changes):
    section = config.default().reward.endpoint
    section.update({"url": "http://localhost:1/v1", "model": "m"})
    with section.unlocked(), section.ignore_type():
        section.update(changes)
    with pytest.raises(InputError, match="the first must be 1 or more"):
        endpoint.check_endpoint(section)


def test_options_of_attacks_are_checked_alike():
    o = attack_options.default()
    o.temperature = math.nan
    with pytest.raises(InputError, match="options.temperature is nan: give a finite number"):
        attack_options.validate(o)
