"""A labelled set of images, pooled and split anew, each of whose classes is an anomaly to models
that never saw it (the MNIST protocol of Zenati et al. 2018, arXiv:1802.06222, that MEG uses).

One split serves all classes: a model without class d trains on what is left of `train`, and every
image of d is an anomaly. The released code draws a second split for its test, so that most of its
test images are training images; `released_index` are the rows of train, validation and test, one
after another, that such a second draw puts into the test.
"""

import torch
from torch import Tensor

from ebm import EBMError
from ebm.data import SPLITS, published
from ebm.data.made import Made, chosen
from ebm.schema import NoveltyData


def prepare(settings: NoveltyData) -> Made:
    """Uint8 splits [N, H, W] with labels and rows of the pool (the published train part, then the
    test part), and `released_index`."""
    parts = [published.part(settings.name, which) for which in ("train", "test")]
    images = torch.cat([part.images for part in parts])
    labels = torch.cat([part.labels for part in parts])
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(images), generator=generator)
    train = round(settings.train * len(images))
    test = len(images) - train - settings.validation
    if test < 1:
        wanted = f"train = {settings.train} and validation = {settings.validation}"
        raise EBMError(f"{settings.name}: {wanted} leave nothing of {len(images)} images to test")
    tensors: dict[str, Tensor] = {}
    pieces = order.split([train, settings.validation, test])
    for split, index in zip(SPLITS, pieces, strict=True):
        tensors |= chosen(split, index, images, labels)
    again = torch.randperm(len(images), generator=generator)
    tensors["released_index"] = again[train:].sort().values
    return Made(f"{settings.name}: {parts[0].source}; {parts[1].source}; pooled", tensors)
