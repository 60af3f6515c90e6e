"""Policy losses: pure jnp on log-probabilities, advantages and masks. Letters are those of types.py."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from drirl_jax.types import Array


def sequence_ratio(log_ratio_PGT: Array, mask_PGT: Array) -> Array:
    """log s_ig = mean_t (log π - log π_old) over a response's tokens, at every one of them. (GSPO, arXiv 2507.18071)"""
    total_PG1 = jnp.sum(log_ratio_PGT * mask_PGT, -1, keepdims=True)
    return jnp.broadcast_to(total_PG1 / jnp.maximum(mask_PGT.sum(-1, keepdims=True), 1), log_ratio_PGT.shape)


# Logarithm of the ratio ρ of each token: ([P, G, T] log π - log π_old, 0 at padding; [P, G, T] mask) -> [P, G, T].
RATIO = {"token": lambda log_ratio_PGT, mask_PGT: log_ratio_PGT, "sequence": sequence_ratio}


def clipped_surrogate(log_ratio: Array, advantage: Array, clip_low: float, clip_high: float):
    """Clipped surrogate of each token, to be maximised.

    min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A)     (PPO, arXiv 1707.06347)

    Args:
        log_ratio: [P, G, T] log ρ, with ρ = π / π_old under the policy and under the one that sampled.
        advantage: [P, G] scaled advantages; a constant.
        clip_low, clip_high: ε_low, ε_high in (0, 1) and (0, ∞).

    Returns:
        ([P, G, T] objective, [P, G, T] bool: ρ lies outside of the clip).
    """
    ratio = jnp.exp(log_ratio)
    advantage = advantage[..., None]
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return jnp.minimum(ratio * advantage, clipped * advantage), clipped != ratio


def off_policy_surrogate(logp: Array, advantage: Array) -> Array:
    """Objective of each token of a text that the policy did not sample, to be maximised: pull towards it, or push off.

    A log π where A > 0, A π where A <= 0: gradients A ∇log π and A π ∇log π     (ours)

    The push is what the policy would feel on average from sampling the token itself, so it ends with the token's
    probability; A ∇log π would go on for ever.

    Args:
        logp: [P, G, T] log-probabilities under the policy.
        advantage: [P, G] scaled advantages; a constant.
    """
    advantage = advantage[..., None]
    return advantage * jnp.where(advantage > 0, logp, jnp.exp(logp))


def k3(logp: Array, ref_logp: Array) -> Array:
    """Unbiased, non-negative estimate of KL(π || π_ref) from a token sampled by π.

    k3 = exp(d) - d - 1,  d = log π_ref - log π     (GRPO, arXiv 2402.03300, eq. 4)

    Args:
        logp, ref_logp: [...] log-probabilities in nats.
    """
    d = ref_logp - logp
    return jnp.expm1(d) - d  # exp(d) - 1 - d, without the rounding that makes small values negative


def _by_response(share_PMT: Array, mask_PMT: Array) -> Array:
    """Each response's shares, spread over the responses that have tokens; see REDUCE."""
    responses = jnp.maximum(mask_PMT.any(-1).sum(), 1)
    return share_PMT * mask_PMT.shape[0] / responses


def weight_by_sequence(mask_PMT: Array) -> Array:
    """Mean over each response's tokens, then over responses: the paper's GRPO."""
    return _by_response(mask_PMT / jnp.maximum(mask_PMT.sum(-1, keepdims=True), 1), mask_PMT)


def weight_by_sequence_discounted(mask_PMT: Array, discount: float = 0.7) -> Array:
    """Mean over each response's tokens, token t with weight γ^t, then over responses.     (ours)

    Whether to refuse is decided in the first tokens.
    """
    falling_PMT = mask_PMT * discount ** jnp.arange(mask_PMT.shape[-1])
    return _by_response(falling_PMT / jnp.maximum(falling_PMT.sum(-1, keepdims=True), 1), mask_PMT)


def weight_by_token(mask_PMT: Array) -> Array:
    """Mean over all tokens of the batch: long responses count for more. (DAPO, arXiv 2503.14476)"""
    return mask_PMT * mask_PMT.shape[0] / jnp.maximum(mask_PMT.sum(), 1)


