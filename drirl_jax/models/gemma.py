"""The Gemma family: Gemma 2 (arXiv 2408.00118), which caps scores and logits and whose every other layer is local; the
text models of Gemma 3 (arXiv 2503.19786), with norms of queries and keys and a global layer behind five local ones."""

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


# Fields that a Gemma's config may have; the rest of the names stand in ONLY.
UNDERSTOOD = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
    "layer_types",
)
UNDERSTOOD3 = (*UNDERSTOOD, "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq")
WINDOW = 4096  # transformers' own where the config does not say


def gemma2_from_hf(hf: Mapping) -> Config:
    """The decoder from a Gemma 2's config; raises what `llama.config_from_hf` does."""
    return _shape(hf, ONLY, UNDERSTOOD, rope.THETA)._replace(
        attn_softcap=hf["attn_logit_softcapping"] or 0.0,
        final_softcap=hf["final_logit_softcapping"] or 0.0,
        **llama.windows(hf, fields.size(hf, "sliding_window", WINDOW), lambda i: i % 2 == 0),
    )


def gemma3_from_hf(hf: Mapping) -> Config:
    """The same from a Gemma 3 text model's."""
    pattern = fields.size(hf, "sliding_window_pattern", 6) or 6
    sight = llama.windows(hf, fields.size(hf, "sliding_window", WINDOW), lambda i: (i + 1) % pattern != 0)
    if sight:
        sight["local_rope_theta"] = fields.number(hf, "rope_local_base_freq", rope.LOCAL_THETA)
    # transformers caps no scores of Gemma 3, whatever the config says, so that a cap there is no known model's.
    only = ONLY | {"attn_logit_softcapping": False}
    return _shape(hf, only, UNDERSTOOD3, rope.THETA_OF["gemma3_text"])._replace(
        qk_norm=True,
        final_softcap=hf.get("final_logit_softcapping") or 0.0,
        **sight,
    )


def _shape(hf: Mapping, only: Mapping, understood: Sequence[str], rope_theta: float) -> Config:
    return llama.shape(hf, only, understood, rope_theta)._replace(
        head_dim=hf["head_dim"],
        query_pre_attn_scalar=fields.number(hf, "query_pre_attn_scalar", 256.0),
        **_like(hf["hidden_size"]),
    )


def _like(width: int) -> dict:
    """What every Gemma of this width has."""
    return dict(norm_offset=1.0, post_norms=True, activation="gelu_pytorch_tanh", embed_scale=width**0.5)


PRESETS = {
    "gemma2-2b": Config(
        256_000, 2304, 26, 8, 4, 256, 9216, 1e4, 1e-6, family="gemma2", query_pre_attn_scalar=256.0, attn_softcap=50.0,
        final_softcap=30.0, window=4096, local=(True, False) * 13, **_like(2304),
    ),
    "gemma3-1b": Config(
        262_144, 1152, 26, 4, 1, 256, 6912, 1e6, 1e-6, family="gemma3_text", query_pre_attn_scalar=256.0, qk_norm=True,
        local_rope_theta=1e4, window=512, local=((True,) * 5 + (False,)) * 4 + (True,) * 2, **_like(1152),
    ),
    "gemma3-4b": Config(
        262_208, 2560, 34, 8, 4, 256, 10_240, 1e6, 1e-6, family="gemma3_text", query_pre_attn_scalar=256.0,
        qk_norm=True, rope_scaling=Linear(8.0), local_rope_theta=1e4, window=1024,
        local=((True,) * 5 + (False,)) * 5 + (True,) * 4, **_like(2560),
    ),
}  # fmt: skip
