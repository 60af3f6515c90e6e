"""Tokenizers in and out: of a model folder, or of a GGUF file (llama.cpp's format), and the ids that end a turn.

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

from drirl_jax.models import gguf_header, templates
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
POINTER = "version https://git-lfs"  # how a file begins that Git LFS has left in another's place
# What an exported generation_config.json keeps of the source's beside ids. The sampler here follows none of it: it
# draws from the whole softmax at config.sampler.temperature.
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

# How a byte-level BPE tokenizer cuts text before it merges, by tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}
# transformers' name of a token with a role, and llama.cpp's.
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
GGUF_ENDS = ("eos", "eot", "eom")  # llama.cpp stops at each of these


def load(path: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model folder or a .gguf file, with what its files say of the ends of a turn.

    Raises:
        InputError: there is none to be read, it needs code of its own, has no fast form, or a file names an end that
            is no id of the model.
    """
    if path.suffix == ".gguf":
        return from_gguf(path)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"the model folder {path} has no tokenizer: copy the model's tokenizer.json and "
            "tokenizer_config.json there."
        )
    own = {name: _json_object(path / name) for name in JSON_FILES}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        tokenizer("a")  # some wrong types are met only now
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package tokenizers panics past Exception
        if "auto_map" in own["tokenizer_config.json"] or "trust_remote_code" in str(error):
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
    config = own["config.json"]
    setattr(tokenizer, GENERATION, _generation(path, config, own["generation_config.json"], len(tokenizer)))
    eos, size = tokenizer.eos_token_id, _vocabulary(config, len(tokenizer))
    if eos is not None and eos >= size:
        raise InputError(
            f"{path}: the tokenizer's eos_token {tokenizer.eos_token!r} has the id {eos}, and the model has only "
            f"{size} tokens: correct eos_token in tokenizer_config.json."
        )
    return tokenizer


# ---------------------------------------------------------------------------------------------- ends of a turn

GENERATION = "generation"  # the attribute of a tokenizer that `load` sets: what `_generation` gives


def ends(tokenizer: transformers.PreTrainedTokenizerBase, template: templates.ChatTemplate | None) -> tuple[int, ...]:
    """Every id that ends a turn: the chat template's, the tokenizer's, and those of the model's files.

    This is the one place that decides where a response ends: sampling, the end of a demonstration (the first id) and
    the exported generation_config.json follow it.
    """
    ids = [template.turn_end() if template else None, getattr(tokenizer, "eos_token_id", None)]
    ids += getattr(tokenizer, GENERATION, {}).get("eos_token_id", [])
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def generation_config(config: Mapping[str, Any], tokenizer) -> dict[str, Any]:
    """The generation_config.json of an exported model: the source's, and every end of a turn.

    Args:
        config: of the model; its own ids count where the source has no generation_config.json.
        tokenizer: as `load` gives it.
    """
    template = templates.ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    own = config.get("eos_token_id")
    stops = [*(own if isinstance(own, list) else [own]), *ends(tokenizer, template)]
    ids = {key: config.get(key) for key in ("bos_token_id", "pad_token_id")}
    ids |= getattr(tokenizer, GENERATION, {})
    ids["eos_token_id"] = [i for i in dict.fromkeys(stops) if i is not None] or None
    return {key: value for key, value in ids.items() if value is not None}


def _generation(path: pathlib.Path, config: dict[str, Any], source: dict[str, Any], tokens: int) -> dict[str, Any]:
    """What config.json and generation_config.json (`source`) say of the ends of a turn, and what else is kept.

    Raises:
        InputError: an id is no token of the model, or a setting has the wrong type.
    """
    size = _vocabulary(config, tokens)
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    stops: list[int] = []
    for name, values in (("config.json", config), ("config.json", inner), ("generation_config.json", source)):
        stops += _ids(values.get("eos_token_id"), f"{path / name}: eos_token_id", size)
    if source.get("stop_strings"):
        raise InputError(
            f"{path / 'generation_config.json'}: stop_strings is not supported: name the ends by their ids in "
            "eos_token_id, and leave stop_strings out."
        )
    kept: dict[str, Any] = {}
    for key in ("bos_token_id", "pad_token_id"):
        value = source.get(key, config.get(key))
        # Some models say -1 where they have no padding.
        kept |= {key: i for i in _ids(None if value == -1 else value, f"{path}: {key}", size)}
    for key, kind in SETTINGS.items():
        value = source.get(key)
        if value is None:
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{path / 'generation_config.json'}: {key} is {value!r}: correct it, or leave it out.")
        kept[key] = value
    return kept | {"eos_token_id": list(dict.fromkeys(stops))}


