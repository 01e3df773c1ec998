"""Notebooks and package agree, and committed notebooks are fit to be read."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.])(/home/|/root/|/Users/|/tmp/|/work/|/opt/|/usr/|[A-Z]:\\\\)\w")


def contents(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and "__pycache__" not in f.parts
    }


def text_of(output):
    data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
    return json.dumps([output.get("text", ""), data], ensure_ascii=False)


def test_export_and_clean_change_nothing(tmp_path):
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("nbs", "afa_nb"):
        shutil.copytree(
            ROOT / name,
            copy / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".last_checked"),
        )
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "_quarto.yml"):
        shutil.copy(ROOT / name, copy)
    before = contents(copy)
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=copy, check=True, capture_output=True)
        after = contents(copy)
        changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        assert not changed, f"{command} changes {sorted(changed)}: run it and commit"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_kept_outputs(file):
    assert file.stat().st_size < 1.5e6, "keep fewer or smaller pictures"
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells), "two cells have the same id"
    for cell in cells:
        source = "".join(cell["source"])
        assert not MACHINE_PATH.search(source), source
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", source
            assert output.get("name") != "stderr", source
            assert not MACHINE_PATH.search(text_of(output)), text_of(output)


def test_front_matter_is_for_markdown_only():
    "What nbdev and Quarto read at the head of a notebook does not show where nbconvert renders the notebook as a page."
    raw = {
        file.stem: c["metadata"].get("raw_mimetype")
        for file in NOTEBOOKS
        for c in json.loads(file.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "raw"
    }
    assert raw and set(raw.values()) == {"text/markdown"}, raw
    page = HTMLExporter(template_name="basic").from_filename(ROOT / "nbs/tour.ipynb")[0]
    assert "Ten minutes" in page and "skip_exec" not in page


@pytest.mark.parametrize(
    "module", sorted(f for f in (ROOT / "afa_nb").glob("*.py") if not f.name.startswith("_")), ids=lambda f: f.stem
)
def test_module_comes_from_its_notebook(module):
    source = re.search(r"File to edit: \.\./(nbs/\S+\.ipynb)", module.read_text(encoding="utf-8"))
    assert source, "written by hand: put it into a notebook"
    cells = json.loads((ROOT / source[1]).read_text(encoding="utf-8"))["cells"]
    assert any(f"#| default_exp {module.stem}" in "".join(c["source"]) for c in cells)
