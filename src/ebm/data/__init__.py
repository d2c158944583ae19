"""Data sets as tensors: prepared once, checked by checksum, split into disjoint parts that are
stored.

A prepared folder holds `splits.safetensors` (`train`, `validation`, `test` [N, *], float32, or
uint8 for images; where the source has them `<split>_labels` [N]; where the source is a fixed
collection `<split>_index` [N], the rows of the source; where bits are drawn anew at every update
`train_greys` [N, *], the values they are drawn from), `manifest.json` (source, SHA-256 of the
tensors, counts, shape, settings), for images `outliers.safetensors` (other sets by name, in the
type and shape of the images) and for tables `transform.json` (what made points of their rows,
`ebm.data.transform`).

What is stored becomes points by `unit` and nothing else (images points of [0, 1]): train, test and
outliers alike.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ebm import EBMError
from ebm.densities import DENSITIES, GaussianMixture
from ebm.schema import Dataset

if TYPE_CHECKING:
    from ebm.data.made import Made

SPLITS = ("train", "validation", "test")
GREYS = "train_greys"
TENSORS = "splits.safetensors"
MANIFEST = "manifest.json"
OUTLIERS = "outliers.safetensors"
TRANSFORM = "transform.json"


@dataclass(frozen=True)
class Prepared:
    """A prepared data set: tensors by name, the manifest that describes them, and what reads the
    outlier sets (none unless there are any) and the transform of a table (None unless it is one;
    as JSON has it) that lie beside them."""

    tensors: dict[str, Tensor]
    manifest: dict[str, Any]
    outliers: Callable[[], dict[str, Tensor]] = dict
    transform: Callable[[], dict[str, Any] | None] = lambda: None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one point, without the batch axis."""
        return tuple(self.tensors["train"].shape[1:])

    @property
    def density(self) -> GaussianMixture | None:
        """The density that the points were drawn from, where it is known."""
        name = self.manifest["settings"].get("density")
        return DENSITIES[name]() if name else None

    def points(self, split: str, most: int | None = None) -> Tensor:
        """The points of a split [N, *], float32; the first of them, if it has more than `most`."""
        return unit(self.tensors[split][:most])

    def labels(self, split: str) -> Tensor | None:
        """The classes of the points of a split [N], where the source has them."""
        return self.tensors.get(f"{split}_labels")


def unit(x: Tensor) -> Tensor:
    """Stored values as float32 in [0, 1]: bytes are divided by 255, floats pass through."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def first_grey(x: Tensor) -> int | None:
    """The first of the points [N, *] that has values other than 0 and 1, if one has."""
    grey = ((x != 0) & (x != 1)).flatten(1).any(1)
    return int(grey.int().argmax()) if grey.any() else None


def mode(classes: Tensor) -> Tensor:
    """The mode [N] of a stack, the number whose decimal digits are the classes 0 ... 9 of its
    parts [N, parts], first part first."""
    return (classes * 10 ** torch.arange(classes.shape[1] - 1, -1, -1, device=classes.device)).sum(
        1
    )


def prepare(settings: Dataset) -> Prepared:
    """The data set that `settings` describe, from its source; the same settings give the same
    bits."""
    # stages that only read depend on none of them
    from ebm.data import (
        density,
        digits,
        folder,
        images,
        kddcup99,
        novelty,
        stacked,
        table,
        tumours,
    )

    sources: dict[str, Callable[[Any], Made]] = {
        "density": density.prepare,
        "digits": digits.prepare,
        "folder": folder.prepare,
        "images": images.prepare,
        "kddcup99": kddcup99.prepare,
        "novelty": novelty.prepare,
        "stacked": stacked.prepare,
        "table": table.prepare,
        "tumours": tumours.prepare,
    }
    made = sources[settings.kind](settings)
    tensors = {name: tensor.contiguous() for name, tensor in made.tensors.items()}
    manifest = {
        "source": made.source,
        "settings": settings.model_dump(exclude={"reference"}),  # no part of the tensors
        "shape": list(tensors["train"].shape[1:]),
        "counts": {split: len(tensors[split]) for split in SPLITS},
        **made.notes,
    }
    if made.outliers:
        manifest["outliers"] = {name: len(tensor) for name, tensor in made.outliers.items()}
    return Prepared(tensors, manifest, lambda: made.outliers, lambda: made.transform)


def write(prepared: Prepared, folder: Path) -> None:
    """Write the files into `folder`, the checksums of the tensors into the manifest."""
    payloads, outliers = {TENSORS: save(prepared.tensors)}, prepared.outliers()
    manifest = prepared.manifest | {"sha256": hashlib.sha256(payloads[TENSORS]).hexdigest()}
    if outliers:
        payloads[OUTLIERS] = save(outliers)
        manifest["outliers_sha256"] = hashlib.sha256(payloads[OUTLIERS]).hexdigest()
    if transform := prepared.transform():
        payloads[TRANSFORM] = (json.dumps(transform, indent=2) + "\n").encode()
        manifest["transform_sha256"] = hashlib.sha256(payloads[TRANSFORM]).hexdigest()
    payloads[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, payload in payloads.items():
            (folder / name).write_bytes(payload)
    except OSError as error:
        raise EBMError(f"{folder}: cannot be written: {error.strerror}") from None


def read(folder: Path) -> Prepared:
    """Read a prepared folder, its outliers and transform when they are asked for; raises EBMError
    if a file is missing, damaged or not the one described."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected, outliers = manifest["sha256"], manifest.get("outliers_sha256")
        transform = manifest.get("transform_sha256")
    except OSError as error:
        raise EBMError(f"{error.filename}: {error.strerror}; {_advice(folder)}") from None
    except (ValueError, KeyError, TypeError):
        raise EBMError(f"{folder / MANIFEST}: not a manifest; {_advice(folder)}") from None
    return Prepared(
        _tensors(folder / TENSORS, expected),
        manifest,
        partial(_tensors, folder / OUTLIERS, outliers) if outliers else dict,
        lambda: json.loads(_checked(folder / TRANSFORM, transform)) if transform else None,
    )


def _checked(path: Path, expected: str) -> bytes:
    """The content of a file whose SHA-256 is known."""
    advice = _advice(path.parent)
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise EBMError(f"{path}: {error.strerror}; {advice}") from None
    if hashlib.sha256(payload).hexdigest() != expected:
        raise EBMError(f"{path}: checksum differs from the manifest's; {advice}")
    return payload


def _tensors(path: Path, expected: str) -> dict[str, Tensor]:
    """The tensors in a file whose SHA-256 is known."""
    try:
        return load(_checked(path, expected))
    except SafetensorError as error:
        advice = _advice(path.parent)
        raise EBMError(f"{path}: not a safetensors file ({error}); {advice}") from None


def _advice(folder: Path) -> str:
    return f"delete {folder} and run its prepare stage again"
