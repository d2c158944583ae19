"""Images: how near the samples come to the test split, what the energy tells apart, pictures."""

import math
from statistics import fmean
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ebm import EBMError, figures, metrics
from ebm.contrastive import Contrasted
from ebm.demonstrations import animate, demonstrate
from ebm.evaluation.classes import agreement, measure_classes
from ebm.evaluation.contrast import measure_constant
from ebm.evaluation.published import MNIST_BINARY, refer_to_published
from ebm.evaluation.result import Case, Evaluation, bound, measure_acceptance
from ebm.outliers import outlier_sets
from ebm.reference import KEPT, Reference, Seen
from ebm.schema import OfImages
from ebm.tasks import Chained
from ebm.variants.base import EBM

ENERGIES = 2000
"""Images of each set whose energies are compared with those of the test split. That counts whole:
the published test images are not in random order."""

FEWEST_EFFECTIVE = 100
"""Draws of the noise that have to count, of those by which log Z is estimated: with fewer its
standard error is beyond a tenth of a nat, and the estimate may miss most of Z."""

SHOWN = 8
"""Chains whose way is shown as a strip."""


def evaluate_images(case: Case) -> Evaluation:
    """Likelihood where log Z can be estimated, distances of the samples where the model draws any,
    anomalies and pictures."""
    result = Evaluation()
    train, test = case.points("train"), case.points("test")
    energies = _measure(result, case, train, test)
    _draw(result, case, test)
    draw_energies(result, energies)
    return result


def _measure(result: Evaluation, case: Case, train: Tensor, test: Tensor) -> dict[str, Tensor]:
    """All numbers; by name the energies [N] of the sets of images that they tell of."""
    model, samples = case.model, _in_shares_of_test(case)
    drawn = samples["samples"]
    if draws := len(case.drawn) > 0:
        enough(drawn, len(case.drawn))
    _likelihood(result, case, train, test)
    _bits(result, model, train, test)
    if isinstance(model, Contrasted):
        _bits(result, model.noise, train, test, "_generator")
        measure_constant(result, model)
        _correct_bits(result, test[0].numel())
    sets = {"train": train[:ENERGIES], "test": test}
    if draws:
        measure_samples(result, case, looked_at(case.reference, samples, train))
        sets["samples"] = drawn[:ENERGIES]
        _conditional_accuracy(result, case)
    measure_acceptance(result, samples)
    measure_classes(result, case)
    outliers = outlier_sets(case.prepared, ENERGIES, case.about["seed"])
    sets |= {name: images.to(case.device) for name, images in outliers.items()}
    energies = {k: metrics.in_batches(model.energy, x, 256) for k, x in sets.items()}
    _anomalies(result, energies["test"], {name: energies[name] for name in outliers})
    return energies


def _in_shares_of_test(case: Case) -> dict[str, Tensor]:
    """The samples; where classes were asked for, each is as frequent as in the test split."""
    asked, known = case.samples.get("labels"), case.labels("test")
    if asked is None or known is None:
        return case.samples
    return case.samples | {"samples": case.drawn[in_shares(asked, known)]}


def _draw(result: Evaluation, case: Case, test: Tensor) -> None:
    """Pictures of samples, data and chains, and of what else the model can do."""
    model, draws = case.model, len(case.drawn) > 0
    columns = 16 if max(test.shape[-2:]) <= 16 else 10
    caption = "What is held for usual."
    if draws:
        _draw_samples(result, case.samples, columns)
        caption = "What the samples should look like."
        if "probability" in case.samples:
            caption = "What is to be drawn by the probabilities above: pixels that are on or off."
    result.draw("data", "Test images", caption, _grid(test[: 6 * columns], columns))
    _draw_chains(result, model, case.samples)
    steps = case.settings.get("steps")
    if steps and isinstance(model, Chained):
        classes = case.labels("test") if model.classes else None
        demonstrate(model, test, classes, steps, result.draw)


def draw_energies(result: Evaluation, energies: dict[str, Tensor]) -> None:
    """Histograms of the energies [N] of several sets, by name."""
    caption = (
        "The lower, the more usual to the model. Line: the median, where it lies within the "
        "frame; what lies beyond counts in the outermost bins. Each row has a height of its own."
    )
    picture = figures.energy_histogram({k: e.cpu().numpy() for k, e in energies.items()})
    result.draw("energies", "Energies", caption, picture)


