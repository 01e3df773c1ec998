"""The COCO job, run headlessly as a user runs it, on a COCO of a few pictures."""

import json
from pathlib import Path

import papermill
import pytest
from test_data_sets import coco_json, write_coco

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "train_coco.ipynb"


def test_the_coco_job(tmp_path, monkeypatch):
    monkeypatch.setenv("AFA_NB_CACHE", str(tmp_path / "cache"))
    for split, images in dict(train2014=8, val2014=3).items():
        write_coco(tmp_path / "coco", coco_json(images), split)
    other = dict(stride=8, decoder_dim=16, save_every=4, log_every=2, radius=2, dilations=[1, 2], cam_scales=[1])
    parameters = dict(
        data_root=str(tmp_path / "coco"),
        backbone="mit_tiny",
        weights="none",
        max_iters=4,
        cam_iters=1,
        aff_iters=2,
        crop_size=64,
        batch_size=2,
        eval_every=2,
        num_workers=0,
        run_dir=str(tmp_path / "run"),
        pictures=1,
        train_limit=2,
        other=json.dumps(other),
    )
    papermill.execute_notebook(NOTEBOOK, tmp_path / "out.ipynb", parameters, kernel_name="python3", progress_bar=False)
    outputs = [o for cell in json.loads((tmp_path / "out.ipynb").read_text())["cells"] for o in cell.get("outputs", [])]
    text = "".join("".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/markdown", [])) for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2, "curves, pictures"
    assert "| CAM + PAR" in text and "| 38.9 |" in text and "person 4, toothbrush 4" in text
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {r["split"] for r in rows if r["kind"] == "eval"} == {"train2014", "val2014"} and rows[-1]["data"] == "coco"
