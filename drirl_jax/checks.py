"""The checks of a config that need no data.

An option that is a choice must name a row of the table that implements the choice (TABLES).
"""

from __future__ import annotations

from typing import Callable, Collection, Iterable, NamedTuple

from ml_collections import ConfigDict

from drirl_jax import judges, losses, scaling
from drirl_jax.config import ADAPTED, STAGES, get_option, require
from drirl_jax.data import generators, pipeline, text
from drirl_jax.evals import benchmarks
from drirl_jax.models import flash, reward
from drirl_jax.runtime import endpoint, names, ranges, sinks
from drirl_jax.stages import base, irl, objectives, optimizer, sft
from drirl_jax.stages.rewards import routes, sources
from drirl_jax.types import InputError

# Option that is a choice -> the table whose rows it can name.
TABLES: dict[str, Collection[str]] = {
    "data.long_prompts": ("error", "drop"),
    "policy.tune": base.POLICIES,
    "policy.dtype": ("float32", "bfloat16"),
    "policy.weights": ("float32", "bfloat16"),
    "policy.attention": flash.ATTENTION,
    "demos.generator": generators.GENERATORS,
    "demos.form": ("explain", "direct"),
    "demos.style": ("draft", "thought"),
    "data.mixing": pipeline.BATCHES,
    "reward.kind": reward.KINDS,
    "reward.source": sources.SOURCES,
    "reward.route": routes.ROUTES,
    "reward.normalize": reward.NORMALIZE,
    "sft.harmless": sft.HARMLESS,
    "sft.optimizer.schedule": optimizer.SCHEDULES,
    "irl.loss": irl.LOSSES,
    "irl.cut": ("common", "none"),
    "irl.policy": ("frozen", "alternate"),
    "irl.optimizer.schedule": optimizer.SCHEDULES,
    "align.optimizer.schedule": optimizer.SCHEDULES,
    "align.objective": objectives.OBJECTIVES,
    "dpo.pairs": objectives.dpo.PAIRS,
    "dpo.alpha_on": losses.ALPHA_ON,
    "scaling.split": (*text.SPLIT, "llm"),
    "group.demonstration": objectives.grpo.ROLES,
    "group.contrast": objectives.grpo.ROLES,
    "policy_loss.reduce": losses.REDUCE,
    "policy_loss.ratio": losses.RATIO,
} | {f"scaling.{option}": rows for option, rows in scaling.TABLES.items()}

# Options that are tuples of words; tuples of numbers are in ranges.RANGES.
WORDS = (
    "schedule data.categories data.harmless policy.targets reward.targets evals.benchmarks evals.judges metrics.sinks"
)


def needs_rewards(config: ConfigDict) -> bool:
    """Whether the align stage reads rewards that IRL learned."""
    objective, source = objectives.OBJECTIVES[config.align.objective], sources.SOURCES[config.reward.source]
    return objective.needs_samples and source.needs_bank


class Scope(NamedTuple):
    """Options that only some objectives read. All other objectives ignore them.

    Attributes:
        keys: what the dotted keys of these options begin with.
        applies: (the name of an objective) -> whether it reads them.
        reason: why another objective does not, as the end of a sentence about it.
    """

    keys: tuple[str, ...]
    applies: Callable[[str], bool]
    reason: str


SCOPES = (
    Scope(("group.",), lambda name: name == "grpo", "compares no group"),
    Scope(("ppo.",), lambda name: name == "ppo", "has no value head"),
    Scope(("dpo.",), lambda name: name == "dpo", "compares no pairs"),
    Scope(
        ("scaling.", "reward.", "constraint.", "align.group_size"),
        lambda name: objectives.OBJECTIVES[name].needs_samples,
        "samples no responses that a reward could score",
    ),
    Scope(
        ("policy_loss.clip_", "policy_loss.beta_kl", "policy_loss.ratio"),
        lambda name: name in ("grpo", "ppo"),
        "has no clipped ratio and no KL term",
    ),
)


def refuse_ignored(config: ConfigDict, keys: Iterable[str]) -> None:
    """Raises InputError for the first option that the user sets and that the objective would ignore.

    A config file may set such an option, so that `--config.align.objective` alone chooses another objective.

    Args:
        keys: the dotted keys that the user gave as flags.
    """
    objective = config.align.objective
    for key in keys:
        for scope in SCOPES:
            if key.startswith(scope.keys) and not scope.applies(objective) and not _is_for_irl(config, key):
                raise InputError(
                    f"--config.{key} has no effect: config.align.objective is {objective!r}, which {scope.reason}. "
                    "Leave the flag out, or choose another objective."
                )


def _is_for_irl(config: ConfigDict, key: str) -> bool:
    """Whether the option also describes the rewards that the IRL stage learns."""
    return key.startswith("reward.") and "irl" in config.schedule


def validate(config: ConfigDict) -> None:
    """Raises InputError with one sentence for the first value that is not allowed."""
    for check in CHECKS:
        check(config)


