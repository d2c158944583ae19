"""Laws of DSEBM: the energy and its gradient by hand, the denoiser that it ends as."""

import pytest
import torch
from torch.nn.functional import softplus

from ebm.variants.dsebm import DSEBM


def model(d=3, **changes):
    """A small DSEBM in float64."""
    torch.manual_seed(0)
    settings = {
        "widths": [6, 5],
        "noise": 1.0,
        "standardise": False,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.999),
    }
    made = DSEBM((d,), **settings | changes).double()
    torch.nn.init.normal_(made.centre)
    return made


def gradient(energy, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(energy(x).sum(), x)[0]


def blob(n=20, d=3):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1)).double()


def test_the_energy_is_that_of_the_paper():
    dsebm, x = model(), blob()
    (w1, b1), (w2, b2) = [(dsebm.layers[k].weight, dsebm.layers[k].bias) for k in (0, 2)]
    h = softplus(softplus(x @ w1.T + b1) @ w2.T + b2)
    expected = (x - dsebm.centre).square().sum(1) / 2 - h.sum(1)
    torch.testing.assert_close(dsebm.energy(x), expected)


def test_the_reconstruction_goes_back_through_the_transposed_weights():
    """Equation for f(x) in the paper: h'_(l-1) = W_l' (sigmoid(W_l h_(l-1) + b_l) h'_l)."""
    dsebm, x = model(), blob()
    (w1, b1), (w2, b2) = [(dsebm.layers[k].weight, dsebm.layers[k].bias) for k in (0, 2)]
    a1 = x @ w1.T + b1
    a2 = softplus(a1) @ w2.T + b2
    back = (torch.sigmoid(a1) * (torch.sigmoid(a2) @ w2)) @ w1
    torch.testing.assert_close(x - gradient(dsebm.energy, x), dsebm.centre + back)


def test_what_a_point_scores_does_not_depend_on_its_place_in_a_batch():
    dsebm, x = model(), blob()
    assert dsebm.centre.shape == (3,)
    torch.testing.assert_close(dsebm.energy(x).flip(0), dsebm.energy(x.flip(0)))


def test_the_step_descends_the_denoising_error():
    dsebm, x = model(noise=0.3), blob()
    dsebm.optimizers["model"] = torch.optim.SGD(dsebm.parameters(), lr=1.0)
    before = [p.detach().clone() for p in dsebm.parameters()]
    torch.manual_seed(7)
    noisy = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    (g,) = torch.autograd.grad(dsebm.energy(noisy).sum(), noisy, create_graph=True)
    error = (x - noisy + g).square().sum(1).mean()
    gap = (dsebm.energy(x).mean() - dsebm.energy(noisy).mean()).item()
    expected = torch.autograd.grad(error, list(dsebm.parameters()), allow_unused=True)
    torch.manual_seed(7)
    logs = dsebm.training_step(x)
    assert logs["reconstruction_error"].item() == pytest.approx(error.item())
    assert logs["energy_gap"].item() == pytest.approx(gap)
    for p, old, slope in zip(dsebm.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - (0 if slope is None else slope))


def test_on_a_gaussian_it_ends_as_the_conditional_mean():
    """x ~ N(1, 4), noise of variance 1: the mean of x given x~ is 1 + 4/5 (x~ - 1), so grad E is
    (x~ - 1) / 5, sigma^2 times the score of N(1, 5)."""
    dsebm = model(1, widths=[32], learning_rate=1e-2).float()
    torch.manual_seed(2)
    for step in range(1000):
        dsebm.optimizers["model"].param_groups[0]["lr"] = 1e-2 * (1 - step / 1000)
        dsebm.training_step(1 + 2 * torch.randn(512, 1))
    x = torch.linspace(-2, 4, 13)[:, None]
    torch.testing.assert_close(gradient(dsebm.energy, x), (x - 1) / 5, rtol=0, atol=0.1)


def test_standardised_columns_learn_the_same_in_other_units():
    units = torch.tensor([1.0, 1e3, 1e8]).double()
    x = blob(200)
    one, other = model(standardise=True), model(standardise=True)
    for dsebm, data in ((one, x), (other, units * x)):
        dsebm.initialise(data)
        torch.manual_seed(3)
        for _ in range(5):
            dsebm.training_step(data)
    torch.testing.assert_close(one.energy(x), other.energy(units * x))


def test_its_state_is_all_there_is_to_it():
    ours, other, x = model(standardise=True), model(standardise=True), blob()
    ours.initialise(x)
    ours.training_step(x)
    assert not torch.equal(other.energy(x), ours.energy(x))
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.energy(x), ours.energy(x))
