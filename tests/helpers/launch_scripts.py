"""Starts a launch script with what it calls faked."""

import os
import pathlib
import signal
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def fake(path, text):
    """An executable shell script."""
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


def start(script, *args, **environment):
    """The script's process; LOGS and the like are given by name."""
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(
        ["bash", str(LAUNCH / script), *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests in the background of a shell ignore SIGINT, and what they start could not trap it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process):
    """Exit code, stdout, stderr."""
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.terminate()  # and what it has started, which is what it should do
        raise
    return process.returncode, out, err


def launched(script, *args, **environment):
    return finish(start(script, *args, **environment))


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []
