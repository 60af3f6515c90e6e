"""The one train loop, and a run from config to report; reads top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import time
from functools import partial
from typing import Sequence

import jax
from ml_collections import ConfigDict

from drirl_jax import checks, judges
from drirl_jax import config as config_lib
from drirl_jax.data import builder, examples, records
from drirl_jax.data.text import Text
from drirl_jax.evals import runner, watch
from drirl_jax.models import encoder, families, flash, hf, peft, reward
from drirl_jax.models.architecture import need_positions
from drirl_jax.models.transformer import Transformer
from drirl_jax.reports import pages, single
from drirl_jax.runtime import bucket, console, files, metrics, preemption, sharding, sinks, workdirs
from drirl_jax.runtime.bucket import Workdir
from drirl_jax.runtime.checkpoint import Checkpoints
from drirl_jax.stages import align, guards, irl, samples
from drirl_jax.stages.base import POLICIES, Context, Stage
from drirl_jax.types import InputError, PyTree

log = logging.getLogger(__name__)


def prepare(config: ConfigDict, load: bool = True) -> Context:
    """Checks the config and all that it names, then loads it; joins the processes, sets the mesh and jax itself up.

    Args:
        load: False checks as much, but writes nothing, and reads of the policy's files the shapes alone: the context's
            model are these.

    Raises:
        InputError: something that the user gave is wrong.
    """
    checks.validate(config)
    sharding.connect(config.distributed)
    jax.config.update("jax_debug_nans", config.debug_nans)
    if config.compilation_cache and load:
        cache = files.place(config.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    mesh = sharding.mesh_of(config.mesh, config_lib.micro_batches(config), jax.devices())
    sampling = sharding.sampling_mesh(config.sampler.mesh, config.align.batch, mesh)
    jax.set_mesh(mesh)
    reader = builder.read if load else records.by_split
    by_split = reader(config.data.path, config.data.categories, harmless=config.data.harmless)
    shares = dict(zip(config.data.categories, config.data.shares))
    trained = [category for category in config.data.categories if shares.get(category, 1.0) > 0]
    if "train" in by_split:
        by_split["train"] = records.thinned(by_split["train"], shares)
    needed = {"irl": ("train", "valid"), "align": ("train",), "evals": (config.evals.split,)}
    if config.reward.route == "router":
        needed["align"] = ("train", "valid")
    for split in {split for name in config.schedule for split in needed[name]}:
        of, minimum = (trained, config.data.minimum) if split == "train" else (config.data.categories, 1)
        records.require(by_split.get(split, []), of, split, minimum)
    if config.reward.init:
        need_rewards(config, bucket.path(config.reward.init))
    with sharding.together():
        encode = load_encoder(config)
        model, tokens = load_policy(config, load)
    tokenised = examples.tokenise(by_split, tokens, config)
    longest = max((len(of.prefix) + int(of.prompt_len.max()) for of in tokenised.values()), default=0)
    need_positions(model.config, longest, max(config.sampler.max_new, config.evals.max_new))
    return Context(
        config=config,
        model=model,
        text=tokens,
        embedder=encode,
        examples=tokenised,
        sampling=sampling,
    )


def load_encoder(config: ConfigDict) -> encoder.TextEmbedder:
    """The text encoder that the config names."""
    return encoder.TextEmbedder.from_folder(hf.resolve(config.encoder.init), config.encoder.max_tokens)


def load_policy(config: ConfigDict, load: bool = True) -> tuple[Transformer, Text]:
    """The policy to start from, and its tokens; with `load` False the policy's shapes alone, once they are checked."""
    path = hf.resolve(config.policy.init)
    chosen = {name: config.policy[name] for name in ("dtype", "weights", "attention")}
    model_config = families.config_from_hf(hf.read_config(path))._replace(**chosen)
    flash.require(model_config, jax.default_backend())
    for key in ("policy.layers", "reward.layers"):
        layers, most = config_lib.get(config, key), model_config.layers
        config_lib.need(layers <= most, f"config.{key} is {layers}, but {config.policy.init} has {most} layers.")
    tokens = Text(hf.load_tokenizer(path), config.policy.system, config.policy.enable_thinking)
    if load:
        return families.from_hf(hf.read_tensors(path), model_config), tokens
    families.check(hf.read_shapes(path), model_config)
    return families.shapes_of(model_config), tokens


# What a run must have in common with the one whose rewards it takes.
COMMON = (
    "data.categories sampler.max_new reward.kind reward.one_for_all reward.rank reward.alpha "
    "reward.targets reward.layers"
).split()


