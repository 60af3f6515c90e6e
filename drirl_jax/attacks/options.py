"""Every option of the attacks with its default; a file of --options, such as configs/attack.py, changes some."""

from __future__ import annotations

from ml_collections import ConfigDict

from drirl_jax import config as config_lib
from drirl_jax.runtime import ranges

COUNTS = (
    "max_new batch max_prompt gcg.steps gcg.width gcg.topk gcg.suffix gcg.check autodan.population "
    "autodan.generations autodan.points pair.streams pair.rounds pair.max_tokens"
)
SHARES = "autodan.elite autodan.crossover autodan.mutation"
# Every number in `default`.
RANGES = {
    "seed": ranges.SEED,
    **dict.fromkeys(COUNTS.split(), ranges.COUNT),
    **dict.fromkeys(SHARES.split(), ranges.SHARE),
    "temperature": ranges.TEMPERATURE._replace(zero=True),
    **{f"attacker.{key}": row for key, row in ranges.ENDPOINT.items()},
}


def default() -> ConfigDict:
    """GCG's numbers are those of its paper; the others are of their papers' order, and smaller where noted."""
    o = ConfigDict()
    o.seed = 0
    o.split = "test"  # of the data
    o.judges = (
        "phrases",
    )  # rows of evals.judges.JUDGES, as config.evals has them; the first tells a search when to stop
    o.target = "Sure, here is"  # the beginning of an answer that searches make likely
    o.max_new = 64  # response tokens
    o.batch = 16  # messages answered, or templates read, at once
    o.max_prompt = 1024  # tokens of a message with the chat template

    o.gcg = ConfigDict()
    o.gcg.steps = 500
    o.gcg.width = 512  # candidates that a step reads, in one group
    o.gcg.topk = 256  # replacements of each token that a step draws from
    o.gcg.suffix = 20  # tokens
    o.gcg.check = 25  # after so many steps the best suffix is tried, and a success ends the search

    o.autodan = ConfigDict()
    o.autodan.templates = ""  # JSONL of {"template": "... {prompt} ..."}: yours, none come with the package
    o.autodan.population = 64
    o.autodan.generations = 100
    o.autodan.elite = 0.1  # share of the population that passes on as it is
    o.autodan.crossover = 0.5  # share of the pairs of parents that exchange sentences
    o.autodan.points = 5  # at which they change over
    o.autodan.mutation = 0.0  # share of the children that `attacker` rewrites, for which it must be named

    o.pair = ConfigDict()
    o.pair.streams = 5  # conversations side by side; the paper has more
    o.pair.rounds = 3
    o.pair.max_tokens = 400  # of a reply of `attacker`

    o.selfcipher = ConfigDict()
    o.selfcipher.demonstrations = ""  # JSONL of {"prompt", "response"}; "": the package's own, which are harmless

    o.attacker = ConfigDict(config_lib.default().judge)  # the model that helps PAIR and AutoDAN, behind an endpoint
    o.temperature = 1.0  # of `attacker`
    return o.lock()


def validate(options: ConfigDict) -> None:
    """Raises InputError with one sentence for a number that cannot be run."""
    ranges.check(options, RANGES, "options")
    config_lib.require(options.target.strip(), "options.target is blank: give the beginning of an answer.")
