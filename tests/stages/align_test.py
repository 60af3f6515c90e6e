"""Steps of the align stage on a tiny run's context: every objective, and options that whole runs leave out."""

import contextlib
import json

import jax
import numpy as np
import optax
import pytest
from helpers import method_numpy as ref
from helpers.tiny_context import prepared, tiny

from drirl_jax.data.text import SPLIT
from drirl_jax.runtime import sharding
from drirl_jax.runtime.checkpoint import Checkpoints
from drirl_jax.stages import align, irl, samples
from drirl_jax.stages.base import Context, SharedLayers
from drirl_jax.types import InputError


def kept_and_restored(stage, state, folder):
    """The state as a run that was killed finds it again."""
    with contextlib.closing(Checkpoints(folder, keep=1)) as kept:
        kept.save(1, state)
    _, again = Checkpoints(folder, keep=1).restore(sharding.place(stage.init()))
    jax.tree.map(np.testing.assert_array_equal, state, again)
    return again


def test_prompts_that_the_policy_has_no_positions_for_are_refused(policy, cache, tmp_path):
    for path in policy.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    told = json.loads((tmp_path / "config.json").read_text())
    context = tiny(policy, cache)
    longest = max(len(of.prefix) + int(of.prompt_len.max()) for of in context.examples.values())
    behind = max(context.config.sampler.max_new, context.config.evals.max_new)
    for more in (0, -1):
        positions = longest + behind + more
        (tmp_path / "config.json").write_text(json.dumps(told | {"max_position_embeddings": positions}))
        refused = pytest.raises(InputError, match=f"a prompt of {longest} tokens with {behind} .* at most {positions}")
        with refused if more else contextlib.nullcontext():
            tiny.__wrapped__(tmp_path, cache)


def no_transfers(step):
    """An update moves nothing between host and device by itself, once the first has compiled it.

    On a CPU this finds NumPy arrays among what an update is given; arrays of the device lie in the host's memory there.
    """
    return jax.transfer_guard("disallow") if step else contextlib.nullcontext()


OF_NO_GROUP = {"demonstration": "apart", "contrast": "apart", "harmless_refusals": 1.0}


@pytest.mark.parametrize(
    "objective, options",
    [
        ("ppo", {}),
        ("dpo", {"dpo": {"pairs": "demonstration"}}),
        ("dpo", {"dpo": {"pairs": "self", "online": True}}),
        ("sft", {"scaling": {"combine": "none"}}),
    ],
    ids=["ppo", "dpo", "dpo_self_online", "sft"],
)
def test_steps_of_each_objective(policy, cache, tmp_path, objective, options):
    sections = {"align": {"objective": objective, "epochs": 2}, "group": OF_NO_GROUP} | options
    context, bank = prepared(policy, cache, **sections)
    kept = {}
    stage = align.make(context, bank, keep=kept.__setitem__)
    state, first = stage.init(), None
    start = jax.tree.map(np.asarray, state.train.params)
    for step in range(2):
        batch, carry, scalars = stage.collect(state, step)
        with no_transfers(step):
            trained, told = stage.update(state.train, batch)
        state = kept_and_restored(stage, state._replace(train=trained, carry=carry), tmp_path / str(step))
        told = {name: float(value) for name, value in told.items()}
        first = first or told
        assert np.isfinite(list(told.values())).all() and np.isfinite(list(scalars.values())).all()
    assert int(state.train.step) == 4  # two steps of two updates
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start.policy, stage.finish(state))
    assert max(jax.tree.leaves(moved)) > 0
    if objective == "ppo":
        assert np.abs(state.train.params.value.weight).max() > 0
        assert {"kl", "entropy", "value_loss"} < told.keys() and "alpha_d" in scalars
    if objective == "dpo":
        assert 0 <= told["pairs_right"] <= 1 and 0 < scalars["pairs"] <= 1
    told_of = {"ppo": {"scaled"}, "dpo": set()}
    for row in (row for rows in kept.values() for row in rows):
        of = {"text", "reward", "alpha_d", "alpha", "masked"} | told_of[objective]
        assert all(response.keys() == of and None not in response.values() for response in row["responses"])
    assert kept.keys() == (set() if objective == "sft" else {1, 2})
    if objective == "sft":
        _, again = stage.update(state.train, stage.collect(state, 0)[0])  # the first step's batch
        assert float(again["loss"]) < first["loss"] and not scalars


