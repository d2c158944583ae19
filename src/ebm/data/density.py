"""Points drawn from a density with a known log p."""

import torch
from torch import Tensor

from ebm.data import SPLITS
from ebm.densities import DENSITIES
from ebm.schema import DensityData


def prepare(settings: DensityData) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """What it is, float32 splits [N, 2], with classes where the density has any, no outliers."""
    density = DENSITIES[settings.density]()
    torch.manual_seed(settings.seed)
    counts = {split: getattr(settings, split) for split in SPLITS}
    tensors: dict[str, Tensor] = {}
    for split, count in counts.items():
        x, classes = density.sample_with_classes(count)
        tensors[split] = x.float()
        if density.classes > 1:
            tensors[f"{split}_labels"] = classes
    return f"ebm.densities {settings.density}, exact draws", tensors, {}
