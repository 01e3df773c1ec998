"""VOC, SBD and COCO in their original file formats, through torchvision's own downloads from a local server.

Also your own tagged images, and what may go wrong on the way."""

import functools
import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

import afa_nb.coco
from afa_nb import data, files, sources
from afa_nb.coco import coco
from afa_nb.data import VOC_CLASSES, voc
from afa_nb.files import read_mask, save_mask
from afa_nb.sources import download_voc, prepare_sbd, tagged_images

SHARED = Path(__file__).resolve().parents[2] / "shared"
SIZE = 60, 40  # width, height
fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AFA_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)).save(path)


def digest(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- VOC and SBD

TRAIN, VAL, REST = ["2007_000032", "2007_000039"], ["2007_000033"], ["2008_000001", "2008_000002", "2008_000003"]
SBD_TRAIN, SBD_VAL = ["2007_000032", "2008_000002", "2008_000001"], ["2007_000033", "2008_000003"]


def mask_with(*labels):
    mask = np.zeros(SIZE[::-1], np.uint8)
    for i, label in enumerate(labels):
        mask[5:20, 10 * i : 10 * i + 8] = label
    return mask


def annotation(name, objects):
    "An XML file as in VOC's Annotations."
    parts = "".join(
        f"""
	<object>
		<name>{label}</name>
		<pose>Unspecified</pose>
		<truncated>0</truncated>
		<difficult>{difficult}</difficult>
		<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>
	</object>"""
        for label, difficult in objects
    )
    return f"""<annotation>
	<folder>VOC2012</folder>
	<filename>{name}.jpg</filename>
	<source><database>The VOC2007 Database</database><image>flickr</image></source>
	<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>
	<segmented>1</segmented>{parts}
</annotation>
"""


def voc_archive(folder):
    "VOCtrainval_11-May-2012.tar, with six images."
    root = folder / "VOCdevkit" / "VOC2012"
    for i, name in enumerate(TRAIN + VAL + REST):
        photo(root / f"JPEGImages/{name}.jpg", i)
    for sub in ("Annotations", "ImageSets/Segmentation", "ImageSets/Main", "SegmentationClass", "SegmentationObject"):
        (root / sub).mkdir(parents=True)
    for sub in ("Segmentation", "Main"):
        for split, names in dict(train=TRAIN, val=VAL, trainval=sorted(TRAIN + VAL)).items():
            (root / f"ImageSets/{sub}/{split}.txt").write_text("\n".join(names) + "\n")
    objects = {
        "2007_000032": [("aeroplane", 0), ("person", 1)],
        "2007_000039": [("tvmonitor", 0)],
        "2007_000033": [("aeroplane", 0)],
    }
    for name in TRAIN + VAL + REST:
        (root / f"Annotations/{name}.xml").write_text(annotation(name, objects.get(name, [("cow", 0)])))
    for name, labels in {
        "2007_000032": (1, 255),
        "2007_000039": (20, 255),
        "2007_000033": (1,),
    }.items():  # the difficult person is void
        save_mask(mask_with(*labels), root / f"SegmentationClass/{name}.png")
        save_mask(mask_with(*range(1, 1 + len(labels))), root / f"SegmentationObject/{name}.png")
    with tarfile.open(folder / "VOCtrainval_11-May-2012.tar", "w") as tar:
        tar.add(folder / "VOCdevkit", "VOCdevkit")
    return folder / "VOCtrainval_11-May-2012.tar"


def matlab(path, struct, segmentation, categories):
    "A mask as SBD stores it: a struct with a cell of sparse boundaries, the segmentation, and the categories."
    boundaries = np.empty((20, 1), object)
    for i in range(20):
        boundaries[i, 0] = scipy.sparse.csc_matrix(segmentation.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(
        path,
        {
            struct: dict(
                Boundaries=boundaries,
                Segmentation=segmentation,
                **{"Categories" if struct == "GTinst" else "CategoriesPresent": categories},
            )
        },
        do_compression=True,
    )


def sbd_archive(folder):
    "benchmark.tgz, with five images: one in VOC's train, one in its val."
    root = folder / "benchmark_RELEASE" / "dataset"
    for i, name in enumerate(SBD_TRAIN + SBD_VAL):
        photo(root / f"img/{name}.jpg", i)
        matlab(root / f"cls/{name}.mat", "GTcls", mask_with(10 + i), [10 + i])
        matlab(root / f"inst/{name}.mat", "GTinst", mask_with(1), [10 + i])
    for split, names in dict(train=SBD_TRAIN, val=SBD_VAL).items():
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")
    with tarfile.open(folder / "benchmark.tgz", "w:gz") as tar:
        tar.add(folder / "benchmark_RELEASE", "benchmark_RELEASE")
    return folder / "benchmark.tgz"


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    return voc_archive(folder), sbd_archive(folder)


@pytest.fixture
def server(archives, tmp_path, monkeypatch):
    """Both archives on a local web server, where torchvision looks for them.

    Gives the served folder, with `.asked`, the requests."""
    served = tmp_path / "served"
    served.mkdir()
    for archive in archives:
        shutil.copy(archive, served)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=served))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    publish(served, f"http://127.0.0.1:{httpd.server_port}", monkeypatch)
    yield served, asked
    httpd.shutdown()
    httpd.server_close()


