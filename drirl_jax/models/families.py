"""The families of decoders that can be read and written, one row each, and the functions for all of them."""

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
    """What a family's file gives: a function from Hugging Face's config to ours, and our names of a layer's tensors
    mapped to Hugging Face's."""

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
# The largest sizes that a config may have. They are checked before anything is allocated.
SIZES = {"num_hidden_layers": 2**12, "max_position_embeddings": 2**31} | dict.fromkeys(
    "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim".split(), 2**24
)
# Fields of Config that must be positive whole numbers, and fields that must be finite and not negative.
COUNTS = "vocab width layers heads kv_heads head_dim ffn".split()
MEASURES = "rope_theta norm_eps attn_softcap final_softcap window".split()
BUFFERS = (".rotary_emb.inv_freq", ".position_ids")  # tensors that follow from config.json
TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
# The sizes of public models, from their published config.json.
PRESETS = llama.PRESETS | mistral.PRESETS | qwen.PRESETS | gemma.PRESETS


def config_from_hf(hf: Mapping) -> Config:
    """The decoder that a Hugging Face config, as `hf.read_config` returns it, describes.

    Raises:
        InputError: the family or an option of the config is not implemented, or a field is missing or wrong.
    """
    model_type = hf.get("model_type")
    if model_type not in list(FAMILIES):  # a list, because a value from a file may be unhashable
        raise InputError(
            f"config.json has model_type={fields.quoted(model_type)}: supported are {', '.join(FAMILIES)}."
        )
    hf = rope.standardise_config(hf)
    for name, largest in SIZES.items():
        size = hf.get(name)
        if size is not None and not (type(size) is int and 0 < size <= largest):
            raise InputError(f"config.json has {name}={fields.quoted(size)}: that is no size of a {model_type} model.")
    try:
        config = FAMILIES[model_type].config_from_hf(hf)
        config = config._replace(family=model_type, positions=hf.get("max_position_embeddings"))
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"config.json lacks the field {error}: it does not describe a {model_type} model.") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"config.json has a field that no {model_type} model can have ({error}).") from error
    _need_numbers(config)
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise InputError(
            f"config.json has {config.heads} heads of width {config.head_dim} and {config.kv_heads} key-value heads: "
            "the number of key-value heads must divide the number of heads, and the width must be even."
        )
    return config


def _need_numbers(config: Config) -> None:
    """Raises InputError unless sizes are positive whole numbers, and the other numbers are finite and not negative."""
    scaling = config.rope_scaling._asdict() if config.rope_scaling else {}
    wrong_fields = {
        name: value
        for name, value in (config._asdict() | scaling).items()
        if (name in COUNTS and not (type(value) is int and value > 0))
        or (name in [*MEASURES, *scaling] and not (type(value) in (int, float) and 0 <= value < math.inf))
    }
    if wrong_fields:
        listed = ", ".join(f"{name}={fields.quoted(value)}" for name, value in wrong_fields.items())
        raise InputError(f"config.json does not describe a {config.family} model: it gives {listed}.")


def model_shapes(config: Config) -> Transformer:
    """The decoder's parameters as shapes, without arrays."""
    return jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: Config) -> None:
    """Raises the InputErrors of `from_hf`, from the shapes of the tensors under Hugging Face names alone."""
    wanted = wanted_shapes(config)
    for name, shape in wanted.items():
        _need_tensor(name, shapes)
        _need_shape(name, shapes[name], shape)
    _need_no_other_tensors(shapes, wanted, config)


def wanted_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a decoder, by Hugging Face name."""
    model = model_shapes(config)
    wanted = {theirs: getattr(model, ours).shape for ours, theirs in TOP.items() if hasattr(model, ours)}
    for ours, theirs in FAMILIES[config.family].layer.items():
        if hasattr(model.blocks, ours):
            wanted |= {theirs.format(i): getattr(model.blocks, ours).shape[1:] for i in range(config.layers)}
    return wanted


def _need_no_other_tensors(tensors: Collection[str], wanted: Collection[str], config: Config) -> None:
    """Raises InputError if the weights hold a tensor that this model does not use, such as scales or biases."""
    allowed = TOP["head"] if config.tied else None  # `folders` refuses a head that differs from a tied embedding
    for name in tensors:
        if name not in wanted and name != allowed and not name.endswith(BUFFERS):
            raise InputError(
                f"the weights hold the tensor {name[:80]}, which no {config.family} model with this config.json has: "
                "weights and config.json belong to different models, or the model is not supported."
            )


def _need_tensor(name: str, tensors: Mapping) -> None:
    if name not in tensors:
        raise InputError(f"the weights lack the tensor {name}: is the model folder complete?")


def _need_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(wanted):
        raise InputError(f"the tensor {name} has shape {list(shape)}, but config.json asks for {list(wanted)}.")


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack, i, layer):
    return stack.at[i].set(layer.astype(stack.dtype))


def from_hf(tensors: Mapping[str, np.ndarray], config: Config) -> Transformer:
    """The decoder from tensors under Hugging Face names, in the dtype of config.weights.

    The tensors are read one after the other, and each goes straight to its place on the mesh. So the host never holds
    two tensors of `hf.read_tensors` in memory, and a device never holds more than one complete layer.

    Raises:
        InputError: a tensor is missing, has a wrong shape, or is not used by the model.
    """
    model = model_shapes(config)
    _need_no_other_tensors(tensors, wanted_shapes(config), config)

    def read_tensor(name, shape):
        _need_tensor(name, tensors)
        tensor = tensors[name]
        _need_shape(name, tensor.shape, shape)
        return tensor

    layer_names = {
        ours: theirs for ours, theirs in FAMILIES[config.family].layer.items() if hasattr(model.blocks, ours)
    }
    total = len(layer_names) * config.layers
    with contextlib.closing(
        Progress("weights", total, prints=processes.is_writer(), unit="tensor", brief=True)
    ) as progress:
        for ours, theirs in layer_names.items():
            shape = getattr(model.blocks, ours).shape
            # The config may claim any size: nothing is allocated for weights that are missing.
            for i in range(config.layers):
                _need_tensor(theirs.format(i), tensors)
            read_tensor(theirs.format(0), shape[1:])
            stack = sharding.sharded_zeros({ours: jax.ShapeDtypeStruct(shape, config.weights)})[ours]
            for i in range(config.layers):
                # Wait until this tensor is in place before the next is read.
                stack = jax.block_until_ready(_set_layer(stack, i, read_tensor(theirs.format(i), shape[1:])))
                progress.show()
            setattr(model.blocks, ours, nnx.Param(stack))
    for ours, theirs in TOP.items():
        if hasattr(model, ours):
            setattr(
                model, ours, nnx.Param(jnp.asarray(read_tensor(theirs, getattr(model, ours).shape), config.weights))
            )
    return sharding.place(model)


def to_hf(model: Transformer) -> dict[str, np.ndarray]:
    """Tensors under Hugging Face names, in the dtype of the model's weights: the inverse of `from_hf`."""
    tensors = {theirs: np.asarray(getattr(model, ours)[...]) for ours, theirs in TOP.items() if hasattr(model, ours)}
    for ours, theirs in with_progress(list(FAMILIES[model.config.family].layer.items()), "fetching weights", "matrix"):
        if hasattr(model.blocks, ours):
            stacked = np.asarray(getattr(model.blocks, ours)[...])
            tensors |= {theirs.format(i): stacked[i] for i in range(model.config.layers)}
    return tensors
