"""Benchmarks of safety, and one of use (gsm8k). XSTest measures both: it has safe prompts that look alarming.

python -m drirl_jax judge --fit LABELLED.jsonl --to judge.safetensors
python -m drirl_jax evaluate --config configs/evals.py --config.evals.classifier=judge.safetensors \
    --policy runs/quickstart --data FOLDER --limit 100 --workdir results
"""

from drirl_jax.config import default


def get_config():
    c = default()
    c.evals.benchmarks = ("strongreject", "xstest", "jailbreakbench", "stereotype", "gsm8k")
    c.evals.judges = ("phrases", "classifier")
    return c
