"""Category rewards on a tiny model: pairs, where they are read, and what the bank learns from them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import method_numpy as mn
from helpers.tiny_models import apply, filled, random_group, tiny
from ml_collections import ConfigDict

from drirl_jax import equations as eq
from drirl_jax.config import default
from drirl_jax.data.examples import Examples, other_kind_demonstrations, require_both_kinds
from drirl_jax.models import reward
from drirl_jax.stages import calibration, irl, optimizer
from drirl_jax.types import InputError

token_scores, raw_score = jax.jit(reward.token_scores), jax.jit(reward.raw_score)
SECTION = ConfigDict({"beta": 0.7, "penalty": 0.3})


def examples(demo, demo_len, category):
    """Records with these demonstrations, and prompts that do not matter; category 3 is the harmless one."""
    N = len(category)
    prompt = np.arange(1, 3 * N + 1, dtype=np.int32).reshape(N, 3)
    demo, demo_len, category = (np.asarray(x, np.int32) for x in (demo, demo_len, category))
    names, index = [str(n) for n in range(N)], np.arange(N, dtype=np.int32)
    columns = prompt, np.full(N, 3, np.int32), demo, demo_len, category, category == 3, index
    return Examples(*columns, names, names, names)


def two_records():
    """Two records against two negatives each: they differ from token 0, 2, 1 and never on."""
    data = examples([[1, 2, 3, 4, 0], [5, 6, 0, 0, 0]], [4, 2], [0, 1])
    negative = np.int32([[[9, 2, 3, 0, 0], [1, 2, 8, 4, 7]], [[5, 7, 7, 7, 0], [5, 6, 0, 0, 0]]])
    return data, negative, np.int32([[3, 5], [4, 2]])


def test_pairs_know_where_their_texts_first_differ_and_where_they_are_read():
    data, negative, length = two_records()
    pairs = irl.make_pairs(data, negative, length, "none", [0, 0])
    np.testing.assert_array_equal(pairs.differ[:, :2], [[0, 2], [1, 5]])
    np.testing.assert_array_equal(pairs.demo_end, [[4, 4], [2, 2]])
    np.testing.assert_array_equal(pairs.negative_end, length)
    np.testing.assert_array_equal(pairs.group.response[:, 1:], negative)
    np.testing.assert_array_equal(pairs.group.response_len, [[4, 3, 5], [2, 4, 2]])
    cut = irl.make_pairs(data, negative, length, "common", [0, 0])
    np.testing.assert_array_equal(cut.demo_end, cut.negative_end)
    assert (cut.demo_end <= np.minimum(data.demo_len[:, None], length)).all()


@pytest.mark.parametrize("cut", ["none", "common"])
def test_losses_equal_the_method_written_out(cut):
    data, negative, length = two_records()
    pairs = irl.make_pairs(data, negative, length, cut, [0, 0])
    score = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32) * 2
    for name, row in irl.LOSSES.items():
        got = row(jnp.asarray(score), pairs, SECTION)
        for p in range(2):
            for k in range(2):
                demo, other = score[p, 0], score[p, 1 + k]
                if name == "token":
                    tokens = data.demo[p, : data.demo_len[p]], negative[p, k, : length[p, k]]
                    want = mn.irl_token(*tokens, demo / 0.7, other / 0.7)
                else:
                    ends = int(pairs.demo_end[p, k]), int(pairs.negative_end[p, k])
                    want = mn.irl_pair(demo[ends[0] - 1], other[ends[1] - 1], name, 0.7, 0.3)
                np.testing.assert_allclose(got[p, k], want, rtol=1e-5, err_msg=f"{name} {p} {k}")


def test_a_score_at_a_token_is_the_score_of_the_text_up_to_it():
    model, group = tiny(), random_group(P=3, G=2)
    rewards = reward.init_lora(model, jax.random.key(0), 4, rank=4, alpha=4, targets=("q", "down"))
    head = jax.random.normal(jax.random.key(2), rewards.heads.shape)
    rewards = rewards.replace(adapter=filled(rewards.adapter, 1), heads=head)
    everywhere = token_scores(model, rewards, group)
    for t in range(1, group.response.shape[-1] + 1):
        short = group.replace(response_len=jnp.full((3, 2), t))
        np.testing.assert_allclose(raw_score(model, rewards, short), everywhere[..., t - 1], atol=1e-6)
        alone = short.replace(response=group.response[..., :t])
        np.testing.assert_allclose(raw_score(model, rewards, alone), everywhere[..., t - 1], atol=1e-5)


def test_contrast_takes_demonstrations_of_the_other_kind():
    category = np.arange(12) % 4
    data = examples(np.repeat(np.arange(12)[:, None], 5, 1), np.arange(12) % 5 + 1, category)
    drawn = set()
    for step in range(60):
        tokens, length = other_kind_demonstrations(data, data, [0, step])
        source = tokens[:, 0]
        assert ((category[source] == 3) != (category == 3)).all()
        np.testing.assert_array_equal(length, data.demo_len[source])
        drawn |= set(source.tolist())
    assert drawn == set(range(12))
    np.testing.assert_array_equal(tokens, other_kind_demonstrations(data, data, [0, 59])[0])


def test_a_round_samples_what_it_reads_and_enough_of_every_category():
    # Of category 0 three rows are read, which is enough; of category 1 one, of category 2 none, and it has but one.
    by_category = [np.arange(0, 5), np.arange(5, 9), np.array([9])]
    got = irl.rows_to_sample(np.array([4, 2, 8, 0, 2]), by_category, minimum=2)
    np.testing.assert_array_equal(got, [0, 2, 4, 5, 6, 8, 9])


def test_contrast_needs_both_kinds():
    demo, length = np.ones((3, 5)), [5, 5, 5]
    require_both_kinds(examples(demo, length, [0, 3, 1]), "valid")
    for category in ([0, 1, 2], [3, 3, 3]):
        with pytest.raises(InputError, match="split valid has prompts of one kind alone"):
            require_both_kinds(examples(demo, length, category), "valid")


def test_a_head_alone_reads_the_trunk_and_whole_models_are_each_its_own():
    model, group = tiny(), random_group(P=4, G=2)
    group = group.replace(category=jnp.array([0, 1, 1, 2]))
    head = jax.random.normal(jax.random.key(2), (3, 32))
    alone = reward.init_head(model, jax.random.key(0), 3).replace(heads=head)
    hidden = apply(model, group)[1]
    for p in range(4):
        got = token_scores(model, alone, group)[p]
        np.testing.assert_allclose(got, hidden[p] @ head[group.category[p]], atol=1e-5)
    # Whole models start from the trunk; another one for category 1 changes its prompts alone.
    full = reward.init_full(model, jax.random.key(0), 3).replace(heads=head)
    base = token_scores(model, alone, group)
    np.testing.assert_allclose(token_scores(model, full, group), base, atol=1e-5)
    other = tiny(seed=1)
    mixed = full.replace(models=jax.tree.map(lambda all_C, new: all_C.at[1].set(new), full.models, other))
    got = token_scores(model, mixed, group)
    want = jnp.where((group.category == 1)[:, None, None], token_scores(other, alone, group), base)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_one_reward_for_all_is_that_of_every_category():
    model, group = tiny(), random_group(P=3, G=2)
    one = reward.init_lora(model, jax.random.key(0), 1, rank=4, alpha=4, targets=("q",))
    one = one.replace(adapter=filled(one.adapter, 1), heads=jax.random.normal(jax.random.key(2), (1, 32)))
    of_first = raw_score(model, one, group.replace(category=jnp.zeros(3, int)))
    for categories in ([2, 0, 1], [1, 1, 7]):
        given = group.replace(category=jnp.array(categories))
        np.testing.assert_array_equal(raw_score(model, one, given), of_first)
    raw, category = jnp.arange(6.0), jnp.arange(6) % 3
    bank = reward.standardise(one, raw, category)
    np.testing.assert_allclose((bank.mean[0], bank.std[0]), (2.5, np.std(np.arange(6))), rtol=1e-6)


@pytest.mark.parametrize("kind", reward.KINDS)
def test_all_categories_at_once_are_each_of_them(kind):
    model, group = tiny(), random_group(P=3, G=2)
    rewards = reward.KINDS[kind](model, jax.random.key(0), 4, rank=4, alpha=4, targets=("q", "down"))
    rewards = rewards.replace(
        adapter=filled(rewards.adapter, 1),
        heads=jax.random.normal(jax.random.key(2), rewards.heads.shape),
        models=jax.tree.map(lambda w: w * jnp.arange(1.0, 5.0).reshape(4, *[1] * (w.ndim - 1)), rewards.models),
    )
    bank = reward.Bank(rewards, mean=jnp.arange(4.0), std=jnp.arange(1.0, 5.0))
    got, score = jax.jit(reward.score_by_all)(model, bank, group), jax.jit(reward.score)
    for c in range(4):
        one = score(model, bank, group.replace(category=jnp.full(3, c)))
        np.testing.assert_allclose(got[..., c], one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, kind",
    [(name, "lora") for name in irl.LOSSES] + [("logistic", kind) for kind in reward.KINDS if kind != "lora"],
)
def test_the_bank_learns_to_tell_its_pairs_apart_category_by_category(name, kind):
    model, rng = tiny(), np.random.default_rng(2)
    tokens = rng.integers(1, 60, (4, 2, 5), dtype=np.int32)
    data = examples(tokens[:, 0], [5, 3, 4, 5], [0, 1, 2, 2])
    pairs = irl.make_pairs(data, tokens[:, 1:], np.int32([[4], [5], [5], [3]]), "none", [0, 0])
    rewards = reward.KINDS[kind](model, jax.random.key(0), 4, rank=4, alpha=4, targets=("q", "down"))
    c = default().irl.optimizer
    c.learning_rate = 0.05 if kind == "head" else 1e-3
    transformation = optimizer.make(c, 100)
    train = optimizer.init(transformation, rewards)
    section = ConfigDict({"beta": 1.0, "penalty": 0.5})
    stage_loss = partial(irl.loss, model, partial(irl.LOSSES[name], section=section), jnp.ones(1))
    step = jax.jit(lambda t: optimizer.step(transformation, stage_loss, t, pairs, 1))
    _, first = step(train)
    for _ in range(100):
        train, scalars = step(train)
    # Rewards of 0 at first. The linear loss has its least value, -1 / (2 β² λ), at r = ±1 / (2 β λ).
    begin, end = (0, -1) if name == "linear" else (np.log(2), 0)
    assert first["loss"] == pytest.approx(begin) and scalars["loss"] < end + 0.05 and scalars["pairs_right"] == 1
    # Category 3 had no pair: nothing of it moved.
    assert not train.params.heads[3].any()
    for matrix, pair in train.params.adapter.items():
        np.testing.assert_array_equal(pair.a[:, 3], rewards.adapter[matrix].a[:, 3])
        assert not pair.b[:, 3].any()
    if kind == "full":
        jax.tree.map(lambda w, own: np.testing.assert_array_equal(w, own[3]), model, train.params.models)


def test_the_weights_of_the_negatives_average_their_losses():
    model, (data, negative, length) = tiny(), two_records()
    pairs = irl.make_pairs(data, negative, length, "none", [0, 0])
    rewards = reward.init_lora(model, jax.random.key(0), 2, rank=4, alpha=4, targets=("q",))
    rewards = rewards.replace(heads=jax.random.normal(jax.random.key(1), rewards.heads.shape))
    row = partial(irl.logistic, section=default().irl)
    loss = jax.jit(partial(irl.loss, model, row))
    one, other, both = (loss(jnp.array(w), rewards, pairs)[0] for w in ([1.0, 0], [0, 1.0], [1, 3.0]))
    assert abs(one - other) > 1e-3
    np.testing.assert_allclose(both, (one + 3 * other) / 4, rtol=1e-6)


def test_standardised_rewards_have_mean_0_and_deviation_1_in_each_category():
    rng = np.random.default_rng(0)
    raw, category = jnp.asarray(rng.normal(size=60) * 3 + 5, jnp.float32), jnp.asarray(np.arange(60) % 3)
    rewards = reward.Rewards({}, jnp.zeros((4, 2)), jnp.zeros(4))
    bank = reward.standardise(rewards, raw, category)
    assert (bank.mean[3], bank.std[3]) == (0, 1)  # a category that was left out
    for c in range(3):
        mine = np.asarray(raw)[np.asarray(category) == c]
        np.testing.assert_allclose((bank.mean[c], bank.std[c]), (mine.mean(), mine.std()), rtol=1e-5)


@pytest.mark.parametrize("value", [0.1, 7.7, -123.4, 1e4, 1e20])
def test_equal_rewards_are_standardised_to_0(value):
    rewards = reward.Rewards({}, jnp.zeros((1, 2)), jnp.zeros(1))
    raw = jnp.full(37, value, jnp.float32)
    bank = reward.standardise(rewards, raw, jnp.zeros(37, jnp.int32))
    z = eq.zscore(raw, bank.mean[0], bank.std[0])
    assert (z == 0).all() and bank.std[0] > 0
    # A unit in the last place is rounding, not a difference.
    assert jnp.abs(eq.zscore(jnp.nextafter(raw, jnp.inf), bank.mean[0], bank.std[0])).max() < 0.2


def test_common_cut_gives_both_texts_of_a_pair_one_length():
    demo, sample = np.array([30, 6, 40]), np.array([[40, 12], [40, 3], [9, 40]])
    cuts = np.stack([irl.common_cut(demo, sample, [0, i]) for i in range(300)])
    top = np.minimum(demo[:, None], sample)
    assert (cuts <= top).all() and (cuts >= np.minimum(irl.SHORTEST_CUT, top)).all()
    assert (cuts.max(0) == top).all() and (cuts.min(0) == np.minimum(8, top)).all()
    np.testing.assert_array_equal(irl.common_cut(demo, sample, [0, 7]), cuts[7])


def test_reliability_by_hand():
    # β = 1. Gaps of ±ln 3: confidence ¾, two of three right; a gap of ln 19: confidence .95, right. So of ten bins of
    # [½, 1] two are held, and the error is (3 |⅔ - ¾| + |1 - .95|) / 4 = .075.
    bins = calibration.reliability(np.log([3, 1 / 3, 3, 19]), 1.0)
    assert [b["n"] for b in bins] == [3, 1]
    np.testing.assert_allclose([[b["confidence"], b["right"]] for b in bins], [[0.75, 2 / 3], [0.95, 1]])
    assert calibration.calibration_error(bins) == pytest.approx(0.075)
