"""The documentation's site leads to every notebook."""
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def test_sidebar_lists_every_notebook_once():
    sections = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = [file for section in sections for file in section["contents"]]
    assert len(listed) == len(set(listed))
    assert {nb.name for nb in (ROOT / "nbs").glob("*.ipynb")} <= set(listed)
