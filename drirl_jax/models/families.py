"""The families of decoders that are read and written: one row each, and what is done with any of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from drirl_jax.models import fields, gemma, llama, mistral, qwen, rope
from drirl_jax.models.architecture import Config
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime import processes, sharding
from drirl_jax.runtime.progress import Progress, with_progress
from drirl_jax.types import InputError


class Family(NamedTuple):
    """What a family's file gives: a Config from Hugging Face's, and the names of a layer's tensors, ours to theirs."""

    config_from_hf: Callable[[Mapping], Config]
    layer: dict[str, str]


FAMILIES = {
    "llama": Family(llama.config_from_hf, llama.LAYER),
    "mistral": Family(mistral.config_from_hf, llama.LAYER),
    "qwen2": Family(qwen.qwen2_from_hf, qwen.LAYER),
    "qwen3": Family(qwen.qwen3_from_hf, qwen.LAYER),
    "gemma2": Family(gemma.gemma2_from_hf, gemma.LAYER),
    "gemma3_text": Family(gemma.gemma3_from_hf, gemma.LAYER),
}
# What a config may say at most, before anything is made of such a size.
SIZES = {"num_hidden_layers": 2**12, "max_position_embeddings": 2**31} | dict.fromkeys(
    "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim".split(), 2**24
)
# Fields of Config by what they must be.
COUNTS = "vocab width layers heads kv_heads head_dim ffn".split()
MEASURES = "rope_theta norm_eps attn_softcap final_softcap window".split()
BUFFERS = (".rotary_emb.inv_freq", ".position_ids")  # which follow from config.json
TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
# Public models' sizes, from their published config.json.
PRESETS = llama.PRESETS | mistral.PRESETS | qwen.PRESETS | gemma.PRESETS


def config_from_hf(hf: Mapping) -> Config:
    """The decoder that a Hugging Face config describes, as `hf.read_config` gives it.

    Raises:
        InputError: the family, or something that the config asks of it, is not implemented here; or a field is missing.
    """
    kind = hf.get("model_type")
    if kind not in list(FAMILIES):  # a list, as what a file holds may have no hash
        raise InputError(f"config.json has model_type={fields.quoted(kind)}: supported are {', '.join(FAMILIES)}.")
    hf = rope.standard(hf)
    for name, most in SIZES.items():
        size = hf.get(name)
        if size is not None and not (type(size) is int and 0 < size <= most):
            raise InputError(f"config.json has {name}={fields.quoted(size)}: that is no size of a {kind} model.")
    try:
        config = FAMILIES[kind].config_from_hf(hf)
        config = config._replace(family=kind, positions=hf.get("max_position_embeddings"))
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"config.json lacks the field {error}: it does not describe a {kind} model.") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"config.json has a field that no {kind} model can have ({error}).") from error
    _need_numbers(config)
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise InputError(
            f"config.json has {config.heads} heads of width {config.head_dim} for {config.kv_heads} of keys: the last "
            "must divide the first, and the width be even."
        )
    return config


def _need_numbers(config: Config) -> None:
    """Raises InputError unless sizes are positive whole numbers and the others finite and not negative."""
    scaling = config.rope_scaling._asdict() if config.rope_scaling else {}
    wrong = {
        name: value
        for name, value in (config._asdict() | scaling).items()
        if (name in COUNTS and not (type(value) is int and value > 0))
        or (name in [*MEASURES, *scaling] and not (type(value) in (int, float) and 0 <= value < math.inf))
    }
    if wrong:
        told = ", ".join(f"{name}={fields.quoted(value)}" for name, value in wrong.items())
        raise InputError(f"config.json does not describe a {config.family} model: it comes to {told}.")


def model_shapes(config: Config) -> Transformer:
    """The decoder's parameters as shapes alone."""
    return jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))


def check(shapes: Mapping[str, tuple[int, ...]], config: Config) -> None:
    """Raises InputError where `from_hf` would, told by the shapes of the tensors under Hugging Face names."""
    wanted = wanted_shapes(config)
    for name, shape in wanted.items():
        _need(name, shapes)
        _fits(name, shapes[name], shape)
    _need_no_others(shapes, wanted, config)


