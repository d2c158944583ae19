"""What an energy can do besides drawing samples (Du & Mordatch 2019, sections 4 and 5).

Each task is a chain of the model's own kernel on another energy, or from another start. Points go
in as [n, *] within the model's bounds; out comes what they were on the way, [n, T, *], first at
the start and last at the end, after `milestones(steps)` steps.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ebm.samplers import Energy, Kernel, at_milestones


@runtime_checkable
class Chained(Protocol):
    """An energy with chains of its own, such as IGEBM: what the tasks ask of a model."""

    classes: int
    bounds: tuple[float, float]

    def energy(self, x: Tensor) -> Tensor:
        """E(x) [n] of points [n, *]."""

    def conditional_energy(self, x: Tensor, y: Tensor | None) -> Tensor:
        """E(x, y) [n] of classes y [n]."""

    def kernel(self, energy: Energy) -> Kernel[Any]:
        """A step of the chains on any energy."""

    def noise_like(self, x: Tensor) -> Tensor:
        """Where chains start, of the shape of points [n, *]."""

    def starts(self, n: int) -> Tensor:
        """Where n chains start: [n, *]."""


def denoise(model: Chained, x: Tensor, y: Tensor | None, steps: int) -> Tensor:
    """Corrupted points on their way to lower energy; of classes y [n], or None: of any."""
    return _chain(model, _energy(model, y), x, steps)


def complete(model: Chained, x: Tensor, known: Tensor, y: Tensor | None, steps: int) -> Tensor:
    """Points of which only the coordinates `known` (boolean, broadcast to x) are to be believed:
    the rest starts as noise, and its chains follow the energy of the whole, of classes y [n] if
    they are given."""
    energy = _energy(model, y)
    start = torch.where(known, x, model.noise_like(x))
    frames = _chain(model, lambda z: energy(torch.where(known, x, z)), start, steps)
    held = known.expand_as(x).unsqueeze(1)
    return torch.where(held, x.unsqueeze(1), frames)


def transfer(model: Chained, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Points of one class on their way to the class y [n]: implicit sampling across classes."""
    return denoise(model, x, y, steps)


def compose(model: Chained, classes: Sequence[Tensor], steps: int) -> Tensor:
    """From noise to points of several classes at once: the product of the densities p(x | y) for
    the y [n] in `classes`, whose energies add up."""
    start = model.starts(len(classes[0]))
    energies = [_energy(model, y) for y in classes]
    return _chain(model, lambda x: torch.stack([e(x) for e in energies]).sum(0), start, steps)


def _energy(model: Chained, y: Tensor | None) -> Energy:
    return model.energy if y is None else lambda x: model.conditional_energy(x, y)


def _chain(model: Chained, energy: Energy, start: Tensor, steps: int) -> Tensor:
    return at_milestones(model.kernel(energy), start, steps, len(start))[1].clamp(*model.bounds)
