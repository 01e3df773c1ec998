"""Masks as people have them: colours, renumbered palettes, paint programs' 255, other orders, other sizes.

What is certain is read, the rest is told before the first step."""

import io

import numpy as np
import pytest
from PIL import Image

from afa_nb import checks
from afa_nb.data import VOC_CLASSES, problems, summary, voc
from afa_nb.files import mask_values, read_mask, save_mask, voc_palette
from afa_nb.settings import configure, open_data
from afa_nb.sources import tagged_images
from afa_nb.training import train

MASK = np.zeros((24, 32), np.uint8)
MASK[2:12, 4:20], MASK[14:20, 5:15], MASK[12:14] = 15, 12, 255


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AFA_NB_CACHE", str(tmp_path / "cache"))


def palette_png(path, numbers, colours):
    im = Image.fromarray(np.asarray(numbers, np.uint8))
    im.putpalette(np.asarray(colours, np.uint8).tobytes())
    im.save(path)
    return path


def half(value):
    return np.repeat(np.uint8([[0] * 20 + [value] * 12]), 24, axis=0)


@pytest.fixture
def own(tmp_path):
    "Makes a folder of pictures with tags.csv and masks: pairs of tags and mask (an array or an image)."

    def make(*pairs, classes=None):
        folder, masks = tmp_path / "photos", tmp_path / "masks"
        folder.mkdir(), masks.mkdir()
        rows = ["image,tags"]
        for i, (tags, mask) in enumerate(pairs):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 32, 3), np.uint8)).save(folder / f"{i}.png")
            rows.append(f"{i}.png,{tags}")
            if isinstance(mask, Image.Image):
                mask.save(masks / f"{i}.png")
            else:
                save_mask(mask, masks / f"{i}.png")
        (folder / "tags.csv").write_text("\n".join(rows))
        if classes:
            (folder / "classes.txt").write_text("\n".join(["background", *classes]))
        return folder

    return make


def settings(folder, **changes):
    return configure(
        str(folder),
        say=lambda *args: None,
        masks=str(folder.parent / "masks"),
        run_dir=str(folder.parent / "run"),
        weights="none",
        backbone="mit_tiny",
        **changes,
    )


def refused(folder, **changes):
    "The message of a training that does not begin: no folder is made."
    with pytest.raises((ValueError, OSError)) as error:
        train(settings(folder, **changes), verbose=False)
    assert not (folder.parent / "run").exists()
    return str(error.value)


# ---------------------------------------------------------------- what a mask's numbers and colours mean


@pytest.mark.parametrize("kind", ["adaptive", "quantized", "RGB", "RGBA", "reversed"])
def test_vocs_colours_say_which_class(tmp_path, kind):
    rgb, path = Image.fromarray(voc_palette()[MASK]), tmp_path / "a.png"
    if kind == "adaptive":
        rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(path)
    elif kind == "quantized":
        rgb.quantize(4).save(path)
    elif kind == "reversed":
        palette_png(path, 255 - MASK, voc_palette()[::-1])
    else:
        rgb.convert(kind).save(path)
    assert np.array_equal(read_mask(path, 21), MASK)
    assert np.flatnonzero(mask_values(path, 21)).tolist() == [0, 12, 15, 255]


@pytest.mark.parametrize(
    "colours",
    [
        np.repeat(np.arange(256)[:, None], 3, axis=1),  # grey: 128 is no car
        [[0, 0, 0], [0, 128, 0], [128, 0, 0], [255, 255, 255]],  # dark green before dark red, as in VOC, and white
        [[0, 0, 0], [0, 0, 128], [64, 0, 0]],  # VOC's colours of numbers that are no classes here
        voc_palette(),
    ],
)
def test_other_palettes_keep_their_numbers(tmp_path, colours):
    path = palette_png(tmp_path / "a.png", half(2), colours)
    assert np.array_equal(read_mask(path, 3), half(2))


@pytest.mark.parametrize("colours, used", [(21, (0, 15, 255)), (21, (15, 255)), (0, (0, 3))])
def test_black_after_the_last_colour_does_not_mean_background(tmp_path, colours, used):
    palette = np.concatenate([voc_palette()[:colours], np.zeros((256 - colours, 3), np.uint8)])
    mask = np.resize(np.uint8(used), (24, 32))
    assert np.array_equal(read_mask(palette_png(tmp_path / "a.png", mask, palette)), mask)


