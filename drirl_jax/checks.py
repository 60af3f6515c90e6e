"""The checks of a config that need no data.

Options that name a choice are rows of the table that implements it (TABLES).
"""

from __future__ import annotations

from typing import Collection

from ml_collections import ConfigDict

from drirl_jax import judges, losses, scaling
from drirl_jax.config import ADAPTED, default, get_option, require
from drirl_jax.data import generators, pipeline, text
from drirl_jax.evals import benchmarks
from drirl_jax.models import flash, reward
from drirl_jax.runtime import endpoint, names, ranges, sinks
from drirl_jax.stages import base, irl, objectives, optimizer
from drirl_jax.stages.rewards import sources

# Options that name a choice, and the table whose rows they may be.
TABLES: dict[str, Collection[str]] = {
    "data.long_prompts": ("error", "drop"),
    "policy.tune": base.POLICIES,
    "policy.dtype": ("float32", "bfloat16"),
    "policy.weights": ("float32", "bfloat16"),
    "policy.attention": flash.ATTENTION,
    "demos.generator": generators.GENERATORS,
    "demos.form": ("explain", "direct"),
    "demos.style": ("draft", "thought"),
    "sampler.batch": pipeline.BATCHES,
    "reward.kind": reward.KINDS,
    "reward.source": sources.SOURCES,
    "reward.route": sources.ROUTES,
    "reward.normalize": reward.NORMALIZE,
    "irl.loss": irl.LOSSES,
    "irl.cut": ("common", "none"),
    "irl.policy": ("frozen", "alternate"),
    "irl.optimizer.name": optimizer.OPTIMIZERS,
    "irl.optimizer.schedule": optimizer.SCHEDULES,
    "align.optimizer.name": optimizer.OPTIMIZERS,
    "align.optimizer.schedule": optimizer.SCHEDULES,
    "align.objective": objectives.OBJECTIVES,
    "dpo.pairs": objectives.PAIRS,
    "dpo.alpha_on": losses.ALPHA_ON,
    "scaling.split": (*text.SPLIT, "llm"),
    "grpo.demonstration": objectives.ROLES,
    "grpo.contrast": objectives.ROLES,
    "grpo.reduce": losses.REDUCE,
    "grpo.ratio": losses.RATIO,
    "evals.judge": judges.judges_of_kind("refusal"),
} | {f"scaling.{option}": rows for option, rows in scaling.TABLES.items()}

# Options that are tuples of words; those of numbers stand in ranges.RANGES.
WORDS = (
    "schedule data.categories data.harmless policy.targets reward.targets evals.benchmarks evals.judges metrics.sinks"
)


def needs_rewards(config: ConfigDict) -> bool:
    """Whether the align stage reads rewards that IRL learned."""
    return objectives.OBJECTIVES[config.align.objective].samples and sources.SOURCES[config.reward.source].bank


def validate(config: ConfigDict) -> None:
    """Raises InputError with one sentence for a value that cannot be run."""
    for check in CHECKS:
        check(config)


def _values(config: ConfigDict) -> None:
    """Each value alone: its type, its table, its range."""
    ranges.check(config, ranges.RANGES, "config")
    for key in WORDS.split():
        given = get_option(config, key)
        require(all(isinstance(x, str) for x in given), f"config.{key} is {given}: give words alone.")
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
    require(config.demos.separator.strip(), "config.demos.separator is blank: it must tell the draft from the answer.")


def _schedule(config: ConfigDict) -> None:
    """The stages, and the rewards that they need."""
    stages, schedule = default().schedule, tuple(config.schedule)
    require(
        schedule and schedule == tuple(stage for stage in stages if stage in schedule),
        f"config.schedule is {schedule}: give {stages}, or some of them in this order.",
    )
    require(
        "evals" not in schedule or "align" in schedule, "config.schedule has 'evals', which needs 'align' before it."
    )
    learned = "irl" in schedule
    require(
        learned or config.reward.init or "align" not in schedule or not needs_rewards(config),
        f"config.schedule is {schedule}, but config.reward.source={config.reward.source!r} needs rewards: put 'irl' "
        "first, or name a finished run in config.reward.init.",
    )
    require(
        not (learned and config.reward.init),
        f"config.reward.init is {config.reward.init!r}, but 'irl' in the schedule learns rewards: leave one out.",
    )
    benchmarks.validate(config.evals)
    require(
        "rewards" not in config.evals.judges or learned or config.reward.init,
        "config.evals.judges has 'rewards', which the IRL stage learns: put 'irl' into the schedule, or name a run in "
        "config.reward.init.",
    )


def _data(config: ConfigDict) -> None:
    """Categories, their shares and kinds."""
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
    two_kinds = len({name in config.data.harmless for name in config.data.categories}) == 2
    contrasted = config.irl.contrast > 0 or objectives.ROLES[config.grpo.contrast].counts
    require(
        two_kinds or not (contrasted or config.sampler.batch == "kinds"),
        "config.irl.contrast, grpo.contrast and sampler.batch='kinds' need harmful and harmless categories: see "
        "config.data.harmless.",
    )


