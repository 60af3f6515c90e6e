"""The reward bank: C category rewards on one shared trunk, any mix of categories scored in one pass.

r_c(q, y) = w_c · h_last + b_c, h_last the final hidden state of the last non-padding token of y under the
trunk with adapter c; then standardised by the category's mean and deviation. (DR-IRL section 2)
"""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp

from drirl_jax.equations import zscore
from drirl_jax.models import lora, transformer
from drirl_jax.models.transformer import Begun, Transformer
from drirl_jax.types import Array, Group


@flax.struct.dataclass
class Rewards:
    """What IRL trains: a bank of adapters, and a scalar head for each category (head [C, D], bias [C])."""

    adapter: lora.Adapter
    head: Array
    bias: Array


@flax.struct.dataclass
class Bank:
    """Trained rewards with each category's statistics, mean [C] and std [C], in units of raw reward."""

    rewards: Rewards
    mean: Array
    std: Array


def init_lora(model: Transformer, key: Array, categories: int, **options) -> Rewards:
    """An adapter and a head for each category; every reward is 0 at first. For the options see `lora.init`."""
    adapter = lora.init(model, key, bank=categories, **options)
    return Rewards(adapter, jnp.zeros((categories, model.config.width)), jnp.zeros(categories))


KINDS = {"lora": init_lora}


def token_scores(model: Transformer, rewards: Rewards, group: Group, begun: Begun | None = None) -> Array:
    """[P, G, T] float32 raw rewards of every beginning of the responses: at t, of the tokens up to and with t.

    For `begun` see `transformer.apply`.
    """
    _, hidden_PGTD = transformer.apply(model, group, rewards.adapter, group.category, begun=begun)
    head_PD, bias_P = rewards.head[group.category], rewards.bias[group.category]
    return jnp.einsum("pgtd,pd->pgt", hidden_PGTD.astype(jnp.float32), head_PD) + bias_P[:, None, None]


def read(score_PGT: Array, length_PG: Array) -> Array:
    """[P, G] the rewards of the first `length` tokens."""
    return jnp.take_along_axis(score_PGT, (length_PG - 1)[..., None], axis=-1)[..., 0]


def raw_score(model: Transformer, rewards: Rewards, group: Group, begun: Begun | None = None) -> Array:
    """[P, G] float32 rewards of the responses before standardising, each by its prompt's category."""
    return read(token_scores(model, rewards, group, begun), group.response_len)


def score(model: Transformer, bank: Bank, group: Group, begun: Begun | None = None) -> Array:
    """[P, G] standardised rewards."""
    c = group.category
    return zscore(raw_score(model, bank.rewards, group, begun), bank.mean[c][:, None], bank.std[c][:, None])


def standardised(rewards: Rewards, reward_N: Array, category_N: Array) -> Bank:
    """The bank with mean and deviation of each category's raw rewards; a spread below 1e-6 counts as 1e-6."""
    categories = rewards.bias.shape[0]
    count_C = jnp.maximum(jax.ops.segment_sum(jnp.ones_like(reward_N), category_N, categories), 1)
    mean_C = jax.ops.segment_sum(reward_N, category_N, categories) / count_C
    square_C = jax.ops.segment_sum((reward_N - mean_C[category_N]) ** 2, category_N, categories) / count_C
    return Bank(rewards, mean_C, jnp.maximum(jnp.sqrt(square_C), 1e-6))


# How raw rewards become comparable between categories: (rewards, [N] raw, [N] category) -> Bank.
NORMALIZE = {"zscore": standardised}
