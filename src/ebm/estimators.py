"""Estimates of an expectation from independent draws, each with its standard error and the number
of exact draws that it is worth; and of log Z from draws of both densities (`ebm.contrastive`).

    paper | here
    ------|----------------------------------------------------------------------------------
    f(x)  | values [N]
    p, q  | the density asked about, the density drawn from
    w     | exp(log_weight), p(x) / q(x)
    M     | exp(log_bound), at least the largest p(x) / q(x)
    nu    | ratio, draws of q for each of p
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ebm import EBMError


class Estimate(NamedTuple):
    """`value` of an expectation, its standard `error` and the effective sample size `ess`."""

    value: Tensor
    error: Tensor
    ess: Tensor


def monte_carlo(values: Tensor) -> Estimate:
    """Mean of f over draws of p. Error: that of a mean; every draw counts."""
    count = torch.tensor(len(values), dtype=torch.float64, device=values.device)
    return Estimate(values.mean(), values.std() / math.sqrt(len(values)), count)


def importance(values: Tensor, log_weight: Tensor) -> Estimate:
    """Mean of w f over draws of q, where both densities are normalised: without bias."""
    mean, error, _ = monte_carlo(log_weight.exp() * values)
    return Estimate(mean, error, kish(log_weight))


def self_normalised(values: Tensor, log_weight: Tensor) -> Estimate:
    """sum w f / sum w over draws of q: log w may lack a constant; the bias falls with 1 / N.

    Error by the delta method, sqrt(sum of (w (f - value))^2) / sum w (Owen 2013, eq. 9.9).
    """
    weight = log_weight.softmax(0)
    mean = (weight * values).sum()
    return Estimate(mean, (weight * (values - mean)).norm(), kish(log_weight))


def accept_reject(values: Tensor, log_weight: Tensor, log_bound: float) -> Estimate:
    """Mean of f over those draws of q that pass for draws of p (von Neumann 1951)."""
    return monte_carlo(values[accepted(log_weight, log_bound)])


def accepted(log_weight: Tensor, log_bound: float) -> Tensor:
    """Which draws of q to keep [N]: each with probability w / M, and what is kept is exact.

    Raises EBMError if a weight exceeds the bound, or is NaN: the kept draws would follow another
    density.
    """
    if not (log_weight <= log_bound).all():
        largest = f"log weight {log_weight.max().item():.6g}"
        raise EBMError(f"accept-reject: {largest} exceeds log bound {log_bound:.6g}")
    return torch.rand_like(log_weight) < (log_weight - log_bound).exp()


def kish(log_weight: Tensor) -> Tensor:
    """Effective sample size of weighted draws, (sum w)^2 / sum w^2 (Kish 1965): N for equal
    weights, 1 where one draw has all."""
    return 1 / log_weight.softmax(0).square().sum()


def log_partition(data: Tensor, noise: Tensor, ratio: float) -> float:
    """log Z of an unnormalised density p, of which only that is unknown, from the log ratios
    log p - log q at its own draws [N] and at those of the noise [ratio N], both float64: the
    log Z that maximises V(log p - log Z). There the derivative of V is 0; `excess` is -N times it
    and rises.

    Raises EBMError where the noise does not meet the data: V has no maximum, or at it not a
    millionth of a draw is expected to be taken for the other kind, and log Z may be anything.
    """
    from scipy.optimize import brentq  # slow to import, and seldom asked for

    shift = math.log(ratio)

    def missed(log_z: float) -> float:
        return torch.sigmoid(shift + log_z - data).sum().item()

    def excess(log_z: float) -> float:
        return missed(log_z) - torch.sigmoid(noise - shift - log_z).sum().item()

    ratios = torch.cat([data, noise])
    finite = ratios[ratios.isfinite()]
    low, high = (finite.min().item() - 50, finite.max().item() + 50) if len(finite) else (0.0, 0.0)
    if excess(low) < 0 < excess(high):
        log_z = brentq(excess, low, high)
        if missed(log_z) >= 1e-6:
            return log_z
    raise EBMError("contrastive estimation: the noise does not meet the data")


def log_partition_variance(log_p: Tensor, log_q: Tensor, ratio: float, cell: float) -> float:
    """N times the asymptotic variance of `log_partition` from N points of data (Gutmann &
    Hyvarinen 2012, theorem 3, for the one parameter c):

        1 / I - (1 + 1 / nu),   I = integral of p(u) P(u) du,   P = nu q / (p + nu q)

    by the midpoint rule, from log p and log q [cells], both normalised, and the size of a `cell`;
    where that makes it negative, 0.
    """
    share = torch.sigmoid(math.log(ratio) + log_q - log_p)
    information = (log_p.exp() * share).sum() * cell
    return (1 / information - (1 + 1 / ratio)).clamp(min=0.0).item()
