"""The package stands without notebook tooling, and its modules build on each other floor by floor."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def number_and_module(notebook):
    module = re.search(r"#\| default_exp (\w+)", notebook.read_text(encoding="utf-8"))
    return notebook.stem.split("_")[0], module and module[1]


ROOMS = {m: n for n, m in map(number_and_module, sorted((ROOT / "nbs").glob("[0-9a][0-9]*_*.ipynb"))) if m}
METHOD, USE, APPENDIX = ({m for m, n in ROOMS.items() if n[0] in first} for first in ("01", "2", "a"))
MODULES = sorted(ROOMS)
TOOLING = [
    "IPython",
    "execnb",
    "fastcore",
    "ipyevents",
    "ipykernel",
    "ipywidgets",
    "jupyter_client",
    "jupyter_core",
    "nbclient",
    "nbconvert",
    "nbdev",
    "nbformat",
    "papermill",
    "pytest",
]


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
    assert "ImportError: the explorer needs ipywidgets, missing here: pip install 'afa_nb[dev]'" in done.stderr


def imported(module):
    "Names of our modules that a module imports when it is imported itself, not inside its functions."
    tree = ast.parse((ROOT / f"afa_nb/{module}.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    return {name for node in found for name in ([node.module] if node.module else [a.name for a in node.names])}


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_what_lies_below(module):
    "The method: its earlier notebooks and the appendix. The appendix: not what uses it. Use: what comes before."
    below = {m for m in ROOMS if ROOMS[m] < ROOMS[module]}
    allowed = METHOD | APPENDIX if module in APPENDIX else APPENDIX | below
    assert imported(module) <= allowed


def test_no_import_leads_back():
    open_, done = [], set()

    def visit(module):
        assert module not in open_, f"a circle: {' → '.join([*open_, module])}"
        if module in done:
            return
        open_.append(module)
        for name in sorted(imported(module)):
            visit(name)
        done.add(open_.pop())

    for module in MODULES:
        visit(module)
