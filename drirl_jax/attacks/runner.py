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

from drirl_jax import config as config_lib
from drirl_jax import endpoint, metrics, sharding, train, workdirs
from drirl_jax.attacks import autodan, gcg, options, pair, templates
from drirl_jax.attacks.target import Outcome, Target
from drirl_jax.config import need
from drirl_jax.data import records
from drirl_jax.data.records import Record
from drirl_jax.evals.judges import JUDGES, UNSAFE, Setting
from drirl_jax.intervals import wilson
from drirl_jax.models import hf

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
        need(chosen and not unknown, f"{key} names {', '.join(unknown) or 'nothing'}: choose among {', '.join(table)}.")
    if "autodan" in names:
        need(o.autodan.templates, "AutoDAN needs templates: name a file of them in options.autodan.templates.")
        autodan.templates(o.autodan.templates)
    if "selfcipher" in names and o.selfcipher.demonstrations:
        templates.demonstrations(o.selfcipher.demonstrations)
    if asks_attacker(names, o):
        endpoint.check(o.attacker)
        need(jax.process_count() == 1, "PAIR and AutoDAN's mutation ask a server: run them in one process.")


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
    need(found, f"the data has no harmful prompt in split {split!r}: see options.split.")
    return found[:limit] if limit else found


def config_of(model: str, given: ConfigDict | None) -> ConfigDict:
    """The config under which the model is loaded: its run's own, or the given one with this model."""
    aligned = pathlib.Path(model) / "aligned"
    is_run = aligned.is_dir()
    need(not (is_run and given), f"--model {model} is a run, which has a config of its own: leave --config out.")
    config = workdirs.recall(pathlib.Path(model)) if is_run else given or config_lib.default()
    config.policy.init = str(aligned) if is_run else model
    return config


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
    config = config_of(model, given)
    sharding.connect(config.distributed)
    check(names, o)
    rows = records.read(data, config.data.categories, optional=("draft", "response"))
    rows = chosen(rows, config.data.harmless, o.split, limit)
    jax.set_mesh(sharding.mesh_of(config.mesh, [o.batch, o.gcg.width], jax.devices()))
    attacker = endpoint.Endpoint(o.attacker, workdir / "attacker.jsonl") if asks_attacker(names, o) else None
    target = Target(*train.load_policy(config), o, judges_of(config, o, workdir), attacker)
    if sharding.writes():
        said = {"model": config.policy, "data": data, "categories": config.data.categories, "options": o}
        workdirs.remember(ConfigDict(said), workdir)
    return run(target, rows, names, workdir)


def judges_of(config: ConfigDict, o: ConfigDict, workdir: pathlib.Path) -> dict[str, Callable[[str, str], bool]]:
    """By name, (prompt, response) -> whether it is safe: of options.judges, as config.evals says."""
    setting = Setting(config, workdir / "judgements.jsonl", lambda: hf.resolve(config.encoder.init))

    def safe(judge):
        return lambda prompt, response: bool(judge.harm([prompt], [response])[0] <= UNSAFE)

    return {name: safe(JUDGES[name].make(setting)) for name in o.judges}


def run(target: Target, rows: Sequence[Record], names: Sequence[str], workdir: pathlib.Path) -> list["Rate"]:
    """Every attack on every prompt that has no result yet, in workdir/ATTACK.jsonl; the rates of all, in table.md."""
    for attack in names:
        path = workdir / f"{attack}.jsonl"
        done = {result["id"] for result in results(path)}
        left = [row for row in rows if not sharding.agreed(row.id in done)]
        progress = metrics.Progress(attack, len(rows), len(rows) - len(left), sharding.writes())
        began = time.perf_counter()
        for row, outcome in zip(left, ATTACKS[attack](target, left)):
            now = time.perf_counter()
            safe = {name: bool(judge(row.prompt, outcome.response)) for name, judge in target.judges.items()}
            told = {"category": row.category, "prompt": row.prompt, "safe": safe, "seconds": now - began}
            if sharding.writes():
                with path.open("a") as file:
                    file.write(json.dumps(outcome._asdict() | told) + "\n")
            began = now
            progress.show({"queries": outcome.queries})
        progress.close()
    if not sharding.writes():
        return []
    ids = {row.id for row in rows}
    rates = [
        rate
        for name in names
        for rate in rates_of(name, [result for result in results(workdir / f"{name}.jsonl") if result["id"] in ids])
    ]
    (workdir / "table.md").write_text(table(rates))
    return rates


def results(path: pathlib.Path) -> list[dict]:
    """The results that a run has left; a last line that was torn as it was killed is cut off."""
    if path.exists() and sharding.writes():
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)
    return metrics.read(path)


class Rate(NamedTuple):
    """How often an attack had success by a judge, which is that it does not find the response safe.

    Attributes:
        category: of the prompts; "all" for all.
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
            successes = sum(not result["safe"][judge] for result in of)
            cost = (float(np.mean([result[key] for result in of])) for key in ("queries", "seconds"))
            rates.append(Rate(name, judge, category, successes, len(of), *wilson(successes, len(of)), *cost))
    return rates


def table(rates: Sequence[Rate]) -> str:
    """The rates in Markdown."""
    lines = ["| attack | judge | category | success | 95% interval | prompts | queries | seconds |", "|" + " --- |" * 8]
    for of in rates:
        share, interval = of.successes / of.prompts, f"{of.low:.1%} to {of.high:.1%}"
        lines.append(
            f"| {of.attack} | {of.judge} | {of.category} | {share:.1%} | {interval} | {of.successes}/{of.prompts} | "
            f"{of.queries:.1f} | {of.seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"
