"""Progress bars, and the seconds of a step's phases."""

from __future__ import annotations

import sys
import time
from typing import Iterator, Mapping, Sequence

import jax
import tqdm

from drirl_jax.runtime import console, processes
from drirl_jax.types import PyTree


class Clock:
    """Seconds of the phases of a step: `mark` ends the phase that began at the previous mark.

    In a run `wait` is off and nothing is recorded, because waiting would end the overlap of host and device.
    """

    def __init__(self):
        self.restart(wait=False)

    def restart(self, wait: bool) -> None:
        """Clears all phases. With `wait` a mark waits for its value, so each phase counts the work that it started."""
        self.wait, self.seconds, self.last = wait, {}, time.perf_counter()

    def mark(self, phase: str, value: PyTree) -> PyTree:
        """Returns the value, once it is computed, and adds the time since the last mark to this phase."""
        if self.wait:
            jax.block_until_ready(value)
            now = time.perf_counter()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
            self.last = now
        return value


class Progress:
    """A bar on stderr with the rate, the time left and some scalars; updated every 10 s if stderr is no terminal.

    In console mode "quiet" there is no bar. In mode "json" there is one object a step on stdout instead.

    Args:
        stage: the label of the bar.
        total, start: the number of all steps, and of the steps that are already done.
        prints: whether this process prints.
        unit: the name of a step.
        brief: for a part of a larger task: the bar appears only after 2 s, and disappears at the end.
    """

    def __init__(
        self, stage: str, total: int, start: int = 0, prints: bool = True, *, unit: str = "step", brief: bool = False
    ):
        interval = 0.1 if sys.stderr.isatty() else 10
        self.prints_events = prints and console.mode() == "json"
        self.brief, self.start_time, self.last_event_time = brief, time.monotonic(), time.monotonic()
        self.bar = tqdm.tqdm(
            desc=stage, total=total, initial=start, unit=unit, mininterval=interval, dynamic_ncols=True,
            disable=not prints or console.mode() != "text", delay=2 if brief else 0, leave=not brief,
        )  # fmt: skip
        self.stage, self.total, self.start, self.done = stage, total, start, start

    def show(self, scalars: Mapping[str, float] | None = None) -> None:
        """Advances the bar by one step, with these scalars beside it in 3 significant digits."""
        self.done += 1
        now = time.monotonic()
        if self.prints_events and (not self.brief or now - self.last_event_time > 10):
            self.last_event_time = now
            seconds_left = (now - self.start_time) / (self.done - self.start) * (self.total - self.done)
            fields = {"stage": self.stage, "done": self.done, "of": self.total, "seconds_left": round(seconds_left, 1)}
            console.print_event("progress", **fields, **(scalars or {}))
        if scalars:
            self.bar.set_postfix({key: f"{value:.3g}" for key, value in scalars.items()}, refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Stops the bar; a brief one disappears."""
        self.bar.close()


def with_progress(items: Sequence, label: str, unit: str) -> Iterator:
    """The items one by one, with a bar that appears after 2 s."""
    progress = Progress(label, len(items), prints=processes.is_writer(), unit=unit, brief=True)
    try:
        for item in items:
            yield item
            progress.show()
    finally:
        progress.close()
