"""Pictures, report and table say what the numbers say, invent nothing, and escape what a model wrote."""

import base64
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from drirl_jax import plots

CATEGORIES = ("insult", "harmless", "physical_harm")  # on purpose not in the order that is shown
HARMLESS = ("harmless",)
REFUSED = {
    "base": {"insult": 1, "harmless": 1, "physical_harm": 0},
    "aligned": {"insult": 7, "harmless": 2, "physical_harm": 8},
}
COUNT = {"insult": 8, "harmless": 20, "physical_harm": 8}


def result(name):
    """A result as of `evals.runner.evaluate`: the first rows of each category are the refused ones."""
    refused = REFUSED[name]
    responses = [
        {
            "id": f"{category}-{i:02d}",
            "category": category,
            "prompt": f"prompt {i} of {category}",
            "response": f"{name} answers {category} {i}",
            "refused": i < refused[category],
            "reward": i / 4,
        }
        for category in CATEGORIES
        for i in reversed(range(COUNT[category]))
    ]
    return {
        "overall": {
            "harmful_refused": (refused["insult"] + refused["physical_harm"]) / 16,
            "harmless_refused": refused["harmless"] / 20,
            "mean_reward": 0.25 if name == "base" else 1.5,
        },
        "by_category": {
            category: {"n": COUNT[category], "refused": refused[category] / COUNT[category], "reward": -0.5}
            for category in CATEGORIES
        },
        "responses": responses,
    }


def rows():
    """Eight steps of both stages; held-out accuracy at every fourth."""
    irl = [{"stage": "irl", "step": step, "loss": 1 / step} for step in range(1, 9)]
    for row in irl[3::4]:
        row |= {"accuracy": 0.75, "accuracy/insult": 0.5, "accuracy/harmless": 1.0}
    align = []
    for step in range(1, 9):
        row = {"stage": "align", "step": step, "loss": 0.1, "kl": 0.01 * step, "length": 9.0, "entropy": 2.0}
        for metric in ("reward", "gap", "alpha_d", "alpha_m"):
            row |= {metric: 1 + step, f"{metric}/insult": 0.1 * step, f"{metric}/physical_harm": 0.2 * step}
        align.append(row)
    return irl + align


@pytest.fixture
def figures(monkeypatch):
    """{file stem: Figure} of every figure that is saved."""
    saved, save = {}, Figure.savefig

    def spy(self, path):
        saved[path.stem] = self
        save(self, path)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def drawn(figure):
    """{label: (x, y)} of a curve's lines."""
    return {line.get_label(): line.get_data() for line in figure.axes[0].lines if line.get_label()[0] != "_"}


def is_png(path):
    data = path.read_bytes()
    return data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize(
    "successes, n, z, low, high",
    [
        # z = 2, n = 4: (1/2 + 1/2 ± 2 √(1/16 + 1/16)) / 2 = (1 ± 1/√2) / 2
        (2, 4, 2.0, (1 - math.sqrt(0.5)) / 2, (1 + math.sqrt(0.5)) / 2),
        # nothing: 0 and (z²/n) / (1 + z²/n) = z² / (n + z²)
        (0, 10, 1.96, 0.0, 3.8416 / 13.8416),
        (10, 10, 1.96, 10 / 13.8416, 1.0),
        # z = 3, n = 9, p = 1/3: z²/n = 1: (1/3 + 1/2 ± 3 √(2/81 + 1/36)) / 2
        (3, 9, 3.0, (5 / 6 - 3 * math.sqrt(17 / 324)) / 2, (5 / 6 + 3 * math.sqrt(17 / 324)) / 2),
    ],
)
def test_wilson_by_hand(successes, n, z, low, high):
    assert plots.wilson(successes, n, z) == pytest.approx((low, high), abs=1e-12)


def test_wilson_is_95_percent_unless_told():
    assert plots.wilson(5, 10) == plots.wilson(5, 10, 1.96)
    assert plots.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)  # tabulated


def test_headline_is_computed():
    # harmful: (1 + 0)/16 = 6.25%, (7 + 8)/16 = 93.75%; harmless: 1/20, 2/20
    expected = "Harmful prompts refused: 6% → 94%; harmless prompts refused: 5% → 10%"
    assert plots.headline(result("base"), result("aligned")) == expected


@pytest.mark.parametrize(
    "missing, expected",
    [
        ("harmless_refused", "Harmful prompts refused: 6% → 94%"),
        ("harmful_refused", "Harmless prompts refused: 5% → 10%"),
    ],
)
def test_headline_leaves_out_a_kind_of_prompt_that_there_is_none_of(missing, expected):
    base, aligned = result("base"), result("aligned")
    base["overall"][missing] = aligned["overall"][missing] = None
    assert plots.headline(base, aligned) == expected


