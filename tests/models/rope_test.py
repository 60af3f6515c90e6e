"""RoPE and windows of a config.json: every form means here what it means to transformers, or is refused."""

import json

import pytest
import transformers

from drirl_jax.models import families, hf, rope
from drirl_jax.types import InputError

SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, head_dim=8,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SHORT = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
LINEAR = {"type": "linear", "factor": 2.0}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
FULL = ["full_attention"] * 3
OF = {
    "gemma2": dict(query_pre_attn_scalar=24, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": dict(query_pre_attn_scalar=24, sliding_window=4, sliding_window_pattern=2),
}


def made(folder, family, fields):
    config = SHAPE | OF.get(family, {}) | {"model_type": family} | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def theirs(folder):
    """(theta, kind and factor, local theta, which layers are local, window, tied), as transformers reads the folder."""
    config = transformers.AutoConfig.from_pretrained(folder)
    table, local = config.rope_parameters, None
    if "full_attention" in table:
        table, local = table["full_attention"], table["sliding_attention"]["rope_theta"]
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    of_layer = [window is not None] * 3 if config.model_type == "mistral" else [False] * 3
    of_layer = [name == "sliding_attention" for name in types] if types else of_layer
    scaled = {name: table[name] for name in LLAMA3 if name in table and table["rope_type"] != "default"}
    return table["rope_theta"], scaled, local, of_layer, window if any(of_layer) else 0, config.tie_word_embeddings


def ours(folder):
    config = families.config_from_hf(hf.read_config(folder))
    kind = {type_: name for name, type_ in rope.ROPE_SCALING.items()}
    scaling = config.rope_scaling
    scaled = {"rope_type": kind[type(scaling)]} | scaling._asdict() if scaling else {}
    of_layer = list(config.local) or [False] * config.layers
    return config.rope_theta, scaled, config.local_rope_theta, of_layer, config.window, config.tied


PLAIN = [
    {},
    {"rope_theta": 5e3},
    {"rope_theta": 5000},
    {"rope_parameters": LLAMA3},
    {"rope_parameters": LLAMA3, "rope_theta": 7e3},
    {"rope_parameters": LLAMA3 | {"rope_theta": 7e3}},
    {"rope_parameters": LLAMA3 | {"rope_theta": 7e3}, "rope_theta": 7e3},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 7e3, "partial_rotary_factor": 1.0}},
    {"rope_parameters": {}, "rope_theta": 5e3},
    {"rope_scaling": LLAMA3 | {"rope_theta": 7e3}},
    {"rope_scaling": LLAMA3, "rope_theta": 7e3},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LINEAR},
    {"rope_scaling": None, "rope_theta": 7e3},
    {"rope_scaling": SHORT},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    {"rope_scaling": LLAMA3 | {"rope_theta": 7e3}, "rope_parameters": LLAMA3 | {"rope_theta": 7e3}},
]
GEMMA3 = [
    {},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e3}, "rope_local_base_freq": 500.0},
    {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_theta": 3e3, "rope_local_base_freq": 500.0},
    {"rope_parameters": {"sliding_attention": {"rope_theta": 300.0}}},
    {"rope_parameters": {"full_attention": LINEAR | {"rope_theta": 3e3}, "sliding_attention": {"rope_theta": 300.0}}},
    {"layer_types": MIXED, "rope_local_base_freq": 500.0},
]
WINDOWS = {
    "llama": [{"sliding_window": None}, {"layer_types": FULL}],
    "mistral": [
        {"sliding_window": 4},
        {"sliding_window": None},
        {"sliding_window": 4, "layer_types": MIXED},
        {"layer_types": MIXED},
        {"layer_types": None},
        {"sliding_window": 4, "layer_types": FULL},
        {"sliding_window": None, "layer_types": FULL},
    ],
    "qwen2": [
        {"sliding_window": 4, "max_window_layers": 1},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": FULL},
        {"tie_word_embeddings": True},
    ],
    "qwen3": [{"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}],
    "gemma2": [{"layer_types": MIXED}, {"sliding_window_size": 4}, {"tie_word_embeddings": False}],
}
CASES = [(family, fields) for family in ("llama", "mistral", "qwen2", "gemma2") for fields in PLAIN]
CASES += [("gemma3_text", fields) for fields in GEMMA3]
CASES += [(family, fields) for family, each in WINDOWS.items() for fields in each]


@pytest.mark.parametrize("family, fields", CASES)
def test_a_form_means_what_it_means_to_transformers_and_so_does_its_export(tmp_path, family, fields):
    want = theirs(made(tmp_path, family, fields))
    assert ours(tmp_path) == want
    exported = rope.in_both_forms(hf.read_config(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(exported))
    assert ours(tmp_path) == want
    assert theirs(tmp_path) == want
    # Without what transformers 5 alone writes it is what transformers 4 reads.
    (tmp_path / "config.json").write_text(json.dumps(exported | {"rope_parameters": None}))
    assert ours(tmp_path) == want


@pytest.mark.parametrize(
    "family, fields, message",
    [
        (
            "llama",
            {"rope_parameters": {"rope_theta": 7e3}, "rope_theta": 1e4},
            "two bases, rope_theta=10000.0 and 7000",
        ),
        ("llama", {"rope_scaling": {"type": "default"}, "rope_parameters": LLAMA3}, "say different things"),
        ("llama", {"rope_scaling": LINEAR | {"rope_type": "llama3"}}, "the rope_type .*linear.* and|and .*linear"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "the rope_type 'dynamic': supported are"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "the rope_type 'longrope'"),
        ("llama", {"rope_scaling": {"rope_type": None}}, "the rope_type None"),
        ("llama", {"rope_scaling": {"rope_type": []}}, "the rope_type"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear': an object"),
        ("llama", {"rope_parameters": [LINEAR]}, "rope_parameters=.* an object"),
        ("llama", {"rope_scaling": LINEAR | {"attention_factor": 0.5}}, "attention_factor=0.5"),
        ("llama", {"rope_scaling": LINEAR | {"mrope_section": [2, 1, 1]}}, "mrope_section"),
        ("llama", {"rope_scaling": {"type": "default", "factor": 8.0}}, "factor=8.0 in a RoPE of the rope_type 'defau"),
        ("llama", {"rope_scaling": LINEAR | {"factor": "2"}}, "factor='2' in its RoPE: a positive number"),
        ("llama", {"rope_scaling": LINEAR | {"factor": 0}}, "factor=0 in its RoPE"),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "not below its high_freq_factor"),
        (
            "llama",
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
            "original_max_position_embeddings=16 beside its RoPE, and 32 in it",
        ),
        ("llama", {"rope_scaling": SHORT, "original_max_position_embeddings": 16}, "16 beside its RoPE, and None in"),
        ("gemma3_text", {"rope_scaling": LINEAR}, "call it rope_type"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_theta": "10000"}, "rope_theta='10000'"),
        ("llama", {"rope_theta": 0}, "rope_theta=0"),
        ("llama", {"rope_theta": True}, "rope_theta=True"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 7e3}}}, "which only gemma3_text has"),
        ("llama", {"sliding_window": 4}, "sliding_window=4, which is not implemented for a llama model"),
        ("llama", {"layer_types": MIXED}, "layer_types other than full_attention"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("llama", {"logits_scaling": 8.0}, "logits_scaling"),
        ("llama", {"embedding_multiplier": 12}, "embedding_multiplier"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("llama", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers"),
        ("llama", {"attention_bias": "false"}, "attention_bias='false'"),
        ("mistral", {"sliding_window": None, "layer_types": MIXED}, "no sliding_window"),
        ("mistral", {"sliding_window": "4"}, "sliding_window='4'"),
        ("mistral", {"layer_types": "full_attention"}, "layer_types"),
        ("mistral", {"layer_types": [["full_attention"]] * 3}, "layer_types"),
        ("qwen2", {"layer_types": MIXED, "sliding_window": 4}, "no sliding_window"),
        ("qwen2", {"use_sliding_window": "false"}, "use_sliding_window='false': true or false"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers='1'"),
        ("gemma2", {"query_pre_attn_scalar": "24"}, "query_pre_attn_scalar='24'"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
        ("gemma2", {"sliding_window": None}, "no sliding_window"),
        ("gemma2", {"rope_local_base_freq": 500.0}, "rope_local_base_freq"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ("gemma3_text", {"rope_parameters": LINEAR}, "one table for each of full_attention and sliding_attention"),
        ("gemma3_text", {"rope_scaling": {"full_attention": {"rope_theta": 3e3}}}, "full_attention"),
        (
            "gemma3_text",
            {"rope_local_base_freq": 5.0, "rope_parameters": {"sliding_attention": {"rope_theta": 3.0}}},
            "two bases, rope_local_base_freq=5.0 and 3.0",
        ),
    ],
)
def test_what_is_not_understood_and_changes_the_numbers_is_refused(tmp_path, family, fields, message):
    with pytest.raises(InputError, match=message):
        families.config_from_hf(hf.read_config(made(tmp_path, family, fields)))


def test_what_changes_nothing_passes(tmp_path):
    neutral = {
        "rope_interleaved": False, "is_llama_config": True, "use_mrope": False, "logits_scaling": 1.0,
        "chunk_size_feed_forward": 0, "is_causal": True, "attn_logit_softcapping": None, "initializer_range": 0.02,
        "pretraining_tp": 1, "transformers.js_config": {"dtype": "q4"},
    }  # fmt: skip
    families.config_from_hf(hf.read_config(made(tmp_path, "llama", neutral)))


def test_a_config_that_no_file_held_is_read_alike():
    config = SHAPE | {"model_type": "llama", "rope_parameters": LLAMA3 | {"rope_theta": 7e3}}
    read = families.config_from_hf(config)
    assert (read.rope_theta, read.rope_scaling) == (7e3, rope.Llama3(8.0, 1.0, 4.0, 32))
