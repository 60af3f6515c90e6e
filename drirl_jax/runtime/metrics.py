"""Writes scalars to JSONL files and to sinks (TensorBoard by default), and samples to a JSONL file.

metrics.jsonl and samples.jsonl hold nothing that depends on the clock or the load of the machine. So two runs can be
compared bit for bit. Seconds go to timing.jsonl.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import pathlib
from typing import Any, Callable, Iterable, Mapping, Sequence

from drirl_jax.runtime import json_files, sinks
from drirl_jax.runtime.files import replace_file
from drirl_jax.runtime.names import scalar_name
from drirl_jax.types import InputError

log = logging.getLogger(__name__)


class MetricWriter:
    """Writes the scalars of one workdir (metrics.jsonl, timing.jsonl, sinks) and its samples (samples.jsonl).

    A sink that fails gets no more scalars: there is one warning, and the run continues without the sink.

    Args:
        workdir: made if it does not exist.
        is_writer: whether this process is the one that writes; if False, nothing is written.
        names: keys of `sinks.SINKS`.
        project, options: see `sinks.Start`.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        is_writer: bool = True,
        names: Sequence[str] = ("tensorboard",),
        project: str = "",
        options: Mapping[str, Any] | None = None,
    ):
        self.is_writer = is_writer
        workdir.mkdir(parents=True, exist_ok=True)
        self.metrics_file, self.timing_file = workdir / "metrics.jsonl", workdir / "timing.jsonl"
        self.samples_file = workdir / "samples.jsonl"
        rows = self.read_metrics()
        self.rows, self.sinks = len(rows), {}
        start = sinks.Start(workdir, project, options or {}, rows)
        for name in names if is_writer else ():
            self._call_sink(name, lambda: self.sinks.update({name: sinks.SINKS[name](start)}))

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(failed=kind is not None)

    def write(self, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        """Appends {"stage", "step", ...} to metrics.jsonl, in full precision, with null for NaN and infinity."""
        self.rows += self.is_writer
        self._append(self.metrics_file, stage, step, scalars)

    def write_timing(self, stage: str, step: int, seconds: Mapping[str, float]) -> None:
        """Appends {"stage", "step", "NAME_s", ...} to timing.jsonl; call it after `write` of the same step."""
        self._append(self.timing_file, stage, step, {f"{key}_s": value for key, value in seconds.items()})

    def write_samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends {"stage", "step", ...} for each row to samples.jsonl; call it before `write` of the same step."""
        if self.is_writer:
            lines = [json.dumps({"stage": stage, "step": step} | dict(row)) + "\n" for row in rows]
            with self.samples_file.open("a") as file:
                file.write("".join(lines))

    def read_metrics(self) -> list[dict]:
        """The rows of metrics.jsonl."""
        return read_jsonl(self.metrics_file)

    def last_complete_step(self, stage: str) -> int:
        """The last step of the stage up to which metrics.jsonl has every step; 0 if it lacks the first step."""
        steps = {row["step"] for row in self.read_metrics() if row["stage"] == stage}
        return next(step for step in itertools.count() if step + 1 not in steps)

    def rewind(self, stage_order: Sequence[str], stage: str, step: int, sampled_steps: Iterable[int] = ()) -> None:
        """Drops all rows after this step of this stage, so that a resumed run does not write a row twice.

        Each file is replaced whole, so a run that is killed here loses nothing. TensorBoard hides the dropped steps.

        Args:
            stage_order: the schedule's stages in their order.
            stage, step: the state from which the run resumes. An incomplete last line is dropped too.
            sampled_steps: the steps of the stage whose samples samples.jsonl should have; later steps are ignored.

        Raises:
            InputError: a file is damaged, or has rows of a stage that is not in the schedule.
        """
        if not self.is_writer:
            return
        stage_index = {name: i for i, name in enumerate(stage_order)}
        last_position = (stage_index[stage], step)
        for path in (self.metrics_file, self.timing_file, *filter(pathlib.Path.exists, (self.samples_file,))):
            lines = json_files.lines(path, json_files.ROW)
            if unknown := {row["stage"] for row, _ in lines} - stage_index.keys():
                raise InputError(f"{path} has rows of {', '.join(sorted(unknown))}, no stage of config.schedule.")
            replace_file(
                path, "".join(line for row, line in lines if (stage_index[row["stage"]], row["step"]) <= last_position)
            )
        rows = self.read_metrics()
        self.rows = len(rows)
        done = {(row["stage"], row["step"]) for row in rows}
        sampled = {(stage, n) for n in sampled_steps if n <= step}
        for path, expected in ((self.timing_file, done), (self.samples_file, sampled)):
            present = {(row["stage"], row["step"]) for row in json_files.rows(path)}
            if missing := sorted(n for _, n in expected - present):
                steps = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
                log.warning("%s lacks %d steps that are done (%s): the report does too", path, len(missing), steps)
        for name in tuple(self.sinks):
            self._call_sink(name, lambda: self.sinks[name].rewind(stage, step))

    def close(self, failed: bool = False) -> None:
        """Closes the sinks; they have all that was written.

        Args:
            failed: whether the run ended before its last step.
        """
        for name in tuple(self.sinks):
            self._call_sink(name, lambda: self.sinks[name].close(failed))
        self.sinks.clear()

    def _append(self, path: pathlib.Path, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        if not self.is_writer:
            return
        values = {key: float(value) for key, value in sorted(scalars.items())}
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        with path.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step} | dict.fromkeys(values) | finite) + "\n")
        sink_scalars = {scalar_name(key): value for key, value in finite.items()}
        for name in tuple(self.sinks):
            self._call_sink(name, lambda: self.sinks[name].write(self.rows - 1, stage, step, sink_scalars))

    def _call_sink(self, name: str, call: Callable[[], Any]) -> None:
        """Calls a sink; removes it if it raises."""
        try:
            call()
        except Exception as error:  # other people's tools and the network raise anything; none of it may end the run
            self.sinks.pop(name, None)
            log.warning("%s takes no more scalars of this start: %s", name, sinks.describe_error(error))


def read_jsonl(path: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl or timing.jsonl in order, without an incomplete last line of a killed run. Raises
    InputError if another line is damaged."""
    return json_files.rows(path, json_files.SCALARS)
