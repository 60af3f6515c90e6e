"""The constraint of help by harm: its steps on a tiny run's context, its multipliers, and a run that was killed."""

import jax
import numpy as np
import pytest
from helpers import method_numpy as ref
from helpers import stand_in_stage
from helpers.tiny_context import prepared

from drirl_jax import checks, config, loading
from drirl_jax.models import reward
from drirl_jax.runtime import metrics, workdirs
from drirl_jax.runtime.bucket import Workdir
from drirl_jax.runtime.checkpoint import Checkpoints
from drirl_jax.stages import align
from drirl_jax.stages.rewards import constraint
from drirl_jax.types import InputError

HARMFUL = config.HARM_CATEGORIES


def constrained(policy, cache, **options):
    """A tiny run's context whose rewards are under the constraint, and a bank."""
    return prepared(policy, cache, reward={"route": "constraint"}, constraint=options, align={"steps": 4})


def step_of(stage, state, step):
    """The state after a step, and the step's scalars."""
    batch, carry, scalars = stage.collect(state, step)
    trained, update_scalars = stage.update(state.train, batch)
    scalars |= {name: float(value) for name, value in update_scalars.items()}
    return state._replace(train=trained, carry=carry), scalars


def test_steps_have_the_numbers_of_the_equations(policy, cache, monkeypatch):
    # One prompt of each of the eight categories a step; the multipliers differ from the second step on.
    context, bank = constrained(policy, cache, limit=0.25, rate=0.2, initial=0.5, max_multiplier=0.75)
    names, G = context.config.data.categories, context.config.align.group_size
    scored, make_scored = [], align.ScoredGroup

    def recorded(*fields):
        scored.append(make_scored(*fields))
        return scored[-1]

    monkeypatch.setattr(align, "ScoredGroup", recorded)
    stage = align.make(context, bank)
    state, multipliers = stage.init(), [0.5] * 7 + [0.0]
    np.testing.assert_array_equal(state.carry.multipliers, np.float32(multipliers))
    for step in range(3):
        state, scalars = step_of(stage, state, step)
        group = scored[step].group
        each = np.asarray(reward.score_by_all(context.model, bank, group))
        category = np.asarray(group.category)
        own = np.stack([each[p, :, c] for p, c in enumerate(category)])
        want = ref.constrained_reward(each[..., 7], -own, np.array(multipliers)[category])
        np.testing.assert_allclose(scored[step].reward, want, atol=2e-5)
        np.testing.assert_allclose(scored[step].reward[category == 7], own[category == 7], atol=2e-5)
        np.testing.assert_allclose([scalars[f"lambda/{name}"] for name in HARMFUL], multipliers[:7], atol=1e-5)
        assert "lambda/harmless" not in scalars and "harm/harmless" not in scalars
        assert scalars["lambda"] == pytest.approx(np.mean(multipliers[:7]), abs=1e-5)
        harms = [-own[category == c, :G].ravel() for c in range(7)]
        np.testing.assert_allclose([scalars[f"harm/{name}"] for name in HARMFUL], np.mean(harms, axis=1), atol=2e-5)
        assert scalars["harm"] == pytest.approx(np.mean(harms), abs=2e-5)
        multipliers = [ref.dual_ascent(m, h, 0.25, 0.2, 0.75) for m, h in zip(multipliers, harms)] + [0.0]
        np.testing.assert_allclose(state.carry.multipliers, multipliers, atol=1e-5)
    assert len(set(multipliers)) > 2 and names[7] == "harmless"


def test_multipliers_rise_above_the_limit_and_fall_to_0_below_it(policy, cache):
    # A limit that every text exceeds, then one that none exceeds: 1, 3.5, 4 and stays there; then 0 and stays there.
    for limit, path in ((-1e4, "rises"), (1e4, "falls")):
        context, bank = constrained(policy, cache, limit=limit, rate=2.5e-4, max_multiplier=4.0)
        stage = align.make(context, bank)
        state, seen = stage.init(), []
        for step in range(3):
            _, carry, _ = stage.collect(state, step)
            state = state._replace(carry=carry)
            seen.append(np.asarray(carry.multipliers))
        want = {"rises": [3.5, 4, 4], "falls": [0, 0, 0]}[path]
        np.testing.assert_allclose(np.array(seen)[:, :7], np.repeat(np.array(want)[:, None], 7, axis=1), atol=0.01)
        assert (np.array(seen)[:, 7] == 0).all()


