"""The explorer on every layout of data: a run on COCO's and one on tagged images, opened and turned by code."""

import json
from html import unescape

import numpy as np
import pytest
from PIL import Image

from afa_nb.explorer import Explorer, open_bench
from afa_nb.files import save_mask
from afa_nb.settings import preset
from afa_nb.training import train

pytest.importorskip("ipyevents", reason="the widgets are not installed: pip install 'afa_nb[dev]'")
CLASSES = ["background", "cat", "dog"]


def tiny_run(folder, **changes):
    "A run of two iterations."
    tiny = dict(max_iters=2, crop_size=64, batch_size=2, radius=2, eval_every=2)
    return train(preset("demo", run_dir=str(folder), **tiny, **changes), verbose=False, ladder=())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AFA_NB_CACHE", str(tmp_path / "cache"))


def picture(file, k, seed=0):
    "A picture with a square of class k; gives its corners."
    top, left, side = 10, 20, 24 + k
    pixels = np.random.default_rng((k, seed)).integers(0, 99, (72, 96, 3), dtype=np.uint8)
    pixels[top : top + side, left : left + side, k] = 250
    Image.fromarray(pixels).save(file)
    return [left, top, left + side, top, left + side, top + side, left, top + side]


@pytest.fixture
def coco(tmp_path):
    "Pictures in COCO's layout: of train2014 one, of val2014 two."
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split, numbers in (("train2014", [1]), ("val2014", [1, 2])):
        (root / split).mkdir()
        squares = {k: picture(root / split / f"{k}.png", k) for k in numbers}
        rest = dict(iscrowd=0, area=1, bbox=[0, 0, 1, 1])
        images = [dict(id=k, file_name=f"{k}.png", height=72, width=96) for k in squares]
        objects = [dict(id=k, image_id=k, category_id=k, segmentation=[squares[k]], **rest) for k in squares]
        categories = [dict(id=k, name=name) for k, name in enumerate(CLASSES) if k]
        index = dict(images=images, annotations=objects, categories=categories)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def tagged(tmp_path):
    "Three tagged pictures in sub-folders; one has a mask."
    root = tmp_path / "tagged"
    for seed, (name, k) in enumerate((("cat/tom", 1), ("cat/felix", 1), ("dog/rex", 2))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        left, top, right, _, _, bottom, *_ = picture(root / f"{name}.png", k, seed)
    mask = np.zeros((72, 96), np.uint8)
    mask[top:bottom, left:right] = 2
    (tmp_path / "masks/dog").mkdir(parents=True)
    save_mask(mask, tmp_path / "masks/dog/rex.png")
    return root


def test_coco(coco, tagged, tmp_path):
    run = tiny_run(tmp_path / "run", data_root=str(coco), train_split="train2014", val_split="val2014")
    explorer = Explorer(run)
    c = explorer.controls
    assert (c["split"].options, c["split"].value, c["image"].max) == (("train2014", "val2014"), "val2014", 1)
    assert (explorer.bench.own_tags, explorer.bench.mask.unique().tolist()) == (("cat",), [0, 1])
    c["image"].value = 1
    assert (explorer.bench.name, explorer.bench.own_tags) == ("2", ("dog",))
    c["split"].value = "train2014"
    assert (explorer.bench.name, c["image"].value, c["image"].max) == ("1", 0, 0)
    assert "split='train2014'" in unescape(explorer.line.value)
    c["data_root"].value = str(tagged)  # the same classes
    assert (c["split"].options, explorer.bench.name, explorer.bench.mask) == (("all",), "cat/felix", None)
    assert "Error" not in explorer.message.value
    c["data_root"].value = ""
    assert (c["split"].value, explorer.bench.name) == ("val2014", "1")
    c["data_root"].value = str(tmp_path / "nowhere")
    assert "FileNotFoundError" in explorer.message.value and explorer.bench.name == "1"


def test_tagged_images(tagged, tmp_path):
    masks = str(tmp_path / "masks")
    run = tiny_run(tmp_path / "run", data_root=str(tagged), masks=masks, train_split="all", val_split="masked")
    explorer = Explorer(run)
    c = explorer.controls
    assert (c["split"].options, c["split"].value, explorer.bench.name) == (("all", "masked"), "masked", "dog/rex")
    assert explorer.bench.scores(explorer.bench.mask.long())[1] == 1
    c["split"].value = "all"
    assert (explorer.bench.name, explorer.bench.mask, c["image"].max) == ("cat/felix", None, 2)
    assert explorer.bench.figure() and open_bench(run, "cat/tom", split="all").own_tags == ("cat",)
    with pytest.raises(IndexError, match="no picture 1 in masked: it has 1"):
        open_bench(run, 1)
    with pytest.raises(FileNotFoundError, match="neither a picture file nor a name in masked"):
        open_bench(run, "cat/tom")
