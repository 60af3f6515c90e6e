"""Optax chains from a config section, and updates that accumulate gradients over micro-batches."""

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


class Average(NamedTuple):
    """The state of `average`: the number of updates, and the mean of the parameters."""

    count: Array
    mean: PyTree


def average(first: int) -> optax.GradientTransformation:
    """Keeps the mean of the parameters after every update beyond number `first`. It must end the chain.

    It changes no update.

    mean = (θ_first+1 + ... + θ_n) / (n - first); up to `first` it is θ_n itself.     (Polyak and Juditsky, 1992)
    """

    def init(params):
        return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        count = state.count + 1
        weight = 1 / jnp.maximum(count - first, 1)
        new_params = optax.apply_updates(params, updates)
        return updates, Average(count, jax.tree.map(lambda m, p: (1 - weight) * m + weight * p, state.mean, new_params))

    return optax.GradientTransformation(init, update)


def product(train: TrainState) -> PyTree:
    """The result of training: the average of the parameters if the chain keeps one, otherwise the parameters."""
    states = jax.tree.leaves(train.opt_state, is_leaf=lambda x: isinstance(x, Average))
    means = [state.mean for state in states if isinstance(state, Average)]
    return means[0] if means else train.params


def make(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; its rate follows a linear warmup and then the schedule.

    Args:
        config: a section with learning_rate, warmup, schedule, b1, b2, weight_decay, clip_norm, and average: the
            share of the steps, the last ones, over which `product` averages the parameters.
        steps: updates of the whole stage.
    """
    schedule = SCHEDULES[config.schedule](config.learning_rate, config.warmup, steps)
    warmup = optax.linear_schedule(config.learning_rate / (config.warmup + 1), config.learning_rate, config.warmup)
    rate = optax.join_schedules([warmup, schedule], [config.warmup])
    adamw = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    chain = [optax.clip_by_global_norm(config.clip_norm), adamw]
    if config.average:
        chain.append(average(steps - round(config.average * steps)))
    return optax.chain(*chain)


def init(transformation: optax.GradientTransformation, params: PyTree) -> TrainState:
    """A train state before the first update; the optimiser's part is made with its final sharding."""
    opt_state = jax.jit(lambda params: sharding.constrain_tree(transformation.init(params)))(params)
    return TrainState(params, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def step(
    transformation: optax.GradientTransformation, loss: Callable, train: TrainState, batch: PyTree, parts: int
) -> tuple[TrainState, PyTree]:
    """One update on a batch; lax.scan averages its gradient over `parts` micro-batches.

    If the loss or the gradient is not finite, the update is skipped and counted.

    Args:
        loss: (params, micro-batch) -> (scalar mean over the micro-batch, dict of such scalars).
        train: the state before the update.
        batch: pytree of arrays whose leading axis is divisible by `parts`.
        parts: number of micro-batches; memory depends on it, the result does not.

    Returns:
        (new state, the dict of scalars with "loss" and "grad_norm").
    """
    micro_batches = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def accumulate(total, micro_batch):
        result = value_and_grad(train.params, micro_batch)
        return jax.tree.map(lambda t, x: t + x / parts, total, result), None

    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(value_and_grad, train.params, jax.tree.map(lambda x: x[0], micro_batches)),
    )
    ((value, scalars), grad), _ = jax.lax.scan(accumulate, zero, micro_batches)
    updates, opt_state = transformation.update(grad, train.opt_state, train.params)
    norm = optax.global_norm(grad)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updated = TrainState(
        optax.apply_updates(train.params, updates), opt_state, train.step + 1, train.skipped, jnp.zeros_like(train.step)
    )
    skipped = train._replace(skipped=train.skipped + 1, skipped_in_a_row=train.skipped_in_a_row + 1)
    updated = jax.tree.map(partial(jnp.where, finite), updated, skipped)
    return sharding.constrain_tree(updated), scalars | {"loss": value, "grad_norm": norm}
