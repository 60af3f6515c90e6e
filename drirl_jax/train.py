"""A run from config to report, and the one train loop; read it from top to bottom."""

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
from drirl_jax.evals.benchmarks import Questions
from drirl_jax.judges import Judge
from drirl_jax.models import reward
from drirl_jax.models.transformer import Transformer
from drirl_jax.reports import pages, single, status
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
from drirl_jax.stages import align, export, guards, irl, samples, sft
from drirl_jax.stages.base import POLICIES, Context, Stage, State
from drirl_jax.types import InputError, PyTree

log = logging.getLogger(__name__)


def replay(config: ConfigDict, workdir: bucket.Path, folder: bucket.Path) -> None:
    """Repeats the step that a guard saved in this folder, and prints its scalars.

    Raises:
        InputError: something that the user gave is wrong.
    """
    context, name = loading.load_context(config), folder.name.partition("-")[0]
    config_lib.require(
        name in ("sft", "irl", "align"),
        f"{folder} holds no step that a guard saved: give a folder in {workdir}/replay.",
    )
    if name != "sft":
        context = loading.with_warm_start(context, bucket.parse_path(config.reward.init or workdir))
    if name != "align":
        stage = {"sft": sft, "irl": irl}[name].make(context)
    else:
        has_rewards = "irl" in config.schedule or config.reward.init
        stage = align.make(
            context,
            loading.load_rewards(context, bucket.parse_path(config.reward.init or workdir)) if has_rewards else None,
        )
    step, scalars = guards.replay_step(folder, stage)
    if processes.is_writer():
        result = {"stage": name, "step": step} | scalars
        console.print_result(json.dumps(result, indent=1), **result)


def run(config: ConfigDict, workdir: bucket.Path) -> None:
    """Runs the schedule. A second start on the same workdir continues the run.

    Raises:
        InputError: something that the user gave is wrong; the error comes before any long work where that is
            possible. Or a guard has stopped the run.
        Preempted: the run received SIGTERM and saved its state.
    """
    # ------------------------------------------------------------------ check everything, then load everything
    started = time.time()
    checks.validate(config)
    for name in config.metrics.sinks:
        sinks.SINKS[name].check_usable()
    run_workdir = Workdir(workdir)
    context = dataclasses.replace(loading.load_context(config), workdir=run_workdir)
    benchmarks = runner.load_benchmarks(context)
    sink_settings = (config.metrics.sinks, config.metrics.project, workdirs.flat_options(config))
    with contextlib.ExitStack() as stack:
        if processes.is_writer():
            stack.enter_context(run_workdir.at_work())
            workdirs.record_config(
                config, run_workdir.local, fingerprints.run_contents(config, context.text, benchmarks)
            )
        writer = stack.enter_context(metrics.MetricWriter(run_workdir.local, processes.is_writer(), *sink_settings))
        run_stages(context, benchmarks, run_workdir, writer, started)


def run_stages(
    context: Context, benchmarks: list[Questions], workdir: Workdir, writer: metrics.MetricWriter, started: float
) -> None:
    """Runs the stages of the schedule in turn, from the warm start to the report; see `run`."""
    schedule = context.config.schedule
    facts = write_facts(context, workdir)
    context, trained = warm_start(context, workdir, writer) if "sft" in schedule else (context, [])
    bank = learn_rewards(context, workdir, writer)
    judges = runner.make_judges(context, bank)
    if "align" in schedule:
        trained += [align_policy(context, bank, benchmarks, judges, workdir, writer)]
    if not trained:
        return
    aligned = context.model
    if "align" in schedule:
        aligned = POLICIES[context.config.policy.tune].merge(context.model, trained[-1])
    export.export_policy(context, trained, aligned, workdir.local)
    workdir.push()
    if "evals" not in schedule:
        return
    evaluate(evaluated_models(context, aligned), context, bank, benchmarks, judges, workdir)
    if processes.is_writer():
        report(workdir, facts | {"minutes of this start": f"{(time.time() - started) / 60:.1f}"})


