"""The container image and the job on a cluster: who a run is there, from what it is made, and values as they are."""

import pathlib
import re
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


def jobset(**settings) -> dict:
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    known = dict(re.findall(r"^#   export (\w+)=(\S+)", text, re.MULTILINE)) | settings
    return yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda found: known[found[1]], text))


def pod_of(found: dict) -> dict:
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "value", ["gs://b/a: b", "gs://b/a #1", "12", "1e3", "yes", "null", "*x", "{a}", 'a"b', "a\\b", " a ", "é中"]
)
def test_every_text_of_the_jobset_is_taken_as_it_is(value):
    settings = ("NAME", "IMAGE", "CONFIG", "WORKDIR", "SERVICE_ACCOUNT", "ACCELERATOR", "TOPOLOGY")
    found = jobset(**dict.fromkeys(settings, value))
    pod = pod_of(found)
    (container,) = pod["containers"]
    assert found["metadata"]["name"] == pod["serviceAccountName"] == container["image"] == value
    assert set(pod["nodeSelector"].values()) == {value}
    assert {f"--config={value}", f"--workdir={value}"} <= set(container["command"])


def test_numbers_of_the_jobset_stay_numbers():
    spec = jobset(HOSTS="16")["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 16


def test_a_run_is_no_root_and_its_base_is_one_release():
    lines = [line.split() for line in (LAUNCH / "Dockerfile").read_text().splitlines()]
    users = [words[1] for words in lines if words[:1] == ["USER"]]
    assert users and users[-1].isdigit() and int(users[-1]) > 0
    (base,) = [words[1] for words in lines if words[:1] == ["ARG"]]
    assert re.fullmatch(r"BASE=python:3\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", base)
    assert ["FROM", "${BASE}"] in lines
    (container,) = pod_of(jobset())["containers"]
    assert container["securityContext"] == {"runAsNonRoot": True, "allowPrivilegeEscalation": False}


def test_a_word_of_a_remote_command_stays_one_word():
    script = (LAUNCH / "tpu_vm.sh").read_text()
    (function,) = re.findall(r"^quoted\(\) \{.*?^\}", script, re.MULTILINE | re.DOTALL)
    words = ["", "a b", "~/x", "$HOME", "it's", "x [1]*?", "--workdir=gs://b/a b", "a\nb", "é中", "#", "plain"]
    command = f'{function}\neval "again=($(quoted "$@"))"\nprintf "%s\\0" "${{again[@]}}"'
    done = subprocess.run(["bash", "-c", command, "-", *words], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == words
