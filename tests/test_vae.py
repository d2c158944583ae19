"""Laws of the VAE: the divergence and the bound in closed form, a score without chance."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from ebm.variants.vae import VAE, kl_to_prior


def model(shape=(2,), **changes):
    """A small VAE in float64."""
    torch.manual_seed(0)
    settings = {
        "network": "mlp",
        "encoder": [16],
        "decoder": [16],
        "latent": 2,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.999),
    }
    return VAE(shape, **settings | changes).double()


class Affine(nn.Module):
    """x -> A x + b, and behind it constants that do not depend on x."""

    def __init__(self, a, b, constants=None):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.constants = torch.empty(0) if constants is None else constants

    def forward(self, x):
        return torch.cat([x @ self.a.T + self.b, self.constants.expand(len(x), -1)], 1)


def probabilistic_pca(scale=0.7):
    """A VAE that is exactly x = W z + b + noise in R^3, with its exact posterior as the encoder,
    and the density of x. The columns of W are orthogonal, so the posterior's axes are
    independent."""
    w = torch.tensor([[1.2, 0.0], [0.0, 0.5], [-0.9, 0.0]]).double()
    b = torch.tensor([0.3, -0.2, 0.1]).double()
    precision = (w.T @ w).diagonal() / scale**2 + 1
    gain = (w / scale**2 / precision).T
    vae = model((3,))
    vae.decoder = Affine(w, b)
    vae.encoder = Affine(gain, -gain @ b, -precision.log())
    nn.init.constant_(vae.log_scale, math.log(scale))
    density = MultivariateNormal(b, w @ w.T + scale**2 * torch.eye(3).double())
    return vae, density


def negative_elbo(vae, x):
    """-ELBO of x [B, *] with the expectation over q taken exactly: the reconstruction of a linear
    decoder is a quadratic in the noise, whose mean is that over +-sqrt(D) along every axis."""
    size = math.sqrt(vae.latent)
    points = [s * size * e for e in torch.eye(vae.latent).double() for s in (-1, 1)]
    terms = [sum(vae.terms(x, noise.expand(len(x), -1))) for noise in points]
    return torch.stack(terms).mean(0).detach()


def test_the_divergence_is_that_of_two_gaussians():
    mean, log_variance = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    q = Normal(mean, (log_variance / 2).exp())
    expected = kl_divergence(q, Normal(torch.zeros(4).double(), 1.0)).sum(1)
    torch.testing.assert_close(kl_to_prior(mean, log_variance), expected)
    assert kl_to_prior(torch.zeros(1, 3), torch.zeros(1, 3)).item() == 0


def test_the_bound_is_log_p_where_the_encoder_is_the_posterior():
    vae, density = probabilistic_pca()
    x = density.sample((6,))
    torch.testing.assert_close(negative_elbo(vae, x), -density.log_prob(x))


@pytest.mark.parametrize(("shift", "widen"), [(0.3, 0.0), (0.0, 0.5), (0.0, -0.5), (-0.2, 0.2)])
def test_the_bound_falls_short_of_log_p_by_the_divergence_to_the_posterior(shift, widen):
    vae, density = probabilistic_pca()
    x = density.sample((6,))
    log_variance = vae.encoder.constants.clone()
    with torch.no_grad():
        vae.encoder.b += shift
        vae.encoder.constants += widen
    mean, _ = vae.encoder(x).detach().chunk(2, 1)
    q = Normal(mean, ((log_variance + widen) / 2).exp())
    missed = kl_divergence(q, Normal(mean - shift, (log_variance / 2).exp())).sum(1)
    assert missed.min() > 0
    torch.testing.assert_close(negative_elbo(vae, x), -density.log_prob(x) + missed)


def test_the_energy_leaves_out_what_the_spread_of_the_posterior_costs():
    vae, density = probabilistic_pca()
    x = density.sample((6,))
    spread = vae.encoder.constants.exp()
    cost = (vae.decoder.a.square() @ spread).sum() / (2 * 0.7**2)
    expected = -density.log_prob(x) - cost.detach()
    torch.testing.assert_close(vae.energy(x).detach(), expected)


def test_the_energy_is_the_same_whenever_and_beside_whatever_it_is_asked_for():
    vae = model((8, 8), network="conv", encoder=[4, 8], decoder=[8, 4])
    x = torch.rand(6, 8, 8).double()
    vae.training_step(x)
    vae.eval()
    torch.testing.assert_close(vae.energy(x), torch.cat([vae.energy(r[None]) for r in x]))
    assert torch.equal(vae.energy(x), vae.energy(x))


def test_images_are_scored_by_bernoulli_pixels_and_sampled_within_their_range():
    vae = model((2, 4, 4))
    x = (torch.rand(5, 2, 4, 4) < 0.5).double()
    logits = torch.randn(5, 2, 4, 4).double()
    expected = -Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(vae.reconstruction(x, logits), expected)
    drawn = vae.sample(7)["samples"]
    assert drawn.shape == (7, 2, 4, 4)
    assert 0 <= drawn.min() < drawn.max() <= 1
    assert vae.decoder(torch.zeros(1, 2).double()).min() < 0  # logits, not shares


def test_the_training_step_goes_down_the_mean_of_the_bound():
    vae = model(learning_rate=1e-3)
    x = torch.randn(64, 2).double()
    torch.manual_seed(1)
    terms = vae.terms(x, vae._noise(64))
    torch.manual_seed(1)
    logs = vae.training_step(x)
    assert logs["reconstruction"].item() == pytest.approx(terms[0].mean().item())
    assert logs["divergence"].item() == pytest.approx(terms[1].mean().item())
    assert logs["energy_gap"].item() == pytest.approx(sum(t.mean().item() for t in terms))
    torch.manual_seed(1)
    assert sum(vae.terms(x, vae._noise(64))).mean() < logs["energy_gap"]


def test_it_learns_a_gaussian_and_the_scale_of_its_noise():
    """In one dimension more than it has latents: what they cannot carry is noise."""
    vae = model(encoder=[32], decoder=[32], latent=1, learning_rate=1e-2).float()
    torch.manual_seed(2)
    for _ in range(400):
        vae.training_step(torch.tensor([0.5, -0.5]) + 0.3 * torch.randn(256, 2))
    drawn = vae.sample(4000)["samples"]
    assert drawn.mean(0).tolist() == pytest.approx([0.5, -0.5], abs=0.06)
    assert drawn.std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.06)
    entropy = 2 * math.log(0.3 * math.sqrt(2 * math.pi * math.e))
    test = torch.tensor([0.5, -0.5]) + 0.3 * torch.randn(4000, 2)
    assert vae.energy(test).mean().item() == pytest.approx(entropy, abs=0.1)


def test_the_worst_outliers_have_an_energy():
    """However far a row lies, and however wide its posterior is: infinite at worst, never NaN."""
    vae = model((2,))
    vae.encoder = Affine(
        torch.tensor([[0.1, 0.0], [0.0, 0.1], [9.0, 0.0], [0.0, 9.0]]).double(),
        torch.zeros(4).double(),
    )
    energy = vae.energy(10.0 ** torch.arange(26).double()[:, None].expand(-1, 2))
    assert not energy.isnan().any()
    assert (energy.diff() > 0).logical_or(energy[1:].isinf()).all()
