"""Reads and writes tokenizers of a model folder or a GGUF file (llama.cpp's format), and the ids that end a turn.

No code of a model folder is run.
"""

from __future__ import annotations

import functools
import json
import numbers
import pathlib
from typing import Any, Mapping, NamedTuple, Sequence

import gguf
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from drirl_jax.models import folders, gguf_header, templates
from drirl_jax.types import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "config.json",
    "generation_config.json",
)
# The settings of the source's generation_config.json that an export keeps, beside ids. The sampler of this project uses
# none of them: it samples from the whole softmax at config.sampler.temperature.
SETTINGS = {
    "do_sample": bool,
    "temperature": numbers.Real,
    "top_p": numbers.Real,
    "top_k": numbers.Integral,
    "min_p": numbers.Real,
    "typical_p": numbers.Real,
    "repetition_penalty": numbers.Real,
    "suppress_tokens": list,
    "begin_suppress_tokens": list,
    "bad_words_ids": list,
}

# How a byte-level BPE tokenizer splits text before it merges, by tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}
# The roles of tokens: transformers' name, then llama.cpp's.
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
GGUF_ENDS = ("eos", "eot", "eom")  # llama.cpp stops at each of these


def load(path: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model folder or a .gguf file, with the ids that its files give for the end of a turn.

    Raises:
        InputError: no tokenizer can be read, it needs code of its own, it has no fast form, or a file gives an
            end-of-turn id that the model does not have.
    """
    if path.suffix == ".gguf":
        return from_gguf(path)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"the model folder {path} has no tokenizer: copy the model's tokenizer.json and "
            "tokenizer_config.json there."
        )
    file_contents = {name: _read_object(path / name) for name in JSON_FILES}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        tokenizer("a")  # some wrong types raise only when text is tokenized
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the package tokenizers is no Exception
        if "auto_map" in file_contents["tokenizer_config.json"] or "trust_remote_code" in str(error):
            raise InputError(
                f"the tokenizer in {path} needs code of its own (auto_map), which is never run: take a model whose "
                "tokenizer.json a class of transformers reads, and leave auto_map out of its config."
            ) from error
        raise InputError(
            f"the tokenizer in {path} cannot be read ({_reason(error)}): download the model's tokenizer.json and "
            "tokenizer_config.json again, or install a later version of tokenizers."
        ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer in {path} has no fast form: save it as tokenizer.json, with transformers' "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    if not tokenizer.vocab_size:
        raise InputError(f"the tokenizer in {path} has no words: download the model's tokenizer.json again.")
    config = file_contents["config.json"]
    setattr(
        tokenizer,
        GENERATION,
        _generation_settings(path, config, file_contents["generation_config.json"], len(tokenizer)),
    )
    eos, vocab_size = tokenizer.eos_token_id, _vocab_size(config, len(tokenizer))
    if eos is not None and eos >= vocab_size:
        raise InputError(
            f"{path}: the tokenizer's eos_token {tokenizer.eos_token!r} has the id {eos}, and the model has only "
            f"{vocab_size} tokens: correct eos_token in tokenizer_config.json."
        )
    return tokenizer


# ---------------------------------------------------------------------------------------------- ends of a turn

GENERATION = "generation"  # `load` sets this attribute of a tokenizer to the result of `_generation_settings`


def end_ids(
    tokenizer: transformers.PreTrainedTokenizerBase, template: templates.ChatTemplate | None
) -> tuple[int, ...]:
    """Every id that ends a turn: those of the chat template, the tokenizer and the model's files.

    Only this function decides where a response ends. Sampling, the end of a demonstration (the first id) and the
    exported generation_config.json follow it.
    """
    ids = [template.turn_end() if template else None, getattr(tokenizer, "eos_token_id", None)]
    ids += getattr(tokenizer, GENERATION, {}).get("eos_token_id", [])
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def generation_config(config: Mapping[str, Any], tokenizer) -> dict[str, Any]:
    """The generation_config.json of an exported model: the source's settings and every id that ends a turn.

    Args:
        config: of the model; its ids are used if the source has no generation_config.json.
        tokenizer: as `load` returns it.
    """
    template = templates.ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    model_stops = config.get("eos_token_id")
    stop_ids = [*(model_stops if isinstance(model_stops, list) else [model_stops]), *end_ids(tokenizer, template)]
    settings = {key: config.get(key) for key in ("bos_token_id", "pad_token_id")}
    settings |= getattr(tokenizer, GENERATION, {})
    settings["eos_token_id"] = [i for i in dict.fromkeys(stop_ids) if i is not None] or None
    return {key: value for key, value in settings.items() if value is not None}


def _generation_settings(
    path: pathlib.Path, config: dict[str, Any], source: dict[str, Any], token_count: int
) -> dict[str, Any]:
    """The end-of-turn ids of config.json and generation_config.json (`source`), and the settings that are kept.

    Raises:
        InputError: an id is no token of the model, or a setting has the wrong type.
    """
    vocab_size = _vocab_size(config, token_count)
    text_config = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    stop_ids: list[int] = []
    for name, values in (("config.json", config), ("config.json", text_config), ("generation_config.json", source)):
        stop_ids += _checked_ids(values.get("eos_token_id"), f"{path / name}: eos_token_id", vocab_size)
    if source.get("stop_strings"):
        raise InputError(
            f"{path / 'generation_config.json'}: stop_strings is not supported: put the ids that end a turn into "
            "eos_token_id, and remove stop_strings."
        )
    settings: dict[str, Any] = {}
    for key in ("bos_token_id", "pad_token_id"):
        value = source.get(key, config.get(key))
        # Some models write -1 if they have no padding token.
        settings |= {key: i for i in _checked_ids(None if value == -1 else value, f"{path}: {key}", vocab_size)}
    for key, setting_type in SETTINGS.items():
        value = source.get(key)
        if value is None:
            continue
        if not isinstance(value, setting_type) or (isinstance(value, bool) and setting_type is not bool):
            raise InputError(f"{path / 'generation_config.json'}: {key} is {value!r}: correct it, or remove it.")
        settings[key] = value
    return settings | {"eos_token_id": list(dict.fromkeys(stop_ids))}


def _vocab_size(config: dict[str, Any], token_count: int) -> int:
    """The number of tokens with an embedding; `token_count`, of the tokenizer, if the config does not give it."""
    text_config = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    size = config.get("vocab_size", text_config.get("vocab_size"))
    return size if isinstance(size, int) and size > 0 else token_count


def _checked_ids(value: Any, source: str, vocab_size: int) -> list[int]:
    """A token id, a list of ids or None, as a list. Raises InputError unless each is an id below `vocab_size`."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
            raise InputError(
                f"{source} has {token_id!r}: give ids of tokens, whole numbers from 0 to {vocab_size - 1}."
            )
    return ids


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file. Raises InputError."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text("utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, json.JSONDecodeError) and error.doc.startswith(folders.POINTER.decode()):
            raise InputError(
                f"{file} is only a Git LFS pointer to the file: run git lfs pull in the folder."
            ) from error
        raise InputError(f"{file} is not JSON ({_reason(error)}): download or save the model again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds {type(value).__name__}, not an object: download or save the model again.")
    return value


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------------------------------------------- GGUF


