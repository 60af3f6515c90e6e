"""Pictures say what the numbers say and invent nothing."""

import numpy as np
import pytest
from helpers import small_run
from helpers.small_run import CATEGORIES, HARMLESS, result, rows
from matplotlib.figure import Figure

from drirl_jax.reports import plots
from drirl_jax.reports.intervals import wilson


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
    expected = [wilson(1, 8), wilson(0, 8), wilson(7, 8), wilson(8, 8)]
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


def test_the_multipliers_of_a_constraint_are_drawn(tmp_path, figures):
    metrics = rows()
    for row in metrics[8:]:
        row |= {name: row["step"] for name in ("lambda", "lambda/insult", "harm", "harm/insult")}
    paths = plots.training_curves(metrics, CATEGORIES, tmp_path)
    assert {"lambda", "harm"} <= set(paths) and is_png(paths["lambda"])
    assert set(drawn(figures["lambda"])) == {"insult", "all categories"}
    assert plots.describe(plots.CURVES["lambda"]) == "Multiplier λ of the constraint by alignment step"


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


def test_the_curve_of_prefills_is_the_shares_and_their_intervals(tmp_path, figures):
    curves = {name: of["prefill"]["curve"] for name, of in small_run.depth()["policies"].items()}
    assert is_png(plots.prefill_curve(curves, "success", tmp_path / "picture.png"))
    axes = figures["picture"].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "5", "40"]
    bars = {container.get_label(): container for container in axes.containers}
    assert list(bars) == ["base", "sft", "aligned"]
    assert bars["aligned"].lines[0].get_ydata().tolist() == [0.1, 0.5, 0.9]
    drawn_bounds = [segment[:, 1] for segment in bars["aligned"].lines[2][0].get_segments()]
    np.testing.assert_allclose(drawn_bounds, [wilson(n, 20) for n in (2, 10, 18)])
    assert len({container.lines[0].get_color() for container in bars.values()}) == 3


def test_a_share_without_a_verdict_is_a_gap(tmp_path, figures):
    point = {"tokens": 0, "success": {"value": None, "low": None, "high": None, "n": 0}}
    assert is_png(plots.prefill_curve({"base": [point]}, "success", tmp_path / "picture.png"))
    assert np.isnan(figures["picture"].axes[0].containers[0].lines[0].get_ydata()).all()


def test_kl_is_drawn_from_the_first_token_on(tmp_path, figures):
    kl = {"aligned": small_run.depth()["policies"]["aligned"]["kl"]}
    assert is_png(plots.kl_by_position(kl, tmp_path / "kl.png"))
    lines = drawn(figures["kl"])
    np.testing.assert_array_equal(lines["aligned, harmful prompts"], ([1, 2, 3], [2.0, 0.5, 0.25]))
    np.testing.assert_array_equal(lines["aligned, harmless prompts"], ([1, 2], [0.5, 0.25]))


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