def write_facts(context: Context, workdir: Workdir) -> dict:
    """Writes the facts of program, machine and data, and returns them; {} on a process that writes nothing."""
    if not processes.is_writer():
        return {}
    facts = pages.facts_of(context.examples, context.config.data.categories)
    pages.write_facts(workdir.local, facts)
    workdir.push()
    prompt_count = sum(len(split_examples.id) for split_examples in context.examples.values())
    log.info("%s, %d prompts, %s", jax.devices()[0], prompt_count, context.config.policy.init)
    return facts


def warm_start(context: Context, workdir: Workdir, writer: metrics.MetricWriter) -> tuple[Context, list[PyTree]]:
    """Stage 0: the context whose trunk is the product of SFT, and what that stage trained."""
    with contextlib.closing(Checkpoints(workdir.path / "warm_start", keep=1)) as product:
        if product.latest() is None:
            product.save(0, loop("sft", sft.make(context), context.config, workdir, writer))
        params = product.restore(sharding.place(sft.init_params(context)))[1]
    model = POLICIES[context.config.policy.tune].merge(context.model, params)
    export.export_model(context, model, workdir.local / "sft")
    workdir.push()
    return dataclasses.replace(context, model=model), [params]


def learn_rewards(context: Context, workdir: Workdir, writer: metrics.MetricWriter) -> reward.Bank | None:
    """Stage 1: the rewards that IRL learns, or those of config.reward.init; None without any."""
    config = context.config
    if "irl" not in config.schedule:
        return loading.load_rewards(context, bucket.parse_path(config.reward.init)) if config.reward.init else None
    with contextlib.closing(Checkpoints(workdir.path / "rewards", keep=1)) as rewards:
        if rewards.latest() is None:
            rewards.save(0, loop("irl", irl.make(context), config, workdir, writer))
    bank = loading.load_rewards(context, bucket.parse_path(config.reward.init or workdir.path))
    export.export_rewards(context, bank, workdir.local)
    workdir.push()
    return bank


def align_policy(
    context: Context,
    bank: reward.Bank | None,
    benchmarks: list[Questions],
    judges: dict[str, Judge],
    workdir: Workdir,
    writer: metrics.MetricWriter,
) -> PyTree:
    """Stage 2: the policy's trained parameters (see `base.POLICIES`)."""
    stage = align.make(context, bank, keep=partial(writer.write_samples, "align"))
    stage = watch.with_periodic_evals(stage, context, benchmarks, judges)
    return loop("align", stage, context.config, workdir, writer)


def evaluated_models(context: Context, aligned: Transformer) -> dict[str, Transformer]:
    """The models that are compared: the initial policy, the product of `sft` if `align` follows it, the last policy."""
    schedule = context.config.schedule
    base = loading.load_policy(context.config)[0] if "sft" in schedule else context.model
    models = {"base": base, "sft": context.model, "aligned": aligned}
    return {name: models[name] for name in status.evaluated_policies(schedule)}


def evaluate(
    models: dict[str, Transformer],
    context: Context,
    bank: reward.Bank | None,
    benchmarks: list[Questions],
    judges: dict[str, Judge],
    workdir: Workdir,
) -> None:
    """Writes the evaluation of each of these models, unless it is there already."""
    contents = workdirs.recorded_contents(workdir.local) if processes.is_writer() else {}
    settings = runner.settings(context, bank, judges, contents)
    for name, model in models.items():
        path = workdir.local / "evals" / f"{name}.json"
        if processes.writers_value(processes.is_writer() and runner.is_done(path, settings)):
            continue
        results = {"settings": settings} | runner.evaluate(context, model, bank)
        results["benchmarks"] = runner.run_benchmarks(context, model, benchmarks, judges)
        if processes.is_writer():
            files.replace_file(path, json.dumps(results, indent=1, ensure_ascii=False))
            workdir.push()


def report(workdir: Workdir, facts: dict) -> None:
    """Writes the facts and the report, and prints the table of the evaluations before and after."""
    pages.write_facts(workdir.local, facts)
    run_page = pages.load_run(workdir.local)
    single.report(run_page)
    workdir.push()
    page, model = workdir.path / "report.html", workdir.path / "aligned"
    console.print_result(
        f"{single.terminal_table(run_page)}\nreport: {page}\naligned model: {model}",
        report=str(page), model=str(model), base=run_page.base["overall"], aligned=run_page.aligned["overall"],
    )  # fmt: skip


