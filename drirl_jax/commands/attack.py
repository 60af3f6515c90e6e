"""How robust a model is: published attacks on it, and the share of harmful prompts that it then answers.

python -m drirl_jax attack --model runs/quickstart --attacks none,gcg --options configs/attack.py --workdir runs/attack

MODEL is the workdir of a finished run, whose aligned model is attacked, or a model as config.policy.init names it; for
that a --config may give categories, system turn, dtype and mesh, and for either its evals name the judges' endpoint and
classifier. The model is loaded here: no other is attacked.
docs/ATTACKS.md says what each attack is; --options.gcg.steps=100 changes a number of the file. WORKDIR gets
ATTACK.jsonl, a result a line with what the model said, and table.md; started again on it the command goes on where it
was.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from drirl_jax import main as command
from drirl_jax.attacks import options as options_lib
from drirl_jax.attacks import runner
from drirl_jax.data import records
from drirl_jax.runtime import bucket, console
from drirl_jax.types import InputError

MODEL = flags.DEFINE_string("model", None, "Workdir of a run, or a folder, .gguf file, package:NAME or hub name.")
NAMES = flags.DEFINE_list("attacks", ["none", "prefix", "suppression"], f"Among {', '.join(runner.ATTACKS)}.")
DATA = flags.DEFINE_string("data", records.STARTER, "JSONL file of prompts, a folder of them, or starter.")
LIMIT = flags.DEFINE_integer("limit", 0, "Most prompts, from each category in turn; 0: all.", lower_bound=0)
OPTIONS = config_flags.DEFINE_config_file("options", None, "A file of attacks/options.py's, or its defaults.")


def main(argv: list[str]) -> None:
    """The attacks that the flags ask for. Raises InputError."""
    for name, value in (("model", MODEL.value), ("workdir", command.WORKDIR.value)):
        if value is None:
            raise InputError(f"--{name} is missing: {__doc__.splitlines()[2]}")
    options, workdir = OPTIONS.value or options_lib.default(), bucket.local_folder(command.WORKDIR.value)
    rates = runner.attack_model(
        MODEL.value, command.CONFIG.value, NAMES.value, DATA.value, LIMIT.value, options, workdir
    )
    if rates:
        told = [rate._asdict() for rate in rates]
        console.print_result(f"{runner.table(rates)}\nwhat the model said: {workdir}", rates=told)


if __name__ == "__main__":
    command.start(main, files=(command.CONFIG, OPTIONS))
