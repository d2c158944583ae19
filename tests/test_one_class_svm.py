"""Laws of the one-class SVM: it is scikit-learn's; nu is what it promises to be."""

import pytest
import torch
from sklearn import svm

from ebm.variants.one_class_svm import OneClassSVM


def model(data, **changes):
    torch.manual_seed(0)
    settings = {"points": 150, "nu": 0.2, "gamma": "scale", "standardise": False}
    made = OneClassSVM((data.shape[1],), **settings | changes)
    made.initialise(data)
    return made


def blob(n=200, d=3, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gamma", ["scale", 0.05])
@pytest.mark.parametrize("nu", [0.1, 0.5])
def test_the_energy_is_minus_the_decision_function(gamma, nu):
    ours = model(blob(), gamma=gamma, nu=nu)
    theirs = svm.OneClassSVM(nu=nu, gamma=gamma).fit(ours.rows.numpy())
    x = 2 * blob(seed=1).double()
    expected = -torch.from_numpy(theirs.decision_function(x.numpy()))
    torch.testing.assert_close(ours.energy(x), expected, rtol=0, atol=1e-10)


def test_the_rows_are_training_rows_as_it_sees_them():
    ours = model(blob(), standardise=True)
    seen = ours.columns(blob()).double()
    assert (torch.cdist(ours.rows, seen).min(1).values < 1e-6).all()
    assert len(ours.rows.unique(dim=0)) == 150


@pytest.mark.parametrize("nu", [0.1, 0.5])
def test_nu_bounds_the_outliers_from_above_and_the_support_vectors_from_below(nu):
    """Proposition 3 of the paper. The zeros are stored as well."""
    ours = model(blob(), nu=nu)
    outliers = (ours.energy(ours.rows) > 1e-6).double().mean().item()
    support = (ours.dual != 0).double().mean().item()
    assert outliers <= nu <= support < 1
    assert ours.dual.sum().item() == pytest.approx(nu * 150)
    assert ours.dual.shape == (150,)


def test_far_away_the_energy_is_the_offset_and_within_it_is_negative():
    ours = model(blob())
    far = torch.full((1, 3), 1e6)
    assert ours.energy(far).item() == pytest.approx(ours.offset.item())
    assert ours.energy(torch.zeros(1, 3)).item() < 0


def test_it_sees_no_difference_between_units_if_it_standardises():
    units = torch.tensor([1.0, 1e3, 1e-3])
    one, other = model(blob(), standardise=True), model(units * blob(), standardise=True)
    x = blob(seed=1)
    torch.testing.assert_close(one.energy(x), other.energy(units * x), rtol=1e-3, atol=1e-3)


def test_its_state_is_all_there_is_to_it():
    ours, x = model(blob()), blob(seed=1)
    other = OneClassSVM((3,), points=150, nu=0.2, gamma="scale", standardise=False)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.energy(x), ours.energy(x))


def test_the_gradient_is_that_of_finite_differences():
    ours = model(blob())
    x = blob(5, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(ours.energy, x)