def _vocabulary(config: dict[str, Any], tokens: int) -> int:
    """How many tokens the model has an embedding for; `tokens` of the tokenizer where its config does not say."""
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    size = config.get("vocab_size", inner.get("vocab_size"))
    return size if isinstance(size, int) and size > 0 else tokens


def _ids(value: Any, what: str, size: int) -> list[int]:
    """A token id or a list of them, or None, as a list. Raises InputError where one is no id below `size`."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size:
            raise InputError(f"{what} has {i!r}: give ids of tokens, whole numbers from 0 to {size - 1}.")
    return ids


def _json_object(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file. Raises InputError."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text("utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, json.JSONDecodeError) and error.doc.startswith(POINTER):
            raise InputError(f"{file} is a pointer of Git LFS, no file: run git lfs pull in its folder.") from error
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
    """The file's contents. Raises InputError where it is no whole GGUF file."""
    try:
        stat = path.stat()
        return _parsed(path, stat.st_size, stat.st_mtime_ns)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError) as error:
        raise InputError(f"{path} is not a readable GGUF file ({error}): download it again.") from error


@functools.lru_cache(maxsize=1)
def _parsed(path: pathlib.Path, size: int, changed: int) -> Gguf:
    """Kept until the file changes or another is opened: config, tokenizer and weights are read one after the other, and
    the words of a vocabulary take the reader seconds."""
    gguf_header.need_bounded(path)
    reader = gguf.GGUFReader(path)
    return Gguf(path, {key: field.contents() for key, field in reader.fields.items()}, reader.tensors)


def from_gguf(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file carries, with its chat template.

    Raises:
        InputError: it is not a byte-level BPE tokenizer with a known way of cutting text, or not whole.
    """
    try:
        return _from_meta(path, open_gguf(path).meta)
    except InputError:
        raise
    except Exception as error:  # the package tokenizers raises Exception itself
        raise InputError(f"{path} carries no whole tokenizer ({error!r}): download it again.") from error


def _from_meta(path: pathlib.Path, meta: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise InputError(
            f"{path} has a tokenizer of the model {kind!r}, and only 'gpt2' (byte-level BPE) "
            "is read from GGUF: use the model's Hugging Face folder."
        )
    if pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{path} has a tokenizer that cuts text by the rule {pre!r}, and from GGUF only "
            f"{', '.join(PRE_TOKENIZERS)} is known: use the model's Hugging Face folder."
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS[pre](), decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"]
    control = [token for token, type_ in zip(tokens, types) if type_ == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in control])
    ids = {role: _gguf_id(path, meta, name) for role, name in ROLES.items()}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=meta.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=meta[f"{meta['general.architecture']}.context_length"],
        **{role: tokens[i] for role, i in ids.items() if i is not None},
    )
    stops = [_gguf_id(path, meta, name) for name in GGUF_ENDS]
    setattr(fast, GENERATION, {"eos_token_id": [i for i in dict.fromkeys(stops) if i is not None]})
    return fast


def _gguf_id(path: pathlib.Path, meta: dict[str, Any], name: str) -> int | None:
    """The id of the token with a role, if there is one. Raises InputError where it is no token."""
    key = f"tokenizer.ggml.{name}_token_id"
    ids = _ids(meta.get(key), f"{path}: {key}", len(meta["tokenizer.ggml.tokens"]))
    return ids[0] if ids else None
