"""Qwen2-7B-Instruct with adapters, laid out as configs/llama31_8b.py lays out its model.

python -m drirl_jax plan --config configs/qwen2_7b.py:64 --topology v5e:8x8 --model qwen2-7b
python -m drirl_jax.main --config configs/qwen2_7b.py:64 --workdir runs/qwen2_7b

Planned with the chips' own compilers on 64 TPU chips and on a node of H100 (docs/SCALE.md); none has run.
"""

from drirl_jax.configs import llama31_8b


def get_config(chips: str = "64"):
    """See `llama31_8b.get_config`."""
    c = llama31_8b.get_config(chips)
    c.policy.init = "Qwen/Qwen2-7B-Instruct"
    c.sampler.mesh.tensor = min(4, c.sampler.mesh.tensor)  # it has four heads of keys
    return c
