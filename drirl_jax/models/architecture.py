"""What kind of decoder a model is: one record that every family's file (llama.py, qwen.py, ...) fills in."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from drirl_jax.types import Array, InputError


class Linear(NamedTuple):
    """Rotary frequencies divided by a factor, for contexts longer than those of pretraining (arXiv 2306.15595)."""

    factor: float

    def __call__(self, frequency_d: Array) -> Array:
        return frequency_d / self.factor


class Llama3(NamedTuple):
    """Llama 3.1's: pairs of fewer than low_freq_factor turns in the context of pretraining are slowed by the factor,
    those of more than high_freq_factor are kept, and between the frequency is interpolated linearly in the turns."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, frequency_d: Array) -> Array:
        turns_d = self.original_max_position_embeddings * frequency_d / (2 * jnp.pi)
        kept_d = jnp.clip((turns_d - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return kept_d * frequency_d + (1 - kept_d) * frequency_d / self.factor


# By Hugging Face's rope_type.
ROPE_SCALING: dict[str, type[Linear] | type[Llama3]] = {"linear": Linear, "llama3": Llama3}


class Config(NamedTuple):
    """Shape and kind of a decoder; with the defaults of what has one it is a Llama.

    Attributes:
        vocab, width, layers, heads, kv_heads, head_dim, ffn: sizes; head_dim need not be width / heads.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square in every RMSNorm.
        tied: the embedding is the matrix of the vocabulary product too.
        dtype: of activations and products; softmax, norms and log-probabilities stay float32.
        weights: the type in which weights are made and read; whatever is trained is float32 all the same.
        attention: of groups, a row of flash.ATTENTION.
        family: row of families.FAMILIES, whose names the tensors have on disk.
        rope_scaling: None for plain RoPE.
        qkv_bias: queries, keys and values have biases.
        qk_norm: every head's queries and keys pass an RMSNorm before they are rotated.
        norm_offset: RMSNorm multiplies by norm_offset + weight.
        post_norms: attention and MLP have an RMSNorm behind them too, before their sums with the residual stream.
        activation: of the gate, a name in transformer.ACTIVATIONS.
        embed_scale: factor of the token embeddings.
        query_pre_attn_scalar: scores are q·k / √query_pre_attn_scalar; None for head_dim.
        attn_softcap, final_softcap: c of x ← c·tanh(x / c), of attention scores and of logits; 0 for none.
        window: a token of a local layer sees itself and the window - 1 tokens before it.
        local: which layers are local, [layers]; () for none.
        local_rope_theta: base of the local layers' frequencies, which are not scaled; None for those of all layers.
        positions: how many tokens a text may have; None where no config.json tells.
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


def need_positions(config: Config, prompt: int, behind: int) -> None:
    """Raises InputError where a prompt of so many tokens, with so many behind it, is longer than texts may be."""
    if config.positions and prompt + behind > config.positions:
        raise InputError(
            f"a prompt of {prompt} tokens with {behind} behind it: texts of this model have at most "
            f"{config.positions}. Shorten the prompt, or take fewer new tokens."
        )
