"""What papermill hands over is understood or refused, before a notebook starts or writes anything."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from papermill.cli import _resolve_type

from afa_nb.ablations import ablation_config
from afa_nb.data import voc
from afa_nb.report import cost, results
from afa_nb.settings import check, configure, preset
from afa_nb.shapes import make_shapes
from afa_nb.training import train

NBS = Path(__file__).parent.parent / "nbs"
CELLS = {f.stem: nbformat.read(f, 4).cells for f in sorted(NBS.glob("*.ipynb"))}
OWN = {name: c.source for name, cells in CELLS.items() for c in cells if "parameters" in c.metadata.get("tags", [])}


def parts(name):
    "The parameters' own cell and the one that reads them, as code."
    sources = (c.source.removeprefix("#| hide\n") for c in CELLS[name])
    return OWN[name], next(s for s in sources if s.startswith("read_parameters("))


def read(name, given):
    "The parameters of a notebook after its first cells, started as by `papermill -p` for text, else as by -y."
    own, code = parts(name)
    names = {}
    exec("from afa_nb.parameters import *", names)
    exec("from afa_nb.crf import check_crf", names)
    exec(own, names)
    names |= {k: _resolve_type(v) if isinstance(v, str) else v for k, v in given.items()}
    exec(code, names)
    return names


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words, name, **given):
    with pytest.raises(ValueError, match=re.escape(words)):
        read(name, given)


@pytest.mark.parametrize("name", OWN)
def test_every_notebook_reads_all_its_parameters(name):
    own, code = parts(name)
    names = re.findall(r"^(\w+) =", own, re.M)
    assert names and all(re.search(rf"\b{n}\b", code) for n in names)
    before = {}
    exec(own, before)
    after = read(name, {})
    assert {n: after[n] for n in names} == {n: before[n] for n in names}, "the defaults stay"


@pytest.mark.parametrize("text", ["false", "no", "OFF", "0", "False"])
@pytest.mark.parametrize("name", ["crf", "use_tags", "overwrite"])
def test_false_is_not_true(name, text):
    assert read("train_own", {name: text})[name] is False
    assert read("train_own", {name: "yes"})[name] is True


def test_what_is_neither_true_nor_false():
    refused("crf must be true or false, not 'perhaps': -p crf False", "train_own", crf="perhaps")
    refused("use_tags must be true or false, not 2", "train_own", use_tags="2")
    refused("overwrite must be true or false, not None", "train_own", overwrite="None")


@pytest.mark.parametrize("name", [n for n in OWN if "max_iters" in OWN[n]])
def test_numbers_as_text(name):
    for given, expected in ((1e1, 10), ("1e1", 10), ("20", 20)):
        assert type(read(name, dict(max_iters=given))["max_iters"]) is int
        assert read(name, dict(max_iters=given))["max_iters"] == expected
    refused("max_iters must be a whole number", name, max_iters="2.5")
    refused("max_iters must be a whole number", name, max_iters="True")


def test_numbers_of_other_kinds():
    own = read("train_voc", dict(lr="1e-4", lambda_reg="0", train_limit="none", pictures="2e0", weights="none"))
    assert (own["lr"], own["lambda_reg"], own["train_limit"], own["pictures"]) == (1e-4, 0, None, 2)
    assert own["weights"] == "none", "random weights"
    refused("lr must be a number or None, not '6e-5x'", "train_voc", lr="6e-5x")
    refused("lr must be a number or None, not nan", "train_voc", lr="nan")
    refused("pictures must be a whole number, 0 or more, not -1", "train_voc", pictures="-1")
    refused("pictures must be a whole number, 1 or more, not 0", "ablation_modules", pictures="0")
    refused("train_limit must be a whole number, 1 or more or None, not 0", "train_coco", train_limit="0")


NAMED = [("train_own", "folder"), ("train_voc", "data_root"), ("comparison", "data_root")]


@pytest.mark.parametrize("name, folder", NAMED)
def test_a_name_that_looks_like_a_number(name, folder, here):
    words = f"{folder}: papermill read the name as the number 20240501; start it with -r {folder} 2024_05_01"
    refused(words, name, **{folder: "2024_05_01"})
    (here / "2024_05_01").mkdir()
    assert read(name, {folder: "2024_05_01"})[folder] == "2024_05_01"
    (here / "20240501").mkdir()
    refused("20240501 or 2024_05_01", name, **{folder: "2024_05_01"})
    assert read(name, {folder: Path("2024_05_01")})[folder] == "2024_05_01"


def test_other_names_that_look_like_something_else():
    refused("-r out 2024,", "train_own", out="2024")
    refused("-r run_dir 100000,", "tour", run_dir="1e5")
    refused("-r out inf,", "train_own", out="inf")
    refused("-r folder True", "train_own", folder="True")
    refused("folder must be text or None, not ''", "train_own", folder="")
    refused("-r image 2007_000032", "21_explorer", image="2007_000032")
    refused("-r pictures 2007_000032", "paper_figures", pictures="2007_000032")
    assert read("21_explorer", dict(image="7"))["image"] == 7


def test_seeds_and_exponents():
    for given, expected in (("3", "3"), ("0,1", "0 1"), ([0, 1], "0 1"), ("0 1 2", "0 1 2")):
        assert read("ablation_pooling", dict(seeds=given))["seeds"] == expected
    assert read("ablation_hyperparameters", dict(train_seeds=""))["train_seeds"] == ""
    for wrong in ("0 one", "0 0", "-1", "0.5", "2147483648"):
        refused("seeds must be different whole numbers", "comparison", seeds=wrong)
    assert read("comparison", dict(rrm_exponents=[1, 8]))["rrm_exponents"] == "1 8"
    refused("rrm_exponents must be two numbers", "comparison", rrm_exponents="8")


def test_further_settings():
    given = {"radius": "5", "cam_scales": ["1", 0.5], "released_start": "no", "save_every": 1e2, "batch_size": "4"}
    for other in (given, json.dumps(given)):
        found = read("train_voc", dict(other=other))
        expected = dict(radius=5, cam_scales=[1, 0.5], released_start=False, save_every=100)
        assert json.loads(found["other"]) == expected and found["batch_size"] == 4
    for name in OWN:
        if re.search("^other =", OWN[name], re.M):
            broken = '{"radius": 5, "crop_size" 64}'
            refused("other is not JSON: Expecting ':' delimiter at character 27", name, other=broken)
            refused("in double quotes", name, other="{'radius': 5}")
            refused('other must be a JSON object such as {"weight_decay": 0.02}, not 5', name, other="5")
            refused("unknown setting crop", name, other='{"crop": 64}')
    refused("other: crop_size must be a whole number", "paper_figures", other='{"crop_size": "big"}')
    refused("other cannot hold data_root", "train_own", other='{"data_root": "photos"}')
    refused("other: val_split must be text or None, not 2014", "train_coco", other='{"val_split": 2014}')


def test_settings_from_python():
    for wrong, words in (
        (dict(max_iters="2"), "max_iters must be a whole number, not '2'"),
        (dict(lr="6e-5"), "lr must be a number, not '6e-5'"),
        (dict(max_iters=float("inf")), "max_iters must be"),
        (dict(dilations=["1", "2"]), "dilations must be a list of numbers"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            preset("demo", **wrong)
        with pytest.raises(ValueError, match=re.escape(words)):
            configure(preset_name="demo", say=lambda _: None, **wrong)
    check(preset("demo", max_iters=1e1, dilations=[1, 2]))
    with pytest.raises(ValueError, match="data_root must be text or none, not 20240501"):
        configure(20240501)


def test_without_masks(here):
    "An ablation is refused at once; a finished run says that nothing was measured."
    root = make_shapes(here / "shapes", num_train=4, num_val=2, size=64)
    records = voc(root, "train").records
    for i, tag in enumerate(("a", "a", "b", "b")):
        (here / "photos" / tag).mkdir(parents=True, exist_ok=True)
        (here / "photos" / tag / f"{i}.png").write_bytes(Path(records[i].image).read_bytes())
    tiny = dict(backbone="mit_tiny", weights="none", stride=8, decoder_dim=16, crop_size=64, batch_size=2)
    tiny |= dict(num_workers=0, radius=2, dilations=(1, 2), cam_scales=(1,), lambda_reg=0.0, precision="fp32")
    with pytest.raises(ValueError, match="photos: no image has a mask, so there is nothing to measure"):
        ablation_config("photos", max_iters=2, say=lambda _: None, **tiny)
    assert not (here / "runs").exists()
    run = train(configure("photos", max_iters=2, say=lambda _: None, **tiny), verbose=False)
    assert results(run) == "No image has a mask, so nothing is measured."
    assert cost(run).startswith("2 iterations in")
