"""DPO-S: pairs of a chosen and a rejected response; each pair has the coefficient α of its rejected one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from drirl_jax import losses
from drirl_jax.models import transformer, vocabulary
from drirl_jax.models.transformer import Transformer, TrunkStates
from drirl_jax.stages.base import Context, Policy
from drirl_jax.stages.objectives.base import Params, ScoredGroup
from drirl_jax.types import Array, Group, length_mask


class Preferences(NamedTuple):
    """A chosen response to each prompt and K rejected ones.

    Attributes:
        group: [P, 1 + K] responses, the chosen one first.
        ref_logp: [P, 1 + K] log-probabilities of the whole responses under the reference.
        alpha: [P, K] coefficients.
        weight: [P, K] weights of the pairs; 0 for a pair without a preference.
        trunk_states: see `objectives.base.Batch`.
        prompt_weight: [P] `losses.prompt_weights`, computed on the whole batch, as this may be a micro-batch of it.
            None: this is the whole batch.
    """

    group: Group
    ref_logp: Array
    alpha: Array
    weight: Array
    trunk_states: TrunkStates | None = None
    prompt_weight: Array | None = None


def demonstration_pairs(scored: ScoredGroup) -> tuple[Array, Array]:
    """The demonstration against every sample: members [P, 1 + G], and weights [P, G] of the pairs."""
    G = scored.num_samples
    return jnp.broadcast_to(jnp.array([G, *range(G)]), (len(scored.reward), 1 + G)), scored.kept


def self_pairs(scored: ScoredGroup) -> tuple[Array, Array]:
    """Of the kept samples, the one with the highest reward against the one with the lowest."""
    reward_PG = scored.reward[:, : scored.num_samples]
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


def make_batch(context: Context, model: Transformer, params: Params, scored: ScoredGroup):
    """Pairs; each has the coefficient of its rejected sample."""
    index_PM, weight_PK = PAIRS[context.config.dpo.pairs](scored)
    group = scored.group.take(index_PM)
    trunk_states = None if scored.trunk_states is None else scored.trunk_states.take(index_PM)
    ref_logp_PM = context.clock.mark("reference", _reference_whole_logprobs(context.model, group, trunk_states))
    alpha_PK = jnp.take_along_axis(scored.alpha, index_PM[:, 1:], axis=1)
    weight_PK = weight_PK.astype(jnp.float32)
    trunk_states, weight_P = scored.states_for_policy(trunk_states), losses.prompt_weights(weight_PK)
    return Preferences(group, ref_logp_PM, alpha_PK, weight_PK, trunk_states, weight_P), {"pairs": weight_PK}


def loss(trunk, policy: Policy, config, params: Params, batch: Preferences):
    """The mean of `losses.preference` over each prompt's pairs with a weight, then over the prompts with such a pair.

    The scalars are such means too. All are 0 if no pair has a weight.
    """
    model, adapter = policy.model_and_adapter(trunk, params.policy)
    hidden = transformer.apply(model, batch.group, adapter, trunk_states=batch.trunk_states)
    log_ratio_PM = whole_logprobs(model, hidden, batch.group) - batch.ref_logp
    margin_PK = log_ratio_PM[:, :1] - log_ratio_PM[:, 1:]
    loss_PK = losses.preference(margin_PK, batch.alpha, config.dpo.beta, config.dpo.alpha_on)
    weight_P = losses.prompt_weights(batch.weight) if batch.prompt_weight is None else batch.prompt_weight
    weight_PK = weight_P[:, None] * batch.weight / jnp.maximum(batch.weight.sum(axis=1, keepdims=True), 1)
    scalars = {
        "margin": losses.weighted(margin_PK, weight_PK),
        "pairs_right": losses.weighted(margin_PK > 0, weight_PK),
        "chosen": losses.weighted(log_ratio_PM[:, 0], weight_P),
    }
    return losses.weighted(loss_PK, weight_PK), scalars
