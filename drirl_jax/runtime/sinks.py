"""Sends scalars to TensorBoard, Weights & Biases and MLflow, besides metrics.jsonl.

A resumed run repeats the steps since its last checkpoint with the same bits. So a sink does not get a row again that it
already has; rows of earlier starts that it lacks come from metrics.jsonl. Keys come from the environment or from the
tool's own login, and appear in none of our files and messages.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import time
import urllib.parse
import uuid
from types import ModuleType
from typing import Any, Mapping, NamedTuple, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from drirl_jax.runtime.files import replace_file
from drirl_jax.runtime.names import scalar_name
from drirl_jax.types import InputError

SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")  # environment variables
PATIENCE = 60  # most seconds to wait for a server at the start and at the end of a run


class Start(NamedTuple):
    """The arguments with which a sink is opened.

    Attributes:
        workdir: the run's workdir, which exists.
        project: the project in W&B, the experiment in MLflow.
        options: the options of the run's config, by dotted key.
        rows: the rows of metrics.jsonl that earlier starts wrote.
    """

    workdir: pathlib.Path
    project: str
    options: Mapping[str, Any]
    rows: list[dict]

    @property
    def name(self) -> str:
        """The run's name: that of its folder, also if the user wrote "."."""
        return pathlib.Path(os.path.abspath(self.workdir)).name


