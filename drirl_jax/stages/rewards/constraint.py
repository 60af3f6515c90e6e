"""The constraint of Safe RLHF (arXiv 2310.12773): as much help as possible, with the mean harm below a limit.

Each harmful category has a multiplier λ_c, the price of harm in its rewards. It grows while the mean harm of the
category's samples exceeds config.constraint.limit, and falls to 0 otherwise. Harmless categories have λ_c = 0, so their
reward is help alone. The equations are `equations.constrained_reward` and `equations.dual_ascent`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from drirl_jax import equations as eq
from drirl_jax.data.examples import Examples
from drirl_jax.runtime import sharding
from drirl_jax.stages.base import category_means
from drirl_jax.stages.rewards.routes import HelpHarm
from drirl_jax.types import Array


def is_harmful(config: ConfigDict) -> np.ndarray:
    """[C] bool: which categories are constrained."""
    return np.array([name not in config.data.harmless for name in config.data.categories])


def initial_multipliers(config: ConfigDict) -> Array | None:
    """[C] λ_c before the first step; None if config.reward.route is not "constraint"."""
    if config.reward.route != "constraint":
        return None
    return jnp.where(is_harmful(config), jnp.float32(config.constraint.initial), 0.0)


def constrain(
    config: ConfigDict, multiplier_C: Array | None, scores: Array | HelpHarm, category_P: Array
) -> tuple[Array, Array | None]:
    """([P, M] rewards under these multipliers; [C] the multipliers of the next step).

    The demonstrations are rewarded like the samples, but only the samples' harm is compared with the limit.

    Args:
        multiplier_C: [C] λ_c; None without the constraint.
        scores: of the group's members; the samples come first. Without the constraint they are the rewards.
        category_P: [P] int32.
    """
    if not isinstance(scores, HelpHarm):
        return scores, multiplier_C
    c = config.constraint
    options = dict(limit=c.limit, rate=c.rate, max_multiplier=c.max_multiplier)
    return _constrain(multiplier_C, scores, category_P, is_harmful(config), config.align.group_size, **options)


@partial(jax.jit, static_argnames=("num_samples", "limit", "rate", "max_multiplier"))
def _constrain(multiplier_C, scores, category_P, is_harmful_C, num_samples, **options) -> tuple[Array, Array]:
    reward_PM = eq.constrained_reward(scores.help, scores.harm, multiplier_C[category_P])
    harm_C, present_C = eq.category_mean(scores.harm[:, :num_samples], category_P, multiplier_C.size)
    return reward_PM, eq.dual_ascent(multiplier_C, harm_C, present_C & is_harmful_C, **options)


def scalars(
    config: ConfigDict, multiplier_C: Array | None, scores: Array | HelpHarm, examples: Examples
) -> dict[str, float]:
    """Of the harmful categories: each λ_c with which this batch was rewarded, and the mean harm of the batch's samples.

    "lambda" is the mean over these categories, "harm" the mean over their samples. "harm" is missing in a batch without
    a harmful prompt. There are no scalars without the constraint.
    """
    if not isinstance(scores, HelpHarm):
        return {}
    multiplier_C, harm_PM = sharding.fetch((multiplier_C, scores.harm))
    names, is_harmful_C = config.data.categories, is_harmful(config)
    lambdas = {f"lambda/{names[c]}": float(multiplier_C[c]) for c in np.flatnonzero(is_harmful_C)}
    values = {"lambda": float(multiplier_C[is_harmful_C].mean())} | lambdas
    harmful_P = ~examples.harmless
    if not harmful_P.any():
        return values
    harm_PG = harm_PM[harmful_P, : config.align.group_size]
    return values | category_means(harm_PG, examples.category[harmful_P], names, "harm")
