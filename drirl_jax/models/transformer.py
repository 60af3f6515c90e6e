"""The decoder: a prompt passes through its layers once for the whole group of responses.

Weight matrices are [out, in] as in torch. They are stacked over layers on a leading axis, and a scan runs over it.
Everything here is a pure function of a `Transformer`: a Flax NNX module that is used as an immutable pytree.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Callable, Mapping, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name

from drirl_jax.models.architecture import Config
from drirl_jax.models.attention import (
    Layout,
    heads_first,
    layer_cos_sin,
    local_layers,
    prompt_attention,
    rope,
    rope_cos_sin,
    with_prefix,
)
from drirl_jax.models.flash import ATTENDED, ATTENTION
from drirl_jax.runtime.sharding import constrain
from drirl_jax.types import Array, Group

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True)}


LINEAR = "linear"  # the name of results that the backward pass reuses: see `apply`


class Frozen(nnx.Module):
    """An NNX module that never changes: `replace` gives a changed copy."""

    def replace(self, **arrays):
        """A copy in which the named Params hold the new arrays, and the named submodules are the new modules."""
        changed = jax.tree.map(lambda x: x, self)
        for name, value in arrays.items():
            setattr(changed, name, value if isinstance(value, nnx.Module) else nnx.Param(value))
        return changed


def param(config: Config, x: Array) -> nnx.Param:
    """A Param of x in the dtype of the weights."""
    return nnx.Param(x.astype(config.weights))


def norm_sizes(config: Config) -> dict[str, int]:
    """The name and the size of each RMSNorm of one layer."""
    sizes = {"attn_norm": config.width, "mlp_norm": config.width}
    if config.post_norms:
        sizes |= {"attn_post_norm": config.width, "mlp_post_norm": config.width}
    if config.qk_norm:
        sizes |= {"q_norm": config.head_dim, "k_norm": config.head_dim}
    return sizes


class Block(Frozen):
    """The weights of one layer: attention and a gated MLP, each with an RMSNorm before it; a config may add norms."""

    def __init__(self, config: Config, key: Array):
        d, hd = config.width, config.head_dim
        shapes = {
            "q": (config.heads * hd, d),
            "k": (config.kv_heads * hd, d),
            "v": (config.kv_heads * hd, d),
            "o": (d, config.heads * hd),
            "gate": (config.ffn, d),
            "up": (config.ffn, d),
            "down": (d, config.ffn),
        }
        for i, (name, shape) in enumerate(shapes.items()):
            scale = shape[1] ** -0.5
            setattr(self, name, param(config, scale * jax.random.normal(jax.random.fold_in(key, i), shape)))
        for name, size in norm_sizes(config).items():
            setattr(self, name, param(config, jnp.full(size, 1 - config.norm_offset)))
        for name in "qkv" if config.qkv_bias else "":
            setattr(self, f"{name}_bias", param(config, jnp.zeros(shapes[name][0])))


def rms_norm(x: Array, weight: Array, config: Config) -> Array:
    """x / √(mean x² + ε) · (offset + w) over the last axis, in float32."""
    x32, weight = x.astype(jnp.float32), jnp.expand_dims(weight, range(x.ndim - weight.ndim))
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + config.norm_eps)
    if config.norm_offset:  # in bfloat16, 1 + w would lose most of w
        return (x32 * (config.norm_offset + weight.astype(jnp.float32))).astype(x.dtype)
    return x32.astype(x.dtype) * weight.astype(x.dtype)


class Layer(Protocol):
    """The weights of one layer and how they are applied. What a layer computes with them is in the two functions below.

    Training and prefill have an `AdaptedBlock`, decoding has a `decoding.DecodeLayer`. The leading axes of the states
    are the implementation's own.
    """

    @property
    def config(self) -> Config: ...

    def norm(self, name: str, x: Array) -> Array:
        """`rms_norm` with the weight that has this name in `norm_sizes`."""

    def qkv(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries [..., H, hd], keys and values [..., KV, hd] of states [..., D]."""

    def output(self, attended: Array) -> Array:
        """The output projection of attention, [..., H, hd] to [..., D]."""

    def gate_up(self, x: Array) -> tuple[Array, Array]:
        """The two projections of the MLP, [..., D] to [..., F] each."""

    def down(self, x: Array) -> Array:
        """The last projection of the MLP, [..., F] to [..., D]."""


