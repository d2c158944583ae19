"""Samples and scores in, numbers out. No model, no file, no randomness."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def nearest_mode(x: Tensor, modes: Tensor, radius: float) -> Tensor:
    """For x [N, D] the index of its nearest mode [N], or -1 where that is over `radius` away."""
    distance, index = torch.cdist(x.double(), modes.double()).min(1)
    return torch.where(distance <= radius, index, -1)


def mode_counts(assignment: Tensor, modes: int) -> Tensor:
    """How many samples each of the `modes` got [modes]; assignments of -1 count for none."""
    return torch.bincount(assignment[assignment >= 0], minlength=modes)


def kl_to_uniform(counts: Tensor) -> float:
    """KL(histogram || uniform) in nats; 0 log 0 = 0. NaN for an empty histogram.

    For n draws of the uniform itself the expectation is about (K - 1) / (2 n): its floor.
    """
    p = counts.double() / counts.sum()
    return (torch.xlogy(p, p).sum() + math.log(len(counts))).item()


def cell_centres(low: float, high: float, cells: int) -> Tensor:
    """Centres of the cells x cells grid over [low, high]^2, rows = y ascending: [cells^2, 2]."""
    axis = low + (high - low) * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def grid_log_partition(energy: Tensor, low: float, high: float) -> Tensor:
    """log of the integral of exp(-E) over a square, by the midpoint rule on its cell centres."""
    cells = math.isqrt(energy.numel())
    return torch.logsumexp(-energy.double(), 0) + 2 * math.log((high - low) / cells)


def grid_kl(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) in nats of two densities given at the cells of one grid, each normalised on
    it."""
    log_p, log_q = log_p.double().log_softmax(0), log_q.double().log_softmax(0)
    return (log_p.exp() * (log_p - log_q)).sum().item()


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features [N, D], [M, D].

    The squared 2-Wasserstein distance of the two fitted Gaussians (Dowson & Landau 1982). The
    trace of the root is the sum of the roots of the eigenvalues of C_x^(1/2) C_y C_x^(1/2), which
    is symmetric, so nothing complex or unstable is taken.
    """
    x, y = x.double().flatten(1), y.double().flatten(1)
    c_x, c_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(c_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_y @ root).clamp(min=0).sqrt().sum()
    mean = (x.mean(0) - y.mean(0)).square().sum()
    return (mean + c_x.trace() + c_y.trace() - 2 * cross).item()


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, size: int = 16384) -> Tensor:
    """function(x) computed in slices along the first axis, without gradients."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(size)])
