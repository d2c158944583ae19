"""scikit-learn's 1,797 handwritten digits, which need no download."""

import torch
from torch import Tensor

from ebm import EBMError
from ebm.data import GREYS, SPLITS
from ebm.data.made import Made, binarised, chosen
from ebm.schema import FEWEST, DigitsData


def prepare(settings: DigitsData) -> Made:
    """Float32 splits [N, 8, 8] in [0, 1] with labels and rows."""
    parts = settings.validation, settings.test
    source = f"scikit-learn load_digits, 1797 images, binarised: {settings.binarize}"
    return Made(source, splits(settings.binarize, *parts, settings.seed))


def splits(binarize: str, validation: int, test: int, seed: int) -> dict[str, Tensor]:
    """The images, split at random, with labels and rows."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16).float()
    labels = torch.from_numpy(bunch.target).long()
    if validation + test > len(images) - FEWEST:
        wanted, most = f"validation + test = {validation + test}", len(images) - FEWEST
        raise EBMError(f"digits: {wanted}; expected at most {most}: {FEWEST} images to train on")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    greys, images = images, binarised(images, binarize, generator)
    parts = order.split([len(order) - validation - test, validation, test])
    tensors: dict[str, Tensor] = {}
    for split, index in zip(SPLITS, parts, strict=True):
        tensors |= chosen(split, index, images, labels)
    if binarize == "dynamic":
        tensors[GREYS] = greys[parts[0]]
    return tensors
