"""GRPO-S coefficients of whole batches against the numpy method, and their running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import method_numpy as mn

from drirl_jax import scaling
from drirl_jax.checks import validate
from drirl_jax.config import default
from drirl_jax.types import InputError


def batch(P=6, G=4, K=3, L=2, E=5, C=4, seed=0):
    rng = np.random.default_rng(seed)

    def unit(*shape):
        x = rng.normal(size=(*shape, E))
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    mask_K = np.arange(K) < rng.integers(1, K + 1, (P, G))[..., None]
    mask_L = np.arange(L) < rng.integers(1, L + 1, P)[:, None]
    parts = scaling.Parts(unit(P, G, K), mask_K, unit(P, L), mask_L)
    reward, demo = rng.normal(size=(P, G)).astype(np.float32), rng.normal(size=P).astype(np.float32) + 1
    return (
        parts,
        reward,
        demo,
        rng.integers(0, C - 1, P).astype(np.int32),
    )  # the last category is always absent


def by_method(options, stats, parts, reward, demo, category):
    """Section 3 of the method in numpy; statistics are two dicts category -> mean, of δ and of ρ."""
    (P, G), C = reward.shape, 4
    delta = np.zeros((P, G))
    for p in range(P):
        o = parts.demo_PLE[p][parts.demo_mask_PL[p]]
        for g in range(G):
            y = parts.response_PGKE[p, g][parts.response_mask_PGK[p, g]]
            delta[p, g] = 1 - mn.aligned_similarity(y, o, options.mean_over)
    delta_now = [mn.category_mean(delta, category, c) for c in range(C)]
    baseline_C = {
        "ema": [stats[0].get(c, delta_now[c]) for c in range(C)],
        "batch": delta_now,
        "group": None,
        "dataset": [stats[0].get(c, 0.0) for c in range(C)],
    }[options.baseline]
    baseline = [[np.mean(delta[p])] * G if baseline_C is None else [baseline_C[category[p]]] * G for p in range(P)]
    if options.similarity == "plain":
        data = delta if options.orientation == "formula" else 1 / delta
    else:
        data = mn.data_alpha(delta, baseline, options.orientation)
    gap = demo[:, None] - reward
    gap_now = [mn.category_mean(gap, category, c) for c in range(C)]
    gap_base = [stats[1].get(c, 0.0 if gap_now[c] is None else gap_now[c]) for c in range(C)]
    if options.mask == "top":
        mask = mn.outlier_mask(gap, category, gap_base, options.drop)
    else:
        mask = mn.threshold_mask(gap, category, gap_base, options.threshold)
    model = mn.model_alpha(gap, category, gap_base, mask, options.alpha_m)[category]
    alpha = mn.combined(data, model, options.combine, options.per, options.clip or None)
    followed = gap if options.ema_of == "all" else np.where(mask > 0, gap, np.nan)
    new = [{}, {}]
    for c in set(category.tolist()):
        values = followed[category == c]
        seen = values[~np.isnan(values)]
        new[1][c] = mn.running_mean(stats[1].get(c), seen.mean() if seen.size else None, options.decay)
        new[0][c] = mn.running_mean(stats[0].get(c), delta_now[c], options.decay)
    moved = stats[0] if options.baseline == "dataset" else stats[0] | new[0]
    known = {c: mean for c, mean in new[1].items() if mean is not None}  # of no gap there is no mean
    return alpha, mask, (moved, stats[1] | known)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mean_over": "demo", "baseline": "batch"},
        {"mean_over": "both", "orientation": "inverse"},
        {"similarity": "response"},
        {"similarity": "plain", "per": "response"},
        {"baseline": "group", "per": "response"},
        {"baseline": "dataset", "combine": "sum"},
        {"mask": "threshold", "threshold": 2.0, "ema_of": "kept"},
        {"mask": "threshold", "threshold": 1e-4, "ema_of": "kept"},  # which keeps no gap at first
        {"alpha_m": "mean_of_sigma", "drop": 0.35, "ema_of": "kept", "decay": 0.6},
        {"combine": "data", "per": "response", "clip": (0.97, 1.02)},
        {"combine": "model"},
        {"combine": "none"},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()) or "default",
)
def test_three_batches_match_the_method(changes):
    options = scaling.Options(**changes)
    one_part = {"K": 1, "L": 1} if options.rule("similarity").whole else {}
    stats, numpy_stats = scaling.Stats.fresh(4), ({}, {})
    if options.baseline == "dataset":
        calibrated = np.float32([0.9, 1.1, 1.0, 0.8])
        stats, numpy_stats = stats._replace(delta=calibrated), (dict(enumerate(calibrated)), {})
    for seed in range(3):
        data = batch(seed=seed, **one_part)
        alpha, stats, info = scaling.coefficients(options, stats, *data)
        want, mask, numpy_stats = by_method(options, numpy_stats, *data)
        np.testing.assert_allclose(alpha, want, rtol=1e-5)
        np.testing.assert_array_equal(info["kept"], mask)
        for mean_C, means in zip((stats.delta, stats.gap), numpy_stats):
            for c, mean in means.items():
                np.testing.assert_allclose(mean_C[c], mean, rtol=1e-5, atol=1e-6)
    assert not stats.gap_seen[3] and stats.gap[3] == 0
    if changes:
        assert np.abs(alpha - scaling.coefficients(scaling.Options(), stats, *data)[0]).max() > 1e-3


def test_a_category_of_which_no_gap_is_kept_has_no_say():
    # (ρ - ρ̄)² = 1 for both gaps, above τ: α^M = 1, and the running mean of the kept ones does not move.
    parts = batch(P=1, G=2)[0]
    options = scaling.Options(mask="threshold", threshold=0.5, ema_of="kept", combine="model")
    alpha, stats, _ = scaling.coefficients(
        options, scaling.Stats.fresh(1), parts, np.float32([[1, -1]]), np.float32([5]), np.array([0])
    )
    assert alpha.tolist() == [[1, 1]] and not stats.gap_seen[0] and stats.delta_seen[0]


def one_category(delta):
    """Two prompts' worth of one part each, at distance δ = 0 or 1 from the demonstration, in one category."""
    e, real = np.eye(2, dtype=np.float32), np.ones((1, 2, 1), bool)
    return scaling.Parts(np.broadcast_to(e[delta], (1, 2, 1, 2)), real, e[0][None, None], real[:, 0])


