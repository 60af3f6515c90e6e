"""Policy losses: pure jnp on log-probabilities, advantages and masks. Letters are those of types.py, also in the
annotations, which the tests check.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, ScalarLike, Shaped

from drirl_jax.equations import standard_scores
from drirl_jax.types import AnyArray, Array


def sequence_ratio(log_ratio_PGT: Float[AnyArray, "P G T"], mask_PGT: Bool[AnyArray, "P G T"]) -> Float[Array, "P G T"]:
    """log s_ig = mean_t (log π - log π_old), the same for all tokens of a response. (GSPO, arXiv 2507.18071)"""
    total_PG1 = jnp.sum(log_ratio_PGT * mask_PGT, -1, keepdims=True)
    return jnp.broadcast_to(total_PG1 / jnp.maximum(mask_PGT.sum(-1, keepdims=True), 1), log_ratio_PGT.shape)


class Ratio(NamedTuple):
    """A row of RATIO.

    Attributes:
        log_ratio: ([P, G, T] log π - log π_old, 0 at padding; [P, G, T] mask) -> [P, G, T] log ρ of each token.
        per_token: whether each token's ρ depends only on that token. Then a response's loss is a sum over its pieces.
    """

    log_ratio: Callable[[Array, Array], Array]
    per_token: bool


RATIO = {"token": Ratio(lambda log_ratio_PGT, mask_PGT: log_ratio_PGT, True), "sequence": Ratio(sequence_ratio, False)}


def clipped_surrogate(
    log_ratio: Float[AnyArray, "P G T"],
    advantage: Float[AnyArray, "P G #T"],
    clip_low: ScalarLike,
    clip_high: ScalarLike,
) -> tuple[Float[Array, "P G T"], Bool[Array, "P G T"]]:
    """Clipped surrogate of each token; the policy maximises it.

    min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A)     (PPO, arXiv 1707.06347)

    Args:
        log_ratio: [P, G, T] log ρ, with ρ = π / π_old, the policy over the policy that sampled.
        advantage: [P, G, 1 or T] scaled advantages; a constant.
        clip_low, clip_high: ε_low, ε_high in (0, 1) and (0, ∞).

    Returns:
        ([P, G, T] objective, [P, G, T] bool: ρ is outside the clip).
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return jnp.minimum(ratio * advantage, clipped * advantage), clipped != ratio


def off_policy_surrogate(logp: Float[AnyArray, "P G T"], advantage: Float[AnyArray, "P G #T"]) -> Float[Array, "P G T"]:
    """Objective of each token of a text that the policy did not sample; the policy maximises it.

    A log π where A > 0, A π where A <= 0: gradients A ∇log π and A π ∇log π     (ours)

    A > 0 pulls the policy towards the text, A <= 0 pushes it away. The push equals the average push if the policy had
    sampled the token itself, so it fades with the token's probability. A ∇log π would never fade.

    Args:
        logp: [P, G, T] log-probabilities under the policy.
        advantage: [P, G, 1 or T] scaled advantages; a constant.
    """
    return advantage * jnp.where(advantage > 0, logp, jnp.exp(logp))


