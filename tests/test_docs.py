"""The documentation's site leads to every notebook."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("folder", [ROOT, ROOT / "nbs"], ids=lambda f: f.name)
def test_sidebar_lists_every_notebook_once_and_nothing_else(folder):
    sections = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    assert sorted(file for section in sections for file in section["contents"]) == sorted(
        nb.name for nb in (ROOT / "nbs").glob("*.ipynb")
    )
