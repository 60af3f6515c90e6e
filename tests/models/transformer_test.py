"""The decoder against torch, and the grouped form against one row at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import (
    TINY,
    apply,
    filled,
    random_group,
    rows,
    run_trunk,
    spelt_out,
    tiny,
    token_logprobs,
    torch_llama,
)

from drirl_jax.models import decoding, families, lora, transformer
from drirl_jax.types import Group


@pytest.mark.parametrize("tied", [True, False])
def test_matches_torch_on_random_weights(tied):
    torch = pytest.importorskip("torch")
    peer = torch_llama(tied)
    tensors = {k: v.detach().numpy() for k, v in peer.state_dict().items()}
    if tied:
        tensors.pop("lm_head.weight", None)
    model = families.from_hf(tensors, families.config_from_hf(TINY | {"tie_word_embeddings": tied}))
    group = random_group()
    hidden = apply(model, group)
    logp, entropy = token_logprobs(model, hidden, group, temperature=0.7, chunk=4)
    for p, g, prompt, response in rows(group):
        ids = torch.tensor(np.concatenate([prompt, response])[None])
        with torch.no_grad():
            out = torch.log_softmax(peer(ids).logits[0] / 0.7, -1).numpy()[len(prompt) - 1 : -1]
        np.testing.assert_allclose(logp[p, g, : len(response)], out[np.arange(len(response)), response], atol=1e-4)
        np.testing.assert_allclose(entropy[p, g, : len(response)], -(np.exp(out) * out).sum(-1), atol=1e-4)


def test_grouped_equals_one_row_at_a_time():
    model, group = tiny(), random_group(P=3, S=9, G=4, T=6)
    prompt_hidden, response_hidden = apply(model, group)
    for p, g, prompt, response in rows(group):
        alone = Group(
            jnp.asarray(prompt)[None], jnp.array([len(prompt)]), jnp.asarray(response)[None, None],
            jnp.array([[len(response)]]), group.category[p : p + 1],
        )  # fmt: skip
        prompt_alone, response_alone = apply(model, alone)
        np.testing.assert_allclose(prompt_hidden[p, : len(prompt)], prompt_alone[0], atol=2e-5)
        np.testing.assert_allclose(response_hidden[p, g, : len(response)], response_alone[0, 0], atol=2e-5)


@pytest.mark.parametrize("kind", ["trunk", "adapter", "bank"])
def test_a_prefix_passed_once_is_one_in_every_prompt(kind):
    model, group = tiny(), random_group(P=3).replace(prefix=(5, 8, 13, 5))
    bank = {"bank": 2} if kind == "bank" else {}
    adapter = filled(lora.init(model, jax.random.key(1), rank=4, alpha=4, layers=2, **bank), 3)
    adapter, route = {"trunk": {}, "adapter": adapter, "bank": adapter}[kind], group.category if bank else None

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def total(trained, group):
        trunk_states = run_trunk(trained[0], group, 1)
        hidden = apply(trained[0], group, trained[1], route, trunk_states=trunk_states)
        logp, _ = token_logprobs(trained[0], hidden, group, 1.0)
        return logp.sum(), hidden

    once, whole = (total((model, adapter), g) for g in (group, spelt_out(group)))
    (_, (prompt, response)), slope = once
    (_, (want_prompt, want_response)), want_slope = whole
    np.testing.assert_allclose(prompt, want_prompt[:, 4:], atol=2e-5)
    np.testing.assert_allclose(response, want_response, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), slope, want_slope)


def test_padding_and_order_change_nothing():
    model, group = tiny(), random_group()
    noisy = group.replace(
        prompt=jnp.where(jnp.arange(7) < group.prompt_len[:, None], group.prompt, 5),
        response=jnp.where(jnp.arange(5) < group.response_len[..., None], group.response, 6),
    )
    mask = jnp.arange(5) < group.response_len[..., None]

    def logp(g):
        return token_logprobs(model, apply(model, g), g, 1.0)[0]

    np.testing.assert_allclose(jnp.where(mask, logp(group), 0), jnp.where(mask, logp(noisy), 0), atol=1e-6)
    flipped = jax.tree.map(lambda x: x[::-1], group)
    np.testing.assert_allclose(logp(flipped)[::-1], logp(group), atol=1e-6)


@pytest.mark.parametrize("filled", [64, 2])
def test_prefill_and_decode_match_apply(monkeypatch, filled):
    monkeypatch.setattr(decoding, "FILLED", filled)  # 2: the own cache of 5 is read up to 2, 4 or 5
    model, group = tiny(), random_group()
    _, want = apply(model, group)
    mask = jnp.arange(7) < group.prompt_len[:, None]
    _, prompt_cache = jax.jit(decoding.prefill)(model, group.prompt)
    decode, fused = jax.jit(decoding.decode, static_argnums=3), decoding.fuse(model)
    own = tuple(jnp.zeros((3, 2, 2, 3, 5, 8)) for _ in range(2))
    for t in range(5):
        token = group.response[:, :, t]
        got, own = decode(model, fused, token, t, group.prompt_len, mask, prompt_cache, own)
        np.testing.assert_allclose(got, want[:, :, t], atol=2e-5)


def test_chunking_and_remat_change_nothing():
    model, group = tiny(), random_group()

    @partial(jax.jit, static_argnums=(1, 2))
    @jax.value_and_grad
    def loss(model, chunk, remat):
        hidden = apply(model, group, remat=remat)
        return token_logprobs(model, hidden, group, 1.0, chunk)[0].sum()

    value, grad = loss(model, 4, True)
    other, other_grad = loss(model, 1000, False)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grad, other_grad)


@pytest.mark.parametrize("bank", [None, 2])
def test_the_backward_pass_finds_one_array_of_each_matrix_again(bank):
    """The sum of W x and the adapter's part, not both: of layers of an 8B model it is most of an update's memory."""
    model, group = tiny(), random_group()
    route_P = None if bank is None else jnp.array([0, 1])

    def loss(adapter):
        return transformer.apply(model, group, adapter, route_P)[1].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(lora.init(model, jax.random.key(0), rank=4, alpha=8, bank=bank)).jaxpr
    rows, (L, F) = group.prompt.shape[0] * (7 + 3 * 5), (model.config.layers, model.config.ffn)
    kept = [out.aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "scan" for out in eqn.outvars]
    assert kept.count((L, rows, F)) == 2  # gate and up
    assert kept.count((L, rows, model.config.width)) == 2  # q and o


def test_fresh_adapter_is_the_trunk_and_merging_is_exact():
    model, group = tiny(), random_group()
    fresh = lora.init(model, jax.random.key(1), rank=4, alpha=8)
    plain = apply(model, group)
    jax.tree.map(np.testing.assert_array_equal, plain, apply(model, group, fresh))
    adapter = filled(fresh, 2)
    adapted = apply(model, group, adapter)
    assert np.abs(adapted[1] - plain[1]).max() > 0.1
    merged = apply(lora.merge(model, adapter), group)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), adapted, merged)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_adapter_of_the_last_layers_is_one_of_all_with_zeros_below(layers):
    model, group = tiny(), random_group()
    adapter = filled(lora.init(model, jax.random.key(1), rank=4, alpha=8, layers=layers), 2)
    padded = jax.tree.map(lambda x: jnp.pad(x, ((3 - layers, 0), (0, 0), (0, 0))), adapter)
    want = apply(model, group, padded)
    trunk_states = run_trunk(model, group, 3 - layers)
    for got in (
        apply(model, group, adapter),
        apply(model, group, adapter, trunk_states=trunk_states),
        apply(lora.merge(model, adapter), group),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
    two = group.replace(response=group.response[:, :2], response_len=group.response_len[:, :2])
    _, got = apply(model, two, adapter, trunk_states=trunk_states.members(slice(2)))
    np.testing.assert_allclose(got, want[1][:, :2], atol=2e-5)
    with pytest.raises(ValueError, match="after layer 3 cannot go on to layer"):
        apply(model, group, adapter, trunk_states=run_trunk(model, group, 3))


def test_bank_routes_each_prompt_to_its_adapter():
    model, group = tiny(), random_group(P=4)
    bank = filled(lora.init(model, jax.random.key(1), rank=4, alpha=4, bank=3), 3)
    route = jnp.array([2, 0, 1, 2])
    _, got = apply(model, group, bank, route)
    for p, c in enumerate(route):
        single = {k: v.replace(a=v.a[:, c], b=v.b[:, c]) for k, v in bank.items()}
        _, want = apply(model, jax.tree.map(lambda x: x[p : p + 1], group), single)
        np.testing.assert_allclose(got[p], want[0], atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_is_close_and_leaves_weights_and_probabilities_in_float32(tied):
    group, adapter = random_group(P=4, S=9, G=3, T=8), filled(lora.init(tiny(), jax.random.key(3), rank=4, alpha=4), 5)
    out = {}
    for dtype in ("float32", "bfloat16"):
        model = tiny(tied, dtype=dtype)
        assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("float32")}

        def total(trained, model=model):
            hidden = apply(trained[0], group, trained[1])
            assert {x.dtype for x in hidden} == {jnp.dtype(model.config.dtype)}
            logp, entropy = token_logprobs(trained[0], hidden, group, 1.0)
            return logp.mean(), (logp, entropy)

        out[dtype] = jax.jit(jax.value_and_grad(total, has_aux=True))((model, adapter))
    (_, exact), exact_slope = out["float32"]
    (_, rough), rough_slope = out["bfloat16"]
    # 8 bits of mantissa: relative errors of 2^-9 a rounding, a handful of roundings a layer.
    for a, b in zip(exact, rough):
        assert b.dtype == jnp.float32 and 0 < float(jnp.abs(a - b).max()) < 0.02
    for a, b in zip(jax.tree.leaves(exact_slope), jax.tree.leaves(rough_slope)):
        assert b.dtype == jnp.float32
        assert float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.995
