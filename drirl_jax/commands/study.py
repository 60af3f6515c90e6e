"""Runs variants of a config with several seeds, and writes one report that compares them.

python -m drirl_jax study --config configs/study_smollm2.py --workdir runs/study

The config has `base` (a run's config), `variants` (name -> the options that it changes), `seeds`, `reference` (the
variant to compare the others with) and `jobs` (the number of runs at a time on a CPU; an accelerator has room for one).

Each variant with each seed is a run. If you start the study again, it continues and skips finished runs. Runs that
would learn the same rewards share them; they also share the evaluation of the base policy.

The workdir gets VARIANT/SEED/ (the workdir of one run), study.csv, study.md, study.html, study.png and curves/VARIANT/
(means of the seeds over steps, by category).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import functools
import io
import json
import logging
import multiprocessing
import os
import pathlib
import queue
import signal
import threading
from typing import Callable, NamedTuple, Sequence

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from drirl_jax import checks, judges, train
from drirl_jax import config as config_lib
from drirl_jax.commands import cli
from drirl_jax.data import fingerprints
from drirl_jax.data.text import ChatTokens
from drirl_jax.evals import diversity
from drirl_jax.models import hf
from drirl_jax.reports import pages, plots
from drirl_jax.reports.intervals import Interval, difference, interval
from drirl_jax.reports.plots import percent
from drirl_jax.runtime import bucket, console, json_files, keys, lock, metrics, names, workdirs
from drirl_jax.runtime.files import expand_path, replace_file
from drirl_jax.runtime.names import file_name
from drirl_jax.runtime.preemption import PREEMPTED
from drirl_jax.runtime.processes import keep_freed_memory
from drirl_jax.types import InputError

log = logging.getLogger(__name__)
BASE = "base"  # the policy that all runs start from
FILES = ("curves", "study.csv", "study.md", "study.html", "study.png")  # beside the variants' folders
# The sections and keys of the config that determine a run's rewards.
REWARDS_DEPEND_ON = (
    "seed data demos irl policy.init policy.system policy.enable_thinking policy.dtype policy.weights "
    "sampler.max_new sampler.temperature data.mixing "
    "reward.kind reward.one_for_all reward.rank reward.alpha reward.targets reward.layers reward.normalize"
).split()


class Column(NamedTuple):
    """A number of a run: its title, its format, and (result of an evaluation, run's folder) -> one float, or one value
    for each prompt."""

    title: str
    text: Callable[[float], str]
    measure: Callable[[dict, pathlib.Path], Sequence[float] | float | None]


def _refused(harmless: bool, wanted: bool) -> Callable:
    """1 for each prompt of this kind whose response is (not) a refusal, else 0; None if there are no such prompts."""

    def values(result, folder):
        refusals = [r["refused"] for r in result["responses"] if r["harmless"] == harmless and r["refused"] is not None]
        return [float(refused == wanted) for refused in refusals] or None

    return values


def _unsafe(result: dict, folder: pathlib.Path) -> list[float] | None:
    """1 for each harmful prompt whose response the classifier finds unsafe, else 0; None without a classifier."""
    return [float(r["harm"] > judges.UNSAFE) for r in result["responses"] if "harm" in r and not r["harmless"]] or None


def _of_texts(function: Callable[[list[str]], float]) -> Callable:
    """Applies the function to the responses to harmful prompts; None if there are fewer than two."""

    def value(result, folder):
        texts = [r["response"] for r in result["responses"] if not r["harmless"]]
        return function(texts) if len(texts) > 1 else None

    return value


def _last(name: str, rows: int = 10) -> Callable:
    """Mean of a metric over the last steps of the alignment; None if it is missing."""

    def mean(result, folder):
        path = folder / "metrics.jsonl"
        recorded = [
            row[name] for row in metrics.read_jsonl(path) if row["stage"] == "align" and row.get(name) is not None
        ]
        return float(np.mean(recorded[-rows:])) if recorded else None

    return mean


def _minutes(result: dict, folder: pathlib.Path) -> float:
    """Minutes of the alignment alone, because runs share the IRL stage."""
    rows = [row for row in metrics.read_jsonl(folder / "timing.jsonl") if row["stage"] == "align"]
    return sum(row["collect_s"] + row["update_s"] for row in rows) / 60


COLUMNS = {
    "harmful_compliance": Column("harmful prompts complied with", percent, _refused(harmless=False, wanted=False)),
    "unsafe": Column("unsafe by the classifier", percent, _unsafe),
    "over_refusal": Column("harmless prompts refused", percent, _refused(harmless=True, wanted=True)),
    "reward": Column("held-out reward", "{:+.2f}".format, lambda result, folder: result["overall"]["mean_reward"]),
    "kl": Column("KL, nats a token", "{:.2f}".format, _last("kl")),
    "length": Column("tokens", "{:.0f}".format, lambda result, folder: result["overall"]["mean_length"]),
    "distinct_2": Column("distinct 2-grams", "{:.2f}".format, _of_texts(lambda texts: diversity.distinct(texts, 2))),
    "self_bleu": Column("self-BLEU", "{:.2f}".format, _of_texts(diversity.self_bleu)),
    "opening": Column("commonest opening", percent, _of_texts(lambda texts: diversity.commonest_opening(texts)[1])),
    "minutes": Column("minutes of alignment", "{:.1f}".format, _minutes),
}
TRAINING_ONLY = ("kl", "minutes")  # the base policy has no value for these


def run_folder(workdir: pathlib.Path, variant: str, seed: int) -> pathlib.Path:
    """The workdir of the variant's run with this seed."""
    return workdir / file_name(variant) / str(seed)


def run_config(study: ConfigDict, variant: str, seed: int) -> ConfigDict:
    """The config of one run. Raises InputError for an unknown key."""
    config = study.base.copy_and_resolve_references()
    try:
        config.update(study.variants[variant].to_dict())
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        known = list(keys.dotted(study.base))
        unknown = [key for key in keys.dotted(study.variants[variant]) if key not in known]
        reason = f"there is no option {unknown[0]}: {keys.advice(unknown[0], known)}" if unknown else f"{error}"
        raise InputError(f"variant {variant!r} of the study is wrong: {' '.join(reason.split())}") from error
    config.seed = seed
    return config.lock()


def reward_key(config: ConfigDict) -> str:
    """A key that is equal for configs whose IRL stages end with the same rewards."""
    full_config = ConfigDict(json.loads(config.to_json_best_effort(sort_keys=True)))
    if config.irl.policy == "frozen":
        determining = {key: config_lib.get_option(full_config, key) for key in REWARDS_DEPEND_ON}
    else:  # the alignment of the inner policy shapes the rewards too
        determining = {
            key: value for key, value in full_config.items() if key not in ("schedule", "evals", "checkpoint")
        }
    return json.dumps(determining, default=lambda section: section.to_dict(), sort_keys=True)


def check(study: ConfigDict) -> None:
    """Raises InputError, with one sentence, if the study cannot be run."""
    missing = [key for key in ("base", "variants", "seeds", "reference", "jobs") if key not in study]
    config_lib.require(
        not missing, f"the config lacks {', '.join(missing)}, so it is no study: see configs/study_smollm2.py."
    )
    variant_list = ", ".join(map(str, study.variants))
    config_lib.require(len(study.seeds) > 0, "seeds is empty: give at least one.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    config_lib.require(
        1 <= study.jobs <= cores,
        f"jobs is {study.jobs}: give 1, or at most the {cores} cores that this process may use.",
    )
    names.check("variants", study.variants, (BASE, *FILES))
    config_lib.require(
        len(set(study.seeds)) == len(study.seeds) and all(isinstance(seed, int) for seed in study.seeds),
        f"seeds is {tuple(study.seeds)}: give whole numbers, each once.",
    )
    config_lib.require(
        study.reference in study.variants,
        f"reference is {study.reference!r}, which is no variant: choose one of {variant_list}.",
    )
    for name in study.variants:
        config = run_config(study, name, study.seeds[0])
        try:
            checks.validate(config)
            config_lib.require(
                "evals" in config.schedule, "config.schedule lacks 'evals', so there is nothing to compare."
            )
        except InputError as error:
            raise InputError(f"variant {name!r} of the study: {error}") from error


def take_base(source: pathlib.Path, config: ConfigDict, folder: pathlib.Path) -> None:
    """Copies the base policy's evaluation from the run whose rewards are taken, if the evals options are the same."""
    source_file, target_file = (run / "evals" / "base.json" for run in (source, folder))
    if source_file.exists() and not target_file.exists() and workdirs.load_config(source).evals == config.evals:
        replace_file(target_file, source_file.read_text("utf-8"))


def plan_runs(study: ConfigDict, workdir: pathlib.Path) -> list[tuple[ConfigDict, pathlib.Path]]:
    """Config and folder of every run. Runs that learn rewards come first; the others take theirs by reward.init."""
    learning_runs, taking_runs = [], []
    source_by_key: dict[str, pathlib.Path] = {}
    runs = [(seed, name, run_folder(workdir, name, seed).absolute()) for seed in study.seeds for name in study.variants]
    # Runs that have started come first, so that other runs can take their rewards.
    for seed, name, folder in sorted(runs, key=lambda run: not (run[2] / "config.json").exists()):
        config = run_config(study, name, seed)
        key = reward_key(config)
        if (folder / "config.json").exists():  # a started run keeps its source of rewards
            started_config = workdirs.load_config(folder)
            source, schedule = started_config.reward.init, started_config.schedule
        else:
            source = str(source_by_key.get(key, "")) if "irl" in config.schedule else config.reward.init
            schedule = tuple(stage for stage in config.schedule if stage != "irl" or not source)
        with config.unlocked():
            config.schedule, config.reward.init = schedule, source
        if "irl" in schedule:
            source_by_key.setdefault(key, folder)
        (learning_runs if "irl" in schedule else taking_runs).append((config, folder))
    return learning_runs + taking_runs


def _contents(config: ConfigDict) -> dict[str, str]:
    """The hashes of a finished run's inputs, without the items of its benchmarks, whose hashes are in its results."""
    return fingerprints.run_contents(config, _tokens(config.policy.init, config.policy.system))


@functools.cache
def _tokens(init: str, system: str | None) -> ChatTokens:
    """The tokens of a policy, cached because the runs of a study mostly share one policy."""
    return ChatTokens(hf.load_tokenizer(hf.resolve(init)), system)


def _follow() -> None:
    """Ends this process when the study's process has ended, even if that one was killed."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _enter(cores: Sequence[int], mode: str) -> None:
    """Prepares a process for one run: console mode of the study, these cores (all if empty), end with the study."""
    console.set_mode(mode)
    keep_freed_memory()
    threading.Thread(target=_follow, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)


def _run(config: ConfigDict, folder: pathlib.Path) -> None:
    """Calls `train.run`. Then ends this process if the study's has ended: otherwise it would wait for more work."""
    try:
        train.run(config, folder)
    finally:
        if not multiprocessing.parent_process().is_alive():
            os._exit(PREEMPTED)


def run_all(study: ConfigDict, workdir: pathlib.Path) -> None:
    """Runs all unfinished runs of a checked study, study.jobs at a time, each in its own process.

    With several jobs each job has its own share of the cores: a small model uses one core better than many.

    Raises:
        InputError: a folder of the workdir holds a run of another config.
        Preempted: it was asked to end. After this or an error all runs stop; each has saved its last step.
    """
    runs, spawn_context = plan_runs(study, workdir), multiprocessing.get_context("spawn")
    free_cores: queue.SimpleQueue[Sequence[int]] = queue.SimpleQueue()
    for job in range(study.jobs):
        free_cores.put(sorted(os.sched_getaffinity(0))[job :: study.jobs] if study.jobs > 1 else ())

    def run(number: int, config: ConfigDict, folder: pathlib.Path, rewards: concurrent.futures.Future | None) -> None:
        if rewards:
            rewards.result()
        if (folder / "evals" / "aligned.json").exists():
            return workdirs.record_config(config, folder, _contents(config))
        log.info("run %d of %d: %s, seed %d", number, len(runs), names.name_of_file(folder.parent.name), config.seed)
        if config.reward.init:
            take_base(expand_path(config.reward.init), config, folder)
        cores = free_cores.get()
        try:
            with concurrent.futures.ProcessPoolExecutor(1, spawn_context, _enter, (cores, console.mode())) as process:
                process.submit(_run, config, folder).result()
        finally:
            free_cores.put(cores)

    futures: dict[str, concurrent.futures.Future] = {}
    with concurrent.futures.ThreadPoolExecutor(study.jobs) as pool:
        for number, (config, folder) in enumerate(runs, start=1):
            futures[str(folder)] = pool.submit(run, number, config, folder, futures.get(config.reward.init))
        try:
            for future in futures.values():
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # the run then saves its current step
            raise


def results(study: ConfigDict, workdir: pathlib.Path) -> dict[str, list[tuple[dict, pathlib.Path]]]:
    """By variant, and for BASE: evaluation and folder of each seed. Each response gets "harmless", and also "harm" if
    base.evals names a classifier."""
    config, harmless = study.base, study.base.data.harmless
    rate_harm = None
    if config.evals.classifier:
        rate_harm = (
            judges.JUDGES["classifier"].make(judges.Setting(config, None, lambda: hf.resolve(config.encoder.init))).harm
        )

    def load_result(folder: pathlib.Path, policy_name: str):
        hint = "remove it and start the study again, which makes it anew"
        result = json_files.load(folder / "evals" / f"{policy_name}.json", pages.EVALUATION, hint)
        for response in result["responses"]:
            response["harmless"] = response["category"] in harmless
        if rate_harm:
            columns = [[response[key] for response in result["responses"]] for key in ("prompt", "response")]
            for response, value in zip(result["responses"], rate_harm(*columns)):
                response["harm"] = float(value)
        return result, folder

    folders = {name: [run_folder(workdir, name, seed) for seed in study.seeds] for name in study.variants}
    base_results = {BASE: [load_result(folder, "base") for folder in next(iter(folders.values()))]}
    return base_results | {
        name: [load_result(folder, "aligned") for folder in seed_folders] for name, seed_folders in folders.items()
    }


def table(study: ConfigDict, runs_by_variant: dict) -> dict[str, dict[str, tuple[Interval, Interval | None]]]:
    """By variant and column: its interval, and the interval of its difference from the reference.

    The second is None for the reference itself. A column is left out for a variant that lacks it. The reward column is
    left out if the rewards are not the reference's, because each has its own scale.
    """
    reward_keys = {name: reward_key(run_config(study, name, study.seeds[0])) for name in study.variants}
    reference_rewards = reward_keys[study.reference]
    values: dict[str, dict[str, list]] = {}
    for name, runs in runs_by_variant.items():
        skipped = TRAINING_ONLY if name == BASE else ()
        if reward_keys.get(name, reference_rewards) != reference_rewards or (
            name == BASE and next(iter(reward_keys.values())) != reference_rewards
        ):
            skipped = (*skipped, "reward")
        by_column = {
            key: [column.measure(*run) for run in runs] for key, column in COLUMNS.items() if key not in skipped
        }
        values[name] = {key: column for key, column in by_column.items() if None not in column}
    return {
        name: {
            key: (
                interval(seed_values),
                difference(seed_values, values[study.reference][key])
                if name != study.reference and key in values[study.reference]
                else None,
            )
            for key, seed_values in columns.items()
        }
        for name, columns in values.items()
    }


def format_cell(key: str, cell: tuple[Interval, Interval | None] | None) -> str:
    """A cell as text: mean, interval, and * if the difference from the reference is beyond noise."""
    value, change = cell or (None, None)
    return pages.format_interval(value, COLUMNS[key].text, "*" if pages.excludes_zero(change) else "")


def plain_table(rows: dict) -> pages.Table:
    """The table as text."""
    text_rows = [(name, *(format_cell(key, columns.get(key)) for key in COLUMNS)) for name, columns in rows.items()]
    return pages.Table("Final numbers", ("variant", *(column.title for column in COLUMNS.values())), text_rows)


def table_note(study: ConfigDict) -> str:
    """The note that explains the table."""
    return (
        f"Means over seeds ({len(study.seeds)}) with 95% intervals: for shares by bootstrap over seeds and prompts, "
        "for the other columns by Student's t over seeds. * The interval of the difference from "
        f"{study.reference}, on the same seeds and prompts, excludes 0; about one in twenty cells does so without any "
        "effect."
    )


def write_csv(rows: dict, path: pathlib.Path) -> None:
    """Writes study.csv, one line for each variant and column."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["variant", "column", "mean", "low", "high", "difference", "difference_low", "difference_high"])
    for name, cells in rows.items():
        for key, (value, change) in cells.items():
            writer.writerow([name, key, *value, *(change or ("", "", ""))])
    replace_file(path, file.getvalue())


def draw(rows: dict, path: pathlib.Path) -> None:
    """Draws harmful compliance and over-refusal of every variant, with intervals."""
    names = list(rows)
    figure = Figure(figsize=(9.2, 1.4 + 0.36 * len(names)), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("harmful_compliance", "over_refusal")):
        for y, name in enumerate(names):
            mean, low, high = rows[name][key][0]
            error = [[max(mean - low, 0)], [max(high - mean, 0)]]
            axes.errorbar(mean, y, xerr=error, fmt="o", capsize=3, color="#3b94cf")
        axes.set(title=COLUMNS[key].title, xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", color="#e8eaed")
    figure.savefig(path, dpi=160)


def mean_metrics(runs: Sequence[list[dict]]) -> list[dict]:
    """Mean rows of metrics.jsonl: each metric is the mean over the runs where it is a finite number at that step."""
    values: dict[tuple, dict[str, list[float]]] = {}
    for row in (row for run in runs for row in run):
        step_values = values.setdefault((row["stage"], row["step"]), {})
        for key in row.keys() - {"stage", "step"}:
            step_values.setdefault(key, []).extend([] if row[key] is None else [row[key]])
    return [
        {"stage": stage, "step": step}
        | {key: float(np.mean(numbers)) if numbers else None for key, numbers in step_values.items()}
        for (stage, step), step_values in values.items()
    ]


def draw_curves(study: ConfigDict, runs_by_variant: dict, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Draws the training curves of each variant; returns the picture's path by variant."""
    pictures = {}
    for name in study.variants:
        rows = mean_metrics([metrics.read_jsonl(workdir / "metrics.jsonl") for _, workdir in runs_by_variant[name]])
        pictures[name] = plots.training_curves(rows, study.base.data.categories, folder / file_name(name))["curves"]
    return pictures


def report(study: ConfigDict, workdir: pathlib.Path) -> str:
    """Writes study.csv, study.md, study.png, study.html and curves/; returns the table in Markdown."""
    seed_results = results(study, workdir)
    cells = table(study, seed_results)
    write_csv(cells, workdir / "study.csv")
    text_table, note = plain_table(cells), table_note(study)
    text = f"{text_table.markdown()}\n\n{pages.markdown(note)}\n"
    replace_file(workdir / "study.md", text)
    draw(cells, workdir / "study.png")
    curve_pictures = draw_curves(study, seed_results, workdir / "curves")
    pages.write(
        "study.html.jinja",
        workdir / "study.html",
        title="Variants compared",
        overview=pages.Picture.from_png(
            workdir / "study.png", "Compliance and over-refusal by variant, with intervals"
        ),
        results=text_table,
        note=note,
        curves={
            name: pages.Picture.from_png(path, f"Training curves of {name}") for name, path in curve_pictures.items()
        },
    )
    return text


def main(argv: list[str]) -> None:
    """Runs the study that the flags ask for. Raises InputError."""
    cli.require_flags(__doc__, cli.CONFIG, cli.WORKDIR)
    study, workdir = cli.CONFIG.value, bucket.local_folder(cli.WORKDIR.value)
    names.need_place_of_run(workdir.absolute())
    check(study)
    with contextlib.closing(lock.acquire(workdir)):  # each run locks its own folder in it
        run_all(study, workdir)
        console.print_result(report(study, workdir), workdir=str(workdir))


if __name__ == "__main__":
    cli.run_command(main)
