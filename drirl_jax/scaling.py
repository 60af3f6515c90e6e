"""The tables of scaling rules, and the running statistics that they carry from batch to batch.

Each option of config.scaling names a row of its table; a new rule is a function in equations.py and a row here.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from drirl_jax import equations as eq
from drirl_jax.types import Array

TABLES = {
    # W from the cosines of parts
    "align": {"response": eq.align_response},
    # what is compared: the cosines s_kℓ of the parts of response and demonstration
    "similarity": {"parts": eq.part_similarity},
    # δ̄_c: (running mean, whether there is one, mean of the batch) -> baseline
    "baseline": {"ema": lambda mean_C, seen_C, batch_C: jnp.where(seen_C, mean_C, batch_C)},
    # α^D as used, from the formula's
    "orientation": {"formula": lambda alpha_d: alpha_d},
    # which gaps are kept for ρ̃_c
    "mask": {"top": eq.mask_top},
    # which gaps the running mean follows: (mean of all, mean of the kept)
    "ema_of": {"all": lambda all_C, kept_C: all_C},
    "alpha_m": {"sigma_of_mean": eq.model_responsiveness},
    "combine": {"product": eq.combine_product},
    "per": {"prompt": eq.per_prompt},
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
    decay: float = 0.9

    @classmethod
    def from_config(cls, section) -> "Options":
        return cls(**{name: section[name] for name in cls._fields})

    def rule(self, option: str):
        return TABLES[option][getattr(self, option)]


class Stats(NamedTuple):
    """Running means of each category, [C]: δ̄_c and ρ̄_c, and whether the category has been seen."""

    delta: Array
    gap: Array
    seen: Array

    @classmethod
    def fresh(cls, categories: int) -> "Stats":
        return cls(jnp.zeros(categories), jnp.zeros(categories), jnp.zeros(categories, bool))


class Parts(NamedTuple):
    """Unit embeddings of the parts of responses and demonstrations, and which of them are real.

    A response that says nothing has one real part with the zero vector: it is like no demonstration, δ = 1.
    """

    response_PGKE: Any
    response_mask_PGK: Any
    demo_PLE: Any
    demo_mask_PL: Any


@partial(jax.jit, static_argnames="options")
def coefficients(
    options: Options, stats: Stats, parts: Parts, reward_PG: Array, demo_reward_P: Array, category_P: Array
) -> tuple[Array, Stats, dict[str, Array]]:
    """GRPO-S coefficients α_ig of a batch, and the statistics moved on by it (after their use, as the method says).

    Returns:
        ([P, G] α, Stats, {"alpha_d" [P, G], "alpha_m" [P], "delta" [P, G], "gap" [P, G]}).
    """
    categories = stats.seen.shape[0]
    cosine_PGKL = options.rule("similarity")(parts.response_PGKE, parts.demo_PLE)
    delta_PG = 1 - options.rule("align")(cosine_PGKL, parts.response_mask_PGK, parts.demo_mask_PL)
    delta_C, present_C = eq.category_mean(delta_PG, category_P, categories)
    delta_base_C = options.rule("baseline")(stats.delta, stats.seen, delta_C)
    alpha_d_PG = options.rule("orientation")(eq.data_hardness(delta_PG, delta_base_C[category_P][:, None]))

    gap_PG = eq.gap(demo_reward_P, reward_PG)
    gap_C, _ = eq.category_mean(gap_PG, category_P, categories)
    gap_base_C = jnp.where(stats.seen, stats.gap, gap_C)
    keep_PG = options.rule("mask")(gap_PG, category_P, gap_base_C, options.drop)
    kept_C, _ = eq.category_mean(gap_PG, category_P, categories, keep_PG)
    alpha_m_P = options.rule("alpha_m")(kept_C, gap_base_C, present_C)[category_P]

    alpha_PG = options.rule("per")(options.rule("combine")(alpha_d_PG, alpha_m_P))
    delta_mean_C, seen_C = eq.running_mean(stats.delta, stats.seen, delta_C, present_C, options.decay)
    followed_C = options.rule("ema_of")(gap_C, kept_C)
    gap_mean_C, _ = eq.running_mean(stats.gap, stats.seen, followed_C, present_C, options.decay)
    info = {"alpha_d": alpha_d_PG, "alpha_m": alpha_m_P, "delta": delta_PG, "gap": gap_PG}
    return alpha_PG, Stats(delta_mean_C, gap_mean_C, seen_C), info
