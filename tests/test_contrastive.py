"""Laws of contrastive estimation: its value, and what is told from a noise, with densities of
which all is known."""

import math
from itertools import pairwise

import pytest
import torch
from small_models import MODELS
from torch.distributions import MultivariateNormal, Normal

from ebm import EBMError, variants
from ebm.contrastive import accuracy, importance_log_partition, value
from ebm.flows import Defended, Gaussian
from ebm.metrics import cell_centres
from ebm.variants.nce import NCE

pytestmark = pytest.mark.usefixtures("double")

RATIOS = [0.2, 1.0, 3.0, 100.0]
P, Q = (Normal(*torch.tensor(pair).double()) for pair in [(0.0, 1.0), (0.5, 1.5)])


def exact(density, n):
    """Points that stand for equal parts of a density on the line: expectations without chance."""
    return density.icdf((torch.arange(n) + 0.5) / n)


def ratios(p=P, q=Q, n=2000, nu=1.0):
    """log p - log q at points of both."""
    return [p.log_prob(x) - q.log_prob(x) for x in (exact(p, n), exact(q, round(nu * n)))]


def equilibrium(nu):
    """V where nothing is left to tell."""
    return -math.log1p(nu) - nu * math.log1p(1 / nu)


@pytest.mark.parametrize("nu", RATIOS)
def test_the_value_of_two_densities_that_are_one_is_that_of_equilibrium(nu):
    assert value(torch.zeros(5), torch.zeros(7), nu).item() == pytest.approx(equilibrium(nu))
    assert equilibrium(1.0) == pytest.approx(-math.log(4))


@pytest.mark.parametrize("nu", RATIOS)
def test_no_other_density_has_a_higher_value_where_data_and_noise_are_alike(nu):
    x = exact(Q, 4000)
    for other in (P, Normal(0.6, 1.5), Normal(0.5, 1.4)):
        r = other.log_prob(x) - Q.log_prob(x)
        assert value(r, r, nu) < equilibrium(nu)


@pytest.mark.parametrize("nu", RATIOS)
def test_the_value_is_the_likelihood_of_a_logistic_regression(nu):
    r, r_noise = torch.randn(6), torch.randn(9)
    h, h_noise = (1 / (1 + nu * (-x).exp()) for x in (r, r_noise))
    expected = h.log().mean() + nu * (1 - h_noise).log().mean()
    torch.testing.assert_close(value(r, r_noise, nu), expected)
    right = (h > 0.5).double().mean() + (h_noise < 0.5).double().mean()
    assert accuracy(r, r_noise, nu).item() == pytest.approx(right.item() / 2)


@pytest.mark.parametrize("nu", [0.5, 1.0, 10.0])
def test_the_gradient_in_c_vanishes_at_the_true_constant(nu):
    """And in nothing else that multiplies the noise: a slope along x, here."""
    data, noise = ratios(nu=nu, n=8000)
    c = torch.tensor(0.0, requires_grad=True)
    slope = torch.tensor(0.0, requires_grad=True)
    x, x_noise = exact(P, 8000), exact(Q, round(nu * 8000))
    v = value(data - c + slope * x, noise - c + slope * x_noise, nu)
    gradients = torch.autograd.grad(v, [c, slope])
    assert max(gradient.abs().item() for gradient in gradients) < 2e-4
    for wrong in (-0.1, 0.1):
        c = torch.tensor(wrong, requires_grad=True)
        (gradient,) = torch.autograd.grad(value(data - c, noise - c, nu), c)
        assert gradient.item() * wrong < -1e-3


def test_importance_sampling_finds_known_constants():
    torch.manual_seed(2)
    x = Q.sample((40_000,))
    log_q = Q.log_prob(x)
    precisions = torch.tensor([0.8, 1.0, 2.0])
    energy = precisions * x.square()[:, None] / 2 - 3
    found = importance_log_partition(energy, log_q)
    expected = 0.5 * (2 * math.pi / precisions).log() + 3
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    torch.testing.assert_close(importance_log_partition(energy[:, 1], log_q), found[1])
    certain = importance_log_partition(4 - log_q, log_q)
    torch.testing.assert_close(certain, torch.tensor(-4.0))


