"""Adapters in PEFT's folders: PEFT's model of the same base says what ours says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers.tiny_models import apply, filled, rows, token_logprobs
from helpers.torch_families import GROUP, load, torch_logits, torch_model

from drirl_jax.models import lora, peft, reward

theirs = pytest.importorskip("peft")


def base(family, tmp_path):
    torch_model(family).save_pretrained(tmp_path / "base")
    return load(tmp_path / "base"), str(tmp_path / "base")


@pytest.mark.parametrize("family, layers", [("llama", 0), ("gemma2", 2)])
def test_peft_reads_a_policys_adapter(family, layers, tmp_path):
    model, name = base(family, tmp_path)
    options = {"rank": 4, "alpha": 6, "layers": layers, "targets": ("q", "v", "o", "up", "down")}
    adapter = filled(lora.init(model, jax.random.key(1), **options), 3)
    peft.save_adapter(tmp_path / "adapter", adapter, model.config, name)
    peer = transformers.AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager")
    peer = theirs.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    assert peer.peft_config["default"].base_model_name_or_path == name
    logp = token_logprobs(model, apply(model, GROUP, adapter), GROUP, 1.0)[0]
    for p, g, prompt, response in rows(GROUP):
        want = torch_logits(peer, np.concatenate([GROUP.prefix, prompt, response]))[-len(response) - 1 : -1]
        want = np.asarray(jax.nn.log_softmax(want))[np.arange(len(response)), response]
        np.testing.assert_allclose(logp[p, g, : len(response)], want, atol=1e-4)


@pytest.mark.parametrize("family, categories", [("qwen2", ["insult", "harmless"]), ("gemma3_text", ["all"])])
def test_peft_reads_each_reward_of_a_bank(family, categories, tmp_path, recwarn):
    model, name = base(family, tmp_path)
    rewards = reward.init_lora(model, jax.random.key(1), len(categories), rank=4, alpha=4, layers=2)
    rewards = rewards.replace(
        adapter=filled(rewards.adapter, 3),
        heads=jax.random.normal(jax.random.key(2), rewards.heads.shape),
        bias=jnp.array([0.5, -2.0])[: len(categories)],
    )
    bank = reward.Bank(rewards, mean=rewards.bias + 1, std=rewards.bias**2)
    peft.save_rewards(tmp_path / "rewards", bank, model.config, name, ["insult", "harmless"])
    assert sorted(file.name for file in (tmp_path / "rewards").iterdir()) == sorted(categories)
    group = GROUP.replace(category=jnp.array([0, 1]))
    found = jax.jit(reward.score)(model, bank, group)
    for c, category in enumerate(categories):
        folder = tmp_path / "rewards" / category
        peer = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, attn_implementation="eager"
        )
        peer = theirs.PeftModel.from_pretrained(peer, folder).eval()
        numbers = json.loads((folder / "reward.json").read_text())
        for p, g, prompt, response in rows(group):
            if reward.reward_index(rewards, group.category)[p] == c:
                (raw,) = torch_logits(peer, np.concatenate([GROUP.prefix, prompt, response]))[None]
                want = (raw + numbers["bias"] - numbers["mean"]) / numbers["std"]
                np.testing.assert_allclose(found[p, g], want, atol=1e-4)
    assert not [told for told in recwarn if "peft" in str(told.filename)]
