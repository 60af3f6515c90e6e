"""Whole runs on a random two-layer model, as a user starts them: to the report, on several devices, and refused."""

import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import commands
from helpers.whole_runs import EIGHT_DEVICES, flags_of, run_here, same_run, start
from safetensors.numpy import load_file

from drirl_jax import main
from drirl_jax.commands import score
from drirl_jax.reports import status
from drirl_jax.runtime import console

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory):
    """A run that was never interrupted: its folder, and what it told, compilations among it."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_LOG_COMPILES", "1")
        done = start(policy, workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done


def test_a_run_leaves_its_products(whole, policy):
    workdir, printed = whole[0], whole[1].stdout
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [(s, i) for s in ("irl", "align") for i in range(1, 5)]
    align = rows[-1]
    for name in ("reward", "gap", "alpha_d", "alpha_m", "kl", "length", "entropy", "loss", "grad_norm"):
        assert np.isfinite(align[name])
    assert {f"alpha_d/{c}" for c in ("insult", "harmless")} < align.keys()
    assert rows[0]["loss"] == pytest.approx(np.log(2)) and rows[4]["kl"] == pytest.approx(0, abs=1e-6)
    assert "accuracy/insult" in rows[1] and "accuracy/insult" not in rows[0]
    for name in ("base", "aligned"):
        result = json.loads((workdir / "evals" / f"{name}.json").read_text())
        assert {row["category"] for row in result["responses"]} == set(result["by_category"])
        assert len(result["responses"]) == sum(of["n"] for of in result["by_category"].values()) == 184
    # Four samples a prompt: a share of them is a whole number of quarters of the prompts, not a mean reward.
    assert all((row["wrong/insult"] * 4).is_integer() for row in rows[4:])
    html = (workdir / "report.html").read_text()
    assert "data:image/png;base64" in html and "unfairness" in html and "0 (not finite)" in html
    facts = json.loads((workdir / "facts.json").read_text())
    assert sum(facts["records"]["test"].values()) == 410
    assert set(facts["records"]["train"]) == set(result["by_category"])
    assert "Records by category and split" in html and "No step has been timed" not in html and facts["device"] in html
    assert "refused" in printed and str(workdir / "report.html") in printed
    assert list((workdir / "tensorboard").rglob("events*"))
    adapters = {str(file.parent.relative_to(workdir)) for file in workdir.rglob("adapter_model.safetensors")}
    assert adapters == {"adapters/policy"} | {f"adapters/rewards/{category}" for category in result["by_category"]}


def test_the_aligned_model_loads_in_transformers_and_is_the_merged_policy(whole, policy):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    aligned = whole[0] / "aligned"
    model = transformers.AutoModelForCausalLM.from_pretrained(aligned)
    before, after = load_file(policy / "model.safetensors"), load_file(aligned / "model.safetensors")
    np.testing.assert_array_equal(model.state_dict()["model.norm.weight"].numpy(), after["model.norm.weight"])
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in after if "proj" in name}
    assert transformers.AutoTokenizer.from_pretrained(aligned).chat_template


def same_but_for_rounding(a: pathlib.Path, b: pathlib.Path):
    """Every sampled token is the same, and every number within float32's rounding.

    Rewards are compared as they were before they were divided by their category's spread, which is about 0.01 here:
    Adam moves a weight whose gradient is only rounding by as much as any other, and so a reward by 1e-6 or less.
    """
    for one, other in zip(*(map(json.loads, (x / "metrics.jsonl").read_text().splitlines()) for x in (a, b))):
        assert one.keys() == other.keys() and one.pop("stage") == other.pop("stage")
        values = [[np.nan if row[name] is None else row[name] for name in one] for row in (one, other)]
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)
    one, other = (load_file(x / "aligned" / "model.safetensors") for x in (a, b))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=2e-6)
    for name in ("base", "aligned"):
        one, other = (json.loads((x / "evals" / f"{name}.json").read_text())["responses"] for x in (a, b))
        for before, after in zip(one, other, strict=True):
            folder = a / "adapters" / "rewards" / before["category"]
            spread = json.loads((folder / "reward.json").read_text())["std"]
            assert before.pop("reward") * spread == pytest.approx(after.pop("reward") * spread, abs=1e-6)
            assert before == after


# Functions that hold the model, and for how many shapes a run calls them; the sampler: in irl, align and evals.
USES = {"sample": 3, "logprobs": 1, "score": 2, "updated": 2, "token_scores": 2, "merge": 1}


def test_a_run_compiles_each_function_once_for_each_use(whole):
    # The lines come whether the compiler or its cache on disk gave the result.
    compiled = collections.Counter(re.findall(r"Finished XLA compilation of jit\((\w+)\)", whole[1].stderr))
    assert {name: compiled[name] for name in USES} == USES


@pytest.mark.parametrize(
    "mesh",
    [(2, 2, 2), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 1, 2)))],
    ids=lambda mesh: "x".join(map(str, mesh)),
)
def test_eight_devices_give_the_run_of_one(whole, policy, tmp_path, mesh):
    flags = [f"--config.mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh)]
    if mesh == (2, 2, 2):  # and samples on another
        flags += ["--config.sampler.mesh.data=4", "--config.sampler.mesh.tensor=2"]
    done = start(policy, tmp_path / "run", *flags, environment=EIGHT_DEVICES)
    assert done.returncode == 0, done.stderr[-3000:]
    same_but_for_rounding(whole[0], tmp_path / "run")


def several(count, policy, workdir, *flags):
    """`launch/multiprocess.sh` with so many processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable, "GRACE": "60"}
    return subprocess.Popen(
        ["bash", "launch/multiprocess.sh", str(count), *flags_of(policy, workdir, *flags)],
        cwd=ROOT, env=environment | {"NPROC": "64"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def process_of(launcher, number):
    """The id of the launcher's child that is process `number` of the run."""
    ids = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    told = {pid: pathlib.Path(f"/proc/{pid}/cmdline").read_text() for pid in ids}
    (pid,) = [pid for pid in ids if f"--config.distributed.process={number}" in told[pid].split("\0")]
    return int(pid)


def test_two_processes_give_the_run_of_one(whole, policy, tmp_path):
    told, _ = (process := several(2, policy, tmp_path / "run")).communicate()
    assert process.returncode == 0 and "started again" not in told, told[-3000:]
    same_but_for_rounding(whole[0], tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_of_four_processes_one_is_killed_and_the_run_ends_with_the_same_bits(policy, tmp_path):
    flags = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
    assert several(4, policy, tmp_path / "whole", *flags).wait() == 0
    process = several(4, policy, tmp_path / "killed", *flags)
    metrics, end = tmp_path / "killed" / "metrics.jsonl", time.time() + 400
    while not (metrics.exists() and '"stage": "align", "step": 3,' in metrics.read_text()):
        assert process.poll() is None and time.time() < end
        time.sleep(0.05)
    os.kill(process_of(process, 3), signal.SIGKILL)
    told, _ = process.communicate()
    assert process.returncode == 0 and "started again (1 of 3)" in told, told[-3000:]
    same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["irl", "align"])
def test_of_two_processes_one_is_asked_to_end_and_both_leave_at_the_same_step(whole, policy, tmp_path, stage):
    process, end = several(2, policy, tmp_path / "run"), time.time() + 400
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and f'"stage": "{stage}", "step": 1,' in metrics.read_text()):
        assert process.poll() is None and time.time() < end
        time.sleep(0.01)
    os.kill(process_of(process, 1), signal.SIGTERM)
    told, _ = process.communicate()
    assert process.returncode == 0 and "started again (1 of 3)" in told, told[-3000:]
    assert re.search(r"asked to end: step \d of (irl|align) is kept; started again, it goes on", told), told[-3000:]
    same_but_for_rounding(whole[0], tmp_path / "run")


def test_another_seed_is_another_run(whole, policy, tmp_path):
    run_here(policy, tmp_path / "run", "--config.seed=1", "--config.schedule=('irl',)")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() != "\n".join(
        (whole[0] / "metrics.jsonl").read_text().splitlines()[:4]
    ) + "\n"


@pytest.mark.smoke
def test_full_fine_tuning_runs_and_rows_that_the_tiny_config_leaves_out(policy, tmp_path):
    run_here(
        policy,
        tmp_path / "run",
        "--config.irl.loss=logistic",
        "--config.irl.contrast=0.0",
        "--config.data.mixing=kinds",
        "--config.group.demonstration=member",
        "--config.policy_loss.beta_kl=0.0",
        "--config.policy.tune=full",
        "--config.align.accumulate=2",
        "--config.irl.steps=1",
        "--config.align.steps=1",
    )
    before, after = (load_file(f / "model.safetensors") for f in (policy, tmp_path / "run" / "aligned"))
    assert not np.array_equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_adapters_on_the_last_layer_leave_the_others_as_they_are(policy, tmp_path):
    run_here(
        policy,
        tmp_path / "run",
        "--config.policy.layers=1",
        "--config.reward.layers=1",
        "--config.group.demonstration=member",
        "--config.group.contrast=member",
        "--config.align.accumulate=2",
        "--config.irl.steps=1",
        "--config.align.steps=1",
    )
    before, after = (load_file(f / "model.safetensors") for f in (policy, tmp_path / "run" / "aligned"))
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in after if "layers.1." in name and "proj" in name}


