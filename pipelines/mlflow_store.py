"""MLflow, as a courier uses it: a store of runs. Nothing else imports mlflow but
`pipelines.mlflow_registry`, `pipelines.machine`, and `pipelines.mlflow_model`, which MLflow itself
runs.

Every call may be repeated after a kill, with the same effect as once: a run is found again by its
tag `ebm.key`; params, tags, data sets and files replace themselves; MLflow drops a metric of which
it has the name, step, time and value; a model is found again by its run and the checksum of all
that is packed into it.
"""

import hashlib
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from importlib.metadata import version
from math import isnan
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from ebm import EBMError
from ebm.files import locked
from pipelines.places import main_checkout, misread, public
from pipelines.spool import Event, UnfitError

EXPERIMENT = "ebm"
KEY = "ebm.key"
PACKED = "ebm.packed_sha256"
DATA = "data.sha256"  # of a run: the checksum of its data
MODEL = "ebm.model_id"  # of a run: the model that it has logged last
REQUIREMENTS = (
    "mlflow",
    "numpy",
    "pandas",
    "pydantic",
    "safetensors",
    "scikit-learn",
    "threadpoolctl",
    "torch",
    "zuko",
)
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables of MLflow's database, and their columns that hold paths of this machine."""
PAGE = 100  # params or tags in a request: MLflow's limit


class Store:
    """The runs at one tracking URI, and the id of the `experiment` that has them all."""

    def __init__(self, uri: str) -> None:
        check(uri)
        if uri.startswith("sqlite:///"):
            create_database(Path(uri.removeprefix("sqlite:///")))
            settle(uri)
        self._client = MlflowClient(uri)
        found = self._client.get_experiment_by_name(EXPERIMENT)
        self.experiment = (
            found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        )

    def begin(self, key: str, event: Event) -> str:
        """The MLflow id of the run `key`, which is RUNNING from now on."""
        tags = {**_names(event["tags"]), **self._nested(event)}
        run = self._find(key) or self._client.create_run(
            self.experiment,
            start_time=event["time"],
            run_name=event["experiment"],
            tags={KEY: key, **_sources(tags), **tags},
        )
        self._add(run, _names(event["params"]), tags, event["stage"])
        if dataset := event["dataset"]:
            self._client.log_inputs(run.info.run_id, [_dataset(**dataset)])
        unnamed = run.info.run_name == key  # a child of it came first
        if run.info.status != "RUNNING" or unnamed:
            name = event["experiment"] if unnamed else None
            self._client.update_run(run.info.run_id, "RUNNING", name)
        return run.info.run_id

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        for page in _pages([RunTag(*item) for item in _names(tags).items()]):
            self._client.log_batch(run_id, tags=page)

    def log(self, run_id: str, events: list[Event]) -> None:
        """Rows of scalars, in order; results also for the model that the run has logged."""
        model = self._latest_model(run_id) if any(e["op"] == "final" for e in events) else None
        metrics = [
            Metric(name, value, event["time"], event["step"], model_id=about)
            for event in events
            for name, value in _names(event["values"]).items()
            # of a model, MLflow would keep NaN as 0
            for about in [model if event["op"] == "final" and not isnan(value) else None]
        ]
        self._client.log_batch(run_id, metrics=metrics)

    def load(self, run_id: str, values: dict[str, float], step: int) -> None:
        """How busy the machine is now, which is no result of the run's."""
        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(run_id, metrics=metrics)

    def artifact(self, run_id: str, files: Path, event: Event) -> None:
        """Upload one file."""
        self._client.log_artifact(run_id, str(files / event["name"]), event["folder"] or None)

    def model(self, run_id: str, files: Path, event: Event) -> None:
        """Log weights, config and code as a model that answers energies; the run's latest one."""
        model = self._model_of(run_id, packed_digest(files, event))
        if model.status != LoggedModelStatus.READY:
            self._upload(run_id, files, event, model)
        self._client.set_tag(run_id, MODEL, model.model_id)

    def _upload(self, run_id: str, files: Path, event: Event, model: LoggedModel) -> None:
        described = Model(model.artifact_location, run_id, model_id=model.model_id)
        try:
            save_model(files, event, described)
        except OSError:
            raise
        except Exception as error:
            raise UnfitError(f"the model cannot be packed: {error}") from error
        self._client.log_model_artifacts(model.model_id, str(files / "model"))
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)

    def end(self, run_id: str, status: str, time: int) -> None:
        """The run is over since `time`, in milliseconds since the epoch."""
        self._client.set_terminated(run_id, status, end_time=time)

    def _nested(self, event: Event) -> dict[str, str]:
        """The tag by which MLflow shows a run under another one, which is made if it has not
        arrived yet."""
        if not (parent := event.get("parent")):
            return {}
        run = self._find(parent) or self._client.create_run(
            self.experiment, start_time=event["time"], run_name=parent, tags={KEY: parent}
        )
        return {"mlflow.parentRunId": run.info.run_id}

    def _find(self, key: str) -> Run | None:
        found = self._client.search_runs([self.experiment], f"tags.`{KEY}` = '{key}'")
        return found[0] if found else None

    def _add(
        self, run: Run, params: Mapping[str, str], tags: Mapping[str, str], stage: str
    ) -> None:
        """Add what is new. MLflow's params cannot change, so what a later stage says differently
        becomes a tag under the name of the stage."""
        known = {**run.data.params, **run.data.tags}
        new = {name: value for name, value in params.items() if name not in known}
        changed = {
            f"{stage}.{name}" if name in known else name: value
            for name, value in {**params, **tags}.items()
            if name not in new and known.get(name) != value
        }
        for page in _pages([Param(*item) for item in new.items()]):
            self._client.log_batch(run.info.run_id, params=page)
        for page in _pages([RunTag(*item) for item in changed.items()]):
            self._client.log_batch(run.info.run_id, tags=page)

    def _latest_model(self, run_id: str) -> str | None:
        return self._client.get_run(run_id).data.tags.get(MODEL)

    def _model_of(self, run_id: str, digest: str) -> LoggedModel:
        found = self._client.search_logged_models(
            [self.experiment], f"source_run_id = '{run_id}' AND tags.`{PACKED}` = '{digest}'"
        )
        if found:
            return found[0]
        run = self._client.get_run(run_id)
        return self._client.create_logged_model(
            self.experiment,
            name=re.sub(r"[/:.%\"']", "-", run.info.run_name),
            source_run_id=run_id,
            tags={PACKED: digest},
            params=run.data.params,
            model_type="energy",
        )


