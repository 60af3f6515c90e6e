"""Turns a config into a checked and loaded `Context`: model, tokens, data, text encoder, rewards and judges."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Callable, Sequence

import jax
from ml_collections import ConfigDict

from drirl_jax import checks, judges
from drirl_jax import config as config_lib
from drirl_jax.data import builder, examples, fingerprints, overlap, records
from drirl_jax.data.text import ChatTokens
from drirl_jax.models import encoder, families, flash, hf, reward
from drirl_jax.models.architecture import need_positions
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime import bucket, files, processes, sharding, workdirs
from drirl_jax.runtime.checkpoint import Checkpoints
from drirl_jax.stages import irl
from drirl_jax.stages.base import Context
from drirl_jax.stages.rewards.routes import ROUTES, has_help_reward
from drirl_jax.types import InputError


def load_context(config: ConfigDict, load: bool = True) -> Context:
    """Checks the config and all that it names, then loads it. Also joins the processes and sets up the mesh and jax.

    Args:
        load: False makes the same checks, but writes nothing and reads only the shapes from the policy's files: the
            context's model then consists of shapes.

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
    sampling_mesh = sharding.sampling_mesh(config.sampler.mesh, config.align.batch, mesh)
    jax.set_mesh(mesh)
    by_split = read_checked_splits(config, builder.read_splits if load else records.by_split)
    if config.reward.init:
        require_rewards(config, bucket.parse_path(config.reward.init))
    with processes.all_or_none():
        embedder = load_encoder(config)
        model, tokens = load_policy(config, load)
    tokenised = examples.tokenise(by_split, tokens, config)
    longest_prompt = max(
        (len(split_examples.prefix) + int(split_examples.prompt_len.max()) for split_examples in tokenised.values()),
        default=0,
    )
    need_positions(model.config, longest_prompt, max(config_lib.taught_tokens(config), config.evals.max_new))
    return Context(
        config=config,
        model=model,
        text=tokens,
        embedder=embedder,
        examples=tokenised,
        sampling_mesh=sampling_mesh,
    )


def read_checked_splits(config: ConfigDict, read_splits: Callable) -> dict[str, list[records.Record]]:
    """The records of each split that the run uses. Training prompts without an answer are a split of their own.

    Args:
        read_splits: `builder.read_splits`, or `records.by_split`, which prepares nothing.

    Raises:
        InputError: a record breaks the schema, or a category has too few of them.
    """
    unanswered = config_lib.learns_own_answers(config)
    by_split = read_splits(
        config.data.path, config.data.categories, harmless=config.data.harmless, unanswered=unanswered
    )
    shares = dict(zip(config.data.categories, config.data.shares))
    trained_categories = [category for category in config.data.categories if shares.get(category, 1.0) > 0]
    if "train" in by_split:
        rows = records.first_share(by_split["train"], shares)
        by_split["train"] = [row for row in rows if row.response.strip()]
        if unanswered_rows := [row for row in rows if not row.response.strip()]:
            by_split[overlap.UNANSWERED] = unanswered_rows
    splits_of_stage = {
        "sft": ("train",),
        "irl": ("train", "valid"),
        "align": ("train",),
        "evals": (config.evals.split,),
    }
    if config.reward.route == "router":
        splits_of_stage["align"] = ("train", "valid")
    for split in {split for name in config.schedule for split in splits_of_stage[name]}:
        categories, minimum = (
            (trained_categories, config.data.minimum) if split == "train" else (config.data.categories, 1)
        )
        records.require(by_split.get(split, []), categories, split, minimum)
    return by_split


def load_encoder(config: ConfigDict) -> encoder.TextEmbedder:
    """The text encoder that the config names."""
    return encoder.TextEmbedder.from_folder(hf.resolve(config.encoder.init), config.encoder.max_tokens)


def load_policy(config: ConfigDict, load: bool = True) -> tuple[Transformer, ChatTokens]:
    """The policy to start from, and its tokens; if `load` is False, only the policy's checked shapes."""
    path = hf.resolve(config.policy.init)
    model_options = {name: config.policy[name] for name in ("dtype", "weights", "attention")}
    model_config = families.config_from_hf(hf.read_config(path))._replace(**model_options)
    flash.check_attention(model_config, jax.default_backend())
    for key in ("policy.layers", "reward.layers"):
        layers, model_layers = config_lib.get_option(config, key), model_config.layers
        config_lib.require(
            layers <= model_layers, f"config.{key} is {layers}, but {config.policy.init} has {model_layers} layers."
        )
    tokens = ChatTokens(hf.load_tokenizer(path), config.policy.system, config.policy.enable_thinking)
    if load:
        return families.from_hf(hf.read_tensors(path), model_config), tokens
    families.check_shapes(hf.read_shapes(path), model_config)
    return families.model_shapes(model_config), tokens


