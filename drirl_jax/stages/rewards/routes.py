"""The routes of rewards: which categories' rewards count for a prompt, and how much; rows of one table (ROUTES)."""

from __future__ import annotations

import logging
from typing import Callable, Sequence, TypeAlias

import jax
import numpy as np

from drirl_jax.stages.base import Context

log = logging.getLogger(__name__)

Weights: TypeAlias = Callable[[Sequence[str]], np.ndarray]  # prompts -> [P, C] weights of the categories' rewards


def router(context: Context) -> Weights:
    """Prompts -> [P, C] weights, softmax over categories of cos(Φ(q), μ_c) / config.reward.router_temperature (ours).

    μ_c is the unit mean of the embeddings of the category's training prompts. The log says how often the router finds
    the category of held-out prompts.
    """
    train, valid = context.examples["train"], context.examples["valid"]
    category_names = context.config.data.categories
    embedded_NE = context.embedder(train.prompt_text)
    centroid_CE = np.stack([embedded_NE[rows].sum(axis=0) for rows in train.rows_by_category(len(category_names))])
    # A category without training prompts has no direction: its cosine is 0.
    centroid_CE /= np.maximum(np.linalg.norm(centroid_CE, axis=1, keepdims=True), 1e-6)

    def category_weights(prompts: Sequence[str]) -> np.ndarray:
        logit_PC = context.embedder(prompts) @ centroid_CE.T / context.config.reward.router_temperature
        return np.asarray(jax.nn.softmax(logit_PC, axis=-1))

    correct_N = category_weights(valid.prompt_text).argmax(axis=1) == valid.category
    log.info("the router finds the category of %.0f%% of %d held-out prompts", 100 * correct_N.mean(), correct_N.size)
    return category_weights


def fixed_weights(context: Context) -> Weights:
    """Prompts -> [P, C] the weights of config.reward.weights, or equal weights if it is empty."""
    count = len(context.config.data.categories)
    weight_C = np.asarray(tuple(context.config.reward.weights) or (1 / count,) * count, np.float32)
    return lambda prompts: np.tile(weight_C, (len(prompts), 1))


# Which rewards count for a prompt. None: only that of its own category; a function: all of them, with its weights.
ROUTES: dict[str, Callable[[Context], Weights] | None] = {"category": None, "linear": fixed_weights, "router": router}
