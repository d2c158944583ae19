"""Laws of flows: densities that integrate to one, draws that know theirs and follow a gradient,
and the space between data and flow."""

import math
from itertools import product

import pytest
import torch
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal, Normal

from ebm import EBMError, parallel
from ebm.flows import Defended, Density, Gaussian, Space, adam, make
from ebm.metrics import cell_centres

pytestmark = pytest.mark.usefixtures("double")

KINDS = {
    "gaussian": {},
    "spline": {"transforms": 2, "bins": 4, "width": 6},
    "coupling": {"transforms": 2, "width": 6},
}
TRAINED = [kind for kind, settings in KINDS.items() if settings]
SQUARE, CELLS = (-8.0, 8.0), 240


def flow(kind, dimensions=2, stir=0.3):
    """A flow every parameter of which is off its start, fitted to data that are not standard."""
    torch.manual_seed(0)
    made = make((dimensions,), kind, **KINDS[kind])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += stir * torch.randn_like(parameter)
    mix = torch.eye(dimensions) + 0.4 * torch.randn(dimensions, dimensions)
    made.initialise(0.5 + torch.randn(500, dimensions) @ mix)
    return made


def integral(log_prob, low=SQUARE[0], high=SQUARE[1], cells=CELLS):
    """Of a density in the plane over a square, by the midpoint rule."""
    with torch.no_grad():
        return (log_prob(cell_centres(low, high, cells)).exp().sum()).item() * (
            (high - low) / cells
        ) ** 2


def to_latent(made, v):
    """u of points [B, D], which is N(0, I)."""
    if isinstance(made, Gaussian):
        return torch.linalg.solve_triangular(made.scale, (v - made.mean).T, upper=False).T
    return made.lazy().transform(getattr(made, "STRETCH", 1) * v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dimensions", [2, 5])
def test_the_density_is_that_of_the_latent_and_the_jacobian(kind, dimensions):
    made, v = flow(kind, dimensions), torch.randn(4, dimensions)
    matrices = [jacobian(lambda p: to_latent(made, p[None])[0], p) for p in v]
    log_det = torch.stack([torch.linalg.slogdet(matrix).logabsdet for matrix in matrices])
    assert log_det.abs().min() > 0.01
    normal = Normal(0.0, 1.0).log_prob(to_latent(made, v)).sum(1)
    torch.testing.assert_close(made.log_prob(v), normal + log_det)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_integrates_to_one(kind):
    assert integral(flow(kind).log_prob) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_knows_its_density(kind):
    made = flow(kind, 3)
    v, log_prob = made.draw_with_log_prob(7)
    assert v.shape == (7, 3)
    torch.testing.assert_close(log_prob, made.log_prob(v))


@pytest.mark.parametrize("kind", KINDS)
def test_no_draws_may_be_asked_for(kind):
    """As a mixture does whose only draw is another part's."""
    v, log_prob = flow(kind).draw_with_log_prob(0)
    assert (v.shape, log_prob.shape) == ((0, 2), (0,))


@pytest.mark.parametrize("kind", KINDS)
def test_every_quadrant_has_its_share_of_the_draws(kind):
    made, n = flow(kind), 20_000
    with torch.no_grad():
        grid = cell_centres(*SQUARE, CELLS)
        weight, x = made.log_prob(grid).softmax(0), made.draw_with_log_prob(n)[0]
    cell = (SQUARE[1] - SQUARE[0]) / CELLS
    centre = cell * (x.median(0).values / cell).round()  # between cells

    def quadrants(x):
        return ((x > centre) * torch.tensor([2, 1])).sum(1)

    drawn = quadrants(x).bincount(minlength=4) / n
    mass = torch.zeros(4).index_add(0, quadrants(grid), weight)
    assert drawn.min() > 0.05
    assert (drawn - mass).abs().max() < 4 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("of", ["draws", "log_prob of draws"])
def test_the_gradient_of_a_draw_is_that_of_finite_differences(kind, of):
    made, step = flow(kind), 1e-5

    def value():
        torch.manual_seed(1)
        v, log_prob = made.draw_with_log_prob(6)
        return v.cos().sum() if of == "draws" else log_prob.cos().sum()

    weights = [p for p in made.parameters() if p.dim() == 1]
    gradients = torch.autograd.grad(value(), weights)
    assert max(gradient.abs().max() for gradient in gradients) > 0.01
    for parameter, gradient in zip(weights, gradients, strict=True):
        with torch.no_grad():
            parameter[0] += step
            up = value()
            parameter[0] -= 2 * step
            down = value()
            parameter[0] += step
        assert gradient[0].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=1e-5)


