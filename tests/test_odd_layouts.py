"""Folders that are something else than they seem, lists of pairs, and pictures in formats that cannot be read."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa_nb import data, files
from afa_nb.data import read_classes, voc
from afa_nb.files import image_extensions, save_mask, unreadable_below
from afa_nb.settings import configure, open_data
from afa_nb.sources import layout, load, tag_splits, tagged_images


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AFA_NB_CACHE", str(tmp_path_factory.mktemp("cache")))


def put(root, *files):
    "Small pictures, each its own; masks where the extension is .png; other files are text."
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(map(ord, str(file)))
        if path.suffix == ".png":
            save_mask(np.random.default_rng(seed).integers(0, 2, (12, 16)), path)
        elif path.suffix == ".jpg":
            Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)).save(path)
        else:
            path.write_text("x")
    return root


def opened(root, **changes):
    return open_data(configure(str(root), say=lambda *a: None, weights="none", backbone="mit_tiny", **changes))


# ---------------------------------------------------------------- parts of another layout


@pytest.mark.parametrize(
    "files, words",
    [
        (["JPEGImages/a.jpg", "SegmentationClass/a.png", "class_names.txt"], "lacks ImageSets/Segmentation.*train.txt"),
        (["JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Main/train.txt"], "ImageSets/Main has such lists"),
        (["images/a.jpg", "masks/a.png"], "images, masks: folders called so.*rows such as images/a.jpg,cow"),
        (["Images/a.jpg", "Ground Truth/a.png"], "Ground Truth, Images"),
        (["train_images/a.jpg", "train_masks/a.png"], "train_images, train_masks"),
        (["images/training/a.jpg", "annotations/training/a.png"], "annotations, images"),
        (["leftImg8bit/train/ulm/a.png", "gtFine/train/ulm/a.png"], "gtFine, leftImg8bit"),
        (["images/train/a.jpg", "labels/train/a.txt"], "labels/train/a.txt is in YOLO's format"),
        (["train/images/a.jpg", "train/labels/a.txt", "val/images/b.jpg"], "train/labels/a.txt is in YOLO's format"),
        (["train/a.jpg", "train/_annotations.coco.json", "valid/b.jpg"], "move it to annotations/instances_train.json"),
        (["train/a.jpg", "train/_classes.csv", "valid/b.jpg"], "train/_classes.csv is a table"),
        (["train/a.jpg", "test/b.jpg"], "one folder for each tag, as in train/cow/1.jpg"),
        (["train/images/a.jpg", "train/masks/a.png"], "train: folders called so"),
        (["a.jpg", "b.jpg", "masks/a.png"], "masks: folders called so"),
        (["train/cow/a.jpg", "train/dog/b.jpg", "more/c.jpg"], "train: folders called so"),
        (["photos/cow/a.jpg", "photos/dog/a.jpg"], "all images lie in photos.*Give that folder"),
        (["VOC2007/JPEGImages/a.jpg", "VOC2007/SegmentationClass/a.png"], "all images lie in VOC2007"),
        (["cow.heic", "dog.heic"], "cannot be read here.*2 HEIC"),
    ],
)
def test_parts_of_another_layout_are_no_tags(tmp_path, files, words):
    put(tmp_path, *files)
    for call in (lambda: layout(tmp_path), lambda: opened(tmp_path), lambda: tagged_images(tmp_path)):
        with pytest.raises((FileNotFoundError, ValueError), match=words) as error:
            call()
    print(error.value)


def test_a_table_of_tags_makes_any_folder_a_data_set(tmp_path):
    "Tags may then be called as they like."
    put(tmp_path, "images/a.jpg", "images/b.jpg", "masks/a.png")
    (tmp_path / "tags.csv").write_text("images/a.jpg,images\nimages/b.jpg,train\n")
    assert tagged_images(tmp_path).classes == ["background", "images", "train"]


@pytest.mark.parametrize(
    "names", [["car", "train"], ["invalid", "valid"], ["with_mask", "without_mask"], ["bus", "cow"]]
)
def test_honest_tags(tmp_path, names):
    "A railway train is a tag, and a note asks."
    dataset = tagged_images(put(tmp_path, *(f"{name}/{i}.jpg" for name in names for i in range(2))))
    assert dataset.counts() == dict.fromkeys(names, 2) and layout(tmp_path) == "tagged"
    asked = any("counts as a tag like its neighbours" in p for p in data.problems(dataset))
    assert asked == bool({"train", "valid"} & set(names))


@pytest.mark.parametrize(
    "pictures, masks",
    [
        ("input/{}.jpg", "target/{}.png"),
        ("img_dir/train/{}.jpg", "ann_dir/train/{}.png"),
        ("Train/Rural/images_png/{}.jpg", "Train/Rural/masks_png/{}.png"),
        ("raw_full/{}.jpg", "approved_full/{}_L.png"),
        ("DUTS-TR-Image/{}.jpg", "DUTS-TR-Mask/{}.png"),
    ],
)
def test_folders_of_masks_are_no_tags(tmp_path, pictures, masks):
    put(tmp_path, *(kind.format(i) for kind in (pictures, masks) for i in range(3)))
    with pytest.raises(FileNotFoundError, match="tags.csv"):
        layout(tmp_path)


def test_class_folders_with_the_same_names_are_no_masks(tmp_path):
    put(tmp_path, *(f"{tag}/{i}.jpg" for tag in ("cat", "dog") for i in range(3)))
    drawn = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
    (tmp_path / "yak").mkdir()
    for i in range(3):
        Image.fromarray(drawn).save(tmp_path / f"yak/{i}.png")
    assert tagged_images(tmp_path).classes[1:] == ["cat", "dog", "yak"]


def test_masks_beside_their_images_are_left_out(tmp_path):
    put(tmp_path, "benign/1.jpg", "benign/1_mask.png", "normal/2.jpg", "normal/2_mask_1.png", "__MACOSX/normal/2.jpg")
    dataset = tagged_images(tmp_path)
    assert dataset.counts() == dict(benign=1, normal=1)
    assert "they look like masks of the images beside them: benign/1_mask.png" in " ".join(data.problems(dataset))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_lists_in_other_encodings_are_named(tmp_path, encoding):
    (tmp_path / "classes.txt").write_bytes("background\nkühe\n".encode(encoding))
    with pytest.raises(ValueError, match="classes.txt: not UTF-8"):
        read_classes(tmp_path)


@pytest.mark.parametrize("text", ["image,tags\na.jpg,\"['cat', 'dog']\"\n", "a.jpg,[cat]\n"])
def test_lists_as_python_prints_them_are_no_tags(tmp_path, text):
    put(tmp_path, "a.jpg")
    (tmp_path / "tags.csv").write_text(text)
    with pytest.raises(ValueError, match="looks like a part of a list. Write tags as in cat;dog"):
        tagged_images(tmp_path)


def test_a_table_with_tabs_may_be_called_csv(tmp_path):
    put(tmp_path, "a.jpg")
    (tmp_path / "tags.csv").write_text("image\ttags\na.jpg\tcat;dog\n")
    assert tagged_images(tmp_path).classes[1:] == ["cat", "dog"]


def test_a_folder_of_masks_that_is_not_there_is_named(tmp_path):
    put(tmp_path, "cat/a.jpg", "dog/b.jpg")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        tagged_images(tmp_path, masks=tmp_path / "nowhere")


def test_a_truncated_picture_of_val_is_told_before_training(tmp_path):
    put(tmp_path, *(f"{split}/{i}.jpg" for split in ("cat", "dog") for i in range(3)))
    put(tmp_path.parent / "masks", *(f"{split}/{i}.png" for split in ("cat", "dog") for i in range(3)))
    path = tmp_path / "dog/2.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(OSError, match="2.jpg: cannot be read as an image"):
        opened(tmp_path, masks=str(tmp_path.parent / "masks"))


def test_the_same_folders_in_every_folder_are_asked_about(tmp_path):
    dataset = tagged_images(put(tmp_path, *(f"{a}/{b}/1.jpg" for a in ("colour", "grey") for b in ("apple", "pear"))))
    assert dataset.classes[1:] == ["colour", "grey"]
    assert any("apple, pear: if those are the tags" in p for p in data.problems(dataset))


# ---------------------------------------------------------------- class folders in splits


@pytest.mark.parametrize("train, val", [("train", "val"), ("training_set", "test_set"), ("Train", "Validation")])
def test_splits_of_class_folders(tmp_path, train, val):
    put(tmp_path, f"{train}/cow/1.jpg", f"{train}/dog/1.jpg", f"{train}/dog/2.jpg", f"{val}/dog/3.jpg")
    put(tmp_path, f"{val}/yak/4.jpg", f"{val}/loose.jpg")
    dataset, valset = opened(tmp_path)
    assert valset is None and tag_splits(tmp_path) == sorted([train, val])
    assert dataset.counts() == dict(cow=1, dog=2, yak=0), "the classes of all splits, the images of train"
    other = load(tmp_path, val)
    assert other.classes == dataset.classes and other.counts() == dict(cow=0, dog=1, yak=1)
    assert f"Left out for want of tags: {val}/loose.jpg." in data.problems(dataset)
    assert len(load(tmp_path, "all")) == 5
    with pytest.raises(FileNotFoundError, match=f"no such split; there is: {', '.join(sorted([train, val]))}"):
        load(tmp_path, "dev")


def test_a_test_split_without_tags_and_a_train_among_the_classes(tmp_path):
    put(tmp_path, "train/car/1.jpg", "train/train/2.jpg", "test/3.jpg")
    assert load(tmp_path, "train").counts() == dict(car=1, train=1) and tag_splits(tmp_path) == ["train"]


def test_splits_are_measured_with_masks_of_any_image(tmp_path):
    put(tmp_path, "photos/train/cow/1.jpg", "photos/train/dog/2.jpg", "photos/val/cow/3.jpg", "masks/val/cow/3.png")
    dataset, valset = opened(tmp_path / "photos", masks=str(tmp_path / "masks"))
    assert [r.name for r in valset.records] == ["val/cow/3"] and len(dataset) == 2


# ---------------------------------------------------------------- masks in the folder of the photographs


@pytest.mark.parametrize("table", [True, False])
def test_masks_among_the_photographs_are_not_left_out_images(tmp_path, table):
    put(tmp_path, "cow/a.jpg", "dog/b.jpg", "masks/cow/a.png")
    if table:
        (tmp_path / "tags.csv").write_text("cow/a.jpg,cow\ndog/b.jpg,dog\n")
    train, val = opened(tmp_path, masks=str(tmp_path / "masks"))
    assert train.counts() == dict(cow=1, dog=1) and len(val) == 1 and not train.has_masks
    assert not any("Left out" in p for p in data.problems(train) + data.problems(val))


def test_masks_that_nobody_named_are_asked_about(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg", "spare.jpg", "masks/a.png")
    (tmp_path / "tags.csv").write_text("a,cow\nb,dog\n")
    said = data.problems(tagged_images(tmp_path))
    assert any(p.startswith("masks/a.png: called as the images are.") for p in said)
    assert "Left out for want of tags: spare.jpg." in said


# ---------------------------------------------------------------- names of classes


@pytest.mark.parametrize(
    "file, text",
    [
        ("class_names.txt", "_background_\ncow\n"),
        ("labels.txt", "__ignore__\n_background_\ncow\n"),
        ("classes.txt", "background\ncow\n"),
    ],
)
def test_lists_of_classes_as_labelme_calls_them(tmp_path, file, text):
    put(tmp_path, "cow/a.jpg")
    put(tmp_path, "background/b.jpg")
    (tmp_path / file).write_text(text)
    for classes in (read_classes(tmp_path), tagged_images(tmp_path).classes):
        assert len(classes) == 2 and "background" in classes[0] and classes[1] == "cow"
    (tmp_path / file).write_text("cow\n")
    with pytest.raises(ValueError, match=f"{file}: needs 'background' first"):
        tagged_images(tmp_path)


# ---------------------------------------------------------------- lists


@pytest.fixture
def devkit(tmp_path):
    put(tmp_path, "JPEGImages/a.jpg", "JPEGImages/b.jpg", "SegmentationClass/a.png", "SegmentationClass/b.png")
    put(tmp_path, "SegmentationClassAug/a.png", "SegmentationClassAug/b.png", "ImageSets/Segmentation/train.txt")
    put(tmp_path, "images/a c.jpg", "images/d.jpg", "gt/a.png", "images/d_mask.png")
    for i, name in enumerate("ab"):  # other classes than in SegmentationClass
        save_mask(np.full((12, 16), 5 + i), tmp_path / f"SegmentationClassAug/{name}.png")
    return tmp_path


def listed(devkit, text, **kwargs):
    (devkit / "ImageSets/Segmentation/train.txt").write_text(text)
    return voc(devkit, "train", **kwargs)


@pytest.mark.parametrize(
    "line",
    [
        "/JPEGImages/a.jpg /SegmentationClassAug/a.png",
        "JPEGImages/a.jpg SegmentationClassAug/a.png",
        "JPEGImages/a.jpg,SegmentationClassAug/a.png",
        "VOCdevkit/VOC2012/JPEGImages/a.jpg\tVOCdevkit/VOC2012/SegmentationClassAug/a.png",
        "/home/me/VOC2012/JPEGImages/a.jpg /home/me/VOC2012/SegmentationClassAug/a.png",
        "JPEGImages\\a.jpg SegmentationClassAug\\a.png",
        "JPEGImages/a.JPG SegmentationClassAug/a.PNG",
    ],
)
def test_pairs_give_the_mask_of_the_list(devkit, line):
    (record,) = (dataset := listed(devkit, line + "\n")).records
    assert (record.name, Path(record.image), Path(record.mask)) == (
        "a",
        devkit / "JPEGImages/a.jpg",
        devkit / "SegmentationClassAug/a.png",
    )
    assert dataset.class_labels.nonzero()[:, 1].tolist() == [4] and dataset[0]["mask"].unique().tolist() == [5]


@pytest.mark.parametrize("line", ["b", "b.jpg", "b.png", "JPEGImages/b.jpg", "/JPEGImages/b", "b.JPG"])
def test_names_are_written_in_several_ways(devkit, line):
    (record,) = listed(devkit, line).records
    assert record.name == "b" and Path(record.mask) == devkit / "SegmentationClass/b.png"


def test_pairs_of_other_folders_beside_names(devkit):
    dataset = listed(devkit, "b\n\nimages/a c.jpg gt/a.png\nimages/d.jpg images/d_mask.png\n")
    assert [r.name for r in dataset.records] == ["b", "images/a c", "images/d"]
    assert [Path(r.mask).name for r in dataset.records] == ["b.png", "a.png", "d_mask.png"]
    assert all("mask" in sample for sample in dataset)


def test_a_listed_mask_that_is_not_there_is_not_replaced(devkit):
    text = "JPEGImages/a.jpg gone/a.png\n"
    with pytest.raises(FileNotFoundError, match=r"gone/a.png: no such mask \(1 of 1"):
        (devkit / "tags.csv").write_text("a,cow\n")
        listed(devkit, text, masks=True)
    assert listed(devkit, text).records[0].mask is None


@pytest.mark.parametrize(
    "text, words",
    [
        ("b\na -1\n", r"train.txt, line 2 lists 'a -1'.*a name without extension, or a pair"),
        ("b\na 1\n", "line 2 lists 'a 1'"),
        ("\nJPEGImages/a.jpg SegmentationClass/a.png 3\n", "line 2 lists"),
        ("JPEGImages/z.jpg SegmentationClass/a.png\n", r"line 1 lists 'JPEGImages/z.jpg' \(1 of 1"),
        ("b\n/JPEGImages/b.jpg /SegmentationClass/a.png\n", "'b' is listed 2 times"),
        ("b\n../JPEGImages/a.jpg ../../secret.png\n", "line 2: .*leads out of"),
        ("e\n", "e.cr2 is in a format that cannot be read here"),
    ],
)
def test_lines_that_are_neither_are_named(devkit, text, words):
    put(devkit, "JPEGImages/e.cr2")
    with pytest.raises((FileNotFoundError, ValueError), match=words) as error:
        listed(devkit, text)
    print(error.value)


# ---------------------------------------------------------------- formats that cannot be read


@pytest.mark.parametrize("name", ["tags.csv", None])
def test_formats_that_cannot_be_read_are_counted(tmp_path, name):
    put(tmp_path, "cow/a.jpg", "dog/b.jpg", "cow/c.CR2", "cow/d.cr2", "dog/film.MOV", "dog/old.mpg", "dog/notes.txt")
    put(tmp_path, "drawn/x.nef")
    if name:
        (tmp_path / name).write_text("cow/a,cow\ndog/b,dog\n")
    summary = data.summary(tagged_images(tmp_path, leave_out=tmp_path / "drawn"))
    assert "cannot be read here: 2 CR2, 1 MOV, 1 MPG." in summary and "TXT" not in summary


def test_nothing_is_said_where_all_can_be_read(tmp_path):
    assert unreadable_below(put(tmp_path, "a.jpg", "notes.txt", ".hidden.cr2")) == ""
    assert not {".mpg", ".h5", ".wmf"} & image_extensions(), "PIL knows these names, but cannot read the files"


def test_pillow_heif_is_used_where_it_is_installed(monkeypatch):
    called = []
    fake = types.SimpleNamespace(register_heif_opener=lambda: called.append("once"))
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    spec = importlib.util.spec_from_file_location("afa_nb.files_again", files.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert called == ["once"]
