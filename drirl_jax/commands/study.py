"""Variants of a config x seeds, each a run of its own, and one report that compares them.

python -m drirl_jax study --config configs/study_smollm2.py --workdir runs/study

The config has `base` (a run's config), `variants` (by name, what each changes), `seeds`, `reference`, the variant that
the others are compared with, and `jobs`, how many run at a time (on a CPU: an accelerator has room for one). Started
again it goes on: what is finished is not run again. Runs whose rewards would be the same share them, and the evaluation
of the base. Left in the workdir: VARIANT/SEED/ (each run's own), study.csv, study.md, study.html, study.png, and
curves/VARIANT/ (the mean of the seeds over steps, by category).
"""

from __future__ import annotations

import concurrent.futures
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
from drirl_jax import main as command
from drirl_jax.data import fingerprints
from drirl_jax.data.text import ChatTokens
from drirl_jax.evals import diversity
from drirl_jax.models import hf
from drirl_jax.reports import pages, plots
from drirl_jax.reports.intervals import Interval, difference, interval
from drirl_jax.reports.plots import percent
from drirl_jax.runtime import bucket, console, json_files, metrics, names, workdirs
from drirl_jax.runtime.files import expand_path, replace_file
from drirl_jax.runtime.names import file_name
from drirl_jax.runtime.preemption import PREEMPTED
from drirl_jax.runtime.processes import keep_freed_memory
from drirl_jax.types import InputError

log = logging.getLogger(__name__)
BASE = "base"  # the policy that all runs start from
FILES = ("curves", "study.csv", "study.md", "study.html", "study.png")  # what lies beside the variants' folders
# Sections and keys of the config that the rewards of a run depend on.
REWARDS_DEPEND_ON = (
    "seed data demos irl policy.init policy.system policy.enable_thinking policy.dtype policy.weights "
    "sampler.max_new sampler.temperature sampler.batch "
    "reward.kind reward.one_for_all reward.rank reward.alpha reward.targets reward.layers reward.normalize"
).split()


class Column(NamedTuple):
    """A number of a run: its title, how it is written, and (result of an evaluation, run's folder) -> float, or one
    value for each prompt."""

    title: str
    text: Callable[[float], str]
    of: Callable[[dict, pathlib.Path], Sequence[float] | float | None]


def _refused(harmless: bool, wanted: bool) -> Callable:
    """1 for each prompt of the kind whose response is (not) a refusal; None where there are no such prompts."""

    def of(result, folder):
        told = [r["refused"] for r in result["responses"] if r["harmless"] == harmless and r["refused"] is not None]
        return [float(refused == wanted) for refused in told] or None

    return of


def _unsafe(result: dict, folder: pathlib.Path) -> list[float] | None:
    """1 for each harmful prompt whose response the classifier finds unsafe; None where none was asked."""
    return [float(r["harm"] > judges.UNSAFE) for r in result["responses"] if "harm" in r and not r["harmless"]] or None


def _of_texts(function: Callable[[list[str]], float]) -> Callable:
    """The function of the responses to harmful prompts, None unless there are two."""

    def of(result, folder):
        texts = [r["response"] for r in result["responses"] if not r["harmless"]]
        return function(texts) if len(texts) > 1 else None

    return of


def _last(name: str, rows: int = 10) -> Callable:
    """Mean of a scalar over the last steps of the alignment; None where there is none."""

    def of(result, folder):
        path = folder / "metrics.jsonl"
        found = [row[name] for row in metrics.read_jsonl(path) if row["stage"] == "align" and row.get(name) is not None]
        return float(np.mean(found[-rows:])) if found else None

    return of


def _minutes(result: dict, folder: pathlib.Path) -> float:
    """Of the alignment alone, as runs share the IRL stage."""
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
TRAINING_ONLY = ("kl", "minutes")  # which the base does not have


def folder_of(workdir: pathlib.Path, variant: str, seed: int) -> pathlib.Path:
    """Where the variant's run with this seed is."""
    return workdir / file_name(variant) / str(seed)


def config_of(study: ConfigDict, variant: str, seed: int) -> ConfigDict:
    """The run's own config. Raises InputError for a key that no config has."""
    config = study.base.copy_and_resolve_references()
    try:
        config.update(study.variants[variant].to_dict())
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"variant {variant!r} of the study is wrong: {' '.join(str(error).split())}") from error
    config.seed = seed
    return config.lock()


