"""The report of one run: one HTML file with everything in it."""

from __future__ import annotations

import pathlib
from typing import Iterator, Mapping, Sequence

import numpy as np
import rich.console

from drirl_jax import config as config_lib
from drirl_jax.reports import compare, depth, plots, tax
from drirl_jax.reports.intervals import Interval, over_prompts, wilson
from drirl_jax.reports.pages import (
    MEASURES,
    Answer,
    Picture,
    Prompt,
    Run,
    SampledPrompt,
    Table,
    answer_of,
    change_of,
    differences,
    format_change,
    format_interval,
    format_option,
    key_of,
    points,
    refusal_judge,
    signed,
    values_of,
    write,
)
from drirl_jax.reports.plots import percent, words
from drirl_jax.reports.status import TRAINED
from drirl_jax.runtime import json_files
from drirl_jax.stages import guards

SHOWN, MORE = 2, 20  # prompts of a category with their responses: shown at once, and folded away
RECENT = 10  # a coefficient "at the end" is its mean over so many last steps
REPLIES = ("judge.jsonl", "judgements.jsonl", "splits.jsonl")  # replies of servers: see endpoint.Endpoint


def about(run: Run) -> Table:
    """The model, the method, the data, the steps and the facts of the run."""
    c, last = run.config, {row["stage"]: row for row in run.metrics}
    records = sum(sum(counts.values()) for counts in run.facts.get("records", {}).values())
    rows = {
        "model": f"{c.policy.init}, {'adapters' if c.policy.tune == 'lora' else 'all weights'} trained",
        "method": f"objective {c.align.objective}, rewards {c.reward.source}, scaling {c.scaling.combine}",
        "data": c.data.path + (f", {records} records" if records else ""),
        "steps": ", ".join(
            f"{stage}: {last[stage]['step'] if stage in last else 0} of {c[stage].steps}"
            for stage in TRAINED
            if stage in c.schedule
        ),
        "seed": str(c.seed),
    }
    rows |= {name: str(value) for name, value in run.facts.items() if name != "records"}
    if last:
        rows["updates left out"] = f"{sum(row.get('skipped', 0) for row in last.values()):.0f} (not finite)"
    if warnings := [sentence for stage in last for sentence in guards.idle(c, stage, run.rows(stage))]:
        rows["warnings"] = " ".join(warnings)
    return Table("What was run", ("", ""), list(rows.items()), wordy=True)


def changed_options(run: Run) -> Table:
    """The options that differ from their defaults."""
    options = differences(config_lib.default(), run.config)
    rows = [(key, *map(format_option, pair)) for key, pair in options.items()]
    return Table("Options other than the defaults", ("option", "default", "here"), rows, wordy=True)


def right_reaction(run: Run, category: str) -> str:
    """What the policy should do with the category's prompts."""
    return "answer" if category in run.harmless else "refuse"


def balance(run: Run) -> Table | None:
    """Records by category and split; None if facts.json has none."""
    if not (records := run.facts.get("records")):
        return None
    rows = [
        (words(name), right_reaction(run, name), *(str(counts.get(name, 0)) for counts in records.values()))
        for name in run.config.data.categories
    ]
    sums = [str(sum(counts.values())) for counts in records.values()]
    return Table("Records by category and split", ("category", "should", *records), [*rows, ("all", "", *sums)])


def accuracy(run: Run) -> Table | None:
    """How often each reward ranks held-out pairs right, and its calibration; None before the first IRL evaluation."""
    rows = [row for row in run.rows("irl") if "accuracy" in row]
    if not rows:
        return None
    last, table_rows = rows[-1], []
    for name in (*run.config.data.categories, "all"):
        suffix = "" if name == "all" else f"/{name}"
        if f"accuracy{suffix}" not in last:
            continue
        bins = run.reliability.get(name, [])
        pairs = sum(b["n"] for b in bins)
        right = Interval(last[f"accuracy{suffix}"], float("nan"), float("nan"))
        if pairs:
            right = Interval(right.mean, *wilson(round(sum(b["n"] * b["right"] for b in bins)), pairs))
        shares = [last.get(f"{key}{suffix}") for key in ("accuracy_whole", "accuracy_contrast")]
        cells = ["–" if share is None else percent(share) for share in shares]
        numbers = [signed(last.get(f"{key}{suffix}")).removeprefix("+") for key in ("ece", "length_correlation")]
        table_rows.append((words(name), str(pairs or "–"), format_interval(right, percent), *cells, *numbers))
    head = ("category", "pairs", "ranked right", "whole texts", "other kind", "calibration error", "with length")
    return Table("Held-out pairs of demonstration and sample", head, table_rows)


