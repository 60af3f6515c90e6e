"""Stage 1, maximum-likelihood IRL: it learns category rewards from demonstrations against the policy's samples."""

from __future__ import annotations

import json
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from drirl_jax import equations as eq
from drirl_jax.data import pipeline
from drirl_jax.data.examples import Examples, other_kind_demonstrations, require_both_kinds
from drirl_jax.models import reward
from drirl_jax.runtime import processes, sharding
from drirl_jax.runtime.files import replace_file
from drirl_jax.stages import align, optimizer
from drirl_jax.stages.base import POLICIES, Context, Stage, State, batched_rows, category_means, make_group, sample_all
from drirl_jax.types import Array, Group, InputError

SHORTEST_CUT = 8  # tokens: a shorter text says too little to rank it


class Pairs(NamedTuple):
    """Demonstrations, each against K negatives.

    Attributes:
        group: [P, 1 + K] responses: the demonstration, then its negatives.
        demo_end, negative_end: [P, K] number of tokens that the reward reads of the two texts of a pair.
        differ: [P, K] index of the first token in which the two texts differ.
    """

    group: Group
    demo_end: Array
    negative_end: Array
    differ: Array


def logistic(score_PGT: Array, pairs: Pairs, section: ConfigDict) -> Array:
    """[P, K] `equations.irl_logistic` of the rewards at the ends of the texts."""
    return eq.irl_logistic(*pair_rewards(score_PGT, pairs), section.beta)


def linear(score_PGT: Array, pairs: Pairs, section: ConfigDict) -> Array:
    """[P, K] `equations.irl_linear` of the rewards at the ends of the texts."""
    return eq.irl_linear(*pair_rewards(score_PGT, pairs), section.beta, section.penalty)


def token(score_PGT: Array, pairs: Pairs, section: ConfigDict) -> Array:
    """[P, K] `equations.irl_token`, from the first token that differs to the end of the shorter text."""
    length_PM, t = pairs.group.response_len, jnp.arange(score_PGT.shape[-1])
    shorter_PK = jnp.minimum(length_PM[:, :1], length_PM[:, 1:])
    mask_PKT = (t >= pairs.differ[..., None]) & (t < shorter_PK[..., None])
    return eq.irl_token(score_PGT[:, :1], score_PGT[:, 1:], mask_PKT, section.beta)


LOSSES = {"logistic": logistic, "linear": linear, "token": token}


def init_rewards(context: Context) -> reward.Rewards:
    """Untrained rewards of the kind config.reward.kind: one for each category, or one for all."""
    c = context.config.reward
    categories = 1 if c.one_for_all else len(context.config.data.categories)
    key = context.key("rewards")
    options = {name: c[name] for name in ("rank", "alpha", "targets", "layers")}
    return reward.KINDS[c.kind](context.model, key, categories, **options)


def negative_weights(section: ConfigDict) -> list[float]:
    """The weight of each negative of a demonstration: of the samples, then of the contrast if config.irl.contrast > 0.

    The contrast is a demonstration of the other kind (harmful or harmless).
    """
    return [1.0] * section.samples + [section.contrast] * (section.contrast > 0)


def common_cut(demo_len_P, negative_len_PK, seed: list[int]) -> np.ndarray:
    """[P, K] one length for both texts of a pair, uniform from SHORTEST_CUT to the shorter text's end (ours).

    Without this cut the reward learns only the length, or whether a text was cut off at max_new.
    """
    longest_PK = np.minimum(demo_len_P[:, None], negative_len_PK)
    shortest_PK = np.minimum(SHORTEST_CUT, longest_PK)
    return np.random.default_rng(seed).integers(shortest_PK, longest_PK + 1).astype(np.int32)


def rows_to_sample(read: np.ndarray, by_category: list[np.ndarray], minimum: int) -> np.ndarray:
    """The rows that need samples in a round.

    These are the rows that the round trains on. A category with fewer than `minimum` of them adds its first `minimum`
    rows: without some samples its rewards could not be standardised.

    Args:
        read: row numbers that the round trains on, perhaps repeated.
        by_category: the row numbers of each category.
    """
    extra_rows = [rows[:minimum] for rows in by_category if np.isin(rows, read).sum() < minimum]
    return np.unique(np.concatenate([read, *extra_rows]))