def reward_key(config: ConfigDict) -> str:
    """Equal for configs whose IRL stages end with the same rewards."""
    whole = ConfigDict(json.loads(config.to_json_best_effort(sort_keys=True)))
    if config.irl.policy == "frozen":
        parts = {key: config_lib.get_option(whole, key) for key in REWARDS_DEPEND_ON}
    else:  # the inner policy's alignment shapes them too
        parts = {key: value for key, value in whole.items() if key not in ("schedule", "evals", "checkpoint")}
    return json.dumps(parts, default=lambda section: section.to_dict(), sort_keys=True)


def check(study: ConfigDict) -> None:
    """Raises InputError with one sentence for a study that cannot be run."""
    missing = [key for key in ("base", "variants", "seeds", "reference", "jobs") if key not in study]
    config_lib.require(
        not missing, f"the config lacks {', '.join(missing)}, so it is no study: see configs/study_smollm2.py."
    )
    known = ", ".join(map(str, study.variants))
    config_lib.require(len(study.seeds) > 0, "seeds is empty: give at least one.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    config_lib.require(
        1 <= study.jobs <= cores,
        f"jobs is {study.jobs}: give 1, or at most the {cores} cores that this process may use and give away.",
    )
    names.check("variants", study.variants, (BASE, *FILES))
    config_lib.require(
        len(set(study.seeds)) == len(study.seeds) and all(isinstance(seed, int) for seed in study.seeds),
        f"seeds is {tuple(study.seeds)}: give whole numbers, each once.",
    )
    config_lib.require(
        study.reference in study.variants,
        f"reference is {study.reference!r}, which is no variant: choose one of {known}.",
    )
    for name in study.variants:
        config = config_of(study, name, study.seeds[0])
        try:
            checks.validate(config)
            config_lib.require(
                "evals" in config.schedule, "config.schedule lacks 'evals', so there is nothing to compare."
            )
        except InputError as error:
            raise InputError(f"variant {name!r} of the study: {error}") from error


def take_base(source: pathlib.Path, config: ConfigDict, folder: pathlib.Path) -> None:
    """Copies the evaluation of the untrained policy from the run whose rewards are taken, where it is the same."""
    evaluated, here = (run / "evals" / "base.json" for run in (source, folder))
    if evaluated.exists() and not here.exists() and workdirs.load_config(source).evals == config.evals:
        replace_file(here, evaluated.read_text("utf-8"))


def planned(study: ConfigDict, workdir: pathlib.Path) -> list[tuple[ConfigDict, pathlib.Path]]:
    """Config and folder of every run, those that learn rewards first; the others' reward.init names what they take."""
    learn, take = [], []
    learned: dict[str, pathlib.Path] = {}
    runs = [(seed, name, folder_of(workdir, name, seed).absolute()) for seed in study.seeds for name in study.variants]
    # Those that were begun come first: others may take the rewards that they have learned.
    for seed, name, folder in sorted(runs, key=lambda run: not (run[2] / "config.json").exists()):
        config = config_of(study, name, seed)
        key = reward_key(config)
        if (folder / "config.json").exists():  # it keeps the rewards that it took then
            theirs = workdirs.load_config(folder)
            source, schedule = theirs.reward.init, theirs.schedule
        else:
            source = str(learned.get(key, "")) if "irl" in config.schedule else config.reward.init
            schedule = tuple(stage for stage in config.schedule if stage != "irl" or not source)
        with config.unlocked():
            config.schedule, config.reward.init = schedule, source
        if "irl" in schedule:
            learned.setdefault(key, folder)
        (learn if "irl" in schedule else take).append((config, folder))
    return learn + take


def _contents(config: ConfigDict) -> dict[str, str]:
    """The hash of what a finished run was made of, but for the items of its benchmarks, which are in its results."""
    return fingerprints.run_contents(config, _tokens(config.policy.init, config.policy.system))


@functools.cache
def _tokens(init: str, system: str | None) -> ChatTokens:
    """Of a policy; runs of a study mostly share one."""
    return ChatTokens(hf.load_tokenizer(hf.resolve(init)), system)


