"""The one train loop, and a run from config to report; reads top to bottom."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import time

import jax
from ml_collections import ConfigDict

import drirl_jax
from drirl_jax import config as config_lib
from drirl_jax import metrics, plots
from drirl_jax.checkpoint import Checkpoints
from drirl_jax.data import builder, examples, records
from drirl_jax.evals import runner
from drirl_jax.models import encoder, families, hf, peft, reward
from drirl_jax.models.transformer import Transformer
from drirl_jax.stages import align, irl
from drirl_jax.stages.base import POLICIES, Context, Stage
from drirl_jax.text import Text
from drirl_jax.types import PyTree

log = logging.getLogger(__name__)


def prepare(config: ConfigDict) -> Context:
    """Checks the config and all that it names, then loads it; sets jax's compilation cache and NaN checks.

    Raises:
        InputError: something that the user gave is wrong.
    """
    config_lib.validate(config)
    jax.config.update("jax_debug_nans", config.debug_nans)
    if config.compilation_cache:
        cache = pathlib.Path(config.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    by_split = builder.load(config.data.path, config.data.categories)
    shares = dict(zip(config.data.categories, config.data.shares))
    trained = [category for category in config.data.categories if shares.get(category, 1.0) > 0]
    if "train" in by_split:
        by_split["train"] = records.thinned(list(by_split["train"]), shares)
    needed = {"irl": ("train", "valid"), "align": ("train",), "evals": (config.evals.split,)}
    if config.reward.route == "router":
        needed["align"] = ("train", "valid")
    for split in {split for name in config.schedule for split in needed[name]}:
        of, minimum = (trained, config.data.minimum) if split == "train" else (config.data.categories, 1)
        records.require(by_split.get(split, []), of, split, minimum)
    if config.reward.init:
        need_rewards(config, pathlib.Path(config.reward.init))
    encode = load_encoder(config)
    model, tokens = load_policy(config)
    return Context(
        config=config,
        model=model,
        text=tokens,
        embedder=encode,
        examples=examples.tokenise(by_split, tokens, config),
    )


def load_encoder(config: ConfigDict) -> encoder.TextEmbedder:
    """The text encoder that the config names."""
    return encoder.TextEmbedder.from_folder(hf.resolve(config.encoder.init), config.encoder.max_tokens)


def load_policy(config: ConfigDict) -> tuple[Transformer, Text]:
    """The policy to start from, and its tokens."""
    path = hf.resolve(config.policy.init)
    model_config = families.config_from_hf(hf.read_config(path))._replace(dtype=config.policy.dtype)
    for key in ("policy.layers", "reward.layers"):
        layers, most = config_lib.get(config, key), model_config.layers
        config_lib.need(layers <= most, f"config.{key} is {layers}, but {config.policy.init} has {most} layers.")
    tokens = Text(hf.load_tokenizer(path), config.policy.system)
    return committed(families.from_hf(hf.read_tensors(path), model_config)), tokens


# What a run must have in common with the one whose rewards it takes.
COMMON = (
    "data.categories policy.init sampler.max_new reward.kind reward.one_for_all reward.rank reward.alpha "
    "reward.targets reward.layers"
).split()


def need_rewards(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises InputError unless a run has left rewards in this workdir that mean the same under this config."""
    folder = workdir / "rewards"
    config_lib.need(
        folder.is_dir() and Checkpoints(folder, keep=1).latest() is not None,
        f"no rewards in {folder}: name the workdir of a run whose IRL stage has ended.",
    )
    theirs = config_lib.recall(workdir)
    for key in COMMON:
        here, there = (config_lib.get(of, key) for of in (config, theirs))
        config_lib.need(here == there, f"the rewards in {folder} are of config.{key} = {there!r}, not {here!r}.")


def rewards(context: Context, workdir: pathlib.Path) -> reward.Bank:
    """The rewards that a run has left in this workdir. Raises InputError if they do not fit the context's config."""
    need_rewards(context.config, workdir)
    fresh = irl.init_rewards(context)
    return Checkpoints(workdir / "rewards", keep=1).restore(reward.Bank(fresh, mean=fresh.bias, std=fresh.bias))


