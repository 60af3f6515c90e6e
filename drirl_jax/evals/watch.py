"""Benchmarks while a policy learns: their figures among the run's metrics, and the best policy kept."""

from __future__ import annotations

import contextlib

import jax.numpy as jnp
import numpy as np

from drirl_jax.evals import benchmarks, runner
from drirl_jax.evals.benchmarks import Questions
from drirl_jax.judges import Judge
from drirl_jax.runtime import processes
from drirl_jax.runtime.checkpoint import Checkpoints
from drirl_jax.stages.base import POLICIES, Context, Stage, State


def with_periodic_evals(stage: Stage, context: Context, asked: list[Questions], judges: dict[str, Judge]) -> Stage:
    """The align stage with the benchmarks run after each config.evals.every steps and after the last.

    What is measured is what would be the stage's product then. With config.evals.best the product is the measured
    policy of the best value, of equals the earliest; a step at which the metric has no value does not count. A run that
    was killed measures again what followed its last checkpoint, with the same result. Nothing of this changes what is
    learned.
    """
    c = context.config.evals
    if not asked or not c.every:
        return stage
    assert context.workdir, "a run has a workdir"
    kept = Checkpoints(context.workdir.kept / "best", keep=1) if c.best else None
    name, _, metric = c.best.partition("/")
    sign = 1 if not c.best or benchmarks.BENCHMARKS[name].metrics[metric] else -1

    def best(state: State):
        """The best policy so far and its value; None before there is any."""
        template = {"params": stage.finish(state), "value": jnp.zeros(())}
        return None if kept.latest() is None else kept.restore(template)[1]

    def evaluate(state: State, step: int) -> dict[str, float]:
        scalars = stage.evaluate(state, step)
        if step % c.every and step != stage.steps:
            return scalars
        params = stage.finish(state)
        model = POLICIES[context.config.policy.tune].merged(context.model, params)
        for result in runner.run_benchmarks(context, model, asked, judges).values():
            scalars |= benchmarks.scalars(result)
        if kept is not None and c.best in scalars:
            before, value = best(state), np.float32(scalars[c.best])
            if processes.writers_value(before is None or bool(sign * value > sign * before["value"])):
                kept.save(step, {"params": params, "value": jnp.asarray(value)})
        return scalars

    def finish(state: State):
        if kept is None:
            return stage.finish(state)
        with contextlib.closing(kept):
            found = best(state)
        return stage.finish(state) if found is None else found["params"]

    return stage._replace(evaluate=evaluate, finish=finish)
