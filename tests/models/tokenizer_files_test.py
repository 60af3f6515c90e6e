"""Tokenizers of model folders that cannot be read are refused in one sentence that names the file."""

import json

import pytest
from helpers.tiny_tokenizers import backend, folder_of

from drirl_jax.data.text import ChatTokens
from drirl_jax.models import hf
from drirl_jax.types import InputError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
TORN = ["", "{", "[]", "null", "5", '"x"', "\ufeff{}", "[" * 100_000, POINTER]


def changed(file, **changes):
    value = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(value | changes))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
@pytest.mark.parametrize("torn", TORN, ids=lambda torn: repr(torn[:9]))
def test_a_torn_file_is_named(tmp_path, name, torn):
    (folder_of(tmp_path) / name).write_text(torn)
    with pytest.raises(InputError, match=f"{name} (is not JSON|holds .* not an object|is only a Git LFS pointer)"):
        hf.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("tokenizer.json", {"model": {"type": "BPE3", "ranks": {}}}, "later version of tokenizers"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}}, "has no words"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, "cannot be read"),
        ("tokenizer_config.json", {"model_max_length": "many"}, "cannot be read"),
        ("tokenizer_config.json", {"eos_token": 5}, "cannot be read"),
        ("tokenizer_config.json", {"eos_token": "<|new|>"}, r"eos_token '<\|new\|>' has the id"),
        ("tokenizer_config.json", {"chat_template": ["a"]}, "cannot be read"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "cannot be read"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": 5}]}, "int, not text"),
        ("special_tokens_map.json", {"eos_token": 5}, "cannot be read"),
    ],
)
def test_wrong_types_are_refused(tmp_path, name, changes, message):
    folder_of(tmp_path, {"vocab_size": len(backend().get_vocab())})
    if "chat_template" in changes:
        (tmp_path / "chat_template.jinja").unlink()
    changed(tmp_path / name, **changes)
    with pytest.raises(InputError, match=message):
        ChatTokens(hf.load_tokenizer(tmp_path))


def test_code_in_a_model_folder_is_never_run_nor_recommended(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "own.py").write_text("raise SystemExit('it was run')")
    changed(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    with pytest.raises(InputError, match="needs code of its own .auto_map., which is never run") as refused:
        hf.load_tokenizer(folder)
    assert "trust_remote_code" not in str(refused.value)


def test_a_template_that_is_no_utf8_is_refused(tmp_path):
    (folder_of(tmp_path) / "chat_template.jinja").write_bytes(b"\xe9{{ messages }}")
    with pytest.raises(InputError, match="cannot be read .*utf-8"):
        hf.load_tokenizer(tmp_path)


def test_ids_beyond_the_tokenizer_decode_to_nothing(tmp_path):
    text = ChatTokens(hf.load_tokenizer(folder_of(tmp_path, {"vocab_size": 500})))
    ids = text.response_ids("he is safe", 99)
    assert text.decode([ids[0], 400, *ids[1:]], len(ids) + 1) == "he is safe"
