"""The moments at which a run is killed: hooks of a child process of the tests, none of them in the product."""

import importlib
import os
import pathlib
import random
import signal
import sys
from typing import Callable, NamedTuple


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(real, *args, **kwargs):
    die()


def after(real, *args, **kwargs):
    """Of what goes on in the background or on the device: while it does."""
    real(*args, **kwargs)
    die()


def half_a_line(real, writer, path, *args):
    with path.open("a") as file:
        file.write('{"stage": "ali')
    die()


def half_a_file(real, path, text, *args, **kwargs):
    real(path, text[: len(text) // 2], *args, **kwargs)
    die()


class Moment(NamedTuple):
    """Where a run is killed.

    Attributes:
        stage: of the schedule, "" where none is at work.
        target: module:name of what is called then, or the name of a field of the stage.
        kill: what is done instead of the n-th call.
        calls: which n can be drawn.
        of: whether a call with these arguments counts.
    """

    stage: str
    target: str
    kill: Callable
    calls: tuple[int, ...] = (1,)
    of: Callable = lambda *args: True


def unnamed(path, *_):
    return str(path).endswith(".orbax-checkpoint-tmp")


def named(*ends: str) -> Callable:
    return lambda path, *_: str(path).endswith(ends)


# In the order of a run. Of what a stage does in each step it is killed in the first three, so that it is not over then.
MOMENTS = {
    "irl: sampling": Moment("irl", "drirl_jax.rollout:sample", before, (1, 2, 3)),
    "irl: updating": Moment("irl", "update", after, (1, 2, 3)),
    "irl: held-out pairs": Moment("irl", "evaluate", before, (1, 2, 3)),
    "irl: a line of metrics": Moment(
        "irl", "drirl_jax.runtime.metrics:MetricWriter._append", half_a_line, (1, 2, 3, 4, 5)
    ),
    "irl: a checkpoint has begun": Moment("irl", "drirl_jax.runtime.checkpoint:Checkpoints.save", after),
    "irl: a checkpoint lacks its name": Moment("irl", "os:rename", before, (1, 2), unnamed),
    "between the stages": Moment("", "drirl_jax.stages.export:export_rewards", before),
    "align: rewinding": Moment("align", "os:replace", before, (1, 2), named("metrics.jsonl.tmp", "timing.jsonl.tmp")),
    "align: sampling": Moment("align", "drirl_jax.rollout:sample", before, (1, 2, 3)),
    "align: scoring": Moment("align", "drirl_jax.stages.rewards.sources:_score", after, (1, 2, 3)),
    "align: updating": Moment("align", "update", after, (1, 2, 3)),
    "align: a line of metrics": Moment(
        "align", "drirl_jax.runtime.metrics:MetricWriter._append", half_a_line, (1, 2, 3, 4, 5)
    ),
    "align: a checkpoint has begun": Moment("align", "drirl_jax.runtime.checkpoint:Checkpoints.save", after),
    "align: a checkpoint lacks its name": Moment("align", "os:rename", before, (1, 2), unnamed),
    "the stage has ended": Moment("align", "finish", before),
    "the aligned model": Moment("", "drirl_jax.models.hf:_save_tokenizer", before),
    "evaluating": Moment("", "drirl_jax.evals.runner:response_rewards", before, (1, 2)),
    "an evaluation lacks its name": Moment(
        "", "os:replace", before, (1, 2), named("base.json.tmp", "aligned.json.tmp")
    ),
    "the report": Moment("", "pathlib:Path.write_bytes", half_a_file, (1,), named("report.html.tmp")),
}


class Kill(NamedTuple):
    """A moment's name, and at which of its calls."""

    moment: str
    call: int


def drawn(seed: int, count: int) -> list[Kill]:
    """So many kills in the order of a run, one a moment; the first call after an earlier kill in the same stage, as it
    is not known how much that has left to do."""
    draw, stages, kills = random.Random(seed), set(), []
    for name in sorted(draw.sample(list(MOMENTS), count), key=list(MOMENTS).index):
        moment = MOMENTS[name]
        kills.append(Kill(name, moment.calls[0] if moment.stage in stages else draw.choice(moment.calls)))
        stages.add(moment.stage)
    return kills


def arm(kill: Kill) -> None:
    """Has this process die there."""
    from drirl_jax import train

    moment, at_work, calls, loop = MOMENTS[kill.moment], [""], [0], train.loop

    def counted(real):
        def call(*args, **kwargs):
            calls[0] += at_work[0] == moment.stage and moment.of(*args)
            if at_work[0] == moment.stage and moment.of(*args) and calls[0] == kill.call:
                return moment.kill(real, *args, **kwargs)
            return real(*args, **kwargs)

        return call

    def watched(name, stage, *args):
        at_work[0] = name
        if ":" not in moment.target:
            stage = stage._replace(**{moment.target: counted(getattr(stage, moment.target))})
        product = loop(name, stage, *args)
        at_work[0] = ""
        return product

    train.loop = watched
    if ":" in moment.target:
        module, _, path = moment.target.partition(":")
        *owners, name = path.split(".")
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, counted(getattr(owner, name)))


def run(flags: list[str], told: pathlib.Path, kill: Kill | None = None, patch: Callable | None = None) -> None:
    """`python -m drirl_jax.main` with these flags in this process, its output in the file `told`."""
    from drirl_jax import main
    from drirl_jax.commands import cli

    with told.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["drirl_jax.main", *flags]
    if kill:
        arm(kill)
    if patch:
        patch()
    cli.call(cli.parse(sys.argv), main.main, trains=True)
