"""What a run writes down: exact lines, rewinding, TensorBoard's files read back, the progress bar."""

import json
import math
import struct
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from drirl_jax.runtime import json_files, progress
from drirl_jax.runtime.metrics import MetricWriter, read_jsonl
from drirl_jax.runtime.progress import Progress

STAGES = ("irl", "align", "evals")


def events(folder):
    """The events of all of a folder's TensorBoard files, oldest file first: length, CRC, event, CRC."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack_from("<Q", data)
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(folder):
    found = ((event.step, value) for event in events(folder) for value in event.summary.value)
    return [(value.tag, step, value.simple_value) for step, value in found]


def write_run(writer, stages=("irl", "align"), steps=range(1, 5)):
    for stage in stages:
        for step in steps:
            writer.write(stage, step, {"reward": math.sin(step), "reward/insult": step / 3})
            writer.write_timing(stage, step, {"collect": 0.25 * step})


def test_lines_are_exact_and_sorted(tmp_path):
    writer = MetricWriter(tmp_path / "run")
    writer.write("irl", 1, {"loss": 0.1 + 0.2, "accuracy/insult": np.float32(0.1), "accuracy": 1})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        '{"stage": "irl", "step": 1, "accuracy": 1.0, "accuracy/insult": 0.10000000149011612, '
        '"loss": 0.30000000000000004}\n'
    )
    writer.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_null(tmp_path, value):
    writer = MetricWriter(tmp_path)
    writer.write("irl", 3, {"loss": value, "gap": 0.5})
    writer.close()
    line = '{"stage": "irl", "step": 3, "gap": 0.5, "loss": null}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == line
    assert scalars(tmp_path / "tensorboard" / "irl") == [("irl/gap", 3, 0.5)]


def test_seconds_stay_out_of_the_metrics(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write("align", 1, {"kl": 0.5})
    writer.write_timing("align", 1, {"update": 2.0, "collect": 1.5})
    writer.close()
    assert writer.read_metrics() == [{"stage": "align", "step": 1, "kl": 0.5}]
    timing = [{"stage": "align", "step": 1, "collect_s": 1.5, "update_s": 2.0}]
    assert read_jsonl(tmp_path / "timing.jsonl") == timing
    expected = [("align/kl", 1, 0.5), ("align/collect_s", 1, 1.5), ("align/update_s", 1, 2.0)]
    assert scalars(tmp_path / "tensorboard" / "align") == expected


def test_tensorboard_keeps_categories_in_the_tag(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write("align", 2, {"reward/physical_harm": 0.25})
    writer.close()
    assert scalars(tmp_path / "tensorboard" / "align") == [("align/reward/physical_harm", 2, 0.25)]


def test_lines_are_on_disk_before_the_writer_is_closed(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write("irl", 1, {"loss": 1.0})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"stage": "irl", "step": 1, "loss": 1.0}]
    writer.close()


@pytest.mark.parametrize(
    "stage, step, kept",
    [
        ("irl", 0, []),
        ("irl", 2, [("irl", 1), ("irl", 2)]),
        ("align", 0, [("irl", step) for step in range(1, 5)]),
        ("align", 3, [("irl", step) for step in range(1, 5)] + [("align", step) for step in range(1, 4)]),
        ("evals", 0, [(name, step) for name in ("irl", "align") for step in range(1, 5)]),
    ],
)
def test_rewind_drops_what_is_later(tmp_path, stage, step, kept):
    writer = MetricWriter(tmp_path)
    write_run(writer)
    before = {name: (tmp_path / name).read_text().splitlines() for name in ("metrics.jsonl", "timing.jsonl")}
    writer.rewind(STAGES, stage, step)
    writer.close()
    for name, lines in before.items():
        after = (tmp_path / name).read_text().splitlines()
        assert after == lines[: len(kept)]
        assert [(row["stage"], row["step"]) for row in map(json.loads, after)] == kept
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "timing.jsonl", "tensorboard"}


def test_rewind_drops_a_torn_last_line(tmp_path):
    writer = MetricWriter(tmp_path)
    write_run(writer, stages=("irl",))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"stage": "irl", "step": 5, "rew')
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    writer.rewind(STAGES, "irl", 5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    writer.close()


def test_a_run_that_goes_on_writes_the_bytes_of_one_that_was_never_killed(tmp_path):
    straight, killed = MetricWriter(tmp_path / "straight"), MetricWriter(tmp_path / "killed")
    write_run(straight)
    write_run(killed, stages=("irl",))
    write_run(killed, stages=("align",), steps=range(1, 4))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "al')
    again = MetricWriter(tmp_path / "killed")
    again.rewind(STAGES, "align", 2)
    write_run(again, stages=("align",), steps=range(3, 5))
    for writer in (straight, killed, again):
        writer.close()
    expected = (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == expected


def test_samples_of_a_step_that_is_repeated_are_kept_once(tmp_path):
    def samples(writer, steps):
        for step in steps:
            rows = [{"text": f"{name} {step}\u2028\ud800\n", "reward": None} for name in "ab"]
            writer.write_samples("align", step, rows)
            writer.write("align", step, {"loss": 1.0})

    straight, killed = MetricWriter(tmp_path / "straight"), MetricWriter(tmp_path / "killed")
    samples(straight, (1, 3, 4))
    samples(killed, (1, 3))
    with (tmp_path / "killed" / "samples.jsonl").open("a") as file:
        file.write('{"stage": "align", "step": 4}\n{"stage": "al')
    again = MetricWriter(tmp_path / "killed")
    again.rewind(STAGES, "align", 2)
    assert [(row["step"], row["text"][0]) for row in json_files.rows(again.samples_file)] == [(1, "a"), (1, "b")]
    samples(again, (3, 4))
    silent = MetricWriter(tmp_path / "silent", is_writer=False)
    silent.write_samples("align", 1, [{}])
    for writer in (straight, killed, again, silent):
        writer.close()
    whole = (tmp_path / "straight" / "samples.jsonl").read_bytes()
    assert (tmp_path / "killed" / "samples.jsonl").read_bytes() == whole and whole.count(b"\n") == 6
    assert not (tmp_path / "silent" / "samples.jsonl").exists()


def test_rewind_of_a_fresh_run_leaves_no_rows(tmp_path):
    writer = MetricWriter(tmp_path)
    assert writer.read_metrics() == []
    writer.rewind(STAGES, "irl", 0)
    assert writer.read_metrics() == []
    writer.close()


def test_a_run_killed_while_rewinding_loses_nothing(tmp_path, monkeypatch):
    writer = MetricWriter(tmp_path)
    write_run(writer)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.rewind(STAGES, "irl", 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    writer.close()


def test_rewind_purges_the_stage_in_tensorboard_and_keeps_its_past(tmp_path):
    killed = MetricWriter(tmp_path)
    write_run(killed)
    killed.close()
    again = MetricWriter(tmp_path)  # within the same second: the file must not be overwritten
    again.rewind(STAGES, "align", 2)
    again.write("align", 3, {"reward": 9.0})
    again.close()
    folder = tmp_path / "tensorboard"
    assert len(list((folder / "align").iterdir())) == 2
    assert len(list((folder / "irl").iterdir())) == 1
    found = events(folder / "align")
    starts = [event.step for event in found if event.session_log.status == SessionLog.START]
    assert starts == [1, 3]  # what TensorBoard hides from: all at first, then from step 3 on
    rewards = [(step, value) for tag, step, value in scalars(folder / "align") if tag == "align/reward"]
    assert [step for step, _ in rewards] == [1, 2, 3, 4, 3]
    assert rewards[-1] == (3, 9.0)


def test_progress_shows_three_digits_and_starts_where_the_run_goes_on(capsys):
    progress = Progress("align", total=10, start=4)
    progress.show({"reward": 0.123456, "kl": 0.0000123456, "length": 64})
    progress.show({"reward": -1.23456, "kl": 0.0000123456, "length": 64})
    progress.close()
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("align:") and " 6/10 " in last
    assert "reward=-1.23, kl=1.23e-05, length=64]" in last


def test_progress_is_not_a_line_a_step_where_there_is_no_terminal(capsys):
    progress = Progress("irl", total=200)
    for _ in range(200):
        progress.show({"loss": 0.5})
    progress.close()
    drawn = capsys.readouterr().err.count("irl:")
    assert 1 <= drawn <= 3


def test_the_clock_counts_a_phase_only_when_it_waits():
    clock = progress.Clock()
    assert clock.mark("a", 3) == 3 and clock.seconds == {}
    clock.restart(wait=True)
    time.sleep(0.02)
    clock.mark("a", None)
    clock.mark("b", None)
    time.sleep(0.01)
    clock.mark("a", None)
    assert clock.seconds["a"] >= 0.03 > 0.02 > clock.seconds["b"]
