"""SmolLM2-135M-Instruct on the starter set, eight categories.

python -m drirl_jax.main --config configs/quickstart.py --workdir runs/quickstart

Two CPU cores, seed 0: 11.7 minutes without the install. Harmful prompts refused 36% -> 55%, harmless prompts refused
7% -> 18% (56 and 28 test prompts): the aim, half of the harmful compliance for less than 10 points of harmless
refusals, is missed. The settings follow from runs on validation prompts; see docs/LOG.md.
"""

from drirl_jax.config import default


def get_config():
    c = default()
    c.data.max_prompt = 64
    c.demos.keep_draft = False
    # This small model writes sense only at a low temperature.
    c.sampler.temperature = 0.4
    c.sampler.max_new = 32
    c.evals.max_new = 40
    c.evals.batch = 64
    # The reward must read refusal, not style.
    c.irl.loss = "token"
    c.irl.contrast = 4.0
    c.irl.samples = 1
    c.irl.steps = 24
    c.irl.eval_every = 24
    # Harmless prompts must pull as hard as harmful ones, even where the policy refuses them all.
    c.sampler.batch = "kinds"
    c.grpo.demonstration = "baseline"
    c.grpo.beta_kl = 0.1
    c.align.group = 4
    c.align.steps = 24
    c.align.optimizer.learning_rate = 6e-4
    c.align.optimizer.schedule = "cosine"
    return c
