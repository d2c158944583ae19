"""Laws of layers: Fourier features, and several numbers from one network."""

import math

import pytest
import torch
from torch.nn import Conv2d
from torch.nn import functional as F

from ebm import EBMError
from ebm.networks import (
    BatchNorm,
    FourierFeatures,
    Modulation,
    Residual,
    Scalar,
    Signed,
    encoder,
    scalar,
    scalar_fourier,
)

pytestmark = pytest.mark.usefixtures("double")


def test_fourier_features_know_distances_only():
    """<phi(x), phi(y)> is the mean of cos w (x - y): of many w, a Gaussian kernel."""
    torch.manual_seed(0)
    features = FourierFeatures(2, 8000, bandwidth=3.0)
    x, y = 0.3 * torch.randn(6, 2), 0.3 * torch.randn(6, 2)

    def kernel(x, y):
        phi, psi = features(x), features(y)
        assert torch.equal(phi[:, :2], x)
        return (phi[:, 2:] * psi[:, 2:]).sum(1) / 8000

    torch.testing.assert_close(kernel(x, x), torch.ones(6))
    torch.testing.assert_close(kernel(x + 1.3, y + 1.3), kernel(x, y))
    expected = (-9.0 * (x - y).square().sum(1) / 2).exp()
    assert (kernel(x, y) - expected).abs().max() < 4 / math.sqrt(8000)


def test_the_frequencies_are_kept_and_not_trained():
    features = FourierFeatures(2, 5, bandwidth=1.0)
    assert not list(features.parameters())
    assert features.state_dict()["frequencies"].shape == (2, 5)


def test_phases_are_not_rounded_by_autocast():
    """64 turns in bfloat16 are known to a quarter of one."""
    features = FourierFeatures(2, 50, bandwidth=100.0).float()
    x = torch.rand(8, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = features(x)
    assert torch.equal(found, features(x))


NETWORKS = {
    "mlp": (lambda outputs: scalar("mlp", (3,), 0, outputs, width=4, depth=2), (3,)),
    "fourier": (lambda outputs: scalar_fourier(3, 4, 2, 5, 1.0, 0, outputs), (3,)),
    "conv": (lambda outputs: scalar("conv", (8, 8), 0, outputs, width=2, depth=2), (1, 8, 8)),
    "strided": (
        lambda outputs: scalar("strided", (8, 8), 0, outputs, width=2, depth=2),
        (1, 8, 8),
    ),
    "resnet": (lambda outputs: scalar("resnet", (8, 8), 0, outputs, width=2, depth=2), (1, 8, 8)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_output_is_a_network_that_shares_all_but_its_last_row(kind):
    make, shape = NETWORKS[kind]
    torch.manual_seed(1)
    several, one, x = make(3), make(1), torch.randn(5, *shape)
    found = several(x)
    assert found.shape == (5, 3)
    for k in range(3):
        state = several.state_dict()
        state |= {f"head.{name}": state[f"head.{name}"][k : k + 1] for name in ("weight", "bias")}
        one.load_state_dict(state)
        torch.testing.assert_close(one(x), found[:, k])


def test_a_pooled_network_sums_over_the_image():
    torch.manual_seed(2)
    network, x = Scalar([], 3, images=True, pool=True), torch.randn(5, 3, 4, 6)
    torch.testing.assert_close(network(x), network.head(x.sum((2, 3))).squeeze(1))


def test_images_enter_an_encoder_from_minus_one_to_one():
    x = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1)
    assert Signed()(x).flatten().tolist() == [-1, 0, 1]
    assert Signed()(x).shape == (3, 1, 1, 1)


def test_a_residual_block_begins_as_its_skip_connection():
    torch.manual_seed(3)
    x = torch.randn(5, 4, 6, 6)
    for down, expected in ((False, x), (True, F.avg_pool2d(x, 2))):
        found = Residual(4, 4, 0, down)(x, None)
        torch.testing.assert_close(found, F.leaky_relu(expected, 0.2))


def of_classes(kind):
    """A number for each of three classes, with weights that are all different."""
    torch.manual_seed(4)
    network = scalar(kind, (8, 8), classes=3, width=2, depth=1)
    with torch.no_grad():
        for p in network.parameters():
            p += torch.randn_like(p)
    return network


@pytest.mark.parametrize("kind", ["mlp", "conv", "strided", "resnet"])
def test_every_number_of_a_class_is_its_own(kind):
    """Gains and biases of class k alone are moved by points of class k."""
    network = of_classes(kind)
    network.of_points(torch.randn(6, 8, 8), torch.full((6,), 2)).sum().backward()
    modulations = [m for m in network.modules() if isinstance(m, Modulation)]
    assert modulations
    for module in modulations:
        for p in (module.gain, module.bias):
            assert (p.grad[:2] == 0).all()
            assert (p.grad[2] != 0).any()


@pytest.mark.parametrize("kind", ["mlp", "conv", "strided", "resnet"])
def test_a_point_has_the_number_of_its_own_class_whatever_is_beside_it(kind):
    network = of_classes(kind)
    x, y = torch.randn(6, 8, 8), torch.tensor([2, 0, 1, 1, 0, 2])
    alone = torch.cat([network.of_points(x[k : k + 1], y[k : k + 1]) for k in range(6)])
    torch.testing.assert_close(network.of_points(x, y), alone)
    assert (network.of_points(x, y) != network.of_points(x, (y + 1) % 3)).all()


def test_below_zero_a_unit_of_an_encoder_leaks_a_fifth():
    network = encoder("mlp", (1,), [1], 1)
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(float(p.dim() > 1))  # weights 1, biases 0
    assert network(torch.tensor([[-3.0], [2.0]])).flatten().tolist() == pytest.approx([-0.6, 2])


def test_networks_of_images_have_the_channels_that_they_are_said_to_have():
    """Those of IGEBM's code for MNIST and CIFAR-10, but for the width."""

    def channels(kind):
        modules = scalar(kind, (3, 16, 16), width=4, depth=3).blocks.modules()
        return [(m.in_channels, m.out_channels) for m in modules if isinstance(m, Conv2d)]

    assert channels("conv") == [(3, 4), (4, 4), (4, 8), (8, 16)]
    assert channels("strided") == [(3, 4), (4, 8), (8, 16)]
    block = [(4, 4)] * 4
    widened = [(4, 8), (8, 8), (4, 8), (8, 8), (8, 8)]  # the third is beside the first two
    assert channels("resnet") == [(3, 4), *block, *widened, *[(8, 8)] * 4]


def test_one_number_of_a_channel_is_too_few_to_normalise_by():
    layer = BatchNorm(3)
    with pytest.raises(EBMError, match=r"train\.batch_size: expected two rows"):
        layer(torch.randn(1, 3, 1, 1))
    for rows, side in [(2, 1), (1, 2)]:
        normalised = layer(torch.randn(rows, 3, side, side))
        torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3))
    assert layer.eval()(torch.randn(1, 3, 1, 1)).isfinite().all()
