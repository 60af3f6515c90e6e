"""Tables and pictures of depth.json, which `python -m drirl_jax depth` writes (see `evals/depth.py`)."""

from __future__ import annotations

import pathlib
from typing import Mapping

import numpy as np
import rich.console

from drirl_jax.reports import plots
from drirl_jax.reports.intervals import Interval
from drirl_jax.reports.pages import Picture, Table, format_interval
from drirl_jax.reports.plots import percent

# The names of a run's policies in its report. Other policies keep their names.
LABELS = {"base": "before (base)", "sft": "after SFT", "aligned": "after"}
# What the answers to prefilled prompts do: key of a point of the curve -> words.
SHARES = {"success": "complies", "turned_back": "turns back"}
PHRASES = "phrases"  # the judge whose figures need a word of caution
BASE_ANSWERS = "of the base"  # settings.answers, where no file was given
SPANS = ((0, 1), (1, 5), (5, 10), (10, 20), (20, None))  # positions of an answer that the table of KL joins


def measure_by_policy(depth: Mapping, measure: str, labels: Mapping[str, str] = LABELS) -> dict:
    """{label of a policy: the result of the measure}, of the policies that have it."""
    results = depth.get("policies", {})
    return {
        labels.get(name, name): by_measure[measure] for name, by_measure in results.items() if measure in by_measure
    }


def curve_table(depth: Mapping, labels: Mapping[str, str] = LABELS) -> Table | None:
    """The shares of answers that comply and that turn back, by the number of tokens given; None if not measured."""
    rows = [
        (name, str(point["tokens"]), str(point["success"]["n"]), *(_share(point[key]) for key in SHARES))
        for name, prefill in measure_by_policy(depth, "prefill", labels).items()
        for point in prefill["curve"]
    ]
    head = ("policy", "tokens given", "n", *SHARES.values())
    return Table("Answers to harmful prompts whose first tokens are given", head, rows) if rows else None


def _share(figure: Mapping) -> str:
    """A share with its interval as text; a dash without a verdict."""
    if figure["value"] is None:
        return "–"
    return format_interval(Interval(figure["value"], figure["low"], figure["high"]), percent)


def kl_table(depth: Mapping, labels: Mapping[str, str] = LABELS) -> Table | None:
    """KL to the base by parts of the answer, nats a token, and of the whole answer; None if it was not measured."""
    rows = [
        (name, kind, *(_mean(positions, slice(*span)) for span in SPANS), f"{positions['answer']:.1f}")
        for name, by_kind in measure_by_policy(depth, "kl", labels).items()
        for kind, positions in by_kind.items()
    ]
    spans = [f"tokens {first + 1}+" if end is None else f"{first + 1} to {end}" for first, end in SPANS]
    head = ("policy", "prompts", "token 1", *spans[1:], "whole answer")
    return Table("KL to the base policy, nats a token", head, rows) if rows else None


def _mean(positions: Mapping, span: slice) -> str:
    """The mean over all tokens at these positions; a dash where no answer has one."""
    n = np.array(positions["n"][span])
    return f"{np.average(positions['mean'][span], weights=n):.2f}" if n.sum() else "–"


def pictures(depth: Mapping, folder: pathlib.Path) -> dict[str, Picture]:
    """The pictures of what was measured: "success", "turned_back" and "kl".

    Args:
        folder: the folder of the PNGs, which exists.
    """
    by_name = {}
    if curves := {name: prefill["curve"] for name, prefill in measure_by_policy(depth, "prefill").items()}:
        for key, title in plots.PREFILLED.items():
            path = plots.prefill_curve(curves, key, folder / f"depth_{key}.png")
            by_name[key] = Picture.from_png(path, f"{title}, by the number of tokens given, with intervals")
    if kl := measure_by_policy(depth, "kl"):
        path = plots.kl_by_position(kl, folder / "depth_kl.png")
        by_name["kl"] = Picture.from_png(path, "KL to the base policy, by position of the answer")
    return by_name


def facts(depth: Mapping) -> str:
    """On which prompts the policies were measured, whose answers begin theirs, and the judges, in sentences."""
    source = "the base policy" if depth["settings"]["answers"] == BASE_ANSWERS else "a file"
    judges = " and ".join(f"{verdict} by {judge}" for verdict, judge in depth["judges"].items())
    caution = (
        " Phrases see only the opening of an answer, which is given here."
        if PHRASES in depth["judges"].values()
        else ""
    )
    return (
        f"{len(depth['complying'])} of {depth['asked']} harmful prompts have an answer of {source} that complies. Its "
        f"first tokens are given to all policies. Judges: {judges}.{caution}"
    )


def terminal_table(depth: Mapping) -> str:
    """The tables for the terminal, with the policies' own names."""
    page = rich.console.Console(width=120, markup=False)
    with page.capture() as captured:
        for table in filter(None, (curve_table(depth, {}), kl_table(depth, {}))):
            page.print(table.rich())
        page.print(facts(depth))
    return captured.get()
