"""Stage `report`: from models/ to metrics, training curves, figures and one page for the reader.

It writes `metrics/<experiment>.json`, `metrics/samplers.json`, `reports/runs/<experiment>.json`,
which says where those come from, `reports/curves/<experiment>.csv`, `reports/figures/` and
`reports/index.html`, and removes what experiments that are gone left there.
Everything is read and checked before the first file is written. Numbers are rounded to six
significant digits, so that a diff in git shows what changed and not the noise of the last bits.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebm import EBMError, params
from pipelines import page, places, results, stage
from pipelines.results import Comparison, History, Provenance, Result

log = logging.getLogger(__name__)

CURVE_ROWS = 200


def main() -> None:
    here, checkout = Path().resolve(), places.checkout()
    folder = here.relative_to(checkout) if here.is_relative_to(checkout) else Path()
    write(Path(), params.load(stage.PARAMS).plain(), folder)


def write(root: Path, settings: Mapping[str, Any], folder: Path = Path()) -> None:
    """Report on every experiment of `settings`, the whole of params.yaml as plain mappings, which
    lies in this `folder` of the checkout.

    DVC comes here when all of them are done. Who runs this stage alone, because some cannot be
    trained on their machine, gets a report on those that are measured, and by `dvc.lock` with
    these `settings`; earlier results of the others stay. EBMError: there are none."""
    models, used = root / "models", results.used(root / "dvc.lock")
    measured: dict[str, tuple[str, ...]] = {
        name: (f"{name}/run.json", f"{name}/evaluation/metrics.json")
        for name in settings["experiments"]
    }
    if settings.get(results.COMPARISON):
        measured[results.COMPARISON] = (results.COMPARISON,)
    absent = [name for name, files in measured.items() if not _exist(models, files)]
    if absent:
        log.warning("not trained and measured here, left out: %s", ", ".join(absent))
    done = [name for name in measured if name not in absent]
    outdated = [name for name in done if results.outdated(name, used, settings)]
    if outdated:
        log.warning("made with other parameters or weights and left out: %s", ", ".join(outdated))
    absent += outdated
    current = [name for name in settings["experiments"] if name not in absent]
    if not current:
        raise EBMError("no experiment is trained and measured with these parameters; dvc repro")
    found = [results.read(models, name, settings) for name in current]
    found = [replace(result, history=thin(result.history)) for result in found]
    compared = results.COMPARISON not in absent
    comparison = results.read_comparison(models, settings) if compared else None
    reports = root / "reports"
    html = page.render(found, comparison, folder.as_posix())
    named: list[tuple[str, Result | Comparison]] = [(result.name, result) for result in found]
    named += [(results.COMPARISON, comparison)] if comparison else []
    pictures = {f"{name}-{p.name}.png": p.png for name, r in named for p in r.pictures}
    _fill(root / "metrics", {f"{name}.json": _metrics(r.metrics) for name, r in named}, absent)
    curves = {f"{r.name}.csv": _table(r.history) for r in found if r.history["step"]}
    runs = {f"{name}.json": _provenance(r.record) for name, r in named}
    _fill(reports / "runs", runs, absent)
    _fill(reports / "curves", curves, absent)
    _fill(reports / "figures", pictures, absent)
    (reports / "index.html").write_text(html, encoding="utf-8")


def _exist(folder: Path, names: Sequence[str]) -> bool:
    return all((folder / name).exists() for name in names)


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


def _provenance(record: Provenance) -> bytes:
    return f"{record.model_dump_json(indent=2)}\n".encode()


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
    for old in folder.iterdir():
        named = old.stem.rpartition("-")[0] if old.suffix == ".png" else old.stem
        ours = old.suffix in (".json", ".csv", ".png")
        if ours and old.name not in files and named not in absent:
            old.unlink()


if __name__ == "__main__":
    stage.main_alone(main)
