"""The text encoder Φ (BERT family, such as all-MiniLM-L6-v2): texts to L2-normalised sentence embeddings.

`Encoder` is the network, `load` reads it from a Hugging Face folder, and `TextEmbedder` adds the tokenizer and a few
fixed shapes to run at. Weight matrices are [out, in], stacked over layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from tokenizers import Tokenizer

from drirl_jax.models import fields, folders
from drirl_jax.runtime import sharding
from drirl_jax.runtime.progress import with_progress
from drirl_jax.types import Array, InputError, length_mask

TOP = {
    "words": "embeddings.word_embeddings.weight",
    "positions": "embeddings.position_embeddings.weight",
    "types": "embeddings.token_type_embeddings.weight",
    "norm": "embeddings.LayerNorm.weight",
    "norm_bias": "embeddings.LayerNorm.bias",
}
LAYER = {
    f"{ours}{suffix}": f"encoder.layer.{{}}.{theirs}.{kind}"
    for ours, theirs in {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attn_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }.items()
    for suffix, kind in {"": "weight", "_bias": "bias"}.items()
}
SUPPORTED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
}
LARGEST = 2**24  # the largest size that a config may have; it is checked before anything is allocated
# The shapes that an embedder runs at. More shapes waste less padding, but each is compiled.
ROWS = (16, 32, 64)
TOKENS = (16, 32, 64, 128, 256, 512)
# On a GPU the search for the fastest Triton kernel of full-precision products takes longer than a run's embeddings.
COMPILER = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


class EncoderConfig(NamedTuple):
    """Shape of an encoder. `types` is the number of token types; only type 0 is used."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    ffn: int
    max_positions: int
    norm_eps: float = 1e-12
    types: int = 2

    @classmethod
    def from_hf(cls, config: Mapping) -> EncoderConfig:
        """The encoder's shape from a Hugging Face config. Raises InputError for options that are not implemented."""
        for name, wanted in SUPPORTED.items():
            if config.get(name, wanted) != wanted:
                raise InputError(
                    f"the encoder's config.json has {name}={config[name]!r}: only {wanted!r} is supported."
                )
        names = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
        sizes: list[int] = []
        for name in [*names.split(), "type_vocab_size"]:
            size = config.get(name, 2 if name == "type_vocab_size" else None)
            if name not in config and size is None:
                raise InputError(
                    f"the encoder's config.json lacks the field {name!r}: it does not describe a BERT model."
                )
            if not (type(size) is int and 0 < size <= LARGEST):
                raise InputError(
                    f"the encoder's config.json has {name}={fields.quoted(size)}: that is no size of a BERT model."
                )
            sizes.append(size)
        *shape, types = sizes
        encoder_config = cls(*shape, norm_eps=fields.number(config, "layer_norm_eps", 1e-12), types=types)
        if encoder_config.width % encoder_config.heads:
            raise InputError(
                f"the encoder's config.json has hidden_size={encoder_config.width}: that is no multiple of its "
                f"{encoder_config.heads} heads."
            )
        return encoder_config


class Block(nnx.Module):
    """One layer: attention over the real tokens, then a GELU MLP, with a LayerNorm after each residual sum."""

    def __init__(self, config: EncoderConfig, key: Array):
        d, ffn = config.width, config.ffn
        shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "up": (ffn, d), "down": (d, ffn)}
        for i, (name, shape) in enumerate(shapes.items()):
            setattr(self, name, nnx.Param(0.02 * jax.random.normal(jax.random.fold_in(key, i), shape)))
            setattr(self, f"{name}_bias", nnx.Param(jnp.zeros(shape[0])))
        for name in ("attn_norm", "mlp_norm"):
            setattr(self, name, nnx.Param(jnp.ones(d)))
            setattr(self, f"{name}_bias", nnx.Param(jnp.zeros(d)))

    def linear(self, name: str, x_NTI: Array) -> Array:
        """W x + b."""
        return jnp.einsum("nti,oi->nto", x_NTI, getattr(self, name)[...]) + getattr(self, f"{name}_bias")[...]

    def __call__(self, config: EncoderConfig, x_NTD: Array, mask_NT: Array) -> Array:
        """[N, T, D] to [N, T, D]; tokens attend only to tokens where the mask is True, at least one a row."""
        q, k, v = (rearrange(self.linear(name, x_NTD), "n t (h d) -> n t h d", h=config.heads) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask_NT[:, None, None, :])
        x_NTD = x_NTD + self.linear("o", rearrange(attended, "n t h d -> n t (h d)"))
        x_NTD = layer_norm(x_NTD, self.attn_norm[...], self.attn_norm_bias[...], config.norm_eps)
        hidden = jax.nn.gelu(self.linear("up", x_NTD), approximate=False)
        x_NTD = x_NTD + self.linear("down", hidden)
        return layer_norm(x_NTD, self.mlp_norm[...], self.mlp_norm_bias[...], config.norm_eps)