# Options that must have the same values in a run and in the run whose rewards it uses.
COMMON = (
    "data.categories sampler.max_new reward.kind reward.one_for_all reward.rank reward.alpha "
    "reward.targets reward.layers"
).split()


def require_rewards(config: ConfigDict, workdir: bucket.Path) -> None:
    """Raises InputError unless this workdir holds a run's rewards that fit this config."""
    folder = workdir / "rewards"
    config_lib.require(
        folder.is_dir() and Checkpoints(folder, keep=1).latest() is not None,
        f"no rewards in {folder}: name the workdir of a run whose IRL stage has ended.",
    )
    reward_config = workdirs.load_config(workdir)
    # Where the hashes of the policy's contents are recorded, they are compared instead: see `require_same_policy`.
    for key in COMMON if workdirs.recorded_contents(workdir) else (*COMMON, "policy.init"):
        value, reward_value = (config_lib.get_option(options, key) for options in (config, reward_config))
        config_lib.require(
            value == reward_value, f"the rewards in {folder} are of config.{key} = {reward_value!r}, not {value!r}."
        )
    route = ROUTES[config.reward.route]
    if route and route.needs_help:
        learned_C = has_help_reward(reward_config)
        missing = [
            name
            for name, here, learned in zip(config.data.categories, has_help_reward(config), learned_C)
            if here and not learned
        ]
        config_lib.require(
            not missing,
            f"config.reward.route={config.reward.route!r} reads the rewards of {', '.join(missing)}, which the run of "
            f"{folder} did not learn: its data.shares or data.harmless leave them out; take another run's rewards.",
        )


def with_warm_start(context: Context, workdir: bucket.Path) -> Context:
    """The context with the trunk that the rewards of this run read: the product of its stage `sft`, if it has one."""
    if "sft" not in workdirs.load_config(workdir).schedule:
        return context
    folder = workdir / "sft"
    config_lib.require(folder.is_dir(), f"no model in {folder}: name the workdir of a run whose SFT stage has ended.")
    model = families.from_hf(hf.read_tensors(bucket.local_copy(folder)), context.model.config)
    return dataclasses.replace(context, model=model)


def require_same_policy(context: Context, workdir: bucket.Path) -> None:
    """Raises InputError unless the rewards of this workdir read the same trunk as the context's.

    A run's rewards read its policy.init; after a stage `sft` they read its product, the folder sft.
    """
    if context.config.reward.init and "sft" in workdirs.load_config(workdir).schedule:
        folder, init = bucket.local_copy(workdir / "sft"), hf.resolve(context.config.policy.init)
        same = processes.ask_once(lambda: fingerprints.weights_hash(folder) == fingerprints.weights_hash(init))
        config_lib.require(
            same,
            f"the rewards in {workdir} read the model {workdir / 'sft'}, not {context.config.policy.init}: set "
            "config.policy.init to that folder.",
        )
        return
    processes.ask_once(
        lambda: workdirs.require_same(workdir, fingerprints.policy_contents(context.config, context.text))
    )


def load_rewards(context: Context, workdir: bucket.Path) -> reward.Bank:
    """The rewards that a run saved in this workdir. Raises InputError if they do not fit the context's config."""
    require_rewards(context.config, workdir)
    require_same_policy(context, workdir)
    initial = irl.init_rewards(context)
    template = reward.Bank(initial, mean=initial.bias, std=initial.bias)
    return Checkpoints(workdir / "rewards", keep=1).restore(template)[1]


def load_judges(model: str, config: ConfigDict, names: Sequence[str], memory: pathlib.Path) -> dict[str, judges.Judge]:
    """The judges of a policy that is not being trained. The judge `rewards` uses the rewards of the policy's run, on
    the model that the run started from.

    Args:
        model, config: see `workdirs.policy_config`.
        names: rows of JUDGES.
        memory: see `judges.Setting`.

    Raises:
        InputError: a judge cannot be made, such as `rewards` where `model` is no run.
    """
    run_rewards = None
    if "rewards" in names:
        run = files.expand_path(model)
        if not (run / "rewards").is_dir():
            raise InputError(f"the judge 'rewards' needs a run with rewards, and {model} is none.")
        run_config = workdirs.load_config(run)
        context = with_warm_start(load_context(run_config), bucket.parse_path(run_config.reward.init or model))
        bank = load_rewards(context, bucket.parse_path(run_config.reward.init or model))
        run_rewards = (context.model, context.text, bank)
    setting = judges.Setting(config, memory, lambda: hf.resolve(config.encoder.init), run_rewards)
    return {name: judges.JUDGES[name].make(setting) for name in names}