def test_a_grey_mask_saved_as_rgb_is_no_bus(tmp_path):
    Image.fromarray(half(128)).convert("RGB").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"holds other colours, for example \(0, 0, 0\)"):
        read_mask(tmp_path / "a.png", 21)


def test_masks_of_one_bit_hold_0_and_1_and_fractions_are_no_classes(tmp_path):
    Image.fromarray(half(1).astype(bool)).save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png", 3), half(1))
    assert np.flatnonzero(mask_values(tmp_path / "a.png", 3)).tolist() == [0, 1]
    Image.fromarray(half(1) / np.float32(2)).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match="b.tif: holds fractions"):
        mask_values(tmp_path / "b.tif", 3)


def jpeg(mask):
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "JPEG", quality=80)
    return file


GREY = np.random.default_rng(0).choice(np.uint8([0, 1, 2, 255]), (24, 32))


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (Image.fromarray(np.uint8([[[255, 0, 0], [0, 0, 0]]])), ["RGB", "(255, 0, 0)", "PNG of class indices"]),
        (Image.fromarray(np.stack([half(1)] * 3, -1)), ["RGB", "(1, 1, 1)"]),
        (Image.open(jpeg(GREY)).copy(), ["come from JPEG", "nearest neighbour"]),
        (Image.open(jpeg(voc_palette()[GREY])).copy(), ["blurred by JPEG"]),
        (Image.fromarray(np.uint8([[0, 127, 254]])), ["0, 127, 254", "divide the masks by 127"]),
        (Image.fromarray(np.uint8([[0, 85, 170, 255]])), ["divide the masks by 85"]),
        (Image.fromarray(np.uint8([[0, 7]])), ["holds the value 7", "classes.txt"]),
        (Image.fromarray(np.uint16([[0, 300]])), ["300"]),
        (Image.fromarray(half(1)).convert("LA"), ["LA", "PNG of class indices"]),
    ],
)
def test_what_could_mean_anything_is_refused(tmp_path, picture, words):
    picture.save(tmp_path / "a.png")
    for read in (read_mask, mask_values):
        with pytest.raises(ValueError) as error:
            read(tmp_path / "a.png", 4)
        assert all(w in str(error.value) for w in [str(tmp_path / "a.png"), *words]), error.value


def test_a_jpeg_is_refused_whatever_it_is_called(tmp_path):
    (tmp_path / "a.png").write_bytes(jpeg(half(1)).getvalue())
    with pytest.raises(ValueError, match="a.png: is a JPEG.*PNG"):
        read_mask(tmp_path / "a.png", 3)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 9), (24, 32)])
def test_all_values_are_seen(tmp_path, shape):
    mask = np.random.default_rng(0).choice(np.uint8([0, 3, 9, 255]), shape)
    save_mask(mask, tmp_path / "a.png")
    assert np.flatnonzero(mask_values(tmp_path / "a.png")).tolist() == np.unique(mask).tolist()


# ---------------------------------------------------------------- masks without any class


def test_masks_of_0_and_255_are_refused_where_something_is_tagged(own):
    folder = own(("crack", half(255)), ("background", half(0)), ("crack", half(255)))
    said = refused(folder)
    assert "only the values 0, 255" in said and "1 for 'crack'" in said and "divide" in said
    dataset = tagged_images(folder, masks=folder.parent / "masks")
    assert any("divide" in p for p in problems(dataset)) and "divide" in summary(dataset)


def test_masks_that_are_all_background_are_refused_where_something_is_tagged(own):
    assert "only the values 0, so none shows a class" in refused(own(("crack", half(0)), ("background", half(0))))


def test_some_masks_of_0_and_255_are_told(own):
    folder = own(("crack", half(1)), ("crack", half(255)), ("background", half(0)), ("background", half(0)))
    said = problems(open_data(settings(folder))[1])
    assert any("1 of 4 masks show no class" in s and "1.png" in s for s in said)


def voc_root(root, *masks, tags=None):
    for sub in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (root / sub).mkdir(parents=True)
    for i, mask in enumerate(masks):
        Image.new("RGB", mask.shape[::-1]).save(root / f"JPEGImages/{i}.jpg")
        save_mask(mask, root / f"SegmentationClass/{i}.png")
    for split in ("train", "val"):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(map(str, range(len(masks)))))
    if tags:
        (root / "tags.csv").write_text("\n".join(f"{i},{t}" for i, t in enumerate(tags)))
    return root


