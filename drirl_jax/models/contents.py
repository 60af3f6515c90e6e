"""What a model folder may hold, decided here for every reader of one: policy, encoder, plan, evaluation, attacks.

A folder is a config.json and safetensors, whole and of floats. What else changes the numbers is refused before any
work: quantised weights, adapters, code of its own, two models in one place, files that are none.
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
READ = {".json", ".safetensors", ".jinja", ".model", ".txt"}  # what some reader of a folder opens
FLOATS = ("F64", "F32", "F16", "BF16")
BUFFERS = ("position_ids", "token_type_ids")  # counted numbers that no reader takes
POINTER = b"version https://git-lfs"
# What files may have before anything is done with them. 405B Llama has 1,100 tensors and 0.1 MiB of index.
JSON_BYTES, HEADER_BYTES, TENSORS = 2**24, 2**23, 2**16
ROWS = 4096  # of two matrices that are compared, which are in memory at once


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The object in config.json, of a folder that holds a model which is understood.

    Raises:
        InputError: there is none, or it describes a run, an adapter, a quantised model, or one with code of its own.
    """
    with _readable(folder):
        _need_model(folder)
        if not (folder / "config.json").is_file():
            raise InputError(f"the model folder {folder} has no config.json: give a Hugging Face model's folder.")
    config = read_json(folder / "config.json")
    unused = {name for name in config if QUANTISED_FIELD.search(name) and config[name] in (None, {})}
    quantised = [name for name in config if QUANTISED_FIELD.search(name) and name not in unused]
    if quantised:
        how = config[quantised[0]]
        method = how.get("quant_method", how.get("format", how)) if isinstance(how, dict) else how
        raise InputError(
            f"{folder / 'config.json'} has a {quantised[0]} ({fields.quoted(method)}): quantised weights are not read, "
            "so save the model dequantised, in bfloat16."
        )
    code = config.get("auto_map")
    if code and (not isinstance(code, dict) or any(str(name).startswith("AutoModel") for name in code)):
        raise InputError(
            f"{folder / 'config.json'} has an auto_map to code of its own, and no code of a model folder is run: take "
            "a model that transformers computes itself, or remove the field if its code changes nothing."
        )
    return {name: value for name, value in config.items() if name not in unused}


def open_weights(folder: pathlib.Path) -> Tensors:
    """The tensors of the folder, whose files and headers are looked at here; each is read when it is asked for.

    Raises:
        InputError: there are none, not all of them, more than one model's, or some that are no floats.
    """
    with _readable(folder):
        _need_model(folder)
        place, files = _weight_files(folder)
    tensors = Tensors(files)
    if place is not None:
        _need_agreement(folder / INDEX, place, tensors)
    _need_tie(folder, tensors)
    return tensors