def attention_inputs(layer: Layer, x: Array, cos_sin: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Rotated queries [..., H, hd], rotated keys and values [..., KV, hd] of the residual stream x [..., D]."""
    q, k, v = layer.qkv(layer.norm("attn_norm", x))
    if layer.config.qk_norm:
        q, k = layer.norm("q_norm", q), layer.norm("k_norm", k)
    return rope(q, cos_sin), rope(k, cos_sin), v


def finish_layer(layer: Layer, x: Array, attended: Array) -> Array:
    """The residual stream x [..., D] after a layer, from the result of its attention [..., H, hd]."""
    config = layer.config
    out = layer.output(attended)
    x += layer.norm("attn_post_norm", out) if config.post_norms else out
    gate, up = layer.gate_up(layer.norm("mlp_norm", x))
    out = layer.down(ACTIVATIONS[config.activation](gate) * up)
    return x + (layer.norm("mlp_post_norm", out) if config.post_norms else out)


class AdaptedBlock(NamedTuple):
    """A `Layer` of a `Block` and its adapter, for states [M, D] of P prompts.

    The rows of all prompts are one axis M = P·N. Over [P, N, width] XLA's CPU code is slow for elementwise operations,
    and the gradient of an MLP takes a quarter more time.

    Attributes:
        adapter: what changes the matrices, by name; {} for nothing.
        route_P: see `apply`.
        prompts: P.
    """

    config: Config
    block: Block
    adapter: Mapping[str, Callable]
    route_P: Array | None
    prompts: int

    def norm(self, name: str, x: Array) -> Array:
        return rms_norm(x, getattr(self.block, name)[...], self.config)

    def linear(self, name: str, x_MI: Array) -> Array:
        """W x, plus the bias if there is one, plus ΔW x if the adapter changes this matrix, [M, out]."""
        y_MO = jnp.einsum("mi,oi->mo", x_MI, getattr(self.block, name)[...])
        if hasattr(self.block, f"{name}_bias"):
            y_MO += getattr(self.block, f"{name}_bias")[...]
        return checkpoint_name(y_MO + self.adapter[name](x_MI, self.route_P) if name in self.adapter else y_MO, LINEAR)

    def qkv(self, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = (
            rearrange(self.linear(name, x), "(p n) (h d) -> p n h d", p=self.prompts, d=self.config.head_dim)
            for name in "qkv"
        )
        return q, k, v

    def output(self, attended: Array) -> Array:
        return self.linear("o", rearrange(attended, "p n h d -> (p n) (h d)"))

    def gate_up(self, x: Array) -> tuple[Array, Array]:
        return self.linear("gate", x), self.linear("up", x)

    def down(self, x: Array) -> Array:
        return self.linear("down", x)


def flatten_rows(x_PND: Array) -> Array:
    """[M, D] the states of P prompts as an `AdaptedBlock` takes them."""
    return rearrange(x_PND, "p n d -> (p n) d")


class Transformer(Frozen):
    """Decoder weights: embed [V, D], blocks stacked over layers, norm [D], head [V, D] (none if tied to embed)."""

    def __init__(self, config: Config, key: Array):
        self.config = config
        keys = jax.random.split(key, 3)
        self.embed = param(config, 0.02 * jax.random.normal(keys[0], (config.vocab, config.width)))
        self.blocks = jax.vmap(lambda k: Block(config, k))(jax.random.split(keys[1], config.layers))
        self.norm = param(config, jnp.full(config.width, 1 - config.norm_offset))
        if not config.tied:
            self.head = param(config, 0.02 * jax.random.normal(keys[2], (config.vocab, config.width)))

    @property
    def unembed(self) -> Array:
        """[V, D] the matrix that turns hidden states into logits."""
        return self.embed[...] if self.config.tied else self.head[...]


def cast(tree, config: Config):
    """The weights in the dtype of the computation; the weights themselves where they already have it."""
    return jax.tree.map(lambda x: x.astype(config.dtype), tree)


def embed(model: Transformer, ids: Array) -> Array:
    """[..., D] token embeddings times the config's embed_scale."""
    embedding = constrain(model.embed[...][ids], *("weights_stay", *(None,) * (ids.ndim - 1), "width"))
    x, scale = constrain(cast(embedding, model.config), "prompts"), model.config.embed_scale
    return x if scale == 1 else x * scale


def prompt_layer(config: Config, block: Block, x_PSD, cos_sin, local, prefix_kv, adapter, route_P):
    """Runs prompts [P, S, D] through one layer, after a prefix or not.

    Args:
        cos_sin: (cos, sin) of `attention.rope_cos_sin`.
        prefix_kv: keys and values of the prefix; None without one.

    Returns:
        (new states, (keys, values) of prefix and prompt).
    """
    layer = AdaptedBlock(config, block, adapter, route_P, len(x_PSD))
    q, k, v = attention_inputs(layer, flatten_rows(x_PSD), layer_cos_sin(config, cos_sin, local))
    k, v = with_prefix(prefix_kv, heads_first(k), heads_first(v))
    attended = prompt_attention(config, q, k, v, local)
    return finish_layer(layer, flatten_rows(x_PSD), attended).reshape(x_PSD.shape), (k, v)


@struct.dataclass
class TrunkStates:
    """The residual streams of a group after the trunk's first `layers` layers.

    prefix is [P, R, D], prompt [P, S, D], response [P, G, T, D]. The prefix is the same for all P prompts: the axis P
    only lets micro-batches cut it.
    """

    prefix: Array
    prompt: Array
    response: Array
    layers: int = struct.field(pytree_node=False)

    def members(self, members: slice) -> "TrunkStates":
        """The states of some of each prompt's responses."""
        return dataclasses.replace(self, response=self.response[:, members])

    def take(self, index_PM: Array) -> "TrunkStates":
        """The states of M responses of each prompt; index_PM says which."""
        return dataclasses.replace(self, response=jnp.take_along_axis(self.response, index_PM[..., None, None], axis=1))


def run_trunk(model: Transformer, group: Group, layers: int) -> TrunkStates:
    """Runs the group through the trunk's first `layers` layers, once for all adapters that do not change them."""
    prefix_RD = embed(model, jnp.array(group.prefix, jnp.int32))
    prefix_PRD = jnp.broadcast_to(prefix_RD, (group.prompt.shape[0], *prefix_RD.shape))
    return _run_layers(
        model, group, TrunkStates(prefix_PRD, embed(model, group.prompt), embed(model, group.response), 0), layers
    )


def apply(
    model: Transformer,
    group: Group,
    adapter=None,
    route_P: Array | None = None,
    *,
    trunk_states: TrunkStates | None = None,
    remat: bool = True,
):
    """Final hidden states of a group; the prompt is computed once for all its responses.

    Args:
        model: the trunk.
        group: prompts and responses, right-padded.
        adapter: a LoRA adapter of all layers or of the last ones, or a bank of them with `route_P`; None for the trunk
            alone.
        route_P: [P] int32, which adapter of the bank each prompt uses.
        trunk_states: the states that `run_trunk` gives for the same group, before the first adapted layer; None to
            start from the tokens.
        remat: recompute activations in the backward pass. Only the results of the matrices (with their adapters) and
            of an attention kernel are kept.

    Returns:
        ([P, S, D] prompt, [P, G, T, D] response) hidden states after the final norm. Values at padding are
        finite and have no meaning.
    """
    layers = model.config.layers
    trunk_states = run_trunk(model, group, 0) if trunk_states is None else trunk_states
    if adapter:
        adapted_layers = jax.tree.leaves(adapter)[0].shape[0]
        trunk_states = _run_layers(model, group, trunk_states, layers - adapted_layers)
    trunk_states = _run_layers(model, group, trunk_states, layers, adapter, route_P, remat)
    return tuple(rms_norm(x, model.norm[...], model.config) for x in (trunk_states.prompt, trunk_states.response))


def _run_layers(
    model: Transformer, group: Group, states: TrunkStates, end: int, adapter=None, route_P=None, remat=True
) -> TrunkStates:
    """Runs the group from layer `states.layers` up to layer `end`; the adapter has exactly these layers."""
    config, adapter = model.config, adapter or {}
    if not states.layers <= end <= config.layers:
        raise ValueError(f"a group after layer {states.layers} cannot go on to layer {end} of {config.layers}")
    if states.layers == end:
        return states
    (_, S), (_, G, T), R = group.prompt.shape, group.response.shape, len(group.prefix)
    layout = Layout(R, S, G, T, group.prompt_len)
    cos_sin, prefix_cos_sin = rope_cos_sin(config, layout.position_PN()), rope_cos_sin(config, jnp.arange(R)[None])
    attention = ATTENTION[config.attention].function
    # Without a bank all prompts share one adapter, so one prefix is enough for them all.
    prefix = states.prefix if route_P is not None else states.prefix[:1]

    def run_layer(carry, inputs):
        prefix, x_PND = constrain(carry[0], "prompts"), constrain(carry[1], "prompts")
        *block_and_adapter, local = inputs
        block, layer_adapter = cast(block_and_adapter, config)
        prefix_kv = None
        if R:
            prefix, prefix_kv = prompt_layer(config, block, prefix, prefix_cos_sin, local, None, layer_adapter, route_P)
        layer = AdaptedBlock(config, block, layer_adapter, route_P, len(x_PND))
        q, k, v = attention_inputs(layer, flatten_rows(x_PND), layer_cos_sin(config, cos_sin, local))
        attended = attention(config, layout, q, k, v, prefix_kv, local)
        return (prefix, finish_layer(layer, flatten_rows(x_PND), attended).reshape(x_PND.shape)), None

    if remat:
        run_layer = jax.checkpoint(run_layer, policy=jax.checkpoint_policies.save_only_these_names(LINEAR, ATTENDED))
    blocks = model.blocks
    if (states.layers, end) != (0, config.layers):
        blocks = jax.tree.map(lambda w: w[states.layers : end], blocks)
    inputs = (blocks, adapter, local_layers(config, slice(states.layers, end)))
    (prefix, x_PND), _ = jax.lax.scan(run_layer, (prefix, layout.join(states.prompt, states.response)), inputs)
    return TrunkStates(jnp.broadcast_to(prefix, states.prefix.shape), *layout.split(x_PND), layers=end)


def last_token(x: Array, length: Array) -> Array:
    """[..., D] the entry of x [..., N, D] at position length - 1 of each row."""
    return jnp.take_along_axis(x, (length - 1)[..., None, None], axis=-2)[..., 0, :]


def predicting_states(hidden, group: Group) -> Array:
    """[P, G, T, D] the state that predicts each response token: of the last prompt token, then of response token t - 1.

    Args:
        hidden: the pair that `apply` returns.
        group: the group that `apply` was given.
    """
    prompt_PSD, response_PGTD = hidden
    first_PD = last_token(prompt_PSD, group.prompt_len)
    first = jnp.broadcast_to(first_PD[:, None, None], response_PGTD[:, :, :1].shape)
    return jnp.concatenate([first, response_PGTD[:, :, :-1]], axis=2)
