"""Data sets as tensors: prepared once, checked by checksum, split into disjoint parts that are
stored.

A prepared folder holds `splits.safetensors` (`train`, `validation`, `test` [N, *] float32; where
the source has them `<split>_labels` [N]; where the source is a fixed collection `<split>_index`
[N], the rows of the source) and `manifest.json` (source, SHA-256 of the tensors, counts, shape,
settings).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ebm import EBMError
from ebm.densities import DENSITIES, GaussianMixture
from ebm.schema import DensityData, DigitsData

SPLITS = ("train", "validation", "test")
FILES = ("splits.safetensors", "manifest.json")


@dataclass(frozen=True)
class Prepared:
    """A prepared data set: tensors by name and the manifest that describes them."""

    tensors: dict[str, Tensor]
    manifest: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one point, without the batch axis."""
        return tuple(self.tensors["train"].shape[1:])

    @property
    def density(self) -> GaussianMixture | None:
        """The density that the points were drawn from, where it is known."""
        name = self.manifest["settings"].get("density")
        return DENSITIES[name]() if name else None


def prepare(settings: DensityData | DigitsData) -> Prepared:
    """The data set that `settings` describe, from its source; the same settings give the same
    bits."""
    source, tensors = _SOURCES[settings.kind](settings)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    manifest = {
        "source": source,
        "settings": settings.model_dump(),
        "shape": list(tensors["train"].shape[1:]),
        "counts": {split: len(tensors[split]) for split in SPLITS},
    }
    return Prepared(tensors, manifest)


def write(prepared: Prepared, folder: Path) -> None:
    """Write both files into `folder`, the checksum of the tensors into the manifest."""
    payload = save(prepared.tensors)
    manifest = prepared.manifest | {"sha256": hashlib.sha256(payload).hexdigest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILES[0]).write_bytes(payload)
        (folder / FILES[1]).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise EBMError(f"{folder}: cannot be written: {error.strerror}") from None


def read(folder: Path) -> Prepared:
    """Read a prepared folder; raises EBMError if a file is missing, damaged or not the one
    described."""
    advice = f"delete {folder} and run its prepare stage again"
    try:
        payload = (folder / FILES[0]).read_bytes()
        manifest = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
        expected = manifest["sha256"]
    except OSError as error:
        raise EBMError(f"{error.filename}: {error.strerror}; {advice}") from None
    except (ValueError, KeyError, TypeError):
        raise EBMError(f"{folder / FILES[1]}: not a manifest; {advice}") from None
    if hashlib.sha256(payload).hexdigest() != expected:
        raise EBMError(f"{folder / FILES[0]}: checksum differs from the manifest's; {advice}")
    try:
        return Prepared(load(payload), manifest)
    except SafetensorError as error:
        raise EBMError(
            f"{folder / FILES[0]}: not a safetensors file ({error}); {advice}"
        ) from None


def _density(settings: DensityData) -> tuple[str, dict[str, Tensor]]:
    density = DENSITIES[settings.density]()
    torch.manual_seed(settings.seed)
    counts = {split: getattr(settings, split) for split in SPLITS}
    tensors = {split: density.sample(count).float() for split, count in counts.items()}
    return f"ebm.densities {settings.density}, exact draws", tensors


def _digits(settings: DigitsData) -> tuple[str, dict[str, Tensor]]:
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
    return f"scikit-learn load_digits, 1797 images, binarised: {settings.binarize}", tensors


def _binarised(grey: Tensor, how: str, generator: torch.Generator) -> Tensor:
    match how:
        case "sample":
            return torch.bernoulli(grey, generator=generator)
        case "threshold":
            return (grey >= 0.5).float()
        case _:
            return grey


_SOURCES: dict[str, Any] = {"density": _density, "digits": _digits}
