"""What a run leaves for other programs: the aligned model, and adapters as PEFT folders."""

from __future__ import annotations

import pathlib

from drirl_jax.models import families, hf, peft, reward
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime import processes, sharding
from drirl_jax.stages.base import Context
from drirl_jax.types import PyTree


def export_rewards(context: Context, bank: reward.Bank, workdir: pathlib.Path) -> None:
    """Writes each reward that is an adapter into adapters/rewards, as `models/peft.py` says."""
    config = context.config
    if config.reward.kind == "lora":
        fetched = sharding.fetch(bank)
        if processes.is_writer():
            folder, base = workdir / "adapters" / "rewards", config.policy.init
            peft.save_rewards(folder, fetched, context.model.config, base, config.data.categories)


def export_policy(context: Context, params: PyTree, aligned: Transformer, workdir: pathlib.Path) -> None:
    """Writes the aligned model in the type of the weights, each one rounded once from a sum in float32 where an adapter
    was merged; and into adapters/policy what was trained, in float32, if that is an adapter."""
    init = context.config.policy.init
    if context.config.policy.tune == "lora":
        adapter = sharding.fetch(params)
        if processes.is_writer():
            peft.save_adapter(workdir / "adapters" / "policy", adapter, context.model.config, init)
    if not processes.writers_value((workdir / "aligned").exists()):
        tensors = families.to_hf(sharding.fetch(aligned))
        if processes.is_writer():
            hf.save(workdir / "aligned", hf.read_config(hf.resolve(init)), tensors, context.text.tokenizer)
