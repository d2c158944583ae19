"""Stacks of images: which of the modes, the tuples of their parts' classes, the samples reach."""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ebm import EBMError, figures, metrics
from ebm.data import Prepared
from ebm.evaluation.images import ENERGIES, described, enough, measure_samples
from ebm.evaluation.published import MNIST_STACKED, refer_to_published
from ebm.evaluation.result import Evaluation
from ebm.evaluation.scores import Numbers, energies, evaluating
from ebm.reference import Reference
from ebm.variants.base import EBM

SHOWN, COLUMNS = 50, 5
"""Stacks in a picture, and in one of its rows."""


def evaluate_stacked(
    model: EBM,
    samples: dict[str, Tensor],
    prepared: Prepared,
    reference: Reference,
    settings: dict[str, Any],
) -> Evaluation:
    """Modes that the samples reach by the classifier of `reference`, which looks at single parts
    and in eval mode: one that draws its units at random would find modes that are not there."""
    result = Evaluation()
    drawn = samples["samples"]
    enough(drawn)
    train = prepared.points("train", max(len(drawn), ENERGIES)).to(drawn.device)
    test = prepared.points("test").to(drawn.device)
    with evaluating(reference.network):
        _modes(result, samples, train, reference)
        measure_samples(result, samples, train, test, reference)
    if prepared.manifest["settings"].get("base") == "mnist":
        stacks = MNIST_STACKED.get(train.shape[1], {})
        refer_to_published(result, model, stacks)
    if len(samples.get("acceptance", ())):
        result.metrics["acceptance"] = samples["acceptance"].mean().item()
    _pictures(result, drawn, test)
    sets = {"train": train, "test": test, "samples": drawn}
    if "generator" in samples:
        sets["generator"] = samples["generator"]
    found = {name: energies(model, x[:ENERGIES]).cpu().numpy() for name, x in sets.items()}
    caption = (
        "The lower, the more likely. What lies beyond the frame counts in its outermost bins."
    )
    result.draw("energies", "Energies", caption, figures.energy_histogram(found))
    return result


def mode_counts(x: Tensor, reference: Reference) -> Tensor:
    """How many of the stacks x [N, parts, H, W] the classifier finds in each mode
    [10^parts]."""
    found = reference.classify(x)
    if found is None:
        raise EBMError("reference.kind: stacks are counted by a classifier; expected 'classifier'")
    return metrics.mode_counts(found, 10 ** x.shape[1])


def _modes(
    result: Evaluation, samples: dict[str, Tensor], train: Tensor, reference: Reference
) -> None:
    """Coverage of the samples, beside that of as many training stacks and of the uniform."""
    counts = {"samples": mode_counts(samples["samples"], reference)}
    n, modes = int(counts["samples"].sum()), len(counts["samples"])
    result.metrics |= _coverage(counts["samples"]) | {"modes_total": modes}
    if "generator" in samples:
        counts["generator"] = mode_counts(samples["generator"], reference)
        before = _coverage(counts["generator"])
        result.metrics |= {f"{name}_generator": value for name, value in before.items()}
    real = counts["training stacks"] = mode_counts(train[:n], reference)
    source = f"{int(real.sum())} training stacks, counted by {described(reference)}"
    for name, value in _coverage(real).items():
        result.refer(name, value, "ceiling" if name == "modes" else "floor", source)
    expected = f"the expectation of {n} draws of the uniform distribution"
    result.refer("mode_kl", metrics.uniform_kl(modes, n), "floor", expected)
    shares = {name: (count / count.sum()).cpu().numpy() for name, count in counts.items()}
    caption = "Shares of the modes, each set in the order of its own. Dashed: all alike."
    result.draw("modes", "Modes", caption, figures.mode_shares(shares))


def _coverage(counts: Tensor) -> Numbers:
    return {"modes": int((counts > 0).sum()), "mode_kl": metrics.kl_to_uniform(counts)}


def _pictures(result: Evaluation, drawn: Tensor, test: Tensor) -> None:
    """Samples beside data."""
    caption = f"Each stack as its {test.shape[1]} parts side by side."
    result.draw("samples", "Samples", caption, _grid(drawn))
    caption += " What the samples should look like."
    result.draw("data", "Test stacks", caption, _grid(test))


def _grid(stacks: Tensor) -> Figure:
    """The first of stacks [N, parts, H, W], the parts of each side by side: as colours, three
    digits of 8 x 8 pixels cannot be told apart."""
    parts = torch.cat(list(stacks[:SHOWN].unbind(1)), -1)
    return figures.image_grid(parts.cpu().numpy(), COLUMNS)
