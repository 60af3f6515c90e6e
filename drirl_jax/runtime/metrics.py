"""Scalars to JSONL and to sinks, TensorBoard by default, samples to JSONL, and the progress bar.

metrics.jsonl and samples.jsonl hold nothing that depends on the clock or the machine's load, so that two runs can be
compared bit for bit; seconds go to timing.jsonl.
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
    """The scalars of one workdir: metrics.jsonl, timing.jsonl and sinks; and samples.jsonl. Nothing without `writes`.

    A sink that fails is left out from then on, with one warning: the run goes on as it would without.

    Args:
        workdir: made if it is not there.
        writes: whether this process is the one that writes.
        names: of `sinks.SINKS`.
        project, options: see `sinks.Start`.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        writes: bool = True,
        names: Sequence[str] = ("tensorboard",),
        project: str = "",
        options: Mapping[str, Any] | None = None,
    ):
        self.writes = writes
        workdir.mkdir(parents=True, exist_ok=True)
        self.metrics, self.seconds = workdir / "metrics.jsonl", workdir / "timing.jsonl"
        self.samples = workdir / "samples.jsonl"
        rows = self.read()
        self.rows, self.sinks = len(rows), {}
        start = sinks.Start(workdir, project, options or {}, rows)
        for name in names if writes else ():
            self._try(name, lambda: self.sinks.update({name: sinks.SINKS[name](start)}))

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(failed=kind is not None)

    def write(self, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        """Appends {"stage", "step", ...} to metrics.jsonl, in full precision; null for what is not finite."""
        self.rows += self.writes
        self._append(self.metrics, stage, step, scalars)

    def timing(self, stage: str, step: int, seconds: Mapping[str, float]) -> None:
        """Appends {"stage", "step", "NAME_s", ...} to timing.jsonl, after the step's scalars were written."""
        self._append(self.seconds, stage, step, {f"{key}_s": value for key, value in seconds.items()})

    def keep(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends {"stage", "step", ...} for each row to samples.jsonl, before the step's scalars are written."""
        if self.writes:
            lines = [json.dumps({"stage": stage, "step": step} | dict(row)) + "\n" for row in rows]
            with self.samples.open("a") as file:
                file.write("".join(lines))

    def read(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        return read_jsonl(self.metrics)

    def whole_until(self, stage: str) -> int:
        """The last step of the stage up to which metrics.jsonl has every step; 0 where it lacks the first."""
        steps = {row["step"] for row in self.read() if row["stage"] == stage}
        return next(step for step in itertools.count() if step + 1 not in steps)

    def rewind(self, stage_order: Sequence[str], stage: str, step: int, sampled: Iterable[int] = ()) -> None:
        """Drops what was written after this step of this stage, so that a run that goes on repeats no line.

        Each file is replaced whole, so a run killed here loses nothing; TensorBoard hides the dropped steps.

        Args:
            stage_order: the schedule's stages in turn.
            stage, step: the state that the run goes on from; a torn last line is dropped too.
            sampled: the stage's steps whose samples samples.jsonl should have, as far as they are done.

        Raises:
            InputError: a file is damaged, or of a stage that is not in the schedule.
        """
        if not self.writes:
            return
        turn = {name: i for i, name in enumerate(stage_order)}
        at = (turn[stage], step)
        for path in (self.metrics, self.seconds, *filter(pathlib.Path.exists, (self.samples,))):
            whole = json_files.lines(path, json_files.ROW)
            if unknown := {row["stage"] for row, _ in whole} - turn.keys():
                raise InputError(f"{path} has rows of {', '.join(sorted(unknown))}, no stage of config.schedule.")
            replace_file(path, "".join(line for row, line in whole if (turn[row["stage"]], row["step"]) <= at))
        rows = self.read()
        self.rows = len(rows)
        done = {(row["stage"], row["step"]) for row in rows}
        for path, wanted in ((self.seconds, done), (self.samples, {(stage, n) for n in sampled if n <= step})):
            there = {(row["stage"], row["step"]) for row in json_files.rows(path)}
            if lost := sorted(n for of, n in wanted - there):
                steps = ", ".join(map(str, lost[:5])) + ", ..." * (len(lost) > 5)
                log.warning("%s lacks %d steps that are done (%s): the report does too", path, len(lost), steps)
        for name in tuple(self.sinks):
            self._try(name, lambda: self.sinks[name].rewind(stage, step))

    def close(self, failed: bool = False) -> None:
        """Closes the sinks, which hold all that was written.

        Args:
            failed: whether the run ended before it was done.
        """
        for name in tuple(self.sinks):
            self._try(name, lambda: self.sinks[name].close(failed))
        self.sinks.clear()

    def _append(self, path: pathlib.Path, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        if not self.writes:
            return
        values = {key: float(value) for key, value in sorted(scalars.items())}
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        with path.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step} | dict.fromkeys(values) | finite) + "\n")
        named = {scalar_name(key): value for key, value in finite.items()}
        for name in tuple(self.sinks):
            self._try(name, lambda: self.sinks[name].write(self.rows - 1, stage, step, named))

    def _try(self, name: str, call: Callable[[], Any]) -> None:
        """Calls a sink; one that raises is left out from then on."""
        try:
            call()
        except Exception as error:  # a tool of others, and the network: any kind, and never worth a run
            self.sinks.pop(name, None)
            log.warning("%s takes no more scalars of this start: %s", name, sinks.described(error))


def read_jsonl(path: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl or timing.jsonl in order; a torn last line, which a killed run leaves, is not among
    them. Raises InputError where another one is damaged."""
    return json_files.rows(path, json_files.SCALARS)