def _values(config: ConfigDict) -> None:
    """Checks each value alone: its type, its table, its range."""
    ranges.check(config, ranges.RANGES, "config")
    for key in WORDS.split():
        words = get_option(config, key)
        require(all(isinstance(word, str) for word in words), f"config.{key} is {words}: give only words.")
    for key, rows in TABLES.items():
        require(
            get_option(config, key) in rows,
            f"config.{key} is {get_option(config, key)!r}: choose one of {', '.join(rows)}.",
        )
    clip = tuple(config.scaling.clip)
    require(
        not clip or (len(clip) == 2 and clip[0] < clip[1]),
        f"config.scaling.clip is {clip}: give the lowest and the highest α, as (0.5, 2.0), or () for no bounds.",
    )
    unknown = set(config.metrics.sinks) - set(sinks.SINKS)
    require(not unknown, f"config.metrics.sinks names {sorted(unknown)}: choose among {', '.join(sinks.SINKS)}.")
    require(config.metrics.project.strip(), "config.metrics.project is blank: name a project.")


def _schedule(config: ConfigDict) -> None:
    """Checks the stages, and the rewards that they need."""
    stages, schedule = STAGES, tuple(config.schedule)
    require(
        bool(schedule) and schedule == tuple(stage for stage in stages if stage in schedule),
        f"config.schedule is {schedule}: give {stages}, or some of them in this order.",
    )
    require(
        "evals" not in schedule or "sft" in schedule or "align" in schedule,
        "config.schedule has 'evals', which needs 'sft' or 'align' before it.",
    )
    learns_rewards = "irl" in schedule
    require(
        learns_rewards or config.reward.init or "align" not in schedule or not needs_rewards(config),
        f"config.schedule is {schedule}, but config.reward.source={config.reward.source!r} needs rewards: put 'irl' "
        "first, or name a finished run in config.reward.init.",
    )
    require(
        not (learns_rewards and config.reward.init),
        f"config.reward.init is {config.reward.init!r}, but 'irl' in the schedule learns rewards: leave one out.",
    )
    require(
        not ("sft" in schedule and config.reward.init),
        f"config.reward.init is {config.reward.init!r}, but 'sft' in the schedule changes the model that rewards read: "
        "leave 'sft' out.",
    )
    benchmarks.validate(config.evals)
    if "evals" in schedule or config.reward.source == "rules":
        judges.first_of_kind(config.evals.judges, "refusal")
    require(
        "rewards" not in config.evals.judges or learns_rewards or config.reward.init,
        "config.evals.judges has 'rewards', which the IRL stage learns: put 'irl' into the schedule, or name a run in "
        "config.reward.init.",
    )


def _data(config: ConfigDict) -> None:
    """Checks the categories, their shares and their kinds (harmful, harmless)."""
    require(
        len(set(config.data.categories)) == len(config.data.categories),
        "config.data.categories repeats a name.",
    )
    names.check("config.data.categories", config.data.categories, names.AGGREGATES)
    shares = tuple(config.data.shares)
    require(
        not shares or (len(shares) == len(config.data.categories) and max(shares) > 0),
        f"config.data.shares is {shares}: give a number in [0, 1] for each of the {len(config.data.categories)} "
        "categories, one of them above 0, or () for all records.",
    )
    unknown = set(config.data.harmless) - set(config.data.categories)
    require(not unknown, f"config.data.harmless names {sorted(unknown)}, which config.data.categories lacks.")
    has_both_kinds = len({name in config.data.harmless for name in config.data.categories}) == 2
    uses_contrast = config.irl.contrast > 0 or objectives.grpo.group_roles(config)[1].counts
    require(
        has_both_kinds or not (uses_contrast or config.data.mixing == "kinds"),
        "config.irl.contrast, group.contrast and data.mixing='kinds' need harmful and harmless categories: see "
        "config.data.harmless.",
    )


def _connections(config: ConfigDict) -> None:
    """Checks how other processes and servers are reached."""
    d = config.distributed
    require(
        d.auto or d.process < d.processes,
        f"config.distributed.process is {d.process}, but there are {d.processes} processes, numbered from 0.",
    )
    require(
        d.auto or d.processes == 1 or ":" in d.coordinator,
        f"config.distributed.coordinator is {d.coordinator!r}: give the HOST:PORT of process 0.",
    )
    for section, used in (
        (config.reward.endpoint, config.reward.source == "judge"),
        (config.scaling.endpoint, config.scaling.split == "llm"),
        (config.demos.endpoint, config.demos.generator == "endpoint"),
        (config.evals.endpoint, "endpoint" in config.evals.judges),
    ):
        if used:
            endpoint.check_endpoint(section)


def _weights(config: ConfigDict) -> None:
    """Checks the type of the policy's weights."""
    is_bfloat16, policy = config.policy.weights == "bfloat16", config.policy
    require(
        not is_bfloat16 or policy.tune == "lora",
        f"config.policy.weights is 'bfloat16', but config.policy.tune is {policy.tune!r}, which trains the weights, "
        "and bfloat16 would lose most of an update: set weights to 'float32', or tune to 'lora'.",
    )
    require(
        not is_bfloat16 or policy.dtype == "bfloat16",
        f"config.policy.weights is 'bfloat16', but config.policy.dtype is {policy.dtype!r}: sampling would round the "
        "merged adapters, while training does not; set both to 'bfloat16', or weights to 'float32'.",
    )


