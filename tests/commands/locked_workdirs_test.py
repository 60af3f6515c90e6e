"""Commands that write a workdir hold its lock; commands that only read it do not."""

import contextlib
import pathlib

import pytest
from helpers import commands

from drirl_jax.attacks import options, runner
from drirl_jax.commands import evaluate, study
from drirl_jax.config import default
from drirl_jax.reports import pages, status
from drirl_jax.runtime import lock, workdirs
from drirl_jax.types import InputError

TAKEN = "another run is at work in .*out: wait until it has ended"
STUDY = f"--config={pathlib.Path(__file__).parents[2]}/configs/study_smollm2.py"


def run_evaluate(workdir):
    return evaluate.run("model", default(), workdir)


def run_attack(workdir):
    return runner.attack_model("model", None, ["none"], "starter", 1, options.default(), workdir)


@pytest.mark.parametrize("module, do", [(evaluate, run_evaluate), (runner, run_attack)], ids=["evaluate", "attack"])
def test_evaluate_and_attack_hold_their_workdir(module, do, tmp_path, monkeypatch):
    work = "_run" if module is evaluate else "_attack_model"
    locked = []
    monkeypatch.setattr(module, work, lambda *_: locked.append(lock.is_locked(tmp_path / "out")) or [])
    assert do(tmp_path / "out") == [] and locked == [True] and not lock.is_locked(tmp_path / "out")
    with contextlib.closing(lock.acquire(tmp_path / "out")), pytest.raises(InputError, match=TAKEN):
        do(tmp_path / "out")
    assert locked == [True]  # the second command has not begun

    def fail(*_):
        raise InputError("wrong")

    monkeypatch.setattr(module, work, fail)
    with pytest.raises(InputError, match="wrong"):
        do(tmp_path / "out")
    assert not lock.is_locked(tmp_path / "out")


def test_a_study_holds_its_folder_and_leaves_those_of_its_runs_to_them(tmp_path, monkeypatch):
    out, locked = tmp_path / "out", []

    def run_all(plan, workdir):
        locked.append(lock.is_locked(workdir))
        lock.acquire(study.run_folder(workdir, plan.reference, plan.seeds[0])).close()  # as a run does
        raise InputError("a run is wrong")

    monkeypatch.setattr(study, "run_all", run_all)
    commands.refused("a run is wrong", study, STUDY, f"--workdir={out}", "--config.jobs=1")
    assert locked == [True] and not lock.is_locked(out)
    with contextlib.closing(lock.acquire(out)):
        commands.refused(TAKEN, study, STUDY, f"--workdir={out}", "--config.jobs=1")
    assert locked == [True]


def test_a_study_that_is_wrong_makes_no_folder(tmp_path):
    commands.refused("jobs is 0", study, STUDY, f"--workdir={tmp_path / 'out'}", "--config.jobs=0")
    assert not (tmp_path / "out").exists()


def test_what_only_reads_works_beside_a_run(tmp_path):
    workdirs.record_config(default(), tmp_path)
    with contextlib.closing(lock.acquire(tmp_path)):
        assert status.run_status(tmp_path)["at_work"]
        assert pages.load_run(tmp_path).workdir == tmp_path
    assert not status.run_status(tmp_path)["at_work"]
