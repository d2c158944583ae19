"""Laws of DAGMM: the features, the mixture and its energy, whose mixture it is, the objective."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.nn.functional import normalize

from ebm.variants.dagmm import DAGMM, Mixture, mixture_energy


def model(**changes):
    """A small DAGMM in float64."""
    torch.manual_seed(0)
    settings = {
        "encoder": [6],
        "decoder": [6],
        "latent": 1,
        "components": 2,
        "estimation": [5],
        "dropout": 0.5,
        "energy_weight": 0.1,
        "diagonal_penalty": 0.005,
        "regularisation": 1e-3,
        "ema": 0.9,
        "standardise": False,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.999),
    }
    return DAGMM((4,), **settings | changes).double()


def blob(n=60, seed=1):
    return 1 + torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)).double()


def some_mixture(k=3, f=3):
    torch.manual_seed(4)
    roots = torch.randn(k, f, f).double()
    covariances = roots @ roots.mT + 0.1 * torch.eye(f)
    return Mixture(torch.rand(k).double().softmax(0), torch.randn(k, f).double(), covariances)


def density(mixture):
    normals = MultivariateNormal(mixture.means, mixture.covariances)
    return MixtureSameFamily(Categorical(mixture.weights), normals)


def test_the_energy_is_minus_the_log_density_of_the_mixture():
    mixture, z = some_mixture(), 3 * torch.randn(50, 3).double()
    torch.testing.assert_close(mixture_energy(z, mixture), -density(mixture).log_prob(z))


def test_far_away_the_energy_is_the_square_and_no_underflow():
    energy = mixture_energy(torch.full((1, 3), 1e4).double(), some_mixture())
    assert 1e5 < energy.item() < math.inf


def test_a_covariance_that_is_none_gives_no_number():
    mixture = some_mixture()
    mixture.covariances[1, 0, 0] = -1.0
    assert mixture_energy(torch.zeros(2, 3).double(), mixture).isnan().all()


def test_the_features_are_the_code_the_relative_error_and_the_cosine():
    dagmm, x = model(), blob()
    z, copy = dagmm.features(x)
    torch.testing.assert_close(copy, dagmm.decoder(dagmm.encoder(x)))
    for row, original, other in zip(z[:5], x[:5], copy[:5], strict=True):
        distance = (original - other).square().sum().sqrt() / original.square().sum().sqrt()
        cosine = original @ other / (original @ original * (other @ other)).sqrt()
        torch.testing.assert_close(row[1:], torch.stack([distance, cosine]))
    torch.testing.assert_close(z[:, :1], dagmm.encoder(x))


def test_a_point_at_the_origin_has_finite_features_and_gradients():
    x = torch.zeros(1, 4).double().requires_grad_()
    z, _ = model().features(x)
    (gradient,) = torch.autograd.grad(z.sum(), x)
    assert z.isfinite().all()
    assert gradient.isfinite().all()


def test_an_empty_row_does_not_decide_the_mixture():
    """Relative to nothing, every copy is infinitely far."""
    dagmm = model()
    dagmm.initialise(torch.cat([blob().float(), torch.zeros(1, 4)]))
    widest = dagmm.mixture(dagmm.moments).covariances.diagonal(dim1=1, dim2=2).max()
    assert widest < 1000


def test_memberships_are_the_mixture_weights_means_and_covariances_of_the_paper():
    dagmm, x = model(), blob()
    z, _ = dagmm.features(x)
    gamma = dagmm.membership(z, 0.0)
    found = dagmm.mixture(dagmm.moments_of(z, 0.0))
    torch.testing.assert_close(gamma.sum(1), torch.ones(60).double())
    for k in range(2):
        share = gamma[:, k] / gamma[:, k].sum()
        mean = share @ z
        covariance = (z - mean).T @ torch.diag(share) @ (z - mean)
        torch.testing.assert_close(found.weights[k], gamma[:, k].mean())
        torch.testing.assert_close(found.means[k], mean)
        torch.testing.assert_close(found.covariances[k], covariance + 1e-3 * torch.eye(3))


def test_it_begins_with_the_mixture_of_all_rows_without_dropout(monkeypatch):
    monkeypatch.setattr("ebm.variants.dagmm.SLICE", 7)
    dagmm, x = model(), blob()
    dagmm.initialise(x)
    z, _ = dagmm.features(x)
    mixture = dagmm.mixture(dagmm.moments_of(z, 0.0))
    torch.testing.assert_close(dagmm.energy(x), -density(mixture).log_prob(z))


def test_what_a_point_scores_depends_neither_on_its_batch_nor_on_the_mode():
    dagmm, x = model(), blob()
    dagmm.initialise(blob(seed=2))
    in_training = dagmm.energy(x)
    dagmm.eval()
    alone = torch.cat([dagmm.energy(row[None]) for row in x])
    torch.testing.assert_close(alone, in_training)


def test_the_moments_run_behind_the_batches_by_their_decay():
    dagmm, x = model(learning_rate=1e-12), blob()
    dagmm.initialise(x)
    before = dagmm.moments.clone()
    dagmm.training_step(x[:20])
    batch = dagmm.moments_of(dagmm.features(x[:20])[0], 0.0)
    torch.testing.assert_close(dagmm.moments, 0.9 * before + 0.1 * batch)


def test_as_the_learning_rate_falls_the_moments_become_those_of_the_final_network():
    dagmm, x = model(ema=0.95, learning_rate=1e-2, standardise=True), blob(400)
    dagmm.initialise(x)
    for step in range(400):
        dagmm.optimizers["model"].param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
        dagmm.training_step(x[torch.randperm(400)[:100]])
    running = dagmm.energy(x)
    z, _ = dagmm.features(dagmm.columns(x))
    exact = -density(dagmm.mixture(dagmm.moments_of(z, 0.0))).log_prob(z)
    assert (running - exact).abs().mean() < 0.1
    assert (running - exact).abs().mean() < 0.1 * running.std()


def test_the_step_descends_the_objective_of_the_paper():
    dagmm, x = model(dropout=0.0), blob()
    dagmm.initialise(x)
    dagmm.optimizers["model"] = torch.optim.SGD(dagmm.parameters(), lr=1.0)
    z, copy = dagmm.features(x)
    mixture = dagmm.mixture(dagmm.moments_of(z, 0.0))
    error = (x - copy).square().sum(1).mean()
    energy = -density(mixture).log_prob(z).mean()
    penalty = sum(1 / c.diagonal()[j] for c in mixture.covariances for j in range(3))
    parameters = list(dagmm.parameters())
    expected = torch.autograd.grad(error + 0.1 * energy + 0.005 * penalty, parameters)
    before = [p.detach().clone() for p in parameters]
    logs = dagmm.training_step(x)
    assert logs["reconstruction_error"].item() == pytest.approx(error.item())
    assert logs["energy_gap"].item() == pytest.approx(energy.item())
    assert logs["diagonal_penalty"].item() == pytest.approx(penalty.item())
    for p, old, slope in zip(parameters, before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - slope)


def test_dropout_leaves_out_units_in_training_and_nowhere_else():
    dagmm = model(estimation=[1000])
    z, _ = dagmm.features(blob())
    assert torch.equal(dagmm.membership(z, 0.0), dagmm.membership(z, 0.0))
    assert not torch.equal(dagmm.membership(z, 0.5), dagmm.membership(z, 0.5))


def test_it_finds_what_it_cannot_reconstruct():
    """Points on a line in four dimensions; anomalies are beside it. (Near the origin errors
    relative to the length of a point mean little.)"""
    weights = {"energy_weight": 1e-3, "diagonal_penalty": 1e-6, "regularisation": 1e-6}
    dagmm = model(encoder=[20], decoder=[20], learning_rate=1e-2, **weights)
    torch.manual_seed(3)
    direction = torch.tensor([1.0, -1.0, 0.5, 2.0])
    line = ((1 + torch.rand(1000, 1)) * direction + 0.01 * torch.randn(1000, 4)).double()
    dagmm.initialise(line)
    for _ in range(400):
        dagmm.training_step(line[torch.randperm(1000)[:200]])
    beside = line[:200] + normalize(torch.randn(200, 4)).double()
    higher = dagmm.energy(beside)[:, None] > dagmm.energy(line)
    assert higher.float().mean() > 0.95


def test_its_state_is_all_there_is_to_it():
    ours, other, x = model(standardise=True), model(standardise=True), blob()
    ours.initialise(x)
    ours.training_step(x)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.energy(x), ours.energy(x))


def test_a_step_learns_from_memberships_with_dropout_and_keeps_those_without():
    dagmm, x = model(dropout=0.5, learning_rate=1e-12), blob()
    dagmm.initialise(x)
    z, _ = dagmm.features(x)
    torch.manual_seed(5)
    mixture = dagmm.mixture(dagmm.moments_of(z, 0.5))
    expected = -density(mixture).log_prob(z).mean().item()
    torch.manual_seed(5)
    logs = dagmm.training_step(x)
    assert logs["energy_gap"].item() == pytest.approx(expected)
    exact = -density(dagmm.mixture(dagmm.moments)).log_prob(z).mean().item()
    assert exact != pytest.approx(expected, rel=1e-3)
