"""What an energy can do besides drawing samples (Du & Mordatch 2019, sections 4 and 5).

Each task is a chain of the model's own kernel on another energy, or from another start. Points go
in as [n, *] within the model's bounds; out comes what they were on the way, [n, T, *], first at
the start and last at the end, after `milestones(steps)` steps.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ebm.samplers import Energy, trace

if TYPE_CHECKING:
    from ebm.variants.igebm import IGEBM


def denoise(model: "IGEBM", x: Tensor, y: Tensor | None, steps: int) -> Tensor:
    """Corrupted points on their way to lower energy; of classes y [n], or None: of any."""
    return _chain(model, _energy(model, y), x, steps)


def complete(model: "IGEBM", x: Tensor, known: Tensor, y: Tensor | None, steps: int) -> Tensor:
    """Points of which only the coordinates `known` (boolean, broadcast to x) are to be believed:
    the rest starts as noise and follows p(rest | known, y)."""
    energy = _energy(model, y)
    start = torch.where(known, x, model.noise_like(x))
    frames = _chain(model, lambda z: energy(torch.where(known, x, z)), start, steps)
    held = known.expand_as(x).unsqueeze(1)
    return torch.where(held, x.unsqueeze(1), frames)


def transfer(model: "IGEBM", x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Points of one class on their way to the class y [n]: implicit sampling across classes."""
    return _chain(model, _energy(model, y), x, steps)


def compose(model: "IGEBM", classes: Sequence[Tensor], steps: int) -> Tensor:
    """From noise to points of several classes at once: the product of the densities p(x | y) for
    the y [n] in `classes`, whose energies add up."""
    start = model.starts(len(classes[0]))
    energies = [_energy(model, y) for y in classes]
    return _chain(model, lambda x: torch.stack([e(x) for e in energies]).sum(0), start, steps)


def _energy(model: "IGEBM", y: Tensor | None) -> Energy:
    return model.energy if y is None else lambda x: model.conditional_energy(x, y)


def _chain(model: "IGEBM", energy: Energy, start: Tensor, steps: int) -> Tensor:
    return trace(model.kernel(energy), start, steps, len(start))[1].clamp(*model.bounds)
