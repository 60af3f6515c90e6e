"""The method's equations in float64 numpy, written from the text of the method with plain loops.

It shares no code with the package: the tests compare the two. Nested lists or arrays in, arrays out.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def sigmoid(x: float) -> float:
    """σ(x) = 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + np.exp(-np.float64(x)))


# ---- category rewards ------------------------------------------------------------------------------------


def irl_pair(r: float, s: float, loss: str, beta: float, penalty: float = 0.0) -> float:
    """Rewards r of the demonstration and s of the sample.

    'logistic': -log σ((r - s)/β); 'linear': -(r - s)/β + λ (r² + s²).
    """
    if loss == "linear":
        return -(r - s) / beta + penalty * (r**2 + s**2)
    return float(-np.log(sigmoid((r - s) / beta)))


def irl_token(demo_tokens, sample_tokens, demo_reward_T, sample_reward_T) -> float:
    """-log σ(r_t(y) - r_t(ỹ)) from the first differing token, averaged over positions real in both."""
    both = range(min(len(demo_tokens), len(sample_tokens)))
    first = next((t for t in both if demo_tokens[t] != sample_tokens[t]), len(both))
    terms = [-np.log(sigmoid(demo_reward_T[t] - sample_reward_T[t])) for t in both[first:]]
    return sum(terms) / max(len(terms), 1)


def zscore(reward_N, statistics) -> np.ndarray:
    """(r - mean) / std with the mean and the population std of `statistics`."""
    mean = sum(statistics) / len(statistics)
    std = np.sqrt(sum((r - mean) ** 2 for r in statistics) / len(statistics))
    return np.array([(r - mean) / std for r in reward_N])


# ---- help against harm -----------------------------------------------------------------------------------


def safe_completion(help_PM, safety_PM, harmless_P) -> np.ndarray:
    """R = σ(H) σ(S) for a harmful prompt, σ(H) for a harmless one."""
    out = np.zeros(np.shape(help_PM))
    for i, (help_M, safety_M) in enumerate(zip(help_PM, safety_PM)):
        for m, (h, s) in enumerate(zip(help_M, safety_M)):
            out[i, m] = sigmoid(h) * (1.0 if harmless_P[i] else sigmoid(s))
    return out


def constrained_reward(help_PM, harm_PM, multiplier_P) -> np.ndarray:
    """R = (H - λ F) / (1 + λ)."""
    out = np.zeros(np.shape(help_PM))
    for i, (help_M, harm_M) in enumerate(zip(help_PM, harm_PM)):
        for m, (h, f) in enumerate(zip(help_M, harm_M)):
            out[i, m] = (np.float64(h) - multiplier_P[i] * np.float64(f)) / (1 + multiplier_P[i])
    return out


def dual_ascent(multiplier: float, harms, limit: float, rate: float, most: float) -> float:
    """λ + κ (mean of the harms - limit), not below 0 and not above the most; λ itself without any harm to average."""
    if not len(harms):
        return multiplier
    return min(max(multiplier + rate * (float(np.mean(np.float64(harms))) - limit), 0.0), most)


# ---- advantages ------------------------------------------------------------------------------------------


def group_advantage(reward_PG, eps: float) -> np.ndarray:
    """Â_ig = (R_ig - mean_g R_i) / (std_g R_i + ε); population std; 0 for a group without spread."""
    out = np.zeros(np.shape(reward_PG))
    for i, row in enumerate(np.asarray(reward_PG, np.float64)):
        if all(value == row[0] for value in row):
            continue  # decided on the rewards: the computed std of equal rewards need not be 0
        mean = sum(row) / len(row)
        std = np.sqrt(sum((value - mean) ** 2 for value in row) / len(row))
        for g, value in enumerate(row):
            out[i, g] = (value - mean) / (std + eps)
    return out