def loop(name: str, stage: Stage, config: ConfigDict, workdir: Workdir, writer: metrics.MetricWriter) -> PyTree:
    """THE loop: collect -> update -> evaluate -> log -> checkpoint. Returns the stage's product.

    A checkpoint holds the state after a number of finished steps. All later steps depend only on that state and the
    config. So a run that was killed repeats the steps since its last checkpoint and ends with the same bits.
    """
    with contextlib.ExitStack() as stack:
        is_preempted = stack.enter_context(preemption.preemption_notice())
        checkpoints = Checkpoints(workdir.path / "checkpoints" / name, config.checkpoint.keep)
        stack.callback(checkpoints.close)
        start, state = resume(name, stage, config, checkpoints, writer)
        rows = [row for row in writer.read_metrics() if row["stage"] == name]
        first, previous = (rows[0], rows[-1]) if rows else ({}, {})
        bar = progress.Progress(name, total=stage.steps, start=start, prints=processes.is_writer())
        stack.callback(bar.close)
        bar_scalars: dict[str, float] = {}

        for step in range(start, stage.steps):
            state, scalars, seconds = take_step(name, stage, state, step, config, workdir)
            scalars |= stage.evaluate(state, step + 1)
            writer.write(name, step + 1, scalars)
            writer.write_timing(name, step + 1, seconds)
            first = first or scalars
            if processes.is_writer():
                for warning in guards.new_warnings(config.guards, first, previous, scalars):
                    log.warning("step %d of %s: %s", step + 1, name, warning)
            previous = scalars
            bar_scalars |= {key: scalars[key] for key in stage.bar_scalars if key in scalars}
            bar.show(bar_scalars)
            preempted = is_preempted(step + 1)
            if preempted or (step + 1) % config.checkpoint.every == 0 or step + 1 == stage.steps:
                workdir.push()
                checkpoints.save(step + 1, state)
            if preempted:
                raise preemption.Preempted(f"step {step + 1} of {name} is kept")

    if reason := guards.never_updated(name, state.train):
        raise InputError(reason)
    if start < stage.steps and processes.is_writer():
        for warning in guards.idle(config, name, [row for row in writer.read_metrics() if row["stage"] == name]):
            log.warning("%s", warning)
    return stage.finish(state)


def resume(
    name: str, stage: Stage, config: ConfigDict, checkpoints: Checkpoints, writer: metrics.MetricWriter
) -> tuple[int, State]:
    """The number of finished steps and the state after them, from the newest checkpoint; else (0, the first state).

    Removes what the writer's files hold of later steps.
    """
    finished, state = 0, sharding.place(stage.init())
    if checkpoints.latest():
        last_logged = processes.ask_once(lambda: writer.last_complete_step(name))
        lacking = f"metrics.jsonl lacks step {last_logged + 1} of {name}, which it has done"
        finished, state = checkpoints.restore(state, lambda step: lacking if step > last_logged else None)
    sample_steps = samples.steps_kept(stage.steps, config.metrics.samples) if name == "align" else ()
    writer.rewind(config.schedule, name, finished, sample_steps)
    return finished, state


def take_step(
    name: str, stage: Stage, state: State, step: int, config: ConfigDict, workdir: Workdir
) -> tuple[State, dict[str, float], dict[str, float]]:
    """One step: (the state after it, its scalars, seconds of "collect" and "update").

    Raises:
        InputError: a guard stops the run. The step is saved for --replay.
    """
    times = [time.perf_counter()]
    batch, carry, scalars = stage.collect(state, step)
    times.append(time.perf_counter())
    train, update_scalars = stage.update(state.train, batch)
    update_scalars |= {"skipped": train.skipped, "skipped_in_a_row": train.skipped_in_a_row}
    scalars |= {key: float(value) for key, value in jax.device_get(update_scalars).items()}
    times.append(time.perf_counter())
    if reason := guards.stop_reason(config.guards, scalars):
        folder = workdir.path / "replay" / f"{name}-{step + 1}"
        guards.keep_step(folder, step + 1, state._replace(train=train), batch)
        raise InputError(f"stopped at step {step + 1} of {name}: {reason} --replay={folder} runs it alone.")
    seconds = {"collect": times[1] - times[0], "update": times[2] - times[1]}
    return State(train, carry), scalars, seconds
