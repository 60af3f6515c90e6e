"""Every end of a turn that a model's files name ends a response, here and where the exported model is served."""

import json

import numpy as np
import pytest
from helpers.tiny_tokenizers import CHATML, SIZE, TURNS, backend, folder_of

from drirl_jax.data.text import ChatTokens
from drirl_jax.models import hf, tokenizers
from drirl_jax.types import InputError


def exported(folder, out):
    """generation_config.json and config.json of the folder's model, saved again."""
    config = {"vocab_size": SIZE} | json.loads((folder / "config.json").read_text())
    tokenizer = hf.load_tokenizer(folder)
    hf.save(out, config, {"w": np.zeros(2, np.float32)}, ChatTokens(tokenizer).tokenizer)
    return (json.loads((out / name).read_text()) for name in ("generation_config.json", "config.json"))


def test_all_ends_together_in_sampling_and_in_the_export(tmp_path):
    source = {"eos_token_id": [4, 17, 18], "pad_token_id": 7, "temperature": 0.6, "do_sample": True, "x": "y"}
    folder = folder_of(tmp_path / "m", {"eos_token_id": 0, "bos_token_id": 3}, source)
    text = ChatTokens(hf.load_tokenizer(folder))
    # The template's <end_turn>, the tokenizer's </s>, the config's, generation_config.json's.
    assert text.eos_ids == (6, 4, 0, 17, 18)
    assert text.response_ids("he", 99)[-1] == 6
    generation, config = exported(folder, tmp_path / "aligned")
    assert sorted(generation["eos_token_id"]) == sorted(config["eos_token_id"]) == [0, 4, 6, 17, 18]
    assert (generation["bos_token_id"], generation["pad_token_id"]) == (3, 7)
    assert (generation["temperature"], generation["do_sample"]) == (0.6, True) and "x" not in generation
    again = ChatTokens(hf.load_tokenizer(tmp_path / "aligned"))
    assert set(again.eos_ids) == set(text.eos_ids) and again.eos_ids[0] == 6


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": []}, {"eos_token_id": 4}])
def test_the_templates_own_end_is_exported_where_no_file_names_it(tmp_path, generation):
    folder = folder_of(tmp_path / "m", {"eos_token_id": 4}, generation)
    assert ChatTokens(hf.load_tokenizer(folder)).eos_ids == (6, 4)
    written, config = exported(folder, tmp_path / "aligned")
    assert written == {"eos_token_id": [4, 6]} and config["eos_token_id"] == [4, 6]


def test_one_end_stays_as_the_config_has_it(tmp_path):
    folder = folder_of(tmp_path / "m", {"eos_token_id": 2}, eos_token="<|im_end|>", chat_template=CHATML)
    written, config = exported(folder, tmp_path / "aligned")
    assert written == {"eos_token_id": [2]} and config["eos_token_id"] == 2


@pytest.mark.parametrize("wrong", ["4", ["4"], 4.0, True, -1, SIZE, [4, None], [[4]], {"id": 4}], ids=str)
@pytest.mark.parametrize("file", ["config", "generation"])
def test_an_end_that_is_no_token_is_refused(tmp_path, file, wrong):
    folder = folder_of(tmp_path, **{file: {"eos_token_id": wrong}})
    with pytest.raises(InputError, match=r"config.json: eos_token_id has .* give ids of tokens.* from 0 to 319"):
        hf.load_tokenizer(folder)


@pytest.mark.parametrize(
    "generation, message",
    [
        ({"temperature": "0.6"}, "temperature is '0.6'"),
        ({"do_sample": 1}, "do_sample is 1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"pad_token_id": "x"}, "pad_token_id has 'x'"),
        ({"stop_strings": ["###"]}, "stop_strings is not supported"),
    ],
)
def test_other_settings_of_the_wrong_kind_are_refused(tmp_path, generation, message):
    with pytest.raises(InputError, match=message):
        hf.load_tokenizer(folder_of(tmp_path, generation=generation))


def test_padding_of_minus_one_is_none(tmp_path):
    tokenizer = hf.load_tokenizer(folder_of(tmp_path, {"pad_token_id": -1}, {"bos_token_id": 3}))
    assert tokenizers.generation_config({}, tokenizer) == {"bos_token_id": 3, "eos_token_id": [6, 4]}


def test_the_ends_of_a_multimodal_config_stand_inside(tmp_path):
    config = {"vocab_size": None, "text_config": {"vocab_size": SIZE, "eos_token_id": [0, 17]}}
    folder = folder_of(tmp_path, config)
    assert ChatTokens(hf.load_tokenizer(folder)).eos_ids == (6, 4, 0, 17)


def gguf_meta(**ids):
    words = [token for token, _ in sorted(backend().get_vocab().items(), key=lambda item: item[1])]
    merges = [" ".join(pair) for pair in json.loads(backend().to_str())["model"]["merges"]]
    types = [3 if token.startswith("<") and len(token) > 1 else 1 for token in words]
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": types,
        "tokenizer.chat_template": TURNS,
    } | {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}


def test_a_gguf_file_names_ends_of_a_turn_and_of_a_message(tmp_path):
    tokenizer = tokenizers._from_meta(tmp_path, gguf_meta(bos=3, eos=4, eot=0, eom=2))
    assert ChatTokens(tokenizer).eos_ids == (6, 4, 0, 2)
    assert sorted(tokenizers.generation_config({"eos_token_id": 4}, tokenizer)["eos_token_id"]) == [0, 2, 4, 6]


@pytest.mark.parametrize("wrong", [-1, 99_999, "4", 4.0])
def test_a_gguf_end_that_is_no_token_is_refused(tmp_path, wrong):
    with pytest.raises(InputError, match="eot_token_id has"):
        tokenizers._from_meta(tmp_path, gguf_meta(eos=4, eot=wrong))
