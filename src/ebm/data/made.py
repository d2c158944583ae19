"""What all kinds of data are made into."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Made:
    """A data set, from its source.

    Attributes:
        source: what it is, for a reader.
        tensors: the splits, their labels and rows, by the names that `ebm.data` lists.
        outliers: other sets by name, in the type and shape of the splits.
        notes: more for the manifest.
        transform: what made points of the rows of a table, as JSON has it.
    """

    source: str
    tensors: dict[str, Tensor]
    outliers: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    transform: dict[str, Any] | None = None


def chosen(split: str, index: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The rows `index` of a collection as a split with its labels and rows."""
    return {split: images[index], f"{split}_labels": labels[index], f"{split}_index": index}


def binarised(grey: Tensor, how: str, generator: Generator) -> Tensor:
    """Greys of [0, 1] as 0 and 1 of the same shape and type, as `schema.Binarize` says; or as they
    are."""
    match how:
        case "sample" | "dynamic":
            return torch.bernoulli(grey, generator=generator)
        case "threshold":
            return (grey >= 0.5).to(grey.dtype)
        case _:
            return grey
