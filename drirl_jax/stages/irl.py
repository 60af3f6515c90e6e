"""Stage 1, maximum-likelihood IRL: it learns category rewards from demonstrations against the policy's samples."""

from __future__ import annotations

import json
from functools import partial
from typing import NamedTuple, Sequence, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from drirl_jax import equations as eq
from drirl_jax.data import pipeline
from drirl_jax.data.examples import Examples, other_kind_demonstrations, require_both_kinds
from drirl_jax.models import reward
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime import processes, sharding
from drirl_jax.runtime.files import replace_file
from drirl_jax.stages import optimizer
from drirl_jax.stages.align import Alignment
from drirl_jax.stages.base import POLICIES, Context, Stage, State, batched_rows, category_means, make_group, sample_all
from drirl_jax.stages.calibration import calibration_error, correlation, reliability
from drirl_jax.types import Array, Group, InputError, TrainState

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
    length_PM, t = pairs.group.response_len, jnp.arange(score_PGT.shape[-1])[None, None]
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


def rows_to_sample(batch_rows: np.ndarray, rows_C: Sequence[np.ndarray], minimum: int) -> np.ndarray:
    """The rows that need samples in a round.

    These are the rows that the round trains on. A category with fewer than `minimum` of them adds its first `minimum`
    rows: without some samples its rewards could not be standardised.

    Args:
        batch_rows: row numbers that the round trains on, perhaps repeated.
        rows_C: the row numbers of each category.
    """
    extra_rows = [rows[:minimum] for rows in rows_C if np.isin(rows, batch_rows).sum() < minimum]
    return np.unique(np.concatenate([batch_rows, *extra_rows]))


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
    def updated(train_state: TrainState, trunk, batch):
        stage_loss = partial(loss, trunk, pair_loss, jnp.array(weight_K))
        return optimizer.step(transformation, stage_loss, train_state, batch, c.accumulate)

    return updated


Samples: TypeAlias = tuple[np.ndarray, np.ndarray]  # responses [N, K, T] to the prompts of a split, and lengths [N, K]


class Carry(NamedTuple):
    """What the stage carries from step to step, beside the train state.

    Attributes:
        train, valid: samples of the training and of the held-out prompts.
        inner: the state of the inner policy's alignment, with irl.policy='alternate'.
    """

    train: Samples
    valid: Samples
    inner: State | None = None


def make(context: Context) -> Stage:
    """The IRL stage. Its product is a `reward.Bank`."""
    return RewardLearning(context).stage()


