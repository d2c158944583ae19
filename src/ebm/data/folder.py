"""A user's own images: files in a folder, or in one folder for each class.

    image                    becomes
    of any size              its largest square about the middle, resized bilinearly (when it
                             shrinks, averaged over what falls together)
    colour, where grey       grey by ITU-R 601 luma; grey, where colour is wanted: equal channels
    turned by EXIF           upright
    transparent              laid on white
    of 16 bits               its upper 8

Files count in the order of their paths. Hidden ones, and those whose name is not an image's, are
left out; an image that cannot be read is an error that names it. Links to files are followed, to
folders refused: DVC sees no change in those.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ebm import EBMError
from ebm.data import SPLITS
from ebm.schema import FolderData

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
OF_THREE = ("LAB", "HSV")
"""Colours that become grey by way of RGB only."""
OF_16_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
WHITE = "white"
FEWEST = 4
"""Test images that distances take: three neighbours of each are looked for."""

Made = tuple[str, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]
"""What it is, tensors, outliers, notes for the manifest."""


def prepare(settings: FolderData) -> Made:
    """The images of a folder, uint8 [N, size, size] or in colour [N, 3, size, size], split at
    random by `seed`, each class in the same shares; rows of the list of all files that are no
    outliers'. The notes: names of the classes, if there are any, and a digest of all files."""
    root = Path(settings.path)
    if links := [path for path in (root, *root.parents) if path.is_symlink()]:
        raise EBMError(f"{links[0]}: {LINK}")
    paths = files(root)
    names = _classes(paths, root)
    _check_outliers(settings, names)
    shape = (3, settings.size, settings.size) if settings.colour else (settings.size,) * 2
    kept = [path for path in paths if path.relative_to(root).parts[0] not in settings.outliers]
    inliers = [name for name in names if name not in settings.outliers]
    tensors = _split(read_all(kept, shape), _labels(kept, root, inliers), inliers, settings)
    outliers = {
        name: read_all([path for path in paths if path.is_relative_to(root / name)], shape)
        for name in settings.outliers
    }
    notes = {"classes": inliers} if inliers else {}
    return f"{root}, {len(paths)} images, sha256 {_digest(paths, root)}", tensors, outliers, notes


def files(root: Path) -> list[Path]:
    """The image files in a folder and in those within it, by their paths, a warning if others are
    left out. EBMError if there are none, if a folder cannot be read or is a link to another, or if
    a name is no printable text, which no list could show."""
    if not root.is_dir():
        raise EBMError(f"{root}: no such folder")
    images, others = list[Path](), 0
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if links := [name for name in folders if Path(folder, name).is_symlink()]:
            raise EBMError(f"{Path(folder, links[0])}: {LINK}")
        for name in (name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            if path.suffix.lower() not in SUFFIXES:
                others += 1
                continue
            if not str(path.relative_to(root)).isprintable():
                raise EBMError(f"{str(path)!r}: a name that is no printable text; rename it")
            if not path.is_file():
                raise EBMError(f"{path}: no file, or a link to none")
            images.append(path)
    known = ", ".join(sorted(SUFFIXES))
    if not images:
        raise EBMError(f"{root}: no image; expected files whose names end in {known}")
    if others:
        log.warning(
            "%s: %d files are left out, whose names end in none of %s", root, others, known
        )
    return sorted(images)


LINK = "a link to a folder, in which DVC sees no change; expected the folder itself"


def _unreadable(error: OSError) -> NoReturn:
    raise EBMError(f"{error.filename}: cannot be read: {error.strerror}") from None


def read_all(paths: Sequence[Path], shape: tuple[int, ...]) -> Tensor:
    """The images in files, uint8 [N, *shape]."""
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(partial(read, shape=shape), paths)))


def read(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The image in a file, uint8 of `shape` [H, W] or in colour [3, H, W]: see the table in this
    module's docstring. EBMError names a file that cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = _of_8_bits(ImageOps.exif_transpose(file), "RGB" if len(shape) == 3 else "L")
        *_, height, width = shape
        fitted = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problem = " ".join(str(error).split())[:200]
        raise EBMError(f"{path}: cannot be read as an image ({problem})") from None
    pixels = torch.from_numpy(np.array(fitted))
    return pixels.permute(2, 0, 1).contiguous() if len(shape) == 3 else pixels


def _of_8_bits(image: "Image", mode: str) -> "Image":
    """The image in `mode`, RGB or L."""
    from PIL import Image

    if image.mode in OF_16_BITS:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB").convert(mode) if image.mode in OF_THREE else image.convert(mode)


def _classes(paths: Sequence[Path], root: Path) -> list[str]:
    """The names of the folders in `root` that hold images, in their order; none if the images lie
    there themselves. EBMError if there are both."""
    parents = {path.relative_to(root).parts[0] for path in paths if path.parent != root}
    if parents and (loose := [path for path in paths if path.parent == root]):
        advice = "all images in folders, which are their classes, or none"
        raise EBMError(f"{loose[0]}: lies beside folders with images; expected {advice}")
    return sorted(parents)


def _check_outliers(settings: FolderData, names: Sequence[str]) -> None:
    where = f"{settings.path}: outliers"
    if lacking := [name for name in settings.outliers if name not in names]:
        has = f"; it has {', '.join(names)}" if names else ", and none at all"
        raise EBMError(f"{where}: no folder {lacking[0]!r} with images{has}")
    if names and not set(names) - set(settings.outliers):
        raise EBMError(f"{where}: no class is left to learn")


def _labels(paths: Sequence[Path], root: Path, names: Sequence[str]) -> Tensor:
    """The number of the class of each file: int64 [N]; of images without classes 0."""
    number = {name: k for k, name in enumerate(names)}
    return torch.tensor([number.get(path.relative_to(root).parts[0], 0) for path in paths])


def _split(
    images: Tensor, labels: Tensor, names: Sequence[str], settings: FolderData
) -> dict[str, Tensor]:
    """Images, rows and, if there are `names` of classes, labels of each split, in random order: of
    each class the shares `validation` and `test`, the rest to train on. EBMError if a class is too
    small for that."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(images), generator=generator)
    part = torch.zeros(len(images), dtype=torch.long)
    for number in labels.unique():
        rows = order[labels[order] == number]
        sizes = [round(share * len(rows)) for share in (settings.validation, settings.test)]
        if min(*sizes, len(rows) - sum(sizes)) < 1:
            where = Path(settings.path, *names[number : number + 1])
            shares = f"validation = {settings.validation}, test = {settings.test}"
            raise EBMError(f"{where}: {len(rows)} images are too few for {shares}")
        validation, test, _ = rows.split([*sizes, len(rows) - sum(sizes)])
        part[validation], part[test] = 1, 2
    if (found := int((part == SPLITS.index("test")).sum())) < FEWEST:
        raise EBMError(f"{settings.path}: {found} test images; expected at least {FEWEST}")
    tensors: dict[str, Tensor] = {}
    for number, split in enumerate(SPLITS):
        index = order[part[order] == number]
        tensors |= {split: images[index], f"{split}_index": index}
        tensors |= {f"{split}_labels": labels[index]} if names else {}
    return tensors


def _digest(paths: Sequence[Path], root: Path) -> str:
    """Of names and contents of all files."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()
