"""Scalars in TensorBoard, W&B and MLflow: failing sinks, restarts, keys; the real tools, offline, if they are there."""

import json
import logging
import struct
import sys
import time
import types

import pytest

from drirl_jax import checks, train
from drirl_jax import config as config_lib
from drirl_jax.runtime import sinks, workdirs
from drirl_jax.runtime.metrics import MetricWriter
from drirl_jax.types import InputError

KEY = "0123456789abcdef" * 2 + "01234567"  # of the form of W&B's
STAGES = ("irl", "align")


class Listed:
    """A sink that keeps what it is told."""

    def __init__(self, start):
        self.start, self.told = start, []

    def rewind(self, stage, step):
        self.told.append(("rewind", stage, step))

    def write(self, row, stage, step, scalars):
        self.told.append((row, stage, step, dict(scalars)))

    def close(self, failed):
        self.told.append(("close", failed))


class Failing(Listed):
    """A sink that raises at its first row."""

    def write(self, row, stage, step, scalars):
        raise ConnectionError(f"refused with key {KEY}")


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.setitem(sinks.SINKS, "listed", Listed)
    monkeypatch.setitem(sinks.SINKS, "failing", Failing)


def write(writer, stage, *steps):
    for step in steps:
        writer.write(stage, step, {"loss": step / 3, "bad": float("nan")})
        writer.write_timing(stage, step, {"update": 0.5})


def test_rows_are_numbered_as_the_lines_of_metrics_jsonl(tmp_path, listed):
    with MetricWriter(tmp_path, names=("listed",)) as writer:
        write(writer, "irl", 1, 2)
        writer.rewind(STAGES, "irl", 1)
        write(writer, "irl", 2)
        write(writer, "align", 1)
        told = writer.sinks["listed"].told
    loss, time = {"loss": 2 / 3}, {"update_s": 0.5}
    assert told == [
        (0, "irl", 1, {"loss": 1 / 3}), (0, "irl", 1, time), (1, "irl", 2, loss), (1, "irl", 2, time),
        ("rewind", "irl", 1), (1, "irl", 2, loss), (1, "irl", 2, time),
        (2, "align", 1, {"loss": 1 / 3}), (2, "align", 1, time), ("close", False),
    ]  # fmt: skip


def test_a_sink_that_fails_warns_once_and_changes_nothing(tmp_path, listed, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    files = []
    for names in [("tensorboard",), ("failing", "tensorboard")]:
        folder = tmp_path / str(len(names))
        with caplog.at_level(logging.WARNING), MetricWriter(folder, names=names) as writer:
            write(writer, "irl", 1, 2, 3)
            assert list(writer.sinks) == ["tensorboard"]
        files.append([(folder / name).read_bytes() for name in ("metrics.jsonl", "timing.jsonl")])
    assert files[0] == files[1]
    (warning,) = caplog.messages
    assert warning == "failing takes no more scalars of this start: ConnectionError: refused with key ***"


def test_a_sink_that_cannot_be_opened_leaves_the_run_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sinks.SINKS, "broken", lambda start: start.no_such_thing)
    writer = MetricWriter(tmp_path, names=("broken",))
    write(writer, "irl", 1)
    assert writer.sinks == {} and len(writer.read_metrics()) == 1 and len(caplog.messages) == 1


def test_a_process_that_does_not_write_opens_no_sink(tmp_path, listed):
    with MetricWriter(tmp_path, is_writer=False, names=("listed",)) as writer:
        write(writer, "irl", 1)
        assert writer.sinks == {} and not list(tmp_path.iterdir())


