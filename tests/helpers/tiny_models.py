"""Models of three layers with random weights, batches for them, and one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drirl_jax.models import families, transformer, vocabulary
from drirl_jax.types import Group

# Compiled whole: one by one, every operation would be compiled for every shape.
apply = jax.jit(transformer.apply, static_argnames="remat")
run_trunk = jax.jit(transformer.run_trunk, static_argnums=2)
token_logprobs = jax.jit(vocabulary.token_logprobs, static_argnames="chunk")

TINY = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1000.0,
    "rms_norm_eps": 1e-5,
}


def torch_llama(tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{k: v for k, v in TINY.items() if k != "model_type"}, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


def tiny(tied=True, seed=0, dtype="float32"):
    config = families.config_from_hf(TINY | {"tie_word_embeddings": tied})._replace(dtype=dtype)
    return transformer.Transformer(config, jax.random.key(seed))


def random_group(P=2, S=7, G=3, T=5, vocab=97, seed=0):
    rng = np.random.default_rng(seed)
    return Group(
        prompt=jnp.asarray(rng.integers(0, vocab, (P, S)), jnp.int32),
        prompt_len=jnp.asarray(rng.integers(1, S + 1, P), jnp.int32),
        response=jnp.asarray(rng.integers(0, vocab, (P, G, T)), jnp.int32),
        response_len=jnp.asarray(rng.integers(1, T + 1, (P, G)), jnp.int32),
        category=jnp.asarray(rng.integers(0, 2, P), jnp.int32),
    )


def rows(group):
    """Each (p, g, prompt ids, response ids) without padding."""
    for p in range(group.prompt.shape[0]):
        for g in range(group.response.shape[1]):
            prompt = np.asarray(group.prompt[p, : group.prompt_len[p]])
            yield p, g, prompt, np.asarray(group.response[p, g, : group.response_len[p, g]])


def spelt_out(group):
    """The same group with its prefix written into every prompt."""
    prefix = jnp.broadcast_to(jnp.array(group.prefix, jnp.int32), (group.prompt.shape[0], len(group.prefix)))
    prompt = jnp.concatenate([prefix, group.prompt], axis=1)
    return group.replace(prompt=prompt, prompt_len=len(group.prefix) + group.prompt_len, prefix=())


def filled(adapter, seed):
    """The adapter with a random B, so that it does something."""
    leaves = {
        k: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), v.b.shape)
        for i, (k, v) in enumerate(sorted(adapter.items()))
    }
    return {k: v.replace(b=0.1 * leaves[k]) for k, v in adapter.items()}
