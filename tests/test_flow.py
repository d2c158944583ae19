"""Laws of a flow as a model: a density of the data, exact draws, maximum likelihood."""

import math

import pytest
import torch
from small_models import MODELS

from ebm.metrics import cell_centres
from ebm.variants.flow import NormalisingFlow

KINDS = {
    "gaussian": {"kind": "gaussian"},
    "spline": {"kind": "spline", "transforms": 2, "bins": 4, "width": 16},
    "coupling": {"kind": "coupling", "transforms": 3, "width": 16},
    "glow": {"kind": "glow", "levels": 1, "depth": 1, "width": 4},
}
SCALE, MEAN = torch.tensor([0.6, 0.2]), torch.tensor([-0.5, 0.4])


def model(kind, shape=(2,), **changes):
    torch.manual_seed(0)
    return NormalisingFlow(shape, **MODELS["flow"] | {"flow": KINDS[kind]} | changes)


def data(n):
    """Two bumps, neither near 0 nor of size 1."""
    side = (torch.rand(n) < 0.5).float() * 2 - 1
    x = torch.stack([0.9 * side, side], 1) + 0.4 * torch.randn(n, 2)
    return MEAN + SCALE * x


def log_density(x):
    u = (x - MEAN) / SCALE
    bumps = [-(u - s * torch.tensor([0.9, 1.0])).square().sum(1) / (2 * 0.4**2) for s in (-1, 1)]
    constant = math.log(2 * 2 * math.pi * 0.4**2) + SCALE.log().sum()
    return torch.logaddexp(*bumps) - constant


@pytest.mark.parametrize("kind", ["gaussian", "spline", "coupling"])
def test_exp_of_minus_the_energy_integrates_to_one_over_the_data(kind):
    flow = model(kind).double()
    torch.manual_seed(1)
    flow.initialise(data(500).double())
    with torch.no_grad():
        total = (-flow.energy(cell_centres(-4, 4, 240))).logsumexp(0) + 2 * math.log(8 / 240)
    assert total.item() == pytest.approx(0, abs=2e-3)
    assert flow.normalised


def test_a_step_goes_down_the_mean_energy_and_touches_nothing_else():
    flow = model("coupling")
    torch.manual_seed(1)
    x = data(400)
    flow.initialise(x)
    space = [b.clone() for b in flow.space.buffers()]
    before = flow.energy(x).mean()
    logs = flow.training_step(x)
    torch.testing.assert_close(logs["energy_gap"], before.detach())
    torch.testing.assert_close(flow.log_likelihood(x), -flow.energy(x))
    assert flow.energy(x).mean() < before
    assert all(torch.equal(a, b) for a, b in zip(space, flow.space.buffers(), strict=True))


def test_a_gaussian_needs_no_step():
    flow = model("gaussian")
    torch.manual_seed(1)
    flow.initialise(data(500))
    before = {name: t.clone() for name, t in flow.state_dict().items()}
    logs = flow.training_step(data(100))
    assert logs["gradient_norm"] == 0
    assert not flow.optimizers
    assert all(torch.equal(before[name], t) for name, t in flow.state_dict().items())
    drawn, exact = flow.sample(20_000)["samples"], data(20_000)
    torch.testing.assert_close(drawn.T.cov(), exact.T.cov(), rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", ["spline", "coupling"])
def test_it_learns_a_density_of_two_bumps(kind):
    """As a Gaussian does not: to a part of its divergence, with draws like the data."""
    gaussian, flow = model("gaussian"), model(kind, learning_rate=2e-2)
    torch.manual_seed(2)
    x, test = data(4000), data(4000)
    gaussian.initialise(x)
    flow.initialise(x)
    for _ in range(200):
        flow.training_step(data(256))
        flow.optimizers["flow"].param_groups[0]["lr"] *= 0.985
    lost = [(log_density(test) + of.energy(test)).mean().item() for of in (gaussian, flow)]
    assert -0.02 < lost[1] < 0.25 * lost[0]
    drawn = flow.sample(4000)["samples"]
    assert drawn.mean(0).tolist() == pytest.approx(MEAN.tolist(), abs=0.06)
    assert (log_density(drawn).mean() - log_density(test).mean()).abs() < 0.25


def test_images_are_measured_by_their_levels():
    """In bits per pixel between what the true density and one that knows nothing have."""
    flow = model("glow", (4, 4), levels=5, margin=0.01, learning_rate=3e-3)
    torch.manual_seed(3)
    x = (torch.rand(512, 4, 4) < 0.5).float() * 0.25 + 0.5  # two of five levels: one bit
    flow.initialise(x)
    for _ in range(60):
        flow.training_step(x[torch.randint(512, (128,))])
    bits = -flow.log_likelihood(x).mean().item() / (16 * math.log(2))
    assert 1.0 < bits < 1.25
    assert torch.equal(flow.energy(x), flow.energy(x))
    drawn = flow.sample(500)["samples"]
    assert drawn.shape == (500, 4, 4)
    assert torch.equal(drawn, (4 * drawn).round() / 4)
    assert ((drawn == 0.5) | (drawn == 0.75)).float().mean() > 0.6


def test_a_gradient_is_cut_to_its_norm():
    """Plain descent of rate 1 then moves all weights together by that norm."""
    flow = model("coupling", clip=1e-3)
    torch.manual_seed(1)
    x = data(400)
    flow.initialise(x)
    weights = list(flow.parameters())
    flow.optimizers["flow"] = torch.optim.SGD(weights, lr=1.0)
    before = [p.detach().clone() for p in weights]
    assert flow.training_step(x)["gradient_norm"] > 0.01
    moved = torch.cat([(p - q).flatten() for p, q in zip(weights, before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=0.01)


def test_greys_are_dequantised_anew_at_every_step():
    """Two equal images are two points, and at the next step two others."""
    settings = MODELS["flow"] | {
        "flow": {"kind": "glow", "levels": 1, "depth": 1, "width": 4},
        "levels": 3,
        "margin": 0.05,
    }
    flow = NormalisingFlow((4, 4), **settings)
    seen = []
    flow.minimise = lambda name, objective, v, clip: seen.append(v) or {}
    for _ in range(2):
        flow.training_step(torch.full((2, 4, 4), 0.5))
    points = torch.cat(seen).flatten(1)
    assert len(points.unique(dim=0)) == 4
    assert len(points[0].unique()) == 16
