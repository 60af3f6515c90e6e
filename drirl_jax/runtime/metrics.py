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
import sys
import time
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import jax
import tqdm

from drirl_jax.runtime import console, json_files, sharding, sinks
from drirl_jax.runtime.files import replace_file
from drirl_jax.runtime.names import scalar_name
from drirl_jax.types import InputError, PyTree

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
        return read(self.metrics)

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


class Clock:
    """Seconds of the phases of a step: `mark` ends the phase that began at the mark before.

    A run leaves `wait` off, as waiting would end the overlap of host and device; nothing is recorded then.
    """

    def __init__(self):
        self.restart(wait=False)

    def restart(self, wait: bool) -> None:
        """Forgets all phases; with `wait` a mark waits for its value, so that work counts where it was asked for."""
        self.wait, self.seconds, self.last = wait, {}, time.perf_counter()

    def mark(self, phase: str, value: PyTree) -> PyTree:
        """The value, once it is there; the time since the last mark is this phase's."""
        if self.wait:
            jax.block_until_ready(value)
            now = time.perf_counter()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
            self.last = now
        return value


class Progress:
    """A bar on stderr with the rate, the time left and the scalars that matter; every 10 s where that is no terminal.

    None where the console is quiet, and an object a step on stdout where it speaks JSON.

    Args:
        stage: what is done.
        total, start: how many steps there are, and how many are done already.
        shown: whether this process speaks.
        unit: of the steps.
        brief: for what belongs to something greater: shown only once it has taken 2 s, and gone when it ends.
    """

    def __init__(
        self, stage: str, total: int, start: int = 0, shown: bool = True, *, unit: str = "step", brief: bool = False
    ):
        patience = 0.1 if sys.stderr.isatty() else 10
        self.objects = shown and console.mode() == "json"
        self.brief, self.started, self.told = brief, time.monotonic(), time.monotonic()
        self.bar = tqdm.tqdm(
            desc=stage, total=total, initial=start, unit=unit, mininterval=patience, dynamic_ncols=True,
            disable=not shown or console.mode() != "text", delay=2 if brief else 0, leave=not brief,
        )  # fmt: skip
        self.stage, self.total, self.start, self.done = stage, total, start, start

    def show(self, scalars: Mapping[str, float] | None = None) -> None:
        """One step on, with these scalars beside the bar in 3 significant digits."""
        self.done += 1
        now = time.monotonic()
        if self.objects and (not self.brief or now - self.told > 10):
            self.told = now
            left = (now - self.started) / (self.done - self.start) * (self.total - self.done)
            facts = {"stage": self.stage, "done": self.done, "of": self.total, "seconds_left": round(left, 1)}
            console.say("progress", **facts, **(scalars or {}))
        if scalars:
            self.bar.set_postfix({key: f"{value:.3g}" for key, value in scalars.items()}, refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self.bar.close()


def tracked(items: Sequence, doing: str, unit: str) -> Iterator:
    """The items one by one, with a bar once they have taken a while."""
    progress = Progress(doing, len(items), shown=sharding.writes(), unit=unit, brief=True)
    try:
        for item in items:
            yield item
            progress.show()
    finally:
        progress.close()


def read(path: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl or timing.jsonl in order; a torn last line, which a killed run leaves, is not among
    them. Raises InputError where another one is damaged."""
    return json_files.rows(path, json_files.SCALARS)
