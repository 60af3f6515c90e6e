"""A real chat model made safer in about ten minutes on two CPU cores.

    python -m drirl_jax.main --config configs/quickstart.py --workdir runs/quickstart
"""

from drirl_jax.config import default


def get_config():
    c = default()
    c.data.max_prompt = 64
    c.demos.keep_draft = False
    c.sampler.max_new = 48
    c.evals.max_new = 48
    c.irl.samples = 1
    c.irl.steps = 40
    c.align.steps = 20
    c.align.group = 4
    return c
