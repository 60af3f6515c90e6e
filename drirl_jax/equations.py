"""Every equation of DR-IRL, in the order of the method: pure jnp, no parameters, no config, no I/O.

Sources: DR-IRL is "Inverse Reinforcement Learning with Dynamic Reward Scaling for LLM Alignment"
(arXiv 2503.18991); ML-IRL for LLMs is arXiv 2405.17888; GRPO is arXiv 2402.03300. "Ours" marks a choice that is
not the paper's. Letters are those of types.py, also in the annotations, which the tests check; σ is the logistic
sigmoid.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, ScalarLike

from drirl_jax.types import AnyArray, Array

# ----------------------------------------------------------------------------------------------------------
# 2. Category rewards by maximum-likelihood IRL
# ----------------------------------------------------------------------------------------------------------


def irl_logistic(
    demo_reward: Float[AnyArray, "*#shape"], sample_reward: Float[AnyArray, "*#shape"], beta: ScalarLike
) -> Float[Array, "*shape"]:
    """Loss of one (demonstration, sample) pair.

    ℓ = -log σ((r(x, y) - r(x, ỹ)) / β)     (DR-IRL section 2 with the bounded form of ML-IRL)

    Args:
        demo_reward: [...] r(x, y) of the demonstration.
        sample_reward: [...] r(x, ỹ) of the policy's sample.
        beta: β > 0, in units of reward.

    Returns:
        [...] loss >= 0; log 2 if the two rewards are equal.
    """
    return -jax.nn.log_sigmoid((demo_reward - sample_reward) / beta)


def irl_linear(
    demo_reward: Float[AnyArray, "*shape"],
    sample_reward: Float[AnyArray, "*shape"],
    beta: ScalarLike,
    penalty: ScalarLike,
) -> Float[AnyArray, "*shape"]:
    """Loss of one pair in the objective's linear form. Without the penalty on the rewards it has no lower bound.

    ℓ = -(r(x, y) - r(x, ỹ)) / β + λ (r(x, y)² + r(x, ỹ)²)     (ML-IRL, with λ)

    Args:
        demo_reward, sample_reward, beta: see `irl_logistic`.
        penalty: λ > 0.

    Returns:
        [...] loss; smallest at r(x, y) = -r(x, ỹ) = 1 / (2 β λ).
    """
    return (sample_reward - demo_reward) / beta + penalty * (demo_reward**2 + sample_reward**2)


def irl_token(
    demo_reward_T: Float[AnyArray, "*#pair T"],
    sample_reward_T: Float[AnyArray, "*#pair T"],
    mask_T: Bool[AnyArray, "*#pair T"],
    beta: ScalarLike,
) -> Float[Array, "*pair"]:
    """Loss of one pair, token by token: it compares the rewards after each token, at the same place in both texts.

    ℓ = mean_t -log σ((r_t(x, y) - r_t(x, ỹ)) / β)     over the masked t (the released code of ML-IRL, with β = 1)

    Args:
        demo_reward_T, sample_reward_T: [..., T] r_t of the two texts, up to and with token t.
        mask_T: [..., T] bool, True from the first token in which the texts differ, at positions that are real in both.
        beta: β > 0, in units of reward.

    Returns:
        [...] loss >= 0; 0 if the mask is empty (two equal texts).
    """
    loss_T = irl_logistic(demo_reward_T, sample_reward_T, beta)
    return jnp.sum(loss_T * mask_T, axis=-1) / jnp.maximum(mask_T.sum(axis=-1), 1)


def zscore(
    reward: Float[AnyArray, "*shape"], mean: Float[AnyArray, "*#shape"], std: Float[AnyArray, "*#shape"]
) -> Float[AnyArray, "*shape"]:
    """r ← (r - μ_c) / σ_c, so that the gaps of different categories are comparable.

    Args:
        reward: [...] raw rewards.
        mean, std: [...] μ_c and σ_c > 0 of each row's category.
    """
    return (reward - mean) / std


# ----------------------------------------------------------------------------------------------------------
# Rewards of help against harm
# ----------------------------------------------------------------------------------------------------------


def safe_completion(
    help_PM: Float[AnyArray, "P M"], safety_PM: Float[AnyArray, "P M"], harmless_P: Bool[AnyArray, " P"]
) -> Float[Array, "P M"]:
    """R = h · s with h = σ(H) and s = σ(S); s = 1 for a harmless prompt. (arXiv 2508.09224; the sigmoids are ours)

    A refusal that offers an alternative beats a bare one: both are safe, and only the first one helps.

    Args:
        help_PM: [P, M] rewards H of helpfulness, standardised.
        safety_PM: [P, M] rewards S of the prompt's own category, standardised.
        harmless_P: [P] bool, which prompts have no harm to avoid.

    Returns:
        [P, M] R in [0, 1].
    """
    return jax.nn.sigmoid(help_PM) * jnp.where(harmless_P[:, None], 1.0, jax.nn.sigmoid(safety_PM))


def constrained_reward(
    help_PM: Float[AnyArray, "P M"], harm_PM: Float[AnyArray, "P M"], multiplier_P: Float[AnyArray, " P"]
) -> Float[AnyArray, "P M"]:
    """R = (H - λ_c F) / (1 + λ_c): help, less the price of harm. (Safe RLHF, arXiv 2310.12773)

    The division keeps the reward's scale while λ grows.

    Args:
        help_PM: [P, M] rewards H of helpfulness.
        harm_PM: [P, M] harm F: minus the reward of the prompt's own category.
        multiplier_P: [P] λ_c >= 0 of the prompt's category.

    Returns:
        [P, M] R, in units of reward; H if λ_c is 0.
    """
    return (help_PM - multiplier_P[:, None] * harm_PM) / (1 + multiplier_P[:, None])


def dual_ascent(
    multiplier_C: Float[AnyArray, " C"],
    harm_C: Float[AnyArray, " C"],
    present_C: Bool[AnyArray, " C"],
    limit: ScalarLike,
    rate: ScalarLike,
    max_multiplier: ScalarLike,
) -> Float[Array, " C"]:
    """λ_c ← clip(λ_c + κ (mean F - d), 0, λ_max): it grows while the mean harm exceeds its limit. (Safe RLHF's dual
    ascent on λ itself; their code takes its steps on log λ)

    Args:
        multiplier_C: [C] λ_c in [0, λ_max].
        harm_C: [C] mean F of the batch's samples.
        present_C: [C] bool; a category that is not in the batch keeps its λ_c. One whose mean is not finite does too.
        limit: d, in units of reward.
        rate: κ >= 0.
        max_multiplier: λ_max > 0.

    Returns:
        [C] λ_c in [0, λ_max].
    """
    moved_C = jnp.clip(multiplier_C + rate * (harm_C - limit), 0.0, max_multiplier)
    return jnp.where(present_C & jnp.isfinite(harm_C), moved_C, multiplier_C)


# ----------------------------------------------------------------------------------------------------------
# 3. GRPO-S
# ----------------------------------------------------------------------------------------------------------


def standard_scores(
    value: Float[AnyArray, "*shape"],
    eps: ScalarLike,
    *,
    where: Bool[AnyArray, "*#shape"] | None = None,
    axis: int | None = None,
) -> Float[Array, "*shape"]:
    """z = (x - mean) / (std + ε), population std, of any finite float32 numbers; exactly 0 if all are equal.

    Three problems need care. Squares of large numbers overflow: all numbers are first divided by a power of two, which
    is exact. The mean has a rounding error of about 1e-7 of the numbers' size, perhaps more than their spread: the
    centred numbers are centred once more. Equal numbers would show only this error: a comparison finds them.

    Args:
        value: [...] numbers.
        eps: ε >= 0, in the numbers' unit.
        where: [...] bool, the numbers that count; default all.
        axis: the axis of mean and std; default all axes.

    Returns:
        [...] float32, 0 where `where` is False; gradients are finite.

    >>> standard_scores(jnp.array([1e20, -1e20]), eps=0.0).tolist()
    [1.0, -1.0]
    """
    value = value.astype(jnp.float32)
    where = jnp.ones(value.shape, bool) if where is None else jnp.broadcast_to(where, value.shape)
    reduction: dict[str, Any] = {"axis": axis, "keepdims": True, "where": where}
    count = jnp.maximum(jnp.sum(where, axis=axis, keepdims=True), 1)
    factor = _inverse_power_of_two(jnp.max(jnp.abs(value), initial=0.0, **reduction))
    scaled = jnp.where(where, value, 0.0) * factor
    all_equal = jnp.max(scaled, initial=-jnp.inf, **reduction) <= jnp.min(scaled, initial=jnp.inf, **reduction)
    for _ in range(2):
        scaled = scaled - jnp.sum(scaled, **reduction) / count
    variance = jnp.sum(scaled**2, **reduction) / count
    zero_spread = all_equal | (variance == 0)  # NaN is neither of these, and stays NaN
    std = jnp.sqrt(jnp.where(zero_spread, 1.0, variance))  # the square root has an infinite slope at 0
    return jnp.where(where & ~zero_spread, scaled / (std + eps * factor), 0.0)


def _inverse_power_of_two(magnitude: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2^-e of float32 numbers >= 0 in [2^e, 2^(e+1)), exact as it uses the bits; a constant for differentiation."""
    exponent = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(magnitude), jnp.int32) >> 23  # e + 127
    return jax.lax.bitcast_convert_type(jnp.clip(254 - exponent, 1, 254) << 23, jnp.float32)


