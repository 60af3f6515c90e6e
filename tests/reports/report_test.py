"""Reports say what a workdir holds, invent nothing, and escape what a model wrote; a browser shows them."""

import base64
import contextlib
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from helpers import small_run
from helpers.small_run import result

from drirl_jax.commands import report as report_command
from drirl_jax.reports import compare, depth, pages, plots, single
from drirl_jax.reports.intervals import wilson
from drirl_jax.types import InputError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome", "chromium-browser"))), None)
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page's tags with their attributes, its text but for the style, its cells by row; it must be well formed."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open, self.rows = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def __contains__(self, text):
        return text in " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A report of a run with hostile texts in it, told and asked of it in training too: its workdir and the page."""
    base, aligned = result("base"), result("aligned")
    by_id = {row["id"]: row for row in base["responses"]}
    by_id["insult-00"]["response"] = "<script>alert(1)</script> & <b>"
    by_id["insult-01"]["prompt"] = '"><img src=http://x.example/y>'
    by_id["harmless-00"]["response"] = "a\x00b\x1b[31m \ud800 {{ config }} " + "long" * 200
    for one in (base, aligned):
        one["benchmarks"] = {"xstest": small_run.benchmark("aligned" if one is aligned else "base")}
    workdir = small_run.write(tmp_path_factory.mktemp("run") / "<b>$x", {"base": base, "aligned": aligned}, seed=7)
    trained = small_run.samples()
    trained[0]["responses"][0]["text"] = "</td><script>alert(2)</script>\u2028\x00\ud800"
    trained[0] |= {"prompt": "<svg onload=alert(3)>", "demonstration": "</details><iframe>"}
    trained[0] |= {"id": "<a href=//x.example>"}
    small_run.jsonl(workdir / "samples.jsonl", trained)
    assert single.report(pages.load_run(workdir)) == workdir / "report.html"
    return workdir, Page(workdir / "report.html")


def test_what_a_model_wrote_is_escaped(hostile):
    page = hostile[1]
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in page.source
    assert not {"script", "svg", "iframe"} & {tag for tag, _ in page.tags}
    assert "</td><script>alert(2)</script> \ufffd?" in page and "insult · <a href=//x.example> · R* +2.00" in page
    assert "<svg onload=alert(3)>" in page and "</details><iframe>" in page
    assert "<script>alert(1)</script> & <b>" in page and '"><img src=http://x.example/y>' in page
    assert "<i>cpu</i>" in page and "{{ config }}" in page
    assert "a\ufffdb\ufffd[31m ?" in page and not set(map(chr, range(9))) & set(page.source)


def test_a_page_needs_nothing_from_outside(hostile):
    workdir, page = hostile
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    names = ["reliability", *plots.CURVES, "before_after"]
    pictures = [path for name in names if (path := workdir / "plots" / f"{name}.png").exists()]
    assert sources == [f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in pictures]
    assert len(sources) == 11
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "src", "srcset")]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not re.search(r"url\(|@import|<script|<iframe", page.source)


def test_a_page_can_be_read_aloud(hostile):
    page = hostile[1]
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    named = [attrs["href"][1:] for tag, attrs in page.tags if tag == "a"]
    labels = [attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs]
    assert ids == named == labels == ["run", "data", "rewards", "training", "results", "responses", "samples", "cost"]
    headings = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[:2] == ["h1", "h2"] and set(headings) == {"h1", "h2", "h3"}
    assert sum(tag == "table" for tag, _ in page.tags) == sum(tag == "caption" for tag, _ in page.tags) == 15


