"""Intervals by hand."""

import math

import numpy as np
import pytest
import scipy.stats

from drirl_jax.reports.intervals import (
    clustered_mean,
    difference,
    effective_count,
    geometric_mean,
    interval,
    paired_over_items,
    paired_ratio,
    paired_shares,
    wilson,
)


@pytest.mark.parametrize(
    "successes, n, z, low, high",
    [
        # z = 2, n = 4: (1/2 + 1/2 ± 2 √(1/16 + 1/16)) / 2 = (1 ± 1/√2) / 2
        (2, 4, 2.0, (1 - math.sqrt(0.5)) / 2, (1 + math.sqrt(0.5)) / 2),
        # nothing: 0 and (z²/n) / (1 + z²/n) = z² / (n + z²)
        (0, 10, 1.96, 0.0, 3.8416 / 13.8416),
        (10, 10, 1.96, 10 / 13.8416, 1.0),
        # z = 3, n = 9, p = 1/3: z²/n = 1: (1/3 + 1/2 ± 3 √(2/81 + 1/36)) / 2
        (3, 9, 3.0, (5 / 6 - 3 * math.sqrt(17 / 324)) / 2, (5 / 6 + 3 * math.sqrt(17 / 324)) / 2),
    ],
)
def test_wilson_by_hand(successes, n, z, low, high):
    assert wilson(successes, n, z) == pytest.approx((low, high), abs=1e-12)


def test_wilson_is_95_percent_unless_told():
    assert wilson(5, 10) == wilson(5, 10, 1.96)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)  # tabulated


def test_how_many_independent_items_clusters_are_worth_by_hand():
    # Both items of each of 4 clusters are alike: sums of deviations ±1, D = 4/3 · 4 / (8/7 · 8 · 1/4) = 7/3.
    assert effective_count([1, 1, 1, 1, 0, 0, 0, 0], list("aabbccdd")) == pytest.approx(24 / 7)
    # One of each in every cluster tell no less than independent ones; and what is all the same tells nothing of it.
    assert effective_count([1, 0] * 4, list("aabbccdd")) == effective_count([0] * 8, list("aabbccdd")) == 8
    assert effective_count([1, 0, 0] * 4, range(12)) == pytest.approx(12)
    assert effective_count([1, 0, 1], list("aaa")) == 3  # one cluster says nothing of how they differ


def test_intervals():
    # Over seeds: mean 2, deviation 1, so 2 ± t(0.975, 2) / √3 = 2 ± 4.3027 / 1.7321. One seed says nothing about noise.
    np.testing.assert_allclose(interval([1.0, 2.0, 3.0]), (2, 2 - 2.4841, 2 + 2.4841), atol=1e-4)
    assert interval([0.5])[0] == 0.5 and np.isnan(interval([0.5])[1:]).all()
    # With prompts it is about that of a share of 100 prompts.
    rng = np.random.default_rng(0)
    prompts = (rng.random((3, 100)) < 0.3).astype(float)
    mean, low, high = interval(prompts.tolist())
    assert mean == pytest.approx(prompts.mean()) and low < mean < high and 0.08 < high - low < 0.25
    # A difference on the same prompts is surer than the two shares.
    worse = np.minimum(prompts + (rng.random((3, 100)) < 0.1), 1)
    gap = difference(worse.tolist(), prompts.tolist())
    assert gap.low > 0 and gap.high - gap.low < high - low
    assert difference([1.0, 2.0], [1.0, 2.0]) == (0, 0, 0)


def test_the_difference_of_shares_of_the_same_prompts_by_hand():
    # All of 8 changed: φ = 0; z²/n = 0.4802, so Wilson's are [1/1.4802, 1] and [0, 0.4802/1.4802].
    reach = math.sqrt(2) * 0.4802 / 1.4802
    np.testing.assert_allclose(paired_shares([1] * 8, [0] * 8), (1, 1 - reach, 1), atol=1e-12)
    np.testing.assert_allclose(paired_shares([0] * 8, [1] * 8), (-1, -1, -1 + reach), atol=1e-12)
    # Nothing changed, half are 1: φ = (4 · 4 - 8/2) / 16 = 3/4. Wilson's of 4 of 8 reaches w on both sides, so
    # √(w² - 3/2 w² + w²) = w / √2.
    same = [0, 1] * 4
    np.testing.assert_allclose(paired_shares(same, same), [0, *np.array([-1, 1]) * (wilson(4, 8)[1] - 0.5) / 2**0.5])
    # Of the same shares it is wider where those that are 1 are others by chance, widest where all are others.
    widths = [paired_shares(other, same).high for other in (same, [0, 0, 1, 1] * 2, [1, 0] * 4)]
    assert widths == sorted(widths) and widths[1] == pytest.approx((wilson(4, 8)[1] - 0.5) * 2**0.5)


