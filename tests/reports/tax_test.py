"""The report's table of the tax: paired changes of the tasks, and which of them tell nothing."""

import numpy as np
import pytest
from helpers import small_run

from drirl_jax.reports import pages, single, tax
from drirl_jax.reports.intervals import over_items, paired_over_items, paired_ratio, wilson

RIGHT = {"base": [1] * 30 + [0] * 10, "sft": [1] * 28 + [0] * 12, "aligned": [1] * 20 + [0] * 10 + [1] * 2 + [0] * 8}
GUESSED = {"base": [1, 0] * 20, "sft": [1, 0] * 20, "aligned": [1, 0] * 20}
CLUSTERS = [str(i // 2) for i in range(40)]
BASE_PERPLEXITY = np.linspace(5, 20, 40)
PERPLEXITY = {
    "base": BASE_PERPLEXITY,
    "sft": BASE_PERPLEXITY * 1.01,
    "aligned": BASE_PERPLEXITY * np.exp(np.linspace(0.05, 0.15, 40)),
}


def task(name, metric, values, chance, geometric=(), clusters=("",) * 40):
    """A result as of `evals.benchmarks.run`, of one metric with these values."""
    estimate, kind = over_items(values, clusters) if not geometric else ((9.0, 8.0, 10.0), "t of logs")
    figure = dict(zip(("value", "low", "high"), estimate), n=len(values), interval=kind)
    responses = [
        {"id": str(i), "subset": "", "cluster": cluster, "prompt": f"question {i}", "protocol": {metric: float(value)}}
        for i, (value, cluster) in enumerate(zip(values, clusters))
    ]
    return {
        "benchmark": name,
        "judge": "protocol",
        "judges": {"protocol": {"metrics": {metric: figure}}},
        "agreement": {},
        "responses": responses,
        "tax": {metric: chance},
        "geometric": list(geometric),
    }


def evaluated(policy):
    benchmarks = {
        "minimal_pairs": task("minimal_pairs", "accuracy", RIGHT[policy], 0.5),
        "hhh": task("hhh", "accuracy", GUESSED[policy], 0.5),
        "stereotype": task("stereotype", "agreed", RIGHT[policy], None, clusters=CLUSTERS),
        "perplexity": task("perplexity", "perplexity", PERPLEXITY[policy], None, ("perplexity",)),
    }
    return small_run.result("aligned" if policy == "aligned" else "base") | {"benchmarks": benchmarks}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    results = {policy: evaluated(policy) for policy in ("base", "sft", "aligned")}
    return pages.load_run(small_run.write(tmp_path_factory.mktemp("run") / "run", results))


def test_the_table(run):
    table = tax.table(run)
    assert table.head == ("task", "n", "before", "change by SFT", "after", "change", "reading")
    by_task = {row[0]: row[1:] for row in table.rows}
    pairs = by_task["minimal pairs, accuracy"]
    low, high = wilson(30, 40)
    mean, down, up = paired_over_items(RIGHT["aligned"], RIGHT["base"], range(40))
    assert mean == pytest.approx(-8 / 40)
    assert pairs[:2] == ("40", f"0.750 ({low:.3f} to {high:.3f})")
    assert pairs[4:] == (f"-0.200* ({down:+.3f} to {up:+.3f})", "above chance (0.500)")
    # Of the same rows in clusters the interval is wider, and has no star.
    _, down, up = paired_over_items(RIGHT["aligned"], RIGHT["base"], CLUSTERS)
    assert by_task["stereotype, agreed"][4:] == (f"-0.200 ({down:+.3f} to {up:+.3f})", "")
    assert pairs[4] != by_task["stereotype, agreed"][4]


def test_a_task_at_chance_is_uninformative_though_nothing_changed(run):
    row = next(row for row in tax.table(run).rows if row[0] == "hhh, accuracy")
    assert row[5].startswith("+0.000 (") and row[6] == "uninformative (0.500)"


def test_perplexities_are_compared_by_their_ratio(run):
    row = next(row for row in tax.table(run).rows if row[0] == "perplexity")
    assert row[2] == "9.00 (8.00 to 10.00)" and row[3] == "+1.0%* (+1.0% to +1.0%)"
    ratio, low, high = paired_ratio(PERPLEXITY["aligned"], PERPLEXITY["base"], range(40))
    assert ratio == pytest.approx(np.exp(0.1)) and low < ratio < high
    assert row[5] == f"+10.5%* ({100 * (low - 1):+.1f}% to {100 * (high - 1):+.1f}%)" and row[6] == "above +5%"


@pytest.mark.parametrize(
    "ratio, words",
    [((1.02, 1.01, 1.05), "at most +5%"), ((1.04, 1.0, 1.06), "may be above +5%"), ((1.2, 1.06, 1.3), "above +5%")],
)
def test_what_a_ratio_is_read_as(ratio, words):
    assert tax.reading({"low": 3.0}, None, tax.Interval(*ratio)) == words


def test_changes_are_over_the_items_that_both_have():
    before, after = (task("gsm8k", "exact_match", [value] * 40, 0.02) for value in (0, 1))
    del after["responses"][5]["protocol"]["exact_match"]
    after["responses"][6]["prompt"] = "another question"
    n, change = tax.change(after, before, "exact_match")
    assert n == 38 and change.mean == 1
    assert tax.change(after | {"responses": []}, before, "exact_match") == (0, None)


def test_the_report_and_the_terminal_show_it(run):
    page = single.report(run).read_text()
    assert "Tax: the change in other tasks" in page and "uninformative (0.500)" in page
    assert "does not mean that there is no tax" in " ".join(page.split())
    assert "uninformative" in single.terminal_table(run)


def test_a_run_without_such_tasks_has_no_table(tmp_path):
    run = pages.load_run(small_run.write(tmp_path / "run"))
    assert tax.table(run) is None and "Tax:" not in single.report(run).read_text()