def check(uri: str) -> None:
    """EBMError for a database that would be another than it says."""
    if problem := misread(uri):
        raise EBMError(f"{public(uri)}: {problem}")


def create_database(path: Path) -> None:
    """Make MLflow's database at `path` if there is none, so that it appears whole: killed in the
    middle, MLflow's own way leaves a file that no later process can open. WAL lets a UI read while
    a courier writes."""
    if path.exists():
        return
    names = ("draft", "ready", "lock")
    draft, ready, lock = (path.with_name(f"{path.name}.{name}") for name in names)
    with locked(lock):  # others may have come for the same one
        if path.exists():
            return
        for old in (draft, ready):
            old.unlink(missing_ok=True)
        MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
        with closing(sqlite3.connect(draft)) as database:
            database.execute("VACUUM INTO ?", [str(ready)])
        with closing(sqlite3.connect(ready)) as database:
            database.execute("PRAGMA journal_mode=WAL")
        os.replace(ready, path)
        draft.unlink()


def settle(uri: str) -> None:
    """Have the database of a checkout that was moved, or copied, find its artifacts where they are
    now: MLflow keeps absolute paths. That at another address stays as it is."""
    path, here = main_checkout() / "mlflow.db", f"{main_checkout() / 'mlruns'}/"
    if uri != f"sqlite:///{path}" or not path.is_file():
        return
    with closing(sqlite3.connect(path)) as database, database:
        asked = "SELECT artifact_location FROM experiments WHERE name = ?"
        (found,) = database.execute(asked, [EXPERIMENT]).fetchone() or [""]
        there = found.rpartition("/")[0] + "/"
        local = there.startswith("/") and there.endswith("/mlruns/")
        if not local or os.path.realpath(there) == os.path.realpath(here):
            return
        for table, column in PLACES:
            begins = f"substr({column}, 1, {len(there)}) = ?"
            moved = f"UPDATE {table} SET {column} = ? || substr({column}, {len(there) + 1})"
            database.execute(f"{moved} WHERE {begins}", [here, there])