def group_advantage(reward_PG: Float[AnyArray, "P G"], eps: ScalarLike = 1e-6) -> Float[Array, "P G"]:
    """Group-relative advantage.

    Â_ig = (R_ig - mean_g R_i·) / (std_g R_i· + ε), population std; 0 for a group of zero spread. (GRPO)

    Args:
        reward_PG: [P, G] finite rewards.
        eps: ε >= 0, in units of reward.

    Returns:
        [P, G] float32 advantages, mean 0 in each group and standard deviation at most 1; see `standard_scores`.

    >>> group_advantage(jnp.array([[3.0, 1.0, 1.0, 3.0]]), eps=0.0).tolist()  # mean 2, std 1
    [[1.0, -1.0, -1.0, 1.0]]
    """
    return standard_scores(reward_PG, eps, axis=-1)


def part_similarity(
    response_PGKE: Float[AnyArray, "P G K E"], demo_PLE: Float[AnyArray, "P L E"]
) -> Float[Array, "P G K L"]:
    """s_kℓ = cos(Φ(y^k), Φ(o^ℓ)), the cosine of L2-normalised part embeddings. (DR-IRL, data hardness)

    Args:
        response_PGKE: [P, G, K, E] unit embeddings of each response's parts.
        demo_PLE: [P, L, E] unit embeddings of the demonstration's parts.

    Returns:
        [P, G, K, L] cosines in [-1, 1].
    """
    return jnp.einsum("pgke,ple->pgkl", response_PGKE, demo_PLE, precision="highest")


