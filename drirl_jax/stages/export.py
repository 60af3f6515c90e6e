"""Exports of a run for other programs: the aligned model, and adapters as PEFT folders."""

from __future__ import annotations

import pathlib

from drirl_jax.models import families, hf, peft, reward
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
            folder, base = workdir / "adapters" / "rewards", config.policy.init
            peft.save_rewards(folder, host_bank, context.model.config, base, config.data.categories)


def export_policy(context: Context, params: PyTree, aligned: Transformer, workdir: pathlib.Path) -> None:
    """Writes the aligned model in the trunk's weight type; and a trained adapter, in float32, into adapters/policy.

    A merged weight is a sum in float32, rounded once.
    """
    init = context.config.policy.init
    if context.config.policy.tune == "lora":
        adapter = sharding.fetch(params)
        if processes.is_writer():
            peft.save_adapter(workdir / "adapters" / "policy", adapter, context.model.config, init)
    if not processes.writers_value((workdir / "aligned").exists()):
        tensors = families.to_hf(sharding.fetch(aligned))
        if processes.is_writer():
            hf.save(workdir / "aligned", hf.read_config(hf.resolve(init)), tensors, context.text.tokenizer)
