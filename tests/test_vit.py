"""Plain vision transformers: the key names of files, the hub, and everything that is done with a run."""

import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from afa_nb import predict
from afa_nb.model import AFANet
from afa_nb.runs import evaluate_run, load_run, read_metrics
from afa_nb.settings import check, preset
from afa_nb.shapes import make_shapes
from afa_nb.training import optimizer_of, train
from afa_nb.vit import VisionTransformer
from afa_nb.weights import load_weights

SHORT = dict(max_iters=6, cam_iters=2, aff_iters=4, warmup_iters=1, crop_size=64, batch_size=2, radius=2, save_every=3)
TINY = dict(backbone="test_vit", weights="none", decoder_dim=16, eval_every=100)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=8, num_val=2, size=64)


@pytest.fixture(scope="module", params=[False, True], ids=["trained", "frozen"])
def run(request, root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit") / "run"
    config = preset("demo", data_root=str(root), run_dir=str(folder), freeze=request.param, **TINY | SHORT)
    train(config, verbose=False, until=3)
    return train(config, verbose=False)


# ---------------------------------------------------------------- key names


def openai(state):
    "timm's names → those of OpenAI's CLIP, beside its text tower."
    names = [
        (r"^patch_embed\.proj\.", "conv1."),
        (r"^blocks\.", "transformer.resblocks."),
        (r"norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"norm(\d)", r"ln_\1"),
        (r"qkv\.", "in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    ]
    for pattern, new in names:
        state = {re.sub(pattern, new, k): v for k, v in state.items()}
    state["class_embedding"], state["positional_embedding"] = state.pop("cls_token")[0, 0], state.pop("pos_embed")[0]
    state["proj"] = torch.zeros(len(state["class_embedding"]), 5)
    return {f"visual.{k}": v for k, v in state.items()} | {"token_embedding.weight": torch.zeros(7, 3)}


def registers(state):
    "timm's names → DINOv2's with registers, whose positions count the class token."
    state["register_tokens"], state["mask_token"] = state.pop("reg_token"), torch.zeros(1, 1)
    nothing = torch.zeros_like(state["pos_embed"][:, :1])
    return state | dict(pos_embed=torch.cat([nothing, state["pos_embed"]], 1))


def dinov3(state):
    "timm's names → Meta's: fused biases, tokens of storage."
    state = {k.replace("gamma_", "ls").replace("reg_token", "storage_tokens"): v for k, v in state.items()}
    return {re.sub(r"(ls\d)$", r"\1.gamma", k): v for k, v in state.items()} | dict(mask_token=torch.zeros(1, 1))


SMALL = dict(depth=4, embed_dim=48, num_heads=3)
LAYOUTS = {
    "timm": ("vit_small_patch16_224", dict),
    "timm, with a head": ("vit_small_patch16_224", lambda s: s | {"head.weight": torch.zeros(9, 48)}),
    "DeiT": ("deit_small_distilled_patch16_224", lambda s: {"model": s | {"head_dist.weight": torch.zeros(9, 48)}}),
    "DINOv2": ("vit_small_patch14_dinov2", lambda s: s | dict(mask_token=torch.zeros(1, 48))),
    "DINOv2, registers": ("vit_small_patch14_reg4_dinov2", registers),
    "DINOv3": ("vit_small_patch16_dinov3", dinov3),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", openai),
    "norm after pooling": ("vit_base_patch16_reg4_gap_256", dict),
    "a wrapped teacher": ("vit_small_patch16_224", lambda s: {f"module.backbone.{k}": v for k, v in s.items()}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_in_other_key_names_give_the_same_features(tmp_path, layout):
    name, rename = LAYOUTS[layout]
    torch.manual_seed(0)
    source, target = (VisionTransformer(name, **SMALL).eval() for _ in range(2))
    for p in source.parameters():
        p.data += 0.1 * torch.randn_like(p)
    state = {k: v.clone() for k, v in source.vit.state_dict().items()}
    if source.norms_late:
        state = {re.sub("^norm", "fc_norm", k): v for k, v in state.items()}
    torch.save(rename(state), tmp_path / "weights.pth")
    net = AFANet(3, target, stride=target.stride)
    net.variant = name
    report = load_weights(net, tmp_path / "weights.pth", verbose=False)
    assert not [k for k in report["missing"] if k.startswith("encoder.")]
    image = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        (features, S), (expected, T) = target(image), source(image)
    assert all(torch.allclose(f, e, atol=1e-5) for f, e in zip(features, expected, strict=True))
    assert torch.allclose(S, T, atol=1e-4)


def test_patches_of_14_are_resampled_to_16(tmp_path):
    torch.manual_seed(0)
    old, new = (VisionTransformer("vit_small_patch14_dinov2", stride, **SMALL) for stride in (14, 16))
    save_file(old.vit.state_dict(), tmp_path / "a.safetensors")
    net = AFANet(3, new, stride=16)
    load_weights(net, tmp_path / "a.safetensors", verbose=False)
    assert torch.equal(new.vit.blocks[0].attn.qkv.weight, old.vit.blocks[0].attn.qkv.weight)
    grey = torch.ones(1, 3, 16, 16)
    seen, expected = new.vit.patch_embed(grey), old.vit.patch_embed(grey[..., :14, :14])
    assert torch.allclose(seen, expected, atol=0.05 * expected.std().item()), "the same area looks the same"


@pytest.mark.parametrize(
    "state, words",
    [
        ({"conv1.weight": torch.zeros(1)}, "this file has 0"),
        ({f"{who}.patch_embed.proj.weight": torch.zeros(1) for who in ("teacher", "student")}, "keep one of these"),
        (timm.create_model("vit_small_patch16_224", depth=1, embed_dim=96).state_dict(), r"is \(96,"),
    ],
)
def test_weights_of_something_else_are_refused(tmp_path, state, words):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=words):
        load_weights(AFANet(3, "test_vit", stride=16), tmp_path / "a.pth", verbose=False)


def test_an_adapter_begins_by_doing_nothing_and_is_not_dropped(tmp_path):
    torch.manual_seed(0)
    free, frozen = (AFANet(3, "test_vit", stride=16, decoder_dim=16, freeze=freeze).eval() for freeze in (False, True))
    save_file(free.state_dict(), tmp_path / "free.safetensors")
    assert {k.split(".")[0] for k in load_weights(frozen, tmp_path / "free.safetensors")["missing"]} == {"adapter"}
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(free(image).cls, frozen(image).cls)
    save_file(frozen.state_dict(), tmp_path / "frozen.safetensors")
    with pytest.raises(ValueError, match="needs freeze=True"):
        load_weights(free, tmp_path / "frozen.safetensors")


# ---------------------------------------------------------------- a run


def test_a_run_is_continued_measured_and_loaded(run, root):
    rows = read_metrics(run)
    assert rows[-1]["final"] and {"cam", "propagated_par", "seg_crf"} <= set(rows[-1])
    net, config, _ = load_run(run)
    assert isinstance(net.encoder, VisionTransformer) and net.freeze == config.freeze
    first, last = (load_file(path / "model.safetensors") for path in sorted((run / "checkpoints").iterdir()))
    moved = {k.split(".")[0] for k, v in last.items() if not torch.equal(v, first[k])}
    assert moved >= {"classifier", "decoder", "affinity_head"} and ("encoder" in moved) != config.freeze
    assert ("adapter" in moved) == config.freeze
    assert evaluate_run(run, "train", ladder=("cam", "raw_attention"))["raw_attention"] > 0


def test_a_run_predicts_and_is_explored(run, root, tmp_path):
    pytest.importorskip("ipyevents", reason="the widgets are not installed: pip install 'afa_nb[dev]'")
    from afa_nb.explorer import open_bench

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 50, 3), np.uint8)).save(tmp_path / "a.png")
    report = predict.predict_folder(predict.load(run, crf=False), tmp_path / "a.png", tmp_path / "out")
    assert report.done == ["a"] and Image.open(tmp_path / "out/a.png").size == (50, 70)
    bench = open_bench(run, 0)
    assert bench.heads == 2 and len(bench.seen.attention) == 4
    assert torch.allclose(bench.seen.attention.sum(-1), torch.ones(()), atol=1e-5)


def test_a_run_is_exported(run, tmp_path):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module, reason="needed to write ONNX: pip install 'afa_nb[onnx]'")
    onnxruntime = pytest.importorskip("onnxruntime")
    net = load_run(run)[0].cpu()
    file = predict.export_onnx(net, tmp_path / "seg.onnx", (64, 96))
    picture = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 96), dtype=np.uint8)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    (found,) = session.run(None, {given.name: picture if "uint8" in given.type else picture.astype(np.float32) / 255})
    with torch.no_grad():
        expected = predict._Segmentation(net)(torch.from_numpy(picture))
    assert np.abs(found - expected.numpy()).max() < 1e-3


