"""Pictures of any depth and range, with damaged or turning EXIF, with names spelled in two ways; those left out."""

import sys
import unicodedata
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from afa_nb import predict
from afa_nb.data import problems, voc
from afa_nb.files import find_files, match_names, oddity, read_image, save_mask, sizes
from afa_nb.model import AFANet
from afa_nb.sources import read_tags, tagged_images

GREY = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))  # (48,64)
GREY[:, -1] = 255


def nfc(name):
    return unicodedata.normalize("NFC", name)


def nfd(name):
    return unicodedata.normalize("NFD", name)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AFA_NB_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    net = AFANet(3, "mit_tiny", stride=8, decoder_dim=16)
    return predict.Predictor(net, ["background", "cow", "yak"], "single", long_side=64)


# ---------------------------------------------------------------- brightness

G = GREY.astype(float)
RANGES = {
    "16 bits": (G * 257).astype(np.uint16),
    "14 of 16 bits": (G * 64).astype(np.uint16),
    "12 of 16 bits": (G * 16).astype(np.uint16),
    "10 of 16 bits": (G * 4).astype(np.uint16),
    "8 of 16 bits": GREY.astype(np.uint16),
    "16 of 32 bits": (G * 257).astype(np.int32),
    "24 of 32 bits": (G * 65793).astype(np.int32),
    "negative integers": (G * 16 - 1000).astype(np.int32),
    "float to 1": (G / 255).astype(np.float32),
    "float to 1.2": (G / 255 * 1.2).astype(np.float32),
    "float from -1 to 1": (G / 127.5 - 1).astype(np.float32),
    "float to 5": (G / 51).astype(np.float32),
    "float to 255": G.astype(np.float32),
    "float to 260": (G * 260 / 255).astype(np.float32),
    "float to 4095": (G * 16).astype(np.float32),
    "float to 65535": (G * 257).astype(np.float32),
    "float to 1e9": (G * 1e9).astype(np.float32),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_read_alike(tmp_path, name):
    "Up to a grey level; what exceeds white is cut off."
    Image.fromarray(RANGES[name]).save(tmp_path / "x.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_image(tmp_path / "x.tif")
    over = 1.2 if name == "float to 1.2" else 260 / 255 if name == "float to 260" else 1
    np.testing.assert_allclose(np.asarray(read)[..., 0], np.minimum(G * over, 255), atol=1)
    assert oddity(read) == ""


def test_every_value_of_16_bits_is_what_it_was(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "x.png"))[..., 1], values // 257)


def test_a_dark_picture_comes_out_brighter_and_never_darker(tmp_path):
    for highest in (300, 1100, 4200, 17000):
        Image.fromarray((G / 255 * highest).astype(np.uint16)).save(tmp_path / "x.png")
        assert 60 <= np.asarray(read_image(tmp_path / "x.png")).max() <= 255, highest


FLAT = {
    "black": np.zeros((48, 64), np.uint16),
    "white": np.full((48, 64), 65535, np.uint16),
    "one colour": np.full((48, 64), 0.5, np.float32),
    "black ": np.full((48, 64), np.nan, np.float32),
    "white ": np.full((48, 64), 300, np.float32) + np.float32(G / 255),  # kelvin
    "black  ": np.dstack([GREY // 17] * 3),  # 12 of 16 bits in colour: the upper 8 bits
}


@pytest.mark.parametrize("look", FLAT)
def test_what_shows_nothing_is_told(tmp_path, predictor, look):
    file = tmp_path / "own" / "cow" / "a.tif"
    file.parent.mkdir(parents=True)
    Image.fromarray(FLAT[look]).save(file)
    Image.fromarray(GREY).save(file.with_name("b.png"))
    says = f"shows nothing but {look.strip()}: its values are "
    assert says in oddity(read_image(file)) and not oddity(read_image(file.with_name("b.png")))
    assert any(str(file) in p and says in p for p in problems(tagged_images(tmp_path / "own")))
    report = predict.predict_folder(predictor, tmp_path / "own", tmp_path / "out")
    assert report.done == ["cow/a", "cow/b"] and [*report.odd] == ["cow/a"] and says in report.odd["cow/a"]


@pytest.mark.parametrize("kind, value", [(np.float32, -9999), (np.int32, -9999), (np.uint16, 65535)])
def test_a_few_values_far_from_all_others_are_told(tmp_path, kind, value):
    picture = (G * 4).astype(kind)
    picture[0, 5] = value
    Image.fromarray(picture).save(tmp_path / "a.tif")
    assert "nearly all are" in oddity(read_image(tmp_path / "a.tif"))


def test_a_night_sky_is_a_picture(tmp_path):
    sky = np.zeros((64, 64), np.uint8)
    sky[::20, ::20] = 255
    Image.fromarray(sky).save(tmp_path / "a.png")
    assert oddity(read_image(tmp_path / "a.png")) == ""


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3.4e38])
def test_what_is_no_number_is_told(tmp_path, value):
    values = (G / 255).astype(np.float32)
    values[:3, :4] = value
    Image.fromarray(values).save(tmp_path / "x.tif")
    read = read_image(tmp_path / "x.tif")
    assert oddity(read).startswith("holds 12 values that are no numbers")
    np.testing.assert_array_equal(np.asarray(read)[3:, :, 0], GREY[3:])
    assert (np.asarray(read)[:3, :4] == (255 if value == np.inf else 0)).all()


# ---------------------------------------------------------------- EXIF


def turned_exif(orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return exif


DAMAGED = {
    "cut short": b"Exif\0\0II*\0\x08\0",
    "empty": b"Exif\0\0",
    "garbage": b"Exif\0\0garbage",
    "doubled header": b"Exif\0\0Exif\0\0II*\0\x08\0\0\0\0\0",
    "far away": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "an orientation that is text": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
    "an orientation of 99": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", DAMAGED)
def test_damaged_exif_stops_nothing(tmp_path, predictor, exif, extension):
    file = tmp_path / "p" / f"a.{extension}"
    file.parent.mkdir()
    Image.fromarray(GREY).convert("RGB").save(file, exif=DAMAGED[exif])
    with Image.open(file) as opened:
        for read in (read_image(file), read_image(opened), predict.to_picture(str(file))):
            assert read.size == (64, 48) and abs(np.asarray(read)[..., 0] - G).max() < 20
    assert sizes(file) == ((64, 48), (64, 48))
    assert predict.predict_folder(predictor, file.parent, tmp_path / "out").failed == {}


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("extension", ["png", "webp", "tif"])
def test_turned_once_through_any_door(tmp_path, extension, orientation):
    "The way back is tried out: a second reading turns nothing."
    file, odd = tmp_path / f"a.{extension}", np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    lossless = dict(lossless=True) if extension == "webp" else {}
    Image.fromarray(odd).convert("RGB").save(file, exif=turned_exif(orientation), **lossless)
    expected = [odd[:, ::-1], odd[::-1, ::-1], odd[::-1], odd.T, np.rot90(odd, -1), odd[::-1, ::-1].T, np.rot90(odd)]
    with Image.open(file) as opened:
        for read in (read_image(file), read_image(opened), read_image(read_image(file))):
            np.testing.assert_array_equal(np.asarray(read)[..., 0], expected[orientation - 2])
    assert sizes(file) == ((3, 2), (2, 3) if orientation > 4 else (3, 2))


def test_the_turn_is_found_though_the_rest_is_damaged(tmp_path):
    "A maker's note that cannot be written again is no reason to leave the picture lying."
    exif = bytearray(turned_exif().tobytes())
    exif[-20:] = b"\xff" * 20
    Image.fromarray(GREY).save(tmp_path / "a.jpg", exif=bytes(exif))
    assert read_image(tmp_path / "a.jpg").size == (48, 64)


@pytest.mark.parametrize("extension", ["jpg", "png", "tif"])
def test_a_mask_drawn_before_the_turn_is_named_so(tmp_path, extension):
    save_mask(GREY // 128, tmp_path / "masks" / "a.png")
    Image.fromarray(GREY).convert("RGB").save(tmp_path / f"a.{extension}", exif=turned_exif())
    (tmp_path / "tags.csv").write_text("image,tags\na,cow\n")
    said = ("a.png is 64×48 pixels, but its image .*/a.* is 48×64. The mask was drawn on the pixels before the turn "
            "that the photograph's EXIF asks for: turn it too")
    with pytest.raises(ValueError, match=said):
        tagged_images(tmp_path, masks=tmp_path / "masks")[0]
    save_mask(np.zeros((5, 6), int), tmp_path / "masks" / "a.png")
    with pytest.raises(ValueError, match="is 48×64$"):
        tagged_images(tmp_path, masks=tmp_path / "masks")[0]


# ---------------------------------------------------------------- names

SPELLINGS = [
    (nfd("café.jpg"), nfc("café.jpg")),
    (nfc("naïf.jpg"), nfd("naïf.jpg")),
    (nfd("hôtel/é.jpg"), nfc("hôtel\\é")),
    ("sub/d.jpg", "sub\\d.jpg"),
    ("sub/d.JPG", "./sub/d.jpg"),
    ("IMG_1.jpeg", "IMG_1.JPEG"),
    ("day.1.png", "day.1"),
]


@pytest.mark.parametrize("file, row", SPELLINGS)
def test_one_name_everywhere(tmp_path, predictor, file, row):
    "A table, a folder of masks, a list and afa-predict take the same spellings."
    own, masks, stem = tmp_path / "own", tmp_path / "masks", row.replace("\\", "/")
    stem = stem.removesuffix(".jpg").removesuffix(".JPEG")
    (own / file).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(GREY).convert("RGB").save(own / file)
    save_mask(GREY // 128, masks / f"{stem}.PNG")
    (own / "tags.csv").write_text(f"image,tags\n{row},cow\n", "utf-8")
    dataset = tagged_images(own, masks=masks)
    assert dataset.counts() == {"cow": 1} and dataset.records[0].image == str(own / file) and dataset.has_masks
    assert find_files(own, [stem]) == [str(own / file)]
    files = predict.find_pictures(own, tmp_path / "out")
    allowed = predict.allowed_classes(predictor, files, read_tags(own / "tags.csv"))
    assert [a.tolist() for a in allowed.values()] == [[True, True, False]]


def test_voc_list_and_tags_may_be_spelled_otherwise(tmp_path):
    for folder, end in (("JPEGImages", "JPG"), ("SegmentationClass", "png")):
        (tmp_path / folder).mkdir()
        for name in (nfd("café"), "b"):
            save_mask(GREY // 128, tmp_path / folder / f"{name}.{end}") if end == "png" else Image.fromarray(
                GREY).save(tmp_path / folder / f"{name}.{end}")
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text(nfc("café\nb\n"), "utf-8")
    (tmp_path / "tags.csv").write_text(f"{nfd('café')}.jpg,cow\nb.jpg,dog\n", "utf-8")
    dataset = voc(tmp_path, tags="file")
    assert dataset.has_masks and dataset.counts()["cow"] == dataset.counts()["dog"] == 1


def test_capitals_count_but_are_hinted_at(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "Cow.jpg")
    for row in ("cow.jpg", "Cow.png"):
        (tmp_path / "tags.csv").write_text(f"image,tags\n{row},cow\n")
        with pytest.raises(FileNotFoundError, match=f"{row}: no such image, but tags.csv lists it; Cow.jpg is there"):
            tagged_images(tmp_path)


@pytest.mark.skipif(sys.platform == "darwin", reason="one file there")
def test_two_files_of_one_name_are_told(tmp_path, predictor):
    for name in (nfc("é.png"), nfd("é.png"), "b.png"):
        Image.fromarray(GREY).save(tmp_path / name)
    with pytest.raises(ValueError, match="may be .* or .*; write which .accents can be stored in two ways; rename one"):
        match_names([nfc("é.png")], [nfc("é.png"), nfd("é.png")], "t.csv")
    with pytest.raises(ValueError, match="both are 'é', remove one"):
        find_files(tmp_path, ["é"])
    (tmp_path / "tags.csv").write_text("é.png,cow\nb.png,cow\n", "utf-8")
    with pytest.raises(ValueError, match="may be"):
        tagged_images(tmp_path)
    with pytest.raises(ValueError, match="the masks of both would be called é.png; rename one"):
        predict.predict_folder(predictor, tmp_path, tmp_path / "out")


def test_a_row_that_is_there_twice_in_two_spellings(tmp_path):
    (tmp_path / "tags.csv").write_text(f"image,tags\n{nfc('é.jpg')},cow\n{nfd('é.JPG')},dog\n", "utf-8")
    with pytest.raises(ValueError, match="line 3: .* is there twice"):
        read_tags(tmp_path / "tags.csv")


# ---------------------------------------------------------------- left out


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "DSC_2.NEF", "clip.mov"])
def test_what_is_left_out_is_counted(tmp_path, predictor, name):
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / name).write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    counted = f": 1 {name.split('.')[1].upper()}. Save"
    with pytest.raises(ValueError, match=f"there is no picture in this folder. Left out, .*{counted}"):
        predict.predict_folder(predictor, folder, tmp_path / "out")
    Image.fromarray(GREY).save(folder / "a.png")
    report = predict.predict_folder(predictor, [folder, folder / "a.png"], tmp_path / "out")
    assert report.done == ["a"] and counted in report.left_out
    Image.fromarray(GREY).save(tmp_path / "b.png")
    assert predict.predict_folder(predictor, tmp_path / "b.png", tmp_path / "out").left_out == ""


def test_a_heic_says_how_to_read_it(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        with pytest.raises(OSError, match="a.heic: cannot be read .*unknown format; pip install pillow-heif reads it"):
            read_image(tmp_path / "a.heic")
