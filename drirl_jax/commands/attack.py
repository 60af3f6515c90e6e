"""Attacks a model with published attacks, and measures the share of harmful prompts that it then answers.

python -m drirl_jax attack --model runs/quickstart --attacks none,gcg --options configs/attack.py --workdir runs/attack

MODEL is the workdir of a finished run, or a model named as in config.policy.init. Of a run the command attacks the
aligned model. For another model a --config may give categories, system turn, dtype and mesh. For both, the config's
evals section names the endpoint and the classifier of the judges. Only this model, loaded in this process, is attacked.

docs/ATTACKS.md explains each attack. --options.gcg.steps=100 changes a value of the options file. The command writes
WORKDIR/ATTACK.jsonl, one result a line with the model's response, and WORKDIR/table.md. If you start it again on the
same workdir, it continues.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from drirl_jax.attacks import options as options_lib
from drirl_jax.attacks import runner
from drirl_jax.commands import cli
from drirl_jax.data import records
from drirl_jax.runtime import bucket, console

MODEL = flags.DEFINE_string("model", None, "The model: workdir of a run, folder, .gguf file, package:NAME or hub name.")
NAMES = flags.DEFINE_list("attacks", ["none", "prefix", "suppression"], f"Some of {', '.join(runner.ATTACKS)}.")
DATA = flags.DEFINE_string("data", records.STARTER, "Prompts: a JSONL file, a folder of such files, or starter.")
LIMIT = flags.DEFINE_integer(
    "limit", 0, "Number of prompts at most, taken from the categories in turn; 0: all.", lower_bound=0
)
OPTIONS = config_flags.DEFINE_config_file(
    "options", None, "Python file with the options of the attacks; default: attacks/options.py."
)


def main(argv: list[str]) -> None:
    """Runs the attacks that the flags ask for. Raises InputError."""
    cli.require_flags(__doc__, MODEL, cli.WORKDIR)
    options, workdir = OPTIONS.value or options_lib.default(), bucket.local_folder(cli.WORKDIR.value)
    rates = runner.attack_model(MODEL.value, cli.CONFIG.value, NAMES.value, DATA.value, LIMIT.value, options, workdir)
    if rates:
        rates_json = [rate._asdict() for rate in rates]
        console.print_result(f"{runner.table(rates)}\nthe model's responses: {workdir}", rates=rates_json)


if __name__ == "__main__":
    cli.run_command(main, files=(cli.CONFIG, OPTIONS))
