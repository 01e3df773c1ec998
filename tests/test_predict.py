"""Predicting survives a kill, a full disk, broken and huge pictures; what the command line answers."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from afa_nb import predict
from afa_nb.files import read_mask
from afa_nb.model import AFANet
from afa_nb.runs import open_run, save_weights
from afa_nb.settings import preset

CLASSES = ["background", "cow", "person", "yak"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run's folder with random weights."
    torch.manual_seed(0)
    config = preset("demo", run_dir=str(tmp_path_factory.mktemp("runs") / "run"))
    net = AFANet(len(CLASSES), config.backbone, stride=config.stride, decoder_dim=config.decoder_dim)
    save_weights(net, open_run(config, CLASSES) / "best" / "model.safetensors")
    return Path(config.run_dir)


@pytest.fixture(scope="module")
def predictor(run):
    return predict.load(run, best=True, device="cpu")


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (max(1, height // 8), max(1, width // 8), 3), np.uint8)
    return Image.fromarray(noise).resize((width, height))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        picture(40 + i, 50, i).save(folder / f"{i}.jpg")
    return folder


def command(photos, run, out, *more):
    options = ["--weights", str(run), "--best", "--device", "cpu", "--out", str(out)]
    return [sys.executable, "-m", "afa_nb.predict", str(photos), *options, *more]


def contents(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_killed_and_continued_gives_the_same_files(photos, run, predictor, tmp_path):
    for i in range(6, 40):
        picture(64, 64, i).save(photos / f"{i}.jpg")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command(photos, run, tmp_path / "out", "--overlays"), **quiet)
    deadline = time.time() + 300
    while len(list((tmp_path / "out").glob("*.png"))) < 3 and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    masks = [p for p in (tmp_path / "out").glob("*.png") if not p.name.startswith(".")]
    assert 3 <= len(masks) < 40
    for mask in masks:
        read_mask(mask, len(CLASSES))
    report = predict.predict_folder(predictor, photos, tmp_path / "out", overlays=True)
    assert len(report.skipped) >= 3 and len(report.done) + len(report.skipped) == 40
    predict.predict_folder(predictor, photos, tmp_path / "whole", overlays=True)
    whole, continued = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert {k: v for k, v in continued.items() if not Path(k).name.startswith(".")} == whole


def test_command_line(photos, run, tmp_path):
    "0: all done; 1: some failed and are named; 2: nothing was started."
    (photos / "text.jpg").write_text("not a picture")
    done = subprocess.run(command(photos, run, tmp_path / "out"), capture_output=True, text=True)
    assert done.returncode == 1 and "6 masks written" in done.stdout
    assert "text.jpg: cannot be read as an image" in done.stderr
    assert "6/7" in done.stderr or "7/7" in done.stderr, "the progress bar"
    assert predict.main(command(photos / "0.jpg", run, tmp_path / "out", "--quiet")[3:]) == 0
    with pytest.raises(SystemExit) as error:
        predict.main(["--protocol", "best"])
    assert error.value.code == 2


WRONG = [
    (dict(run="nowhere"), "nowhere holds no config.json: is it a run's folder?"),
    (dict(photos="nowhere"), "nowhere: no such image or folder"),
    (dict(out="file"), "file: cannot be written to"),
    (dict(tags="zebra.csv"), "tag 'zebra' is not one of the network's classes: cow, person, yak"),
    (dict(tags="short.csv"), "has no row for it"),
    (dict(run="no_checkpoint"), "best holds no weights: nothing was measured"),
    (dict(photos="empty"), "there is no picture in this folder"),
]


def name_of(x):
    return "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else ""


@pytest.mark.parametrize("more, message", WRONG, ids=name_of)
def test_wrong_arguments(photos, run, tmp_path, capsys, more, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "zebra.csv").write_text("image,tags\n" + "".join(f"{i}.jpg,zebra\n" for i in range(6)))
    (tmp_path / "short.csv").write_text("image,tags\n0.jpg,cow\n")
    open_run(preset("demo", run_dir=str(tmp_path / "no_checkpoint")), CLASSES)
    paths = dict(photos=photos, run=run, out="out") | {k: v for k, v in more.items() if k != "tags"}
    paths = {k: tmp_path / v for k, v in paths.items()}
    tags = ["--tags", str(tmp_path / more["tags"])] if "tags" in more else []
    assert predict.main(command(paths["photos"], paths["run"], paths["out"], "--quiet", *tags)[3:]) == 2
    error = capsys.readouterr().err
    print(error)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_half_written(photos, predictor, tmp_path, monkeypatch):
    save = Image.Image.save

    def save_until_full(self, file, *args, **kwargs):
        if full and "P" == self.mode:
            Path(file).write_bytes(b"\x89PNG half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, file, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save_until_full)
    full = True
    report = predict.predict_folder(predictor, photos, tmp_path / "out")
    assert len(report.failed) == 6 and "could not be written (No space left on device)" in report.failed["0"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["confidence.csv", "predict.json"]
    full = False
    assert len(predict.predict_folder(predictor, photos, tmp_path / "out").done) == 6


def test_pictures_come_upright(predictor, tmp_path):
    image = picture(48, 80)
    exif = Image.Exif()
    exif[0x0112] = 8
    image.rotate(-90, expand=True).save(tmp_path / "lying.jpg", exif=exif, quality=95)
    assert Image.open(tmp_path / "lying.jpg").size == (48, 80)
    mask, _ = predictor(tmp_path / "lying.jpg")
    assert mask.shape == (48, 80)


def test_modes_of_pictures(predictor, tmp_path):
    for mode, name in (("L", "l.png"), ("CMYK", "c.jpg"), ("P", "p.png"), ("RGBA", "a.png"), ("1", "b.png")):
        picture(40, 44).convert(mode).save(tmp_path / name)
        assert predictor(tmp_path / name).mask.shape == (40, 44)


def test_memory_stays_bounded(run, tmp_path):
    "6 megapixels: 64 classes at that size would take 1.5 GB of logits."
    code = """