def test_the_gaussian_has_the_moments_of_the_data_and_nothing_to_train():
    torch.manual_seed(2)
    data = torch.randn(300, 3) @ torch.randn(3, 3) + torch.tensor([1.0, -2.0, 0.5])
    made = make((3,), "gaussian")
    made.initialise(data)
    expected = MultivariateNormal(data.mean(0), data.T.cov() + 1e-6 * torch.eye(3))
    torch.testing.assert_close(made.log_prob(data), expected.log_prob(data))
    assert adam("flow", made, 1e-3, (0.9, 0.999), 0.0) == {}
    data[:, 1] = 4
    made.initialise(data)
    assert made.log_prob(data).isfinite().all()


@pytest.mark.parametrize("rows", [1000, 300_000])
def test_the_gaussian_fits_columns_that_add_up_to_one(rows):
    """Their covariance is singular, in float32 its smallest eigenvalue is negative; the Gaussian
    has a deviation of 0.1 where they do not vary."""
    torch.manual_seed(0)
    one_hot = torch.nn.functional.one_hot(torch.arange(rows) % 5, 5).float()
    data = torch.cat([torch.randn(rows, 2), (one_hot - one_hot.mean(0)) / one_hot.std(0)], 1)
    made = make((7,), "gaussian")
    made.initialise(data)
    covariance = made.scale.double() @ made.scale.double().T
    wider = data.double().T.cov() + 0.01 * torch.eye(7)
    assert (covariance - wider).abs().max() < 1e-5
    assert made.log_prob(data[:100]).isfinite().all()


def test_a_defended_flow_integrates_to_one_and_its_draws_know_their_density():
    narrow, broad = Gaussian(2), Gaussian(2)
    narrow.scale *= 0.2
    narrow.mean += 1
    mixture = Defended(narrow, broad, 0.3)
    assert integral(mixture.log_prob) == pytest.approx(1, abs=1e-4)
    v, log_prob = mixture.draw_with_log_prob(50)
    expected = 0.7 * narrow.log_prob(v).exp() + 0.3 * broad.log_prob(v).exp()
    torch.testing.assert_close(log_prob, expected.log())