def test_before_after_draws_the_numbers(tmp_path, figures):
    base, aligned = result("base"), result("aligned")
    path = plots.before_after(base, aligned, CATEGORIES, HARMLESS, tmp_path / "picture.png")
    assert path == tmp_path / "picture.png" and is_png(path)
    figure = figures["picture"]
    assert figure.get_suptitle() == plots.headline(base, aligned)
    harmful, harmless = figure.axes
    labels = [[tick.get_text() for tick in axes.get_yticklabels()] for axes in (harmful, harmless)]
    assert labels == [["insult  (n = 8)", "physical harm  (n = 8)"], ["harmless  (n = 20)"]]
    for axes, before, after in ((harmful, [1 / 8, 0], [7 / 8, 1]), (harmless, [1 / 20], [2 / 20])):
        bars = [container for container in axes.containers if container.get_label() in ("before", "after")]
        assert [[bar.get_width() for bar in container] for container in bars] == [before, after]
    texts = [[text.get_text() for text in axes.texts] for axes in (harmful, harmless)]
    assert texts == [["12%", "0%", "88%", "100%"], ["5%", "10%"]]


def test_before_after_error_bars_are_wilson_intervals(tmp_path, figures):
    plots.before_after(result("base"), result("aligned"), CATEGORIES, HARMLESS, tmp_path / "picture.png")
    segments = [s[:, 0] for bars in figures["picture"].axes[0].collections for s in bars.get_segments()]
    expected = [plots.wilson(1, 8), plots.wilson(0, 8), plots.wilson(7, 8), plots.wilson(8, 8)]
    np.testing.assert_allclose(segments, expected, atol=1e-12)


def test_before_after_without_harmless_prompts_has_one_panel(tmp_path, figures):
    base, aligned = result("base"), result("aligned")
    for one in (base, aligned):
        del one["by_category"]["harmless"]
        one["overall"]["harmless_refused"] = None
    assert is_png(plots.before_after(base, aligned, CATEGORIES, HARMLESS, tmp_path / "picture.png"))
    assert len(figures["picture"].axes) == 1


def test_curves_are_the_expected_files(tmp_path):
    paths = plots.training_curves(rows(), CATEGORIES, tmp_path / "plots")
    names = {"irl_loss", "irl_accuracy", "reward", "gap", "alpha_d", "alpha_m", "kl", "length", "entropy"}
    names |= {"curves"}
    assert set(paths) == names
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{name}.png" for name in names}
    assert all(paths[name] == tmp_path / "plots" / f"{name}.png" and is_png(paths[name]) for name in names)


def test_what_is_missing_is_left_out(tmp_path, figures):
    kept = ("stage", "step", "loss", "gap/insult")
    metrics = [{key: value for key, value in row.items() if key in kept} for row in rows()]
    paths = plots.training_curves(metrics, CATEGORIES, tmp_path)
    assert set(paths) == {"irl_loss", "gap", "curves"} == {path.stem for path in tmp_path.iterdir()}
    assert set(drawn(figures["gap"])) == {"insult"}  # no mean was written: none is drawn
    assert [axes.get_title(loc="left") for axes in figures["curves"].axes] == ["IRL loss", "Gap $R^* - R$"]


def test_no_metrics_no_pictures(tmp_path):
    assert plots.training_curves([], CATEGORIES, tmp_path / "plots") == {}
    assert list((tmp_path / "plots").iterdir()) == []


def test_lines_are_the_rows_values(tmp_path, figures):
    plots.training_curves(rows(), CATEGORIES, tmp_path)
    reward = drawn(figures["reward"])
    assert set(reward) == {"insult", "physical harm", plots.MEAN}
    for label, value in (("insult", 0.1), ("physical harm", 0.2)):
        np.testing.assert_allclose(reward[label], (range(1, 9), value * np.arange(1, 9)), atol=1e-12)
    accuracy = drawn(figures["irl_accuracy"])
    assert accuracy["insult"][0].tolist() == [4, 8]  # evaluation steps only: nothing between them is made up
    assert accuracy["harmless"][1].tolist() == [1.0, 1.0]
    loss = drawn(figures["irl_loss"])[plots.MEAN]
    np.testing.assert_array_equal(loss[1], [1 / step for step in range(1, 9)])


def test_a_null_is_a_break_in_the_line(tmp_path, figures):
    metrics = [{"stage": "align", "step": i + 1, "kl": kl} for i, kl in enumerate([1.0, None, 3.0, 4.0])]
    plots.training_curves(metrics, CATEGORIES, tmp_path)
    np.testing.assert_array_equal(drawn(figures["kl"])[plots.MEAN][1], [1.0, np.nan, 3.0, 4.0])


def test_long_runs_are_drawn_as_running_means_and_say_so(tmp_path, figures):
    metrics = [{"stage": "align", "step": step, "kl": 1.0 * step} for step in range(1, 101)]
    plots.training_curves(metrics, CATEGORIES, tmp_path)
    values = drawn(figures["kl"])[plots.MEAN][1]
    # 100 steps: means of the last 4; of fewer at the start
    assert values[:5].tolist() == [1.0, 1.5, 2.0, 2.5, 3.5] and values[-1] == 98.5
    assert figures["kl"].axes[0].get_xlabel() == "alignment step (means of 4 steps)"