def _elsewhere(config: ConfigDict) -> None:
    """Other processes and endpoints."""
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
        (config.judge, config.reward.source == "judge"),
        (config.scaling.endpoint, config.scaling.split == "llm"),
        (config.demos.endpoint, config.demos.generator == "endpoint"),
        (config.evals.endpoint, "endpoint" in (config.evals.judge, *config.evals.judges)),
    ):
        if used:
            endpoint.check_endpoint(section)


def _weights(config: ConfigDict) -> None:
    """In which type the policy's weights may lie."""
    half, policy = config.policy.weights == "bfloat16", config.policy
    require(
        not half or policy.tune == "lora",
        f"config.policy.weights is 'bfloat16', but config.policy.tune is {policy.tune!r}, which trains the weights, "
        "and bfloat16 would lose most of an update: set weights to 'float32', or tune to 'lora'.",
    )
    require(
        not half or policy.dtype == "bfloat16",
        f"config.policy.weights is 'bfloat16', but config.policy.dtype is {policy.dtype!r}: adapters merged for "
        "sampling would be rounded as those that are trained are not; set both to 'bfloat16', or weights to 'float32'.",
    )


def _rewards(config: ConfigDict) -> None:
    """The rewards and what reads them."""
    require(
        not config.reward.one_for_all or config.reward.route == "category",
        f"config.reward.route is {config.reward.route!r}, but config.reward.one_for_all leaves no choice: set it to "
        "'category'.",
    )
    weights = len(config.reward.weights)
    require(
        weights in (0, len(config.data.categories)),
        f"config.reward.weights has {weights} numbers: give one for each of the {len(config.data.categories)} "
        "categories, or () for equal ones.",
    )
    require(
        not weights or max(config.reward.weights) > 0,
        f"config.reward.weights is {config.reward.weights}: every reward would be 0, and nothing could be learned; "
        "give one of them a weight above 0.",
    )
    for key, adapted in (("policy", config.policy.tune), ("reward", config.reward.kind)):
        require(
            adapted != "lora" or config[key].targets,
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


def _alignment(config: ConfigDict) -> None:
    """The objective, its groups and coefficients."""
    own, other = (objectives.ROLES[config.grpo[name]] for name in ("demonstration", "contrast"))
    require(
        other <= own,
        f"config.grpo.contrast is {config.grpo.contrast!r}: it may have no part that config.grpo.demonstration "
        f"({config.grpo.demonstration!r}) has not.",
    )
    require(
        config.grpo.harmless_wrong == 1 or other.counts,
        f"config.grpo.harmless_wrong is {config.grpo.harmless_wrong}, but it takes the reward of a demonstration of "
        "the other kind to tell: set config.grpo.contrast to 'baseline' or 'member'.",
    )
    require(
        config.scaling.baseline != "group" or config.scaling.per == "response",
        "config.scaling.baseline='group' compares a response with its own group, so that the mean over the group says "
        "nothing: set config.scaling.per to 'response'.",
    )
    objective = config.align.objective
    require(
        objective == "grpo" or config.grpo.demonstration == "apart",
        f"config.grpo.demonstration is {config.grpo.demonstration!r}, but config.align.objective is {objective!r}, "
        "which compares no group: set it to 'apart', and grpo.contrast too.",
    )
    require(
        objectives.OBJECTIVES[objective].samples or config.scaling.combine == "none",
        f"config.align.objective is {objective!r}, which has no samples whose hardness could scale it: set "
        "config.scaling.combine to 'none'.",
    )
    require(
        config.align.group > 1 or config.grpo.demonstration != "apart" or objective != "grpo",
        "config.align.group is 1: a group-relative advantage needs at least 2 responses, or the demonstration in the "
        "group (config.grpo.demonstration).",
    )
    require(
        config.align.group > 1 or objective != "dpo" or config.dpo.pairs != "self",
        "config.align.group is 1: config.dpo.pairs='self' needs a best and a worst of at least 2 responses.",
    )


def _batches(config: ConfigDict) -> None:
    """What must divide what."""
    batch, parts = config.align.batch, config.align.minibatches
    require(batch % parts == 0, f"config.align.minibatches ({parts}) must divide config.align.batch ({batch}).")
    for key, batch in (("irl", config.irl.batch), ("align", config.align.batch // config.align.minibatches)):
        parts = config[key].accumulate
        require(batch % parts == 0, f"config.{key}.accumulate ({parts}) must divide the {batch} prompts of an update.")
    rounds, steps = config.irl.rounds, config.irl.steps
    require(steps % rounds == 0, f"config.irl.rounds ({rounds}) must divide config.irl.steps ({steps}).")


# In this order: a later one may rely on what an earlier one has found.
CHECKS = (_values, _schedule, _data, _elsewhere, _weights, _rewards, _alignment, _batches)