@pytest.mark.parametrize(("share", "n"), [(0.05, 200), (0.3, 10), (0.05, 512)])
def test_the_defence_has_its_share_of_every_batch_anywhere_in_it(share, n):
    torch.manual_seed(3)
    far = Gaussian(2)
    far.mean += 1000
    mixture = Defended(Gaussian(2), far, share)
    where = torch.stack([mixture.draw_with_log_prob(n)[0][:, 0] > 500 for _ in range(50)])
    assert (where.sum(1) - share * n).abs().max() < 1
    assert where[:, : n // 2].sum() == pytest.approx(where.sum().item() / 2, rel=0.3)


def test_processes_that_draw_together_have_a_whole_defence_each(monkeypatch):
    mixture = Defended(Gaussian(2), Gaussian(2), 0.1)
    mixture.draw_with_log_prob(32)
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    mixture.draw_with_log_prob(32)  # alike in all processes
    with parallel.same_draws():
        mixture.draw_with_log_prob(30)
        with pytest.raises(EBMError, match=r"model\.defence = 0\.1: of 32 draws"):
            mixture.draw_with_log_prob(32)


def test_a_few_draws_have_their_share_of_the_defence_too():
    """On average, so that each is a draw of the mixture: rounded, three would never have any."""
    torch.manual_seed(8)
    far = Gaussian(2)
    far.mean += 1000
    mixture = Defended(Gaussian(2), far, 0.1)
    draws = [mixture.draw_with_log_prob(3)[0][:, 0] > 500 for _ in range(4000)]
    expected, trials = 0.1, 4000
    deviation = math.sqrt(expected * (1 - expected) / trials)
    share = torch.stack(draws).double().mean(0)
    assert (share - expected).abs().max() < 4 * deviation


@pytest.mark.parametrize(("levels", "margin"), [(2, 0.05), (3, 1e-6), (17, 1e-6), (256, 0.01)])
def test_every_grey_comes_back_to_its_level_exactly(levels, margin):
    torch.manual_seed(4)
    space = Space((levels, 200), levels, margin)
    x = (torch.arange(levels) / (levels - 1))[:, None].expand(levels, 200)[None]
    for v in (space.enter(x), space.centre(x)):
        assert v.isfinite().all()
        assert torch.equal(space.leave(v), x)
    assert torch.equal(space.leave(space.centre(x.float())), x.float())
    assert not torch.equal(space.enter(x), space.enter(x))
    assert space.leave(torch.tensor([-1e3, 1e3])).tolist() == [0, 1]


def test_a_margin_that_single_precision_cannot_tell_from_none_is_refused():
    white = torch.ones(500, 28, 28, dtype=torch.float32)
    assert Space((28, 28), 256, 1e-7).enter(white).isfinite().all()
    for margin in (0.0, 1e-8):
        with pytest.raises(EBMError, match=f"margin = {margin:g}: expected at least 1e-07"):
            Space((28, 28), 256, margin)


def test_the_noise_is_uniform_within_the_level():
    torch.manual_seed(5)
    space = Space((1, 20_000), 5, 0.02)
    v = space.enter(torch.full((1, 1, 20_000), 0.5))
    y = (v.sigmoid() - 0.02) / 0.96
    noise = (5 * y - 2).flatten().sort().values
    assert noise.min() >= 0
    assert noise.max() < 1
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    assert (noise - uniform).abs().max() < 1.95 / math.sqrt(20_000)  # Kolmogorov's 0.001


def test_the_log_determinant_of_greys_is_that_of_the_noise_within_a_level():
    torch.manual_seed(6)
    space = Space((2, 3), 5, 0.03)
    x = torch.randint(5, (4, 2, 3)) / 4
    noise = torch.rand(4, 2, 3)

    def of_noise(k):
        return lambda n: space._enter(x[k : k + 1], n[None]).flatten()

    matrices = [jacobian(of_noise(k), noise[k]).reshape(6, 6) for k in range(4)]
    expected = torch.stack([torch.linalg.slogdet(matrix).logabsdet for matrix in matrices])
    torch.testing.assert_close(space.log_det(space._enter(x, noise)), expected)


def test_columns_of_two_values_are_told_of_as_no_density_fits_them_best(caplog):
    torch.manual_seed(8)
    x = torch.randn(1000, 4)
    Space((4,), 0, 0.0).initialise(x)
    assert not caplog.messages
    x[:, 1], x[:, 2] = x[:, 1] > 0, 0.1
    space = Space((4,), 0, 0.0)
    space.initialise(x)
    assert "2 of 4 columns have two values at most" in caplog.text
    assert space.scale[2] == 1  # rounding makes a deviation of a thousand times 0.1


def test_vectors_are_standardised_and_come_back():
    torch.manual_seed(7)
    x = torch.randn(100, 3) * torch.tensor([2.0, 0.1, 0.0]) + torch.tensor([3.0, -1.0, 7.0])
    space = Space((3,), 0, 0.0)
    space.initialise(x)
    v = space.enter(x)
    torch.testing.assert_close(v.mean(0), torch.zeros(3), atol=1e-12, rtol=0)
    torch.testing.assert_close(v.std(0), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(space.leave(v), x)
    assert torch.equal(space.centre(x), v)
    slope = torch.linalg.slogdet(jacobian(lambda p: space.enter(p[None])[0], x[0])).logabsdet
    torch.testing.assert_close(space.log_det(v), slope.expand(100))


@pytest.mark.parametrize("margin", [0.02, 0.1])
def test_the_probabilities_of_all_images_add_up_to_the_share_of_draws_within_range(margin):
    """All images of 2 x 2 pixels of 3 levels, the noise averaged away: a bound in the mean of logs
    is none in the mean of probabilities. What the flow puts beyond black and white is lost."""
    torch.manual_seed(8)
    settings = {"kind": "glow", "levels": 1, "depth": 1, "width": 4}
    model = Density((2, 2), settings, levels=3, margin=margin)
    images = torch.tensor(list(product([0.0, 0.5, 1.0], repeat=4))).view(-1, 2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        totals = torch.stack([model.log_likelihood(images).exp().sum() for _ in range(600)])
        v, _ = model.flow.draw_with_log_prob(40_000)
    y = (v.sigmoid() - margin) / (1 - 2 * margin)
    inside = ((y >= 0) & (y <= 1)).flatten(1).all(1).double().mean().item()
    error = totals.std().item() / math.sqrt(600) + 0.5 / math.sqrt(40_000)
    assert error < 0.01
    assert totals.mean().item() == pytest.approx(inside, abs=4 * error)
    assert totals.mean() < 1
    if margin == 0.02:
        assert inside > 0.97


def test_draws_of_images_have_the_levels_and_their_probabilities():
    torch.manual_seed(9)
    settings = {"kind": "glow", "levels": 1, "depth": 1, "width": 4}
    model = Density((2, 2), settings, levels=2, margin=0.01)
    images = torch.tensor(list(product([0.0, 1.0], repeat=4))).view(-1, 2, 2)
    with torch.no_grad():
        model.flow.levels[0].bias += 0.5
        each = torch.stack([model.log_likelihood(images).exp() for _ in range(400)]).mean(0)
        drawn = model.sample(20_000)["samples"]
    powers = torch.tensor([[8, 4], [2, 1]])
    share = (drawn * powers).flatten(1).sum(1).long().bincount(minlength=16) / 20_000
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert (share - each).abs().max() < 0.02
    assert each.max() > 0.08


def test_levels_between_which_the_data_have_greys_are_named():
    """Bits per dimension of other levels than the data's would be of other data."""
    data = torch.randint(17, (50, 2, 2)) / 16
    Space((2, 2), 17, 0.01).initialise(data)
    Space((2, 2), 33, 0.01).initialise(data)
    for levels in (2, 9, 32, 256):
        with pytest.raises(EBMError, match=rf"model\.levels = {levels}"):
            Space((2, 2), levels, 0.01).initialise(data)


@pytest.mark.parametrize(("shape", "levels"), [((4,), 3), ((4,), 1), ((2, 2), 0), ((2, 2), 1)])
def test_levels_that_do_not_fit_the_shape_are_named(shape, levels):
    with pytest.raises(EBMError, match=rf"model\.levels = {levels}"):
        Space(shape, levels, 0.01)


def test_a_margin_that_leaves_black_infinite_is_named():
    with pytest.raises(EBMError, match=r"model\.margin = 0"):
        Space((2, 2), 4, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_of_vectors_refuses_images(kind):
    with pytest.raises(EBMError, match=rf"flow '{kind}' .*\(2, 2\); use 'glow'"):
        make((2, 2), kind, **KINDS[kind])


def test_a_flow_of_images_begins_with_the_greys_as_it_will_see_them():
    """Of images of one grey nothing but the noise within its level varies: fitted to the middle
    of the level, every channel would be scaled by a million."""
    torch.manual_seed(11)
    settings = {"kind": "glow", "levels": 1, "depth": 1, "width": 4}
    model = Density((4, 4), settings, levels=16, margin=1e-6)
    x = torch.full((200, 4, 4), 0.6)
    model.initialise(x)
    assert -model.log_likelihood(x).mean().item() / 16 < 2
