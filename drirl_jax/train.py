"""The one train loop, and a run from config to report; reads top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from functools import partial

import jax
from ml_collections import ConfigDict

from drirl_jax import checks, loading
from drirl_jax import config as config_lib
from drirl_jax.data import fingerprints
from drirl_jax.evals import runner, watch
from drirl_jax.reports import pages, single
from drirl_jax.runtime import (
    bucket,
    console,
    files,
    metrics,
    preemption,
    processes,
    progress,
    sharding,
    sinks,
    workdirs,
)
from drirl_jax.runtime.bucket import Workdir
from drirl_jax.runtime.checkpoint import Checkpoints
from drirl_jax.stages import align, export, guards, irl, samples
from drirl_jax.stages.base import POLICIES, Context, Stage
from drirl_jax.types import InputError, PyTree

log = logging.getLogger(__name__)


def replay(config: ConfigDict, workdir: bucket.Path, folder: bucket.Path) -> None:
    """Runs the one step that a guard has kept in this folder, and prints its scalars.

    Raises:
        InputError: something that the user gave is wrong.
    """
    context, name = loading.load_context(config), folder.name.partition("-")[0]
    config_lib.require(
        name in ("irl", "align"), f"{folder} is no step that was kept: give a folder in {workdir}/replay."
    )
    if name == "irl":
        stage = irl.make(context)
    else:
        learned = "irl" in config.schedule or config.reward.init
        stage = align.make(
            context,
            loading.load_rewards(context, bucket.parse_path(config.reward.init or workdir)) if learned else None,
        )
    step, scalars = guards.replay_step(folder, stage)
    if processes.is_writer():
        told = {"stage": name, "step": step} | scalars
        console.print_result(json.dumps(told, indent=1), **told)


def run(config: ConfigDict, workdir: bucket.Path) -> None:
    """Runs the schedule; started again on the same workdir, it goes on where it was.

    Raises:
        InputError: something that the user gave is wrong; before any long work wherever it can be known then. Or a
            guard has stopped the run.
        Preempted: the run was asked to end, and has kept what it did.
    """
    # ------------------------------------------------------------------ check everything, then load everything
    started = time.time()
    checks.validate(config)
    for name in config.metrics.sinks:
        sinks.SINKS[name].require()
    place = Workdir(workdir)
    context = dataclasses.replace(loading.load_context(config), workdir=place)
    asked = runner.load_benchmarks(context)
    chosen = (config.metrics.sinks, config.metrics.project, workdirs.flat(config))
    with contextlib.ExitStack() as stack:
        if processes.is_writer():
            stack.enter_context(place.at_work())
            workdirs.record_config(config, place.local, fingerprints.run_contents(config, context.text, asked))
        writer = stack.enter_context(metrics.MetricWriter(place.local, processes.is_writer(), *chosen))
        stages(context, asked, place, writer, started)


def stages(context: Context, asked: list, place: Workdir, writer: metrics.MetricWriter, started: float) -> None:
    """The schedule's stages in turn, from rewards to report; see `run`."""
    config = context.config
    prompts = sum(len(of_split.id) for of_split in context.examples.values())
    if processes.is_writer():
        facts = pages.facts_of(context.examples, config.data.categories, config.data.harmless)
        pages.note(place.local, facts)
        place.push()
        log.info("%s, %d prompts, %s", jax.devices()[0], prompts, config.policy.init)

    # ------------------------------------------------------------------------------------------ stage 1: rewards
    bank = None
    if "irl" in config.schedule:
        with contextlib.closing(Checkpoints(place.kept / "rewards", keep=1)) as kept:
            if kept.latest() is None:
                kept.save(0, loop("irl", irl.make(context), config, place, writer))
    if "irl" in config.schedule or config.reward.init:
        bank = loading.load_rewards(context, bucket.parse_path(config.reward.init or place.kept))
    if "irl" in config.schedule:
        export.export_rewards(context, bank, place.local)
        place.push()
    if "align" not in config.schedule:
        return

    # ------------------------------------------------------------------------------------- stage 2: the policy
    judges = runner.make_judges(context, bank)
    stage = align.make(context, bank, keep=partial(writer.keep, "align"))
    params = loop("align", watch.with_periodic_evals(stage, context, asked, judges), config, place, writer)
    aligned = POLICIES[config.policy.tune].merged(context.model, params)
    export.export_policy(context, params, aligned, place.local)
    place.push()
    if "evals" not in config.schedule:
        return

    # --------------------------------------------------------------------------------------- before and after
    settings = runner.settings(
        context, bank, judges, workdirs.recorded_contents(place.local) if processes.is_writer() else {}
    )
    for name, model in {"base": context.model, "aligned": aligned}.items():
        path = place.local / "evals" / f"{name}.json"
        if not processes.writers_value(processes.is_writer() and runner.is_done(path, settings)):
            found = {"settings": settings} | runner.evaluate(context, model, bank)
            found["benchmarks"] = runner.run_benchmarks(context, model, asked, judges)
            if processes.is_writer():
                files.replace_file(path, json.dumps(found, indent=1, ensure_ascii=False))
                place.push()
    if not processes.is_writer():
        return
    pages.note(place.local, facts | {"minutes of this start": f"{(time.time() - started) / 60:.1f}"})
    done = pages.read(place.local)
    single.report(done)
    place.push()
    written, model = place.kept / "report.html", place.kept / "aligned"
    console.print_result(
        f"{single.terminal_table(done)}\nreport: {written}\naligned model: {model}",
        report=str(written), model=str(model), base=done.base["overall"], aligned=done.aligned["overall"],
    )  # fmt: skip


