"""The stage `sft`: whole answers, own answers that are made once, openings of the other kind without loss."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_context import prepared

from drirl_jax import losses
from drirl_jax.models import lora
from drirl_jax.rollout import FINISH
from drirl_jax.runtime.bucket import Workdir
from drirl_jax.stages import own_answers, sft
from drirl_jax.stages.base import POLICIES, make_group
from drirl_jax.stages.lesson_batches import (
    WINDOW,
    Lessons,
    choose_width,
    group_by_length,
    join_lessons,
    make_batches,
    with_openings,
)
from drirl_jax.stages.objectives import sft as supervised
from drirl_jax.stages.objectives.base import Params
from drirl_jax.stages.own_answers import whole_sentences
from drirl_jax.types import InputError, length_mask


@pytest.mark.parametrize(
    "answer, ended, kept",
    [
        ("Boil water. Add salt.", True, "Boil water. Add salt."),
        ("Boil water. Add salt and", False, "Boil water."),
        ("Boil water and add", False, ""),
        ("Do this:\n1. Boil water.\n2. Add", False, "Do this:\n1. Boil water."),
        ("Boil water.\n2.", False, "Boil water."),
        ("", False, ""),
        ("No stop at all", True, "No stop at all"),
    ],
)
def test_an_answer_that_was_cut_off_ends_with_its_last_whole_sentence(answer, ended, kept):
    assert whole_sentences(answer, ended) == kept


def test_openings_stand_between_prompt_and_answer(policy, cache):
    context, _ = prepared(policy, cache)
    examples = context.examples["train"].take([0, 1, 2])
    openings = [(7, 8, 9, 10), (), (5,)]
    rows, opening_len = with_openings(examples, openings, 1.0, np.random.default_rng(0), 3)
    assert opening_len[1] == 0 and opening_len[2] == 1 and 1 <= opening_len[0] <= 3
    for p, (row, opening, k) in enumerate(zip(rows, openings, opening_len)):
        prompt, answer = examples.prompt[p, : examples.prompt_len[p]], examples.demo[p, : examples.demo_len[p]]
        assert row == [*prompt, *opening[:k], *answer]
    # Each k in 1..K comes about equally often, and about half of the prompts get an opening.
    rng = np.random.default_rng(1)
    ks = np.concatenate([with_openings(examples, [(1, 2, 3)] * 3, 0.5, rng, 3)[1] for _ in range(400)])
    share = [np.mean(ks == k) for k in range(4)]
    np.testing.assert_allclose(share, [1 / 2, 1 / 6, 1 / 6, 1 / 6], atol=0.06)


def test_batches_hold_rows_of_similar_length_and_both_kinds_in_their_share():
    rng = np.random.default_rng(0)
    harmless = np.arange(64) % 4 == 0
    length = rng.integers(10, 30, 64) + 20 * harmless  # harmless answers are longer
    order = group_by_length(length, harmless, 8, rng)
    assert sorted(order.ravel()) == list(range(64))
    assert harmless[order].sum(1).tolist() == [2] * 8
    spread = np.ptp(length[order] - 20 * harmless[order], axis=1)
    assert spread.max() <= 8  # of 20
    assert [choose_width(n, 120) for n in (1, 60, 64, 65, 80, 81, 97, 120)] == [64, 64, 64, 80, 80, 96, 120, 120]


def test_the_windows_hold_each_batch_once(policy, cache):
    context, _ = prepared(policy, cache)
    lessons = Lessons(context.examples["train"], [()] * len(context.examples["train"].id))
    batches = np.random.default_rng(0).permutation(len(lessons.examples.id))[: 2 * WINDOW].reshape(-1, 2)
    batches = np.concatenate([batches, batches])[: 2 * WINDOW]
    make = make_batches(lessons, batches, context.config.sft, seed=0)
    made = [make(step) for step in range(WINDOW)]
    tokens = sorted(np.asarray(batch.group.response)[p, 0].sum() for batch in made for p in range(2))
    rows = [
        with_openings(lessons.examples.take([i]), [()], 0.0, np.random.default_rng(0), 1)[0][0]
        for i in batches[:WINDOW].ravel()
    ]
    assert tokens == sorted(sum(row[1:]) for row in rows)


def test_a_lesson_in_one_row_has_the_loss_of_prompt_and_answer(policy, cache):
    context, _ = prepared(policy, cache)
    examples = context.examples["train"].take([0, 1, 2])
    rows, opening_len = with_openings(examples, [()] * 3, 0.0, np.random.default_rng(0), 1)
    joined = join_lessons(examples, rows, opening_len, max(map(len, rows)) + 3)
    params = Params(sft.init_params(context))
    adapted = POLICIES[context.config.policy.tune]
    apart = make_group(examples, examples.demo[:, None], examples.demo_len[:, None])
    masks = joined.answer_P1T, length_mask(apart.response_len, apart.response.shape[-1])
    assert np.asarray(masks[0]).sum() == np.asarray(masks[1]).sum() == examples.demo_len.sum()
    for reduce in ("sequence", "token", "discounted"):
        values = [
            supervised.loss(
                context.model, adapted, context.config, params,
                supervised.Demonstrations(group, losses.REDUCE[reduce](mask), losses.weight_by_token(mask)),
            )
            for group, mask in zip((joined.group, apart), masks)
        ]  # fmt: skip
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *values)


def test_the_sum_of_two_adapters_is_one_adapter_of_their_ranks(policy, cache):
    context, _ = prepared(policy, cache)
    options = {name: context.config.policy[name] for name in ("rank", "alpha", "targets", "layers")}
    first, second = (
        jax.tree.map(lambda x, key=key: jax.random.normal(key, x.shape) / 10, lora.init(context.model, key, **options))
        for key in jax.random.split(jax.random.key(3))
    )
    both = lora.concatenate([first, second])
    assert both["q"].a.shape[1] == 2 * options["rank"] and both["q"].scale == first["q"].scale
    want = lora.merge(lora.merge(context.model, first), second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), lora.merge(context.model, both), want)
    assert jax.tree.structure(lora.concatenate([first])) == jax.tree.structure(first)


def own_answers_of_a_stub(monkeypatch, refused=()):
    """Short answers that end, in place of sampling; counts how often prompts are asked. It refuses prompts by id."""
    asked = []

    def answer(name):
        return "I'm sorry, but I can't help with that." if name in refused else f"Answer to {name}."

    def sample_all(context, model, examples, key, batch, **options):
        asked.append(len(examples.id))
        ids = [context.text.response_ids(answer(name), options["max_new"]) for name in examples.id]
        response = np.zeros((len(ids), 1, options["max_new"]), np.int32)
        for row, tokens in zip(response, ids):
            row[0, : len(tokens)] = tokens
        return dataclasses.make_dataclass("R", ["response", "response_len", "finish"])(
            response, np.array([[len(tokens)] for tokens in ids]), np.full((len(ids), 1), FINISH.index("stop"))
        )

    monkeypatch.setattr(own_answers, "sample_all", sample_all)
    return asked


def test_own_answers_are_made_once_and_kept(policy, cache, tmp_path, monkeypatch):
    asked = own_answers_of_a_stub(monkeypatch)
    context, _ = prepared(policy, cache, sft={"recovery": 0.5})
    context = dataclasses.replace(context, workdir=Workdir(tmp_path))
    first = sft.make_lessons(context)
    harmless = int(first.examples.harmless.sum())
    assert asked == [harmless, len(first.examples.id) - harmless]
    rows = [json.loads(line) for line in (tmp_path / "own_answers" / "harmless.jsonl").read_text().splitlines()]
    assert len(rows) == harmless and rows[0].keys() == {"id", "prompt", "answer"}
    again = sft.make_lessons(context)
    assert len(asked) == 2
    for one, other in zip(first.examples, again.examples):
        np.testing.assert_array_equal(one, other)
    assert first.openings == again.openings and all(first.openings)
    # A harmful prompt opens with the policy's own answer, a harmless one with a refusal from the demonstrations.
    i, j = np.flatnonzero(~first.examples.harmless)[0], np.flatnonzero(first.examples.harmless)[0]
    assert context.text.decode(first.openings[i], len(first.openings[i])).startswith("Answer")
    demonstrations = context.examples["train"].demo.tolist()
    opening = list(first.openings[j])
    assert any(row[: len(opening)] == opening for row in demonstrations)


def test_a_harmless_prompt_that_the_policy_refuses_has_its_demonstration(policy, cache, monkeypatch):
    context, _ = prepared(policy, cache, sft={"harmless": "own"})
    train = context.examples["train"]
    refused = train.id[int(np.flatnonzero(train.harmless)[0])]
    own_answers_of_a_stub(monkeypatch, {refused})
    lessons = sft.make_lessons(context)
    taught = dict(zip(lessons.examples.id, lessons.examples.demo_text))
    for id_, is_harmless, demonstration in zip(train.id, train.harmless, train.demo_text):
        expected = f"Answer to {id_}." if is_harmless and id_ != refused else demonstration
        assert taught[id_] == expected
    assert len(taught) == len(lessons.examples.id) == len(train.id)


def test_a_damaged_file_of_own_answers_is_one_sentence(policy, cache, tmp_path, monkeypatch):
    own_answers_of_a_stub(monkeypatch)
    context = dataclasses.replace(prepared(policy, cache)[0], workdir=Workdir(tmp_path))
    (tmp_path / "own_answers").mkdir()
    (tmp_path / "own_answers" / "harmless.jsonl").write_text('{"id": "harmless-001"}\n')
    with pytest.raises(InputError, match="own_answers/harmless.jsonl.* remove it and start the run again"):
        sft.make_lessons(context)


@pytest.mark.parametrize("harmless", sft.HARMLESS)
def test_steps_lower_the_loss_and_the_product_is_an_adapter(policy, cache, monkeypatch, harmless):
    own_answers_of_a_stub(monkeypatch)
    context, _ = prepared(policy, cache, sft={"harmless": harmless, "batch": 8, "steps": 4, "recovery": 0.5})
    stage = sft.make(context)
    state = stage.init()
    batch, carry, scalars = stage.collect(state, 0)
    # No token of an opening has a weight, and every token behind it has.
    weight = np.asarray(batch.weight)[:, 0]
    length = np.asarray(batch.group.response_len)[:, 0]
    assert 0 < scalars["recovering"] <= 1 and np.isclose(weight.sum(), len(weight) * weight.sum(1).mean())
    for row, n in zip(weight, length):
        taught = np.flatnonzero(row)
        assert taught[-1] == n - 1 and (np.diff(taught) == 1).all()
    losses = []
    for _ in range(3):
        train, told = stage.update(state.train, batch)
        state = state._replace(train=train, carry=carry)
        losses.append(float(told["loss"]))
    assert losses[2] < losses[0]
    assert jax.tree.leaves(stage.finish(state))[0].dtype == jnp.float32
