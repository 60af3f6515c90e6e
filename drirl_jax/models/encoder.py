"""The text encoder Φ (BERT family, such as all-MiniLM-L6-v2): texts to L2-normalised sentence embeddings.

`Encoder` is the network, `load` reads it from a Hugging Face folder, and `TextEmbedder` adds the tokenizer,
a few fixed shapes to run at, and a cache by text. Weight matrices are [out, in], stacked over layers.
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

from drirl_jax.models import contents, fields
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
LARGEST = 2**24  # what any size in a config may be, before anything is made of it
# The shapes that an embedder runs at: more of them waste less padding but compile more often.
ROWS = (16, 32, 64)
TOKENS = (16, 32, 64, 128, 256, 512)
# On a GPU the search for the fastest Triton form of products in full precision takes longer than a run's embeddings.
COMPILER = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


class EncoderConfig(NamedTuple):
    """Shape of an encoder; `types` is the number of token types, of which only type 0 is ever used."""

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
        """The encoder's shape from a Hugging Face config. Raises InputError for what is not implemented."""
        for name, wanted in SUPPORTED.items():
            if config.get(name, wanted) != wanted:
                raise InputError(
                    f"the encoder's config.json has {name}={config[name]!r}: only {wanted!r} is supported."
                )
        names = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
        sizes = [config.get(name) for name in names.split()] + [config.get("type_vocab_size", 2)]
        for name, size in zip([*names.split(), "type_vocab_size"], sizes):
            if name not in config and size is None:
                raise InputError(
                    f"the encoder's config.json lacks the field {name!r}: it does not describe a BERT model."
                )
            if not (type(size) is int and 0 < size <= LARGEST):
                raise InputError(
                    f"the encoder's config.json has {name}={fields.quoted(size)}: that is no size of a BERT model."
                )
        found = cls(*sizes[:-1], norm_eps=fields.number(config, "layer_norm_eps", 1e-12), types=sizes[-1])
        if found.width % found.heads:
            raise InputError(
                f"the encoder's config.json has hidden_size={found.width}, which its {found.heads} heads do not divide."
            )
        return found


class Block(nnx.Module):
    """One layer: attention over the real tokens, then a GELU MLP, a LayerNorm after each residual sum."""

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
        """[N, T, D] to [N, T, D]; tokens attend only to those where the mask is True, at least one a row."""
        q, k, v = (rearrange(self.linear(n, x_NTD), "n t (h d) -> n t h d", h=config.heads) for n in "qkv")
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
        for k, (name, size) in zip(keys, sizes.items()):
            setattr(self, name, nnx.Param(0.02 * jax.random.normal(k, (size, config.width))))
        self.norm = nnx.Param(jnp.ones(config.width))
        self.norm_bias = nnx.Param(jnp.zeros(config.width))
        self.blocks = jax.vmap(lambda k: Block(config, k))(jax.random.split(keys[3], config.layers))

    def __call__(self, ids_NT: Array, length_N: Array) -> Array:
        """Sentence embeddings Φ = m / ‖m‖, m the mean of the real tokens' last states. (arXiv 1908.10084)

        Products are float32 on every device: an embedding must not depend on where it was computed.

        Args:
            ids_NT: [N, T] int32 token ids, right-padded, T <= max_positions.
            length_N: [N] int32, 1 <= length <= T.

        Returns:
            [N, E] float32, rows of length 1; E is the width D.
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

    Tensor names may carry the prefix "bert."; what no embedding needs, like the pooler, is ignored.

    Raises:
        InputError: a file or a tensor is missing, a tensor has a wrong shape, or the model is not supported.
    """
    config = EncoderConfig.from_hf(contents.read_config(Path(folder)))
    _need_mean(Path(folder))
    weights = contents.open_weights(Path(folder))
    stored = {name.removeprefix("bert."): name for name in weights}
    known = {*TOP.values(), *(name.format(i) for name in LAYER.values() for i in range(config.layers))}
    for name in stored:
        if name.startswith(("embeddings.", "encoder.")) and name not in known and not name.endswith(contents.BUFFERS):
            raise InputError(
                f"the encoder's weights in {folder} hold the tensor {name[:80]}, which no BERT model as config.json "
                "describes it has: the two are not of one model, or it is not supported."
            )
    model = jax.eval_shape(lambda: Encoder(config, jax.random.key(0)))

    def take(name, shape):
        if name not in stored:
            raise InputError(f"the encoder's weights in {folder} lack the tensor {name}: save them whole.")
        if weights.shape(stored[name]) != tuple(shape):
            raise InputError(
                f"the encoder's tensor {name} has shape {list(weights.shape(stored[name]))}, "
                f"but its config.json asks for {list(shape)}."
            )
        return weights[stored[name]]

    for ours, theirs in LAYER.items():
        shape = getattr(model.blocks, ours).shape[1:]
        stacked = np.stack([take(theirs.format(i), shape) for i in range(config.layers)])
        setattr(model.blocks, ours, nnx.Param(jnp.asarray(stacked, jnp.float32)))
    for ours, theirs in TOP.items():
        setattr(model, ours, nnx.Param(jnp.asarray(take(theirs, getattr(model, ours).shape), jnp.float32)))
    return model