class Tensors(Mapping):
    """The tensors of safetensors files by name, each read when it is asked for, in the type that it has on disk.

    Raises:
        InputError: a file cannot be read, is out of all measure, holds numbers that are no floats, or a tensor that
            another file holds too.
    """

    def __init__(self, files: list[pathlib.Path]):
        self.file: dict[str, pathlib.Path] = {}
        self._opened, self._shape = {}, {}
        for file in files:
            header = read_header(file)
            for name, (kind, shape) in header.items():
                if name in self.file:
                    raise InputError(
                        f"{self.file[name]} and {file} both hold the tensor {name}: remove the file that is older."
                    )
                if kind not in FLOATS and not name.endswith(BUFFERS):
                    raise InputError(
                        f"{file} holds the tensor {name} as {kind}: weights are read as {', '.join(FLOATS)} alone, so "
                        "save the model dequantised, in bfloat16."
                    )
                self.file[name], self._shape[name] = file, shape
            if len(self.file) > TENSORS:
                raise InputError(f"{file.parent} holds more than {TENSORS} tensors, more than any model does.")
            try:
                self._opened[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise _unreadable(file, error) from error

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._opened[self.file[name]]
        try:
            return file.get_tensor(name)
        except (SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:  # a type numpy lacks
            raise InputError(f"the tensor {name} cannot be read ({error}): save the model as bfloat16.") from error

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """The rows from `first` to before `last` of a matrix."""
        return self._opened[self.file[name]].get_slice(name)[first:last]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, which the file's header tells."""
        return self._shape[name]

    def __contains__(self, name) -> bool:  # Mapping's own would read the tensor
        return name in self.file

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def __len__(self) -> int:
        return len(self.file)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object that a JSON file of a model holds.

    Raises:
        InputError: it is no regular file, larger than such files are, or no JSON object.
    """
    try:
        if not file.is_file():
            raise InputError(f"{file} is no regular file: put the model's own there.")
        if file.stat().st_size > JSON_BYTES:
            raise InputError(f"{file} has more than {JSON_BYTES >> 20} MiB: no such file of a model has.")
        content = file.read_bytes()
        value = json.loads(content.decode("utf-8"))
    except (OSError, RecursionError) as error:
        raise _unreadable(file, error) from error
    except InputError:
        raise
    except ValueError as error:
        if content.startswith(POINTER):
            raise _pointer(file) from error
        raise InputError(f"{file} is not JSON ({error}): download or save the model again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds {fields.quoted(value)}, where an object is needed: save the model again.")
    return value


def read_header(file: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor of a safetensors file, by name.

    Raises:
        InputError: it is no whole safetensors file, or its header is out of all measure.
    """
    try:
        if not file.is_file():
            raise FileNotFoundError("it is not there" if not file.exists() else "it is no regular file")
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(max(8, len(POINTER)))
            if start == POINTER:
                raise _pointer(file)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
            if length > size - 8:
                raise ValueError("it ends before its header does")
            if length > HEADER_BYTES:
                raise ValueError(f"its header has {length >> 20} MiB, more than any model's")
            opened.seek(8)
            header = json.loads(opened.read(length))
        if len(header) > TENSORS:
            raise ValueError(f"it holds {len(header)} tensors, more than any model")
        header.pop("__metadata__", None)
        return {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(file, error) from error


def need_embeddings(tokenizer: Any, rows: int, where: object) -> None:
    """Raises InputError where a tokenizer has ids beyond the rows of the embedding, which would take another's row.

    Placeholders of images, sounds and films may lie there: no text holds them, and nothing is sampled beyond the rows.

    Args:
        tokenizer: of transformers or of tokenizers.
        rows: of the embedding.
        where: the folder, for the sentence.
    """
    words = tokenizer.get_vocab()
    roles = (f"{sense}_token" for sense in ("image", "video", "audio"))
    spared = {str(getattr(tokenizer, role, None)) for role in roles}
    beyond = {word: i for word, i in words.items() if i >= rows and word not in spared}
    if beyond:
        word = max(beyond, key=beyond.__getitem__)
        raise InputError(
            f"the tokenizer in {where} has {len(words)} tokens, up to the id {beyond[word]} ({fields.quoted(word)}), "
            f"but its network has only {rows} embeddings: take both from one model, or resize the embedding and train "
            "it."
        )


def _unreadable(file: pathlib.Path, error: object) -> InputError:
    return InputError(f"{file} cannot be read ({str(error)[:200]}): download or save the model again.")


@contextlib.contextmanager
def _readable(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"the model folder {folder} cannot be read ({error}): give one that can be.") from error


def _pointer(file: pathlib.Path) -> InputError:
    return InputError(f"{file} is a pointer of Git LFS in the place of the file: run git lfs pull in the folder.")


def _need_model(folder: pathlib.Path) -> None:
    """Raises InputError where the folder is another's than a model's, by the names of its files."""
    has = {name for name in (*ADAPTER, *QUANTISED, "config.json") if (folder / name).exists()}
    adapter = [name for name in ADAPTER if name in has]
    if adapter and "config.json" in has:
        raise InputError(
            f"the model folder {folder} holds an adapter beside the model ({adapter[0]}), which is not read: merge it "
            "into the model (PEFT's merge_and_unload), or move it elsewhere."
        )
    if adapter:
        raise InputError(
            f"{folder} holds a PEFT adapter of {_base_of(folder)} and no model: merge the two (PEFT's "
            "merge_and_unload), save the result, and give that folder."
        )
    _need_no_run(folder)
    quantised = [name for name in QUANTISED if name in has]
    if quantised:
        raise InputError(
            f"the model folder {folder} has a {quantised[0]}: quantised weights are not read, so save the model "
            "dequantised, in bfloat16, or remove the file if they are not."
        )
    for file in folder.iterdir():
        if file.suffix in READ and file.exists() and not (file.is_file() or file.is_dir()):
            raise InputError(f"{file} is no regular file: put the model's own there.")


def _base_of(folder: pathlib.Path) -> str:
    try:
        base = read_json(folder / ADAPTER[0]).get("base_model_name_or_path")
    except InputError:
        base = None
    return fields.quoted(base) if isinstance(base, str) and base else "a base that it does not name"


def _need_no_run(folder: pathlib.Path) -> None:
    """Raises InputError for the workdir of a run, which has a config.json of its own."""
    aligned = folder / "aligned"
    if (folder / "config.json").is_file():
        of_run = {"policy", "schedule", "align"} <= read_json(folder / "config.json").keys()
    else:
        of_run = (folder / "checkpoints").is_dir() or aligned.is_dir()
    if of_run and aligned.is_dir():
        raise InputError(f"{folder} is the workdir of a run: give the model in it, {aligned}.")
    if of_run:
        raise InputError(
            f"{folder} is the workdir of a run that has not come to its end, and holds no model yet: start the run "
            f"again with its own command, then give {aligned}."
        )


def _weight_files(folder: pathlib.Path) -> tuple[dict[str, str] | None, list[pathlib.Path]]:
    """What an index says, if there is one, and the files that hold the model."""
    index, single = folder / INDEX, folder / SINGLE
    place = _read_index(index) if index.exists() else None
    if place and single.exists() and set(place.values()) != {SINGLE}:
        raise InputError(
            f"the model folder {folder} holds {SINGLE} and {INDEX} of other files, which may be two models: remove "
            "the older one."
        )
    names = sorted(set(place.values())) if place else [SINGLE] if single.exists() else _all_files(folder)
    unnamed = {file.name for file in folder.glob("model-*.safetensors") if SHARD.fullmatch(file.name)} - set(names)
    if unnamed:
        raise InputError(
            f"the model folder {folder} holds {min(unnamed)} beside {names[0]}, of which it is no part: remove the "
            "files of the older model."
        )
    _need_all_shards(folder, set(names))
    return place, [folder / name for name in names]


def _read_index(index: pathlib.Path) -> dict[str, str]:
    """The name of each tensor's file."""
    place = read_json(index).get("weight_map")
    if not isinstance(place, dict) or not place or len(place) > TENSORS:
        raise InputError(f"{index} has no weight_map of tensors and files: download or save the model again.")
    for name, file in place.items():
        plain = isinstance(file, str) and file not in ("", ".", "..") and not re.search(r"[/\\\0]", file)
        if not plain or not file.endswith(".safetensors"):
            raise InputError(
                f"{index} puts the tensor {name[:80]} into {fields.quoted(file)}, which is no name of a safetensors "
                "file in the same folder: download or save the model again."
            )
    return place


def _all_files(folder: pathlib.Path) -> list[str]:
    """Every safetensors file, where neither an index nor the usual name tells which."""
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names and any(folder.glob("*.bin")):
        raise InputError(
            f"the model folder {folder} has weights in *.bin only, pickles, which are not read: convert them "
            "to safetensors."
        )
    if not names:
        raise InputError(
            f"the model folder {folder} has no weights: there is no {SINGLE}, put the model's files there."
        )
    return names


def _need_all_shards(folder: pathlib.Path, names: set[str]) -> None:
    """Raises InputError where a file is one of n parts, and not all of the n are there."""
    for part in filter(None, map(SHARD.fullmatch, sorted(names))):
        before, number, count = part.groups()
        every = (f"{before}-{i:0{len(number)}d}-of-{count}.safetensors" for i in range(1, int(count) + 1))
        missing = next((name for name in every if name not in names), None)
        if missing is not None:
            raise InputError(f"the model folder {folder} holds {part[0]} but lacks {missing}: download them all.")


def _need_agreement(index: pathlib.Path, place: Mapping[str, str], tensors: Tensors) -> None:
    """Raises InputError where an index and the headers of its files tell of different tensors."""
    for name in place.keys() | tensors.file.keys():
        file = tensors.file.get(name)
        if file is None or place.get(name) != file.name:
            raise InputError(
                f"{index} puts the tensor {name[:80]} into {place.get(name, 'no file')}, but it lies in "
                f"{file.name if file else 'none'}: the index is of another model, download or save the model again."
            )


def _need_tie(folder: pathlib.Path, tensors: Tensors) -> None:
    """Raises InputError where config.json ties the two matrices of the vocabulary, and the weights hold two."""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    config = folder / "config.json"
    if not (embed in tensors and head in tensors and config.is_file() and fields.tied(read_json(config))):
        return
    shape = tensors.shape(embed)
    parts = ((i, min(i + ROWS, shape[0])) for i in range(0, shape[0], ROWS))
    same = shape == tensors.shape(head) and all(
        np.array_equal(tensors.rows(embed, *part), tensors.rows(head, *part)) for part in parts
    )
    if not same:
        raise InputError(
            f"{config} ties the embedding to lm_head (tie_word_embeddings), but the weights hold an "
            "lm_head.weight of their own that differs: set tie_word_embeddings to false, or remove that tensor."
        )