def test_minibatches_are_updates_one_after_the_other(policy, cache):
    context, bank = prepared(policy, cache, align={"minibatches": 2})
    stage = align.make(context, bank)
    whole = align.make(prepared(policy, cache)[0], bank)
    batch, _, _ = stage.collect(stage.init(), 0)
    half = len(batch.group.prompt) // 2
    one_by_one = whole.init().train
    for part in (slice(half), slice(half, None)):
        one_by_one, _ = whole.update(one_by_one, jax.tree.map(lambda x: x[part], batch))
    together, told = stage.update(stage.init().train, batch)
    assert int(together.step) == 2 and np.isfinite(float(told["loss"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), together.params, one_by_one.params)


@pytest.mark.parametrize(
    "sections, shared",
    [
        ({"policy": {"tune": "full"}, "reward": {"layers": 1}}, SharedLayers(1, policy=False, rewards=True)),
        ({"policy": {"layers": 1}}, SharedLayers(1, policy=True, rewards=False)),
        ({"policy": {"tune": "full"}, "reward": {"kind": "head"}}, SharedLayers(2, policy=False, rewards=True)),
    ],
    ids=["last_layers_of_rewards", "of_the_policy", "heads"],
)
def test_layers_passed_once_change_nothing(policy, cache, monkeypatch, sections, shared):
    def first_step():
        context, bank = prepared(policy, cache, **sections)
        stage = align.make(context, bank)
        state = stage.init()
        batch, _, scalars = stage.collect(state, 0)
        trained, told = stage.update(state.train, batch)
        # Of the update the gradient, which Adam's first moment holds: Adam divides it by its own size, so that in a
        # parameter that it hardly touches rounding alone is a step.
        gradient = optax.tree_utils.tree_get(trained.opt_state, "mu")
        return context.shared_layers, gradient, (batch.ref_logp, scalars | {k: float(v) for k, v in told.items()})

    found, gradient, once = first_step()
    assert found == shared
    monkeypatch.setattr(Context, "shared_layers", SharedLayers(0, policy=False, rewards=False))
    _, expected, again = first_step()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), once, again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), gradient, expected)


def test_a_step_with_a_calibrated_baseline_and_masked_responses_left_out(policy, cache):
    scaled = {"split": "clause", "baseline": "dataset", "mask": "threshold", "threshold": 0.5, "drop_masked": True}
    context, bank = prepared(policy, cache, scaling=scaled, policy_loss={"reduce": "token", "ratio": "sequence"})
    kept = {}
    stage = align.make(context, bank, keep=kept.__setitem__)
    state, deltas = stage.init(), []
    for step in range(2):
        batch, carry, scalars = stage.collect(state, step)
        trained, told = stage.update(state.train, batch)
        state = state._replace(train=trained, carry=carry)
        deltas.append(carry.stats.delta)
    assert np.isfinite(told["loss"]) and 0 < scalars["kept"] < 1
    assert (deltas[0] == deltas[1]).all() and (deltas[0] > 0).all() and (deltas[0] < 2).all()
    responses = [response for rows in kept.values() for row in rows for response in row["responses"]]
    assert len(responses) == 64 and all((of["scaled"] is None) == of["masked"] for of in responses)
    left_out = np.asarray(batch.group.response_len) == 0
    assert left_out.mean() == pytest.approx(1 - scalars["kept"]) and (batch.weights.members[left_out] == 0).all()


def test_steps_whose_samples_are_kept():
    chosen = {count: samples.steps_kept(50, count) for count in (0, 1, 2, 3)}
    assert chosen == {0: set(), 1: {50}, 2: {1, 50}, 3: {1, 26, 50}}
    assert samples.steps_kept(1, 3) == {1} and samples.steps_kept(4, 9) == {1, 2, 3, 4}


