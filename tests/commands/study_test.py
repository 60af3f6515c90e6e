"""The study: its numbers by hand, sharing of rewards, and a small one from start to report, twice."""

import csv
import importlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from drirl_jax.commands import study
from drirl_jax.evals import diversity
from drirl_jax.judges import classifier
from drirl_jax.models import hf
from drirl_jax.models.encoder import TextEmbedder
from drirl_jax.reports.intervals import Interval
from drirl_jax.runtime import lock, metrics, workdirs
from drirl_jax.runtime.preemption import PREEMPTED
from drirl_jax.types import InputError

ROOT = pathlib.Path(__file__).parents[2]


def test_diversity_by_hand():
    # "a b", "b a", "a b": three bigrams, two of them distinct. Four of six words repeat.
    texts = ["a b", "B a", "a b"]
    assert diversity.distinct(texts, 2) == pytest.approx(2 / 3) and diversity.distinct(texts, 1) == pytest.approx(2 / 6)
    assert diversity.distinct([""], 2) == 0
    same = ["I can't help with that, sorry."] * 4
    assert diversity.self_bleu(same) == pytest.approx(1)
    other = ["The cat sat on the mat today.", "Rivers flow towards a distant sea.", "Seven loud drums beat at noon."]
    assert diversity.self_bleu(other) < 0.1
    assert diversity.commonest_opening([*same, *other]) == ("i can't help with", 4 / 7)


def test_a_star_says_that_a_difference_is_beyond_noise():
    own, beyond, within = Interval(0.3, 0.2, 0.4), Interval(0.1, 0.01, 0.2), Interval(0.1, -0.1, 0.3)
    nothing = Interval(0.1, float("nan"), float("nan"))
    cells = [study.format_cell("over_refusal", (own, beside)) for beside in (beyond, within, None, nothing)]
    assert cells == ["30%* (20% to 40%)", *["30% (20% to 40%)"] * 3] and study.format_cell("kl", None) == "–"
    assert study.format_cell("over_refusal", (nothing, nothing)) == "10%"


def test_curves_are_means_of_the_seeds_where_these_have_a_number():
    runs = [
        [{"stage": "align", "step": 1, "kl": 1.0, "gap/a": None}],
        [{"stage": "align", "step": 1, "kl": 3.0, "gap/a": 2.0}, {"stage": "align", "step": 2, "kl": None}],
    ]
    first, second = study.mean_metrics(runs)
    assert first == {"stage": "align", "step": 1, "kl": 2.0, "gap/a": 2.0}
    assert second == {"stage": "align", "step": 2, "kl": None}


def config(*parts):
    return importlib.import_module("configs.study_smollm2").get_config(*parts)


def test_every_variant_is_a_run_and_shares_rewards_where_they_are_the_same():
    from drirl_jax.checks import validate

    plan = config()
    parts = importlib.import_module("configs.study_smollm2").PARTS
    assert len(plan.variants) == 2 + sum(map(len, parts.values()))
    assert set(config("data+combine").variants) == {"grpo_s", "grpo_static", *parts["data"], *parts["combine"]}
    keys = {}
    for name in plan.variants:
        of = study.run_config(plan, name, 1)
        validate(of)
        keys[name] = study.reward_key(of)
    own = {name for name in plan.variants if plan.variants[name].get("data")} | {"grpo_one_reward"}
    assert len(own) == 9 and len({keys[name] for name in own}) == 9
    assert len({key for name, key in keys.items() if name not in own}) == 1
    assert study.reward_key(study.run_config(plan, "sft", 2)) != keys["sft"]
    plan.variants.linear = {"irl": {"loss": "linear"}}
    assert study.reward_key(study.run_config(plan, "linear", 1)) != keys["sft"]
    # With an inner policy the alignment's own options shape the rewards.
    plan.base.irl.update({"policy": "alternate", "rounds": 2})
    keys = {name: study.reward_key(study.run_config(plan, name, 1)) for name in ("grpo_s", "grpo_static")}
    assert keys["grpo_s"] != keys["grpo_static"]
    plan.variants.wrong = {"align": {"stps": 3}}
    with pytest.raises(InputError, match="variant 'wrong' of the study is wrong.*stps"):
        study.run_config(plan, "wrong", 0)


