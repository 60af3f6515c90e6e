"""Runs that are killed, asked to end, given bad disks and clocks: they end with the bits of one that never was."""

import collections
import functools
import json
import multiprocessing
import os
import pathlib
import random
import re
import signal
import subprocess
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import moments
from helpers.endpoint_server import KEY
from safetensors.numpy import load_file

from drirl_jax.runtime import lock, metrics, progress

ROOT = pathlib.Path(__file__).parents[2]
REPLY = {"choices": [{"message": {"content": f"7 {KEY}"}, "finish_reason": "stop"}]}
# Two records of a category, so that an epoch has two steps; two rounds of samples in the IRL stage.
SMALL = ["--config.data.shares=(" + "0.03," * 8 + ")", "--config.data.minimum=2", "--config.irl.rounds=2"]


class Runs:
    """Starts runs in processes that have their imports behind them."""

    def __init__(self, policy, cache, told: pathlib.Path):
        self.flags = [f"--config={ROOT}/configs/tiny.py", f"--config.policy.init={policy}", *SMALL]
        self.flags += [f"--config.compilation_cache={cache}"]
        self.told = told
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["drirl_jax.train"])

    def begin(self, workdir, *flags, kill=None, patch=None):
        args = ([*self.flags, f"--workdir={workdir}", *flags], self.log(workdir), kill, patch)
        process = self.context.Process(target=moments.run, args=args)
        process.start()
        return process

    def __call__(self, workdir, *flags, kill=None, patch=None):
        """The exit code, negative for a signal, and all that was told in this workdir's starts."""
        process = self.begin(workdir, *flags, kill=kill, patch=patch)
        process.join()
        return process.exitcode, self.log(workdir).read_text()

    def log(self, workdir):
        """What was told in all starts of this workdir; it lies elsewhere, as that may be full."""
        return self.told / f"{str(workdir).replace('/', '_')}.log"


@pytest.fixture(scope="session")
def runs(policy, cache, tmp_path_factory):
    return Runs(policy, cache, tmp_path_factory.mktemp("told"))


@pytest.fixture(scope="session")
def whole(runs, tmp_path_factory):
    """The workdir of a run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("never_interrupted") / "run"
    code, told = runs(workdir)
    assert code == 0, told[-3000:]
    return workdir


def newest(folder: pathlib.Path):
    """The step and the leaves of the newest checkpoint: parameters, optimiser, statistics and samples."""
    manager = ocp.CheckpointManager(folder)
    step = manager.latest_step()
    return step, manager.restore(step, args=ocp.args.StandardRestore())


def assert_same(a: pathlib.Path, b: pathlib.Path):
    """All that two runs leave behind is the same, bit for bit, but for what tells the time."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (a / name).read_text() == (b / name).read_text(), name
    kept = [json.loads(line)["step"] for line in (a / "samples.jsonl").open()]
    assert sorted(set(kept)) == [1, 2, 4] and len(kept) == 3 * 8
    steps = [[(row["stage"], row["step"]) for row in map(json.loads, (x / "timing.jsonl").open())] for x in (a, b)]
    assert steps[0] == steps[1] == [(stage, step) for stage in ("irl", "align") for step in range(1, 5)]
    for name in ("checkpoints/irl", "checkpoints/align", "rewards"):
        (step, one), (other_step, other) = newest(a / name), newest(b / name)
        assert step == other_step and one.keys() == other.keys() and len(one) > 3
        for path in one:
            np.testing.assert_array_equal(one[path], other[path], err_msg=path)
    weights = sorted(path.relative_to(a) for path in a.rglob("*.safetensors"))
    assert weights == sorted(path.relative_to(b) for path in b.rglob("*.safetensors")) and len(weights) == 10
    for path in weights:
        one, other = load_file(a / path), load_file(b / path)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=f"{path} {name}")
    for path in ("evals/base.json", "evals/aligned.json", "reliability.json", "config.json"):
        assert (a / path).read_text() == (b / path).read_text(), path
    assert (b / "report.html").read_text().rstrip().endswith("</html>")


def killed(runs, workdir, kills):
    """Starts a run once for each kill, and once more."""
    for kill in kills:
        code, told = runs(workdir, kill=kill)
        assert code == -signal.SIGKILL, f"{kill} was not reached: {told[-2000:]}"
    code, told = runs(workdir)
    assert code == 0, told[-3000:]