def curves(run: Run) -> list[Picture]:
    """A picture for each curve that the metrics hold."""
    paths = plots.training_curves(run.metrics, run.config.data.categories, run.workdir / "plots")
    return [
        Picture.from_png(path, _describe(plots.CURVES[name], run))
        for name, path in paths.items()
        if name in plots.CURVES
    ]


def _describe(curve: plots.Curve, run: Run) -> str:
    """A curve in words, with its first and its last value."""
    values = [row[curve.metric] for row in run.rows(curve.stage) if row.get(curve.metric) is not None]
    ends = f", {plots.MEAN}: from {values[0]:.3g} to {values[-1]:.3g}" if values else ""
    return f"{plots.describe(curve)} and category{ends}"


def overall(run: Run) -> Table:
    """Before and after over all prompts, each number with its interval; after the warm start too, if there is one."""
    results = {"before": run.base} | ({"after SFT": run.warm} if run.warm else {}) | {"after": run.aligned}
    rows = []
    for measure in MEASURES.values():
        columns = [values_of(measure, result, run.harmless) for result in results.values()]
        if all(columns):
            means = [
                format_interval(over_prompts(list(values.values()), measure.is_share), measure.text)
                for values in columns
            ]
            change = format_change(change_of(columns[-1], columns[0], measure.is_share), measure.change)
            unit = ", points" if measure.is_share else ""
            rows.append((measure.title + unit, str(len(columns[0])), *means, change))
    return Table("Before and after, all prompts", ("", "n", *results, "change"), rows)


def by_category(run: Run) -> Table:
    """Before and after by category, the harmful ones first."""
    table_rows = []
    for row in plots.category_rows(run.base, run.aligned, run.config.data.categories, run.harmless):
        refused_before, refused_after = (_refusals(result, row["category"]) for result in (run.base, run.aligned))
        change = format_change(change_of(refused_after, refused_before, is_share=True), points)
        shares = [
            format_interval(Interval(side["refused"], *side["interval"]), percent)
            for side in (row["before"], row["after"])
        ]
        rewards = [signed(row[name]["reward"]) for name in ("before", "after")]
        table_rows.append(
            (row["label"], right_reaction(run, row["category"]), str(row["n"]), *shares, change, *rewards)
        )
    head = ("category", "should", "n", "refused before", "refused after", "change, points", "reward before", "after")
    return Table("Before and after by category", head, table_rows)


def _refusals(result: Mapping, category: str) -> dict[tuple[str, str], float]:
    """1 or 0 for each prompt of the category whose response has a verdict: whether it was refused; by `key_of`."""
    rows = [row for row in result["responses"] if row["category"] == category]
    return {key_of(row): float(row["refused"]) for row in rows if row["refused"] is not None}


def benchmarks(run: Run) -> Table | None:
    """Each metric of each benchmark by each judge; None if no benchmark was run."""
    rows = []
    for name, before in run.base.get("benchmarks", {}).items():
        for judge, verdicts in before["judges"].items():
            after = run.aligned["benchmarks"][name]["judges"][judge]
            for metric, estimate in verdicts["metrics"].items():
                rows.append(
                    (
                        name,
                        words(metric),
                        compare.judge_label(judge, verdicts),
                        str(estimate["n"]),
                        compare.format_metric(estimate),
                        compare.format_metric(after["metrics"].get(metric)),  # None where it has no item
                    )
                )
    head = ("benchmark", "metric", "judge", "n", "before", "after")
    return Table("Benchmarks, with 95% intervals", head, rows) if rows else None


def agreement(run: Run) -> Table | None:
    """The agreement of the benchmarks' judges; None if there are fewer than two judges."""
    rows = [
        (
            name,
            pair,
            when,
            str(figures["n"]),
            percent(figures["agree"]),
            "–" if figures["kappa"] is None else f"{figures['kappa']:.2f}",
        )
        for when, result in (("before", run.base), ("after", run.aligned))
        for name, benchmark_result in result.get("benchmarks", {}).items()
        for pair, figures in benchmark_result["agreement"].items()
    ]
    head = ("benchmark", "judges", "policy", "n", "agree", "Cohen's kappa")
    return Table("Agreement of the judges", head, rows) if rows else None