def whitened(advantage_NT, mask_NT, eps: float) -> np.ndarray:
    """(A - mean) / (std + ε) over all real tokens; 0 at padding, and everywhere where all real ones are equal."""
    real = [float(a) for row, m in zip(advantage_NT, mask_NT) for a, is_real in zip(row, m) if is_real]
    if not real or all(a == real[0] for a in real):
        return np.zeros(np.shape(advantage_NT))
    mean = sum(real) / len(real)
    std = np.sqrt(sum((a - mean) ** 2 for a in real) / len(real))
    return np.where(mask_NT, (np.asarray(advantage_NT, np.float64) - mean) / (std + eps), 0)


# ---- data hardness ---------------------------------------------------------------------------------------


def cosine(a, b) -> float:
    """cos(a, b)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def aligned_similarity(response_parts, demo_parts, align: str) -> float:
    """W = mean_k max_ℓ s_kℓ ('response'), mean_ℓ max_k s_kℓ ('demo'), or the mean of the two ('both')."""
    over_response = np.mean([max(cosine(y, o) for o in demo_parts) for y in response_parts])
    over_demo = np.mean([max(cosine(y, o) for y in response_parts) for o in demo_parts])
    return {"response": over_response, "demo": over_demo, "both": (over_response + over_demo) / 2}[align]


def category_mean(value_PG, category_P, number: int):
    """Mean of all values of category `number`; None where the batch has none of it."""
    found = [v for c, row in zip(category_P, value_PG) if c == number for v in row]
    return sum(found) / len(found) if found else None


def data_alpha(delta_PG, baseline_PG, orientation: str) -> np.ndarray:
    """α^D = σ(δ) / σ(δ̄); 'inverse' is 1 / α^D."""
    out = np.zeros(np.shape(delta_PG))
    for i, row in enumerate(delta_PG):
        for g, delta in enumerate(row):
            alpha = sigmoid(delta) / sigmoid(baseline_PG[i][g])
            out[i, g] = alpha if orientation == "formula" else 1.0 / alpha
    return out


# ---- model responsiveness --------------------------------------------------------------------------------


def drop_count(drop: float, count: int) -> int:
    """⌊drop·M⌋ with the decimal number that was written: 0.29 · 100 is 29, though floats give 28.99..."""
    return int(Fraction(str(drop)) * count)


def outlier_mask(gap_PG, category_P, baseline_C, drop: float) -> np.ndarray:
    """0 for the ⌊drop·M⌋ gaps of each category with the largest (ρ - ρ̄_c)², 1 for the others."""
    gap_PG = np.asarray(gap_PG, np.float64)
    mask = np.ones(gap_PG.shape)
    for number, baseline in enumerate(baseline_C):
        places = [(i, g) for i, c in enumerate(category_P) if c == number for g in range(gap_PG.shape[1])]
        places.sort(key=lambda place: -((gap_PG[place] - baseline) ** 2))
        for place in places[: drop_count(drop, len(places))]:
            mask[place] = 0.0
    return mask


def threshold_mask(gap_PG, category_P, baseline_C, threshold: float) -> np.ndarray:
    """1 where (ρ - ρ̄_c)² <= τ."""
    out = np.zeros(np.shape(gap_PG))
    for i, row in enumerate(gap_PG):
        for g, gap in enumerate(row):
            out[i, g] = float((gap - baseline_C[category_P[i]]) ** 2 <= threshold)
    return out


def model_alpha(gap_PG, category_P, baseline_C, mask_PG, form: str) -> np.ndarray:
    """α^M_c = σ(ρ̃_c) / σ(ρ̄_c), ρ̃ the mean of the kept gaps; 'mean_of_sigma' averages σ(ρ); absent: 1."""
    out = np.ones(len(baseline_C))
    for number, baseline in enumerate(baseline_C):
        kept = [
            gap
            for i, row in enumerate(gap_PG)
            for g, gap in enumerate(row)
            if category_P[i] == number and mask_PG[i][g] > 0
        ]
        if kept:
            top = sigmoid(np.mean(kept)) if form == "sigma_of_mean" else np.mean([sigmoid(k) for k in kept])
            out[number] = top / sigmoid(baseline)
    return out


def running_mean(old: float | None, batch_mean: float | None, decay: float) -> float | None:
    """x̄ <- γ x̄ + (1-γ) · batch mean; the first batch initialises it; an absent category keeps it."""
    if batch_mean is None:
        return old
    return batch_mean if old is None else decay * old + (1 - decay) * batch_mean


# ---- combination -----------------------------------------------------------------------------------------


def combined(data_PG, model_P, how: str, per: str, clip=None) -> np.ndarray:
    """α_ig from α^D_ig and the prompt's α^M; per='prompt' gives every response its group's mean."""
    out = np.ones(np.shape(data_PG))
    for i, row in enumerate(data_PG):
        for g, a in enumerate(row):
            m = model_P[i]
            out[i, g] = {"product": a * m, "sum": (a + m) / 2, "data": a, "model": m, "none": 1.0}[how]
        if per == "prompt":
            out[i] = sum(out[i]) / len(out[i])
    return out if clip is None else np.clip(out, *clip)


# ---- losses ----------------------------------------------------------------------------------------------


def surrogate(logp_NT, old_NT, advantage_N, mask_NT, low: float, high: float, ratio: str) -> np.ndarray:
    """-min(w·A, clip(w, 1-low, 1+high)·A) per real token (0 at padding); w = π/π_old, of the token or,
    for 'sequence', the geometric mean over the sequence's real tokens."""
    out = np.zeros(np.shape(logp_NT))
    for n, advantage in enumerate(advantage_N):
        real = [t for t in range(out.shape[1]) if mask_NT[n][t]]
        logs = {t: float(logp_NT[n][t]) - float(old_NT[n][t]) for t in real}
        for t in real:
            log = logs[t] if ratio == "token" else sum(logs.values()) / len(real)
            w = np.exp(log)
            bounded = min(max(w, 1 - low), 1 + high)
            out[n, t] = -min(w * advantage, bounded * advantage)
    return out


