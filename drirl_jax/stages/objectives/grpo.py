"""GRPO-S: group-relative advantages, which the coefficients α scale after the normalisation."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from drirl_jax import equations as eq
from drirl_jax import losses
from drirl_jax.models import transformer
from drirl_jax.models.transformer import Transformer
from drirl_jax.stages.base import Context, Policy
from drirl_jax.stages.objectives.base import Batch, Params, ScoredGroup, drop_masked, reference_logprobs, surrogate
from drirl_jax.types import Array, length_mask


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


def member_advantages(roles: tuple[Role, Role], reward_PM: Array, num_samples: int, eps: float) -> Array:
    """Group-relative advantages of the members that the loss trains on: the G samples and perhaps demonstrations.

    Args:
        roles: of the demonstration, and of the demonstration of the other kind. A flag of the second is set only if the
            same flag of the first is.
        reward_PM: [P, G + 1 or G + 2] rewards of the samples and of these two, in this order; the last only if it
            counts.
        num_samples: G.
    """
    num_counted, num_trained = (num_samples + sum(flags) for flags in zip(*roles))
    return eq.group_advantage(reward_PM[:, :num_counted], eps)[:, :num_trained]


def advantages(config, scored: ScoredGroup) -> Array:
    """`member_advantages` by config.group, before the scaling."""
    return member_advantages(group_roles(config), scored.reward, scored.num_samples, config.group.eps)


def harmless_weight(wrong_kind_PG: Array, harmless_P: np.ndarray, target: float) -> Array:
    """[P] weights: 1 for harmful prompts; for harmless ones by the share of their samples that are of the wrong kind.

    Args:
        wrong_kind_PG: see `equations.nearer_to_other_kind`.
        harmless_P: which prompts are harmless.
        target: config.group.harmless_refusals; with 1 every weight is 1.
    """
    if target == 1 or not harmless_P.any():
        return jnp.ones(len(harmless_P))
    wrong_share = jnp.average(wrong_kind_PG.mean(axis=1), weights=harmless_P)
    return jnp.where(harmless_P, eq.kind_weight(wrong_share, target), 1.0)


def make_batch(context: Context, model: Transformer, params: Params, scored: ScoredGroup):
    """Group-relative advantages, scaled after the normalisation."""
    c, num_samples, info = context.config.group, scored.num_samples, {}
    weight_P = jnp.ones(len(scored.reward))
    if group_roles(context.config)[1].counts:
        wrong_kind_PG = eq.nearer_to_other_kind(
            scored.reward[:, :num_samples], scored.demo_reward, scored.reward[:, num_samples + 1]
        )
        weight_P = harmless_weight(wrong_kind_PG, scored.harmless, c.harmless_refusals)
        info = {"wrong": wrong_kind_PG}
    advantage_PM = advantages(context.config, scored)
    members = slice(advantage_PM.shape[1])
    demo_alpha = jnp.repeat(scored.alpha.mean(axis=1, keepdims=True), advantage_PM.shape[1] - num_samples, axis=1)
    alpha_PM = weight_P[:, None] * jnp.concatenate([scored.alpha, demo_alpha], axis=1)
    group = drop_masked(scored, members)
    mask_PMT = length_mask(group.response_len, group.response.shape[-1])
    batch = Batch(
        group=group,
        advantage=eq.scaled_advantage(alpha_PM, advantage_PM)[..., None],
        old_logp=scored.old_logp,
        ref_logp=reference_logprobs(context, scored),
        weights=losses.token_weights(context.config.policy_loss.reduce, mask_PMT, num_samples),
        trunk_states=scored.states_for_policy(scored.member_states(members)),
    )
    return batch, info


def response_advantages(config, scored: ScoredGroup, batch: Batch) -> dict[str, Array]:
    """See `Objective.response_advantages`."""
    samples = slice(scored.num_samples)
    return {"advantage": advantages(config, scored)[:, samples], "scaled": batch.advantage[:, samples, 0]}


def loss(trunk, policy: Policy, config, params: Params, batch: Batch):
    """GRPO's loss of a micro-batch.

    The members that follow the samples are demonstrations: see `losses.policy_loss`.
    """
    model, adapter = policy.model_and_adapter(trunk, params.policy)
    hidden = transformer.apply(model, batch.group, adapter, trunk_states=batch.trunk_states)
    return surrogate(model, config, hidden, batch)
