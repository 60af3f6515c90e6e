"""Where scalars go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A run that goes on repeats the steps since its last checkpoint with the same bits, so a sink that holds a row already is
not told it again; one that lacks rows of the starts before gets them from metrics.jsonl. Keys come from the environment
or from the tool's own login, and stand in no file and no message of ours.
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
PATIENCE = 60  # seconds that a server may take at the start and at the end of a run


class Start(NamedTuple):
    """What a sink is opened with.

    Attributes:
        workdir: of the run, which exists.
        project: the project of W&B, the experiment of MLflow.
        options: of the run's config, by dotted key.
        rows: those of metrics.jsonl that the starts before this one wrote.
    """

    workdir: pathlib.Path
    project: str
    options: Mapping[str, Any]
    rows: list[dict]

    @property
    def name(self) -> str:
        """Of the run: its folder's, also where that is called "."."""
        return pathlib.Path(os.path.abspath(self.workdir)).name


class Sink(Protocol):
    """Takes the scalars of a run, in turn. Whatever it raises ends the sink and not the run."""

    def __init__(self, start: Start): ...

    @staticmethod
    def require() -> None:
        """Raises InputError where a package or a login is missing."""

    def rewind(self, stage: str, step: int) -> None:
        """The run goes on from this step of this stage."""

    def write(self, row: int, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        """Finite scalars of a step; `row` is the number of lines before its own in metrics.jsonl."""

    def close(self, failed: bool) -> None:
        """The run has ended, or this start of it."""


class TensorBoard:
    """Event files in workdir/tensorboard, a folder a stage."""

    def __init__(self, start: Start):
        self.folder = start.workdir / "tensorboard"
        self.events: dict[str, EventsWriter] = {}

    @staticmethod
    def require() -> None:
        """It comes with the package."""

    def rewind(self, stage: str, step: int) -> None:
        """TensorBoard hides the steps after this one."""
        if stage in self.events:
            self.events.pop(stage).close()
        self._open(stage, first=step + 1)

    def write(self, row: int, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        """On disk when it returns."""
        if stage not in self.events:
            self._open(stage, first=step)
        for key, value in scalars.items():
            summary = scalar(f"{stage}/{key}", value)
            self.events[stage].write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self.events[stage].flush()

    def close(self, failed: bool) -> None:
        """Closes the files, which hold all that was written."""
        for events in self.events.values():
            events.close()
        self.events.clear()

    def _open(self, stage: str, first: int) -> None:
        # A folder a stage, since a purge hides the later steps of everything in its folder. The first step is
        # in the file's name, which else has only the time in seconds: a run started again at once must not
        # overwrite its past. Not tensorboardX's SummaryWriter: its thread dies when the clock jumps back by weeks,
        # and the run then waits for it without end.
        folder = self.folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        events = self.events[stage] = EventsWriter(str(folder / "events"), f".{first}")
        events.write_event(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))


class WandB:
    """A run of Weights & Biases, the same one over all starts; its step is the row, which only grows.

    Offline (WANDB_MODE=offline) each start writes a folder with the whole history, as W&B cannot go on with one: the
    newest is the one for `wandb sync`.
    """

    def __init__(self, start: Start):
        import wandb

        run_id = _kept_id(start.workdir, "wandb") or uuid.uuid4().hex[:12]
        _keep_id(start.workdir, "wandb", run_id)  # before W&B hears of it: a run killed in between has it too
        self.run = wandb.init(
            dir=start.workdir, project=start.project, name=start.name, config=dict(start.options),
            id=run_id, resume="allow", reinit="create_new",
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True,
                init_timeout=PATIENCE, finish_timeout=PATIENCE,
            ),
        )  # fmt: skip
        self.held = self.run.step  # rows that the server has
        self.stages: set[str] = set()
        for row, line in enumerate(start.rows):
            self.write(row, *_parts(line))
        self.held = max(self.held, len(start.rows))

    @staticmethod
    def require() -> None:
        """A key or another login is there, unless W&B is offline."""
        wandb = _package("wandb")
        try:
            mode = wandb.setup().settings.mode
            known = mode in ("offline", "disabled", "dryrun") or wandb.login(verify=False, prompt=False)
        except Exception:  # a key of another form, a settings file that cannot be read: its text may show the key
            known = False
        if not known:
            raise InputError(
                "config.metrics.sinks has 'wandb', which has no valid login here: run `wandb login` once, set "
                "WANDB_API_KEY, or set WANDB_MODE=offline."
            )

    def rewind(self, stage: str, step: int) -> None:
        """Steps that come again are known by their row."""

    def write(self, row: int, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        """Hands the scalars to W&B's own process, which waits for the network."""
        if row < self.held:
            return
        if stage not in self.stages:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.stages.add(stage)
        self.run.log({f"{stage}/step": step} | {f"{stage}/{key}": x for key, x in scalars.items()}, step=row)

    def close(self, failed: bool) -> None:
        """Waits for the upload, a minute at most; what is left `wandb sync` uploads."""
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, the same one over all starts, at MLFLOW_TRACKING_URI or in workdir/mlflow.db."""

    ROWS = "drirl_jax.rows"  # the tag with the number of rows that the run holds

    def __init__(self, start: Start):
        # Its defaults would hold a step up for minutes where the server is away, and tell its makers of the run.
        for name, value in {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient, entities

        self.entities = entities
        local = f"sqlite:///{start.workdir.absolute() / 'mlflow.db'}"
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
        self.held, run_id = 0, _kept_id(start.workdir, "mlflow")
        if run_id:
            self.held = int(self.client.get_run(run_id).data.tags.get(self.ROWS, 0))
            self.client.update_run(run_id, status="RUNNING")
        else:
            known = self.client.get_experiment_by_name(start.project)
            experiment = known.experiment_id if known else self.client.create_experiment(start.project)
            run_id = self.client.create_run(experiment, run_name=start.name).info.run_id
            _keep_id(start.workdir, "mlflow", run_id)
            options = [entities.Param(key, str(value)) for key, value in start.options.items()]
            for first in range(0, len(options), 100):  # MLflow's own limit
                self.client.log_batch(run_id, params=options[first : first + 100])
        self.run_id = run_id
        for row, line in enumerate(start.rows):
            self.write(row, *_parts(line))
        self.held = max(self.held, len(start.rows))

    @staticmethod
    def require() -> None:
        """The server's address has no password in it, or the local store's package is there."""
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
        """Steps that come again are known by their row."""

    def write(self, row: int, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        """At the server when it returns."""
        if row < self.held:
            return
        now, of = int(time.time() * 1000), self.entities
        metrics = [of.Metric(f"{stage}/{key}", value, now, step) for key, value in scalars.items()]
        self.client.log_batch(self.run_id, metrics=metrics, tags=[of.RunTag(self.ROWS, str(row + 1))])

    def close(self, failed: bool) -> None:
        """Says how the run has ended."""
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def described(error: Exception) -> str:
    """What an error says, in one line, without the keys that the environment holds."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for name in SECRETS:
        text = text.replace(os.environ.get(name) or "\0", "***")
    return text[:300]


def _package(name: str) -> ModuleType:
    """The package; InputError if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"config.metrics.sinks needs the package {name} ({error}): pip install {name}, or leave its sink out."
        ) from error


def _parts(line: dict) -> tuple[str, int, dict[str, float]]:
    """Stage, step and finite scalars of a row of metrics.jsonl."""
    scalars = {scalar_name(key): x for key, x in line.items() if key not in ("stage", "step") and x is not None}
    return line["stage"], line["step"], scalars


def _kept_id(workdir: pathlib.Path, sink: str) -> str | None:
    """The sink's name for this run, if a start before has kept it."""
    path = workdir / "sinks.json"
    return json.loads(path.read_text()).get(sink) if path.exists() else None


def _keep_id(workdir: pathlib.Path, sink: str, run_id: str) -> None:
    path = workdir / "sinks.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    replace_file(path, json.dumps(known | {sink: run_id}) + "\n")
