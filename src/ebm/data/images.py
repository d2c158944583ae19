"""Published image data sets as bytes, with other sets as outliers in the same type and shape."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ebm import EBMError
from ebm.data import GREYS, SPLITS, published, unit
from ebm.data.made import Made, binarised, chosen
from ebm.schema import FEWEST, ImageData

OUTLIERS_AT_MOST = 10_000
LUMA = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)
"""What red, green and blue weigh in grey (ITU-R BT.601)."""


def prepare(settings: ImageData) -> Made:
    """Uint8 splits [N, H, W] or [N, 3, H, W] with labels and rows, and outliers; where binarised,
    of bytes 0 and 255.

    Train and validation are drawn from the published train part, whose rows their index names;
    test is the published test part in its order.
    """
    source, tensors = splits(settings.name, settings.validation, settings.seed)
    shape = tensors["test"].shape[1:]
    outliers: dict[str, Tensor] = {name: outlier_set(name, shape) for name in settings.outliers}
    if (how := settings.binarize) != "none":
        source = f"{source}; binarised: {how}"
        generator = torch.Generator().manual_seed(settings.seed)
        greys = {GREYS: tensors["train"]} if how == "dynamic" else {}
        tensors |= greys | {name: _binary(tensors[name], how, generator) for name in SPLITS}
        outliers = {name: _binary(x, how, generator) for name, x in outliers.items()}
    return Made(source, tensors, outliers)


def splits(name: str, validation: int, seed: int) -> tuple[str, dict[str, Tensor]]:
    """What it is, and the images with labels and rows: `validation` of the train part set
    apart."""
    train, test = (published.part(name, which) for which in ("train", "test"))
    if validation > (most := len(train.images) - FEWEST):
        wanted = f"validation = {validation}; expected at most {most}"
        raise EBMError(f"{name}: {wanted}: {FEWEST} images to train on")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.images), generator=generator)
    tensors = (
        chosen("train", order[validation:], train.images, train.labels)
        | chosen("validation", order[:validation], train.images, train.labels)
        | chosen("test", torch.arange(len(test.images)), test.images, test.labels)
    )
    return f"{name}: {train.source}; {test.source}", tensors


def outlier_set(name: str, shape: torch.Size) -> Tensor:
    """The first images of the test part of another published set, in a `shape` that is not its
    own: uint8 [N, *shape]."""
    return reshaped(published.part(name, "test").images[:OUTLIERS_AT_MOST], shape)


def reshaped(images: Tensor, shape: torch.Size) -> Tensor:
    """Images, uint8 [N, h, w] or in colour [N, 3, h, w], as uint8 [N, *shape]: colours made grey
    (ITU-R 601 luma) where `shape` has none, resized bilinearly (when they shrink, averaged over
    what falls together), and grey given three equal channels where `shape` has colours."""
    images = images if images.ndim == 4 else images[:, None]
    if len(shape) == 2 and images.shape[1] == 3:
        images = _bytes((images * LUMA).sum(1, keepdim=True))
    if images.shape[-2:] != shape[-2:]:
        size = tuple(shape[-2:])
        images = _bytes(interpolate(images.float(), size, mode="bilinear", antialias=True))
    return images.expand(-1, *shape).contiguous() if len(shape) == 3 else images[:, 0]


def _binary(images: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Bytes as 0 and 255."""
    return _bytes(255 * binarised(unit(images), how, generator))


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)
