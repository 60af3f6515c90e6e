"""A whole run with the stage `sft`: its products, its adapter on the initial policy, and a second start."""

import json
import shutil

import numpy as np
import pytest
from helpers.whole_runs import run_here, same_run
from safetensors.numpy import load_file

FLAGS = (
    "--config.schedule=('sft','irl','align','evals')", "--config.sft.steps=2", "--config.sft.recovery=0.5",
    "--config.sft.own_answers=16", "--config.irl.steps=2", "--config.align.steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def warm(policy, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("warm") / "run"
    run_here(policy, workdir, *FLAGS)
    return workdir


def test_the_stages_follow_each_other_and_three_policies_are_evaluated(warm):
    rows = [json.loads(line) for line in (warm / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [(s, i) for s in ("sft", "irl", "align") for i in (1, 2)]
    assert {path.stem for path in (warm / "evals").iterdir()} == {"base", "sft", "aligned"}
    assert "after SFT" in (warm / "report.html").read_text()
    base = json.loads((warm / "adapters" / "rewards" / "insult" / "adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == str(warm / "sft")


def test_the_exported_adapter_is_the_sum_of_both_stages_on_the_initial_policy(warm, policy):
    adapter = load_file(warm / "adapters" / "policy" / "adapter_model.safetensors")
    options = json.loads((warm / "adapters" / "policy" / "adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == str(policy)
    before, after, middle = (load_file(x / "model.safetensors") for x in (policy, warm / "aligned", warm / "sft"))
    scale, compared = options["lora_alpha"] / options["r"], 0
    for name in (name for name in adapter if "lora_A" in name):
        key = name.removeprefix("base_model.model.").replace(".lora_A", "")
        delta = scale * adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
        np.testing.assert_allclose(before[key] + delta, after[key], atol=1e-6)
        compared += not np.array_equal(before[key], middle[key]) and not np.array_equal(middle[key], after[key])
    assert compared == 14  # seven matrices of two layers, which both stages changed


def test_a_second_start_goes_on_behind_the_warm_start(warm, policy, tmp_path):
    # As if the first start had been killed before the first checkpoint of the alignment.
    shutil.copytree(warm, tmp_path / "run")
    for name in ("checkpoints/align", "aligned", "evals"):
        shutil.rmtree(tmp_path / "run" / name)
    run_here(policy, tmp_path / "run", *FLAGS)
    same_run(warm, tmp_path / "run")
