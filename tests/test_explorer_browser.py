"""The explorer as a reader's hand finds it: the notebook in JupyterLab, in a real browser.

Screenshots go to $AFA_NB_SCREENSHOTS if that is set; $AFA_NB_PARAMETERS, as JSON, holds the notebook's parameters, for
instance {"run": "a run's folder"}."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install 'afa_nb[dev]'")
pytest.importorskip("ipyevents", reason="ipyevents is not installed: pip install 'afa_nb[dev]'")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'afa_nb[dev]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no browser: apt-get install chromium")]

NBS = Path(__file__).resolve().parent.parent / "nbs"
ERRORS = ", ".join(f'[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in ("error", "stderr"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of a JupyterLab on a copy of the notebooks."
    folder = tmp_path_factory.mktemp("lab")
    nbs = folder / "nbs"
    nbs.mkdir()
    for file in NBS.glob("*.ipynb"):
        shutil.copy(file, nbs)
    parameters = json.loads(os.environ.get("AFA_NB_PARAMETERS", "{}"))
    notebook = json.loads((nbs / "21_explorer.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] += [f"\n{name} = {value!r}" for name, value in parameters.items()]
    (nbs / "21_explorer.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    tracker = folder / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # else cells out of sight are not in the page
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folders = "JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"
    environment = os.environ | {name: str(folder / name.split("_")[1].lower()) for name in folders}
    options = [
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={nbs}",
        "--IdentityProvider.token=test",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with open(folder / "log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    for _ in range(300):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert server.poll() is None, (folder / "log").read_text()
        time.sleep(1)
    yield f"http://127.0.0.1:{port}/lab/tree/21_explorer.ipynb?token=test"
    server.terminate()
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()


@pytest.fixture
def page(lab):
    "The notebook with all cells run, and in `problems` what the browser's console called an error."
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.problems = []

        def listen(message):
            if message.type == "error":
                page.problems.append(f"{message.text} {message.location.get('url', '')}")

        page.on("console", listen)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(lab, timeout=120_000)
        kernel = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
        page.wait_for_function(f"{kernel}?.status == 'idle'", timeout=300_000)
        run_all = "jupyterapp.commands.execute('notebook:run-all-cells')"
        page.evaluate(f"() => {{ {run_all}.then(() => window.finished = true) }}")
        page.wait_for_function("window.finished", timeout=600_000)
        yield page
        browser.close()


def test_a_click_and_a_slider_change_the_picture(page, tmp_path):
    folder = Path(os.environ.get("AFA_NB_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    assert page.locator(ERRORS).all_inner_texts() == []
    explorer = page.locator(".jp-OutputArea-output", has=page.locator(".widget-image")).last
    point, label = explorer.locator(".widget-image").all()

    def act(name, row, gesture):
        "The gesture changes the picture of `row`; a screenshot of what came of it."
        before = row.get_attribute("src")
        gesture()
        changed = "([image, before]) => image.src != before && image.complete"
        row.page.wait_for_function(changed, arg=[row.element_handle(), before], timeout=20_000)
        page.wait_for_timeout(500)
        explorer.screenshot(path=folder / f"explorer-{name}.png")

    def drag(slider, distance):
        box = explorer.locator(".widget-slider", has_text=slider).locator(".noUi-handle").last.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + distance, y, steps=4)
        page.mouse.up()

    explorer.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    explorer.screenshot(path=folder / "explorer-before.png")
    pixels = point.screenshot(), label.screenshot()
    box = point.bounding_box()
    act("click", point, lambda: point.click(position=dict(x=0.06 * box["width"], y=0.35 * box["height"])))
    assert "point=" in explorer.locator("code").inner_text()
    act("scores", label, lambda: drag("β_l, β_h", 12))
    act("iterations", label, lambda: drag("iterations", -40))
    assert "num_iter=" in explorer.locator("code").inner_text()
    assert point.screenshot() != pixels[0] and label.screenshot() != pixels[1]
    assert page.locator(ERRORS).all_inner_texts() == []
    assert page.problems == []
