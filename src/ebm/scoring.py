"""What models that only score points have in common: columns of very different size are brought to
one by a layer that is fitted once, and no points are drawn."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ebm.variants.base import EBM


class Standardise(nn.Module):
    """(x - mean) / scale, column by column, of points [B, *]: [B, D], as float as `x`. Both are
    buffers; until `fit` they leave points as they are."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("scale", torch.ones(dimensions))

    def fit(self, data: Tensor) -> None:
        """Mean and standard deviation of the rows of `data` [N, *]; the scale of a column that
        never varies is 1."""
        rows = data.flatten(1).double()
        spread = rows.std(0, correction=0)
        constant = rows.amin(0) == rows.amax(0)  # where rounding alone can make a deviation
        self.mean.copy_(rows.mean(0))
        self.scale.copy_(spread.masked_fill(constant, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - self.mean) / self.scale


class Scorer(EBM):
    """A model of points of `shape` that can draw none. Its `columns` are what it sees of them:
    standardised by the training data if `standardise`, else as they are."""

    def __init__(self, shape: tuple[int, ...], standardise: bool) -> None:
        super().__init__()
        self.shape, self.standardise = shape, standardise
        self.columns = Standardise(math.prod(shape))

    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        if self.standardise:
            self.columns.fit(data)

    def sample(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """`samples` [0, *]: none, whatever `n` is."""
        return {"samples": self.columns.mean.new_empty(0, *self.shape)}