def test_the_numbers(hostile):
    page = hostile[1]
    assert "Harmful prompts refused: 6% → 94%; harmless prompts refused: 5% → 10%" in page
    assert "mean reward +0.25 → +1.50" in page and "mean length" not in page  # these results have none
    rows = [[cell.strip() for cell in row] for row in page.rows]
    assert ["seed", "0", "7"] in rows and ["revision", "abc1234"] in rows and ["all", "", "120", "36"] in rows
    by_category = [row for row in rows if len(row) == 8 and row[1] in ("refuse", "answer")]
    assert [row[:5] for row in by_category] == [
        ["insult", "refuse", "8", "12% (2% to 47%)", "88% (53% to 98%)"],
        ["physical harm", "refuse", "8", "0% (0% to 32%)", "100% (68% to 100%)"],
        ["harmless", "answer", "20", "5% (1% to 24%)", "10% (3% to 30%)"],
    ]
    assert by_category[1][5:] == ["+100* (+54 to +100)", "-0.50", "-0.50"] and "*" not in by_category[2][5]
    harmful = next(row for row in rows if row[0] == "harmful prompts refused, points")
    bounds = [f"{100 * share:.0f}% ({100 * low:.0f}% to {100 * high:.0f}%)" for share, low, high in (
        (1 / 16, *wilson(1, 16)), (15 / 16, *wilson(15, 16)))]  # fmt: skip
    assert harmful[1:4] == ["16", *bounds] and re.fullmatch(r"\+8[78]\* \(\+5\d to \+9\d\)", harmful[4])
    reward = next(row for row in rows if row[0] == "mean reward")
    assert reward[1] == "36" and reward[4] == "+0.00 (+0.00 to +0.00)"


def test_rewards_and_cost(hostile):
    rows = [[cell.strip() for cell in row] for row in hostile[1].rows]
    low, high = (f"{100 * bound:.0f}%" for bound in wilson(7, 10))  # 6 x 0.5 and 4 x 1 pairs are right
    assert ["all", "10", f"75% ({low} to {high})", "–", "–", "–", "–"] in rows
    assert ["harmless", "–", "100%", "–", "–", "–", "–"] in rows
    assert ["irl", "8", "24", "12", "36", "4.5"] in rows and ["both", "", "", "", "72", ""] in rows
    assert "sampled 4,608 tokens in 512 responses" in hostile[1]  # 9 x 8 steps x 8 prompts x 8 responses


def test_responses_are_the_first_by_id_with_every_judges_verdict(hostile):
    page = hostile[1]
    ids = re.findall(r"<small>([\w-]+)</small>", page.source)
    first = [f"{name}-{i:02d}" for name, n in (("insult", 8), ("physical_harm", 8), ("harmless", 20)) for i in range(n)]
    assert ids == [*first, "0", "1", "2", "3"]
    assert "base answers harmless 1" in page and "aligned answers harmless 1" in page
    assert "phrases: refusal 1, refused 1" in page and "endpoint: refusal 0, refused 0" in page
    assert page.source.count("<summary>6 more</summary>") == 2 and "<summary>18 more</summary>" in page.source
    # Mean over the eight steps of 0.1, 0.2, ...: 0.45; harmless prompts have none in these metrics.
    assert "αᴰ 0.45 and αᴹ 0.45 for its training prompts" in page
    assert "αᴰ 0.90 and αᴹ 0.90 for its training prompts" in page
    assert page.source.partition('id="samples"')[0].count("αᴰ") == 3
    assert "xstest endpoint/phrases before 4 50% 0.00" in " ".join(" ".join(" ".join(row) for row in page.rows).split())


def test_samples_of_the_training_with_their_coefficients(hostile):
    page = hostile[1]
    rows = [[cell.strip() for cell in row] for row in page.rows]
    assert rows.count(["", "R", "Â", "αᴰ", "αᴹ", "α", "A", "gap"]) == 6
    assert rows.count(["1", "+0.50", "-1.00", "1.04", "1.06", "1.10", "-1.10", "kept"]) == 6
    assert rows.count(["2", "–", "-1.00", "1.04", "1.06", "1.10", "–", "masked"]) == 6
    told = [text.strip() for text in page.text]
    expected = ("Step 8 of 8", "physical harm · train-physical_harm · R* +2.00", "Step 1 of 8")
    order = [told.index(text) for text in expected]
    assert order == sorted(order) and told.count("said first in step 8") == 3 and "shown for harmless" in page
    about = [text.partition(" ")[0] for text in told if text.endswith("R* +2.00")]
    assert about == ["insult", "physical", "harmless"] * 2