def test_rewards_come_from_the_run_that_was_begun_else_from_the_first(tmp_path):
    plan = config()
    for name in list(plan.variants):
        if name not in ("dpo_s", "grpo_one_reward", "grpo_s"):
            del plan.variants[name]
    plan.seeds = (0, 1)

    def planned():
        return {
            f"{folder.parent.name}/{folder.name}": (of.reward.init.removeprefix(f"{tmp_path}/"), "irl" in of.schedule)
            for of, folder in study.plan_runs(plan, tmp_path)
        }

    assert planned() == {
        "dpo_s/0": ("", True), "grpo_one_reward/0": ("", True), "dpo_s/1": ("", True), "grpo_one_reward/1": ("", True),
        "grpo_s/0": ("dpo_s/0", False), "grpo_s/1": ("dpo_s/1", False),
    }  # fmt: skip
    assert list(planned())[:4] == ["dpo_s/0", "grpo_one_reward/0", "dpo_s/1", "grpo_one_reward/1"]
    workdirs.record_config(study.run_config(plan, "grpo_s", 1), tmp_path / "grpo_s" / "1")
    assert planned()["grpo_s/1"] == ("", True) and planned()["dpo_s/1"] == ("grpo_s/1", False)
    assert planned()["dpo_s/0"] == ("", True)


@pytest.mark.parametrize("change, sentence", [
    ({"seeds": ()}, "seeds is empty"),
    ({"jobs": 0}, "jobs is 0: give 1, or at most the"),
    ({"jobs": 10**6}, "jobs is 1000000"),
    ({"reference": "nobody"}, "reference is 'nobody', which is no variant: choose one of dpo_s"),
    ({"base": {"schedule": ("irl", "align")}}, "variant 'dpo_s' of the study: config.schedule lacks 'evals'"),
    ({"base": {"dpo": {"beta": -1.0}}}, "variant 'dpo_s' of the study: config.dpo.beta is -1.0"),
])  # fmt: skip
def test_a_study_that_cannot_be_run_is_one_sentence(change, sentence):
    plan = config()
    plan.update(change)
    with pytest.raises(InputError, match=sentence):
        study.check(plan)
    with pytest.raises(InputError, match="so it is no study"):
        study.check(plan.base)


