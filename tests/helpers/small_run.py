"""A run's workdir written by hand: 36 evaluated prompts of three categories, eight steps of both stages."""

import json

from drirl_jax import config as config_lib
from drirl_jax.reports.intervals import wilson
from drirl_jax.runtime import workdirs

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


def samples():
    """Rows of samples.jsonl: of the first and the last step a group of two in each category."""
    numbers = {"alpha_d": 1.04, "alpha": 1.1, "scaled": -1.1, "advantage": -1.0}
    return [
        {
            "stage": "align",
            "step": step,
            "category": category,
            "id": f"train-{category}",
            "prompt": f"asked of {category}",
            "demonstration": f"shown for {category}",
            "demo_reward": 2.0,
            "alpha_m": 1.06,
            "responses": [
                {"text": f"said first in step {step}", "reward": 0.5, "masked": False} | numbers,
                {"text": "said then", "reward": None, "masked": True} | numbers | {"scaled": None},
            ],
        }
        for step in (1, 8)
        for category in CATEGORIES
    ]


def benchmark(name):
    """A result as of `evals.benchmarks.run`: four answers that one judge tells by phrases and another by a server."""
    after = name == "aligned"
    responses = [
        {
            "id": i,
            "subset": "all",
            "prompt": f"question {i}",
            "response": f"{name} says {i}",
            "phrases": {"refusal": float(after), "refused": float(after)},
            "endpoint": {"refusal": float(i % 2), "refused": float(i % 2)},
        }
        for i in range(4)
    ]
    judges = ("phrases", "endpoint")
    value = {"value": float(after), "low": 0.5 * after, "high": 1 - 0.5 * (not after), "n": 4, "interval": "wilson"}
    return {
        "benchmark": "xstest",
        "judge": "phrases",
        "judges": {judge: {"version": f"{judge} 1", "metrics": {"refused": value}} for judge in judges},
        "agreement": {"endpoint/phrases": {"n": 4, "agree": 0.5, "kappa": 0.0}},
        "responses": responses,
    }


def depth():
    """A depth.json: of three policies the curve of the prefill attack, and KL at three positions."""

    def share(value, n=20):
        low, high = wilson(value * n, n)
        return {"value": value, "low": low, "high": high, "n": n}

    def curve(*shares):
        return [
            {"tokens": k, "success": share(value), "turned_back": share(1 - value)}
            for k, value in zip((0, 5, 40), shares, strict=True)
        ]

    by_kind = {
        "harmful": {"mean": [2.0, 0.5, 0.25], "n": [20, 20, 10], "answer": 2.625},
        "harmless": {"mean": [0.5, 0.25], "n": [20, 20], "answer": 0.75},
    }
    return {
        "settings": {"answers": "of the base", "judges": {"harm": "phrases 1", "refusal": "phrases 1"}},
        "judges": {"harm": "phrases", "refusal": "phrases"},
        "asked": 30,
        "complying": {f"prompt {i}": "Yes." for i in range(20)},
        "policies": {
            "base": {"settings": {}, "prefill": {"curve": curve(1.0, 1.0, 1.0)}},
            "sft": {"settings": {}, "prefill": {"curve": curve(0.2, 0.4, 0.7)}},
            "aligned": {"settings": {}, "prefill": {"curve": curve(0.1, 0.5, 0.9)}, "kl": by_kind},
        },
    }


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write(workdir, results=None, **changes):
    """Writes the workdir of a finished run whose evaluations are these, else `result`'s; changes are of the config."""
    config = config_lib.default()
    with config.unlocked():
        config.data.categories, config.data.harmless = CATEGORIES, HARMLESS
        config.irl.steps = config.align.steps = 8
        config.update(changes)
    workdirs.record_config(config, workdir)
    (workdir / "evals").mkdir()
    results = results or {name: result(name) | {"benchmarks": {"xstest": benchmark(name)}} for name in REFUSED}
    for name, of in results.items():
        (workdir / "evals" / f"{name}.json").write_text(json.dumps(of))
    jsonl(workdir / "metrics.jsonl", rows())
    times = [{"stage": row["stage"], "step": row["step"], "collect_s": 3.0, "update_s": 1.5} for row in rows()]
    jsonl(workdir / "timing.jsonl", times)
    jsonl(workdir / "samples.jsonl", samples())
    bins = [{"n": 6, "confidence": 0.6, "right": 0.5}, {"n": 4, "confidence": 0.9, "right": 1.0}]
    (workdir / "reliability.json").write_text(json.dumps({"all": bins, "insult": bins[:1]}))
    records = {"train": {"insult": 30, "harmless": 60, "physical_harm": 30}, "test": dict(COUNT)}
    facts = {"revision": "abc1234", "device": "<i>cpu</i>", "records": records}
    (workdir / "facts.json").write_text(json.dumps(facts))
    return workdir
