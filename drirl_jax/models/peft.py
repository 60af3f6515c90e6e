"""Adapters as PEFT's folders: the policy's, and each reward's as a sequence classifier with one label.

A policy loads with `PeftModel.from_pretrained(base, folder)`; a reward the same way, on the base model loaded by
`AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`. Of a reward two things have no place in such a
classifier:

- Its bias, and the category's statistics: reward = (logit + bias - mean) / std, with the numbers of `reward.json` in
  the adapter's folder. Responses of one category are in the same order without.
- Where a response ends. transformers reads the last token that is not the config's pad_token_id, and here an
  end-of-sequence token is part of the response: where a tokenizer pads with that token, set another pad_token_id.
"""

from __future__ import annotations

import pathlib
from typing import Sequence

import jax
import numpy as np
from safetensors.numpy import save_file

from drirl_jax.models import families, lora
from drirl_jax.models.architecture import Config
from drirl_jax.models.reward import Bank
from drirl_jax.runtime import files
from drirl_jax.runtime.names import file_name
from drirl_jax.types import Array


def save_adapter(
    folder: pathlib.Path, adapter: lora.Adapter, config: Config, base: str, head_D: Array | None = None, **numbers
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; the folder appears whole or not at all.

    Args:
        folder: replaced if it exists.
        adapter: one adapter, not a bank.
        config: of the model that it belongs to.
        base: name or folder of that model, which PEFT notes.
        head_D: [D] of a reward, the weights of the classifier's `score`; None for a policy.
        numbers: what `reward.json` is to hold, if any.
    """
    names = families.FAMILIES[config.family].layer
    tensors, (any_pair, *_) = {}, adapter.values()
    layers, rank = any_pair.a.shape[:2]
    first = config.layers - layers
    for target, pair in adapter.items():
        module = names[target].removesuffix(".weight")
        for i, (a_RI, b_RO) in enumerate(zip(np.asarray(pair.a), np.asarray(pair.b)), first):
            tensors[f"base_model.model.{module.format(i)}.lora_A.weight"] = a_RI
            tensors[f"base_model.model.{module.format(i)}.lora_B.weight"] = np.ascontiguousarray(b_RO.T)
    if head_D is not None:
        tensors["base_model.model.score.weight"] = np.asarray(head_D)[None]
    alpha = any_pair.scale * rank
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head_D is None else "SEQ_CLS",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [names[target].split(".")[-2] for target in adapter],
        "layers_to_transform": list(range(first, config.layers)) if first else None,
        "layers_pattern": "layers" if first else None,
        "modules_to_save": None if head_D is None else ["score"],
    }
    with files.replace_folder(folder) as new:
        files.write_json(new / "adapter_config.json", described)
        save_file(tensors, new / "adapter_model.safetensors", {"format": "pt"})
        if numbers:
            files.write_json(new / "reward.json", numbers)


def save_rewards(folder: pathlib.Path, bank: Bank, config: Config, base: str, categories: Sequence[str]) -> None:
    """Writes each reward of a bank of adapters into a folder of its category's `names.file_name`, or all, if it is one.

    For `config` and `base` see `save_adapter`.
    """
    rewards = bank.rewards
    # All names before any folder: one that cannot be is refused before anything is written.
    for c, name in enumerate(list(map(file_name, categories if len(rewards.bias) > 1 else ["all"]))):
        adapter = jax.tree.map(lambda x: x[:, c], rewards.adapter)
        numbers = {"bias": rewards.bias, "mean": bank.mean, "std": bank.std}
        numbers = {key: float(of[c]) for key, of in numbers.items()}
        save_adapter(folder / name, adapter, config, base, rewards.heads[c], **numbers)