class RewardLearning:
    """The parts of the IRL stage, which `stage` puts together.

    The steps form config.irl.rounds rounds. A round begins with new samples of the policy; `collect` pairs these with
    the demonstrations.
    """

    def __init__(self, context: Context):
        self.context, self.config = context, context.config
        config, c = context.config, context.config.irl
        self.train, valid = context.examples["train"], context.examples["valid"]
        # config.data.shares may leave a category out. Its reward learns nothing, so we do not evaluate it.
        self.valid = valid.take(np.flatnonzero(np.isin(valid.category, self.train.category)))
        self.transformation = optimizer.make(c.optimizer, c.steps)
        self.round_steps = c.steps // c.rounds
        self.has_contrast = c.contrast > 0
        for split in ("train", "valid") if self.has_contrast else ():
            require_both_kinds(context.examples[split], split)
        self.rows_C = self.train.rows_by_category(len(config.data.categories))
        mix = pipeline.natural if config.data.mixing == "natural" else pipeline.balanced
        self.batches = mix([rows for rows in self.rows_C if len(rows)], c.batch, config.seed)
        # The inner policy takes steps of the align stage between rounds. So the rewards see samples that exploit them.
        self.inner = Alignment(context, "inner_samples") if c.policy == "alternate" else None
        self.updated = make_update(config, self.transformation)
        self.token_scores = jax.jit(reward.token_scores)

    def stage(self) -> Stage:
        """See `make`."""
        return Stage(
            steps=self.config.irl.steps,
            init=self.init,
            collect=self.collect,
            update=lambda train_state, batch: self.updated(train_state, self.context.model, batch),
            evaluate=self.evaluate,
            finish=self.finish,
            bar_scalars=("loss", "pairs_right", "accuracy"),
        )

    def init(self) -> State:
        """The state before the first step."""
        inner_state = self.inner.init() if self.inner else None
        carry = Carry(self.no_samples(self.train), self.no_samples(self.valid), inner_state)
        return State(optimizer.init(self.transformation, init_rewards(self.context)), carry)

    # ------------------------------------------------------------------------------------------ collect

    def collect(self, state: State, step: int) -> tuple[Pairs, Carry, dict[str, float]]:
        """A batch of demonstrations, each against the samples of this round."""
        carry = state.carry
        if step % self.round_steps == 0:
            carry = self.begin_round(state, step // self.round_steps)
        rows = np.asarray(self.batches[step])
        samples, seed = tuple(x[rows] for x in carry.train), [self.config.seed, step]
        pairs = self.pair_with_negatives(self.train.take(rows), self.train, samples, self.has_contrast, seed)
        return pairs, carry, {"inner_skipped": float(carry.inner.train.skipped)} if carry.inner else {}

    def begin_round(self, state: State, number: int) -> Carry:
        """New samples for a round: of the inner policy after its steps, or else of the fixed policy."""
        model, inner_state = self.context.model, state.carry.inner
        if self.inner:
            if number:
                inner_state = self.train_inner_policy(self.inner.stage(self.finish(state)), inner_state, number - 1)
            merge = POLICIES[self.config.policy.tune].merge
            model = merge(self.context.model, inner_state.train.params.policy)
        steps = range(number * self.round_steps, (number + 1) * self.round_steps)
        batch_rows = np.concatenate([self.batches[step] for step in steps])
        train_rows = rows_to_sample(batch_rows, self.rows_C, self.config.data.minimum)
        train_samples = self.sample(model, self.train, train_rows, number)
        return Carry(train_samples, self.sample(model, self.valid, np.arange(len(self.valid.id)), number), inner_state)

    def train_inner_policy(self, inner_stage: Stage, inner_state: State, number: int) -> State:
        """The state of the inner policy after its steps that follow round `number`."""
        policy_steps = self.config.irl.policy_steps
        for step in range(number * policy_steps, (number + 1) * policy_steps):
            batch, carry, _ = inner_stage.collect(inner_state, step)
            inner_state = State(inner_stage.update(inner_state.train, batch)[0], carry)
        return inner_state

    def no_samples(self, examples: Examples) -> Samples:
        """The samples before any sampling: all 0."""
        shape = (len(examples.id), self.config.irl.samples)
        return np.zeros((*shape, self.config.sampler.max_new), np.int32), np.zeros(shape, np.int32)

    def sample(self, model: Transformer, examples: Examples, rows: np.ndarray, round_number: int) -> Samples:
        """The model's samples for these rows; the other rows stay 0."""
        config, c = self.config, self.config.irl
        rollout = sample_all(
            self.context, model, examples.take(rows), self.context.key("irl_samples", round_number),
            max(1, config.evals.batch // c.samples),
            group=c.samples, max_new=config.sampler.max_new, temperature=config.sampler.temperature,
        )  # fmt: skip
        response_NKT, length_NK = self.no_samples(examples)
        response_NKT[rows], length_NK[rows] = rollout.response, rollout.response_len
        return response_NKT, length_NK

    def pair_with_negatives(
        self, examples: Examples, pool: Examples, samples: Samples, has_contrast: bool, seed: list[int]
    ) -> Pairs:
        """The demonstrations against these samples; with a contrast also one of the other kind from the pool."""
        response_PKT, length_PK = samples
        if has_contrast:
            demo_PT, demo_len_P = other_kind_demonstrations(examples, pool, seed)
            response_PKT = np.concatenate([response_PKT, demo_PT[:, None]], axis=1)
            length_PK = np.concatenate([length_PK, demo_len_P[:, None]], axis=1)
        return make_pairs(examples, response_PKT, length_PK, self.config.irl.cut, seed)

    # ------------------------------------------------------------------------------------------ evaluate, finish

    def evaluate(self, state: State, step: int) -> dict[str, float]:
        """Accuracy on held-out pairs, calibration, and correlation with length."""
        c = self.config.irl
        if step % c.eval_every and step != c.steps:
            return {}
        scores = self.score_pairs(optimizer.product(state.train), self.valid, state.carry.valid, self.has_contrast)
        gap_NK = (scores["demo"] - scores["negative"])[:, : c.samples]
        curves = {name: reliability(gap_NK[rows].reshape(-1), c.beta) for name, rows in self.valid_subsets().items()}
        if self.context.workdir and step == c.steps and processes.is_writer():
            replace_file(self.context.workdir.local / "reliability.json", json.dumps(curves, indent=1) + "\n")
        return self.accuracies(scores) | self.calibration(scores, curves, state.carry.valid)

    def valid_subsets(self) -> dict[str, np.ndarray]:
        """Masks [N] of the held-out prompts: of all, and of each category present."""
        names, category_N = self.config.data.categories, self.valid.category
        return {"all": np.ones(len(category_N), bool)} | {names[i]: category_N == i for i in np.unique(category_N)}

    def accuracies(self, scores: dict[str, np.ndarray]) -> dict[str, float]:
        """The share of pairs that the rewards rank right, by category: at the ends of `Pairs`, and of whole texts."""
        K, beta = self.config.irl.samples, self.config.irl.beta
        gap_NK = scores["demo"] - scores["negative"]
        whole_gap_NK = scores["whole"][:, :1] - scores["whole"][:, 1:]
        measures = {
            "accuracy": gap_NK[:, :K] > 0,
            "confidence": 1 / (1 + np.exp(-gap_NK[:, :K] / beta)),
            "accuracy_whole": whole_gap_NK[:, :K] > 0,
        }
        if self.has_contrast:  # a demonstration of the other kind follows the K samples
            measures["accuracy_contrast"] = whole_gap_NK[:, K:] > 0
        scalars = {}
        for name, values in measures.items():
            scalars |= category_means(values, self.valid.category, self.config.data.categories, name)
        return scalars

    def calibration(self, scores: dict[str, np.ndarray], curves: dict[str, list], samples: Samples) -> dict[str, float]:
        """The calibration error, and the correlation of reward and length: over all prompts, and for each category."""
        scalars, (_, length_NK) = {}, samples
        sample_reward_NK = scores["whole"][:, 1 : 1 + self.config.irl.samples]
        for name, rows in self.valid_subsets().items():
            suffix = "" if name == "all" else f"/{name}"
            scalars[f"ece{suffix}"] = calibration_error(curves[name])
            scalars[f"length_correlation{suffix}"] = correlation(sample_reward_NK[rows], length_NK[rows])
        return scalars

    def score_pairs(
        self, rewards: reward.Rewards, examples: Examples, samples: Samples, has_contrast: bool
    ) -> dict[str, np.ndarray]:
        """Raw rewards: "demo" and "negative" [N, K] at the ends of `Pairs`, "whole" [N, 1 + K] of whole texts.

        Raises:
            InputError: a reward is not finite.
        """
        pieces = []
        for rows, num_real in batched_rows(len(examples.id), self.config.evals.batch, "rewards"):
            batch_samples, seed = tuple(x[rows] for x in samples), [self.config.seed, int(rows[0])]
            pairs = self.pair_with_negatives(examples.take(rows), examples, batch_samples, has_contrast, seed)
            score_PMT = self.token_scores(self.context.model, rewards, pairs.group)
            demo_PK, negative_PK = pair_rewards(score_PMT, pairs)
            whole_PM = reward.reward_at(score_PMT, pairs.group.response_len)
            pieces.append([x[:num_real] for x in sharding.fetch((demo_PK, negative_PK, whole_PM))])
        scores = dict(zip(("demo", "negative", "whole"), map(np.concatenate, zip(*pieces))))
        if not all(np.isfinite(values).all() for values in scores.values()):
            raise InputError(
                "the rewards are not finite: the IRL stage diverged, lower config.irl.optimizer.learning_rate."
            )
        return scores

    def finish(self, state: State) -> reward.Bank:
        """The rewards, normalised over the samples of the last round."""
        rewards = optimizer.product(state.train)
        sampled_rows = np.flatnonzero(state.carry.train[1][:, 0])
        samples = tuple(x[sampled_rows] for x in state.carry.train)
        raw_NM = self.score_pairs(rewards, self.train.take(sampled_rows), samples, has_contrast=False)["whole"]
        category_N = np.repeat(self.train.category[sampled_rows], raw_NM.shape[1])
        normalize = reward.NORMALIZE[self.config.reward.normalize]
        return normalize(rewards, jnp.asarray(raw_NM.reshape(-1)), jnp.asarray(category_N))
