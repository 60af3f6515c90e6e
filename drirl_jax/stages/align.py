"""Stage 2: GRPO-S (DR-IRL section 3): group-relative advantages scaled by how hard each prompt is."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from drirl_jax import equations as eq
from drirl_jax import losses, optimizer, scaling
from drirl_jax.data import pipeline
from drirl_jax.data.examples import Examples
from drirl_jax.models import reward, transformer
from drirl_jax.rollout import FINISH, Rollout
from drirl_jax.stages.base import POLICIES, Context, Policy, Stage, State, by_category, draw, group_of
from drirl_jax.text import SPLIT
from drirl_jax.types import Array, Group, InputError, TrainState, length_mask

# What a response is compared with: (rewards [P, G], the demonstrations' rewards [P], eps) -> advantages [P, G].
BASELINES = {
    "group": lambda reward_PG, demo_reward_P, eps: eq.group_advantage(reward_PG, eps),
    "demo": eq.demo_advantage,
}
PART_BUCKETS = (4, 8, 16, 32)  # shapes of the coefficient computation: most parts of a text in the batch


def embed_parts(context: Context, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings [N, K, E] of the texts' parts, padded to a bucket, and their mask [N, K]; see `scaling.Parts`."""
    parts_N = [SPLIT[context.config.scaling.split](text) for text in texts]
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


@partial(jax.jit, static_argnames="temperature")
def assess(model, bank: reward.Bank, group: Group, demo_PT, demo_len_P, temperature: float):
    """Rewards of the group and of its demonstration in one pass, and the reference's log-probabilities.

    Returns:
        ([P, G] R, [P] R*, [P, G, T] log π_ref).
    """
    with_demo = group._replace(
        response=jnp.concatenate([group.response, demo_PT[:, None]], axis=1),
        response_len=jnp.concatenate([group.response_len, demo_len_P[:, None]], axis=1),
    )
    reward_PG = reward.score(model, bank, with_demo)
    ref_logp, _ = transformer.token_logprobs(model, transformer.apply(model, group), group, temperature)
    return reward_PG[:, :-1], reward_PG[:, -1], ref_logp


def loss(trunk, policy: Policy, config, params, batch: tuple[Group, Array, Array, Array]):
    """GRPO's loss of a micro-batch (group, advantages, sampler's and reference's log-probabilities)."""
    group, advantage_PG, old_logp, ref_logp = batch
    model, adapter = policy.parts(trunk, params)
    hidden = transformer.apply(model, group, adapter)
    logp, entropy = transformer.token_logprobs(model, hidden, group, config.sampler.temperature)
    mask = length_mask(group.response_len, group.response.shape[-1])
    g = config.grpo
    value, scalars = losses.policy_loss(
        logp, old_logp, ref_logp, advantage_PG, mask,
        clip_low=g.clip_low, clip_high=g.clip_high, beta_kl=g.beta_kl, reduce=g.reduce,
    )  # fmt: skip
    return value, scalars | {"entropy": losses.REDUCE[g.reduce](entropy, mask)}


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
    demo_parts = embed_parts(context, train.demo_text)

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
        group = group_of(examples, out.response, out.response_len)
        # Rewards and reference on the device while the host splits and embeds the texts.
        reward_PG, demo_reward_P, ref_logp = assess(
            context.model,
            bank,
            group,
            jnp.asarray(examples.demo),
            jnp.asarray(examples.demo_len),
            config.sampler.temperature,
        )
        response, length = jax.device_get((out.response, out.response_len))
        flat = (response.reshape(-1, response.shape[-1]), length.reshape(-1))
        embedded, mask = embed_parts(context, [context.text.decode(*row) for row in zip(*flat)])
        split = (c.batch, c.group, mask.shape[-1])
        parts = scaling.Parts(embedded.reshape(*split, -1), mask.reshape(split), *(x[rows] for x in demo_parts))
        # Advantages, scaled.
        alpha_PG, stats, info = scaling.coefficients(
            options, state.carry, parts, reward_PG, demo_reward_P, group.category
        )
        advantage_PG = BASELINES[config.grpo.baseline](reward_PG, demo_reward_P, config.grpo.eps)
        advantage_PG = eq.scaled_advantage(alpha_PG, advantage_PG)
        scalars = describe(names, examples, out, reward_PG, advantage_PG, info)
        return (group, advantage_PG, out.logp, ref_logp), stats, scalars

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
    for name, value in {"reward": reward_PG, "length": out.response_len, **info}.items():
        scalars |= by_category(value, examples.category, names, name)
    return scalars | {
        "reward_std": float(reward_PG.std(axis=1).mean()),
        "zero_spread": float((np.ptp(reward_PG, axis=1) == 0).mean()),
        "advantage_abs": float(np.abs(advantage_PG).mean()),
        "stopped": float((out.finish == FINISH.index("stop")).mean()),
    }
