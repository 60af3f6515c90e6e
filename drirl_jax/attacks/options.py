"""All options of the attacks with their defaults. A file for --options, such as configs/attack.py, changes some."""

from __future__ import annotations

from ml_collections import ConfigDict

from drirl_jax import config as config_lib
from drirl_jax.runtime import ranges

COUNTS = (
    "max_new batch max_prompt gcg.steps gcg.width gcg.topk gcg.suffix gcg.check autodan.population "
    "autodan.generations autodan.points pair.streams pair.rounds pair.max_tokens prefill.tokens"
)
SHARES = "autodan.elite autodan.crossover autodan.mutation"
# The range of every number in `default`.
RANGES = {
    "seed": ranges.SEED,
    **dict.fromkeys(COUNTS.split(), ranges.COUNT),
    **dict.fromkeys(SHARES.split(), ranges.SHARE),
    "temperature": ranges.TEMPERATURE._replace(zero=True),
    **{f"attacker.{key}": row for key, row in ranges.ENDPOINT.items()},
}


def default() -> ConfigDict:
    """The default options.

    GCG has the numbers of its paper. The others have numbers of the size in their papers, or smaller where a comment
    says so.
    """
    o = ConfigDict()
    o.seed = 0  # seed of all random numbers of the attacks
    o.split = "test"  # the split of the data whose prompts are attacked
    # names in judges.JUDGES, as in config.evals.judges; the first judge decides when a search stops
    o.judges = ("phrases",)
    o.target = "Sure, here is"  # the beginning of an answer; searches make it likely
    o.max_new = 64  # most tokens of a response
    o.batch = 16  # messages or templates in a batch
    o.max_prompt = 1024  # maximum tokens of a message with the chat template

    o.gcg = ConfigDict()  # GCG: a search for a suffix, by gradients
    o.gcg.steps = 500  # most steps of a search
    o.gcg.width = 512  # candidates that a step reads, as one group
    o.gcg.topk = 256  # replacements of each token that a step samples from
    o.gcg.suffix = 20  # tokens of the suffix
    o.gcg.check = 25  # steps between two tries of the best suffix; a success ends the search

    o.autodan = ConfigDict()  # AutoDAN: a genetic search among templates
    o.autodan.templates = ""  # JSONL of {"template": "... {prompt} ..."}; the package has no templates of its own
    o.autodan.population = 64  # templates in a generation
    o.autodan.generations = 100  # most generations of a search
    o.autodan.elite = 0.1  # share of the population that survives unchanged
    o.autodan.crossover = 0.5  # share of the pairs of parents that exchange sentences
    o.autodan.points = 5  # cuts between the segments that they exchange
    o.autodan.mutation = 0.0  # share of the children that `attacker` rewrites; above 0 it must be configured

    o.pair = ConfigDict()  # PAIR: another model rewrites the prompt
    o.pair.streams = 5  # conversations in parallel; the paper has more
    o.pair.rounds = 3  # messages of a conversation
    o.pair.max_tokens = 400  # most tokens of a reply of `attacker`

    o.selfcipher = ConfigDict()  # SelfCipher: examples before the prompt
    o.selfcipher.demonstrations = ""  # JSONL of {"prompt", "response"}; "": the package's own, which are harmless

    o.prefill = ConfigDict()  # prefill: the answer begins with the first tokens of one that complies
    o.prefill.tokens = 10  # tokens of the beginning
    # a model, named as for --model, whose greedy answers are taken where the first judge finds them unsafe
    o.prefill.base = ""
    o.prefill.answers = ""  # in place of a base: JSONL of {"prompt", "answer"}; the first judge reads them too

    o.attacker = config_lib.endpoint()  # the model that helps PAIR and AutoDAN, behind an endpoint
    o.temperature = 1.0  # temperature of `attacker`
    return o.lock()


def validate(options: ConfigDict) -> None:
    """Raises InputError with one sentence for a number that cannot be run."""
    ranges.check(options, RANGES, "options")
    config_lib.require(options.target.strip(), "options.target is blank: give the beginning of an answer.")
