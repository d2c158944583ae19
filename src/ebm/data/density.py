"""Points drawn from a density with a known log p."""

import torch
from torch import Tensor

from ebm.data import SPLITS
from ebm.data.made import Made
from ebm.densities import DENSITIES
from ebm.schema import DensityData


def prepare(settings: DensityData) -> Made:
    """Float32 splits [N, 2], with classes where the density has any."""
    density = DENSITIES[settings.density]()
    torch.manual_seed(settings.seed)
    counts = {split: getattr(settings, split) for split in SPLITS}
    tensors: dict[str, Tensor] = {}
    for split, count in counts.items():
        x, classes = density.sample_with_classes(count)
        tensors[split] = x.float()
        if density.classes > 1:
            tensors[f"{split}_labels"] = classes
    return Made(f"ebm.densities {settings.density}, exact draws", tensors)
