"""The table of benchmarks (BENCHMARKS, one file a row), and the code that runs one benchmark on a policy."""

from __future__ import annotations

import collections
import logging
from typing import Any, Mapping, NamedTuple, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from drirl_jax.data.text import ChatTokens
from drirl_jax.evals import answers
from drirl_jax.evals.items import Benchmark, Item, without_thoughts
from drirl_jax.evals.tasks import (
    advglue,
    gsm8k,
    hhh,
    jailbreakbench,
    minimal_pairs,
    perplexity,
    simpleqa,
    stereotype,
    strongreject,
    wildchat,
    xstest,
)
from drirl_jax.judges import JUDGES, Judge, agreement, classifier, is_unsafe, judges_of_kind
from drirl_jax.models.architecture import Config
from drirl_jax.models.transformer import Transformer
from drirl_jax.reports import intervals
from drirl_jax.runtime import hashes
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
    "perplexity": perplexity.PERPLEXITY,
    "minimal_pairs": minimal_pairs.MINIMAL_PAIRS,
}
BENCHMARKS = {name: without_thoughts(benchmark) for name, benchmark in BENCHMARKS.items()}
NO_JUDGE = "protocol"  # stands for a judge's name where the benchmark's own rule decides
LONGEST = 8192  # maximum tokens of an item with its answer


def validate(section: ConfigDict) -> None:
    """Checks the benchmarks, the judges and the metric of the best policy in config.evals. Raises InputError."""
    for key, table in (("benchmarks", BENCHMARKS), ("judges", JUDGES)):
        if unknown := [name for name in section[key] if name not in table]:
            raise InputError(f"config.evals.{key} names {unknown}: choose among {', '.join(table)}.")
    for name in section.benchmarks:
        capable = judges_of_kind(BENCHMARKS[name].verdict)
        if BENCHMARKS[name].verdict and not set(capable) & set(section.judges):
            raise InputError(f"{name} needs a judge: put one of {', '.join(capable)} into config.evals.judges.")
    if "classifier" in section.judges:
        classifier.load(section.classifier)
    metrics = [f"{name}/{metric}" for name in section.benchmarks for metric in BENCHMARKS[name].metrics]
    if section.best and section.best not in metrics:
        raise InputError(
            f"config.evals.best is {section.best!r}, no metric of config.evals.benchmarks: "
            f"{', '.join(metrics) or 'there are none'}."
        )
    if section.best and not section.every:
        raise InputError(
            f"config.evals.best is {section.best!r}: set config.evals.every, the steps between two evaluations."
        )


class Questions(NamedTuple):
    """A benchmark's items, selected and tokenised once for all policies.

    Attributes:
        items, ids: the items that the policy answers, and the token ids of their prompts.
        options: token ids of each item's options; [] where the policy generates responses.
        n_total: number of items in the whole benchmark.
        left_out: number of selected items that were too long.
    """

    name: str
    items: list[Item]
    ids: list[list[int]]
    options: list[list[list[int]]]
    n_total: int
    left_out: int

    @property
    def contents(self) -> str:
        """A hash of the items. It does not depend on where their files are."""
        return hashes.hash_value([self.name, *(item._asdict() for item in self.items)])


def _items(name: str, config: ConfigDict) -> list[Item]:
    """All items of a benchmark. Raises InputError where its data has another form, or an item has no question."""
    try:
        items = BENCHMARKS[name].load_items(config)
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"the data of {name} is of another form than the published file ({error!r}): download it again."
        ) from error
    for item in items:
        texts = (*(turn["content"] for turn in item.chat), *item.options)
        if not all(isinstance(text, str) for text in texts) or not item.prompt.strip():
            raise InputError(
                f"{name}, item {item.id}: what is asked is empty or no text: download the published file again."
            )
        if BENCHMARKS[name].verdict == "grade" and not any(map(str.isalnum, item.target)):
            raise InputError(f"{name}, item {item.id}: the right answer is empty: download the published file again.")
    return items