def _likelihood(result: Evaluation, case: Case, train: Tensor, test: Tensor) -> None:
    """log p = -E - log Z, log Z in the middle of the model's own two estimates, if it has any: one
    that tends to err low, one that tends to err high."""
    model, about = case.model, case.about
    annealing = {name: n for name, n in case.settings.items() if name != "flagged"}
    estimates = model.log_partition(train, **annealing)
    if estimates is None:
        return
    low, high = (estimate.item() for estimate in estimates)
    log_p, log_p_train = (
        -metrics.in_batches(model.energy, x).double().mean().item() for x in (test, train)
    )
    result.metrics |= {
        "log_likelihood": log_p - (low + high) / 2,
        "log_likelihood_lower": log_p - high,
        "log_likelihood_upper": log_p - low,
        "log_likelihood_train": log_p_train - (low + high) / 2,
        "log_partition": (low + high) / 2,
    }
    rate = (train.sum(0) + 0.5) / (len(train) + 1)
    independent = torch.distributions.Bernoulli(rate).log_prob(test).flatten(1).sum(1)
    source = "independent pixels, each with its rate in the training split"
    result.refer("log_likelihood", independent.mean().item(), "baseline", source)
    if about.get("name") == "mnist" and about.get("binarize") in ("sample", "dynamic"):
        refer_to_published(result, model, MNIST_BINARY)


def _bits(result: Evaluation, model: EBM, train: Tensor, test: Tensor, suffix: str = "") -> None:
    """-log2 p per pixel and channel of images by a model that knows its density, uniform noise
    within the grey levels; as many training images as test images."""
    if not model.normalised:
        return
    for name, x in {"bits_per_dim": test, "bits_per_dim_train": train[: len(test)]}.items():
        log_p = metrics.in_batches(cast(Any, model.log_likelihood), x, 256)
        bits = -log_p.double().mean().item() / (x[0].numel() * math.log(2))
        result.metrics[name + suffix] = bits


def _correct_bits(result: Evaluation, dimensions: int) -> None:
    """Put what is left of log Z into the bits of an energy whose constant was learned; where it is
    not known, neither are they."""
    left, ess = (result.metrics[f"log_partition_{name}"] for name in ("left", "ess"))
    known = left if ess >= FEWEST_EFFECTIVE else math.nan
    for name in ("bits_per_dim", "bits_per_dim_train"):
        result.metrics[name] += known / (dimensions * math.log(2))


def enough(kept: Tensor, count: int) -> None:
    """EBMError if too few samples are `kept` of so many."""
    if len(kept) >= OfImages.fewest:
        return
    problem = OfImages.too_few
    if 0 < len(kept) < count:
        needed = math.ceil(OfImages.fewest * count / len(kept))
        problem = f"{len(kept)} are left in the shares of the classes; {problem}: try {needed}"
    raise EBMError(f"sample.count = {count}: {problem}")


def looked_at(reference: Reference, samples: dict[str, Tensor], train: Tensor) -> dict[str, Seen]:
    """What `reference` sees in the samples, in a generator's, and in as many images of `train` (or
    all) as there are samples."""
    sets = {"samples": samples["samples"], "train": train[: len(samples["samples"])]}
    if "generator" in samples:
        sets["generator"] = samples["generator"]
    return {name: reference.see(x) for name, x in sets.items()}


def measure_samples(result: Evaluation, case: Case, seen: dict[str, Seen]) -> None:
    """How near samples come to the test split, beside training images, and how clearly each shows
    one class of many; the same of a generator's, before MCMC. All as `looked_at` has `seen`
    them."""
    by, of = described(case.reference), case.reference.statistics
    result.metrics |= image_scores(seen["samples"], of) | class_scores(seen["samples"])
    drawn, real = (len(seen[name].features) for name in ("samples", "train"))
    source = f"{real} training images, scored alike by {by}"
    if real < drawn:
        source += f"; fewer than the {drawn} samples, so distances are a little too large"
    for name, value in image_scores(seen["train"], of).items():
        result.refer(name, value, bound(name), source)
    if case.seen:
        for name, value in class_scores(case.seen).items():
            result.refer(name, value, "ceiling", f"the test split, scored alike by {by}")
    if "generator" in seen:
        before = seen["generator"]
        result.add(image_scores(before, of) | class_scores(before), "_generator")


def class_scores(seen: Seen) -> dict[str, float]:
    """The inception score of images that a classifier has `seen`, of stacks the mean over the
    scores of their parts; nothing by what is no classifier."""
    if (logits := seen.logits) is None:
        return {}
    parts = logits.double().softmax(-1).view(len(logits), -1, logits.shape[-1]).unbind(1)
    return {"inception_score": fmean(metrics.inception_score(part) for part in parts)}


