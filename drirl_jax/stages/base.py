"""What all stages share: the run's context, the stage interface, the two forms of the policy, and sampling."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any, Callable, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from drirl_jax import rollout
from drirl_jax.data.examples import Examples
from drirl_jax.data.text import ChatTokens
from drirl_jax.models import lora
from drirl_jax.models.encoder import TextEmbedder
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime import sharding
from drirl_jax.runtime.bucket import Workdir
from drirl_jax.runtime.progress import Clock, with_progress
from drirl_jax.types import Array, Group, PyTree, TrainState

# Each use of random numbers has its own stream: key = fold_in(run key, stream), then step, prompt and response index.
RANDOM_STREAMS = dict(
    adapter=0,
    rewards=1,
    irl_samples=2,
    irl_cut=3,
    align_samples=4,
    evals=5,
    calibration=6,
    best_of=7,
    inner_samples=8,
    benchmarks=9,
    sft_adapter=10,
    own_answers=11,
)


class SharedLayers(NamedTuple):
    """The first layers of the trunk that a step's group passes only once, for the reference and others.

    Attributes:
        layers: the number of these layers.
        policy: whether the policy uses their result.
        rewards: whether the rewards use their result.
    """

    layers: int
    policy: bool
    rewards: bool


@dataclasses.dataclass(frozen=True)
class Context:
    """What stays fixed in a run.

    Attributes:
        model: the trunk, which is also the reference.
        text: the tokeniser with its chat template.
        embedder: the sentence encoder.
        examples: of each split.
        workdir: None for a run that writes nothing.
        sampling_mesh: the mesh to sample on; None if it is the mesh of training.
    """

    config: ConfigDict
    model: Transformer
    text: ChatTokens
    embedder: TextEmbedder
    examples: dict[str, Examples]
    clock: Clock = dataclasses.field(default_factory=Clock)
    workdir: Workdir | None = None
    sampling_mesh: jax.sharding.Mesh | None = None

    @property
    def shared_layers(self) -> SharedLayers:
        """The first layers that policy and rewards leave unchanged. One that changes all layers does not count."""
        layers, c = self.model.config.layers, self.config
        reward_layers = {"lora": (c.reward.layers or layers), "head": 0, "full": layers}
        policy_shared = layers - ((c.policy.layers or layers) if c.policy.tune == "lora" else layers)
        rewards_shared = layers - reward_layers[c.reward.kind]
        return SharedLayers(
            min(filter(None, (policy_shared, rewards_shared)), default=0), policy_shared > 0, rewards_shared > 0
        )

    def key(self, stream: str, step: int = 0) -> Array:
        """The random key of this stream (a key of RANDOM_STREAMS) in this step."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), RANDOM_STREAMS[stream]), step)

    def local_file(self, name: str) -> pathlib.Path | None:
        """The path of a file of the workdir on this machine; None for a run that writes nothing."""
        return None if self.workdir is None else self.workdir.local / name


class State(NamedTuple):
    """What a stage carries from step to step: `update` replaces `train`, and `collect` replaces `carry`."""

    train: TrainState
    carry: PyTree


class Stage(NamedTuple):
    """One stage of the schedule.

    Attributes:
        steps: how often `collect` and `update` run.
        init: () -> State.
        collect: (State, step) -> (batch, carry, scalars). It samples and scores, on host and device.
        update: (TrainState, batch) -> (TrainState, scalars); one or more calls of one jitted, donated function.
        evaluate: (State, step) -> scalars on held-out data; {} at steps without an evaluation.
        finish: State -> the stage's product.
        bar_scalars: the scalars that the progress bar shows.
    """

    steps: int
    init: Callable[[], State]
    collect: Callable[[State, int], tuple[Any, PyTree, dict[str, float]]]
    update: Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]
    evaluate: Callable[[State, int], dict[str, float]]
    finish: Callable[[State], PyTree]
    bar_scalars: tuple[str, ...]


class Policy(NamedTuple):
    """A way to train the policy: its parameters, and how to make a model of them and the trunk.

    Attributes:
        init: (config.policy, trunk, key) -> params.
        model_and_adapter: (trunk, params) -> (model, adapter) for the differentiable pass.
        merge: (trunk, params) -> one model with the trunk's weight type, for sampling and export.
    """

    init: Callable
    model_and_adapter: Callable
    merge: jax.stages.Wrapped