def load(name: str, config: ConfigDict, tokens: ChatTokens, model: Config) -> Questions:
    """Loads config.evals.limit items of a benchmark (0: all). They come from all its parts and are the same every time.

    Raises:
        InputError: the data is absent, is not the published data, or all items are too long.
    """
    items, section = _items(name, config), config.evals
    n_total = len(items)
    if section.limit and section.limit < n_total:
        selection = np.random.default_rng(0).permutation(n_total)[: section.limit]
        items = [items[i] for i in sorted(selection)]
    ids = [answers.prompt_ids(tokens, item.chat) for item in items]
    options = [[tokens.response_ids(text, LONGEST + 1)[:-1] for text in item.options] for item in items]
    max_new = section.benchmark_max_new or BENCHMARKS[name].max_new
    answer_lens = [max(map(len, item_options), default=max_new) for item_options in options]
    max_tokens = min(LONGEST, model.positions or LONGEST)
    fitting = [i for i in range(len(items)) if len(ids[i]) + answer_lens[i] <= max_tokens]
    if len(fitting) < len(items):
        log.warning("%s: left out %d items that are too long", name, len(items) - len(fitting))
    if not fitting:
        raise InputError(f"all items of {name} are too long: they have {min(map(len, ids))} tokens or more.")
    if BENCHMARKS[name].geometric and len(fitting) < 2:
        raise InputError(
            f"{name} has one item here, too few for an interval: set config.evals.limit to 2 or more, or 0."
        )
    return Questions(
        name,
        items=[items[i] for i in fitting],
        ids=[ids[i] for i in fitting],
        options=[options[i] for i in fitting],
        n_total=n_total,
        left_out=len(items) - len(fitting),
    )


def run(
    questions: Questions,
    model: Transformer,
    tokens: ChatTokens,
    section: ConfigDict,
    judges: Mapping[str, Judge],
    key: Array,
) -> dict:
    """Lets a policy answer the questions, judges its answers and measures them.

    Args:
        questions: from `load`.
        model: the policy, adapters merged.
        section: config.evals.
        judges: {name: judge}; the first one that gives the verdict which the benchmark needs decides the main figures.
        key: the random key, used where config.evals.temperature is above 0.

    Returns:
        {"benchmark", "main": the main metric, "higher_is_better", "tax": {metric: chance level or None}, "geometric",
         "n", "of", "left_out", "protocol",
         "judge", "judges": {name: {"version", "facts", "unjudged": responses without a verdict,
         "metrics": {metric: see `interval`}, "subsets": {subset: the same}}},
         "agreement": see `judges.agreement`, "responses": [{"id", "subset", "cluster", "prompt", "response", ...}]}
    """
    benchmark = BENCHMARKS[questions.name]
    max_new = section.benchmark_max_new or benchmark.max_new
    protocol = {"temperature": section.temperature, "max_new": max_new, "shots": section.shots}
    if not benchmark.max_new:
        outputs = answers.score_options(model, questions.ids, questions.options, batch=section.batch)
        protocol = {"options": "log-probability"}
        output_rows = [{"logp": scores.total.tolist(), "option_tokens": scores.tokens.tolist()} for scores in outputs]
    else:
        responses = answers.respond(
            model, tokens, questions.ids,
            batch=section.batch, max_new=max_new, temperature=section.temperature,
            key=jax.random.fold_in(key, list(BENCHMARKS).index(questions.name)),
        )  # fmt: skip
        outputs = [answer.text for answer in responses]
        output_rows = [
            {"response": answer.text, "tokens": answer.tokens, "finish": answer.finish} for answer in responses
        ]
    rows = _response_rows(questions.items, output_rows)
    return {
        "benchmark": questions.name,
        "main": next(iter(benchmark.metrics)),
        "higher_is_better": next(iter(benchmark.metrics.values())),
        "tax": {metric: chance and chance(questions.items) for metric, chance in benchmark.tax.items()},
        "geometric": list(benchmark.geometric),
        "n": len(rows),
        "of": questions.n_total,
        "left_out": questions.left_out,
        "protocol": protocol,
    } | judge_responses(benchmark, questions.items, outputs, judges, rows)


def _response_rows(items: Sequence[Item], outputs: Sequence[Mapping]) -> list[dict]:
    """The "responses" of `run`: each item's facts with the policy's output; the judges add their verdicts."""
    return [
        {"id": item.id, "subset": item.subset, "cluster": item.cluster, "prompt": item.prompt, **output}
        for item, output in zip(items, outputs)
    ]


