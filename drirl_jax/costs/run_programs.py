"""The jitted functions of a run with their arguments as shapes, so that a compiler can measure them."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from drirl_jax import rollout
from drirl_jax.models import reward
from drirl_jax.models.architecture import Config
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime import sharding
from drirl_jax.stages import align, irl, objectives, optimizer
from drirl_jax.stages.base import POLICIES, Context, reshard
from drirl_jax.types import Group, PyTree


class Program(NamedTuple):
    """A jitted function of the run.

    Attributes:
        name: what it does.
        times: how often it runs in an alignment step; 0 for the other stages.
        traced: () -> the result of `jax.jit(f).trace(*args)`.
        args: its arguments, as shapes with shardings.
        loop: how often its while loops run, if it has any.
        mesh: its mesh, if not the current one.
    """

    name: str
    times: int
    traced: Callable
    args: tuple
    loop: int = 1
    mesh: jax.sharding.Mesh | None = None


def batch_shapes(tree: PyTree) -> PyTree:
    """Shapes of a batch, sharded by their first axis, the prompts."""
    return sharding.sharded_shapes(tree, lambda path, x: ("prompts",))


def id_shapes(*shape: int) -> jax.ShapeDtypeStruct:
    """Shape of an int32 array of a batch."""
    return batch_shapes(jax.ShapeDtypeStruct(shape, jnp.int32))


def group_shapes(P: int, S: int, G: int, T: int) -> Group:
    """The shapes of a group."""
    return Group(id_shapes(P, S), id_shapes(P), id_shapes(P, G, T), id_shapes(P, G), id_shapes(P))


def float_shapes(*shape: int) -> jax.ShapeDtypeStruct:
    """Shape of a float32 array of a batch."""
    return batch_shapes(jax.ShapeDtypeStruct(shape, jnp.float32))


class RunPrograms:
    """The functions of a run that hold the model, for the current mesh.

    It plans GRPO with rewards of the IRL stage, where the prompt's category selects the reward. Nothing is executed:
    the devices of the mesh need not exist.

    Attributes:
        config: of the run.
        context: the run's context with shapes for the model, and without texts.
        train: the train state of the alignment.
        bank: the rewards.
    """

    def __init__(self, config: ConfigDict, shape: Config):
        model = sharding.sharded_shapes(jax.eval_shape(lambda: Transformer(shape, jax.random.key(0))))
        unread: Any = None  # no program reads the tokenizer or the encoder
        self.config, self.context = config, Context(config, model, unread, unread, {})
        self.model, self.policy = model, POLICIES[config.policy.tune]
        self.objective = objectives.OBJECTIVES[config.align.objective]
        self.transformation = align.make_transformation(config)
        self.train = sharding.sharded_shapes(jax.eval_shape(self._init_train, model))
        rewards = sharding.sharded_shapes(jax.eval_shape(self._init_rewards, model))
        reward_shape = sharding.sharded_shapes(jax.eval_shape(lambda: jnp.zeros(rewards.bias.shape)))
        self.bank = reward.Bank(rewards, reward_shape, reward_shape)
        self.sampling_mesh = sharding.sampling_mesh(config.sampler.mesh, config.align.batch, jax.sharding.get_mesh())

    @property
    def resident(self) -> list[PyTree]:
        """The trees that are always on the devices: trunk, train state, reward bank."""
        return [self.model, self.train, self.bank]

    def scheduled(self) -> Iterator[Program]:
        """Yields the programs of an alignment step, then those of the other stages of the schedule."""
        yield from self.align()
        if "irl" in self.config.schedule:
            yield from self.irl()
        if "evals" in self.config.schedule:
            c = self.config.evals
            P = sharding.round_up_prompts(c.batch)
            yield from self.sampling("evals sample", 0, self.model, (P, 1, c.max_new), c.temperature)

    def align(self) -> Iterator[Program]:
        """Yields the programs of an alignment step: sampling, scoring, reference and update."""
        config, model, shared = self.config, self.model, self.context.shared_layers
        P, G, S, T = config.align.batch, config.align.group_size, config.data.max_prompt, config.sampler.max_new
        merged_model = model
        if config.policy.tune == "lora":
            args = (model, self.train.params.policy)
            merged_model = sharding.sharded_shapes(jax.eval_shape(self.policy.merge, *args))
            yield self._program("merge", 1, self.policy.merge, args)
        yield from self.sampling("sample", 1, merged_model, (P, G, T), config.sampler.temperature)
        full_group = group_shapes(P, S, G + 1 + objectives.grpo.group_roles(config)[1].counts, T)
        trunk_states = None
        if shared.layers:
            trunk = (model, full_group)
            yield self._program("trunk", 1, align.run_trunk, trunk, layers=shared.layers)
            trunk_states = batch_shapes(
                jax.eval_shape(lambda m, g: align.run_trunk(m, g, layers=shared.layers), *trunk)
            )
        scoring = (model, self.bank, full_group, trunk_states if shared.rewards else None)
        yield self._program("rewards", 1, jax.jit(reward.score), scoring)
        if config.policy_loss.beta_kl > 0:
            sampled_states = trunk_states and batch_shapes(_first(trunk_states, G))
            reference = (model, group_shapes(P, S, G, T), config.sampler.temperature, sampled_states)
            yield self._program("reference", 1, objectives.base.logprobs, reference)
        updating = (self.train, model, self._update_batch(full_group, trunk_states))
        yield self._program("update", config.align.epochs, align.make_update(config, self.transformation), updating)

    def irl(self) -> Iterator[Program]:
        """Yields the programs of the IRL stage: the update of the rewards, and the sampling of its negatives."""
        c, S, T = self.config.irl, self.config.data.max_prompt, self.config.sampler.max_new
        K, P = len(irl.negative_weights(c)), c.batch
        pairs = irl.Pairs(group_shapes(P, S, 1 + K, T), *(id_shapes(P, K) for _ in range(3)))
        optimiser = optimizer.make(c.optimizer, c.steps)
        init = jax.eval_shape(lambda model: optimizer.init(optimiser, self._init_rewards(model)), self.model)
        args = (sharding.sharded_shapes(init), self.model, pairs)
        yield self._program("irl update", 0, irl.make_update(self.config, optimiser), args)
        P = sharding.round_up_prompts(max(1, self.config.evals.batch // c.samples))
        yield from self.sampling("irl sample", 0, self.model, (P, c.samples, T), self.config.sampler.temperature)

    def sampling(
        self, name: str, times: int, model: PyTree, shape: tuple[int, int, int], temperature: float
    ) -> Iterator[Program]:
        """Yields the move of the model to the sampler's mesh, if it has one of its own, and the sampling.

        Args:
            name, times: of the program.
            model: shapes of the policy.
            shape: P prompts, G responses to each, T tokens of each.
            temperature: of the samples.
        """
        P, G, T = shape
        if self.sampling_mesh:
            yield self._program(f"{name}: move", times, reshard, (model,))._replace(mesh=self.sampling_mesh)
            model = jax.eval_shape(reshard, model)
        with jax.set_mesh(self.sampling_mesh or jax.sharding.get_mesh()):
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (P, G)))
            args = (sharding.sharded_shapes(model), id_shapes(P, self.config.data.max_prompt), id_shapes(P), keys)
        options = dict(max_new=T, temperature=temperature, eos=(0,), compact=())  # so no row ends before the others
        yield self._program(name, times, rollout.sample, args, **options)._replace(loop=T, mesh=self.sampling_mesh)

    def _program(self, name: str, times: int, function: Any, args: tuple, **options) -> Program:
        return Program(name, times, lambda: function.trace(*args, **options), args)

    def _init_train(self, model: Transformer) -> PyTree:
        params = self.policy.init(self.config.policy, model, jax.random.key(0))
        return optimizer.init(self.transformation, objectives.base.init_params(self.objective, params, model))

    def _init_rewards(self, model: Transformer) -> PyTree:
        return irl.init_rewards(dataclasses.replace(self.context, model=model))

    def _update_batch(self, full_group: Group, trunk_states: PyTree) -> PyTree:
        """Shapes of the batch that the objective makes of a scored group."""
        P, members, T = full_group.response.shape
        G = self.config.align.group_size

        def make_batch(model, params, group, trunk_states, logp, value, alpha):
            kept, is_harmless_P = jnp.ones(alpha.shape, bool), np.zeros(P, bool)
            scored = objectives.base.ScoredGroup(
                group, logp, value, alpha, kept, trunk_states, self.context.shared_layers.policy, is_harmless_P
            )
            return self.objective.make_batch(dataclasses.replace(self.context, model=model), model, params, scored)[0]

        floats = (float_shapes(P, G, T), float_shapes(P, members), float_shapes(P, G))
        batch = jax.eval_shape(make_batch, self.model, self.train.params, full_group, trunk_states, *floats)
        return batch_shapes(batch)


def _first(trunk_states: PyTree, members: int) -> PyTree:
    """Shapes of the trunk's states of the first members of a group."""
    return jax.eval_shape(lambda states: states.members(slice(members)), trunk_states)
