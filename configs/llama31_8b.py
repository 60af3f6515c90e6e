"""Llama-3.1-8B-Instruct with adapters on 4 to 256 TPU chips, or, as `:gpus`, on a node of eight GPUs of 80 GB.

python -m drirl_jax plan --config configs/llama31_8b.py:64 --topology v5e:8x8 --model llama3.1-8b
python -m drirl_jax.main --config configs/llama31_8b.py:64 --workdir runs/llama31_8b

Planned with the chips' own compilers on 4 to 256 chips and on a node of H100 (docs/SCALE.md); none has run.
"""

from drirl_jax.config import default

FEWEST = 16  # prompts of a step


def get_config(chips: str = "64"):
    """So many chips: a prompt of a step for each, weights cut over all of them; to sample, over 8, by heads.

    Raises:
        ValueError: it is no such number.
    """
    c = default()
    c.policy.init = "meta-llama/Llama-3.1-8B-Instruct"
    c.policy.dtype = c.policy.weights = "bfloat16"
    c.data.max_prompt = 256
    c.sampler.max_new = c.evals.max_new = 256
    if chips == "gpus":
        number, c.policy.attention, c.sampler.mesh.tensor = 8, "cudnn", 1
    else:
        number, c.policy.attention = int(chips), "splash"
        c.sampler.mesh.tensor = min(8, number)
    c.mesh.fsdp = number
    c.align.batch = c.irl.batch = max(number, FEWEST)
    if chips != "gpus":  # whose memory holds two prompts' activations
        c.align.accumulate = c.irl.accumulate = c.align.batch // number
    c.evals.batch = max(number, 64)
    return c
