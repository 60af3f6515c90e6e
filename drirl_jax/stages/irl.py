"""Stage 1: category rewards by maximum-likelihood IRL: demonstrations against the policy's samples."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from drirl_jax import equations as eq
from drirl_jax import optimizer
from drirl_jax.data import pipeline
from drirl_jax.data.examples import Examples
from drirl_jax.models import reward
from drirl_jax.stages.base import Context, Stage, State, by_category, draw_all, group_of, row_batches
from drirl_jax.types import Group

# The loss of a pair: (r(x, y), r(x, ỹ), beta) -> loss.
LOSSES = {"logistic": eq.irl_logistic}
SHORTEST_CUT = 8  # tokens: before that a text says too little to be told apart


def init_rewards(context: Context) -> reward.Rewards:
    """Fresh rewards of the kind that config.reward names."""
    c = context.config.reward
    categories = len(context.config.data.categories)
    key = context.key("rewards")
    return reward.KINDS[c.kind](context.model, key, categories, rank=c.rank, alpha=c.alpha, targets=c.targets)


def common_cut(demo_len_P, sample_len_PK, seed: list[int]) -> np.ndarray:
    """[P, K] one length for both texts of a pair, uniform from SHORTEST_CUT to the shorter text's end (ours).

    Without it the reward learns to read length, or whether a text was cut off at max_new, and no more.
    """
    top = np.minimum(demo_len_P[:, None], sample_len_PK)
    low = np.minimum(SHORTEST_CUT, top)
    return np.random.default_rng(seed).integers(low, top + 1).astype(np.int32)


def cut_pairs(examples: Examples, response_PKT, cut_PK) -> Group:
    """A group of 2K: the demonstration K times, then the K samples, each pair read up to its common length."""
    demo_PKT = np.repeat(examples.demo[:, None], response_PKT.shape[1], axis=1)
    return group_of(examples, np.concatenate([demo_PKT, response_PKT], 1), np.concatenate([cut_PK, cut_PK], 1))


def whole(examples: Examples, response_PKT, response_len_PK) -> Group:
    """A group of 1 + K: the demonstration, then the K samples, whole."""
    response = np.concatenate([examples.demo[:, None], response_PKT], axis=1)
    return group_of(examples, response, np.concatenate([examples.demo_len[:, None], response_len_PK], axis=1))


def loss(model, pair_loss, samples: int, rewards: reward.Rewards, group: Group):
    """Mean loss of the pairs of a `cut_pairs` or `whole` group, the share ranked right, and the mean gap."""
    score_PG = reward.raw_score(model, rewards, group)
    demo, sample_PK = score_PG[:, :-samples], score_PG[:, -samples:]
    pairs_right = (demo > sample_PK).astype(jnp.float32).mean()
    return pair_loss(demo, sample_PK).mean(), {"pairs_right": pairs_right, "gap": (demo - sample_PK).mean()}


def make(context: Context) -> Stage:
    """The stage; its product is a `reward.Bank`."""
    config, c = context.config, context.config.irl
    names = config.data.categories
    train, valid = context.examples["train"], context.examples["valid"]
    transformation = optimizer.make(c.optimizer, c.steps)
    round_steps = c.steps // c.rounds
    batches = pipeline.balanced(train.rows_by_category(names), c.batch, config.seed)
    raw_score = jax.jit(reward.raw_score)

    def sample(examples: Examples, round_: int):
        batch = max(1, config.evals.batch // c.samples)
        out = draw_all(
            context, context.model, examples, context.key("irl_samples", round_), batch,
            group=c.samples, max_new=config.sampler.max_new, temperature=config.sampler.temperature,
        )  # fmt: skip
        return out.response, out.response_len

    def init() -> State:
        def no_samples(examples):
            shape = (len(examples.id), c.samples)
            return np.zeros((*shape, config.sampler.max_new), np.int32), np.ones(shape, np.int32)

        return State(optimizer.init(transformation, init_rewards(context)), (no_samples(train), no_samples(valid)))

    def group(examples: Examples, response, length, cut: bool, seed: list[int]) -> Group:
        if not cut:
            return whole(examples, response, length)
        return cut_pairs(examples, response, common_cut(examples.demo_len, length, seed))

    def collect(state: State, step: int):
        samples = state.carry
        if step % round_steps == 0:
            samples = tuple(sample(examples, step // round_steps) for examples in (train, valid))
        rows = np.asarray(batches[step])
        responses, lengths = samples[0]
        cut = c.cut == "common"
        return group(train.take(rows), responses[rows], lengths[rows], cut, [config.seed, step]), samples, {}

    @partial(jax.jit, donate_argnums=0)
    def updated(train_state, model, batch):
        stage_loss = partial(loss, model, partial(LOSSES[c.loss], beta=c.beta), c.samples)
        return optimizer.step(transformation, stage_loss, train_state, batch, c.accumulate)

    def scores(rewards, examples: Examples, samples, cut: bool) -> tuple[np.ndarray, np.ndarray]:
        """Raw rewards of all the examples: demonstrations [N, K] if cut, else [N, 1], and samples [N, K]."""
        pieces = []
        for rows, real in row_batches(len(examples.id), c.batch):
            batch = group(examples.take(rows), *(x[rows] for x in samples), cut, [config.seed, int(rows[0])])
            pieces.append(jax.device_get(raw_score(context.model, rewards, batch))[:real])
        score_NG = np.concatenate(pieces)
        return score_NG[:, : -c.samples], score_NG[:, -c.samples :]

    def evaluate(state: State, step: int):
        if step % c.eval_every and step != c.steps:
            return {}
        demo_NK, sample_NK = scores(state.train.params, valid, state.carry[1], cut=True)
        confidence = 1 / (1 + np.exp(-(demo_NK - sample_NK) / c.beta))
        out = by_category((demo_NK > sample_NK).astype(float), valid.category, names, "accuracy")
        out |= by_category(confidence, valid.category, names, "confidence")
        demo_N1, sample_NK = scores(state.train.params, valid, state.carry[1], cut=False)
        out |= by_category((demo_N1 > sample_NK).astype(float), valid.category, names, "accuracy_whole")
        return out | {"length_correlation": correlation(sample_NK, state.carry[1][1])}

    def finish(state: State) -> reward.Bank:
        raw_NG = np.concatenate(scores(state.train.params, train, state.carry[0], cut=False), axis=1)
        category_N = np.repeat(train.category, raw_NG.shape[1])
        return reward.NORMALIZE[config.reward.normalize](
            state.train.params, jnp.asarray(raw_NG.reshape(-1)), jnp.asarray(category_N)
        )

    return Stage(
        steps=c.steps,
        init=init,
        collect=collect,
        update=lambda train_state, batch: updated(train_state, context.model, batch),
        evaluate=evaluate,
        finish=finish,
        show=("loss", "pairs_right", "accuracy"),
    )


def correlation(reward_NK: np.ndarray, length_NK: np.ndarray) -> float:
    """Pearson correlation of the samples' raw reward and length; NaN where all are of one length."""
    if np.ptp(length_NK) == 0 or np.ptp(reward_NK) == 0:
        return float("nan")
    return float(np.corrcoef(reward_NK.reshape(-1), length_NK.reshape(-1))[0, 1])