def test_a_run_killed_at_drawn_moments_ends_with_the_same_bits(runs, whole, tmp_path):
    killed(runs, tmp_path / "run", moments.drawn(seed=196, count=5))
    assert_same(whole, tmp_path / "run")


LONG = [moments.drawn(seed, count=9) for seed in range(8, 13)]


def test_the_long_form_kills_at_every_moment():
    kills = collections.Counter(kill.moment for kills in LONG for kill in kills)
    assert kills.keys() == moments.MOMENTS.keys() and kills.total() >= 40


@pytest.mark.slow
@pytest.mark.parametrize("kills", LONG, ids=range(8, 13))
def test_runs_killed_many_times_end_with_the_same_bits(runs, whole, tmp_path, kills):
    killed(runs, tmp_path / "run", kills)
    assert_same(whole, tmp_path / "run")


# ------------------------------------------------------------------------------------------- the machine goes


def jumping_clock_and_sigterm(step):
    """In step `step` of the align stage comes SIGTERM, and in every step the clock jumps back by up to six weeks.

    Forward it may not jump by more than 20 minutes while a checkpoint is written: orbax would give up.
    """
    from drirl_jax import train

    hours, look, loop, late = random.Random(step), time.time, train.loop, [0.0]
    time.time = lambda: look() - late[0]

    def signalled(name, stage, *args):
        calls = iter(range(1, 100))

        def update(*batch):
            late[0] += 3600 * hours.uniform(0, 1000)
            if name == "align" and next(calls) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return stage.update(*batch)

        return loop(name, stage._replace(update=update), *args)

    train.loop = signalled


def test_sigterm_and_a_clock_that_jumps(runs, whole, tmp_path):
    workdir = tmp_path / "run"
    start = time.monotonic()
    code, told = runs(workdir, patch=functools.partial(jumping_clock_and_sigterm, 1))
    assert code == 75 and "step 1 of align is kept; started again, it goes on" in told, told[-2000:]
    print(f"{time.monotonic() - start:.0f} s from the start to the exit")
    assert newest(workdir / "checkpoints" / "align")[0] == 1
    code, told = runs(workdir, patch=functools.partial(jumping_clock_and_sigterm, 99))
    assert code == 0, told[-2000:]
    assert_same(whole, workdir)


@pytest.mark.slow
def test_sigterm_while_nothing_is_at_work_ends_the_run_at_once(runs, whole, tmp_path):
    process = runs.begin(tmp_path / "run")
    while not (tmp_path / "run" / "config.json").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(300)
    assert process.exitcode == 75
    assert runs(tmp_path / "run")[0] == 0
    assert_same(whole, tmp_path / "run")


# ---------------------------------------------------------------------------------------------- the disk


