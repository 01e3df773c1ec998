"""The main job, run headlessly as a user runs it, on a data set of a few pictures."""

import json
from pathlib import Path

import papermill
import pytest

from afa_nb.shapes import make_shapes

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "train_voc.ipynb"


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    root = make_shapes(folder / "shapes", num_train=16, num_val=3, size=64)
    other = dict(batch_size=4, save_every=4, log_every=4, radius=3)
    return dict(
        data_root=str(root),
        preset="demo",
        max_iters=8,
        crop_size=64,
        run_dir=str(folder / "run"),
        pictures=2,
        train_limit=4,
        other=json.dumps(other),
    )


def run(parameters, folder):
    out = folder / "out.ipynb"
    papermill.execute_notebook(NOTEBOOK, out, parameters, kernel_name="python3", progress_bar=False)
    return [output for cell in json.loads(out.read_text())["cells"] for output in cell.get("outputs", [])]


def text(outputs):
    return "".join("".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/markdown", [])) for o in outputs)


def test_the_main_job_shows_curves_table_and_pictures(parameters, tmp_path):
    outputs = run(parameters, tmp_path)
    assert not any(o["output_type"] == "error" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2, "curves, pictures"
    for rung in (
        "all background",
        "CAM + PAR",
        "propagated along affinity + PAR",
        "segmentation, one scale",
        "released protocol + CRF",
        "raw attention",
    ):
        assert f"| {rung}" in text(outputs) or rung in text(outputs)
    weights = Path(parameters["run_dir"]) / "checkpoints" / "step-00000008" / "model.safetensors"
    before = weights.read_bytes()
    assert "this run is finished" in text(run(parameters, tmp_path))
    assert weights.read_bytes() == before


def test_a_parameter_without_sense_stops_before_training(parameters, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="crop_size 4 is smaller than the stride 8"):
        run(parameters | dict(crop_size=4, run_dir=str(tmp_path / "run")), tmp_path)
    assert not (tmp_path / "run").exists()
