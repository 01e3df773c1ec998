"""The package stands without notebook tooling, and its modules build on each other in the notebooks' order."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = [nb.stem.split("_", 1)[1] for nb in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
MODULES = [m for m in ORDER if (ROOT / f"afa_nb/{m}.py").exists()]
TOOLING = ["IPython", "execnb", "fastcore", "ipyevents", "ipykernel", "ipywidgets", "jupyter_client", "jupyter_core", "nbclient", "nbconvert", "nbdev", "nbformat", "papermill", "pytest"]


def test_importing_needs_no_notebook_tooling(tmp_path):
    code = f"""
import importlib, sys
for name in {["afa_nb", *(f"afa_nb.{m}" for m in MODULES)]}:
    module = importlib.import_module(name)
    assert all(hasattr(module, n) for n in getattr(module, "__all__", [])), name
    found = sorted(set({TOOLING}) & set(sys.modules))
    assert not found, f"importing {{name}} imports {{found}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_explorer_says_what_to_install(tmp_path):
    code = """
import sys
sys.modules["ipywidgets"] = None  # as where it is not installed
from afa_nb.explorer import Explorer
Explorer("run")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "ImportError: the explorer needs ipywidgets, which is not installed here: pip install 'afa_nb[dev]'" in done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_modules_above(module):
    tree = ast.parse((ROOT / f"afa_nb/{module}.py").read_text(encoding="utf-8"))
    used = {name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level
            for name in ([node.module] if node.module else [alias.name for alias in node.names])}
    assert used <= set(MODULES[:MODULES.index(module)])