def need_rewards(config: ConfigDict, workdir: bucket.Path) -> None:
    """Raises InputError unless a run has left rewards in this workdir that mean the same under this config."""
    folder = workdir / "rewards"
    config_lib.need(
        folder.is_dir() and Checkpoints(folder, keep=1).latest() is not None,
        f"no rewards in {folder}: name the workdir of a run whose IRL stage has ended.",
    )
    theirs = workdirs.recall(workdir)
    # Once the contents of the policies are known, they decide: see `rewards`.
    for key in COMMON if workdirs.noted(workdir) else (*COMMON, "policy.init"):
        here, there = (config_lib.get(of, key) for of in (config, theirs))
        config_lib.need(here == there, f"the rewards in {folder} are of config.{key} = {there!r}, not {here!r}.")


def need_same_policy(context: Context, workdir: bucket.Path) -> None:
    """Raises InputError unless the run in this workdir started from a policy that holds what the context's does."""
    sharding.told(lambda: workdirs.require_same(workdir, workdirs.policy_contents(context.config, context.text)))


def rewards(context: Context, workdir: bucket.Path) -> reward.Bank:
    """The rewards that a run has left in this workdir. Raises InputError if they do not fit the context's config."""
    need_rewards(context.config, workdir)
    need_same_policy(context, workdir)
    fresh = irl.init_rewards(context)
    template = reward.Bank(fresh, mean=fresh.bias, std=fresh.bias)
    return Checkpoints(workdir / "rewards", keep=1).restore(template)[1]


def replay(config: ConfigDict, workdir: bucket.Path, folder: bucket.Path) -> None:
    """Runs the one step that a guard has kept in this folder, and prints its scalars.

    Raises:
        InputError: something that the user gave is wrong.
    """
    context, name = prepare(config), folder.name.partition("-")[0]
    config_lib.need(name in ("irl", "align"), f"{folder} is no step that was kept: give a folder in {workdir}/replay.")
    if name == "irl":
        stage = irl.make(context)
    else:
        learned = "irl" in config.schedule or config.reward.init
        stage = align.make(context, rewards(context, bucket.path(config.reward.init or workdir)) if learned else None)
    step, scalars = guards.replay(folder, stage)
    if sharding.writes():
        told = {"stage": name, "step": step} | scalars
        console.result(json.dumps(told, indent=1), **told)


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
    context = dataclasses.replace(prepare(config), workdir=place)
    asked = runner.questions_of(context)
    chosen = (config.metrics.sinks, config.metrics.project, workdirs.flat(config))
    with contextlib.ExitStack() as stack:
        if sharding.writes():
            stack.enter_context(place.at_work())
            workdirs.remember(config, place.local, workdirs.contents_of(config, context.text, asked))
        writer = stack.enter_context(metrics.MetricWriter(place.local, sharding.writes(), *chosen))
        stages(context, asked, place, writer, started)


def stages(context: Context, asked: list, place: Workdir, writer: metrics.MetricWriter, started: float) -> None:
    """The schedule's stages in turn, from rewards to report; see `run`."""
    config = context.config
    prompts = sum(len(of_split.id) for of_split in context.examples.values())
    if sharding.writes():
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
        bank = rewards(context, bucket.path(config.reward.init or place.kept))
    if "irl" in config.schedule:
        export_rewards(context, bank, place.local)
        place.push()
    if "align" not in config.schedule:
        return

    # ------------------------------------------------------------------------------------- stage 2: the policy
    judges = runner.judges_of(context, bank)
    stage = align.make(context, bank, keep=partial(writer.keep, "align"))
    params = loop("align", watch.watched(stage, context, asked, judges), config, place, writer)
    aligned = POLICIES[config.policy.tune].merged(context.model, params)
    export_policy(context, params, aligned, place.local)
    place.push()
    if "evals" not in config.schedule:
        return

    # --------------------------------------------------------------------------------------- before and after
    settings = runner.settings(context, bank, judges, workdirs.noted(place.local) if sharding.writes() else {})
    for name, model in {"base": context.model, "aligned": aligned}.items():
        path = place.local / "evals" / f"{name}.json"
        if not sharding.agreed(sharding.writes() and runner.is_done(path, settings)):
            found = {"settings": settings} | runner.evaluate(context, model, bank)
            found["benchmarks"] = runner.benchmarked(context, model, asked, judges)
            if sharding.writes():
                files.replace_file(path, json.dumps(found, indent=1, ensure_ascii=False))
                place.push()
    if not sharding.writes():
        return
    pages.note(place.local, facts | {"minutes of this start": f"{(time.time() - started) / 60:.1f}"})
    done = pages.read(place.local)
    single.report(done)
    place.push()
    written, model = place.kept / "report.html", place.kept / "aligned"
    console.result(
        f"{single.terminal_table(done)}\nreport: {written}\naligned model: {model}",
        report=str(written), model=str(model), base=done.base["overall"], aligned=done.aligned["overall"],
    )  # fmt: skip


def export_rewards(context: Context, bank: reward.Bank, workdir: pathlib.Path) -> None:
    """Writes each reward that is an adapter into adapters/rewards, as `models/peft.py` says."""
    config = context.config
    if config.reward.kind == "lora":
        fetched = sharding.fetch(bank)
        if sharding.writes():
            folder, base = workdir / "adapters" / "rewards", config.policy.init
            peft.save_rewards(folder, fetched, context.model.config, base, config.data.categories)