def test_rewards_of_another_run_and_none_at_all(whole, policy, tmp_path):
    # The rewards are those that the first run learned: its first batch is scored the same.
    alone = ("--config.schedule=('align',)", "--config.align.steps=1")
    run_here(policy, tmp_path / "again", *alone, f"--config.reward.init={whole[0]}")
    (row,) = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    first = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()][4]
    assert row["reward"] == first["reward"] and row["stage"] == first["stage"] == "align"
    other = ("--config.schedule=('align',)", f"--config.reward.init={whole[0]}", "--config.sampler.max_new=10")
    commands.refused("are of config.sampler.max_new = 12, not 10", main, *flags_of(policy, tmp_path / "other", *other))
    # Demonstrations alone need no rewards; the report shows none.
    supervised = ("--config.align.objective=sft",)
    run_here(policy, tmp_path / "sft", "--config.schedule=('align','evals')", *supervised)
    result = json.loads((tmp_path / "sft" / "evals" / "aligned.json").read_text())
    assert result["overall"]["mean_reward"] is None and result["overall"]["harmful_refused"] is not None
    assert "objective sft" in (tmp_path / "sft" / "report.html").read_text()


def test_rewards_at_inference(whole, tmp_path):
    workdir, (given, out) = whole[0], (tmp_path / name for name in ("given.jsonl", "out.jsonl"))
    evaluated = json.loads((workdir / "evals" / "base.json").read_text())["responses"][:3]
    fields = {"lang": "en", "split": "test"}
    rows = [{k: r[k] for k in ("id", "category", "prompt", "response")} | fields for r in evaluated]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row | {"response": ""}) + "\n" for row in rows))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    own = [sys.executable, "-m", "drirl_jax.commands.score", f"--workdir={workdir}", f"--responses={given}"]
    done = subprocess.run([*own, f"--out={out}"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    # Text of a random model need not come back as the same tokens, so the rewards need not be the evaluation's.
    assert [row["id"] for row in found] == [row["id"] for row in rows] and np.isfinite(
        [r["reward"] for r in found]
    ).all()
    commands.run(score, f"--workdir={workdir}", f"--prompts={prompts}", "--best_of=4", f"--out={out}")
    best = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["lowest"] <= row["mean"] <= row["reward"] and row["response"] for row in best)
    assert any(row["lowest"] < row["reward"] for row in best)
    commands.refused(
        "holds no run, as it has no config.json", score, f"--workdir={tmp_path}", f"--responses={given}", f"--out={out}"
    )
    commands.refused("give --responses to score, or --prompts", score, f"--workdir={workdir}", f"--out={out}")


def jsonl(tmp_path, *lines):
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    return f"--config.data.path={tmp_path / 'data.jsonl'}"


GOOD = {
    "id": "a",
    "category": "insult",
    "lang": "en",
    "split": "train",
    "prompt": "p",
    "draft": "",
    "response": "r",
}
BAD_DATA = {
    "not JSON": ("{oops", r"data.jsonl, line 1: not JSON"),
    "no field": (
        json.dumps({k: v for k, v in GOOD.items() if k != "response"}),
        "line 1: the field 'response' is missing",
    ),
    "category": (
        json.dumps(GOOD | {"category": "insults"}),
        "line 1: unknown category 'insults': did you mean 'insult'",
    ),
    "empty": (json.dumps(GOOD | {"response": " "}), r"line 1: the demonstration \(response\) is empty"),
    "too few": (json.dumps(GOOD), "too few demonstrations"),
}
BAD_FLAGS = {
    "misspelt key": ("--config.align.stps=3", "steps"),
    "misspelt table row": (
        "--config.scaling.combine=produkt",
        "config.scaling.combine is 'produkt': choose one of product",
    ),
    "half weights that are trained": (
        "--config.policy.weights=bfloat16 --config.policy.dtype=bfloat16 --config.policy.tune=full",
        "config.policy.weights is 'bfloat16', but config.policy.tune is 'full'",
    ),
    "half weights under a float32 computation": (
        "--config.policy.weights=bfloat16",
        "config.policy.weights is 'bfloat16', but config.policy.dtype is 'float32'",
    ),
    "no data": ("--config.data.path=nowhere.jsonl", "no file nowhere.jsonl"),
    "no model": ("--config.policy.init=./nowhere", "no model at ./nowhere"),
    "long prompts": ("--config.data.max_prompt=20", "above config.data.max_prompt = 20"),
    "more layers than there are": ("--config.policy.layers=3", "config.policy.layers is 3, but .* has 2 layers"),
    "a part without the first": (
        "--config.group.contrast=member",
        "group.contrast is 'member', but config.group.demonstration is only 'baseline'",
    ),
    "nothing to tell refusals by": ("--config.group.contrast=apart", "group.harmless_refusals is 0.5, which needs"),
    "group of one": (
        "--config.align.group_size=1 --config.group.harmless_refusals=1.0 --config.group.contrast=apart "
        "--config.group.demonstration=apart",
        "at least 2 responses",
    ),
    "an inner policy that never moves": ("--config.irl.policy=alternate", "the inner policy never moves"),
    "no rewards": ("--config.schedule=('align',)", "config.reward.source='irl' needs rewards: put 'irl' first"),
    "rewards twice": ("--config.reward.init=runs/other", "'irl' in the schedule learns rewards: leave one out"),
    "no judge": ("--config.reward.source=judge", "an endpoint needs a url that begins with http"),
    "no data at all": ("--config.data.shares=(" + ",".join(["0.0"] * 8) + ")", "one of them above 0"),
    "rewards of no run": (
        "--config.schedule=('align',) --config.reward.init=nowhere",
        "no rewards in nowhere/rewards: name the workdir of a run",
    ),
    "stages out of order": ("--config.schedule=('align','irl')", "config.schedule is .*: give .* in this order"),
    "an option of another objective": (
        "--config.align.objective=dpo --config.group.demonstration=member",
        "--config.group.demonstration has no effect: config.align.objective is 'dpo', which compares no group",
    ),
    "a weight below 0": ("--config.irl.contrast=-1.0", "config.irl.contrast is -1.0: it must not be negative"),
    "no encoder": ("--config.encoder.init=package:no_such_encoder", "pip install"),
}


def refused(done, message):
    assert done.returncode not in (0, -9)
    assert re.search(message, done.stderr), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) < 900


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_is_one_clear_sentence(policy, tmp_path, kind):
    line, message = BAD_DATA[kind]
    commands.refused(message, main, *flags_of(policy, tmp_path / "run", jsonl(tmp_path, line)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_a_bad_flag_is_one_clear_sentence(policy, tmp_path, kind):
    flags, message = BAD_FLAGS[kind]
    commands.refused(message, main, *flags_of(policy, tmp_path / "run", *flags.split()))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_workdir_of_another_config_is_refused(whole, policy):
    before = (whole[0] / "metrics.jsonl").read_text()
    refused(start(policy, whole[0], "--config.align.group_size=6"), r"align.group_size: 4 there, 6 now")
    assert (whole[0] / "metrics.jsonl").read_text() == before


def test_the_status_and_the_plan_of_a_finished_run(whole, policy, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
    run_here(policy, whole[0], "--dry_run", "--log=json")
    console.set_mode("text")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (found,) = [event for event in events if event["event"] == "result"]
    assert events[-1] == {"event": "end", "exit": 0}
    assert [(stage["stage"], stage["finished"], stage["seconds"]) for stage in found["stages"]] == [
        ("irl", True, 0.0), ("align", True, 0.0), ("evals", True, 0.0)
    ]  # fmt: skip
    told = status.run_status(whole[0])
    assert told["finished"] and not told["at_work"] and told["checkpoints"] == {"irl": [2, 4], "align": [2, 4]}
    assert told["last"]["stage"] == "align" and told["stages"][1]["seconds_a_step"] > 0
    assert "align       4 of 4, done" in status.text(told)
    assert before == {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}


def test_flags_that_say_too_little_or_what_is_not_there():
    for flags, message in (
        ([], "--config is missing.*configs/quickstart.py, .*configs/tiny.py"),
        (["--config=configs/tiny.py"], "--workdir is missing"),
        (["--config=configs/nowhere.py", "--workdir=x"], "nowhere"),
        (["--config=configs/study_smollm2.py:mian"], "no part 'mian': choose from main"),
        (["--confg=configs/tiny.py"], "Unknown command line flag 'confg'. Did you mean: config"),
    ):
        commands.refused(message, main, *flags)
