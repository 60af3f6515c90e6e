"""SmolLM2-135M-Instruct on the starter set, eight categories.

python -m drirl_jax.main --config configs/quickstart.py --workdir runs/quickstart

5 to 8 minutes on two CPU cores with AVX-512, 16 minutes without, the install included. Refusals of harmful prompts
rise from 31% to 67%, those of harmless ones from 12% to 23%: three seeds, by phrases. Both figures are of the former
test set, 84 and 56 prompts. In an earlier run, read blind, most of the new refusals went on to offer help: only the
first 8 tokens are trained. See docs/LOG.md.
"""

from drirl_jax.config import default


def get_config():
    c = default()
    c.data.max_prompt = 80
    c.demos.keep_draft = False
    # Whether to refuse is decided in the first words; short responses leave time for many prompts.
    c.sampler.max_new = 8
    # This small model writes sense only at a low temperature.
    c.sampler.temperature = 0.4
    c.evals.max_new = 40
    c.evals.batch = 80
    # The first 20 of 30 layers know what a prompt asks for; they stay as they are and are passed once for all.
    c.policy.layers = c.reward.layers = 10
    # The reward must read refusal, not style.
    c.irl.loss = "token"
    c.irl.contrast = 4.0
    c.irl.samples = 1
    c.irl.steps = 48
    c.irl.eval_every = 48
    c.irl.optimizer.schedule = "cosine"
    # The policy seldom samples a refusal at first, and once it refuses it seldom samples help: every group holds both.
    c.group.demonstration = c.group.contrast = "member"
    c.policy_loss.beta_kl = 0.03
    # The first words decide, so they weigh most; and harmless prompts weigh more while many of their samples refuse.
    c.policy_loss.reduce = "discounted"
    c.group.harmless_refusals = 0.1
    c.data.mixing = "kinds"
    c.data.harmless_share = 0.625
    c.align.batch = 16
    c.align.group_size = 4
    # Four updates on the samples of a step: what a step costs is mostly sampling and scoring.
    c.align.steps = 40
    c.align.minibatches = 4
    c.align.optimizer.schedule = "cosine"
    c.align.optimizer.average = 0.5
    return c
