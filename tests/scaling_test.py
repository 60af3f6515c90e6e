"""GRPO-S coefficients of whole batches against the numpy method, and their running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drirl_jax import scaling
from drirl_jax.config import default, validate
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


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def by_hand(stats, parts, reward, demo, category, drop=0.2, decay=0.9):
    """Section 3 of the method with loops; statistics are dicts category -> mean."""
    P, G = reward.shape
    delta = np.zeros((P, G))
    for p in range(P):
        o = parts.demo_PLE[p][parts.demo_mask_PL[p]]
        for g in range(G):
            y = parts.response_PGKE[p, g][parts.response_mask_PGK[p, g]]
            delta[p, g] = 1 - np.mean([max(float(k @ part) for part in o) for k in y])
    gap = demo[:, None] - reward
    alpha, new = np.zeros((P, G)), {}
    for c in set(category.tolist()):
        rows = category == c
        mean_delta, mean_gap = stats.get(c, (delta[rows].mean(), gap[rows].mean()))
        gaps = sorted(gap[rows].reshape(-1), key=lambda x: (x - mean_gap) ** 2)
        kept = np.mean(gaps[: len(gaps) - int(drop * len(gaps) + 1e-9)])
        alpha_m = sigmoid(kept) / sigmoid(mean_gap)
        alpha[rows] = (sigmoid(delta[rows]) / sigmoid(mean_delta) * alpha_m).mean(1, keepdims=True)
        if c in stats:
            new[c] = tuple(
                decay * old + (1 - decay) * now for old, now in zip(stats[c], (delta[rows].mean(), gap[rows].mean()))
            )
        else:
            new[c] = (delta[rows].mean(), gap[rows].mean())
    return alpha, stats | new


def test_three_batches_match_the_method_by_hand():
    stats, numpy_stats = scaling.Stats.fresh(4), {}
    for seed in range(3):
        data = batch(seed=seed)
        alpha, stats, _ = scaling.coefficients(scaling.Options(), stats, *data)
        want, numpy_stats = by_hand(numpy_stats, *data)
        np.testing.assert_allclose(alpha, want, rtol=1e-5)
        for c, (delta, gap) in numpy_stats.items():
            np.testing.assert_allclose((stats.delta[c], stats.gap[c]), (delta, gap), rtol=1e-5, atol=1e-6)
    assert not stats.seen[3] and stats.gap[3] == 0


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


def test_coefficients_are_jitted_once_for_equal_shapes():
    before = scaling.coefficients._cache_size()
    for seed in range(3):
        scaling.coefficients(scaling.Options(drop=0.25), scaling.Stats.fresh(5), *batch(P=5, seed=seed))
    assert scaling.coefficients._cache_size() == before + 1
    assert jnp.isfinite(scaling.coefficients(scaling.Options(), scaling.Stats.fresh(4), *batch())[0]).all()
