"""Exports of a run for other programs: the aligned model, and adapters as PEFT folders."""

from __future__ import annotations

import pathlib
from typing import Sequence

from drirl_jax.models import families, hf, lora, peft, reward
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime import processes, sharding
from drirl_jax.stages.base import Context
from drirl_jax.types import PyTree


def export_rewards(context: Context, bank: reward.Bank, workdir: pathlib.Path) -> None:
    """Writes the rewards that are adapters into adapters/rewards, in the form of `models/peft.py`."""
    config = context.config
    if config.reward.kind == "lora":
        host_bank = sharding.fetch(bank)
        if processes.is_writer():
            folder = workdir / "adapters" / "rewards"
            base = str(workdir / "sft") if "sft" in config.schedule else config.policy.init
            peft.save_rewards(folder, host_bank, context.model.config, base, config.data.categories)


def export_policy(context: Context, trained: Sequence[PyTree], aligned: Transformer, workdir: pathlib.Path) -> None:
    """Writes the aligned model in the trunk's weight type; and a trained adapter, in float32, into adapters/policy.

    A merged weight is a sum in float32, rounded once. The adapter loads on config.policy.init.

    Args:
        trained: the products of the stages that trained the policy, in their order. If they are adapters, the exported
            one is their sum: see `lora.concatenate`.
        aligned: the model that all of them give.
    """
    if context.config.policy.tune == "lora":
        adapter = sharding.fetch(lora.concatenate(trained))
        if processes.is_writer():
            init = context.config.policy.init
            peft.save_adapter(workdir / "adapters" / "policy", adapter, context.model.config, init)
    export_model(context, aligned, workdir / "aligned")


def export_model(context: Context, model: Transformer, folder: pathlib.Path) -> None:
    """Writes the model as a folder that transformers reads, unless it is there."""
    if not processes.writers_value(folder.exists()):
        tensors = families.to_hf(sharding.fetch(model))
        if processes.is_writer():
            init = hf.resolve(context.config.policy.init)
            hf.save(folder, hf.read_config(init), tensors, context.text.tokenizer)
