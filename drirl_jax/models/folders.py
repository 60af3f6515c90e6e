"""Decides what a model folder may hold, for all its readers: policy, encoder, plan, evaluation, attacks.

A folder holds a config.json and complete safetensors of floats. Everything else that changes the numbers is refused
before any work: quantised weights, adapters, code of the model's own, two models in one folder, broken files.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  gives numpy the name bfloat16, which safetensors looks up
import numpy as np
from safetensors import SafetensorError, safe_open

from drirl_jax.models import fields
from drirl_jax.types import InputError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.safetensors")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
QUANTISED_FIELD = re.compile("quantiz|quantis|^quant_|compression_config")
READ = {".json", ".safetensors", ".jinja", ".model", ".txt"}  # the files of a folder that are opened
FLOATS = ("F64", "F32", "F16", "BF16")
BUFFERS = ("position_ids", "token_type_ids")  # tensors of integers that are never read
POINTER = b"version https://git-lfs"  # the first bytes of a Git LFS pointer, which stands where a file should be
# The largest sizes of files that are accepted. The 405B Llama has 1,100 tensors and an index of 0.1 MiB.
JSON_BYTES, HEADER_BYTES, TENSORS = 2**24, 2**23, 2**16
ROWS = 4096  # rows in memory at once when two matrices are compared


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The object in the config.json of a folder that holds a supported model.

    Raises:
        InputError: there is no model, or the folder holds a run, an adapter, a quantised model, or code of its own.
    """
    with _reading(folder):
        _need_model(folder)
        if not (folder / "config.json").is_file():
            raise InputError(f"the model folder {folder} has no config.json: give a Hugging Face model's folder.")
    config = read_json(folder / "config.json")
    unused = {name for name in config if QUANTISED_FIELD.search(name) and config[name] in (None, {})}
    quantised_fields = [name for name in config if QUANTISED_FIELD.search(name) and name not in unused]
    if quantised_fields:
        quantisation = config[quantised_fields[0]]
        method = (
            quantisation.get("quant_method", quantisation.get("format", quantisation))
            if isinstance(quantisation, dict)
            else quantisation
        )
        raise InputError(
            f"{folder / 'config.json'} has a {quantised_fields[0]} ({fields.quoted(method)}): quantised weights are "
            "not read, so save the model dequantised, in bfloat16."
        )
    code = config.get("auto_map")
    if code and (not isinstance(code, dict) or any(str(name).startswith("AutoModel") for name in code)):
        raise InputError(
            f"{folder / 'config.json'} has an auto_map to code in the folder, but no code of a model folder is run: "
            "take a model that transformers supports itself, or remove the field if its code changes nothing."
        )
    return {name: value for name, value in config.items() if name not in unused}


def open_weights(folder: pathlib.Path) -> Tensors:
    """The tensors of the folder. Files and headers are checked now; each tensor is read only when it is used.

    Raises:
        InputError: there are no weights, some are missing, they belong to two models, or some are not floats.
    """
    with _reading(folder):
        _need_model(folder)
        weight_map, files = _weight_files(folder)
    tensors = Tensors(files)
    if weight_map is not None:
        _need_agreement(folder / INDEX, weight_map, tensors)
    _need_tie(folder, tensors)
    return tensors


