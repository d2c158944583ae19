"""Points in the plane whose density is known: the learned one as a density, its samples as
draws."""

import math
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ebm import EBMError, figures, metrics
from ebm.contrastive import Contrasted
from ebm.densities import EXTENT, GaussianMixture
from ebm.evaluation.classes import measure_classes
from ebm.evaluation.contrast import measure_contrast
from ebm.evaluation.result import Case, Evaluation, bound, measure_acceptance
from ebm.evaluation.scores import variant
from ebm.flows import Density
from ebm.schema import AGAINST
from ebm.variants.base import EBM

RADIUS = 4.0
"""A sample within this many standard deviations of a mode counts as of high quality."""


def evaluate_density(case: Case) -> Evaluation:
    """Coverage, quality and distance of the samples; the learned density on a grid."""
    result = Evaluation()
    test = case.points("test")
    if case.prepared.density is None:
        raise EBMError("datasets.density: missing; expected the name of a density")
    density = case.prepared.density.to(case.device)
    result.metrics |= sample_scores(case.drawn, test, density)
    if "generator" in case.samples:
        before = sample_scores(case.samples["generator"], test, density)
        before.pop("modes_total", None)
        result.add(before, "_generator")
    measure_classes(result, case)
    measure_acceptance(result, case.samples)
    _refer_to_true_draws(result, case, test, density)
    _grid_scores(result, case, test, density)
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
    result: Evaluation, case: Case, test: Tensor, density: GaussianMixture
) -> None:
    """The same scores of as many points of the training split, their mean over the parts of that
    split: what exact sampling gets."""
    train = case.points("train")
    n = min(len(case.drawn), len(train))
    parts = [part for part in train.split(n) if len(part) == n]
    scores = [sample_scores(part, test, density) for part in parts]
    source = f"{n} exact draws of the density, scored alike"
    if len(parts) > 1:
        source = f"mean of {len(parts)} times {source}"
    for name in sorted(scores[0].keys() - {"modes_total"}):
        result.refer(name, mean(score[name] for score in scores), bound(name), source)


def _grid_scores(result: Evaluation, case: Case, test: Tensor, density: GaussianMixture) -> None:
    """Integrate exp(-E) over the square: the learned density as a density, beside the true one."""
    model = case.model
    grid = metrics.cell_centres(*EXTENT, case.settings["grid"]).to(case.device)
    true = metrics.in_batches(density.log_prob, grid, 4096)
    true_test = metrics.in_batches(density.log_prob, test.double(), 4096)
    scores, learned = density_scores(model, grid, test, true, true_test)
    result.metrics |= scores
    result.refer("grid_kl", 0.0, "exact", "the learned density equals the true one")
    result.refer("log_density_mse", 0.0, "exact", "the learned density equals the true one")
    result.refer("outside", 0.0, "exact", "the square holds the true density")
    exact = true_test.mean().item()
    result.refer("log_likelihood", exact, "ceiling", "the true density on the same test split")
    if isinstance(model, Contrasted):
        result.refer("log_partition_left", 0.0, "exact", "the model's own constant is right")
        scores, of_noise = density_scores(model.noise, grid, test, true, true_test)
        result.add(scores, "_generator")
        measure_contrast(result, model, density, _square(of_noise), grid)
    _draw_panels(result, case, _square(true), _square(learned))


def _draw_panels(result: Evaluation, case: Case, true: Any, learned: Any) -> None:
    """Both densities beside the samples, and beside what their chains began with."""
    model, points = case.model, {"Samples": case.drawn}
    shown = "and samples."
    if "generator" in case.samples:
        title, draws = "Generator, before MCMC", "the generator"
        if against := AGAINST.get(variant(model)):
            title = f"Draws of the {against}"
            draws = f"the {against} that the energy was trained against"
        points = {title: case.samples["generator"], "After MCMC": case.drawn}
        shown = f"draws of {draws}, and samples: Markov chains that began with such draws."
    if isinstance(model, Contrasted) and model.defence:
        shown += f" {model.defence:.0%} of what chains start at is of a broad Gaussian instead."
    picture = figures.density_panels(
        true, learned, {k: x.cpu().numpy() for k, x in points.items()}, (*EXTENT, *EXTENT)
    )
    caption = f"True density, learned density exp(-E)/Z, {shown}"
    caption += " Thin line: where the true density is 8 nats below its highest value."
    result.draw("density", "Density and samples", caption, picture)


def density_scores(
    model: EBM, grid: Tensor, test: Tensor, true: Tensor, true_test: Tensor
) -> tuple[dict[str, float], Tensor]:
    """How near exp(-E) / Z comes to the true density, whose log is `true` on the `grid` and
    `true_test` at the test points; and its log on the grid. Z is the integral over the plane, also
    of a model that has learned its constant, which may be off and would then be told of as
    likelihood; that of a flow is 1. (Of the plane nine times the square: `_log_partition`.)"""
    energy = _energies(model, grid, test.dtype)
    within = metrics.grid_log_partition(energy, *EXTENT)
    exact = isinstance(model, Density)
    log_z = torch.zeros_like(within) if exact else _log_partition(model, within, grid, test.dtype)
    learned = -energy.double() - log_z
    log_p = -_energies(model, test, test.dtype).double() - log_z
    scores = {
        "grid_kl": metrics.grid_kl(true, learned) - (within - log_z).item(),
        "log_likelihood": log_p.mean().item(),
        "log_density_mse": (log_p - true_test).square().mean().item(),
        "outside": (0.0 - (within - log_z).expm1()).clamp(min=0.0).item(),  # a grid may find more
    }
    own = isinstance(model, Contrasted)
    return scores | ({"log_partition_left": log_z.item()} if own else {}), learned


def _log_partition(model: EBM, within: Tensor, grid: Tensor, dtype: torch.dtype) -> Tensor:
    """log Z: what is `within` the square, whose cells are the `grid`, and on as many cells of the
    same size in each of the 8 squares around it."""
    low, high = EXTENT
    side = high - low
    cells = metrics.cell_centres(low - side, high + side, 3 * math.isqrt(len(grid))).to(grid)
    around = cells[((cells < low) | (cells > high)).any(1)]
    energy = _energies(model, around, dtype).double()
    area = math.log(side**2 / len(grid))
    return torch.logaddexp(within, torch.logsumexp(-energy, 0) + area)


def _energies(model: EBM, x: Tensor, dtype: torch.dtype) -> Tensor:
    """E at points x [N, 2], infinite beyond the model's support: [N]."""
    low, high = model.support or (-math.inf, math.inf)
    supported = ((x > low) & (x < high)).all(1)
    energy = torch.full((len(x),), math.inf, dtype=dtype, device=x.device)
    if supported.any():
        energy[supported] = metrics.in_batches(model.energy, x[supported].to(dtype))
    return energy


def _square(values: Tensor) -> Any:
    side = round(len(values) ** 0.5)
    return values.view(side, side).cpu().numpy()
