"""The least cost of a step: the operations of its phases, from their shapes, and the seconds that a machine needs."""

from __future__ import annotations

import time
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from drirl_jax.models import transformer
from drirl_jax.stages.base import SharedLayers


class Machine(NamedTuple):
    """Measured rates of a machine: float operations a second of a matrix product, bytes a second of a read."""

    flops: float
    bandwidth: float


class Shape(NamedTuple):
    """Shape of a step: P prompts, S tokens of each, G responses to each, T tokens of each, R tokens of the prefix."""

    P: int
    S: int
    G: int
    T: int
    R: int = 0


def forward_flops(model: transformer.Config, shape: Shape, logits: bool = True) -> float:
    """Operations of a forward pass: prefix once, prompt once a group, responses without their last token.

    2 · positions · weights + 2 D V · predicted tokens + 4 H hd · (query, key) pairs, over all layers.
    """
    P, S, G, T, R = shape
    attention = 2 * model.width * (model.heads + model.kv_heads) * model.head_dim
    weights = model.layers * (attention + 3 * model.width * model.ffn)
    pairs = R * (R + 1) / 2 + P * S * (R + (S + 1) / 2) + P * G * sum(R + S + t + 1 for t in range(T - 1))
    predicted = P + P * G * (T - 1) if logits else 0
    fed = R + P * S + P * G * (T - 1)
    return (
        2 * weights * fed
        + 2 * model.width * model.vocab * predicted
        + 4 * model.layers * model.heads * model.head_dim * pairs
    )


def floor(
    model: transformer.Config,
    shape: Shape,
    machine: Machine,
    *,
    size: int,
    tuned: int,
    shared: SharedLayers = SharedLayers(0, False, False),
    scored: int = 1,
    trained: int = 0,
) -> dict[str, float]:
    """Least seconds of each phase: its operations at the measured rate, or its bytes if these take longer.

    Args:
        size, tuned: number of all parameters (sampling reads them in the type of the computation), and of the trained
            ones (float32).
        shared: the layers that a group passes only once, as phase "trunk".
        scored, trained: number of a group's demonstrations that get a reward, and of those that the update learns from.

    Returns:
        phase -> seconds, for the phases whose time the model's work bounds; "hardness" is not among them.
    """
    P, S, G, T, R = shape
    bottom = model._replace(layers=shared.layers)
    top = {takes_part: model._replace(layers=model.layers - shared.layers * takes_part) for takes_part in (False, True)}
    item = jnp.dtype(model.dtype).itemsize
    cache_row = 2 * item * model.layers * model.kv_heads * model.head_dim
    sampling_bytes = item * size * T + cache_row * P * G * sum(R + S + t + 1 for t in range(T - 1))
    # A frozen weight needs no gradient: only the forward pass and the gradient of its input.
    passes = 3 if tuned == size else 2
    return {
        "rollout": max(forward_flops(model, shape) / machine.flops, sampling_bytes / machine.bandwidth),
        "trunk": forward_flops(bottom, shape._replace(G=G + scored), logits=False) / machine.flops,
        "reference": forward_flops(top[True], shape) / machine.flops,
        "rewards": forward_flops(top[shared.rewards], shape._replace(G=G + scored), logits=False) / machine.flops,
        "update": passes * forward_flops(top[shared.policy], shape._replace(G=G + trained)) / machine.flops
        + 7 * 4 * tuned / machine.bandwidth,
    }


def irl_floor(model: transformer.Config, shape: Shape, machine: Machine, adapted: int) -> float:
    """Least seconds of an update of the rewards: forward, and backward through the layers with adapters.

    Args:
        shape: of the pairs; G = 1 + the number of negatives of each demonstration.
    """
    forward = forward_flops(model, shape, logits=False)
    return (forward + forward_flops(model._replace(layers=adapted), shape, logits=False)) / machine.flops


def fastest(function: Callable, *args, repeats: int = 7) -> float:
    """Seconds of the fastest of `repeats` calls, after one call that compiles."""
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_machine(model: transformer.Config) -> Machine:
    """Measures the best rate of a matrix product with this model's shapes and type, and the rate of reading 256 MiB."""
    rates = []
    for rows, inner, out in ((2048, model.width, model.ffn), (2048, model.ffn, model.width), (2048, 2048, 2048)):
        a, w = (jnp.full((n, inner), 0.5, model.dtype) for n in (rows, out))
        rates.append(2 * rows * inner * out / fastest(jax.jit(lambda a, w: a @ w.T), a, w))
    matrix, vector = jnp.zeros((8192, 8192)), jnp.zeros(8192)
    return Machine(max(rates), matrix.nbytes / fastest(jax.jit(jnp.matmul), matrix, vector))
