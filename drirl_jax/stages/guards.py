"""What keeps a run from going on with numbers that mean nothing: limits, warnings, and steps kept to be looked into."""

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
    """Why a run with these scalars of its last step must stop, and what to do; None if it need not."""
    if scalars["skipped_in_a_row"] >= section.skips:
        if scalars.get("bad_rewards"):
            return (
                f"{scalars['bad_rewards']:.0f} rewards are not finite, and {section.skips} updates in a row "
                "were left out: did the IRL stage diverge? Lower config.irl.optimizer.learning_rate."
            )
        return (
            f"the loss or its gradient was not finite {scalars['skipped_in_a_row']:.0f} times in a row: lower the "
            "stage's optimizer.learning_rate, or look into the step."
        )
    if scalars.get("sampler_gap", 0.0) > section.sampler_gap:
        return (
            f"the trainer's log-probabilities differ from the sampler's by {scalars['sampler_gap']:.3g} nats a token, "
            f"above config.guards.sampler_gap = {section.sampler_gap}: compute both alike (policy.dtype), or raise it."
        )
    return None


def new_warnings(section: ConfigDict, first: Mapping, before: Mapping, now: Mapping) -> list[str]:
    """What lies beyond its limit in a step that did not in the step before: one sentence each.

    Args:
        first, before, now: scalars of the stage's first step, of the step before and of this one; {} where there is
            none, None or NaN for what is not finite.
    """

    def drift(row):
        return abs((row.get("reward") or 0.0) - (first.get("reward") or 0.0))

    quantities = {
        "kl": ("the KL divergence from the reference", lambda row: row.get("kl") or 0.0),
        "reward_drift": ("the mean reward's distance from the first step's", drift),
    }
    return [
        f"{words} is {of(now):.3g}, above config.guards.{name} = {section[name]}"
        for name, (words, of) in quantities.items()
        if of(now) > section[name] and not (before and of(before) > section[name])
    ]


def never_updated(name: str, train: TrainState) -> str | None:
    """Why a stage that ends with this state has no product, and what to do; None if an update was taken."""
    if int(train.step) or not int(train.skipped):
        return None
    return (
        f"all {int(train.skipped)} updates of {name} were left out, as the loss, its gradient or a reward was not "
        f"finite: nothing was learned; lower config.{name}.optimizer.learning_rate, or look into the data and the "
        "rewards, and take another --workdir."
    )


class Idle(NamedTuple):
    """A sign that a stage learns nothing: one scalar has one value in every step.

    Attributes:
        stage, scalar, value: of the rows of metrics.jsonl.
        words: what that means, and what to do.
        counts: (config) -> whether it means that under this config.
    """

    stage: str
    scalar: str
    value: float
    words: str
    counts: Callable[[ConfigDict], bool] = lambda config: True


NO_GRADIENT = "no update had a gradient: all that the loss compares is alike, or the trained weights do not reach it"
IDLE = (
    Idle("irl", "grad_norm", 0.0, NO_GRADIENT),
    Idle("align", "grad_norm", 0.0, NO_GRADIENT),
    Idle(
        "align", "zero_spread", 1.0,
        "all samples of a prompt have one reward, so that none is better than another: raise "
        "config.sampler.temperature or config.align.group, or look into the rewards",
        lambda config: config.align.objective == "grpo" and config.align.group > 1,
    ),
    Idle("align", "advantage_abs", 0.0, "every advantage is 0: the rewards do not differ"),
    Idle("align", "pairs", 0.0, "no pair of responses says anything: the rewards do not differ, or all are masked"),
)  # fmt: skip


def idle(config: ConfigDict, stage: str, rows: Sequence[Mapping]) -> list[str]:
    """What shows that a stage learned nothing: one sentence each.

    Args:
        rows: the stage's rows of metrics.jsonl.
    """

    def values(scalar: str) -> list[float]:
        return [row[scalar] for row in rows if row.get(scalar) is not None]

    signs = [sign for sign in IDLE if sign.stage == stage and sign.counts(config)]
    found = [sign.words for sign in signs if set(values(sign.scalar)) == {sign.value}]
    accuracy = values("accuracy")[-1:]
    if stage == "irl" and accuracy and accuracy[0] <= 0.5:
        found.append(f"the rewards rank {accuracy[0]:.0%} of the held-out pairs right, no better than chance")
    inner = (config.irl.rounds - 1) * config.irl.policy_steps * config.align.epochs * config.align.minibatches
    if stage == "irl" and inner and values("inner_skipped")[-1:] == [inner]:
        found.append("all updates of the inner policy were left out, as they were not finite")
    return [f"{stage} seems to have learned nothing: {words}." for words in found]


def keep_step(folder: bucket.Path, step: int, state: State, batch: PyTree) -> None:
    """Writes the state before a step, and the batch that it collected, for `replay`; once, as it is the same again."""
    for name, tree in {"state": state, "batch": batch}.items():
        with contextlib.closing(Checkpoints(folder / name, keep=1)) as kept:
            if kept.latest() is None:
                kept.save(step, tree)


def replay_step(folder: bucket.Path, stage: Stage) -> tuple[int, dict[str, float]]:
    """The number and the scalars of the step that `keep` wrote: collected again, then updated with the batch kept.

    Raises:
        InputError: there is no such step, or it is not of this stage and config.
    """
    if not (folder / "batch").is_dir():
        raise InputError(f"no step was kept in {folder}: give one of the folders in WORKDIR/replay.")
    step, state = Checkpoints(folder / "state", keep=1).restore(sharding.place(stage.init()))
    again, _, scalars = stage.collect(state, step - 1)
    _, batch = Checkpoints(folder / "batch", keep=1).restore(again)
    _, trained = stage.update(state.train, batch)
    return step, scalars | {key: float(value) for key, value in sharding.fetch(trained).items()}
