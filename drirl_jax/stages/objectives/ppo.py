"""PPO-S: generalised advantages from a value head, which the coefficients α scale after the whitening."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from drirl_jax import equations as eq
from drirl_jax import losses
from drirl_jax.models import transformer
from drirl_jax.models.transformer import Transformer, TrunkStates
from drirl_jax.stages.base import Context, Policy
from drirl_jax.stages.objectives.base import (
    Batch,
    Params,
    ScoredGroup,
    ValueHead,
    drop_masked,
    reference_logprobs,
    surrogate,
)
from drirl_jax.types import Array, Group, length_mask


@jax.jit
def values(model, head: ValueHead, group: Group, trunk_states: TrunkStates | None = None) -> Array:
    """[P, G, T] values under the model."""
    return head(transformer.apply(model, group, trunk_states=trunk_states), group)


@partial(jax.jit, static_argnums=(3, 4, 5))
def token_advantages(reward_PG, value_PGT, mask_PGT, gamma: float, lam: float, whiten: bool) -> tuple[Array, Array]:
    """`losses.generalised_advantage`, whitened by `losses.whitened` if `whiten` is set, and the returns."""
    advantage_PGT, returns_PGT = losses.generalised_advantage(reward_PG, value_PGT, mask_PGT, gamma, lam)
    return losses.whitened(advantage_PGT, mask_PGT) if whiten else advantage_PGT, returns_PGT


def make_batch(context: Context, model: Transformer, params: Params, scored: ScoredGroup):
    """Generalised advantages of each token, whitened over the batch if config.ppo.whiten is set, then scaled."""
    c, num_samples = context.config.ppo, scored.num_samples
    group = drop_masked(scored, slice(num_samples))
    mask_PGT = length_mask(group.response_len, group.response.shape[-1])
    trunk_states = scored.states_for_policy(scored.member_states(slice(num_samples)))
    old_value_PGT = context.clock.mark("values", values(model, params.value, group, trunk_states))
    advantage_PGT, returns_PGT = token_advantages(
        scored.reward[:, :num_samples], old_value_PGT, mask_PGT, c.gamma, c.lam, c.whiten
    )
    batch = Batch(
        group=group,
        advantage=eq.scaled_advantage(scored.alpha[..., None], advantage_PGT),
        old_logp=scored.old_logp,
        ref_logp=reference_logprobs(context, scored),
        weights=losses.token_weights(context.config.policy_loss.reduce, mask_PGT, num_samples),
        trunk_states=trunk_states,
        old_value=old_value_PGT,
        returns=returns_PGT,
    )
    return batch, {}


def response_advantages(config, scored: ScoredGroup, batch: Batch) -> dict[str, Array]:
    """See `Objective.response_advantages`; a token has an advantage, a whole response has none."""
    mask_PGT = length_mask(batch.group.response_len, batch.group.response.shape[-1])
    return {"scaled": jnp.sum(batch.advantage * mask_PGT, axis=-1) / jnp.maximum(mask_PGT.sum(axis=-1), 1)}


def loss(trunk, policy: Policy, config, params: Params, batch: Batch):
    """The clipped surrogate and the KL term of GRPO with PPO's advantages, plus the loss of the value head.

    The value head reads the policy's hidden states, and its gradient passes through them.
    """
    model, adapter = policy.model_and_adapter(trunk, params.policy)
    hidden = transformer.apply(model, batch.group, adapter, trunk_states=batch.trunk_states)
    policy_loss, scalars = surrogate(model, config, hidden, batch)
    value_PGT = params.value(hidden, batch.group)
    value_loss_PGT = losses.value_loss(value_PGT, batch.old_value, batch.returns, config.ppo.value_clip)
    value_loss = losses.weighted(value_loss_PGT, batch.weights.sampled)
    scalars |= {"value_loss": value_loss, "value": losses.weighted(value_PGT, batch.weights.tokens)}
    return policy_loss + config.ppo.value_weight * value_loss, scalars
