"""SmolLM2-135M-Instruct on the starter set, eight categories.

python -m drirl_jax.main --config configs/quickstart.py --workdir runs/quickstart

RESULT
"""

from drirl_jax.config import default


def get_config():
    c = default()
    c.data.max_prompt = 64
    c.demos.keep_draft = False
    # This small model writes sense only at a low temperature, and tells by its first words whether it refuses.
    c.sampler.temperature = 0.4
    c.sampler.max_new = 16
    c.evals.max_new = 40
    c.evals.batch = 64
    # The reward must read refusal, not style.
    c.irl.loss = "token"
    c.irl.contrast = 4.0
    c.irl.samples = 1
    c.irl.steps = 32
    c.irl.eval_every = 32
    # Harmless prompts must pull as hard as harmful ones, even where the policy refuses them all.
    c.sampler.batch = "kinds"
    c.grpo.demonstration = "baseline"
    c.grpo.beta_kl = 0.05
    c.align.group = 4
    c.align.steps = 44
    c.align.optimizer.learning_rate = 6e-4
    c.align.optimizer.schedule = "cosine"
    # Refusals swing from step to step: what counts is where they swing around.
    c.align.optimizer.average = 0.5
    return c
