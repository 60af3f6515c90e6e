"""The alignment tax of a run: what the alignment changed in tasks other than safety, with paired intervals."""

from __future__ import annotations

from typing import Mapping, NamedTuple

from drirl_jax.reports.intervals import Interval, paired_over_items, paired_ratio
from drirl_jax.reports.pages import Run, Table, format_interval
from drirl_jax.reports.plots import words

LIMIT = 1.05  # the largest ratio of perplexities that counts as small
NOTE = (
    "Each change is from before, over the items that both policies have, with a paired 95% interval: a difference, or "
    "for perplexities a ratio in percent. * The interval excludes no change. In an uninformative task the base is not "
    "above chance, whose level is in brackets: an unchanged figure there does not mean that there is no tax."
)


class Value(NamedTuple):
    """One item's value of a metric, and the cluster that the item belongs to."""

    value: float
    cluster: str


def values_of(result: Mapping, metric: str) -> dict[tuple[str, str], Value]:
    """The metric's value of each item of a benchmark's result by its main judge; the key is (id, prompt)."""
    values = {}
    for row in result["responses"]:
        value = row.get(result["judge"], {}).get(metric)
        if value is not None:
            item_id = str(row["id"])
            values[item_id, row["prompt"]] = Value(float(value), row.get("cluster") or item_id)
    return values


def change(after: Mapping, before: Mapping, metric: str) -> tuple[int, Interval | None]:
    """The number of items with this metric in both results of a benchmark, and its paired change; None without items.

    The change is `intervals.paired_ratio` of a geometric metric, and otherwise `intervals.paired_over_items`.
    """
    values, reference = values_of(after, metric), values_of(before, metric)
    keys = [key for key in reference if key in values]
    if not keys:
        return 0, None
    paired = paired_ratio if metric in before["geometric"] else paired_over_items
    clusters = [reference[key].cluster for key in keys]
    return len(keys), paired([values[key].value for key in keys], [reference[key].value for key in keys], clusters)


def reading(figure: Mapping, chance: float | None, ratio: Interval | None) -> str:
    """What a change may be read as, in words: "uninformative" unless the base's interval is wholly above chance.

    Args:
        figure: the metric of the base: see `evals.benchmarks.interval`.
        chance: its chance level, if it has one.
        ratio: the change, if it is a ratio.
    """
    if chance is not None:
        return f"{'above chance' if figure['low'] > chance else 'uninformative'} ({chance:.3f})"
    if ratio is None:
        return ""
    limit = f"+{100 * (LIMIT - 1):.0f}%"
    if ratio.high <= LIMIT:
        return f"at most {limit}"
    return f"above {limit}" if ratio.low > LIMIT else f"may be above {limit}"


def format_value(figure: Mapping | None) -> str:
    """A figure as text: a perplexity with two decimals, a share with three; a dash for None."""
    if figure is None:
        return "–"
    digits = 2 if figure["value"] > 1 else 3
    return format_interval(Interval(figure["value"], figure["low"], figure["high"]), f"{{:.{digits}f}}".format)


def format_tax(estimate: Interval | None, is_ratio: bool) -> str:
    """A change as text, with a star if its interval excludes no change."""
    if estimate is None:
        return "–"
    unchanged = 1.0 if is_ratio else 0.0
    star = "*" if estimate.low > unchanged or estimate.high < unchanged else ""
    text = (lambda ratio: f"{100 * (ratio - 1):+.1f}%") if is_ratio else "{:+.3f}".format
    return format_interval(estimate, text, star)


def _cells(before: Mapping, warm: Mapping | None, after: Mapping, metric: str, chance: float | None) -> list[str]:
    """The cells of a row of `table` after the task's name; `warm` is the result of the policy after SFT."""
    figures = [result["judges"][result["judge"]]["metrics"].get(metric) for result in (before, after)]
    is_ratio = metric in before["geometric"]
    n, estimate = change(after, before, metric)
    after_sft = [] if warm is None else [format_tax(change(warm, before, metric)[1], is_ratio)]
    texts = [format_value(figures[0]), *after_sft, format_value(figures[1]), format_tax(estimate, is_ratio)]
    return [str(n), *texts, reading(figures[0], chance, estimate if is_ratio else None)]


def table(run: Run) -> Table | None:
    """Each task's figures before and after, with their paired changes; None if the run has no such task.

    The rows are the metrics that a benchmark's result calls `tax`, by its main judge. If the run has a stage `sft`
    before the alignment, a column has the change that this stage made.
    """
    rows = []
    for name, before in run.base.get("benchmarks", {}).items():
        warm = run.warm["benchmarks"][name] if run.warm else None
        for metric, chance in before.get("tax", {}).items():
            if metric in before["judges"][before["judge"]]["metrics"]:
                task = words(name) if metric == name else f"{words(name)}, {words(metric)}"
                rows.append((task, *_cells(before, warm, run.aligned["benchmarks"][name], metric, chance)))
    head = ("task", "n", "before", *["change by SFT"] * bool(run.warm), "after", "change", "reading")
    return Table("Tax: the change in other tasks, item by item", head, rows) if rows else None
