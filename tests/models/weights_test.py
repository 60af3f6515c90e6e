"""Weights that lie in bfloat16: the bits of float32 ones from the same file, and what is trained stays float32."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drirl_jax import loading
from drirl_jax.models import families, hf, reward
from drirl_jax.runtime import sharding
from drirl_jax.stages import align, export, irl
from drirl_jax.stages.base import POLICIES
from drirl_jax.types import Group


@pytest.fixture(scope="module")
def half(policy, tmp_path_factory):
    """The random policy in bfloat16, its norms no ones."""
    rng, folder, half = np.random.default_rng(0), tmp_path_factory.mktemp("half") / "policy", np.dtype("bfloat16")
    noisy = {k: x + 0.1 * rng.normal(size=x.shape) * ("norm" in k) for k, x in hf.read_tensors(policy).items()}
    hf.save(folder, hf.read_config(policy), {k: x.astype(half) for k, x in noisy.items()}, hf.load_tokenizer(policy))
    return folder


@functools.cache
def context(folder, cache, weights, kind="lora"):
    """The tiny run's context for PPO, computing in bfloat16."""
    config = importlib.import_module("configs.tiny").get_config()
    config.policy.init, config.compilation_cache = str(folder), str(cache)
    config.policy.dtype, config.policy.weights = "bfloat16", weights
    config.align.objective, config.reward.kind = "ppo", kind
    config.group.update({"demonstration": "apart", "contrast": "apart", "harmless_refusals": 1.0})
    return loading.load_context(config)


def types(tree):
    return {str(x.dtype) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


def equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(*sharding.fetch((x, y))), a, b)


def test_a_step_has_the_bits_of_float32_weights_and_trains_float32(half, cache, tmp_path):
    found = {}
    for weights in ("float32", "bfloat16"):
        of = context(half, cache, weights)
        assert types(of.model) == {weights}
        fresh = irl.init_rewards(of)
        head = jax.random.normal(jax.random.key(0), fresh.heads.shape)
        stage = align.make(of, reward.Bank(fresh.replace(heads=head), mean=fresh.bias, std=jnp.ones_like(fresh.bias)))
        state = stage.init()
        for step in range(2):  # the second samples from a policy that has moved, and has a value head that is not 0
            batch, carry, scalars = stage.collect(state, step)
            trained, told = stage.update(state.train, batch)
            state = state._replace(train=trained, carry=carry)
        assert types((state.train, fresh)) == {"float32"} and state.train.params.value is not None
        aligned = POLICIES["lora"].merge(of.model, state.train.params.policy)
        export.export_policy(of, [state.train.params.policy], aligned, tmp_path / weights)
        moved = np.abs(jax.tree.leaves(state.train.params.policy["q"].b)[0]).max()
        found[weights] = (batch, scalars, state, told), hf.read_tensors(tmp_path / weights / "aligned"), of, moved
    (want, wide, *_, moved), (got, narrow, of, _) = found.values()
    assert moved > 0
    equal(got, want)
    assert hf.read_config(tmp_path / "bfloat16" / "aligned")["torch_dtype"] == "bfloat16"
    for name, x in wide.items():
        assert narrow[name].dtype == "bfloat16" and x.dtype == np.float32
        np.testing.assert_array_equal(narrow[name], x.astype(narrow[name].dtype))
    again = families.from_hf(narrow, of.model.config)
    assert types(again) == {"bfloat16"}
    equal(families.to_hf(again), dict(narrow))


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("head", "full"))])
def test_an_update_of_the_rewards_has_the_bits_of_float32_weights(half, cache, kind):
    rng, found = np.random.default_rng(0), []
    arrays = rng.integers(0, 97, (8, 8)), np.full(8, 8), rng.integers(0, 97, (8, 3, 12)), np.full((8, 3), 12)
    group = Group(*(jnp.asarray(x, jnp.int32) for x in (*arrays, np.arange(8) % 2)))
    pairs = irl.Pairs(group, *(jnp.full((8, 2), n, jnp.int32) for n in (12, 12, 0)))
    for weights in ("float32", "bfloat16"):
        stage = irl.make(context(half, cache, weights, kind))
        state = sharding.place(stage.init().train)
        for _ in range(2):
            state, told = stage.update(state, pairs)
        assert types(state) == {"float32"}
        found.append((state, told))
    equal(*found)