class Encoder(nnx.Module):
    """Encoder weights: words [V, D], positions [max, D], types [types, D], norm [D], blocks over layers."""

    def __init__(self, config: EncoderConfig, key: Array):
        self.config = config
        keys = jax.random.split(key, 4)
        sizes = {"words": config.vocab_size, "positions": config.max_positions, "types": config.types}
        for table_key, (name, size) in zip(keys, sizes.items()):
            setattr(self, name, nnx.Param(0.02 * jax.random.normal(table_key, (size, config.width))))
        self.norm = nnx.Param(jnp.ones(config.width))
        self.norm_bias = nnx.Param(jnp.zeros(config.width))
        self.blocks = jax.vmap(lambda table_key: Block(config, table_key))(jax.random.split(keys[3], config.layers))

    def __call__(self, ids_NT: Array, length_N: Array) -> Array:
        """Sentence embeddings Φ = m / ‖m‖, where m is the mean of the real tokens' last states. (arXiv 1908.10084)

        Products are float32 on every device: an embedding must not depend on the device that computes it.

        Args:
            ids_NT: [N, T] int32 token ids, right-padded, T <= max_positions.
            length_N: [N] int32, 1 <= length <= T.

        Returns:
            [N, E] float32, rows of norm 1; E is the width D.
        """
        mask_NT = length_mask(length_N, ids_NT.shape[1])
        x_NTD = self.words[...][ids_NT] + self.positions[: ids_NT.shape[1]] + self.types[0]
        x_NTD = layer_norm(x_NTD, self.norm[...], self.norm_bias[...], self.config.norm_eps)
        with jax.default_matmul_precision("float32"):
            x_NTD, _ = jax.lax.scan(lambda x, b: (b(self.config, x, mask_NT), None), x_NTD, self.blocks)
        mean_NE = x_NTD.mean(1, where=mask_NT[..., None])
        return mean_NE / jnp.linalg.norm(mean_NE, axis=-1, keepdims=True)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """(x - mean x) / √(var x + ε) · w + b over the last axis."""
    return jax.nn.standardize(x, epsilon=eps, algorithm="stable") * weight + bias


def load(folder: str | Path) -> Encoder:
    """The encoder of a Hugging Face folder (config.json, model.safetensors), in float32.

    Tensor names may have the prefix "bert.". Tensors that no embedding needs, like the pooler, are ignored.

    Raises:
        InputError: a file or a tensor is missing, a tensor has a wrong shape, or the model is not supported.
    """
    config = EncoderConfig.from_hf(folders.read_config(Path(folder)))
    _need_mean_pooling(Path(folder))
    weights = folders.open_weights(Path(folder))
    stored_names = {name.removeprefix("bert."): name for name in weights}
    expected_names = {*TOP.values(), *(name.format(i) for name in LAYER.values() for i in range(config.layers))}
    for name in stored_names:
        if (
            name.startswith(("embeddings.", "encoder."))
            and name not in expected_names
            and not name.endswith(folders.BUFFERS)
        ):
            raise InputError(
                f"the encoder's weights in {folder} hold the tensor {name[:80]}, which no BERT model with this "
                "config.json has: weights and config.json belong to different models, or the model is not supported."
            )
    model = jax.eval_shape(lambda: Encoder(config, jax.random.key(0)))

    def read_tensor(name, shape):
        if name not in stored_names:
            raise InputError(f"the encoder's weights in {folder} lack the tensor {name}: save all of them.")
        if weights.shape(stored_names[name]) != tuple(shape):
            raise InputError(
                f"the encoder's tensor {name} has shape {list(weights.shape(stored_names[name]))}, "
                f"but its config.json asks for {list(shape)}."
            )
        return weights[stored_names[name]]

    for ours, theirs in LAYER.items():
        shape = getattr(model.blocks, ours).shape[1:]
        stacked = np.stack([read_tensor(theirs.format(i), shape) for i in range(config.layers)])
        setattr(model.blocks, ours, nnx.Param(jnp.asarray(stacked, jnp.float32)))
    for ours, theirs in TOP.items():
        setattr(model, ours, nnx.Param(jnp.asarray(read_tensor(theirs, getattr(model, ours).shape), jnp.float32)))
    return model


def _need_mean_pooling(folder: Path) -> None:
    """Raises InputError if sentence-transformers' files say that an embedding is not the mean over a text's tokens."""
    pooling = folder / "1_Pooling" / "config.json"
    if not pooling.exists():
        return
    config = folders.read_json(pooling)
    modes = [name for name, used in config.items() if name.startswith("pooling_mode") and used is not False]
    if modes != ["pooling_mode_mean_tokens"] and config.get("pooling_mode") != "mean":
        raise InputError(
            f"{pooling} has {', '.join(modes)[:80]}: embeddings are means over a text's tokens here, so take an "
            "encoder that was trained for mean pooling."
        )


