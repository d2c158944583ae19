"""Laws of kernel PCA: the distance to the principal subspace of feature space."""

import pytest
import torch
from sklearn import decomposition

from ebm import EBMError, rbf
from ebm.variants.kernel_pca import KernelPCA


def model(data, **changes):
    torch.manual_seed(0)
    settings = {"points": 60, "components": 5, "gamma": "scale", "standardise": False}
    made = KernelPCA((data.shape[1],), **settings | changes)
    made.initialise(data)
    return made


def blob(n=100, d=3, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_with_all_components_the_rows_themselves_are_at_no_distance():
    ours = model(blob(), components=59, gamma=0.5)
    assert ours.energy(ours.rows).abs().max() < 1e-9
    assert ours.energy(blob(seed=1).double()).min() > 1e-9


def test_without_projections_it_is_the_distance_to_the_mean():
    """From |sum_i c_i phi(x_i)|^2 = c.K.c for phi(x) - 1/n sum_i phi(x_i)."""
    ours = model(blob())
    ours.axes.zero_()
    ours.centre.zero_()
    x = blob(1, seed=1).double()
    gram = rbf.kernel(*[torch.cat([x, ours.rows])] * 2, ours.gamma)
    c = torch.cat([torch.ones(1), torch.full((60,), -1 / 60)]).double()
    assert ours.energy(x).item() == pytest.approx((c @ gram @ c).item())


def test_it_is_the_residual_of_the_best_projection_in_feature_space():
    """By coordinates: feature space is cut to the span of all rows and points, where the rows of a
    root of the kernel matrix are the features; an SVD of the centred ones gives the subspace."""
    ours, x = model(blob(), components=4), blob(7, seed=1).double()
    gram = rbf.kernel(*[torch.cat([ours.rows, x])] * 2, ours.gamma)
    values, vectors = torch.linalg.eigh(gram)
    features = vectors * values.clamp(min=0).sqrt()
    mean = features[:60].mean(0)
    basis = torch.linalg.svd(features[:60] - mean).Vh[:4]
    centred = features[60:] - mean
    expected = (centred - centred @ basis.T @ basis).square().sum(1)
    torch.testing.assert_close(ours.energy(x), expected, rtol=1e-6, atol=1e-9)


def test_the_projections_are_those_of_scikit_learn():
    ours, x = model(blob()), blob(9, seed=1).double()
    theirs = decomposition.KernelPCA(5, kernel="rbf", gamma=ours.gamma.item())
    theirs.fit(ours.rows.numpy())
    f = rbf.kernel(x, ours.rows, ours.gamma) @ ours.axes - ours.centre
    expected = torch.from_numpy(theirs.transform(x.numpy()))
    torch.testing.assert_close(f.abs(), expected.abs(), rtol=1e-6, atol=1e-9)


def test_a_wide_kernel_makes_it_linear():
    """k = 1 - gamma |x - y|^2 + ...: the residual of linear PCA, times 2 gamma."""
    data = blob() * torch.tensor([3.0, 2.0, 0.5])
    gamma = 1e-5
    ours, x = model(data, components=2, gamma=gamma), blob(8, seed=1).double()
    linear = decomposition.PCA(2).fit(ours.rows.numpy())
    back = torch.from_numpy(linear.inverse_transform(linear.transform(x.numpy())))
    expected = (x - back).square().sum(1)
    torch.testing.assert_close(ours.energy(x) / (2 * gamma), expected, rtol=0, atol=2e-3)


def test_axes_of_small_eigenvalues_sum_to_nothing_and_the_energy_is_never_negative():
    """Rows that nearly coincide, as in traffic: eigenvalues down to 1e-9 of the largest."""
    data = torch.cat([blob(80) * 1e-3, blob(20) + 5.0])
    ours = model(data, points=100, components=40, gamma=0.1)
    assert ours.axes.norm(dim=0).max() > 100
    assert ours.axes.sum(0).abs().max() < 1e-8
    assert ours.energy(torch.cat([data, 3 * blob(seed=1)]).double()).min() > -1e-8


def test_more_components_than_points_are_refused():
    with pytest.raises(EBMError, match=r"model\.components = 61 is more than points = 60"):
        KernelPCA((3,), points=60, components=61, gamma="scale", standardise=False)


def test_repeated_rows_leave_axes_of_nothing_and_finite_energies():
    ours = model(blob(5).repeat(20, 1), components=10)
    assert (ours.axes.norm(dim=0) == 0).sum() >= 5
    assert ours.energy(blob(seed=1)).isfinite().all()


def test_its_state_is_all_there_is_to_it():
    ours, x = model(blob(), standardise=True), blob(seed=1)
    other = KernelPCA((3,), points=60, components=5, gamma="scale", standardise=True)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.energy(x), ours.energy(x))


def test_the_gradient_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(
        model(blob()).energy, blob(5, seed=1).double().requires_grad_()
    )
