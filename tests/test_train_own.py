"""A folder of photographs and a table of tags, run headlessly as a user runs it."""

import csv
import json
from pathlib import Path

import numpy as np
import papermill
import pytest
from PIL import Image

from afa_nb.data import read_mask, tagged_images, voc
from afa_nb.shapes import make_shapes
from afa_nb.training import configure

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "train_own.ipynb"
OTHER = dict(
    stride=8,
    decoder_dim=32,
    radius=3,
    cam_iters=2,
    aff_iters=4,
    cam_scales=[1],
    par_iters=2,
    dilations=[1, 2],
    long_side=None,
    lambda_reg=0.0,
)


def folder_with_table(root, folder, split="train"):
    "A data set in VOC's layout as people have theirs: photographs in a folder, and a table."
    dataset = voc(root, split)
    folder.mkdir()
    rows = [["image", "tags"]]
    for record, labels in zip(dataset.records, dataset.class_labels):
        Image.open(record.image).save(folder / Path(record.image).name)
        rows.append(
            [
                Path(record.image).name,
                ";".join(c for c, there in zip(dataset.classes[1:], labels) if there) or "background",
            ]
        )
    with open(folder / "tags.csv", "w", newline="") as f:
        csv.writer(f).writerows(rows)
    (folder / "classes.txt").write_text("\n".join(dataset.classes) + "\n")
    return dataset


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=12, num_val=2, size=64)


@pytest.fixture
def parameters(shapes, tmp_path):
    folder_with_table(shapes, tmp_path / "photos")
    return dict(
        folder=str(tmp_path / "photos"),
        backbone="mit_tiny",
        weights="none",
        max_iters=6,
        batch_size=4,
        crop_size=64,
        num_workers=0,
        run_dir=str(tmp_path / "run"),
        crf=False,
        pictures=3,
        other=json.dumps(OTHER),
    )


def run(parameters, folder):
    out = folder / "out.ipynb"
    papermill.execute_notebook(NOTEBOOK, out, parameters, kernel_name="python3", progress_bar=False)
    outputs = [output for cell in json.loads(out.read_text())["cells"] for output in cell.get("outputs", [])]
    return outputs, "".join(
        "".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/markdown", [])) for o in outputs
    )


def test_without_any_mask(parameters, tmp_path):
    outputs, text = run(parameters, tmp_path)
    photos, masks = Path(parameters["folder"]), tmp_path / "run" / "masks"
    names = sorted(p.stem for p in photos.glob("*.png"))
    assert (
        sorted(p.stem for p in masks.glob("*.png"))
        == sorted(p.stem for p in (masks / "overlays").glob("*.jpg"))
        == names
        and len(names) == 12
    )
    table = {
        row["image"]: set(row["tags"].split(";")) | {"background"} for row in csv.DictReader(open(photos / "tags.csv"))
    }
    classes = (photos / "classes.txt").read_text().split()
    for name in names:
        mask = read_mask(masks / f"{name}.png", len(classes))
        assert mask.shape == (64, 64) and {classes[k] for k in np.unique(mask)} <= table[f"{name}.png"]
    rows = list(csv.DictReader(open(masks / "confidence.csv")))
    assert [r["image"] for r in rows] == names and [*rows[0]] == ["image", *classes[1:]]
    assert "On fewer than 10 images" in text and "nothing can be measured" in text and "confidence where tagged" in text
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3, "images, curves, masks"
    again = run(parameters, tmp_path)[1]
    assert "this run is finished" in again and "0 masks written, 12 were there" in again


def test_masks_of_some_images_only_measure(parameters, shapes, tmp_path):
    masks = tmp_path / "photos" / "drawn"
    masks.mkdir()
    for record in voc(shapes, "train").records[:3]:
        (masks / f"{record.name}.png").write_bytes(Path(record.mask).read_bytes())
    outputs, text = run(parameters | dict(masks=str(masks)), tmp_path)
    assert "whole image one of its tags" in text and "| 3 " in text
    assert len(list((tmp_path / "run/masks").glob("*.png"))) == 12, "the masks are no photographs"


def test_no_folder(parameters, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="give the folder of photographs"):
        run({}, tmp_path)


def test_iterations_grow_with_the_number_of_images(tmp_path):
    (tmp_path / "many").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "many/0.png")
    for i in range(1, 1600):
        (tmp_path / f"many/{i}.png").hardlink_to(tmp_path / "many/0.png")
    (tmp_path / "many/tags.csv").write_text(
        "image,tags\n" + "".join(f"{i}.png,{'cow' if i % 2 else 'background'}\n" for i in range(1600))
    )
    assert configure(str(tmp_path / "many"), weights="none", say=lambda _: None).max_iters == 15 * 1600 // 8


MSRC = Path(__file__).resolve().parents[2] / "shared" / "data" / "msrc21"


@pytest.mark.skipif(not MSRC.exists(), reason="needs the photographs of MSRC-21, which are not part of the project")
def test_photographs_with_a_table_are_the_data_set_they_were(tmp_path):
    expected = folder_with_table(MSRC, tmp_path / "photos")
    found = tagged_images(tmp_path / "photos")
    assert found.classes == expected.classes and [r.name for r in found.records] == [r.name for r in expected.records]
    assert (found.class_labels == expected.class_labels).all()
