"""A model as a score of anomaly: its energy, and the norm of its gradient; the members of an
ensemble, one by one."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from torch import Tensor

from ebm import metrics
from ebm.data import unit
from ebm.ensemble import Ensemble, histories
from ebm.variants.base import EBM

SUFFIXES = {"energy": "", "gradient": "_gradient"}
"""What the names of metrics end in, by score."""

TITLES = {"energy": "Energy", "gradient": "Squared norm of the gradient"}
"""What to call a score, for a reader."""

AT_ONCE = 2**20
"""Numbers that go through a network at once."""

Numbers = dict[str, float]


def energies(model: EBM, x: Tensor) -> Tensor:
    """E of points [N, *], or of bytes that `ebm.data.unit` makes points of: [N], float64."""
    return metrics.in_batches(lambda part: model.energy(unit(part)).double(), x, _rows(x))


def scores(model: EBM, x: Tensor) -> dict[str, Tensor]:
    """`energy` E and `gradient` |grad E|^2 over all axes of points [N, *], or of bytes: [N] each,
    float64. There is no `gradient` where E cannot be differentiated."""
    parts = [_scored(model, part) for part in x.split(_rows(x))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _scored(model: EBM, x: Tensor) -> dict[str, Tensor]:
    x = unit(x).detach().requires_grad_()
    with torch.enable_grad():
        energy = model.energy(x)
    found = {"energy": energy.detach().double()}
    if energy.requires_grad:
        (gradient,) = torch.autograd.grad(energy.sum(), x, allow_unused=True)
        if gradient is not None:
            found["gradient"] = gradient.double().flatten(1).square().sum(1)
    return found


def _rows(x: Tensor) -> int:
    return max(1, AT_ONCE // max(1, x[:1].numel()))


def variant(model: EBM) -> str:
    """The variant of `model`, or of its members, by the name of the file of its class."""
    return type(histories(model)[0][0]).__module__.rsplit(".", 1)[-1]


def left_out(model: EBM) -> list[int]:
    """The class that each member of `model` never saw, or an empty list: the members take turns
    in the classes of `without`."""
    if not isinstance(model, Ensemble) or not model.without:
        return []
    return [model.hidden(m) for m in range(len(model.members))]


def summarised(members: Sequence[Sequence[Numbers]]) -> Numbers:
    """The numbers of the snapshots of each member in one: the mean over a member's snapshots, then
    under `name` the mean over the members and, where there are several, under `name_std` their
    standard deviation (the square root of the unbiased variance)."""
    means = [_mean(snapshots) for snapshots in members]
    found = _mean(means)
    if len(means) > 1:
        found |= {f"{name}_std": _spread([one[name] for one in means]) for name in means[0]}
    return found


def _spread(values: Sequence[float]) -> float:
    """The standard deviation; NaN if a value is not finite, of which `stdev` fails."""
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def _mean(several: Sequence[Numbers]) -> Numbers:
    return {name: fmean(one[name] for one in several) for name in several[0]}