def committed(tree: PyTree) -> PyTree:
    """The tree with its jax arrays bound to the device, as the results of jitted functions are: else each function
    would be compiled twice, for the first step's free arrays and for all others."""
    device = jax.devices()[0]
    return jax.tree.map(lambda x: jax.device_put(x, device) if isinstance(x, jax.Array) else x, tree)


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Runs the schedule; started again on the same workdir, it goes on where it was.

    Raises:
        InputError: something that the user gave is wrong; before any long work wherever it can be known then.
    """
    # ------------------------------------------------------------------ check everything, then load everything
    started = time.time()
    context = dataclasses.replace(prepare(config), workdir=workdir)
    config_lib.remember(config, workdir)
    writer = metrics.MetricWriter(workdir)
    prompts = sum(len(of_split.id) for of_split in context.examples.values())
    log.info("%s, %d prompts, %s", jax.devices()[0], prompts, config.policy.init)

    # ------------------------------------------------------------------------------------------ stage 1: rewards
    bank = None
    if "irl" in config.schedule:
        kept = Checkpoints(workdir / "rewards", keep=1)
        if kept.latest() is None:
            kept.save(0, loop("irl", irl.make(context), config, workdir, writer))
    if "irl" in config.schedule or config.reward.init:
        bank = rewards(context, pathlib.Path(config.reward.init or workdir))
    adapted = (context.model.config, config.policy.init)
    if "irl" in config.schedule and config.reward.kind == "lora":
        peft.save_rewards(workdir / "adapters" / "rewards", bank, *adapted, config.data.categories)
    if "align" not in config.schedule:
        return

    # ------------------------------------------------------------------------------------- stage 2: the policy
    params = loop("align", align.make(context, bank), config, workdir, writer)
    aligned = POLICIES[config.policy.tune].merged(context.model, params)
    if config.policy.tune == "lora":
        peft.save_adapter(workdir / "adapters" / "policy", params, *adapted)
    if not (workdir / "aligned").exists():
        hf_config = hf.read_config(hf.resolve(config.policy.init))
        hf.save(workdir / "aligned", hf_config, families.to_hf(aligned), context.text.tokenizer)
    if "evals" not in config.schedule:
        return

    # --------------------------------------------------------------------------------------- before and after
    results = {}
    for name, model in {"base": context.model, "aligned": aligned}.items():
        path = workdir / "evals" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(runner.evaluate(context, model, bank), indent=1, ensure_ascii=False))
            temporary.replace(path)
        results[name] = json.loads(path.read_text())
    facts = {
        "drirl_jax": drirl_jax.__version__,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "minutes": f"{(time.time() - started) / 60:.1f} (this start)",
    }
    shown = (config.data.categories, config.data.harmless)
    method = f"objective {config.align.objective}, rewards {config.reward.source}, scaling {config.scaling.combine}"
    report = plots.report(
        workdir, results["base"], results["aligned"], writer.read(), *shown, method, str(config), facts
    )
    print(plots.terminal_table(results["base"], results["aligned"], *shown))
    print(f"report: {report}\naligned model: {workdir / 'aligned'}")


def loop(name: str, stage: Stage, config: ConfigDict, workdir: pathlib.Path, writer: metrics.MetricWriter) -> PyTree:
    """THE loop: collect -> update -> log, evaluate, checkpoint. Returns the stage's product.

    A checkpoint holds the state after a number of finished steps, and all that follows is a function of that state and
    the config: so a run that was killed repeats the steps since its last checkpoint and ends with the same bits.
    """
    # ---------------------------------------------------------------------------------------- start, or go on
    checkpoints = Checkpoints(workdir / "checkpoints" / name, config.checkpoint.keep)
    state = committed(stage.init())
    done = checkpoints.latest() or 0
    if done:
        state = checkpoints.restore(state)
    writer.rewind(config.schedule, name, done)
    progress = metrics.Progress(name, total=stage.steps, start=done)
    shown: dict[str, float] = {}

    for step in range(done, stage.steps):
        # ------------------------------------------------------------------------------ collect and update
        clock = [time.perf_counter()]
        batch, carry, scalars = stage.collect(state, step)
        clock.append(time.perf_counter())
        train, trained = stage.update(state.train, batch)
        scalars |= {key: float(value) for key, value in jax.device_get(trained).items()}
        clock.append(time.perf_counter())
        state = state._replace(train=train, carry=carry)

        # --------------------------------------------------------------------- log, evaluate, checkpoint
        scalars |= stage.evaluate(state, step + 1)
        writer.write(name, step + 1, scalars)
        writer.timing(name, step + 1, {"collect": clock[1] - clock[0], "update": clock[2] - clock[1]})
        shown |= {key: scalars[key] for key in stage.show if key in scalars}
        progress.show(shown)
        if (step + 1) % config.checkpoint.every == 0 or step + 1 == stage.steps:
            checkpoints.save(step + 1, state)

    progress.close()
    checkpoints.close()
    return stage.finish(state)
