"""Columns are standardised by the training rows; the Gaussian kernel is exact."""

from types import SimpleNamespace

import pytest
import torch
from small_models import MODELS

from ebm import EBMError, rbf, variants
from ebm.scoring import Scorer, Standardise
from pipelines import results, train


def rows(n=200, d=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator) * torch.tensor([1e-3, 1.0, 1e8]) + 7.0


def test_standardised_columns_have_mean_0_and_variance_1_whatever_their_size():
    layer = Standardise(3)
    layer.fit(rows())
    z = layer(rows()).double()
    torch.testing.assert_close(z.mean(0), torch.zeros(3).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3).double(), atol=1e-3, rtol=0)


def test_it_is_the_identity_until_it_is_fitted():
    x = rows()
    assert torch.equal(Standardise(3)(x), x)


def test_a_column_that_never_varies_is_only_shifted():
    """0.1 is no sum of powers of two: the computed deviation of these is not 0."""
    data = torch.full((1001, 1), 0.1, dtype=torch.double)
    assert data.std(correction=0) > 0
    layer = Standardise(1).double()
    layer.fit(data)
    assert layer.scale.item() == 1
    assert layer(data + 1).flatten().tolist() == pytest.approx([1] * 1001)


@pytest.mark.parametrize("standardise", [True, False])
def test_a_scorer_fits_its_columns_only_where_it_is_asked_to_and_draws_nothing(standardise):
    model = Scorer((3,), standardise)
    model.initialise(rows())
    assert torch.equal(model.columns(rows()), rows()) != standardise
    assert model.sample(7)["samples"].shape == (0, 3)


def test_the_kernel_is_that_of_the_differences_and_can_be_differentiated_at_a_row():
    torch.manual_seed(0)
    x, y = torch.randn(5, 3).double(), torch.randn(4, 3).double()
    gamma = torch.tensor(0.7).double()
    expected = torch.exp(-gamma * (x[:, None] - y).square().sum(2))
    torch.testing.assert_close(rbf.kernel(x, y, gamma), expected)
    at = y[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rbf.kernel(at, y[:1], gamma).sum(), at)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_scale_is_that_of_scikit_learn():
    import numpy as np
    from sklearn.svm import OneClassSVM

    x = rows(50)[:, :2].double()
    fitted = OneClassSVM(gamma="scale").fit(x.numpy())
    assert rbf.fitting_gamma("scale", x) == pytest.approx(fitted._gamma)
    assert rbf.fitting_gamma("scale", x) == pytest.approx(1 / (2 * np.var(x.numpy())))
    assert rbf.fitting_gamma("scale", torch.ones(5, 2)) == 1
    assert rbf.fitting_gamma(0.3, x) == 0.3


def test_rows_are_drawn_once_each_by_the_global_generator():
    data = torch.arange(30.0)[:, None]
    torch.manual_seed(5)
    first = rbf.some_rows(data, 20)
    torch.manual_seed(5)
    assert torch.equal(first, rbf.some_rows(data, 20))
    assert not torch.equal(first, rbf.some_rows(data, 20))
    assert len(first.unique()) == 20


def test_more_rows_than_there_are_is_an_error_that_names_the_key():
    with pytest.raises(EBMError, match=r"model\.points = 31 is more than the 30"):
        rbf.some_rows(torch.zeros(30, 1), 31)


def test_slices_are_put_together_in_order(monkeypatch):
    monkeypatch.setattr(rbf, "SLICE", 3)
    x = torch.arange(8.0)[:, None]
    sizes = []

    def function(part):
        sizes.append(len(part))
        return part.squeeze(1)

    assert torch.equal(rbf.in_slices(function, x), x.squeeze(1))
    assert sizes == [3, 3, 2]
    assert rbf.in_slices(function, x[:0]).shape == (0,)


@pytest.mark.parametrize("name", ["dagmm", "dsebm", "kernel_pca", "one_class_svm"])
def test_one_that_was_fitted_without_steps_comes_back_from_its_files(tmp_path, name):
    model = variants.build(name, (3,), MODELS[name])
    model.initialise(rows())
    settings = {"variant": name, "model": MODELS[name], "ensemble": None, "dataset": "table"}
    prepared = SimpleNamespace(shape=(3,), transform=lambda: None, manifest={"settings": {}})
    train._write(tmp_path, model, settings, prepared, history=[])
    loaded = variants.load(tmp_path / "weights.safetensors", tmp_path / "config.json")
    assert torch.equal(loaded.energy(rows()), model.energy(rows()))
    assert results._history(tmp_path / "history.csv", "train@it") == {"step": []}


def test_a_gradient_over_many_points_keeps_none_of_their_kernels(monkeypatch):
    """Of a million rows and 4000 to compare them with they would be 32 GB."""
    monkeypatch.setattr(rbf, "SLICE", 3)
    torch.manual_seed(0)
    compared, gamma = torch.randn(500, 2).double(), torch.tensor(0.7).double()
    x = torch.randn(8, 2).double().requires_grad_()

    def similarity(part):
        return rbf.kernel(part, compared, gamma).sum(1)

    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        total = rbf.in_slices(similarity, x).sum()
    assert max(kept, default=0) < len(compared)
    (found,) = torch.autograd.grad(total, x)
    (expected,) = torch.autograd.grad(similarity(x).sum(), x)
    torch.testing.assert_close(found, expected)