import resource, sys, numpy as np, torch
from afa_nb.model import AFANet
from afa_nb.predict import Predictor
torch.manual_seed(0)
predictor = Predictor(AFANet(64, "mit_tiny", decoder_dim=16), [str(i) for i in range(64)], long_side=256, max_side=512)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
predictor(np.zeros((64, 64, 3), np.uint8))
before, image = peak(), np.random.default_rng(0).integers(0, 255, (2000, 3000, 3), np.uint8)
assert predictor(image).mask.shape == (2000, 3000)
print(round(peak() - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 800, f"{done.stdout} MB"


def test_earlier_masks_are_not_taken_for_pictures(photos, predictor):
    predict.predict_folder(predictor, photos, photos / "masks")
    assert len(predict.predict_folder(predictor, photos, photos / "more", overlays=True).done) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_file_names_that_are_not_text(photos, predictor, tmp_path):
    os.rename(photos / "0.jpg", os.fsencode(photos) + b"/caf\xe9.jpg")
    name = os.fsdecode(b"caf\xe9")
    assert name in predict.predict_folder(predictor, photos, tmp_path / "out").done
    assert name in predict.read_confidences(tmp_path / "out/confidence.csv")
    assert name in predict.predict_folder(predictor, photos, tmp_path / "out").skipped


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_end_with_a_killed_parent(photos, run, tmp_path):
    def marked(p):
        try:
            return b"AFA_NB_TEST_WORKERS" in (p / "environ").read_bytes()
        except OSError:
            return False

    def alive():
        return {p.name for p in Path("/proc").iterdir() if p.name.isdigit() and marked(p)}

    for i in range(6, 60):
        picture(300, 300, i).save(photos / f"{i}.jpg")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    marker = os.environ | dict(AFA_NB_TEST_WORKERS="1")
    process = subprocess.Popen(command(photos, run, tmp_path / "out", "--crf"), env=marker, **quiet)
    deadline = time.time() + 300
    while not list((tmp_path / "out").glob("*.png")) and time.time() < deadline:
        time.sleep(0.05)
    assert len(alive()) > 1
    process.kill()
    process.wait()
    while alive() and time.time() < deadline:
        time.sleep(0.2)
    assert not alive()


def test_masks_of_two_networks_do_not_mix(photos, predictor, tmp_path):
    predict.predict_folder(predictor, photos, tmp_path / "out")
    torch.manual_seed(1)
    other = predict.Predictor(AFANet(len(CLASSES), "mit_tiny", stride=8, decoder_dim=64), CLASSES, long_side=None)
    with pytest.raises(ValueError, match="made with other weights: choose another folder, or overwrite"):
        predict.predict_folder(other, photos, tmp_path / "out")
    assert len(predict.predict_folder(other, photos, tmp_path / "out", overwrite=True).done) == 6
    assert json.loads((tmp_path / "out/predict.json").read_text())["weights"] == other.settings()["weights"]


def test_crf_in_processes_gives_what_one_call_gives(photos, predictor, tmp_path):
    pytest.importorskip("pydensecrf.densecrf")
    refined = predict.Predictor(predictor.net, CLASSES, long_side=None, crf=True)
    predict.predict_folder(refined, photos, tmp_path / "out", crf_workers=2)
    for i in range(6):
        np.testing.assert_array_equal(read_mask(tmp_path / f"out/{i}.png"), refined(photos / f"{i}.jpg").mask)
    rows = list(csv.reader(open(tmp_path / "out/confidence.csv")))
    assert rows[0] == ["image", *CLASSES[1:]] and [r[0] for r in rows[1:]] == list("012345")
    assert all(0 <= float(c) <= 1 for r in rows[1:] for c in r[1:])


def test_onnx_of_the_papers_network(tmp_path):
    "At the paper's stride and a size that is no multiple of it."
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = AFANet(5, "mit_b0", decoder_dim=32).eval()
    file = predict.export_onnx(net, tmp_path / "seg.onnx", (72, 100))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [p.name for p in tmp_path.iterdir()] == ["seg.onnx"], "one file"
    x = torch.rand(2, 3, 72, 100)
    with torch.inference_mode():
        expected = predict._Segmentation(net)(x)
    np.testing.assert_allclose(session.run(["logits"], {"image": x.numpy()})[0], expected.numpy(), atol=1e-4)


def test_the_last_line_counts_what_was_left_out_and_what_shows_nothing(photos, run, tmp_path, capsys):
    for name in ("IMG_1.HEIC", "IMG_2.heic", "DSC_3.NEF"):
        (photos / name).write_bytes(b"not read here")
    Image.fromarray(np.zeros((40, 50), np.uint16)).save(photos / "dark.png")
    assert predict.main(command(photos, run, tmp_path / "out", "--quiet")[3:]) == 0
    said = capsys.readouterr()
    last = said.out.splitlines()[-1]
    assert "out: 7 masks written, 0 existed already, 1 picture doubtful. Left out, because the format " in last
    assert "1 NEF" in last and ("2 HEIC" in last or "HEIF" in Image.OPEN)
    assert "  dark: " in said.err and "dark.png shows nothing but black" in said.err
