"""What a run must survive, tested on whole runs.

A kill, a damaged checkpoint, scrambled masks, a NaN, bad input, two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from afa_nb import runs, training
from afa_nb.affinity import affinity_labels
from afa_nb.data import save_mask, voc
from afa_nb.evaluation import LADDER, PROTOCOLS, evaluate, ladder_labels, predict
from afa_nb.losses import classification_loss
from afa_nb.model import AFANet
from afa_nb.predict import Predictor
from afa_nb.runs import NotFinite, evaluate_run, load_run, read_metrics
from afa_nb.settings import check, open_data, preset
from afa_nb.shapes import make_shapes
from afa_nb.training import train
from afa_nb.transforms import normalize
from afa_nb.weights import load_weights

SHORT = dict(
    max_iters=12,
    cam_iters=3,
    aff_iters=6,
    warmup_iters=2,
    crop_size=64,
    batch_size=4,
    eval_every=100,
    save_every=3,
    log_every=3,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=2, size=64)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    "An uninterrupted run."
    return train(
        preset("demo", data_root=str(root), run_dir=str(tmp_path_factory.mktemp("whole") / "run"), **SHORT),
        verbose=False,
    )


def weights(run, step=12):
    return load_file(Path(run) / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(run):
    "The metrics without what depends on the clock."
    clock = {"seconds", "images_per_second", "peak_memory_mb", "iterations_per_second"}
    return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(run)]


def command(root, run, **changes):
    settings = dict(data_root=str(root), run_dir=str(run), **SHORT) | changes
    code = f"from afa_nb.training import preset, train; train(preset('demo', **{settings!r}))"
    return [sys.executable, "-c", code]


def environment():
    "This process's number of threads, so that sums are formed in the same order."
    return os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()))


def test_killed_and_continued_is_bit_identical(root, whole, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(root, run), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment()
    )
    deadline = time.time() + 300
    while not (run / "checkpoints" / "step-00000006").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "checkpoints" / "step-00000012").exists(), "the run was over before it was killed"
    again = subprocess.run(command(root, run), capture_output=True, text=True, env=environment())
    assert again.returncode == 0, again.stderr
    assert "continuing at step" in again.stdout
    assert same(weights(run), weights(whole))
    assert [r for r in rows(run) if r["kind"] == "train"] == [r for r in rows(whole) if r["kind"] == "train"]


def test_damaged_checkpoint_is_reported_and_the_one_before_used(root, whole, tmp_path, capsys, monkeypatch):
    config = preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT)
    save, stop = runs.save_checkpoint, RuntimeError("stopped on purpose")

    def save_until_nine(run_dir, step, *args):
        save(run_dir, step, *args)
        if step == 9:
            raise stop

    monkeypatch.setattr(runs, "save_checkpoint", save_until_nine)
    with pytest.raises(RuntimeError, match="on purpose"):
        train(config, verbose=False)
    monkeypatch.setattr(runs, "save_checkpoint", save)
    newest = tmp_path / "run" / "checkpoints" / "step-00000009" / "state.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    train(config)
    printed = capsys.readouterr().out
    assert "step-00000009 is damaged (state.pt)" in printed and "continuing at step 6" in printed
    assert same(weights(tmp_path / "run"), weights(whole))


def test_scrambled_masks_leave_training_bit_identical(root, whole, tmp_path):
    "Decision 17: the pixels of every training mask moved around, its set of classes kept."
    scrambled = shutil.copytree(root, tmp_path / "shapes")
    rng = np.random.default_rng(0)
    for name in (scrambled / "ImageSets/Segmentation/train.txt").read_text().split():
        path = scrambled / "SegmentationClass" / f"{name}.png"
        mask = np.asarray(Image.open(path))
        save_mask(rng.permutation(mask.ravel()).reshape(mask.shape), path)
    first = voc(root, "train")[0]["mask"], voc(scrambled, "train")[0]["mask"]
    assert not torch.equal(*first) and torch.equal(first[0].unique(), first[1].unique())
    run = train(preset("demo", data_root=str(scrambled), run_dir=str(tmp_path / "run"), **SHORT), verbose=False)
    assert same(weights(run), weights(whole))


def test_other_tags_change_training(root, whole, tmp_path):
    "The control of the test above: the run does read the tags."
    other = shutil.copytree(root, tmp_path / "shapes")
    (other / "tags.csv").write_text(
        "".join(
            f"{name},circle\n"
            for split in ("train", "val")
            for name in (other / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        )
    )
    run = train(preset("demo", data_root=str(other), run_dir=str(tmp_path / "run"), **SHORT), verbose=False)
    assert not same(weights(run), weights(whole))


def test_missing_pydensecrf_is_said_before_training(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)  # as where it is not installed
    config = preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT)
    with pytest.raises(ImportError, match="--no-build-isolation pydensecrf2"):
        train(config, verbose=False)
    run = train(config, verbose=False, ladder=("cam", "seg"))
    assert {"cam", "seg"} <= set(read_metrics(run)[-1])


def test_best_weights_are_compared_on_the_same_images(root, tmp_path):
    config = preset(
        "demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT | dict(eval_every=4, eval_limit=1)
    )
    run = train(config, verbose=False, ladder=("cam",))
    evals = [r for r in read_metrics(run) if r["kind"] == "eval"]
    assert [(r["step"], r["images"], r["final"]) for r in evals] == [
        (4, 1, False),
        (8, 1, False),
        (12, 1, False),
        (12, 2, True),
    ]
    part = {r["step"]: r["seg"] for r in evals if "seg" in r}
    with safe_open(run / "best" / "model.safetensors", "pt") as best:
        step = int(best.metadata()["step"])
    assert step == max(part, key=part.get) and set(part) == {4, 8, 12}


@pytest.mark.parametrize("size", [(20, 24), (400, 20), (12, 300)])
def test_small_and_thin_pictures_are_measured_too(size):
    generator = torch.Generator().manual_seed(0)
    image, mask = (
        torch.randint(0, 256, (1, 3, *size), generator=generator, dtype=torch.uint8),
        torch.randint(0, 3, (1, *size), generator=generator, dtype=torch.uint8),
    )
    torch.manual_seed(0)
    net = AFANet(3, "mit_tiny", stride=8, decoder_dim=16).eval()
    for long_side in (None, 512):
        labels = ladder_labels(
            net,
            image,
            torch.tensor([[1.0, 1]]),
            (*LADDER, "raw_attention_par", "oracle_par"),
            protocol=PROTOCOLS["released"]._replace(long_side=long_side),
            mask=mask,
        )
        alone = {
            rung: ladder_labels(
                net,
                image,
                torch.tensor([[1.0, 1]]),
                (rung,),
                protocol=PROTOCOLS["released"]._replace(long_side=long_side),
            )[rung]
            for rung in ("cam_par", "seg", "seg_ms")
        }
        assert all((labels[rung] == label).all() for rung, label in alone.items()), (
            "a label depends on which others are asked for"
        )
        assert (labels["seg_ms"] == predict(net, normalize(image), long_side=long_side).argmax(1)).all()
        assert all(label.shape == mask.shape for label in labels.values()) and predict(
            net, normalize(image), long_side=long_side
        ).shape == (1, 3, *size)


def test_evaluations_while_training_compute_as_evaluate_run_does(root, tmp_path, monkeypatch):
    "In float32, without the wrapper in which accelerate computes in bf16, which is back afterwards."
    seen, evaluate = [], runs.evaluate

    def watched(net, *args, **kwargs):
        with torch.inference_mode():
            seen.append(net(torch.rand(1, 3, 64, 64)).attention.dtype)
        return evaluate(net, *args, **kwargs)

    def step(net, *args):
        seen.append("forward" in vars(net))
        return training_step(net, *args)

    training_step = training.training_step
    monkeypatch.setattr(runs, "evaluate", watched)
    monkeypatch.setattr(training, "training_step", step)
    train(
        preset(
            "demo",
            data_root=str(root),
            run_dir=str(tmp_path / "run"),
            precision="bf16",
            **SHORT | dict(max_iters=4, eval_every=2),
        ),
        verbose=False,
        ladder=("seg",),
    )
    assert seen == [True, True, torch.float32, True, True, torch.float32]


def test_weights_of_a_run_with_other_classes(whole, tmp_path):
    config = preset("demo", weights=str(whole), **SHORT)
    classes = (whole / "classes.txt").read_text().splitlines()
    theirs = load_file(whole / "best" / "model.safetensors")
    for names, anew in ((classes, False), ([*classes[:-1], "other"], True), (classes[:3], True)):
        own = runs.build(config, names, verbose=False).state_dict()
        for k in ("encoder.patch_embed.proj.weight", "decoder.fuse.weight", "affinity_head.proj.weight"):
            assert torch.equal(own[k], theirs[k])
        for k in ("classifier.weight", "decoder.predict.weight", "decoder.predict.bias"):
            assert torch.equal(own[k], theirs[k]) != anew


def test_a_ladder_without_the_segmentation(root, tmp_path):
    run = train(
        preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT), verbose=False, ladder=("cam",)
    )
    assert {"cam", "seg"} <= set(read_metrics(run)[-1]) and (run / "best" / "model.safetensors").exists()


def test_an_unfinished_run_is_measured_as_what_it_is(root, tmp_path):
    config = preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT)
    run = train(config, verbose=False, until=6, ladder=())
    early = evaluate_run(run, ladder=("cam",))
    assert (early["step"], early["final"]) == (6, False) and evaluate_run(run, ladder=("cam",)) == early
    train(config, verbose=False, ladder=("seg",))
    late = evaluate_run(run, ladder=("cam",))
    assert (late["step"], late["final"]) == (12, True) and late["cam"] != early["cam"]


def test_a_run_keeps_the_precision_it_has_begun_with(root, tmp_path, monkeypatch):
    config = preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), precision="auto", **SHORT)
    monkeypatch.setattr(runs, "multiplies_bf16", lambda device: True)
    train(config, verbose=False, until=3)
    monkeypatch.setattr(runs, "multiplies_bf16", lambda device: False)  # another machine
    train(config, verbose=False, ladder=())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["precision"] == "bf16"
    with pytest.raises(ValueError, match="precision was 'bf16', now 'fp32'"):
        train(
            preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), precision="fp32", **SHORT), verbose=False
        )


def test_other_classes_are_refused_and_a_run_that_has_not_begun_is_replaced(root, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    names = [f"train_{i:05d}" for i in range(4)]
    for name in names:
        Image.open(root / "JPEGImages" / f"{name}.png").save(photos / f"{name}.png")
    table = "image,tags\n" + "".join(
        f"{name},{tag}\n" for name, tag in zip(names, ("car", "cow", "car;cow", "background"))
    )
    (photos / "tags.csv").write_text(table)
    settings = preset(
        "demo", data_root=str(photos), run_dir=str(tmp_path / "run"), train_split="all", val_split="masked", **SHORT
    )
    runs.open_run(
        replace(settings, batch_size=2), ["background", "car", "cow"]
    )  # as a start that ran out of memory leaves it
    train(settings, verbose=False, until=6)
    (photos / "tags.csv").write_text(table.replace("car", "train"))
    with pytest.raises(ValueError, match=r"other classes \(added: train; missing: car\)"):
        train(settings, verbose=False)
    (photos / "tags.csv").write_text(table)
    (photos / "masks").mkdir()
    for name in names[:2]:
        save_mask(np.ones((64, 64), np.uint8), photos / "masks" / f"{name}.png")
    train(settings, verbose=False)
    run = train(
        replace(settings, masks=str(photos / "masks")), verbose=False
    )  # masks may come later: they only measure
    assert read_metrics(run)[-1]["images"] == 2 and load_run(run)[1].masks


def test_what_was_learned_stays_when_a_picture_cannot_be_read(root, whole, tmp_path, monkeypatch):
    config = preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT | dict(save_every=100))
    seen, getitem = [], runs.TrainSet.__getitem__

    def breaking(crops, key):
        seen.append(key)
        if len(seen) == 21:  # the first of the sixth batch
            raise OSError("a.jpg: cannot be read")
        return getitem(crops, key)

    monkeypatch.setattr(runs.TrainSet, "__getitem__", breaking)
    with pytest.raises(OSError, match="a.jpg"):
        train(config, verbose=False)
    monkeypatch.setattr(runs.TrainSet, "__getitem__", getitem)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    assert same(weights(train(config, verbose=False)), weights(whole))


def test_an_interrupt_saves_the_step(root, whole, tmp_path, monkeypatch):
    config = preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT | dict(save_every=100))
    step = training.training_step

    def interrupted(net, labels, batch, i, config):
        if i == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(net, labels, batch, i, config)

    monkeypatch.setattr(training, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="saved at step 5"):
        train(config, verbose=False)
    monkeypatch.setattr(training, "training_step", step)
    assert same(weights(train(config, verbose=False)), weights(whole))


@pytest.mark.slow
def test_a_sigterm_saves_the_step_and_ends_the_process(root, whole, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(root, run, save_every=100, max_iters=5000, cam_iters=5000, aff_iters=5000, log_every=1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 300
    while len(read_metrics(run)) < 3 and time.time() < deadline:
        time.sleep(0.02)
    before = len(read_metrics(run))
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    steps = [int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir()]
    assert max(steps) >= before and max(steps) == read_metrics(run)[-1]["step"]


def test_a_run_is_trained_by_one_process_at_a_time(root, whole, tmp_path):
    config = load_run(whole)[1]
    with FileLock(whole / ".training.lock"), pytest.raises(RuntimeError, match="another process is training this run"):
        train(config, verbose=False)
    assert train(config, verbose=False) == whole
    begun = replace(config, run_dir=str(tmp_path / "run"))
    runs.open_run(begun, ["background", "circle"])  # a rival has begun, and has no checkpoint yet
    before = (tmp_path / "run/config.json").read_text()
    with FileLock(tmp_path / "run/.training.lock"), pytest.raises(RuntimeError, match="another process"):
        train(replace(begun, lr=1e-4), verbose=False)
    assert (tmp_path / "run/config.json").read_text() == before


def test_a_run_is_not_measured_on_other_classes(whole, root, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    names = (run / "classes.txt").read_text().splitlines()
    (run / "classes.txt").write_text("\n".join([names[0], *names[:0:-1]]) + "\n")
    with pytest.raises(ValueError, match="other classes .in another order"):
        evaluate_run(run)


def test_a_run_dir_that_cannot_be_made_is_named(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file: cannot be made .* choose another run_dir"):
        train(preset("demo", data_root=str(root), run_dir=str(tmp_path / "file"), **SHORT), verbose=False)


def test_weights_of_another_task_begin_with_a_new_last_layer(root, tmp_path, capsys):
    save_file(AFANet(5, "mit_tiny", decoder_dim=64).state_dict(), tmp_path / "five.safetensors")
    tiny = dict(data_root=str(root), weights=str(tmp_path / "five.safetensors"), backbone="mit_tiny")
    net = runs.build(preset("demo", **tiny), ["background", "circle"])
    assert "the classifier and the decoder's last layer begin anew" in capsys.readouterr().out
    assert net.num_classes == 2


@pytest.mark.parametrize(
    "state, words",
    [
        (dict(teacher=dict(a=torch.zeros(1)), student=dict(a=torch.zeros(1))), "It holds teacher, student: save one"),
        (dict(a=torch.full((2,), torch.nan)), "a holds values that are no numbers"),
    ],
)
def test_files_without_usable_weights_say_why(tmp_path, state, words):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=words):
        load_weights(AFANet(2, "mit_tiny"), tmp_path / "a.pth")


def test_other_images_are_said_and_other_masks_measured(tmp_path, capsys):
    root = make_shapes(tmp_path / "shapes", num_train=16, num_val=4, size=64)
    config = preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT)
    train(config, verbose=False, ladder=("seg",), until=6)
    names = root / "ImageSets/Segmentation/train.txt"
    names.write_text("\n".join(names.read_text().split()[:8]))
    run = train(config, ladder=("seg",))
    assert "16 images then, 8 now" in capsys.readouterr().out
    first = evaluate_run(run, ladder=("seg",))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "Metrics", lambda *a: 1 / 0)  # what is known is only read
        assert evaluate_run(run, ladder=("seg",)) == first
    names = root / "ImageSets/Segmentation/val.txt"
    names.write_text("\n".join(names.read_text().split()[:2]))
    best = (run / "best/model.safetensors").read_bytes()
    assert evaluate_run(run, ladder=("seg",))["images"] == 2 and first["images"] == 4
    train(config, verbose=False, ladder=("seg",))
    assert (
        run / "best/model.safetensors"
    ).read_bytes() == best  # weights measured on other images are no better for that


def test_weights_come_before_the_row_that_says_how_good_they_are(root, tmp_path, monkeypatch):
    config = preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT)
    with monkeypatch.context() as patched:
        patched.setattr(runs._Validation, "_save_best", lambda *a, **k: 1 / 0)  # a full disk
        with pytest.raises(ZeroDivisionError):
            train(config, verbose=False, ladder=("seg",))
    assert not any(r["kind"] == "eval" for r in read_metrics(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="nothing was measured"):
        load_run(tmp_path / "run", best=True)
    assert (train(config, verbose=False, ladder=("seg",)) / "best/model.safetensors").exists()


def test_a_setting_of_a_later_version_is_refused(root, tmp_path):
    config = preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT)
    path = train(config, verbose=False, until=3) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(future=3)))
    with pytest.raises(ValueError, match="unknown setting future"):
        train(config, verbose=False)


def test_nothing_of_the_caller_is_changed(root, whole):
    "Neither the modes of his network's parts, nor his random numbers, nor how products are rounded."
    net, config, classes = load_run(whole)
    net.train(), net.encoder.eval()
    modes = [m.training for m in net.modules()]
    _, val = open_data(config)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    labels = ladder_labels(net, val[0]["image"][None], val[0]["class_labels"][None], ("cam", "seg_ms"))
    evaluate(net, val, ("seg",), num_workers=1)
    Predictor(net, classes)(val[0]["image"])
    random = torch.rand(1)
    torch.manual_seed(0)
    assert random == torch.rand(1) and modes == [m.training for m in net.modules()]
    labels["cam"][:] = 255  # an ordinary tensor
    train(config, verbose=False)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_an_evaluation_that_was_missed_is_made_up_for(root, tmp_path, monkeypatch):
    config = preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT | dict(eval_every=3))
    with monkeypatch.context() as patched:
        patched.setattr(runs._Validation, "measure", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, verbose=False)
    steps = [r["step"] for r in read_metrics(train(config, verbose=False, ladder=("seg",))) if r["kind"] == "eval"]
    assert steps == [3, 6, 9, 12]


def test_released_start(root, tmp_path):
    """While only the classification learns, decoder and affinity head make steps with a gradient of zero:
    they shrink by the weight decay alone, and Adam counts."""
    config = preset(
        "demo", data_root=str(root), run_dir=str(tmp_path / "run"), released_start=True, **SHORT | dict(drop_path=0.0)
    )
    run = train(config, verbose=False, until=3)
    fresh, after = runs.build(config, open_data(config)[0].classes).state_dict(), weights(run, 3)
    state = torch.load(run / "checkpoints/step-00000003/state.pt", weights_only=True)["optimizer"]["state"]
    assert all(float(s["step"]) == 3 for s in state.values()) and len(state) == len(list(load_run(run)[0].parameters()))
    ratio = after["affinity_head.proj.weight"] / fresh["affinity_head.proj.weight"]
    assert 0.99 < ratio.min() == pytest.approx(ratio.max().item(), abs=1e-6) and ratio.max() < 1
    assert 0.2 < fresh["affinity_head.proj.weight"].std() < 1.2


def test_nan_stops_and_keeps_the_last_good_checkpoint(root, tmp_path, monkeypatch):
    step = training.training_step

    def poisoned(net, labels, batch, i, config):
        loss, losses = step(net, labels, batch, i, config)
        if i == 7:
            loss, losses = loss * float("nan"), losses | dict(aff=losses["aff"] * float("nan"))
        return loss, losses

    monkeypatch.setattr(training, "training_step", poisoned)
    with pytest.raises(NotFinite, match="loss_aff is not finite since step 7") as error:
        train(preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT), verbose=False)
    print(error.value)
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    assert all(v.isfinite().all() for v in weights(tmp_path / "run", 6).values() if v.is_floating_point())


def bad_root(root, tmp_path, change):
    copy = shutil.copytree(root, tmp_path / "shapes")
    change(copy)
    return copy


def remove_image(copy):
    (copy / "JPEGImages/train_00003.png").unlink()


def truncate_image(copy):
    os.truncate(copy / "JPEGImages/train_00003.png", 900)


def write_text(copy):
    (copy / "JPEGImages/train_00003.png").write_text("not an image")


def remove_split(copy):
    (copy / "ImageSets/Segmentation/train.txt").unlink()


def small_mask(copy):
    save_mask(np.ones((10, 12), np.uint8), copy / "SegmentationClass/val_00001.png")


def wrong_value(copy):
    save_mask(np.full((64, 64), 77, np.uint8), copy / "SegmentationClass/train_00003.png")


def no_tags(copy):
    (copy / "SegmentationClass/train_00003.png").unlink()


@pytest.mark.parametrize(
    "change, message",
    [
        (remove_image, "train_00003"),
        (truncate_image, "train_00003.png: cannot be read"),
        (write_text, "train_00003.png: cannot be read"),
        (remove_split, "train.txt: no such split"),
        (small_mask, "val_00001.png is 12×10 pixels, but its image"),
        (wrong_value, "train_00003.png: holds the value 77"),
        (no_tags, "each needs tags.*the masks lack 1, the first is 'train_00003'"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_bad_data_is_named(root, tmp_path, change, message):
    copy = bad_root(root, tmp_path, change)
    with pytest.raises((ValueError, OSError), match=message) as error:
        train(
            preset(
                "demo",
                data_root=str(copy),
                run_dir=str(tmp_path / "run"),
                **SHORT | dict(max_iters=4, cam_iters=9, aff_iters=9),
            ),
            verbose=False,
        )
    print(error.value)


def test_root_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder") as error:
        train(preset("demo", data_root=str(tmp_path / "nowhere"), run_dir=str(tmp_path / "run")), verbose=False)
    print(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_images_of_every_mode_work(root, tmp_path, mode):
    def convert(copy):
        for path in sorted((copy / "JPEGImages").glob("train_*.png")):
            image = Image.open(path).convert(mode)
            path.unlink()
            image.save(path.with_suffix(".jpg" if mode in ("L", "CMYK") else ".png"))

    copy = bad_root(root, tmp_path, convert)
    sample = voc(copy, "train")[0]
    assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.uint8


def test_crop_smaller_than_the_stride():
    with pytest.raises(ValueError, match="crop_size 4 is smaller than the stride 8") as error:
        check(preset("demo", crop_size=4))
    print(error.value)


def test_two_processes_learn_what_one_learns(root, tmp_path):
    """The same samples in the same batches. Without stochastic depth the classifier learns the same up to the order
    of sums; the other losses are balanced, and the batch norm counts, within each process."""
    settings = dict(eval_every=100, max_iters=6, cam_iters=3, aff_iters=4, log_every=1, drop_path=0.0)
    one, two = tmp_path / "one", tmp_path / "two"
    done = subprocess.run(command(root, one, **settings), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]  # on CPUs `accelerate launch` starts one process unless there is MPI
    script = tmp_path / "run.py"
    script.write_text(
        command(root, two, **settings)[2]
        + "\n"
        + command(root, tmp_path / "again", **settings | dict(max_iters=1, cam_iters=1))[2]
    )
    done = subprocess.run(
        [*launch, str(script)],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "again/checkpoints/step-00000001").exists(), "a second run in the same script"
    assert len(list((two / "checkpoints").glob("step-*/random-*.pt"))) == 2 * len(
        list((two / "checkpoints").glob("step-*"))
    ), "a random state from each of two processes"
    a, b = ([r for r in read_metrics(run) if r["kind"] == "train"] for run in (one, two))
    assert [r["step"] for r in a] == [r["step"] for r in b] == [1, 2, 3, 4, 5, 6]
    for x, y in zip(a[:4], b):
        assert x["loss_cls"] == pytest.approx(y["loss_cls"], rel=1e-3)
    assert len([r for r in read_metrics(two) if r["kind"] == "eval"]) == 1, "one row, not one per process"
    assert json.loads((two / "config.json").read_text())["batch_size"] == 4


def test_a_run_of_an_earlier_version_continues(root, whole, tmp_path):
    "Its config.json names three settings that are gone; they never changed what is learned."
    config = preset("demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT)
    path = train(config, verbose=False, until=6) / "config.json"
    gone = dict(channels_last=False, cuda_graphs=False, compile=False)
    path.write_text(json.dumps(json.loads(path.read_text()) | gone))
    assert load_run(tmp_path / "run")[1] == config
    assert same(weights(train(config, verbose=False)), weights(whole))


def test_micro_batches_make_one_step(root, tmp_path):
    "The rate follows the iterations, not the micro-batches; a continued run goes on with the same rate."
    config = preset(
        "demo", data_root=str(root), run_dir=str(tmp_path / "run"), **SHORT | dict(accumulate=2, log_every=1)
    )
    train(config, verbose=False, until=5, ladder=())
    rows = [r for r in read_metrics(train(config, verbose=False, ladder=())) if r["kind"] == "train"]
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert [r["lr"] for r in rows] == [training.learning_rate(i, config.lr, 12, 2) for i in range(12)]


# ---------------------------------------------------------------- data that moved


def moved(root, tmp_path, change=None):
    "A run that has begun, and its settings with the data in another place."
    first = shutil.copytree(root, tmp_path / "here")
    config = preset("demo", data_root=str(first), run_dir=str(tmp_path / "run"), **SHORT)
    train(config, verbose=False, ladder=(), until=6)
    there = tmp_path / "elsewhere" / "data"
    there.parent.mkdir()
    shutil.move(first, there)
    if change:
        change(there)
    return replace(config, data_root=str(there))


def test_a_run_whose_data_moved_continues(root, whole, tmp_path):
    config = moved(root, tmp_path)
    run = train(config, verbose=False)
    assert same(weights(run), weights(whole)) and load_run(run)[1].data_root == config.data_root
    assert evaluate_run(run, ladder=("seg",))["images"] == 2, "from its new place"


def test_a_run_of_a_version_that_knew_less_continues_too(root, tmp_path):
    config = moved(root, tmp_path)
    path = tmp_path / "run/data.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({k: known[k] for k in ("images", "fingerprint")}))
    train(config, verbose=False, ladder=())
    assert json.loads(path.read_text()) == known


def test_a_table_of_tags_may_move_as_well(root, tmp_path):
    photos, names = tmp_path / "photos", [f"train_{i:05d}" for i in range(4)]
    photos.mkdir()
    for name in names:
        shutil.copy(root / "JPEGImages" / f"{name}.png", photos)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tags.csv").write_text("".join(f"{n},{'cow' if n[-1] < '2' else 'car'}\n" for n in names))
    settings = dict(data_root=str(photos), run_dir=str(tmp_path / "run"), train_split="all", val_split="masked")
    config = preset("demo", tags=str(tmp_path / "a/tags.csv"), **settings, **SHORT)
    train(config, verbose=False, until=3)
    train(replace(config, tags=str(tmp_path / "b/tags.csv")), verbose=False, until=6)
    (tmp_path / "a/tags.csv").write_text("".join(f"{n},{'cow' if n[-1] < '3' else 'car'}\n" for n in names))
    with pytest.raises(ValueError, match="tags was .* other tags on the same images; car on 2 images then, on 1 now"):
        train(config, verbose=False)


def fewer(there):
    path = there / "ImageSets/Segmentation/train.txt"
    path.write_text("\n".join(path.read_text().split()[:7]))


def renamed(there):
    path = there / "ImageSets/Segmentation/train.txt"
    path.write_text(path.read_text().replace("train_00003", "renamed"))
    for folder in ("JPEGImages", "SegmentationClass"):
        (there / folder / "train_00003.png").rename(there / folder / "renamed.png")


def reduced(there):
    for path in (there / "JPEGImages").glob("train_*.png"):
        Image.open(path).resize((32, 32)).save(path)


def other_tags(there):
    for i in range(16):
        save_mask(np.full((64, 64), 1, np.uint8), there / f"SegmentationClass/train_{i:05d}.png")


def other_classes(there):
    path = there / "classes.txt"
    path.write_text(path.read_text().replace("circle", "disc"))


@pytest.mark.parametrize(
    "change, words",
    [
        (fewer, r"on other data \(data_root was .*here', now .*data'\): 16 images then, 7 now"),
        (renamed, "as many images, but with other names"),
        (reduced, "the same names and tags, but files of other sizes"),
        (other_tags, "other tags on the same images; .* images then, on"),
        (other_classes, r"other classes \(added: disc; missing: circle\)"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_other_data_in_another_place_are_refused(root, tmp_path, change, words):
    config = moved(root, tmp_path, change)
    with pytest.raises(ValueError, match=words) as error:
        train(config, verbose=False)
    print(error.value)


def test_other_settings_are_refused_although_the_data_only_moved(root, tmp_path):
    with pytest.raises(ValueError, match="other settings .*data_root was .*lr was"):
        train(replace(moved(root, tmp_path), lr=1e-5), verbose=False)


# ---------------------------------------------------------------- images that show none of the classes


def negatives_beside(tags):
    "Labels (B,3) of which the last image shows none of the classes."
    return torch.tensor([*tags, [0.0, 0, 0]])


def test_labels_of_an_image_without_tags_are_background():
    labels = preset("demo").pseudo_labels()
    image, cam, affinity = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 8, 8), torch.rand(2, 64, 64)
    tags = negatives_beside([[1.0, 0, 1]])
    for label in (labels.refined(image, cam, tags), *labels.both(image, cam, affinity, tags)):
        assert (label[1] == 0).all() and set(label[0].unique().tolist()) <= {0, 1, 3, 255}
    alone = labels.refined(image[1:], cam[1:], tags[1:])
    assert (alone == 0).all(), "also where no image of the batch has a tag"
    box = torch.tensor([[0, 64, 0, 64], [8, 64, 0, 40]])
    padded = labels.refined(image, cam, tags, box)[1]
    assert (padded[8:, :40] == 0).all() and (padded[:8] == 255).all() and (padded[:, 40:] == 255).all()


@pytest.mark.parametrize("supervision", ["afa", "par", "cam"])
@pytest.mark.parametrize("tags", [[], [[1.0, 0, 1]]], ids=["alone", "beside a positive"])
def test_losses_of_an_image_without_tags(supervision, tags):
    torch.manual_seed(0)
    tags = negatives_beside(tags)
    config = preset("demo", supervision=supervision, crop_size=64, lambda_reg=1e-3)
    net = AFANet(4, "mit_tiny", stride=8, decoder_dim=16)
    box = torch.tensor([[0, 64, 0, 64]]).repeat(len(tags), 1)
    batch = dict(image=torch.randn(len(tags), 3, 64, 64), class_labels=tags, box=box)
    for step in (0, config.cam_iters, config.aff_iters):
        total, losses = training.training_step(net, config.pseudo_labels(), batch, step, config)
        net.zero_grad()
        total.backward()
        assert all(loss.isfinite() for loss in losses.values()) and losses["cls"] > 0
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    cls = net(batch["image"][-1:], seg=False, affinity=False).cls
    expected = torch.nn.functional.softplus(cls.double()).mean()  # every class is pushed down, none is left out
    assert classification_loss(cls, tags[-1:]).item() == pytest.approx(expected.item(), rel=1e-5)
    if supervision == "afa" and len(tags) == 1:
        refined, target = training.step_labels(net, config.pseudo_labels(), batch, None, config.aff_iters, config)
        pairs = affinity_labels(refined, 8, config.radius)
        assert (target == 0).all() and set(pairs.unique().tolist()) == {1, 255}, "no pair differs"
