"""Writes demonstrations for your own prompts, by Chain of Draft (see `drirl_jax/data/drafts.py`).

python -m drirl_jax demos --config configs/quickstart.py --prompts prompts.jsonl --out mine.jsonl

PROMPTS holds one JSON object a line with id, category, lang, split and prompt. OUT gets records with the fields of
`data/records.py`; a run reads them with --config.data.path=mine.jsonl. By default the policy writes the demonstrations.
To use another model, set --config.demos.generator=endpoint, --config.demos.endpoint.url=URL and
--config.demos.endpoint.model=NAME.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags
from ml_collections import ConfigDict

from drirl_jax import checks, judges, loading
from drirl_jax.commands import cli
from drirl_jax.data import drafts, generators, records
from drirl_jax.runtime import console
from drirl_jax.runtime.files import expand_path, need_apart, replace_file, replies_file

PROMPTS = flags.DEFINE_string("prompts", None, "JSONL file of prompts.")
OUT = flags.DEFINE_string("out", None, "JSONL file to write.")


def run(config: ConfigDict, prompts: pathlib.Path, out: pathlib.Path) -> drafts.Outcome:
    """Writes `out`, and beside it the replies of the endpoint, if one is used.

    Raises:
        InputError: an input of the user is wrong, or too few demonstrations pass the filters.
    """
    checks.validate(config)
    need_apart(out, prompts)
    rows = records.read_records(prompts, config.data.categories, optional=("draft", "response"))
    section = config.demos
    records.require(rows, config.data.categories, "train", section.per_category)
    embedder = loading.load_encoder(config)
    kept_replies = replies_file(out, "replies")
    generate = generators.GENERATORS[section.generator](section, lambda: loading.load_policy(config), kept_replies)
    outcome = drafts.make(
        rows,
        section,
        categories=config.data.categories,
        harmless=config.data.harmless,
        generate=generate,
        embed=embedder,
        judge=judges.refusal_check(judges.Setting(config, replies_file(out, "judgements"))),
        model=config.policy.init if section.generator == "policy" else section.endpoint.model,
        seed=config.seed,
    )
    lines = [json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in outcome.records]
    replace_file(out, "".join(lines))
    return outcome


def main(argv: list[str]) -> None:
    """Writes the demonstrations that the flags ask for. Raises InputError."""
    cli.require_flags(__doc__, cli.CONFIG, PROMPTS, OUT)
    outcome = run(cli.CONFIG.value, expand_path(PROMPTS.value), expand_path(OUT.value))
    counts = {"demonstrations": len(outcome.records), "requested": outcome.requested, "left_out": outcome.left_out}
    console.print_result(f"{outcome.summary()}\nwritten to {OUT.value}", **counts, out=OUT.value)


if __name__ == "__main__":
    cli.run_command(main)
