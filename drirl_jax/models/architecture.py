"""The shape and kind of a decoder: one record that the file of each family (llama.py, qwen.py, ...) fills in."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from drirl_jax.types import Array, InputError


class Linear(NamedTuple):
    """Divides rotary frequencies by a factor, for contexts longer than in pretraining (arXiv 2306.15595)."""

    factor: float

    def __call__(self, frequency_d: Array) -> Array:
        return frequency_d / self.factor


class Llama3(NamedTuple):
    """The scaling of Llama 3.1, by the turns that a rotary pair makes within the context of pretraining.

    Below low_freq_factor turns the frequency is divided by the factor, above high_freq_factor turns it stays as it is.
    Between them it is interpolated linearly in the turns.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, frequency_d: Array) -> Array:
        turns_d = self.original_max_position_embeddings * frequency_d / (2 * jnp.pi)
        share_d = jnp.clip((turns_d - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return share_d * frequency_d + (1 - share_d) * frequency_d / self.factor


# By Hugging Face's rope_type.
ROPE_SCALING: dict[str, type[Linear] | type[Llama3]] = {"linear": Linear, "llama3": Llama3}


class Config(NamedTuple):
    """Shape and kind of a decoder. With the default values it is a Llama.

    Attributes:
        vocab, width, layers, heads, kv_heads, head_dim, ffn: sizes; head_dim need not be width / heads.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square in every RMSNorm.
        tied: the embedding is also the matrix that gives logits.
        dtype: of activations and products; softmax, norms and log-probabilities stay float32.
        weights: the dtype in which weights are made and read. Trained weights are float32 in any case.
        attention: how attention of groups is computed, a row of flash.ATTENTION.
        family: row of families.FAMILIES, which gives the names of the tensors on disk.
        rope_scaling: None for plain RoPE.
        qkv_bias: queries, keys and values have biases.
        qk_norm: queries and keys of each head pass an RMSNorm before they are rotated.
        norm_offset: RMSNorm multiplies by norm_offset + weight.
        post_norms: attention and MLP also have an RMSNorm after them, before they are added to the residual stream.
        activation: of the gate, a name in transformer.ACTIVATIONS.
        embed_scale: factor of the token embeddings.
        query_pre_attn_scalar: scores are q·k / √query_pre_attn_scalar; None for head_dim.
        attn_softcap, final_softcap: c of x ← c·tanh(x / c), for attention scores and for logits; 0 for none.
        window: a token of a local layer sees itself and the window - 1 tokens before it.
        local: which layers are local, [layers]; () for none.
        local_rope_theta: base of the local layers' frequencies, which are not scaled; None if all layers share theirs.
        positions: the most tokens that a text may have; None if no config.json gives it.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True
    dtype: str = "float32"
    weights: str = "float32"
    attention: str = "einsum"
    family: str = "llama"
    rope_scaling: Linear | Llama3 | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    activation: str = "silu"
    embed_scale: float = 1.0
    query_pre_attn_scalar: float | None = None
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    window: int = 0
    local: tuple[bool, ...] = ()
    local_rope_theta: float | None = None
    positions: int | None = None


def need_positions(config: Config, prompt: int, new_tokens: int) -> None:
    """Raises InputError if a prompt of `prompt` tokens with `new_tokens` after it is longer than a text may be."""
    if config.positions and prompt + new_tokens > config.positions:
        raise InputError(
            f"a prompt of {prompt} tokens with {new_tokens} after it: texts of this model have at most "
            f"{config.positions}. Shorten the prompt, or take fewer new tokens."
        )
