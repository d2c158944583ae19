"""Published image collections, read from their original files: grey or colour bytes, drawings as
bright ink on dark ground.

| name | images | test part |
|---|---|---|
| `mnist`, `fashion-mnist` | grey 28x28 | 10,000 |
| `cifar10` | colour 32x32 | 10,000 (reduced form: the first 1,000) |
| `svhn` | colour 32x32, cropped house numbers | 26,032 |
| `omniglot` | grey 105x105 | the 4,840 drawings of both small background sets; no train part |
| `usps` | grey 16x16 | 2,007; no train part |
"""

import gzip
import logging
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ebm.data import files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """The `train` or `test` part of a collection.

    Attributes:
        source: the names of the files that it was read from.
        images: uint8 [N, H, W], or [N, 3, H, W] in colour.
        labels: int64 [N], the class of each.
    """

    source: str
    images: Tensor
    labels: Tensor


def part(name: str, which: str) -> Part:
    """The part `which` of the collection `name`; raises EBMError if a file cannot be had."""
    return COLLECTIONS[name](which)


def idx(content: bytes) -> Tensor:
    """An array of bytes in IDX format: two zeros, the type (8: bytes), the number of axes, their
    sizes as big-endian 32-bit integers, then the bytes in row-major order."""
    sizes = np.frombuffer(content, ">i4", count=content[3], offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    return torch.from_numpy(values.reshape(sizes).copy())


def _mnist(name: str, which: str) -> Part:
    prefix = {"train": "train", "test": "t10k"}[which]
    names = [f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"]
    images, labels = (
        idx(gzip.decompress(files.fetch(f"{name}/{file}").read_bytes())) for file in names
    )
    return Part(", ".join(names), images, labels.long())


CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR10_MEMBERS = {
    "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
    "test": ["test_batch.bin"],
}
CIFAR10_REDUCED = {
    "train": ["data_batch_1.bin", "data_batch_2.bin"],
    "test": ["test_batch_first1000.bin"],
}


def _cifar10(which: str) -> Part:
    """From the official archive; where that cannot be had but a mirror holds single batches, from
    those: 20,000 images to train and 1,000 to test, with a warning and the files as source."""
    try:
        path = files.fetch(f"cifar10/{CIFAR10_ARCHIVE}")
    except files.Missing:
        paths = [files.mirrored(f"cifar10/{name}") for name in CIFAR10_REDUCED[which]]
        found = [path for path in paths if path]
        if len(found) < len(paths):
            raise
        source = f"reduced to {', '.join(CIFAR10_REDUCED[which])}"
        log.warning("cifar10: no %s; the %s part is %s", CIFAR10_ARCHIVE, which, source)
        return _cifar10_records(source, b"".join(path.read_bytes() for path in found))
    with tarfile.open(path) as archive:
        members = [f"cifar-10-batches-bin/{name}" for name in CIFAR10_MEMBERS[which]]
        batches = [file.read() for name in members if (file := archive.extractfile(name))]
    return _cifar10_records(", ".join(CIFAR10_MEMBERS[which]), b"".join(batches))


def _cifar10_records(source: str, content: bytes) -> Part:
    """Records of one byte for the class, then 32x32 red, green and blue bytes."""
    records = torch.from_numpy(np.frombuffer(content, np.uint8).copy()).reshape(-1, 1 + 3 * 32**2)
    return Part(source, records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long())


def _svhn(which: str) -> Part:
    """From MATLAB's files, images [32, 32, 3, N] there; class 10 is the digit 0."""
    from scipy.io import loadmat

    name = f"{which}_32x32.mat"
    content = loadmat(files.fetch(f"svhn/{name}"))
    images = torch.from_numpy(content["X"]).permute(3, 2, 0, 1).contiguous()
    return Part(name, images, torch.from_numpy(content["y"]).flatten().long() % 10)


def _omniglot(_: str) -> Part:
    """Drawings of characters, black on white in the files, each once (both files hold the Latin
    and the Greek alphabet)."""
    from PIL import Image

    names = ["images_background_small1.zip", "images_background_small2.zip"]
    drawings: dict[str, np.ndarray] = {}
    for name in names:
        with zipfile.ZipFile(files.fetch(f"omniglot/{name}")) as archive:
            for member in archive.namelist():
                _, _, drawing = member.partition("/")  # Greek/character01/0394_01.png
                if member.endswith(".png") and drawing not in drawings:
                    with archive.open(member) as file:
                        drawings[drawing] = np.asarray(Image.open(file).convert("L"))
    characters = [drawing.rpartition("/")[0] for drawing in drawings]
    classes = {name: number for number, name in enumerate(dict.fromkeys(characters))}
    images = 255 - torch.from_numpy(np.stack(list(drawings.values())))
    return Part(", ".join(names), images, torch.tensor([classes[name] for name in characters]))


def _usps(_: str) -> Part:
    """From `usps.h5` (values in [0, 1]) in a mirror, else from LIBSVM's file (in [-1, 1], classes
    from 1)."""
    if path := files.mirrored("usps/usps.h5"):
        import h5py

        with h5py.File(path) as file:
            values, labels = file["test/data"][:], file["test/target"][:]
    else:
        from sklearn.datasets import load_svmlight_file

        path = files.fetch("usps/usps.t.bz2")
        matrix, classes = load_svmlight_file(str(path), n_features=16 * 16)
        values, labels = (matrix.toarray() + 1) / 2, classes - 1
    bytes_ = torch.from_numpy(np.round(values * 255).astype(np.uint8))
    return Part(path.name, bytes_.reshape(-1, 16, 16), torch.from_numpy(labels).long())


COLLECTIONS: dict[str, Callable[[str], Part]] = {
    "mnist": partial(_mnist, "mnist"),
    "fashion-mnist": partial(_mnist, "fashion-mnist"),
    "cifar10": _cifar10,
    "svhn": _svhn,
    "omniglot": _omniglot,
    "usps": _usps,
}
