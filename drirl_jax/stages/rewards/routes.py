"""The routes of rewards: how the categories' rewards become one reward of a response; rows of one table (ROUTES)."""

from __future__ import annotations

import logging
from typing import Callable, NamedTuple, Sequence, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from drirl_jax import equations as eq
from drirl_jax.data.examples import Examples
from drirl_jax.stages.base import Context
from drirl_jax.types import Array

log = logging.getLogger(__name__)

_safe_completion = jax.jit(eq.safe_completion)

Weights: TypeAlias = Callable[[Sequence[str]], np.ndarray]  # prompts -> [P, C] weights of the categories' rewards


class HelpHarm(NamedTuple):
    """Two rewards of each member of a group, which the multipliers of constraint.py make one reward.

    Attributes:
        help: [P, M] H, rewards of helpfulness.
        harm: [P, M] F, minus the reward of the prompt's own category.
    """

    help: Array
    harm: Array


# (examples, [P, M, C] rewards of each member by every category) -> [P, M] rewards
Combine: TypeAlias = Callable[[Examples, Array], Array | HelpHarm]


class Route(NamedTuple):
    """A row of the table.

    Attributes:
        make: context -> Combine.
        needs_help: whether it weighs help against harm, so that it needs rewards of both kinds of categories.
    """

    make: Callable[[Context], Combine]
    needs_help: bool = False


# ---------------------------------------------------------------------------------------------- weighted sums


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


def weighted_sum(make_weights: Callable[[Context], Weights]) -> Callable[[Context], Combine]:
    """The sum over categories of their rewards, with these weights."""

    def make(context: Context) -> Combine:
        category_weights = make_weights(context)
        return lambda examples, reward_PMC: jnp.einsum("pmc,pc->pm", reward_PMC, category_weights(examples.prompt_text))

    return make


# ----------------------------------------------------------------------------------------- help against harm


def has_help_reward(config: ConfigDict) -> np.ndarray:
    """[C] bool: the harmless categories of which there are training records, so that their rewards can be learned."""
    names, shares = config.data.categories, tuple(config.data.shares) or (1.0,) * len(config.data.categories)
    return np.array([name in config.data.harmless and share > 0 for name, share in zip(names, shares)])


@jax.jit
def help_and_own(reward_PMC: Array, category_P: Array, harmless_P: Array, has_help_C: Array) -> tuple[Array, Array]:
    """(reward of helpfulness, reward of the prompt's own category), [P, M] each.

    The reward of helpfulness is the own one for a harmless prompt. For a harmful prompt it is the mean over the
    harmless categories.
    """
    own_PM = jnp.take_along_axis(reward_PMC, category_P[:, None, None], axis=-1)[..., 0]
    return jnp.where(harmless_P[:, None], own_PM, reward_PMC.mean(axis=-1, where=has_help_C)), own_PM


def safe_completion(context: Context) -> Combine:
    """See `equations.safe_completion`."""
    has_help_C = has_help_reward(context.config)

    def combine(examples: Examples, reward_PMC: Array) -> Array:
        help_PM, own_PM = help_and_own(reward_PMC, examples.category, examples.harmless, has_help_C)
        return _safe_completion(help_PM, own_PM, examples.harmless)

    return combine


def help_and_harm(context: Context) -> Combine:
    """Both rewards apart; see constraint.py."""
    has_help_C = has_help_reward(context.config)

    def combine(examples: Examples, reward_PMC: Array) -> HelpHarm:
        help_PM, own_PM = help_and_own(reward_PMC, examples.category, examples.harmless, has_help_C)
        return HelpHarm(help_PM, -own_PM)

    return combine


# None: the reward of the prompt's own category, which is scored alone.
ROUTES: dict[str, Route | None] = {
    "category": None,
    "linear": Route(weighted_sum(fixed_weights)),
    "router": Route(weighted_sum(router)),
    "safe_completion": Route(safe_completion, needs_help=True),
    "constraint": Route(help_and_harm, needs_help=True),
}
