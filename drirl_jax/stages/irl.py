"""Stage 1: category rewards by maximum-likelihood IRL: demonstrations against the policy's samples."""

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

SHORTEST_CUT = 8  # tokens: before that a text says too little to be told apart


class Pairs(NamedTuple):
    """Demonstrations, each against K negatives.

    Attributes:
        group: [P, 1 + K] responses: the demonstration, then its negatives.
        demo_end, negative_end: [P, K] tokens up to which the two texts of a pair are read.
        differ: [P, K] index of the first token in which they differ.
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
    length_PG, t = pairs.group.response_len, jnp.arange(score_PGT.shape[-1])
    both_PK = jnp.minimum(length_PG[:, :1], length_PG[:, 1:])
    mask_PKT = (t >= pairs.differ[..., None]) & (t < both_PK[..., None])
    return eq.irl_token(score_PGT[:, :1], score_PGT[:, 1:], mask_PKT, section.beta)


LOSSES = {"logistic": logistic, "linear": linear, "token": token}


def init_rewards(context: Context) -> reward.Rewards:
    """Fresh rewards of the kind that config.reward names, one for each category or one for all."""
    c = context.config.reward
    categories = 1 if c.one_for_all else len(context.config.data.categories)
    key = context.key("rewards")
    options = {name: c[name] for name in ("rank", "alpha", "targets", "layers")}
    return reward.KINDS[c.kind](context.model, key, categories, **options)


def negative_weights(section: ConfigDict) -> list[float]:
    """Of each negative of a demonstration: the samples, then one for the other kind where config.irl.contrast > 0."""
    return [1.0] * section.samples + [section.contrast] * (section.contrast > 0)


def common_cut(demo_len_P, negative_len_PK, seed: list[int]) -> np.ndarray:
    """[P, K] one length for both texts of a pair, uniform from SHORTEST_CUT to the shorter text's end (ours).

    Without it the reward learns to read length, or whether a text was cut off at max_new, and no more.
    """
    top = np.minimum(demo_len_P[:, None], negative_len_PK)
    low = np.minimum(SHORTEST_CUT, top)
    return np.random.default_rng(seed).integers(low, top + 1).astype(np.int32)


def rows_to_sample(read: np.ndarray, by_category: list[np.ndarray], minimum: int) -> np.ndarray:
    """The rows that a round reads, and the first `minimum` of every category of which it reads fewer.

    Each category needs some samples, or its rewards could not be standardised.

    Args:
        read: row numbers, perhaps repeated.
        by_category: the row numbers of each category.
    """
    few = [rows[:minimum] for rows in by_category if np.isin(rows, read).sum() < minimum]
    return np.unique(np.concatenate([read, *few]))


def make_pairs(examples: Examples, negative_PKT, negative_len_PK, cut: str, seed: list[int]) -> Pairs:
    """The examples' demonstrations against these negatives; `cut` is config.irl.cut."""
    demo_end = np.broadcast_to(examples.demo_len[:, None], negative_len_PK.shape)
    ends = (demo_end, negative_len_PK)
    if cut == "common":
        ends = (common_cut(examples.demo_len, negative_len_PK, seed),) * 2
    differ = np.cumprod(examples.demo[:, None] == negative_PKT, axis=-1).sum(axis=-1)
    response = np.concatenate([examples.demo[:, None], negative_PKT], axis=1)
    length = np.concatenate([examples.demo_len[:, None], negative_len_PK], axis=1)
    return Pairs(
        make_group(examples, response, length), *(sharding.shard_prompts(x.astype(np.int32)) for x in (*ends, differ))
    )


def pair_rewards(score_PGT: Array, pairs: Pairs) -> tuple[Array, Array]:
    """[P, K] rewards of the demonstration and of the negative of each pair, where the pair is read."""
    demo_PKT = jnp.broadcast_to(score_PGT[:, :1], score_PGT[:, 1:].shape)
    return reward.reward_at(demo_PKT, pairs.demo_end), reward.reward_at(score_PGT[:, 1:], pairs.negative_end)


def loss(model, pair_loss, weight_K, rewards: reward.Rewards, pairs: Pairs):
    """Mean loss of the pairs, each negative k with its weight, the share of pairs ranked right, and the mean gap."""
    score_PGT = reward.token_scores(model, rewards, pairs.group)
    demo_PK, negative_PK = pair_rewards(score_PGT, pairs)
    pairs_right = (demo_PK > negative_PK).astype(jnp.float32).mean()
    value = jnp.average(pair_loss(score_PGT, pairs).mean(axis=0), weights=weight_K)
    return value, {"pairs_right": pairs_right, "gap": (demo_PK - negative_PK).mean()}


