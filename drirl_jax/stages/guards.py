"""Guards against a run that goes on with meaningless numbers: limits, warnings, and saved steps for a replay."""

from __future__ import annotations

import contextlib
import logging
from typing import Callable, Mapping, NamedTuple, Sequence

from ml_collections import ConfigDict

from drirl_jax.runtime import bucket, sharding
from drirl_jax.runtime.checkpoint import Checkpoints
from drirl_jax.stages.base import Stage, State
from drirl_jax.types import InputError, PyTree, TrainState

log = logging.getLogger(__name__)


def stop_reason(section: ConfigDict, scalars: Mapping[str, float]) -> str | None:
    """The reason to stop a run whose last step has these scalars, and a remedy; None if it may go on."""
    if scalars["skipped_in_a_row"] >= section.skips:
        if scalars.get("bad_rewards"):
            return (
                f"{scalars['bad_rewards']:.0f} rewards are not finite, and {section.skips} updates in a row "
                "were left out: did the IRL stage diverge? Lower config.irl.optimizer.learning_rate."
            )
        return (
            f"the loss or its gradient was not finite {scalars['skipped_in_a_row']:.0f} times in a row: lower the "
            "stage's optimizer.learning_rate, or inspect the step."
        )
    if scalars.get("sampler_gap", 0.0) > section.sampler_gap:
        return (
            f"the trainer's log-probabilities differ from the sampler's by {scalars['sampler_gap']:.3g} nats a token, "
            f"above config.guards.sampler_gap = {section.sampler_gap}: give both the same policy.dtype, or raise it."
        )
    return None


def new_warnings(section: ConfigDict, first: Mapping, previous: Mapping, scalars: Mapping) -> list[str]:
    """One sentence for each quantity that exceeds its limit in this step and did not in the step before.

    Args:
        first, previous, scalars: of the stage's first step, of the step before and of this one; {} for a missing step,
            None or NaN for a value that is not finite.
    """

    def reward_drift(row):
        return abs((row.get("reward") or 0.0) - (first.get("reward") or 0.0))

    quantities = {
        "kl": ("the KL divergence from the reference", lambda row: row.get("kl") or 0.0),
        "reward_drift": ("the mean reward's distance from the first step's", reward_drift),
    }
    return [
        f"{quantity} is {measure(scalars):.3g}, above config.guards.{name} = {section[name]}"
        for name, (quantity, measure) in quantities.items()
        if measure(scalars) > section[name] and not (previous and measure(previous) > section[name])
    ]


def never_updated(name: str, train: TrainState) -> str | None:
    """The reason why a stage with this last state has no product, and a remedy; None if it took an update."""
    if int(train.step) or not int(train.skipped):
        return None
    return (
        f"all {int(train.skipped)} updates of {name} were left out, as the loss, its gradient or a reward was not "
        f"finite: nothing was learned; lower config.{name}.optimizer.learning_rate, or check the data and the rewards. "
        "Then start with another --workdir."
    )


class Idle(NamedTuple):
    """A sign that a stage learns nothing: a scalar has this value in every step.

    Attributes:
        stage, scalar, value: the stage, the scalar's name and its value in the rows of metrics.jsonl.
        message: the meaning of the sign, and a remedy.
        applies: (config) -> whether the sign has this meaning with this config.
    """

    stage: str
    scalar: str
    value: float
    message: str
    applies: Callable[[ConfigDict], bool] = lambda config: True


NO_GRADIENT = "no update had a gradient: the loss compares equal things, or does not depend on the trained weights"
IDLE = (
    Idle("irl", "grad_norm", 0.0, NO_GRADIENT),
    Idle("align", "grad_norm", 0.0, NO_GRADIENT),
    Idle(
        "align", "zero_spread", 1.0,
        "all samples of a prompt have one reward, so that none is better than another: raise "
        "config.sampler.temperature or config.align.group_size, or check the rewards",
        lambda config: config.align.objective == "grpo" and config.align.group_size > 1,
    ),
    Idle("align", "advantage_abs", 0.0, "every advantage is 0: the rewards do not differ"),
    Idle("align", "pairs", 0.0, "no pair of responses says anything: the rewards do not differ, or all are masked"),
)  # fmt: skip


def idle(config: ConfigDict, stage: str, rows: Sequence[Mapping]) -> list[str]:
    """One sentence for each sign that a stage learned nothing.

    Args:
        rows: the stage's rows of metrics.jsonl.
    """

    def values(scalar: str) -> list[float]:
        return [row[scalar] for row in rows if row.get(scalar) is not None]

    signs = [sign for sign in IDLE if sign.stage == stage and sign.applies(config)]
    messages = [sign.message for sign in signs if set(values(sign.scalar)) == {sign.value}]
    accuracy = values("accuracy")[-1:]
    if stage == "irl" and accuracy and accuracy[0] <= 0.5:
        messages.append(f"the rewards rank {accuracy[0]:.0%} of the held-out pairs right, no better than chance")
    inner_updates = (config.irl.rounds - 1) * config.irl.policy_steps * config.align.epochs * config.align.minibatches
    if stage == "irl" and inner_updates and values("inner_skipped")[-1:] == [inner_updates]:
        messages.append("all updates of the inner policy were left out, as they were not finite")
    return [f"{stage} seems to have learned nothing: {message}." for message in messages]


def keep_step(folder: bucket.Path, step: int, state: State, batch: PyTree) -> None:
    """Writes the state before a step and the step's batch, for `replay_step`. Only once: a repeat gives the same."""
    for name, tree in {"state": state, "batch": batch}.items():
        with contextlib.closing(Checkpoints(folder / name, keep=1)) as checkpoints:
            if checkpoints.latest() is None:
                checkpoints.save(step, tree)


def replay_step(folder: bucket.Path, stage: Stage) -> tuple[int, dict[str, float]]:
    """Repeats the step that `keep_step` wrote, with the saved batch: its number and scalars.

    Raises:
        InputError: there is no such step, or another stage or config wrote it.
    """
    if not (folder / "batch").is_dir():
        raise InputError(f"no step was kept in {folder}: give one of the folders in WORKDIR/replay.")
    step, state = Checkpoints(folder / "state", keep=1).restore(sharding.place(stage.init()))
    new_batch, _, scalars = stage.collect(state, step - 1)
    _, batch = Checkpoints(folder / "batch", keep=1).restore(new_batch)
    _, update_scalars = stage.update(state.train, batch)
    return step, scalars | {key: float(value) for key, value in sharding.fetch(update_scalars).items()}