def test_vocs_layout_needs_a_class_in_some_mask(tmp_path):
    with pytest.raises(ValueError, match="this mask and 2 more hold only the values 0, 255.*1 for 'aeroplane'"):
        voc(voc_root(tmp_path / "painted", half(255), half(0), half(255)))
    assert voc(voc_root(tmp_path / "mixed", half(255), half(4))).counts()["boat"] == 1
    assert voc(voc_root(tmp_path / "void", half(255))).counts()["boat"] == 0  # one alone may be right


# ---------------------------------------------------------------- masks against tags

ORDERS = {"two": ["person", "cow"], "three": ["yak", "cow", "person"]}


@pytest.mark.parametrize("drawn", ORDERS.values(), ids=ORDERS)
def test_another_order_is_found(own, drawn):
    tags = [drawn[i % len(drawn)] for i in range(12)]
    folder = own(*((t, half(1 + drawn.index(t))) for t in tags), ("background", half(0)))
    said = "".join(problems(open_data(settings(folder))[1]))
    n = sum(sorted(drawn).index(t) != drawn.index(t) for t in tags)
    assert f"{n} of 13 masks hold a class that is not among the tags" in said
    assert f"in this order: background, {', '.join(drawn)}." in said and "classes.txt" in said
    assert "0.png: it holds" in said
    assert f"background, {', '.join(drawn)}" in refused(folder)
    (folder / "classes.txt").write_text("\n".join(["background", *drawn]))
    assert not any("among the tags" in p for p in problems(open_data(settings(folder))[1]))


def test_some_wrong_tags_are_told_and_trained_on(own):
    folder = own(*(("cow", half(1)), ("person", half(2))) * 3, ("cow", half(2)))
    _, val = open_data(settings(folder))
    said = checks.check_masks(val, strict=True)
    assert len(said) == 1 and said[0].startswith("1 of 7 masks") and said[0].endswith("Correct the tags, or the masks.")
    assert "6.png: it holds person, and the tags are cow." in said[0]


def test_masks_without_a_tagged_object_do_not_contradict(own):
    folder = own(("cow;person", half(1)), ("person", half(2)), ("cow", half(1)), ("background", half(0)))
    assert checks.check_masks(open_data(settings(folder))[1], strict=True) == []


def test_vocs_masks_are_compared_with_a_table(tmp_path):
    tags = ["cat", "dog"] * 3
    masks = [half(VOC_CLASSES.index(t)) for t in reversed(tags)]
    root = voc_root(tmp_path / "VOC", *masks, tags=tags)
    said = "".join(problems(voc(root)))
    assert "6 of 6 masks" in said and "it holds dog, and the tags are cat." in said
    assert "bus, car, dog, chair, cow, diningtable, cat," in said


# ---------------------------------------------------------------- before the first step

GOOD = [("cow", half(1)), ("person", half(2)), ("background", half(0))]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((26, 32), np.uint8), ["32×26", "32×24", "1 of 4"]),
        (half(7), ["holds the value 7"]),
        (Image.new("RGB", (32, 24)), ["RGB", "black"]),
        (Image.new("RGB", (32, 24), "red"), ["RGB", "(255, 0, 0)"]),
    ],
)
def test_a_mask_that_cannot_be_used_stops_the_run_before_it_begins(own, mask, words):
    said = refused(own(*GOOD, ("cow", mask)))
    assert all(w in said for w in ["3.png", *words]), said


def test_black_rgb_masks_are_background_among_vocs_colours(own):
    colours = [(tags, Image.fromarray(voc_palette()[mask])) for tags, mask in GOOD]
    _, val = open_data(settings(own(*colours)))
    assert [np.unique(val.read_mask(i)).tolist() for i in range(3)] == [[0, 1], [0, 2], [0]]


def test_a_picture_that_cannot_be_opened_stops_the_run_before_it_begins(own):
    folder = own(*GOOD)
    (folder / "1.png").write_text("<html>404</html>")
    assert "1.png: cannot be read as an image" in refused(folder)


def test_much_is_looked_at_once_and_more_than_much_is_sampled(own, monkeypatch):
    folder = own(*GOOD * 67, ("cow", half(2)))
    first = problems(open_data(settings(folder))[1])
    assert any(s.startswith("1 of 202 masks hold") for s in first)
    with monkeypatch.context() as patch:
        for name in ("mask_values", "sizes"):
            patch.setattr(checks, name, lambda *args: pytest.fail("looked at again"))
        assert problems(open_data(settings(folder))[1]) == first
    monkeypatch.setattr(checks, "MOST_MASKS", 2)
    said = problems(open_data(settings(folder))[1])
    assert any(s.startswith("1 of 2 masks looked at hold") for s in said)
