"""Laws of layers: Fourier features, and several numbers from one network."""

import math

import pytest
import torch

from ebm.networks import FourierFeatures, scalar, scalar_fourier

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