def _init_adapter(section, trunk, key):
    options = ("rank", "alpha", "targets", "layers")
    return lora.init(trunk, key, **{name: section[name] for name in options})


POLICIES = {
    "lora": Policy(_init_adapter, lambda trunk, params: (trunk, params), jax.jit(lora.merge)),
    # A copy, because the update donates the old parameters, and the trunk must stay as the reference.
    "full": Policy(
        lambda section, trunk, key: jax.tree.map(jnp.copy, trunk),
        lambda trunk, params: (params, None),
        lambda trunk, params: params,
    ),
}


def make_group(examples: Examples, response, response_len) -> Group:
    """The examples' prompts with these responses, [P, G, T] and [P, G]."""
    arrays = (examples.prompt, examples.prompt_len, response, response_len, examples.category)
    return Group(*(sharding.shard_prompts(x) for x in arrays), prefix=examples.prefix)


def on_sampling_mesh(context: Context, model: Transformer) -> Transformer:
    """The model on the sampling mesh: each sampled token reads all weights, so they should not be gathered first."""
    if context.sampling_mesh is None:
        return model
    with jax.set_mesh(context.sampling_mesh):
        return reshard(model)


@jax.jit
def reshard(model: Transformer) -> Transformer:
    """The model on the mesh that is set, with its matrices in the type of the computation."""

    def cast(path, x):
        axes = sharding.logical_axes(path, x.ndim)
        # Go through matrices that are split on both axes. Else every device would hold a whole matrix for a moment.
        via_axes = ["spread_width" if axis == "width" else axis for axis in axes]
        return sharding.constrain(x.astype(model.config.dtype), *via_axes) if axes else x

    return sharding.constrain_tree(jax.tree_util.tree_map_with_path(cast, model))


def sample_batch(context: Context, model: Transformer, examples: Examples, key: Array, **options) -> rollout.Rollout:
    """The model's responses to one batch of examples, sharded by prompt; see `rollout.sample` for the other options."""
    group = options.pop("group")
    keys = rollout.response_keys(key, jnp.asarray(examples.number), group)
    with jax.set_mesh(context.sampling_mesh) if context.sampling_mesh else contextlib.nullcontext():
        keys = sharding.replicate(keys) if context.sampling_mesh else keys
        prompt, length = sharding.shard_prompts(examples.prompt), sharding.shard_prompts(examples.prompt_len)
        options |= dict(eos=context.text.eos_ids, prefix=examples.prefix)
        responses = rollout.sample(model, prompt, length, keys, **options)
    return jax.tree.map(sharding.shard_prompts, responses) if context.sampling_mesh else responses


def batched_rows(total: int, size: int, label: str) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (row numbers, number of real rows) of batches of `total` rows.

    Args:
        size: rows of a batch; rounded up so that the devices get equal shares. Repeated rows fill the last batch.
        label: what the progress bar calls this work.
    """
    size = sharding.round_up_prompts(size)
    for start in with_progress(range(0, total, size), label, "batch"):
        yield np.arange(start, start + size) % total, min(size, total - start)


def sample_all(context: Context, model: Transformer, examples: Examples, key: Array, batch: int, **options):
    """`sample_batch` over all the examples, `batch` prompts at a time: a Rollout of numpy arrays."""
    pieces, model = [], on_sampling_mesh(context, model)
    for rows, num_real in batched_rows(len(examples.id), batch, "sampling"):
        responses = sharding.fetch(sample_batch(context, model, examples.take(rows), key, **options))
        pieces.append(jax.tree.map(lambda x: x[:num_real], responses))
    return jax.tree.map(lambda *x: np.concatenate(x), *pieces)


def category_means(values_N: np.ndarray, category_N: np.ndarray, names, prefix: str) -> dict[str, float]:
    """{"prefix": mean of all, "prefix/name": mean of each category present}, as floats; values are [N] or [N, G]."""
    means = {prefix: float(np.mean(values_N))}
    for c in np.unique(category_N):
        means[f"{prefix}/{names[c]}"] = float(np.mean(values_N[category_N == c]))
    return means
