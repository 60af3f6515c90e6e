"""Stage 2, alignment: the policy learns from scored samples, scaled by the hardness of prompts (DR-IRL section 3).

`Alignment.collect` is a step from top to bottom: samples, rewards, coefficients, and the batch of the objective.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from drirl_jax import scaling
from drirl_jax.data import pipeline
from drirl_jax.data.examples import Examples, other_kind_demonstrations, require_both_kinds
from drirl_jax.models import reward, transformer
from drirl_jax.models.transformer import Transformer, TrunkStates
from drirl_jax.rollout import FINISH, Rollout
from drirl_jax.runtime import sharding
from drirl_jax.stages import optimizer, samples
from drirl_jax.stages.base import (
    POLICIES,
    Context,
    Stage,
    State,
    category_means,
    make_group,
    on_sampling_mesh,
    sample_batch,
)
from drirl_jax.stages.hardness import Hardness
from drirl_jax.stages.objectives import OBJECTIVES
from drirl_jax.stages.objectives.base import TOKEN_SHARE, Params, ScoredGroup, init_params
from drirl_jax.stages.objectives.grpo import group_roles
from drirl_jax.stages.rewards import constraint
from drirl_jax.stages.rewards.routes import HelpHarm
from drirl_jax.stages.rewards.sources import SOURCES
from drirl_jax.types import Array, Group, PyTree, TrainState

run_trunk = jax.jit(transformer.run_trunk, static_argnames="layers")
# Scalars (means over tokens) of the first update of a step only: there the policy still equals the sampling policy.
FIRST_UPDATE_SCALARS = ("sampler_gap",)


def make_transformation(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser of config.align: one update for each minibatch of each epoch of each step."""
    c = config.align
    return optimizer.make(c.optimizer, c.steps * c.epochs * c.minibatches)


