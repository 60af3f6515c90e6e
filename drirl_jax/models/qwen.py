"""The Qwen family: Llamas with small differences.

In Qwen2 and 2.5 queries, keys and values have biases (arXiv 2407.10671). Qwen3 has no biases, and an RMSNorm over the
queries and keys of each head (arXiv 2505.09388).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drirl_jax.models import fields, llama
from drirl_jax.models.architecture import Config
from drirl_jax.types import InputError

LAYER = llama.LAYER | {
    "q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
}


# Fields of the windows, and the defaults of transformers.
WINDOWS: dict[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def qwen2_from_hf(hf: Mapping) -> Config:
    """The decoder from a Qwen2's config. Raises the errors of `llama.config_from_hf`."""
    return llama.shape(hf, {"hidden_act": "silu"}, WINDOWS)._replace(qkv_bias=True, **_windows(hf))


def qwen3_from_hf(hf: Mapping) -> Config:
    """The decoder from a Qwen3's config, which must have head_dim. Raises the errors of `llama.config_from_hf`."""
    config = llama.shape(hf, {"hidden_act": "silu", "attention_bias": False}, WINDOWS)
    return config._replace(head_dim=hf["head_dim"], qk_norm=True, **_windows(hf))


def _windows(hf: Mapping) -> dict:
    """The fields `window` and `local` of a Config. Without use_sliding_window the width of the window is ignored."""
    uses_window = fields.boolean(hf, "use_sliding_window", WINDOWS["use_sliding_window"])
    window = fields.size(hf, "sliding_window", WINDOWS["sliding_window"]) if uses_window else None
    first_local = hf.get("max_window_layers", WINDOWS["max_window_layers"])
    if window and not (type(first_local) is int and first_local >= 0):
        raise InputError(f"config.json has max_window_layers={fields.quoted(first_local)}: a whole number is needed.")
    return llama.windows(hf, window, lambda i: window is not None and i >= first_local)


_QWEN = Config(151_936, 896, 24, 14, 2, 64, 4864, 1e6, 1e-6)
_QWEN2 = _QWEN._replace(family="qwen2", qkv_bias=True)
_QWEN3 = _QWEN._replace(family="qwen3", qk_norm=True, head_dim=128, heads=16, kv_heads=8)
_QWEN2_7B = _QWEN2._replace(
    vocab=152_064, width=3584, layers=28, heads=28, kv_heads=4, head_dim=128, ffn=18_944, tied=False
)
PRESETS = {
    "qwen2-7b": _QWEN2_7B,
    "qwen2.5-7b": _QWEN2_7B,
    "qwen2.5-0.5b": _QWEN2,
    "qwen2.5-1.5b": _QWEN2._replace(width=1536, layers=28, heads=12, head_dim=128, ffn=8960),
    "qwen3-0.6b": _QWEN3._replace(width=1024, layers=28, ffn=3072),
    "qwen3-1.7b": _QWEN3._replace(width=2048, layers=28, ffn=6144),
    "qwen3-8b": _QWEN3._replace(width=4096, layers=36, heads=32, ffn=12_288, tied=False),
}
