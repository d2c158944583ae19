"""Stacks of images: which of the modes, the tuples of their parts' classes, the samples reach."""

from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ebm import EBMError, figures, metrics
from ebm.ensemble import histories
from ebm.evaluation.images import (
    ENERGIES,
    described,
    draw_energies,
    enough,
    looked_at,
    measure_samples,
)
from ebm.evaluation.published import MNIST_STACKED, refer_to_published
from ebm.evaluation.result import Case, Evaluation, bound, measure_acceptance
from ebm.evaluation.scores import Numbers, energies
from ebm.reference import Reference, Seen

PUBLISHED = 26
"""Samples to a mode by which the published numbers were counted."""

SHOWN, COLUMNS = 50, 5
"""Stacks in a picture, and in one of its rows."""


def evaluate_stacked(case: Case) -> Evaluation:
    """Modes that the samples reach by the classifier of `reference`, which looks at single
    parts."""
    result = Evaluation()
    model, samples, drawn = case.model, case.samples, case.drawn
    enough(drawn, len(drawn))
    train, test = case.points("train", max(len(drawn), ENERGIES)), case.points("test")
    seen = looked_at(case.reference, samples, train)
    _modes(result, seen, train.shape[1], case.reference)
    _alone(result, seen["samples"], train.shape[1], len(histories(model)))
    measure_samples(result, case, seen)
    if case.about.get("base") == "mnist" and len(drawn) >= PUBLISHED * 10 ** train.shape[1]:
        stacks = MNIST_STACKED.get(train.shape[1], {})
        refer_to_published(result, model, stacks)
    measure_acceptance(result, samples)
    _pictures(result, drawn, test)
    sets = {"train": train, "test": test, "samples": drawn}
    if "generator" in samples:
        sets["generator"] = samples["generator"]
    draw_energies(result, {name: energies(model, x[:ENERGIES]) for name, x in sets.items()})
    return result


def mode_counts(seen: Seen, parts: int) -> Tensor:
    """How many stacks of so many `parts` the classifier has `seen` in each mode [10^parts]."""
    if seen.classes is None:
        raise EBMError("reference.kind: stacks are counted by a classifier; expected 'classifier'")
    return metrics.mode_counts(seen.classes, 10**parts)


def _modes(result: Evaluation, seen: dict[str, Seen], parts: int, reference: Reference) -> None:
    """Coverage of the samples, beside that of as many training stacks and of the uniform."""
    counts = {"samples": mode_counts(seen["samples"], parts)}
    n, modes = int(counts["samples"].sum()), len(counts["samples"])
    result.metrics |= _coverage(counts["samples"]) | {"modes_total": modes}
    if "generator" in seen:
        counts["generator"] = mode_counts(seen["generator"], parts)
        result.add(_coverage(counts["generator"]), "_generator")
    real = counts["training stacks"] = mode_counts(seen["train"], parts)
    source = f"{int(real.sum())} training stacks, counted by {described(reference)}"
    for name, value in _coverage(real).items():
        result.refer(name, value, bound(name), source)
    expected = f"the expectation of {n} draws of the uniform distribution"
    result.refer("mode_kl", metrics.uniform_kl(modes, n), "floor", expected)
    shares = {name: (count / count.sum()).cpu().numpy() for name, count in counts.items()}
    caption = (
        f"Share of each mode as a multiple of one in {modes:,}, each set in an order of its own. "
        "A line ends where its modes do: the classifier finds one in every stack, however bad."
    )
    result.draw("modes", "Modes", caption, figures.mode_shares(shares))


def _alone(result: Evaluation, seen: Seen, parts: int, members: int) -> None:
    """What the `members` of an ensemble, whose samples were `seen` in turn, reach each by itself:
    together they miss nothing that one of them has."""
    if members == 1 or seen.classes is None:
        return
    each = [seen.classes[m::members] for m in range(min(members, len(seen.classes)))]
    coverage = [_coverage(metrics.mode_counts(own, 10**parts)) for own in each]
    source = f"the mean over the {members} trainings, each by {len(each[-1])} samples of its own"
    for name in coverage[0]:
        result.refer(name, fmean(one[name] for one in coverage), "baseline", source)


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
