"""What a flow run leaves in Prefect of a rebuild: tables, figures and links, as plain values."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebm import EBMError, params
from pipelines import page, results, typeset
from pipelines.places import public
from pipelines.spool import Spool
from pipelines.timeline import WORDS, Rebuild, clock
from pipelines.words import AREAS, METRICS, Metric

GROUPS = ("train", "sample", "evaluate")
"""The stages that an experiment has of its own."""

MLFLOW_UI = "http://127.0.0.1:5000"
"""Where `make ui` shows the runs of mlflow.db."""


@dataclass(frozen=True)
class Experiment:
    """One that has been evaluated as it is trained; `title` is its name, in paper/ with that in
    front. `ran`: it was measured just now, and did not come from DVC's cache."""

    title: str
    result: results.Result
    ran: bool

    @property
    def key(self) -> str:
        """The title in the form that Prefect wants of an artifact's key."""
        return re.sub("[^a-z0-9]+", "-", self.title.lower())

    @property
    def address(self) -> str:
        """The page of its training in MLflow, empty if that was not tracked, or not delivered
        yet."""
        record = self.result.record
        state = Spool(record.tracking_key).state()
        run = record.mlflow_run_id or (state and state.mlflow_run_id)
        return f"{_mlflow()}/#/runs/{run}" if run else ""


def _mlflow() -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return public(uri).rstrip("/") if uri.startswith("http") else MLFLOW_UI


def stages(last: Rebuild) -> list[dict[str, Any]]:
    """A row for every stage of the plan."""
    return [
        {
            "stage": entry.stage,
            "outcome": WORDS[entry.kind],
            "started": clock(entry.started) if entry.ran else "",
            "took": typeset.duration(entry.seconds) if entry.ran else "",
            "worker": entry.worker,
            "reason": entry.reason,
        }
        for entry in last.entries
    ]


def experiments(last: Rebuild, root: Path) -> list[Experiment]:
    """Experiments of the plan that have been evaluated, now or before."""
    ran: dict[tuple[str, str], bool] = {}
    for entry in last.entries:
        path, stage = entry.stage.rpartition("dvc.yaml:")[::2]
        group, _, name = stage.partition("@")
        if group in GROUPS and name:
            measured = group == "evaluate" and entry.ran and not entry.restored
            ran[path, name] = ran.get((path, name), False) or measured
    graphs = {path: _graph(root / path) for path in {path for path, _ in ran}}
    return [
        found
        for (path, name), r in ran.items()
        for found in _read(root, path, name, r, *graphs[path])
    ]


def _graph(folder: Path) -> tuple[dict[str, Any], dict[str, results.Used]]:
    """The parameters of a graph and what its stages were run with; of one that cannot be read no
    experiment: the report will say why."""
    try:
        return params.load(folder / "params.yaml").plain(), results.used(folder / "dvc.lock")
    except EBMError:
        return {"experiments": {}}, {}


def _read(
    root: Path,
    path: str,
    name: str,
    ran: bool,
    settings: dict[str, Any],
    used: dict[str, results.Used],
) -> Iterator[Experiment]:
    """The experiment, unless something of it is missing or older than the rest."""
    models = root / path / "models"
    if name not in settings["experiments"] or not (models / name / "evaluation").is_dir():
        return
    if results.outdated(name, used, settings):
        return
    try:
        result = results.read(models, name, settings)
    except EBMError:  # the report will say what
        return
    yield Experiment(f"{path}{name}", result, ran)


def table(found: Sequence[Experiment]) -> list[dict[str, Any]]:
    """The headline numbers of experiments, each beside what it is held against."""
    return [
        {
            "experiment": experiment.title,
            "metric": metric.label + (f" [{metric.unit}]" if metric.unit else ""),
            "value": value,
            "held against": against,
            "measured": "now" if experiment.ran else "before",
        }
        for experiment in found
        for metric, value, against in _headlines(experiment.result)
    ]


def _headlines(result: results.Result) -> Iterator[tuple[Metric, str, str]]:
    for name, row in page.rows(result).items():
        if name in METRICS and row.metric.overview:
            against = [f"{r.kind} {page.held_against(r)}" for r in row.references]
            yield row.metric, row.value, ", ".join(against)
    for area, meaning in AREAS.items():  # of many classes: their mean
        if (name := f"{area}_mean") in result.metrics:
            label = f"{meaning.partition(':')[0]}, mean"
            yield Metric(label, +1, ""), typeset.measured(result.metrics[name]), ""


def figures(found: Sequence[Experiment]) -> str:
    """Markdown: the figures of what the rebuild touched, one of what it did not, all with a link
    to the run in MLflow."""
    return "\n\n".join(block for experiment in found for block in _section(experiment))


def _section(experiment: Experiment) -> Iterator[str]:
    yield f"## {experiment.title}"
    state = "" if experiment.ran else "up to date"
    link = (
        f"[training in MLflow]({experiment.address})"
        if experiment.address
        else "not in MLflow (yet)"
    )
    yield ", ".join(filter(None, (link, state)))
    for picture in experiment.result.pictures[: None if experiment.ran else 1]:
        yield f"![{picture.title}]({page.data_uri(picture)})"
        yield f"**{picture.title}.** {picture.caption}"