def k3(logp, ref):
    """exp(d) - d - 1 with d = log π_ref - log π."""
    d = np.asarray(ref, np.float64) - np.asarray(logp, np.float64)
    return np.exp(d) - d - 1


def reduced(value_NT, mask_NT, how: str, length: int | None = None) -> float:
    """'sequence': mean over tokens, then sequences; 'token': over all tokens; 'constant': over N·length."""
    rows = [[v for v, m in zip(values, mask) if m] for values, mask in zip(value_NT, mask_NT)]
    if how == "sequence":
        return sum(sum(row) / max(len(row), 1) for row in rows) / len(rows)
    count = sum(len(row) for row in rows) if how == "token" else len(rows) * length
    return sum(sum(row) for row in rows) / count


def gae(reward: float, value_T, length: int, gamma: float, lam: float):
    """Advantages and returns of one response: A_t = sum over k of (γλ)^k δ_{t+k}; the reward at the last token."""
    value = [float(v) for v in value_T[:length]] + [0.0]
    delta = [(reward if t == length - 1 else 0.0) + gamma * value[t + 1] - value[t] for t in range(length)]
    advantage = [sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) for t in range(length)]
    return np.array(advantage), np.array(advantage) + np.array(value[:-1])


def value_loss(value: float, old: float, returns: float, clip: float) -> float:
    """½ max((V - R)², (V_clipped - R)²), V_clipped at most ε from the old value."""
    clipped = min(max(value, old - clip), old + clip)
    return 0.5 * max((value - returns) ** 2, (clipped - returns) ** 2)


def mean_of_telling(value_PK, telling_PK) -> float:
    """Mean over each prompt's pairs that say something, then over the prompts that have one; 0 where none has."""
    rows = [[v for v, says in zip(values, row) if says] for values, row in zip(value_PK, telling_PK)]
    means = [sum(row) / len(row) for row in rows if row]
    return sum(means) / len(means) if means else 0.0


def dpo(chosen: float, ref_chosen: float, rejected: float, ref_rejected: float, beta: float) -> float:
    """-log σ(β (log π/π_ref of the chosen - log π/π_ref of the rejected)) of whole-response log-probabilities."""
    return float(-np.log(sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))))
