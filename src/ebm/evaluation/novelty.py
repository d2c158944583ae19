"""Images of a class that a model never saw, told from those of the classes that it knows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from ebm import EBMError, figures, metrics
from ebm.data import SPLITS
from ebm.ensemble import histories
from ebm.evaluation.published import MNIST_NOVELTY, refer_to_published
from ebm.evaluation.result import Case, Evaluation
from ebm.evaluation.scores import (
    SUFFIXES,
    TITLES,
    Numbers,
    left_out,
    scores,
    summarised,
)
from ebm.variants.base import EBM

TENTH = 0.1
"""The share of anomalies where they are made to count as rare."""


@dataclass(frozen=True)
class Pool:
    """All images of a data set [N, *] as they are stored, their classes [N], and by name the test
    of which images are: [N] each."""

    images: Tensor
    labels: Tensor
    tests: dict[str, Tensor]

    def normal(self, digit: int) -> dict[str, Tensor]:
        """Which images are normal where class `digit` is the anomaly, by test: [N] each."""
        return {name: test & (self.labels != digit) for name, test in self.tests.items()}


PROTOCOLS: dict[str, tuple[str, Callable[[Tensor, Tensor], float]]] = {
    "released": ("released", metrics.auprc_trapezoid),
    "strict": ("strict", metrics.auprc),
    "tenth": ("strict", partial(metrics.auprc, prevalence=TENTH)),
}
"""The test whose images of other classes are the normal ones, and the area under the
precision-recall curve, by protocol."""


def evaluate_novelty(case: Case) -> Evaluation:
    """Every class as the anomaly, found by the members that never saw it.

    All images of the class are anomalies. Normal are, for `strict`, the test images of the other
    classes; for `released` those that a second split puts into the test, most of which the members
    were trained on; `tenth` is `strict` with the anomalies counted as a tenth of all.
    """
    result = Evaluation()
    without = left_out(case.model)
    if not without:
        raise EBMError("ensemble.without: missing; expected for each member a class to leave out")
    pool = _pool(case)
    members = list(zip(histories(case.model), without, strict=True))
    digits = sorted(set(without))
    for digit in digits:
        own = [snapshots for snapshots, left in members if left == digit]
        found = [[_found(pool, digit, one) for one in snapshots] for snapshots in own]
        result.metrics |= summarised(found)
        _refer_to_shares(result, pool, digit)
    _means(result, digits)
    if case.about.get("name") == "mnist":
        refer_to_published(result, case.model, MNIST_NOVELTY)
    _draw_digits(result, digits)
    return result


def _pool(case: Case) -> Pool:
    stored, device = case.prepared.tensors, case.device
    images, labels = (
        torch.cat([stored[split + end] for split in SPLITS]).to(device) for end in ("", "_labels")
    )
    strict, released = torch.zeros(2, len(labels), dtype=torch.bool, device=device)
    strict[-len(stored["test"]) :] = True
    released[stored["released_index"].to(device)] = True
    return Pool(images, labels, {"released": released, "strict": strict})


def _found(pool: Pool, digit: int, model: EBM) -> Numbers:
    """One network as a detector of the images of class `digit`, under all protocols. It sees each
    image once."""
    anomalous, normal = pool.labels == digit, pool.normal(digit)
    needed = torch.stack([anomalous, *normal.values()]).any(0)
    found: Numbers = {}
    for name, score in scores(model, pool.images[needed]).items():
        inliers = {test: score[rows[needed]] for test, rows in normal.items()}
        outliers, end = score[anomalous[needed]], f"_{digit}{SUFFIXES[name]}"
        for protocol, (test, area) in PROTOCOLS.items():
            found[f"auprc_{protocol}{end}"] = area(inliers[test], outliers)
        for test, normals in inliers.items():
            found[f"auroc_{test}{end}"] = metrics.auroc(normals, outliers)
    return found


def _refer_to_shares(result: Evaluation, pool: Pool, digit: int) -> None:
    """What rankings that know nothing and the worst ones score."""
    anomalies = int((pool.labels == digit).sum())
    normal = {test: int(rows.sum()) for test, rows in pool.normal(digit).items()}
    for protocol, (test, area) in PROTOCOLS.items():
        name, n = f"auprc_{protocol}_{digit}", normal[test]
        share = TENTH if protocol == "tenth" else anomalies / (anomalies + n)
        source = f"{anomalies} anomalies beside {n} normal images"
        result.refer(name, share, "chance", source)
        result.refer(name, metrics.worst(area, n, anomalies), "floor", f"{source}, ranked worst")
    for test in normal:
        result.refer(f"auroc_{test}_{digit}", 0.5, "chance", "scores that know nothing")


def _means(result: Evaluation, digits: list[int]) -> None:
    """The means of all areas over the classes, beside those of their references."""
    kinds = [f"auprc_{protocol}" for protocol in PROTOCOLS]
    kinds += [f"auroc_{test}" for test in ("released", "strict")]
    for stem in kinds:
        for end in SUFFIXES.values():
            names = [f"{stem}_{digit}{end}" for digit in digits]
            if names[0] in result.metrics:
                result.metrics[f"{stem}_mean{end}"] = fmean(result.metrics[n] for n in names)
        entries = [result.references.get(f"{stem}_{digit}", []) for digit in digits]
        for several in zip(*entries, strict=True):
            value = fmean(entry["value"] for entry in several)
            result.refer(f"{stem}_mean", value, several[0]["kind"], "the mean over the classes")


def _draw_digits(result: Evaluation, digits: list[int]) -> None:
    """AUPRC by class, beside its chance values and floors."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for test in ("released", "strict"):
        for score, end in SUFFIXES.items():
            names = [f"auprc_{test}_{digit}{end}" for digit in digits]
            if names[0] in result.metrics:
                spreads = [result.metrics.get(f"{name}_std", 0.0) for name in names]
                series = [result.metrics[name] for name in names], spreads
                panels.setdefault(TITLES[score], {})[test] = series
    lines = {
        kind: {
            test: [_referred(result, f"auprc_{test}_{digit}", kind) for digit in digits]
            for test in ("released", "strict")
        }
        for kind in ("chance", "floor")
    }
    caption = (
        "Each class as the anomaly, by members that never saw it: mean and standard deviation of "
        "the trainings. Short lines: chance and floor of the same test."
    )
    picture = figures.by_class(panels, lines, [str(digit) for digit in digits], "AUPRC")
    result.draw("classes", "AUPRC by class", caption, picture)


def _referred(result: Evaluation, name: str, kind: str) -> float:
    """The value of a `kind` that a metric is held against."""
    return next(e["value"] for e in result.references[name] if e["kind"] == kind)
