"""The output of a command: text and bars; only warnings and the result; or one JSON object a line on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
from typing import Any, Iterator, TextIO

MODES = ("text", "quiet", "json")
_mode = "text"
# Characters that control a terminal or a page: control characters, and marks that turn the direction of writing.
CONTROLS = {
    code: "\ufffd"
    for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\t\n\r"
}
COLOUR = re.compile("(\033\\[[0-9;]*m)")  # rich's colour codes; they cannot move the cursor or write elsewhere


def printable(text: str) -> str:
    """The text with a sign in place of each of CONTROLS and of half characters. Names and texts come from others."""
    return text.translate(CONTROLS).encode("utf-8", "replace").decode("utf-8")


def mode() -> str:
    """The row of MODES that this process uses."""
    return _mode


def set_mode(output_mode: str) -> None:
    """Sets the mode of this process's output and of its log records.

    Args:
        output_mode: a row of MODES. In "json" stdout has one object a line, each with "event": "log", "progress",
            "result" or "end"; null stands for NaN and infinity.
    """
    global _mode
    _mode = output_mode
    handler = _JsonHandler() if output_mode == "json" else _TextHandler(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    for name in ("drirl_jax", "__main__"):  # __main__ is the command's own module
        logging.getLogger(name).setLevel(logging.WARNING if output_mode == "quiet" else logging.INFO)


class _Output:
    """A stream that outlives its reader: once nobody reads it, as after `| head -1`, output is dropped. So a run does
    not end because a pager has ended."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropped():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropped():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropped(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # The rest of the stream's buffer goes to devnull, also when Python ends.
            with open(os.devnull, "w") as devnull:
                os.dup2(devnull.fileno(), self._stream.fileno())


def outlive_readers() -> None:
    """Lets this process continue when nobody reads its stdout or stderr any longer, or when one of them was closed from
    the start. Every command calls it first."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, open(os.devnull, "w") if stream is None else _Output(stream))


def print_event(event: str, **facts: Any) -> None:
    """Prints one JSON object on stdout, in any mode."""
    line = json.dumps({"event": event} | _finite(facts), ensure_ascii=False)
    print("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line), flush=True)


def print_result(text: str, **facts: Any) -> None:
    """Prints the command's result: the text, or in mode "json" the facts."""
    if _mode == "json":
        print_event("result", **facts)
    else:
        parts = COLOUR.split(text)
        print("".join(part if i % 2 else printable(part).replace("\r", "\ufffd") for i, part in enumerate(parts)))


def wants_colour(file: TextIO) -> bool:
    """Whether to print colours: only on a terminal, and not if NO_COLOR is set (https://no-color.org)."""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class _JsonHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_event("log", level=record.levelname.lower(), message=record.getMessage())


class _TextHandler(logging.StreamHandler):
    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        return f"\033[33m{text}\033[0m" if record.levelno >= logging.WARNING and wants_colour(self.stream) else text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