def test_the_mean_distance_begins_without_a_gap_that_is_kept():
    # Gaps ±2 around their mean, τ = 1: none is kept. δ = 0, then 1: δ̄ = .9·0 + .1·1, and α^D = σ(1)/σ(0) in between.
    options, stats = scaling.Options(mask="threshold", ema_of="kept", threshold=1.0), scaling.Stats.fresh(1)
    for delta, alpha, mean in ((0, 1.0, 0.0), (1, 1 / (1 + np.exp(-1)) / 0.5, 0.1)):
        gaps = np.float32([[2, -2]]), np.float32([0]), np.array([0])
        _, stats, info = scaling.coefficients(options, stats, one_category(delta), *gaps)
        np.testing.assert_allclose(info["alpha_d"], alpha, rtol=1e-6)
        np.testing.assert_allclose(stats.delta, mean, atol=1e-7)
    assert stats.delta_seen.tolist() == [True] and stats.gap_seen.tolist() == [False]
    # The first gap that is kept begins the other mean, and with itself: .9·0 + .1·ρ̄ would be 0.1.
    _, stats, _ = scaling.coefficients(
        options, stats, one_category(1), np.float32([[-1, -1]]), np.float32([0]), gaps[2]
    )
    np.testing.assert_allclose((stats.gap[0], stats.delta[0]), (1.0, 0.19), rtol=1e-6)


def test_a_text_equal_to_the_demonstration_is_at_distance_0():
    # The cosine of this vector with itself is rounded to above 1.
    x = np.float32([0.6, 0.8]) * np.float32(1.0000001)
    parts = scaling.Parts(x[None, None, None], np.ones((1, 1, 1), bool), x[None, None], np.ones((1, 1), bool))
    assert np.float32(1) - x @ x < 0
    assert scaling.distances(scaling.Options(), parts).tolist() == [[0.0]]


def test_order_of_the_batch_and_padded_parts_change_nothing():
    parts, reward, demo, category = batch()
    stats = scaling.coefficients(scaling.Options(), scaling.Stats.fresh(4), *batch(seed=9))[1]
    alpha, after, _ = scaling.coefficients(scaling.Options(), stats, parts, reward, demo, category)
    flipped = jax.tree.map(lambda x: x[::-1], (parts, reward, demo, category))
    other, other_after, _ = scaling.coefficients(scaling.Options(), stats, *flipped)
    np.testing.assert_allclose(other[::-1], alpha, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after, other_after)
    noisy = parts._replace(response_PGKE=np.where(parts.response_mask_PGK[..., None], parts.response_PGKE, 7.0))
    noisy = noisy._replace(demo_PLE=np.where(parts.demo_mask_PL[..., None], parts.demo_PLE, 9.0))
    np.testing.assert_allclose(
        scaling.coefficients(scaling.Options(), stats, noisy, reward, demo, category)[0], alpha, rtol=1e-5
    )


def test_a_silent_response_counts_as_unlike_the_demonstration():
    parts, reward, demo, category = batch()
    response, mask = parts.response_PGKE.copy(), parts.response_mask_PGK.copy()
    response[0, 0], mask[0, 0] = 0, np.arange(3) < 1
    _, _, info = scaling.coefficients(
        scaling.Options(),
        scaling.Stats.fresh(4),
        parts._replace(response_PGKE=response, response_mask_PGK=mask),
        reward,
        demo,
        category,
    )
    assert info["delta"][0, 0] == 1


def test_options_name_rows_of_the_tables():
    assert set(scaling.TABLES) < set(scaling.Options._fields)
    for option in scaling.TABLES:
        config = default()
        config.scaling[option] = "no such rule"
        with pytest.raises(InputError, match=f"config.scaling.{option} is 'no such rule': choose one of"):
            validate(config)
    assert scaling.Options.from_config(default().scaling) == scaling.Options()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"baseline": "group"}, "config.scaling.baseline='group' compares a response with its own group"),
        ({"clip": (2.0, 1.0)}, "config.scaling.clip is"),
        ({"clip": (1.0,)}, "config.scaling.clip is"),
        ({"threshold": 0.0}, "config.scaling.threshold is 0.0"),
    ],
)
def test_bad_options_are_refused(changes, sentence):
    config = default()
    for key, value in changes.items():
        config.scaling[key] = value
    with pytest.raises(InputError, match=sentence):
        validate(config)


def test_coefficients_are_jitted_once_for_equal_shapes():
    before = scaling.coefficients._cache_size()
    for seed in range(3):
        scaling.coefficients(scaling.Options(drop=0.25), scaling.Stats.fresh(5), *batch(P=5, seed=seed))
    assert scaling.coefficients._cache_size() == before + 1
    assert jnp.isfinite(scaling.coefficients(scaling.Options(), scaling.Stats.fresh(4), *batch())[0]).all()