def judge_responses(
    benchmark: Benchmark, items: Sequence[Item], outputs: Sequence, judges: Mapping[str, Judge], rows: list
) -> dict:
    """The part of the result of `run` that the judges decide. Adds the verdicts to each of the `rows`.

    Args:
        outputs: for each item the response, or the Scores of its options.
    """
    capable = {name: judge for name, judge in judges.items() if benchmark.verdict in JUDGES[name].verdicts}
    columns = [[item.prompt for item in items], list(outputs), [item.target for item in items]]
    columns = columns if benchmark.verdict == "grade" else columns[:2]
    verdicts_by_judge = {name: getattr(judge, benchmark.verdict)(*columns) for name, judge in capable.items()}
    by_judge = {}
    for name, verdicts in verdicts_by_judge.items() or [(NO_JUDGE, [None] * len(items))]:
        unjudged = [verdict is not None and bool(np.isnan(verdict)) for verdict in verdicts]
        values = [
            {} if is_unjudged else _measure(benchmark, item, output, verdict)
            for is_unjudged, item, output, verdict in zip(unjudged, items, outputs, verdicts)
        ]
        judge_facts: dict = {}
        if name in capable:
            judge_facts = {
                "version": capable[name].version,
                "facts": dict(capable[name].facts),
                "unjudged": sum(unjudged),
            }
        by_judge[name] = judge_facts | {
            "metrics": summary(items, values, benchmark.geometric),
            "subsets": by_subset(items, values, benchmark.geometric),
        }
        for row, is_unjudged, verdict, metrics in zip(rows, unjudged, verdicts, values):
            stored = {} if verdict is None else {benchmark.verdict: None if is_unjudged else float(verdict)}
            row[name] = stored | metrics
    labels = {
        name: is_unsafe(verdicts) if benchmark.verdict == "harm" else verdicts
        for name, verdicts in verdicts_by_judge.items()
    }
    return {"judge": next(iter(by_judge)), "judges": by_judge, "agreement": agreement(labels), "responses": rows}


def _measure(benchmark: Benchmark, item: Item, output: Any, verdict: Any) -> dict[str, float]:
    """{metric: value} of one answer, as Python's floats."""
    return {metric: float(value) for metric, value in benchmark.measure(item, output, verdict).items()}


def rejudge(questions: Questions, judges: Mapping[str, Judge], rows: Sequence[Mapping]) -> dict:
    """The result of `judge_responses` for responses of an earlier run; {} for options, because no judge reads them.

    Args:
        rows: the "responses" that `run` returned.

    Raises:
        InputError: the responses do not belong to these questions.
    """
    benchmark = BENCHMARKS[questions.name]
    if [(row["id"], row["prompt"]) for row in rows] != [(item.id, item.prompt) for item in questions.items]:
        raise InputError(f"the stored responses do not answer the items of {questions.name}: take another --workdir.")
    if not benchmark.max_new:
        return {}
    outputs = [{key: row[key] for key in ("response", "tokens", "finish")} for row in rows]
    unjudged_rows = _response_rows(questions.items, outputs)
    return judge_responses(benchmark, questions.items, [row["response"] for row in rows], judges, unjudged_rows)


def by_subset(
    items: Sequence[Item], values: Sequence[Mapping[str, float]], geometric: Sequence[str] = ()
) -> dict[str, dict]:
    """{subset: `summary` of its items}; {} where there is only one subset."""
    rows_by_subset = collections.defaultdict(list)
    for i, item in enumerate(items):
        rows_by_subset[item.subset].append(i)
    if len(rows_by_subset) < 2:
        return {}
    return {
        name: summary([items[i] for i in rows], [values[i] for i in rows], geometric)
        for name, rows in rows_by_subset.items()
    }


def summary(
    items: Sequence[Item], values: Sequence[Mapping[str, float]], geometric: Sequence[str] = ()
) -> dict[str, dict]:
    """{metric: `interval` over the items that have this metric}, in the order in which metrics appear."""
    by_metric = {}
    for name in dict.fromkeys(name for value in values for name in value):
        rows = [i for i, value in enumerate(values) if name in value]
        clusters = [items[i].cluster or items[i].id for i in rows]
        by_metric[name] = interval([values[i][name] for i in rows], clusters, name in geometric)
    return by_metric


def interval(values: Sequence[float], clusters: Sequence[str], is_geometric: bool = False) -> dict:
    """{"value", "low", "high", "n", "interval"}: the mean with its 95% interval: see `intervals.over_items`.

    A geometric mean has that of `intervals.geometric_mean`.
    """
    if is_geometric:
        estimate, kind = intervals.geometric_mean(values, clusters), "t of logs"
    else:
        estimate, kind = intervals.over_items(values, clusters)
    return {"value": estimate.mean, "low": estimate.low, "high": estimate.high, "n": len(values), "interval": kind}


def scalars(result: Mapping) -> dict[str, float]:
    """{"benchmark/metric": value} by the first judge, for metrics.jsonl."""
    metrics = result["judges"][result["judge"]]["metrics"]
    return {f"{result['benchmark']}/{name}": interval["value"] for name, interval in metrics.items()}