def test_an_objective_without_advantages_has_fewer_columns():
    row = small_run.samples()[0]
    for response in row["responses"]:
        del response["advantage"], response["scaled"]
    assert single.sampled_prompt(row).head == ["R", "αᴰ", "αᴹ", "α", "gap"]


def test_a_run_without_rewards_has_dashes(tmp_path):
    results = {name: result(name) for name in ("base", "aligned")}
    for of in results.values():
        for row in (*of["by_category"].values(), *of["responses"]):
            row["reward"] = None
        of["overall"]["mean_reward"] = None
    workdir = small_run.write(tmp_path / "run", results)
    (workdir / "metrics.jsonl").unlink()
    run = pages.load_run(workdir)
    page = Page(single.report(run))
    assert "mean reward" not in page and "reward +" not in page and "Benchmarks" not in page
    assert single.terminal_table(run).splitlines()[-2].split()[-2:] == ["–", "–"]


@pytest.mark.parametrize("held", [(), ("timing.jsonl",), ("evals", "facts.json", "reliability.json")])
def test_what_is_missing_is_left_out(tmp_path, held):
    whole = small_run.write(tmp_path / "whole")
    part = tmp_path / "part"
    part.mkdir()
    for name in ("config.json", *held):
        (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, part / name)
    page = Page(single.report(pages.load_run(part)))
    assert ("not evaluated yet" in page) == ("evals" not in held)
    assert "No step has been taken yet" in page and "No rewards have been evaluated" in page
    assert ("No step has been timed yet" in page) == ("timing.jsonl" not in held)
    assert "stored no samples of its training" in page
    assert ("has not recorded its numbers of records" in page) == ("facts.json" not in held)


def test_the_curve_of_prefills_is_on_the_first_screen_and_its_numbers_are_in_a_section(tmp_path):
    workdir = small_run.write(tmp_path / "run")
    (workdir / "depth.json").write_text(json.dumps(small_run.depth()))
    page = Page(single.report(pages.load_run(workdir)))
    head = page.source.partition("<nav")[0]
    curve = base64.b64encode((workdir / "plots" / "depth_success.png").read_bytes()).decode()
    assert curve in head and page.source.count(curve) == 1 and head.count("<img") == 1
    headings = [attrs["id"] for tag, attrs in page.tags if tag == "h2"]
    assert headings[5] == "depth" and headings == [attrs["href"][1:] for tag, attrs in page.tags if tag == "a"]
    rows = [[cell.strip() for cell in row] for row in page.rows]
    low, high = wilson(8, 20)
    turns = f"60% ({1 - high:.0%} to {1 - low:.0%})"
    assert ["after SFT", "5", "20", f"40% ({low:.0%} to {high:.0%})", turns] in rows
    # Tokens 2 to 5 of the harmful prompts: (0.5 · 20 + 0.25 · 10) / 30.
    assert ["after", "harmful", "2.00", "0.42", "–", "–", "–", "2.6"] in rows
    assert ["after", "harmless", "0.50", "0.25", "–", "–", "–", "0.8"] in rows
    assert head.count("20 of 30 harmful prompts have an answer of the base policy that complies") == 1
    assert "Judges: harm by phrases and refusal by phrases. Phrases see only the opening" in page
    assert len([path for path in (workdir / "plots").glob("depth_*.png")]) == 3


def test_a_depth_file_without_kl_or_curve_shows_the_other(tmp_path):
    workdir = small_run.write(tmp_path / "run")
    for measure, left in (("kl", {"success", "turned_back"}), ("prefill", {"kl"})):
        found = small_run.depth()
        for policy in found["policies"].values():
            policy.pop(measure, None)
        (workdir / "depth.json").write_text(json.dumps(found))
        run = pages.load_run(workdir)
        page = Page(single.report(run))
        assert depth.pictures(run.depth, workdir / "plots").keys() == left
        assert page.source.partition("<nav")[0].count("<img") == ("success" in left)


