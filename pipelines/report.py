"""Stage `report`: from models/ to metrics, training curves, figures and one page for the reader.

It writes `metrics/<experiment>.json`, `metrics/samplers.json`, `reports/curves/<experiment>.csv`,
`reports/figures/` and `reports/index.html`, and removes what experiments that are gone left there.
Everything is read and checked before the first file is written. Numbers are rounded to six
significant digits, so that a diff in git shows what changed and not the noise of the last bits.
"""

import csv
import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebm import params
from pipelines import page, results, stage, tracking
from pipelines.results import Comparison, History, Result

log = logging.getLogger(__name__)

CURVE_ROWS = 200


def main() -> None:
    timeline = os.path.relpath(stage.root() / "reports" / "timeline.html", "reports")
    write(Path(), params.load(stage.PARAMS).model_dump(), timeline)
    tracking.flush()


def write(root: Path, settings: Mapping[str, Any], timeline: str = "timeline.html") -> None:
    """Report on every experiment of `settings`, the whole of params.yaml as plain mappings; its
    page links to the `timeline` of the last rebuild.

    DVC comes here when all of them are done. Who runs this stage alone, because some cannot be
    trained on their machine, gets a report on those that are measured and were trained with these
    `settings`; earlier results of the others stay."""
    everyone, measured = list(settings["experiments"]), "evaluation/metrics.json"
    done = [name for name in everyone if (root / "models" / name / measured).exists()] or everyone
    found = [results.read(root / "models", name, settings) for name in done]
    if outdated := [result.name for result in found if result.outdated]:
        log.warning("trained with other parameters and left out: %s", ", ".join(outdated))
    absent = [name for name in everyone if name not in done]
    compared = (root / "models" / results.COMPARISON).is_dir()
    if settings.get(results.COMPARISON) and not compared:
        absent.append(results.COMPARISON)
    if absent:
        log.warning("not trained and measured here, left out: %s", ", ".join(absent))
    absent += outdated
    found = [replace(r, history=thin(r.history)) for r in found if not r.outdated]
    comparison = results.read_comparison(root / "models", settings) if compared else None
    reports = root / "reports"
    html = page.render(found, comparison, timeline)
    named: list[tuple[str, Result | Comparison]] = [(result.name, result) for result in found]
    named += [(results.COMPARISON, comparison)] if comparison else []
    pictures = {f"{name}-{p.name}.png": p.png for name, r in named for p in r.pictures}
    _fill(root / "metrics", {f"{name}.json": _metrics(r.metrics) for name, r in named}, absent)
    curves = {f"{r.name}.csv": _table(r.history) for r in found if r.history["step"]}
    _fill(reports / "curves", curves, absent)
    _fill(reports / "figures", pictures, absent)
    (reports / "index.html").write_text(html, encoding="utf-8")


def thin(history: History) -> History:
    """At most CURVE_ROWS rows, evenly spread, the first and the last among them."""
    length = len(history["step"])
    if length <= CURVE_ROWS:
        return history
    kept = [round(k * (length - 1) / (CURVE_ROWS - 1)) for k in range(CURVE_ROWS)]
    return {name: [column[k] for k in kept] for name, column in history.items()}


def _metrics(metrics: Mapping[str, float]) -> bytes:
    """A flat object of numbers, sorted; JSON has no number for what is not finite: left out."""
    finite = {name: _rounded(value) for name, value in metrics.items() if math.isfinite(value)}
    return (json.dumps(finite, indent=2, sort_keys=True) + "\n").encode()


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _table(history: History) -> bytes:
    """The curves as CSV; a value that is missing is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(history)
    for row in zip(*history.values(), strict=True):
        writer.writerow("" if math.isnan(value) else f"{value:.6g}" for value in row)
    return text.getvalue().encode()


def _fill(folder: Path, files: Mapping[str, bytes], absent: Sequence[str]) -> None:
    """Write `files` into `folder`, and remove older files of the same kinds, but for those of the
    experiments that are `absent`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    kept = tuple(f"{name}{end}" for name in absent for end in ".-")
    for old in folder.iterdir():
        ours = old.suffix in (".json", ".csv", ".png")
        if ours and old.name not in files and not old.name.startswith(kept):
            old.unlink()


if __name__ == "__main__":
    stage.guarded(main)