def make_update(config: ConfigDict, transformation: optax.GradientTransformation) -> jax.stages.Wrapped:
    """(TrainState, trunk, Pairs) -> (TrainState, scalars): one update."""
    c = config.irl
    pair_loss, weight_K = partial(LOSSES[c.loss], section=c), negative_weights(c)

    @partial(jax.jit, donate_argnums=0)
    def updated(train_state, model, batch):
        stage_loss = partial(loss, model, pair_loss, jnp.array(weight_K))
        return optimizer.step(transformation, stage_loss, train_state, batch, c.accumulate)

    return updated


class Carry(NamedTuple):
    """What the stage remembers: samples (responses [N, K, T], lengths [N, K]) for training and held-out prompts, and
    with irl.policy='alternate' the state of the inner policy's alignment."""

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    inner: State | None = None


def make(context: Context) -> Stage:
    """The stage; its product is a `reward.Bank`."""
    config, c = context.config, context.config.irl
    names = config.data.categories
    harmless = [names.index(name) for name in config.data.harmless]
    train, valid = context.examples["train"], context.examples["valid"]
    # A category that config.data.shares leaves out has a reward that learned nothing: no figure of it.
    valid = valid.take(np.flatnonzero(np.isin(valid.category, train.category)))
    transformation = optimizer.make(c.optimizer, c.steps)
    round_steps = c.steps // c.rounds
    contrasted = c.contrast > 0
    for split in ("train", "valid") if contrasted else ():
        require_both_kinds(context.examples[split], harmless, split)
    held = [rows for rows in train.rows_by_category(len(names)) if len(rows)]
    balance = pipeline.natural if config.sampler.batch == "natural" else pipeline.balanced
    batches = balance(held, c.batch, config.seed)
    token_scores = jax.jit(reward.token_scores)

    def no_samples(examples: Examples):
        """Responses [N, K, T] and their lengths [N, K], 0 where there is none."""
        shape = (len(examples.id), c.samples)
        return np.zeros((*shape, config.sampler.max_new), np.int32), np.zeros(shape, np.int32)

    # The inner policy takes steps of the align stage between rounds, so that the rewards meet what would exploit them.
    inner = align.make(context, None, "inner_samples") if c.policy == "alternate" else None

    def sample(model, examples: Examples, rows, round_: int):
        """Samples for these rows, none for the others."""
        batch = max(1, config.evals.batch // c.samples)
        out = sample_all(
            context, model, examples.take(rows), context.key("irl_samples", round_), batch,
            group=c.samples, max_new=config.sampler.max_new, temperature=config.sampler.temperature,
        )  # fmt: skip
        response, length = no_samples(examples)
        response[rows], length[rows] = out.response, out.response_len
        return response, length

    def init() -> State:
        carry = Carry(no_samples(train), no_samples(valid), inner and inner.init())
        return State(optimizer.init(transformation, init_rewards(context)), carry)

    def pairs_of(examples: Examples, pool: Examples, response_PKT, length_PK, contrasted: bool, seed) -> Pairs:
        if contrasted:
            other_PT, other_len_P = other_kind_demonstrations(examples, pool, harmless, seed)
            response_PKT = np.concatenate([response_PKT, other_PT[:, None]], axis=1)
            length_PK = np.concatenate([length_PK, other_len_P[:, None]], axis=1)
        return make_pairs(examples, response_PKT, length_PK, c.cut, seed)

    def collect(state: State, step: int):
        carry = state.carry
        if step % round_steps == 0:
            carry = new_round(state, step // round_steps)
        rows = np.asarray(batches[step])
        responses, lengths = carry.train
        drawn = (responses[rows], lengths[rows], contrasted, [config.seed, step])
        inner_skipped = {"inner_skipped": float(carry.inner.train.skipped)} if inner else {}
        return pairs_of(train.take(rows), train, *drawn), carry, inner_skipped

    def new_round(state: State, number: int) -> Carry:
        """Fresh samples, of the inner policy after it has taken its steps, or of the one that stays as it is."""
        first = number * round_steps
        read = np.concatenate([batches[i] for i in range(first, first + round_steps)])
        used = rows_to_sample(read, train.rows_by_category(len(names)), config.data.minimum)
        model, moved = context.model, state.carry.inner
        if inner:
            bank = finish(state) if number else None
            for step in range((number - 1) * c.policy_steps, number * c.policy_steps) if number else ():
                batch, stats, _ = inner.collect(moved, step, bank)
                moved = State(inner.update(moved.train, batch)[0], stats)
            model = POLICIES[config.policy.tune].merged(context.model, moved.train.params.policy)
        everything = np.arange(len(valid.id))
        return Carry(sample(model, train, used, number), sample(model, valid, everything, number), moved)

    updated = make_update(config, transformation)

    def scores(rewards, examples: Examples, samples, contrasted: bool) -> dict[str, np.ndarray]:
        """Raw rewards of all the pairs where they are read (demo, negative [N, K]), and of whole texts [N, 1 + K]."""
        pieces = []
        for rows, real in batched_rows(len(examples.id), config.evals.batch, "rewards"):
            drawn = (*(x[rows] for x in samples), contrasted, [config.seed, int(rows[0])])
            pairs = pairs_of(examples.take(rows), examples, *drawn)
            score_PGT = token_scores(context.model, rewards, pairs.group)
            demo, negative = pair_rewards(score_PGT, pairs)
            whole = reward.reward_at(score_PGT, pairs.group.response_len)
            pieces.append([x[:real] for x in sharding.fetch((demo, negative, whole))])
        found = dict(zip(("demo", "negative", "whole"), map(np.concatenate, zip(*pieces))))
        if not all(np.isfinite(values).all() for values in found.values()):
            raise InputError(
                "the rewards are not finite: the IRL stage diverged, lower config.irl.optimizer.learning_rate."
            )
        return found

    def evaluate(state: State, step: int):
        if step % c.eval_every and step != c.steps:
            return {}
        s = scores(optimizer.product(state.train), valid, state.carry.valid, contrasted)
        gap_NK = s["demo"] - s["negative"]
        whole_NK = s["whole"][:, :1] - s["whole"][:, 1:]
        K = c.samples  # what follows the samples is the negative of config.irl.contrast
        shown = {
            "accuracy": gap_NK[:, :K] > 0,
            "confidence": 1 / (1 + np.exp(-gap_NK[:, :K] / c.beta)),
            "accuracy_whole": whole_NK[:, :K] > 0,
        }
        if contrasted:
            shown["accuracy_contrast"] = whole_NK[:, K:] > 0
        out = {}
        for name, values in shown.items():
            out |= category_means(values, valid.category, names, name)
        # Calibration, and whether the reward reads length: over all prompts, and of each category.
        rows_of = {"all": np.ones(len(valid.id), bool)}
        rows_of |= {names[i]: valid.category == i for i in np.unique(valid.category)}
        curves = {name: reliability(gap_NK[rows, :K].reshape(-1), c.beta) for name, rows in rows_of.items()}
        for name, rows in rows_of.items():
            suffix = "" if name == "all" else f"/{name}"
            out[f"ece{suffix}"] = calibration_error(curves[name])
            out[f"length_correlation{suffix}"] = correlation(s["whole"][rows, 1 : 1 + K], state.carry.valid[1][rows])
        if context.workdir and step == c.steps and processes.is_writer():
            replace_file(context.workdir.local / "reliability.json", json.dumps(curves, indent=1) + "\n")
        return out

    def finish(state: State) -> reward.Bank:
        rewards = optimizer.product(state.train)
        drawn = np.flatnonzero(state.carry.train[1][:, 0])
        samples = tuple(x[drawn] for x in state.carry.train)
        raw_NG = scores(rewards, train.take(drawn), samples, contrasted=False)["whole"]
        category_N = np.repeat(train.category[drawn], raw_NG.shape[1])
        return reward.NORMALIZE[config.reward.normalize](
            rewards, jnp.asarray(raw_NG.reshape(-1)), jnp.asarray(category_N)
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
    """How often the reward ranks a pair right where it says that it is so sure, by bins of equal width.

    A gap says which of two texts is the demonstration, with confidence σ(|gap|/β) in [½, 1]; it is right where gap > 0.

    Returns:
        for each bin that is not empty {"n", "confidence", "right"}, means of the pairs in it.
    """
    confidence = 1 / (1 + np.exp(-np.abs(gap_N) / beta))
    bin_N = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {"n": int(rows.sum()), "confidence": float(confidence[rows].mean()), "right": float((gap_N[rows] > 0).mean())}
        for rows in (bin_N == b for b in range(bins))
        if rows.any()
    ]


def calibration_error(bins: list[dict[str, float]]) -> float:
    """ECE = Σ_b (n_b / N) |right_b - confidence_b|, N > 0     (expected calibration error, arXiv 1706.04599)"""
    return sum(b["n"] * abs(b["right"] - b["confidence"]) for b in bins) / sum(b["n"] for b in bins)


def correlation(reward_NK: np.ndarray, length_NK: np.ndarray) -> float:
    """Pearson correlation of the samples' raw reward and length; NaN where all are of one length."""
    if np.ptp(length_NK) == 0 or np.ptp(reward_NK) == 0:
        return float("nan")
    return float(np.corrcoef(reward_NK.reshape(-1), length_NK.reshape(-1))[0, 1])
