"""Scalars to JSONL and TensorBoard, and the progress bar.

metrics.jsonl holds nothing that depends on the clock or the machine's load, so that two runs can be compared bit for
bit; seconds go to timing.jsonl.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from typing import Mapping, Sequence

import tensorboardX
import tqdm


class MetricWriter:
    """The scalars of one workdir: metrics.jsonl, timing.jsonl and tensorboard/."""

    def __init__(self, workdir: pathlib.Path):
        self.metrics, self.seconds = workdir / "metrics.jsonl", workdir / "timing.jsonl"
        self.events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

    def write(self, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        """Appends {"stage", "step", ...} to metrics.jsonl; a value that is not finite is written as null."""
        self._append(self.metrics, stage, step, scalars)

    def timing(self, stage: str, step: int, seconds: Mapping[str, float]) -> None:
        """Appends seconds to timing.jsonl."""
        self._append(self.seconds, stage, step, {f"{key}_s": value for key, value in seconds.items()})

    def read(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        return [row for row, _ in _lines(self.metrics)]

    def rewind(self, order: Sequence[str], stage: str, step: int) -> None:
        """Drops what was written after this step of this stage, so that a run that goes on repeats no line.

        Args:
            order: the schedule's stages in turn.
            stage, step: the state that the run goes on from; a torn last line is dropped too.
        """
        for path in (self.metrics, self.seconds):
            at = (order.index(stage), step)
            kept = [line for row, line in _lines(path) if (order.index(row["stage"]), row["step"]) <= at]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, path)

    def _append(self, path: pathlib.Path, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in sorted(scalars.items())}
        with path.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step} | finite) + "\n")
        for key, value in finite.items():
            if value is not None:
                self.events.add_scalar(f"{stage}/{key}", value, step)
        self.events.flush()


class Progress:
    """A progress bar with the rate and the scalars that matter, on stderr; a line now and then where that is no terminal."""

    def __init__(self, stage: str, total: int, start: int = 0):
        patience = 0.1 if sys.stderr.isatty() else 10
        self.bar = tqdm.tqdm(desc=stage, total=total, initial=start, unit="step", mininterval=patience, dynamic_ncols=True)

    def show(self, scalars: Mapping[str, float]) -> None:
        """One step on, with these scalars beside the bar."""
        self.bar.set_postfix({key: f"{value:.3g}" for key, value in scalars.items()}, refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def _lines(path: pathlib.Path):
    """The whole lines of a JSONL file as (row, line); none if there is no file."""
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line), line