def loop(name: str, stage: Stage, config: ConfigDict, workdir: Workdir, writer: metrics.MetricWriter) -> PyTree:
    """THE loop: collect -> update -> log, evaluate, checkpoint. Returns the stage's product.

    A checkpoint holds the state after a number of finished steps, and all that follows is a function of that state and
    the config: so a run that was killed repeats the steps since its last checkpoint and ends with the same bits.
    """
    with contextlib.ExitStack() as stack:
        # ------------------------------------------------------------------------------------ start, or go on
        asked_to_leave = stack.enter_context(preemption.preemption_notice())
        checkpoints = Checkpoints(workdir.kept / "checkpoints" / name, config.checkpoint.keep)
        stack.callback(checkpoints.close)
        done, state = 0, sharding.place(stage.init())
        if checkpoints.latest():
            last = processes.ask_once(lambda: writer.whole_until(name))
            why = f"metrics.jsonl lacks step {last + 1} of {name}, which it has done"
            done, state = checkpoints.restore(state, lambda step: why if step > last else None)
        sampled = samples.steps_kept(stage.steps, config.metrics.samples) if name == "align" else ()
        writer.rewind(config.schedule, name, done, sampled)
        rows = [row for row in writer.read() if row["stage"] == name]
        first, before = (rows[0], rows[-1]) if rows else ({}, {})
        bar = progress.Progress(name, total=stage.steps, start=done, shown=processes.is_writer())
        stack.callback(bar.close)
        shown: dict[str, float] = {}

        for step in range(done, stage.steps):
            # -------------------------------------------------------------------------- collect and update
            clock = [time.perf_counter()]
            batch, carry, scalars = stage.collect(state, step)
            clock.append(time.perf_counter())
            train, trained = stage.update(state.train, batch)
            trained |= {"skipped": train.skipped, "skipped_in_a_row": train.in_a_row}
            scalars |= {key: float(value) for key, value in jax.device_get(trained).items()}
            clock.append(time.perf_counter())
            if why := guards.stop_reason(config.guards, scalars):
                folder = workdir.kept / "replay" / f"{name}-{step + 1}"
                guards.keep_step(folder, step + 1, state._replace(train=train), batch)
                raise InputError(f"stopped at step {step + 1} of {name}: {why} --replay={folder} runs it alone.")
            state = state._replace(train=train, carry=carry)

            # ----------------------------------------------------------------- log, evaluate, checkpoint
            scalars |= stage.evaluate(state, step + 1)
            writer.write(name, step + 1, scalars)
            writer.timing(name, step + 1, {"collect": clock[1] - clock[0], "update": clock[2] - clock[1]})
            first = first or scalars
            for sentence in guards.new_warnings(config.guards, first, before, scalars) if processes.is_writer() else ():
                log.warning("step %d of %s: %s", step + 1, name, sentence)
            before = scalars
            shown |= {key: scalars[key] for key in stage.show if key in scalars}
            bar.show(shown)
            leave = asked_to_leave(step + 1)
            if leave or (step + 1) % config.checkpoint.every == 0 or step + 1 == stage.steps:
                workdir.push()
                checkpoints.save(step + 1, state)
            if leave:
                raise preemption.Preempted(f"step {step + 1} of {name} is kept")

    if why := guards.never_updated(name, state.train):
        raise InputError(why)
    if done < stage.steps and processes.is_writer():
        for sentence in guards.idle(config, name, [row for row in writer.read() if row["stage"] == name]):
            log.warning("%s", sentence)
    return stage.finish(state)
