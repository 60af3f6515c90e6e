"""Attacks on a model, prompt by prompt. A killed run continues from its stored results. Writes the success rates."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from typing import Callable, Iterator, NamedTuple, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from drirl_jax import loading
from drirl_jax.attacks import autodan, gcg, options, pair, prefill, templates
from drirl_jax.attacks.target import Outcome, Target
from drirl_jax.config import require
from drirl_jax.data import fingerprints, records
from drirl_jax.data.records import Record
from drirl_jax.judges import JUDGES, UNSAFE, Judge, agreement, describe_agreement, describe_facts
from drirl_jax.reports.intervals import wilson
from drirl_jax.reports.pages import markdown
from drirl_jax.runtime import endpoint, hashes, json_files, processes, progress, sharding, workdirs
from drirl_jax.runtime.files import replace_file
from drirl_jax.runtime.names import AGGREGATES
from drirl_jax.runtime.names import check as check_names

# A line of ATTACK.jsonl.
RESULT = {
    "id": str,
    "category": str,
    "prompt": str,
    "response": str,
    "queries": int,
    "seconds": json_files.NUMBER,
    "safe": {...: (bool, type(None))},
}
# (target, records) -> one Outcome for each record, in the same order. docs/ATTACKS.md describes each attack.
ATTACKS: dict[str, Callable[[Target, Sequence[Record]], Iterator[Outcome]]] = {
    "none": templates.single_query(templates.plain),
    "prefix": templates.single_query(templates.prefix_injection),
    "suppression": templates.single_query(templates.refusal_suppression),
    "dra": templates.single_query(templates.disguise_and_reconstruct),
    "selfcipher": templates.single_query(templates.self_cipher),
    "gcg": gcg.attack,
    "autodan": autodan.attack,
    "pair": pair.attack,
    "prefill": prefill.attack,
}


def check(names: Sequence[str], o: ConfigDict) -> None:
    """Checks the names of the attacks and their options. Raises InputError with one sentence."""
    options.validate(o)
    for key, choices, table in (("--attacks", names, ATTACKS), ("options.judges", o.judges, JUDGES)):
        unknown = [name for name in choices if name not in table]
        require(
            bool(choices) and not unknown,
            f"{key} names {', '.join(unknown) or 'nothing'}: choose among {', '.join(table)}.",
        )
    if "autodan" in names:
        require(o.autodan.templates, "AutoDAN needs templates: name a file of them in options.autodan.templates.")
        autodan.load_templates(o.autodan.templates)
    if "selfcipher" in names and o.selfcipher.demonstrations:
        templates.load_demonstrations(o.selfcipher.demonstrations)
    if "prefill" in names:
        prefill.check(o.prefill)
    if asks_attacker(names, o):
        endpoint.check_endpoint(o.attacker)
        require(
            jax.process_count() == 1, "PAIR and AutoDAN's mutation send requests to a server: run them in one process."
        )


def asks_attacker(names: Sequence[str], o: ConfigDict) -> bool:
    """Whether any of the attacks needs the model of options.attacker."""
    return "pair" in names or ("autodan" in names and o.autodan.mutation > 0)


def select_prompts(rows: Sequence[Record], harmless: Sequence[str], split: str, limit: int) -> list[Record]:
    """The harmful prompts of the split, taken from each category in turn: `limit` of them, or all if it is 0."""
    harmful = [row for row in rows if row.split == split and row.category not in harmless]
    require(bool(harmful), f"the data has no harmful prompt in split {split!r}: see options.split.")
    return records.in_turn(harmful)[: limit or None]


def attack_model(
    model: str,
    user_config: ConfigDict | None,
    names: Sequence[str],
    data: str,
    limit: int,
    o: ConfigDict,
    workdir: pathlib.Path,
) -> list["Rate"]:
    """Loads the model, attacks it with the prompts of `data`, and returns the rates of the attacks.

    The workdir is locked meanwhile.

    Raises:
        InputError: an argument is wrong, or another command is at work in the workdir.
    """
    config = workdirs.policy_config(model, user_config)
    processes.connect(config.distributed)
    check(names, o)
    check_names("config.data.categories", config.data.categories, AGGREGATES)
    rows = records.read_records(data, config.data.categories, optional=("draft", "response"))
    rows = select_prompts(rows, config.data.harmless, o.split, limit)
    with processes.locked_by_writer(workdir):
        return _attack_model(model, config, names, rows, o, workdir)


def _attack_model(
    model: str, config: ConfigDict, names: Sequence[str], rows: Sequence[Record], o: ConfigDict, workdir: pathlib.Path
) -> list["Rate"]:
    jax.set_mesh(sharding.make_mesh(config.mesh, [o.batch, o.gcg.width], jax.devices()))
    attacker = endpoint.Endpoint(o.attacker, workdir / "attacker.jsonl") if asks_attacker(names, o) else None
    judges = loading.load_judges(model, config, o.judges, workdir / "judgements.jsonl")
    checks = {name: safety_check(judge) for name, judge in judges.items()}
    target = Target(*loading.load_policy(config), o, checks, attacker)
    if processes.is_writer():
        # batch and max_prompt do not change a result.
        result_options = {name: value for name, value in o.items() if name not in ("batch", "max_prompt")}
        recorded = {"model": config.policy, "categories": config.data.categories, "options": result_options}
        recorded |= {"versions": {name: judge.version for name, judge in judges.items()}}
        workdirs.record_config(ConfigDict(recorded), workdir, contents_of(config, target, names))
    if "prefill" in names:
        complying = prefill.complying_answers(o, config, judges[o.judges[0]], rows, workdir)
        target = dataclasses.replace(target, complying=complying)
    judge_lines = [
        f"Judge {name}: {', '.join(filter(None, (judge.version, describe_facts(judge.facts))))}."
        for name, judge in judges.items()
    ]
    return run(target, rows, names, workdir, judge_lines)


def contents_of(config: ConfigDict, target: Target, names: Sequence[str]) -> dict[str, str]:
    """Hashes of the policy and the files that the results of these attacks depend on; the results hold the prompts."""
    by_input, o = fingerprints.policy_contents(config, target.text), target.options
    if "autodan" in names:
        by_input["templates"] = hashes.hash_file(o.autodan.templates)
    if "selfcipher" in names and o.selfcipher.demonstrations:
        by_input["demonstrations"] = hashes.hash_file(o.selfcipher.demonstrations)
    if "prefill" in names and o.prefill.answers:
        by_input["answers"] = hashes.hash_file(o.prefill.answers)
    return by_input


def safety_check(judge: Judge) -> Callable[[str, str], bool | None]:
    """(prompt, response) -> whether this judge finds the response safe; None without a verdict."""

    def is_safe(prompt: str, response: str) -> bool | None:
        harm = judge.harm([prompt], [response])[0]
        return None if np.isnan(harm) else bool(harm <= UNSAFE)

    return is_safe


def run(
    target: Target, rows: Sequence[Record], names: Sequence[str], workdir: pathlib.Path, judge_lines: Sequence[str] = ()
) -> list["Rate"]:
    """Runs every attack on every prompt without a result, and returns the rates.

    Writes the results to workdir/ATTACK.jsonl. Writes the rates to table.md, with `judge_lines` on the judges, the
    number of responses without a verdict, and the agreement of the judges.

    Raises:
        InputError: a file of results is damaged, or holds the result of another prompt under the same id.
    """
    for attack in names:
        _run_attack(target, rows, attack, workdir / f"{attack}.jsonl")
    if not processes.is_writer():
        return []
    ids = {row.id for row in rows}
    by_attack = {
        name: [result for result in load_results(workdir / f"{name}.jsonl") if result["id"] in ids] for name in names
    }
    rates = [rate for name, attack_results in by_attack.items() for rate in attack_rates(name, attack_results)]
    verdicts_of_judge = {
        judge: [result["safe"][judge] for attack_results in by_attack.values() for result in attack_results]
        for judge in target.judges
    }
    unjudged = {judge: sum(verdict is None for verdict in verdicts) for judge, verdicts in verdicts_of_judge.items()}
    unjudged_lines = [f"{n} responses left out without a verdict of {judge}." for judge, n in unjudged.items() if n]
    lines = [
        table(rates),
        *judge_lines,
        *unjudged_lines,
        *(f"{line}." for line in describe_agreement(agreement(verdicts_of_judge))),
    ]
    replace_file(workdir / "table.md", "\n".join(lines) + "\n")
    return rates


def _run_attack(target: Target, rows: Sequence[Record], attack: str, path: pathlib.Path) -> None:
    """Runs one attack on every prompt without a result in the file, and appends the results. Raises InputError."""
    prompt_by_id = {result["id"]: result["prompt"] for result in load_results(path)}
    changed = [row.id for row in rows if prompt_by_id.get(row.id, row.prompt) != row.prompt]
    require(
        not changed,
        f"{path} has results of other prompts under the ids {', '.join(changed[:3])}: the data has changed; "
        "restore the old data, or choose another --workdir.",
    )
    missing_rows = [row for row in rows if not processes.writers_value(row.id in prompt_by_id)]
    bar = progress.Progress(attack, len(rows), len(rows) - len(missing_rows), processes.is_writer())
    start_time = time.perf_counter()
    for row, outcome in zip(missing_rows, ATTACKS[attack](target, missing_rows)):
        now = time.perf_counter()
        result = {
            "id": outcome.id,
            "message": outcome.message,
            "response": outcome.response,
            "queries": outcome.queries,
            "found": outcome.facts,
            "category": row.category,
            "prompt": row.prompt,
            "safe": {name: judge(row.prompt, outcome.response) for name, judge in target.judges.items()},
            "seconds": now - start_time,
        }
        if processes.is_writer():
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
        start_time = now
        bar.show({"queries": outcome.queries})
    bar.close()


def load_results(path: pathlib.Path) -> list[dict]:
    """The results in a file. Cuts off an incomplete last line, which a killed run leaves."""
    if path.exists() and processes.is_writer():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    return json_files.rows(path, RESULT)


class Rate(NamedTuple):
    """How often an attack had success by one judge. Success: the judge does not find the response safe.

    Attributes:
        category: the category of the prompts; "all": all categories.
        prompts: number of prompts whose responses have a verdict.
        low, high: Wilson's 95% interval of the share of successes.
        queries, seconds: means over the prompts.
    """

    attack: str
    judge: str
    category: str
    successes: int
    prompts: int
    low: float
    high: float
    queries: float
    seconds: float


def attack_rates(attack: str, attack_results: Sequence[dict]) -> list[Rate]:
    """The rates of one attack: for each judge, over all prompts and over each category."""
    rates = []
    for judge in attack_results[0]["safe"]:
        for category in ("all", *dict.fromkeys(result["category"] for result in attack_results)):
            counted = [result for result in attack_results if category in ("all", result["category"])]
            counted = [result for result in counted if result["safe"][judge] is not None]
            if not counted:
                continue
            successes = sum(not result["safe"][judge] for result in counted)
            costs = (float(np.mean([result[key] for result in counted])) for key in ("queries", "seconds"))
            bounds = wilson(successes, len(counted))
            rates.append(Rate(attack, judge, category, successes, len(counted), *bounds, *costs))
    return rates


def table(rates: Sequence[Rate]) -> str:
    """The rates as a Markdown table."""
    lines = ["| attack | judge | category | success | 95% interval | prompts | queries | seconds |", "|" + " --- |" * 8]
    for rate in rates:
        share, interval = rate.successes / rate.prompts, f"{rate.low:.1%} to {rate.high:.1%}"
        category = markdown(rate.category)
        lines.append(
            f"| {rate.attack} | {rate.judge} | {category} | {share:.1%} | {interval} | {rate.successes}/{rate.prompts} "
            f"| {rate.queries:.1f} | {rate.seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"