def make_pairs(examples: Examples, negative_PKT, negative_len_PK, cut: str, seed: list[int]) -> Pairs:
    """The examples' demonstrations against these negatives; `cut` is config.irl.cut."""
    demo_end = np.broadcast_to(examples.demo_len[:, None], negative_len_PK.shape)
    ends = (demo_end, negative_len_PK)
    if cut == "common":
        ends = (common_cut(examples.demo_len, negative_len_PK, seed),) * 2
    differ_PK = np.cumprod(examples.demo[:, None] == negative_PKT, axis=-1).sum(axis=-1)
    response_PMT = np.concatenate([examples.demo[:, None], negative_PKT], axis=1)
    length_PM = np.concatenate([examples.demo_len[:, None], negative_len_PK], axis=1)
    return Pairs(
        make_group(examples, response_PMT, length_PM),
        *(sharding.shard_prompts(x.astype(np.int32)) for x in (*ends, differ_PK)),
    )


def pair_rewards(score_PGT: Array, pairs: Pairs) -> tuple[Array, Array]:
    """[P, K] rewards of the demonstration and of the negative of each pair, at the ends that `Pairs` gives."""
    demo_PKT = jnp.broadcast_to(score_PGT[:, :1], score_PGT[:, 1:].shape)
    return reward.reward_at(demo_PKT, pairs.demo_end), reward.reward_at(score_PGT[:, 1:], pairs.negative_end)


def loss(model, pair_loss, weight_K, rewards: reward.Rewards, pairs: Pairs):
    """(mean loss of the pairs, {"pairs_right", "gap"}): weight_K holds the weight of each negative."""
    score_PGT = reward.token_scores(model, rewards, pairs.group)
    demo_PK, negative_PK = pair_rewards(score_PGT, pairs)
    pairs_right = (demo_PK > negative_PK).astype(jnp.float32).mean()
    value = jnp.average(pair_loss(score_PGT, pairs).mean(axis=0), weights=weight_K)
    return value, {"pairs_right": pairs_right, "gap": (demo_PK - negative_PK).mean()}


def make_update(config: ConfigDict, transformation: optax.GradientTransformation) -> jax.stages.Wrapped:
    """A jitted function (TrainState, trunk, Pairs) -> (TrainState, scalars): one update."""
    c = config.irl
    pair_loss, weight_K = partial(LOSSES[c.loss], section=c), negative_weights(c)

    @partial(jax.jit, donate_argnums=0)
    def updated(train_state, model, batch):
        stage_loss = partial(loss, model, pair_loss, jnp.array(weight_K))
        return optimizer.step(transformation, stage_loss, train_state, batch, c.accumulate)

    return updated


class Carry(NamedTuple):
    """What the stage carries from step to step.

    Attributes:
        train, valid: samples of the training and of the held-out prompts: responses [N, K, T] and lengths [N, K].
        inner: the state of the inner policy's alignment, with irl.policy='alternate'.
    """

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    inner: State | None = None


