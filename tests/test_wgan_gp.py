"""Laws of WGAN-GP: the penalty is that of the paper, who moves when and where, the distance."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from ebm.variants.wgan_gp import WGANGP, between

IMAGE = (3, 2, 2)


def model(shape=(2,), **changes):
    """A small WGAN-GP in float64."""
    torch.manual_seed(0)
    settings = {
        "network": "mlp",
        "energy": [16, 16],
        "generator": [16],
        "latent": 3,
        "energy_steps": 2,
        "gradient_penalty": 10.0,
        "energy_learning_rate": 1e-3,
        "generator_learning_rate": 1e-3,
        "betas": (0.5, 0.9),
        "ema": 0.0,
        "precision": "float32",
        "compile": False,
    }
    return WGANGP(shape, **settings | changes).double()


class Fixed(nn.Module):
    """A generator that makes the same points [N, *] whatever z, shifted by what it learns."""

    def __init__(self, points):
        super().__init__()
        self.points, self.shift = points, nn.Parameter(torch.zeros_like(points[0]))

    def forward(self, z):
        return self.points[: len(z)] + self.shift


def linear(shape=IMAGE, points=8, **changes):
    """A model whose critic is linear and whose generator is fixed, both moved by plain gradient
    descent of rate 1: every step has a closed form."""
    wgan = model(shape, **changes)
    wgan.energy_network = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 1))
    wgan.generator = Fixed(torch.rand(points, *shape))
    wgan.double()
    wgan.optimizers["energy"] = torch.optim.SGD(wgan.energy_network.parameters(), lr=1.0)
    wgan.optimizers["generator"] = torch.optim.SGD(wgan.generator.parameters(), lr=1.0)
    return wgan


def snapshot(network):
    return [p.detach().clone() for p in network.parameters()]


def moved(network, before):
    return any(not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def test_the_step_of_a_linear_critic_has_its_closed_form_over_all_axes():
    """Fails for a norm over the channels alone, and for any wrong sign or weight."""
    wgan, data = linear(), torch.rand(8, *IMAGE).double()
    w = wgan.energy_network[1].weight.detach().clone()
    fake = wgan.generator(data).detach()
    logs = wgan._energy_step(data)
    size = w.norm()
    assert logs["slope"].item() == pytest.approx(size.item())
    assert logs["penalty"].item() == pytest.approx((size.item() - 1) ** 2)
    over_channels = w.view(IMAGE).norm(dim=0)
    assert logs["penalty"].item() != pytest.approx((over_channels - 1).square().mean().item())
    gap = data.flatten(1).mean(0) - fake.flatten(1).mean(0)
    assert logs["energy_gap"].item() == pytest.approx((w @ gap).item())
    expected = w - gap - 2 * 10.0 * (size - 1) * w / size
    torch.testing.assert_close(wgan.energy_network[1].weight.detach(), expected)


def test_the_penalty_is_taken_on_the_segments_between_pairs():
    """Fails for a share of its own for every entry, and for one share for all pairs."""
    wgan, data = linear(), torch.rand(8, *IMAGE).double()
    fake = wgan.generator(data).detach().flatten(1)
    seen = []
    wgan.energy_network.register_forward_hook(lambda m, x, y: seen.append(x[0].detach()))
    wgan._energy_step(data)
    both, mixed = (x.flatten(1) for x in seen)
    torch.testing.assert_close(both, torch.cat([data.flatten(1), fake]))
    share = (mixed - fake) / (data.flatten(1) - fake)
    torch.testing.assert_close(share, share[:, :1].expand_as(share))
    assert 0 <= share.min() < share.max() <= 1
    assert share[:, 0].round(decimals=6).unique().numel() == len(data)


def test_between_goes_from_start_to_end():
    start, end = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    share = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(between(start, end, share), share.view(3, 1, 1).expand(3, 2, 2))


def test_the_generator_goes_down_the_energy():
    wgan = linear(ema=0.0)
    wgan._generator_step(8)
    w = wgan.energy_network[1].weight.detach()
    torch.testing.assert_close(wgan.generator.shift.detach(), -w.view(IMAGE))


def test_each_step_moves_its_own_network_only():
    wgan = model()
    critic, generator = snapshot(wgan.energy_network), snapshot(wgan.generator)
    wgan._energy_step(torch.randn(8, 2).double())
    assert moved(wgan.energy_network, critic)
    assert not moved(wgan.generator, generator)
    critic = snapshot(wgan.energy_network)
    wgan._generator_step(8)
    assert not moved(wgan.energy_network, critic)
    assert moved(wgan.generator, generator)


@pytest.mark.parametrize(
    ("n", "cut"), [(12, [3, 3, 3, 3, -3]), (6, [2, 2, 1, 1, -1]), (2, [1, 1, -1])]
)
def test_a_batch_is_cut_into_the_energy_steps_of_one_generator_step(n, cut):
    wgan, sizes = model(energy_steps=4), []
    wgan._energy_step = lambda data: sizes.append(len(data)) or {}
    wgan._generator_step = lambda n: sizes.append(-n) or {}
    wgan.training_step(torch.randn(n, 2).double())
    assert sizes == cut


def gaps(wgan, data, fake, steps=400):
    """Minus the gap over the last quarter of `steps` of the critic alone, a mean; in the plane,
    where a slope of the wrong sign can turn round, as it cannot on a line."""
    found = []
    for _ in range(steps):
        wgan.generator = Fixed(fake())
        found.append(wgan._energy_step(data())["energy_gap"])
    return -torch.stack(found[-steps // 4 :]).mean().item()


def test_the_gap_of_two_points_is_their_distance_and_the_slack_of_the_penalty():
    """The best critic is linear between them; its slope maximises g d - lambda (g - 1)^2."""
    d, penalty = 0.6, 2.0
    wgan = model(gradient_penalty=penalty, energy_learning_rate=3e-3)
    there, here = torch.tensor([[0.0, d], [0.0, 0.0]]).double().unsqueeze(1).expand(2, 64, 2)
    estimate = gaps(wgan, lambda: there, lambda: here)
    assert estimate == pytest.approx(d + d * d / (2 * penalty), rel=0.02)


@pytest.mark.parametrize("d", [0.5, 2.0])
def test_the_gap_of_two_gaussians_is_their_wasserstein_distance(d):
    torch.manual_seed(1)
    wgan = model(gradient_penalty=100.0, energy_learning_rate=3e-3).float()
    shift = torch.tensor([0.6 * d, 0.8 * d])
    estimate = gaps(
        wgan, lambda: shift + 0.5 * torch.randn(256, 2), lambda: 0.5 * torch.randn(256, 2)
    )
    assert estimate == pytest.approx(d, rel=0.1)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("shape", [(8, 8), (2, 9, 8)])
def test_images_are_trained_with_convolutions_in_less_precision(shape):
    """The energy is a number of full precision, and the penalty that of the exact critic."""
    settings = {"network": "conv", "energy": [4, 8], "generator": [8, 4], "gradient_penalty": 1.0}
    exact, rough = (
        model(shape, **settings, energy_learning_rate=1e-12, precision=precision).float()
        for precision in ("float32", "bfloat16")
    )
    x, logs = torch.rand(8, *shape), []
    for wgan in (exact, rough):
        torch.manual_seed(2)
        logs.append(wgan.training_step(x))
        assert wgan.energy(x).dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in wgan.parameters())
        drawn = wgan.eval().sample(5)["samples"]
        assert drawn.shape == (5, *shape)
        assert 0 <= drawn.min() <= drawn.max() <= 1
    full, less = (log["penalty"].item() for log in logs)
    assert full != less
    assert full == pytest.approx(less, rel=0.05)


def test_samples_are_of_the_moving_average():
    wgan = model(ema=0.9)
    wgan.training_step(torch.randn(8, 2).double())
    first = snapshot(wgan.generator)
    wgan.training_step(torch.randn(8, 2).double())
    for average, p, old in zip(
        wgan.average.parameters(), wgan.generator.parameters(), first, strict=True
    ):
        torch.testing.assert_close(average, (0.9 * old + p.detach()) / 1.9)
    torch.manual_seed(3)
    drawn = wgan.sample(4)["samples"]
    torch.manual_seed(3)
    assert torch.equal(drawn, wgan.average(wgan._prior(4)))


def test_in_the_end_the_averaged_generator_has_statistics_of_its_own():
    """Of its batch normalisation: with them draws in a large batch hardly depend on the mode."""
    widths = {"energy": [4, 4], "generator": [8, 4]}
    wgan = model((8, 8), network="conv", ema=0.9, **widths).float()
    for _ in range(8):
        wgan.training_step(torch.rand(16, 8, 8))
    weights, z = snapshot(wgan.average), wgan._prior(4000)

    def error():
        with torch.no_grad():
            wgan.average.train()
            expected = deepcopy(wgan.average)(z)
            wgan.average.eval()
            return (wgan.average(z) - expected).abs().mean().item()

    before = error()
    wgan.finish()
    assert not moved(wgan.average, weights)
    assert error() < 0.1 * before
    kept = {name: b.clone() for name, b in wgan.average.named_buffers() if "running" in name}
    assert kept
    torch.manual_seed(5)
    wgan.finish()
    assert all(
        torch.allclose(b, kept[name], atol=0.05)
        for name, b in wgan.average.named_buffers()
        if name in kept
    )


def test_it_learns_a_gaussian_that_is_not_its_prior():
    networks = {"energy": [64, 64], "generator": [32], "latent": 2, "ema": 0.98}
    wgan = model(**networks, gradient_penalty=0.1, energy_learning_rate=2e-3).float()
    torch.manual_seed(4)
    for _ in range(400):
        wgan.training_step(torch.tensor([0.5, -0.5]) + 0.3 * torch.randn(128, 2))
    drawn = wgan.sample(2000)["samples"]
    assert drawn.mean(0).tolist() == pytest.approx([0.5, -0.5], abs=0.1)
    assert drawn.std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.1)
