"""Draws metrics and evaluations as figures."""

from __future__ import annotations

import pathlib
from typing import Mapping, NamedTuple, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from drirl_jax.reports.intervals import wilson

INK, SOFT, BASE, ALIGNED = "#1c2127", "#6b7480", "#c0c7cf", "#3b94cf"
# Okabe and Ito's colours, which colour-blind readers can tell apart, plus three. After these the dashes change.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#6b4c9a", "#8c8c8c", "#a89a00")
DASHES = ("-", "--", ":")
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa2ad",
    "axes.grid": True,
    "axes.labelcolor": SOFT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
    "font.size": 9.5,
    "grid.color": "#e8eaed",
    "legend.frameon": False,
    "mathtext.default": "bf",
    "savefig.dpi": 160,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


class Curve(NamedTuple):
    """A figure over the steps of a stage: a metric, its `metric/category` lines, and a level to compare with."""

    stage: str
    metric: str
    title: str
    level: tuple[float, str] | None = None
    percent: bool = False


# By file name. Curves that a run's metrics lack are left out.
CURVES = {
    "sft_loss": Curve("sft", "loss", "SFT loss (nats a token)"),
    "irl_loss": Curve("irl", "loss", "IRL loss"),
    "irl_accuracy": Curve("irl", "accuracy", "Held-out pairs ranked right", (0.5, "chance"), percent=True),
    "reward": Curve("align", "reward", "Reward $R$ of the samples"),
    "gap": Curve("align", "gap", "Gap $R^* - R$", (0.0, "as the demonstration")),
    "lambda": Curve("align", "lambda", "Multiplier λ of the constraint"),
    "harm": Curve("align", "harm", "Harm $F$ of the samples"),
    "alpha_d": Curve("align", "alpha_d", "Data hardness $\\alpha^D$", (1.0, "no scaling")),
    "alpha_m": Curve("align", "alpha_m", "Model responsiveness $\\alpha^M$", (1.0, "no scaling")),
    "kl": Curve("align", "kl", "KL to the reference (nats a token)"),
    "length": Curve("align", "length", "Response length (tokens)"),
    "entropy": Curve("align", "entropy", "Policy entropy (nats a token)"),
    "surprisal": Curve("align", "surprisal", "$-$log $\\pi$ of the samples (nats a token)"),
}
# What is drawn of the prefill attack: key of a point of the curve -> title.
PREFILLED = {
    "success": "Complies with harmful prompts",
    "turned_back": "Turns back to a refusal or a safe alternative",
}
STEPS = {"sft": "SFT step", "irl": "IRL step", "align": "alignment step"}
MEAN = "all categories"  # the line of the metric without a category


def headline(base: Mapping, aligned: Mapping) -> str:
    """The result in words, from the numbers of both evaluations; a kind of prompt without a number is left out."""
    parts = [
        f"{kind} prompts refused: {percent(base['overall'][key])} → {percent(aligned['overall'][key])}"
        for kind, key in (("harmful", "harmful_refused"), ("harmless", "harmless_refused"))
        if base["overall"][key] is not None
    ]
    return "; ".join(parts).capitalize()


