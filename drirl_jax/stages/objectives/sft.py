"""Supervised training on the demonstrations."""

from __future__ import annotations

from typing import NamedTuple

from drirl_jax import losses
from drirl_jax.models import transformer, vocabulary
from drirl_jax.models.transformer import Transformer
from drirl_jax.stages.base import Context, Policy
from drirl_jax.stages.objectives.base import Params, ScoredGroup
from drirl_jax.types import Array, Group, length_mask


class Demonstrations(NamedTuple):
    """The batch of an update of supervised training.

    Attributes:
        group: [P, 1] the demonstrations.
        weight: [P, 1, T] weights of their tokens in the loss.
        token_weight: [P, 1, T] weights of a mean over tokens, computed on the whole batch. None: this is the whole
            batch.
    """

    group: Group
    weight: Array
    token_weight: Array | None = None


def make_batch(context: Context, model: Transformer, params: Params, scored: ScoredGroup):
    """The demonstrations alone."""
    mask_P1T = length_mask(scored.group.response_len, scored.group.response.shape[-1])
    weight, token_weight = losses.REDUCE[context.config.policy_loss.reduce](mask_P1T), losses.weight_by_token(mask_P1T)
    return Demonstrations(scored.group, weight, token_weight), {}


def loss(trunk, policy: Policy, config, params: Params, batch: Demonstrations):
    """-log π of the demonstrations' tokens, at the model's own temperature."""
    model, adapter = policy.model_and_adapter(trunk, params.policy)
    hidden = transformer.apply(model, batch.group, adapter)

    token_weight = batch.token_weight
    if token_weight is None:
        token_weight = losses.weight_by_token(length_mask(batch.group.response_len, batch.group.response.shape[-1]))

    def token_loss(logp, entropy, weights):
        weight, token_weight = weights
        return -losses.weighted(logp, weight), {"entropy": losses.weighted(entropy, token_weight)}

    return vocabulary.token_sum(model, hidden, batch.group, 1.0, token_loss, (batch.weight, token_weight))