def export_policy(context: Context, params: PyTree, aligned: Transformer, workdir: pathlib.Path) -> None:
    """Writes the aligned model in the type of the weights, each one rounded once from a sum in float32 where an adapter
    was merged; and into adapters/policy what was trained, in float32, if that is an adapter."""
    init = context.config.policy.init
    if context.config.policy.tune == "lora":
        adapter = sharding.fetch(params)
        if sharding.writes():
            peft.save_adapter(workdir / "adapters" / "policy", adapter, context.model.config, init)
    if not sharding.agreed((workdir / "aligned").exists()):
        tensors = families.to_hf(sharding.fetch(aligned))
        if sharding.writes():
            hf.save(workdir / "aligned", hf.read_config(hf.resolve(init)), tensors, context.text.tokenizer)


def judges_of(model: str, config: ConfigDict, names: Sequence[str], memory: pathlib.Path) -> dict[str, judges.Judge]:
    """The judges of a policy that is in no training; `rewards` are those of its run, on the model it started from.

    Args:
        model, config: see `workdirs.of_policy`.
        names: rows of JUDGES.
        memory: see `judges.Setting`.

    Raises:
        InputError: a judge cannot be made, such as the rewards of what is no run.
    """
    rewards_of_run = None
    if "rewards" in names:
        run = files.place(model)
        if not (run / "rewards").is_dir():
            raise InputError(f"the judge 'rewards' needs a run with rewards, and {model} is none.")
        of_run = workdirs.recall(run)
        context = prepare(of_run)
        bank = rewards(context, bucket.path(of_run.reward.init or model))
        rewards_of_run = (context.model, context.text, bank)
    setting = judges.Setting(config, memory, lambda: hf.resolve(config.encoder.init), rewards_of_run)
    return {name: judges.JUDGES[name].make(setting) for name in names}


def loop(name: str, stage: Stage, config: ConfigDict, workdir: Workdir, writer: metrics.MetricWriter) -> PyTree:
    """THE loop: collect -> update -> log, evaluate, checkpoint. Returns the stage's product.

    A checkpoint holds the state after a number of finished steps, and all that follows is a function of that state and
    the config: so a run that was killed repeats the steps since its last checkpoint and ends with the same bits.
    """
    with contextlib.ExitStack() as stack:
        # ------------------------------------------------------------------------------------ start, or go on
        asked_to_leave = stack.enter_context(preemption.notice())
        checkpoints = Checkpoints(workdir.kept / "checkpoints" / name, config.checkpoint.keep)
        stack.callback(checkpoints.close)
        done, state = 0, sharding.place(stage.init())
        if checkpoints.latest():
            last = sharding.told(lambda: writer.whole_until(name))
            why = f"metrics.jsonl lacks step {last + 1} of {name}, which it has done"
            done, state = checkpoints.restore(state, lambda step: why if step > last else None)
        sampled = samples.steps_kept(stage.steps, config.metrics.samples) if name == "align" else ()
        writer.rewind(config.schedule, name, done, sampled)
        rows = [row for row in writer.read() if row["stage"] == name]
        first, before = (rows[0], rows[-1]) if rows else ({}, {})
        progress = metrics.Progress(name, total=stage.steps, start=done, shown=sharding.writes())
        stack.callback(progress.close)
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
            if why := guards.reason(config.guards, scalars):
                folder = workdir.kept / "replay" / f"{name}-{step + 1}"
                guards.keep(folder, step + 1, state._replace(train=train), batch)
                raise InputError(f"stopped at step {step + 1} of {name}: {why} --replay={folder} runs it alone.")
            state = state._replace(train=train, carry=carry)

            # ----------------------------------------------------------------- log, evaluate, checkpoint
            scalars |= stage.evaluate(state, step + 1)
            writer.write(name, step + 1, scalars)
            writer.timing(name, step + 1, {"collect": clock[1] - clock[0], "update": clock[2] - clock[1]})
            first = first or scalars
            for sentence in guards.crossings(config.guards, first, before, scalars) if sharding.writes() else ():
                log.warning("step %d of %s: %s", step + 1, name, sentence)
            before = scalars
            shown |= {key: scalars[key] for key in stage.show if key in scalars}
            progress.show(shown)
            leave = asked_to_leave(step + 1)
            if leave or (step + 1) % config.checkpoint.every == 0 or step + 1 == stage.steps:
                workdir.push()
                checkpoints.save(step + 1, state)
            if leave:
                raise preemption.Preempted(f"step {step + 1} of {name} is kept")

    if why := guards.never_updated(name, state.train):
        raise InputError(why)
    if done < stage.steps and sharding.writes():
        for sentence in guards.idle(config, name, [row for row in writer.read() if row["stage"] == name]):
            log.warning("%s", sentence)
    return stage.finish(state)
