"""MLflow's model registry, as `pipelines.promote` uses it: what was recorded of an experiment, the
versions of the registered model named like it, and their aliases.

Every change may be repeated after a kill, with the same effect as once.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from ebm import EBMError
from pipelines.courier import reason
from pipelines.mlflow_store import DATA, EXPERIMENT, MODEL, check, settle
from pipelines.places import public


@dataclass(frozen=True)
class Recorded:
    """A run, with the latest value of each of its metrics, the checksum of its data, and the id of
    the model that it has logged last, if any."""

    id: str
    finished: bool
    metrics: dict[str, float]
    data: str | None
    model: str | None


@dataclass(frozen=True)
class Version:
    """A version of a registered model; `run` may be gone, or never have been there."""

    number: str
    run: str | None


class Registry:
    """The registry at one tracking URI. `name` is that of an experiment and of its model."""

    def __init__(self, uri: str) -> None:
        check(uri)
        path = uri.removeprefix("sqlite:///")
        if path != uri and not Path(path).is_file():
            problem = "no such file, so nothing is recorded yet"
            advice = "`python -m pipelines.tracking` delivers what waits"
            raise EBMError(f"{public(uri)}: {problem}; {advice}")
        settle(uri)
        self._client = MlflowClient(uri)

    def runs(self, name: str) -> list[Recorded]:
        """All runs of an experiment but those that were deleted, oldest first."""
        found = self._client.get_experiment_by_name(EXPERIMENT)
        runs = self._search(found.experiment_id, name) if found else ()
        return [
            Recorded(
                run.info.run_id,
                run.info.status == "FINISHED",
                run.data.metrics,
                run.data.tags.get(DATA),
                run.data.tags.get(MODEL),
            )
            for run in runs
        ]

    def metric(self, version: Version, metric: str) -> float | None:
        """What the run of `version` has of it, if there is such a run."""
        try:
            return self._client.get_run(version.run).data.metrics.get(metric)
        except MlflowException as error:
            if version.run and error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def complete(self, model_id: str) -> bool:
        """Whether all of a model has arrived."""
        model: LoggedModel = self._client.get_logged_model(model_id)
        files = self._client.list_logged_model_artifacts(model_id)
        ready = model.status == LoggedModelStatus.READY
        return ready and any(file.path == "MLmodel" for file in files)

    def present(self, name: str, alias: str) -> Version | None:
        """The version that an alias points at."""
        number = self._registered(name).get("aliases", {}).get(alias)
        if number is None:
            return None
        return Version(str(number), self._client.get_model_version(name, str(number)).run_id)

    def number(self, name: str, model_id: str) -> str | None:
        """Number of the version that is this model, if there is one."""
        source = self._source(model_id)
        known = [str(found.version) for found in self._versions(name) if found.source == source]
        return known[0] if known else None

    def register(self, name: str, run_id: str, model_id: str) -> str:
        """The number of the version that is this model: a new one, unless there is one."""
        if not self._registered(name):
            self._client.create_registered_model(name)
        if known := self.number(name, model_id):
            return known
        source = self._source(model_id)
        created = self._client.create_model_version(name, source, run_id, model_id=model_id)
        return str(created.version)

    def point(self, name: str, alias: str, number: str) -> None:
        """From now on `alias` is version `number`."""
        self._client.set_registered_model_alias(name, alias, number)

    def history(self, name: str, alias: str) -> list[str]:
        """The versions that `alias` was before, oldest first, as far as they still exist."""
        there = {str(version.version) for version in self._versions(name)}
        kept = self._registered(name).get("tags", {}).get(_tag(alias), "[]")
        return [number for number in json.loads(kept) if number in there]

    def remember(self, name: str, alias: str, history: list[str]) -> None:
        """Replace that list: it is a tag of the registered model."""
        self._client.set_registered_model_tag(name, _tag(alias), json.dumps(history))

    def _source(self, model_id: str) -> str:
        return self._client.get_logged_model(model_id).artifact_location

    def _search(self, experiment_id: str, name: str) -> Iterator[Run]:
        token = None
        while True:
            page = self._client.search_runs(
                [experiment_id],
                f"tags.`ebm.experiment` = '{name}'",
                order_by=["attributes.start_time"],
                page_token=token,
            )
            yield from page
            if not (token := page.token):
                return

    def _registered(self, name: str) -> dict[str, Any]:
        """Aliases and tags of a model, or nothing if no such model is registered."""
        found = self._client.search_registered_models(f"name = '{name}'")
        return {"aliases": found[0].aliases, "tags": found[0].tags} if found else {}

    def _versions(self, name: str) -> list[Any]:
        return list(self._client.search_model_versions(f"name = '{name}'"))


@contextmanager
def plain_errors(uri: str) -> Iterator[None]:
    """Whatever MLflow refuses, or the store beneath it, becomes an EBMError of one line."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, ImportError, OSError) as error:
        raise EBMError(f"{public(uri)}: {reason(error)}") from error


def _tag(alias: str) -> str:
    return f"ebm.history.{alias}"