def test_an_error_is_told_to_the_sinks(tmp_path, listed):
    with pytest.raises(KeyError), MetricWriter(tmp_path, names=("listed",)) as writer:
        told = writer.sinks["listed"].told
        raise KeyError
    assert told == [("close", True)]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_sentence_before_any_work(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    config = config_lib.default()
    config.metrics.sinks = (name,)
    with pytest.raises(InputError, match=f"needs the package {name} .*pip install {name}, or leave its sink out"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_address_with_a_password_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://someone:secret@localhost:5000")
    with pytest.raises(InputError, match="holds a password") as error:
        sinks.MLflow.check_usable()
    assert "secret" not in str(error.value)


def test_names_of_sinks_are_checked():
    config = config_lib.default()
    config.metrics.sinks = ("tensorboard", "wandbb")
    with pytest.raises(InputError, match=r"config.metrics.sinks names \['wandbb'\]: choose among tensorboard, wandb"):
        checks.validate(config)
    config.metrics.sinks, config.metrics.project = (), " "
    with pytest.raises(InputError, match="config.metrics.project is blank"):
        checks.validate(config)


def test_sinks_may_be_changed_for_a_run_that_has_begun(tmp_path):
    config = config_lib.default()
    workdirs.record_config(config, tmp_path)
    config.metrics.sinks = ()
    workdirs.record_config(config, tmp_path)
    assert workdirs.flat_options(config)["scaling.drop"] == 0.2


# --------------------------------------------------------------------------------------------------- W&B


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log, blocks of 32 KiB with parts of CRC, length, type, bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def wandb_history(path):
    """[(W&B's step, {name: value})] of the scalars, clocks left out, once W&B's own process has ended the file."""
    until, rows = time.monotonic() + 20, []
    while not any(record.WhichOneof("record_type") == "exit" for record in wandb_records(path)):
        assert time.monotonic() < until
        time.sleep(0.1)
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append((record.history.step.num, {k: v for k, v in items.items() if not k.startswith("_")}))
    return rows


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def test_wandb_offline_each_start_has_the_whole_history_once(tmp_path, offline):
    sinks.WandB.check_usable()
    chosen = ("wandb",), "project", {"irl.steps": 4}
    workdir = tmp_path / "run"
    with MetricWriter(workdir, True, *chosen) as writer:
        write(writer, "irl", 1, 2, 3)
    with MetricWriter(workdir, True, *chosen) as writer:
        writer.rewind(STAGES, "irl", 1)  # killed after step 3, the last checkpoint being that of step 1
        write(writer, "irl", 2, 3, 4)
        write(writer, "align", 1)
    files = sorted((workdir / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 2 and len({file.name for file in files}) == 1  # one id
    first, second = map(wandb_history, files)
    assert [(step, row["irl/step"], row["irl/loss"]) for step, row in first] == [
        (i, i + 1, (i + 1) / 3) for i in range(3)
    ]
    assert [step for step, _ in second] == [0, 1, 2, 3, 4]
    assert [row["irl/loss"] for _, row in second[:4]] == [(i + 1) / 3 for i in range(4)]
    assert second[4][1] == {"align/step": 1, "align/loss": 1 / 3, "align/update_s": 0.5}
    (run,) = [record.run for record in wandb_records(files[1]) if record.WhichOneof("record_type") == "run"][:1]
    assert run.project == "project" and "irl.steps" in str(run.config)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []


def test_wandb_online_goes_on_where_the_server_is(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    logged, opened = [], []

    def init(**options):
        opened.append(options)
        return types.SimpleNamespace(
            step=2, define_metric=lambda *_, **__: None, finish=lambda exit_code: logged.append(exit_code),
            log=lambda scalars, step: logged.append((step, scalars.get("irl/loss"))),
        )  # fmt: skip

    monkeypatch.setattr(wandb, "init", init)
    write(MetricWriter(tmp_path, names=()), "irl", 1, 2, 3)
    for _ in range(2):
        with MetricWriter(tmp_path, names=("wandb",)) as writer:
            writer.rewind(STAGES, "irl", 0)
            write(writer, "irl", 1, 2, 3, 4)
    assert opened[0]["id"] == opened[1]["id"] and opened[0]["resume"] == "allow"
    assert logged[:4] == [(2, 1.0), (3, 4 / 3), (3, None), 0]  # the server lacked step 3; step 4 and its time are new


def test_wandb_without_a_login_is_one_sentence(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    wandb.teardown()
    with pytest.raises(InputError, match="no valid login here: run `wandb login` once, set WANDB_API_KEY"):
        sinks.WandB.check_usable()
    wandb.teardown()


# ------------------------------------------------------------------------------------------------- MLflow


@pytest.fixture(params=["file", pytest.param("ours", marks=pytest.mark.slow)])
def tracking(request, tmp_path, monkeypatch):
    """A client of a local store: of files, and of the data base in the workdir, which takes MLflow half a minute."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", KEY)
    if request.param == "ours":
        pytest.importorskip("sqlalchemy")
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    return mlflow.MlflowClient(f"file://{tmp_path}/store")


def test_mlflow_goes_on_with_one_run_and_no_step_twice(tmp_path, tracking):
    (tmp_path / "run").mkdir()
    sinks.MLflow.check_usable()
    chosen = ("mlflow",), "project", {f"option.{i}": i for i in range(150)}
    workdir = tmp_path / "run"
    writer = MetricWriter(workdir, True, *chosen)
    write(writer, "irl", 1, 2)
    writer.sinks.clear()  # as when the server was away for a while
    write(writer, "irl", 3)
    with pytest.raises(InputError), MetricWriter(workdir, True, *chosen) as writer:
        writer.rewind(STAGES, "irl", 1)
        write(writer, "irl", 2, 3, 4)
        raise InputError("ended")
    (run,) = tracking.search_runs([tracking.get_experiment_by_name("project").experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FAILED" and len(run.data.params) == 150
    for key, values in {
        "irl/loss": [(i, i / 3) for i in (1, 2, 3, 4)],
        "irl/update_s": [(i, 0.5) for i in (1, 2, 4)],
    }.items():
        assert [(m.step, m.value) for m in tracking.get_metric_history(run.info.run_id, key)] == values
    with MetricWriter(workdir, True, *chosen):
        assert tracking.get_run(run.info.run_id).info.status == "RUNNING"
    assert tracking.get_run(run.info.run_id).info.status == "FINISHED"
    assert [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []


def test_mlflow_server_that_is_away(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with MetricWriter(tmp_path, names=("mlflow",)) as writer:
        write(writer, "irl", 1)
    assert len(writer.read_metrics()) == 1
    assert [m for m in caplog.messages if m.startswith("mlflow takes no more scalars of this start: ")]
