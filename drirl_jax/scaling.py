"""The tables of scaling rules, and the running statistics that they carry from batch to batch.

Each option of config.scaling names a row of its table; a new rule is a function in equations.py and a row here.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from drirl_jax import equations as eq
from drirl_jax.types import Array


class Similarity(NamedTuple):
    """What of a response is compared with the demonstration, and how α^D follows from δ.

    Attributes:
        whole: the texts are compared as wholes, not part by part.
        ratio: α^D = σ(δ)/σ(δ̄), otherwise α^D = δ.
    """

    whole: bool
    ratio: bool


class Baseline(NamedTuple):
    """δ̄ of each response.

    Attributes:
        of: (running mean [C], whether it has begun [C], mean of the batch [C], δ [P, G], category [P]) -> broadcasts
            to [P, G].
        moves: whether the running mean follows the batches; one that does not is calibrated before the first.
    """

    of: Callable[..., Array]
    moves: bool = True


def _responsiveness_of_mean(gap_PG, keep_PG, category_P, baseline_C):
    kept_gap_C, kept_C = eq.category_mean(gap_PG, category_P, baseline_C.shape[0], keep_PG)
    return eq.model_responsiveness(kept_gap_C, baseline_C, kept_C)


TABLES = {
    # W from the cosines of parts
    "align": {"response": eq.align_response, "demo": eq.align_demo, "both": eq.align_both},
    "similarity": {
        "parts": Similarity(whole=False, ratio=True),
        "response": Similarity(whole=True, ratio=True),
        "plain": Similarity(whole=True, ratio=False),
    },
    "baseline": {
        "ema": Baseline(lambda mean_C, seen_C, now_C, _, c_P: jnp.where(seen_C, mean_C, now_C)[c_P][:, None]),
        "batch": Baseline(lambda mean_C, seen_C, now_C, _, c_P: now_C[c_P][:, None]),
        "group": Baseline(lambda mean_C, seen_C, now_C, delta_PG, _: delta_PG.mean(axis=1, keepdims=True)),
        "dataset": Baseline(lambda mean_C, seen_C, now_C, _, c_P: mean_C[c_P][:, None], moves=False),
    },
    # α^D as used, from the formula's
    "orientation": {"formula": lambda alpha_d: alpha_d, "inverse": lambda alpha_d: 1 / alpha_d},
    # which gaps are kept for ρ̃_c
    "mask": {
        "top": lambda options, *gaps: eq.mask_top(*gaps, drop=options.drop),
        "threshold": lambda options, *gaps: eq.mask_threshold(*gaps, threshold=options.threshold),
    },
    # which gaps the running mean follows: all, or the kept
    "ema_of": {"all": jnp.ones_like, "kept": lambda keep_PG: keep_PG},
    "alpha_m": {"sigma_of_mean": _responsiveness_of_mean, "mean_of_sigma": eq.mean_responsiveness},
    "combine": {
        "product": eq.combine_product,
        "sum": eq.combine_sum,
        "data": lambda alpha_d_PG, alpha_m_P: alpha_d_PG,
        "model": lambda alpha_d_PG, alpha_m_P: jnp.broadcast_to(alpha_m_P[:, None], alpha_d_PG.shape),
        "none": lambda alpha_d_PG, alpha_m_P: jnp.ones_like(alpha_d_PG),
    },
    "per": {"prompt": eq.per_prompt, "response": lambda alpha_PG: alpha_PG},
}


class Options(NamedTuple):
    """config.scaling, hashable: rows of TABLES by name, and the numbers."""

    align: str = "response"
    similarity: str = "parts"
    baseline: str = "ema"
    orientation: str = "formula"
    mask: str = "top"
    ema_of: str = "all"
    alpha_m: str = "sigma_of_mean"
    combine: str = "product"
    per: str = "prompt"
    drop: float = 0.2
    threshold: float = 1.0
    decay: float = 0.9
    clip: tuple[float, ...] = ()

    @classmethod
    def from_config(cls, section) -> "Options":
        return cls(**{name: section[name] for name in cls._fields})

    def rule(self, option: str):
        return TABLES[option][getattr(self, option)]


class Stats(NamedTuple):
    """Running means of each category, [C], and whether each of them has begun.

    The two begin apart: a batch in which no gap of a category is kept has distances of it, but no gap to follow.

    Attributes:
        delta: δ̄_c.
        gap: ρ̄_c.
        seen: bool, whether ρ̄_c has begun.
        delta_seen: bool, whether δ̄_c has begun.
    """

    delta: Array
    gap: Array
    seen: Array
    delta_seen: Array

    @classmethod
    def fresh(cls, categories: int) -> "Stats":
        means, flags = jnp.zeros(categories), jnp.zeros(categories, bool)
        return cls(means, means, flags, flags)


class Parts(NamedTuple):
    """Unit embeddings of the parts of responses and demonstrations, and which of them are real.

    A response that says nothing has one real part with the zero vector: it is like no demonstration, δ = 1.
    """

    response_PGKE: Any
    response_mask_PGK: Any
    demo_PLE: Any
    demo_mask_PL: Any


def distances(options: Options, parts: Parts) -> Array:
    """[P, G] δ = 1 - W in [0, 2]: how far each response is from the demonstration.

    Cosines of equal texts may be rounded to above 1, and α^D = 1/δ of a δ just below 0 would turn an advantage round.
    """
    cosine_PGKL = eq.part_similarity(parts.response_PGKE, parts.demo_PLE)
    return jnp.clip(1 - options.rule("align")(cosine_PGKL, parts.response_mask_PGK, parts.demo_mask_PL), 0.0, 2.0)


@partial(jax.jit, static_argnames="options")
def coefficients(
    options: Options, stats: Stats, parts: Parts, reward_PG: Array, demo_reward_P: Array, category_P: Array
) -> tuple[Array, Stats, dict[str, Array]]:
    """GRPO-S coefficients α_ig of a batch, and the statistics moved on by it (after their use, as the method says).

    Returns:
        ([P, G] α, Stats, {"alpha_d" [P, G], "alpha_m" [P], "delta" [P, G], "gap" [P, G], "kept" [P, G]}); "kept" tells
        which gaps were not masked.
    """
    categories = stats.seen.shape[0]
    similarity, baseline = options.rule("similarity"), options.rule("baseline")
    delta_PG = distances(options, parts)
    delta_C, present_C = eq.category_mean(delta_PG, category_P, categories)
    alpha_d_PG = delta_PG
    if similarity.ratio:
        base_PG = baseline.of(stats.delta, stats.delta_seen, delta_C, delta_PG, category_P)
        alpha_d_PG = eq.data_hardness(delta_PG, base_PG)
    alpha_d_PG = options.rule("orientation")(alpha_d_PG)

    gap_PG = eq.gap(demo_reward_P, reward_PG)
    gap_C, _ = eq.category_mean(gap_PG, category_P, categories)
    gap_base_C = jnp.where(stats.seen, stats.gap, gap_C)
    keep_PG = options.rule("mask")(options, gap_PG, category_P, gap_base_C)
    alpha_m_P = options.rule("alpha_m")(gap_PG, keep_PG, category_P, gap_base_C)[category_P]

    alpha_PG = options.rule("per")(options.rule("combine")(alpha_d_PG, alpha_m_P))
    if options.clip:
        alpha_PG = jnp.clip(alpha_PG, *options.clip)
    followed_PG = options.rule("ema_of")(keep_PG)
    followed_C, any_C = eq.category_mean(gap_PG, category_P, categories, followed_PG)
    gap_mean_C, seen_C = eq.running_mean(stats.gap, stats.seen, followed_C, any_C, options.decay)
    delta_mean_C, delta_seen_C = stats.delta, stats.delta_seen
    if baseline.moves:
        delta_mean_C, delta_seen_C = eq.running_mean(stats.delta, stats.delta_seen, delta_C, present_C, options.decay)
    info = {"alpha_d": alpha_d_PG, "alpha_m": alpha_m_P, "delta": delta_PG, "gap": gap_PG, "kept": keep_PG}
    return alpha_PG, Stats(delta_mean_C, gap_mean_C, seen_C, delta_seen_C), info