def publish(served, address, monkeypatch):
    "Tell torchvision the addresses and the checksums of what is served."
    monkeypatch.setitem(
        DATASET_YEAR_DICT,
        "2012",
        DATASET_YEAR_DICT["2012"]
        | dict(url=f"{address}/VOCtrainval_11-May-2012.tar", md5=digest(served / "VOCtrainval_11-May-2012.tar")),
    )
    monkeypatch.setattr(SBDataset, "url", f"{address}/benchmark.tgz")
    monkeypatch.setattr(SBDataset, "md5", digest(served / "benchmark.tgz"))


@pytest.fixture
def unpacked(archives, tmp_path):
    "VOC and SBD side by side, unpacked by hand."
    for archive in archives:
        shutil.unpack_archive(archive, tmp_path)
    return tmp_path, tmp_path / "benchmark_RELEASE" / "dataset"


def test_from_an_empty_folder_to_train_aug(server, tmp_path):
    _, asked = server
    train = voc(tmp_path / "data", "train_aug", download=True)
    assert [r.name for r in train.records] == sorted(TRAIN + REST), (
        "VOC's train and SBD's train and val, without VOC's val"
    )
    labels = {s["name"]: sorted(set(s["mask"].unique().tolist()) - {0}) for s in train}
    assert labels == {
        "2007_000032": [1, 255],
        "2007_000039": [20, 255],
        "2008_000002": [11],
        "2008_000001": [12],
        "2008_000003": [14],
    }, "VOC's own masks where it has some"
    assert (tmp_path / "data/VOCdevkit/VOC2012/SegmentationClassAug/sha256.txt").read_text().count("\n") == 5
    assert len(voc(tmp_path / "data", "val")) == 1
    before = list(asked)
    assert len(voc(tmp_path / "data", "train_aug", download=True)) == 5 and asked == before, (
        "what is there is not fetched again"
    )


def test_tags_of_masks_and_of_xml_differ(unpacked):
    "A difficult object has a box but no pixel of its own."
    root, _ = unpacked
    tags = {
        source: [VOC_CLASSES[k + 1] for k in voc(root, "train", tags=source).class_labels[0].nonzero()[:, 0]]
        for source in ("masks", "xml")
    }
    assert tags == dict(masks=["aeroplane"], xml=["aeroplane", "person"])


def test_tags_of_large_sets_are_remembered_until_a_file_changes(unpacked, cache):
    root, _ = unpacked
    paths = sorted((root / "VOCdevkit/VOC2012/Annotations").iterdir())
    remembered = lambda: files.cached("tags", lambda: data.tags_from_xml(paths, VOC_CLASSES), paths)
    first = remembered()
    assert len(list((cache / "tags").iterdir())) == 1
    paths[0].write_text(annotation("x", [("sheep", 0)] * 2))
    assert not np.array_equal(remembered(), first)


def test_voc_remembers_the_tags_of_more_than_500_images(unpacked, cache, monkeypatch):
    folder = unpacked[0] / "VOCdevkit/VOC2012"
    names = [f"copy_{i:03}" for i in range(501)]
    for name in names:
        for sub, ext in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
            os.link(folder / f"{sub}/{TRAIN[0]}.{ext}", folder / f"{sub}/{name}.{ext}")
    (folder / "ImageSets/Segmentation/many.txt").write_text("\n".join(names))
    first = voc(folder, "many").class_labels
    monkeypatch.setattr(data, "tags_from_masks", lambda *args: pytest.fail("the masks are read again"))
    data.tags_from_masks.__name__ = "tags_from_masks"
    assert torch.equal(voc(folder, "many").class_labels, first) and first.sum() == 501


