"""A trained model and its samples in; numbers, what to hold them against, and pictures out.

A reference is of one of five kinds: `exact` (the truth, known in closed form), `ceiling` and
`floor` (what draws of the true distribution itself score: no model can honestly do better),
`baseline` (a simple model fitted here) and `published`.

Names of metrics, the same in every experiment:

    modes, modes_total          modes with at least one sample within 4 sigma; how many there are
    mode_kl                     KL(histogram over the modes || uniform), nats
    high_quality_share          share of samples within 4 sigma of a mode (of the curve, if it is
    one) grid_kl                     KL(true density || learned density) on the cells of a square,
    nats log_likelihood              mean log p of the test split, nats; `_lower`, `_upper`
    bracket it
                                where Z is estimated, `_train` is the same of the training split
    frechet_distance            between samples and test split, on the raw coordinates
    acceptance                  mean acceptance probability of the chains that drew the samples

The suffix `_generator` marks a number of the generator's samples before any MCMC.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ebm import figures, metrics
from ebm.data import Prepared
from ebm.densities import EXTENT, GaussianMixture
from ebm.variants.base import EBM

RADIUS = 4.0
"""A sample within this many standard deviations of a mode counts as of high quality."""


@dataclass
class Evaluation:
    """Numbers by name, references by the number's name, and titled pictures in display order."""

    metrics: dict[str, float] = field(default_factory=dict)
    references: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: list[tuple[str, str, str, Figure]] = field(default_factory=list)

    def refer(self, metric: str, value: float, kind: str, source: str) -> None:
        """Hold `metric` against `value`."""
        entry = {"value": value, "kind": kind, "source": source}
        self.references.setdefault(metric, []).append(entry)

    def draw(self, name: str, title: str, caption: str, figure: Figure) -> None:
        """Add a picture."""
        self.figures.append((name, title, caption, figure))


def evaluate(
    model: EBM, samples: dict[str, Tensor], prepared: Prepared, settings: dict[str, Any]
) -> Evaluation:
    """All that can be said of `model` and its `samples`, on the device where they lie."""
    density = prepared.density
    if density is None:
        return _evaluate_images(model, samples, prepared, settings)
    return _evaluate_density(model, samples, prepared, density.to(_device(model)), settings)


def _device(model: EBM) -> torch.device:
    return next(model.parameters()).device


def _evaluate_density(
    model: EBM,
    samples: dict[str, Tensor],
    prepared: Prepared,
    density: GaussianMixture,
    settings: dict[str, Any],
) -> Evaluation:
    result = Evaluation()
    test = prepared.tensors["test"].to(_device(model))
    drawn = samples["samples"]
    result.metrics |= sample_scores(drawn, test, density)
    if "generator" in samples:
        before = sample_scores(samples["generator"], test, density)
        before.pop("modes_total", None)
        result.metrics |= {f"{name}_generator": value for name, value in before.items()}
    if len(samples.get("acceptance", ())):
        result.metrics["acceptance"] = samples["acceptance"].mean().item()
    _refer_to_true_draws(result, prepared, density, len(drawn))
    _grid_scores(result, model, samples, test, density, settings["grid"])
    return result


def sample_scores(x: Tensor, test: Tensor, density: GaussianMixture) -> dict[str, float]:
    """What can be said of draws [N, 2] by looking at them: coverage, quality, distance."""
    near = metrics.in_batches(
        lambda part: metrics.nearest_mode(part, density.means, RADIUS * density.sigma), x, 4096
    )
    scores = {
        "high_quality_share": (near >= 0).double().mean().item(),
        "frechet_distance": metrics.frechet_distance(x, test),
    }
    if density.modes is not None:
        counts = metrics.mode_counts(near, len(density.modes))
        scores["modes"] = int((counts > 0).sum())
        scores["modes_total"] = len(counts)
        scores["mode_kl"] = metrics.kl_to_uniform(counts)
    return scores


def _refer_to_true_draws(
    result: Evaluation, prepared: Prepared, density: GaussianMixture, n: int
) -> None:
    """The same scores of as many points of the training split: what exact sampling gets."""
    exact = prepared.tensors["train"][:n].to(density.means.device)
    scores = sample_scores(exact, prepared.tensors["test"].to(density.means.device), density)
    source = f"{len(exact)} exact draws of the density, scored alike"
    for name in scores.keys() - {"modes_total"}:
        kind = "floor" if name in ("mode_kl", "frechet_distance") else "ceiling"
        result.refer(name, scores[name], kind, source)


