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