def responses(run: Run) -> Iterator[tuple[str, str, list[Prompt]]]:
    """Yields (category, its coefficients, its first prompts by id). The fixed rule prevents a choice of examples."""
    after = {row["id"]: row for row in run.aligned["responses"]}
    judge = refusal_judge(run)
    for name in run.evaluated:
        rows = sorted((row for row in run.base["responses"] if row["category"] == name), key=lambda row: row["id"])
        prompts = [
            Prompt(
                row["id"],
                row["prompt"],
                (answer_of("before", row, judge), answer_of("after", after[row["id"]], judge)),
            )
            for row in rows[: SHOWN + MORE]
        ]
        yield words(name), coefficients(run, name), prompts


def coefficients(run: Run, category: str) -> str:
    """αᴰ and αᴹ of the category's training prompts at the end, in words; "" if the metrics have none."""
    parts = []
    for key, symbol in (("alpha_d", "αᴰ"), ("alpha_m", "αᴹ")):
        values = [row[f"{key}/{category}"] for row in run.rows("align") if row.get(f"{key}/{category}") is not None]
        if values:
            parts.append(f"{symbol} {np.mean(values[-RECENT:]):.2f}")
    used = "" if run.config.scaling.combine != "none" else "; not used, as config.scaling.combine is 'none'"
    return f"{' and '.join(parts)} for its training prompts at the end{used}" if parts else ""


# Columns of the samples: the key in samples.jsonl, its head, the format of a value.
SAMPLED = {
    "reward": ("R", signed),
    "advantage": ("Â", signed),
    "alpha_d": ("αᴰ", "{:.2f}".format),
    "alpha_m": ("αᴹ", "{:.2f}".format),
    "alpha": ("α", "{:.2f}".format),
    "scaled": ("A", signed),
    "masked": ("gap", lambda masked: "masked" if masked else "kept"),
}


def samples(run: Run) -> Iterator[tuple[str, list[SampledPrompt]]]:
    """Yields (step, a group of each category, the harmful ones first) for the stored steps, the last step first."""
    order = sorted(run.config.data.categories, key=lambda name: name in run.harmless)
    for step in sorted({row["step"] for row in run.samples}, reverse=True):
        rows = sorted((row for row in run.samples if row["step"] == step), key=lambda row: order.index(row["category"]))
        yield f"Step {step} of {run.config.align.steps}", [sampled_prompt(row) for row in rows]


def sampled_prompt(row: Mapping) -> SampledPrompt:
    """The prompt and its responses in a row of samples.jsonl."""
    responses = [row | response for response in row["responses"]]
    columns = {key: column for key, column in SAMPLED.items() if key in responses[0]}
    cells = [["–" if r[key] is None else text(r[key]) for key, (_, text) in columns.items()] for r in responses]
    about = f"{words(row['category'])} · {row['id']} · R* {signed(row['demo_reward'])}"
    head = [name for name, _ in columns.values()]
    return SampledPrompt(
        about, row["prompt"], row["demonstration"], head, list(zip(cells, (r["text"] for r in responses)))
    )


def benchmark_responses(run: Run) -> Iterator[tuple[str, str, list[Prompt]]]:
    """Like `responses`, for each benchmark with generated answers, with the verdict of each judge."""
    for name, before in run.base.get("benchmarks", {}).items():
        after = {row["id"]: row for row in run.aligned["benchmarks"][name]["responses"]}
        rows = [row for row in before["responses"] if "response" in row]

        def answer(policy_name: str, row: Mapping, judges: Sequence[str] = tuple(before["judges"])) -> Answer:
            verdicts = {
                judge: ", ".join(f"{words(name)} {x:.3g}" for name, x in row[judge].items()) for judge in judges
            }
            return Answer(policy_name, row["response"], [f"{judge}: {verdict}" for judge, verdict in verdicts.items()])

        prompts = [
            Prompt(str(row["id"]), row["prompt"], (answer("before", row), answer("after", after[row["id"]])))
            for row in rows[: SHOWN + MORE]
        ]
        if prompts:
            yield name, "", prompts


