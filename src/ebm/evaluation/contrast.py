"""Energies that were trained against noise: the classes that they know, how far the constant that
they learned is right, the pieces of their density, and how much of log Z that noise can tell."""

import math
from typing import Any

import torch
from torch import Tensor

from ebm import figures, metrics
from ebm.contrastive import Contrasted, importance_log_partition
from ebm.densities import EXTENT, GaussianMixture
from ebm.estimators import kish, log_partition, log_partition_variance
from ebm.evaluation.result import Evaluation
from ebm.flows import Gaussian

RATIOS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Draws of the noise for each draw of the true density, nu, at which its log Z is estimated."""
POINTS = 10_000
"""Draws of the true density in one such estimate."""
TRIALS = 16
"""Estimates for each nu, whose spread is held against theory."""

SLICES = 16
"""Slices of draws of the noise that tell what is left of a learned log Z."""
SLICE = 512
"""Draws in a slice."""


@torch.no_grad()
def measure_constant(result: Evaluation, model: Contrasted) -> None:
    """What is left of log Z, the model's own constant in it, by importance sampling from the noise
    where no grid can tell: 0 where that constant is right. The estimate tends to err low where few
    draws have most of the weight."""
    energy = torch.cat([model.draw_with_energy(SLICE)[1].double() for _ in range(SLICES)])
    left = importance_log_partition(energy, torch.zeros_like(energy))  # log q relative to q is 0
    result.metrics["log_partition_left"] = left.item()
    result.metrics["log_partition_ess"] = kish(-energy).item()
    result.refer("log_partition_left", 0.0, "exact", "the model's own constant is right")
    result.refer("log_partition_ess", len(energy), "ceiling", "the noise is the model's density")


def measure_contrast(
    result: Evaluation, model: Contrasted, density: GaussianMixture, noise: Any, grid: Tensor
) -> None:
    """Pictures of the noise, of each class, and of what the noise can tell of log Z."""
    side = math.isqrt(len(grid))
    fields = {"Noise": noise}
    if model.outputs > 1:
        v = model.space.centre(grid.to(model.log_z.dtype))
        log_p = metrics.in_batches(model.log_densities, v) + model.space.log_det(v).unsqueeze(1)
        fields |= {
            f"Class {k}": log_p[:, k].view(side, side).cpu().numpy() for k in range(model.outputs)
        }
    picture = figures.log_density_fields(fields, (*EXTENT, *EXTENT))
    caption = "On a colour scale of its own: the density that the energy was trained against"
    if model.defence:
        caption += f" (and a broad Gaussian, {model.defence:.0%} of the draws)"
    caption += (
        ", and the densities of its classes, of which the learned density is the mixture."
        if model.outputs > 1
        else "."
    )
    result.draw("noise", "Noise and classes" if model.outputs > 1 else "Noise", caption, picture)
    if isinstance(model.flow, Gaussian) and density.modal:  # both cost next to nothing
        _theory(result, model, density, grid)


def _theory(result: Evaluation, model: Contrasted, density: GaussianMixture, grid: Tensor) -> None:
    """log Z of the true density by this noise, of which all is known: the error against nu."""
    cell = (EXTENT[1] - EXTENT[0]) ** 2 / len(grid)
    log_p = metrics.in_batches(density.log_prob, grid, 4096)
    log_q = metrics.in_batches(model.noise_log_prob, grid.to(model.log_z.dtype)).double()
    expected = [
        math.sqrt(log_partition_variance(log_p, log_q, nu, cell) / POINTS) for nu in RATIOS
    ]
    errors = [_errors(model, density, nu) for nu in RATIOS]
    measured = [error.square().mean().sqrt().item() for error in errors]
    result.metrics["log_partition_error"] = measured[-1]
    source = f"theory: the standard error at ν = {RATIOS[-1]:g} from {POINTS} points"
    result.refer("log_partition_error", expected[-1], "exact", source)
    picture = figures.log_lines(
        {"measured": (RATIOS, measured)},
        {"theory": (RATIOS, expected)},
        "ν, noise draws per data point",
        "RMS error of log Z",
    )
    caption = (
        f"log Z of the true density from {POINTS:,} of its draws and ν times as many of this "
        f"noise, root mean square (RMS) error of {TRIALS} trials: what noise can tell, and at "
        "what cost."
    )
    result.draw("theory", "Noise-contrastive log Z", caption, picture)


@torch.no_grad()
def _errors(model: Contrasted, density: GaussianMixture, nu: float) -> Tensor:
    """c - log Z of the true density, whose log Z is 0, in every trial."""
    like = model.log_z

    def log_ratio(x: Tensor) -> Tensor:
        log_p = metrics.in_batches(density.log_prob, x.double(), 4096)
        return log_p - metrics.in_batches(model.noise_log_prob, x.to(like)).double()

    def trial() -> float:
        data = density.sample(POINTS).to(like.device)
        v, _ = model.contrast.draw_with_log_prob(round(nu * POINTS))
        return log_partition(log_ratio(data), log_ratio(model.space.leave(v)), nu)

    return torch.tensor([trial() for _ in range(TRIALS)])
