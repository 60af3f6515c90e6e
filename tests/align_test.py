"""The policy update on a tiny model: what must change nothing, and what must change it."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformer_test import filled, random_group, tiny

from drirl_jax import equations as eq
from drirl_jax import losses, optimizer, train
from drirl_jax.config import default
from drirl_jax.models import lora, reward, transformer
from drirl_jax.stages import align, irl
from drirl_jax.stages.base import POLICIES
from drirl_jax.types import length_mask


def weights(group, sampled, reduce="sequence"):
    mask = length_mask(group.response_len, group.response.shape[-1])
    return losses.token_weights(reduce, mask, sampled)


def batch(P=4, G=4):
    """A group with advantages, the sampler's and the reference's log-probabilities."""
    model, group = tiny(), random_group(P=P, G=G)
    rng = np.random.default_rng(1)
    advantage = jnp.asarray(rng.normal(size=(P, G)), jnp.float32)
    logp, _ = transformer.token_logprobs(model, transformer.apply(model, group), group, 1.0)
    ref_logp = logp + 0.1 * jnp.asarray(rng.normal(size=logp.shape), jnp.float32)
    return model, align.Batch(group, advantage, logp, ref_logp, weights(group, G))


@jax.jit
def _gradient(params, model, data):
    return jax.grad(lambda p: align.loss(model, POLICIES["lora"], default(), p, align.Batch(*data))[0])(params)


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
        close(gradient(model, data._replace(begun=transformer.begin(model, data.group, layers)), params), want)


@pytest.mark.parametrize("parts, reduce", [(2, "sequence"), (4, "sequence"), (4, "token"), (2, "constant")])
def test_gradient_accumulation_changes_no_update(parts, reduce):
    # By token the micro-batches have unequal shares: their means would not average to the whole's.
    model, data = batch()
    data = data._replace(weights=weights(data.group, 4, reduce))
    params = filled(lora.init(model, jax.random.key(3), rank=4, alpha=4), 5)
    transformation = optimizer.make(default().align.optimizer, 10)
    loss = partial(align.loss, model, POLICIES["lora"], default())
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
    model, (group, _, old, ref, each, _) = batch()
    rewards = jnp.asarray(np.random.default_rng(2).normal(size=(4, 4)), jnp.float32)
    alpha = jnp.broadcast_to(jnp.array([0.5, 1.0, 1.0, 2.0])[:, None], (4, 4))
    static = gradient(model, (group, eq.group_advantage(rewards), old, ref, each))
    scaled = gradient(model, (group, eq.scaled_advantage(alpha, eq.group_advantage(rewards)), old, ref, each))
    cancelled = gradient(model, (group, eq.group_advantage(alpha * rewards), old, ref, each))
    close(cancelled, static)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(static), jax.tree.leaves(scaled))) > 1e-3


def test_the_part_of_the_demonstration():
    # Prompt 1: samples 0, 0, demonstration 3. With it mean 1, std √2. Prompt 2: samples 1, 3, demonstration 2: mean 2,
    # std 1 without it, √(2/3) with it. Prompt 3: nothing to choose.
    reward = jnp.array([[0.0, 0, 3], [1, 3, 2], [5, 5, 5]])
    low, high = 1 / np.sqrt(2), np.sqrt(3 / 2)
    member = [[-low, -low, 2 * low], [-high, high, 0], [0, 0, 0]]
    want = {"apart": [[0, 0], [-1, 1], [0, 0]], "baseline": np.array(member)[:, :2], "member": member}
    assert want.keys() == align.ROLES.keys()
    apart, baseline, member = (align.ROLES[name] for name in ("apart", "baseline", "member"))
    for name, rows in want.items():
        got = align.advantages((align.ROLES[name], apart), reward, 2, 0.0)
        np.testing.assert_allclose(got, rows, rtol=1e-6, err_msg=name)
    # One of the other kind with reward -3 in prompt 1: mean 0, std √(18/4).
    four, high = jnp.array([[0.0, 0, 3, -3]]), np.sqrt(2)
    for roles, row in {
        (baseline, baseline): [0, 0], (member, baseline): [0, 0, high], (member, member): [0, 0, high, -high]
    }.items():  # fmt: skip
        np.testing.assert_allclose(align.advantages(roles, four, 2, 0.0), [row], rtol=1e-6)


def test_a_demonstration_in_the_group_becomes_more_likely():
    model, (group, advantage, old, ref, *_) = batch()
    demo, length = jnp.full((4, 5), 3), jnp.array([5, 2, 3, 1])
    config, policy = default(), POLICIES["lora"]
    params = filled(lora.init(model, jax.random.key(3), rank=4, alpha=4), 5)
    pull = jnp.concatenate([jnp.zeros_like(advantage), jnp.ones((4, 1))], axis=1)
    members = align.joined(group, demo, length)
    data = align.Batch(members, pull, old, ref, weights(members, 4))
    slope = jax.grad(lambda p: align.loss(model, policy, config, p, data)[0])(params)
    after = jax.tree.map(lambda p, g: p - 0.05 * g, params, slope)
    alone = group.replace(response=demo[:, None], response_len=length[:, None])

    def likely(p):
        hidden = transformer.apply(model, alone, p)
        return transformer.token_logprobs(model, hidden, alone, 1.0)[0].sum(-1)

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
    np.testing.assert_allclose(align.harmless_weight(wrong, harmless, 0.4), [np.exp(0.5), 1, np.exp(0.5)], rtol=1e-6)
    for which, target in ((harmless, 1.0), (np.zeros(3, bool), 0.3)):
        np.testing.assert_array_equal(align.harmless_weight(wrong, which, target), np.ones(3))


def test_full_tuning_and_adapters_start_from_the_reference():
    model, (group, advantage, old, _, each, _) = batch()
    config = default()
    for name, policy in POLICIES.items():
        params = policy.init(config.policy, model, jax.random.key(0))
        _, scalars = align.loss(model, policy, config, params, align.Batch(group, advantage, old, old, each))
        np.testing.assert_allclose(scalars["kl"], 0, atol=1e-9, err_msg=name)
        jax.tree.map(np.testing.assert_array_equal, policy.merged(model, params), model)


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
        advantage = jax.ShapeDtypeStruct((1, 4), jnp.float32)
        data = align.Batch(group, advantage, value, value, losses.Weights(value, value))

        @jax.jit
        def slope(params, model, data):
            return jax.grad(lambda p: align.loss(model, policy, config, p, data)[0])(params)

        return slope.lower(params, model, data).compile().memory_analysis().temp_size_in_bytes

    short, long = (temporary(16_384, T) - temporary(128, T) for T in (64, 512))
    assert 0 < short and long < 1.1 * short


def test_a_step_with_a_calibrated_baseline_and_masked_responses_left_out(policy, tmp_path):
    config = importlib.import_module("configs.tiny").get_config()
    config.policy.init, config.compilation_cache = str(policy), str(tmp_path)
    config.scaling.update(
        {"split": "clause", "baseline": "dataset", "mask": "threshold", "threshold": 0.5, "drop_masked": True}
    )
    config.grpo.update({"reduce": "token", "ratio": "sequence"})
    context = train.prepare(config)
    fresh = irl.init_rewards(context)
    head = jax.random.normal(jax.random.key(0), fresh.head.shape)  # else all rewards are equal, and no gap is masked
    stage = align.make(context, reward.Bank(fresh.replace(head=head), mean=fresh.bias, std=jnp.ones_like(fresh.bias)))
    state, deltas = stage.init(), []
    for step in range(2):
        batch, stats, scalars = stage.collect(state, step)
        trained, told = stage.update(state.train, batch)
        state = state._replace(train=trained, carry=stats)
        deltas.append(stats.delta)
    assert np.isfinite(told["loss"]) and 0 < scalars["kept"] < 1
    assert (deltas[0] == deltas[1]).all() and (deltas[0] > 0).all() and (deltas[0] < 2).all()
    left_out = np.asarray(batch.group.response_len) == 0
    assert left_out.mean() == pytest.approx(1 - scalars["kept"]) and (batch.weights.members[left_out] == 0).all()
