"""Attention by kernels against the einsum form: states, gradients, log-probabilities, on one device and on a mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drirl_jax.models import attention, families, flash, transformer, vocabulary
from drirl_jax.types import Group

TINY = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1000.0,
}


@pytest.fixture
def kernels(monkeypatch):
    """The two kernels, as this machine can run them: splash attention interpreted, cuDNN's function in XLA."""
    here = {"splash": {"interpret": True}, "cudnn": {"implementation": "xla"}}
    for name, options in here.items():
        row = flash.ATTENTION[name]
        monkeypatch.setitem(flash.ATTENTION, name, row._replace(function=partial(row.function, **options)))


def random_group(P, S, G, T, prefix, seed=0):
    rng = np.random.default_rng(seed)
    return Group(
        prompt=jnp.asarray(rng.integers(0, 97, (P, S)), jnp.int32),
        prompt_len=jnp.asarray(rng.permutation(np.linspace(1, S, P).astype(int)), jnp.int32),
        response=jnp.asarray(rng.integers(0, 97, (P, G, T)), jnp.int32),
        response_len=jnp.full((P, G), T, jnp.int32),
        category=jnp.zeros(P, jnp.int32),
        prefix=prefix,
    )


def loss_and_gradient(config, group):
    """A weighted sum of the log-probabilities, and its gradient in every weight."""
    model = transformer.Transformer(config._replace(attention="einsum"), jax.random.key(0))

    def loss(model):
        hidden = transformer.apply(model, group)
        logp = vocabulary.token_logprobs(model, hidden, group, 1.0)[0]
        return (logp * jnp.arange(logp.size).reshape(logp.shape) / logp.size).sum(), logp

    def of(name):
        model.config = config._replace(attention=name)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(model)

    return of


@pytest.mark.parametrize("name, change, sizes, prefix", [
    ("splash", {}, (2, 7, 3, 5), ()),
    ("splash", {"attn_softcap": 5.0, "query_pre_attn_scalar": 20.0}, (2, 70, 3, 40), (3, 5, 8)),
    ("cudnn", {}, (3, 7, 3, 5), (3, 5, 8)),
    ("cudnn", {"window": 4, "local": (True, False)}, (3, 7, 3, 5), ()),
])  # fmt: skip
def test_a_kernel_equals_the_einsum_form(kernels, name, change, sizes, prefix):
    config = families.config_from_hf(TINY)._replace(**change)
    of = loss_and_gradient(config, random_group(*sizes, prefix))
    ((_, logp), gradient), ((_, expected_logp), expected) = of(name), of("einsum")
    np.testing.assert_allclose(logp, expected_logp, atol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = dict(jax.tree_util.tree_leaves_with_path(gradient))[path]
        np.testing.assert_allclose(other, leaf, atol=1e-4 * float(jnp.abs(leaf).max()), err_msg=str(path))


def test_what_a_token_sees():
    # One prefix token, two of a prompt, two responses of two: r0 r1 | s0 s1 | s0 s1.
    sees = flash.visibility_mask(attention.Layout(1, 2, 2, 2, jnp.array([2])))
    rows = ["1100000", "1110000", "1111000", "1111100", "1110010", "1110011"]
    assert sees.astype(int).tolist() == [[int(x) for x in row] for row in rows]


@pytest.mark.parametrize("sizes, prefix", [((2, 64, 4, 32), ()), ((3, 39, 3, 21), (3, 5, 8))])
def test_cudnn_on_a_gpu_errs_no_more_than_einsum_does(sizes, prefix):
    """Log-probabilities and gradients in bfloat16, each by their distance from the einsum form's in float32."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    config = families.config_from_hf(TINY | {"hidden_size": 256, "head_dim": 64})
    group = random_group(*sizes, prefix)
    with jax.default_matmul_precision("highest"):
        (_, exact_logp), exact = loss_and_gradient(config, group)("einsum")
    half = loss_and_gradient(config._replace(dtype="bfloat16"), group)

    def distances(name):
        (_, logp), gradient = half(name)
        pairs = zip(jax.tree.leaves((logp, gradient)), jax.tree.leaves((exact_logp, exact)), strict=True)
        return np.array([float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs])

    by_kernel, by_einsum = distances("cudnn"), distances("einsum")
    assert by_einsum.max() < 0.1 and (by_kernel <= 1.5 * by_einsum + 1e-3).all(), (by_kernel, by_einsum)
