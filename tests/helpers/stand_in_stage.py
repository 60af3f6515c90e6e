"""A stage of least squares that takes no time, and the loop that runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from drirl_jax import config as config_lib
from drirl_jax import train
from drirl_jax.runtime import metrics
from drirl_jax.runtime.bucket import Workdir
from drirl_jax.stages import optimizer
from drirl_jax.stages.base import Stage, State

CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1), optimizer.average(0))


def loss(params, batch):
    value = jnp.mean((batch["x"] @ params["w"] - 1) ** 2)
    return value, {"kl": jnp.mean(batch["kl"]), "reward": jnp.mean(batch["reward"])}


@jax.jit
def update(state, batch):
    return optimizer.step(CHAIN, loss, state, batch, 2)


def batch_of(step, bad=()):
    x = np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)
    return {"x": x * np.float32(np.nan if step + 1 in bad else 1), "kl": np.zeros(4), "reward": np.zeros(4)}


def fresh():
    return optimizer.init(CHAIN, {"w": jnp.zeros(3)})


def stage(steps=6, bad=(), **scalars):
    """A stage of `steps` least-squares steps; scalars: name -> its value at each step."""

    def collect(state, step):
        batch = batch_of(step, bad)
        return batch | {name: np.full(4, values[step]) for name, values in scalars.items()}, state.carry + 1, {}

    return Stage(steps, lambda: State(fresh(), jnp.zeros(())), collect, update, lambda *_: {}, lambda s: s, ("loss",))


def run(workdir, stage, **options):
    config = config_lib.default()
    config.checkpoint.every = 2
    config.guards.update(options)
    place = workdir if isinstance(workdir, Workdir) else Workdir(workdir)
    return train.loop("align", stage, config, place, metrics.MetricWriter(place.local))
