"""Original files of published data sets: from a mirror, or downloaded once, with known checksums.

`EBM_DATA_MIRROR` names a folder, or the URL of one, that holds `<data set>/<original file name>`.
It is asked first. What it lacks is downloaded from the public address into the user's cache.
"""

import logging
import os
from pathlib import Path

import pooch

from ebm import EBMError

log = logging.getLogger(__name__)

MIRROR = "EBM_DATA_MIRROR"

URLS = {
    "cifar10": "https://www.cs.toronto.edu/~kriz",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "kddcup99/kddcup.data_10_percent.gz": "https://ndownloader.figshare.com/files/5976042",
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist",
    "omniglot": "https://raw.githubusercontent.com/brendenlake/omniglot/master/python",
    "svhn": "http://ufldl.stanford.edu/housenumbers",
    "usps": "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass",
}
"""Where the files of a data set are, or one file that has another name there."""

CHECKSUMS = {
    "cifar10/cifar-10-binary.tar.gz": (
        "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    ),
    "cifar10/data_batch_1.bin": (
        "sha256:cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"
    ),
    "cifar10/data_batch_2.bin": (
        "sha256:a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"
    ),
    "cifar10/test_batch_first1000.bin": (
        "sha256:8314c96d7cd65618193bab23acdd5d4c4af15bf6dd00a1781d55beedf3be1ef5"
    ),
    "fashion-mnist/t10k-images-idx3-ubyte.gz": (
        "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
    ),
    "fashion-mnist/t10k-labels-idx1-ubyte.gz": (
        "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
    ),
    "fashion-mnist/train-images-idx3-ubyte.gz": (
        "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
    ),
    "fashion-mnist/train-labels-idx1-ubyte.gz": (
        "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
    ),
    "kddcup99/kddcup.data_10_percent.gz": (
        "sha256:8045aca0d84e70e622d1148d7df782496f6333bf6eb979a1b0837c42a9fd9561"
    ),
    "mnist/t10k-images-idx3-ubyte.gz": (
        "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "mnist/t10k-labels-idx1-ubyte.gz": (
        "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
    "mnist/train-images-idx3-ubyte.gz": (
        "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "mnist/train-labels-idx1-ubyte.gz": (
        "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "omniglot/images_background_small1.zip": (
        "sha256:f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4"
    ),
    "omniglot/images_background_small2.zip": (
        "sha256:3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f"
    ),
    "svhn/test_32x32.mat": "md5:eb5a983be6a315427106f1b164d9cef3",
    "svhn/train_32x32.mat": "md5:e26dedcc434d2e4c54c9b2d4a06d8373",
    "usps/usps.h5": "sha256:734f88c541104a956d88be2c95d03b4a463ffd74ccc2ba9c80841fb98e3fcb36",
    "usps/usps.t.bz2": "md5:8ea070ee2aca1ac39742fdd1ef5ed118",
}


class Missing(EBMError):
    """A file is neither in the mirror nor can it be downloaded."""


def fetch(name: str) -> Path:
    """The original file `<data set>/<file name>`: from the mirror, else downloaded once.

    Raises:
        Missing: it cannot be had; the line names it and the two ways to get it.
        EBMError: what was found is not the published file.
    """
    dataset, file = name.split("/")
    return mirrored(name) or _retrieve(URLS.get(name) or f"{URLS[dataset]}/{file}", name)


def mirrored(name: str) -> Path | None:
    """The file in the mirror; None if there is no mirror or the mirror lacks it."""
    mirror = os.environ.get(MIRROR)
    if not mirror:
        return None
    if mirror.startswith(("http://", "https://")):
        try:
            return _retrieve(f"{mirror.rstrip('/')}/{name}", name)
        except Missing as error:
            log.warning("%s: %s", MIRROR, str(error).partition(";")[0])
            return None
    if not Path(mirror).is_dir():
        raise EBMError(f"{MIRROR} = {mirror}: neither a folder nor an address of http(s)")
    path = Path(mirror, name)
    if not path.is_file():
        return None
    algorithm, _, expected = CHECKSUMS[name].partition(":")
    if pooch.file_hash(str(path), algorithm) != expected:
        raise EBMError(f"{path}: not the published file: its checksum is not {CHECKSUMS[name]}")
    return path


def _retrieve(url: str, name: str) -> Path:
    dataset, file = name.split("/")
    folder = Path(pooch.os_cache("ebm"), dataset)
    try:
        return Path(pooch.retrieve(url, CHECKSUMS[name], fname=file, path=folder))
    except (OSError, ValueError) as error:
        if type(error) is ValueError:  # pooch's; of an address that is none, a subclass
            raise EBMError(
                f"{url}: not the published file: its checksum is not {CHECKSUMS[name]}"
            ) from None
        if isinstance(error, OSError) and error.errno is not None:  # none of requests'
            raise EBMError(f"{folder}: cannot be written: {error.strerror}") from None
        reason = type(error).__name__
        raise Missing(
            f"{name} is missing: {url} cannot be downloaded ({reason}); go online, or put the "
            f"file into a folder as {name} and name that folder in {MIRROR}"
        ) from None
