"""The sampler: exactness, end of sequence, reproducibility, and agreement with the trainer's log-probabilities."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import apply, random_group, spelt_out, tiny, token_logprobs

from drirl_jax import rollout
from drirl_jax.models import transformer
from drirl_jax.types import Group

EOS = (3, 11)


def draw(model, group, *, temperature=1.0, T=6, seed=0, G=3, index=None, **options):
    index = jnp.arange(group.prompt.shape[0]) if index is None else index
    keys = rollout.response_keys(jax.random.key(seed), index, G)
    options = {"max_new": T, "temperature": temperature, "eos": EOS, "prefix": group.prefix} | options
    return rollout.sample(model, group.prompt, group.prompt_len, keys, **options)


def sharpened(seed=0):
    """A tiny model whose distributions are far from uniform."""
    model = tiny(seed=seed)
    return model.replace(embed=model.embed[...] * 40)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.0])
def test_logprobs_equal_the_trainers(temperature):
    model, group = sharpened(), random_group(P=3)
    out = draw(model, group, temperature=temperature)
    again = Group(group.prompt, group.prompt_len, out.response, out.response_len, group.category)
    logp, _ = token_logprobs(model, apply(model, again), again, temperature or 1.0)
    mask = jnp.arange(6) < out.response_len[..., None]
    np.testing.assert_allclose(out.logp, jnp.where(mask, logp, 0), atol=1e-4)


def test_a_prefix_passed_once_changes_no_sample():
    model, group = sharpened(), random_group(P=3).replace(prefix=(5, 8, 13, 5))
    once, whole = draw(model, group), draw(model, spelt_out(group))
    for a, b in zip(once[:3], whole[:3]):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(once.logp, whole.logp, atol=1e-4)


def test_logprobs_in_bfloat16_are_near_the_trainers():
    model, group = tiny(dtype="bfloat16"), random_group(P=3)
    out = draw(model, group)
    again = Group(group.prompt, group.prompt_len, out.response, out.response_len, group.category)
    logp, _ = token_logprobs(model, apply(model, again), again, 1.0)
    mask = jnp.arange(6) < out.response_len[..., None]
    assert out.logp.dtype == jnp.float32
    np.testing.assert_allclose(out.logp, jnp.where(mask, logp, 0), atol=0.02)


def test_end_of_sequence_is_kept_and_ends_the_row():
    model, group = tiny(), random_group(P=4)
    out = draw(model, group, T=60, G=8)
    response, length = np.asarray(out.response), np.asarray(out.response_len)
    stopped = 0
    for p in range(4):
        for g in range(8):
            inside = np.isin(response[p, g, : length[p, g]], EOS)
            assert not inside[:-1].any()
            assert inside[-1] == (rollout.FINISH[out.finish[p, g]] == "stop")
            assert inside[-1] or length[p, g] == 60
            assert (np.asarray(out.logp)[p, g, length[p, g] :] == 0).all()
            stopped += inside[-1]
    assert 0 < stopped


def test_compaction_changes_nothing():
    model, group = tiny(), random_group(P=4)
    eos = tuple(range(3, tiny().config.vocab, 9))
    plain = draw(model, group, T=50, G=8, eos=eos, compact=())
    compacted = draw(model, group, T=50, G=8, eos=eos)
    length = np.sort(np.asarray(plain.response_len).ravel())
    # Rows end one after the other, some last for long: every share of the batch is passed, and work is left after.
    assert length[0] < length[8] < length[16] < length[20] < length[-4] < length[-1]
    for before, after in zip(plain[:3], compacted[:3]):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(plain.logp, compacted.logp, atol=1e-5)


def test_rows_depend_on_seed_and_index_and_not_on_the_batch():
    model, group = sharpened(), random_group(P=4)
    out = draw(model, group)
    np.testing.assert_array_equal(out.response, draw(model, group).response)
    assert (np.asarray(out.response) != np.asarray(draw(model, group, seed=1).response)).any()
    part = jax.tree.map(lambda x: x[2:3], group)
    np.testing.assert_array_equal(draw(model, part, index=jnp.array([2])).response[0], out.response[2])
    np.testing.assert_array_equal(draw(model, group, G=2).response, out.response[:, :2])


def test_greedy_takes_the_most_likely_token():
    model, group = sharpened(), random_group(P=2)
    out = draw(model, group, temperature=0.0, G=1, T=4)
    for p in range(2):
        ids = list(np.asarray(group.prompt[p, : group.prompt_len[p]]))
        for t in range(int(out.response_len[p, 0])):
            one = Group(
                jnp.array([ids]),
                jnp.array([len(ids)]),
                jnp.zeros((1, 1, 1), jnp.int32),
                jnp.ones((1, 1)),
                None,
            )
            hidden, _ = apply(model, one)
            best = int(jnp.argmax(hidden[0, -1] @ model.unembed.T))
            assert best == int(out.response[p, 0, t])
            ids.append(best)


def test_two_level_sampling_is_exact():
    rng = np.random.default_rng(0)
    logit = jnp.asarray(rng.normal(size=37) * 2, jnp.float32)
    uniform = jax.random.uniform(jax.random.key(0), (200_000, 2))
    drawn, logp = rollout.sample_categorical(uniform, jnp.broadcast_to(logit, (200_000, 37)), chunk=8)
    share = np.bincount(np.asarray(drawn), minlength=37) / 200_000
    probability = np.asarray(jax.nn.softmax(logit))
    np.testing.assert_allclose(logp, np.log(probability)[drawn], atol=1e-5)
    # Five standard errors of a binomial share.
    assert (np.abs(share - probability) < 5 * np.sqrt(probability / 200_000) + 1e-9).all()


def test_sampling_never_returns_an_impossible_token():
    logit = jnp.full((4, 300), -jnp.inf).at[:, 258].set(0.0)
    uniform = jnp.array([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24], [0.5, 0.0], [0.0, 1 - 2**-24]])
    token, logp = rollout.sample_categorical(uniform, logit)
    assert (token == 258).all() and (logp == 0).all()


@pytest.mark.slow
def test_uneven_lengths_cost_little():
    # SmolLM2's shape with random weights, responses of 8 to 256 tokens spread evenly, against all of 256.
    model = transformer.Transformer(
        transformer.Config(49_152, 576, 30, 9, 3, 64, 1536, rope_theta=1e5), jax.random.key(0)
    )
    P, G, S, T = 4, 8, 64, 256
    prompt = jax.random.randint(jax.random.key(1), (P, S), 0, 49_152)
    ends = tuple(range(0, 49_152, 110))  # 0.9% of the vocabulary

    def sample(keys, eos):
        return rollout.sample(model, prompt, jnp.full(P, S), keys, max_new=T, temperature=1.0, eos=eos)

    # A response depends on its key alone, so lengths can be chosen among many.
    many = rollout.response_keys(jax.random.key(2), jnp.arange(P), 64)
    length = np.concatenate(
        [jax.device_get(sample(many[:, i : i + G], ends).response_len) for i in range(0, 64, G)], axis=1
    )
    wanted = np.linspace(8, T, P * G).reshape(G, P).T  # each prompt has short ones and long ones
    chosen = np.array([[np.abs(of - target).argmin() for target in targets] for of, targets in zip(length, wanted)])
    spread = many[np.arange(P)[:, None], chosen]
    rates = {}
    for name, keys, eos in (("equal", many[:, :G], (-1,)), ("spread", spread, ends)):
        useful, seconds = int(jax.device_get(sample(keys, eos).response_len).sum()), []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(sample(keys, eos))
            seconds.append(time.perf_counter() - start)
        rates[name] = useful / np.median(seconds)
    got = np.sort(np.take_along_axis(length, chosen, axis=1).reshape(-1))
    assert got[0] < 16 and got[-1] > 200 and 90 < got.mean() < 170
    assert rates["spread"] > 0.7 * rates["equal"], rates  # 0.76 measured


def keys_of(index, group, seed=3):
    return jax.random.key_data(rollout.response_keys(jax.random.key(seed), jnp.asarray(index, jnp.int32), group))


def test_a_prompt_that_is_twice_in_a_batch_is_sampled_twice():
    index = [4, 9, 2, 9, 7, 9]
    keys = np.asarray(keys_of(index, 3))
    assert len({tuple(key) for key in keys.reshape(-1, keys.shape[-1])}) == 18
    # A prompt's first group has the keys that it has alone: fold_in(fold_in(key, prompt), response).
    first = np.asarray(keys_of([4, 9, 2, 7], 3))
    np.testing.assert_array_equal(keys[[0, 1, 2, 4]], first)
    by_hand = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 9), 2)
    np.testing.assert_array_equal(keys[1, 2], jax.random.key_data(by_hand))
    # The n-th group of a prompt is the same wherever its rows stand.
    moved = np.asarray(keys_of([9, 7, 9, 4, 2, 9], 3))
    np.testing.assert_array_equal(moved, keys[[1, 4, 3, 0, 2, 5]])
