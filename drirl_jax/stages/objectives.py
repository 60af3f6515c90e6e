"""The objectives of the alignment stage: GRPO-S, PPO-S, DPO-S and supervised training, rows of one table (OBJECTIVES).

Each objective makes its own batch from a scored group and has its own loss. With config.scaling.combine='none' all
coefficients α are 1: this gives each objective's static baseline.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drirl_jax import equations as eq
from drirl_jax import losses
from drirl_jax.models import transformer, vocabulary
from drirl_jax.models.transformer import Transformer, TrunkStates
from drirl_jax.stages.base import Context, Policy
from drirl_jax.types import Array, Group, PyTree, length_mask


class ValueHead(NamedTuple):
    """V_t = w · h_t + b of the final hidden state that predicts token t: weight [D], bias []."""

    weight: Array
    bias: Array

    def __call__(self, hidden, group: Group) -> Array:
        """[P, G, T] float32 values; `hidden` is the pair that `transformer.apply` returns."""
        return transformer.predicting_states(hidden, group).astype(jnp.float32) @ self.weight + self.bias


class Params(NamedTuple):
    """The trained parameters: the policy's (see `base.POLICIES`), and PPO's value head."""

    policy: PyTree
    value: ValueHead | None = None


class ScoredGroup(NamedTuple):
    """What a step collects. An objective makes its batch from it.

    Attributes:
        group: [P, M] the G samples, the demonstration, and perhaps a demonstration of the other kind, in this order. An
            objective that samples nothing has the demonstration alone, and the other fields are None.
        old_logp: [P, G, T] log-probabilities of the samples under the sampler.
        reward: [P, M].
        alpha: [P, G] coefficients.
        kept: [P, G] bool: the samples that the loss keeps.
        trunk_states: the group's states after the shared layers of the trunk (see `base.SharedLayers`); or None.
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
    def sampled(self) -> int:
        """G."""
        return self.old_logp.shape[1]

    @property
    def demonstration(self) -> Array:
        """[P] rewards R* of the demonstrations."""
        return self.reward[:, self.sampled]

    def trunk_states_of(self, members: slice) -> TrunkStates | None:
        return None if self.trunk_states is None else self.trunk_states.members(members)

    def for_policy(self, trunk_states: TrunkStates | None) -> TrunkStates | None:
        return trunk_states if self.policy_shares_layers else None


class Objective(NamedTuple):
    """A row of the table.

    Attributes:
        samples: True: it learns from the policy's samples, and the stage scores them. False: from demonstrations.
        batch: (context, model to sample from, Params, ScoredGroup) -> (the update's batch, arrays [P, ...] to log by
            category).
        loss: (trunk, policy, config, Params, batch) -> (scalar, dict of scalars), a mean over the batch's prompts.
        value: whether it trains a value head.
        offline: (config) -> whether the reference samples at every step, in place of the policy.
        advantages: (config, ScoredGroup, the update's batch) -> {name: [P, G]}, for logs: "advantage" before the
            scaling (if a response has one), and "scaled", the one in the loss (mean over the response's tokens).
    """

    samples: bool
    batch: Callable
    loss: Callable
    value: bool = False
    offline: Callable = lambda config: False
    advantages: Callable = lambda config, scored, batch: {}


def init_params(objective: Objective, policy_params: PyTree, model: Transformer) -> Params:
    """Initial parameters; the value head predicts 0 at first."""
    value_head = ValueHead(jnp.zeros(model.config.width), jnp.zeros(())) if objective.value else None
    return Params(policy_params, value_head)


@partial(jax.jit, static_argnames="temperature")
def logprobs(model, group: Group, temperature: float, trunk_states: TrunkStates | None = None) -> Array:
    """[P, G, T] log-probabilities of the group under the model, here the reference."""
    hidden = transformer.apply(model, group, trunk_states=trunk_states)
    return vocabulary.token_logprobs(model, hidden, group, temperature)[0]


@jax.jit
def values(model, head: ValueHead, group: Group, trunk_states: TrunkStates | None = None) -> Array:
    """[P, G, T] values under the model."""
    return head(transformer.apply(model, group, trunk_states=trunk_states), group)


