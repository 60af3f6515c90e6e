"""What the policy learns from, on a tiny model: against numpy, what must change nothing, and what must change it."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import method_numpy as mn
from helpers.tiny_models import apply, filled, random_group, run_trunk, tiny, token_logprobs

from drirl_jax import equations as eq
from drirl_jax import losses
from drirl_jax.config import default
from drirl_jax.models import lora, transformer
from drirl_jax.runtime.progress import Clock
from drirl_jax.stages import optimizer
from drirl_jax.stages.base import POLICIES
from drirl_jax.stages.objectives import dpo, grpo, ppo, sft
from drirl_jax.stages.objectives.base import Batch, Params, ScoredGroup, ValueHead
from drirl_jax.types import length_mask


def weights(group, sampled, reduce="sequence"):
    mask = length_mask(group.response_len, group.response.shape[-1])
    return losses.token_weights(reduce, mask, sampled)


def batch(P=4, G=4):
    """A group with advantages, the sampler's and the reference's log-probabilities."""
    model, group = tiny(), random_group(P=P, G=G)
    rng = np.random.default_rng(1)
    advantage = jnp.asarray(rng.normal(size=(P, G)), jnp.float32)
    logp, _ = token_logprobs(model, apply(model, group), group, 1.0)
    ref_logp = logp + 0.1 * jnp.asarray(rng.normal(size=logp.shape), jnp.float32)
    return model, Batch(group, advantage[..., None], logp, ref_logp, weights(group, G))


def grpo_loss(model, params, data, tune="lora", config=default()):
    return grpo.loss(model, POLICIES[tune], config, Params(params), Batch(*data))


@jax.jit
def _gradient(params, model, data):
    return jax.grad(lambda p: grpo_loss(model, p, data)[0])(params)


def gradient(model, data, params=None):
    params = filled(lora.init(model, jax.random.key(3), rank=4, alpha=4), 5) if params is None else params
    return _gradient(params, model, data)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6, rtol=1e-4), a, b)


def test_padding_and_order_change_no_gradient():
    model, data = batch()
    want = gradient(model, data)
    group = data[0]
    noisy = group.replace(response=jnp.where(jnp.arange(5) < group.response_len[..., None], group.response, 7))
    wider = noisy.replace(response=jnp.pad(noisy.response, ((0, 0), (0, 0), (0, 3))))
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, 3))) for x in data[2:4]]
    close(gradient(model, (wider, data[1], *padded, weights(wider, 4))), want)
    close(gradient(model, jax.tree.map(lambda x: x[::-1], data)), want)


def test_splitting_the_group_changes_no_gradient():
    model, data = batch(G=4)
    group, *rest = data[:4]

    def half(s):
        part = group.replace(response=group.response[:, s], response_len=group.response_len[:, s])
        return gradient(model, (part, *(x[:, s] for x in rest), weights(part, 2)))

    both = jax.tree.map(lambda a, b: (a + b) / 2, half(slice(0, 2)), half(slice(2, 4)))
    close(both, gradient(model, data))


def test_layers_that_nobody_adapts_may_be_passed_beforehand():
    model, data = batch()
    params = filled(lora.init(model, jax.random.key(3), rank=4, alpha=4, layers=1), 5)
    want = gradient(model, data, params)
    for layers in (1, 2):
        close(gradient(model, data._replace(trunk_states=run_trunk(model, data.group, layers)), params), want)


@pytest.mark.parametrize("parts, reduce", [(2, "sequence"), (4, "sequence"), (4, "token"), (2, "constant")])
def test_gradient_accumulation_changes_no_update(parts, reduce):
    # By token the micro-batches have unequal shares: their means would not average to the whole's.
    model, data = batch()
    data = data._replace(weights=weights(data.group, 4, reduce))
    params = filled(lora.init(model, jax.random.key(3), rank=4, alpha=4), 5)
    transformation = optimizer.make(default().align.optimizer, 10)
    loss = partial(grpo_loss, model)
    step = jax.jit(lambda train, n: optimizer.step(transformation, loss, train, data, n), static_argnums=1)
    (whole, scalars), (split, other) = (step(optimizer.init(transformation, params), n) for n in (1, parts))
    # Adam's first step is the sign of the gradient: where that is rounding noise, so is the step.
    mask = jax.tree.map(lambda g: jnp.abs(g) > 1e-5, gradient(model, data, params))
    jax.tree.map(
        lambda m, a, b: np.testing.assert_allclose(jnp.where(m, a, 0), jnp.where(m, b, 0), atol=1e-5),
        mask, whole.params, split.params,
    )  # fmt: skip
    close(scalars, other)


def test_the_coefficient_changes_the_gradient():
    model, (group, _, old, ref, each, *_) = batch()
    rewards = jnp.asarray(np.random.default_rng(2).normal(size=(4, 4)), jnp.float32)
    alpha = jnp.broadcast_to(jnp.array([0.5, 1.0, 1.0, 2.0])[:, None], (4, 4))
    static = gradient(model, (group, eq.group_advantage(rewards)[..., None], old, ref, each))
    advantage = eq.scaled_advantage(alpha, eq.group_advantage(rewards))
    scaled = gradient(model, (group, advantage[..., None], old, ref, each))
    cancelled = gradient(model, (group, eq.group_advantage(alpha * rewards)[..., None], old, ref, each))
    close(cancelled, static)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(static), jax.tree.leaves(scaled))) > 1e-3


def test_the_part_of_the_demonstration():
    # Prompt 1: samples 0, 0, demonstration 3. With it mean 1, std √2. Prompt 2: samples 1, 3, demonstration 2: mean 2,
    # std 1 without it, √(2/3) with it. Prompt 3: nothing to choose.
    reward = jnp.array([[0.0, 0, 3], [1, 3, 2], [5, 5, 5]])
    low, high = 1 / np.sqrt(2), np.sqrt(3 / 2)
    member = [[-low, -low, 2 * low], [-high, high, 0], [0, 0, 0]]
    want = {"apart": [[0, 0], [-1, 1], [0, 0]], "baseline": np.array(member)[:, :2], "member": member}
    assert want.keys() == grpo.ROLES.keys()
    apart, baseline, member = (grpo.ROLES[name] for name in ("apart", "baseline", "member"))
    for name, rows in want.items():
        got = grpo.member_advantages((grpo.ROLES[name], apart), reward, 2, 0.0)
        np.testing.assert_allclose(got, rows, rtol=1e-6, err_msg=name)
    # One of the other kind with reward -3 in prompt 1: mean 0, std √(18/4).
    four, high = jnp.array([[0.0, 0, 3, -3]]), np.sqrt(2)
    for roles, row in {
        (baseline, baseline): [0, 0], (member, baseline): [0, 0, high], (member, member): [0, 0, high, -high]
    }.items():  # fmt: skip
        np.testing.assert_allclose(grpo.member_advantages(roles, four, 2, 0.0), [row], rtol=1e-6)


def test_a_demonstration_in_the_group_becomes_more_likely():
    model, (group, advantage, old, ref, *_) = batch()
    demo, length = jnp.full((4, 5), 3), jnp.array([5, 2, 3, 1])
    params = filled(lora.init(model, jax.random.key(3), rank=4, alpha=4), 5)
    pull = jnp.concatenate([jnp.zeros_like(advantage), jnp.ones((4, 1, 1))], axis=1)
    members = group.join(demo, length)
    data = Batch(members, pull, old, ref, weights(members, 4))
    slope = gradient(model, data, params)
    after = jax.tree.map(lambda p, g: p - 0.05 * g, params, slope)
    alone = group.replace(response=demo[:, None], response_len=length[:, None])

    def likely(p):
        hidden = apply(model, alone, p)
        return token_logprobs(model, hidden, alone, 1.0)[0].sum(-1)

    assert (likely(after) > likely(params)).all()


def test_a_masked_response_leaves_the_loss():
    # Its length is 0: no gradient comes from it, and the others weigh as if it were not there.
    model, (group, advantage, old, ref, *_) = batch(P=1, G=4)
    without = group.replace(response_len=group.response_len.at[:, 3].set(0))
    three = group.replace(response=group.response[:, :3], response_len=group.response_len[:, :3])
    got = gradient(model, (without, advantage, old, ref, weights(without, 4)))
    close(got, gradient(model, (three, advantage[:, :3], old[:, :3], ref[:, :3], weights(three, 3))))


def test_harmless_prompts_weigh_by_their_share_of_refusals():
    # Two harmless prompts, of whose four samples two are refusals: share .5, target .4, weight e^(5·.1).
    wrong, harmless = jnp.array([[1, 0], [1, 1], [1, 0]], bool), np.array([True, False, True])
    np.testing.assert_allclose(grpo.harmless_weight(wrong, harmless, 0.4), [np.exp(0.5), 1, np.exp(0.5)], rtol=1e-6)
    for which, target in ((harmless, 1.0), (np.zeros(3, bool), 0.3)):
        np.testing.assert_array_equal(grpo.harmless_weight(wrong, which, target), np.ones(3))


def test_full_tuning_and_adapters_start_from_the_reference():
    model, (group, advantage, old, _, each, *_) = batch()
    config = default()
    for name, policy in POLICIES.items():
        params = policy.init(config.policy, model, jax.random.key(0))
        data = Batch(group, advantage, old, old, each)
        _, scalars = jax.jit(partial(grpo.loss, model, policy, config))(Params(params), data)
        np.testing.assert_allclose(scalars["kl"], 0, atol=1e-9, err_msg=name)
        jax.tree.map(np.testing.assert_array_equal, policy.merge(model, params), model)


@pytest.mark.parametrize("tune", POLICIES)
def test_memory_does_not_grow_with_tokens_times_vocabulary(tune):
    # What a vocabulary of 16,384 adds to the update's temporary memory: a chunk of logits, and where the embedding is
    # trained its gradient; at 512 tokens nothing, as attention needs more by then. The logits of all 4 x 512 tokens
    # would be 134 MB, and more than attention takes.
    def temporary(vocab, T):
        model = jax.eval_shape(lambda: transformer.Transformer(tiny().config._replace(vocab=vocab), jax.random.key(0)))
        group = jax.eval_shape(lambda: random_group(P=1, G=4, T=T))
        policy, config = POLICIES[tune], default()
        params = jax.eval_shape(lambda m: policy.init(config.policy, m, jax.random.key(0)), model)
        value = jax.ShapeDtypeStruct((1, 4, T), jnp.float32)
        advantage = jax.ShapeDtypeStruct((1, 4, 1), jnp.float32)
        data = Batch(group, advantage, value, value, losses.Weights(value, value, value, value))

        @jax.jit
        def slope(params, model, data):
            return jax.grad(lambda p: grpo_loss(model, p, data, tune)[0])(params)

        return slope.lower(params, model, data).compile().memory_analysis().temp_size_in_bytes

    short, long = (temporary(16_384, T) - temporary(128, T) for T in (64, 512))
    assert 0 < short and long < 1.1 * short


# ---- PPO, DPO, SFT ---------------------------------------------------------------------------------------


def scored(group, reward, alpha=None, kept=None):
    """G samples and their demonstration, the last member, with these rewards [P, G + 1]."""
    P, G = group.response.shape[0], group.response.shape[1] - 1
    alpha, kept = (jnp.ones((P, G), kind) if x is None else x for x, kind in ((alpha, float), (kept, bool)))
    return ScoredGroup(group, jnp.zeros((P, G, group.response.shape[2])), jnp.asarray(reward), alpha, kept)


def context_of(model, **sections):
    """As much of a run's context as a batch needs."""
    config = default()
    for section, options in sections.items():
        config[section].update(options)
    return types.SimpleNamespace(config=config, model=model, clock=Clock())


