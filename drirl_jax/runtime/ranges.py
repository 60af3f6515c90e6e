"""The range of each number of a config, in one table (RANGES), and the check of a section against a table.

Every number must be finite. Computations are in float32, where a number that is too small or too large becomes 0 or
infinity; so such a number is refused too.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Mapping, NamedTuple

from ml_collections import ConfigDict

from drirl_jax.errors import InputError


class Range(NamedTuple):
    """An interval of finite numbers.

    Attributes:
        low, high: its ends, which belong to it unless `above` or `below` is True.
        above, below: whether a number must be above `low`, below `high`.
        whole: whether only whole numbers are allowed.
        zero: whether 0 is allowed besides the interval.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    whole: bool = False
    zero: bool = False

    def fault(self, value: Any) -> str | None:
        """The reason why a value is not in the range, as the end of a sentence; None if it is in the range."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return "give a number"
        if not math.isfinite(value):
            return "give a finite number"
        if self.whole and not isinstance(value, numbers.Integral):
            return "give a whole number"
        value = float(value)
        if self.zero and value == 0:
            return None
        if value < self.low or (self.above and value == self.low):
            return self._too_low(value)
        if value > self.high or (self.below and value == self.high):
            return f"it must lie in {self}"
        return None

    def _too_low(self, value: float) -> str:
        if value < 0 and (self.zero or (self.low == 0 and not self.above and self.high >= LARGEST)):
            return "it must not be negative"
        if value <= 0 and self.high >= LARGEST:
            return "it must be above 0"
        return f"it must lie in {self}"

    def __str__(self) -> str:
        """Such as "[0, 1)"."""
        interval = f"{'(' if self.above else '['}{self.low:.10g}, {self.high:.10g}{')' if self.below else ']'}"
        return f"{interval}, or be 0" if self.zero else interval


LARGEST = 1e6  # upper bound of numbers without a special one: above it, products overflow float32

COUNT = Range(1, 2**31 - 1, whole=True)
INDEX = Range(0, 2**31 - 1, whole=True)  # 0 often stands for all, or for none
SEED = Range(0, 2**32 - 1, whole=True)  # a key loses higher bits, so two seeds would be the same
SHARE = Range(0, 1)
BELOW_ONE = Range(0, 1, below=True)
POSITIVE = Range(1e-6, LARGEST)
WEIGHT = Range(1e-6, LARGEST, zero=True)
SECONDS = Range(0, LARGEST, above=True)
TEMPERATURE = Range(0.01, 100)  # below: always the most likely token; above: all tokens equally likely
LIMIT = Range(0, 1e9, above=True)  # limit of a guard; at the upper end it never stops or warns


def _rows(prefixes: str, table: Mapping[str, Range]) -> dict[str, Range]:
    """The table's rows for each of these sections."""
    return {f"{prefix}.{key}": row for prefix in prefixes.split() for key, row in table.items()}


def _same_range(row: Range, keys: str) -> dict[str, Range]:
    return dict.fromkeys(keys.split(), row)


OPTIMIZER = {
    "learning_rate": Range(1e-9, 1),  # Adam moves each weight by about this much; rounding would remove smaller moves
    "warmup": INDEX,
    "b1": BELOW_ONE,
    "b2": BELOW_ONE,
    "weight_decay": SHARE,
    "clip_norm": POSITIVE,
    "average": SHARE,
}
ENDPOINT = {"concurrency": COUNT, "retries": INDEX, "timeout": SECONDS, "backoff": Range(0, LARGEST)}

# Range of each number in `config.default`; of a tuple, the range of each of its numbers.
RANGES: dict[str, Range] = {
    "seed": SEED,
    **_same_range(COUNT, "distributed.processes mesh.fsdp mesh.tensor sampler.mesh.fsdp"),
    **_same_range(INDEX, "distributed.process mesh.data sampler.mesh.data sampler.mesh.tensor"),
    **_same_range(COUNT, "policy.rank reward.rank"),
    **_same_range(POSITIVE, "policy.alpha reward.alpha"),
    **_same_range(INDEX, "policy.layers reward.layers"),
    "encoder.max_tokens": Range(3, 2**31 - 1, whole=True),  # [CLS], [SEP] and one token between them
    **_same_range(COUNT, "data.minimum data.max_prompt"),
    "data.shares": SHARE,
    **_same_range(COUNT, "demos.per_category demos.attempts demos.step_words demos.max_new demos.batch"),
    "demos.echo_words": INDEX,
    "demos.duplicate": SHARE,
    **_same_range(TEMPERATURE._replace(zero=True), "demos.temperature evals.temperature"),
    "sampler.temperature": TEMPERATURE,
    "sampler.max_new": COUNT,
    "data.harmless_share": Range(0, 1, above=True, below=True),
    "reward.weights": WEIGHT,
    "reward.router_temperature": Range(1e-3, 1e3),
    "constraint.limit": Range(-LARGEST, LARGEST),
    "constraint.rate": WEIGHT,
    "constraint.initial": WEIGHT,
    "constraint.max_multiplier": POSITIVE,
    **_same_range(COUNT, "sft.steps sft.batch sft.accumulate sft.recovery_tokens"),
    "sft.own_answers": INDEX,
    "sft.recovery": SHARE,
    **_same_range(POSITIVE, "irl.beta irl.penalty"),
    **_same_range(COUNT, "irl.policy_steps irl.rounds irl.samples irl.steps irl.batch irl.accumulate irl.eval_every"),
    "irl.contrast": WEIGHT,
    "scaling.drop": BELOW_ONE,
    "scaling.threshold": POSITIVE,
    "scaling.decay": BELOW_ONE,
    "scaling.clip": POSITIVE,
    "group.harmless_refusals": SHARE,
    "policy_loss.clip_low": Range(0, 1, above=True),
    "policy_loss.clip_high": POSITIVE,
    "policy_loss.beta_kl": WEIGHT,
    "group.eps": SHARE,
    **_same_range(SHARE, "ppo.gamma ppo.lam"),
    "ppo.value_weight": WEIGHT,
    "ppo.value_clip": POSITIVE,
    "dpo.beta": POSITIVE,
    **_same_range(COUNT, "align.steps align.epochs align.minibatches align.batch align.group_size align.accumulate"),
    **_rows("sft.optimizer irl.optimizer align.optimizer", OPTIMIZER),
    **_rows("reward.endpoint scaling.endpoint demos.endpoint evals.endpoint", ENDPOINT),
    **_same_range(COUNT, "evals.max_new evals.batch"),
    **_same_range(INDEX, "evals.every evals.limit evals.shots evals.benchmark_max_new"),
    "guards.skips": COUNT,
    **_same_range(LIMIT, "guards.sampler_gap guards.kl guards.reward_drift"),
    "metrics.samples": INDEX,
    **_same_range(COUNT, "checkpoint.every checkpoint.keep"),
}


def check(section: ConfigDict, table: Mapping[str, Range], name: str) -> None:
    """Raises InputError for the first number of the section that is not in its range.

    Args:
        table: dotted keys of the section -> ranges; for a tuple, the range of each of its numbers.
        name: the section's name in the message, such as "config".
    """
    for key, row in table.items():
        value = section
        for part in key.split("."):
            value = value[part]
        for number in value if isinstance(value, tuple) else (value,):
            if fault := row.fault(number):
                raise InputError(f"{name}.{key} is {value}: {fault}.")