def _need_mean(folder: Path) -> None:
    """Raises InputError where sentence-transformers' files say that a text's embedding is no mean of its tokens'."""
    pooling = folder / "1_Pooling" / "config.json"
    if not pooling.exists():
        return
    config = contents.read_json(pooling)
    modes = [name for name, used in config.items() if name.startswith("pooling_mode") and used is not False]
    if modes != ["pooling_mode_mean_tokens"] and config.get("pooling_mode") != "mean":
        raise InputError(
            f"{pooling} has {', '.join(modes)[:80]}: embeddings are means of a text's tokens here, so take an encoder "
            "that was trained for that."
        )


class TextEmbedder:
    """Texts to embeddings; the network runs at a few fixed shapes.

    Nothing is remembered between calls: rounding depends on the shape that a text was computed at, and a run that
    goes on after a kill must see the same bits as one that was never interrupted.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, max_tokens=64):
        """Keeps the encoder and the tokenizer, whose own truncation and padding are switched off.

        Args:
            encoder: the network.
            tokenizer: puts [CLS] before a text and [SEP] behind it.
            max_tokens: longer texts are cut to this many tokens, [CLS] and [SEP] among them.

        Raises:
            InputError: max_tokens does not fit the encoder, or the tokenizer does not.
        """
        config = encoder.config
        if not 3 <= max_tokens <= config.max_positions:
            raise InputError(f"max_tokens={max_tokens} is out of range: the encoder takes 3 to {config.max_positions}.")
        contents.need_embeddings(tokenizer, config.vocab_size, "the encoder's folder")
        if tokenizer.num_special_tokens_to_add(is_pair=False) != 2:
            raise InputError(
                "the encoder's tokenizer.json puts no [CLS] and [SEP] around a text: add a post_processor."
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.encoder, self.tokenizer, self.max_tokens = sharding.replicate(encoder), tokenizer, max_tokens
        self.token_buckets = (*(t for t in TOKENS if t < max_tokens), max_tokens)
        options = COMPILER.get(jax.default_backend())
        self._run = jax.jit(lambda encoder, ids_NT, length_N: encoder(ids_NT, length_N), compiler_options=options)

    @classmethod
    def from_folder(cls, folder: str | Path, max_tokens=64) -> TextEmbedder:
        """The embedder of a Hugging Face folder: `load`'s files and tokenizer.json. Raises InputError."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"the encoder's folder {folder} has no tokenizer.json: save its tokenizer.")
        encoder = load(folder)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises no other kind
            raise InputError(f"{path} cannot be read ({str(error)[:200]}): save the tokenizer again.") from error
        return cls(encoder, tokenizer, max_tokens)

    @property
    def width(self) -> int:
        """E, the length of an embedding."""
        return self.encoder.config.width

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [N, E] float32 of N texts, rows of length 1. Raises InputError for an empty text."""
        for i, text in enumerate(texts):
            if not text.strip():
                raise InputError(f"text {i + 1} of the {len(texts)} to embed is empty: leave it out.")
        unique = list(dict.fromkeys(texts))
        row = dict(zip(unique, self._embed(unique)))
        return np.array([row[text] for text in texts], np.float32).reshape(len(texts), self.width)

    def compilations(self) -> int:
        """How many shapes the network was compiled for: at most buckets of rows times buckets of tokens."""
        return self._run._cache_size()

    def _embed(self, texts: list[str]) -> list[np.ndarray]:
        """Embeddings of distinct texts, in their order: rows of like length run together."""
        ids = [self._cut(encoding.ids) for encoding in self.tokenizer.encode_batch(texts)]
        rest, chunks = sorted(range(len(ids)), key=lambda i: len(ids[i])), []
        while rest:
            rows = max((rows for rows in ROWS if rows <= len(rest)), default=ROWS[0])
            chunks.append(rest[:rows])
            rest = rest[rows:]
        padded = [map(sharding.shard_prompts, self._pad([ids[i] for i in chunk])) for chunk in chunks]
        # Every chunk is launched before the first is fetched.
        outputs = [self._run(self.encoder, *arrays) for arrays in padded]
        embedded: dict[int, np.ndarray] = {}
        for chunk, output_NE in with_progress(list(zip(chunks, outputs)), "embeddings", "batch"):
            embedded |= zip(chunk, sharding.fetch(output_NE))
        return [embedded[i] for i in range(len(texts))]

    def _cut(self, ids: list[int]) -> list[int]:
        """At most max_tokens of them: the first ones and, at the end, [SEP]."""
        return ids if len(ids) <= self.max_tokens else ids[: self.max_tokens - 1] + ids[-1:]

    def _pad(self, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [N, T], lengths [N] of rows sorted by length; an added row has length 1: none divides by 0."""
        rows = next(b for b in ROWS if b >= len(ids))
        tokens = next(b for b in self.token_buckets if b >= len(ids[-1]))
        ids_NT, length_N = np.zeros((rows, tokens), np.int32), np.ones(rows, np.int32)
        for i, row in enumerate(ids):
            ids_NT[i, : len(row)], length_N[i] = row, len(row)
        return ids_NT, length_N
