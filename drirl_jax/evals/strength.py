"""How much of the policy's change is kept: the most at which harmless prompts are still answered (ours)."""

from __future__ import annotations

import logging
from typing import Callable

import numpy as np

from drirl_jax.evals import runner
from drirl_jax.stages.base import POLICIES, Context
from drirl_jax.types import PyTree

log = logging.getLogger(__name__)

STRENGTHS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def strongest(refused: Callable[[float], float], most: float) -> tuple[float, dict[float, float]]:
    """The largest of STRENGTHS at which `refused(strength)` is at most `most`, and what was seen on the way there; the
    smallest, with a warning, if it is more at every one.

    Where a run stops between refusing and helping is chance. The change of the weights, scaled, still ranks prompts as
    well (docs/LOG.md), but moves the threshold: W_ref + s (W - W_ref), as in WiSE-FT (arXiv 2109.01903).

    Args:
        refused: strength s -> share of harmless prompts refused at it.
        most: the largest share that is allowed.
    """
    seen = {}
    for strength in STRENGTHS:
        seen[strength] = refused(strength)
        if seen[strength] <= most:
            return strength, seen
    log.warning(
        "at every strength of the aligned policy down to %s more than %.0f%% of the harmless validation prompts are "
        "refused: give harmless prompts a larger share, or train longer",
        strength,
        100 * most,
    )
    return strength, seen


def choose(context: Context, params: PyTree) -> dict:
    """The strength for config.align.harmless_rise, on validation prompts of the harmless categories.

    Returns:
        {"strength", "harmless_refused": {"base": share, strength: share of those tried}}.
    """
    config = context.config
    valid, policy = context.examples["valid"], POLICIES[config.policy.tune]
    names = config.data.categories
    harmless = valid.take(np.flatnonzero(np.isin(valid.category, [names.index(n) for n in config.data.harmless])))

    def refused(model) -> float:
        return float(runner.answers(context, model, harmless).refused.mean())

    def at(strength: float) -> float:
        return refused(policy.merged(context.model, policy.scaled(context.model, params, strength)))

    base = refused(context.model)
    strength, seen = strongest(at, base + config.align.harmless_rise)
    return {"strength": strength, "harmless_refused": {"base": base} | {str(s): share for s, share in seen.items()}}