def test_a_mean_over_clusters_by_hand():
    # Sums of deviations from 3: -2 - 1 and 0 + 3, so s² = 2 · 18 and s / n = 6 / 4; t(0.975, 1) = 12.7062.
    found = clustered_mean([1.0, 2.0, 3.0, 6.0], list("aabb"))
    np.testing.assert_allclose(found, (3, 3 - 1.5 * 12.7062, 3 + 1.5 * 12.7062), rtol=1e-5)
    # If each item is its own cluster, it is Student's interval.
    x = np.random.default_rng(0).normal(size=12)
    low, high = scipy.stats.ttest_1samp(x, 0).confidence_interval()
    np.testing.assert_allclose(clustered_mean(x, range(12)), (x.mean(), low, high))
    assert np.isnan(clustered_mean([1.0, 2.0], list("aa"))[1:]).all()


def test_geometric_means_and_their_ratio_by_hand():
    # Logs 0 and 2: mean 1, deviation √2, so e to the 1 ± 12.7062.
    found = geometric_mean([1.0, math.e**2], list("ab"))
    np.testing.assert_allclose(np.log(found), (1, 1 - 12.7062, 1 + 12.7062), rtol=1e-5)
    np.testing.assert_allclose(paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], range(3)), (2, 2, 2))


def test_paired_shares_in_clusters():
    rng = np.random.default_rng(0)
    before = rng.integers(0, 2, 40).astype(float)
    after = np.where(rng.random(40) < 0.3, 1 - before, before)
    alone = paired_over_items(after, before, range(40))
    np.testing.assert_allclose(alone, paired_shares(after, before))
    # Items that are asked twice count for no more: m = 40 clusters of two are worth 2m(m - 1)/(2m - 1) items.
    twice = paired_over_items(np.repeat(after, 2), np.repeat(before, 2), np.repeat(range(40), 2))
    assert effective_count(np.repeat(after - before, 2), np.repeat(range(40), 2)) == pytest.approx(80 * 39 / 79)
    assert twice.mean == pytest.approx(alone.mean) and 1 < (twice.high - twice.low) / (alone.high - alone.low) < 1.02
    # Policies that are always right are no less certain of it for that.
    assert paired_over_items([1.0] * 8, [1.0] * 8, range(8)) == paired_shares([1] * 8, [1] * 8)


def simulated(rng, is_share, clusters=30, size=4):
    """(after, before, cluster, true change) of items whose change depends on their cluster."""
    cluster = np.repeat(np.arange(clusters), size)
    skill, change = rng.normal(size=(2, clusters))
    before = skill[cluster] + rng.normal(size=cluster.size)
    after = before + 0.5 + 0.5 * change[cluster] + 0.5 * rng.normal(size=cluster.size)
    if is_share:  # P(after > 0) - P(before > 0) of N(0.5, 2.5) and N(0, 2)
        return after > 0, before > 0, cluster, scipy.stats.norm.cdf(0.5 / 2.5**0.5) - 0.5
    return after, before, cluster, 0.5


@pytest.mark.parametrize("is_share", [False, True])
def test_paired_intervals_hold_the_true_change_in_95_percent(is_share):
    rng, held, held_without_clusters, draws = np.random.default_rng(1), 0, 0, 1000
    for _ in range(draws):
        after, before, cluster, truth = simulated(rng, is_share)
        with_clusters, without = (
            paired_over_items(after, before, groups) for groups in (cluster, np.arange(len(cluster)))
        )
        held += with_clusters.low <= truth <= with_clusters.high
        held_without_clusters += without.low <= truth <= without.high
    # Of 1000 draws at 95% the count has a standard deviation of 7.
    assert 930 <= held <= 970
    assert held_without_clusters < held
