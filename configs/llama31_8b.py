"""Llama-3.1-8B-Instruct with adapters, for a slice of 64 v5e chips or more; another slice: config.mesh and the batches.

python -m drirl_jax.plan --config configs/llama31_8b.py --topology v5e:8x8 --model llama3.1-8b
python -m drirl_jax.main --config configs/llama31_8b.py --workdir runs/llama31_8b

Planned with the TPU compiler (docs/SCALE.md), not yet run.
"""

from drirl_jax.config import default


def get_config():
    c = default()
    c.policy.init = "meta-llama/Llama-3.1-8B-Instruct"
    c.policy.dtype = "bfloat16"
    c.policy.attention = "splash"
    c.mesh.fsdp = 64
    c.data.max_prompt = 256
    c.sampler.max_new = 256
    c.align.batch = c.irl.batch = c.evals.batch = 64
    c.evals.max_new = 256
    return c
