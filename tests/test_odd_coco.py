"COCO annotations as other people write them: read sensibly, or named with file and entry."

import json

import numpy as np
import pytest
from PIL import Image

from afa_nb.coco import coco
from afa_nb.data import problems
from afa_nb.settings import open_data, preset
from afa_nb.sources import load
from afa_nb.training import train


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AFA_NB_CACHE", str(tmp_path / "cache"))


def box(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


SQUARE = [box(10, 10, 20, 20)]
CATEGORIES = [dict(id=3, name="cow"), dict(id=9, name="dog")]
BOX_ONLY = dict(bbox=[10, 10, 20, 20])


def write(root, annotations, images=(1, 2, 3), categories=CATEGORIES, splits=("val2014",)):
    "`annotations`: (image id, category id, other fields); `images`: ids, or fields that replace the usual ones."
    images = [i if isinstance(i, dict) else dict(id=i) for i in images]
    images = [dict(height=48, width=64, file_name=f"{i['id']}.jpg") | i for i in images]
    annotations = [dict(image_id=i, category_id=c, segmentation=SQUARE, iscrowd=0) | more for i, c, more in annotations]
    for split in splits:
        (root / split).mkdir(parents=True)
        for image in images:
            Image.new("RGB", (64, 48)).save(root / split / str(image["file_name"]))
        about = dict(images=images, annotations=annotations, categories=categories)
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(about))
    return root


def without(field):
    def remove(entry):
        del entry[field]

    return remove


def edit(root, change, split="val2014", key="annotations"):
    path = root / f"annotations/instances_{split}.json"
    about = json.loads(path.read_text())
    for entry in about[key]:
        change(entry)
    path.write_text(json.dumps(about))
    return root


def labels(dataset):
    return {record.name: row for record, row in zip(dataset.records, dataset.class_labels.tolist(), strict=True)}


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("ids", [(1, 3, 9), (7, 0, 250), ("1", "3", "9"), ("1", 3, 9.0), ("a1", "cat-3", "cat-9")])
def test_ids_with_gaps_zero_or_as_text(tmp_path, ids):
    image, cow, dog = ids
    categories = [dict(id=dog, name="dog"), dict(id=cow, name="cow")]
    root = write(tmp_path / "c", [(image, dog, {}), (image, dog, {})], [dict(id=image, file_name="1.jpg")], categories)
    dataset = coco(root, "val2014")
    assert dataset.classes == ["background", "cow", "dog"] and labels(dataset) == {"1": [0, 1]}
    assert set(np.unique(dataset.read_mask(0))) == {0, 2}


def test_an_id_may_be_text_here_and_a_number_there(tmp_path):
    root = write(tmp_path / "c", [("2", "3", dict(id=5)), (2.0, 9, dict(id=5, iscrowd="1"))], ["1", 2])
    dataset = coco(root, "val2014")
    assert labels(dataset) == {"2": [1, 1]}, "annotations with the same id are both read"
    assert set(np.unique(dataset.read_mask(0))) == {0, 1}, "the crowd lies below"