def small(**changes):
    """An energy over the plane, and the data that it is fitted to."""
    torch.manual_seed(3)
    settings = {"noise": {"kind": "gaussian"}, "defence": 0.0, "warmup": 0}
    model = NCE((2,), **MODELS["nce"] | settings | changes)
    data = torch.randn(2000, 2) * torch.tensor([2.0, 0.5]) + 1
    model.initialise(data)
    return model, data


def test_every_constant_starts_where_its_density_integrates_to_one():
    """And their mixture: of f = a |v|^2 - 2 over the Gaussian of the data, whose integrals are
    those of Gaussians."""
    model, _ = small(defence=0.1)
    a = torch.tensor([0.4, 0.6, 1.0])
    model.unnormalised = lambda v: a * v.square().sum(1, keepdim=True) - 2
    model.log_z = torch.nn.Parameter(torch.zeros(3))
    model.start_constants()
    wider = torch.eye(2) + 2 * a.view(3, 1, 1) * (model.broad.scale @ model.broad.scale.T)
    mean = model.broad.mean.expand(3, 2)
    far = (mean * torch.linalg.solve(wider, mean)).sum(1)
    expected = 2 - torch.logdet(wider) / 2 - a * far
    torch.testing.assert_close(model.log_z.detach(), expected, rtol=0, atol=0.06)
    with torch.no_grad():
        model.log_z.copy_(expected)
        grid = cell_centres(-7, 7, 200)
        p = torch.cat([model.log_densities(grid), model.log_density(grid)[:, None]], 1).exp()
    torch.testing.assert_close(p.sum(0) * (14 / 200) ** 2, torch.ones(4))
    torch.testing.assert_close(p[:, 3], p[:, :3].mean(1))


def test_one_point_has_no_gaussian():
    with pytest.raises(EBMError, match="two training rows at least"):
        Gaussian(2).initialise(torch.zeros(1, 2))


def test_what_lies_beside_data_on_a_line_is_unlikely_and_not_impossible():
    """Else all logits were saturated, and nothing would learn."""
    model, data = small()
    data = data[:, [0, 0]]  # two columns that are the same
    model.noise.initialise(data)
    v = model.space.enter(data)
    model.broad.initialise(v)
    fall = model.broad.log_prob(v) - model.broad.log_prob(v + torch.tensor([0.5, -0.5]))
    assert fall.tolist() == pytest.approx([0.25 / 0.01] * len(v), rel=0.02)


def test_a_density_carries_over_to_the_data_with_its_scale():
    """log p(x) = log p(v) + log|dv/dx|, and the same of the noise, defence and all."""
    model, data = small(defence=0.2)
    v = model.space.enter(data)
    scale = data.std(0).log().sum()
    torch.testing.assert_close(-model.energy(data), model.log_density(v) - scale)
    torch.testing.assert_close(model.log_likelihood(data), -model.energy(data))
    assert isinstance(model.contrast, Defended)
    expected = 0.8 * model.flow.log_prob(v).exp() + 0.2 * model.broad.log_prob(v).exp()
    torch.testing.assert_close(model.noise_log_prob(data), expected.log() - scale)


def test_samples_are_of_the_density_and_the_generator_of_the_noise():
    torch.manual_seed(5)
    model, data = small()
    target = MultivariateNormal(torch.tensor([0.3, -0.2]), 0.5 * torch.eye(2))
    model.log_density = target.log_prob
    drawn = model.sample(8000, steps=25)
    mean, scale = data.mean(0), data.std(0)
    v = (drawn["samples"] - mean) / scale
    assert (v.mean(0) - target.mean).abs().max() < 4 * math.sqrt(0.5 / 8000)
    assert (v.T.cov() - 0.5 * torch.eye(2)).abs().max() < 4 * math.sqrt(2 / 8000) * 0.5
    before = (drawn["generator"] - mean) / scale
    assert before.mean(0).abs().max() < 4 / math.sqrt(8000)
    assert (before.var(0) - 1).abs().max() < 4 * math.sqrt(2 / 8000)
    assert drawn["acceptance"].shape == (25,)
    w = model.log_density(v) - model.flow.log_prob(v)
    y, log_q = model.contrast.draw_with_log_prob(8000)
    expected = (model.log_density(y) - log_q - w).clamp(max=0).exp().mean()
    assert drawn["acceptance"][-1].item() == pytest.approx(expected.item(), abs=0.02)


