"""Points drawn from a density with a known log p."""

import torch
from torch import Tensor

from ebm.data import SPLITS
from ebm.densities import DENSITIES
from ebm.schema import DensityData


def prepare(settings: DensityData) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """What it is, float32 splits [N, 2], no outliers."""
    density = DENSITIES[settings.density]()
    torch.manual_seed(settings.seed)
    counts = {split: getattr(settings, split) for split in SPLITS}
    tensors = {split: density.sample(count).float() for split, count in counts.items()}
    return f"ebm.densities {settings.density}, exact draws", tensors, {}
