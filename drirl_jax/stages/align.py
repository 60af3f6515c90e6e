"""Stage 2: GRPO-S (DR-IRL section 3): group-relative advantages scaled by how hard each prompt is."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drirl_jax import equations as eq
from drirl_jax import losses, optimizer, scaling
from drirl_jax.data import pipeline
from drirl_jax.data.examples import Examples, contrast, require_both_kinds
from drirl_jax.models import reward, transformer
from drirl_jax.models.transformer import Begun, Transformer
from drirl_jax.rollout import FINISH, Rollout
from drirl_jax.stages.base import POLICIES, Context, Policy, Stage, State, by_category, draw, draw_all, group_of
from drirl_jax.text import SPLIT, whole_text
from drirl_jax.types import Array, Group, InputError, TrainState, length_mask


class Role(NamedTuple):
    """A demonstration's part in a prompt's group: whether its reward counts in the group's mean and std, and whether it
    is trained on."""

    counts: bool
    trained: bool


ROLES = {"apart": Role(False, False), "baseline": Role(True, False), "member": Role(True, True)}
PART_BUCKETS = (4, 8, 16, 32)  # shapes of the coefficient computation: most parts of a text in the batch


def embed_parts(context: Context, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings [N, K, E] of the texts' parts, padded to a bucket, and their mask [N, K]; see `scaling.Parts`."""
    c = context.config.scaling
    split = whole_text if scaling.TABLES["similarity"][c.similarity].whole else SPLIT[c.split]
    parts_N = [split(text) for text in texts]
    vectors = iter(context.embedder([part for parts in parts_N for part in parts]))
    most = max(len(parts) for parts in parts_N)
    size = next((bucket for bucket in PART_BUCKETS if bucket >= most), most)
    embedded = np.zeros((len(texts), size, context.embedder.width), np.float32)
    mask = np.zeros((len(texts), size), bool)
    for n, parts in enumerate(parts_N):
        mask[n, : max(len(parts), 1)] = True
        for k in range(len(parts)):
            embedded[n, k] = next(vectors)
    return embedded, mask


