"""Laws of the metrics: closed forms, invariances, known floors."""

import math

import pytest
import torch

from ebm import metrics
from ebm.densities import DENSITIES, EXTENT


def test_modes_are_counted_within_the_radius_only():
    modes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[0.05, 0.0], [0.95, 0.0], [0.5, 0.5], [0.0, 0.04]])
    near = metrics.nearest_mode(x, modes, radius=0.1)
    assert near.tolist() == [0, 1, -1, 0]
    assert metrics.mode_counts(near, 3).tolist() == [2, 1, 0]


def test_kl_to_uniform_in_closed_form():
    assert metrics.kl_to_uniform(torch.tensor([5, 5, 5])) == pytest.approx(0, abs=1e-12)
    assert metrics.kl_to_uniform(torch.tensor([9, 0, 0])) == pytest.approx(math.log(3))
    expected = 0.75 * math.log(0.75 * 2) + 0.25 * math.log(0.25 * 2)
    assert metrics.kl_to_uniform(torch.tensor([3, 1])) == pytest.approx(expected)
    assert math.isnan(metrics.kl_to_uniform(torch.tensor([0, 0])))


def test_kl_of_uniform_draws_has_its_known_floor():
    torch.manual_seed(0)
    values = [
        metrics.kl_to_uniform(torch.bincount(torch.randint(25, (5000,)), minlength=25))
        for _ in range(200)
    ]
    assert sum(values) / 200 == pytest.approx(24 / (2 * 5000), rel=0.1)


def test_frechet_distance_of_two_gaussians_in_closed_form():
    """Diagonal covariances: |m|^2 + sum (s - t)^2."""
    torch.manual_seed(1)
    x = torch.randn(400000, 2) * torch.tensor([1.0, 2.0])
    y = torch.randn(400000, 2) * torch.tensor([3.0, 0.5]) + torch.tensor([1.0, -1.0])
    assert metrics.frechet_distance(x, y) == pytest.approx(2 + 4 + 2.25, rel=0.01)


def test_frechet_distance_is_zero_on_itself_symmetric_and_free_of_rotation():
    torch.manual_seed(2)
    x, y = torch.randn(500, 5).double(), torch.randn(400, 5).double() @ torch.randn(5, 5).double()
    q, _ = torch.linalg.qr(torch.randn(5, 5).double())
    there, back = metrics.frechet_distance(x, y), metrics.frechet_distance(y, x)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert there == pytest.approx(back)
    assert metrics.frechet_distance(x @ q, y @ q) == pytest.approx(there)


def test_frechet_distance_survives_constant_pixels():
    x = torch.cat([torch.randn(100, 3), torch.zeros(100, 2)], 1)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_grid_log_partition_of_a_gaussian():
    grid = metrics.cell_centres(-8, 8, 200)
    log_z = metrics.grid_log_partition(grid.square().sum(1) / 2, -8, 8)
    assert log_z.item() == pytest.approx(math.log(2 * math.pi), abs=1e-9)


def test_grid_kl_of_two_gaussians_in_closed_form():
    grid = metrics.cell_centres(-8, 8, 300)
    p, q = -grid.square().sum(1) / 2, -(grid - 0.5).square().sum(1) / (2 * 1.5**2)
    per_axis = math.log(1.5) + (1 + 0.25) / (2 * 1.5**2) - 0.5
    assert metrics.grid_kl(p, q) == pytest.approx(2 * per_axis, rel=1e-5)
    assert metrics.grid_kl(p, p + 7) == pytest.approx(0, abs=1e-12)


def test_the_grid_is_in_rows_of_ascending_y():
    grid = metrics.cell_centres(0, 1, 2)
    assert grid.tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_a_toy_density_integrates_to_one_and_fits_its_square(name):
    density = DENSITIES[name]()
    cells = 300 if density.modal else 180  # below sigma: there the midpoint rule is exact to 1e-8
    grid = metrics.cell_centres(*EXTENT, cells)
    log_p = metrics.in_batches(density.log_prob, grid, 2048)
    log_z = metrics.grid_log_partition(-log_p, *EXTENT)
    assert log_z.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_draws_of_a_toy_density_have_its_entropy(name):
    """Mean log p of draws equals the integral of p log p: sampler and density are of one
    distribution."""
    density = DENSITIES[name]()
    torch.manual_seed(3)
    log_p = metrics.in_batches(density.log_prob, density.sample(4000), 1024)
    cells = metrics.cell_centres(*EXTENT, 300 if density.modal else 180)
    on_grid = metrics.in_batches(density.log_prob, cells, 2048)
    p = on_grid.softmax(0)
    error = 5 * log_p.std() / math.sqrt(len(log_p)) + 0.01
    assert log_p.mean().item() == pytest.approx((p * on_grid).sum().item(), abs=error.item())


def test_every_curve_is_strung_closely_enough():
    for name, factory in DENSITIES.items():
        density = factory()
        if density.modal:
            continue
        distance = torch.cdist(density.means, density.means) + 9 * torch.eye(len(density.means))
        assert distance.min(1).values.max() < density.sigma / 2, name


def test_modes_of_exact_draws_hold_what_theory_says():
    """A two-dimensional Gaussian has 1 - exp(-8) of its mass within 4 sigma."""
    torch.manual_seed(4)
    density = DENSITIES["25gaussians"]()
    near = metrics.nearest_mode(density.sample(200000), density.means, 4 * density.sigma)
    assert (near >= 0).double().mean().item() == pytest.approx(1 - math.exp(-8), abs=3e-4)
