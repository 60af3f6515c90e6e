"""The tiny run's context, made once for all tests of a process."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp

from drirl_jax import loading
from drirl_jax.checks import validate
from drirl_jax.models import reward
from drirl_jax.stages import irl


@functools.cache
def tiny(policy, cache):
    """The tiny run's context."""
    config = importlib.import_module("configs.tiny").get_config()
    config.policy.init, config.compilation_cache = str(policy), str(cache)
    return loading.load_context(config)


def prepared(policy, cache, /, **sections):
    """The tiny run's context with these options, and rewards that tell responses apart."""
    context = tiny(policy, cache)
    config = context.config.copy_and_resolve_references()
    for section, options in sections.items():
        config[section].update(options)
    validate(config)
    context = dataclasses.replace(context, config=config)
    fresh = irl.init_rewards(context)
    head = jax.random.normal(jax.random.key(0), fresh.heads.shape)
    return context, reward.Bank(fresh.replace(heads=head), mean=fresh.bias, std=jnp.ones_like(fresh.bias))
