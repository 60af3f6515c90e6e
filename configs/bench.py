"""The workloads of the speed comparison: SmolLM2-135M, 4 prompts x 8 responses of 64 tokens, full fine-tuning, float32.

python -m drirl_jax bench --config configs/bench.py --shape S=64

S is the number of prompt tokens: 64 and 256 are the two workloads. docs/PERFORMANCE.md has the times.
"""

from drirl_jax.config import default


def get_config():
    c = default()
    c.policy.tune = "full"
    c.reward.layers = 10  # as the quickstart's: the reference and the rewards pass the first 20 together
    c.align.batch = 4
    c.align.group_size = 8
    c.align.optimizer.learning_rate = 1e-6
    return c
