"""The command line beside the run itself: the plan, the status, quiet and JSON modes, --help."""

import dataclasses
import importlib
import io
import json
import logging
import platform
import re
import subprocess
import sys

import jax
import pytest
from helpers import commands

from drirl_jax import config as config_lib
from drirl_jax import loading, main
from drirl_jax.commands import bench, cli, evaluate, score
from drirl_jax.commands import report as report_command
from drirl_jax.commands import status as status_command
from drirl_jax.costs import dry_run, roofline
from drirl_jax.reports import status
from drirl_jax.runtime import console, lock, progress, workdirs


@pytest.fixture(params=console.MODES)
def mode(request):
    yield request.param
    console.set_mode("text")


def test_a_mode_says_what_it_should(mode, capsys):
    console.set_mode(mode)
    logging.getLogger("drirl_jax.x").info("begun")
    logging.getLogger("drirl_jax.x").warning("odd")
    console.print_result("a table", rows=2, gap=float("nan"))
    out, err = capsys.readouterr()
    if mode == "json":
        assert not err and [json.loads(line) for line in out.splitlines()] == [
            {"event": "log", "level": "info", "message": "begun"},
            {"event": "log", "level": "warning", "message": "odd"},
            {"event": "result", "rows": 2, "gap": None},
        ]
    else:
        assert out == "a table\n" and err == ("odd\n" if mode == "quiet" else "begun\nodd\n")


def test_progress_in_each_mode(mode, capsys):
    console.set_mode(mode)
    bar = progress.Progress("align", total=3, start=1)
    bar.show({"loss": 0.5})
    assert list(progress.with_progress([5, 6], "weights", "tensor")) == [5, 6]  # too short a work to be told of
    bar.close()
    out, err = capsys.readouterr()
    assert ("align:" in err) == (mode == "text") and "weights" not in out + err
    if mode == "json":
        told = json.loads(out)
        assert told.pop("seconds_left") >= 0
        assert told == {"event": "progress", "stage": "align", "done": 2, "of": 3, "loss": 0.5}


def test_long_work_has_a_bar_with_the_time_left(capsys, monkeypatch):
    ticks = iter(range(0, 1000, 5))
    monkeypatch.setattr("tqdm.std.time", lambda: next(ticks))
    for _ in progress.with_progress(range(4), "weights", "tensor"):
        pass
    assert "weights:" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.wants_colour(Terminal()) and not console.wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not console.wants_colour(Terminal())


# ------------------------------------------------------------------------------------------------------ status