def reference(context: Context, scored: ScoredGroup) -> Array | None:
    """[P, G, T] log-probabilities of the samples under the reference, at the sampler's temperature; None without KL."""
    if context.config.policy_loss.beta_kl == 0:
        return None
    samples = slice(scored.sampled)
    args = scored.group.members(samples), context.config.sampler.temperature, scored.trunk_states_of(samples)
    return context.clock.mark("reference", logprobs(context.model, *args))


# ----------------------------------------------------------------------------------------------------------
# GRPO-S
# ----------------------------------------------------------------------------------------------------------


class Role(NamedTuple):
    """The role of a demonstration in a prompt's group.

    Attributes:
        counts: whether its reward counts in the group's mean and std.
        trained: whether the loss trains on it.
    """

    counts: bool
    trained: bool


ROLES = {"apart": Role(False, False), "baseline": Role(True, False), "member": Role(True, True)}


def group_roles(config) -> tuple[Role, Role]:
    """The roles of the demonstration and of the demonstration of the other kind, by config.group.

    They are apart for every objective but GRPO, because no other objective compares a group.
    """
    compares_group = config.align.objective == "grpo"
    names = (config.group.demonstration, config.group.contrast) if compares_group else ("apart", "apart")
    return ROLES[names[0]], ROLES[names[1]]


def advantages(roles: tuple[Role, Role], reward_PM: Array, sampled: int, eps: float) -> Array:
    """Group-relative advantages of the members that the loss trains on: the G samples and perhaps demonstrations.

    Args:
        roles: of the demonstration, and of the demonstration of the other kind. A flag of the second is set only if the
            same flag of the first is.
        reward_PM: [P, G + 1 or G + 2] rewards of the samples and of these two, in this order; the last only if it
            counts.
        sampled: G.
    """
    num_counted, num_trained = (sampled + sum(flags) for flags in zip(*roles))
    return eq.group_advantage(reward_PM[:, :num_counted], eps)[:, :num_trained]


def grpo_advantages(config, scored: ScoredGroup) -> Array:
    """`advantages` by config.group, before the scaling."""
    return advantages(group_roles(config), scored.reward, scored.sampled, config.group.eps)


def harmless_weight(wrong_PG: Array, harmless_P: np.ndarray, target: float) -> Array:
    """[P] weights: 1 for harmful prompts; for harmless ones by the share of their samples that are wrong.

    Args:
        wrong_PG: see `equations.nearer_to_other_kind`.
        harmless_P: which prompts are harmless.
        target: config.group.harmless_refusals; with 1 every weight is 1.
    """
    if target == 1 or not harmless_P.any():
        return jnp.ones(len(harmless_P))
    wrong_share = jnp.average(wrong_PG.mean(axis=1), weights=harmless_P)
    return jnp.where(harmless_P, eq.kind_weight(wrong_share, target), 1.0)


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
    samples = slice(scored.sampled)
    length_PG = jnp.where(scored.kept, group.response_len[:, samples], 0)
    return dataclasses.replace(group, response_len=group.response_len.at[:, samples].set(length_PG))


def grpo_batch(context: Context, model: Transformer, params: Params, scored: ScoredGroup):
    """Group-relative advantages, scaled after the normalisation."""
    c, sampled, info = context.config.group, scored.sampled, {}
    weight_P = jnp.ones(len(scored.reward))
    if group_roles(context.config)[1].counts:
        wrong_PG = eq.nearer_to_other_kind(
            scored.reward[:, :sampled], scored.demonstration, scored.reward[:, sampled + 1]
        )
        weight_P = harmless_weight(wrong_PG, scored.harmless, c.harmless_refusals)
        info = {"wrong": wrong_PG}
    advantage_PM = grpo_advantages(context.config, scored)
    members = slice(advantage_PM.shape[1])
    other_alpha = jnp.repeat(scored.alpha.mean(axis=1, keepdims=True), advantage_PM.shape[1] - sampled, axis=1)
    alpha_PM = weight_P[:, None] * jnp.concatenate([scored.alpha, other_alpha], axis=1)
    group = drop_masked(scored, members)
    mask_PMT = length_mask(group.response_len, group.response.shape[-1])
    batch = Batch(
        group=group,
        advantage=eq.scaled_advantage(alpha_PM, advantage_PM)[..., None],
        old_logp=scored.old_logp,
        ref_logp=reference(context, scored),
        weights=losses.token_weights(context.config.policy_loss.reduce, mask_PMT, sampled),
        trunk_states=scored.for_policy(scored.trunk_states_of(members)),
    )
    return batch, info


