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
import math
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from unicodedata import category

import numpy as np
import torch
from torch import Tensor

from ebm import EBMError
from ebm.data.made import Made
from ebm.data.own import check_room, refuse_links
from ebm.data.shares import by_class, repeated
from ebm.schema import FEWEST, FolderData

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
OF_THREE = ("LAB", "HSV")
"""Colours that become grey by way of RGB only."""
OF_16_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
WHITE = "white"
UNLISTED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, bytes that are no text, and ends of lines."""
BROKEN = (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error)
UNREADABLE = (OSError, *BROKEN)
"""What Pillow raises of a file that is no image, or a damaged one."""

NEEDED = 8
"""Bytes of memory for each byte of the images: the splits, what is written of them, floats."""

DARK = 16
"""Of 256 levels, those that pixels of 10 or 12 bits leave in files of 16 bits."""


def prepare(settings: FolderData) -> Made:
    """The images of a folder, uint8 [N, size, size] or in colour [N, 3, size, size], split at
    random by `seed`, each class in the same shares; rows of the list of all files that are no
    outliers'. The source ends in a digest of all files; the notes name the classes, if there are
    any, and count the test images that are training images too."""
    root = Path(settings.path)
    refuse_links(root, *root.parents)
    paths = files(root)
    classes = _by_class(paths, root)
    outliers = {name: classes.pop(name) for name in _known(settings, list(classes))}
    shape = (3, settings.size, settings.size) if settings.colour else (settings.size,) * 2
    pixels = len(paths) * math.prod(shape)
    what = f"{settings.path}: {len(paths)} images of {settings.size} x {settings.size} pixels"
    check_room(NEEDED * pixels, what, "a smaller size takes less")
    inliers = [path for members in classes.values() for path in members]
    sizes = torch.tensor([len(members) for members in classes.values()])
    labels = torch.arange(len(classes)).repeat_interleave(sizes)
    told = {k: (str(root / name), "images") for k, name in enumerate(classes)}
    index = by_class(labels, told, settings.validation, settings.test, settings.seed)
    for split, kind in (("test", "test"), ("train", "training")):
        if len(index[split]) < FEWEST:
            problem = f"{len(index[split])} {kind} images; expected at least {FEWEST}"
            raise EBMError(f"{settings.path}: {problem}")
    images, names = read_all(inliers, shape), [name for name in classes if name]
    if images.max() < DARK:
        advice = "16-bit files give their upper 8 bits: stretch pixels of 10 or 12 bits to all 16"
        log.warning("%s: no pixel is above %d of 255; %s", settings.path, images.max(), advice)
    tensors = {split: images[rows] for split, rows in index.items()}
    tensors |= {f"{split}_index": rows for split, rows in index.items()}
    if names:
        tensors |= {f"{split}_labels": labels[rows] for split, rows in index.items()}
    sets = {name: read_all(members, shape) for name, members in outliers.items()}
    source = f"{root}, {len(paths)} images, sha256 {_digest(paths, root)}"
    notes: dict[str, Any] = {"classes": names} if names else {}
    return Made(source, tensors, sets, notes | repeated(tensors, str(root), "images"))


def files(root: Path) -> list[Path]:
    """The image files in a folder and in those within it, by their paths, a warning if others are
    left out. EBMError if there are none, if a folder cannot be read or is a link to another, or if
    a name is no line of text, which no list could show."""
    if not root.is_dir():
        raise EBMError(f"{root}: no such folder")
    images, others = list[Path](), 0
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        refuse_links(*(Path(folder, name) for name in folders))
        for name in (name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            if path.suffix.lower() not in SUFFIXES:
                others += 1
                continue
            if any(category(c) in UNLISTED for c in str(path.relative_to(root))):
                raise EBMError(f"{str(path)!r}: a name that is no line of text; rename it")
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
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        problem = " ".join(str(error).split())[:200]
        raise EBMError(f"{path}: cannot be read as an image ({problem})") from None
    pixels = torch.from_numpy(np.array(fitted))
    return pixels.permute(2, 0, 1).contiguous() if len(shape) == 3 else pixels


def _of_8_bits(image: "Image", mode: str) -> "Image":
    """The image in `mode`, RGB or L."""
    from PIL import Image

    if image.mode in OF_16_BITS:
        levels = np.asarray(image)
        clear = levels == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(clear, 255, levels >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB").convert(mode) if image.mode in OF_THREE else image.convert(mode)


def _by_class(paths: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """The files by the folder of `root` that they lie in, their class, in its order; all of the
    class "" if they lie in `root` itself. EBMError if some do and some do not."""
    classes: dict[str, list[Path]] = {}
    for path in paths:
        folder, *within = path.relative_to(root).parts
        classes.setdefault(folder if within else "", []).append(path)
    if "" in classes and len(classes) > 1:
        advice = "all images in folders, which are their classes, or none"
        raise EBMError(f"{classes[''][0]}: lies beside folders with images; expected {advice}")
    return classes


def _known(settings: FolderData, names: Sequence[str]) -> list[str]:
    """The outliers, if they are among the `names` of the classes, and others are left to learn."""
    where = f"{settings.path}: outliers"
    if lacking := [name for name in settings.outliers if name not in names]:
        has = f"; it has {', '.join(names)}" if any(names) else ", and none at all"
        raise EBMError(f"{where}: no folder {lacking[0]!r} with images{has}")
    if not set(names) - set(settings.outliers):
        raise EBMError(f"{where}: no class is left to learn")
    return settings.outliers


def _digest(paths: Sequence[Path], root: Path) -> str:
    """SHA-256 over names and contents of all files."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()
