"""The objectives of the alignment stage, rows of one table (OBJECTIVES); each has its file.

An objective makes its own batch from a scored group and has its own loss. With config.scaling.combine='none' all
coefficients α are 1: this gives each objective's static baseline.
"""

from __future__ import annotations

from drirl_jax.stages.objectives import dpo, grpo, ppo, sft
from drirl_jax.stages.objectives.base import Objective

OBJECTIVES = {
    "grpo": Objective(True, grpo.make_batch, grpo.loss, response_advantages=grpo.response_advantages),
    "ppo": Objective(True, ppo.make_batch, ppo.loss, has_value_head=True, response_advantages=ppo.response_advantages),
    "dpo": Objective(True, dpo.make_batch, dpo.loss, offline=lambda config: not config.dpo.online),
    "sft": Objective(False, sft.make_batch, sft.loss),
}
