"""GGUF files (llama.cpp's format): opening one, and the tokenizer that it carries."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple, Sequence

import gguf
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from drirl_jax.models import gguf_header
from drirl_jax.types import InputError

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
    except (KeyError, IndexError, TypeError) as error:
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
    ids = {role: meta.get(f"tokenizer.ggml.{name}_token_id") for role, name in ROLES.items()}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=meta.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=meta[f"{meta['general.architecture']}.context_length"],
        **{role: tokens[i] for role, i in ids.items() if i is not None},
    )
