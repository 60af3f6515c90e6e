"""The wheel, installed into an empty folder: it starts a packaged config outside the source tree."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the wheel's files, as `pip install --no-deps --target` leaves them."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("site")
    left_out = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=left_out, symlinks=True)
    (source / "drirl_jax" / "configs").unlink()
    (source / "drirl_jax" / "configs").write_text("../configs")  # what pip makes of the link in a .zip
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q", "-w", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    (wheel,) = out.glob("drirl_jax-*.whl")
    zipfile.ZipFile(wheel).extractall(out)
    return out


def test_the_wheel_has_what_a_run_reads(site):
    patterns = {
        "configs": "*.py",
        "data/starter": "*",
        "reports/templates": "*",
        "data": "*.json",
        "evals/tasks": "*.jsonl",
    }
    for folder, pattern in patterns.items():
        there = {path.name for path in (site / "drirl_jax" / folder).glob(pattern)} - {"__pycache__"}
        assert there == {path.name for path in (ROOT / "drirl_jax" / folder).glob(pattern)} - {"__pycache__"}


def test_a_packaged_config_starts_from_an_empty_folder(site, policy, tmp_path):
    show = "import drirl_jax.configs as c; print(*c.__path__)"
    # -P and no PYTHONPATH but this one: nothing of the source tree can be found.
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    configs = subprocess.run([sys.executable, "-P", "-c", show], **options).stdout.strip()
    assert configs == str(site / "drirl_jax" / "configs")
    # Layers are counted behind the config, the starter set and the encoder, and before anything is compiled.
    command = ["-P", "-m", "drirl_jax.main", f"--config={configs}/tiny.py", "--workdir=run"]
    flags = [f"--config.policy.init={policy}", "--config.policy.layers=3"]
    done = subprocess.run([sys.executable, *command, *flags], **options)
    assert f"config.policy.layers is 3, but {policy} has 2 layers" in done.stderr and "Traceback" not in done.stderr
