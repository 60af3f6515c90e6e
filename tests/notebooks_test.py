"""The notebooks run from top to bottom, here on a random model for two steps a stage; in full: `jupyter execute`."""

import os
import pathlib

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = pathlib.Path(__file__).parents[1]


def read(name):
    return nbformat.read(ROOT / "colab" / name, as_version=4)


@pytest.mark.parametrize("name", ["drirl_demo.ipynb", pytest.param("your_own.ipynb", marks=pytest.mark.slow)])
def test_a_notebook_runs_to_its_end(name, policy, tmp_path):
    settings = {"POLICY": policy, "CONFIG": "tiny", "STEPS": 2, "WORKDIR": tmp_path / "run"}
    environment = {f"DRIRL_{key}": str(value) for key, value in settings.items()}
    environment = os.environ | environment | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    notebook = nbclient.NotebookClient(read(name), timeout=600).execute(env=environment, cwd=str(tmp_path))
    shown = [out.data for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out]
    assert any("image/png" in data for data in shown)
    assert (tmp_path / "run" / "before_after.png").exists()


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "colab").glob("*.ipynb")))
def test_a_notebook_is_stored_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