def embed_responses(context: Context, response_PGT: np.ndarray, length_PG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`embed_parts` of responses, [P, G, K, E] and [P, G, K]."""
    P, G, T = response_PGT.shape
    texts = [context.text.decode(*row) for row in zip(response_PGT.reshape(-1, T), length_PG.reshape(-1))]
    embedded, mask = embed_parts(context, texts)
    return embedded.reshape(P, G, *embedded.shape[1:]), mask.reshape(P, G, -1)


def calibrate(context: Context, options: scaling.Options, model: Transformer, demo_parts) -> Array:
    """[C] δ̄ of each category under this policy: one response to every training prompt. (as DAMA fixes its hardness)"""
    config, train = context.config, context.examples["train"]
    out = draw_all(
        context, model, train, context.key("calibration"), config.evals.batch,
        group=1, max_new=config.sampler.max_new, temperature=config.sampler.temperature,
    )  # fmt: skip
    parts = scaling.Parts(*embed_responses(context, out.response, out.response_len), *demo_parts)
    delta_PG = scaling.distances(options, parts)
    return eq.category_mean(delta_PG, train.category, len(config.data.categories))[0]


def joined(group: Group, text_PT: Array, length_P: Array) -> Group:
    """The group with one more member, its last: [P, G + 1, T]."""
    return group.replace(
        response=jnp.concatenate([group.response, text_PT[:, None]], axis=1),
        response_len=jnp.concatenate([group.response_len, length_P[:, None]], axis=1),
    )


def advantages(roles: tuple[Role, Role], reward_PM: Array, sampled: int, eps: float) -> Array:
    """Group-relative advantages of the members that are trained on, at least the G samples.

    Args:
        roles: of the demonstration, and of one of the other kind; the second has no part that the first has not.
        reward_PM: [P, G + 1 or G + 2] of the samples and of the two in this order, the last only where it counts.
        sampled: G.
    """
    counted, trained = (sampled + sum(part) for part in zip(*roles))
    return eq.group_advantage(reward_PM[:, :counted], eps)[:, :trained]


def harmless_weight(wrong_PG: Array, harmless_P: np.ndarray, target: float) -> Array:
    """[P] weights: of harmless prompts by the share of their samples that are wrong, of others 1.

    Args:
        wrong_PG: see `equations.of_the_other_kind`.
        harmless_P: which prompts are harmless.
        target: config.grpo.harmless_wrong; at 1 every weight is 1.
    """
    if target == 1 or not harmless_P.any():
        return jnp.ones(len(harmless_P))
    share = jnp.average(wrong_PG.mean(axis=1), weights=harmless_P)
    return jnp.where(harmless_P, eq.kind_weight(share, target), 1.0)


class Batch(NamedTuple):
    """What an update learns from.

    Attributes:
        group: [P, M] responses: those that were sampled, and the demonstrations that are trained on.
        advantage: [P, M] scaled advantages.
        old_logp, ref_logp: [P, G, T] of the sampled ones under the sampler and the reference (None without a KL term).
        weights: see `losses.token_weights`.
        begun: the group behind the trunk's layers that the policy leaves as they are; None if there are none.
    """

    group: Group
    advantage: Array
    old_logp: Array
    ref_logp: Array | None
    weights: losses.Weights
    begun: Begun | None = None


begin = jax.jit(transformer.begin, static_argnames="layers")
score = jax.jit(reward.score)


@partial(jax.jit, static_argnames="temperature")
def logprobs(model, group: Group, temperature: float, begun: Begun | None = None) -> Array:
    """[P, G, T] log-probabilities of the group under the model, here the reference."""
    hidden = transformer.apply(model, group, begun=begun)
    return transformer.token_logprobs(model, hidden, group, temperature)[0]


def loss(trunk, policy: Policy, config, params, batch: Batch):
    """GRPO's loss of a micro-batch.

    Members of the group beyond those that were sampled are demonstrations: see `losses.policy_loss`.
    """
    group, advantage_PG, old_logp, ref_logp, weights, begun = batch
    model, adapter = policy.parts(trunk, params)
    prompt_hidden, response_hidden = transformer.apply(model, group, adapter, begun=begun)
    g, sampled = config.grpo, old_logp.shape[1]

    def read(members: slice, temperature: float):
        part = group.replace(response=group.response[:, members], response_len=group.response_len[:, members])
        return transformer.token_logprobs(model, (prompt_hidden, response_hidden[:, members]), part, temperature)

    logp, entropy = read(slice(sampled), config.sampler.temperature)
    if group.response.shape[1] > sampled:  # what nobody sampled has the model's own temperature
        logp = jnp.concatenate([logp, read(slice(sampled, None), 1.0)[0]], axis=1)
    mask = length_mask(group.response_len, group.response.shape[-1])
    value, scalars = losses.policy_loss(
        logp, old_logp, ref_logp, advantage_PG, mask, weights,
        clip_low=g.clip_low, clip_high=g.clip_high, beta_kl=g.beta_kl, ratio=g.ratio,
    )  # fmt: skip
    return value, scalars | {"entropy": losses.weighted(entropy, weights.sampled)}


def make(context: Context, bank: reward.Bank) -> Stage:
    """The stage; its product is the policy's parameters (see `base.POLICIES`)."""
    config, c = context.config, context.config.align
    names = config.data.categories
    train = context.examples["train"]
    policy = POLICIES[config.policy.tune]
    options = scaling.Options.from_config(config.scaling)
    transformation = optimizer.make(c.optimizer, c.steps)
    batches = pipeline.BATCHES[config.sampler.batch](
        config.sampler,
        train.rows_by_category(len(names)),
        c.batch,
        config.seed,
        [name in config.data.harmless for name in names],
    )
    roles = ROLES[config.grpo.demonstration], ROLES[config.grpo.contrast]
    harmless = [names.index(name) for name in config.data.harmless]
    if roles[1].counts:
        require_both_kinds(train, harmless, "train")
    demo_parts, shared = embed_parts(context, train.demo_text), context.shared_layers

    def init() -> State:
        params = policy.init(config.policy, context.model, context.key("adapter"))
        return State(optimizer.init(transformation, params), scaling.Stats.fresh(len(names)))

    def collect(state: State, step: int):
        # Sample a group for every prompt.
        rows = np.asarray(batches[step])
        examples = train.take(rows)
        model = policy.merged(context.model, state.train.params)
        out = draw(
            context, model, examples, context.key("align_samples", step),
            group=c.group, max_new=config.sampler.max_new, temperature=config.sampler.temperature,
        )  # fmt: skip
        group = group_of(examples, *context.clock.mark("rollout", (out.response, out.response_len)))
        # Rewards and reference on the device while the host splits and embeds the texts.
        scored = joined(group, jnp.asarray(examples.demo), jnp.asarray(examples.demo_len))
        if roles[1].counts:
            other = contrast(examples, train, harmless, [config.seed, step])
            scored = joined(scored, *map(jnp.asarray, other))
        begun = begin(context.model, scored, layers=shared) if shared else None
        begun_of = begun.members if shared else lambda members: None
        context.clock.mark("trunk", begun)
        ref_logp = None
        if config.grpo.beta_kl > 0:
            ref_logp = logprobs(context.model, group, config.sampler.temperature, begun_of(slice(c.group)))
        context.clock.mark("reference", ref_logp)
        reward_PM = context.clock.mark("rewards", score(context.model, bank, scored, begun))
        reward_PG, demo_reward_P = reward_PM[:, : c.group], reward_PM[:, c.group]
        response, length = jax.device_get((out.response, out.response_len))
        parts = scaling.Parts(*embed_responses(context, response, length), *(x[rows] for x in demo_parts))
        # Advantages, scaled.
        stats = state.carry
        if step == 0 and not options.rule("baseline").moves:
            stats = stats._replace(delta=calibrate(context, options, model, demo_parts))
        alpha_PG, stats, info = scaling.coefficients(options, stats, parts, reward_PG, demo_reward_P, group.category)
        context.clock.mark("hardness", alpha_PG)
        weight_P = jnp.ones(c.batch)
        if roles[1].counts:
            wrong_PG = eq.of_the_other_kind(reward_PG, demo_reward_P, reward_PM[:, c.group + 1])
            info |= {"wrong": wrong_PG}
            weight_P = harmless_weight(wrong_PG, np.isin(examples.category, harmless), config.grpo.harmless_wrong)
        advantage = advantages(roles, reward_PM, c.group, config.grpo.eps)
        trained = slice(advantage.shape[1])
        length = scored.response_len[:, trained]
        if config.scaling.drop_masked:
            length = length.at[:, : c.group].set(jnp.where(info["kept"], length[:, : c.group], 0))
        group = scored.replace(response=scored.response[:, trained], response_len=length)
        weights = losses.token_weights(config.grpo.reduce, length_mask(length, response.shape[-1]), c.group)
        others = jnp.repeat(alpha_PG.mean(axis=1, keepdims=True), advantage.shape[1] - c.group, axis=1)
        advantage = eq.scaled_advantage(weight_P[:, None] * jnp.concatenate([alpha_PG, others], axis=1), advantage)
        scalars = describe(names, examples, out, reward_PG, advantage, info)
        return Batch(group, advantage, out.logp, ref_logp, weights, begun_of(trained)), stats, scalars

    @partial(jax.jit, donate_argnums=0)
    def updated(train_state: TrainState, trunk, batch):
        return optimizer.step(transformation, partial(loss, trunk, policy, config), train_state, batch, c.accumulate)

    return Stage(
        steps=c.steps,
        init=init,
        collect=collect,
        update=lambda train_state, batch: updated(train_state, context.model, batch),
        evaluate=lambda state, step: {},
        finish=lambda state: optimizer.product(state.train),
        show=("reward", "gap", "kl", "alpha_d", "alpha_m", "length"),
    )


def describe(names, examples: Examples, out: Rollout, reward_PG, advantage_PG, info) -> dict[str, float]:
    """The scalars of a batch, by category. Raises InputError for a reward that is not finite."""
    reward_PG, advantage_PG, info, out = jax.device_get((reward_PG, advantage_PG, info, out))
    if not np.isfinite(reward_PG).all():
        p, g = np.argwhere(~np.isfinite(reward_PG))[0]
        raise InputError(
            f"the reward of category {names[examples.category[p]]} is {reward_PG[p, g]} for a response to record "
            f"{examples.id[p]}: the IRL stage diverged; lower config.irl.optimizer.learning_rate."
        )
    scalars = {}
    zero_spread_P = np.ptp(reward_PG, axis=1) == 0
    for name, value in {"reward": reward_PG, "length": out.response_len, "zero_spread": zero_spread_P, **info}.items():
        scalars |= by_category(value, examples.category, names, name)
    return scalars | {
        "reward_std": float(reward_PG.std(axis=1).mean()),
        "advantage_abs": float(np.abs(advantage_PG).mean()),
        "stopped": float((out.finish == FINISH.index("stop")).mean()),
    }