def test_archives_fetched_by_hand_are_used_and_kept(server, tmp_path):
    served, asked = server
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy(served / "VOCtrainval_11-May-2012.tar", root)
    download_voc(root)
    assert not asked and (root / "VOCtrainval_11-May-2012.tar").exists()
    shutil.rmtree(root / "VOCdevkit")
    (root / ".unpacking").mkdir()
    (root / "VOCtrainval_11-May-2012.tar").rename(
        root / ".unpacking/VOCtrainval_11-May-2012.tar"
    )  # as a kill leaves it
    download_voc(root)
    assert not asked and (root / "VOCtrainval_11-May-2012.tar").exists()


def test_segmentation_class_aug_from_elsewhere(unpacked):
    root, _ = unpacked
    aug = root / "VOCdevkit/VOC2012/SegmentationClassAug"
    aug.mkdir()
    for name in TRAIN + VAL + REST:
        save_mask(mask_with(3), aug / f"{name}.png")
    assert prepare_sbd(root) == aug
    assert [r.name for r in voc(root, "train_aug").records] == sorted(TRAIN + REST)


def slow(save, log=None):
    def slowly(mask, path):
        time.sleep(0.1)
        if log:
            log.write(f"{path.name}\n"), log.flush()
        save(mask, path)

    return slowly


@fork
def test_killed_conversion_is_picked_up(unpacked, monkeypatch):
    root, sbd = unpacked
    folder = root / "VOCdevkit/VOC2012"
    with monkeypatch.context() as patch:
        patch.setattr(sources, "save_mask", slow(save_mask))
        process = multiprocessing.get_context("fork").Process(target=prepare_sbd, args=(root, sbd))
        process.start()
        unfinished = folder / ".SegmentationClassAug.unfinished"
        while len(list(unfinished.glob("[!.]*.png"))) < 2 and process.is_alive():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    written = {p.name: p.stat().st_mtime_ns for p in unfinished.glob("[!.]*.png")}
    assert 2 <= len(written) < 5 and not (folder / "SegmentationClassAug").exists()
    done = prepare_sbd(root, sbd)
    assert len(voc(root, "train_aug")) == 5 and sorted(p.name for p in done.iterdir()) == [
        *(f"{n}.png" for n in sorted(TRAIN + REST)),
        "sha256.txt",
    ]
    assert {name: (done / name).stat().st_mtime_ns for name in written} == written, (
        "what was written before the kill is not written again"
    )


def killed_in(call, *args):
    "Runs `call` in a process that dies in the middle of its first image."

    def half(self, file, *args, **kwargs):
        Path(file).write_bytes(b"\x89PNG half of a mask")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", half)
        process = multiprocessing.get_context("fork").Process(target=call, args=args)
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL


@fork
def test_what_a_kill_leaves_of_a_file_is_passed_over(unpacked, own):
    "Half a mask lies beside the masks, under a name that no reader takes for one."
    root, sbd = unpacked
    unfinished = root / "VOCdevkit/VOC2012/.SegmentationClassAug.unfinished"
    killed_in(prepare_sbd, root, sbd)
    assert len(list(unfinished.iterdir())) == 1
    done = prepare_sbd(root, sbd)
    assert sorted(p.name for p in done.iterdir()) == [*(f"{n}.png" for n in sorted(TRAIN + REST)), "sha256.txt"]

    mask = done / f"{TRAIN[0]}.png"
    before = read_mask(mask)
    killed_in(save_mask, 1 - before.clip(max=1), mask)
    assert len(list(done.iterdir())) == 7 and np.array_equal(read_mask(mask), before), (
        "the old mask is there until the new one is whole"
    )
    assert len(voc(root, "train_aug")) == 5 and prepare_sbd(root, sbd) == done

    (own / "tags.csv").write_text(GOOD)
    dataset, there = tagged_images(own), set(own.iterdir())
    killed_in(save_mask, np.zeros(SIZE[::-1]), own / "new.png")
    (left,) = set(own.iterdir()) - there
    again = tagged_images(own)
    assert left.suffix == ".png" and again.records == dataset.records and again.notes == dataset.notes


