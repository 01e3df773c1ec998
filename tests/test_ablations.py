"""An ablation, run headlessly as a user runs it, killed halfway and run again."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import papermill
import psutil
import pytest

from afa_nb.shapes import make_shapes

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "ablation_modules.ipynb"


@pytest.fixture
def parameters(tmp_path):
    root = make_shapes(tmp_path / "shapes", num_train=8, num_val=2, size=64)
    other = dict(batch_size=2, crop_size=64, radius=2, save_every=2, log_every=2)
    run_dir = str(tmp_path / "runs")
    return dict(
        data_root=str(root), preset="demo", max_iters=6, seeds="0", run_dir=run_dir, pictures=1, other=json.dumps(other)
    )


def rows(parameters):
    path = Path(parameters["run_dir"]) / "modules.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def networks(parameters):
    folder = Path(parameters["run_dir"])
    files = folder.glob("*/checkpoints/step-00000006/model.safetensors")
    return {f.relative_to(folder): f.stat().st_mtime_ns for f in files}


def kill(process):
    "The notebook's kernel too, which is a process of its own."
    running = psutil.Process(process.pid)
    for p in [*running.children(recursive=True), running]:
        p.kill()
    process.wait()


def test_killed_and_run_again_computes_only_what_is_missing(parameters, tmp_path):
    given = [word for k, v in parameters.items() for word in ("-r" if isinstance(v, str) else "-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", NOTEBOOK, tmp_path / "killed.ipynb", "-k", "python3"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([*command, "--no-progress-bar", *given], **quiet, env=os.environ)
    deadline = time.time() + 300
    while not rows(parameters) and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "the notebook was over before it was killed"
    kill(process)
    before, there = rows(parameters), networks(parameters)
    assert 0 < len(before) < 9 and there

    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(NOTEBOOK, out, parameters, kernel_name="python3", progress_bar=False)
    outputs = [o for cell in json.loads(out.read_text())["cells"] for o in cell.get("outputs", [])]
    parts = [part for o in outputs for part in (o.get("text", []), o.get("data", {}).get("text/markdown", []))]
    text = "".join("".join(part) for part in parts)
    assert f"{len(before)} of 9 numbers are there" in text and "To train:" in text
    assert rows(parameters)[: len(before)] == before and len(rows(parameters)) == 9
    assert len(networks(parameters)) == 4
    assert {k: v for k, v in networks(parameters).items() if k in there} == there, "a network was trained again"
    for row in ("baseline", "+ PAR", "+ AFA", "+ L_reg", "+ CRF"):
        assert f"| {row} |" in text
    assert "baseline → + PAR" in text
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2, "plot and pictures"