def image_scores(seen: Seen, of: dict[str, Tensor]) -> dict[str, float]:
    """Distances of images to the test split, by the features that were `seen` and the statistics
    `of` the reference."""
    features, gaussian = seen.features, (of["test_mean"], of["test_covariance"])
    order = torch.randperm(len(features))
    kept = features[order[:KEPT]]
    precision, recall = metrics.precision_recall(kept, of["test"])
    return {
        "frechet_distance": metrics.gaussian_frechet_distance(
            *metrics.moments(features), *gaussian
        ),
        "frechet_distance_extrapolated": metrics.extrapolated_frechet_distance(
            features, *gaussian, order
        ),
        "kernel_distance": metrics.kernel_distance(kept, of["test"]),
        "sample_precision": precision,
        "sample_recall": recall,
    }


def described(reference: Reference) -> str:
    """What measured, for a reader."""
    kind, numbers = reference.config["kind"], reference.metrics
    if "part_accuracy" in numbers:
        return f"a classifier of single parts, right on {numbers['part_accuracy']:.1%} of them"
    if "accuracy" in numbers:
        return f"a {kind}, right on {numbers['accuracy']:.1%} of the test split"
    return kind


def in_shares(labels: Tensor, wanted: Tensor) -> Tensor:
    """Rows of `labels` [N] among which each class is as frequent as in `wanted` [M], as many as
    there are for all of them: samples are asked for by class in turn, data are not balanced."""
    shares = wanted.bincount(minlength=int(labels.max()) + 1).double() / len(wanted)
    have = labels.bincount(minlength=len(shares))
    if (have[shares > 0] == 0).any():  # a class that nobody asked for
        return torch.arange(len(labels))
    enough_for = (have / shares).min()
    kept = [
        (labels == k).nonzero()[: round(float(s * enough_for)), 0] for k, s in enumerate(shares)
    ]
    return torch.cat(kept).sort().values


def _conditional_accuracy(result: Evaluation, case: Case) -> None:
    """Share of the samples in which the classifier sees the class that was asked for, beside that
    of test images of the same classes."""
    labels, classes = case.samples.get("labels"), case.labels("test")
    if labels is None or classes is None or case.seen is None:
        return
    found, real = case.reference.see(case.drawn).classes, case.seen.classes
    if found is None or real is None:
        return
    result.metrics["conditional_accuracy"] = agreement(found, labels)
    right = (real == classes).double()
    by_class = [right[classes == k].mean() for k in labels.unique() if (classes == k).any()]
    source = "the same classifier on test images, its mean over the classes"
    result.refer("conditional_accuracy", torch.stack(by_class).mean().item(), "ceiling", source)


def _anomalies(result: Evaluation, test: Tensor, outliers: dict[str, Tensor]) -> None:
    """How well energies tell the test split from each set of outliers, by energies [N]."""
    scores = {f"auroc_{name}": metrics.auroc(test, energy) for name, energy in outliers.items()}
    if scores:
        result.metrics |= {"auroc_mean": sum(scores.values()) / len(scores)} | scores
    for name in scores:
        result.refer(name, 0.5, "chance", "scores that know nothing")


def _draw_samples(result: Evaluation, samples: dict[str, Tensor], columns: int) -> None:
    labels, drawn = samples.get("labels"), samples.get("probability", samples["samples"])
    columns = columns if labels is None else int(labels.max()) + 1
    shown = "Probabilities of the pixels" if "probability" in samples else "Points"
    chained = "chain" in samples or samples.get("acceptance", torch.ones(0)).numel() > 1
    caption = f"{shown} {'at the end of the chains' if chained else 'that were drawn'}"
    caption += "." if labels is None else "; a column for each class that was asked for."
    result.draw("samples", "Samples", caption, _grid(drawn[: 6 * columns], columns))


def _draw_chains(result: Evaluation, model: EBM, samples: dict[str, Tensor]) -> None:
    """Chains, and parameters worth looking at."""
    if "chain" in samples:
        chain, steps = samples["chain"].cpu().numpy(), samples["chain_steps"].tolist()
        caption = "One chain a row, from its start; columns are steps of the sampler."
        picture = figures.chain_strip(chain[:SHOWN], steps)
        result.draw("chain", "Chains over time", caption, picture)
        caption = "The same chains, moving."
        if len(chain) > SHOWN:
            caption = "The same chains and more of them, moving."
        result.draw("animation", "Chains, animated", caption, animate(samples["chain"]))
    for name, images in model.portraits().items():
        picture = figures.filters(images[:64].cpu().numpy(), columns=8)
        result.draw(name, name.capitalize(), "Those of the first 64 hidden units.", picture)


def _grid(images: Tensor, columns: int) -> Figure:
    return figures.image_grid(images.cpu().numpy(), columns)
