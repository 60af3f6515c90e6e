"""The tables of scaling rules, and their running statistics from batch to batch.

Each option of config.scaling names a row of its table. A new rule is a function in equations.py and a row here.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from drirl_jax import equations as eq
from drirl_jax.types import AnyArray, Array


class Similarity(NamedTuple):
    """How a response is compared with the demonstration, and how α^D follows from δ.

    Attributes:
        whole: True compares whole texts, False compares their parts.
        ratio: True: α^D = σ(δ)/σ(δ̄); False: α^D = δ.
    """

    whole: bool
    ratio: bool


class Baseline(NamedTuple):
    """δ̄ of each response.

    Attributes:
        compute: (running mean [C], whether it has a value [C], mean of the batch [C], δ [P, G], category [P]) -> δ̄,
            which broadcasts to [P, G].
        moves: True: the running mean follows the batches. False: it is calibrated before the first batch and stays.
    """

    compute: Callable[..., Array]
    moves: bool = True


def _responsiveness_of_mean(gap_PG, keep_PG, category_P, baseline_C):
    kept_gap_C, present_C = eq.category_mean(gap_PG, category_P, baseline_C.shape[0], keep_PG)
    return eq.model_responsiveness(kept_gap_C, baseline_C, present_C)


TABLES: dict[str, dict[str, Any]] = {
    # W from the cosines of parts
    "mean_over": {"response": eq.align_response, "demo": eq.align_demo, "both": eq.align_both},
    "similarity": {
        "parts": Similarity(whole=False, ratio=True),
        "response": Similarity(whole=True, ratio=True),
        "plain": Similarity(whole=True, ratio=False),
    },
    "baseline": {
        "ema": Baseline(
            lambda mean_C, seen_C, batch_C, _, category_P: jnp.where(seen_C, mean_C, batch_C)[category_P][:, None]
        ),
        "batch": Baseline(lambda mean_C, seen_C, batch_C, _, category_P: batch_C[category_P][:, None]),
        "group": Baseline(lambda mean_C, seen_C, batch_C, delta_PG, _: delta_PG.mean(axis=1, keepdims=True)),
        "dataset": Baseline(lambda mean_C, seen_C, batch_C, _, category_P: mean_C[category_P][:, None], moves=False),
    },
    # the α^D in use, from the α^D of the formula
    "orientation": {"formula": lambda alpha_d: alpha_d, "inverse": lambda alpha_d: 1 / alpha_d},
    # the gaps that ρ̃_c averages
    "mask": {
        "top": lambda options, *gaps: eq.mask_top(*gaps, drop=options.drop),
        "threshold": lambda options, *gaps: eq.mask_threshold(*gaps, threshold=options.threshold),
    },
    # the gaps that the running mean averages: all, or the kept ones
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
    """config.scaling as a hashable tuple: names of rows of TABLES, and numbers."""

    mean_over: str = "response"
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
    """Running means of each category, [C], and whether each mean has a value yet.

    The two means may start in different batches: a batch that keeps no gap of a category has distances of it, but no
    gap to average.

    Attributes:
        delta: δ̄_c.
        gap: ρ̄_c.
        gap_seen: bool, whether ρ̄_c has a value.
        delta_seen: bool, whether δ̄_c has a value.
    """

    delta: Float[AnyArray, " C"]
    gap: Float[AnyArray, " C"]
    gap_seen: Bool[AnyArray, " C"]
    delta_seen: Bool[AnyArray, " C"]

    @classmethod
    def fresh(cls, categories: int) -> "Stats":
        means, flags = jnp.zeros(categories), jnp.zeros(categories, bool)
        return cls(means, means, flags, flags)


class Parts(NamedTuple):
    """Unit embeddings of the parts of responses and demonstrations, and masks of the real parts.

    An empty response has one real part with the zero vector, so its δ to any demonstration is 1.
    """

    response_PGKE: Float[AnyArray, "P G K E"]
    response_mask_PGK: Bool[AnyArray, "P G K"]
    demo_PLE: Float[AnyArray, "P L E"]
    demo_mask_PL: Bool[AnyArray, "P L"]


def distances(options: Options, parts: Parts) -> Float[Array, "P G"]:
    """[P, G] δ = 1 - W in [0, 2]: how far each response is from the demonstration.

    The clip is needed: rounding may lift the cosine of equal texts above 1. Then δ < 0, and α^D = 1/δ would change the
    sign of an advantage.
    """
    cosine_PGKL = eq.part_similarity(parts.response_PGKE, parts.demo_PLE)
    return jnp.clip(1 - options.rule("mean_over")(cosine_PGKL, parts.response_mask_PGK, parts.demo_mask_PL), 0.0, 2.0)


@partial(jax.jit, static_argnames="options")
def coefficients(
    options: Options,
    stats: Stats,
    parts: Parts,
    reward_PG: Float[AnyArray, "P G"],
    demo_reward_P: Float[AnyArray, " P"],
    category_P: Int[AnyArray, " P"],
) -> tuple[Float[Array, "P G"], Stats, dict[str, Array]]:
    """GRPO-S coefficients α_ig of a batch, and the statistics updated with it (after their use, as in the method).

    Returns:
        ([P, G] α, Stats, {"alpha_d" [P, G], "alpha_m" [P], "delta" [P, G], "gap" [P, G], "kept" [P, G]}); "kept" is
        True for gaps that are not masked.
    """
    num_categories = stats.gap_seen.shape[0]
    similarity, baseline = options.rule("similarity"), options.rule("baseline")
    delta_PG = distances(options, parts)
    delta_C, present_C = eq.category_mean(delta_PG, category_P, num_categories)
    alpha_d_PG = delta_PG
    if similarity.ratio:
        delta_base_PG = baseline.compute(stats.delta, stats.delta_seen, delta_C, delta_PG, category_P)
        alpha_d_PG = eq.data_hardness(delta_PG, delta_base_PG)
    alpha_d_PG = options.rule("orientation")(alpha_d_PG)

    gap_PG = eq.gap(demo_reward_P, reward_PG)
    gap_C, _ = eq.category_mean(gap_PG, category_P, num_categories)
    gap_base_C = jnp.where(stats.gap_seen, stats.gap, gap_C)
    keep_PG = options.rule("mask")(options, gap_PG, category_P, gap_base_C)
    alpha_m_P = options.rule("alpha_m")(gap_PG, keep_PG, category_P, gap_base_C)[category_P]

    alpha_PG = options.rule("per")(options.rule("combine")(alpha_d_PG, alpha_m_P))
    if options.clip:
        alpha_PG = jnp.clip(alpha_PG, *options.clip)
    averaged_PG = options.rule("ema_of")(keep_PG)
    averaged_gap_C, averaged_present_C = eq.category_mean(gap_PG, category_P, num_categories, averaged_PG)
    gap_mean_C, gap_seen_C = eq.running_mean(
        stats.gap, stats.gap_seen, averaged_gap_C, averaged_present_C, options.decay
    )
    delta_mean_C, delta_seen_C = stats.delta, stats.delta_seen
    if baseline.moves:
        delta_mean_C, delta_seen_C = eq.running_mean(stats.delta, stats.delta_seen, delta_C, present_C, options.decay)
    info = {"alpha_d": alpha_d_PG, "alpha_m": alpha_m_P, "delta": delta_PG, "gap": gap_PG, "kept": keep_PG}
    return alpha_PG, Stats(delta_mean_C, gap_mean_C, gap_seen_C, delta_seen_C), info
