"""What a model folder may hold: whatever else lies in it is one sentence, before any tensor is read."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from drirl_jax.models import encoder, families, folders, hf, tokenizers
from drirl_jax.types import InputError

CONFIG = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 1e4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
EMBED, HEAD, QUERY = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"


def weights(**changes):
    """The tensors of CONFIG's model, all of one random draw."""
    config = families.config_from_hf(CONFIG | changes)
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in families.wanted_shapes(config).items()}


def made(folder, tensors=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(weights() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def dry_run(folder):
    """What a plan or a dry run reads of a folder."""
    config = families.config_from_hf(hf.read_config(folder))
    families.check_shapes(hf.read_shapes(folder), config)
    return config


def refused(folder, message):
    with pytest.raises(InputError, match=message) as error:
        dry_run(folder)
    assert len(str(error.value)) < 600


def with_header(file, header, data=b""):
    """A safetensors file with this header, as bytes or as an object."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_a_folder_that_is_understood_passes(tmp_path):
    assert dry_run(made(tmp_path)).tied


# ------------------------------------------------------------------------------------------ quantised weights


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes'"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ("quantization_config", {"bits": 4}, "'bits': 4"),
        ("quantization_config", ["gptq"], "gptq"),
        ("quantization", {"group_size": 64, "bits": 4}, "'bits': 4"),
        ("compression_config", {"format": "pack-quantized"}, "'pack-quantized'"),
    ],
)
def test_a_config_of_quantised_weights_is_refused_though_every_shape_fits(tmp_path, field, value, words):
    refused(made(tmp_path, **{field: value}), f"has a {field} .*{words}.* quantised weights are not read")


def test_no_quantisation_is_none(tmp_path):
    config = hf.read_config(made(tmp_path, quantization_config=None))
    assert "quantization_config" not in config


@pytest.mark.parametrize("name", folders.QUANTISED)
def test_a_file_that_tells_of_quantisation_is_refused(tmp_path, name):
    (made(tmp_path) / name).write_text('{"bits": 4}')
    refused(tmp_path, f"has a {name}: quantised weights")


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "bool", "float8_e4m3fn", "float8_e5m2"])
def test_weights_that_are_no_floats_are_refused_without_any_config_that_tells(tmp_path, kind):
    tensors = weights()
    tensors[QUERY] = np.ones(tensors[QUERY].shape, getattr(ml_dtypes, kind, kind))
    made(tmp_path, tensors)
    refused(tmp_path, f"holds the tensor {QUERY} as .*save the model dequantised")
    with pytest.raises(InputError, match="dequantised"):
        hf.read_tensors(tmp_path)


@pytest.mark.parametrize("kind", ["float16", "float64", "bfloat16"])
def test_floats_of_every_width_pass(tmp_path, kind):
    dry_run(made(tmp_path, {name: x.astype(getattr(ml_dtypes, kind, kind)) for name, x in weights().items()}))


@pytest.mark.parametrize(
    "name",
    [
        f"{QUERY}_scale",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.input_layernorm.weight",
        "score.weight",
    ],
)
@pytest.mark.parametrize("load", [True, False])
def test_a_tensor_that_the_model_does_not_compute_with_is_refused(tmp_path, name, load):
    folder = made(tmp_path, weights() | {name: np.ones(4, np.float32)})
    with pytest.raises(InputError, match=f"hold the tensor {name}, which no llama model"):
        config = families.config_from_hf(hf.read_config(folder))
        families.from_hf(hf.read_tensors(folder), config) if load else families.check_shapes(
            hf.read_shapes(folder), config
        )


def test_what_follows_from_the_config_may_lie_beside_the_weights(tmp_path):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    dry_run(made(tmp_path, weights() | buffers))


# ------------------------------------------------------------------------------------- adapters, runs, code


@pytest.mark.parametrize("name", folders.ADAPTER)
def test_an_adapter_beside_a_model_is_refused(tmp_path, name):
    (made(tmp_path) / name).write_text("{}")
    refused(tmp_path, f"holds an adapter beside the model .{name}.*merge")


def test_an_adapter_alone_is_called_one_and_its_base_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    refused(tmp_path, "PEFT adapter of 'owner/base' and no model: merge the two")
    (tmp_path / "adapter_config.json").write_text("[")
    refused(tmp_path, "PEFT adapter of a base that it does not name")


def test_a_workdir_is_called_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"policy": {}, "schedule": [], "align": {}}))
    refused(tmp_path, "workdir of a run that has not ended.*start the run again")
    (tmp_path / "aligned").mkdir()
    refused(tmp_path, "workdir of a run: give the model in it, .*aligned")
    (tmp_path / "config.json").unlink()
    (tmp_path / "aligned").rmdir()
    (tmp_path / "checkpoints").mkdir()
    refused(tmp_path, "workdir of a run that has not ended")


def test_a_model_with_code_of_its_own_is_refused(tmp_path):
    refused(made(tmp_path, auto_map={"AutoModelForCausalLM": "modeling.Mine"}), "no code of a model folder is run")
    assert "auto_map" in hf.read_config(made(tmp_path, auto_map={"AutoTokenizer": ["tokens.Mine", None]}))


# ------------------------------------------------------------------------------------------ ties


def test_two_matrices_where_the_config_ties_them(tmp_path):
    tensors = weights()
    dry_run(made(tmp_path, tensors | {HEAD: tensors[EMBED]}))
    refused(made(tmp_path, tensors | {HEAD: tensors[EMBED] + 1}), "ties the embedding to lm_head.*that differs")
    refused(made(tmp_path, tensors | {HEAD: tensors[EMBED][:4]}), "that differs")
    dry_run(made(tmp_path, tensors | {HEAD: tensors[EMBED] + 1}, tie_word_embeddings=False))


def test_ties_longer_than_what_is_compared_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "ROWS", 3)
    tensors = weights()
    other = tensors[EMBED].copy()
    other[-1, -1] += 1
    dry_run(made(tmp_path, tensors | {HEAD: tensors[EMBED]}))
    refused(made(tmp_path, tensors | {HEAD: other}), "that differs")


def test_one_matrix_where_the_config_asks_for_two(tmp_path):
    refused(made(tmp_path, tie_word_embeddings=False), f"lack the tensor {HEAD}")
    refused(made(tmp_path, tie_word_embeddings="false"), "tie_word_embeddings='false': true or false")


# ------------------------------------------------------------------------------------------ index and shards


def sharded(folder, parts=2, place=None):
    """The model in several files, and an index of them."""
    tensors = weights()
    made(folder, tensors)
    (folder / "model.safetensors").unlink()
    where = {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        names = list(tensors)[i::parts]
        save_file({name: tensors[name] for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    write_index(folder, where if place is None else place)
    return folder


def write_index(folder, place):
    (folder / folders.INDEX).write_text(json.dumps({"weight_map": place}))


def index(folder):
    return json.loads((folder / folders.INDEX).read_text())["weight_map"]


def test_shards_with_and_without_their_index(tmp_path):
    dry_run(sharded(tmp_path))
    (tmp_path / folders.INDEX).unlink()
    dry_run(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "holds model-00001-of-00002.safetensors but lacks model-00002-of-00002")


def test_an_index_beside_a_single_file_may_be_another_models(tmp_path):
    save_file(weights(), sharded(tmp_path) / "model.safetensors")
    refused(tmp_path, "may be two models: remove the older one")
    write_index(made(tmp_path / "one"), dict.fromkeys(weights(), "model.safetensors"))
    dry_run(tmp_path / "one")


def test_shards_of_two_models(tmp_path):
    sharded(tmp_path, 3)
    sharded(tmp_path, 2)
    refused(tmp_path, "holds model-00001-of-00003.safetensors beside model-00001-of-00002.*of the older model")
    (tmp_path / folders.INDEX).unlink()
    refused(tmp_path, "both hold the tensor")


def test_an_index_that_is_older_than_its_files(tmp_path):
    place = index(sharded(tmp_path))
    write_index(tmp_path, {name: file for name, file in place.items() if name != EMBED})
    refused(tmp_path, f"puts the tensor {EMBED} into no file")
    write_index(tmp_path, place | {"gone": place[EMBED]})
    refused(tmp_path, "puts the tensor gone into .* lies in none")
    write_index(tmp_path, dict(zip(place, reversed(place.values()))))
    refused(tmp_path, "the index is of another model")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..", "", "x.bin", 3, None, "a\\b.safetensors"]
)
def test_an_index_names_files_of_its_own_folder_alone(tmp_path, name):
    place = index(sharded(tmp_path / "m"))
    save_file(weights(), tmp_path / "x.safetensors")
    write_index(tmp_path / "m", place | {EMBED: name})
    refused(tmp_path / "m", "no name of a safetensors file in the same folder")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 99999]
)
def test_a_torn_index(tmp_path, content):
    (sharded(tmp_path) / folders.INDEX).write_text(content)
    refused(tmp_path, "index.json")


# ------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'"llama"', b"3", b"\xff\xfe", b"[" * 99999])
def test_a_torn_config(tmp_path, content):
    (made(tmp_path) / "config.json").write_bytes(content)
    refused(tmp_path, "config.json")


@pytest.mark.parametrize("name", [name for name in CONFIG if name not in ("tie_word_embeddings", "hidden_act")])
@pytest.mark.parametrize("value", ["32", None, -1, [], {}, True, float("nan"), 1e400])
def test_a_field_of_another_type(tmp_path, name, value):
    made(tmp_path, **{name: value})
    if value is None and name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta"):
        return  # stands for the default
    refused(tmp_path, "config.json")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 16, b"version https://git-lfs.github.com/spec/v1\noid"])
def test_weights_that_are_none(tmp_path, content):
    (made(tmp_path) / "model.safetensors").write_bytes(content)
    refused(tmp_path, "git lfs pull" if b"git" in content else "model.safetensors cannot be read")


# ------------------------------------------------------------------------------------------ bounds before work


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", folders.INDEX])
def test_a_pipe_is_no_file(tmp_path, name):
    file = made(tmp_path) / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    refused(tmp_path, f"{name} is no regular file")


def test_headers_out_of_all_measure(tmp_path, monkeypatch):
    file = made(tmp_path) / "model.safetensors"
    empty = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(9)}
    monkeypatch.setattr(folders, "TENSORS", 8)
    with_header(file, empty)
    refused(tmp_path, "holds 9 tensors, more than any model")
    monkeypatch.setattr(folders, "HEADER_BYTES", 2**8)
    refused(tmp_path, "its header has .* MiB, more than any model's")
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(tmp_path, "ends before its header does")
    with_header(file, b"[" * 200)
    refused(tmp_path, "cannot be read")
    for entry in ([], 3, {}, {"dtype": "F32", "shape": 3}, {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 0]}):
        with_header(file, {EMBED: entry})
        refused(tmp_path, "cannot be read")


def test_a_json_file_out_of_all_measure(tmp_path, monkeypatch):
    made(tmp_path)
    monkeypatch.setattr(folders, "JSON_BYTES", 64)
    refused(tmp_path, "MiB, more than any model's")


GGUF = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    "counts, fields",
    [
        ((0, 1), struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 2**40)),  # an array of 2^40 bytes
        ((0, 1), struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**40)),  # of strings
        ((0, 1), struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 2**20) + b"\0" * 16),  # of arrays
        ((0, 1), struct.pack("<Q1sIQ", 1, b"a", 8, 2**40)),  # a string
        ((0, 1), struct.pack("<Q", 2**40)),  # a name
        ((0, 2**40), b""),
        ((2**40, 0), b""),
        ((1, 0), struct.pack("<Q1sI", 1, b"a", 2**31) + b"\0" * 16),  # axes
        ((0, 1), struct.pack("<Q1sI", 1, b"a", 99)),  # a type
    ],
)
def test_a_small_gguf_file_that_claims_much_is_refused_at_once(tmp_path, counts, fields):
    path = tmp_path / "tiny.gguf"
    path.write_bytes((GGUF + struct.pack("<QQ", *counts) + fields).ljust(68, b"\0"))
    with pytest.raises(InputError, match="tiny.gguf is not a readable GGUF file"):
        tokenizers.open_gguf(path)


# ------------------------------------------------------------------------------------------ ids without an embedding


def words(count, **roles):
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, "w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1", **roles)


@pytest.mark.parametrize("count", [7, 8])
def test_a_tokenizer_of_no_more_ids_than_embeddings_passes(tmp_path, count):
    words(count).save_pretrained(made(tmp_path))
    assert len(hf.load_tokenizer(tmp_path)) == count


def test_an_id_without_an_embedding_is_refused(tmp_path):
    tokenizer = words(8)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(made(tmp_path))
    with pytest.raises(InputError, match="9 tokens, up to the id 8 .'<pad>'.*only 8 embeddings"):
        hf.load_tokenizer(tmp_path)


def test_a_placeholder_of_images_may_have_none(tmp_path):
    words(8, extra_special_tokens={"image_token": "<image>"}).save_pretrained(made(tmp_path))
    assert len(hf.load_tokenizer(tmp_path)) == 9


# ------------------------------------------------------------------------------------------ the encoder's folder

BERT = {
    "model_type": "bert", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 16,
}  # fmt: skip


def bert(folder, **changes):
    (folder / "config.json").write_text(json.dumps(BERT | changes))
    save_file({"embeddings.word_embeddings.weight": np.ones((8, 8), np.float32)}, folder / "model.safetensors")
    return folder


def encoder_refused(folder, message):
    with pytest.raises(InputError, match=message):
        encoder.load(folder)


def test_the_encoders_folder_goes_through_the_same_place(tmp_path):
    encoder_refused(bert(tmp_path), "lack the tensor encoder.layer.0")
    encoder_refused(bert(tmp_path, quantization_config={"quant_method": "gptq"}), "'gptq'")
    save_file({"embeddings.word_embeddings.weight": np.ones((8, 8), np.int8)}, bert(tmp_path) / "model.safetensors")
    encoder_refused(tmp_path, "save the model dequantised")
    (bert(tmp_path) / "adapter_config.json").write_text("{}")
    encoder_refused(tmp_path, "adapter beside the model")


def test_a_tensor_that_the_encoder_does_not_compute_with_is_refused(tmp_path):
    extra = {"bert.encoder.layer.0.attention.self.query.SCB": np.ones(8, np.float32)}
    save_file(extra, bert(tmp_path) / "model.safetensors")
    encoder_refused(tmp_path, "hold the tensor encoder.layer.0.attention.self.query.SCB, which no BERT model")
    save_file({"pooler.dense.weight": np.ones((8, 8), np.float32)}, tmp_path / "model.safetensors")
    encoder_refused(tmp_path, "lack the tensor")


def test_counted_positions_of_an_encoder_are_no_quantised_weights(tmp_path):
    save_file({"embeddings.position_ids": np.arange(16)[None]}, bert(tmp_path) / "model.safetensors")
    assert "embeddings.position_ids" in folders.open_weights(tmp_path)


@pytest.mark.parametrize("name", [name for name in BERT if name != "model_type"])
@pytest.mark.parametrize("value", ["8", None, -1, [], True, 1e30])
def test_a_field_of_the_encoder_of_another_type(tmp_path, name, value):
    encoder_refused(bert(tmp_path, **{name: value}), "encoder's config.json has|lacks")


def test_an_encoder_that_pools_otherwise_is_refused(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    encoder_refused(bert(tmp_path), "pooling_mode_cls_token: embeddings are means")
    pooling.write_text(json.dumps({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}))
    encoder_refused(tmp_path, "lack the tensor")


def test_an_encoders_tokenizer_that_is_torn(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "load", lambda folder: None)
    (bert(tmp_path) / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer.json cannot be read"):
        encoder.TextEmbedder.from_folder(tmp_path)
