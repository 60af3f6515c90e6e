"""Compares runs: differences in their configs, final numbers, curves and responses."""

from __future__ import annotations

import pathlib
from typing import Iterator, Mapping, Sequence

from drirl_jax import judges
from drirl_jax.reports import plots
from drirl_jax.reports.intervals import over_prompts
from drirl_jax.reports.pages import (
    MEASURES,
    Measure,
    Picture,
    Prompt,
    Run,
    Table,
    answer_of,
    change_of,
    differences,
    format_change,
    format_interval,
    format_option,
    key_of,
    markdown,
    refusal_judge,
    values_of,
    write,
)
from drirl_jax.reports.plots import words
from drirl_jax.runtime.files import replace_file
from drirl_jax.types import InputError

SHOWN = 2  # prompts of a category
NOTE = (
    "Intervals are 95%: Wilson's for shares, Newcombe's for differences of shares, otherwise by bootstrap over "
    "prompts. Differences are from {first}, on the prompts that both runs were evaluated on; of shares in percentage "
    "points. * The interval excludes 0; about one in twenty does so without any effect. One run of a variant says "
    "nothing about other seeds. Rewards are shown only if they score the first run's responses before alignment as its "
    "rewards do: other rewards have a scale of their own."
)


def format_metric(metric: Mapping | None) -> str:
    """A benchmark's metric as text, with its interval (see `evals.benchmarks.interval`); a dash for None."""
    return f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})" if metric else "–"


def judge_label(judge: str, result: Mapping) -> str:
    """A judge's name with its known facts."""
    facts = judges.describe_facts(result.get("facts", {}))
    return f"{judge} ({facts})" if facts else judge