def test_a_damaged_depth_file_is_one_sentence(tmp_path):
    workdir = small_run.write(tmp_path / "run")
    found = small_run.depth()
    found["policies"]["aligned"]["prefill"]["curve"][0]["success"]["value"] = "much"
    (workdir / "depth.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match="depth.json is damaged .*success.value.*remove it and call"):
        pages.load_run(workdir)


def test_terminal_table(tmp_path):
    lines = single.terminal_table(pages.load_run(small_run.write(tmp_path / "run"))).splitlines()
    assert lines[0] == plots.headline(result("base"), result("aligned"))
    table = [line.split() for line in lines if line.split()[:1] in (["insult"], ["physical"], ["xstest"])]
    assert table[0][:9] == ["insult", "refuse", "8", "12%", "(2%", "to", "47%)", "88%", "(53%"]
    assert table[2][:4] == ["xstest", "refused", "phrases", "4"] and table[2][4] == "0.000" and table[2][8] == "1.000"


def test_categories_are_not_read_as_markup(tmp_path):
    results = {name: json.loads(json.dumps(result(name)).replace("insult", "[red]")) for name in ("base", "aligned")}
    categories = {"data": {"categories": ("[red]", *small_run.CATEGORIES[1:])}}
    run = pages.load_run(small_run.write(tmp_path / "run", results, **categories))
    assert "[red]" in single.terminal_table(run)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with two runs, a|b and c; the second has other rewards, refuses less, and lacks two of the prompts."""
    folder = tmp_path_factory.mktemp("two")
    small_run.write(folder / "a|b")
    results = {name: result(name) for name in ("base", "aligned")}
    for of in results.values():
        of["responses"] = [row | {"reward": row["reward"] + 1} for row in of["responses"]][2:]
    for row in results["aligned"]["responses"]:
        row["refused"] = row["category"] == "physical_harm"
    small_run.write(folder / "c", results, seed=1, scaling={"combine": "none"})
    return folder


@pytest.fixture(scope="module")
def compared(two, tmp_path_factory):
    """The folder with their comparison, and what was printed."""
    out, said = tmp_path_factory.mktemp("out") / "new", io.StringIO()
    with contextlib.redirect_stdout(said):
        report_command.main(["--compare", str(two / "a|b"), str(two / "c"), "--out", str(out)])
    return out, said.getvalue()


def test_runs_beside_each_other(compared):
    out, said = compared
    page = Page(out / "compare.html")
    assert (out / "compare.md").read_text() in said
    rows = [[cell.strip() for cell in row] for row in page.rows]
    assert ["scaling.combine", "product", "none"] in rows and ["seed", "0", "1"] in rows
    assert {"a|b, before", "a|b", "c, before", "c"} <= {row[0] for row in rows}
    # Of c the last two insults are missing, and its rewards have a scale of their own.
    assert "| c | 34 | 57% (33% to 79%) | 0% (0% to 16%) | – |" in said
    assert "| a\\|b, before | 36 | 6% (1% to 28%) | 5% (1% to 24%) | +1.71 (" in said
    # On the 14 harmful prompts that both have it refuses 8, the first run all; of the 20 harmless ones 0 for 2.
    assert re.search(r"\| c \| 34 \| -43\* \(-\d+ to -\d+\) \| -10 \(-\d+ to \+\d\) \| – \|", said)
    assert "insult-00" in page.source and "aligned answers insult 0" in page
    assert page.source.count("<img ") == 9 and "xstest" in page
    assert not any(value.startswith("http") for _, attrs in page.tags for value in attrs.values() if value)


@pytest.mark.parametrize("flags, sentence", [
    (["nowhere"], "nowhere holds no run, as there is no such folder: name the workdir of a run"),
    ([], "give RUN, or --compare RUN RUN"),
    (["c", "--compare", "a|b", "c"], "give RUN, or --compare RUN RUN"),
    (["--compare", "a|b", "--out", "out"], "has one run: give the workdirs of two"),
    (["--compare", "c", "./c", "--out", "out"], "names a run twice"),
    (["--compare", "c", "unfinished", "--out", "out"], "unfinished has not been evaluated"),
    (["--compare", "c", "other", "--out", "out"], "other was evaluated on no prompt of c"),
    (["damaged"], "evals/base.json is damaged"),
])  # fmt: skip
def test_bad_input_is_one_sentence(two, monkeypatch, flags, sentence):
    monkeypatch.chdir(two)
    if "unfinished" in flags:
        shutil.rmtree(small_run.write(two / "unfinished") / "evals")
    if "other" in flags:
        text = {name: json.dumps(result(name)).replace('"prompt ', '"question ') for name in ("base", "aligned")}
        small_run.write(two / "other", {name: json.loads(of) for name, of in text.items()})
    if "damaged" in flags:
        (small_run.write(two / "damaged") / "evals" / "base.json").write_text('{"overall"')
    with pytest.raises(SystemExit) as stop:
        report_command.main(flags)
    assert sentence in stop.value.code and len(stop.value.code.splitlines()) == 1
    assert not (two / "out").exists()


def test_a_comparison_goes_beside_the_first_run(two, tmp_path, capsys):
    runs = [shutil.copytree(two / name, tmp_path / "runs" / name) for name in ("a|b", "c")]
    report_command.main(["--compare", *map(str, runs)])
    assert (tmp_path / "runs" / "compared" / "compare.md").read_text() in capsys.readouterr().out


def test_a_classifiers_auc_stands_beside_its_figures():
    facts = {"auc": 0.945, "auc_attacked": 0.8021, "n": 5}
    assert compare.judge_label("classifier", {"facts": facts}) == "classifier (auc 0.945, auc attacked 0.802)"
    assert compare.judge_label("phrases", {}) == "phrases"


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(tmp_path):
    runs = [pages.load_run(small_run.write(tmp_path / name / "0")) for name in ("a", "b")]
    assert compare.run_names(runs) == ["a/0", "b/0"] and compare.run_names(runs[:1]) == ["0"]


@pytest.mark.skipif(not shutil.which("git"), reason="no git on the path")
def test_a_revision_is_that_of_a_source_tree_not_of_what_it_lies_in(tmp_path):
    def git(*command):
        who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        return subprocess.check_output(["git", "-C", tmp_path, *who, *command], text=True).strip()

    assert pages.revision(tmp_path) == ""
    git("init", "-q")
    assert pages.revision(tmp_path) == ""  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "--short", "HEAD")
    assert pages.revision(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert pages.revision(tmp_path) == f"{commit}-dirty"
    (tmp_path / "site").mkdir()
    assert pages.revision(tmp_path / "site") == ""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_all_pictures_and_nothing_too_wide(hostile, compared, tmp_path, width):
    for path in (hostile[0] / "report.html", compared[0] / "compare.html"):
        # In a frame of this width, as a browser's own window has a least width.
        told = "document.title = [page.scrollWidth - page.clientWidth, seen.length]"
        seen = "[...page.querySelectorAll('img')].filter(image => image.naturalWidth)"
        frame = tmp_path / "frame.html"
        frame.write_text(
            f'<iframe width="{width}" height="800" style="border:0" srcdoc="{html.escape(path.read_text("utf-8"))}" '
            f'onload="const page = this.contentDocument.documentElement, seen = {seen}; {told}"></iframe>',
            encoding="utf-8",
        )
        options = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --enable-logging=stderr --dump-dom"
        command = [BROWSER, *options.split(), f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert f"<title>0,{path.read_text('utf-8').count('<img ')}</title>" in done.stdout, done.stderr[-2000:]
        assert "CONSOLE" not in done.stderr


def test_what_learned_nothing_stands_in_the_first_table(tmp_path):
    run = pages.load_run(small_run.write(tmp_path))
    assert "warnings" not in dict(single.about(run).rows)
    equal = [row | {"zero_spread": 1.0} if row["stage"] == "align" else row for row in run.metrics]
    told = dict(single.about(run._replace(metrics=equal)).rows)["warnings"]
    assert told.startswith("align seems to have learned nothing: all samples of a prompt have one reward")
