"""ImageNet weights for every variant, through the files and the converter that `weights="auto"` uses."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from afa_nb import model, settings, training, weights
from afa_nb.encoder import VARIANTS
from afa_nb.model import AFANet
from afa_nb.shapes import make_shapes
from afa_nb.weights import PRETRAINED, load_weights, pretrained

pytestmark = pytest.mark.slow


@pytest.fixture
def cache(monkeypatch):
    "The hub's cache as a dict of name → file; nothing else of the hub can be reached."
    files = {}

    def cached(name, file):
        return str(files[name]) if name in files else None

    def unreachable():
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    monkeypatch.setattr("huggingface_hub.get_session", unreachable)
    return files


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    "Cheap random numbers: 80 million truncated normals take longer than all the rest, and the weights are replaced."

    def cheap(weight, std):
        weight.data.uniform_(-2 * std, 2 * std)

    monkeypatch.setattr("timm.models.pvt_v2.trunc_normal_", cheap)


def with_noise(net):
    "New layer norms are ones and zeros, which would hide two that changed places."
    for p in net.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
    return net.eval()


def segformer_config(variant):
    transformers = pytest.importorskip("transformers")
    v = {k: list(numbers) for k, numbers in VARIANTS[variant].items()}
    return transformers.SegformerConfig(hidden_sizes=v["widths"], depths=v["depths"], num_attention_heads=v["heads"])


def assert_same_features(variant, expected):
    net = AFANet(3, variant, stride=32).eval()
    report = load_weights(net, "auto", verbose=False)
    assert not any(k.startswith("encoder.") for k in report["missing"] + report["unused"])
    with torch.no_grad():
        features, _ = net.encoder(IMAGE)
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", [v for v in PRETRAINED if v.startswith("mit")])
def test_transformers_segformer_gives_the_same_features(variant, cache, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = with_noise(transformers.SegformerForImageClassification(segformer_config(variant))).segformer
    theirs.save_pretrained(tmp_path)
    cache[pretrained(variant)] = tmp_path / "model.safetensors"
    with torch.no_grad():
        assert_same_features(variant, theirs(IMAGE, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("variant", [v for v in PRETRAINED if v.startswith("pvt")])
def test_timm_pvt_v2_gives_the_same_features(variant, cache, tmp_path):
    torch.manual_seed(0)
    theirs = with_noise(timm.create_model(variant))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    cache[pretrained(variant)] = tmp_path / "model.safetensors"
    with torch.no_grad():
        assert_same_features(variant, theirs.forward_intermediates(IMAGE, intermediates_only=True))


def test_timm_publishes_what_the_table_says():
    for variant, row in PRETRAINED.items():
        if not variant.startswith("pvt"):
            continue
        published = timm.models.get_pretrained_cfg(variant)
        assert row["hub"] == published.hf_hub_id and row["licence"].lower() == published.license


def test_the_hub_file_with_its_classifier(cache, tmp_path):
    "What nvidia/mit-b0 holds: a classification model under `segformer.`, as a pickle."
    transformers = pytest.importorskip("transformers")
    whole = with_noise(transformers.SegformerForImageClassification(segformer_config("mit_b0")))
    whole.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "segformer.encoder.block.0.0.attention.self.query.weight" in state and "classifier.weight" in state
    torch.save(state, tmp_path / "pytorch_model.bin")
    cache["nvidia/mit-b0"] = tmp_path / "pytorch_model.bin"
    net = AFANet(3, "mit_b0", stride=32).eval()
    report = load_weights(net, "auto", verbose=False)
    assert {k.split(".")[0] for k in report["unused"]} == {"head"} and "classifier.weight" in report["missing"]
    with torch.no_grad():
        expected = whole.segformer(IMAGE, output_hidden_states=True).hidden_states
    with torch.no_grad():
        torch.testing.assert_close(net.encoder(IMAGE)[0][-1], expected[-1], atol=1e-4, rtol=0)


def test_without_network_and_cache_nothing_is_made_up(cache, tmp_path):
    root = make_shapes(tmp_path / "shapes", num_train=2, num_val=1, size=64)
    run = tmp_path / "run"
    config = settings.preset("demo", data_root=str(root), run_dir=str(run), backbone="mit_b0", weights="auto")
    url = "https://huggingface.co/nvidia/mit-b0/resolve/main/pytorch_model.bin"
    with pytest.raises(FileNotFoundError, match=f'nvidia/mit-b0: .* Fetch {url} .* weights="none"') as error:
        training.train(config, verbose=False)
    print(error.value)
    assert not run.exists(), "the same call with a file as weights would be refused there"


def test_auto_for_a_variant_without_weights_fails_before_training(cache):
    with pytest.raises(ValueError, match='no ImageNet weights are published for mit_tiny.*weights="none"'):
        settings.check(settings.preset("demo", weights="auto"))


def test_model_still_knows_the_names_that_users_know():
    names = "PRETRAINED pretrained convert_weights read_state find_weights load_weights".split()
    assert all(getattr(model, name) is getattr(weights, name) for name in names)


# ---------------------------------------------------------------- under prefixes


TINY = dict(widths=(8, 16, 24, 32), depths=(1, 1, 1, 2), heads=(1, 1, 2, 4))


def tiny():
    return with_noise(AFANet(3, TINY, decoder_dim=8))


def segformer_names(encoder):
    "Our encoder's tensors by the names in `mit_b0.pth`."
    names = {}
    for name, tensor in encoder.state_dict().items():
        part, *rest = name.replace(".dwconv.", ".dwconv.dwconv.").split(".")
        if part == "patch_embed":
            names[f"patch_embed1.{'.'.join(rest)}"] = tensor
        else:
            what = dict(downsample="patch_embed", blocks="block", norm="norm")[rest[1]]
            names[".".join([f"{what}{int(rest[0]) + 1}", *rest[2:]])] = tensor
    return names


def mmsegmentation_names(encoder):
    "The same by mmsegmentation's, whose attention is PyTorch's and whose MLP consists of convolutions."
    names, state = {}, segformer_names(encoder)
    for name, tensor in state.items():
        first, rest = name.split(".", 1)
        what, stage = first[:-1], int(first[-1]) - 1
        if what == "patch_embed":
            names[f"layers.{stage}.0.{rest.replace('proj.', 'projection.')}"] = tensor
        elif what == "norm":
            names[f"layers.{stage}.2.{rest}"] = tensor
        elif ".kv." not in rest:
            if ".q." in rest:
                tensor = torch.cat([tensor, state[name.replace(".q.", ".kv.")]])
            new = rest.replace("attn.q.", "attn.attn.in_proj_").replace("attn.proj.", "attn.attn.out_proj.")
            for ours, theirs in (("fc1", "0"), ("dwconv.dwconv", "1"), ("fc2", "4")):
                new = new.replace(f"mlp.{ours}.", f"ffn.layers.{theirs}.")
            convolution = new.endswith((".0.weight", ".4.weight")) and "ffn" in new
            names[f"layers.{stage}.1.{new}"] = tensor[:, :, None, None] if convolution else tensor
    return names


LAYOUTS = dict(ours=torch.nn.Module.state_dict, segformer=segformer_names, mmsegmentation=mmsegmentation_names)
PREFIXES = ["", "backbone.", "encoder.", "model.", "module.", "_orig_mod.", "model.encoder.", "module.model.backbone."]
HEADS = {"decode_head.conv_seg.weight": torch.zeros(2), "classifier.weight": torch.zeros(7, 7)}


def assert_encoder_loads(state, source, path):
    torch.save(state, path)
    net = tiny()
    before = net.classifier.weight.clone()
    report = load_weights(net, path, verbose=False)
    assert not [k for k in report["missing"] if k.startswith("encoder.")]
    for k, v in source.encoder.state_dict().items():
        assert torch.equal(net.encoder.state_dict()[k], v), k
    assert torch.equal(net.classifier.weight, before), "another network's classifier is not taken for ours"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_encoder_under_a_prefix_loads(layout, prefix, tmp_path):
    source = tiny()
    state = {prefix + k: v for k, v in LAYOUTS[layout](source.encoder).items()}
    assert_encoder_loads(state | HEADS, source, tmp_path / "weights.pth")


@pytest.mark.parametrize("within", ["state_dict", "model", "params", "model_state_dict", "model state_dict"])
def test_tensors_may_lie_within_a_checkpoint(within, tmp_path):
    source = tiny()
    state = {f"_orig_mod.backbone.{k}": v for k, v in segformer_names(source.encoder).items()}
    for key in reversed(within.split()):
        state = {key: state, "epoch": 7, "optimizer": {"lr": 0.1}}
    assert_encoder_loads(state, source, tmp_path / "weights.pth")


@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.module.{}", "model.{}"])
def test_a_whole_network_under_a_prefix_loads(wrap, tmp_path):
    source, net = tiny(), tiny()
    torch.save({wrap.format(k): v for k, v in source.state_dict().items()}, tmp_path / "weights.pth")
    assert load_weights(net, tmp_path / "weights.pth", verbose=False)["missing"] == []
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in net.state_dict().items())


def test_parts_that_were_compiled_or_wrapped_load(tmp_path):
    source = tiny()
    state = {k.replace("stages.", "stages._orig_mod."): v for k, v in source.encoder.state_dict().items()}
    state = {f"module.{k}".replace("stages.", "stages.module.", 1): v for k, v in state.items()}
    assert_encoder_loads(state, source, tmp_path / "weights.pth")


def test_transformers_networks_load_by_the_names_they_have_and_are_saved_under(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_sizes=[*TINY["widths"]], depths=[*TINY["depths"]], num_attention_heads=[*TINY["heads"]])
    theirs = with_noise(transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes)))
    theirs.save_pretrained(tmp_path)
    torch.save({f"model.{k}": v for k, v in theirs.state_dict().items()}, tmp_path / "lightning.pth")
    with torch.no_grad():
        expected = theirs.segformer(IMAGE, output_hidden_states=True).hidden_states
    for name in ("model.safetensors", "lightning.pth"):
        net = AFANet(3, TINY, stride=32).eval()
        load_weights(net, tmp_path / name, verbose=False)
        with torch.no_grad():
            for ours, other in zip(net.encoder(IMAGE)[0], expected, strict=True):
                torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)


def damaged(names, prefix):
    return {f"{prefix}{k}": v for k, v in names.items() if "patch_embed" not in k and "layers.0.0" not in k}


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda s: damaged(s.encoder.state_dict(), "backbone.") | {"backbone.extra": torch.zeros(1)},
            r"nearest kind is PVT v2 encoder: \d+ of this network's \d+ tensors are there "
            r"\(encoder.patch_embed.proj.weight is missing, encoder.extra has no place\)",
        ),
        (lambda s: damaged(segformer_names(s.encoder), "model."), "nearest kind is SegFormer encoder"),
        (lambda s: damaged(mmsegmentation_names(s.encoder), ""), "nearest kind is mmsegmentation SegFormer encoder"),
        (
            lambda s: {f"{who}.{k}": v for who in ("student", "teacher") for k, v in s.encoder.state_dict().items()},
            "PVT v2 encoder is there under student. and under teacher.: keep one of them",
        ),
        (lambda s: {"layer1.0.conv1.weight": torch.zeros(1)}, r"no known kind. Known are .*SegFormer encoder \(with"),
        (lambda s: AFANet(3, "mit_tiny").encoder.state_dict(), r"of another architecture.*\d+ tensors fit"),
    ],
    ids=["ours", "segformer", "mmsegmentation", "twice", "resnet", "another size"],
)
def test_what_cannot_be_loaded_is_refused_with_the_nearest_kind(make, words, tmp_path):
    net = tiny()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.save(make(net), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"weights.pth.*{words}") as error:
        load_weights(net, tmp_path / "weights.pth", verbose=False)
    print(error.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
