"""The policy losses: against values derived by hand and the float64 numpy method; invariances."""

from functools import partial

import jax
import numpy as np
import pytest
from helpers import method_numpy as mn
from hypothesis import given, settings
from hypothesis import strategies as st

from drirl_jax import losses

LOW, HIGH, BETA = 0.2, 0.3, 0.05
K3 = jax.jit(losses.k3)


def loss(logp, old, ref, advantage, mask, beta_kl=BETA, reduce="sequence", ratio="token", weights=None):
    weights = losses.token_weights(reduce, mask, old.shape[1]) if weights is None else weights
    return losses.policy_loss(
        logp, old, ref, advantage[..., None], mask, weights, clip_low=LOW, clip_high=HIGH, beta_kl=beta_kl, ratio=ratio
    )


VALUE_AND_GRAD = jax.jit(jax.value_and_grad(loss, has_aux=True))  # of the log-probabilities


def batch(seed=0, P=4, G=3, T=5):
    """(logp, old, ref [P, G, T], advantage [P, G], mask) with ratios on both sides of the clip."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(size=(P, G, T))
    old, ref = logp + rng.normal(scale=0.3, size=(2, P, G, T))
    mask = np.arange(T) < rng.integers(1, T + 1, (P, G))[..., None]
    return *(x.astype(np.float32) for x in (logp, old, ref, rng.normal(size=(P, G)))), mask


def by_method(logp, old, ref, advantage, mask, beta_kl=BETA, reduce="sequence", ratio="token"):
    rows = [x.reshape(-1, x.shape[-1]) for x in (logp, old, ref, mask)]
    token = mn.surrogate(rows[0], rows[1], advantage.reshape(-1), rows[3], LOW, HIGH, ratio)
    return mn.reduced(token + beta_kl * mn.k3(rows[0], rows[2]), rows[3], reduce, mask.shape[-1])


def same(got, want, rtol=1e-5, atol=1e-7):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


# ---- clipped surrogate -----------------------------------------------------------------------------------


def test_clipped_surrogate_by_hand():
    # Clip to [.8, 1.3]. Ratios 1.5, .5, 1.1, 1. For A = 2: 1.5 is cut to 1.3 -> 2.6; .5 -> 1 (the smaller of
    # 1 and 1.6); 2.2; 2. For A = -2: -3 (smaller than -2.6); .5 is cut to .8 -> -1.6; -2.2; -2.
    ratio = np.array([1.5, 0.5, 1.1, 1.0])
    old = np.full((1, 2, 4), -3.0, np.float32)
    logp, advantage = (old + np.log(ratio)).astype(np.float32), np.float32([[[2], [-2]]])
    want = [[[2.6, 1.0, 2.2, 2.0], [-3.0, -1.6, -2.2, -2.0]]]
    for run in (losses.clipped_surrogate, jax.jit(losses.clipped_surrogate)):
        objective, outside = run(logp - old, advantage, LOW, HIGH)
        same(objective, np.array(want))
        assert outside.tolist() == [[[True, True, False, False]] * 2]
    # d(w A)/dlogp = w A where the cut is not in force, 0 where it is; at w = 1 the whole A.
    slope = jax.grad(lambda x: losses.clipped_surrogate(x - old, advantage, LOW, HIGH)[0].sum())(logp)
    same(slope, np.array([[[0.0, 1.0, 2.2, 2.0], [-3.0, 0.0, -2.2, -2.0]]]))


@pytest.mark.parametrize("ratio", losses.RATIO)
def test_clipped_surrogate_matches_the_method(ratio):
    for seed in range(3):
        logp, old, _, advantage, mask = batch(seed)
        rows = logp.reshape(12, 5), old.reshape(12, 5), advantage.reshape(12), mask.reshape(12, 5)
        want = mn.surrogate(*rows, LOW, HIGH, ratio)
        log_ratio = losses.RATIO[ratio].log_ratio(logp - old, mask)
        got = losses.clipped_surrogate(log_ratio, advantage[..., None], LOW, HIGH)[0]
        same(np.where(mask, got, 0), -want.reshape(4, 3, 5))


def test_sequence_ratio_by_hand():
    # Two tokens of log ratios .2 and .4: .3 for both; one token: its own.
    got = losses.RATIO["sequence"].log_ratio(np.float32([[[0.2, 0.4], [0.7, 9.0]]]), np.array([[[1, 1], [1, 0]]], bool))
    same(got, np.array([[[0.3, 0.3], [0.7, 0.7]]]))


# ---- k3 --------------------------------------------------------------------------------------------------


def test_k3_by_hand():
    # d = log π_ref - log π: ln 2 -> 2 - ln 2 - 1; -ln 2 -> ½ + ln 2 - 1; 0 -> 0 exactly.
    ln2 = np.log(2)
    logp, ref = np.float32([-2 * ln2, -ln2, -1.7, 0.0]), np.float32([-ln2, -2 * ln2, -1.7, 0.0])
    for run in (losses.k3, K3):
        same(run(logp, ref), np.array([1 - ln2, ln2 - 0.5, 0, 0]))
        assert (run(logp, ref)[2:] == 0).all()


@settings(max_examples=200, deadline=None)
@given(st.floats(-20, 0, width=32), st.floats(-20, 0, width=32))
def test_k3_matches_the_method_and_is_not_negative(logp, ref):
    # In float32: within one rounding of the terms e^d and d.
    d = np.float64(np.float32(ref) - np.float32(logp))
    value = float(K3(np.float32(logp), np.float32(ref)))
    np.testing.assert_allclose(value, mn.k3(0.0, d), rtol=1e-5, atol=3e-7 * max(1.0, abs(d)))
    assert value >= 0


def test_k3_of_nearly_equal_policies_is_not_negative():
    # After a few small steps d is 1e-5 to 1e-2 and k3 ≈ d²/2, below the rounding of e^d near 1.
    d = np.concatenate([np.geomspace(1e-6, 1e-2, 500), -np.geomspace(1e-6, 1e-2, 500)]).astype(np.float32)
    for run in (losses.k3, K3):
        assert np.asarray(run(np.zeros_like(d), d)).min() >= 0


def test_k3_gradient_by_finite_differences():
    # dk3/dlogp = 1 - e^d: 0 at equality, and positive where the policy is above the reference.
    logp, ref = np.float32([-1.0, -0.2, -3.0, -2.0]), np.float32([-1.0, -2.0, -1.5, -2.3])
    h, exact = 1e-6, logp.astype(np.float64)
    want = (mn.k3(exact + h, ref) - mn.k3(exact - h, ref)) / (2 * h)
    got = jax.grad(lambda x: losses.k3(x, ref).sum())(logp)
    same(got, want, rtol=1e-5, atol=1e-6)
    assert got[0] == 0 and got[1] > 0 > got[2]


# ---- reduction -------------------------------------------------------------------------------------------


def test_reductions_by_hand():
    # Tokens 1, 3 and 5 in two responses, T = 3. By sequence: means 2 and 5, 3.5. By token: 9/3. By constant: (4/3 +
    # 5/3) / 2. Discounted, γ = .7: (1 + .7·3)/1.7 and 5; opening: half of that, half of 3.5. A response without tokens
    # changes nothing, nor does padding.
    value = np.float32([[[1, 3, 99], [5, -99, 99], [8, 8, 8]]])
    mask = np.array([[[True, True, False], [True, False, False], [False, False, False]]])
    want = {"sequence": 3.5, "token": 3.0, "constant": 1.5, "discounted": (3.1 / 1.7 + 5) / 2}
    want["opening"] = (want["sequence"] + want["discounted"]) / 2
    assert want.keys() == losses.REDUCE.keys()
    for name, rule in losses.REDUCE.items():
        for run in (rule, jax.jit(rule)):
            same(losses.weighted(value[:, :2], run(mask[:, :2])), want[name])
            same(losses.weighted(value, run(mask)), want[name])


@pytest.mark.parametrize("reduce", ["sequence", "discounted", "opening"])
def test_weights_do_not_depend_on_what_stands_before_the_first_token(reduce):
    # In the stage `sft` the prompt stands in the row before the answer; 0.7^600 would be 0 in float32.
    weight = losses.REDUCE[reduce](np.arange(604)[None, None] >= 600)
    same(weight[..., 600:], losses.REDUCE[reduce](np.ones((1, 1, 4), bool)))
    assert not weight[..., :600].any()


@pytest.mark.parametrize("reduce", ["sequence", "token", "constant"])
def test_reductions_match_the_method(reduce):
    logp, *_, mask = batch(3)
    want = mn.reduced(logp.reshape(12, 5), mask.reshape(12, 5), reduce, 5)
    same(losses.weighted(logp, losses.REDUCE[reduce](mask)), want)


# ---- the whole loss --------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    # Response 1, A = 1: ratios 2 (cut: 1.3) and 1: -1.15. Response 2, A = -1, one token, ratio ½ (cut: .8):
    # .8. Reference at d = ln 2 on response 1's second token: k3 = 1 - ln 2, over 2 tokens, then 2 responses. Each
    # scalar is a mean over the three tokens.
    ln2 = np.log(2)
    logp = np.float32([[[-1, -1], [-1, 0]]])
    old = np.float32([[[-1 - ln2, -1], [-1 + ln2, 0]]])
    ref = np.float32([[[-1, -1 + ln2], [-1, 0]]])
    mask = np.array([[[True, True], [True, False]]])
    kl = (1 - ln2) / 4
    for run in (loss, jax.jit(loss)):
        value, scalars = run(logp, old, ref, np.float32([[1, -1]]), mask)
        same(value, (-1.15 + 0.8) / 2 + BETA * kl)
        same(scalars, {"kl": (1 - ln2) / 3, "clipped": 2 / 3, "sampler_gap": 2 * ln2 / 3})


@pytest.mark.parametrize(
    "seed, reduce, ratio", [(0, "sequence", "token"), (1, "token", "token"), (2, "constant", "sequence")]
)
def test_policy_loss_and_its_gradient_match_the_method(seed, reduce, ratio):
    data, options = batch(seed), {"reduce": reduce, "ratio": ratio}
    value_and_grad = jax.jit(jax.value_and_grad(partial(loss, **options), has_aux=True))
    (value, _), slope = value_and_grad(*data)
    same(value, by_method(*data, **options))
    same(loss(*data, **options)[0], by_method(*data, **options))
    exact, h = data[0].astype(np.float64), 1e-6
    want = np.zeros_like(exact)
    for place in np.ndindex(exact.shape):
        step = np.zeros_like(exact)
        step[place] = h
        above, below = (by_method(exact + s, *data[1:], **options) for s in (step, -step))
        want[place] = (above - below) / (2 * h)
    same(slope, want, rtol=1e-4, atol=1e-7)
    assert (want[~data[4]] == 0).all() and np.abs(want).max() > 0.01


def test_a_text_that_was_not_sampled_is_pulled_at_or_pushed_off():
    # The last member has no old and no reference log-probabilities. At its real tokens the slope is
    # -A / (its length · members · P), for A < 0 times π; no KL. The sampled members keep their loss, spread over one
    # member more.
    logp, old, ref, advantage, mask = batch(6)
    advantage[:2, -1] *= -1
    assert (np.sign(advantage[:, -1]) == [-1, -1, 1, 1]).all()
    (value, scalars), slope = VALUE_AND_GRAD(logp, old[:, :-1], ref[:, :-1], advantage, mask)
    sampled = [x[:, :-1] for x in (logp, old, ref, advantage, mask)]
    surrogate = by_method(*sampled, beta_kl=0.0)
    kl = by_method(*sampled, beta_kl=1.0) - surrogate
    length, pulled, last = mask[:, -1].sum(-1, keepdims=True), advantage[:, -1:] > 0, logp[:, -1]
    text = (np.where(mask[:, -1], np.where(pulled, last, np.exp(last)), 0) / length).sum(-1)
    same(value, (2 * surrogate - (advantage[:, -1] * text).mean()) / 3 + BETA * kl)
    real = sampled[4]
    same(scalars["kl"], mn.k3(sampled[0], sampled[2])[real].mean())  # a token of the samples, whatever the loss's mean
    weight = np.where(pulled, 1, np.exp(last))
    same(slope[:, -1], np.where(mask[:, -1], -advantage[:, -1:] * weight / length / 12, 0))


@pytest.mark.parametrize("reduce", losses.REDUCE)
def test_figures_of_a_token_are_means_over_tokens_however_the_loss_weighs_them(reduce):
    # Responses of unequal length, tokens off by unequal amounts: any other weights give other means.
    logp, old, ref, advantage, mask = batch(8)
    _, scalars = loss(logp, old, ref, advantage, mask, reduce=reduce)
    ratio = np.exp(logp.astype(np.float64) - old)
    want = {
        "kl": mn.k3(logp, ref),
        "clipped": (ratio < 1 - LOW) | (ratio > 1 + HIGH),
        "sampler_gap": np.abs(logp - old),
    }
    same(scalars, {name: value[mask].mean() for name, value in want.items()}, rtol=1e-4)
    # In the loss the KL term goes on being weighed like the rest.
    if reduce not in ("discounted", "opening"):
        want_loss = by_method(logp, old, ref, advantage, mask, reduce=reduce)
        same(loss(logp, old, ref, advantage, mask, reduce=reduce)[0], want_loss)


def test_figures_of_a_token_are_alike_in_micro_batches_of_other_lengths():
    # By hand: two prompts of 1 and 3 tokens, off by 1 and by 0: a quarter of the tokens, though half of the prompts.
    mask = np.arange(3) < np.array([[[1]], [[3]]])
    logp = np.zeros((2, 1, 3), np.float32)
    old, advantage = logp - np.float32([[[1]], [[0]]]), np.ones((2, 1), np.float32)
    weights = losses.token_weights("constant", mask, 1)
    parts = [loss(*(x[i : i + 1] for x in (logp, old, old, advantage, mask)), weights=losses.Weights(
        *(np.asarray(w)[i : i + 1] for w in weights)))[1] for i in range(2)]  # fmt: skip
    same(np.mean([part["sampler_gap"] for part in parts]), 0.25)
    same(loss(logp, old, old, advantage, mask, weights=weights)[1]["sampler_gap"], 0.25)


def test_weights_of_responses_and_prompts_by_hand():
    # Two responses of 1 and 3 tokens and an empty one: each of the two has half of the mean, over P = 1 prompt.
    mask = np.array([[[True, False, False], [True, True, True], [False] * 3]])
    responses = losses.token_weights("token", mask, 2).responses
    same(responses, np.array([[[1 / 2, 0, 0], [1 / 6] * 3, [0] * 3]]))
    # Of four prompts two have a pair that weighs anything.
    weight = np.float32([[1, 1], [0, 0], [0, 1], [0, 0]])
    same(losses.prompt_weights(weight), np.array([2.0, 0, 2, 0]))
    same(losses.prompt_weights(0 * weight), np.zeros(4))


def test_without_a_kl_term_the_reference_is_not_needed():
    logp, old, ref, advantage, mask = batch(7)
    (want, scalars), want_slope = jax.value_and_grad(partial(loss, beta_kl=0.0), has_aux=True)(
        logp, old, ref, advantage, mask
    )
    (value, other), slope = jax.value_and_grad(partial(loss, beta_kl=0.0), has_aux=True)(
        logp, old, None, advantage, mask
    )
    assert scalars.pop("kl") > 0
    assert value == want and (slope == want_slope).all() and other == scalars


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
def test_padding_changes_nothing(size):
    logp, old, ref, advantage, mask = batch(1)
    noise = size * np.random.default_rng(7).normal(size=(3, *mask.shape)).astype(np.float32)
    garbage = [np.where(mask, x, n) for x, n in zip((logp, old, ref), noise)]
    want, dirty = VALUE_AND_GRAD(logp, old, ref, advantage, mask), VALUE_AND_GRAD(*garbage, advantage, mask)
    same(dirty, want)
    assert (np.asarray(dirty[1])[~mask] == 0).all()
    longer = [np.pad(x, ((0, 0), (0, 0), (0, 2)), constant_values=-size) for x in (logp, old, ref)]
    (value, scalars), slope = VALUE_AND_GRAD(*longer, advantage, np.pad(mask, ((0, 0), (0, 0), (0, 2))))
    same(((value, scalars), slope[..., :5]), want)


def test_the_order_of_the_batch_changes_nothing():
    data = batch(2)
    (value, scalars), slope = VALUE_AND_GRAD(*data)
    prompts, group = np.array([2, 0, 3, 1]), np.array([1, 2, 0])
    (moved, moved_scalars), moved_slope = VALUE_AND_GRAD(*(x[prompts][:, group] for x in data))
    same((moved, moved_scalars, moved_slope), (value, scalars, slope[prompts][:, group]))


@pytest.mark.parametrize("pieces, reduce", [(2, "sequence"), (4, "sequence"), (2, "token"), (4, "constant")])
def test_equal_micro_batches_average_to_the_whole(pieces, reduce):
    data = batch(4)
    weights = losses.token_weights(reduce, data[4], 3)
    value_and_grad = jax.value_and_grad(lambda *x: loss(*x[:5], weights=losses.Weights(*x[5:])), has_aux=True)
    (value, scalars), slope = value_and_grad(*data, *weights)
    parts = [value_and_grad(*part) for part in zip(*(np.split(np.asarray(x), pieces) for x in (*data, *weights)))]
    same(jax.tree.map(lambda *x: sum(x) / pieces, *(part[0] for part in parts)), (value, scalars))
    same(np.concatenate([part[1] for part in parts]) / pieces, slope)


@pytest.mark.parametrize("beta_kl", [0.0, 0.5])
def test_the_on_policy_gradient_is_the_policy_gradient(beta_kl):
    # A softmax policy over 6 tokens by position. With ratio 1, and k3 flat where the reference is the policy,
    # ∇L = -mean_ig mean_t A ∇log π(y_t), ∇log π(y) = onehot(y) - π.
    rng = np.random.default_rng(0)
    theta, token = rng.normal(size=(5, 6)).astype(np.float32), rng.integers(0, 6, (4, 3, 5))
    _, _, _, advantage, mask = batch(5)

    def logp(theta):
        return jax.nn.log_softmax(theta)[np.arange(5), token]

    frozen = logp(theta)
    got = jax.grad(lambda theta: loss(logp(theta), frozen, frozen, advantage, mask, beta_kl)[0])(theta)
    probability = np.exp(theta.astype(np.float64))
    probability /= probability.sum(1, keepdims=True)
    want = np.zeros((5, 6))
    for p, g, t in zip(*np.nonzero(mask)):
        want[t] -= advantage[p, g] * (np.eye(6)[token[p, g, t]] - probability[t]) / mask[p, g].sum() / 12
    same(got, want, rtol=1e-4, atol=1e-6)
    assert np.abs(want).max() > 0.05


# ---- PPO -------------------------------------------------------------------------------------------------


def test_generalised_advantages_by_hand():
    # γ = λ = ½, reward 4, values 1, 2 and a real length of 2: δ = (0 + ½·2 - 1, 4 + 0 - 2) = (0, 2), so A = (0 + ¼·2,
    # 2), returns (1½, 4). The third token is padding, whatever its value.
    args = np.float32([[4]]), np.float32([[[1, 2, 99]]]), np.array([[[True, True, False]]])
    for run in (losses.generalised_advantage, jax.jit(losses.generalised_advantage)):
        advantage, returns = run(*args, 0.5, 0.5)
        same(advantage, np.array([[[0.5, 2, 0]]]))
        same(returns, np.array([[[1.5, 4, 0]]]))
    # λ = γ = 1: the reward less the value, whatever comes between.
    same(losses.generalised_advantage(*args, 1.0, 1.0)[0], np.array([[[3.0, 2, 0]]]))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0)])
def test_generalised_advantages_match_the_method(gamma, lam):
    value, _, _, reward, mask = batch(3)
    got = losses.generalised_advantage(reward, value, mask, gamma, lam)
    for p, g in np.ndindex(reward.shape):
        length = mask[p, g].sum()
        want = mn.gae(reward[p, g], value[p, g], length, gamma, lam)
        for mine, theirs in zip(got, want):
            same(mine[p, g], np.pad(theirs, (0, mask.shape[-1] - length)), rtol=1e-4, atol=1e-5)


def test_whitened_advantages_have_mean_0_and_spread_1_over_real_tokens():
    value, _, _, _, mask = batch(4)
    got = np.asarray(losses.whitened(value, mask))
    assert got[mask].mean() == pytest.approx(0, abs=1e-6) and got[mask].std() == pytest.approx(1, abs=1e-5)
    assert (got[~mask] == 0).all() and (np.asarray(losses.whitened(value, np.zeros_like(mask))) == 0).all()
    order = np.argsort(value[mask])
    assert (np.diff(got[mask][order]) >= 0).all()
    same(got, mn.whitened(value.reshape(12, 5), mask.reshape(12, 5), 1e-6).reshape(got.shape), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reward", [0.1, 0.7, -0.9, 7.7, 123.4, 1e20])
def test_advantages_that_are_all_alike_are_whitened_to_0(reward):
    # γ = λ = 1, values of 0: every token's advantage is the reward, and none is better than another.
    *_, mask = batch(4)
    advantage, _ = losses.generalised_advantage(np.full((4, 3), reward, np.float32), 0.0 * mask, mask, 1.0, 1.0)
    assert (np.asarray(losses.whitened(advantage, mask)) == 0).all()
    noisy = np.where(mask, advantage, np.inf)  # what stands at padding has no say
    assert (np.asarray(losses.whitened(noisy, mask)) == 0).all()


def test_value_loss_matches_the_method():
    # By hand: V = 3, V_old = 1, ε = ½, R = 2: clipped to 1½, so max(1, ¼)/2 = ½. R = 3: max(0, 2¼)/2 = 1.125.
    value, old, returns = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    got = losses.value_loss(value, old, returns, 0.3)
    same(got, np.array([mn.value_loss(*row, 0.3) for row in zip(value, old, returns)]), rtol=1e-5, atol=1e-6)
    same(losses.value_loss(np.float32([3, 3]), np.float32([1, 1]), np.float32([2, 3]), 0.5), np.array([0.5, 1.125]))


# ---- DPO -------------------------------------------------------------------------------------------------


def test_preference_matches_the_method():
    # α = 1 is DPO itself, in either place; α on β is another β, α on the loss another weight.
    logp = np.random.default_rng(1).normal(-20, 3, size=(20, 4))
    margin = ((logp[:, 0] - logp[:, 1]) - (logp[:, 2] - logp[:, 3])).astype(np.float32)
    plain, doubled = (np.array([mn.dpo(*row, beta) for row in logp]) for beta in (0.1, 0.2))
    one, two = np.ones(20, np.float32), np.full(20, 2, np.float32)
    for place in losses.ALPHA_ON:
        same(losses.preference(margin, one, 0.1, place), plain, rtol=1e-4, atol=1e-6)
    same(losses.preference(margin, two, 0.1, "beta"), doubled, rtol=1e-4, atol=1e-6)
    same(losses.preference(margin, two, 0.1, "loss"), 2 * plain, rtol=1e-4, atol=1e-6)
    # α is a constant: no gradient through it.
    slope = jax.grad(lambda a: losses.preference(margin, a, 0.1, "beta").sum())(one)
    same(slope, np.zeros(20))