@jax.jit
def _states(model, alone):
    return transformer.predicting_states(transformer.apply(model, alone), alone)[0, 0]


def whole_logp(model, group, adapter=None):
    """[P, M] summed log-probabilities at temperature 1, one row at a time with numpy's softmax."""
    out = np.zeros(group.response.shape[:2])
    merged = lora.merge(model, adapter) if adapter else model
    for p, m in np.ndindex(out.shape):
        alone = jax.tree.map(lambda x: x[p : p + 1], group).members(slice(m, m + 1))
        logit = np.asarray(_states(merged, alone), np.float64) @ np.asarray(merged.unembed, np.float64).T
        real = zip(logit[: group.response_len[p, m]], np.asarray(group.response[p, m]))
        out[p, m] = sum(row[i] - np.log(np.exp(row).sum()) for row, i in real)
    return out


@pytest.mark.parametrize("alpha_on", losses.ALPHA_ON)
def test_dpo_loss_matches_the_method(alpha_on):
    model, group = tiny(), random_group(P=3, G=3)
    adapter = filled(lora.init(model, jax.random.key(3), rank=4, alpha=4), 5)
    alpha = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (3, 2)), jnp.float32)
    kept = jnp.array([[True, True], [True, False], [False, False]])
    context = context_of(model, dpo={"beta": 0.3, "alpha_on": alpha_on})
    batch, _ = dpo.make_batch(context, model, Params({}), scored(group, jnp.zeros((3, 3)), alpha, kept))
    loss = jax.jit(partial(dpo.loss, model, POLICIES["lora"], context.config))
    value, told = loss(Params(adapter), batch)
    now, before = whole_logp(model, group, adapter), whole_logp(model, group)
    want = np.zeros((3, 2))
    for p, g in np.ndindex(3, 2):
        weight, beta = (alpha[p, g], 0.3) if alpha_on == "loss" else (1, 0.3 * alpha[p, g])
        want[p, g] = weight * mn.dpo(now[p, 2], before[p, 2], now[p, g], before[p, g], beta)
    np.testing.assert_allclose(value, mn.mean_of_telling(want, kept), rtol=1e-4)
    # The third prompt has no pair that says anything, and so no chosen response either.
    np.testing.assert_allclose(told["chosen"], (now - before)[:2, 2].mean(), rtol=1e-3)
    margin = (now - before)[:, 2:] - (now - before)[:, :2]
    np.testing.assert_allclose(told["margin"], mn.mean_of_telling(margin, kept), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(told["pairs_right"], mn.mean_of_telling(margin > 0, kept), rtol=1e-6)
    parts = [loss(Params(adapter), jax.tree.map(lambda x: x[p : p + 1], batch)) for p in range(3)]
    close(jax.tree.map(lambda *x: sum(x) / 3, *parts), (value, told))  # micro-batches of one prompt each
    # From the reference itself each pair costs log 2, and the demonstration becomes more likely than the samples.
    fresh = lora.init(model, jax.random.key(3), rank=4, alpha=4)
    ones = batch._replace(alpha=jnp.ones((3, 2)), weight=jnp.ones((3, 2)))
    ones = ones._replace(prompt_weight=losses.prompt_weights(ones.weight))
    np.testing.assert_allclose(loss(Params(fresh), ones)[0], np.log(2), rtol=1e-6)
    slope = jax.jit(jax.grad(lambda p: loss(Params(p), ones)[0]))(fresh)
    after = jax.tree.map(lambda p, g: p - 0.05 * g, fresh, slope)
    assert loss(Params(after), ones)[1]["margin"] > 0


@pytest.mark.parametrize("telling", [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
def test_prompts_without_a_pair_that_says_something_leave_the_mean(monkeypatch, telling):
    # Margins of 10 at β = .1: a loss of log(1 + 1/e) = .3133 for each pair, and every one ranked right.
    monkeypatch.setattr(dpo.transformer, "apply", lambda *args, **options: None)
    monkeypatch.setattr(dpo, "whole_logprobs", lambda *args: jnp.array([[10.0, 0.0]] * 4))
    policy = types.SimpleNamespace(model_and_adapter=lambda trunk, params: (None, None))
    weight = jnp.float32(telling)[:, None]
    batch = dpo.Preferences(
        None, jnp.zeros((4, 2)), jnp.ones((4, 1)), weight, prompt_weight=losses.prompt_weights(weight)
    )
    for given in (batch, batch._replace(prompt_weight=None)):
        loss, told = dpo.loss(None, policy, default(), Params(None), given)
        some = float(any(telling))
        np.testing.assert_allclose(loss, some * np.log1p(np.exp(-1)), rtol=1e-6)
        assert told == {"margin": 10 * some, "pairs_right": some, "chosen": 10 * some}


def test_pairs_by_hand():
    # Rewards of three samples, then the demonstration's. Without its best sample the first prompt's pair is 1 over 0;
    # the second prompt has nothing to choose.
    group = random_group(P=2, G=4)
    given = scored(group, [[3.0, 0, 1, 9], [2, 2, 2, 9]], kept=jnp.array([[False, True, True], [True, True, True]]))
    pair, weight = dpo.PAIRS["self"](given)
    assert pair[0].tolist() == [2, 1] and weight.tolist() == [[True], [False]]
    members, weight = dpo.PAIRS["demonstration"](given)
    assert members.tolist() == [[3, 0, 1, 2]] * 2 and (weight == given.kept).all()
    taken = group.take(members)
    np.testing.assert_array_equal(taken.response[:, 1:], group.response[:, :3])
    np.testing.assert_array_equal(taken.response_len[:, 0], group.response_len[:, 3])


@pytest.mark.parametrize("whiten", [False, True])
def test_ppo_matches_the_method(whiten):
    model, group = tiny(), random_group(P=3, G=3)
    reward, alpha = jnp.array([[1.0, 0, 9], [2, -1, 9], [0, 1, 9]]), jnp.array([[0.5, 1], [1, 2], [1, 1]])
    head = ValueHead(jnp.asarray(np.random.default_rng(0).normal(size=32), jnp.float32), jnp.array(0.1))
    options = {"whiten": whiten, "gamma": 0.9, "lam": 0.8, "value_clip": 0.05, "value_weight": 0.3}
    context = context_of(model, ppo=options, policy_loss={"beta_kl": 0.0})
    batch, _ = ppo.make_batch(context, model, Params({}, head), scored(group, reward, alpha))
    samples = group.members(slice(2))
    value_PGT = np.asarray(ppo.values(model, head, samples), np.float64)
    length = np.asarray(samples.response_len)
    mask = np.asarray(length_mask(samples.response_len, 5))
    advantage = np.zeros((3, 2, 5))
    for p, g in np.ndindex(3, 2):
        estimates, _ = mn.gae(float(reward[p, g]), value_PGT[p, g], length[p, g], 0.9, 0.8)
        advantage[p, g, : length[p, g]] = estimates
    if whiten:
        advantage = np.where(mask, (advantage - advantage[mask].mean()) / advantage[mask].std(), 0)
    close(batch.advantage, advantage * np.asarray(alpha)[..., None])
    # After a step of the head the values have moved: the loss is the method's, token by token.
    moved = head._replace(bias=head.bias + 0.2)
    logp, _ = token_logprobs(model, apply(model, samples), samples, 1.0)
    batch = batch._replace(old_logp=logp, returns=batch.returns + 0.1)
    fresh = lora.init(model, jax.random.key(3), rank=4, alpha=4)
    ppo_loss = jax.jit(partial(ppo.loss, model, POLICIES["lora"], context.config))
    loss, told = ppo_loss(Params(fresh, moved), batch)
    per_token = np.vectorize(mn.value_loss)(value_PGT + 0.2, value_PGT, np.asarray(batch.returns), 0.05)
    want = mn.reduced(per_token.reshape(6, 5), mask.reshape(6, 5), "sequence")
    np.testing.assert_allclose(told["value_loss"], want, rtol=1e-4)
    surrogate = -mn.reduced(np.asarray(batch.advantage).reshape(6, 5), mask.reshape(6, 5), "sequence")
    np.testing.assert_allclose(loss, surrogate + 0.3 * want, rtol=1e-4, atol=1e-5)


def test_sft_loss_is_minus_the_log_probability_of_a_demonstrations_token():
    model, group = tiny(), random_group(P=3, G=1)
    context = context_of(model)
    batch, _ = sft.make_batch(context, model, Params({}), ScoredGroup(group))
    fresh = lora.init(model, jax.random.key(3), rank=4, alpha=4)
    value, told = sft.loss(model, POLICIES["lora"], context.config, Params(fresh), batch)
    np.testing.assert_allclose(value, -np.mean(whole_logp(model, group) / group.response_len), rtol=1e-4)
    # The entropy is a mean over tokens, here of unequal lengths, whatever the reduction.
    _, entropy = token_logprobs(model, apply(model, group), group, 1.0)
    mask = np.asarray(length_mask(group.response_len, group.response.shape[-1]))
    np.testing.assert_allclose(told["entropy"], np.asarray(entropy)[mask].mean(), rtol=1e-5)
    context.config.policy_loss.reduce = "constant"
    batch, _ = sft.make_batch(context, model, Params({}), ScoredGroup(group))
    _, other = sft.loss(model, POLICIES["lora"], context.config, Params(fresh), batch)
    np.testing.assert_allclose(other["entropy"], told["entropy"], rtol=1e-6)