def align_response(
    s_PGKL: Float[AnyArray, "P G K L"], response_mask_PGK: Bool[AnyArray, "P G K"], demo_mask_PL: Bool[AnyArray, "P L"]
) -> Float[Array, "P G"]:
    """W = mean_k max_ℓ s_kℓ: how well each part of the response matches some part of the demonstration.

    Args:
        s_PGKL: [P, G, K, L] cosines.
        response_mask_PGK: [P, G, K] bool, True at real parts; at least one for each response.
        demo_mask_PL: [P, L] bool, True at real parts; at least one for each demonstration.

    Returns:
        [P, G] W in [-1, 1].

    >>> s = jnp.array([[[[1.0, 0.0], [0.5, 0.25]]]])  # two parts of a response, two of the demonstration
    >>> align_response(s, jnp.ones((1, 1, 2), bool), jnp.ones((1, 2), bool)).item()  # (1 + ½) / 2
    0.75
    """
    best_PGK = jnp.max(jnp.where(demo_mask_PL[:, None, None, :], s_PGKL, -jnp.inf), axis=-1)
    return jnp.mean(best_PGK, axis=-1, where=response_mask_PGK)


def align_demo(
    s_PGKL: Float[AnyArray, "P G K L"], response_mask_PGK: Bool[AnyArray, "P G K"], demo_mask_PL: Bool[AnyArray, "P L"]
) -> Float[Array, "P G"]:
    """W = mean_ℓ max_k s_kℓ: how well each part of the demonstration matches some part of the response.

    Arguments and result are those of `align_response`.
    """
    best_PGL = jnp.max(jnp.where(response_mask_PGK[..., None], s_PGKL, -jnp.inf), axis=-2)
    return jnp.mean(best_PGL, axis=-1, where=demo_mask_PL[:, None, :])


