"""A run as a process: alone in its workdir, and ready to leave when its machine is taken away."""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import threading
from typing import Callable, Iterator

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

PREEMPTED = 75  # exit code (EX_TEMPFAIL): started again, the run goes on
ASKED = itertools.count(1)  # JAX agrees on one of these, so they must not begin anew with every stage


class Preempted(BaseException):
    """The machine is taken away; what was done is kept. No error, which something on the way could take for its own."""


def raise_preempted(*_) -> None:
    """The handler of SIGTERM where nothing is at work that is not kept already."""
    raise Preempted("the run was asked to end")


@contextlib.contextmanager
def preemption_notice() -> Iterator[Callable[[int], bool]]:
    """Inside, SIGTERM is noted and does no more.

    Yields:
        number of finished steps -> whether to leave now, on all processes alike; asked once after every step.
    """
    if jax.process_count() > 1:  # jax notes the signal itself, and agrees on a step with the other processes
        yield lambda step: multihost_utils.reached_preemption_sync_point(next(ASKED))
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
