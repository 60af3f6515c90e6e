"""python -m drirl_jax COMMAND [OPTIONS]; `drirl COMMAND` is the same.

`python -m drirl_jax COMMAND --help` lists the options of a command.
"""

from __future__ import annotations

import difflib
import runpy
import sys

# Command -> (module, what it does). Each module is loaded only when its command is called.
COMMANDS = {
    "train": ("drirl_jax.main", "align a policy, from a config to a report"),
    "evaluate": ("drirl_jax.commands.evaluate", "run benchmarks on a policy"),
    "attack": ("drirl_jax.commands.attack", "attack a policy and count how often it answers"),
    "depth": ("drirl_jax.commands.depth", "measure whether a policy stays safe when its first words are given"),
    "study": ("drirl_jax.commands.study", "compare variants over seeds"),
    "score": ("drirl_jax.commands.score", "score responses with a run's rewards, or take the best of n"),
    "demos": ("drirl_jax.commands.demos", "write demonstrations for prompts"),
    "convert": ("drirl_jax.commands.convert", "convert published data sets"),
    "judge": ("drirl_jax.commands.judge", "fit a judge, or compare judges with labels"),
    "bench": ("drirl_jax.commands.bench", "time the phases of a step"),
    "plan": ("drirl_jax.commands.plan", "plan a run on accelerators with their compilers"),
    "report": ("drirl_jax.commands.report", "write a run's report, or compare runs"),
    "status": ("drirl_jax.commands.status", "show how far a run is"),
}
OWN_HELP = ("convert", "report", "status")  # they read their command line by argparse
HELP = {"--help", "-help", "-h", "-?"}


def usage() -> str:
    """The text of --help: all commands with their meanings."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [__doc__.strip(), "", *(f"  {name:{width}}  {meaning}" for name, (_, meaning) in COMMANDS.items())]
    )


def main() -> None:
    """Runs the command whose name is the first argument."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in HELP | {"help"}:
        print(usage())
        return
    if name not in COMMANDS:
        matches = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {matches[0]}? " if matches else ""
        sys.exit(f"drirl_jax: no command {name!r}: {hint}There are {', '.join(COMMANDS)}.")
    sys.argv = sys.argv[1:]
    if name not in OWN_HELP and HELP & set(sys.argv[1:]):
        from drirl_jax.commands import help_text  # not the command itself, which loads jax

        print(help_text.usage(name))
        return
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
