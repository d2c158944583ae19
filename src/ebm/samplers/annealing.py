"""Annealed importance sampling, in both directions."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ebm.samplers.kernel import Kernel, State


def ais(
    energy_at: Callable[[float, Tensor], Tensor],
    kernel_at: Callable[[float], Kernel[State]],
    x: Tensor,
    betas: Sequence[float],
) -> Tensor:
    """Annealed importance sampling (Neal 2001) along `betas`: log-weights [B] in float64.

    `energy_at(beta, x)` is the path, `kernel_at(beta)` leaves exp(-energy_at(beta, .)) invariant
    and `x` [B, *] are draws from the path's start. The mean of exp(log-weight) is Z_end /
    Z_start, so the log of the mean errs on the low side. Walking the ladder backwards from draws
    of the target gives an estimate of Z_start / Z_end, hence one of Z_end that errs on the high
    side: the gap between the two bounds the error of both (Grosse, Ghahramani & Adams 2015).
    """
    log_weight = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for last, beta in pairwise(betas):
        with torch.no_grad():
            log_weight += (energy_at(last, x) - energy_at(beta, x)).double()
        kernel = kernel_at(beta)
        x = kernel.step(kernel.init(x)).x
    return log_weight


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """log of the mean of exp(log_weight) over the last axis, without overflow."""
    return torch.logsumexp(log_weight, -1) - math.log(log_weight.shape[-1])
