"""Writes adapters as PEFT folders: the policy's, and each reward's as a sequence classifier with one label.

A policy loads with `PeftModel.from_pretrained(base, folder)`. A reward loads the same way, on the base model loaded by
`AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`. Such a classifier cannot hold two things of a
reward:

- The bias and the category's statistics: reward = (logit + bias - mean) / std, with the numbers of `reward.json` in the
  adapter's folder. Without them, responses of one category still have the same order.
- The end of a response. transformers reads the last token that is not the config's pad_token_id, and here an
  end-of-sequence token is part of the response. If the tokenizer pads with that token, set another pad_token_id.
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
    """Writes adapter_config.json and adapter_model.safetensors. The folder appears complete or not at all.

    Args:
        folder: replaced if it exists.
        adapter: one adapter, not a bank.
        config: of the model that it belongs to.
        base: name or folder of that model; it goes into adapter_config.json.
        head_D: [D] the head of a reward, as weights of the classifier's `score`; None for a policy.
        numbers: the numbers for `reward.json`; without any, that file is not written.
    """
    names = families.FAMILIES[config.family].layer
    tensors, (first_pair, *_) = {}, adapter.values()
    layers, rank = first_pair.a.shape[:2]
    first_layer = config.layers - layers
    for target, pair in adapter.items():
        module = names[target].removesuffix(".weight")
        for i, (a_RI, b_RO) in enumerate(zip(np.asarray(pair.a), np.asarray(pair.b)), first_layer):
            tensors[f"base_model.model.{module.format(i)}.lora_A.weight"] = a_RI
            tensors[f"base_model.model.{module.format(i)}.lora_B.weight"] = np.ascontiguousarray(b_RO.T)
    if head_D is not None:
        tensors["base_model.model.score.weight"] = np.asarray(head_D)[None]
    alpha = first_pair.scale * rank
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head_D is None else "SEQ_CLS",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [names[target].split(".")[-2] for target in adapter],
        "layers_to_transform": list(range(first_layer, config.layers)) if first_layer else None,
        "layers_pattern": "layers" if first_layer else None,
        "modules_to_save": None if head_D is None else ["score"],
    }
    with files.replace_folder(folder) as new_folder:
        files.write_json(new_folder / "adapter_config.json", adapter_config)
        save_file(tensors, new_folder / "adapter_model.safetensors", {"format": "pt"})
        if numbers:
            files.write_json(new_folder / "reward.json", numbers)


def save_rewards(folder: pathlib.Path, bank: Bank, config: Config, base: str, categories: Sequence[str]) -> None:
    """Writes each reward of a bank of adapters into the folder `names.file_name` of its category.

    If the bank has a single reward, the folder is "all". For `config` and `base` see `save_adapter`.
    """
    rewards = bank.rewards
    # All names are made first, so that an impossible name is refused before anything is written.
    for c, name in enumerate(list(map(file_name, categories if len(rewards.bias) > 1 else ["all"]))):
        adapter = jax.tree.map(lambda x: x[:, c], rewards.adapter)
        numbers = {"bias": rewards.bias, "mean": bank.mean, "std": bank.std}
        numbers = {key: float(values_C[c]) for key, values_C in numbers.items()}
        save_adapter(folder / name, adapter, config, base, rewards.heads[c], **numbers)
