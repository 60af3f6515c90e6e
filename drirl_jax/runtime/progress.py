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
            console.print_event("progress", **facts, **(scalars or {}))
        if scalars:
            self.bar.set_postfix({key: f"{value:.3g}" for key, value in scalars.items()}, refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self.bar.close()


def with_progress(items: Sequence, doing: str, unit: str) -> Iterator:
    """The items one by one, with a bar once they have taken a while."""
    progress = Progress(doing, len(items), shown=processes.is_writer(), unit=unit, brief=True)
    try:
        for item in items:
            yield item
            progress.show()
    finally:
        progress.close()