@fork
def test_two_processes_at_once_prepare_once(unpacked, tmp_path, monkeypatch):
    root, sbd = unpacked
    with open(tmp_path / "log", "a") as log:
        monkeypatch.setattr(sources, "save_mask", slow(save_mask, log))
        processes = [
            multiprocessing.get_context("fork").Process(target=prepare_sbd, args=(root, sbd)) for _ in range(2)
        ]
        for p in processes:
            p.start()
        for p in processes:
            p.join(60)
    assert [p.exitcode for p in processes] == [0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == [f"{n}.png" for n in sorted(TRAIN + REST)]


def test_disk_full_while_masks_are_written(unpacked, monkeypatch):
    root, sbd = unpacked
    save, count = Image.Image.save, []

    def full(self, f, *args, **kwargs):
        count.append(f)
        if len(count) < 3:
            return save(self, f, *args, **kwargs)
        Path(f).write_bytes(b"\x89PNG half of a mask")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(
            OSError, match=r"\.png: cannot be written \(No space left on device\).*make room and call again"
        ) as error:
            prepare_sbd(root, sbd)
    print(error.value)
    folder = root / "VOCdevkit/VOC2012"
    assert not (folder / "SegmentationClassAug").exists()
    there = list((folder / ".SegmentationClassAug.unfinished").iterdir())
    assert len(there) == 2 and all(read_mask(p, 21).any() for p in there)
    assert len(list(prepare_sbd(root, sbd).glob("*.png"))) == 5


def refused(call, archive, *words):
    with pytest.raises(OSError) as error:
        call()
    print(error.value)
    assert archive in str(error.value) and all(w in str(error.value) for w in words), error.value


def test_archives_that_are_refused(server, tmp_path, monkeypatch):
    served, _ = server
    root, sbd = tmp_path / "data", tmp_path / "data/SBD"
    address = SBDataset.url.rsplit("/", 1)[0]
    get_voc, get_sbd = lambda: download_voc(root), lambda: sources.download_sbd(sbd)
    whole = (served / "benchmark.tgz").read_bytes()
    (served / "benchmark.tgz").write_bytes(whole[:-200])  # arrives damaged
    refused(get_sbd, "benchmark.tgz: refused", "MD5 is not", address)
    publish(served, address, monkeypatch)  # damaged at its source
    refused(get_sbd, "benchmark.tgz: refused, it cannot be unpacked")
    if hasattr(tarfile, "data_filter"):  # Python 3.10.12, 3.11.4 and later; before, only the MD5 guards
        with tarfile.open(served / "VOCtrainval_11-May-2012.tar", "a") as tar:
            (tmp_path / "x").write_text("escaped")
            tar.add(tmp_path / "x", "../../escaped.txt")
        publish(served, address, monkeypatch)
        refused(get_voc, "VOCtrainval_11-May-2012.tar: refused", "escaped.txt")
        assert not list(tmp_path.rglob("escaped.txt"))
    else:
        root.mkdir(exist_ok=True)
        shutil.copy(served / "VOCtrainval_11-May-2012.tar", root)
    assert not (root / "VOCdevkit").exists() and not (sbd / "cls").exists()
    monkeypatch.setitem(
        DATASET_YEAR_DICT,
        "2012",
        DATASET_YEAR_DICT["2012"] | dict(url="http://127.0.0.1:9/VOCtrainval_11-May-2012.tar", md5="0" * 32),
    )
    refused(get_voc, "VOCtrainval_11-May-2012.tar: refused, its MD5 is not 0000", "cannot be fetched", "put it here")
    (root / "VOCtrainval_11-May-2012.tar").unlink()
    refused(get_voc, "VOCtrainval_11-May-2012.tar: not there", "put it here")
    (served / "benchmark.tgz").write_bytes(whole)
    publish(served, address, monkeypatch)
    assert (get_sbd() / "val.txt").exists(), "and the next good one is taken"


def test_damaged_matlab_file_is_named(unpacked):
    root, sbd = unpacked
    os.truncate(sbd / "cls/2008_000001.mat", 200)
    with pytest.raises(OSError, match="2008_000001.mat: cannot be read") as error:
        prepare_sbd(root, sbd)
    print(error.value)


def test_the_count_is_checked(unpacked, monkeypatch):
    root, sbd = unpacked
    monkeypatch.setattr(sources, "TRAIN_AUG", (len(TRAIN), len(VAL), 10582))
    with pytest.raises(ValueError, match="has 10582 images to train on, but these are 5"):
        prepare_sbd(root, sbd)
    (root / "VOCdevkit/VOC2012/.SegmentationClassAug.unfinished").rename(
        root / "VOCdevkit/VOC2012/SegmentationClassAug"
    )  # as if from elsewhere
    with pytest.raises(ValueError, match="SegmentationClassAug: .* these are 5"):
        prepare_sbd(root)


# ---------------------------------------------------------------- COCO


def coco_json(num_images=4):
    ring = lambda x, y: [x, y, x + 20, y, x + 20, y + 15, x, y + 15]
    return dict(
        info=dict(year=2014),
        licenses=[dict(id=1, name="x")],
        images=[
            dict(id=5 + 3 * i, height=SIZE[1], width=SIZE[0], file_name=f"COCO_val2014_{5 + 3 * i:012}.jpg")
            for i in range(num_images)
        ],
        annotations=[
            dict(
                id=100 + i,
                image_id=5 + 3 * (i % num_images),
                category_id=(1, 90)[i % 2],
                segmentation=[ring(i, i)],
                iscrowd=0,
                area=300,
                bbox=[i, i, 20, 15],
            )
            for i in range(num_images * 2)
        ],
        categories=[
            dict(id=1, name="person", supercategory="person"),
            dict(id=90, name="toothbrush", supercategory="indoor"),
        ],
    )


@pytest.fixture
def coco_root(tmp_path):
    return write_coco(tmp_path / "coco", coco_json())


def write_coco(root, about, split="val2014"):
    for i, image in enumerate(about["images"]):
        photo(root / split / image["file_name"], i)
    (root / "annotations").mkdir(exist_ok=True)
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(about))
    return root


