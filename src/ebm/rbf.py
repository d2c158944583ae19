"""The Gaussian kernel k(x, y) = exp(-gamma |x - y|^2), and what models have in common that compare
a point with some of the training rows by it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ebm import EBMError
from ebm.scoring import Scorer

SLICE = 4096
"""Points that are compared with the rows at once."""


class KernelScorer(Scorer):
    """A detector over points of `shape` that is fitted to so many `points` of the training data
    at once. `rows` are those, as it sees them, in float64; `gamma` is the kernel's, a number or
    `scale`."""

    rows: Tensor
    gamma: Tensor

    def __init__(
        self, shape: tuple[int, ...], points: int, gamma: float | str, standardise: bool
    ) -> None:
        super().__init__(shape, standardise)
        self.points, self.asked_gamma = points, gamma
        dimensions = len(self.columns.mean)
        self.register_buffer("rows", torch.zeros(points, dimensions, dtype=torch.double))
        self.register_buffer("gamma", torch.ones((), dtype=torch.double))

    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        """Choose the rows among `data` [N, *], and gamma by them."""
        super().initialise(data)
        self.rows.copy_(self.columns(some_rows(data, self.points)))
        self.gamma.fill_(fitting_gamma(self.asked_gamma, self.rows))

    @torch.no_grad()
    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mean = self.energy(x).mean()
        return {"energy_gap": mean, "gradient_norm": torch.zeros_like(mean)}


def kernel(x: Tensor, rows: Tensor, gamma: Tensor) -> Tensor:
    """k of every point x [N, D] with every one of `rows` [M, D]: [N, M]. Differentiable in x also
    where the two coincide. Give it float64: a small distance is a difference of large squares."""
    squares = x.square().sum(1, keepdim=True) + rows.square().sum(1)
    return torch.exp(-gamma * (squares - 2 * x @ rows.T).clamp(min=0))


def fitting_gamma(gamma: float | str, rows: Tensor) -> float:
    """`gamma` itself, or for `scale` 1 / (D times the variance of all entries of `rows` [M, D]),
    and 1 where nothing varies: scikit-learn's way."""
    if not isinstance(gamma, str):
        return gamma
    total = rows.shape[1] * rows.var(correction=0).item()
    return 1 / total if total > 0 else 1.0


def some_rows(data: Tensor, points: int) -> Tensor:
    """`points` different rows of `data` [N, D] at random, by torch's global generator."""
    if points > len(data):
        raise EBMError(f"model.points = {points} is more than the {len(data)} training rows")
    return data[torch.randperm(len(data))[:points].to(data.device)]


def in_slices(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) [N] for points x [N, D], slice by slice; for its gradient in x each slice is
    computed again, and none is kept."""
    return torch.cat([_Slice.apply(part, function) for part in x.split(SLICE)])


class _Slice(Function):
    """PyTorch's own `checkpoint` would import its compiler, which takes seconds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            value = ctx.function(x)
        return torch.autograd.grad(value, x, weight)[0], None