class TextEmbedder:
    """Turns texts into embeddings; the network runs at a few fixed shapes.

    Nothing is cached between calls. Rounding depends on the shape at which a text was computed, and a run that was
    killed and started again must see the same bits as a run without interruption.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, max_tokens=64):
        """Keeps the encoder and the tokenizer, and switches off the tokenizer's own truncation and padding.

        Args:
            encoder: the network.
            tokenizer: puts [CLS] before a text and [SEP] after it.
            max_tokens: longer texts are cut to this many tokens, including [CLS] and [SEP].

        Raises:
            InputError: max_tokens or the tokenizer does not fit the encoder.
        """
        config = encoder.config
        if not 3 <= max_tokens <= config.max_positions:
            raise InputError(f"max_tokens={max_tokens} is out of range: the encoder takes 3 to {config.max_positions}.")
        folders.need_embeddings(tokenizer, config.vocab_size, "the encoder's folder")
        if tokenizer.num_special_tokens_to_add(is_pair=False) != 2:
            raise InputError(
                "the encoder's tokenizer.json puts no [CLS] and [SEP] around a text: add a post_processor."
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.encoder, self.tokenizer, self.max_tokens = sharding.replicate(encoder), tokenizer, max_tokens
        self.token_buckets = (*(tokens for tokens in TOKENS if tokens < max_tokens), max_tokens)
        options = COMPILER.get(jax.default_backend())
        self._run = jax.jit(lambda encoder, ids_NT, length_N: encoder(ids_NT, length_N), compiler_options=options)

    @classmethod
    def from_folder(cls, folder: str | Path, max_tokens=64) -> TextEmbedder:
        """The embedder of a Hugging Face folder: the files of `load` and tokenizer.json. Raises InputError."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"the encoder's folder {folder} has no tokenizer.json: save its tokenizer.")
        encoder = load(folder)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package tokenizers raises Exception itself
            raise InputError(f"{path} cannot be read ({str(error)[:200]}): save the tokenizer again.") from error
        return cls(encoder, tokenizer, max_tokens)

    @property
    def width(self) -> int:
        """E, the length of an embedding."""
        return self.encoder.config.width

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [N, E] float32 of N texts, rows of norm 1. Raises InputError for an empty text."""
        for i, text in enumerate(texts):
            if not text.strip():
                raise InputError(f"text {i + 1} of the {len(texts)} to embed is empty: leave it out.")
        unique = list(dict.fromkeys(texts))
        row = dict(zip(unique, self._embed(unique)))
        return np.array([row[text] for text in texts], np.float32).reshape(len(texts), self.width)

    def compilations(self) -> int:
        """The number of shapes that were compiled: at most buckets of rows times buckets of tokens."""
        return self._run._cache_size()

    def _embed(self, texts: list[str]) -> list[np.ndarray]:
        """Embeddings of distinct texts, in the order of the texts. Rows of similar length run together."""
        ids = [self._cut(encoding.ids) for encoding in self.tokenizer.encode_batch(texts)]
        remaining, chunks = sorted(range(len(ids)), key=lambda i: len(ids[i])), []
        while remaining:
            rows = max((rows for rows in ROWS if rows <= len(remaining)), default=ROWS[0])
            chunks.append(remaining[:rows])
            remaining = remaining[rows:]
        padded = [map(sharding.shard_prompts, self._pad([ids[i] for i in chunk])) for chunk in chunks]
        # All chunks are launched before the first result is fetched.
        outputs = [self._run(self.encoder, *arrays) for arrays in padded]
        embedded: dict[int, np.ndarray] = {}
        for chunk, output_NE in with_progress(list(zip(chunks, outputs)), "embeddings", "batch"):
            embedded |= zip(chunk, sharding.fetch(output_NE))
        return [embedded[i] for i in range(len(texts))]

    def _cut(self, ids: list[int]) -> list[int]:
        """At most max_tokens of the ids: the first ones, and [SEP] at the end."""
        return ids if len(ids) <= self.max_tokens else ids[: self.max_tokens - 1] + ids[-1:]

    def _pad(self, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [N, T] and lengths [N] of rows sorted by length. An added row has length 1, so none divides by 0."""
        rows = next(bucket for bucket in ROWS if bucket >= len(ids))
        tokens = next(bucket for bucket in self.token_buckets if bucket >= len(ids[-1]))
        ids_NT, length_N = np.zeros((rows, tokens), np.int32), np.ones(rows, np.int32)
        for i, row in enumerate(ids):
            ids_NT[i, : len(row)], length_N[i] = row, len(row)
        return ids_NT, length_N
