"""The benchmarks, one file each, as rows of one table (BENCHMARKS), and the run of one of them on a policy."""

from __future__ import annotations

import collections
import logging
from typing import Mapping, NamedTuple, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from drirl_jax.data.text import ChatTokens
from drirl_jax.evals import answers
from drirl_jax.evals.items import Benchmark, Item, reading_answers
from drirl_jax.evals.tasks import (
    advglue,
    gsm8k,
    hhh,
    jailbreakbench,
    simpleqa,
    stereotype,
    strongreject,
    wildchat,
    xstest,
)
from drirl_jax.judges import JUDGES, Judge, agreement, classifier, is_unsafe, judges_of_kind
from drirl_jax.models.architecture import Config
from drirl_jax.models.transformer import Transformer
from drirl_jax.reports.intervals import RESAMPLES, effective, wilson
from drirl_jax.runtime import contents
from drirl_jax.types import Array, InputError

log = logging.getLogger(__name__)

BENCHMARKS: dict[str, Benchmark] = {
    "strongreject": strongreject.STRONGREJECT,
    "xstest": xstest.XSTEST,
    "jailbreakbench": jailbreakbench.JAILBREAKBENCH,
    "wildchat": wildchat.WILDCHAT,
    "stereotype": stereotype.STEREOTYPE,
    "simpleqa": simpleqa.SIMPLEQA,
    "advglue": advglue.ADVGLUE,
    "gsm8k": gsm8k.GSM8K,
    "hhh": hhh.HHH,
}
BENCHMARKS = {name: reading_answers(benchmark) for name, benchmark in BENCHMARKS.items()}
NO_JUDGE = "protocol"  # in the place of a judge's name, where the benchmark's own rule decides
FEW = 30  # values, for a bootstrap
LONGEST = 8192  # tokens of an item and its answer


def validate(section: ConfigDict) -> None:
    """Raises InputError for what cannot be run of config.evals: benchmarks, judges, the metric of the best policy."""
    for key, table in (("benchmarks", BENCHMARKS), ("judges", JUDGES)):
        if unknown := [name for name in section[key] if name not in table]:
            raise InputError(f"config.evals.{key} names {unknown}: choose among {', '.join(table)}.")
    for name in section.benchmarks:
        able = judges_of_kind(BENCHMARKS[name].asks)
        if BENCHMARKS[name].asks and not set(able) & set(section.judges):
            raise InputError(f"{name} needs a judge that can tell: put one of {', '.join(able)} into evals.judges.")
    if "classifier" in section.judges:
        classifier.load(section.classifier)
    known = [f"{name}/{metric}" for name in section.benchmarks for metric in BENCHMARKS[name].metrics]
    if section.best and section.best not in known:
        raise InputError(
            f"config.evals.best is {section.best!r}, no metric of config.evals.benchmarks: "
            f"{', '.join(known) or 'there are none'}."
        )
    if section.best and not section.every:
        raise InputError(f"config.evals.best is {section.best!r}: set config.evals.every, the steps between.")


class Questions(NamedTuple):
    """A benchmark's items, drawn and tokenised once, for every policy that is asked.

    Attributes:
        items, ids: those that are asked, and their prompts' ids.
        options: ids of each item's options; [] where responses are generated.
        of, left_out: items of the whole benchmark, and those drawn that were too long.
    """

    name: str
    items: list[Item]
    ids: list[list[int]]
    options: list[list[list[int]]]
    of: int
    left_out: int

    @property
    def contents(self) -> str:
        """A hash of the items, wherever their files lie."""
        return contents.of_value([self.name, *(item._asdict() for item in self.items)])


def _items(name: str, section: ConfigDict) -> list[Item]:
    """All items of a benchmark. Raises InputError where its data is of another form, or an item asks nothing."""
    try:
        items = BENCHMARKS[name].read(section)
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"the data of {name} is of another form ({error!r}): download the published file.") from error
    for item in items:
        texts = (*(turn["content"] for turn in item.chat), *item.options)
        if not all(isinstance(text, str) for text in texts) or not item.prompt.strip():
            raise InputError(f"{name}, item {item.id}: what is asked is empty or no text: download the published file.")
        if BENCHMARKS[name].asks == "grade" and not any(map(str.isalnum, item.target)):
            raise InputError(f"{name}, item {item.id}: the right answer is empty: download the published file.")
    return items


