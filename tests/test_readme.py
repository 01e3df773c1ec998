"""README.md is what index.ipynb says, and what it says works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from afa_nb.benchmarks import table
from afa_nb.shapes import make_shapes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_agrees_with_index():
    done = subprocess.run([sys.executable, ROOT / ".ci/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("link", sorted({m[1] for m in re.finditer(r"\]\((?![a-z]+:|#)([^)\s]+)\)", README)}))
def test_link_leads_somewhere(link):
    assert (ROOT / link).exists()


def test_names_every_notebook():
    missing = [
        nb.name for nb in (ROOT / "nbs").glob("*.ipynb") if nb.name != "index.ipynb" and f"nbs/{nb.name}" not in README
    ]
    assert not missing


def test_both_commands_set_up_alike():
    first, second = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)[:2]
    assert first.splitlines()[:-1] == second.splitlines()[:-1]
    assert "papermill nbs/train_voc.ipynb out.ipynb" in first
    assert "nbdev_test" in second and "pytest" in second


def test_speed_table_is_what_was_measured():
    assert table(ROOT / "benchmarks") in README


def test_library_example_runs(tmp_path):
    data = make_shapes(tmp_path / "shapes", num_train=16, num_val=2)
    code = re.search(r"^```python\n(.*?)^```", README, re.M | re.S)[1]
    short = code.replace(
        'preset("demo")', f'preset("demo", max_iters=3, cam_iters=1, aff_iters=2, data_root={str(data)!r})'
    )
    assert short != code
    done = subprocess.run([sys.executable, "-c", short], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "ladder.png").stat().st_size > 1000
