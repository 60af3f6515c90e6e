"""Uses the rewards of a finished run: scores responses, or takes the best of n responses that a policy samples.

python -m drirl_jax score --workdir runs/quickstart --responses mine.jsonl --out scored.jsonl
python -m drirl_jax score --workdir runs/quickstart --prompts prompts.jsonl --best_of 8 --out best.jsonl

Both files hold one JSON object a line with id, category, lang, split and prompt; a file of --responses also has
response. OUT gets these fields, response and reward; with --prompts also the mean and the lowest reward of the n
responses. The aligned policy samples, or with --base the policy that the run started from. The config comes from the
run's workdir: responses are sampled at its sampler.temperature, up to its evals.max_new tokens.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
from absl import flags

from drirl_jax import loading
from drirl_jax.commands import cli
from drirl_jax.data import examples, records
from drirl_jax.data.records import Record
from drirl_jax.evals import runner
from drirl_jax.models import families, hf, reward
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime import bucket, console, workdirs
from drirl_jax.runtime.files import expand_path, need_apart, replace_file
from drirl_jax.stages.base import Context, sample_all
from drirl_jax.types import InputError

RESPONSES = flags.DEFINE_string("responses", None, "JSONL file of prompts with responses to score.")
PROMPTS = flags.DEFINE_string(
    "prompts", None, "JSONL file of prompts; the best of the sampled responses to each is taken."
)
BEST_OF = flags.DEFINE_integer("best_of", 8, "Responses sampled for each prompt.", lower_bound=1)
BASE = flags.DEFINE_boolean("base", False, "Sample from the policy that the run started from.")
OUT = flags.DEFINE_string("out", None, "JSONL file to write.")


def load(workdir: bucket.Path, rows: list[Record]) -> tuple[Context, reward.Bank]:
    """The run's context, with these records as its only split "given", and the run's rewards.

    Raises:
        InputError: the workdir holds no run with rewards, or a prompt is too long.
    """
    config = workdirs.load_config(workdir)
    rewards_run = bucket.parse_path(config.reward.init or workdir)
    context = loading.with_warm_start(loading.load_context(config), rewards_run)
    by_split = examples.tokenise({"given": rows}, context.text, config)
    if len(by_split["given"].id) < len(rows):
        raise InputError("some prompts are longer than the run's data.max_prompt: shorten them.")
    return dataclasses.replace(context, examples=by_split), loading.load_rewards(context, rewards_run)


def policy(context: Context, workdir: bucket.Path, base: bool) -> Transformer:
    """The aligned policy of the run, or the one that it started from."""
    if base:
        return context.model
    folder = workdir / "aligned"
    if not folder.is_dir():
        raise InputError(f"no aligned model in {folder}: let the run end, or take --base.")
    return families.from_hf(hf.read_tensors(bucket.local_copy(folder)), context.model.config)


def score_responses(workdir: bucket.Path, path: pathlib.Path) -> list[dict]:
    """The records of the file, each with its "reward"."""
    rows = records.read_records(path, workdirs.load_config(workdir).data.categories, optional=("draft",))
    context, bank = load(workdir, rows)
    scored = context.examples["given"]
    rewards = runner.response_rewards(context, bank, scored, scored.demo[:, None], scored.demo_len[:, None])[:, 0]
    return [row._asdict() | {"reward": float(value)} for row, value in zip(rows, rewards)]


def best_of(workdir: bucket.Path, path: pathlib.Path, n: int, base: bool) -> list[dict]:
    """The records of the file, each with the best response of n by reward, and "reward", "mean" and "lowest"."""
    rows = records.read_records(path, workdirs.load_config(workdir).data.categories, optional=("draft", "response"))
    context, bank = load(workdir, rows)
    prompts, config = context.examples["given"], context.config
    samples = sample_all(
        context, policy(context, workdir, base), prompts, context.key("best_of"), min(config.evals.batch, len(rows)),
        group=n, max_new=config.evals.max_new, temperature=config.sampler.temperature,
    )  # fmt: skip
    rewards_NG = runner.response_rewards(context, bank, prompts, samples.response, samples.response_len)
    best = rewards_NG.argmax(axis=1)
    texts = [context.text.decode(samples.response[i, g], samples.response_len[i, g]) for i, g in enumerate(best)]
    summaries = (
        {"reward": float(rewards.max()), "mean": float(rewards.mean()), "lowest": float(rewards.min())}
        for rewards in rewards_NG
    )
    return [row._asdict() | {"response": text} | summary for row, text, summary in zip(rows, texts, summaries)]


def main(argv: list[str]) -> None:
    """Writes the scores that the flags ask for. Raises InputError."""
    cli.require_flags(__doc__, cli.WORKDIR, OUT)
    if (RESPONSES.value is None) == (PROMPTS.value is None):
        raise InputError("give --responses to score, or --prompts to sample responses to and take the best.")
    workdir, out = bucket.parse_path(cli.WORKDIR.value), expand_path(OUT.value)
    input_file = expand_path(PROMPTS.value if RESPONSES.value is None else RESPONSES.value)
    need_apart(out, input_file)
    if RESPONSES.value is not None:
        rows = score_responses(workdir, input_file)
    else:
        rows = best_of(workdir, input_file, BEST_OF.value, BASE.value)
    replace_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    mean = float(np.mean([row["reward"] for row in rows]))
    text = f"{len(rows)} rows, mean reward {mean:+.3f}, written to {out}"
    console.print_result(text, rows=len(rows), mean_reward=mean, out=str(out))


if __name__ == "__main__":
    cli.run_command(main, resumes=False)