def load(name: str, section: ConfigDict, tokens: ChatTokens, model: Config) -> Questions:
    """The benchmark's questions: `section.limit` of them (0: all), the same ones every time, from all parts of it.

    Raises:
        InputError: its data is absent or not what was published, or all of it is too long.
    """
    items = _items(name, section)
    count = len(items)
    if section.limit and section.limit < count:
        drawn = np.random.default_rng(0).permutation(count)[: section.limit]
        items = [items[i] for i in sorted(drawn)]
    ids = [answers.ids_of(tokens, item.chat) for item in items]
    options = [[tokens.response_ids(text, LONGEST + 1)[:-1] for text in item.options] for item in items]
    max_new = section.benchmark_max_new or BENCHMARKS[name].max_new
    behind = [max(map(len, of), default=max_new) for of in options]
    most = min(LONGEST, model.positions or LONGEST)
    kept = [i for i in range(len(items)) if len(ids[i]) + behind[i] <= most]
    if len(kept) < len(items):
        log.warning("%s: left out %d items that are too long", name, len(items) - len(kept))
    if not kept:
        raise InputError(f"all items of {name} are too long: they have {min(map(len, ids))} tokens or more.")
    chosen = ([column[i] for i in kept] for column in (items, ids, options))
    return Questions(name, *chosen, of=count, left_out=len(items) - len(kept))


def run(
    questions: Questions,
    model: Transformer,
    tokens: ChatTokens,
    section: ConfigDict,
    judges: Mapping[str, Judge],
    key: Array,
) -> dict:
    """Asks a policy, judges what it says and measures it.

    Args:
        questions: from `load`.
        model: the policy, adapters merged.
        section: config.evals.
        judges: by name; the first that tells what the benchmark asks for is the one by which it goes.
        key: of the random numbers, used where config.evals.temperature is above 0.

    Returns:
        {"benchmark", "main": the metric that says it all, "higher_is_better", "n", "of", "left_out", "protocol",
         "judge", "judges": {name: {"version", "facts", "unjudged": responses without a verdict,
         "metrics": {metric: see `interval`}, "subsets": {subset: the same}}},
         "agreement": see `judges.agreement`, "responses": [{"id", "subset", "prompt", "response", ...}]}
    """
    benchmark = BENCHMARKS[questions.name]
    max_new = section.benchmark_max_new or benchmark.max_new
    protocol = {"temperature": section.temperature, "max_new": max_new, "shots": section.shots}
    if not benchmark.max_new:
        said = answers.score_options(model, questions.ids, questions.options, batch=section.batch)
        protocol = {"options": "log-probability"}
        shown = [{"logp": of.total.tolist(), "option_tokens": of.tokens.tolist()} for of in said]
    else:
        drawn = answers.respond(
            model, tokens, questions.ids,
            batch=section.batch, max_new=max_new, temperature=section.temperature,
            key=jax.random.fold_in(key, list(BENCHMARKS).index(questions.name)),
        )  # fmt: skip
        said = [of.text for of in drawn]
        shown = [{"response": of.text, "tokens": of.tokens, "finish": of.finish} for of in drawn]
    rows = [
        {"id": item.id, "subset": item.subset, "prompt": item.prompt} | row for item, row in zip(questions.items, shown)
    ]
    return {
        "benchmark": questions.name,
        "main": next(iter(benchmark.metrics)),
        "higher_is_better": next(iter(benchmark.metrics.values())),
        "n": len(rows),
        "of": questions.of,
        "left_out": questions.left_out,
        "protocol": protocol,
    } | judged(benchmark, questions.items, said, judges, rows)


