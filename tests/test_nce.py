"""Laws of noise-contrastive estimation: what a step computes, what it moves, what it learns."""

import math

import pytest
import torch
from small_models import MODELS

from ebm.contrastive import value
from ebm.metrics import cell_centres
from ebm.variants.nce import NCE
from pipelines import words

RATES = {"learning_rate": 2e-2, "constant_learning_rate": 5e-2}
COUPLING = {"kind": "coupling", "transforms": 2, "width": 8}


def model(**changes):
    torch.manual_seed(0)
    settings = {"noise": {"kind": "gaussian"}, "defence": 0.0, "warmup": 0, "clip": None}
    return NCE((2,), **MODELS["nce"] | settings | changes)


def data(n):
    """A Gaussian with a correlation and, off to the side, a narrow one."""
    x = torch.randn(n, 2) @ torch.tensor([[0.5, 0.3], [0.0, 0.4]])
    aside = torch.tensor([1.0, -1.0]) + 0.25 * torch.randn(n, 2)
    return torch.where(torch.rand(n, 1) < 0.5, x, aside)


def weights(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("ratio", [0.5, 3.0])
def test_a_step_ascends_the_value_that_it_logs(ratio):
    nce = model(ratio=ratio, learning_rate=1e-3, constant_learning_rate=1e-3)
    nce.initialise(data(1000))
    x = data(300)

    def value_now():
        torch.manual_seed(1)
        v = nce.space.enter(x)
        noise, log_q = nce.contrast.draw_with_log_prob(round(ratio * 300))
        r, r_noise = nce.log_density(v) - nce.contrast.log_prob(v), nce.log_density(noise) - log_q
        right = (r > math.log(ratio)).float().mean() + (r_noise < math.log(ratio)).float().mean()
        return value(r, r_noise, ratio).item(), right.item() / 2

    before, right = value_now()
    torch.manual_seed(1)
    logs = nce.training_step(x)
    assert logs["value"].item() == pytest.approx(before, rel=1e-5)
    assert logs["accuracy"].item() == pytest.approx(right, abs=0.01)
    assert before < value_now()[0] < 0


def test_the_constant_goes_up_by_its_own_rate_and_nothing_decays_it():
    nce = model(weight_decay=0.5, constant_learning_rate=0.03)
    nce.initialise(data(1000))
    with torch.no_grad():
        nce.log_z.fill_(-4)  # p is far too large: everything looks like data
    nce.training_step(data(200))
    assert nce.log_z.item() == pytest.approx(-4 + 0.03, abs=1e-5)
    decays = {
        p: g["weight_decay"] for g in nce.optimizers["energy"].param_groups for p in g["params"]
    }
    assert decays.pop(nce.log_z) == 0
    assert set(decays.values()) == {0.5}
    assert nce.network.head.bias not in decays
    assert nce.network.head.bias.item() == 0


def test_the_noise_learns_in_the_warm_up_only_and_the_energy_all_the_time():
    nce = model(noise=COUPLING, warmup=3, defence=0.1)
    nce.initialise(data(1000))
    for step in range(6):
        noise, energy = weights(nce.noise), weights(nce.network)
        logs = nce.training_step(data(100))
        assert same(noise, weights(nce.noise)) == (step >= 3)
        assert not same(energy, weights(nce.network))
        assert logs["noise_loss"].abs() > 0


def test_a_tilted_energy_is_the_noise_when_it_begins():
    """There is nothing to tell, whatever nu, and what it learns leaves the noise alone."""
    nce = model(noise=COUPLING, warmup=4, tilted=True, ratio=3.0)
    nce.initialise(data(1000))
    energy = weights(nce.network)
    for _ in range(4):
        assert nce.training_step(data(100))["value"] == 0
    assert same(energy, weights(nce.network))
    assert nce.log_z.item() == 0
    x = nce.space.enter(data(50))
    torch.testing.assert_close(nce.log_density(x), nce.flow.log_prob(x))
    flow = weights(nce.flow)
    logs = nce.training_step(data(100))
    assert logs["value"].item() == pytest.approx(-math.log(4) - 3 * math.log(4 / 3), abs=1e-5)
    nce.training_step(data(100))
    assert same(flow, weights(nce.flow))
    assert not torch.allclose(nce.log_density(x), nce.flow.log_prob(x))
    assert not same(energy, weights(nce.network))


def test_it_learns_log_z():
    """The energy without its constant has a Z that the constant is found to be, by a grid."""
    nce = model(network={"kind": "mlp", "width": 32, "depth": 2}, ratio=2.0, **RATES)
    torch.manual_seed(2)
    nce.initialise(data(4000))
    with torch.no_grad():
        nce.log_z += 1.0  # off to a bad start
    for _ in range(400):
        logs = nce.training_step(data(256))
        for group in nce.optimizers["energy"].param_groups:
            group["lr"] *= 0.99
    grid = cell_centres(-4.0, 4.0, 200)
    with torch.no_grad():
        total = (-nce.energy(grid.float())).logsumexp(0).item() + 2 * math.log(8 / 200)
    assert total == pytest.approx(0, abs=0.08)
    assert logs["value"] > -math.log(3) - 2 * math.log(3 / 2)
    assert logs["energy_gap"] < 0
    drawn, exact = nce.sample(4000, steps=30), data(4000)
    torch.testing.assert_close(drawn["samples"].T.cov(), exact.T.cov(), rtol=0, atol=0.06)
    near = [
        (x - torch.tensor([1.0, -1.0])).norm(dim=1).lt(0.75).float().mean().item()
        for x in (exact, drawn["samples"], drawn["generator"])
    ]
    assert near[1] == pytest.approx(near[0], abs=0.06)
    assert near[2] < near[0] - 0.07


def test_the_page_draws_the_value_at_rest_where_it_is():
    alike = torch.zeros(5)
    assert words.EQUILIBRIA["fce"]["value"] == pytest.approx(value(alike, alike).item())


def test_a_batch_has_a_draw_beside_it_at_any_ratio():
    nce = model(ratio=0.01)
    nce.initialise(data(100))
    assert nce.training_step(data(8))["value"].isfinite()


def test_an_energy_of_images_may_be_of_all_pixels_at_once():
    settings = MODELS["nce"] | {"network": {"kind": "mlp", "width": 8, "depth": 1}, "levels": 3}
    flow = {"kind": "glow", "levels": 1, "depth": 1, "width": 4}
    nce = NCE((4, 4), **settings | {"noise": flow, "defence": 0.0, "margin": 0.01})
    x = torch.randint(3, (6, 4, 4)) / 2
    nce.initialise(x)
    nce.training_step(x)
    assert nce.energy(x).shape == (6,)


def test_a_gradient_is_cut_to_its_norm():
    """Plain descent of rate 1 then moves all weights together by that norm."""
    nce = model(clip=1e-3)
    torch.manual_seed(1)
    nce.initialise(data(400))
    moving = [*(p for p in nce.network.parameters() if p.requires_grad), nce.log_z]
    nce.optimizers["energy"] = torch.optim.SGD(moving, lr=1.0)
    before = [p.detach().clone() for p in moving]
    assert nce.training_step(data(200))["gradient_norm"] > 0.01
    moved = torch.cat([(p - q).flatten() for p, q in zip(moving, before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=0.01)