def test_without_steps_samples_are_the_generator_s():
    drawn = small()[0].sample(6, steps=0)
    assert torch.equal(drawn["samples"], drawn["generator"])
    assert len(drawn["acceptance"]) == 0


def test_the_noise_follows_the_likelihood_while_it_warms_up_at_a_rate_that_falls():
    torch.manual_seed(6)
    model, data = small(noise={"kind": "coupling", "transforms": 2, "width": 8}, warmup=10)
    (group,) = model.optimizers["warmup"].param_groups
    rates, losses, turns = [], [], []
    for _ in range(12):
        group["lr"] = 0.02
        x = model.space.enter(data[:200])
        losses.append(-model.flow.log_prob(x).mean().item())
        turns.append(model.warm_up(x))
        rates.append(group["lr"])
    assert turns[10:] == [None] * 2
    assert [turn.item() for turn in turns[:10]] == pytest.approx(losses[:10])
    assert rates[:10] == pytest.approx([0.02] * 6 + [0.016, 0.012, 0.008, 0.004])
    assert losses[9] < losses[0]
    assert all(a != b for a, b in pairwise(losses[:11]))
    assert losses[11] == losses[10]


def contrasted(name, **changes):
    torch.manual_seed(0)
    model = variants.build(name, (2,), MODELS[name] | changes)
    model.initialise(torch.randn(400, 2))
    return model


@pytest.mark.parametrize("name", ["nce", "fce"])
def test_with_a_defence_the_generator_is_the_flow_alone(name):
    model = contrasted(name, defence=0.5, tilted=False)
    model.broad.mean.fill_(1000.0)
    drawn = model.sample(200, steps=3)
    assert drawn["generator"].abs().max() < 100


TURNS = {"nce": ["warmup", "energy"], "fce": ["warmup", "energy", "flow", "twin"]}


@pytest.mark.parametrize(("name", "turn"), [(n, t) for n, ts in TURNS.items() for t in ts])
def test_every_gradient_is_cut_to_its_norm(name, turn):
    """Plain descent of rate 1 then moves all weights together by that norm."""
    semi = {"classes": 2, "labelled": 5, "supervision": 1.0} if turn == "twin" else {}
    warmup = 10 if turn == "warmup" else 0
    torch.manual_seed(0)
    model = variants.build(
        name, (2,), MODELS[name] | semi | {"clip": 1e-3, "warmup": warmup, "defence": 0.0}
    )
    x = torch.randn(100, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.3]]) + 3
    model.initialise(x, torch.arange(100) % 2 if semi else None)
    if turn == "flow":
        model.last_accuracy.fill_(1.0)
    moving = [p for g in model.optimizers[turn].param_groups for p in g["params"]]
    model.optimizers[turn] = torch.optim.SGD(moving, lr=1.0)
    before = [p.detach().clone() for p in moving]
    model.training_step(x)
    moved = torch.cat([(p - q).flatten() for p, q in zip(moving, before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("kind", ["gaussian", "spline", "coupling"])
def test_samples_that_are_drawn_in_slices_are_those_that_are_drawn_at_once(monkeypatch, kind):
    flow = {"kind": kind} | ({"transforms": 1, "bins": 3, "width": 8} if kind == "spline" else {})
    flow |= {"transforms": 1, "width": 8} if kind == "coupling" else {}
    model, _ = small(noise=flow)
    found, rows = [], []
    model.network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    for numbers in (2**23, 14):
        monkeypatch.setattr("ebm.flows.AT_ONCE", numbers)
        torch.manual_seed(0)
        rows.clear()
        found.append(model.sample(50, steps=3))
    assert max(rows) == 7
    for key, at_once in found[0].items():
        torch.testing.assert_close(found[1][key], at_once)