def judged(
    benchmark: Benchmark, items: Sequence[Item], said: Sequence, judges: Mapping[str, Judge], rows: list
) -> dict:
    """What `run` returns of judges and responses; each row of the responses gets the judges' verdicts."""
    able = {name: judge for name, judge in judges.items() if benchmark.asks in JUDGES[name].tells}
    columns = [[item.prompt for item in items], list(said), [item.target for item in items]]
    columns = columns if benchmark.asks == "grade" else columns[:2]
    verdicts = {name: getattr(judge, benchmark.asks)(*columns) for name, judge in able.items()}
    told = {}
    for name, verdict in verdicts.items() or [(NO_JUDGE, [None] * len(items))]:
        silent = [of is not None and bool(np.isnan(of)) for of in verdict]
        measured = [{} if none else benchmark.measure(*row) for none, *row in zip(silent, items, said, verdict)]
        values = [{metric: float(x) for metric, x in of.items()} for of in measured]
        about: dict = {}
        if name in able:
            about = {"version": able[name].version, "facts": dict(able[name].facts), "unjudged": sum(silent)}
        told[name] = about | {"metrics": summary(items, values), "subsets": by_subset(items, values)}
        for row, none, of, value in zip(rows, silent, verdict, values):
            row[name] = value if of is None else {benchmark.asks: None if none else float(of)} | value
    same = {name: is_unsafe(verdict) if benchmark.asks == "harm" else verdict for name, verdict in verdicts.items()}
    return {"judge": next(iter(told)), "judges": told, "agreement": agreement(same), "responses": rows}


def judged_again(questions: Questions, judges: Mapping[str, Judge], rows: Sequence[Mapping]) -> dict:
    """What `judged` returns of responses that a policy has given before; of options {}, as no judge reads them.

    Args:
        rows: the "responses" that `run` returned.

    Raises:
        InputError: they are not to these questions.
    """
    benchmark = BENCHMARKS[questions.name]
    if [(row["id"], row["prompt"]) for row in rows] != [(item.id, item.prompt) for item in questions.items]:
        raise InputError(f"the responses there are not to the items of {questions.name}: take another --workdir.")
    if not benchmark.max_new:
        return {}
    bare = [{key: row[key] for key in ("id", "subset", "prompt", "response", "tokens", "finish")} for row in rows]
    return judged(benchmark, questions.items, [row["response"] for row in rows], judges, bare)


def by_subset(items: Sequence[Item], values: Sequence[Mapping[str, float]]) -> dict[str, dict]:
    """`summary` of each subset's items; {} where there is one alone."""
    groups = collections.defaultdict(list)
    for item, value in zip(items, values):
        groups[item.subset].append((item, value))
    return {name: summary(*zip(*of)) for name, of in groups.items()} if len(groups) > 1 else {}


def summary(items: Sequence[Item], values: Sequence[Mapping[str, float]]) -> dict[str, dict]:
    """{metric: `interval` of the items that have it}, in the order in which metrics appear."""
    found = {}
    for name in dict.fromkeys(name for value in values for name in value):
        having = [(value[name], item.cluster or item.id) for item, value in zip(items, values) if name in value]
        found[name] = interval(*zip(*having))
    return found


def interval(values: Sequence[float], cluster: Sequence[str]) -> dict:
    """{"value", "low", "high", "n", "interval"}: the mean of values in [0, 1] and its 95% interval over items.

    Of shares, whose values are all 0 or 1, Wilson's over `intervals.effective` items; otherwise the bootstrap's
    percentiles, of RESAMPLES with a fixed seed. From fewer than FEW items, or where all are the same, the bootstrap
    tells too narrow an interval: then it is Wilson's too, as nothing in [0, 1] varies more than a share.
    """
    x, n = np.asarray(values, float), len(values)
    if np.isin(x, (0.0, 1.0)).all():
        n_effective = effective(x, cluster)
        (low, high), kind = wilson(x.mean() * n_effective, n_effective), "wilson"
    elif n < FEW or np.ptp(x) == 0:
        (low, high), kind = wilson(x.sum(), n), "wilson"
    else:
        found = stats.bootstrap((x,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0))
        (low, high), kind = found.confidence_interval, "bootstrap"
    return {"value": float(x.mean()), "low": float(low), "high": float(high), "n": n, "interval": kind}


def scalars(result: Mapping) -> dict[str, float]:
    """{"benchmark/metric": value} of the judge that comes first, for metrics.jsonl."""
    metrics = result["judges"][result["judge"]]["metrics"]
    return {f"{result['benchmark']}/{name}": of["value"] for name, of in metrics.items()}
