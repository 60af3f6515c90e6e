"""The average of the parameters: against numpy, and it changes no update."""

import jax.numpy as jnp
import numpy as np
import pytest

from drirl_jax.config import default
from drirl_jax.stages import optimizer


def walk(average: float, steps: int = 10):
    """The parameters after each update of a quadratic's descent, and the product of the last state."""
    config = default().align.optimizer
    config.average = average
    transformation = optimizer.make(config, steps)
    train = optimizer.init(transformation, {"x": jnp.array([1.0, -2.0])})

    def loss(params, target):
        return ((params["x"] - target) ** 2).sum(), {}

    seen = []
    for step in range(steps):
        batch = jnp.full((1, 2), float(step % 3))
        train, _ = optimizer.step(transformation, loss, train, batch, 1)
        seen.append(np.asarray(train.params["x"]))
    return np.array(seen), np.asarray(optimizer.product(train)["x"])


@pytest.mark.parametrize("average, steps", [(0.3, 3), (0.5, 5), (1.0, 10), (0.1, 1)])
def test_the_product_is_the_mean_over_the_last_steps(average, steps):
    plain, last = walk(0.0)
    np.testing.assert_array_equal(last, plain[-1])
    seen, product = walk(average)
    np.testing.assert_array_equal(seen, plain)
    np.testing.assert_allclose(product, plain[-steps:].mean(axis=0), rtol=1e-6)


def test_before_the_average_begins_the_product_is_the_parameters():
    config = default().align.optimizer
    config.average = 0.5
    transformation = optimizer.make(config, 10)
    train = optimizer.init(transformation, {"x": jnp.array([1.0])})
    np.testing.assert_array_equal(optimizer.product(train)["x"], [1.0])
    for _ in range(3):
        train, _ = optimizer.step(
            transformation, lambda p, b: ((p["x"] - b).sum() ** 2, {}), train, jnp.ones((1, 1)), 1
        )
        np.testing.assert_array_equal(optimizer.product(train)["x"], train.params["x"])
