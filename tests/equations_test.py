"""Every function of equations.py: against values derived by hand and against the float64 numpy method."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import method_numpy as mn
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from drirl_jax import equations as eq
from drirl_jax import losses, scaling

LN3 = float(np.log(3.0))  # σ(ln 3) = 3/4, σ(-ln 3) = 1/4
SEEDS = range(3)
GROUP_ADVANTAGE = jax.jit(eq.group_advantage)  # compiled once for all examples
MASK_TOP = jax.jit(eq.mask_top, static_argnums=3)


def check(function, arrays, want, rtol=2e-5, atol=2e-6):
    """`function(*arrays)` is `want`, finite, both as it is and jitted."""
    for run in (function, jax.jit(function)):
        got = np.asarray(run(*map(jnp.asarray, arrays)))
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_a_wrong_shape_is_an_error_and_no_broadcast():
    # Each of these would broadcast: one demonstration to all prompts, one mask to all prompts, rewards to categories.
    reward, parts = np.zeros((3, 2), np.float32), np.zeros((3, 2, 4, 5), np.float32)
    for run in (eq.gap, jax.jit(eq.gap)):
        assert run(np.zeros(3, np.float32), reward).shape == (3, 2)
        with pytest.raises(TypeCheckError, match="gap"):
            run(np.zeros(1, np.float32), reward)
    with pytest.raises(TypeCheckError, match="align_response"):
        eq.align_response(parts, np.ones((1, 2, 4), bool), np.ones((3, 5), bool))
    with pytest.raises(TypeCheckError, match="zscore"):
        eq.zscore(reward[:, :1], np.zeros(2, np.float32), np.ones(2, np.float32))
    with pytest.raises(TypeCheckError, match="preference"):
        losses.preference(reward, reward[:, :1], 0.1, "beta")
    with pytest.raises(TypeCheckError, match="coefficients"):
        parts = scaling.Parts(parts, np.ones((3, 2, 4), bool), parts[:, 0], np.ones((3, 4), bool))
        scaling.coefficients(scaling.Options(), scaling.Stats.fresh(2), parts, reward, reward[:1, 0], np.zeros(3, int))


# ---- category rewards ------------------------------------------------------------------------------------


def test_irl_logistic():
    # Equal rewards: -log ½. Difference 2 ln 3 with β = 2: -log ¾ = log 4/3; the other way: -log ¼.
    # Far apart it is the line -z on one side and 0 on the other.
    demo, sample = np.float32([5.0, 2 * LN3, 0.0, -4e4, 4e4]), np.float32([5.0, 0.0, 2 * LN3, 0.0, 0.0])
    want = [np.log(2), np.log(4 / 3), np.log(4), 2e4, 0]
    check(lambda y, s: eq.irl_logistic(y, s, 2.0), (demo, sample), want)
    # dℓ/dr = -(1 - σ(z))/β, -¼ at equality for β = 2: the demonstration's reward rises, the sample's falls.
    up, down = jax.grad(lambda y, s: eq.irl_logistic(y, s, 2.0), (0, 1))(1.0, 1.0)
    np.testing.assert_allclose((up, down), (-0.25, 0.25), rtol=1e-6)
    y, s = np.random.default_rng(0).normal(scale=3, size=(2, 20)).astype(np.float32)
    want = [mn.irl_pair(*pair, "logistic", 0.7) for pair in zip(y, s)]
    check(lambda y, s: eq.irl_logistic(y, s, 0.7), (y, s), want)


def test_irl_linear():
    # β = ½, λ = ¼: -(2 - 1)/½ + ¼ (4 + 1) = -¾. Least, -1/(2 β² λ) = -8, at ±1/(2 β λ) = ±4; flat there.
    check(lambda y, s: eq.irl_linear(y, s, 0.5, 0.25), (np.float32([2, 4]), np.float32([1, -4])), [-0.75, -8])
    slope = jax.grad(lambda y, s: eq.irl_linear(y, s, 0.5, 0.25), (0, 1))(4.0, -4.0)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    want = mn.irl_pair(0.3, -1.2, "linear", 0.7, 0.1)
    check(lambda y, s: eq.irl_linear(y, s, 0.7, 0.1), (np.float32(0.3), np.float32(-1.2)), want)


def test_irl_token():
    # Gaps 0, 2 ln 3, -2 ln 3 with β = 2 cost log 2, log 4/3 and log 4; the mask takes the mean of the first two, then
    # of the last alone, then of none.
    demo, sample = np.float32([[5, 2 * LN3, 0]] * 3), np.float32([[5, 0, 2 * LN3]] * 3)
    mask = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
    want = [(np.log(2) + np.log(4 / 3)) / 2, np.log(4), 0]
    check(lambda y, s, m: eq.irl_token(y, s, m, 2.0), (demo, sample, mask), want)
    y, s = np.random.default_rng(0).normal(scale=3, size=(2, 7)).astype(np.float32)
    tokens = [1, 2, 3, 4, 5], [1, 2, 8, 4, 5, 6, 7]
    mask = (np.arange(7) >= 2) & (np.arange(7) < 5)
    check(lambda y, s: eq.irl_token(y, s, mask, 1.0), (y, s), mn.irl_token(*tokens, y, s))


def test_zscore():
    # (7 - 1)/3 = 2, (1 - 1)/3 = 0, (-2 - 4)/0.5 = -12: each row by its own category's statistics.
    check(eq.zscore, (np.float32([7, 1, -2]), np.float32([1, 1, 4]), np.float32([3, 3, 0.5])), [2, 0, -12])
    seen = np.random.default_rng(0).normal(5, 3, 30).astype(np.float32)
    check(
        lambda r: eq.zscore(r, seen.mean(keepdims=True), seen.std(keepdims=True)),
        (seen,),
        mn.zscore(seen, seen),
        atol=1e-5,
    )


# ---- help against harm -----------------------------------------------------------------------------------


def test_safe_completion():
    # σ(ln 3) = 3/4 and σ(-ln 3) = 1/4. Help without safety and safety without help are worth a quarter of 3/4 alike;
    # a harmless prompt has its help alone. Far from 0 a factor is 1 or 0.
    help_PM, safety_PM = np.float32([[LN3, LN3, -LN3], [LN3, -LN3, 60]]), np.float32([[LN3, -LN3, LN3], [9, -9, -60]])
    want = [[9 / 16, 3 / 16, 3 / 16], [3 / 4, 1 / 4, 1]]
    check(eq.safe_completion, (help_PM, safety_PM, np.array([False, True])), want)
    rng = np.random.default_rng(0)
    help_PM, safety_PM = rng.normal(size=(2, 5, 3)).astype(np.float32)
    harmless_P = np.array([True, False, False, True, False])
    got = mn.safe_completion(help_PM, safety_PM, harmless_P)
    check(eq.safe_completion, (help_PM, safety_PM, harmless_P), got)
    assert (0 < got).all() and (got < 1).all()


def test_the_reward_under_a_constraint():
    # λ = 0: help alone, to the bit. λ = 1: half of each. λ = 3: (2 - 3 · 0.4) / 4. A large λ: almost -F alone.
    help_PM, harm_PM = (
        np.float32([[2, -1], [2, -1], [2, 0], [2, -1]]),
        np.float32([[0.4, 3], [0.4, 3], [0.4, 1], [5, 3]]),
    )
    multiplier_P = np.float32([0, 1, 3, 1e6])
    check(eq.constrained_reward, (help_PM, harm_PM, multiplier_P), [[2, -1], [0.8, -2], [0.2, -0.75], [-5, -3]])
    np.testing.assert_array_equal(eq.constrained_reward(help_PM, harm_PM, np.zeros(4, np.float32)), help_PM)
    rng = np.random.default_rng(1)
    help_PM, harm_PM = rng.normal(size=(2, 4, 3)).astype(np.float32)
    multiplier_P = rng.random(4).astype(np.float32) * 10
    check(
        eq.constrained_reward, (help_PM, harm_PM, multiplier_P), mn.constrained_reward(help_PM, harm_PM, multiplier_P)
    )


def test_dual_ascent():
    # 1 + ½ (0.3 - 0.1) = 1.1. At the limit it stays. It ends at 0 and at the bound. A category without harm to average
    # keeps its multiplier, and so does one whose mean is not finite.
    multiplier, harm = np.float32([1, 1, 0.05, 3.9, 2, 2, 2]), np.float32([0.3, 0.1, -5, 5, 9, np.nan, np.inf])
    moves = np.array([True, True, True, True, False, True, True])
    check(lambda *x: eq.dual_ascent(*x, 0.1, 0.5, 4.0), (multiplier, harm, moves), [1.1, 1, 0, 4, 2, 2, 2])
    rng = np.random.default_rng(2)
    multiplier, harm = rng.random(6).astype(np.float32), rng.normal(size=6).astype(np.float32) * 9
    want = [mn.dual_ascent(*pair, -0.2, 0.1, 1.5) for pair in zip(multiplier, harm[:, None])]
    check(lambda *x: eq.dual_ascent(*x, -0.2, 0.1, 1.5), (multiplier, harm, np.ones(6, bool)), want)
    assert min(want) == 0 and max(want) < 1.5


# ---- advantages ------------------------------------------------------------------------------------------


def test_group_advantage_by_hand():
    # [0, 2]: mean 1, population std 1 (the sample std would be √2), ε = ½: ±1/1.5.
    # [1, 1, 4, 4, 5]: mean 3, variance (4+4+1+1+4)/5 = 14/5.
    check(lambda r: eq.group_advantage(r, 0.5), (np.float32([[0, 2]]),), [[-2 / 3, 2 / 3]])
    want = np.array([[-2, -2, 1, 1, 2]]) / np.sqrt(14 / 5)
    check(lambda r: eq.group_advantage(r, 0.0), (np.float32([[1, 1, 4, 4, 5]]),), want)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.3, 1 / 3, 1e6, 1e6 + 0.1, 16777217.0])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_group_without_spread_gets_exactly_zero(value, eps):
    # Beside it a group with spread, [-1, 1, -1] / (2√2/3) after centring by -1/3, which must not suffer.
    reward = np.float32([[value] * 3, [-1, 1, -1]])
    want = [[0, 0, 0], [-1 / np.sqrt(2), np.sqrt(2), -1 / np.sqrt(2)]]
    for run in (eq.group_advantage, GROUP_ADVANTAGE):
        got = np.asarray(run(jnp.asarray(reward), eps))
        np.testing.assert_allclose(got, want, rtol=2e-5)
        assert (got[0] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_group_advantage_matches_the_method(seed):
    rng = np.random.default_rng(seed)
    reward = (rng.normal(size=(5, 4)) * 10.0 ** rng.integers(-2, 3, (5, 1))).astype(np.float32)
    check(lambda r: eq.group_advantage(r, 1e-3), (reward,), mn.group_advantage(reward, 1e-3), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=8, max_size=8))
def test_group_advantage_has_mean_0_and_std_1_or_is_0(values):
    reward = np.float32(values).reshape(2, 4)
    got = np.asarray(GROUP_ADVANTAGE(reward, 0.0), np.float64)
    np.testing.assert_allclose(got.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(got.std(1), reward.min(1) < reward.max(1), atol=1e-5)


@pytest.mark.parametrize(
    "row",
    [
        [1e20, -1e20, 3e20, 0.0],  # whose squares overflow
        [3.4e38, -3.4e38, 0.0, 1.0],  # and whose differences do
        [1e-30, 3e-30, -2e-30, 0.0],
        [1000.0, 1000.00006, 1000.0, 1000.0],  # a unit in the last place apart
        [0.35, 0.35, 0.35000002, 0.35],
        [16777216.0, 16777217.0, 16777218.0, 16777216.0],
        [-1e20, -1e20, -1e20, -1.0000001e20],
    ],
)
def test_group_advantage_of_very_large_and_very_near_rewards(row):
    reward = np.float32([row, [1, 2, 3, 4]])
    eps = 1e-6 if max(map(abs, row)) > 1 else 0.0
    check(lambda r: eq.group_advantage(r, eps), (reward,), mn.group_advantage(reward, eps), rtol=2e-5, atol=2e-6)


def test_gradients_of_advantages_are_finite_also_without_spread():
    reward = jnp.float32([[1, 1, 1, 1], [1, 2, 3, 5], [1e20, -1e20, 0, 3e20], [0, 0, 0, 0]])
    slope = jax.grad(lambda r: (eq.group_advantage(r) * jnp.arange(4.0) ** 2).sum())(reward)
    assert jnp.isfinite(slope).all() and (slope[0] == 0).all()
    h, row = 1e-6, np.float64(reward[1])
    for i in range(4):
        above, below = (mn.group_advantage([row + s * h * np.eye(4)[i]], 1e-6) for s in (1, -1))
        want = ((above - below)[0] / (2 * h)) @ np.arange(4.0) ** 2
        np.testing.assert_allclose(slope[1, i], want, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_stays_so():
    for bad in (np.nan, np.inf):
        assert np.isnan(eq.group_advantage(np.float32([[bad, 1, 2, 3]]))).any()


def test_outliers_are_ranked_where_squares_overflow():
    gap = np.float32([[1e20, 3e20, -4e20, 2e20]])
    got = eq.mask_top(gap, np.array([0]), np.zeros(1, np.float32), 0.25)
    np.testing.assert_array_equal(got, mn.outlier_mask(gap, [0], [0.0], 0.25))


# ---- data hardness ---------------------------------------------------------------------------------------


def test_part_similarity_is_each_pairs_cosine():
    # Parts at 0° and 90°, demonstration parts at 60°, 180°, 90°: cosines ½, -1, 0 and sin 60°, 0, 1.
    r, h = np.sqrt(0.75), 0.5
    check(eq.part_similarity, (np.float32([[[[1, 0], [0, 1]]]]), np.float32([[[h, r], [-1, 0], [0, 1]]])),
          [[[[h, -1, 0], [r, 0, 1]]]])  # fmt: skip
    rng = np.random.default_rng(0)
    y, o = unit(rng, 3, 2, 4, 5), unit(rng, 3, 2, 5)
    want = np.zeros((3, 2, 4, 2))
    for p, g, k, l in np.ndindex(want.shape):
        want[p, g, k, l] = mn.cosine(y[p, g, k], o[p, l])
    check(eq.part_similarity, (y, o), want)


def test_align_response_by_hand():
    # Rows are the response's parts. Maxima over the demonstration .2 and .9: mean .55 (the other way: .6).
    # Second: all negative, maxima -.1 and -.5: -.3, so a padded 0 must not win. Then one real part each.
    first, second = [[0.2, 0.1, 9], [0.3, 0.9, 9], [9, 9, 9]], [[-0.1, -0.4, 0], [-0.6, -0.5, 0], [0, 0, 0]]
    s = np.float32([[first, second]])
    mask = np.array([[[True, True, False]] * 2])
    demo = np.array([[True, True, False]])
    check(eq.align_response, (s, mask, demo), [[0.55, -0.3]])
    one = np.array([[[True, False, False]] * 2])
    check(eq.align_response, (s, one, np.array([[True, False, False]])), [[0.2, -0.1]])


def test_align_demo_and_both_by_hand():
    # The same cosines. Maxima over the response of columns .3 and .9: mean .6; second: -.1 and -.4: -.25. Both: the
    # means with .55 and -.3.
    first, second = [[0.2, 0.1, 9], [0.3, 0.9, 9], [9, 9, 9]], [[-0.1, -0.4, 0], [-0.6, -0.5, 0], [0, 0, 0]]
    s = np.float32([[first, second]])
    mask, demo = np.array([[[True, True, False]] * 2]), np.array([[True, True, False]])
    check(eq.align_demo, (s, mask, demo), [[0.6, -0.25]])
    check(eq.align_both, (s, mask, demo), [[0.575, -0.275]])


@pytest.mark.parametrize("seed, garbage", [(0, 0.0), (1, 1e6), (2, np.nan)])
def test_hardness_of_padded_parts_matches_the_method(seed, garbage):
    rng = np.random.default_rng(seed)
    y, o = unit(rng, 3, 2, 4, 5), unit(rng, 3, 3, 5)
    count_y, count_o = rng.integers(1, 5, (3, 2)), rng.integers(1, 4, 3)
    mask_y, mask_o = np.arange(4) < count_y[..., None], np.arange(3) < count_o[:, None]
    w = [
        [mn.aligned_similarity(y[p, g, : count_y[p, g]], o[p, : count_o[p]], "response") for g in range(2)]
        for p in range(3)
    ]
    delta, baseline = 1 - np.array(w), rng.random((3, 1)).astype(np.float32)
    padded_y, padded_o = np.where(mask_y[..., None], y, garbage), np.where(mask_o[..., None], o, garbage)
    check(lambda y, o: eq.align_response(eq.part_similarity(y, o), mask_y, mask_o), (padded_y, padded_o), w)
    check(eq.data_hardness, (delta, baseline), mn.data_alpha(delta, np.repeat(baseline, 2, 1), "formula"))


def test_data_hardness_by_hand():
    # σ(ln 3)/σ(0) = ¾/½; equal: 1; the method's own bounds for δ̄ = .3: .5/.57444 and .73106/.57444.
    delta, baseline = np.float32([LN3, 0.4, 0, 1]), np.float32([0, 0.4, 0.3, 0.3])
    check(eq.data_hardness, (delta, baseline), [1.5, 1, 0.870409, 1.272638])


# ---- model responsiveness --------------------------------------------------------------------------------


def test_gap_and_category_mean_by_hand():
    # R* - R, so a response below its demonstration has a positive gap.
    check(eq.gap, (np.float32([3, -1]), np.float32([[1, 5], [-1, -4]])), [[2, -2], [0, 3]])
    value, category = np.float32([[1, 2], [10, 30], [3, 6]]), np.array([0, 2, 0])
    keep = np.array([[True, True], [False, True], [False, False]])
    # Category 0 has 1, 2, 3, 6: mean 3; kept 1, 2: 1.5. Category 2: mean 20, kept 30. Category 1 is absent.
    for kept, want in ((None, [3, 0, 20]), (keep, [1.5, 0, 30])):
        check(lambda v, kept=kept: eq.category_mean(v, category, 3, kept)[0], (value,), want)
        assert eq.category_mean(jnp.asarray(value), category, 3, kept)[1].tolist() == [True, False, True]


@pytest.mark.parametrize("drop, count, dropped", [
    (0.2, 4, 0), (0.2, 5, 1), (0.2, 9, 1), (0.1, 10, 1), (0.0, 7, 0), (0.99, 99, 98), (0.5, 1, 0),
    (0.29, 100, 29), (0.57, 100, 57), (0.7, 10, 7),  # whole in decimals, not in binary
    (0.3333, 3, 0), (0.0099, 101, 0),  # ⌊0.9999⌋
])  # fmt: skip
def test_mask_top_drops_the_floor(drop, count, dropped):
    # Category 0 has `count` gaps, category 1 the rest of 101; the largest are the farthest from ρ̄ = 0.
    assert mn.drop_count(drop, count) == dropped
    gap = np.random.default_rng(0).permutation(101).astype(np.float32)[:, None]
    category = (np.arange(101) >= count).astype(np.int32)
    for run in (eq.mask_top, MASK_TOP):
        keep = np.asarray(run(gap, category, jnp.zeros(2), drop))[:, 0]
        assert (~keep[:count]).sum() == dropped and (~keep[count:]).sum() == mn.drop_count(drop, 101 - count)
        np.testing.assert_array_equal(keep, mn.outlier_mask(gap, category, [0, 0], drop)[:, 0])


def test_mask_top_counts_each_category_alone():
    # drop ½, baselines 10 and 0. Category 1 (M = 2) drops 9, the farther from 0. Category 0 (M = 4) drops 0
    # and 5, of distances 10, 1, 5, 2 from 10: it is the distance from the mean that counts, not the size.
    gap, category = np.float32([[0, 9], [0, 11], [5, 12]]), np.array([1, 0, 0])
    baseline, want = np.float32([10, 0, 7]), [[1, 0], [0, 1], [0, 1]]
    check(lambda g, b: eq.mask_top(g, category, b, 0.5), (gap, baseline), want)


def test_ties_drop_exactly_as_many():
    # Ten equal gaps, 8 of category 0: ⌊.3·8⌋ = 2, the first two; 2 of category 1: 0. And ±1 tie about ρ̄ = 0.
    category = np.array([0, 0, 1, 0, 0])
    want = [[0, 0], [1, 1], [1, 1], [1, 1], [1, 1]]
    check(lambda g: eq.mask_top(g, category, jnp.zeros(2), 0.3), (np.full((5, 2), 0.1, np.float32),), want)
    keep = MASK_TOP(jnp.array([[1.0, -1.0, 1.0, -1.0]]), np.array([0]), jnp.zeros(1), 0.5)
    assert np.asarray(keep).sum() == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_model_responsiveness_matches_the_method(seed):
    rng = np.random.default_rng(seed)
    category, C = np.array([0, 2, 0, 0, 2, 3, 2, 0]), 5  # M = 12, 0, 9, 3, 0
    gap, old = rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=C).astype(np.float32)
    batch = [mn.category_mean(gap, category, c) for c in range(C)]
    for first in (True, False):
        # With no statistics the baseline is the batch mean (absent categories: whatever).
        baseline = np.float32([b if first and b is not None else o for b, o in zip(batch, old)])
        mask = mn.outlier_mask(gap, category, baseline, 0.35)
        assert (mask == 0).sum() == 4 + 3 + 1
        check(lambda g, b: eq.mask_top(g, category, b, 0.35), (gap, baseline), mask)

        def alpha(gap, baseline):
            kept, present = eq.category_mean(gap, category, C, eq.mask_top(gap, category, baseline, 0.35))
            return eq.model_responsiveness(kept, baseline, present)

        want = mn.model_alpha(gap, category, baseline, mask, "sigma_of_mean")
        assert want[1] == want[4] == 1 != want[0]
        check(alpha, (gap, baseline), want)


def test_model_responsiveness_by_hand():
    # ¾/¼ = 3, ¼/¾ = 1/3; equal means (the first batch, nothing dropped): 1; absent: 1, whatever stands there.
    kept, baseline = np.float32([LN3, -LN3, 2, 0, np.nan]), np.float32([-LN3, LN3, 2, 50, np.nan])
    present = np.array([True, True, True, False, False])
    check(eq.model_responsiveness, (kept, baseline, present), [3, 1 / 3, 1, 1, 1])


def test_model_responsiveness_of_gaps_far_below_zero():
    # σ(x) -> e^x: the ratio is e^(ρ̃ - ρ̄), finite also where float32 has no e^x left.
    kept, baseline = np.float32([-95, -150]), np.float32([-94, -152])
    check(eq.model_responsiveness, (kept, baseline, np.ones(2, bool)), np.exp([-1.0, 2.0]))


def test_mask_threshold_by_hand():
    # Squared distances from 1 and from 0: 0, 1, 4 and 1, 0, 9; τ = 1 keeps its own edge.
    gap, category = np.float32([[1, 2, 3], [-1, 0, 3]]), np.array([1, 0])
    check(lambda g: eq.mask_threshold(g, category, jnp.array([0.0, 1.0]), 1.0), (gap,), [[1, 1, 0], [1, 1, 0]])
    check(lambda g: eq.mask_threshold(g, category, jnp.array([0.0, 1.0]), 1.0), (gap,),
          mn.threshold_mask(gap, category, [0.0, 1.0], 1.0))  # fmt: skip


def test_mean_responsiveness_by_hand():
    # Kept of category 0: σ = ¾ and ¼, mean ½, over σ(ln 3) = ¾: 2/3; the masked 50 has no say. Category 1 keeps none,
    # category 2 is absent: 1. Then σ = ¾, ¾, ½: mean 2/3, over ½.
    gap = np.float32([[LN3, -LN3, 50], [7, 7, 7]])
    keep, category = np.array([[True, True, False], [False] * 3]), np.array([0, 1])
    baseline = np.float32([LN3, 0, 9])
    check(lambda g, b: eq.mean_responsiveness(g, keep, category, b), (gap, baseline), [2 / 3, 1, 1])
    gap, keep, category = np.float32([[LN3, LN3, 0]]), np.ones((1, 3), bool), np.array([0])
    check(lambda g, b: eq.mean_responsiveness(g, keep, category, b), (gap, np.zeros(1, np.float32)), [4 / 3])
    want = mn.model_alpha(gap, category, [0.0], keep, "mean_of_sigma")
    check(lambda g, b: eq.mean_responsiveness(g, keep, category, b), (gap, np.zeros(1, np.float32)), want)


def test_running_mean():
    # γ = .9: seen .9·1 + .1·2 = 1.1; first batch: 2; absent: kept; never seen: stays unseen.
    mean, seen = np.float32([1, 0, 5, 0]), np.array([True, False, True, False])
    batch, present = np.float32([2, 2, np.nan, np.nan]), np.array([True, True, False, False])
    check(lambda m, b: eq.running_mean(m, seen, b, present, 0.9)[0], (mean, batch), [1.1, 2, 5, 0])
    assert eq.running_mean(mean, seen, batch, present, 0.9)[1].tolist() == [True, True, True, False]
    method = mn.running_mean(2.5, -1.5, 0.7), mn.running_mean(None, 4.0, 0.7), mn.running_mean(3.0, None, 0.7)
    old, new, here = np.float32([2.5, 0, 3]), np.float32([-1.5, 4, 0]), np.array([True, True, False])
    check(lambda m, b: eq.running_mean(m, np.array([True, False, True]), b, here, 0.7)[0], (old, new), method)


def test_the_means_move_after_the_coefficients():
    # One response like its demonstration: δ = 0, α^D = 1. One gap a batch, nothing dropped: α = σ(ρ)/σ(ρ̄).
    # Batch 1, ρ = ln 3 and no statistics: 1, ρ̄ = ln 3. Batch 2, ρ = -ln 3: ¼/¾, then ρ̄ = .9 ln 3 - .1 ln 3.
    # (Moved first, batch 2 would have σ(.8 ln 3) below the line.)
    one, real = np.ones((1, 1, 1, 1)), np.ones((1, 1, 1), bool)
    parts = scaling.Parts(one, real, one[0], real[0])
    stats = scaling.Stats.fresh(2)
    for gap, alpha, mean in ((LN3, 1.0, LN3), (-LN3, 1 / 3, 0.8 * LN3), (0.8 * LN3, 1.0, 0.8 * LN3)):
        batch = parts, np.zeros((1, 1)), np.array([gap]), np.array([1])
        got, stats, _ = scaling.coefficients(scaling.Options(), stats, *batch)
        np.testing.assert_allclose((got[0, 0], stats.gap[1]), (alpha, mean), rtol=1e-5)
        assert stats.gap_seen.tolist() == [False, True] and stats.gap[0] == 0


def test_the_docstrings_examples():
    failed, tried = doctest.testmod(eq)
    assert tried >= 5 and not failed


# ---- combination -----------------------------------------------------------------------------------------


def test_combination():
    # Row 0: [1, 3]·2 = [2, 6], mean 4; row 1: [.5, .5]·.4 = .2. Advantages ±1: α stands outside, per prompt.
    data, model = np.float32([[1, 3], [0.5, 0.5]]), np.float32([2, 0.4])
    check(eq.combine_product, (data, model), [[2, 6], [0.2, 0.2]])
    check(eq.per_prompt, (np.float32([[2, 6], [0.2, 0.2]]),), [[4, 4], [0.2, 0.2]])
    alpha, advantage = np.float32([[4, 4], [0.2, 0.2]]), np.float32([[-1, 1], [2, -2]])
    check(eq.scaled_advantage, (alpha, advantage), [[-4, 4], [0.4, -0.4]])
    rng = np.random.default_rng(0)
    data, model = rng.random((4, 3)).astype(np.float32), rng.random(4).astype(np.float32)
    check(eq.combine_product, (data, model), mn.combined(data, model, "product", "response"))
    check(eq.combine_sum, (data, model), mn.combined(data, model, "sum", "response"))
    want = mn.combined(data, model, "product", "prompt")
    check(lambda d, m: eq.per_prompt(eq.combine_product(d, m)), (data, model), want)


def test_which_responses_are_of_the_other_kind():
    # Own demonstrations 1 and 0, the other kind's -3 and 2: halfway -1 and 1. Halfway itself is not nearer the other.
    reward, demo, contrast = np.float32([[-2, -1, 0], [0.9, 1.1, -5]]), np.float32([1, 0]), np.float32([-3, 2])
    got = jax.jit(eq.nearer_to_other_kind)(reward, demo, contrast)
    assert got.tolist() == [[True, False, False], [True, False, True]]


def test_the_weight_of_a_kind():
    # k = 5. At the target 1; .1 above it e^(1/2); .1 below it e^(-1/2); far above it the bound.
    share = np.float32([0.1, 0.2, 0.0, 1.0])
    check(lambda x: eq.kind_weight(x, 0.1), (share,), [1, np.exp(0.5), np.exp(-0.5), 2])


def test_alpha_is_a_constant_for_differentiation():
    # f(x) = α(x)·Â(x) with α = x², Â = 3x at x = 2: α·3 = 12 (24 more if α were differentiated).
    got = jax.grad(lambda x: eq.scaled_advantage(jnp.full((1, 1), x**2), jnp.full((1, 1), 3 * x)).sum())(2.0)
    np.testing.assert_allclose(got, 12.0, rtol=1e-6)


def test_a_prompts_factor_cancels_before_normalisation_and_not_after():
    rng = np.random.default_rng(0)
    feature, action = rng.normal(size=(3, 4)), rng.integers(0, 5, (3, 6))  # linear softmax over 5 answers
    reward, factor = np.float32(rng.normal(size=(3, 6))), np.float32([[0.25], [1.0], [4.0]])
    theta = jnp.asarray(rng.normal(size=(4, 5)))

    def gradient(advantage):
        def loss(theta):
            logp = jnp.take_along_axis(jax.nn.log_softmax(feature @ theta), action, axis=1)
            return -jnp.sum(advantage * logp, axis=1).mean()

        return np.asarray(jax.grad(loss)(theta))

    plain = eq.group_advantage(reward, 0.0)
    base = gradient(plain)
    np.testing.assert_allclose(gradient(eq.group_advantage(factor * reward, 0.0)), base, rtol=1e-4, atol=1e-5)
    scaled = gradient(eq.scaled_advantage(jnp.broadcast_to(factor, (3, 6)), plain))
    each = [gradient(plain * np.eye(3, dtype=np.float32)[:, [p]]) for p in range(3)]
    np.testing.assert_allclose(scaled, sum(f * g for f, g in zip(factor[:, 0], each)), rtol=1e-4, atol=1e-5)
    assert np.abs(scaled - base).max() > 0.1