def change(key, i, **values):
    def changed(root, about):
        about[key][i].update(values)

    return changed


def twice(root, about):
    about["images"].append(about["images"][0])


def half(root, about):
    return json.dumps(about)[:900]


def no_list(root, about):
    return "[]"


def captions(root, about):
    return json.dumps(about | dict(categories=[]))


def image_gone(root, about):
    (root / "val2014/COCO_val2014_000000000008.jpg").unlink()


def no_box(root, about):
    del about["annotations"][3]["category_id"]


def hundreds(root, about):
    about["categories"] += [dict(id=200 + i, name=str(i)) for i in range(300)]


@pytest.mark.parametrize(
    "change, message",
    [
        (half, "instances_val2014.json: cannot be read as JSON after"),
        (no_list, "0 images and 0 categories"),
        (captions, "0 categories"),
        (
            change("annotations", 3, image_id=77),
            "entry 3 of annotations belongs to image 77, which the file does not list",
        ),
        (change("annotations", 2, category_id=91), "has the category_id 91, which the file does not list"),
        (change("annotations", 1, image_id=None), "entry 1 of annotations is not one of COCO's.*image_id is None"),
        (no_box, "not one of COCO's.*category_id"),
        (twice, "two images have the id 5"),
        (image_gone, r"008.jpg: no such image, but instances_val2014.json lists it \(1 of 4"),
        (change("images", 1, file_name="../../secret.jpg"), "'../../secret.jpg' leads out of"),
        (change("images", 1, file_name="C:\\secret.jpg"), "leads out of"),
        (hundreds, "at most 255"),
        (change("annotations", 0, segmentation=[["a", "b"]]), "000000000005: .*not a segmentation"),
        (change("annotations", 0, segmentation=dict(size=[9, 9], counts=[81])), "000000000005: .*not a segmentation"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_bad_annotations_are_named(coco_root, change, message):
    about, path = coco_json(), coco_root / "annotations/instances_val2014.json"
    path.write_text(change(coco_root, about) or json.dumps(about))
    with pytest.raises((ValueError, OSError), match=message) as error:
        coco(coco_root, "val2014")[0]
    print(error.value)


def test_a_split_that_is_not_there(coco_root):
    with pytest.raises(FileNotFoundError, match="instances_train2014.json: no such file; there is: val2014"):
        coco(coco_root)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        coco(coco_root / "nowhere")


def test_annotations_changed_under_an_open_data_set(coco_root):
    "It stays what it was; who opens it again sees the new ones."
    dataset = coco(coco_root, "val2014")
    masks = [s["mask"] for s in dataset]
    (coco_root / "annotations/instances_val2014.json").write_text(json.dumps(dict(info={}) | coco_json(1)))
    assert all(torch.equal(s["mask"], mask) for s, mask in zip(pickle.loads(pickle.dumps(dataset)), masks, strict=True))
    assert len(coco(coco_root, "val2014")) == 1


def test_an_index_that_is_gone(coco_root, cache):
    sent = pickle.dumps(coco(coco_root, "val2014"))
    shutil.rmtree(cache)
    with pytest.raises(
        FileNotFoundError, match="the index of .*instances_val2014.json is gone; open the data set again"
    ):
        pickle.loads(sent)


def test_the_index_is_made_once_and_shared(coco_root, cache, monkeypatch):
    first = coco(coco_root, "val2014")
    monkeypatch.setattr(afa_nb.coco, "_write_index", lambda *args: pytest.fail("the annotations are read again"))
    again = pickle.loads(pickle.dumps(coco(coco_root, "val2014")))
    assert all(
        torch.equal(a["mask"], b["mask"]) and torch.equal(a["class_labels"], b["class_labels"])
        for a, b in zip(first, again)
    )
    assert all(isinstance(getattr(again.index, name), np.memmap) for name in again.index.ARRAYS)
    loaded = torch.utils.data.DataLoader(again, batch_size=2, num_workers=1, shuffle=False)
    assert torch.equal(torch.cat([batch["mask"] for batch in loaded]), torch.stack([s["mask"] for s in first]))


def test_a_damaged_index_is_made_again_and_a_cache_that_cannot_be_written_is_done_without(
    coco_root, cache, monkeypatch
):
    expected = coco(coco_root, "val2014")[1]["mask"]
    (index,) = (cache / "coco").iterdir()
    os.truncate(index / "tags.npy", 50)
    assert torch.equal(coco(coco_root, "val2014")[1]["mask"], expected)
    monkeypatch.setenv(
        "AFA_NB_CACHE", str(coco_root / "annotations/instances_val2014.json")
    )  # a file, so no folder can be made in it
    assert torch.equal(pickle.loads(pickle.dumps(coco(coco_root, "val2014")))[1]["mask"], expected)


@fork
def test_two_processes_at_once_make_one_index(coco_root, cache):
    processes = [
        multiprocessing.get_context("fork").Process(target=coco, args=(coco_root, "val2014")) for _ in range(2)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0, 0]
    assert len(list((cache / "coco").iterdir())) == 1


@pytest.mark.skipif(not (SHARED / "data/coco").exists(), reason="needs ../shared/data/coco")
@pytest.mark.parametrize("split, images", [("train2014", 378), ("val2014", 100)])
def test_masks_are_pycocotools_own(split, images):
    "Every image; and where instances of several classes overlap, the class is that of the first."
    from pycocotools.coco import COCO

    dataset, api = coco(SHARED / "data/coco", split), COCO(SHARED / f"data/coco/annotations/instances_{split}.json")
    assert len(dataset) == images and len(dataset.classes) == 81
    label_of = {k: i + 1 for i, k in enumerate(sorted(api.cats))}
    pixels = overlapping = 0
    for i, record in enumerate(dataset.records):
        annotations = api.loadAnns(api.getAnnIds(int(record.name[-12:])))
        drawn = [(label_of[a["category_id"]], a["iscrowd"], api.annToMask(a) > 0) for a in annotations]
        expected, classes_here = np.zeros_like(drawn[0][2], np.uint8), np.zeros(drawn[0][2].shape, int)
        for label, crowd, inside in drawn:
            if not crowd:
                expected[inside & (expected == 0)] = label
        for label, crowd, inside in drawn:
            if crowd:
                expected[inside & (expected == 0)] = 255
        for label in {d[0] for d in drawn}:
            classes_here += np.any(
                [inside for other, crowd, inside in drawn if other == label and not crowd] or [classes_here < 0], axis=0
            )
        mask = dataset.read_mask(i)
        assert np.array_equal(mask, expected), record.name
        assert dataset.class_labels[i].nonzero()[:, 0].tolist() == sorted({label - 1 for label, *_ in drawn})
        pixels, overlapping = pixels + mask.size, overlapping + (classes_here > 1).sum()
    print(
        f"{split}: {len(dataset)} images equal; instances of several classes overlap on {overlapping / pixels:.2%}"
    )


# ---------------------------------------------------------------- tagged images


@pytest.fixture
def own(tmp_path):
    for i, name in enumerate(("a.jpg", "b.png", "c.jpg", "deep/d.jpg")):
        photo(tmp_path / "own" / name, i)
    return tmp_path / "own"


GOOD = "image,tags\na.jpg,cow\nb.png,cow;dog\n"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("tags.csv", "image,tags,size\na.jpg,cow,3\n", "line 1: unknown column 'size'. Known are image and tags"),
        ("tags.csv", "file,label\na.jpg,cow\n", "file: no such image.*if this is a heading"),
        ("tags.csv", "name,tags\na.jpg,cow\n", "no column image, only name, tags"),
        ("tags.csv", GOOD + "z.jpg,cow\n", r"z.jpg: no such image, but tags.csv lists it \(1 of 3 are missing\)"),
        ("tags.csv", GOOD + "c.jpg,\n", "line 4: 'c.jpg' has no tags. Write background"),
        ("tags.csv", GOOD + "a.jpg,dog\n", "line 4: 'a.jpg' is there twice"),
        ("tags.csv", GOOD + "a,dog\n", "'a.jpg' is there twice"),
        ("tags.csv", GOOD + "c.jpg,co\tw\n", "holds a character that cannot be printed"),
        ("tags.csv", GOOD + "../../etc/passwd,cow\n", "leads out of the data folder"),
        ("tags.csv", GOOD + "/etc/passwd,cow\n", "leads out of"),
        ("tags.csv", GOOD + "..\\b.png,cow\n", "leads out of"),
        ("tags.json", '{"a.jpg": ["cow"], ', "tags.json: cannot be read"),
        ("tags.json", '["a.jpg"]', "want an object of image: list of tags"),
        ("tags.json", '{"a.jpg": ["../cow"], "../b.png": ["cow"]}', "leads out of"),
        ("tags.csv", "image,tags\na.jpg,background\n", "no image has a tag other than background"),
        ("tags.csv", "image,tags\n", "the table is empty"),
    ],
)
def test_bad_tables_are_named(own, name, text, message):
    (own / name).write_text(text)
    with pytest.raises((ValueError, OSError), match=message) as error:
        tagged_images(own)
    print(error.value)


def test_more_bad_input(own):
    (own / "tags.csv").write_text(GOOD)
    photo(own / "a.png")
    for call, message in [
        (lambda: tagged_images(own / "nowhere"), "no such folder"),
        (lambda: tagged_images(own, own / "t.csv"), "t.csv: no such table of tags"),
        (lambda: tagged_images(own, classes=["background", "cow"]), "tag 'dog' is not one of the classes cow"),
        (lambda: tagged_images(own, masks=own / "deep"), "no mask for any image; it would be called a.png"),
        (
            lambda: tagged_images(
                shutil.copytree(own, own.parent / "flat", ignore=shutil.ignore_patterns("deep", "tags.csv"))
            ),
            "Give tags=",
        ),
    ]:
        with pytest.raises((ValueError, OSError), match=message) as error:
            call()
        print(error.value)
    (own / "tags.csv").write_text("a,cow\n")
    with pytest.raises(ValueError, match="'a' may be a.jpg or a.png; write which"):
        tagged_images(own)
    (own / "tags.csv").write_text("a.jpg,cow\na.png,dog\n")
    with pytest.raises(ValueError, match="two images are called 'a': rename one"):
        tagged_images(own)


def test_odd_tags_work(own):
    odd = ["Rock 'n' Roll", "a/b", "猫", "c++", "50 %", "..", "=1+1"]
    (own / "tags.json").write_text(json.dumps({"a": odd, "b": ["猫"]}))
    dataset = tagged_images(own)
    assert dataset.classes == ["background", *sorted(odd)] and dataset.class_labels.sum(1).tolist() == [7, 1]
    assert any(
        "On every image: 猫" in p for p in data.problems(dataset)
    ) and "Left out for want of tags: c.jpg, deep/d.jpg." in data.problems(dataset)


def test_tables_as_people_write_them(own):
    "Without a heading, several tags in one cell; an accent kept apart from its letter, as some file systems do."
    photo(own / "Ku\u0308he.jpg")
    (own / "tags.csv").write_text("a.jpg,cow;dog\nb.png,cow|dog\nK\u00fche.jpg,dog\n")
    dataset = tagged_images(own)
    assert (
        dataset.classes == ["background", "cow", "dog"]
        and dataset.class_labels.tolist() == [[1, 1], [1, 1], [0, 1]]
        and dataset[2]["image"].shape[0] == 3
    )
    (own / "x.heic").write_bytes(b"heic")
    for name, message in [
        ("A.JPG", "no such image, but tags.csv lists it; a.jpg is there"),
        ("x.heic", "is in a format that cannot be read here: save it as JPEG or PNG"),
    ]:
        (own / "tags.csv").write_text(f"image,tags\n{name},cow\n")
        with pytest.raises(FileNotFoundError, match=message) as error:
            tagged_images(own)
        print(error.value)
    (own / "tags.csv").write_text("image,tags\na.jpg,Cow\nb.png,cow\n")
    assert any("Written in two ways, which makes two classes: cow." in p for p in data.problems(tagged_images(own)))


def test_linked_folders_are_followed_but_not_in_circles(own, tmp_path):
    (own / "a.jpg").unlink(), (own / "b.png").unlink(), (own / "c.jpg").unlink()
    photo(tmp_path / "elsewhere/e.jpg")
    (own / "cow").symlink_to(tmp_path / "elsewhere")
    (own / "deep/round").symlink_to(own)
    assert tagged_images(own).counts() == dict(cow=1, deep=1)


def test_long_pictures_are_reduced_with_their_masks(own):
    (own / "tags.csv").write_text("image,tags\na.jpg,cow\nb.png,background\n")
    (own / "masks").mkdir()
    save_mask(mask_with(1), own / "masks/a.png")
    dataset = tagged_images(own, masks=own / "masks")
    whole = dataset[0]
    dataset.max_side = 30
    sample, (H, W) = dataset[0], whole["image"].shape[1:]
    assert max(H, W) > 30 == max(sample["image"].shape) and sample["image"].shape[1:] == sample["mask"].shape == (
        round(30 * H / max(H, W)),
        round(30 * W / max(H, W)),
    )
    assert (
        set(sample["mask"].unique().tolist()) <= set(whole["mask"].unique().tolist())
        and sample["image"].dtype == torch.uint8
    )
    dataset.max_side = 1000
    assert torch.equal(dataset[0]["image"], whole["image"])


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.float32([[0, 0.5, 1]]), [0, 127, 255]),
        (np.float32([[0, 100, 255]]), [0, 100, 255]),
        (np.int32([[0, 100, 255]]), [0, 100, 255]),
        (np.int32([[0, 25700, 65535]]), [0, 100, 255]),
    ],
)
def test_numbers_of_32_bits(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.asarray(data.read_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == expected


def small(root, run, **changes):
    from afa_nb.training import configure

    return configure(
        str(root),
        backbone="mit_tiny",
        weights="none",
        max_iters=4,
        cam_iters=1,
        aff_iters=2,
        crop_size=64,
        batch_size=2,
        stride=8,
        decoder_dim=16,
        num_workers=0,
        save_every=2,
        eval_every=2,
        log_every=1,
        cam_scales=(1,),
        radius=2,
        dilations=(1, 2),
        run_dir=str(run),
        say=lambda *a: None,
        **changes,
    )


def test_training_on_tagged_images(own, tmp_path):
    """Without masks nothing is measured and the run says so; with some, these are val.

    Batches of images that show no class are trained on too."""
    from afa_nb.training import evaluate_run, open_data, read_metrics, train

    (own / "tags.csv").write_text("image,tags\na,background\nb,background\nc,background\ndeep/d,cow\n")
    for seed in (0, 1):
        run = train(small(own, tmp_path / f"run{seed}", seed=seed), verbose=False)
        rows = read_metrics(run)
        assert all(np.isfinite(r["loss"]) for r in rows[:-1]) and len(rows) == 5
    assert rows[-1]["kind"] == "note" and rows[-1]["final"] and "nothing was measured" in rows[-1]["text"]
    assert (
        (run / "best/model.safetensors").exists()
        and train(small(own, run, seed=1), verbose=False) == run
        and read_metrics(run) == rows
    )
    with pytest.raises(ValueError, match="these images have no masks"):
        evaluate_run(run)
    save_mask(mask_with(1), own / "masks.png")
    (own / "masks/deep").mkdir(parents=True)
    (own / "masks.png").rename(own / "masks/deep/d.png")
    config = small(own, tmp_path / "measured", masks=str(own / "masks"))
    assert [len(d) for d in open_data(config)] == [4, 1] and "mask" not in open_data(config)[0][3]
    rows = read_metrics(train(config, verbose=False))
    assert rows[-1]["kind"] == "eval" and rows[-1]["images"] == 1 and rows[-1]["split"] == "masked"


def test_training_opens_what_the_folder_holds(own, coco_root, unpacked):
    from afa_nb.training import configure

    (own / "tags.csv").write_text(GOOD)
    quiet = dict(say=lambda *a: None, weights="none")
    assert configure(str(own), **quiet).val_split == "masked"
    assert (
        configure(str(coco_root), **quiet).train_split == "train2014"
        and configure(str(coco_root), **quiet).max_iters == 80_000
    )
    assert configure(str(unpacked[0]), **quiet).train_split == "train"
    prepare_sbd(*unpacked)
    assert configure(str(unpacked[0]), **quiet).train_split == "train_aug"