class Sink(Protocol):
    """Receives the scalars of a run in their order. If it raises an error, the sink ends but not the run."""

    def __init__(self, start: Start): ...

    @staticmethod
    def check_usable() -> None:
        """Raises InputError if a package or a login is missing."""

    def rewind(self, stage: str, step: int) -> None:
        """Prepares for a run that resumes from this step of this stage."""

    def write(self, row: int, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        """Sends the finite scalars of a step; `row` is the number of lines before its line in metrics.jsonl."""

    def close(self, failed: bool) -> None:
        """Ends the sink, when the run or this start of it has ended."""


class TensorBoard:
    """Event files in workdir/tensorboard, in one folder for each stage."""

    def __init__(self, start: Start):
        self.folder = start.workdir / "tensorboard"
        self.events: dict[str, EventsWriter] = {}

    @staticmethod
    def check_usable() -> None:
        """Does nothing: TensorBoard's writer is installed with drirl_jax."""

    def rewind(self, stage: str, step: int) -> None:
        """Lets TensorBoard hide the steps after this one."""
        if stage in self.events:
            self.events.pop(stage).close()
        self._open(stage, first=step + 1)

    def write(self, row: int, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars; they are on disk when it returns."""
        if stage not in self.events:
            self._open(stage, first=step)
        for key, value in scalars.items():
            summary = scalar(f"{stage}/{key}", value)
            self.events[stage].write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self.events[stage].flush()

    def close(self, failed: bool) -> None:
        """Closes the files; they have all that was written."""
        for events in self.events.values():
            events.close()
        self.events.clear()

    def _open(self, stage: str, first: int) -> None:
        # Each stage has its own folder, because a purge hides the later steps of everything in its folder. The file's
        # name has the first step besides the time in seconds, so that a run that starts again at once does not
        # overwrite its own file. tensorboardX's SummaryWriter is not used: its thread dies when the clock jumps back by
        # weeks, and the run would wait for it forever.
        folder = self.folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        events = self.events[stage] = EventsWriter(str(folder / "events"), f".{first}")
        events.write_event(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))


class WandB:
    """A run of Weights & Biases, the same one for all starts. Its step is the row number, which only grows.

    Offline (WANDB_MODE=offline) each start writes a new folder with the whole history, because W&B cannot continue an
    old one. Use the newest one for `wandb sync`.
    """

    def __init__(self, start: Start):
        import wandb

        run_id = _load_id(start.workdir, "wandb") or uuid.uuid4().hex[:12]
        _save_id(start.workdir, "wandb", run_id)  # saved before W&B gets it, in case the run is killed in between
        self.run = wandb.init(
            dir=start.workdir, project=start.project, name=start.name, config=dict(start.options),
            id=run_id, resume="allow", reinit="create_new",
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True,
                init_timeout=PATIENCE, finish_timeout=PATIENCE,
            ),
        )  # fmt: skip
        self.rows_sent = self.run.step  # number of rows that the server has
        self.stages: set[str] = set()
        for row, line in enumerate(start.rows):
            self.write(row, *_parse_row(line))
        self.rows_sent = max(self.rows_sent, len(start.rows))

    @staticmethod
    def check_usable() -> None:
        """Raises InputError unless there is a login, or W&B is offline."""
        wandb = _package("wandb")
        try:
            mode = wandb.setup().settings.mode
            can_log = mode in ("offline", "disabled", "dryrun") or wandb.login(verify=False, prompt=False)
        except Exception:  # a malformed key or an unreadable settings file: the error's text may show the key
            can_log = False
        if not can_log:
            raise InputError(
                "config.metrics.sinks has 'wandb', which has no valid login here: run `wandb login` once, set "
                "WANDB_API_KEY, or set WANDB_MODE=offline."
            )

    def rewind(self, stage: str, step: int) -> None:
        """Does nothing: `write` recognises repeated steps by their row number."""

    def write(self, row: int, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        """Hands the scalars to W&B's own process, which waits for the network."""
        if row < self.rows_sent:
            return
        if stage not in self.stages:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.stages.add(stage)
        self.run.log({f"{stage}/step": step} | {f"{stage}/{key}": x for key, x in scalars.items()}, step=row)

    def close(self, failed: bool) -> None:
        """Waits for the upload, at most a minute; `wandb sync` can upload the rest."""
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, the same one for all starts, at MLFLOW_TRACKING_URI or in workdir/mlflow.db."""

    ROWS = "drirl_jax.rows"  # the tag with the number of rows in the MLflow run

    def __init__(self, start: Start):
        # By default MLflow would delay a step for minutes if the server is away, and send usage data to its makers.
        for name, value in {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient, entities

        self.entities = entities
        local_uri = f"sqlite:///{start.workdir.absolute() / 'mlflow.db'}"
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local_uri)
        self.rows_sent, run_id = 0, _load_id(start.workdir, "mlflow")
        if run_id:
            self.rows_sent = int(self.client.get_run(run_id).data.tags.get(self.ROWS, 0))
            self.client.update_run(run_id, status="RUNNING")
        else:
            experiment = self.client.get_experiment_by_name(start.project)
            experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(start.project)
            run_id = self.client.create_run(experiment_id, run_name=start.name).info.run_id
            _save_id(start.workdir, "mlflow", run_id)
            params = [entities.Param(key, str(value)) for key, value in start.options.items()]
            for first in range(0, len(params), 100):  # MLflow's limit for one call
                self.client.log_batch(run_id, params=params[first : first + 100])
        self.run_id = run_id
        for row, line in enumerate(start.rows):
            self.write(row, *_parse_row(line))
        self.rows_sent = max(self.rows_sent, len(start.rows))

    @staticmethod
    def check_usable() -> None:
        """Raises InputError if the server's address has a password in it, or a package is missing."""
        _package("mlflow")
        address = os.environ.get("MLFLOW_TRACKING_URI", "")
        if urllib.parse.urlsplit(address).password:
            raise InputError(
                "MLFLOW_TRACKING_URI holds a password: leave it out, and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD."
            )
        if not address:
            _package("sqlalchemy")

    def rewind(self, stage: str, step: int) -> None:
        """Does nothing: `write` recognises repeated steps by their row number."""

    def write(self, row: int, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        """Sends the scalars; the server has them when it returns."""
        if row < self.rows_sent:
            return
        now, mlflow_entities = int(time.time() * 1000), self.entities
        metrics = [mlflow_entities.Metric(f"{stage}/{key}", value, now, step) for key, value in scalars.items()]
        self.client.log_batch(self.run_id, metrics=metrics, tags=[mlflow_entities.RunTag(self.ROWS, str(row + 1))])

    def close(self, failed: bool) -> None:
        """Sets the status of the MLflow run."""
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def describe_error(error: Exception) -> str:
    """The error's type and text in one line, without the keys in the environment."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for name in SECRETS:
        text = text.replace(os.environ.get(name) or "\0", "***")
    return text[:300]


def _package(name: str) -> ModuleType:
    """The imported package. Raises InputError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"config.metrics.sinks needs the package {name} ({error}): pip install {name}, or leave its sink out."
        ) from error


def _parse_row(line: dict) -> tuple[str, int, dict[str, float]]:
    """Stage, step and finite scalars of a row of metrics.jsonl."""
    scalars = {scalar_name(key): x for key, x in line.items() if key not in ("stage", "step") and x is not None}
    return line["stage"], line["step"], scalars


def _load_id(workdir: pathlib.Path, sink: str) -> str | None:
    """The sink's id of this run, if an earlier start has saved it."""
    path = workdir / "sinks.json"
    return json.loads(path.read_text()).get(sink) if path.exists() else None


def _save_id(workdir: pathlib.Path, sink: str, run_id: str) -> None:
    path = workdir / "sinks.json"
    run_ids = json.loads(path.read_text()) if path.exists() else {}
    replace_file(path, json.dumps(run_ids | {sink: run_id}) + "\n")