def packed_digest(files: Path, event: Event) -> str:
    """The checksum of what a stage has put into `files` to be packed, and of the `serving` beside
    it: the same model if it is the same."""
    digest = hashlib.sha256(json.dumps(event["serving"], sort_keys=True).encode())
    for path in sorted(path for path in files.rglob("*") if path.is_file()):
        name = path.relative_to(files)
        if name.parts[0] != "model":  # which an interrupted delivery has left
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


def save_model(files: Path, event: Event, model: Model) -> None:
    """Write the MLflow model into `files`/model, from what a stage has put there."""
    target, config = files / "model", files / event["config"]
    shutil.rmtree(target, ignore_errors=True)
    mlflow.pyfunc.save_model(
        target,
        mlflow_model=model,
        python_model=str(files / "mlflow_model.py"),
        code_paths=[str(files / "ebm")],
        artifacts={"weights": str(files / event["weights"]), "config": str(config)},
        model_config=event["serving"],
        pip_requirements=[f"{name}=={_release(name)}" for name in REQUIREMENTS],
        signature=signature(json.loads(config.read_text(encoding="utf-8"))),
        input_example=_example(files / "example.json"),
    )


def signature(config: Mapping[str, Any]) -> ModelSignature:
    """What the served model takes and answers, by its configuration (`pipelines.mlflow_model` has
    the words). Columns of a table by name and type; images as a tensor. Vectors the model checks
    itself: MLflow reads no CSV for a tensor, and of columns it drops those that are too many."""
    shape, transform = config["shape"], config.get("transform")
    answer = [ColSpec(DataType.double, "energy"), ColSpec(DataType.boolean, "anomaly")]
    inputs = None
    if transform:
        types = {"numeric": DataType.double, "categorical": DataType.string}
        columns = [ColSpec(types[c["kind"]], c["name"]) for c in transform["columns"]]
        inputs = Schema(columns)
    elif len(shape) > 1:
        inputs = Schema([TensorSpec(np.dtype(np.float64), (-1, *shape))])
    names = ("samples", "seed")
    params = ParamSchema([ParamSpec(name, DataType.long, 0) for name in names])
    return ModelSignature(inputs, Schema(answer), params)


def _example(path: Path) -> "np.ndarray | pd.DataFrame":
    """A request, as Python sends it."""
    request = json.loads(path.read_text(encoding="utf-8"))
    if "inputs" in request:
        return np.asarray(request["inputs"], dtype=np.float64)
    return pd.DataFrame(**request["dataframe_split"])


def _names(named: Mapping[str, Any]) -> dict[str, Any]:
    """`named`, under names that MLflow accepts."""
    return {re.sub(r"[^\w\-. :/]", "-", name): value for name, value in named.items()}


def _sources(tags: Mapping[str, str]) -> dict[str, str]:
    """MLflow's own names for what its UI shows of the source."""
    return {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": tags.get("dvc.stage", "pipelines"),
        "mlflow.source.git.commit": tags.get("git.commit", ""),
    }


def _dataset(name: str, source: str, digest: str) -> DatasetInput:
    where = json.dumps({"uri": source})
    dataset = Dataset(name, digest[:36], source_type="local", source=where)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _pages(items: list[Any]) -> list[list[Any]]:
    return [items[i : i + PAGE] for i in range(0, len(items), PAGE)]


def _release(package: str) -> str:
    """The version without a local part such as +cpu, which no index knows."""
    return version(package).partition("+")[0]
