"""Every family against transformers' own model of it: logits, decoding, files both ways; what is refused."""

import functools
import json
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers.tiny_models import filled, rows, spelt_out
from helpers.tiny_tokenizers import tiny_tokenizer
from helpers.torch_families import CASES, GROUP, LLAMA3, SHAPE, THETA, load, torch_logits, torch_model

from drirl_jax import rollout
from drirl_jax.models import attention, decoding, families, hf, lora, transformer, vocabulary
from drirl_jax.types import InputError

every_family = pytest.mark.parametrize("family", CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a family: the folder that transformers has written."""

    @functools.cache
    def saved(family):
        path = tmp_path_factory.mktemp(family)
        torch_model(family).save_pretrained(path)
        return path

    return saved


@functools.partial(jax.jit, static_argnames="temperature")
def passed(model, group, temperature):
    hidden = transformer.apply(model, group)
    logit = transformer.predicting_states(hidden, group) @ model.unembed.T
    logit = attention.softcap(logit, model.config.final_softcap)
    return logit, vocabulary.token_logprobs(model, hidden, group, temperature, chunk=8)


@every_family
def test_a_group_is_to_every_row_what_transformers_is_to_it_alone(family, folder):
    model, peer = load(folder(family)), torch_model(family)
    logit, (logp, entropy) = passed(model, GROUP, 0.7)
    for p, g, prompt, response in rows(GROUP):
        want = torch_logits(peer, np.concatenate([GROUP.prefix, prompt, response]))
        want, n = want[len(GROUP.prefix) + len(prompt) - 1 : -1], len(response)
        assert want.std() > 0.5
        np.testing.assert_allclose(logit[p, g, :n], want, atol=1e-4)
        log_softmax = np.asarray(jax.nn.log_softmax(want / 0.7))
        np.testing.assert_allclose(logp[p, g, :n], log_softmax[np.arange(n), response], atol=1e-4)
        np.testing.assert_allclose(entropy[p, g, :n], -(np.exp(log_softmax) * log_softmax).sum(-1), atol=1e-4)


@every_family
def test_greedy_decoding_is_that_of_transformers(family, folder, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(decoding, "FILLED", 2)  # the own cache of 7 is read up to 2, 4, 6 or 7
    model, peer = load(folder(family)), torch_model(family)
    keys = rollout.response_keys(jax.random.key(0), jnp.arange(2), 2)
    options = {"max_new": 7, "temperature": 0.0, "eos": (-1,), "prefix": GROUP.prefix}
    out = rollout.sample(model, GROUP.prompt, GROUP.prompt_len, keys, **options)
    for p in range(2):
        prompt = np.concatenate([GROUP.prefix, GROUP.prompt[p, : GROUP.prompt_len[p]]])
        want = peer.generate(torch.tensor(prompt)[None], max_new_tokens=7, do_sample=False)[0, len(prompt) :]
        for g in range(2):
            np.testing.assert_array_equal(out.response[p, g], want)
    again = GROUP.replace(response=out.response, response_len=out.response_len)
    np.testing.assert_allclose(out.logp, passed(model, again, 1.0)[1][0], atol=1e-4)


@every_family
def test_files_go_both_ways_and_old_and_new_configs_say_the_same(family, folder, tmp_path):
    peer, model, config = torch_model(family), load(folder(family)), hf.read_config(folder(family))
    hf.save(tmp_path / "ours", config, families.to_hf(model), tiny_tokenizer())
    assert families.config_from_hf(hf.read_config(tmp_path / "ours")) == model.config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    ids = np.arange(1, 20)
    np.testing.assert_array_equal(torch_logits(again, ids), torch_logits(peer, ids))
    # Without what transformers 5 alone writes, the folder says the same.
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(written | {"rope_parameters": None, "layer_types": None}))
    old = families.config_from_hf(hf.read_config(tmp_path / "ours"))
    assert old._replace(local=model.config.local) == model.config
    old = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert old.rope_parameters == peer.config.rope_parameters
    hash(model.config)


def test_adapters_and_banks_of_the_last_layers(folder):
    model = load(folder("qwen2"))  # biases, and windows in the last layers only
    bank = filled(lora.init(model, jax.random.key(1), rank=2, alpha=4, bank=2, layers=2), 3)
    apply = jax.jit(transformer.apply)
    _, got = apply(model, GROUP, bank, jnp.array([1, 0]))
    for p, c in enumerate((1, 0)):
        adapter = {name: pair.replace(a=pair.a[:, c], b=pair.b[:, c]) for name, pair in bank.items()}
        _, want = apply(lora.merge(model, adapter), GROUP)
        np.testing.assert_allclose(got[p], want[p], atol=1e-4)
        assert np.abs(want[p] - apply(model, GROUP)[1][p]).max() > 0.1


def test_gradients_through_a_prefix_passed_once_are_those_of_one_in_every_prompt(folder):
    model = load(folder("gemma2"))

    @jax.jit
    def slope(model, group):
        def total(model):
            hidden = transformer.apply(model, group)
            return vocabulary.token_logprobs(model, hidden, group, 0.7, chunk=8)[0].mean()

        return jax.grad(total)(model)

    for a, b in zip(jax.tree.leaves(slope(model, GROUP)), jax.tree.leaves(slope(model, spelt_out(GROUP)))):
        np.testing.assert_allclose(a, b, atol=1e-5 + 1e-4 * np.abs(b).max())


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rotary_frequencies_are_those_of_transformers(kind):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    torch = pytest.importorskip("torch")
    rope = {"default": THETA, "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}, "llama3": LLAMA3}[
        kind
    ]
    config = transformers.LlamaConfig(**SHAPE | dict(hidden_size=256), rope_parameters=rope)
    rope = dict(rope)
    ours = families.config_from_hf(
        SHAPE | {"model_type": "llama", "hidden_size": 256, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    )
    if kind == "default":
        want = 1 / 1e3 ** (torch.arange(0, 64, 2) / 64)
    else:
        want, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        assert scale == 1
    cos, sin = attention.rope_cos_sin(ours, jnp.ones((1, 1)))
    np.testing.assert_allclose(jnp.arctan2(sin, cos)[0, 0, 0], want, rtol=1e-5)


def plain(family):
    return torch_model(family).config.to_dict()


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("llama", {"model_type": "mamba"}, "model_type='mamba': supported are llama, mistral, qwen2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias=True: only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True: only False"),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "yarn"}}, "rope_type 'yarn': supported are default, lin"),
        ("llama", {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "lacks the field 'factor'"),
        ("mistral", {"hidden_act": "relu"}, "hidden_act='relu': only 'silu'"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types of 1 layers and of the kinds full_attention"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "full_attention", "chunked"]},
            "the kinds chunked, full_attention",
        ),
        ("qwen2", {"sliding_window": None}, "layers of sliding_attention but no sliding_window"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True: only False"),
        ("qwen3", {"num_hidden_layers": ...}, "lacks the field 'num_hidden_layers': .* not describe a qwen3 model"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation='relu': only 'gelu_pytorch_tanh'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True: only False"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0: only False"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": THETA, "sliding_attention": LLAMA3}},
            "scales the RoPE of its sliding_attention layers",
        ),
    ],
)
def test_what_is_not_implemented_is_one_clear_sentence(family, change, message, tmp_path):
    config = {name: value for name, value in (plain(family) | change).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        families.config_from_hf(hf.read_config(tmp_path))


def test_a_mistral_without_a_window_sees_everything():
    config = families.config_from_hf(plain("mistral") | {"sliding_window": None})
    assert (config.window, config.local) == (0, ())


# The fields of public config.json files that the decoder reads, as transformers 4 wrote them.
PUBLISHED = {
    "llama3.2-1b": dict(
        model_type="llama", vocab_size=128_256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, intermediate_size=8192, rope_theta=500_000.0, rms_norm_eps=1e-5,
        rope_scaling={
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        tie_word_embeddings=True, attention_bias=False, mlp_bias=False, hidden_act="silu",
    ),
    "mistral-7b-v0.1": dict(
        model_type="mistral", vocab_size=32_000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=14_336, rope_theta=10_000.0, rms_norm_eps=1e-5, sliding_window=4096,
        tie_word_embeddings=False, hidden_act="silu",
    ),
    "qwen2.5-0.5b": dict(
        model_type="qwen2", vocab_size=151_936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, intermediate_size=4864, rope_theta=1_000_000.0, rms_norm_eps=1e-6, sliding_window=32_768,
        use_sliding_window=False, max_window_layers=21, tie_word_embeddings=True, hidden_act="silu",
    ),
    "qwen3-0.6b": dict(
        model_type="qwen3", vocab_size=151_936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=3072, rope_theta=1_000_000, rms_norm_eps=1e-6,
        rope_scaling=None, sliding_window=None, use_sliding_window=False, max_window_layers=28, attention_bias=False,
        tie_word_embeddings=True, hidden_act="silu",
    ),
    "gemma2-2b": dict(
        model_type="gemma2", vocab_size=256_000, hidden_size=2304, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, intermediate_size=9216, rope_theta=10_000.0, rms_norm_eps=1e-6,
        query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096,
        attention_bias=False, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
    ),
    "gemma3-1b": dict(
        model_type="gemma3_text", vocab_size=262_144, hidden_size=1152, num_hidden_layers=26, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, intermediate_size=6912, rope_theta=1_000_000, rope_local_base_freq=10_000,
        rope_scaling=None, rms_norm_eps=1e-6, query_pre_attn_scalar=256, attn_logit_softcapping=None,
        final_logit_softcapping=None, sliding_window=512, sliding_window_pattern=6, attention_bias=False,
        hidden_activation="gelu_pytorch_tanh",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset(name):
    assert families.config_from_hf(PUBLISHED[name]) == families.PRESETS[name]


# As the models' cards say.
PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b": 7_248_023_552,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
    "gemma2-2b": 2_614_341_888,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
}


def test_presets_have_the_published_number_of_parameters():
    assert families.PRESETS.keys() == PARAMETERS.keys()
    for name, config in families.PRESETS.items():
        model = jax.eval_shape(lambda: transformer.Transformer(config, jax.random.key(0)))
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(model)) == PARAMETERS[name], name
        assert config.family in families.FAMILIES
        assert len(config.local) in (0, config.layers)


def test_loading_holds_few_tensors_at_once(tmp_path):
    shape = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=16)
    config = transformers.LlamaConfig(**SHAPE | shape)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="10MB")
    load(tmp_path)  # compiled
    layer = 4 * sum(
        math.prod(t.shape) for name, t in hf.read_tensors(tmp_path).items() if name.startswith("model.layers.0.")
    )
    tracemalloc.start()
    try:
        jax.block_until_ready(load(tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * layer, f"{peak / layer:.1f} layers"