def k3(logp: Float[AnyArray, "*shape"], ref_logp: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Unbiased, non-negative estimate of KL(π || π_ref) from a token that π sampled.

    k3 = exp(d) - d - 1,  d = log π_ref - log π     (GRPO, arXiv 2402.03300, eq. 4)

    Args:
        logp, ref_logp: [...] log-probabilities in nats.
    """
    d = ref_logp - logp
    return jnp.expm1(d) - d  # exp(d) - 1 - d, without the rounding that can make small values negative


def _by_response(share_PMT: Float[AnyArray, "P M T"], mask_PMT: Bool[AnyArray, "P M T"]) -> Float[Array, "P M T"]:
    """Weights from each token's share of its response; the mean is over the responses with tokens. See REDUCE."""
    num_responses = jnp.maximum(mask_PMT.any(-1).sum(), 1)
    return share_PMT * mask_PMT.shape[0] / num_responses


def weight_by_sequence(mask_PMT: Bool[AnyArray, "P M T"]) -> Float[Array, "P M T"]:
    """Mean over each response's tokens, then over responses: the paper's GRPO."""
    return _by_response(mask_PMT / jnp.maximum(mask_PMT.sum(-1, keepdims=True), 1), mask_PMT)


def weight_by_sequence_discounted(
    mask_PMT: Bool[AnyArray, "P M T"], discount: ScalarLike = 0.7
) -> Float[Array, "P M T"]:
    """Mean over each response's tokens, its t-th token with weight γ^t, then over responses.     (ours)

    The first tokens decide whether the policy refuses. t counts from 0 at the first token of the mask.
    """
    discounted_PMT = mask_PMT * discount ** (jnp.cumsum(mask_PMT, axis=-1) - 1)
    return _by_response(discounted_PMT / jnp.maximum(discounted_PMT.sum(-1, keepdims=True), 1), mask_PMT)


def weight_by_opening(mask_PMT: Bool[AnyArray, "P M T"]) -> Float[Array, "P M T"]:
    """½ `weight_by_sequence` + ½ `weight_by_sequence_discounted`.                         (ours)

    Half of the weight is on the first tokens, which decide whether the policy refuses; the other half keeps the whole
    answer. With equal weights the decision has one part in forty of a loss that is mostly style.
    """
    return (weight_by_sequence(mask_PMT) + weight_by_sequence_discounted(mask_PMT)) / 2


def weight_by_token(mask_PMT: Bool[AnyArray, "P M T"]) -> Float[Array, "P M T"]:
    """Mean over all tokens of the batch: long responses count for more. (DAPO, arXiv 2503.14476)"""
    return mask_PMT * mask_PMT.shape[0] / jnp.maximum(mask_PMT.sum(), 1)


def weight_by_constant(mask_PMT: Bool[AnyArray, "P M T"]) -> Float[Array, "P M T"]:
    """Sum over each response's tokens divided by T, then the mean over responses. (Dr. GRPO, arXiv 2503.20783)"""
    return _by_response(mask_PMT / mask_PMT.shape[-1], mask_PMT)


# Ways to average the tokens' values: [P, M, T] mask -> [P, M, T] weights w for `weighted`. The weights come from the
# whole batch, so that the mean of its micro-batches is the batch's value whatever their lengths.
REDUCE = {
    "sequence": weight_by_sequence,
    "discounted": weight_by_sequence_discounted,
    "opening": weight_by_opening,
    "token": weight_by_token,
    "constant": weight_by_constant,
}


def weighted(value: Shaped[AnyArray, "*#shape"], weight: Float[AnyArray, "*shape"]) -> Float[Array, ""]:
    """mean_i Σ_gt w_igt v_igt, scalar, over prompts i; the values of [P, M, 1 or T] may also be bool."""
    return jnp.sum(value * weight) / weight.shape[0]


class Weights(NamedTuple):
    """Weights of a batch's tokens.

    Attributes:
        members: [P, M, T] for the surrogate: the tokens of all members, by a row of REDUCE.
        sampled: [P, G, T] for terms estimated from samples (KL, value): the samples' tokens, by the same row.
        tokens: [P, G, T] for scalars per token: the samples' tokens, all equal, whatever REDUCE.
        responses: [P, M, T] for scalars per response: all members' tokens, equal for each response, whatever REDUCE.
    """

    members: Float[AnyArray, "P M T"]
    sampled: Float[AnyArray, "P G T"]
    tokens: Float[AnyArray, "P G T"]
    responses: Float[AnyArray, "P M T"]


def token_weights(reduce: str, mask_PMT: Bool[AnyArray, "P M T"], sampled: int) -> Weights:
    """The weights by a row of REDUCE; the first `sampled` members of each group are samples."""
    mask_PGT = mask_PMT[:, :sampled]
    return Weights(
        members=REDUCE[reduce](mask_PMT),
        sampled=REDUCE[reduce](mask_PGT),
        tokens=weight_by_token(mask_PGT),
        responses=weight_by_sequence(mask_PMT),
    )


def prompt_weights(weight_PK: Float[AnyArray, "P K"]) -> Float[Array, " P"]:
    """[P] weights of a batch's prompts: 0 for a prompt whose pairs all weigh 0, equal for the others, mean 1.

    Like those of REDUCE they come from the whole batch.

    Args:
        weight_PK: [P, K] >= 0, weights of each prompt's pairs.
    """
    has_pair_P = (weight_PK > 0).any(axis=1)
    return has_pair_P * has_pair_P.size / jnp.maximum(has_pair_P.sum(), 1)


def policy_loss(
    logp_PMT: Float[AnyArray, "P M T"],
    old_logp_PGT: Float[AnyArray, "P G T"],
    ref_logp_PGT: Float[AnyArray, "P G T"] | None,
    advantage_PMT: Float[AnyArray, "P M #T"],
    mask_PMT: Bool[AnyArray, "P M T"],
    weights: Weights,
    *,
    clip_low: ScalarLike,
    clip_high: ScalarLike,
    beta_kl: ScalarLike,
    ratio: str,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """GRPO's loss: β_kl · k3 minus the clipped surrogate, averaged over real tokens.

    L = -mean[ min(ρ A, clip(ρ) A) ] + β_kl mean[ k3 ]     (GRPO, arXiv 2402.03300, eq. 3)

    A group may have M >= G members: the first G are samples, the others demonstrations (ours; off-policy members as in
    LUFFY, arXiv 2504.14945). Demonstrations have `off_policy_surrogate` in place of the clipped one, and no k3, which
    estimates the KL from the policy's own samples only.

    Args:
        logp_PMT: [P, M, T] log-probabilities under the policy.
        old_logp_PGT, ref_logp_PGT: [P, G, T] under the sampler and the reference; the latter is None if β_kl is 0.
        advantage_PMT: [P, M, 1 or T] scaled advantages.
        mask_PMT: [P, M, T] bool, True at real response tokens.
        weights: see `token_weights`; computed on the whole batch, as these prompts may be a micro-batch of it.
        clip_low, clip_high, beta_kl: see `clipped_surrogate`; β_kl >= 0.
        ratio: a row of RATIO.

    Returns:
        (scalar loss, {"kl", "clipped", "sampler_gap"}): mean k3, absent without a reference; the share of tokens whose
        ratio is outside the clip; and the mean |log π - log π_sampler|, in nats. Each is a mean over the sampled tokens
        with equal weights.
    """
    sampled = old_logp_PGT.shape[1]
    mask_PGT = mask_PMT[:, :sampled]
    # Values at padding must not pass through exp: an overflow, masked afterwards, would be inf · 0.
    logp_PMT = jnp.where(mask_PMT, logp_PMT, 0.0)
    logp_PGT, demo_logp = logp_PMT[:, :sampled], logp_PMT[:, sampled:]
    logp_change_PGT = logp_PGT - jnp.where(mask_PGT, old_logp_PGT, 0.0)
    log_ratio_PGT = RATIO[ratio].log_ratio(logp_change_PGT, mask_PGT)
    sample_objective, clipped = clipped_surrogate(log_ratio_PGT, advantage_PMT[:, :sampled], clip_low, clip_high)
    demo_objective = off_policy_surrogate(demo_logp, advantage_PMT[:, sampled:])
    scalars = {
        "clipped": weighted(clipped, weights.tokens),
        "sampler_gap": weighted(jnp.abs(logp_change_PGT), weights.tokens),
    }
    loss = -weighted(jnp.concatenate([sample_objective, demo_objective], axis=1), weights.members)
    if ref_logp_PGT is not None:
        k3_PGT = k3(logp_PGT, jnp.where(mask_PGT, ref_logp_PGT, 0.0))
        scalars["kl"] = weighted(k3_PGT, weights.tokens)
        loss += beta_kl * weighted(k3_PGT, weights.sampled)
    return loss, scalars


# ----------------------------------------------------------------------------------------------------------
# PPO-S: a learned value of each prefix of a response, instead of the group's mean
# ----------------------------------------------------------------------------------------------------------


def generalised_advantage(
    reward_PG: Float[AnyArray, "P G"],
    value_PGT: Float[AnyArray, "P G T"],
    mask_PGT: Bool[AnyArray, "P G T"],
    gamma: ScalarLike,
    lam: ScalarLike,
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
    """Generalised advantage estimates; the whole reward comes with a response's last token.

    A_t = Σ_k (γλ)^k δ_{t+k},  δ_t = r_t + γ V_{t+1} - V_t     (GAE, arXiv 1506.02438, eq. 16; V after the end is 0)

    Args:
        reward_PG: [P, G] rewards of the responses.
        value_PGT: [P, G, T] V_t, of the text before token t.
        mask_PGT: [P, G, T] bool, True at real tokens.
        gamma, lam: γ and λ in [0, 1].

    Returns:
        ([P, G, T] advantages, [P, G, T] returns A + V), 0 at padding.
    """
    value_PGT = jnp.where(mask_PGT, value_PGT, 0.0)
    next_value_PGT = jnp.pad(value_PGT[..., 1:], ((0, 0), (0, 0), (0, 1)))
    is_last_PGT = mask_PGT & ~jnp.pad(mask_PGT[..., 1:], ((0, 0), (0, 0), (0, 1)))
    delta_PGT = is_last_PGT * reward_PG[..., None] + gamma * next_value_PGT - value_PGT

    def accumulate(advantage_PG, delta_PG):
        advantage_PG = delta_PG + gamma * lam * advantage_PG
        return advantage_PG, advantage_PG

    # δ is 0 at padding, so each response's sum starts with its last token.
    _, advantage_TPG = jax.lax.scan(accumulate, jnp.zeros_like(reward_PG), jnp.moveaxis(delta_PGT, -1, 0), reverse=True)
    advantage_PGT = jnp.moveaxis(advantage_TPG, 0, -1) * mask_PGT
    return advantage_PGT, advantage_PGT + value_PGT


def whitened(
    advantage_PGT: Float[AnyArray, "P G T"], mask_PGT: Bool[AnyArray, "P G T"], eps: ScalarLike = 1e-6
) -> Float[Array, "P G T"]:
    """(A - mean) / (std + ε) over all real tokens of the batch, population std; 0 at padding.

    Args:
        advantage_PGT: [P, G, T] advantages.
        mask_PGT: [P, G, T] bool, True at real tokens.
        eps: ε >= 0, in units of reward.

    Returns:
        [P, G, T] float32; 0 everywhere if all advantages are equal: see `equations.standard_scores`.
    """
    return standard_scores(advantage_PGT, eps, where=mask_PGT)


def value_loss(
    value: Float[AnyArray, "*shape"],
    old_value: Float[AnyArray, "*shape"],
    returns: Float[AnyArray, "*shape"],
    clip: ScalarLike,
) -> Float[Array, "*shape"]:
    """Loss of each token's value, clipped around the value at the time of sampling.

    ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)     (the released code of PPO, arXiv 1707.06347)

    Args:
        value, old_value, returns: [...] V, V_old and R.
        clip: ε > 0, in units of reward.
    """
    clipped = jnp.clip(value, old_value - clip, old_value + clip)
    return 0.5 * jnp.maximum((value - returns) ** 2, (clipped - returns) ** 2)


# ----------------------------------------------------------------------------------------------------------
# DPO-S
# ----------------------------------------------------------------------------------------------------------


# The place of α in the DPO loss: (margin, α, β) -> loss.
ALPHA_ON = {
    "beta": lambda margin, alpha, beta: -jax.nn.log_sigmoid(alpha * beta * margin),
    "loss": lambda margin, alpha, beta: -alpha * jax.nn.log_sigmoid(beta * margin),
}


def preference(
    margin: Float[AnyArray, "*shape"], alpha: Float[AnyArray, "*shape"], beta: ScalarLike, alpha_on: str
) -> Float[Array, "*shape"]:
    """Loss of a pair of a chosen and a rejected response.

    ℓ = -log σ(αβ m) ('beta') or -α log σ(β m) ('loss'),  m = log π/π_ref (chosen) - log π/π_ref (rejected)
    (DPO, arXiv 2305.18290, eq. 7; α on β as in DAMA, arXiv 2502.01943)

    Args:
        margin: [...] m, of whole responses, in nats.
        alpha: [...] α > 0, a constant for differentiation.
        beta: β > 0.
        alpha_on: a row of ALPHA_ON.
    """
    return ALPHA_ON[alpha_on](margin, jax.lax.stop_gradient(alpha), beta)
