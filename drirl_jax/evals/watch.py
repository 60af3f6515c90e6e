"""Benchmarks during training: their figures go into the run's metrics, and the best policy is stored."""

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


def with_periodic_evals(
    stage: Stage, context: Context, benchmark_questions: list[Questions], judges: dict[str, Judge]
) -> Stage:
    """The align stage, which also runs the benchmarks every config.evals.every steps and after the last step.

    They measure the policy that the stage would produce at that step. With config.evals.best the stage produces the
    measured policy with the best value, the earliest one where values are equal. A step without a value of this metric
    does not count. A killed run repeats the measurements after its last checkpoint, with the same results. The
    benchmarks do not change what the policy learns.
    """
    c = context.config.evals
    if not benchmark_questions or not c.every:
        return stage
    assert context.workdir, "a run has a workdir"
    checkpoints = Checkpoints(context.workdir.path / "best", keep=1) if c.best else None
    name, _, metric = c.best.partition("/")
    sign = 1 if not c.best or benchmarks.BENCHMARKS[name].metrics[metric] else -1

    def load_best(state: State):
        """The best policy so far with its value; None before the first measurement."""
        template = {"params": stage.finish(state), "value": jnp.zeros(())}
        return None if checkpoints.latest() is None else checkpoints.restore(template)[1]

    def evaluate(state: State, step: int) -> dict[str, float]:
        scalars = stage.evaluate(state, step)
        if step % c.every and step != stage.steps:
            return scalars
        params = stage.finish(state)
        model = POLICIES[context.config.policy.tune].merge(context.model, params)
        for result in runner.run_benchmarks(context, model, benchmark_questions, judges).values():
            scalars |= benchmarks.scalars(result)
        if checkpoints is not None and c.best in scalars:
            best, value = load_best(state), np.float32(scalars[c.best])
            if processes.writers_value(best is None or bool(sign * value > sign * best["value"])):
                checkpoints.save(step, {"params": params, "value": jnp.asarray(value)})
        return scalars

    def finish(state: State):
        if checkpoints is None:
            return stage.finish(state)
        with contextlib.closing(checkpoints):
            best_policy = load_best(state)
        return stage.finish(state) if best_policy is None else best_policy["params"]

    return stage._replace(evaluate=evaluate, finish=finish)
