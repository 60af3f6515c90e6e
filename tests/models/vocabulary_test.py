"""Log-probabilities by chunks, and sums of what a loss makes of them, beside plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import apply, random_group, tiny, token_logprobs

from drirl_jax.models import vocabulary
from drirl_jax.models.transformer import predicting_states


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5), a, b)


@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_gradients_of_logprobs_are_those_of_plain_autodiff(cap):
    rng = np.random.default_rng(0)
    unembed, hidden = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((23, 6), (2, 5, 6)))
    target = jnp.asarray(rng.integers(0, 23, (2, 5)), jnp.int32)
    temperature = jnp.asarray(rng.uniform(0.5, 2, (2, 5)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)

    def ours(unembed, hidden):
        return (vocabulary.logprobs(unembed, hidden, target, 1 / temperature, 4, cap)[0] * weight).sum()

    def plain(unembed, hidden):
        logit = hidden @ unembed.T
        logp = jax.nn.log_softmax((cap * jnp.tanh(logit / cap) if cap else logit) / temperature[..., None])
        return (jnp.take_along_axis(logp, target[..., None], axis=-1)[..., 0] * weight).sum()

    got = jax.jit(jax.value_and_grad(ours, (0, 1)))(unembed, hidden)
    close(got, jax.jit(jax.value_and_grad(plain, (0, 1)))(unembed, hidden))


def test_a_temperature_rounds_no_bfloat16():
    """As in the sampler, the logits are divided, not the states: else a token's ratio would be wrong by a percent."""
    rng = np.random.default_rng(0)
    unembed, hidden = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((97, 64), (2, 5, 64)))
    target = jnp.asarray(rng.integers(0, 97, (2, 5)), jnp.int32)
    got, _ = vocabulary.logprobs(unembed, hidden, target, jnp.full((2, 5), 1 / 0.7))
    logit = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T / 0.7
    want = jax.nn.log_softmax(logit)
    np.testing.assert_allclose(got, np.take_along_axis(want, np.asarray(target)[..., None], -1)[..., 0], atol=1e-3)


def curved(logp, entropy, arrays):
    """Something that is not linear in the log-probabilities, and what is told beside it."""
    old, weight = arrays["old"], arrays["weight"]
    return (jnp.exp(logp - old) * weight).sum(), {"entropy": (entropy * weight).sum(), "moved": (logp * weight).sum()}


@pytest.mark.parametrize("chunk", [4, 12, 1000])  # of P · G · T = 2 · 3 · 5: tokens one by one, by two, all at once
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_a_sum_by_chunks_is_the_sum(cap, chunk):
    model, group = tiny(), random_group()
    model.config = model.config._replace(final_softcap=cap)
    rng = np.random.default_rng(0)
    arrays = {name: jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32) for name in ("old", "weight")}
    temperature = jnp.array([0.7, 0.7, 1.0])

    def ours(model):
        hidden = apply(model, group)
        value, told = vocabulary.token_sum(model, hidden, group, temperature, curved, arrays, chunk)
        return 3 * value, told

    def plain(model):
        hidden = apply(model, group)
        value, told = curved(*token_logprobs(model, hidden, group, temperature), arrays)
        return 3 * value, told

    close(jax.jit(ours)(model), jax.jit(plain)(model))
    got, want = (jax.jit(jax.value_and_grad(f, has_aux=True))(model) for f in (ours, plain))
    close(got, want)


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_kl_is_that_of_whole_rows_of_logits(cap, chunk):
    group, models = random_group(), [tiny(tied=False, seed=seed) for seed in (0, 1)]
    models = [model.replace(head=model.head[...] * 40) for model in models]
    models[0].config = models[0].config._replace(final_softcap=cap)  # each has its own cap
    hidden = [apply(model, group) for model in models]
    found = vocabulary.token_kl(models[0], hidden[0], models[1], hidden[1], group, chunk)
    logps = []
    for model, states in zip(models, hidden):
        logit = np.asarray(predicting_states(states, group), np.float64) @ np.asarray(model.unembed, np.float64).T
        cap_here = model.config.final_softcap
        logit = cap_here * np.tanh(logit / cap_here) if cap_here else logit
        logps.append(logit - np.log(np.exp(logit).sum(axis=-1, keepdims=True)))
    expected = (np.exp(logps[0]) * (logps[0] - logps[1])).sum(axis=-1)
    assert found.shape == group.response.shape and expected.min() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("trained, products", [("hidden", 2), ("both", 3)])
def test_products_with_the_vocabulary(trained, products):
    """The logits are made once, and of a frozen embedding no gradient is."""
    model, group = tiny(), random_group()
    arrays = {name: jnp.ones((2, 3, 5)) for name in ("old", "weight")}
    hidden = apply(model, group)

    def total(hidden, unembed):
        of = model.replace(embed=unembed)
        return vocabulary.token_sum(of, hidden, group, 1.0, curved, arrays, 4)[0]

    which = {"hidden": 0, "both": (0, 1)}[trained]
    text = jax.jit(jax.grad(total, which)).lower(hidden, model.unembed).compile().as_text()
    dots = [line for line in text.splitlines() if " dot(" in line or "custom-call" in line and "matmul" in line]
    assert len(dots) == products, "\n".join(dots)
