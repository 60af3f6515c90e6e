"""The calibration of the learned rewards, and their correlation with the length of a text."""

from __future__ import annotations

import numpy as np


def reliability(gap_N: np.ndarray, beta: float, bins: int = 10) -> list[dict[str, float]]:
    """The share of pairs that the reward ranks right, by its confidence, in bins of equal width.

    The sign of a gap says which of two texts is the demonstration, with confidence σ(|gap|/β) in [½, 1]. It is right
    if gap > 0.

    Returns:
        for each bin that is not empty {"n": number of pairs, "confidence" and "right": means of the pairs in it}.
    """
    confidence_N = 1 / (1 + np.exp(-np.abs(gap_N) / beta))
    bin_N = np.minimum(((confidence_N - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {"n": int(rows.sum()), "confidence": float(confidence_N[rows].mean()), "right": float((gap_N[rows] > 0).mean())}
        for rows in (bin_N == b for b in range(bins))
        if rows.any()
    ]


def calibration_error(bins: list[dict[str, float]]) -> float:
    """ECE = Σ_b (n_b / N) |right_b - confidence_b|, N > 0     (expected calibration error, arXiv 1706.04599)"""
    return sum(b["n"] * abs(b["right"] - b["confidence"]) for b in bins) / sum(b["n"] for b in bins)


def correlation(reward_NK: np.ndarray, length_NK: np.ndarray) -> float:
    """Pearson correlation of the samples' raw reward and length; NaN if all lengths or all rewards are equal."""
    if np.ptp(length_NK) == 0 or np.ptp(reward_NK) == 0:
        return float("nan")
    return float(np.corrcoef(reward_NK.reshape(-1), length_NK.reshape(-1))[0, 1])
