"""The tour, run headlessly with a training of a few steps."""

import json
from pathlib import Path

import papermill
import pytest

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "tour.ipynb"


def test_tour(tmp_path):
    out = tmp_path / "out.ipynb"
    parameters = dict(max_iters=4, num_train=16, num_val=3, image="val_00001", run_dir=str(tmp_path / "run"))
    papermill.execute_notebook(NOTEBOOK, out, parameters, kernel_name="python3", progress_bar=False)
    outputs = [output for cell in json.loads(out.read_text())["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 4
    assert (tmp_path / "run" / "val_00001.png").exists()
