"""The reward bank: C category rewards on one shared trunk, any mix of categories scored in one pass.

r_c(q, y) = w_c · h_last + b_c. h_last is the final hidden state of the last non-padding token of y under the trunk
with adapter c. The category's mean and deviation then standardise the reward. (DR-IRL section 2)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from drirl_jax.equations import zscore
from drirl_jax.models import lora, transformer
from drirl_jax.models.transformer import Transformer, TrunkStates
from drirl_jax.types import Array, Group


@struct.dataclass
class Rewards:
    """What IRL trains: a scalar head for each category (heads [C, D], bias [C]), and more by kind.

    "lora" has a bank of adapters on the trunk, "head" an empty adapter, and "full" one model for each category in
    `models`, stacked on a leading axis C.
    """

    adapter: lora.Adapter
    heads: Array
    bias: Array
    models: Transformer | None = None


@struct.dataclass
class Bank:
    """Trained rewards with the mean [C] and std [C] of each category, in units of raw reward."""

    rewards: Rewards
    mean: Array
    std: Array


def init_lora(model: Transformer, key: Array, categories: int, **options) -> Rewards:
    """An adapter and a head for each category. Every reward is 0 at first. The options are those of `lora.init`."""
    adapter = lora.init(model, key, bank=categories, **options)
    return dataclasses.replace(init_head(model, key, categories), adapter=adapter)


def init_head(model: Transformer, key: Array, categories: int, **options) -> Rewards:
    """A head for each category on the unchanged trunk."""
    return Rewards({}, jnp.zeros((categories, model.config.width)), jnp.zeros(categories))


def init_full(model: Transformer, key: Array, categories: int, **options) -> Rewards:
    """A whole model in float32 and a head for each category; the models start from the trunk.

    This is the paper's form. It costs C times as much.
    """
    stacked = jax.tree.map(lambda w: jnp.repeat(w[None].astype(jnp.float32), categories, axis=0), model)
    stacked.config = model.config._replace(weights="float32")  # of the copy
    return dataclasses.replace(init_head(model, key, categories), models=stacked)


KINDS = {"lora": init_lora, "head": init_head, "full": init_full}


def reward_index(rewards: Rewards, category: Array) -> Array:
    """The index of each category's reward: the category itself, or 0 if there is only one reward."""
    return category if rewards.bias.shape[0] > 1 else jnp.zeros_like(category)


def _head_scores(hidden_PGTD: Array, head_PD: Array, bias_P: Array) -> Array:
    return jnp.einsum("pgtd,pd->pgt", hidden_PGTD.astype(jnp.float32), head_PD) + bias_P[:, None, None]


def _own_model_scores(rewards: Rewards, group: Group) -> Array:
    """[C, P, G, T] raw rewards of every category's own model, computed one model after the other."""
    P = group.prompt.shape[0]

    def score_by_model(model_and_head):
        model, head_D, bias = model_and_head
        head_PD, bias_P = jnp.broadcast_to(head_D, (P, *head_D.shape)), jnp.broadcast_to(bias, (P,))
        return _head_scores(transformer.apply(model, group)[1], head_PD, bias_P)

    return jax.lax.map(score_by_model, (rewards.models, rewards.heads, rewards.bias))


def token_scores(model: Transformer, rewards: Rewards, group: Group, trunk_states: TrunkStates | None = None) -> Array:
    """[P, G, T] float32 raw rewards of every beginning of each response: entry t is of the tokens 0 to t.

    For `trunk_states` see `transformer.apply`; categories with their own models do not use it.
    """
    c = reward_index(rewards, group.category)
    if rewards.models is not None:
        return jnp.take_along_axis(_own_model_scores(rewards, group), c[None, :, None, None], axis=0)[0]
    _, hidden_PGTD = transformer.apply(model, group, rewards.adapter, c, trunk_states=trunk_states)
    return _head_scores(hidden_PGTD, rewards.heads[c], rewards.bias[c])


def reward_at(score_PGT: Array, length_PG: Array) -> Array:
    """[P, G] the score of the first `length` tokens of each response."""
    return jnp.take_along_axis(score_PGT, (length_PG - 1)[..., None], axis=-1)[..., 0]


def raw_score(model: Transformer, rewards: Rewards, group: Group, trunk_states: TrunkStates | None = None) -> Array:
    """[P, G] float32 raw rewards of the responses, each from the reward of its prompt's category."""
    return reward_at(token_scores(model, rewards, group, trunk_states), group.response_len)


def score(model: Transformer, bank: Bank, group: Group, trunk_states: TrunkStates | None = None) -> Array:
    """[P, G] standardised rewards of the responses, each from the reward of its prompt's category."""
    c = reward_index(bank.rewards, group.category)
    return zscore(raw_score(model, bank.rewards, group, trunk_states), bank.mean[c][:, None], bank.std[c][:, None])


def standardise(rewards: Rewards, reward_N: Array, category_N: Array) -> Bank:
    """The bank with mean and standard deviation of each category's raw rewards; 0 and 1 for a category without rewards.

    They are computed in float64: in float32 the rounding of the mean may be larger than the deviation. A deviation
    below max(1e-6, 1e-6·|mean|) is only rounding, so this bound takes its place.
    """
    mean_C, std_C = np.zeros(rewards.bias.shape[0]), np.ones(rewards.bias.shape[0])
    category_N, reward_N = np.asarray(reward_index(rewards, category_N)), np.asarray(reward_N, np.float64)
    for c in np.unique(category_N):
        own_rewards = reward_N[category_N == c]
        mean_C[c] = own_rewards.mean()
        std_C[c] = max(own_rewards.std(), 1e-6 * max(1.0, abs(mean_C[c])))
    return Bank(rewards, jnp.asarray(mean_C, jnp.float32), jnp.asarray(std_C, jnp.float32))


def keep_raw(rewards: Rewards, reward_N: Array, category_N: Array) -> Bank:
    """The bank that leaves rewards raw: mean 0 and standard deviation 1."""
    return Bank(rewards, jnp.zeros_like(rewards.bias), jnp.ones_like(rewards.bias))


# Ways to make raw rewards comparable between categories: (rewards, [N] raw, [N] category) -> Bank.
NORMALIZE = {"zscore": standardise, "none": keep_raw}


def score_by_all(model: Transformer, bank: Bank, group: Group, trunk_states: TrunkStates | None = None) -> Array:
    """[P, G, C] standardised rewards of every response by every category, not only by its prompt's."""
    rewards = bank.rewards

    def score_by_category(c):
        return raw_score(
            model, rewards, dataclasses.replace(group, category=jnp.full_like(group.category, c)), trunk_states
        )

    if rewards.models is not None:
        raw_CPG = jax.vmap(reward_at, in_axes=(0, None))(_own_model_scores(rewards, group), group.response_len)
    else:
        raw_CPG = jax.lax.map(score_by_category, jnp.arange(bank.mean.size))
    return zscore(jnp.moveaxis(raw_CPG, 0, -1), bank.mean, bank.std)