def wanted_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of a decoder's tensors by Hugging Face name."""
    model = model_shapes(config)
    wanted = {theirs: getattr(model, ours).shape for ours, theirs in TOP.items() if hasattr(model, ours)}
    for ours, theirs in FAMILIES[config.family].layer.items():
        if hasattr(model.blocks, ours):
            wanted |= {theirs.format(i): getattr(model.blocks, ours).shape[1:] for i in range(config.layers)}
    return wanted


def _need_no_others(tensors: Collection[str], wanted: Collection[str], config: Config) -> None:
    """Raises InputError where the weights hold what this model does not compute with, such as scales or biases."""
    spared = TOP["head"] if config.tied else None  # where it differs from the embedding the folder is refused
    for name in tensors:
        if name not in wanted and name != spared and not name.endswith(BUFFERS):
            raise InputError(
                f"the weights hold the tensor {name[:80]}, which no {config.family} model as config.json describes it "
                "has: the two are not of one model, or it is not supported."
            )


def _need(name: str, tensors: Mapping) -> None:
    if name not in tensors:
        raise InputError(f"the weights lack the tensor {name}: is the model folder complete?")


def _fits(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        raise InputError(f"the tensor {name} has shape {list(found)}, but config.json asks for {list(wanted)}.")


@partial(jax.jit, donate_argnums=0)
def _with_layer(stack, i, layer):
    return stack.at[i].set(layer.astype(stack.dtype))


def from_hf(tensors: Mapping[str, np.ndarray], config: Config) -> Transformer:
    """The decoder from tensors under Hugging Face names, in the type of config.weights.

    They are asked for one after the other and go straight to their place on the mesh, so that of `hf.read_tensors`'
    no two are in the host's memory at once, and no device ever holds more layers whole than one.

    Raises:
        InputError: a tensor is missing or misshapen, or there is one that the model does not compute with.
    """
    model = model_shapes(config)
    _need_no_others(tensors, wanted_shapes(config), config)

    def take(name, shape):
        _need(name, tensors)
        tensor = tensors[name]
        _fits(name, tensor.shape, shape)
        return tensor

    layer = {ours: theirs for ours, theirs in FAMILIES[config.family].layer.items() if hasattr(model.blocks, ours)}
    total = len(layer) * config.layers
    with contextlib.closing(
        Progress("weights", total, shown=processes.is_writer(), unit="tensor", brief=True)
    ) as progress:
        for ours, theirs in layer.items():
            shape = getattr(model.blocks, ours).shape
            # Whatever sizes the config tells, no room is made for weights that are not there.
            for i in range(config.layers):
                _need(theirs.format(i), tensors)
            take(theirs.format(0), shape[1:])
            stack = sharding.sharded_zeros({ours: jax.ShapeDtypeStruct(shape, config.weights)})[ours]
            for i in range(config.layers):
                # Each has its place before the next is read.
                stack = jax.block_until_ready(_with_layer(stack, i, take(theirs.format(i), shape[1:])))
                progress.show()
            setattr(model.blocks, ours, nnx.Param(stack))
    for ours, theirs in TOP.items():
        if hasattr(model, ours):
            setattr(model, ours, nnx.Param(jnp.asarray(take(theirs, getattr(model, ours).shape), config.weights)))
    return sharding.place(model)


def to_hf(model: Transformer) -> dict[str, np.ndarray]:
    """Tensors under Hugging Face names, in the type of the model's weights: the inverse of `from_hf`."""
    tensors = {theirs: np.asarray(getattr(model, ours)[...]) for ours, theirs in TOP.items() if hasattr(model, ours)}
    for ours, theirs in with_progress(list(FAMILIES[model.config.family].layer.items()), "fetching weights", "matrix"):
        if hasattr(model.blocks, ours):
            stacked = np.asarray(getattr(model.blocks, ours)[...])
            tensors |= {theirs.format(i): stacked[i] for i in range(model.config.layers)}
    return tensors
