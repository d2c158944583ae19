"""Laws of Glow: a bijection whose density integrates to one, and whose draws know theirs."""

import math

import pytest
import torch
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal

from ebm import EBMError
from ebm import glow as glow_module
from ebm.estimators import importance
from ebm.glow import BOUND, Glow

pytestmark = pytest.mark.usefixtures("double")

SETTINGS = [((8, 8), 2), ((8, 8), 3), ((28, 28), 2), ((3, 32, 32), 3), ((2, 4, 8), 1)]
TINY = [((4, 4), 1), ((4, 4), 2), ((3, 2, 4), 1)]


def flow(shape=(4, 4), levels=2, depth=2, width=8, stir=0.2):
    """A flow every parameter of which is off its start: a fresh coupling does nothing."""
    torch.manual_seed(0)
    glow = Glow(shape, levels, depth, width)
    with torch.no_grad():
        for parameter in glow.parameters():
            parameter += stir * torch.randn_like(parameter)
    return glow


def log_abs_det(f, x):
    """log |det| of the Jacobian of f at each of x [B, *]: [B]."""
    one = [jacobian(lambda p: f(p[None])[0].flatten(), p).reshape(p.numel(), -1) for p in x]
    return torch.stack([torch.linalg.slogdet(matrix).logabsdet for matrix in one])


@pytest.mark.parametrize(("shape", "levels"), SETTINGS)
def test_every_image_has_one_latent_and_every_latent_one_image(shape, levels):
    glow, v = flow(shape, levels, stir=0.05), torch.randn(3, *shape)
    z, log_det = glow.to_latent(v)
    assert z.shape == (3, math.prod(shape))
    back, inverse_log_det = glow.from_latent(z)
    torch.testing.assert_close(back, v, rtol=0, atol=1e-8)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-8)
    z = torch.randn_like(z)
    torch.testing.assert_close(glow.to_latent(glow.from_latent(z)[0])[0], z, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("shape", "levels"), TINY)
def test_the_log_determinant_is_that_of_the_jacobian(shape, levels):
    glow, v = flow(shape, levels), torch.randn(3, *shape)
    torch.testing.assert_close(
        glow.to_latent(v)[1], log_abs_det(lambda v: glow.to_latent(v)[0], v)
    )
    z = torch.randn(3, math.prod(shape))
    expected = log_abs_det(lambda z: glow.from_latent(z)[0], z)
    torch.testing.assert_close(glow.from_latent(z)[1], expected)


def test_the_density_integrates_to_one():
    """By importance sampling from a Gaussian wider than the flow's own draws."""
    glow = flow((1, 2, 2), levels=1, depth=3)
    with torch.no_grad():
        drawn = glow.draw_with_log_prob(20_000)[0].flatten(1)
        wide = MultivariateNormal(drawn.mean(0), 1.5 * drawn.T.cov())
        x = wide.sample((100_000,))
        log_weight = glow.log_prob(x.view(-1, 1, 2, 2)) - wide.log_prob(x)
    total = importance(torch.ones_like(log_weight), log_weight)
    assert total.ess > 1000
    assert total.error < 0.02
    assert abs(total.value - 1) < 4 * total.error


def test_a_draw_knows_its_density():
    glow = flow((3, 4, 4))
    v, log_prob = glow.draw_with_log_prob(5)
    assert v.shape == (5, 3, 4, 4)
    torch.testing.assert_close(log_prob, glow.log_prob(v))


def test_draws_are_normal_in_latent_space():
    glow = flow()
    with torch.no_grad():
        z, _ = glow.to_latent(glow.draw_with_log_prob(4000)[0])
    assert z.mean(0).abs().max() < 0.08
    assert (z.var(0) - 1).abs().max() < 0.12


def before_actnorm(glow, v):
    """What enters every step of every level, and what leaves its actnorm: [B, C, H, W] each."""
    seen = []
    for level in glow.levels:
        level.register_forward_pre_hook(lambda level, x: seen.append([level, x[0]]))
        for coupling in level.couplings:
            coupling.register_forward_hook(lambda module, x, y: seen[-1].append(y[0]))
    glow.to_latent(v)
    return [
        (x, level.log_scale[k].exp().view(-1, 1, 1) * x + level.bias[k].view(-1, 1, 1))
        for level, *entering in seen
        for k, x in enumerate(entering[:-1])
    ]


def test_initialise_gives_every_channel_mean_0_and_variance_1():
    glow, v = flow((8, 8), depth=3), 3 + 5 * torch.randn(64, 8, 8)
    glow.initialise(v)
    steps = before_actnorm(glow, v)
    assert len(steps) == 6
    for entering, normalised in steps:
        channels = normalised.shape[1]
        assert entering.mean((0, 2, 3)).abs().max() > 0.1
        torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(channels))
        variance = normalised.var((0, 2, 3), correction=0)
        torch.testing.assert_close(variance, torch.ones(channels))