def grpo_response_advantages(config, scored: ScoredGroup, batch: Batch) -> dict[str, Array]:
    """See `Objective.advantages`."""
    samples = slice(scored.sampled)
    advantage_PG = grpo_advantages(config, scored)[:, samples]
    return {"advantage": advantage_PG, "scaled": batch.advantage[:, samples, 0]}


def grpo_loss(trunk, policy: Policy, config, params: Params, batch: Batch):
    """GRPO's loss of a micro-batch.

    The members that follow the samples are demonstrations: see `losses.policy_loss`.
    """
    model, adapter = policy.parts(trunk, params.policy)
    hidden = transformer.apply(model, batch.group, adapter, trunk_states=batch.trunk_states)
    return _surrogate(model, config, hidden, batch)


# Name of a scalar: a micro-batch's share of the batch's sampled tokens, times the number of micro-batches.
TOKEN_SHARE = "token_share"


def _surrogate(model, config, hidden, batch: Batch):
    """`losses.policy_loss` of the group's hidden states, and its scalars."""
    group, c, sampled = batch.group, config.policy_loss, batch.old_logp.shape[1]
    members, T = group.response.shape[1:]
    # Demonstrations were not sampled: they have the model's own temperature, 1.
    temperature_M = jnp.where(jnp.arange(members) < sampled, config.sampler.temperature, 1.0)

    def loss(logp, entropy, arrays):
        value, scalars = losses.policy_loss(
            logp, *arrays, clip_low=c.clip_low, clip_high=c.clip_high, beta_kl=c.beta_kl, ratio=c.ratio
        )
        *_, weights = arrays
        token_share = losses.weighted(jnp.ones_like(weights.tokens), weights.tokens)
        entropy = losses.weighted(entropy[:, :sampled], weights.tokens)
        return value, scalars | {"entropy": entropy, TOKEN_SHARE: token_share}

    advantage = jnp.broadcast_to(batch.advantage, group.response.shape)
    arrays = batch.old_logp, batch.ref_logp, advantage, length_mask(group.response_len, T), batch.weights
    if losses.RATIO[c.ratio].own:
        value, scalars = vocabulary.token_sum(model, hidden, group, temperature_M, loss, arrays)
    else:
        value, scalars = loss(*vocabulary.token_logprobs(model, hidden, group, temperature_M), arrays)
    return value, scalars | {"advantage_abs": losses.weighted(jnp.abs(batch.advantage), batch.weights.responses)}


# ----------------------------------------------------------------------------------------------------------
# PPO-S
# ----------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(3, 4, 5))
def token_advantages(reward_PG, value_PGT, mask_PGT, gamma: float, lam: float, whiten: bool) -> tuple[Array, Array]:
    """`losses.generalised_advantage`, whitened by `losses.whitened` if `whiten` is set, and the returns."""
    advantage_PGT, returns_PGT = losses.generalised_advantage(reward_PG, value_PGT, mask_PGT, gamma, lam)
    return losses.whitened(advantage_PGT, mask_PGT) if whiten else advantage_PGT, returns_PGT


def ppo_batch(context: Context, model: Transformer, params: Params, scored: ScoredGroup):
    """Generalised advantages of each token, whitened over the batch if config.ppo.whiten is set, then scaled."""
    c, sampled = context.config.ppo, scored.sampled
    group = drop_masked(scored, slice(sampled))
    mask_PGT = length_mask(group.response_len, group.response.shape[-1])
    trunk_states = scored.for_policy(scored.trunk_states_of(slice(sampled)))
    old_value_PGT = context.clock.mark("values", values(model, params.value, group, trunk_states))
    advantage_PGT, returns_PGT = token_advantages(
        scored.reward[:, :sampled], old_value_PGT, mask_PGT, c.gamma, c.lam, c.whiten
    )
    batch = Batch(
        group=group,
        advantage=eq.scaled_advantage(scored.alpha[..., None], advantage_PGT),
        old_logp=scored.old_logp,
        ref_logp=reference(context, scored),
        weights=losses.token_weights(context.config.policy_loss.reduce, mask_PGT, sampled),
        trunk_states=trunk_states,
        old_value=old_value_PGT,
        returns=returns_PGT,
    )
    return batch, {}


