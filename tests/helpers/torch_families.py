"""A row a family: transformers' own small model of it, with random weights."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from drirl_jax.models import families, hf
from helpers.tiny_models import random_group

SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


THETA = {"rope_type": "default", "rope_theta": 1e3}


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


GEMMA = dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=4)


# Windows of 4 and prompts of up to 9 tokens behind a prefix of 3.
CASES = {
    "llama": ("LlamaConfig", dict(rope_parameters=LLAMA3, head_dim=16)),
    "mistral": ("MistralConfig", dict(rope_parameters=THETA, sliding_window=4)),
    "qwen2": (
        "Qwen2Config",
        dict(
            rope_parameters=THETA, use_sliding_window=True, sliding_window=4, max_window_layers=1,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3": ("Qwen3Config", dict(rope_parameters=THETA, head_dim=16)),
    "gemma2": (
        "Gemma2Config",
        GEMMA | dict(rope_parameters=THETA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        GEMMA
        | dict(
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
                "sliding_attention": THETA,
            },
        ),
    ),
}  # fmt: skip


@functools.cache
def torch_model(family):
    """transformers' model with random weights, its biases and norms too."""
    torch = pytest.importorskip("torch")
    kind, options = CASES[family]
    config = getattr(transformers, kind)(**SHAPE, **options)
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in peer.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(weight + noise / 4 if weight.ndim == 1 else 1.5 * noise / math.sqrt(weight.shape[-1]))
    return peer


def load(path):
    return families.from_hf(hf.read_tensors(path), families.config_from_hf(hf.read_config(path)))


def torch_logits(peer, ids):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return peer(torch.tensor(np.asarray(ids))[None]).logits[0].numpy()


GROUP = random_group(P=2, S=9, G=2, T=7, seed=1).replace(prompt_len=jnp.array([9, 5]), prefix=(5, 8, 13))
