"""The rewards of a finished run at inference: scores of responses, or the best of n that a policy samples.

python -m drirl_jax score --workdir runs/quickstart --responses mine.jsonl --out scored.jsonl
python -m drirl_jax score --workdir runs/quickstart --prompts prompts.jsonl --best_of 8 --out best.jsonl

Both files hold one object a line with id, category, lang, split and prompt; that of responses also has response. OUT
gets these fields, response and reward; of the best of n also the mean and the lowest reward of the n. The policy that
samples is the aligned one, or with --base the one that the run started from. A run's config comes from its workdir:
responses are sampled at its sampler.temperature, up to its evals.max_new tokens.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
from absl import flags

from drirl_jax import loading
from drirl_jax import main as command
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
PROMPTS = flags.DEFINE_string("prompts", None, "JSONL file of prompts, of whose responses the best is taken.")
BEST_OF = flags.DEFINE_integer("best_of", 8, "Responses sampled for each prompt.", lower_bound=1)
BASE = flags.DEFINE_boolean("base", False, "Sample from the policy that the run started from.")
OUT = flags.DEFINE_string("out", None, "JSONL file to write.")


def load(workdir: bucket.Path, rows: list[Record]) -> tuple[Context, reward.Bank]:
    """The run's context, its examples these records as split "given", and its rewards.

    Raises:
        InputError: the workdir holds no run with rewards, or a prompt is too long.
    """
    config = workdirs.load_config(workdir)
    context = loading.load_context(config)
    given = examples.tokenise({"given": rows}, context.text, config)
    if len(given["given"].id) < len(rows):
        raise InputError("some prompts are longer than the run's data.max_prompt: shorten them.")
    return dataclasses.replace(context, examples=given), loading.load_rewards(
        context, bucket.parse_path(config.reward.init or workdir)
    )


def policy(context: Context, workdir: bucket.Path, base: bool) -> Transformer:
    """The aligned policy of the run, or the one that it started from."""
    if base:
        return context.model
    folder = workdir / "aligned"
    if not folder.is_dir():
        raise InputError(f"no aligned model in {folder}: let the run end, or take --base.")
    return families.from_hf(hf.read_tensors(bucket.local_copy(folder)), context.model.config)


def of_responses(workdir: bucket.Path, path: pathlib.Path) -> list[dict]:
    """The records of the file with "reward"."""
    rows = records.read_records(path, workdirs.load_config(workdir).data.categories, optional=("draft",))
    context, bank = load(workdir, rows)
    given = context.examples["given"]
    found = runner.response_rewards(context, bank, given, given.demo[:, None], given.demo_len[:, None])[:, 0]
    return [row._asdict() | {"reward": float(value)} for row, value in zip(rows, found)]


def best_of(workdir: bucket.Path, path: pathlib.Path, n: int, base: bool) -> list[dict]:
    """The records of the file with the response of the highest reward among n, "reward", "mean" and "lowest"."""
    rows = records.read_records(path, workdirs.load_config(workdir).data.categories, optional=("draft", "response"))
    context, bank = load(workdir, rows)
    given, config = context.examples["given"], context.config
    out = sample_all(
        context, policy(context, workdir, base), given, context.key("best_of"), min(config.evals.batch, len(rows)),
        group=n, max_new=config.evals.max_new, temperature=config.sampler.temperature,
    )  # fmt: skip
    found = runner.response_rewards(context, bank, given, out.response, out.response_len)
    best = found.argmax(axis=1)
    texts = [context.text.decode(out.response[i, g], out.response_len[i, g]) for i, g in enumerate(best)]
    told = ({"reward": float(of.max()), "mean": float(of.mean()), "lowest": float(of.min())} for of in found)
    return [row._asdict() | {"response": text} | numbers for row, text, numbers in zip(rows, texts, told)]


def main(argv: list[str]) -> None:
    """The scores that the flags ask for. Raises InputError."""
    for name, value in (("workdir", command.WORKDIR.value), ("out", OUT.value)):
        if value is None:
            raise InputError(f"--{name} is missing: {__doc__.splitlines()[2]}")
    if (RESPONSES.value is None) == (PROMPTS.value is None):
        raise InputError("give --responses to score, or --prompts of whose responses the best is to be taken.")
    workdir, out = bucket.parse_path(command.WORKDIR.value), expand_path(OUT.value)
    given = expand_path(PROMPTS.value if RESPONSES.value is None else RESPONSES.value)
    need_apart(out, given)
    if RESPONSES.value is not None:
        rows = of_responses(workdir, given)
    else:
        rows = best_of(workdir, given, BEST_OF.value, BASE.value)
    replace_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    mean = float(np.mean([row["reward"] for row in rows]))
    text = f"{len(rows)} rows, mean reward {mean:+.3f}, written to {out}"
    console.print_result(text, rows=len(rows), mean_reward=mean, out=str(out))


if __name__ == "__main__":
    command.start(main, resumes=False)
