"""Optax chains from a config section, and gradients accumulated over micro-batches."""

from __future__ import annotations

from functools import partial
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from drirl_jax.runtime import sharding
from drirl_jax.types import Array, PyTree, TrainState

SCHEDULES = {
    "constant": lambda rate, warmup, steps: optax.constant_schedule(rate),
    "cosine": lambda rate, warmup, steps: optax.cosine_decay_schedule(rate, max(steps - warmup, 1), alpha=0.1),
}
OPTIMIZERS = {
    "adamw": lambda rate, c: optax.adamw(rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay),
}


class Average(NamedTuple):
    """What `average` carries: the number of updates, and the mean of the parameters."""

    count: Array
    mean: PyTree


def average(first: int) -> optax.GradientTransformation:
    """Keeps the mean of the parameters after every update beyond number `first`; the last link of a chain.

    It changes no update.

    mean = (θ_first+1 + ... + θ_n) / (n - first); up to `first` it is θ_n itself.     (Polyak and Juditsky, 1992)
    """

    def init(params):
        return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        count = state.count + 1
        weight = 1 / jnp.maximum(count - first, 1)
        after = optax.apply_updates(params, updates)
        return updates, Average(count, jax.tree.map(lambda m, p: (1 - weight) * m + weight * p, state.mean, after))

    return optax.GradientTransformation(init, update)


def product(train: TrainState) -> PyTree:
    """What training has come to: the average of the parameters where one is kept, otherwise the parameters."""
    states = jax.tree.leaves(train.opt_state, is_leaf=lambda x: isinstance(x, Average))
    means = [state.mean for state in states if isinstance(state, Average)]
    return means[0] if means else train.params


def make(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimiser, its rate warmed up linearly and then by the schedule.

    Args:
        config: a section with name, learning_rate, warmup, schedule, b1, b2, weight_decay, clip_norm, and average: over
            which share of the steps, the last ones, `product` averages the parameters.
        steps: updates of the whole stage.
    """
    after = SCHEDULES[config.schedule](config.learning_rate, config.warmup, steps)
    warm = optax.linear_schedule(config.learning_rate / (config.warmup + 1), config.learning_rate, config.warmup)
    rate = optax.join_schedules([warm, after], [config.warmup])
    chain = [optax.clip_by_global_norm(config.clip_norm), OPTIMIZERS[config.name](rate, config)]
    if config.average:
        chain.append(average(steps - round(config.average * steps)))
    return optax.chain(*chain)


def init(transformation: optax.GradientTransformation, params: PyTree) -> TrainState:
    """A train state with no update taken, the optimiser's part of it made where it belongs."""
    opt_state = jax.jit(lambda params: sharding.constrain_tree(transformation.init(params)))(params)
    return TrainState(params, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def step(
    transformation: optax.GradientTransformation, loss: Callable, train: TrainState, batch: PyTree, parts: int
) -> tuple[TrainState, PyTree]:
    """One update on a batch, its gradient averaged over `parts` micro-batches by lax.scan; none where the loss or a
    gradient is not finite, which is counted.

    Args:
        loss: (params, micro-batch) -> (scalar mean over the micro-batch, dict of scalars of the same kind).
        train: state to be replaced.
        batch: pytree of arrays whose leading axis is divisible by `parts`.
        parts: number of micro-batches; the result does not depend on it, memory does.

    Returns:
        (new state, the dict of scalars with "loss" and "grad_norm").
    """
    micro = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def one(total, part):
        out = value_and_grad(train.params, part)
        return jax.tree.map(lambda t, x: t + x / parts, total, out), None

    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(value_and_grad, train.params, jax.tree.map(lambda x: x[0], micro)),
    )
    ((value, scalars), grad), _ = jax.lax.scan(one, zero, micro)
    updates, opt_state = transformation.update(grad, train.opt_state, train.params)
    norm = optax.global_norm(grad)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    state = TrainState(
        optax.apply_updates(train.params, updates), opt_state, train.step + 1, train.skipped, jnp.zeros_like(train.step)
    )
    as_it_was = train._replace(skipped=train.skipped + 1, in_a_row=train.in_a_row + 1)
    state = jax.tree.map(partial(jnp.where, finite), state, as_it_was)
    return sharding.constrain_tree(state), scalars | {"loss": value, "grad_norm": norm}