def run_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run: the shortest end of its path that makes all names different."""
    paths = [run.workdir.resolve().parts for run in runs]
    candidates = ([str(pathlib.Path(*path[-n:])) for path in paths] for n in range(1, max(map(len, paths)) + 1))
    return next((names for names in candidates if len(set(names)) == len(names)), [str(run.workdir) for run in runs])


def check(runs: Sequence[Run]) -> None:
    """Raises InputError, with one sentence, if the runs cannot be compared."""
    if len(runs) < 2:
        raise InputError("--compare has one run: give the workdirs of two or more.")
    if len({run.workdir.resolve() for run in runs}) < len(runs):
        raise InputError("--compare names a run twice: give each once.")
    for run in runs:
        if not (run.base and run.aligned):
            raise InputError(
                f"{run.workdir} has not been evaluated yet: end the run first, with 'evals' in its schedule."
            )
    prompt_sets = [{key_of(row) for row in run.aligned["responses"]} for run in runs]
    for run, prompts in zip(runs, prompt_sets):
        if not prompts & prompt_sets[0]:
            raise InputError(
                f"{run.workdir} was evaluated on no prompt of {runs[0].workdir}: compare runs of the same data."
            )


def same_rewards(run: Run, first: Run) -> bool:
    """Whether both runs' rewards give the first run's responses before alignment the same scores."""
    first_rewards = {(row["prompt"], row["response"]): row["reward"] for row in first.base["responses"]}
    rewards = [(row["reward"], first_rewards.get((row["prompt"], row["response"]))) for row in run.base["responses"]]
    pairs = [(own, other) for own, other in rewards if own is not None and other is not None]
    return bool(pairs) and all(abs(own - other) <= 1e-3 * max(1.0, abs(other)) for own, other in pairs)


def results(run_by_name: Mapping[str, Run]) -> dict[str, dict[str, dict[tuple, float]]]:
    """By row and measure: the value of each prompt. The policies before alignment come first, then the runs."""
    first = next(iter(run_by_name.values()))
    by_start: dict[str, tuple[list, Mapping, Run]] = {}
    for name, run in run_by_name.items():
        base_responses = [(row["id"], row["response"]) for row in run.base["responses"]]
        if base_responses not in [earlier for earlier, *_ in by_start.values()]:
            by_start[f"{name}, before"] = (base_responses, run.base, run)
    rows = {name: (result, run) for name, (_, result, run) in by_start.items()}
    rows |= {name: (run.aligned, run) for name, run in run_by_name.items()}
    return {
        name: {
            key: values
            for key, measure in MEASURES.items()
            if (values := values_of(measure, result, run.harmless)) and (key != "reward" or same_rewards(run, first))
        }
        for name, (result, run) in rows.items()
    }


def tables(run_by_name: Mapping[str, Run]) -> tuple[Table, Table]:
    """The final numbers of each run, and their differences from those of the first run."""
    by_row, first = results(run_by_name), next(iter(run_by_name))

    def mean(measure: Measure, values: Mapping[tuple, float] | None) -> str:
        return format_interval(over_prompts(list(values.values()), measure.is_share), measure.text) if values else "–"

    def change(measure: Measure, values: Mapping | None, reference: Mapping | None) -> str:
        return (
            format_change(change_of(values, reference, measure.is_share), measure.change)
            if values and reference
            else "–"
        )

    head = ("run", "prompts", *(measure.title for measure in MEASURES.values()))
    final_rows = [
        (
            name,
            str(len(set().union(*by_measure.values()))),
            *(mean(measure, by_measure.get(key)) for key, measure in MEASURES.items()),
        )
        for name, by_measure in by_row.items()
    ]
    change_rows = [
        (
            name,
            str(len(set().union(*by_measure.values()) & set().union(*by_row[first].values()))),
            *(change(measure, by_measure.get(key), by_row[first].get(key)) for key, measure in MEASURES.items()),
        )
        for name, by_measure in by_row.items()
        if name != first
    ]
    return Table("Final numbers", head, final_rows), Table(
        f"Difference from {first}, prompt by prompt", head, change_rows
    )


def benchmarks(run_by_name: Mapping[str, Run]) -> Table | None:
    """Each metric by each judge, a column for each run; None if no benchmark was run."""
    metric_rows: dict[tuple, dict[str, Mapping]] = {}
    for name, run in run_by_name.items():
        for benchmark, result in run.aligned.get("benchmarks", {}).items():
            for judge, verdicts in result["judges"].items():
                for metric, estimate in verdicts["metrics"].items():
                    key = (benchmark, words(metric), judge_label(judge, verdicts))
                    metric_rows.setdefault(key, {})[name] = estimate
    rows = [(*key, *(format_metric(by_run.get(name)) for name in run_by_name)) for key, by_run in metric_rows.items()]
    return Table("Benchmarks after alignment", ("benchmark", "metric", "judge", *run_by_name), rows) if rows else None


def responses(run_by_name: Mapping[str, Run]) -> Iterator[tuple[str, list[Prompt]]]:
    """Yields (category, its first prompts by id that all runs were evaluated on, with the answers before and after)."""
    first = next(iter(run_by_name.values()))
    before = {key_of(row): row for row in first.base["responses"]}
    after = {name: {key_of(row): row for row in run.aligned["responses"]} for name, run in run_by_name.items()}
    shared = set(before).intersection(*after.values())
    for category in first.evaluated:
        prompts = [
            Prompt(
                *key,
                [answer_of("before", before[key], refusal_judge(first))]
                + [answer_of(name, by_key[key], refusal_judge(run_by_name[name])) for name, by_key in after.items()],
            )
            for key in sorted(key for key in shared if before[key]["category"] == category)[:SHOWN]
        ]
        if prompts:
            yield words(category), prompts


def compare(runs: Sequence[Run], out: pathlib.Path) -> str:
    """Writes out/compare.html, compare.md and plots/*.png; returns the tables in Markdown.

    Args:
        runs: two or more; the others are compared with the first.
        out: the folder to write to; it is created.

    Raises:
        InputError: see `check`.
    """
    check(runs)
    run_by_name = dict(zip(run_names(runs), runs))
    first = next(iter(run_by_name))
    option_values = differences(*(run.config for run in runs))
    rows = [(key, *map(format_option, values)) for key, values in option_values.items()]
    configs = Table("Options in which they differ", ("option", *run_by_name), rows, wordy=True)
    number_tables = [table for table in (*tables(run_by_name), benchmarks(run_by_name)) if table]
    note = NOTE.format(first=first)
    paths = plots.draw_overlaid({name: run.metrics for name, run in run_by_name.items()}, out / "plots")
    curves = [
        Picture.from_png(path, f"{plots.describe(plots.CURVES[name])}, of each run") for name, path in paths.items()
    ]
    parts = [f"**{markdown(table.caption)}**\n\n{table.markdown()}" for table in (configs, *number_tables)]
    text = "\n\n".join([*parts, NOTE.format(first=markdown(first))]) + "\n"
    replace_file(out / "compare.md", text)
    write(
        "compare.html.jinja",
        out / "compare.html",
        title=f"{len(runs)} runs compared",
        names=list(run_by_name),
        configs=configs,
        tables=number_tables,
        note=note,
        curves=curves,
        responses=list(responses(run_by_name)),
    )
    return text