def _follow() -> None:
    """Asks this process to end when the study is no more, even if it was killed."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _enter(cores: Sequence[int], mode: str) -> None:
    """Leaves these cores to the process, all if none are named; it speaks as the study does, and ends with it."""
    console.set_mode(mode)
    keep_freed_memory()
    threading.Thread(target=_follow, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)


def _run(config: ConfigDict, folder: pathlib.Path) -> None:
    """`train.run`, and the end of this process where the study is no more: it would wait for more to do."""
    try:
        train.run(config, folder)
    finally:
        if not multiprocessing.parent_process().is_alive():
            os._exit(PREEMPTED)


def run_all(study: ConfigDict, workdir: pathlib.Path) -> None:
    """Runs what is not finished, study.jobs at a time, each in its own process.

    Of several jobs each has its share of the cores for itself: a small model keeps one core busier than many.

    Raises:
        InputError: see `check`; or a folder of the workdir holds a run of another config.
        Preempted: it was asked to end. After this or an error no run goes on; all have kept their last step.
    """
    check(study)
    runs, fresh = planned(study, workdir), multiprocessing.get_context("spawn")
    free: queue.SimpleQueue[Sequence[int]] = queue.SimpleQueue()
    for job in range(study.jobs):
        free.put(sorted(os.sched_getaffinity(0))[job :: study.jobs] if study.jobs > 1 else ())

    def run(number: int, config: ConfigDict, folder: pathlib.Path, rewards: concurrent.futures.Future | None) -> None:
        if rewards:
            rewards.result()
        if (folder / "evals" / "aligned.json").exists():
            return workdirs.record_config(config, folder, _contents(config))
        log.info("run %d of %d: %s, seed %d", number, len(runs), names.name_of_file(folder.parent.name), config.seed)
        if config.reward.init:
            take_base(expand_path(config.reward.init), config, folder)
        cores = free.get()
        try:
            with concurrent.futures.ProcessPoolExecutor(1, fresh, _enter, (cores, console.mode())) as process:
                process.submit(_run, config, folder).result()
        finally:
            free.put(cores)

    begun: dict[str, concurrent.futures.Future] = {}
    with concurrent.futures.ThreadPoolExecutor(study.jobs) as pool:
        for number, (config, folder) in enumerate(runs, start=1):
            begun[str(folder)] = pool.submit(run, number, config, folder, begun.get(config.reward.init))
        try:
            for one in begun.values():
                one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # which has its run keep the step at work
            raise


def results(study: ConfigDict, workdir: pathlib.Path) -> dict[str, list[tuple[dict, pathlib.Path]]]:
    """By variant, and for BASE, the evaluation and the folder of each seed, its responses told harmless or not; and
    how harmful, if base.evals names a classifier."""
    config, harmless = study.base, study.base.data.harmless
    harm = None
    if config.evals.classifier:
        harm = (
            judges.JUDGES["classifier"].make(judges.Setting(config, None, lambda: hf.resolve(config.encoder.init))).harm
        )

    def read(folder: pathlib.Path, which: str):
        hint = "remove it and start the study again, which makes it anew"
        result = json_files.load(folder / "evals" / f"{which}.json", pages.EVALUATION, hint)
        for response in result["responses"]:
            response["harmless"] = response["category"] in harmless
        if harm:
            said = [[response[key] for response in result["responses"]] for key in ("prompt", "response")]
            for response, value in zip(result["responses"], harm(*said)):
                response["harm"] = float(value)
        return result, folder

    folders = {name: [folder_of(workdir, name, seed) for seed in study.seeds] for name in study.variants}
    found = {BASE: [read(folder, "base") for folder in next(iter(folders.values()))]}
    return found | {name: [read(folder, "aligned") for folder in of] for name, of in folders.items()}


def table(study: ConfigDict, found: dict) -> dict[str, dict[str, tuple[Interval, Interval | None]]]:
    """By variant and column: its interval, and that of its difference from the reference.

    The latter is None of the reference itself; what one of them does not have is left out; so are rewards that are
    others than the reference's, as each has its own scale.
    """
    keys = {name: reward_key(config_of(study, name, study.seeds[0])) for name in study.variants}
    rewards = keys[study.reference]
    values: dict[str, dict[str, list]] = {}
    for name, runs in found.items():
        skipped = TRAINING_ONLY if name == BASE else ()
        if keys.get(name, rewards) != rewards or (name == BASE and keys[next(iter(keys))] != rewards):
            skipped = (*skipped, "reward")
        of = {key: [column.of(*run) for run in runs] for key, column in COLUMNS.items() if key not in skipped}
        values[name] = {key: column for key, column in of.items() if None not in column}
    return {
        name: {
            key: (
                interval(of),
                difference(of, values[study.reference][key])
                if name != study.reference and key in values[study.reference]
                else None,
            )
            for key, of in columns.items()
        }
        for name, columns in values.items()
    }


def told(key: str, cell: tuple[Interval, Interval | None] | None) -> str:
    """A cell as text: mean, interval, and * where the difference from the reference is beyond noise."""
    own, beside = cell or (None, None)
    return pages.told(own, COLUMNS[key].text, "*" if pages.beyond_noise(beside) else "")


def written(rows: dict) -> pages.Table:
    """The table as text."""
    cells = [(name, *(told(key, of.get(key)) for key in COLUMNS)) for name, of in rows.items()]
    return pages.Table("Final numbers", ("variant", *(column.title for column in COLUMNS.values())), cells)


def note_of(study: ConfigDict) -> str:
    """How to read the table."""
    return (
        f"Means over seeds ({len(study.seeds)}) with 95% intervals: of shares by bootstrap over seeds and prompts, of "
        "the other columns by Student's t over seeds. * The interval of the difference from "
        f"{study.reference}, on the same seeds and prompts, leaves out 0; of twenty cells without any effect one is to "
        "be expected to do so."
    )


def write_csv(rows: dict, path: pathlib.Path) -> None:
    """One line for each variant and column."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["variant", "column", "mean", "low", "high", "difference", "difference_low", "difference_high"])
    for name, cells in rows.items():
        for key, (own, beside) in cells.items():
            writer.writerow([name, key, *own, *(beside or ("", "", ""))])
    replace_file(path, file.getvalue())


