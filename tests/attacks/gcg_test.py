"""GCG: its gradient, its group, its filter and its budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attack_targets import PROMPT, changed, loss_of, record
from helpers.tiny_models import tiny

from drirl_jax.attacks import gcg
from drirl_jax.attacks import target as target_lib
from drirl_jax.models import transformer
from drirl_jax.types import Group

slope_of = jax.jit(gcg.gradient, static_argnums=(2, 3))


def suffixes(target, frame, count, seed=0):
    rng = np.random.default_rng(seed)
    allowed = np.flatnonzero(gcg.allowed_tokens(target.text, target.model.config.vocab))
    return rng.choice(allowed, (count, len(frame.suffix)))


def test_the_one_hot_gradient_is_a_finite_difference():
    L, M = 4, 3
    rng = np.random.default_rng(0)
    model = tiny(tied=False)
    model = model.replace(head=model.head[...] * 40)
    model.config = model.config._replace(embed_scale=3.0)
    response = jnp.array(rng.integers(0, 97, (1, 1, L + 2 + M)))
    group = Group(jnp.array(rng.integers(0, 97, (1, 5))), jnp.array([4]), response, jnp.array([[9]]), jnp.array([0]))
    loss, slope = slope_of(model, group, L, M)
    assert slope.shape == (L, 97)

    @jax.jit
    def at(onehot):  # the loss where the suffix is a mixture of tokens, spelt out
        trunk_states = transformer.run_trunk(model, group, 0)
        mixed = trunk_states.response.at[0, 0, :L].set(3.0 * onehot @ model.embed[...])
        _, hidden = transformer.apply(model, group, trunk_states=trunk_states.replace(response=mixed))
        logp = jax.nn.log_softmax(hidden[0, 0, L + 1 : L + 1 + M] @ model.unembed.T)
        return -logp[jnp.arange(M), response[0, 0, -M:]].mean()

    onehot = np.eye(97, dtype=np.float32)[np.asarray(response[0, 0, :L])]
    assert float(loss) == pytest.approx(float(at(onehot)), rel=1e-5)
    for place, token in enumerate(np.abs(slope).argmax(axis=1)):
        step = np.zeros_like(onehot)
        step[place, token] = 0.01
        difference = (float(at(onehot + step)) - float(at(onehot - step))) / 0.02
        assert float(slope[place, token]) == pytest.approx(difference, rel=0.02) and abs(difference) > 0.1


def test_a_candidates_loss_in_the_group_is_its_loss_alone_as_the_model_reads_the_chat(target):
    frame = gcg.make_frame(target.text, PROMPT, 6)
    some, goal, apply = suffixes(target, frame, 16), target.goal_ids(), jax.jit(transformer.apply)
    together = target_lib.jitted_goal_losses(target.model, gcg.make_group(target, frame, some), goal_len=len(goal))[0]
    for suffix, loss in zip(some[:5], together):
        ids = [*frame.before, *suffix, *frame.after, *goal]
        whole = Group(*(jnp.array(x) for x in ([ids], [len(ids)], [[[0]]], [[1]], [0])))
        hidden = apply(target.model, whole)[0][0, -len(goal) - 1 : -1]
        logp = jax.nn.log_softmax(hidden @ target.model.unembed.T)[jnp.arange(len(goal)), jnp.array(goal)]
        assert float(loss) == pytest.approx(float(-logp.mean()), abs=1e-4)
    assert float(together.max() - together.min()) > 0.01


def test_candidates_dealt_out_over_copies_of_the_prompt_have_the_same_losses_and_gradient(target):
    frame, goal = gcg.make_frame(target.text, PROMPT, 6), len(target.goal_ids())
    some = suffixes(target, frame, 16)
    one, two = (gcg.make_group(target, frame, some, copies) for copies in (1, 2))
    read = [np.ravel(target_lib.jitted_goal_losses(target.model, group, goal_len=goal)) for group in (one, two)]
    np.testing.assert_allclose(*read, atol=1e-5)
    one, two = (gcg.make_group(target, frame, np.tile(some[:1], (copies, 1)), copies) for copies in (1, 2))
    np.testing.assert_allclose(*(slope_of(target.model, group, 6, goal)[1] for group in (one, two)), atol=1e-5)


def test_candidates_differ_from_the_suffix_in_one_place_by_one_of_the_best_tokens(target):
    frame, goal = gcg.make_frame(target.text, PROMPT, 6), len(target.goal_ids())
    group = gcg.make_group(target, frame, np.array([frame.suffix]))
    allowed = gcg.allowed_tokens(target.text, target.model.config.vocab)
    loss, some = gcg.propose(
        target.model, group, allowed, jax.random.key(0), suffix_len=6, goal_len=goal, topk=8, count=32
    )
    now, slope = slope_of(target.model, group, 6, goal)
    assert float(loss) == pytest.approx(float(now), abs=1e-5)
    best = np.argsort(np.where(allowed, slope, np.inf), axis=1)[:, :8]
    differ = np.asarray(some) != np.array(frame.suffix)
    assert (differ.sum(1) <= 1).all() and differ.any(axis=0).all()
    for candidate, of in zip(np.asarray(some), differ):
        for place in np.flatnonzero(of):
            assert candidate[place] in best[place]
    assert len({tuple(row) for row in np.asarray(some).tolist()}) > 15  # 32 of 6 x 8, drawn with return


def test_what_is_no_text_of_its_own_is_filtered(target):
    text = target.text
    frame = gcg.make_frame(text, PROMPT, 6)
    assert text.prompt_ids(gcg.message(text, frame, frame.suffix)) == [*frame.before, *frame.suffix, *frame.after]
    assert gcg.message(text, frame, frame.suffix) == PROMPT + " !" * 6
    apart = text.tokenizer.encode("he", add_special_tokens=False) + text.tokenizer.encode(
        "llo", add_special_tokens=False
    )
    assert len(apart) == 2 and len(text.tokenizer.encode("hello", add_special_tokens=False)) == 1
    assert not gcg.survives_tokenizer(text, frame, [*apart, *frame.suffix[2:]])  # together they are another token
    end = text.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert not gcg.survives_tokenizer(text, frame, [end, *frame.suffix[1:]])  # a control token, written, is text
    half = next(i for i in range(1000, 49152) if text.tokenizer.decode([i]) == "\ufffd")
    assert not gcg.survives_tokenizer(text, frame, [half, *frame.suffix[1:]])
    allowed = gcg.allowed_tokens(text, target.model.config.vocab)
    assert not allowed[[end, half]].any() and allowed[frame.suffix].all() and not allowed[198]  # a line break


def test_gcg_lowers_the_loss_within_its_budget(target, judge):
    o = target.options.gcg
    (out,) = gcg.attack(target, [record()])
    assert out.facts["loss"] < out.facts["loss_at_first"] - 0.01
    assert out.queries <= o.steps * (o.width + 1) + 2 and out.facts["steps"] == 3
    assert len(judge) == 2  # after steps 2 and 3
    assert 0 <= out.facts["lost_as_text"] < 1
    # The loss is of the message that is told, read anew, and so is the response.
    assert loss_of(target, out.message) == pytest.approx(out.facts["loss"], abs=1e-4)
    assert target.answer([out.message]) == [out.response] and out.message.startswith(PROMPT)
    # Whatever was attacked before, a prompt's search is the same.
    (*_, again) = gcg.attack(changed(target, **{"gcg.steps": 1}), [record(1), record()])
    (alone,) = gcg.attack(changed(target, **{"gcg.steps": 1}), [record()])
    assert again == alone


def test_gcg_ends_where_a_check_has_success(target):
    target.judges["phrases"] = lambda prompt, response: False
    (out,) = gcg.attack(target, [record()])
    assert out.facts["steps"] == 2