def test_layers_learn_more_slowly_the_deeper_they_lie():
    net = AFANet(3, "test_vit", stride=16)
    config = preset("demo", backbone="test_vit", layer_decay=0.5, norm_lr_ratio=1.0)
    ratio_of = {id(p): group["ratio"] for group in optimizer_of(net, config).param_groups for p in group["params"]}
    assert len(ratio_of) == len(list(net.parameters()))
    ratios = {name: ratio_of[id(p)] for name, p in net.encoder.vit.named_parameters()}
    assert ratios["blocks.5.mlp.fc1.weight"] == ratios["norm.weight"] == 1
    assert ratios["blocks.4.norm1.weight"] == 0.5 and ratios["blocks.0.attn.qkv.weight"] == 0.5**5
    assert ratios["patch_embed.proj.weight"] == ratios["pos_embed"] == 0.5**6


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(backbone="vit_smal_patch16_224"), "nearest plain ones are vit_small_patch16_224"),
        (dict(backbone="resnet50"), "no attention"),
        (dict(backbone="swin_tiny_patch4_window7_224"), "no plain vision transformer"),
        (dict(backbone="test_vit", crop_size=100), "take 96 or 104"),
        (dict(layer_decay=0.0), r"layer_decay must lie in \(0,1\]"),
    ],
)
def test_what_cannot_be_an_encoder_is_told_before_training(changes, words):
    with pytest.raises(ValueError, match=words):
        check(preset("demo", weights="none", **changes))


# ---------------------------------------------------------------- the hub


class Hub(http.server.BaseHTTPRequestHandler):
    "Answers as the Hugging Face hub does for one file."

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body):
        there = self.path in ("/", "/timm/test_vit.r160_in1k/resolve/main/model.safetensors")
        body = self.server.file.read_bytes() if there and self.path != "/" else b""
        self.send_response(200 if there else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0123456789"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if not there:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_auto_fetches_what_timm_has_published(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("test_vit").state_dict()
    save_file(state, tmp_path / "model.safetensors")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.file = tmp_path / "model.safetensors"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
from afa_nb.model import AFANet, load_weights
net = AFANet(3, "test_vit", stride=16)
print(load_weights(net, "auto")["kind"], net.encoder.vit.blocks[0].attn.qkv.weight.sum().item())
"""
    here = f"http://127.0.0.1:{server.server_port}"
    own = dict(HF_ENDPOINT=here, HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | own
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    kind, total = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert kind == "test_vit encoder"
    assert float(total) == pytest.approx(state["blocks.0.attn.qkv.weight"].sum().item(), abs=1e-3)
