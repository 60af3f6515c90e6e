"""The guides speak of this tree: options, functions and error sentences are there, and examples apply and run."""

import functools
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import drirl_jax
from drirl_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(drirl_jax.__file__).parent
PAGES = {page.name: page.read_text("utf-8") for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
GUIDES = [name for name in PAGES if name.islower() or name == "README.md"]
# What each example's diff brings along, and the file without which it has nothing to apply to.
EXAMPLES = {
    "scaling_rule": ("tests/harmonic_test.py", "drirl_jax/scaling.py"),
    "objective": ("tests/stages/raft_test.py", "drirl_jax/stages/objectives/__init__.py"),
    "family": ("tests/models/families_test.py", "drirl_jax/models/families.py"),
    "benchmark": ("tests/evals/benchmarks_test.py", "drirl_jax/evals/benchmarks.py"),
}
CHOSEN = "harmonic_test or raft_test or layers_test or published_files or (seed_oss and alone)"


@pytest.mark.parametrize("name", GUIDES)
def test_flags_are_options(name):
    for key in re.findall(r"--config\.([\w.]+)=", PAGES[name]):
        config_lib.get_option(config_lib.default(), key)


def test_the_methods_table_names_functions_and_options_that_are_there():
    rows = [line.split(" | ") for line in PAGES["method.md"].splitlines() if line.startswith("| ")]
    rows = [row for row in rows if "`" in row[-2]]
    assert len(rows) > 30
    for _, functions, options in rows:
        for name in re.findall(r"`([\w.]+)`", functions):
            module, _, function = name.rpartition(".")
            assert hasattr(importlib.import_module(f"drirl_jax.{module}"), function), name
        for key in re.findall(r"`([\w.]+)`", options):
            config_lib.get_option(config_lib.default(), key)


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *NOTEBOOKS])
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, heading = target.partition("#")
        if "://" in path:
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if heading and there.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", there.read_text("utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles]
            assert heading in slugs, target


@functools.cache
def source():
    """All source text, pieces of one sentence joined."""
    text = "\n".join(path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_the_sentences_that_troubleshooting_quotes_are_the_codes_own():
    page = PAGES["troubleshooting.md"]
    quoted = [line.split(" | ")[0] for line in page.splitlines() if re.match(r"\| (the warning )?`", line)]
    quoted = [sentence for cell in quoted for sentence in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 25
    assert [sentence for sentence in quoted if sentence not in source()] == []


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """What the tests of a copy of the tree told, all examples applied."""
    if not shutil.which("git"):
        pytest.skip("the examples are applied by git")
    tree = tmp_path_factory.mktemp("extended")
    for folder in ("drirl_jax", "configs", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pytest.ini", tree)
    there = {name: test for name, (test, needs) in EXAMPLES.items() if (tree / needs).exists()}
    for name in there:
        subprocess.run(["git", "apply", str(ROOT / "docs" / "examples" / f"{name}.patch")], cwd=tree, check=True)
    command = [sys.executable, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", CHOSEN]
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, *there.values(), "tests/layers_test.py"], cwd=tree, env=environment, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_applies_and_runs(name, extended):
    test, needs = EXAMPLES[name]
    if not (ROOT / needs).exists():
        pytest.skip(f"this tree has no {needs}")
    assert "FAILED" not in extended and "ERROR" not in extended, extended[-3000:]
    assert f"PASSED {test}" in extended or f"SKIPPED [1] {test}" in extended, extended[-3000:]
    assert f"docs/examples/{name}.patch" in PAGES["family.md"] + PAGES["extend.md"]
