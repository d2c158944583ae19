"""Stacks of images: random images of a labelled set as the channels of one, so that every tuple of
their classes is a mode (StackedMNIST, Metz et al. 2017, arXiv:1611.02163).

As in MEG's released code the stacks are drawn once and kept. Parts of the training stacks are
training images, of the test stacks test images.
"""

import torch
from torch import Tensor

from ebm.data import SPLITS, digits, images, mode
from ebm.data.made import Made
from ebm.schema import StackedData


def prepare(settings: StackedData) -> Made:
    """Uint8 splits [N, parts, H, W] with the mode of each stack as label, and the
    single images as `<split>_parts` [M, H, W] with their classes as `<split>_parts_labels`."""
    source, base = _base(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    tensors: dict[str, Tensor] = {}
    for split in SPLITS:
        singles, labels = base[split], base[f"{split}_labels"]
        chosen = torch.randint(
            len(singles), (getattr(settings, split), settings.parts), generator=generator
        )
        tensors |= {
            split: singles[chosen],
            f"{split}_labels": mode(labels[chosen]),
            f"{split}_parts": singles,
            f"{split}_parts_labels": labels,
        }
    return Made(f"{settings.parts} random images a stack of {source}", tensors)


def _base(settings: StackedData) -> tuple[str, dict[str, Tensor]]:
    """What the single images are, and they as bytes, by split."""
    apart, seed = settings.held_out, settings.seed
    if settings.base != "digits":
        return images.splits(settings.base, apart, seed)
    grey = digits.splits("none", apart, apart, seed)
    return "scikit-learn load_digits", {
        name: (255 * tensor).round().to(torch.uint8) if name in SPLITS else tensor
        for name, tensor in grey.items()
    }
