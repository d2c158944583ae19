"""Every experiment of `paper/` fits its data: its networks take points of that shape, and a step,
if a short one."""

from pathlib import Path

import pytest
import torch

from ebm import params, variants
from ebm.data.made import binarised

PUBLISHED = params.load(Path(__file__).parents[1] / "paper" / "params.yaml")
SHORT = {
    "igebm": {"langevin_steps": 1, "buffer": 16},
    "kernel_pca": {"points": 12, "components": 3},
    "one_class_svm": {"points": 12},
}
"""What a step of a variant can do with less of."""
CHAINS = {"igebm", "nce", "fce"}
"""Variants whose samples take steps."""


def short(settings):
    """The same with as few steps of a flow at each of its levels as there can be."""
    shallow = {name: f | {"depth": 1} for name, f in settings.items() if _is_glow(f)}
    return settings | shallow


def _is_glow(flow):
    return isinstance(flow, dict) and flow.get("kind") == "glow"


def shape(settings):
    """That of the points of a data set."""
    if settings.kind == "kddcup99":
        return (121,)
    if settings.kind == "stacked":
        return (settings.parts, 28, 28)
    if settings.kind in ("density", "digits"):
        return {"density": (2,), "digits": (8, 8)}[settings.kind]
    return (3, 32, 32) if settings.name in ("cifar10", "svhn") else (28, 28)


@pytest.mark.parametrize("name", PUBLISHED.experiments)
def test_a_published_experiment_fits_its_data(name):
    experiment = PUBLISHED.experiments[name]
    dataset = PUBLISHED.datasets[experiment.dataset]
    of = shape(dataset)
    torch.manual_seed(0)
    settings = short(experiment.model.model_dump()) | SHORT.get(experiment.variant, {})
    model = variants.build(experiment.variant, of, settings)
    x = torch.rand(20, *of)
    if levels := settings.get("levels"):
        x = (x * (levels - 1)).round() / (levels - 1)
    x = binarised(x, getattr(dataset, "binarize", "none"), torch.Generator())
    model.initialise(x)
    logs = model.training_step(x[:4], torch.tensor([0, 3, 6, 9]))
    assert all(value.isfinite() for value in logs.values())
    assert model.eval().energy(x[:4]).shape == (4,)
    drawn = model.sample(2, **({"steps": 1} if experiment.variant in CHAINS else {}))["samples"]
    assert drawn.shape[1:] == of
