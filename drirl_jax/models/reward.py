"""The reward bank: C category rewards on one shared trunk, any mix of categories scored in one pass.

r_c(q, y) = w_c · h_last + b_c, h_last the final hidden state of the last non-padding token of y under the
trunk with adapter c; then standardised by the category's mean and deviation. (DR-IRL section 2)
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
    """What IRL trains: a scalar head for each category (heads [C, D], bias [C]), and by kind a bank of adapters on the
    trunk, nothing more (an empty adapter), or models of their own, stacked on a leading axis C."""

    adapter: lora.Adapter
    heads: Array
    bias: Array
    models: Transformer | None = None


@struct.dataclass
class Bank:
    """Trained rewards with each category's statistics, mean [C] and std [C], in units of raw reward."""

    rewards: Rewards
    mean: Array
    std: Array


def init_lora(model: Transformer, key: Array, categories: int, **options) -> Rewards:
    """An adapter and a head for each category; every reward is 0 at first. For the options see `lora.init`."""
    adapter = lora.init(model, key, bank=categories, **options)
    return dataclasses.replace(init_head(model, key, categories), adapter=adapter)


def init_head(model: Transformer, key: Array, categories: int, **options) -> Rewards:
    """A head for each category on the trunk as it is."""
    return Rewards({}, jnp.zeros((categories, model.config.width)), jnp.zeros(categories))


def init_full(model: Transformer, key: Array, categories: int, **options) -> Rewards:
    """A whole model in float32 and a head for each category, which starts from the trunk: the paper's form, C times as
    costly."""
    stacked = jax.tree.map(lambda w: jnp.repeat(w[None].astype(jnp.float32), categories, axis=0), model)
    stacked.config = model.config._replace(weights="float32")  # of the copy
    return dataclasses.replace(init_head(model, key, categories), models=stacked)


KINDS = {"lora": init_lora, "head": init_head, "full": init_full}


def reward_index(rewards: Rewards, category: Array) -> Array:
    """The reward of each category: its own, or the only one that there is."""
    return category if rewards.bias.shape[0] > 1 else jnp.zeros_like(category)


def _scored(hidden_PGTD: Array, head_PD: Array, bias_P: Array) -> Array:
    return jnp.einsum("pgtd,pd->pgt", hidden_PGTD.astype(jnp.float32), head_PD) + bias_P[:, None, None]


def _by_own_models(rewards: Rewards, group: Group) -> Array:
    """[C, P, G, T] raw rewards of every model of its own, one after the other."""
    P = group.prompt.shape[0]

    def by_one(of_category):
        model, head_D, bias = of_category
        head_PD, bias_P = jnp.broadcast_to(head_D, (P, *head_D.shape)), jnp.broadcast_to(bias, (P,))
        return _scored(transformer.apply(model, group)[1], head_PD, bias_P)

    return jax.lax.map(by_one, (rewards.models, rewards.heads, rewards.bias))


def token_scores(model: Transformer, rewards: Rewards, group: Group, begun: TrunkStates | None = None) -> Array:
    """[P, G, T] float32 raw rewards of every beginning of the responses: at t, of the tokens up to and with t.

    For `begun` see `transformer.apply`; models of their own begin anew.
    """
    c = reward_index(rewards, group.category)
    if rewards.models is not None:
        return jnp.take_along_axis(_by_own_models(rewards, group), c[None, :, None, None], axis=0)[0]
    _, hidden_PGTD = transformer.apply(model, group, rewards.adapter, c, begun=begun)
    return _scored(hidden_PGTD, rewards.heads[c], rewards.bias[c])


def reward_at(score_PGT: Array, length_PG: Array) -> Array:
    """[P, G] the rewards of the first `length` tokens."""
    return jnp.take_along_axis(score_PGT, (length_PG - 1)[..., None], axis=-1)[..., 0]


def raw_score(model: Transformer, rewards: Rewards, group: Group, begun: TrunkStates | None = None) -> Array:
    """[P, G] float32 rewards of the responses before standardising, each by its prompt's category."""
    return reward_at(token_scores(model, rewards, group, begun), group.response_len)


def score(model: Transformer, bank: Bank, group: Group, begun: TrunkStates | None = None) -> Array:
    """[P, G] standardised rewards."""
    c = reward_index(bank.rewards, group.category)
    return zscore(raw_score(model, bank.rewards, group, begun), bank.mean[c][:, None], bank.std[c][:, None])


def standardise(rewards: Rewards, reward_N: Array, category_N: Array) -> Bank:
    """The bank with mean and deviation of each category's raw rewards, 0 and 1 of one without any.

    They are computed in float64: the mean's rounding in float32 may be more than the spread. A spread below 1e-6, or
    below that share of the mean, is rounding itself, and counts as that much.
    """
    mean_C, std_C = np.zeros(rewards.bias.shape[0]), np.ones(rewards.bias.shape[0])
    category_N, reward_N = np.asarray(reward_index(rewards, category_N)), np.asarray(reward_N, np.float64)
    for c in np.unique(category_N):
        own = reward_N[category_N == c]
        mean_C[c] = own.mean()
        std_C[c] = max(own.std(), 1e-6 * max(1.0, abs(mean_C[c])))
    return Bank(rewards, jnp.asarray(mean_C, jnp.float32), jnp.asarray(std_C, jnp.float32))


def keep_raw(rewards: Rewards, reward_N: Array, category_N: Array) -> Bank:
    """The bank whose rewards are the raw ones."""
    return Bank(rewards, jnp.zeros_like(rewards.bias), jnp.ones_like(rewards.bias))


# How raw rewards become comparable between categories: (rewards, [N] raw, [N] category) -> Bank.
NORMALIZE = {"zscore": standardise, "none": keep_raw}


def score_by_all(model: Transformer, bank: Bank, group: Group, begun: TrunkStates | None = None) -> Array:
    """[P, G, C] standardised rewards of every category, whatever the prompts' own."""
    rewards = bank.rewards

    def by_one(c):
        return raw_score(model, rewards, dataclasses.replace(group, category=jnp.full_like(group.category, c)), begun)

    if rewards.models is not None:
        raw_CPG = jax.vmap(reward_at, in_axes=(0, None))(_by_own_models(rewards, group), group.response_len)
    else:
        raw_CPG = jax.lax.map(by_one, jnp.arange(bank.mean.size))
    return zscore(jnp.moveaxis(raw_CPG, 0, -1), bank.mean, bank.std)
