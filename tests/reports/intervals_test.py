"""Intervals by hand."""

import math

import numpy as np
import pytest

from drirl_jax.reports.intervals import difference, effective_count, interval, paired_shares, wilson


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