def make_update(config: ConfigDict, transformation: optax.GradientTransformation) -> jax.stages.Wrapped:
    """A jitted function (TrainState, trunk, batch) -> (TrainState, scalars): one pass, an update for each minibatch."""
    c, objective, policy = config.align, OBJECTIVES[config.align.objective], POLICIES[config.policy.tune]

    @partial(jax.jit, donate_argnums=0)
    def updated(train_state: TrainState, trunk, batch):
        stage_loss = partial(objective.loss, trunk, policy, config)

        # No -1 in the shape: without a shared prefix its array is empty.
        def split_minibatches(x):
            return x.reshape(c.minibatches, x.shape[0] // c.minibatches, *x.shape[1:])

        minibatches = jax.tree.map(split_minibatches, batch)
        train_state, scalars = jax.lax.scan(
            lambda state, minibatch: optimizer.step(transformation, stage_loss, state, minibatch, c.accumulate),
            train_state,
            minibatches,
        )
        means = {name: value.mean() for name, value in scalars.items() if name != TOKEN_SHARE}
        for name in FIRST_UPDATE_SCALARS:
            if name in scalars:  # a minibatch's value carries its share of the tokens: divide by the share
                means[name] = scalars[name][0] / jnp.maximum(scalars[TOKEN_SHARE][0], 1e-6)
        # Once more after the scan: XLA chooses a new layout for its result, and the next step would compile again.
        return sharding.constrain_tree(train_state), means

    return updated


class Carry(NamedTuple):
    """What the stage carries from step to step, beside the train state.

    Attributes:
        stats: the running means of the hardness.
        multipliers: [C] λ_c of the constraint (see `rewards/constraint.py`); None without it.
    """

    stats: scaling.Stats
    multipliers: Array | None = None


def make(context: Context, bank: reward.Bank | None, keep: samples.Keep | None = None) -> Stage:
    """The alignment stage. Its product is the policy's parameters (see `base.POLICIES`).

    Args:
        bank: the rewards that IRL learned. None if neither the objective nor the reward source reads them.
        keep: receives the samples of the steps that config.metrics.samples chooses, before their update.
    """
    return Alignment(context, keep=keep).stage(bank)


class Alignment:
    """The parts of the alignment stage, which `stage` puts together. Stages of other rewards share its compiled update.

    Args:
        stream: the stream of random numbers of the samples (a key of `base.RANDOM_STREAMS`).
        keep: see `make`.
    """

    def __init__(self, context: Context, stream: str = "align_samples", keep: samples.Keep | None = None):
        self.context, self.config, self.stream = context, context.config, stream
        config, c = context.config, context.config.align
        self.policy, self.objective = POLICIES[config.policy.tune], OBJECTIVES[c.objective]
        self.train = context.examples["train"]
        if self.objective.needs_samples:
            self.reward_source = SOURCES[config.reward.source].make(context)
        rows_C = self.train.rows_by_category(len(config.data.categories))
        self.batches = pipeline.batches(config.data, rows_C, c.batch, config.seed, self.train.harmless)
        self.has_contrast = group_roles(config)[1].counts
        if self.has_contrast:
            require_both_kinds(self.train, "train")
        if self.objective.needs_samples:
            self.hardness = Hardness(context)
        self.transformation = make_transformation(config)
        self.updated = make_update(config, self.transformation)
        self.keep = keep
        self.kept_steps = samples.steps_kept(c.steps, config.metrics.samples) if keep else set()

    def stage(self, bank: reward.Bank | None) -> Stage:
        """The stage that learns from these rewards; see `make`."""
        return Stage(
            steps=self.config.align.steps,
            init=self.init,
            collect=partial(self.collect, bank) if self.objective.needs_samples else self.collect_demonstrations,
            update=self.update,
            evaluate=lambda state, step: {},
            finish=lambda state: optimizer.product(state.train).policy,
            bar_scalars=("loss", "reward", "gap", "kl", "alpha_d", "alpha_m", "length"),
        )

    def init(self) -> State:
        """The state before the first step."""
        trunk = self.context.model
        policy_params = self.policy.init(self.config.policy, trunk, self.context.key("adapter"))
        params = init_params(self.objective, policy_params, trunk)
        stats = scaling.Stats.fresh(len(self.config.data.categories))
        carry = Carry(stats, constraint.initial_multipliers(self.config))
        return State(optimizer.init(self.transformation, params), carry)

    # ------------------------------------------------------------------------------------------ collect

    def collect_demonstrations(self, state: State, step: int) -> tuple[Any, Carry, dict[str, float]]:
        """The batch of an objective that learns from demonstrations alone."""
        examples = self.train.take(np.asarray(self.batches[step]))
        group = make_group(examples, examples.demo[:, None], examples.demo_len[:, None])
        scored = ScoredGroup(group)
        batch, _ = self.objective.make_batch(self.context, self.context.model, state.train.params, scored)
        return batch, state.carry, {}

    def collect(self, bank: reward.Bank | None, state: State, step: int) -> tuple[Any, Carry, dict[str, float]]:
        """The batch of an objective that learns from samples, which these rewards score."""
        config, rows = self.config, np.asarray(self.batches[step])
        examples, params = self.train.take(rows), state.train.params
        model = self.sampling_model(params)
        rollout, group = self.sample(model, examples, step)
        trunk_states, scores = self.score(bank, examples, group)
        reward_PM, multiplier_C = constraint.constrain(config, state.carry.multipliers, scores, group.category)
        # The device computes the rewards while the host splits and embeds the texts.
        response_PGT, length_PG = sharding.fetch((rollout.response, rollout.response_len))
        parts = self.hardness.parts(rows, response_PGT, length_PG)
        stats = state.carry.stats if step else self.hardness.calibrated(state.carry.stats, model)
        alpha_PG, stats, info = self.hardness.coefficients(stats, parts, reward_PM, group.category)
        kept_PG = info["kept"] if config.scaling.drop_masked else jnp.ones_like(info["kept"])
        scored = ScoredGroup(
            group, rollout.logp, reward_PM, alpha_PG, kept_PG,
            trunk_states, self.context.shared_layers.policy, examples.harmless,
        )  # fmt: skip
        batch, objective_info = self.objective.make_batch(self.context, model, params, scored)
        names = config.data.categories
        if self.keep and step + 1 in self.kept_steps:
            values = self.sample_values(scored, batch, info)
            self.keep(step + 1, samples.rows(names, self.context.text, examples, response_PGT, length_PG, values))
        scalars = batch_scalars(names, examples, rollout, reward_PM, info | objective_info)
        scalars |= constraint.scalars(config, state.carry.multipliers, scores, examples)
        return batch, Carry(stats, multiplier_C), scalars

    def sampling_model(self, params: Params) -> Transformer:
        """The model that samples: the policy; for an objective that is offline the reference."""
        if self.objective.offline(self.config):
            return self.context.model
        return self.policy.merge(self.context.model, params.policy)

    def sample(self, model: Transformer, examples: Examples, step: int) -> tuple[Rollout, Group]:
        """G samples of each prompt; and the group of them, the demonstration and perhaps one of the other kind."""
        context, config = self.context, self.config
        rollout = sample_batch(
            context, on_sampling_mesh(context, model), examples, context.key(self.stream, step),
            group=config.align.group_size, max_new=config.sampler.max_new, temperature=config.sampler.temperature,
        )  # fmt: skip
        group = make_group(examples, *context.clock.mark("rollout", (rollout.response, rollout.response_len)))
        group = group.join(jnp.asarray(examples.demo), jnp.asarray(examples.demo_len))
        if self.has_contrast:
            demo_PT, demo_len_P = other_kind_demonstrations(examples, self.train, [config.seed, step])
            group = group.join(jnp.asarray(demo_PT), jnp.asarray(demo_len_P))
        return rollout, group

    def score(
        self, bank: reward.Bank | None, examples: Examples, group: Group
    ) -> tuple[TrunkStates | None, Array | HelpHarm]:
        """(the group's states after the shared layers, if there are any; [P, M] rewards of its members)."""
        context, shared = self.context, self.context.shared_layers
        trunk_states = run_trunk(context.model, group, layers=shared.layers) if shared.layers else None
        context.clock.mark("trunk", trunk_states)
        scores = self.reward_source(bank, examples, group, trunk_states if shared.rewards else None)
        return trunk_states, context.clock.mark("rewards", scores)

    def sample_values(self, scored: ScoredGroup, batch: PyTree, info: dict[str, Any]) -> dict[str, np.ndarray]:
        """The numbers of each prompt [P] and of each sample [P, G] for samples.jsonl."""
        values = {
            "reward": scored.reward[:, : scored.num_samples],
            "demo_reward": scored.demo_reward,
            "alpha": scored.alpha,
            "masked": ~info["kept"],
            "alpha_d": info["alpha_d"],
            "alpha_m": info["alpha_m"],
        }
        values = sharding.fetch(values | self.objective.response_advantages(self.config, scored, batch))
        if self.config.scaling.drop_masked and "scaled" in values:  # the loss drops these responses
            values["scaled"] = np.where(values["masked"], np.nan, values["scaled"])
        return values

    # ------------------------------------------------------------------------------------------ update

    def update(self, train_state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        """config.align.epochs passes over the batch."""
        train_state, scalars = self.updated(train_state, self.context.model, batch)
        first_update = {name: scalars[name] for name in FIRST_UPDATE_SCALARS if name in scalars}
        for _ in range(1, self.config.align.epochs):
            train_state, scalars = self.updated(train_state, self.context.model, batch)
        return train_state, scalars | first_update


def batch_scalars(
    names: Sequence[str], examples: Examples, rollout: Rollout, reward_PM: Array, info: dict[str, Any]
) -> dict[str, float]:
    """The scalars of a batch, by category.

    Args:
        names: the categories' names.
        reward_PM: rewards of the group's members; the G samples come first.
        info: more values to average, [P] or [P, G] each.
    """
    reward_PM, info, rollout = sharding.fetch((reward_PM, info, rollout))
    reward_PG = reward_PM[:, : rollout.response_len.shape[1]]
    values = {
        "reward": reward_PG,
        "length": rollout.response_len,
        # Its mean estimates the entropy of the sampling policy.
        "surprisal": -rollout.logp.sum(axis=-1) / rollout.response_len,
        "zero_spread": np.ptp(reward_PG, axis=1) == 0,
    }
    scalars = {}
    for name, value in (values | info).items():
        scalars |= category_means(value, examples.category, names, name)
    return scalars | {
        "reward_std": float(reward_PG.std(axis=1).mean()),
        "bad_rewards": float((~np.isfinite(reward_PM)).sum()),
        "stopped": float((rollout.finish == FINISH.index("stop")).mean()),
    }