def align_both(
    s_PGKL: Float[AnyArray, "P G K L"], response_mask_PGK: Bool[AnyArray, "P G K"], demo_mask_PL: Bool[AnyArray, "P L"]
) -> Float[Array, "P G"]:
    """The mean of `align_response` and `align_demo`."""
    masks = response_mask_PGK, demo_mask_PL
    return (align_response(s_PGKL, *masks) + align_demo(s_PGKL, *masks)) / 2


def data_hardness(delta: Float[AnyArray, "*shape"], baseline: Float[AnyArray, "*#shape"]) -> Float[Array, "*shape"]:
    """α^D = σ(δ) / σ(δ̄_c) with δ = 1 - W. (DR-IRL)

    Args:
        delta: [...] δ in [0, 2].
        baseline: [...] δ̄_c of each row's category.

    Returns:
        [...] α^D > 0; above 1 if the response is farther from the demonstration than usual.
    """
    return jax.nn.sigmoid(delta) / jax.nn.sigmoid(baseline)


def gap(demo_reward_P: Float[AnyArray, " P"], reward_PG: Float[AnyArray, "P G"]) -> Float[AnyArray, "P G"]:
    """ρ_ig = R*_i - R_ig, [P, G]: how far a response's reward is below the demonstration's."""
    return demo_reward_P[:, None] - reward_PG


def category_mean(
    value_PG: Float[AnyArray, "P G"],
    category_P: Int[AnyArray, " P"],
    num_categories: int,
    keep_PG: Bool[AnyArray, "P G"] | None = None,
) -> tuple[Float[Array, " C"], Bool[Array, " C"]]:
    """Mean of the (kept) values of each category, and which categories have any.

    Args:
        value_PG: [P, G].
        category_P: [P] int32 in [0, C).
        num_categories: C.
        keep_PG: [P, G] bool, default all.

    Returns:
        ([C] mean, 0 for an absent category; [C] bool, whether the category is present).
    """
    keep_PG = jnp.ones_like(value_PG, bool) if keep_PG is None else keep_PG
    total_C = jax.ops.segment_sum(jnp.where(keep_PG, value_PG, 0.0).sum(-1), category_P, num_categories)
    count_C = jax.ops.segment_sum(keep_PG.sum(-1), category_P, num_categories)
    return total_C / jnp.maximum(count_C, 1), count_C > 0


