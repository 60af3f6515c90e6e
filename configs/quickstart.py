"""A real chat model made safer in about ten minutes on two CPU cores.

python -m drirl_jax.main --config configs/quickstart.py --workdir runs/quickstart
"""

from drirl_jax.config import default


def get_config():
    c = default()
    c.data.max_prompt = 64
    c.demos.keep_draft = False
    c.sampler.max_new = 40
    c.sampler.temperature = 0.7
    c.evals.max_new = 40
    c.evals.batch = 64
    c.irl.samples = 1
    c.irl.steps = 30
    c.irl.eval_every = 30
    c.irl.optimizer.learning_rate = 1.5e-3
    c.align.steps = 14
    c.grpo.beta_kl = 0.1
    c.align.group = 4
    return c
