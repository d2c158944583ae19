"""What an evaluation is of, and what it finds: numbers, what to hold them against, pictures."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ebm.data import Prepared
from ebm.figures import Drawing
from ebm.reference import Reference, Seen
from ebm.variants.base import EBM


@dataclass(frozen=True)
class Case:
    """A trained model and its samples by name, on one device with the network of `reference`; the
    data, and the settings of the evaluation."""

    model: EBM
    samples: dict[str, Tensor]
    prepared: Prepared
    reference: Reference
    settings: dict[str, Any]

    @property
    def drawn(self) -> Tensor:
        """The samples proper [n, *]."""
        return self.samples["samples"]

    @property
    def device(self) -> torch.device:
        """Where the samples lie."""
        return self.drawn.device

    @property
    def about(self) -> dict[str, Any]:
        """The settings that the data were made by."""
        return self.prepared.manifest["settings"]

    def points(self, split: str, most: int | None = None) -> Tensor:
        """The points of a split [N, *], or the first of them; on the device."""
        return self.prepared.points(split, most).to(self.device)

    def labels(self, split: str) -> Tensor | None:
        """The classes of the points of a split [N], where there are any; on the device."""
        labels = self.prepared.labels(split)
        return None if labels is None else labels.to(self.device)

    @cached_property
    def seen(self) -> Seen | None:
        """What the reference sees in the test points; None if it is no classifier, and would see
        no more than is among its statistics."""
        return self.reference.see(self.points("test")) if self.reference.classifies else None


LOWER_IS_BETTER = {
    "frechet_distance",
    "frechet_distance_extrapolated",
    "kernel_distance",
    "mode_kl",
}
"""Of the scores of samples, those of which real data get the least that a model honestly can."""


def bound(score: str) -> str:
    """The kind of reference that real data, scored alike, are for a `score` of samples."""
    return "floor" if score in LOWER_IS_BETTER else "ceiling"


@dataclass
class Evaluation:
    """Numbers by name, references by the number's name, titled pictures in display order, and the
    thresholds by which scores of the model flag rows as anomalies, by the score's name."""

    metrics: dict[str, float] = field(default_factory=dict)
    references: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: list[tuple[str, str, str, Drawing]] = field(default_factory=list)
    thresholds: dict[str, float] = field(default_factory=dict)

    def add(self, numbers: dict[str, float], suffix: str) -> None:
        """Add `numbers` under their names with a `suffix`."""
        self.metrics |= {name + suffix: value for name, value in numbers.items()}

    def refer(self, metric: str, value: float, kind: str, source: str) -> None:
        """Hold `metric` against `value`, if there is one."""
        if not math.isfinite(value):
            return
        entry = {"value": value, "kind": kind, "source": source}
        self.references.setdefault(metric, []).append(entry)

    def draw(self, name: str, title: str, caption: str, drawing: Drawing) -> None:
        """Add a picture."""
        self.figures.append((name, title, caption, drawing))


def measure_acceptance(result: Evaluation, samples: dict[str, Tensor]) -> None:
    """The mean acceptance of the chains that the samples are of, if anything was accepted."""
    if len(samples.get("acceptance", ())):
        result.metrics["acceptance"] = samples["acceptance"].mean().item()