def mask_top(
    gap_PG: Float[AnyArray, "P G"], category_P: Int[AnyArray, " P"], baseline_C: Float[AnyArray, " C"], drop: float
) -> Bool[Array, "P G"]:
    """Keep-mask of the gaps: of each category's M gaps it drops the ⌊drop·M⌋ with the largest (ρ - ρ̄_c)².

    (DR-IRL masks outliers above a threshold τ; here τ is that quantile. In a tie the later gap stays.)

    Args:
        gap_PG: [P, G] gaps ρ.
        category_P: [P] int32.
        baseline_C: [C] running means ρ̄_c.
        drop: share in [0, 1), a Python number: ⌊drop·M⌋ is exact in decimals: 0.29·100 is 29, not just below.

    Returns:
        [P, G] bool, True for a kept gap; each category in the batch keeps at least one.
    """
    group_size = gap_PG.shape[1]
    # |ρ - ρ̄_c| has the order of the squares, which may overflow.
    distance_N = jnp.abs(gap_PG - baseline_C[category_P][:, None]).reshape(-1)
    category_N = jnp.repeat(category_P, group_size)
    same_category_NN = category_N[:, None] == category_N[None, :]
    index_N = jnp.arange(distance_N.size)
    farther_NN = (distance_N[None, :] > distance_N[:, None]) | (
        (distance_N[None, :] == distance_N[:, None]) & (index_N[None, :] < index_N[:, None])
    )
    rank_N = jnp.sum(same_category_NN & farther_NN, axis=1)
    num_dropped_by_size = jnp.array([int(Fraction(str(drop)) * m) for m in range(distance_N.size + 1)])
    return (rank_N >= num_dropped_by_size[same_category_NN.sum(axis=1)]).reshape(gap_PG.shape)


def mask_threshold(
    gap_PG: Float[AnyArray, "P G"],
    category_P: Int[AnyArray, " P"],
    baseline_C: Float[AnyArray, " C"],
    threshold: ScalarLike,
) -> Bool[AnyArray, "P G"]:
    """Keep-mask of the gaps: (ρ - ρ̄_c)² <= τ. (DR-IRL, with a fixed τ)

    Args:
        gap_PG, category_P, baseline_C: see `mask_top`.
        threshold: τ > 0, in squared units of reward.

    Returns:
        [P, G] bool, True for a kept gap; a category may keep none.
    """
    return (gap_PG - baseline_C[category_P][:, None]) ** 2 <= threshold


def sigmoid_ratio(x: Float[AnyArray, "*shape"], baseline: Float[AnyArray, "*#shape"]) -> Float[Array, "*shape"]:
    """σ(x) / σ(baseline), in logarithms: far below zero both sigmoids underflow, but their ratio does not."""
    return jnp.exp(jax.nn.log_sigmoid(x) - jax.nn.log_sigmoid(baseline))


def model_responsiveness(
    kept_gap_C: Float[AnyArray, " C"], baseline_C: Float[AnyArray, " C"], present_C: Bool[AnyArray, " C"]
) -> Float[Array, " C"]:
    """α^M_c = σ(ρ̃_c) / σ(ρ̄_c); 1 for a category that is not in the batch. (DR-IRL)

    Args:
        kept_gap_C: [C] ρ̃_c, the mean of the kept gaps.
        baseline_C: [C] ρ̄_c, the running mean.
        present_C: [C] bool.

    Returns:
        [C] α^M > 0; above 1 if the policy is farther below the demonstrations than before.
    """
    return jnp.where(present_C, sigmoid_ratio(kept_gap_C, baseline_C), 1.0)


def mean_responsiveness(
    gap_PG: Float[AnyArray, "P G"],
    keep_PG: Bool[AnyArray, "P G"],
    category_P: Int[AnyArray, " P"],
    baseline_C: Float[AnyArray, " C"],
) -> Float[Array, " C"]:
    """α^M_c = mean_kept σ(ρ) / σ(ρ̄_c): the mean outside the sigmoid; 1 for a category that keeps no gap.

    Args:
        gap_PG, keep_PG: [P, G] gaps ρ, and bool, True for a kept gap.
        category_P, baseline_C: see `mask_top`.

    Returns:
        [C] α^M > 0.
    """
    ratio_PG = sigmoid_ratio(gap_PG, baseline_C[category_P][:, None])
    mean_C, present_C = category_mean(ratio_PG, category_P, baseline_C.shape[0], keep_PG)
    return jnp.where(present_C, mean_C, 1.0)