@pytest.mark.slow
def test_a_checkpoint_damaged_after_a_kill_is_told_of_and_the_bits_are_the_same(runs, whole, tmp_path):
    workdir = tmp_path / "run"
    assert runs(workdir, "--config.checkpoint.every=1", kill=moments.Kill("align: updating", 3))[0] == -signal.SIGKILL
    last = max((workdir / "checkpoints" / "align").glob("[1-9]"), key=lambda path: int(path.name))
    file = max((path for path in last.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    code, told = runs(workdir, "--config.checkpoint.every=1")
    assert code == 0 and "is damaged" in told and "one before it is taken" in told, told[-2000:]
    assert (workdir / "checkpoints" / "align.damaged" / last.name).is_dir()
    json_of = [json.loads((x / "config.json").read_text()) for x in (whole, workdir)]
    assert json_of[0] != json_of[1]
    (workdir / "config.json").write_text((whole / "config.json").read_text())  # but for how often it was kept
    assert_same(whole, workdir)


def small_disk(folder, kibibytes):
    """A file system of this size in the folder; mounts are undone with the process that makes it."""
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", folder]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("kibibytes", [60, 400, 1500])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(runs, whole, tmp_path, kibibytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or not small_disk(disk, kibibytes):
        pytest.skip("no file system can be mounted here")
    try:
        code, told = runs(disk / "run")
        assert code == 1, told[-3000:]
        assert re.search(r"^drirl_jax: .*No space left.*: make room and start the same command again", told, re.M)
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        code, told = runs(disk / "run")
        assert code == 0, told[-3000:]
        assert_same(whole, disk / "run")
    finally:
        subprocess.run(["umount", "-l", disk])


# -------------------------------------------------------------------------------------------- two runs, secrets


def test_a_second_run_on_a_workdir_is_refused(runs, whole):
    held = lock.acquire(whole)
    try:
        code, told = runs(whole)
        assert code == 1 and told.strip().splitlines()[-1].startswith("drirl_jax: another run is at work in")
    finally:
        held.close()


def plant():
    os.environ["PLANTED"] = KEY


@pytest.mark.slow
def test_a_planted_key_is_in_no_file(runs, server, tmp_path, monkeypatch):
    server.script = ["not JSON, " + KEY] + [json.dumps(REPLY)] * 200
    flags = [
        "--config.schedule=('align','evals')", "--config.align.steps=1", "--config.reward.source=judge",
        f"--config.reward.endpoint.url=http://127.0.0.1:{server.server_port}/v1", "--config.reward.endpoint.model=m",
        "--config.reward.endpoint.key_env=PLANTED",
    ]  # fmt: skip
    code, told = runs(tmp_path / "run", *flags, patch=plant)
    assert code == 1 and "answers what is no chat completion" in told and KEY not in told
    code, told = runs(tmp_path / "run", *flags, patch=plant)
    assert code == 0, told[-2000:]
    assert any(sent == f"Bearer {KEY}" for _, sent, _ in server.asked)
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not holding and KEY not in told
    assert (tmp_path / "run" / "judge.jsonl").exists() and (tmp_path / "run" / "report.html").exists()


# ----------------------------------------------------------------------------------------------- long runs


def watched_long_run():
    """Tells of each step the memory of the process, and of each compilation."""
    import jax

    jax.config.update("jax_log_compiles", True)
    show = progress.Progress.show

    def told(self, scalars=None):
        show(self, scalars)
        kibibytes = re.search(r"VmRSS:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]
        print(f"STEP {self.bar.desc} {self.bar.n} {kibibytes}", flush=True)

    progress.Progress.show = told


@pytest.mark.slow
def test_two_thousand_steps_take_no_more_memory_or_time_at_their_end(runs, tmp_path):
    steps, workdir = int(os.environ.get("LONG_STEPS", 2000)), tmp_path / "run"
    # The first checkpoint's checksums are compiled when it is due: every 10, that is among the first 20 steps.
    flags = [f"--config.align.steps={steps}", "--config.schedule=('irl','align')", "--config.checkpoint.every=10"]
    code, told = runs(workdir, *flags, patch=watched_long_run)
    assert code == 0, told[-2000:]
    steps_told = re.split(r"STEP align (\d+) (\d+)", told)
    memory = np.array([int(kibibytes) for kibibytes in steps_told[2::3]])
    after = steps_told[3:-1:3]  # of each step but the last, which exports follow
    compiled_in = {int(step) for step, text in zip(steps_told[1::3], after) if "Finished XLA" in text}
    rows = [json.loads(line) for line in (workdir / "timing.jsonl").open()]
    seconds = np.array([row["collect_s"] + row["update_s"] for row in rows if row["stage"] == "align"])
    tenth = steps // 10
    early, late = slice(tenth, 2 * tenth), slice(-tenth, None)
    print(f"{memory[early].mean() / 2**20:.3f} -> {memory[late].mean() / 2**20:.3f} GiB, "
          f"{np.median(seconds[early]):.3f} -> {np.median(seconds[late]):.3f} s a step")  # fmt: skip
    assert len(memory) == steps and max(compiled_in, default=0) < 20
    assert memory[late].mean() < 1.05 * memory[early].mean()
    assert np.median(seconds[late]) < 1.1 * np.median(seconds[early])
    kept = sorted(int(path.name) for path in (workdir / "checkpoints" / "align").iterdir())
    assert kept == [steps - 10, steps]
    assert [row["step"] for row in metrics.read_jsonl(workdir / "metrics.jsonl")][4:] == list(range(1, steps + 1))
