"""What the objectives share: scored groups, the trained parameters, a row of the table, and the clipped surrogate."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from drirl_jax import losses
from drirl_jax.models import transformer, vocabulary
from drirl_jax.models.transformer import Transformer, TrunkStates
from drirl_jax.stages.base import Context
from drirl_jax.types import Array, Group, PyTree, length_mask


class ValueHead(NamedTuple):
    """V_t = w · h_t + b of the final hidden state that predicts token t: weight [D], bias []."""

    weight: Array
    bias: Array

    def __call__(self, hidden, group: Group) -> Array:
        """[P, G, T] float32 values; `hidden` is the pair that `transformer.apply` returns."""
        return transformer.predicting_states(hidden, group).astype(jnp.float32) @ self.weight + self.bias


class Params(NamedTuple):
    """The trained parameters: the policy's (see `stages.base.POLICIES`), and PPO's value head."""

    policy: PyTree
    value: ValueHead | None = None


class ScoredGroup(NamedTuple):
    """What a step collects. An objective makes its batch from it.

    Attributes:
        group: [P, M] the G samples, the demonstration, and perhaps a demonstration of the other kind, in this order. An
            objective that needs no samples has the demonstration alone, and the other fields are None.
        old_logp: [P, G, T] log-probabilities of the samples under the sampler.
        reward: [P, M].
        alpha: [P, G] coefficients.
        kept: [P, G] bool: the samples that the loss keeps.
        trunk_states: the group's states after the shared layers of the trunk (see `stages.base.SharedLayers`); or None.
        policy_shares_layers: whether the policy leaves those layers unchanged.
        harmless: [P] bool, numpy: which prompts the policy should answer.
    """

    group: Group
    old_logp: Any = None
    reward: Any = None
    alpha: Any = None
    kept: Any = None
    trunk_states: TrunkStates | None = None
    policy_shares_layers: bool = False
    harmless: Any = None

    @property
    def num_samples(self) -> int:
        """G."""
        return self.old_logp.shape[1]

    @property
    def demo_reward(self) -> Array:
        """[P] rewards R* of the demonstrations."""
        return self.reward[:, self.num_samples]

    def member_states(self, members: slice) -> TrunkStates | None:
        """The trunk states of these members."""
        return None if self.trunk_states is None else self.trunk_states.members(members)

    def states_for_policy(self, trunk_states: TrunkStates | None) -> TrunkStates | None:
        """These trunk states if the policy can use them, else None."""
        return trunk_states if self.policy_shares_layers else None


class Objective(NamedTuple):
    """A row of the table.

    Attributes:
        needs_samples: True: it learns from the policy's samples, and the stage scores them. False: from demonstrations.
        make_batch: (context, model to sample from, Params, ScoredGroup) -> (the update's batch, arrays [P, ...] to log
            by category).
        loss: (trunk, policy, config, Params, batch) -> (scalar, dict of scalars), a mean over the batch's prompts.
        has_value_head: whether it trains a value head.
        offline: (config) -> whether the reference samples at every step, in place of the policy.
        response_advantages: (config, ScoredGroup, the update's batch) -> {name: [P, G]}, for logs: "advantage" before
            the scaling (if a response has one), and "scaled", the one in the loss (mean over the response's tokens).
    """

    needs_samples: bool
    make_batch: Callable
    loss: Callable
    has_value_head: bool = False
    offline: Callable = lambda config: False
    response_advantages: Callable = lambda config, scored, batch: {}


def init_params(objective: Objective, policy_params: PyTree, model: Transformer) -> Params:
    """Initial parameters; the value head predicts 0 at first."""
    value_head = ValueHead(jnp.zeros(model.config.width), jnp.zeros(())) if objective.has_value_head else None
    return Params(policy_params, value_head)


@partial(jax.jit, static_argnames="temperature")
def logprobs(model, group: Group, temperature: float, trunk_states: TrunkStates | None = None) -> Array:
    """[P, G, T] log-probabilities of the group under the model, here the reference."""
    hidden = transformer.apply(model, group, trunk_states=trunk_states)
    return vocabulary.token_logprobs(model, hidden, group, temperature)[0]


def reference_logprobs(context: Context, scored: ScoredGroup) -> Array | None:
    """[P, G, T] log-probabilities of the samples under the reference, at the sampler's temperature; None without KL."""
    if context.config.policy_loss.beta_kl == 0:
        return None
    samples = slice(scored.num_samples)
    args = scored.group.members(samples), context.config.sampler.temperature, scored.member_states(samples)
    return context.clock.mark("reference", logprobs(context.model, *args))


class Batch(NamedTuple):
    """The batch of an update of GRPO-S or PPO-S.

    Attributes:
        group: [P, M] responses: the samples, and the demonstrations that the loss trains on.
        advantage: [P, M, 1 or T] scaled advantages.
        old_logp, ref_logp: [P, G, T] log-probabilities of the samples under the sampler and under the reference (None
            without a KL term).
        weights: see `losses.token_weights`.
        trunk_states: the group's states after the trunk's layers that the policy leaves unchanged; None without any.
        old_value, returns: [P, G, T], only for PPO-S.
    """

    group: Group
    advantage: Array
    old_logp: Array
    ref_logp: Array | None
    weights: losses.Weights
    trunk_states: TrunkStates | None = None
    old_value: Array | None = None
    returns: Array | None = None


def drop_masked(scored: ScoredGroup, members: slice) -> Group:
    """These members of the group; samples that the loss drops get length 0."""
    group = scored.group.members(members)
    samples = slice(scored.num_samples)
    length_PG = jnp.where(scored.kept, group.response_len[:, samples], 0)
    return dataclasses.replace(group, response_len=group.response_len.at[:, samples].set(length_PG))


# Name of a scalar: a micro-batch's share of the batch's sampled tokens, times the number of micro-batches.
TOKEN_SHARE = "token_share"


def surrogate(model, config, hidden, batch: Batch):
    """(`losses.policy_loss` of the group's hidden states, its scalars)."""
    group, c, num_samples = batch.group, config.policy_loss, batch.old_logp.shape[1]
    M, T = group.response.shape[1:]
    # Demonstrations were not sampled: they have the model's own temperature, 1.
    temperature_M = jnp.where(jnp.arange(M) < num_samples, config.sampler.temperature, 1.0)

    def token_loss(logp, entropy, arrays):
        value, scalars = losses.policy_loss(
            logp, *arrays, clip_low=c.clip_low, clip_high=c.clip_high, beta_kl=c.beta_kl, ratio=c.ratio
        )
        *_, weights = arrays
        token_share = losses.weighted(jnp.ones_like(weights.tokens), weights.tokens)
        entropy = losses.weighted(entropy[:, :num_samples], weights.tokens)
        return value, scalars | {"entropy": entropy, TOKEN_SHARE: token_share}

    advantage = jnp.broadcast_to(batch.advantage, group.response.shape)
    arrays = batch.old_logp, batch.ref_logp, advantage, length_mask(group.response_len, T), batch.weights
    if losses.RATIO[c.ratio].per_token:
        value, scalars = vocabulary.token_sum(model, hidden, group, temperature_M, token_loss, arrays)
    else:
        value, scalars = token_loss(*vocabulary.token_logprobs(model, hidden, group, temperature_M), arrays)
    return value, scalars | {"advantage_abs": losses.weighted(jnp.abs(batch.advantage), batch.weights.responses)}