def _grid_scores(
    result: Evaluation,
    model: EBM,
    samples: dict[str, Tensor],
    test: Tensor,
    density: GaussianMixture,
    cells: int,
) -> None:
    """Integrate exp(-E) over the square: the learned density as a density, beside the true one."""
    grid = metrics.cell_centres(*EXTENT, cells).to(test.device)
    energy = metrics.in_batches(model.energy, grid.to(test.dtype))
    log_z = metrics.grid_log_partition(energy, *EXTENT)
    learned = -energy.double() - log_z
    true = metrics.in_batches(density.log_prob, grid, 4096)
    result.metrics["grid_kl"] = metrics.grid_kl(true, learned)
    result.refer("grid_kl", 0.0, "exact", "the learned density equals the true one")
    test_energy = metrics.in_batches(model.energy, test).double()
    result.metrics["log_likelihood"] = (-test_energy - log_z).mean().item()
    exact = metrics.in_batches(density.log_prob, test.double(), 4096).mean().item()
    result.refer("log_likelihood", exact, "ceiling", "the true density on the same test split")
    picture = figures.density_panels(
        true_log_density=_square(true),
        learned_log_density=_square(learned),
        samples=samples["samples"].cpu().numpy(),
        generator_samples=samples["generator"].cpu().numpy() if "generator" in samples else None,
        extent=(*EXTENT, *EXTENT),
    )
    caption = "True density, learned density exp(-E)/Z, and samples without and with MCMC."
    result.draw("density", "Density and samples", caption, picture)


def _square(values: Tensor) -> Any:
    side = round(len(values) ** 0.5)
    return values.view(side, side).cpu().numpy()


def _evaluate_images(
    model: EBM, samples: dict[str, Tensor], prepared: Prepared, settings: dict[str, Any]
) -> Evaluation:
    result = Evaluation()
    splits = {s: prepared.tensors[s].to(_device(model)) for s in ("train", "test")}
    drawn = samples["samples"]
    result.metrics["frechet_distance"] = metrics.frechet_distance(drawn, splits["test"])
    floor = metrics.frechet_distance(splits["train"], splits["test"])
    result.refer("frechet_distance", floor, "floor", "training split against test split")
    energies = {name: metrics.in_batches(model.energy, x) for name, x in splits.items()}
    _likelihood(result, model, energies, splits, settings)
    noise = torch.bernoulli(torch.full_like(splits["test"], 0.5))
    energies |= {
        "samples": metrics.in_batches(model.energy, drawn),
        "uniform noise": metrics.in_batches(model.energy, noise),
    }
    _picture_images(result, model, samples, splits["test"], energies)
    return result


def _likelihood(
    result: Evaluation,
    model: EBM,
    energies: dict[str, Tensor],
    splits: dict[str, Tensor],
    settings: dict[str, Any],
) -> None:
    """log p = -E - log Z with log Z bracketed by the model's own estimators, if it has any."""
    bracket = model.log_partition(**settings)
    if bracket is None:
        return
    low, high = (bound.item() for bound in bracket)
    mean = {name: -energy.double().mean().item() for name, energy in energies.items()}
    result.metrics |= {
        "log_likelihood": mean["test"] - (low + high) / 2,
        "log_likelihood_lower": mean["test"] - high,
        "log_likelihood_upper": mean["test"] - low,
        "log_likelihood_train": mean["train"] - (low + high) / 2,
        "log_partition": (low + high) / 2,
    }
    rate = (splits["train"].sum(0) + 0.5) / (len(splits["train"]) + 1)
    independent = torch.distributions.Bernoulli(rate).log_prob(splits["test"]).flatten(1).sum(1)
    source = "independent pixels, each with its rate in the training split"
    result.refer("log_likelihood", independent.mean().item(), "baseline", source)


def _picture_images(
    result: Evaluation,
    model: EBM,
    samples: dict[str, Tensor],
    test: Tensor,
    energies: dict[str, Tensor],
) -> None:
    shown = samples.get("probability", samples["samples"])[:64]

    def grid(images: Tensor) -> Figure:
        return figures.image_grid(images.cpu().numpy(), columns=16)

    caption = "Probability of each pixel at the end of its chain."
    result.draw("samples", "Samples", caption, grid(shown))
    result.draw("data", "Test images", "What the samples should look like.", grid(test[:64]))
    if "chain" in samples:
        chain, steps = samples["chain"].cpu().numpy(), samples["chain_steps"].tolist()
        caption = "One chain a row, from the base rate; columns are Gibbs steps."
        picture = figures.chain_strip(chain.swapaxes(0, 1), steps)
        result.draw("chain", "Chains over time", caption, picture)
    for name, images in model.portraits().items():
        picture = figures.filters(images[:64].cpu().numpy(), columns=8)
        result.draw(name, name.capitalize(), "The first 64 rows of the weights.", picture)
    picture = figures.energy_histogram({k: e.cpu().numpy() for k, e in energies.items()})
    caption = "Free energy of data, samples and noise: lower = more likely."
    result.draw("energies", "Energies", caption, picture)