class Tensors(Mapping):
    """The tensors of safetensors files by name. Each is read only when it is used, in the dtype that it has on disk.

    Raises:
        InputError: a file cannot be read, is too large, holds numbers that are not floats, or holds a tensor that
            another file holds too.
    """

    def __init__(self, files: list[pathlib.Path]):
        self.file: dict[str, pathlib.Path] = {}
        self._opened, self._shape = {}, {}
        for file in files:
            header = read_header(file)
            for name, (dtype, shape) in header.items():
                if name in self.file:
                    raise InputError(
                        f"{self.file[name]} and {file} both hold the tensor {name}: remove the file that is older."
                    )
                if dtype not in FLOATS and not name.endswith(BUFFERS):
                    raise InputError(
                        f"{file} holds the tensor {name} as {dtype}: only weights of {', '.join(FLOATS)} are read, so "
                        "save the model dequantised, in bfloat16."
                    )
                self.file[name], self._shape[name] = file, shape
            if len(self.file) > TENSORS:
                raise InputError(f"{file.parent} holds more than {TENSORS} tensors, more than any model does.")
            try:
                self._opened[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise _unreadable_error(file, error) from error

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._opened[self.file[name]]
        try:
            return file.get_tensor(name)
        except (SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:  # a dtype that numpy lacks
            raise InputError(f"the tensor {name} cannot be read ({error}): save the model as bfloat16.") from error

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` - 1 of a matrix."""
        return self._opened[self.file[name]].get_slice(name)[first:last]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return self._shape[name]

    def __contains__(self, name) -> bool:  # the method of Mapping would read the tensor
        return name in self.file

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def __len__(self) -> int:
        return len(self.file)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object that a JSON file of a model holds.

    Raises:
        InputError: it is no regular file, it is larger than JSON_BYTES, or it holds no JSON object.
    """
    try:
        if not file.is_file():
            raise InputError(f"{file} is no regular file: replace it with the model's file.")
        if file.stat().st_size > JSON_BYTES:
            raise InputError(
                f"{file} has more than {JSON_BYTES >> 20} MiB, more than any model's: download or save the model again."
            )
        content = file.read_bytes()
        value = json.loads(content.decode("utf-8"))
    except (OSError, RecursionError) as error:
        raise _unreadable_error(file, error) from error
    except InputError:
        raise
    except ValueError as error:
        if content.startswith(POINTER):
            raise _pointer_error(file) from error
        raise InputError(f"{file} is not JSON ({error}): download or save the model again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds {fields.quoted(value)}, where an object is needed: save the model again.")
    return value


def read_header(file: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor of a safetensors file, by name.

    Raises:
        InputError: it is no complete safetensors file, or its header is too large.
    """
    try:
        if not file.is_file():
            raise FileNotFoundError("it is not there" if not file.exists() else "it is no regular file")
        size = file.stat().st_size
        with file.open("rb") as stream:
            first_bytes = stream.read(max(8, len(POINTER)))
            if first_bytes == POINTER:
                raise _pointer_error(file)
            length = struct.unpack("<Q", first_bytes[:8])[0] if len(first_bytes) >= 8 else size
            if length > size - 8:
                raise ValueError("it ends before its header does")
            if length > HEADER_BYTES:
                raise ValueError(f"its header has {length >> 20} MiB, more than any model's")
            stream.seek(8)
            header = json.loads(stream.read(length))
        if len(header) > TENSORS:
            raise ValueError(f"it holds {len(header)} tensors, more than any model")
        header.pop("__metadata__", None)
        return {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable_error(file, error) from error


def need_embeddings(tokenizer: Any, rows: int, where: object) -> None:
    """Raises InputError if a tokenizer has ids beyond the rows of the embedding, which would take another token's row.

    Placeholders of images, sounds and films may have such ids: no text holds them, and the sampler never gives them.

    Args:
        tokenizer: of the package transformers or tokenizers.
        rows: the number of rows of the embedding.
        where: the folder, for the message.
    """
    vocabulary = tokenizer.get_vocab()
    roles = (f"{medium}_token" for medium in ("image", "video", "audio"))
    placeholders = {str(getattr(tokenizer, role, None)) for role in roles}
    ids_beyond = {word: i for word, i in vocabulary.items() if i >= rows and word not in placeholders}
    if ids_beyond:
        word = max(ids_beyond, key=ids_beyond.__getitem__)
        raise InputError(
            f"the tokenizer in {where} has {len(vocabulary)} tokens, up to the id {ids_beyond[word]} "
            f"({fields.quoted(word)}), but its network has only {rows} embeddings: take both from one model, or resize "
            "the embedding and train it."
        )


def _unreadable_error(file: pathlib.Path, error: object) -> InputError:
    return InputError(f"{file} cannot be read ({str(error)[:200]}): download or save the model again.")


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"the model folder {folder} cannot be read ({error}): give one that can be.") from error


def _pointer_error(file: pathlib.Path) -> InputError:
    return InputError(f"{file} is only a Git LFS pointer to the file: run git lfs pull in the folder.")


def _need_model(folder: pathlib.Path) -> None:
    """Raises InputError if the names of the files show that the folder does not hold a model alone."""
    present = {name for name in (*ADAPTER, *QUANTISED, "config.json") if (folder / name).exists()}
    adapter_files = [name for name in ADAPTER if name in present]
    if adapter_files and "config.json" in present:
        raise InputError(
            f"the model folder {folder} holds an adapter beside the model ({adapter_files[0]}), which is not read: "
            "merge it into the model (PEFT's merge_and_unload), or move it elsewhere."
        )
    if adapter_files:
        raise InputError(
            f"{folder} holds a PEFT adapter of {_base_name(folder)} and no model: merge the two (PEFT's "
            "merge_and_unload), save the result, and give that folder."
        )
    _need_no_run(folder)
    quantised_files = [name for name in QUANTISED if name in present]
    if quantised_files:
        raise InputError(
            f"the model folder {folder} has a {quantised_files[0]}: quantised weights are not read, so save the model "
            "dequantised, in bfloat16, or remove the file if the weights are not quantised."
        )
    for file in folder.iterdir():
        if file.suffix in READ and file.exists() and not (file.is_file() or file.is_dir()):
            raise InputError(f"{file} is no regular file: replace it with the model's file.")


def _base_name(folder: pathlib.Path) -> str:
    try:
        base = read_json(folder / ADAPTER[0]).get("base_model_name_or_path")
    except InputError:
        base = None
    return fields.quoted(base) if isinstance(base, str) and base else "a base that it does not name"


def _need_no_run(folder: pathlib.Path) -> None:
    """Raises InputError for the workdir of a run: it has a config.json too."""
    aligned = folder / "aligned"
    if (folder / "config.json").is_file():
        is_run = {"policy", "schedule", "align"} <= read_json(folder / "config.json").keys()
    else:
        is_run = (folder / "checkpoints").is_dir() or aligned.is_dir()
    if is_run and aligned.is_dir():
        raise InputError(f"{folder} is the workdir of a run: give the model in it, {aligned}.")
    if is_run:
        raise InputError(
            f"{folder} is the workdir of a run that has not ended, and holds no model yet: start the run again with "
            f"its own command, then give {aligned}."
        )


def _weight_files(folder: pathlib.Path) -> tuple[dict[str, str] | None, list[pathlib.Path]]:
    """The weight map of the index (None without an index), and the files that hold the model."""
    index, single = folder / INDEX, folder / SINGLE
    weight_map = _read_index(index) if index.exists() else None
    if weight_map and single.exists() and set(weight_map.values()) != {SINGLE}:
        raise InputError(
            f"the model folder {folder} holds {SINGLE} and {INDEX} of other files, which may be two models: remove "
            "the older one."
        )
    names = sorted(set(weight_map.values())) if weight_map else [SINGLE] if single.exists() else _all_files(folder)
    unlisted = {file.name for file in folder.glob("model-*.safetensors") if SHARD.fullmatch(file.name)} - set(names)
    if unlisted:
        raise InputError(
            f"the model folder {folder} holds {min(unlisted)} beside {names[0]}, and they belong to different models: "
            "remove the files of the older model."
        )
    _need_all_shards(folder, set(names))
    return weight_map, [folder / name for name in names]


def _read_index(index: pathlib.Path) -> dict[str, str]:
    """The name of the file that holds each tensor."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > TENSORS:
        raise InputError(f"{index} has no weight_map of tensors and files: download or save the model again.")
    for name, file in weight_map.items():
        is_file_name = isinstance(file, str) and file not in ("", ".", "..") and not re.search(r"[/\\\0]", file)
        if not is_file_name or not file.endswith(".safetensors"):
            raise InputError(
                f"{index} puts the tensor {name[:80]} into {fields.quoted(file)}, which is no name of a safetensors "
                "file in the same folder: download or save the model again."
            )
    return weight_map


def _all_files(folder: pathlib.Path) -> list[str]:
    """All safetensors files, for a folder without an index and without a file of the usual name."""
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names and any(folder.glob("*.bin")):
        raise InputError(
            f"the model folder {folder} has weights only in *.bin files: these are pickles and are not read, so "
            "convert them to safetensors."
        )
    if not names:
        raise InputError(
            f"the model folder {folder} has no weights: there is no {SINGLE}, put the model's files there."
        )
    return names


def _need_all_shards(folder: pathlib.Path, names: set[str]) -> None:
    """Raises InputError if a file is one of n shards and some of the n are missing."""
    for match in filter(None, map(SHARD.fullmatch, sorted(names))):
        stem, number, count = match.groups()
        shard_names = (f"{stem}-{i:0{len(number)}d}-of-{count}.safetensors" for i in range(1, int(count) + 1))
        missing = next((name for name in shard_names if name not in names), None)
        if missing is not None:
            raise InputError(f"the model folder {folder} holds {match[0]} but lacks {missing}: download them all.")


def _need_agreement(index: pathlib.Path, weight_map: Mapping[str, str], tensors: Tensors) -> None:
    """Raises InputError if an index and the headers of its files list different tensors."""
    for name in weight_map.keys() | tensors.file.keys():
        file = tensors.file.get(name)
        if file is None or weight_map.get(name) != file.name:
            raise InputError(
                f"{index} puts the tensor {name[:80]} into {weight_map.get(name, 'no file')}, but it lies in "
                f"{file.name if file else 'none'}: the index is of another model, download or save the model again."
            )


def _need_tie(folder: pathlib.Path, tensors: Tensors) -> None:
    """Raises InputError if config.json ties embedding and lm_head, but the weights hold two different matrices."""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    config = folder / "config.json"
    if not (embed in tensors and head in tensors and config.is_file() and fields.tied(read_json(config))):
        return
    shape = tensors.shape(embed)
    row_ranges = ((first, min(first + ROWS, shape[0])) for first in range(0, shape[0], ROWS))
    equal = shape == tensors.shape(head) and all(
        np.array_equal(tensors.rows(embed, *row_range), tensors.rows(head, *row_range)) for row_range in row_ranges
    )
    if not equal:
        raise InputError(
            f"{config} ties the embedding to lm_head (tie_word_embeddings), but the weights hold an "
            "lm_head.weight of their own that differs: set tie_word_embeddings to false, or remove that tensor."
        )
