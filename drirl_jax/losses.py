"""Policy losses: pure jnp on log-probabilities, advantages and masks. Letters are those of types.py."""

from __future__ import annotations

import jax.numpy as jnp

from drirl_jax.types import Array


def clipped_surrogate(logp: Array, old_logp: Array, advantage: Array, clip_low: float, clip_high: float):
    """Clipped surrogate of each token, to be maximised.

    min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A),  ρ = exp(log π - log π_old)     (PPO, arXiv 1707.06347)

    Args:
        logp: [P, G, T] log-probabilities under the policy.
        old_logp: [P, G, T] log-probabilities under the policy that sampled; a constant.
        advantage: [P, G] scaled advantages; a constant.
        clip_low, clip_high: ε_low, ε_high in (0, 1) and (0, ∞).

    Returns:
        ([P, G, T] objective, [P, G, T] ratio ρ).
    """
    ratio = jnp.exp(logp - old_logp)
    advantage = advantage[..., None]
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return jnp.minimum(ratio * advantage, clipped * advantage), ratio


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


def mean_by_sequence(value_PGT: Array, mask_PGT: Array) -> Array:
    """Mean over each response's tokens, then over responses: the paper's GRPO. Scalar."""
    return jnp.mean(jnp.sum(value_PGT * mask_PGT, -1) / jnp.maximum(mask_PGT.sum(-1), 1))


def mean_by_sequence_discounted(value_PGT: Array, mask_PGT: Array, discount: float = 0.7) -> Array:
    """Mean over each response's tokens, token t with weight γ^t, then over responses. Scalar.     (ours)

    Σ_t γ^t v_t / max(Σ_t γ^t, 1), sums over the real tokens: whether to refuse is decided in the first ones.
    """
    weight_PGT = mask_PGT * discount ** jnp.arange(mask_PGT.shape[-1])
    return jnp.mean(jnp.sum(value_PGT * weight_PGT, -1) / jnp.maximum(weight_PGT.sum(-1), 1))


REDUCE = {"sequence": mean_by_sequence, "discounted": mean_by_sequence_discounted}


def policy_loss(
    logp_PMT: Array,
    old_logp_PGT: Array,
    ref_logp_PGT: Array | None,
    advantage_PM: Array,
    mask_PMT: Array,
    *,
    clip_low: float,
    clip_high: float,
    beta_kl: float,
    reduce: str,
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
        clip_low, clip_high, beta_kl: see `clipped_surrogate`; β_kl >= 0.
        reduce: a row of REDUCE.

    Returns:
        (scalar loss, {"kl", "clipped"}: mean k3, absent without a reference, and the share of sampled tokens whose
        ratio lies outside the clip).
    """
    mean = REDUCE[reduce]
    sampled = old_logp_PGT.shape[1]
    mask_PGT = mask_PMT[:, :sampled]
    # What stands at padding must not pass through exp: masked afterwards, an overflow would be inf · 0.
    logp_PMT = jnp.where(mask_PMT, logp_PMT, 0.0)
    logp_PGT, other_logp = logp_PMT[:, :sampled], logp_PMT[:, sampled:]
    old_logp_PGT = jnp.where(mask_PGT, old_logp_PGT, 0.0)
    objective, ratio = clipped_surrogate(logp_PGT, old_logp_PGT, advantage_PM[:, :sampled], clip_low, clip_high)
    other = off_policy_surrogate(other_logp, advantage_PM[:, sampled:])
    outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    scalars = {"clipped": mean(outside.astype(jnp.float32), mask_PGT)}
    value = -mean(jnp.concatenate([objective, other], axis=1), mask_PMT)
    if ref_logp_PGT is not None:
        scalars["kl"] = mean(k3(logp_PGT, jnp.where(mask_PGT, ref_logp_PGT, 0.0)), mask_PGT)
        value += beta_kl * scalars["kl"]
    return value, scalars
