"""A trained model as whoever asks for energies needs it: the network, and what its points are."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebm import metrics, variants
from ebm.data import first_grey
from ebm.data.transform import Transform
from ebm.variants.base import EBM

BATCH, AT_ONCE = 4096, 2**19
"""Points, and numbers, that go through the network at once at most."""


@dataclass(frozen=True)
class Trained:
    """A `network` on its `device`, the `shape` of its points, the `transform` that makes such of
    the rows of a table, if it is of one, and how images were made bits (`binarize`), if they
    were."""

    network: EBM
    device: torch.device
    shape: tuple[int, ...]
    transform: Transform | None = None
    binarize: str | None = None

    @property
    def batch(self) -> int:
        """Points that go through the network at once."""
        return max(1, min(BATCH, AT_ONCE // math.prod(self.shape)))

    def energies(self, points: Tensor) -> np.ndarray:
        """Energies float64 [N] of points [N, *shape], in nats."""
        if not len(points):
            return np.empty(0)
        return metrics.in_batches(self._energies, points, self.batch).numpy()

    def _energies(self, points: Tensor) -> Tensor:
        return self.network.energy(points.to(self.device)).cpu().double()

    def first_strange(self, points: Tensor) -> int | None:
        """The first of the points [N, *shape] that has greys, if the model knows bits alone."""
        return first_grey(points) if self.binarize else None


def read(weights: Path, config: Path, device: torch.device) -> Trained:
    """The model of the two files that training wrote. Raises EBMError, one line, if they are not
    usable."""
    network = variants.load(weights, config).to(device)
    settings = json.loads(config.read_text(encoding="utf-8"))
    content = settings.get("transform")
    transform = Transform.from_json(content, str(config)) if content else None
    return Trained(network, device, tuple(settings["shape"]), transform, settings.get("binarize"))