def make(context: Context) -> Stage:
    """The IRL stage. Its product is a `reward.Bank`."""
    config, c = context.config, context.config.irl
    category_names = config.data.categories
    harmless_categories = [category_names.index(name) for name in config.data.harmless]
    train, valid = context.examples["train"], context.examples["valid"]
    # config.data.shares may leave a category out. Its reward learns nothing, so we do not evaluate it.
    valid = valid.take(np.flatnonzero(np.isin(valid.category, train.category)))
    transformation = optimizer.make(c.optimizer, c.steps)
    round_steps = c.steps // c.rounds
    has_contrast = c.contrast > 0
    for split in ("train", "valid") if has_contrast else ():
        require_both_kinds(context.examples[split], harmless_categories, split)
    category_rows = [rows for rows in train.rows_by_category(len(category_names)) if len(rows)]
    mix = pipeline.natural if config.data.mixing == "natural" else pipeline.balanced
    batches = mix(category_rows, c.batch, config.seed)
    token_scores = jax.jit(reward.token_scores)

    def no_samples(examples: Examples):
        """Responses [N, K, T] and lengths [N, K] before any sampling: all 0."""
        shape = (len(examples.id), c.samples)
        return np.zeros((*shape, config.sampler.max_new), np.int32), np.zeros(shape, np.int32)

    # The inner policy takes steps of the align stage between rounds. So the rewards see samples that exploit them.
    inner_stage = align.make(context, None, "inner_samples") if c.policy == "alternate" else None

    def sample(model, examples: Examples, rows, round_: int):
        """Samples for these rows; the other rows stay 0."""
        batch = max(1, config.evals.batch // c.samples)
        rollout = sample_all(
            context, model, examples.take(rows), context.key("irl_samples", round_), batch,
            group=c.samples, max_new=config.sampler.max_new, temperature=config.sampler.temperature,
        )  # fmt: skip
        response_NKT, length_NK = no_samples(examples)
        response_NKT[rows], length_NK[rows] = rollout.response, rollout.response_len
        return response_NKT, length_NK

    def init() -> State:
        carry = Carry(no_samples(train), no_samples(valid), inner_stage and inner_stage.init())
        return State(optimizer.init(transformation, init_rewards(context)), carry)

    def pair_with_negatives(
        examples: Examples, pool: Examples, response_PKT, length_PK, contrasted: bool, seed
    ) -> Pairs:
        if contrasted:
            other_PT, other_len_P = other_kind_demonstrations(examples, pool, harmless_categories, seed)
            response_PKT = np.concatenate([response_PKT, other_PT[:, None]], axis=1)
            length_PK = np.concatenate([length_PK, other_len_P[:, None]], axis=1)
        return make_pairs(examples, response_PKT, length_PK, c.cut, seed)

    def collect(state: State, step: int):
        carry = state.carry
        if step % round_steps == 0:
            carry = begin_round(state, step // round_steps)
        rows = np.asarray(batches[step])
        response_NKT, length_NK = carry.train
        pair_arguments = (response_NKT[rows], length_NK[rows], has_contrast, [config.seed, step])
        inner_skipped = {"inner_skipped": float(carry.inner.train.skipped)} if inner_stage else {}
        return pair_with_negatives(train.take(rows), train, *pair_arguments), carry, inner_skipped

    def begin_round(state: State, number: int) -> Carry:
        """New samples for a round: of the inner policy after its steps, or else of the fixed policy."""
        first_step = number * round_steps
        batch_rows = np.concatenate([batches[i] for i in range(first_step, first_step + round_steps)])
        train_rows = rows_to_sample(batch_rows, train.rows_by_category(len(category_names)), config.data.minimum)
        model, inner_state = context.model, state.carry.inner
        if inner_stage:
            bank = finish(state) if number else None
            for step in range((number - 1) * c.policy_steps, number * c.policy_steps) if number else ():
                batch, stats, _ = inner_stage.collect(inner_state, step, bank)
                inner_state = State(inner_stage.update(inner_state.train, batch)[0], stats)
            model = POLICIES[config.policy.tune].merged(context.model, inner_state.train.params.policy)
        valid_rows = np.arange(len(valid.id))
        return Carry(sample(model, train, train_rows, number), sample(model, valid, valid_rows, number), inner_state)

    updated = make_update(config, transformation)

    def score_pairs(rewards, examples: Examples, samples, contrasted: bool) -> dict[str, np.ndarray]:
        """Raw rewards: "demo" and "negative" [N, K] at the ends of `Pairs`, "whole" [N, 1 + K] of whole texts."""
        pieces = []
        for rows, num_real in batched_rows(len(examples.id), config.evals.batch, "rewards"):
            pair_arguments = (*(x[rows] for x in samples), contrasted, [config.seed, int(rows[0])])
            pairs = pair_with_negatives(examples.take(rows), examples, *pair_arguments)
            score_PMT = token_scores(context.model, rewards, pairs.group)
            demo_PK, negative_PK = pair_rewards(score_PMT, pairs)
            whole_PM = reward.reward_at(score_PMT, pairs.group.response_len)
            pieces.append([x[:num_real] for x in sharding.fetch((demo_PK, negative_PK, whole_PM))])
        scores = dict(zip(("demo", "negative", "whole"), map(np.concatenate, zip(*pieces))))
        if not all(np.isfinite(values).all() for values in scores.values()):
            raise InputError(
                "the rewards are not finite: the IRL stage diverged, lower config.irl.optimizer.learning_rate."
            )
        return scores

    def evaluate(state: State, step: int):
        if step % c.eval_every and step != c.steps:
            return {}
        scores = score_pairs(optimizer.product(state.train), valid, state.carry.valid, has_contrast)
        gap_NK = scores["demo"] - scores["negative"]
        whole_gap_NK = scores["whole"][:, :1] - scores["whole"][:, 1:]
        K = c.samples  # the contrast, a demonstration of the other kind, follows the K samples
        measures = {
            "accuracy": gap_NK[:, :K] > 0,
            "confidence": 1 / (1 + np.exp(-gap_NK[:, :K] / c.beta)),
            "accuracy_whole": whole_gap_NK[:, :K] > 0,
        }
        if has_contrast:
            measures["accuracy_contrast"] = whole_gap_NK[:, K:] > 0
        scalars = {}
        for name, values in measures.items():
            scalars |= category_means(values, valid.category, category_names, name)
        # Calibration, and the correlation of reward and length: over all prompts, and for each category.
        subsets = {"all": np.ones(len(valid.id), bool)}
        subsets |= {category_names[i]: valid.category == i for i in np.unique(valid.category)}
        curves = {name: reliability(gap_NK[rows, :K].reshape(-1), c.beta) for name, rows in subsets.items()}
        for name, rows in subsets.items():
            suffix = "" if name == "all" else f"/{name}"
            scalars[f"ece{suffix}"] = calibration_error(curves[name])
            scalars[f"length_correlation{suffix}"] = correlation(
                scores["whole"][rows, 1 : 1 + K], state.carry.valid[1][rows]
            )
        if context.workdir and step == c.steps and processes.is_writer():
            replace_file(context.workdir.local / "reliability.json", json.dumps(curves, indent=1) + "\n")
        return scalars

    def finish(state: State) -> reward.Bank:
        rewards = optimizer.product(state.train)
        sampled_rows = np.flatnonzero(state.carry.train[1][:, 0])
        samples = tuple(x[sampled_rows] for x in state.carry.train)
        raw_NM = score_pairs(rewards, train.take(sampled_rows), samples, contrasted=False)["whole"]
        category_N = np.repeat(train.category[sampled_rows], raw_NM.shape[1])
        return reward.NORMALIZE[config.reward.normalize](
            rewards, jnp.asarray(raw_NM.reshape(-1)), jnp.asarray(category_N)
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


def reliability(gap_N: np.ndarray, beta: float, bins: int = 10) -> list[dict[str, float]]:
    """The share of pairs that the reward ranks right, by its confidence, in bins of equal width.

    The sign of a gap says which of two texts is the demonstration, with confidence σ(|gap|/β) in [½, 1]. It is right
    if gap > 0.

    Returns:
        for each bin that is not empty {"n": number of pairs, "confidence" and "right": means of the pairs in it}.
    """
    confidence_N = 1 / (1 + np.exp(-np.abs(gap_N) / beta))
    bin_N = np.minimum(((confidence_N - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {"n": int(rows.sum()), "confidence": float(confidence_N[rows].mean()), "right": float((gap_N[rows] > 0).mean())}
        for rows in (bin_N == b for b in range(bins))
        if rows.any()
    ]


def calibration_error(bins: list[dict[str, float]]) -> float:
    """ECE = Σ_b (n_b / N) |right_b - confidence_b|, N > 0     (expected calibration error, arXiv 1706.04599)"""
    return sum(b["n"] * abs(b["right"] - b["confidence"]) for b in bins) / sum(b["n"] for b in bins)


def correlation(reward_NK: np.ndarray, length_NK: np.ndarray) -> float:
    """Pearson correlation of the samples' raw reward and length; NaN if all lengths or all rewards are equal."""
    if np.ptp(length_NK) == 0 or np.ptp(reward_NK) == 0:
        return float("nan")
    return float(np.corrcoef(reward_NK.reshape(-1), length_NK.reshape(-1))[0, 1])
