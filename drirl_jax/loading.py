"""A config becomes a checked and loaded `Context`: model, tokens, data, text encoder, rewards and judges."""

from __future__ import annotations

import pathlib
from typing import Sequence

import jax
from ml_collections import ConfigDict

from drirl_jax import checks, judges
from drirl_jax import config as config_lib
from drirl_jax.data import builder, examples, fingerprints, records
from drirl_jax.data.text import ChatTokens
from drirl_jax.models import encoder, families, flash, hf, reward
from drirl_jax.models.architecture import need_positions
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime import bucket, files, processes, sharding, workdirs
from drirl_jax.runtime.checkpoint import Checkpoints
from drirl_jax.stages import irl
from drirl_jax.stages.base import Context
from drirl_jax.types import InputError


def load_context(config: ConfigDict, load: bool = True) -> Context:
    """Checks the config and all that it names, then loads it; joins the processes, sets the mesh and jax itself up.

    Args:
        load: False checks as much, but writes nothing, and reads of the policy's files the shapes alone: the context's
            model are these.

    Raises:
        InputError: something that the user gave is wrong.
    """
    checks.validate(config)
    processes.connect(config.distributed)
    jax.config.update("jax_debug_nans", config.debug_nans)
    if config.compilation_cache and load:
        cache = files.expand_path(config.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    mesh = sharding.make_mesh(config.mesh, config_lib.micro_batch_sizes(config), jax.devices())
    sampling = sharding.sampling_mesh(config.sampler.mesh, config.align.batch, mesh)
    jax.set_mesh(mesh)
    reader = builder.read_splits if load else records.by_split
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
        require_rewards(config, bucket.parse_path(config.reward.init))
    with processes.all_or_none():
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


def load_policy(config: ConfigDict, load: bool = True) -> tuple[Transformer, ChatTokens]:
    """The policy to start from, and its tokens; with `load` False the policy's shapes alone, once they are checked."""
    path = hf.resolve(config.policy.init)
    chosen = {name: config.policy[name] for name in ("dtype", "weights", "attention")}
    model_config = families.config_from_hf(hf.read_config(path))._replace(**chosen)
    flash.require(model_config, jax.default_backend())
    for key in ("policy.layers", "reward.layers"):
        layers, most = config_lib.get_option(config, key), model_config.layers
        config_lib.require(layers <= most, f"config.{key} is {layers}, but {config.policy.init} has {most} layers.")
    tokens = ChatTokens(hf.load_tokenizer(path), config.policy.system, config.policy.enable_thinking)
    if load:
        return families.from_hf(hf.read_tensors(path), model_config), tokens
    families.check(hf.read_shapes(path), model_config)
    return families.model_shapes(model_config), tokens


# What a run must have in common with the one whose rewards it takes.
COMMON = (
    "data.categories sampler.max_new reward.kind reward.one_for_all reward.rank reward.alpha "
    "reward.targets reward.layers"
).split()


def require_rewards(config: ConfigDict, workdir: bucket.Path) -> None:
    """Raises InputError unless a run has left rewards in this workdir that mean the same under this config."""
    folder = workdir / "rewards"
    config_lib.require(
        folder.is_dir() and Checkpoints(folder, keep=1).latest() is not None,
        f"no rewards in {folder}: name the workdir of a run whose IRL stage has ended.",
    )
    theirs = workdirs.load_config(workdir)
    # Once the contents of the policies are known, they decide: see `rewards`.
    for key in COMMON if workdirs.recorded_contents(workdir) else (*COMMON, "policy.init"):
        here, there = (config_lib.get_option(of, key) for of in (config, theirs))
        config_lib.require(here == there, f"the rewards in {folder} are of config.{key} = {there!r}, not {here!r}.")


def require_same_policy(context: Context, workdir: bucket.Path) -> None:
    """Raises InputError unless the run in this workdir started from a policy that holds what the context's does."""
    processes.ask_once(
        lambda: workdirs.require_same(workdir, fingerprints.policy_contents(context.config, context.text))
    )


def load_rewards(context: Context, workdir: bucket.Path) -> reward.Bank:
    """The rewards that a run has left in this workdir. Raises InputError if they do not fit the context's config."""
    require_rewards(context.config, workdir)
    require_same_policy(context, workdir)
    fresh = irl.init_rewards(context)
    template = reward.Bank(fresh, mean=fresh.bias, std=fresh.bias)
    return Checkpoints(workdir / "rewards", keep=1).restore(template)[1]


def load_judges(model: str, config: ConfigDict, names: Sequence[str], memory: pathlib.Path) -> dict[str, judges.Judge]:
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
        run = files.expand_path(model)
        if not (run / "rewards").is_dir():
            raise InputError(f"the judge 'rewards' needs a run with rewards, and {model} is none.")
        of_run = workdirs.load_config(run)
        context = load_context(of_run)
        bank = load_rewards(context, bucket.parse_path(of_run.reward.init or model))
        rewards_of_run = (context.model, context.text, bank)
    setting = judges.Setting(config, memory, lambda: hf.resolve(config.encoder.init), rewards_of_run)
    return {name: judges.JUDGES[name].make(setting) for name in names}
