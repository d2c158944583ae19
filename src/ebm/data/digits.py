"""scikit-learn's 1,797 handwritten digits, which need no download."""

import torch
from torch import Tensor

from ebm import EBMError
from ebm.data import SPLITS
from ebm.schema import DigitsData


def prepare(settings: DigitsData) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """What it is, float32 splits [N, 8, 8] in [0, 1] with labels and rows, no outliers."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16).float()
    labels = torch.from_numpy(bunch.target).long()
    if settings.validation + settings.test >= len(images):
        wanted = f"validation + test = {settings.validation + settings.test}"
        raise EBMError(f"digits: {wanted} leaves nothing of {len(images)} images to train on")
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(images), generator=generator)
    images = _binarised(images, settings.binarize, generator)
    held_out = [settings.validation, settings.test]
    parts = order.split([len(order) - sum(held_out), *held_out])
    tensors: dict[str, Tensor] = {}
    for split, index in zip(SPLITS, parts, strict=True):
        tensors |= {
            split: images[index],
            f"{split}_labels": labels[index],
            f"{split}_index": index,
        }
    return f"scikit-learn load_digits, 1797 images, binarised: {settings.binarize}", tensors, {}


def _binarised(grey: Tensor, how: str, generator: torch.Generator) -> Tensor:
    match how:
        case "sample":
            return torch.bernoulli(grey, generator=generator)
        case "threshold":
            return (grey >= 0.5).float()
        case _:
            return grey
