"""GGUF files (llama.cpp's format) as what Hugging Face folders hold: config, tensors and tokenizer. No torch needed."""

from __future__ import annotations

import pathlib

import gguf
import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from drirl_jax.types import InputError

CONTROL = 3  # the token type of control tokens

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# How a byte-level BPE tokenizer cuts text before it merges, by tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    ),
}


def _open(path: pathlib.Path) -> tuple[gguf.GGUFReader, dict]:
    """The reader and its metadata by key. Raises InputError for a file that is no GGUF of a Llama model."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} is not a readable GGUF file ({error}): download it again.") from error
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta.get("general.architecture") != "llama":
        raise InputError(
            f"{path} holds the architecture {meta.get('general.architecture')!r}: only 'llama' is supported as GGUF."
        )
    return reader, meta


def read_config(path: pathlib.Path) -> dict:
    """A Hugging Face config from the file's metadata."""
    reader, meta = _open(path)
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": meta["llama.embedding_length"] // heads,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta.get("llama.rope.freq_base", 10_000.0),
        # Stored as float32: 1e-5 must not come back as 9.999999747e-06.
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors),
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor, dequantised to float32, under its Hugging Face name."""
    reader, meta = _open(path)
    heads = meta["llama.attention.head_count"]
    rotated = {"attn_q": heads, "attn_k": meta.get("llama.attention.head_count_kv", heads)}
    out = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in TENSORS:
            out[TENSORS[tensor.name]] = values
            continue
        _, layer, kind, _ = tensor.name.split(".")
        if kind in rotated:
            # llama.cpp stores the two halves of a rotary pair side by side; here they stand half a head apart.
            pairs = values.reshape(rotated[kind], values.shape[0] // rotated[kind] // 2, 2, -1)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        out[f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"] = values
    return out


def read_tokenizer(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer that the file carries, with its chat template.

    Raises:
        InputError: it is not a byte-level BPE with a known way of cutting text.
    """
    _, meta = _open(path)
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{path} has a tokenizer of kind {kind!r} ({pre!r}), which is not supported: use the model's Hugging Face folder."
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    bpe = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer, bpe.decoder = PRE_TOKENIZERS[pre](), decoders.ByteLevel()
    control = [token for token, type_ in zip(tokens, meta["tokenizer.ggml.token_type"]) if type_ == CONTROL]
    bpe.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in control])
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {f"{name}_token": meta.get(f"tokenizer.ggml.{key}_token_id") for name, key in named.items()}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=meta.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=meta["llama.context_length"],
        **{name: tokens[i] for name, i in ids.items() if i is not None},
    )
