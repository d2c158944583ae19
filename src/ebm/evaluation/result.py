"""What an evaluation finds: numbers, what to hold them against, and pictures."""

from dataclasses import dataclass, field
from typing import Any

from ebm.figures import Drawing


@dataclass
class Evaluation:
    """Numbers by name, references by the number's name, titled pictures in display order, and the
    thresholds by which scores of the model flag rows as anomalies, by the score's name."""

    metrics: dict[str, float] = field(default_factory=dict)
    references: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: list[tuple[str, str, str, Drawing]] = field(default_factory=list)
    thresholds: dict[str, float] = field(default_factory=dict)

    def refer(self, metric: str, value: float, kind: str, source: str) -> None:
        """Hold `metric` against `value`."""
        entry = {"value": value, "kind": kind, "source": source}
        self.references.setdefault(metric, []).append(entry)

    def draw(self, name: str, title: str, caption: str, drawing: Drawing) -> None:
        """Add a picture."""
        self.figures.append((name, title, caption, drawing))