def running_mean(
    mean_C: Float[AnyArray, " C"],
    seen_C: Bool[AnyArray, " C"],
    batch_C: Float[AnyArray, " C"],
    present_C: Bool[AnyArray, " C"],
    decay: ScalarLike,
) -> tuple[Float[Array, " C"], Bool[AnyArray, " C"]]:
    """x̄ ← γ x̄ + (1 - γ) x_batch for the categories present; a category starts with its first batch's mean.

    Args:
        mean_C, seen_C: [C] running means, and bool, whether the category has one yet.
        batch_C, present_C: [C] means of this batch, and bool, whether the category is in the batch.
        decay: γ in [0, 1).

    Returns:
        ([C] new means, [C] bool new seen).

    >>> mean, seen, batch = jnp.array([4.0, 0.0]), jnp.array([True, False]), jnp.array([8.0, 8.0])
    >>> running_mean(mean, seen, batch, jnp.array([True, True]), 0.75)[0].tolist()  # ¾·4 + ¼·8, and a first batch
    [5.0, 8.0]
    """
    updated_C = jnp.where(seen_C, decay * mean_C + (1 - decay) * batch_C, batch_C)
    return jnp.where(present_C, updated_C, mean_C), seen_C | present_C


def combine_product(alpha_d_PG: Float[AnyArray, "P G"], alpha_m_P: Float[AnyArray, " P"]) -> Float[AnyArray, "P G"]:
    """α_ig = α^D_ig · α^M_{c_i}, [P, G]. (DR-IRL)"""
    return alpha_d_PG * alpha_m_P[:, None]


def combine_sum(alpha_d_PG: Float[AnyArray, "P G"], alpha_m_P: Float[AnyArray, " P"]) -> Float[AnyArray, "P G"]:
    """α_ig = ½ (α^D_ig + α^M_{c_i}), [P, G]."""
    return (alpha_d_PG + alpha_m_P[:, None]) / 2


def per_prompt(alpha_PG: Float[AnyArray, "P G"]) -> Float[Array, "P G"]:
    """α_i = mean_g α_ig, [P, G] constant along G: one coefficient for each question."""
    return jnp.broadcast_to(alpha_PG.mean(axis=-1, keepdims=True), alpha_PG.shape)


def nearer_to_other_kind(
    reward_PG: Float[AnyArray, "P G"], demo_reward_P: Float[AnyArray, " P"], contrast_reward_P: Float[AnyArray, " P"]
) -> Bool[AnyArray, "P G"]:
    """[P, G] bool: whether a response's reward is nearer to a demonstration of the other kind than to its own.

    R_ig < (R*_i + R'_i) / 2, with R'_i the reward of a demonstration for a prompt of the other kind     (ours)
    """
    return reward_PG < ((demo_reward_P + contrast_reward_P) / 2)[:, None]


def kind_weight(
    share: Float[AnyArray, "*shape"], target: ScalarLike, gain: ScalarLike = 5.0, max_weight: ScalarLike = 2.0
) -> Float[Array, "*shape"]:
    """Weight of the prompts of one kind; their share of wrong responses should not exceed a target.

    λ = min(exp(k (share - target)), max_weight)     (ours)

    This is a proportional controller: it has no memory that could wind up while the share is still high.

    Args:
        share, target: the batch's share and the target, in [0, 1].
        gain: k > 0.
        max_weight: upper bound of λ, above 1.
    """
    return jnp.minimum(jnp.exp(gain * (share - target)), max_weight)


def scaled_advantage(alpha: Float[AnyArray, "*#shape"], advantage: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """A_ig = α_ig · Â_ig, [P, G] or [P, G, T], with α a constant for differentiation. (DR-IRL)

    The factor applies after the normalisation. On the rewards, a positive factor of the prompt would cancel in the
    division by the group's standard deviation.
    """
    return jax.lax.stop_gradient(alpha) * advantage
