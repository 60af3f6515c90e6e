"""The whole method on a random model of two layers, in well under a minute. It is for tests and for trying a change.

python -m drirl_jax.main --config configs/tiny.py --config.policy.init=FOLDER --workdir runs/tiny
"""

from drirl_jax.config import default


def get_config():
    c = default()
    c.data.shares = (0.065,) * 8  # of the training records
    c.evals.split = "valid"
    c.policy.rank = c.reward.rank = 4
    c.sampler.max_new = c.evals.max_new = 12
    c.irl.samples = 1
    c.irl.loss, c.irl.contrast = "token", 1.0
    c.irl.steps, c.irl.eval_every = 4, 2
    c.align.steps, c.align.group_size = 4, 4
    c.align.optimizer.warmup = c.irl.optimizer.warmup = 1
    c.group.demonstration = c.group.contrast = "baseline"
    c.group.harmless_refusals = 0.5
    c.checkpoint.every = 2
    return c
