"""The training step on a CUDA device. Skipped where there is none.

The kernels are tested in nbs/a4_kernels.ipynb, interpreted where they must be."""

import warnings

import pytest
import torch

from afa_nb.model import AFANet
from afa_nb.par import PAR
from afa_nb.pseudo_labels import PseudoLabels
from afa_nb.runs import on_device
from afa_nb.settings import preset
from afa_nb.training import optimizer_of, training_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def network(config, device, classes=4):
    torch.manual_seed(0)
    net = (
        AFANet(classes, config.backbone, config.pooling, config.stride, config.decoder_dim, drop_path=0.0)
        .to(device)
        .train()
    )
    for m in net.modules():
        if isinstance(m, torch.nn.Dropout2d):
            m.p = 0.0
    return net


def batch(config, device):
    generator = torch.Generator().manual_seed(0)
    side = config.crop_size
    image = torch.randn(2, 3, side, side, generator=generator)
    made = dict(
        image=image,
        class_labels=torch.tensor([[1.0, 0, 0], [1.0, 1, 0]]),
        box=torch.tensor([[0, side, 0, side], [8, side - 8, 0, side]]),
    )
    return on_device(made, device)


@pytest.fixture
def config():
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield preset("demo", crop_size=96, lambda_reg=0.01, cam_iters=1, aff_iters=2)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def test_losses_are_the_cpus(config):
    labels = config.pseudo_labels()
    found = [training_step(network(config, d), labels, batch(config, d), 2, config)[1] for d in ("cpu", "cuda")]
    assert found[0].keys() == found[1].keys() == {"cls", "aff", "seg", "reg"}
    for k in found[0]:
        assert abs(found[0][k].item() - found[1][k].item()) < 1e-3 * abs(found[0][k].item()), k


def test_propagated_labels_are_the_cpus():
    "With a padded crop in the batch, and with none."
    generator = torch.Generator().manual_seed(0)
    image, cam, tags = (
        torch.rand(3, 3, 64, 64, generator=generator),
        torch.rand(3, 2, 16, 16, generator=generator),
        torch.ones(3, 2),
    )
    S = torch.randn(3, 16, 16, generator=generator)
    for box in (torch.tensor([[0, 64, 0, 64], [5, 60, 0, 33], [0, 64, 0, 64]]), None):
        labels, inputs = PseudoLabels(PAR(num_iter=3), radius=1), (image, cam, (S + S.mT).sigmoid(), tags)
        found, expected = (labels.both(*(x.to(device) for x in inputs), box) for device in ("cuda", "cpu"))
        for f, e in zip(found, expected):
            assert (f.cpu() == e).float().mean() > 0.999


def test_step_does_not_wait_for_the_device(config):
    net, labels, samples = network(config, "cuda"), config.pseudo_labels(), batch(config, "cuda")
    optimizer = optimizer_of(net, config)

    def update(step):
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = training_step(net, labels, samples, step, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for step in (0, 1, 2, 0, 1, 2):
        update(step)  # compiles, fills caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(3):
                update(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [w for w in caught if "called a synchronizing" in str(w.message)]
