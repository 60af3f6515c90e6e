"""Llama-3.1-8B-Instruct with adapters on 4 to 256 TPU chips, or, as `:gpus`, on a node of eight GPUs of 80 GB.

python -m drirl_jax plan --config configs/llama31_8b.py:64 --topology v5e:8x8 --model llama3.1-8b
python -m drirl_jax.main --config configs/llama31_8b.py:64 --workdir runs/llama31_8b

No run has been made. The plans are of the chips' own compilers, for 4 to 256 chips and for a node of H100: see
docs/SCALE.md.
"""

from drirl_jax.config import default

FEWEST = 16  # prompts of a step


def get_config(chips: str = "64"):
    """The run on this many chips.

    The weights are cut over all chips. Each TPU chip takes one prompt of a micro-batch, each GPU two. To sample, heads
    are cut over at most 8 TPU chips, over no GPUs.

    Args:
        chips: the number of TPU chips, or "gpus": a node of eight.

    Raises:
        ValueError: `chips` is neither.
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
