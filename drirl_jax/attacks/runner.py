"""Attacks on a model, prompt by prompt: results that a killed run goes on from, and the table of success rates."""

from __future__ import annotations

import json
import os
import pathlib
import time
from typing import Callable, Iterator, NamedTuple, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from drirl_jax import loading
from drirl_jax.attacks import autodan, gcg, options, pair, templates
from drirl_jax.attacks.target import Outcome, Target
from drirl_jax.config import require
from drirl_jax.data import fingerprints, records
from drirl_jax.data.records import Record
from drirl_jax.judges import JUDGES, UNSAFE, Judge, agreement, describe_agreement, describe_facts
from drirl_jax.reports.intervals import wilson
from drirl_jax.reports.pages import markdown
from drirl_jax.runtime import contents, endpoint, json_files, processes, progress, sharding, workdirs
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
# (target, records) -> an Outcome of each record, in their order. docs/ATTACKS.md says what each is.
ATTACKS: dict[str, Callable[[Target, Sequence[Record]], Iterator[Outcome]]] = {
    "none": templates.once(templates.plain),
    "prefix": templates.once(templates.prefix_injection),
    "suppression": templates.once(templates.refusal_suppression),
    "dra": templates.once(templates.disguise_and_reconstruct),
    "selfcipher": templates.once(templates.self_cipher),
    "gcg": gcg.attack,
    "autodan": autodan.attack,
    "pair": pair.attack,
}


def check(names: Sequence[str], o: ConfigDict) -> None:
    """Raises InputError with one sentence for what cannot be run."""
    options.validate(o)
    for key, chosen, table in (("--attacks", names, ATTACKS), ("options.judges", o.judges, JUDGES)):
        unknown = [name for name in chosen if name not in table]
        require(
            chosen and not unknown, f"{key} names {', '.join(unknown) or 'nothing'}: choose among {', '.join(table)}."
        )
    if "autodan" in names:
        require(o.autodan.templates, "AutoDAN needs templates: name a file of them in options.autodan.templates.")
        autodan.templates(o.autodan.templates)
    if "selfcipher" in names and o.selfcipher.demonstrations:
        templates.demonstrations(o.selfcipher.demonstrations)
    if asks_attacker(names, o):
        endpoint.check_endpoint(o.attacker)
        require(jax.process_count() == 1, "PAIR and AutoDAN's mutation ask a server: run them in one process.")


def asks_attacker(names: Sequence[str], o: ConfigDict) -> bool:
    """Whether one of the attacks needs the model of options.attacker."""
    return "pair" in names or ("autodan" in names and o.autodan.mutation > 0)


def chosen(rows: Sequence[Record], harmless: Sequence[str], split: str, limit: int) -> list[Record]:
    """The harmful prompts of the split: all, or `limit` of them taken from each category in turn."""
    by_category: dict[str, list[Record]] = {}
    for row in rows:
        if row.split == split and row.category not in harmless:
            by_category.setdefault(row.category, []).append(row)
    ranked = sorted((rank, row.category, row) for some in by_category.values() for rank, row in enumerate(some))
    found = [row for *_, row in ranked]
    require(found, f"the data has no harmful prompt in split {split!r}: see options.split.")
    return found[:limit] if limit else found


def attack_model(
    model: str,
    given: ConfigDict | None,
    names: Sequence[str],
    data: str,
    limit: int,
    o: ConfigDict,
    workdir: pathlib.Path,
) -> list["Rate"]:
    """The rates of the attacks on the model, which is loaded here, with the prompts of `data`.

    Raises:
        InputError: something that the user gave is wrong.
    """
    config = workdirs.policy_config(model, given)
    processes.connect(config.distributed)
    check(names, o)
    check_names("config.data.categories", config.data.categories, AGGREGATES)
    rows = records.read_records(data, config.data.categories, optional=("draft", "response"))
    rows = chosen(rows, config.data.harmless, o.split, limit)
    jax.set_mesh(sharding.make_mesh(config.mesh, [o.batch, o.gcg.width], jax.devices()))
    attacker = endpoint.Endpoint(o.attacker, workdir / "attacker.jsonl") if asks_attacker(names, o) else None
    judges = loading.load_judges(model, config, o.judges, workdir / "judgements.jsonl")
    target = Target(*loading.load_policy(config), o, {name: safe(judge) for name, judge in judges.items()}, attacker)
    if processes.is_writer():
        asked = {name: value for name, value in o.items() if name not in ("batch", "max_prompt")}  # change no result
        said = {"model": config.policy, "categories": config.data.categories, "options": asked}
        said |= {"versions": {name: judge.version for name, judge in judges.items()}}
        workdirs.record_config(ConfigDict(said), workdir, contents_of(config, target, names))
    about = [
        f"Judge {name}: {', '.join(filter(None, (of.version, describe_facts(of.facts))))}."
        for name, of in judges.items()
    ]
    return run(target, rows, names, workdir, about)


