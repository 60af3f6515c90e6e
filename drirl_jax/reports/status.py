"""The state of a run, read from its workdir alone. It takes about a second, whether or not the run is at work.

Seconds left = steps left times the median seconds of the last steps, without evaluations and compilation.
"""

from __future__ import annotations

import pathlib
import statistics
import time
from typing import Sequence

from drirl_jax.runtime import json_files, lock

SHOWN = ("loss", "reward", "gap", "kl", "alpha_d", "alpha_m", "length", "pairs_right", "accuracy", "skipped")
RECENT = 20  # the median is over so many last steps
TAIL = 2**21  # so many bytes are read from the end of a file
PRODUCTS = {"sft": "sft", "irl": "rewards", "align": "aligned", "evals": "report.html"}  # the product of each stage
TRAINED = ("sft", "irl", "align")  # the stages that train
CONFIG = {"schedule": [str], "irl": {"steps": int}, "align": {"steps": int}}


def run_status(workdir: pathlib.Path) -> dict:
    """The state of the run in this workdir.

    Returns:
        {"workdir", "at_work": whether a process of this machine holds it, "finished", "stage": the first unfinished
         one or None, "stages": [{"stage", "done", "steps", "finished", "seconds_a_step", "seconds_left"}],
         "last": the last row of metrics.jsonl, "quiet_for": seconds since it was written, "checkpoints":
         {stage: [steps]}, "stops": steps that a guard has saved, as align-13}. Unknown values are None.

    Raises:
        ValueError: the folder holds no run, or a file of it is damaged; the message is one sentence.
    """
    json_files.need_run(workdir)
    config = json_files.load(
        workdir / "config.json", CONFIG, "put a run's own file there, or name the workdir of a run"
    )
    schedule, steps = config["schedule"], {name: config[name]["steps"] for name in TRAINED if name in config}
    policies = evaluated_policies(schedule)
    steps["evals"] = len(policies)
    if unknown := [name for name in schedule if name not in PRODUCTS]:
        raise ValueError(f"{workdir}/config.json names the stages {unknown}: it is damaged, or of another version.")
    rows, timing = (_rows(workdir / f"{name}.jsonl") for name in ("metrics", "timing"))
    stages = [_stage(name, workdir, steps.get(name, 0), rows, timing, policies) for name in schedule]
    metrics = workdir / "metrics.jsonl"
    return {
        "workdir": str(workdir),
        "at_work": lock.is_locked(workdir),
        "finished": all(stage["finished"] for stage in stages),
        "stage": next((stage["stage"] for stage in stages if not stage["finished"]), None),
        "stages": stages,
        "last": rows[-1] if rows else None,
        "quiet_for": round(time.time() - metrics.stat().st_mtime, 1) if metrics.exists() else None,
        "checkpoints": {
            name: saved_steps for name in TRAINED if (saved_steps := _numbered(workdir / "checkpoints" / name))
        },
        "stops": sorted(folder.name for folder in (workdir / "replay").glob("*-*")),
    }


def _stage(
    name: str, workdir: pathlib.Path, steps: int, rows: list[dict], timing: list[dict], policies: tuple[str, ...]
) -> dict:
    product = PRODUCTS[name]
    finished = bool(_numbered(workdir / product)) if name == "irl" else (workdir / product).exists()
    if name == "evals":
        done = sum((workdir / "evals" / f"{policy}.json").exists() for policy in policies)
    else:
        done = steps if finished else max((row["step"] for row in rows if row["stage"] == name), default=0)
    recent = [row for row in timing if row["stage"] == name][-RECENT:]
    step_seconds = [sum(value or 0 for key, value in row.items() if key.endswith("_s")) for row in recent]
    seconds_a_step = statistics.median(step_seconds) if step_seconds else None
    seconds_left = None if seconds_a_step is None else (steps - done) * seconds_a_step
    progress = {"stage": name, "done": done, "steps": steps, "finished": finished}
    return progress | {"seconds_a_step": seconds_a_step, "seconds_left": seconds_left}


def evaluated_policies(schedule: Sequence[str]) -> tuple[str, ...]:
    """The policies that a run evaluates: the initial one, the product of `sft` if `align` follows it, and the last."""
    return ("base", "sft", "aligned") if {"sft", "align"} <= set(schedule) else ("base", "aligned")


def _numbered(folder: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a folder. Only complete checkpoints have a number as name."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def _rows(path: pathlib.Path) -> list[dict]:
    """The last rows of a JSONL file, without a row that is still being written."""
    return json_files.rows(path, json_files.SCALARS, tail=TAIL)


def duration(seconds: float) -> str:
    """Seconds in a readable unit: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def text(status: dict) -> str:
    """The result of `run_status` as text."""
    state = "at work" if status["at_work"] else "finished" if status["finished"] else "no process is at work in it"
    lines = [f"{status['workdir']}: {state}"]
    for stage in status["stages"]:
        line = f"  {stage['stage']:6} {stage['done']:>6} of {stage['steps']}"
        if stage["finished"]:
            line += ", done"
        elif stage["seconds_left"] is not None:
            line += f", about {duration(stage['seconds_left'])} left at {stage['seconds_a_step']:.2f} s a step"
        lines.append(line)
    if last := status["last"]:
        last_metrics = ", ".join(f"{name} {last[name]:.3g}" for name in SHOWN if last.get(name) is not None)
        ago = duration(status["quiet_for"])
        lines.append(f"step {last['step']} of {last['stage']}, written {ago} ago: {last_metrics}")
    for stage, saved_steps in status["checkpoints"].items():
        lines.append(f"checkpoints of {stage}: {', '.join(map(str, saved_steps))}")
    if status["stops"]:
        folder = f"{status['workdir']}/replay/{status['stops'][-1]}"
        lines.append(f"stopped by a guard at {', '.join(status['stops'])}: --replay={folder} runs the step alone")
    return "\n".join(lines)
