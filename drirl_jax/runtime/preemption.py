"""Lets a run end in order, with its state saved, when its machine is taken away (SIGTERM)."""

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

PREEMPTED = 75  # exit code (EX_TEMPFAIL): the same command resumes the run
SYNC_NUMBERS = itertools.count(
    1
)  # JAX agrees on one of these numbers, so they must not start from 1 again in each stage


class Preempted(BaseException):
    """The machine is taken away, and all finished work is saved. A BaseException, so that no `except Exception` on the
    way catches it."""


def raise_preempted(*_) -> None:
    """The handler of SIGTERM outside the loop, where no unsaved work can be lost."""
    raise Preempted("the run was asked to end")


@contextlib.contextmanager
def preemption_notice() -> Iterator[Callable[[int], bool]]:
    """Inside the block, SIGTERM only sets a flag.

    Yields:
        number of finished steps -> whether to end the run now, the same on all processes; call it once after each step.
    """
    if jax.process_count() > 1:  # jax catches the signal itself, and agrees on a step with the other processes
        yield lambda step: multihost_utils.reached_preemption_sync_point(next(SYNC_NUMBERS))
        return
    received = threading.Event()
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