@pytest.mark.parametrize(
    "images, categories, words",
    [
        ([dict(id=1), dict(id="1", file_name="b.jpg")], CATEGORIES, "two images have the id 1"),
        ([1, dict(id=2, file_name="1.png")], CATEGORIES, "2 images have the file_name 1"),
        ([1], [*CATEGORIES, dict(id="3", name="goat")], "two categories have the id 3: cow and goat"),
        ([1], [*CATEGORIES, dict(id=4, name="cow")], "class 'cow' is listed 2 times"),
        ([1], [*CATEGORIES, dict(id=4, name=None)], r"entry 2 of categories is not one of COCO's \(name is None\)"),
    ],
)
def test_doubles_are_named(tmp_path, images, categories, words):
    root = write(tmp_path / "c", [(1, 3, {})], images, categories)
    with pytest.raises(ValueError, match=f"instances_val2014.json: .*{words}"):
        coco(root, "val2014")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(image_id=None), r"entry 1 of annotations .*image_id is None"),
        (dict(category_id=[3]), r"entry 1 of annotations .*category_id is \[3\]"),
        (dict(image_id=4), "entry 1 of annotations belongs to image 4, which the file does not list. Add it"),
        (dict(category_id="4"), "entry 1 of annotations has the category_id 4"),
        (dict(iscrowd="maybe"), "entry 1 of annotations .*iscrowd is 'maybe'"),
        (dict(segmentation="4,4,9,9"), "entry 1 of annotations, 1: .*not a segmentation"),
        (dict(segmentation=[[1, 2, 3, 4, 5]]), "entry 1 of annotations, 1: not a segmentation: an odd number"),
        (dict(segmentation=[[1, 2, 3, 4, 5, None]]), "entry 1 of annotations, 1: not a segmentation"),
        (dict(segmentation=[[1, 2, 3, 4, 5, 1e12]]), "entry 1 of annotations, 1: .*millions of pixels out of"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_entry(tmp_path, change, words):
    root = write(tmp_path / "c", [(1, 3, {}), (1, 3, change)])
    with pytest.raises(ValueError, match=f"instances_val2014.json.*{words}"):
        coco(root, "val2014")


# ---------------------------------------------------------------- background, sizes, polygons


@pytest.mark.parametrize("number, name", [(0, "background"), (5, "Background"), (99, "_background_")])
def test_a_category_called_background_is_no_class(tmp_path, number, name):
    categories = [*CATEGORIES, dict(id=number, name=name)]
    everywhere = dict(segmentation=[box(0, 0, 64, 48)])
    root = write(tmp_path / "c", [(1, number, everywhere), (1, 3, {}), (2, number, BOX_ONLY)], categories=categories)
    dataset = coco(root, "val2014")
    assert dataset.classes == ["background", "cow", "dog"]
    assert labels(dataset) == {"1": [1, 0], "2": [0, 0]}, "background alone says that none of the classes is shown"
    assert dataset.read_mask(0)[20, 20] == 1 and not dataset.read_mask(1).any()


def test_nothing_but_background_is_refused(tmp_path):
    root = write(tmp_path / "c", [(1, 0, {})], categories=[dict(id=0, name="background")])
    with pytest.raises(ValueError, match="its only category is background"):
        coco(root, "val2014")


@pytest.mark.parametrize("size", [dict(height=None, width=None), dict(height=0), dict(height="48", width="64.")])
def test_sizes_that_are_not_given_are_those_of_the_picture(tmp_path, size):
    size = {k: v.rstrip(".") if isinstance(v, str) else v for k, v in size.items()}
    dataset = coco(write(tmp_path / "c", [(1, 3, {})], [dict(id=1) | size]), "val2014")
    assert dataset.read_mask(0).shape == (48, 64) and dataset[0]["mask"].sum() == 400


def test_sizes_that_are_absent_and_the_picture_too(tmp_path):
    root = edit(write(tmp_path / "c", [(1, 3, {})], [1]), without("width"), key="images")
    assert coco(root, "val2014").read_mask(0).shape == (48, 64)
    (root / "val2014/1.jpg").unlink()
    edit(root, without("height"), key="images")
    with pytest.raises(ValueError, match="image 1 has no height and width, so its file is asked, but .*1.jpg"):
        coco(root, "val2014")


TWO_POINTS = [10, 10, 30, 30]


@pytest.mark.parametrize(
    "outline, area",
    [
        ([TWO_POINTS, *SQUARE], 400),  # pycocotools takes four numbers for a box, and the first decides for all
        ([*SQUARE, TWO_POINTS, []], 400),
        (SQUARE[0], 400),  # not in a list
        ([[10, 10], [30, 10], [30, 30], [10, 30]], 400),  # pairs
        ([[[10, 10], [30, 10], [30, 30], [10, 30]]], 400),
        ([TWO_POINTS], 0),
        ([[5, 5]], 0),
    ],
)
def test_polygons_that_enclose_nothing_are_not_drawn(tmp_path, outline, area):
    root = write(tmp_path / "c", [(1, 3, dict(segmentation=outline)), (2, 9, {})])
    dataset = coco(root, "val2014")
    assert labels(dataset) == {"1": [1, 0], "2": [0, 1]} and (dataset.read_mask(0) == 1).sum() == area
    thin = [note for note in dataset.notes if "1 polygons of fewer than three points" in note]
    assert bool(thin) == (TWO_POINTS in outline or area == 0)


def test_when_no_outline_encloses_anything_there_is_nothing_to_measure_with(tmp_path):
    root = write(tmp_path / "c", [(1, 3, dict(segmentation=[TWO_POINTS])), (2, 9, dict(segmentation=[TWO_POINTS]))])
    with pytest.raises(ValueError, match="2 of its 2 annotations have no segmentation of three points or more"):
        coco(root, "val2014")


# ---------------------------------------------------------------- boxes only

NO_OUTLINE = [without("segmentation")] + [lambda a, v=v: a.update(segmentation=v) for v in (None, [], {}, [[]])]


@pytest.mark.parametrize("change", NO_OUTLINE, ids=["absent", "null", "[]", "{}", "[[]]"])
def test_boxes_give_tags_but_no_masks(tmp_path, change):
    def second(entry):
        if entry["image_id"] == 2:
            change(entry)

    root = edit(write(tmp_path / "c", [(1, 3, {}), (2, 9, BOX_ONLY)]), second)
    dataset = coco(root, "val2014", masks=False)
    assert labels(dataset) == {"1": [1, 0], "2": [0, 1]}
    assert dataset.notes[0].startswith("Without segmentation: 1 of 2 instances. They give tags")
    assert not load(root, "val2014").has_masks, "as in VOC's layout: masks if all have one"
    for attempt in (coco, load):
        with pytest.raises(
            ValueError, match=r"val2014.json: 1 of its 2 annotations have no segmentation \(the first is entry 1"
        ):
            attempt(root, "val2014", masks=True)


def test_a_run_is_refused_before_it_begins(tmp_path):
    root = write(tmp_path / "c", [(1, 3, {}), (2, 9, {})], splits=("train2014", "val2014"))
    edit(root, without("segmentation"), "val2014")
    tiny = dict(data_root=str(root), run_dir=str(tmp_path / "run"), train_split="train2014", val_split="val2014")
    with pytest.raises(ValueError, match="instances_val2014.json: 2 of its 2 annotations have no segmentation"):
        train(preset("demo", **tiny), verbose=False)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    "outline", [[[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]], [box(500, 500, 20, 20)], dict(size=[48, 64], counts=[48 * 64])]
)
def test_outlines_without_a_pixel_are_no_masks(tmp_path, outline):
    root = write(tmp_path / "c", [(1, 3, dict(segmentation=outline)), (2, 9, dict(segmentation=outline))])
    with pytest.raises(ValueError, match="no segmentation covers a pixel of its image: coordinates are in pixels"):
        coco(root, "val2014")
    root = write(tmp_path / "d", [(1, 3, dict(segmentation=outline)), (2, 9, {})])
    assert "Not drawn, because no pixel of the image lies inside: 1 instances." in coco(root, "val2014").notes


