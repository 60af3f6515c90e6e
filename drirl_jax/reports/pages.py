"""The parts of reports: a run read from its workdir, numbers as text, tables, pictures, and HTML pages."""

from __future__ import annotations

import base64
import html
import json
import math
import pathlib
import re
import subprocess
import time
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import flax.traverse_util
import jax
import jinja2
import rich.box
import rich.table
from ml_collections import ConfigDict

import drirl_jax
from drirl_jax.data import overlap
from drirl_jax.data.examples import Examples
from drirl_jax.judges import first_of_kind
from drirl_jax.reports.intervals import Interval, paired_difference
from drirl_jax.reports.plots import percent
from drirl_jax.runtime import console, json_files, metrics, workdirs
from drirl_jax.runtime.files import replace_file

# Prompts, responses and names are untrusted: all text is escaped, and the characters of `console.CONTROLS` replaced.
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("drirl_jax.reports"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


REPEATED = "repeated prompts"  # a key of facts.json: see `data.overlap.describe_repeats`


# The forms of the files in a workdir: see `json_files`.
FIGURE = {"value": float, "low": float, "high": float, "n": int, ...: object}
BENCHMARK = {
    "judge": str,
    "judges": {...: {"metrics": {...: FIGURE}}},
    "agreement": {...: {"n": int, "agree": float, "kappa": json_files.NUMBER}},
    "responses": [dict],
    json_files.Maybe("tax"): {...: json_files.NUMBER},
    json_files.Maybe("geometric"): [str],
}
RESULT = {
    "overall": {...: json_files.NUMBER},
    "by_category": {...: {"n": int, "refused": json_files.NUMBER, "reward": json_files.NUMBER}},
    "responses": [
        {
            "id": str,
            "category": str,
            "prompt": str,
            "response": str,
            "refused": (bool, type(None)),
            "reward": json_files.NUMBER,
        }
    ],
}
EVALUATION = RESULT | {json_files.Maybe("benchmarks"): {...: BENCHMARK}}
SHARE = {"value": json_files.NUMBER, "low": json_files.NUMBER, "high": json_files.NUMBER, "n": int}
DEPTH_FILE = "depth.json"  # in the workdir, from `python -m drirl_jax depth`
DEPTH = {
    "settings": {"answers": str, "judges": {...: str}, ...: object},
    "judges": {...: str},
    "asked": int,
    "complying": {...: str},
    "policies": {
        ...: {
            json_files.Maybe("prefill"): {"curve": [{"tokens": int, "success": SHARE, "turned_back": SHARE}]},
            json_files.Maybe("kl"): {...: {"mean": [float], "n": [int], "answer": float}},
            ...: object,
        }
    },
}
FACTS = {json_files.Maybe("records"): {...: {...: int}}}
RELIABILITY = {...: [{"n": int, "confidence": json_files.NUMBER, "right": json_files.NUMBER}]}
SAMPLES = json_files.ROW | {
    "category": str,
    "id": str,
    "prompt": str,
    "demonstration": str,
    "responses": [{"text": str}],
}


class Run(NamedTuple):
    """A run, read from its workdir; what the run has not written yet is empty.

    Attributes:
        config: from config.json.
        facts: the machine and the data, as `train.run` wrote them to facts.json.
        metrics, timing, samples: rows of metrics.jsonl, timing.jsonl and samples.jsonl.
        base, warm, aligned: results of `evals.runner.evaluate`, with "benchmarks"; `warm` is of the stage `sft`.
        reliability: of the rewards, by category; see `stages.calibration.reliability`.
        depth: of depth.json, which `python -m drirl_jax depth` writes.
    """

    workdir: pathlib.Path
    config: ConfigDict
    facts: dict
    metrics: list[dict]
    timing: list[dict]
    samples: list[dict]
    base: dict
    warm: dict
    aligned: dict
    reliability: dict
    depth: dict

    @property
    def harmless(self) -> tuple[str, ...]:
        """The categories whose prompts should be answered."""
        return self.config.data.harmless

    @property
    def evaluated(self) -> list[str]:
        """The categories that were evaluated, in the config's order, the harmful ones first."""
        names = [name for name in self.config.data.categories if name in self.base["by_category"]]
        return sorted(names, key=lambda name: name in self.harmless)

    def rows(self, stage: str) -> list[dict]:
        """The stage's rows of metrics.jsonl."""
        return [row for row in self.metrics if row["stage"] == stage]


def refusal_judge(run: Run) -> str:
    """The name of the judge that counted the run's refusals."""
    return first_of_kind(run.config.evals.judges, "refusal")


def load_run(workdir: pathlib.Path) -> Run:
    """Reads the run of a workdir. Raises InputError if the folder holds no run, or a file is damaged."""
    config = workdirs.load_config(workdir)

    def load_if_present(name: str, form: Any, remedy: str = "start the run again") -> dict:
        path = workdir / name
        hint = f"remove it and {remedy}, which makes it anew"
        return json_files.load(path, form, hint) if path.exists() else {}

    metric_rows, timing_rows = (metrics.read_jsonl(workdir / f"{name}.jsonl") for name in ("metrics", "timing"))
    samples = json_files.rows(workdir / "samples.jsonl", SAMPLES)
    base, warm, aligned = (load_if_present(f"evals/{name}.json", EVALUATION) for name in ("base", "sft", "aligned"))
    facts, reliability = load_if_present("facts.json", FACTS), load_if_present("reliability.json", RELIABILITY)
    depth = load_if_present(DEPTH_FILE, DEPTH, "call `python -m drirl_jax depth` again")
    return Run(workdir, config, facts, metric_rows, timing_rows, samples, base, warm, aligned, reliability, depth)


def facts_of(examples: Mapping[str, Examples], categories: Sequence[str]) -> dict:
    """The facts of program, machine and data for facts.json: `records` by split and category, and REPEATED, if any."""
    facts = {
        "drirl_jax": drirl_jax.__version__,
        "revision": revision(pathlib.Path(drirl_jax.__file__).parents[1]),
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "records": {
            split: {name: len(rows) for name, rows in zip(categories, split_examples.rows_by_category(len(categories)))}
            for split, split_examples in examples.items()
        },
        REPEATED: overlap.describe_repeats(examples),
    }
    return {name: value for name, value in facts.items() if value}


def revision(source: pathlib.Path) -> str:
    """The commit of a source tree, with "-dirty" after it if there are changes; "" if it is unknown."""
    if not (source / ".git").exists():  # an installed package may be inside another project's tree
        return ""
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_facts(workdir: pathlib.Path, facts: Mapping) -> None:
    """Writes facts.json; it describes the last start of the run."""
    replace_file(workdir / "facts.json", json.dumps(facts, indent=1) + "\n")


def differences(*configs: ConfigDict) -> dict[str, tuple]:
    """Dotted key -> its value in each config, for the keys whose values are not all the same."""
    flat = [flax.traverse_util.flatten_dict(json.loads(c.to_json_best_effort()), sep=".") for c in configs]
    keys = dict.fromkeys(key for options in flat for key in options)
    values = {key: tuple(options.get(key) for options in flat) for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def format_option(option: Any) -> str:
    """The value of an option as text."""
    if isinstance(option, list) and option:
        return ", ".join(map(format_option, option))
    return option if isinstance(option, str) and option else json.dumps(option, ensure_ascii=False)


class Measure(NamedTuple):
    """A number of an evaluation that is a mean over prompts.

    Attributes:
        text, change: the formats of the number and of a difference of two.
        value: (a response's row, whether its prompt is harmless) -> its value; None if it has none.
        is_share: whether all values are 0 or 1.
    """

    title: str
    text: Callable[[float], str]
    change: Callable[[float], str]
    value: Callable[[Mapping, bool], float | None]
    is_share: bool


def signed(value: float | None) -> str:
    """The value with its sign and two decimals; a dash for None."""
    return "–" if value is None else f"{value:+.2f}"


def points(value: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * value:+.0f}"


MEASURES = {
    "harmful_refused": Measure(
        "harmful prompts refused", percent, points, lambda row, harmless: None if harmless else row["refused"], True
    ),
    "harmless_refused": Measure(
        "harmless prompts refused", percent, points, lambda row, harmless: row["refused"] if harmless else None, True
    ),
    "reward": Measure("mean reward", signed, signed, lambda row, harmless: row["reward"], False),
}


def key_of(row: Mapping) -> tuple[str, str]:
    """The key of an evaluated prompt. An id alone is not enough: other data may have the same ids."""
    return row["id"], row["prompt"]


def values_of(measure: Measure, result: Mapping, harmless: Sequence[str]) -> dict[tuple[str, str], float]:
    """The measure's value of each prompt that has one, by `key_of`."""
    values = {key_of(row): measure.value(row, row["category"] in harmless) for row in result["responses"]}
    return {name: float(value) for name, value in values.items() if value is not None}


def change_of(values: Mapping[tuple, float], reference: Mapping[tuple, float], is_share: bool) -> Interval | None:
    """The mean difference on the prompts that both have: see `intervals.paired_difference`; None if they share none."""
    shared = [prompt for prompt in reference if prompt in values]
    if not shared:
        return None
    return paired_difference([values[key] for key in shared], [reference[key] for key in shared], is_share)


def format_interval(estimate: Interval | None, text: Callable[[float], str], mark: str = "") -> str:
    """An interval as text, such as "12% (2% to 47%)", with the mark after the mean; a dash for None."""
    if estimate is None:
        return "–"
    bounds = "" if math.isnan(estimate.low) else f" ({text(estimate.low)} to {text(estimate.high)})"
    return f"{text(estimate.mean)}{mark}{bounds}"


def excludes_zero(change: Interval | None) -> bool:
    """Whether this interval of a difference excludes 0."""
    return change is not None and (change.low > 0 or change.high < 0)


def format_change(change: Interval | None, text: Callable[[float], str]) -> str:
    """A difference as text by `format_interval`, with a star if its interval excludes 0."""
    return format_interval(change, text, "*" if excludes_zero(change) else "")


def markdown(text: str) -> str:
    """The text as one line of plain Markdown: nothing in it acts as HTML, link, picture, code or table cell."""
    return html.escape(re.sub(r"([\\|\[\]`])", r"\\\1", " ".join(console.printable(text).split())), quote=False)


class Table(NamedTuple):
    """A table: its caption, the heads of its columns, its rows of text; `wordy` if the cells are words, not numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    wordy: bool = False

    def markdown(self) -> str:
        """The table in Markdown, without the caption."""

        def line(cells):
            return "| " + " | ".join(map(markdown, cells)) + " |"

        return "\n".join([line(self.head), "| --- " * len(self.head) + "|", *map(line, self.rows)])

    def rich(self) -> rich.table.Table:
        """The table for the terminal."""
        table = rich.table.Table(title=console.printable(self.caption), title_justify="left", box=rich.box.SIMPLE_HEAD)
        for i, name in enumerate(self.head):
            table.add_column(console.printable(name), justify="left" if i == 0 or self.wordy else "right")
        for row in self.rows:
            table.add_row(*map(console.printable, row))
        return table


class Picture(NamedTuple):
    """A picture inside a page: a description in words, and the PNG in base64."""

    alt: str
    data: str

    @classmethod
    def from_png(cls, path: pathlib.Path, alt: str) -> Picture:
        """The picture in this PNG file."""
        return cls(alt, base64.b64encode(path.read_bytes()).decode())


class Answer(NamedTuple):
    """One of the responses to a prompt: the policy that gave it, its text, and the verdicts on it."""

    author: str
    text: str
    verdicts: Sequence[str]


class Prompt(NamedTuple):
    """A prompt and its responses, shown side by side."""

    id: str
    text: str
    answers: Sequence[Answer]


class SampledPrompt(NamedTuple):
    """A prompt with all samples for it in one step.

    Attributes:
        about: facts of the prompt: category, id, reward of its demonstration.
        text, demonstration: the prompt's text, and its demonstration.
        head: the heads of the columns of numbers.
        rows: for each response its cells, one a column, and its text.
    """

    about: str
    text: str
    demonstration: str
    head: Sequence[str]
    rows: Sequence[tuple[Sequence[str], str]]


def answer_of(name: str, row: Mapping, judge: str) -> Answer:
    """The response in a row of an evaluation, with this judge's verdict."""
    verdicts = [f"{judge}: {'refused' if row['refused'] else 'not refused'}"]
    return Answer(name, row["response"], verdicts + [f"reward {signed(row['reward'])}"] * (row["reward"] is not None))


def write(template: str, path: pathlib.Path, **values: Any) -> pathlib.Path:
    """Fills the template with the values and writes the page; returns its path."""
    replace_file(path, console.printable(ENVIRONMENT.get_template(template).render(values)))
    return path