def start(policy, folder, steps):
    """Starts a study of the tiny config, two variants and one seed, in folder/study."""
    (folder / "small.py").write_text(
        f"""
from ml_collections import ConfigDict
from configs import tiny

def get_config():
    study = ConfigDict()
    study.base = tiny.get_config()
    study.base.policy.init = {str(policy)!r}
    study.base.irl.steps = 2
    study.base.align.steps = {steps}
    study.base.irl.eval_every = 2
    study.base.group.update({{"demonstration": "apart", "contrast": "apart", "harmless_refusals": 1.0}})
    study.seeds = (0,)
    study.jobs = {min(2, len(os.sched_getaffinity(0)))}
    study.reference = "static"
    study.variants = ConfigDict({{"static": {{"scaling": {{"combine": "none"}}}}, "scaled": {{}}}})
    return study
"""
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    flags = [f"--config={folder / 'small.py'}", f"--workdir={folder / 'study'}"]
    args = [sys.executable, "-m", "drirl_jax.commands.study", *flags]
    return subprocess.Popen(args, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def small(policy, tmp_path):
    """The workdir of a finished study, and what it printed."""
    process = start(policy, tmp_path, steps=2)
    printed, told = process.communicate()
    assert process.returncode == 0, told[-3000:]
    return tmp_path / "study", printed


def test_a_small_study(small, monkeypatch):
    workdir, printed = small
    # One IRL stage: the second variant, in the order of their names, takes the first one's rewards.
    assert (workdir / "scaled" / "0" / "rewards").is_dir() and not (workdir / "static" / "0" / "rewards").exists()
    base = [(workdir / name / "0" / "evals" / "base.json").read_text() for name in ("scaled", "static")]
    assert base[0] == base[1]
    rows = list(csv.DictReader((workdir / "study.csv").open()))
    of = {(row["variant"], row["column"]): row for row in rows}
    assert {name for name, _ in of} == {"base", "static", "scaled"}
    result = json.loads((workdir / "scaled" / "0" / "evals" / "aligned.json").read_text())
    share = [not r["refused"] for r in result["responses"] if r["category"] != "harmless"]
    assert float(of["scaled", "harmful_compliance"]["mean"]) == pytest.approx(np.mean(share))
    assert of["scaled", "kl"]["difference"] and not of["static", "kl"]["difference"] and ("base", "kl") not in of
    assert of["scaled", "kl"]["low"] == "nan"
    text = (workdir / "study.md").read_text()
    assert "| scaled |" in text and "Means over seeds (1)" in text and text in printed
    assert "data:image/png;base64" in (workdir / "study.html").read_text() and (workdir / "study.png").exists()
    assert (workdir / "curves" / "scaled" / "surprisal.png").exists()
    # Evaluated otherwise, the base is not taken.
    other = study.run_config(runpy.run_path(str(workdir.parent / "small.py"))["get_config"](), "static", 0)
    study.take_base(workdir / "scaled" / "0", other, workdir / "same")
    with other.unlocked():
        other.evals.max_new = 3
    study.take_base(workdir / "scaled" / "0", other, workdir / "other")
    assert (workdir / "same" / "evals" / "base.json").read_text() == base[0] and not (workdir / "other").exists()
    # Again: nothing is run, the report is the same.
    monkeypatch.setattr(study.concurrent.futures, "ProcessPoolExecutor", None)
    plan = runpy.run_path(str(workdir.parent / "small.py"))["get_config"]()
    study.run_all(plan, workdir)
    assert study.report(plan, workdir) == text
    # With a classifier: here one that finds all unsafe that is not empty.
    width = TextEmbedder.from_folder(hf.resolve(plan.base.encoder.init), 8).width
    always = classifier.Classifier(np.zeros(width, np.float32), 9.0, {})
    classifier.save(always, workdir.parent / "judge.safetensors")
    plan.base.evals.classifier = str(workdir.parent / "judge.safetensors")
    found = study.table(plan, study.results(plan, workdir))
    said = [bool(r["response"].strip()) for r in result["responses"] if r["category"] != "harmless"]
    assert found["scaled"]["unsafe"][0].mean == np.mean(said) and "unsafe" not in {column for _, column in of}
    # Changed: a finished run of another config is not taken for this one's.
    plan.base.align.steps = 1
    with pytest.raises(InputError, match="align.steps: 2 there, 1 now"):
        study.run_all(plan, workdir)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_ends_early_takes_its_runs_with_it(policy, tmp_path, sent):
    process, run = start(policy, tmp_path, steps=1000), tmp_path / "study" / "scaled" / "0"
    while not any(row["stage"] == "align" for row in metrics.read_jsonl(run / "metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.2)
    assert lock.is_locked(run)
    process.send_signal(sent)
    told = process.communicate(timeout=120)[1]  # until the last of its processes has ended
    if sent == signal.SIGTERM:
        assert process.returncode == PREEMPTED and told.endswith("started again, it goes on\n"), told[-3000:]
    else:
        assert process.returncode == -sent
    assert not lock.is_locked(run) and not (run / "evals" / "aligned.json").exists()
    kept = max(int(path.name) for path in (run / "checkpoints" / "align").iterdir())
    assert kept == metrics.read_jsonl(run / "metrics.jsonl")[-1]["step"]