def ppo_response_advantages(config, scored: ScoredGroup, batch: Batch) -> dict[str, Array]:
    """See `Objective.advantages`; a token has an advantage, a whole response has none."""
    mask_PGT = length_mask(batch.group.response_len, batch.group.response.shape[-1])
    return {"scaled": jnp.sum(batch.advantage * mask_PGT, axis=-1) / jnp.maximum(mask_PGT.sum(axis=-1), 1)}


def ppo_loss(trunk, policy: Policy, config, params: Params, batch: Batch):
    """The clipped surrogate and the KL term of GRPO with PPO's advantages, plus the loss of the value head.

    The value head reads the policy's hidden states, and its gradient passes through them.
    """
    model, adapter = policy.parts(trunk, params.policy)
    hidden = transformer.apply(model, batch.group, adapter, trunk_states=batch.trunk_states)
    surrogate, scalars = _surrogate(model, config, hidden, batch)
    value_PGT = params.value(hidden, batch.group)
    value_loss_PGT = losses.value_loss(value_PGT, batch.old_value, batch.returns, config.ppo.value_clip)
    value_loss = losses.weighted(value_loss_PGT, batch.weights.sampled)
    scalars |= {"value_loss": value_loss, "value": losses.weighted(value_PGT, batch.weights.tokens)}
    return surrogate + config.ppo.value_weight * value_loss, scalars


# ----------------------------------------------------------------------------------------------------------
# DPO-S
# ----------------------------------------------------------------------------------------------------------


class Preferences(NamedTuple):
    """A chosen response to each prompt and K rejected ones.

    Attributes:
        group: [P, 1 + K] responses, the chosen one first.
        ref_logp: [P, 1 + K] log-probabilities of the whole responses under the reference.
        alpha: [P, K] coefficients.
        weight: [P, K] weights of the pairs; 0 for a pair without a preference.
        trunk_states: see `Batch`.
        prompts: [P] `losses.prompt_weights`, computed on the whole batch, as this may be a micro-batch of it. None:
            this is the whole batch.
    """

    group: Group
    ref_logp: Array
    alpha: Array
    weight: Array
    trunk_states: TrunkStates | None = None
    prompts: Array | None = None


def demonstration_pairs(scored: ScoredGroup) -> tuple[Array, Array]:
    """The demonstration against every sample: members [P, 1 + G], and weights [P, G] of the pairs."""
    sampled = scored.sampled
    return jnp.broadcast_to(jnp.array([sampled, *range(sampled)]), (len(scored.reward), 1 + sampled)), scored.kept


def self_pairs(scored: ScoredGroup) -> tuple[Array, Array]:
    """Of the kept samples, the one with the highest reward against the one with the lowest."""
    reward_PG = scored.reward[:, : scored.sampled]
    best_P = jnp.argmax(jnp.where(scored.kept, reward_PG, -jnp.inf), axis=1)
    worst_P = jnp.argmin(jnp.where(scored.kept, reward_PG, jnp.inf), axis=1)
    pair_P2 = jnp.stack([best_P, worst_P], axis=1)
    pair_reward_P2 = jnp.take_along_axis(reward_PG, pair_P2, axis=1)
    return pair_P2, pair_reward_P2[:, :1] > pair_reward_P2[:, 1:]


# (ScoredGroup) -> ([P, 1 + K] members, the chosen first; [P, K] weights)
PAIRS = {"demonstration": demonstration_pairs, "self": self_pairs}


def whole_logprobs(model, hidden, group: Group) -> Array:
    """[P, M] log-probabilities of whole responses, at the model's own temperature."""
    logp_PMT, _ = vocabulary.token_logprobs(model, hidden, group, 1.0)
    return jnp.sum(logp_PMT, axis=-1, where=length_mask(group.response_len, group.response.shape[-1]))


@jax.jit
def _reference_whole_logprobs(model, group: Group, trunk_states: TrunkStates | None) -> Array:
    return whole_logprobs(model, transformer.apply(model, group, trunk_states=trunk_states), group)


