"""Can these chains be trusted? Traces [chains, draws] of a scalar in, numbers out.

ArviZ does the statistics (Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021); it is imported when
it is first asked. A trace that holds a value that is not finite, or but one value, has NaN for an
answer. Look at the energy
and a few expectations, and only at chains of the target itself: the hot rungs of a tempered ladder
are chains of something else. Chains too short to be stationary have no effective sample size.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

AXES = {"chain_axis": 0, "draw_axis": 1}


class Diagnosis(NamedTuple):
    """What is said of a trace, and what one hopes to hear.

    `ess_bulk`, `ess_tail`: effective sample size for the middle and for the 5 % and 95 %
    quantiles, at least 400 in all. `r_hat`: rank-normalised, split; below 1.01, and of at least 4
    chains (NaN for one). `mcse`: standard error of the mean. `autocorrelation_time`: how many
    draws are worth one.
    """

    ess_bulk: float
    ess_tail: float
    r_hat: float
    mcse: float
    autocorrelation_time: float


def diagnose(trace: Tensor) -> Diagnosis:
    """All of them for a trace [chains, draws]."""
    if _says_nothing(trace):
        return Diagnosis(*[torch.nan] * 5)
    (array, exponent), stats = _scaled(trace), _arviz()
    return Diagnosis(
        float(stats.ess(array, method="bulk", **AXES)),
        float(stats.ess(array, method="tail", prob=(0.05, 0.95), **AXES)),
        float(stats.rhat(array, method="rank", **AXES)),
        math.ldexp(float(stats.mcse(array, method="mean", **AXES)), exponent),
        autocorrelation_time(trace),
    )


def autocorrelation_time(trace: Tensor) -> float:
    """tau with ESS = n / tau for the mean: 1 for independent draws, (1 + rho) / (1 - rho) for a
    first-order autoregression. In draws; NaN for one value only; ask it of the energy."""
    if _says_nothing(trace):
        return torch.nan
    array, _ = _scaled(trace)
    return trace.numel() / float(_arviz().ess(array, method="mean", **AXES))


def _says_nothing(trace: Tensor) -> bool:
    return not trace.isfinite().all() or bool((trace == trace[0, 0]).all())


def _scaled(trace: Tensor) -> tuple[Any, int]:
    """The values over 2^e, the least power of two above their range, and e: ArviZ takes a trace
    that varies by less than 1e-15 for constant."""
    values = trace.double().cpu().numpy()
    exponent = math.frexp(np.ptp(values))[1]
    return np.ldexp(values, -exponent), exponent


def _arviz() -> Any:
    from arviz_stats.base import array_stats  # two seconds, most of them SciPy's

    return array_stats


def swap_rates(swaps: Tensor) -> Tensor:
    """Mean swap acceptance of each pair of rungs [K - 1] from `Tempered.swap_acceptance` over time
    [T, K - 1, B]; what is NaN was not tried yet."""
    return swaps.nanmean((0, 2))