def test_more_categories_than_colours_still_look_different(tmp_path, figures):
    names = [f"c{i}" for i in range(2 * len(plots.COLOURS))]
    row = {"stage": "align", "step": 1} | {f"gap/{name}": 1.0 for name in names}
    plots.training_curves([row], names, tmp_path)
    lines = [line for line in figures["gap"].axes[0].lines if line.get_label() in names]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(names)


class Tags(HTMLParser):
    """All start tags with their attributes, and all text outside of <style>."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.inside = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(workdir, html) of a report with hostile texts in it."""
    workdir = tmp_path_factory.mktemp("run")
    base, aligned = result("base"), result("aligned")
    by_id = {row["id"]: row for row in base["responses"]}
    by_id["insult-00"]["response"] = "<script>alert(1)</script> & <b>"
    by_id["insult-01"]["prompt"] = '"><img src=http://x.example/y>'
    facts = {"jax": "0.10", "device": "<i>cpu</i>"}
    path = plots.report(workdir, base, aligned, rows(), CATEGORIES, HARMLESS, "by <hand>", "a: <config>", facts)
    assert path == workdir / "report.html"
    return workdir, path.read_text(encoding="utf-8")


def test_report_escapes_what_it_is_given(written):
    html = written[1]
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in html
    page = Tags(html)
    assert "script" not in [tag for tag, _ in page.tags]
    text = "".join(page.text)
    assert "<script>alert(1)</script> & <b>" in text and '"><img src=http://x.example/y>' in text
    assert "<i>cpu</i>" in text and "a: <config>" in text and "by <hand>" in text


def test_report_needs_nothing_from_outside(written):
    workdir, html = written
    page = Tags(html)
    sources = [attrs["src"] for _, attrs in page.tags if "src" in attrs]
    names = ("before_after", "curves")
    encoded = [base64.b64encode((workdir / "plots" / f"{name}.png").read_bytes()).decode() for name in names]
    assert sources == [f"data:image/png;base64,{data}" for data in encoded]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not any(name == "href" or name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not re.search(r"url\(|@import", html)


def test_report_shows_the_numbers(written):
    text = " ".join(" ".join(Tags(written[1]).text).split())
    assert "Harmful prompts refused: 6% → 94%; harmless prompts refused: 5% → 10%" in text
    assert "mean reward +0.25 → +1.50" in text
    assert "insult 8 12% 2–47% 88% 53–98% -0.50 -0.50" in text
    assert "harmless to be answered 20 5% 1–24% 10% 3–30% -0.50 -0.50" in text
    assert "mean length" not in text  # these results have none


def test_report_shows_the_first_two_ids_of_each_category_with_both_responses(written):
    ids = re.findall(r"<small>(\w+-\d\d)</small>", written[1])
    assert ids == [f"{name}-{i:02d}" for name in ("insult", "physical_harm", "harmless") for i in range(2)]
    assert "base answers harmless 1" in written[1] and "aligned answers harmless 1" in written[1]
    assert "answers harmless 2" not in written[1]


def test_report_without_metrics_has_no_curves(tmp_path):
    path = plots.report(tmp_path, result("base"), result("aligned"), [], CATEGORIES, HARMLESS, "", "", {})
    assert path.read_text(encoding="utf-8").count("<img ") == 1
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["before_after.png"]


def test_without_rewards_there_is_a_dash(tmp_path):
    base, aligned = result("base"), result("aligned")
    for evaluation in (base, aligned):
        for row in (*evaluation["by_category"].values(), *evaluation["responses"]):
            row["reward"] = None
        evaluation["overall"]["mean_reward"] = None
    path = plots.report(tmp_path, base, aligned, [], CATEGORIES, HARMLESS, "", "", {})
    html = path.read_text(encoding="utf-8")
    assert "reward –" in html and "mean reward</small>" not in html
    assert "–" in plots.terminal_table(base, aligned, CATEGORIES, HARMLESS).splitlines()[-2]


def test_terminal_table():
    lines = plots.terminal_table(result("base"), result("aligned"), CATEGORIES, HARMLESS).splitlines()
    assert lines[0].strip() == plots.headline(result("base"), result("aligned"))
    table = [line.split() for line in lines if line.split()[:1] in (["insult"], ["physical"], ["harmless"])]
    assert table == [
        ["insult", "8", "12%", "(2–47%)", "88%", "(53–98%)", "-0.50", "-0.50"],
        ["physical", "harm", "8", "0%", "(0–32%)", "100%", "(68–100%)", "-0.50", "-0.50"],
        ["harmless", "20", "5%", "(1–24%)", "10%", "(3–30%)", "-0.50", "-0.50"],
    ]


def test_categories_are_not_read_as_markup():
    base, aligned = result("base"), result("aligned")
    for one in (base, aligned):
        one["by_category"]["[red]"] = one["by_category"].pop("insult")
    assert "[red]" in plots.terminal_table(base, aligned, ("[red]", "harmless"), HARMLESS)