def draw(rows: dict, path: pathlib.Path) -> None:
    """Harmful compliance and over-refusal of every variant with their intervals."""
    names = list(rows)
    figure = Figure(figsize=(9.2, 1.4 + 0.36 * len(names)), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("harmful_compliance", "over_refusal")):
        for y, name in enumerate(names):
            mean, low, high = rows[name][key][0]
            reach = [[max(mean - low, 0)], [max(high - mean, 0)]]
            axes.errorbar(mean, y, xerr=reach, fmt="o", capsize=3, color="#3b94cf")
        axes.set(title=COLUMNS[key].title, xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", color="#e8eaed")
    figure.savefig(path, dpi=160)


def mean_metrics(runs: Sequence[list[dict]]) -> list[dict]:
    """Rows of metrics.jsonl, each scalar the mean over the runs that have it there as a finite number."""
    values: dict[tuple, dict[str, list[float]]] = {}
    for row in (row for run in runs for row in run):
        of = values.setdefault((row["stage"], row["step"]), {})
        for key in row.keys() - {"stage", "step"}:
            of.setdefault(key, []).extend([] if row[key] is None else [row[key]])
    return [
        {"stage": stage, "step": step} | {key: float(np.mean(found)) if found else None for key, found in of.items()}
        for (stage, step), of in values.items()
    ]


def draw_curves(study: ConfigDict, found: dict, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """By variant, one picture of its training curves."""
    drawn = {}
    for name in study.variants:
        rows = mean_metrics([metrics.read_jsonl(of / "metrics.jsonl") for _, of in found[name]])
        drawn[name] = plots.training_curves(rows, study.base.data.categories, folder / file_name(name))["curves"]
    return drawn


def report(study: ConfigDict, workdir: pathlib.Path) -> str:
    """Writes study.csv, study.md, study.png, study.html and curves/; returns the table in Markdown."""
    found = results(study, workdir)
    cells = table(study, found)
    write_csv(cells, workdir / "study.csv")
    shown, note = written(cells), note_of(study)
    text = f"{shown.markdown()}\n\n{pages.markdown(note)}\n"
    replace_file(workdir / "study.md", text)
    draw(cells, workdir / "study.png")
    drawn = draw_curves(study, found, workdir / "curves")
    pages.write(
        "study.html.jinja",
        workdir / "study.html",
        title="Variants compared",
        overview=pages.Picture.of(workdir / "study.png", "Compliance and over-refusal by variant, with intervals"),
        results=shown,
        note=note,
        curves={name: pages.Picture.of(path, f"Training curves of {name}") for name, path in drawn.items()},
    )
    return text


def main(argv: list[str]) -> None:
    """The study that the flags ask for. Raises InputError."""
    for flag in (command.CONFIG, command.WORKDIR):
        if flag.value is None:
            raise InputError(f"--{flag.name} is missing: {__doc__.splitlines()[2]}")
    study, workdir = command.CONFIG.value, bucket.local_folder(command.WORKDIR.value)
    names.need_place_of_run(workdir.absolute())
    run_all(study, workdir)
    console.print_result(report(study, workdir), workdir=str(workdir))


if __name__ == "__main__":
    command.start(main)
