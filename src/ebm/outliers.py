"""Images that do not belong to a data set, in exactly its form: what its energy should find
unlikely.

Everything that could tell them apart but what they show is the same as in the test split: shape,
type, range, levels of grey, no noise added, one way to points (`ebm.data.unit`). Du & Mordatch's
loaders added noise to some sets and not to others, which an energy sees before what is shown.

| set | what |
|---|---|
| those stored with the data | test images of other published sets |
| `uniform` | each value on its own, every level equally likely |
| `constant` | one level for the whole image |
| `interpolation` | mean of two test images of different classes; a half is rounded by a coin |
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ebm import seeds
from ebm.data import Prepared, unit


def outlier_sets(prepared: Prepared, n: int, seed: int) -> dict[str, Tensor]:
    """At most `n` images of each outlier set by name, points [N, *shape] like `prepared.points`;
    no set for data that are no images."""
    if len(prepared.shape) < 2:
        return {}
    test, top = prepared.tensors["test"], levels(prepared) - 1
    classes = prepared.labels("test")
    if classes is None or len(classes.unique()) < 2:  # any two images are a pair
        classes = torch.arange(len(test))
    sets = {
        name: _some(images, n, _generator(name, seed))
        for name, images in sorted(prepared.outliers().items())
    }
    shape, none = (n, *prepared.shape), (0, *prepared.shape)  # of two levels: a coin's two sides
    draws: dict[str, Callable[[Generator], Tensor]] = {
        "uniform": lambda generator: uniform(shape, top, generator),
        "constant": lambda generator: constant(shape if top > 1 else none, top, generator),
        "interpolation": lambda generator: interpolation(
            (unit(test) * top).round().long(), classes, n, generator
        ),
    }
    for name, draw in draws.items():  # one after another: large images take much room
        images = _stored(draw(_generator(name, seed)), top, test.dtype)
        if len(images):  # of very unequal classes there may be no pair among those drawn either
            sets[name] = images
    return {name: unit(images) for name, images in sets.items()}


def levels(prepared: Prepared) -> int:
    """How many values a pixel can have: 2 where images are binarised, 256 where they are other
    bytes, else as many as occur."""
    if prepared.manifest["settings"].get("binarize", "none") != "none":
        return 2
    train = prepared.tensors["train"]
    return 256 if train.dtype == torch.uint8 else len(train.unique())


def uniform(shape: tuple[int, ...], top: int, generator: Generator) -> Tensor:
    """Independent levels 0 ... `top`, int64 of `shape`."""
    return torch.randint(top + 1, shape, generator=generator)


def constant(shape: tuple[int, ...], top: int, generator: Generator) -> Tensor:
    """One level 0 ... `top` for each image, int64 of `shape`."""
    each = (shape[0], *(1 for _ in shape[1:]))
    return torch.randint(top + 1, each, generator=generator).expand(shape)


def interpolation(images: Tensor, labels: Tensor, n: int, generator: Generator) -> Tensor:
    """Means of at most `n` random pairs of `images` (levels, int64 [N, *]) whose `labels` [N]
    differ, int64."""
    first, second = torch.randint(len(images), (2, 4 * n), generator=generator)
    differ = (labels[first] != labels[second]).nonzero()[:n, 0]
    total = images[first[differ]] + images[second[differ]]
    return (total + torch.randint(2, total.shape, generator=generator)) // 2


def _stored(level: Tensor, top: int, dtype: torch.dtype) -> Tensor:
    """Levels as the data set stores its values."""
    return (255 * level.int() // top if dtype == torch.uint8 else level / top).to(dtype)


def _some(images: Tensor, n: int, generator: Generator) -> Tensor:
    """At most `n` of the images, at random: files are sorted by class."""
    return images[torch.randperm(len(images), generator=generator)[:n]]


def _generator(name: str, seed: int) -> Generator:
    """One of its own for each set, so that another set more changes none."""
    return Generator().manual_seed(seeds.mix("outliers", name, seed))