def test_initialise_takes_all_images_in_slices(monkeypatch):
    v = 3 + 5 * torch.randn(64, 8, 8)
    sizes, actnorms = [], []
    for limit in (1000, 24):
        monkeypatch.setattr(glow_module, "SLICE", limit)
        glow, seen = flow((8, 8), depth=3), []
        for level in glow.levels:
            for coupling in level.couplings:
                coupling.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(len(x[0])))
        glow.initialise(v)
        sizes.append(max(seen))
        actnorms.append({n: p.clone() for n, p in glow.named_parameters() if "couplings" not in n})
    assert sizes == [64, 24]
    torch.testing.assert_close(*actnorms)


def test_a_fresh_flow_only_rotates():
    glow, v = flow(stir=0), torch.randn(6, 4, 4)
    z, log_det = glow.to_latent(v)
    torch.testing.assert_close(z.norm(dim=1), v.flatten(1).norm(dim=1))
    torch.testing.assert_close(log_det, torch.zeros(6))


def test_initialise_stands_a_channel_that_never_varies():
    glow, v = flow(), torch.randn(16, 4, 4)
    v[:, ::2, ::2] = 0.5
    glow.initialise(v)
    assert glow.log_prob(v).isfinite().all()


@pytest.mark.parametrize("of", ["log_prob", "draw", "log_prob_of_draw"])
def test_every_parameter_gets_a_gradient(of):
    glow = flow()
    value = {
        "log_prob": lambda: glow.log_prob(torch.randn(8, 4, 4)),
        "draw": lambda: glow.draw_with_log_prob(8)[0].cos(),
        "log_prob_of_draw": lambda: glow.draw_with_log_prob(8)[1],
    }[of]()
    gradients = torch.autograd.grad(value.sum(), list(glow.parameters()), allow_unused=True)
    for (name, _), gradient in zip(glow.named_parameters(), gradients, strict=True):
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        if of != "log_prob_of_draw" and name.endswith(("factors", "log_scale")):
            assert gradient.abs().min() > 0, name


def test_the_gradient_of_a_draw_is_that_of_finite_differences():
    glow, z = flow(width=3), torch.randn(2, 16)
    value, step = lambda: glow.from_latent(z)[0].cos().sum(), 1e-6
    parameter = glow.levels[0].factors
    (gradient,) = torch.autograd.grad(value(), parameter)
    for index in [(0, 1, 0), (0, 0, 1), (1, 2, 2)]:
        with torch.no_grad():
            parameter[index] += step
            up = value()
            parameter[index] -= 2 * step
            down = value()
            parameter[index] += step
        assert gradient[index].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-4)


def test_no_coupling_scales_by_more_than_its_bound():
    glow = flow(stir=100.0)
    for level in glow.levels:
        for coupling in level.couplings:
            b = 1e3 * torch.randn(4, coupling.first.in_channels, 2, 2)
            log_scale, _ = coupling.affine(b)
            assert log_scale.abs().max() <= BOUND


def test_it_learns_the_covariance_of_a_gaussian():
    torch.manual_seed(1)
    mix = torch.randn(4, 4) / 2 + torch.eye(4)
    density = MultivariateNormal(torch.ones(4), mix @ mix.T)
    glow = Glow((2, 2), levels=1, depth=2, width=8)
    glow.initialise(density.sample((512,)).view(-1, 2, 2))
    optimizer = torch.optim.Adam(glow.parameters(), lr=1e-2)
    for _ in range(300):
        loss = -glow.log_prob(density.sample((256,)).view(-1, 2, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = density.sample((4000,))
    divergence = density.log_prob(x) - glow.log_prob(x.view(-1, 2, 2))
    assert 0 < divergence.mean() < 0.05


@pytest.mark.parametrize(
    ("shape", "levels"),
    [((28, 28), 3), ((3, 8, 6), 2), ((64,), 1), ((1, 1, 8, 8), 1), ((8, 8), 0)],
)
def test_a_shape_that_does_not_fit_is_named(shape, levels):
    with pytest.raises(EBMError, match=f"{levels} levels") as error:
        Glow(shape, levels, depth=1, width=4)
    assert str(shape) in str(error.value)


def test_points_and_latents_of_another_shape_are_named():
    glow = flow()
    with pytest.raises(EBMError, match=r"expected points of shape \(4, 4\), got \(16,\)"):
        glow.log_prob(torch.randn(3, 16))
    with pytest.raises(EBMError, match=r"expected points of shape \(16,\), got \(4, 4\)"):
        glow.from_latent(torch.randn(3, 4, 4))