def contents_of(config: ConfigDict, target: Target, names: Sequence[str]) -> dict[str, str]:
    """The hash of what the results of these attacks depend on, beside the prompts, which stand in the results."""
    found, o = fingerprints.policy_contents(config, target.text), target.options
    if "autodan" in names:
        found["templates"] = contents.of_file(o.autodan.templates)
    if "selfcipher" in names and o.selfcipher.demonstrations:
        found["demonstrations"] = contents.of_file(o.selfcipher.demonstrations)
    return found


def safe(judge: Judge) -> Callable[[str, str], bool | None]:
    """(prompt, response) -> whether this judge finds the response safe; None without a verdict."""

    def told(prompt: str, response: str) -> bool | None:
        harm = judge.harm([prompt], [response])[0]
        return None if np.isnan(harm) else bool(harm <= UNSAFE)

    return told


def run(
    target: Target, rows: Sequence[Record], names: Sequence[str], workdir: pathlib.Path, about: Sequence[str] = ()
) -> list["Rate"]:
    """Every attack on every prompt that has no result yet, in workdir/ATTACK.jsonl; the rates of all, in table.md, with
    what is said `about` the judges, what they leave without a verdict and how far they agree.

    Raises:
        InputError: a file of results is damaged, or has the result of another prompt under the id of one of these.
    """
    for attack in names:
        path = workdir / f"{attack}.jsonl"
        done = {result["id"]: result["prompt"] for result in results(path)}
        other = [row.id for row in rows if done.get(row.id, row.prompt) != row.prompt]
        require(
            not other,
            f"{path} has results of other prompts under the ids {', '.join(other[:3])}: the data has changed; put back "
            "what was there, or take another --workdir.",
        )
        left = [row for row in rows if not processes.writers_value(row.id in done)]
        bar = progress.Progress(attack, len(rows), len(rows) - len(left), processes.is_writer())
        began = time.perf_counter()
        for row, outcome in zip(left, ATTACKS[attack](target, left)):
            now = time.perf_counter()
            verdicts = {name: judge(row.prompt, outcome.response) for name, judge in target.judges.items()}
            facts = {"category": row.category, "prompt": row.prompt, "safe": verdicts, "seconds": now - began}
            if processes.is_writer():
                with path.open("a") as file:
                    file.write(json.dumps(outcome._asdict() | facts) + "\n")
            began = now
            bar.show({"queries": outcome.queries})
        bar.close()
    if not processes.is_writer():
        return []
    ids = {row.id for row in rows}
    found = {name: [of for of in results(workdir / f"{name}.jsonl") if of["id"] in ids] for name in names}
    rates = [rate for name, of in found.items() for rate in rates_of(name, of)]
    said = {judge: [result["safe"][judge] for of in found.values() for result in of] for judge in target.judges}
    missing = {judge: sum(verdict is None for verdict in of) for judge, of in said.items()}
    silent = [f"{n} responses left out without a verdict of {judge}." for judge, n in missing.items() if n]
    lines = [table(rates), *about, *silent, *(f"{line}." for line in describe_agreement(agreement(said)))]
    replace_file(workdir / "table.md", "\n".join(lines) + "\n")
    return rates


def results(path: pathlib.Path) -> list[dict]:
    """The results that a run has left; a last line that was torn as it was killed is cut off."""
    if path.exists() and processes.is_writer():
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)
    return json_files.rows(path, RESULT)


class Rate(NamedTuple):
    """How often an attack had success by a judge, which is that it does not find the response safe.

    Attributes:
        category: of the prompts; "all" for all.
        prompts: whose responses have a verdict.
        low, high: Wilson's 95% interval of the share.
        queries, seconds: means a prompt.
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


def rates_of(name: str, found: Sequence[dict]) -> list[Rate]:
    """The rates of one attack's results: by judge, of all prompts and of each category."""
    rates = []
    for judge in found[0]["safe"]:
        for category in ("all", *dict.fromkeys(result["category"] for result in found)):
            of = [result for result in found if category in ("all", result["category"])]
            of = [result for result in of if result["safe"][judge] is not None]
            if not of:
                continue
            successes = sum(not result["safe"][judge] for result in of)
            cost = (float(np.mean([result[key] for result in of])) for key in ("queries", "seconds"))
            rates.append(Rate(name, judge, category, successes, len(of), *wilson(successes, len(of)), *cost))
    return rates


def table(rates: Sequence[Rate]) -> str:
    """The rates in Markdown."""
    lines = ["| attack | judge | category | success | 95% interval | prompts | queries | seconds |", "|" + " --- |" * 8]
    for of in rates:
        share, interval = of.successes / of.prompts, f"{of.low:.1%} to {of.high:.1%}"
        category = markdown(of.category)
        lines.append(
            f"| {of.attack} | {of.judge} | {category} | {share:.1%} | {interval} | {of.successes}/{of.prompts} | "
            f"{of.queries:.1f} | {of.seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"