def test_kept_samples_have_the_numbers_of_the_equations(policy, cache):
    # One prompt of each of the eight categories a step: the rows hold the whole batch.
    context, bank = prepared(policy, cache, group=OF_NO_GROUP, scaling={"drop": 0.3}, metrics={"samples": 2})
    context.config.align.steps = 2
    kept = {}
    stage = align.make(context, bank, keep=kept.__setitem__)
    state, names = stage.init(), context.config.data.categories
    delta_mean, gap_mean = [None] * 8, [None] * 8

    def parts(text):
        return context.embedder(SPLIT["sentence"](text))

    for step in range(2):
        _, carry, scalars = stage.collect(state, step)
        state = state._replace(carry=carry)
        rows = kept[step + 1]
        assert [row["category"] for row in rows] == list(names)
        said = [[parts(of["text"]) for of in row["responses"]] for row in rows]
        demos = [parts(row["demonstration"]) for row in rows]
        delta = np.array([
            [1 - ref.aligned_similarity(y, o, "response") if len(y) else 1.0 for y in of_prompt]
            for of_prompt, o in zip(said, demos)
        ])  # fmt: skip
        reward_PG = np.array([[of["reward"] for of in row["responses"]] for row in rows])
        gap = np.array([[row["demo_reward"]] for row in rows]) - reward_PG
        base = [now if mean is None else mean for mean, now in zip(delta_mean, delta.mean(axis=1))]
        gap_base = [now if mean is None else mean for mean, now in zip(gap_mean, gap.mean(axis=1))]
        mask = ref.outlier_mask(gap, range(8), gap_base, 0.3)
        alpha_d = ref.data_alpha(delta, np.repeat(np.array(base)[:, None], 4, axis=1), "formula")
        alpha_m = ref.model_alpha(gap, range(8), gap_base, mask, "sigma_of_mean")
        alpha = ref.combined(alpha_d, alpha_m, "product", "prompt")
        advantage = ref.group_advantage(reward_PG, context.config.group.eps)
        want = {"alpha_d": alpha_d, "alpha": alpha, "advantage": advantage, "scaled": alpha * advantage}
        for name, value in want.items():
            told = [[of[name] for of in row["responses"]] for row in rows]
            np.testing.assert_allclose(told, value, rtol=2e-5, atol=2e-5, err_msg=name)
        np.testing.assert_allclose([row["alpha_m"] for row in rows], alpha_m, rtol=2e-5)
        assert [[of["masked"] for of in row["responses"]] for row in rows] == (mask == 0).tolist()
        assert (mask == 0).sum() == 8 and np.std(reward_PG) > 0
        assert np.mean(alpha_d) == pytest.approx(scalars["alpha_d"], rel=1e-5)
        delta_mean = [ref.running_mean(*pair, 0.9) for pair in zip(delta_mean, delta.mean(axis=1))]
        gap_mean = [ref.running_mean(*pair, 0.9) for pair in zip(gap_mean, gap.mean(axis=1))]
    assert kept.keys() == {1, 2}


def test_the_inner_policy_of_irl_moves_between_rounds(policy, cache, tmp_path):
    # The first round's samples are the initial policy's, the second's those of one that has taken a step.
    sections = {"irl": {"rounds": 2, "steps": 2}, "group": OF_NO_GROUP, "align": {"optimizer": {"learning_rate": 0.1}}}
    carries = {}
    for name in ("frozen", "alternate"):
        sections["irl"] |= {"policy": name, "policy_steps": 1}
        context, _ = prepared(policy, cache, **sections)
        stage = irl.make(context)
        state, carries[name] = stage.init(), []
        for step in range(2):
            batch, carry, _ = stage.collect(state, step)
            carries[name].append(jax.device_get((carry.train, carry.valid)))
            with no_transfers(step):
                train, _ = stage.update(state.train, batch)
            state = state._replace(train=train, carry=carry)
    assert int(state.carry.inner.train.step) == 1
    kept_and_restored(stage, state, tmp_path / "kept")
    (first, second), (same, other) = carries["frozen"], carries["alternate"]
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(second), jax.tree.leaves(other)))