def cost(run: Run) -> Table | None:
    """Seconds by stage; None if no step was timed."""
    rows, total = [], 0.0
    for stage in TRAINED:
        stage_rows = [row for row in run.timing if row["stage"] == stage]
        if stage_rows:
            parts = [sum(row[key] for row in stage_rows) for key in ("collect_s", "update_s")]
            total += sum(parts)
            seconds = [f"{x:.0f}" for x in (*parts, sum(parts))]
            rows.append((stage, str(len(stage_rows)), *seconds, f"{sum(parts) / len(stage_rows):.1f}"))
    head = ("stage", "steps", "sampling and scoring", "updates", "together", "a step")
    return Table("Seconds", head, [*rows, ("both", "", "", "", f"{total:.0f}", "")]) if rows else None


def tokens(run: Run) -> list[str]:
    """Sentences on the sampled tokens, and on the tokens that servers wrote."""
    c, sentences = run.config.align, []
    lengths = [row["length"] for row in run.rows("align") if row.get("length") is not None]
    if lengths:
        sampled = sum(lengths) * c.batch * c.group_size
        sentences.append(
            f"The alignment sampled {sampled:,.0f} tokens in {len(lengths) * c.batch * c.group_size:,} responses."
        )
    for path in (run.workdir / name for name in REPLIES):
        if path.exists():
            replies = json_files.rows(path, {"tokens": int}, "remove that line: the reply is then asked for again")
            written = sum(max(reply["tokens"], 0) for reply in replies)
            sentences.append(
                f"{path.name} holds {len(replies):,} replies of a server, {written:,} tokens as it counts them."
            )
    return sentences


def report(run: Run) -> pathlib.Path:
    """Writes plots/*.png and report.html, which contains its pictures; returns the path of report.html."""
    evaluated = bool(run.base and run.aligned)
    categories, folder = run.config.data.categories, run.workdir / "plots"
    values = {"curves": curves(run), "evaluated": evaluated}  # `curves` makes the folder
    if run.reliability:
        alt = "How often the rewards rank held-out pairs right, against how sure they are, by category"
        path = plots.reliability(run.reliability, folder / "reliability.png")
        values["reliability"] = Picture.from_png(path, alt)
    if run.depth:
        values |= {
            "depth": depth.pictures(run.depth, folder),
            "depth_tables": list(filter(None, (depth.curve_table(run.depth), depth.kl_table(run.depth)))),
            "depth_facts": depth.facts(run.depth),
        }
    if evaluated:
        path = plots.before_after(run.base, run.aligned, categories, run.harmless, folder / "before_after.png")
        values |= {
            "before_after": Picture.from_png(
                path, "Share of prompts refused by category, before and after, with intervals"
            ),
            "cards": list(cards(run)),
            "overall": overall(run),
            "by_category": by_category(run),
            "benchmarks": benchmarks(run),
            "tax": tax.table(run),
            "tax_note": tax.NOTE,
            "agreement": agreement(run),
            "responses": [*responses(run), *benchmark_responses(run)],
            "judge": refusal_judge(run),
        }
    return write(
        "report.html.jinja",
        run.workdir / "report.html",
        title=plots.headline(run.base, run.aligned) if evaluated else f"{run.workdir.name}: not evaluated yet",
        about=about(run),
        changed=changed_options(run),
        config=str(run.config),
        balance=balance(run),
        accuracy=accuracy(run),
        cost=cost(run),
        tokens=tokens(run),
        shown=SHOWN,
        samples=list(samples(run)),
        **values,
    )


def cards(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yields (name, before, after) for the overall numbers that both evaluations have."""
    formats = {key: (measure.title, measure.text) for key, measure in MEASURES.items()}
    formats = {"mean_reward" if key == "reward" else key: pair for key, pair in formats.items()}
    for key, (title, text) in (formats | {"mean_length": ("mean length, tokens", "{:.0f}".format)}).items():
        pair = [result["overall"].get(key) for result in (run.base, run.aligned)]
        if None not in pair:
            yield title, *map(text, pair)


def terminal_table(run: Run) -> str:
    """The tables of categories, benchmarks and tax, before and after, for the terminal."""
    page = rich.console.Console(width=120, markup=False)
    with page.capture() as captured:
        page.print(plots.headline(run.base, run.aligned))
        for table in filter(None, (by_category(run), benchmarks(run), tax.table(run))):
            page.print(table.rich())
    return captured.get()
