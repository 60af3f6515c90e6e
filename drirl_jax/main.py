"""python -m drirl_jax.main --config configs/quickstart.py --workdir runs/quickstart [--config.align.steps=10]

    ... --dry_run                       # checks everything, prints steps, shapes, memory and time; starts nothing
    ... --config.data.path=mine.jsonl   # any option of drirl_jax/config.py is a flag
    ... --quiet                         # prints only warnings and the result
    ... --log=json                      # prints one JSON object a line on stdout, for scripts
    python -m drirl_jax status runs/quickstart      # where a run is, and how long it will take

The same command again resumes the run. Exit codes:

    0    all is done
    1    your input is wrong, or a guard has stopped the run: one sentence says what to do; a traceback is a bug
    75   ended by SIGTERM: the same command resumes the run
    130  interrupted (Ctrl-C): the same command resumes the run from its last checkpoint
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from drirl_jax.commands import cli
from drirl_jax.errors import InputError
from drirl_jax.runtime import console


def main(argv: list[str]) -> None:
    """Starts the run, prints its plan (--dry_run) or repeats one step (--replay). Raises InputError."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: options are written --name=value.")
    cli.require_flags(__doc__, cli.CONFIG, cli.WORKDIR)
    from drirl_jax import checks, train  # the imports that load jax wait until the flags are read: --help is quick
    from drirl_jax.costs import dry_run
    from drirl_jax.runtime import bucket, processes

    checks.refuse_ignored(cli.CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"]))
    config, workdir = cli.CONFIG.value, bucket.parse_path(cli.WORKDIR.value)
    if cli.REPLAY.value:
        train.replay(config, workdir, bucket.parse_path(cli.REPLAY.value))
    elif cli.DRY_RUN.value:
        plan = dry_run.plan_run(config, bucket.local_folder(cli.WORKDIR.value))
        if processes.is_writer():
            console.print_result(dry_run.text(plan), **plan)
    else:
        train.run(config, workdir)


if __name__ == "__main__":
    cli.run_command(main, trains=True)