def dpo_batch(context: Context, model: Transformer, params: Params, scored: ScoredGroup):
    """Pairs; each has the coefficient of its rejected sample."""
    index_PM, weight_PK = PAIRS[context.config.dpo.pairs](scored)
    group = scored.group.take(index_PM)
    trunk_states = None if scored.trunk_states is None else scored.trunk_states.take(index_PM)
    ref_logp_PM = context.clock.mark("reference", _reference_whole_logprobs(context.model, group, trunk_states))
    alpha_PK = jnp.take_along_axis(scored.alpha, index_PM[:, 1:], axis=1)
    weight_PK = weight_PK.astype(jnp.float32)
    trunk_states, weight_P = scored.for_policy(trunk_states), losses.prompt_weights(weight_PK)
    return Preferences(group, ref_logp_PM, alpha_PK, weight_PK, trunk_states, weight_P), {"pairs": weight_PK}


def dpo_loss(trunk, policy: Policy, config, params: Params, batch: Preferences):
    """The mean of `losses.preference` over each prompt's pairs with a weight, then over the prompts with such a pair.

    The scalars are such means too. All are 0 if no pair has a weight.
    """
    model, adapter = policy.parts(trunk, params.policy)
    hidden = transformer.apply(model, batch.group, adapter, trunk_states=batch.trunk_states)
    log_ratio_PM = whole_logprobs(model, hidden, batch.group) - batch.ref_logp
    margin_PK = log_ratio_PM[:, :1] - log_ratio_PM[:, 1:]
    loss_PK = losses.preference(margin_PK, batch.alpha, config.dpo.beta, config.dpo.alpha_on)
    weight_P = losses.prompt_weights(batch.weight) if batch.prompts is None else batch.prompts
    weight_PK = weight_P[:, None] * batch.weight / jnp.maximum(batch.weight.sum(axis=1, keepdims=True), 1)
    scalars = {
        "margin": losses.weighted(margin_PK, weight_PK),
        "pairs_right": losses.weighted(margin_PK > 0, weight_PK),
        "chosen": losses.weighted(log_ratio_PM[:, 0], weight_P),
    }
    return losses.weighted(loss_PK, weight_PK), scalars


# ----------------------------------------------------------------------------------------------------------
# Supervised training
# ----------------------------------------------------------------------------------------------------------


class Demonstrations(NamedTuple):
    """The batch of an update of supervised training.

    Attributes:
        group: [P, 1] the demonstrations.
        weight: [P, 1, T] weights of their tokens in the loss.
        tokens: [P, 1, T] weights of a mean over tokens, computed on the whole batch. None: this is the whole batch.
    """

    group: Group
    weight: Array
    tokens: Array | None = None


def sft_batch(context: Context, model: Transformer, params: Params, scored: ScoredGroup):
    """The demonstrations alone."""
    mask_P1T = length_mask(scored.group.response_len, scored.group.response.shape[-1])
    weight, token_weight = losses.REDUCE[context.config.policy_loss.reduce](mask_P1T), losses.weight_by_token(mask_P1T)
    return Demonstrations(scored.group, weight, token_weight), {}


def sft_loss(trunk, policy: Policy, config, params: Params, batch: Demonstrations):
    """-log π of the demonstrations' tokens, at the model's own temperature."""
    model, adapter = policy.parts(trunk, params.policy)
    hidden = transformer.apply(model, batch.group, adapter)

    token_weight = batch.tokens
    if token_weight is None:
        token_weight = losses.weight_by_token(length_mask(batch.group.response_len, batch.group.response.shape[-1]))

    def loss(logp, entropy, weights):
        weight, token_weight = weights
        return -losses.weighted(logp, weight), {"entropy": losses.weighted(entropy, token_weight)}

    return vocabulary.token_sum(model, hidden, batch.group, 1.0, loss, (batch.weight, token_weight))


OBJECTIVES = {
    "grpo": Objective(True, grpo_batch, grpo_loss, advantages=grpo_response_advantages),
    "ppo": Objective(True, ppo_batch, ppo_loss, value=True, advantages=ppo_response_advantages),
    "dpo": Objective(True, dpo_batch, dpo_loss, offline=lambda config: not config.dpo.online),
    "sft": Objective(False, sft_batch, sft_loss),
}