class Gguf(NamedTuple):
    """What a GGUF file holds: metadata by key, and its tensors, mapped into memory."""

    path: pathlib.Path
    meta: dict[str, Any]
    tensors: Sequence[gguf.ReaderTensor]


def open_gguf(path: pathlib.Path) -> Gguf:
    """The file's contents. Raises InputError if it is no complete GGUF file."""
    try:
        stat = path.stat()
        return _read_gguf(path, stat.st_size, stat.st_mtime_ns)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError) as error:
        raise InputError(f"{path} is not a readable GGUF file ({error}): download it again.") from error


@functools.lru_cache(maxsize=1)
def _read_gguf(path: pathlib.Path, size: int, modified_ns: int) -> Gguf:
    """The file's contents, cached until the file changes or another file is opened.

    Config, tokenizer and weights are read one after the other, and reading the words of a vocabulary takes seconds.
    """
    gguf_header.need_bounded(path)
    reader = gguf.GGUFReader(path)
    return Gguf(path, {key: field.contents() for key, field in reader.fields.items()}, reader.tensors)


def from_gguf(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its chat template.

    Raises:
        InputError: it is no byte-level BPE tokenizer, its rule for splitting text is unknown, or it is not complete.
    """
    try:
        return _from_meta(path, open_gguf(path).meta)
    except InputError:
        raise
    except Exception as error:  # the package tokenizers raises Exception itself
        raise InputError(f"{path} holds no complete tokenizer ({error!r}): download it again.") from error


def _from_meta(path: pathlib.Path, meta: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    model_kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if model_kind != "gpt2":
        raise InputError(
            f"{path} has a tokenizer of the model {model_kind!r}, and only 'gpt2' (byte-level BPE) "
            "is read from GGUF: use the model's Hugging Face folder."
        )
    if pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{path} has a tokenizer that splits text by the rule {pre!r}, and from GGUF only "
            f"{', '.join(PRE_TOKENIZERS)} is known: use the model's Hugging Face folder."
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS[pre](), decoders.ByteLevel()
    token_types = meta["tokenizer.ggml.token_type"]
    control_tokens = [token for token, token_type in zip(tokens, token_types) if token_type == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in control_tokens])
    ids = {role: _gguf_id(path, meta, name) for role, name in ROLES.items()}
    fast_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=meta.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=meta[f"{meta['general.architecture']}.context_length"],
        **{role: tokens[i] for role, i in ids.items() if i is not None},
    )
    stop_ids = [_gguf_id(path, meta, name) for name in GGUF_ENDS]
    setattr(fast_tokenizer, GENERATION, {"eos_token_id": [i for i in dict.fromkeys(stop_ids) if i is not None]})
    return fast_tokenizer


def _gguf_id(path: pathlib.Path, meta: dict[str, Any], name: str) -> int | None:
    """The id of the token with a role, or None. Raises InputError if the id is no token."""
    key = f"tokenizer.ggml.{name}_token_id"
    ids = _checked_ids(meta.get(key), f"{path}: {key}", len(meta["tokenizer.ggml.tokens"]))
    return ids[0] if ids else None