def weight_by_constant(mask_PMT: Array) -> Array:
    """Sum over each response's tokens by the most that it could have, T, then the mean. (Dr. GRPO, arXiv 2503.20783)"""
    return _by_response(mask_PMT / mask_PMT.shape[-1], mask_PMT)


# How values of tokens become one: [P, M, T] mask -> [P, M, T] weights w, of which `weighted` makes the value. They are
# made of the whole batch, so that its micro-batches average to it whatever their lengths.
REDUCE = {
    "sequence": weight_by_sequence,
    "discounted": weight_by_sequence_discounted,
    "token": weight_by_token,
    "constant": weight_by_constant,
}


def weighted(value_PMT: Array, weight_PMT: Array) -> Array:
    """mean_i Σ_gt w_igt v_igt, scalar."""
    return jnp.sum(value_PMT * weight_PMT) / weight_PMT.shape[0]


class Weights(NamedTuple):
    """Weights of a batch's tokens: [P, M, T] of all members' for the surrogate, [P, G, T] of the sampled ones' for what
    is estimated from samples."""

    members: Array
    sampled: Array


def token_weights(reduce: str, mask_PMT: Array, sampled: int) -> Weights:
    """The weights by a row of REDUCE; the first `sampled` members of each group were sampled."""
    return Weights(REDUCE[reduce](mask_PMT), REDUCE[reduce](mask_PMT[:, :sampled]))


def policy_loss(
    logp_PMT: Array,
    old_logp_PGT: Array,
    ref_logp_PGT: Array | None,
    advantage_PM: Array,
    mask_PMT: Array,
    weights: Weights,
    *,
    clip_low: float,
    clip_high: float,
    beta_kl: float,
    ratio: str,
) -> tuple[Array, dict[str, Array]]:
    """GRPO's loss: minus the clipped surrogate plus β_kl · k3, averaged over real tokens.

    L = -mean[ min(ρ A, clip(ρ) A) ] + β_kl mean[ k3 ]     (GRPO, arXiv 2402.03300, eq. 3)

    A group may have M >= G members of which only the first G were sampled; the others are demonstrations (ours;
    off-policy members as in LUFFY, arXiv 2504.14945), with `off_policy_surrogate` for the clipped one. k3 leaves them
    out, as it estimates the KL from the policy's own samples only.

    Args:
        logp_PMT: [P, M, T] under the policy.
        old_logp_PGT, ref_logp_PGT: [P, G, T] under the sampler and the reference, the latter None if β_kl is 0.
        advantage_PM: [P, M] scaled advantages.
        mask_PMT: [P, M, T] bool, True at real response tokens.
        weights: see `token_weights`; of the whole batch, of which these may be some prompts.
        clip_low, clip_high, beta_kl: see `clipped_surrogate`; β_kl >= 0.
        ratio: a row of RATIO.

    Returns:
        (scalar loss, {"kl", "clipped"}: mean k3, absent without a reference, and the share of sampled tokens whose
        ratio lies outside the clip).
    """
    sampled = old_logp_PGT.shape[1]
    mask_PGT = mask_PMT[:, :sampled]
    # What stands at padding must not pass through exp: masked afterwards, an overflow would be inf · 0.
    logp_PMT = jnp.where(mask_PMT, logp_PMT, 0.0)
    logp_PGT, other_logp = logp_PMT[:, :sampled], logp_PMT[:, sampled:]
    log_ratio_PGT = RATIO[ratio](logp_PGT - jnp.where(mask_PGT, old_logp_PGT, 0.0), mask_PGT)
    objective, outside = clipped_surrogate(log_ratio_PGT, advantage_PM[:, :sampled], clip_low, clip_high)
    other = off_policy_surrogate(other_logp, advantage_PM[:, sampled:])
    scalars = {"clipped": weighted(outside, weights.sampled)}
    value = -weighted(jnp.concatenate([objective, other], axis=1), weights.members)
    if ref_logp_PGT is not None:
        scalars["kl"] = weighted(k3(logp_PGT, jnp.where(mask_PGT, ref_logp_PGT, 0.0)), weights.sampled)
        value += beta_kl * scalars["kl"]
    return value, scalars