@pytest.fixture
def begun(tmp_path):
    """What a run leaves in the fourth of ten alignment steps."""
    config = config_lib.default().unlock()
    config.irl.steps, config.align.steps = 2, 10
    workdirs.record_config(config, tmp_path)
    for step, seconds in enumerate((9.0, 2.0, 4.0), start=1):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": "align", "step": step, "loss": 0.5, "kl": None}) + "\n")
        with (tmp_path / "timing.jsonl").open("a") as file:
            file.write(json.dumps({"stage": "align", "step": step, "collect_s": 1.0, "update_s": seconds}) + "\n")
    (tmp_path / "metrics.jsonl").open("a").write('{"stage": "align", "st')
    for folder in ("rewards/0", "checkpoints/align/2", "checkpoints/align/3.orbax-checkpoint-tmp", "replay/align-4"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def test_the_status_of_a_run_that_was_cut_off(begun):
    found = status.run_status(begun)
    assert (found["stage"], found["finished"], found["at_work"]) == ("align", False, False)
    irl, align, evals = found["stages"]
    assert irl["finished"] and (irl["done"], irl["steps"]) == (2, 2)
    # The median of 10, 3 and 5 seconds, for seven steps more.
    assert (align["done"], align["seconds_a_step"], align["seconds_left"]) == (3, 5.0, 35.0)
    assert (evals["done"], evals["steps"], evals["seconds_left"]) == (0, 2, None)
    assert found["checkpoints"] == {"align": [2]} and found["stops"] == ["align-4"]
    text = status.text(found)
    assert "3 of 10, about 35 s left at 5.00 s a step" in text and "loss 0.5" in text and "kl" not in text
    assert f"--replay={begun}/replay/align-4" in text


def test_the_status_knows_who_holds_the_workdir_and_takes_nothing(begun):
    held = lock.acquire(begun)
    assert status.run_status(begun)["at_work"]
    held.close()
    assert not status.run_status(begun)["at_work"]
    lock.require_free(begun)


@pytest.mark.parametrize("config", ["{", "[]", '{"attack": 1}'])
def test_a_config_that_is_no_runs_is_one_sentence(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SystemExit, match="config.json is damaged .*: put a run's own file there"):
        status_command.main([str(tmp_path)])


@pytest.mark.parametrize("name, reason", [("", "it has no config.json"), ("nowhere", "there is no such folder")])
def test_a_folder_that_holds_no_run_is_one_plain_sentence(tmp_path, name, reason):
    folder = tmp_path / name
    sentence = re.escape(f"drirl_jax: {folder} holds no run, as {reason}: name the workdir of a run.") + "$"
    for read in (status_command, report_command):
        with pytest.raises(SystemExit, match=sentence):
            read.main([str(folder)])
    given = tmp_path / "given.jsonl"
    commands.refused(sentence, score, f"--workdir={folder}", f"--responses={given}", f"--out={tmp_path / 'out'}")
    commands.refused(
        f"no model at {tmp_path / 'nowhere'}: ", evaluate, f"--policy={tmp_path / 'nowhere'}", "--benchmarks=xstest",
        f"--workdir={tmp_path / 'results'}",
    )  # fmt: skip


def test_status_needs_a_folder():
    with pytest.raises(SystemExit, match="required: run"):
        status_command.main([])


READERS = """
import subprocess, sys
from drirl_jax.runtime import console
console.outlive_readers()
mode = sys.argv[1]
if mode in ("text", "json"):
    console.set_mode(mode)
    for i in range(20_000):
        console.print_result(f"line {i}", line=i)
else:
    from drirl_jax.commands import status
    for i in range(200):
        status.main(sys.argv[2:])
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize("mode", ["text", "json", "status"])
def test_a_command_outlives_the_reader_of_its_output(begun, mode):
    command = f"set -o pipefail; {sys.executable} -c '{READERS}' {mode} {begun} --json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "done\n") and len(done.stdout.splitlines()) == 1
    closed = f"{sys.executable} -c '{READERS}' {mode} {begun} --json >&- 2>&-"
    assert subprocess.run(["bash", "-c", closed]).returncode == 0


def test_the_status_needs_no_jax(begun):
    code = "import sys; from drirl_jax.commands import status; status.main(sys.argv[1:]); print('jax' in sys.modules)"
    command = [sys.executable, "-c", code, str(begun), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    found, loaded = done.stdout.splitlines()
    assert json.loads(found)["stage"] == "align" and loaded == "False"


# ----------------------------------------------------------------------------------------------------- the plan


@pytest.fixture(scope="module")
def context(policy):
    """The tiny run's, its model shapes alone."""
    config = importlib.import_module("configs.tiny").get_config()
    config.policy.init = str(policy)
    return loading.load_context(config, load=False)


def test_the_plan_of_a_run_that_is_not_begun(context, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "measure_machine", lambda model: roofline.Machine(1e9, 1e9))
    found = dry_run.make_plan(context, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert isinstance(jax.tree.leaves(context.model)[0], jax.ShapeDtypeStruct)
    # Width 32, 4 heads and 2 of keys of 8, MLP 48; pairs of rank 4 for seven matrices of two layers.
    pairs = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert found["parameters"]["trained"] == 2 * pairs
    # 0.065 of 120 and of 450 records, rounded up.
    assert set(found["records"]["train"].values()) == {8, 30} and sum(found["records"]["test"].values()) == 410
    assert [(stage["stage"], stage["steps"], stage["done"]) for stage in found["stages"]] == [
        ("irl", 4, 0), ("align", 4, 0), ("evals", 2, 0)
    ]  # fmt: skip
    for stage in found["stages"]:
        assert stage["seconds"] == pytest.approx(stage["steps"] * stage["operations"] / 1e9)
    # 4 bytes of every weight, adapters as a model of their own beside it.
    assert found["memory"]["weights"] == found["memory"]["align: merged policy"] == 4 * found["parameters"]["policy"]
    text = dry_run.text(found)
    assert "align: 4 steps, not begun; grpo: 8 prompts" in text and "at the 1 GFLOP/s" in text
    assert "harmless" in text and "more than there is" not in text
    assert "more than there is" in dry_run.text(found | {"memory_limit": 1})


def varied(context, **sections):
    config = context.config.copy_and_resolve_references()
    for section, options in sections.items():
        config[section].update(options)
    return dry_run.align_operations(dataclasses.replace(context, config=config), size=100, tuned=10)


def test_what_a_step_costs_follows_the_objective(context):
    grpo = varied(context)
    assert {name for name, count in grpo.items() if count} == {"rollout", "reference", "rewards", "update"}
    assert varied(context, align={"epochs": 3})["update"] == 3 * grpo["update"]
    assert "reference" not in varied(context, policy_loss={"beta_kl": 0.0})
    assert "rewards" not in varied(context, reward={"source": "rules"})
    assert varied(context, reward={"route": "linear"})["rewards"] == 8 * grpo["rewards"]
    assert varied(context, align={"objective": "ppo"})["values"] > 0
    alone = varied(context, align={"objective": "sft"})
    assert list(alone) == ["update"] and alone["update"] < grpo["update"] / 2
    pair, group = (varied(context, align={"objective": "dpo"}, dpo={"pairs": p}) for p in ("self", "demonstration"))
    assert pair["update"] < grpo["update"] < group["update"] and group["rollout"] == grpo["rollout"]


def test_memory_by_hand(context):
    full = context.config.copy_and_resolve_references()
    full.policy.tune = "full"
    full = dataclasses.replace(context, config=full)
    memory = dry_run.memory(full, dry_run.device_trees(full))
    # The policy, two moments and a gradient, and a few counters; it is itself what is sampled from.
    states = memory["align: policy, optimiser, gradients"]
    assert states == pytest.approx(4 * memory["weights"], abs=100) and memory["align: merged policy"] == 0
    shape = roofline.Shape(P=2, S=3, G=4, T=5, R=6)
    # Keys and values, 4 bytes, 2 layers, 2 heads of 8: of the prefix once, of prompts once a group.
    assert dry_run.cache_bytes(context.model.config, shape) == 2 * 4 * 2 * 2 * 8 * (6 + 2 * (3 + 4 * 5))


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.data.max_prompt=20", "above config.data.max_prompt = 20"),
        ("--config.policy.layers=3", "has 2 layers"),
        ("--config.mesh.tensor=64", "config.mesh asks for"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(policy, tmp_path, flag, message):
    flags = ["--config=configs/tiny.py", f"--config.policy.init={policy}", f"--workdir={tmp_path / 'x'}", flag]
    commands.refused(message, main, *flags, "--dry_run")
    assert not (tmp_path / "x").exists()


def test_a_dry_run_refuses_a_workdir_that_is_not_its_own(context, begun):
    with pytest.raises(ValueError, match="a run of a different config"):
        dry_run.make_plan(context, begun)
    held = lock.acquire(begun)
    with pytest.raises(ValueError, match="another run is at work in"):
        dry_run.make_plan(context, begun)
    held.close()


# --------------------------------------------------------------------------------------------------------- flags


def test_help_teaches_and_is_no_error(capsys, monkeypatch):
    def help_of(command):
        monkeypatch.setattr("sys.argv", [f"drirl_jax/{command}.py", "--help"])
        with pytest.raises(SystemExit) as stop:
            cli.parse(sys.argv)
        assert stop.value.code == 0
        return capsys.readouterr().out

    told = help_of("main")
    assert "configs/quickstart.py: SmolLM2-135M-Instruct on the starter set" in told and "--[no]dry_run" in told
    assert "attack.py" not in told and "configs/study_smollm2.py:main: main, rewards" in help_of("study")


def test_a_mode_that_is_none_is_refused():
    commands.refused("flag --log=loud: value should be one of <text|quiet|json>", main, "--log=loud")


@pytest.mark.parametrize("command", [bench, evaluate, score])
def test_other_commands_take_no_dry_run_and_say_how_they_end(command, capsys):
    commands.refused("--dry_run and --replay are flags of drirl_jax.main", command, "--dry_run", "--log=json")
    console.set_mode("text")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit"] == 1


def test_a_wrong_flag_of_a_config_is_told_in_json_too(capsys):
    commands.refused("is wrong", main, "--config=configs/none_such.py", "--log=json")
    console.set_mode("text")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["event"] == "end"


def test_how_a_command_ends_is_said_in_json_too(mode, capsys):
    console.set_mode(mode)
    with pytest.raises(SystemExit) as stop:
        cli.exit_with("interrupted", cli.INTERRUPTED)
    out, err = capsys.readouterr()
    assert stop.value.code == 130 and err == "drirl_jax: interrupted\n"
    assert out == ('{"event": "end", "exit": 130, "message": "interrupted"}\n' if mode == "json" else "")


KEPT = """
import resource, sys, threading
import numpy as np
from drirl_jax.runtime import processes

if sys.argv[1] == "keep":
    processes.keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(2**25, 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def told():
    faults()
    print(faults())

thread = threading.Thread(target=told)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator's options are glibc's")
def test_a_run_takes_freed_memory_again_without_the_kernel():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", KEPT, how], check=True, capture_output=True).stdout)
        for how in ("keep", "leave")
    }
    assert faults["keep"] < 10 < 100 < faults["leave"], faults  # 256 MiB: 65,536 pages of 4 KiB, or 128 of 2 MiB