def _rewards(config: ConfigDict) -> None:
    """Checks the rewards and the options that depend on them."""
    require(
        not config.reward.one_for_all or config.reward.route == "category",
        f"config.reward.route is {config.reward.route!r}, but config.reward.one_for_all leaves no choice: set it to "
        "'category'.",
    )
    route = routes.ROUTES[config.reward.route]
    if route and route.needs_help:
        _help_and_harm(config)
    weight_count = len(config.reward.weights)
    require(
        weight_count in (0, len(config.data.categories)),
        f"config.reward.weights has {weight_count} numbers: give one for each of the {len(config.data.categories)} "
        "categories, or () for equal ones.",
    )
    require(
        not weight_count or max(config.reward.weights) > 0,
        f"config.reward.weights is {config.reward.weights}: every reward would be 0, and nothing could be learned; "
        "give one of them a weight above 0.",
    )
    for key, training in (("policy", config.policy.tune), ("reward", config.reward.kind)):
        require(
            training != "lora" or config[key].targets,
            f"config.{key}.targets is (), so that nothing would be trained: name some of {', '.join(ADAPTED)}.",
        )
        unknown = set(config[key].targets) - set(ADAPTED)
        require(
            not unknown,
            f"config.{key}.targets names {sorted(unknown)}: choose among {', '.join(ADAPTED)}.",
        )
    require(
        config.irl.policy == "frozen" or (config.irl.rounds > 1 and needs_rewards(config)),
        "config.irl.policy is 'alternate', but the inner policy never moves: it needs config.irl.rounds of 2 or more, "
        "and an align.objective and a reward.source that read rewards.",
    )


def _help_and_harm(config: ConfigDict) -> None:
    """Checks what a route needs that weighs help against harm."""
    name = config.reward.route
    require(
        config.reward.source == "irl",
        f"config.reward.route is {name!r}, which reads the rewards of several categories, but config.reward.source is "
        f"{config.reward.source!r}, which has one for all: set source to 'irl', or route to 'category'.",
    )
    require(
        set(config.data.categories) > set(config.data.harmless) and any(routes.has_help_reward(config)),
        f"config.reward.route is {name!r}, which weighs help against harm: it needs a harmful category, and a harmless "
        "one with a reward; see config.data.harmless, and leave it a share above 0 in config.data.shares.",
    )
    c = config.constraint
    require(
        c.initial <= c.max_multiplier,
        f"config.constraint.initial is {c.initial}, above config.constraint.max_multiplier = {c.max_multiplier}: lower "
        "it, or raise the bound.",
    )


def _alignment(config: ConfigDict) -> None:
    """Checks the objective, its groups and coefficients."""
    objective = config.align.objective
    own_role, contrast_role = objectives.grpo.group_roles(config)
    require(
        contrast_role <= own_role,
        f"config.group.contrast is {config.group.contrast!r}, but config.group.demonstration is only "
        f"{config.group.demonstration!r}: set contrast to the same value.",
    )
    require(
        objective != "grpo" or config.group.harmless_refusals == 1 or contrast_role.counts,
        f"config.group.harmless_refusals is {config.group.harmless_refusals}, which needs the reward of a "
        "demonstration of the other kind: set config.group.contrast to 'baseline' or 'member'.",
    )
    require(
        not objectives.OBJECTIVES[objective].needs_samples
        or config.scaling.baseline != "group"
        or config.scaling.per == "response",
        "config.scaling.baseline='group' compares a response with its own group, so the mean over the group has no "
        "meaning: set config.scaling.per to 'response'.",
    )
    require(
        config.align.group_size > 1 or config.group.demonstration != "apart" or objective != "grpo",
        "config.align.group_size is 1: a group-relative advantage needs at least 2 responses, or the demonstration "
        "in the group (config.group.demonstration).",
    )
    require(
        config.align.group_size > 1 or objective != "dpo" or config.dpo.pairs != "self",
        "config.align.group_size is 1: config.dpo.pairs='self' needs a best and a worst of at least 2 responses.",
    )


def _batches(config: ConfigDict) -> None:
    """Checks that batches and steps divide evenly."""
    prompts, parts = config.align.batch, config.align.minibatches
    require(prompts % parts == 0, f"config.align.minibatches ({parts}) must divide config.align.batch ({prompts}).")
    prompts_of_update = {"sft": config.sft.batch, "irl": config.irl.batch, "align": prompts // parts}
    for key, prompts in prompts_of_update.items():
        parts = config[key].accumulate
        require(
            prompts % parts == 0, f"config.{key}.accumulate ({parts}) must divide the {prompts} prompts of an update."
        )
    rounds, steps = config.irl.rounds, config.irl.steps
    require(steps % rounds == 0, f"config.irl.rounds ({rounds}) must divide config.irl.steps ({steps}).")


# The order matters: a check may rely on the ones before it.
CHECKS = (_values, _schedule, _data, _connections, _weights, _rewards, _alignment, _batches)