def test_a_category_that_is_not_in_the_batch_keeps_its_multiplier(policy, cache):
    # Batches of one category each, in turn: the first is of insults, the eighth of harmless prompts.
    context, bank = constrained(policy, cache, limit=-1e4, rate=1e-4)
    context.config.data.mixing = "single"
    stage = align.make(context, bank)
    state = stage.init()
    _, carry, scalars = stage.collect(state, 0)
    np.testing.assert_allclose(carry.multipliers, [2] + [1] * 6 + [0], atol=0.01)
    assert {name for name in scalars if name.startswith("harm/")} == {"harm/insult"}
    _, carry, scalars = stage.collect(state, 7)
    np.testing.assert_array_equal(carry.multipliers, state.carry.multipliers)
    assert "harm" not in scalars and [scalars[f"lambda/{name}"] for name in HARMFUL] == [1] * 7


def test_a_run_that_was_killed_goes_on_with_the_same_numbers(policy, cache, tmp_path):
    context, bank = constrained(policy, cache, rate=0.01)
    stage = align.make(context, bank)

    def killed(state, step):
        if step == 3:  # the checkpoint is of two steps
            raise KeyboardInterrupt
        return {}

    whole = stand_in_stage.run(tmp_path / "whole", stage)
    with pytest.raises(KeyboardInterrupt):
        stand_in_stage.run(tmp_path / "killed", stage._replace(evaluate=killed))
    _, kept = Checkpoints(tmp_path / "killed" / "checkpoints" / "align", keep=2).restore(stage.init())
    assert len(np.unique(kept.carry.multipliers)) > 2  # the checkpoint holds multipliers that have moved
    resumed = stand_in_stage.run(tmp_path / "killed", align.make(context, bank))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    rows = [metrics.read_jsonl(Workdir(tmp_path / name).local / "metrics.jsonl") for name in ("whole", "killed")]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [1, 2, 3, 4]
    for name in HARMFUL:
        path = [row[f"lambda/{name}"] for row in rows[0]]
        assert path[0] == 1 and len(set(path)) == 4


def test_without_the_constraint_nothing_more_is_carried(policy, cache):
    context, bank = prepared(policy, cache)
    stage = align.make(context, bank)
    state = stage.init()
    assert len(jax.tree.leaves(state.carry)) == len(state.carry.stats) and state.carry.multipliers is None
    _, carry, scalars = stage.collect(state, 0)
    assert carry.multipliers is None and not any(name.startswith(("lambda", "harm/")) for name in scalars)
    assert constraint.initial_multipliers(context.config) is None


REFUSED = {
    "rules": (
        {"reward.source": "rules"},
        "reads the rewards of several categories, but config.reward.source is 'rules'",
    ),
    "one reward": ({"reward.one_for_all": True}, "config.reward.one_for_all leaves no choice"),
    "no help": ({"data.harmless": ()}, "it needs a harmful category, and a harmless one with a reward"),
    "no reward of help": ({"data.shares": (1.0,) * 7 + (0.0,)}, "a harmless one with a reward"),
    "no harm": ({"data.harmless": (*HARMFUL, "harmless")}, "it needs a harmful category"),
}


@pytest.mark.parametrize("route", ["safe_completion", "constraint"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_routes_lack_is_refused(route, kind):
    changes, sentence = REFUSED[kind]
    c = config.default()
    c.reward.route = route
    checks.validate(c)
    c.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=sentence):
        checks.validate(c)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"constraint.initial": 11.0},
            "config.constraint.initial is 11.0, above config.constraint.max_multiplier = 10.0",
        ),
        ({"constraint.initial": -1.0}, "config.constraint.initial is -1.0: it must not be negative"),
        ({"constraint.rate": -0.1}, "config.constraint.rate is -0.1: it must not be negative"),
        ({"constraint.max_multiplier": 0.0}, "config.constraint.max_multiplier is 0.0: it must be above 0"),
        ({"constraint.limit": float("nan")}, "config.constraint.limit is nan: give a finite number"),
    ],
)
def test_bad_numbers_of_the_constraint_are_refused(changes, sentence):
    c = config.default()
    c.reward.route = "constraint"
    c.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=sentence):
        checks.validate(c)


def test_a_flag_of_the_constraint_is_refused_where_nothing_is_rewarded():
    c = config.default()
    c.align.objective = "sft"
    with pytest.raises(InputError, match="--config.constraint.limit has no effect: config.align.objective is 'sft'"):
        checks.refuse_ignored(c, ["constraint.limit"])


def test_rewards_of_a_run_that_learned_no_help_are_refused(tmp_path):
    theirs, ours = config.default(), config.default()
    theirs.data.shares = (1.0,) * 7 + (0.0,)
    workdirs.record_config(theirs, tmp_path)
    rewards = Checkpoints(tmp_path / "rewards", keep=1)
    rewards.save(0, {"w": np.ones(1)})
    rewards.close()
    loading.require_rewards(ours, tmp_path)
    ours.reward.route = "constraint"
    with pytest.raises(InputError, match="reads the rewards of harmless, which the run of .* did not learn"):
        loading.require_rewards(ours, tmp_path)
