"""The Gaussian kernel k(x, y) = exp(-gamma |x - y|^2), for models that compare a point with some
of the training rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from ebm import EBMError

SLICE = 4096
"""So many points are compared with the rows at once."""


def kernel(x: Tensor, rows: Tensor, gamma: Tensor) -> Tensor:
    """k of every point x [N, D] with every one of `rows` [M, D]: [N, M]. Differentiable in x also
    where the two coincide. Give it float64: a small distance is a difference of large squares."""
    squares = x.square().sum(1, keepdim=True) + rows.square().sum(1)
    return torch.exp(-gamma * (squares - 2 * x @ rows.T).clamp(min=0))


def width(gamma: float | str, rows: Tensor) -> float:
    """`gamma` itself, or for `scale` 1 / (D times the variance of all entries of `rows` [M, D]),
    and 1 where nothing varies: scikit-learn's way."""
    if not isinstance(gamma, str):
        return gamma
    total = rows.shape[1] * rows.var(correction=0).item()
    return 1 / total if total > 0 else 1.0


def some_rows(data: Tensor, points: int) -> Tensor:
    """So many different rows of `data` [N, D] at random, by torch's global generator."""
    if points > len(data):
        raise EBMError(f"model.points = {points} is more than the {len(data)} training rows")
    return data[torch.randperm(len(data))[:points].to(data.device)]


def in_slices(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) [N] for points x [N, D], slice by slice."""
    return torch.cat([function(part) for part in x.split(SLICE)])
