"""The launch files for Slurm and Kubernetes, with what they call faked."""

import math
import os
import re
import signal

import pytest
import yaml
from helpers.launch_scripts import LAUNCH, ROOT, fake, finish, launched, lines, start, wait_for

# ------------------------------------------------------------------------------------------------------ slurm.sbatch

SRUN = """
if [[ "$*" == *"import drirl_jax"* ]]; then exit "$CHECK"; fi
printf '%s\\n' "$@" >"$SEEN/run"
[ "$DOES" = stays ] || exit "$DOES"
trap 'echo "TERM reached srun"; kill "$!"; exit 143' TERM
touch "$SEEN/trapped"
sleep 100 & wait
"""


@pytest.fixture
def slurm(tmp_path):
    """Settings under which slurm.sbatch finds a fake srun and scontrol, as in a job of two nodes."""
    for folder in ("bin", "seen"):
        (tmp_path / folder).mkdir()
    fake(tmp_path / "bin" / "srun", SRUN)
    fake(tmp_path / "bin" / "scontrol", 'echo "$*" >"$SEEN/scontrol"\n')
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SEEN": tmp_path / "seen", "CHECK": "0", "DOES": "0",
        "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8", "SLURM_SUBMIT_DIR": ROOT,
    }  # fmt: skip


def test_slurm_runs_one_process_a_task_and_returns_its_exit_code(slurm):
    code, _, err = launched("slurm.sbatch", "--config=c", "--workdir", "a b", **slurm)
    assert code == 0, err
    args = lines(slurm["SEEN"] / "run")
    assert args[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=8"]
    flags = ["--config=c", "--workdir", "a b", "--config.distributed.auto=True"]
    assert args[3:] == ["-m", "drirl_jax.main", *flags]
    code, _, _ = launched("slurm.sbatch", "--config=c", **slurm | {"DOES": "7"})
    assert code == 7 and not (slurm["SEEN"] / "scontrol").exists()


@pytest.mark.parametrize("by, queued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_passes_signals_on_and_queues_itself_again_only_when_the_time_is_up(slurm, by, queued):
    process = start("slurm.sbatch", "--config=c", **slurm | {"DOES": "stays"})
    wait_for((slurm["SEEN"] / "trapped").exists)
    process.send_signal(by)
    code, out, _ = finish(process)
    assert code == 143 and "TERM reached srun" in out
    told = slurm["SEEN"] / "scontrol"
    assert told.exists() == queued and (not queued or told.read_text() == "requeue 42\n")


def test_slurm_refuses_in_one_sentence_before_the_run(slurm):
    for changed, said in (
        ({"CHECK": "1"}, "not every node has drirl_jax and a GPU"),
        ({"SLURM_JOB_ID": ""}, "this is for sbatch"),
        ({"SLURM_SUBMIT_DIR": ROOT / "tests"}, "submit from the project's folder"),
    ):
        code, _, err = launched("slurm.sbatch", "--config=c", **slurm | changed)
        assert code == 1 and said in err and len(err.splitlines()) == 1
    assert not (slurm["SEEN"] / "run").exists()


def test_slurm_dry_run_prints_and_starts_nothing(slurm):
    code, out, _ = launched(
        "slurm.sbatch", "--dry_run", "--config=c", "--workdir", "a b", **slurm | {"SLURM_JOB_ID": ""}
    )
    check, run = out.splitlines()
    assert code == 0 and "--ntasks-per-node=1 --ntasks=2" in check
    assert r"a\ b --config.distributed.auto=True" in run and not (slurm["SEEN"] / "run").exists()


def test_slurm_asks_for_a_task_a_gpu_and_lets_each_see_all_of_its_node():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    assert asked["gpus-per-node"] == asked["ntasks-per-node"] and "gpus-per-task" not in asked
    assert asked["signal"].startswith("B:USR1@") and "requeue" in asked and asked["open-mode"] == "append"


# --------------------------------------------------------------------------------------------------- gke_jobset.yaml

# The fields that the file may have, by the path of what holds them: hand-checked against JobSet v1alpha2 and Job v1, as
# their schemas are not at hand here. A misspelt field is refused by the cluster, or worse, dropped.
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name", "annotations", "labels", "namespace"},
    "spec": {"failurePolicy", "replicatedJobs", "successPolicy", "network", "ttlSecondsAfterFinished"},
    "spec.failurePolicy": {"maxRestarts", "rules", "restartStrategy"},
    "spec.failurePolicy.rules": {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"},
    "spec.replicatedJobs": {"name", "replicas", "template"},
    "spec.replicatedJobs.template": {"metadata", "spec"},
    "spec.replicatedJobs.template.spec": {
        "parallelism", "completions", "completionMode", "backoffLimit", "podFailurePolicy", "template",
        "activeDeadlineSeconds",
    },
    "spec.replicatedJobs.template.spec.podFailurePolicy": {"rules"},
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules": {"action", "onPodConditions", "onExitCodes"},
    "spec.replicatedJobs.template.spec.template": {"metadata", "spec"},
    "spec.replicatedJobs.template.spec.template.spec": {
        "restartPolicy", "serviceAccountName", "nodeSelector", "containers", "tolerations", "volumes",
        "terminationGracePeriodSeconds",
    },
    "spec.replicatedJobs.template.spec.template.spec.containers": {
        "name", "image", "command", "args", "env", "ports", "resources", "volumeMounts", "securityContext",
    },
}  # fmt: skip


def check_fields(node, path=""):
    for item in node if isinstance(node, list) else [node]:
        if path in FIELDS and isinstance(item, dict):
            assert item.keys() <= FIELDS[path], f"{path}: {item.keys() - FIELDS[path]}"
            for key, value in item.items():
                check_fields(value, f"{path}.{key}".lstrip("."))


def test_the_jobset_is_whole_with_the_settings_at_its_top():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    settings = dict(re.findall(r"^#   export (\w+)=(\S+)", text, re.MULTILINE))
    assert set(re.findall(r"\$\{?(\w+)\}?", re.sub(r"(?m)^#.*", "", text))) == settings.keys()
    jobset = yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda found: settings[found[1]], text))
    check_fields(jobset)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # One pod a host, all of one slice, and none started again by itself.
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    names = {"cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"}
    assert pod["nodeSelector"].keys() == names and all(isinstance(x, str) for x in pod["nodeSelector"].values())
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == chips * job["completions"]
    assert container["command"][:3] == ["python", "-m", "drirl_jax.main"]
    assert {"--workdir=gs://my-bucket/run", "--config.distributed.auto=True"} <= set(container["command"])
    # A job whose pods were pre-empted fails for the reason for which restarts are not counted.
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    assert job["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onPodConditions": disrupted}]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
