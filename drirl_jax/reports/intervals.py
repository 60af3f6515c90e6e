"""All 95% intervals: of measured shares, of means, and of differences and ratios on the same prompts."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np
import scipy.stats

RESAMPLES = 2000
FEW = 30  # a bootstrap over items needs this many values or more


class Interval(NamedTuple):
    """A mean with a 95% interval; the bounds are NaN for a single number, which says nothing about noise."""

    mean: float
    low: float
    high: float


def wilson(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share (E. B. Wilson 1927); 95% at z = 1.96.

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n),  p = successes / n

    Args:
        successes, n: 0 <= successes <= n, n >= 1.
    """
    p = successes / n
    centre, spread = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    denominator = 1 + z**2 / n
    return max(0.0, (centre - spread) / denominator), min(1.0, (centre + spread) / denominator)


def share(successes: float, n: float) -> Interval:
    """The share successes / n with Wilson's 95% interval: see `wilson`."""
    return Interval(successes / n, *wilson(successes, n))


def effective_count(values: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> float:
    """The effective number of independent items; items of one cluster may be alike (L. Kish 1965).

    n / D, at most n, with the design effect D = m/(m - 1) Σ_c (Σ_{i in c} (x_i - x̄))² / (n/(n - 1) Σ_i (x_i - x̄)²) over
    m clusters. D = 1 if each item is its own cluster. Of shares, Σ_i (x_i - x̄)² = n x̄(1 - x̄).

    Args:
        values: a number for each item, such as 0 or 1. If all are equal, D is unknown, and 1 is used.
        clusters: the cluster of each item.
    """
    x, n = np.asarray(values, float), len(values)
    sums = _cluster_sums(x - x.mean(), clusters)
    spread = n * float(x.var()) * n / max(n - 1, 1)
    if len(sums) < 2 or spread == 0:
        return n
    return n / max(1.0, len(sums) / (len(sums) - 1) * float((sums**2).sum()) / spread)


def _cluster_sums(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """[m] the sum of each cluster's values."""
    return np.bincount(np.unique(np.asarray(clusters), return_inverse=True)[1], weights=values)


def clustered_mean(values: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> Interval:
    """The mean with Student's t interval over clusters of items (K. Liang and S. Zeger 1986).

    x̄ ± t(0.975, m - 1) s / n,  s² = m/(m - 1) Σ_c (Σ_{i in c} (x_i - x̄))², over m clusters of n items. If each item is
    its own cluster, this is Student's interval.

    Args:
        values: any numbers, one for each item; at least one. The bounds are NaN for a single cluster.
        clusters: the cluster of each item.
    """
    x = np.asarray(values, float)
    sums, mean = _cluster_sums(x - x.mean(), clusters), float(x.mean())
    m = len(sums)
    if m < 2:
        return Interval(mean, float("nan"), float("nan"))
    error = (m / (m - 1) * float((sums**2).sum())) ** 0.5 / len(x)
    reach = float(scipy.stats.t.ppf(0.975, m - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


def geometric_mean(values: Sequence[float], clusters: Sequence[str]) -> Interval:
    """The geometric mean of positive values with its 95% interval: exp of `clustered_mean` of their logarithms."""
    return exp(clustered_mean(np.log(values), clusters))


def exp(estimate: Interval) -> Interval:
    """The exponentials of a mean of logarithms and of its bounds."""
    return Interval(*map(float, np.exp(estimate)))


def over_items(values: Sequence[float], clusters: Sequence[str]) -> tuple[Interval, str]:
    """The mean of a benchmark's values in [0, 1] with its 95% interval over items, and "wilson" or "bootstrap".

    For shares, whose values are all 0 or 1: Wilson's interval over `effective_count` items. For other values: the
    percentiles of a bootstrap with RESAMPLES resamples and a fixed seed. With fewer than FEW items, or where all values
    are the same, the bootstrap's interval is too narrow. Then Wilson's interval is used: no value in [0, 1] varies more
    than a share.

    Args:
        values: one number for each item; at least one.
        clusters: the cluster of each item: see `effective_count`.
    """
    x, n = np.asarray(values, float), len(values)
    if np.isin(x, (0.0, 1.0)).all():
        n_effective = effective_count(x, clusters)
        (low, high), kind = wilson(x.mean() * n_effective, n_effective), "wilson"
    elif n < FEW or np.ptp(x) == 0:
        (low, high), kind = wilson(x.sum(), n), "wilson"
    else:
        rng = np.random.default_rng(0)
        result = scipy.stats.bootstrap((x,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng)
        (low, high), kind = result.confidence_interval, "bootstrap"
    return Interval(float(x.mean()), float(low), float(high)), kind


def over_prompts(values: Sequence[float], is_share: bool) -> Interval:
    """The mean with its interval over prompts: Wilson's for a share, otherwise by bootstrap.

    Args:
        values: one number for each prompt; at least one.
        is_share: whether all values are 0 or 1.
    """
    return share(round(sum(values)), len(values)) if is_share else interval([list(values)])


def paired_difference(after: Sequence[float], before: Sequence[float], is_share: bool) -> Interval:
    """The mean difference on the same prompts, with its interval over them: Newcombe's for shares, or by bootstrap.

    Args:
        after, before: one number for each prompt; at least one prompt.
        is_share: whether all values are 0 or 1.
    """
    return paired_shares(after, before) if is_share else difference([after], [before])


def paired_over_items(after: Sequence[float], before: Sequence[float], clusters: Sequence[str]) -> Interval:
    """The mean difference of a benchmark's values on the same items, with its 95% interval over clusters of items.

    For shares: Newcombe's interval (see `paired_shares`) over the `effective_count` of the differences. For other
    values: `clustered_mean` of the differences.

    Args:
        after, before: one number for each item; at least one item.
        clusters: the cluster of each item.
    """
    x, y = np.asarray(after, float), np.asarray(before, float)
    if not np.isin([x, y], (0.0, 1.0)).all():
        return clustered_mean(x - y, clusters)
    return _newcombe(x > 0, y > 0, effective_count(x - y, clusters))


def paired_ratio(after: Sequence[float], before: Sequence[float], clusters: Sequence[str]) -> Interval:
    """The ratio of two geometric means over the same items: exp of `clustered_mean` of log(after / before).

    Args:
        after, before: one positive number for each item; at least one item.
        clusters: the cluster of each item.
    """
    return exp(clustered_mean(np.log(after) - np.log(before), clusters))


def paired_shares(after: Sequence[float], before: Sequence[float]) -> Interval:
    """The difference of two shares of the same prompts with Newcombe's 95% interval (R. G. Newcombe 1998, method 10).

    With Wilson's intervals (l, u) of the shares p, and φ their correlation over prompts:
    low = p' - p - √((p' - l')² - 2φ(p' - l')(u - p) + (u - p)²); high is the same with l and u exchanged.

    Args:
        after, before: 0 or 1 for each prompt; at least one prompt.
    """
    return _newcombe(np.asarray(after, bool), np.asarray(before, bool), len(after))


def _newcombe(now: np.ndarray, then: np.ndarray, n: float) -> Interval:
    """The interval of `paired_shares`; n is the number of independent items that these items count for."""
    p, q, weight = float(now.mean()), float(then.mean()), n / len(now)
    both, neither = weight * (now & then).sum(), weight * (~now & ~then).sum()
    product = float(both * neither - weight * (now & ~then).sum() * weight * (then & ~now).sum())
    product = max(product - n / 2, 0.0) if product > 0 else product
    spread = n**2 * (p * (1 - p) * q * (1 - q)) ** 0.5
    correlation = product / spread if spread else 0.0
    (low, high), (low_then, high_then) = (wilson(share * n, n) for share in (p, q))

    def reach(a: float, b: float) -> float:
        return max(a**2 - 2 * correlation * a * b + b**2, 0.0) ** 0.5

    return Interval(p - q, p - q - reach(p - low, high_then - q), p - q + reach(high - p, q - low_then))


def interval(values: Sequence, seed: int = 0) -> Interval:
    """Mean with a 95% interval: by bootstrap over seeds and prompts, or by Student's t over seeds alone.

    Args:
        values: for each seed one number, or a list with one number for each prompt (the same prompts for all seeds).
    """
    table = np.asarray(values, float)
    if table.ndim == 2:
        rng = np.random.default_rng(seed)
        seeds = rng.integers(0, len(table), (RESAMPLES, len(table)))
        prompts = rng.integers(0, table.shape[1], (RESAMPLES, table.shape[1]))
        means = [table[s][:, p].mean() for s, p in zip(seeds, prompts)]
        return Interval(float(table.mean()), *map(float, np.quantile(means, (0.025, 0.975))))
    if len(table) < 2:
        return Interval(float(table.mean()), float("nan"), float("nan"))
    # Not bootstrap: with three seeds it cannot go beyond the smallest and the largest value, which is too narrow.
    reach = scipy.stats.t.ppf(0.975, len(table) - 1) * table.std(ddof=1) / len(table) ** 0.5
    return Interval(float(table.mean()), float(table.mean() - reach), float(table.mean() + reach))


def difference(values: Sequence, reference: Sequence) -> Interval:
    """Interval of the difference of means; the bootstrap draws the same prompts and seeds for both."""
    return interval(np.asarray(values, float) - np.asarray(reference, float))
