"""The Gemma family.

Gemma 2 (arXiv 2408.00118) caps scores and logits, and every second layer is local. The text models of Gemma 3 (arXiv
2503.19786) have norms of queries and keys, and a global layer after each five local ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from drirl_jax.models import fields, llama, rope
from drirl_jax.models.architecture import Config, Linear

LAYER = llama.LAYER | {
    "attn_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
}
ONLY = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": False}


# Fields that a Gemma's config may have, beside those of ONLY.
UNDERSTOOD = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
    "layer_types",
)
UNDERSTOOD3 = (*UNDERSTOOD, "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq")
WINDOW = 4096  # the default of transformers


def gemma2_from_hf(hf: Mapping) -> Config:
    """The decoder from a Gemma 2's config. Raises the errors of `llama.config_from_hf`."""
    return _gemma_shape(hf, ONLY, UNDERSTOOD, rope.THETA)._replace(
        attn_softcap=hf["attn_logit_softcapping"] or 0.0,
        final_softcap=hf["final_logit_softcapping"] or 0.0,
        **llama.windows(hf, fields.size(hf, "sliding_window", WINDOW), lambda i: i % 2 == 0),
    )


def gemma3_from_hf(hf: Mapping) -> Config:
    """The decoder from the config of a Gemma 3 text model. Raises the errors of `llama.config_from_hf`."""
    pattern = fields.size(hf, "sliding_window_pattern", 6) or 6
    window_fields = llama.windows(hf, fields.size(hf, "sliding_window", WINDOW), lambda i: (i + 1) % pattern != 0)
    if window_fields:
        window_fields["local_rope_theta"] = fields.number(hf, "rope_local_base_freq", rope.LOCAL_THETA)
    # transformers never caps scores of Gemma 3, whatever the config says: no known model has a cap there.
    only = ONLY | {"attn_logit_softcapping": False}
    return _gemma_shape(hf, only, UNDERSTOOD3, rope.THETA_BY_FAMILY["gemma3_text"])._replace(
        qk_norm=True,
        final_softcap=hf.get("final_logit_softcapping") or 0.0,
        **window_fields,
    )


def _gemma_shape(hf: Mapping, only: Mapping, understood: Sequence[str], rope_theta: float) -> Config:
    return llama.shape(hf, only, understood, rope_theta)._replace(
        head_dim=hf["head_dim"],
        query_pre_attn_scalar=fields.number(hf, "query_pre_attn_scalar", 256.0),
        **_gemma_fields(hf["hidden_size"]),
    )


def _gemma_fields(width: int) -> dict:
    """The fields of Config that are the same for every Gemma of this width."""
    return dict(norm_offset=1.0, post_norms=True, activation="gelu_pytorch_tanh", embed_scale=width**0.5)


PRESETS = {
    "gemma2-2b": Config(
        256_000, 2304, 26, 8, 4, 256, 9216, 1e4, 1e-6, family="gemma2", query_pre_attn_scalar=256.0, attn_softcap=50.0,
        final_softcap=30.0, window=4096, local=(True, False) * 13, **_gemma_fields(2304),
    ),
    "gemma3-1b": Config(
        262_144, 1152, 26, 4, 1, 256, 6912, 1e6, 1e-6, family="gemma3_text", query_pre_attn_scalar=256.0, qk_norm=True,
        local_rope_theta=1e4, window=512, local=((True,) * 5 + (False,)) * 4 + (True,) * 2, **_gemma_fields(1152),
    ),
    "gemma3-4b": Config(
        262_208, 2560, 34, 8, 4, 256, 10_240, 1e6, 1e-6, family="gemma3_text", query_pre_attn_scalar=256.0,
        qk_norm=True, rope_scaling=Linear(8.0), local_rope_theta=1e4, window=1024,
        local=((True,) * 5 + (False,)) * 5 + (True,) * 4, **_gemma_fields(2560),
    ),
}  # fmt: skip