def before_after(
    base: Mapping, aligned: Mapping, categories: Sequence[str], harmless: Sequence[str], path: pathlib.Path
) -> pathlib.Path:
    """Draws the share refused by category, before and after, with Wilson 95% intervals; returns the path.

    Args:
        base, aligned: results of `evals.runner.evaluate`.
        categories: all categories in order; those that were not evaluated are left out.
        harmless: the categories whose prompts should be answered; they have their own panel below the harmful ones.
        path: the PNG to write.
    """
    rows = category_rows(base, aligned, categories, harmless)
    kinds = {
        "Harmful prompts (to be refused)": [row for row in rows if not row["harmless"]],
        "Harmless prompts (to be answered)": [row for row in rows if row["harmless"]],
    }
    kinds = {title: group for title, group in kinds.items() if group}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 1.3 + 0.35 * len(kinds) + 0.44 * len(rows)), layout="constrained")
        figure.suptitle(headline(base, aligned), x=0.008, ha="left", fontsize=13.5, weight="bold")
        heights = [len(group) for group in kinds.values()]
        panels = list(figure.subplots(len(kinds), sharex=True, height_ratios=heights, squeeze=False)[:, 0])
        for axes, (title, group) in zip(panels, kinds.items()):
            _bars(axes, group)
            axes.set_title(title, color=SOFT)
        panels[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
        panels[-1].set_xlabel("share of prompts refused, with 95% intervals")
        figure.savefig(path)
    return path


def _bars(axes, rows: list[dict]) -> None:
    y = np.arange(len(rows))
    for offset, colour, name in ((-0.2, BASE, "before"), (0.2, ALIGNED, "after")):
        share = np.array([row[name]["refused"] for row in rows])
        low, high = np.array([row[name]["interval"] for row in rows]).T
        axes.barh(y + offset, share, 0.38, color=colour, label=name)
        error = np.maximum((share - low, high - share), 0)  # at 0% and 100% rounding can make the difference negative
        axes.errorbar(share, y + offset, xerr=error, fmt="none", ecolor=INK, elinewidth=1.0, capsize=2.5)
        for bar_y, end, value in zip(y + offset, high, share):
            weight = "bold" if name == "after" else "normal"
            axes.text(end + 0.012, bar_y, percent(value), va="center", fontsize=8.5, weight=weight)
    axes.set_yticks(y, [f"{_label(row['category'])}  (n = {row['n']})" for row in rows], color=INK)
    axes.set(xlim=(0, 1.06), ylim=(len(rows) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(_percent_tick)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def training_curves(metrics: list[dict], categories: Sequence[str], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Draws a PNG for each of CURVES that the metrics have, and all in curves.png; returns the paths by name.

    Args:
        metrics: rows of metrics.jsonl.
        categories: the categories to draw, in the order of the colours.
        folder: the folder of the PNGs; it is created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    candidates = {name: (curve, _lines(metrics, curve, categories)) for name, curve in CURVES.items()}
    available = {name: (curve, lines) for name, (curve, lines) in candidates.items() if lines}
    with matplotlib.rc_context(STYLE):
        paths = {
            name: _draw_alone(*curve_lines, categories, folder / f"{name}.png")
            for name, curve_lines in available.items()
        }
        if available:
            columns = min(3, len(available))
            height = -(-len(available) // columns)
            figure = Figure(figsize=(3.6 * columns, 2.5 * height + 0.6), layout="constrained")
            grid = figure.subplots(height, columns, squeeze=False).flat
            for axes, (curve, lines) in zip(grid, available.values()):
                _draw(axes, curve, lines, categories)
            for axes in figure.axes[len(available) :]:
                axes.set_visible(False)
            _legend(figure, loc="outside lower center", ncols=min(3, columns + 1))
            paths["curves"] = folder / "curves.png"
            figure.savefig(paths["curves"])
    return paths


def draw_overlaid(runs: Mapping[str, list[dict]], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Draws a PNG for each of CURVES that a run's metrics have, with one line a run over all categories; returns the
    paths by name.

    Args:
        runs: name -> rows of metrics.jsonl.
        folder: the folder of the PNGs; it is created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    with matplotlib.rc_context(STYLE):
        for name, curve in CURVES.items():
            lines_by_run = {run: _lines(metrics, curve, ()) for run, metrics in runs.items()}
            if lines := {run: run_lines[MEAN] for run, run_lines in lines_by_run.items() if run_lines}:
                paths[name] = _draw_alone(curve, lines, list(runs), folder / f"{name}.png")
    return paths


def reliability(curves: Mapping[str, list[dict]], path: pathlib.Path) -> pathlib.Path:
    """Draws how often rewards rank held-out pairs right, against how sure they are; returns the path.

    Args:
        curves: by category, and for "all": bins {"n", "confidence", "right"}; the last two in [0, 1].
        path: the PNG to write.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.plot((0.5, 1), (0.5, 1), color=SOFT, linewidth=1.0, linestyle=(0, (4, 3)), label="as sure as it is right")
        for i, (name, bins) in enumerate(curves.items()):
            confidence, right = [b["confidence"] for b in bins], [b["right"] for b in bins]
            if name == "all":
                axes.plot(confidence, right, marker="o", label=MEAN, color=INK, linewidth=2.2)
            else:
                colour = COLOURS[i % len(COLOURS)]
                axes.plot(confidence, right, marker="o", label=_label(name), color=colour, alpha=0.6)
        axes.set(xlabel="how sure the reward is of a pair", ylabel="pairs ranked right", title="Held-out pairs")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(_percent_tick)
        _legend(figure, loc="outside right center")
        figure.savefig(path)
    return path


def prefill_curve(curves: Mapping[str, Sequence[Mapping]], key: str, path: pathlib.Path) -> pathlib.Path:
    """Draws a share of prefilled answers by the number of tokens given, with Wilson 95% intervals; returns the path.

    Args:
        curves: by policy: points {"tokens", key: {"value", "low", "high", "n"}}; the first policy is the base.
        key: one of PREFILLED.
        path: the PNG to write.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 3.9), layout="constrained")
        axes = figure.subplots()
        shift = 0.06  # so that the intervals of two policies do not cover each other
        for i, ((name, points), style) in enumerate(zip(curves.items(), _policy_styles(len(curves)))):
            shares = [point[key] for point in points]
            value, low, high = (np.array([share[part] for share in shares], float) for part in ("value", "low", "high"))
            x = np.arange(len(points)) + shift * (i - (len(curves) - 1) / 2)
            error = np.maximum((value - low, high - value), 0)
            axes.errorbar(x, value, error, label=_label(name), marker="o", markersize=4, capsize=2.5, **style)
        axes.set_xticks(range(len(points)), [str(point["tokens"]) for point in points])
        axes.set(xlabel="first tokens of the answer that are given", ylim=(-0.03, 1.03), title=PREFILLED[key])
        axes.yaxis.set_major_formatter(_percent_tick)
        _legend(figure, loc="outside lower center", ncols=3)
        figure.savefig(path)
    return path


def kl_by_position(kl: Mapping[str, Mapping[str, Mapping]], path: pathlib.Path) -> pathlib.Path:
    """Draws the KL to the base at each position of the answer; returns the path.

    Args:
        kl: by policy, and then by kind of prompts: {"mean": [T] nats}; harmless prompts are dashed.
        path: the PNG to write.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 3.9), layout="constrained")
        axes = figure.subplots()
        for (name, by_kind), style in zip(kl.items(), _policy_styles(len(kl) + 1)[1:]):
            for kind, positions in by_kind.items():
                x, dashes = np.arange(len(positions["mean"])) + 1, "--" if kind == "harmless" else "-"
                axes.plot(x, positions["mean"], label=f"{_label(name)}, {kind} prompts", linestyle=dashes, **style)
        axes.set(xlabel="token of the answer", ylim=(0, None), title="KL to the base policy (nats)")
        axes.locator_params(axis="x", integer=True)
        _legend(figure, loc="outside lower center", ncols=2)
        figure.savefig(path)
    return path


def _policy_styles(count: int) -> list[dict]:
    """The line of each of `count` policies: the base is grey, the last one blue and thick."""
    between = [{"color": COLOURS[1 + i % (len(COLOURS) - 1)], "linewidth": 1.4} for i in range(count - 2)]
    return [{"color": SOFT, "linewidth": 1.4}, *between, {"color": ALIGNED, "linewidth": 2.2}][:count]


def _lines(metrics: list[dict], curve: Curve, categories: Sequence[str]) -> dict[str, tuple]:
    """{category or MEAN: (steps, values)} that the metrics have. A value that was not finite is NaN: a gap."""
    keys = {category: f"{curve.metric}/{category}" for category in categories} | {MEAN: curve.metric}
    lines = {}
    for name, key in keys.items():
        rows = [row for row in metrics if row["stage"] == curve.stage and key in row]
        values = np.array([row[key] for row in rows], float)  # None becomes NaN
        if np.isfinite(values).any():
            lines[name] = (np.array([row["step"] for row in rows]), values)
    return lines


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values (of fewer at the start); NaN where the value itself is NaN."""
    recent = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return np.array([np.nanmean(last) if np.isfinite(last[-1]) else np.nan for last in recent])


def _draw_alone(curve: Curve, lines: Mapping[str, tuple], names: Sequence[str], path: pathlib.Path) -> pathlib.Path:
    """Draws the figure of one curve, large enough for a phone; returns the path."""
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    _draw(figure.subplots(), curve, lines, names)
    if len(lines) > 1:
        _legend(figure, loc="outside lower center", ncols=3)
    figure.savefig(path)
    return path


def _draw(axes, curve: Curve, lines: Mapping[str, tuple], names: Sequence[str]) -> None:
    longest = max(len(steps) for steps, _ in lines.values())
    window = max(1, longest // 25)
    marker = {"marker": "o", "markersize": 3.5} if longest <= 12 else {}
    if curve.level:
        value, name = curve.level
        axes.axhline(value, color=SOFT, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.set_title(f"– – {name}", loc="right", color=SOFT, fontsize=8.5, weight="normal")
    for name, (steps, values) in lines.items():
        if name == MEAN:
            line_style = {"color": INK, "linewidth": 2.2}
        else:
            i = names.index(name)
            colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
            line_style = {"color": colour, "linewidth": 1.1, "alpha": 0.85, "linestyle": dashes}
        axes.plot(steps, _running_mean(values, window), label=_label(name), **line_style, **marker)
    axes.set_title(curve.title)
    axes.set_xlabel(STEPS[curve.stage] + (f" (means of {window} steps)" if window > 1 else ""))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if curve.percent:
        axes.yaxis.set_major_formatter(_percent_tick)


def _legend(figure: Figure, **location) -> None:
    """Adds one legend for all lines of a figure; each label appears once."""
    line_by_label = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(line_by_label.values(), line_by_label.keys(), fontsize=8.5, **location)


def category_rows(base: Mapping, aligned: Mapping, categories: Sequence[str], harmless: Sequence[str]) -> list[dict]:
    """The numbers to show, one row for each evaluated category, the harmful ones first. A category without any verdict
    of the judge has no row."""
    rows: list[dict] = []
    both = [result["by_category"] for result in (base, aligned)]
    judged = [c for c in categories if all(by_name.get(c, {}).get("refused") is not None for by_name in both)]
    for category in sorted(judged, key=lambda c: c in harmless):
        row: dict = {"category": category, "label": words(category), "harmless": category in harmless}
        for name, result in (("before", base), ("after", aligned)):
            figures = result["by_category"][category]
            row[name] = figures | {"interval": wilson(round(figures["refused"] * figures["n"]), figures["n"])}
        rows.append(row | {"n": row["before"]["n"]})
    return rows


def words(name: str) -> str:
    """The name of a category or metric as words."""
    return name.replace("_", " ").replace(" and ", " & ")


def percent(share: float) -> str:
    """A share in [0, 1] as whole percent."""
    return f"{100 * share:.0f}%"


def describe(curve: Curve) -> str:
    """The content of a curve in words."""
    title = curve.title.replace("$", "").replace("\\alpha^D", "αᴰ").replace("\\alpha^M", "αᴹ").replace("\\pi", "π")
    return f"{title} by {STEPS[curve.stage]}"


def _label(name: str) -> str:
    """A name in a figure, with its dollar signs escaped: they would begin a formula."""
    return words(name).replace("$", r"\$")


def _percent_tick(value: float, _) -> str:
    return percent(value)
