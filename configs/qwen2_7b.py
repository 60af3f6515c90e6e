"""Qwen2-7B-Instruct with adapters, on the layout of configs/llama31_8b.py.

python -m drirl_jax plan --config configs/qwen2_7b.py:64 --topology v5e:8x8 --model qwen2-7b
python -m drirl_jax.main --config configs/qwen2_7b.py:64 --workdir runs/qwen2_7b

No run has been made. The plans are of the chips' own compilers, for 64 TPU chips and for a node of H100: see
docs/SCALE.md.
"""

from drirl_jax.configs import llama31_8b


def get_config(chips: str = "64"):
    """See `llama31_8b.get_config`."""
    c = llama31_8b.get_config(chips)
    c.policy.init = "Qwen/Qwen2-7B-Instruct"
    c.sampler.mesh.tensor = min(4, c.sampler.mesh.tensor)  # it has four heads of keys
    return c
