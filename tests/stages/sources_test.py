"""Rewards that no IRL learned: rules, and a judge behind an endpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import method_numpy as ref
from helpers.endpoint_server import section
from helpers.tiny_context import prepared

from drirl_jax.data.text import pad
from drirl_jax.models import reward
from drirl_jax.stages import hardness
from drirl_jax.stages.base import make_group
from drirl_jax.stages.rewards import routes, sources
from drirl_jax.types import InputError

SAID = ("I can't help with that.", "Sure, here is how: first, breathe.")


@pytest.fixture(scope="module")
def case(policy, cache):
    """A context, a harmful and a harmless example, and for each of them both of SAID."""
    context, _ = prepared(policy, cache, sampler={"max_new": 24})
    train, names = context.examples["train"], context.config.data.categories
    rows = [int(np.flatnonzero(train.category == names.index(name))[0]) for name in ("insult", "harmless")]
    ids, length = pad([context.text.response_ids(text, 24) for text in SAID], 24)
    examples = train.take(rows)
    return context, examples, make_group(examples, np.stack([ids] * 2), np.stack([length] * 2))


def test_by_rules(case):
    # Of a harmful prompt a refusal is right, of a harmless one an answer.
    context, examples, group = case
    assert sources.SOURCES["rules"].make(context)(None, examples, group, None).tolist() == [[1, 0], [0, 1]]


def test_what_is_rated_follows_the_thought(case, server, monkeypatch):
    context, examples, group = case
    thought = "<think>\nI can't help with that.\n</think>\n\n"
    texts = [[thought + SAID[0], thought + SAID[1]], [thought + SAID[1], "<think>\nSure, here is how"]]
    monkeypatch.setattr(sources, "response_texts", lambda context, group: texts)
    # Silence is neither a refusal nor an answer.
    assert sources.SOURCES["rules"].make(context)(None, examples, group, None).tolist() == [[1, 0], [1, 0]]
    context.config.reward.endpoint.update(section(server, concurrency=1))
    server.script = [reply("1")] * 4
    sources.SOURCES["judge"].make(context)(None, examples, group, None)
    asked = [body["messages"][0]["content"] for _, _, body in server.asked]
    assert not any("think>" in text for text in asked) and sum("<answer>\n\n</answer>" in text for text in asked) == 1


def test_rules_give_no_reward_without_a_verdict(case, monkeypatch):
    context, examples, group = case
    monkeypatch.setattr(sources.judges, "refusal_check", lambda setting: lambda prompt, answer: None)
    assert np.isnan(sources.SOURCES["rules"].make(context)(None, examples, group, None)).all()


def random_bank(context):
    """Rewards that tell the texts and the categories apart."""
    categories = len(context.config.data.categories)
    head = jax.random.normal(jax.random.key(1), (categories, context.model.config.width))
    fresh = reward.init_head(context.model, jax.random.key(0), categories)
    return reward.Bank(fresh.replace(heads=head), mean=fresh.bias, std=jnp.ones(categories))


def test_routes(case, caplog):
    # Evenly, by given weights, and by likeness: of the held-out prompts 55% find their own category among eight.
    context, examples, group = case
    categories, bank = len(context.config.data.categories), random_bank(context)
    each = reward.score_by_all(context.model, bank, group)

    def by(route, weights=()):
        context.config.reward.route, context.config.reward.weights = route, weights
        return sources.SOURCES["irl"].make(context)(bank, examples, group, None)

    own = np.stack([each[p, :, c] for p, c in enumerate(examples.category)])
    np.testing.assert_allclose(by("category"), own, atol=1e-5)
    np.testing.assert_allclose(by("linear"), each.mean(-1), atol=1e-5)
    np.testing.assert_allclose(by("linear", (2.0,) + (0.0,) * (categories - 1)), 2 * each[..., 0], atol=1e-5)
    weights = routes.router(context)
    valid = context.examples["valid"]
    found = weights(valid.prompt_text)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    accuracy = (found.argmax(axis=1) == valid.category).mean()
    assert accuracy > 3 / 8  # three times what chance would find
    with caplog.at_level("INFO"):
        np.testing.assert_allclose(
            by("router"), np.einsum("pmc,pc->pm", each, weights(examples.prompt_text)), atol=1e-5
        )
    assert f"{100 * accuracy:.0f}% of {len(valid.id)}" in caplog.text


@pytest.mark.parametrize(
    "data, helpful",
    [
        ({}, ("harmless",)),
        ({"harmless": ("harmless", "privacy_and_property")}, ("harmless", "privacy_and_property")),
        # No record teaches the reward of "harmless".
        ({"harmless": ("harmless", "privacy_and_property"), "shares": (1.0,) * 7 + (0.0,)}, ("privacy_and_property",)),
    ],
    ids=["one", "two", "one_of_two"],
)
def test_routes_of_help_and_harm(policy, cache, data, helpful):
    context, _ = prepared(policy, cache, sampler={"max_new": 24}, data=data)
    train, names = context.examples["train"], context.config.data.categories
    chosen = ("insult", "harmless", "privacy_and_property")
    examples = train.take([int(np.flatnonzero(train.category == names.index(name))[0]) for name in chosen])
    examples = examples._replace(harmless=np.isin(chosen, context.config.data.harmless))
    ids, length = pad([context.text.response_ids(text, 24) for text in SAID], 24)
    group, bank = make_group(examples, np.stack([ids] * 3), np.stack([length] * 3)), random_bank(context)
    each = np.asarray(reward.score_by_all(context.model, bank, group))
    own = np.stack([each[p, :, c] for p, c in enumerate(examples.category)])
    mean = each[..., [names.index(name) for name in helpful]].mean(axis=-1)
    help_PM = np.where(examples.harmless[:, None], own, mean)

    def by(route):
        context.config.reward.route = route
        return sources.SOURCES["irl"].make(context)(bank, examples, group, None)

    want = ref.safe_completion(help_PM, own, examples.harmless)
    np.testing.assert_allclose(by("safe_completion"), want, atol=1e-5)
    np.testing.assert_allclose(by("constraint").help, help_PM, atol=1e-5)
    np.testing.assert_allclose(by("constraint").harm, -own, atol=1e-5)
    assert np.ptp(want) > 0.01 and np.abs(help_PM - own)[0].min() > 0.01


def reply(text):
    return json.dumps({"choices": [{"message": {"content": text}}]})


def test_by_judge(case, server):
    context, examples, group = case
    context.config.reward.endpoint.update(section(server, concurrency=1))
    score = sources.SOURCES["judge"].make(context)
    # The second grade is missing at first, and the fourth beyond the scale: both are asked for again.
    server.script = [
        reply(text) for text in ("8", "none", "Grade: 3/10", "99", "5", "<think>\nStep 1: 3?\n</think>\n10")
    ]
    np.testing.assert_allclose(score(None, examples, group, None), [[0.8, 0.5], [0.3, 1.0]], rtol=1e-6)
    asked = [body["messages"][0]["content"] for _, _, body in server.asked]
    assert len(asked) == 6 and asked[4:] == [asked[1], asked[3]]
    assert [body["max_tokens"] for _, _, body in server.asked] == [8] * 4 + [512] * 2
    assert examples.prompt_text[0] in asked[0] and SAID[0] in asked[0] and SAID[1] in asked[1]
    server.script = [reply("none")] * 12
    with pytest.raises(InputError, match="gives no number from 0 to 10, asked 3 times"):
        sources.SOURCES["judge"].make(context)(None, examples, group, None)


def test_parts_by_a_model(case, server):
    # Each line is a part; an empty reply leaves the text whole; a blank text is not asked about. Asked once for a text.
    context, _, _ = case
    context.config.scaling.split = "llm"
    context.config.scaling.endpoint.update(section(server, concurrency=1))
    server.script = [reply("I can't help.\n\n It would hurt.\n"), reply("")]
    split = hardness.splitter(context)
    context.config.scaling.split = "sentence"
    assert split(["a", " ", "b"]) == [["I can't help.", "It would hurt."], [], ["b"]]
    assert split(["b", "a"]) == [["b"], ["I can't help.", "It would hurt."]] and len(server.asked) == 2