@pytest.mark.parametrize("counts", ["garbage!!", "00"])
def test_run_lengths_that_are_none_name_their_entry(tmp_path, counts):
    broken = dict(segmentation=dict(size=[48, 64], counts=counts))
    root = write(tmp_path / "c", [(1, 3, {}), (2, 9, broken)])
    with pytest.raises(ValueError, match="val2014.json, entry 1 of annotations, 2: not a segmentation"):
        coco(root, "val2014")


def test_pictures_of_another_size_than_listed_are_told_before_training(tmp_path):
    images = [dict(id=i, height=64, width=48) for i in (1, 2, 3)]
    root = write(tmp_path / "c", [(1, 3, {}), (2, 9, {})], images, splits=("train2014", "val2014"))
    with pytest.raises(ValueError, match=r"the mask of 1 is 48×64 pixels, but .*1.jpg is 64×48 \(2 of 2 differ\)"):
        open_data(preset("demo", data_root=str(root), train_split="train2014", val_split="val2014"))


def test_a_mark_of_utf8_before_the_json(tmp_path):
    root = write(tmp_path / "c", [(1, 3, {})])
    path = root / "annotations/instances_val2014.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(coco(root, "val2014")) == 1


# ---------------------------------------------------------------- negatives


def test_images_without_an_instance_take_part_where_that_is_asked_for(tmp_path):
    root = write(tmp_path / "c", [(1, 3, {}), (1, 9, {})], splits=("train2014", "val2014"))
    assert len(load(root, "val2014")) == 1 and len(load(root, "val2014", negatives=True)) == 3
    tiny = dict(data_root=str(root), train_split="train2014", val_split="val2014")
    sets = open_data(preset("demo", **tiny))
    assert [len(s) for s in sets] == [1, 1]
    said = " ".join(problems(sets[0]))
    assert "Left out because nothing is outlined: 2 images; the setting negatives lets them in" in said
    trained, val = open_data(preset("demo", **tiny, negatives=True))
    assert labels(trained) == labels(val) == {"1": [1, 1], "2": [0, 0], "3": [0, 0]}
    assert not val[1]["mask"].any() and "Left out" not in " ".join(problems(val))


def test_names_are_matched_however_they_are_spelled(tmp_path):
    root = write(tmp_path / "c", [(1, 3, {}), (2, 9, {})], [dict(id=1, file_name="Kuh é.jpg"), 2])
    (root / "val2014/Kuh é.jpg").rename(root / "val2014/Kuh e\u0301.JPG")
    dataset = coco(root, "val2014")
    assert dataset.records[0].name == "Kuh é" and dataset[0]["mask"].sum() == 400
