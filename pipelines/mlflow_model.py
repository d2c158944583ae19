"""The model that MLflow serves: rows in, energies and flags out, or samples.

    a model of   takes
    a table      its columns by name, numbers and text as in the CSV file; MLflow drops others.
                 A category that pandas reads as missing (NA, null, None and the like) is empty in
                 MLflow's CSV: send it as JSON. No name in a CSV header may begin with a blank
    vectors      their numbers [B, D]; of a CSV file all columns in their order, under any names
    images       their levels [B, *shape], 0 and 1 alone where the data were binarised; no CSV

    answer       of each row, or of each sample
    energy       in nats: the lower, the more likely
    anomaly      whether the energy is not below the threshold; null where the model has none
    sample       only of a sample: the point, of a table a row of it

Of the `params` of a request, which only JSON has, `samples` asks for so many draws instead of the
energies of the rows (MLflow wants a row all the same); `seed` is theirs. They take what the
`sample` section of the experiment says: with its seed and count they are those of its stage.

Whatever is wrong with a request, MLflow answers 400 and why, with the row (from 1, the header not
counted) and the column. Requests may come side by side: energies draw no random numbers, and draws
wait for each other, WAIT seconds at most (then 429).

MLflow runs this file itself, from a copy beside the weights ("models from code"): nothing is ever
unpickled, and nothing of the checkout is needed, since `ebm` travels along. `threshold` and
`sample` are its model_config: SERVING_MODEL_CONFIG='{"threshold": 5}' serves another threshold.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import RESOURCE_EXHAUSTED
from mlflow.pyfunc import PythonModel, PythonModelContext

if TYPE_CHECKING:
    from torch import Tensor

    from ebm.data.transform import Transform

MOST_ROWS, MOST_SAMPLES = 10_000, 256  # in one request
WAIT = 30.0  # seconds that a draw waits for others


class Energy(PythonModel):
    """E(x) of a trained energy-based model, on the CPU, and what it flags."""

    def load_context(self, context: PythonModelContext) -> None:
        import torch

        from ebm import trained

        weights, config = Path(context.artifacts["weights"]), Path(context.artifacts["config"])
        self.model = trained.read(weights, config, torch.device("cpu"))
        self.threshold = _threshold(context.model_config["threshold"])
        self.drawing = context.model_config["sample"]
        self.turn = threading.Lock()

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """The answer to an array [B, *shape] or [B, D], or to a table.

        From the hint np.ndarray MLflow concludes nothing: the logged signature decides what it
        lets through.
        """
        asked = {"samples": 0, "seed": 0} | {k: v for k, v in (params or {}).items() if v}
        _check_count("samples", asked["samples"], MOST_SAMPLES)
        points = self._points(model_input)
        if not asked["samples"]:
            return self._answer(points)
        drawn = self._draw(asked["samples"], asked["seed"])
        transform = self.model.transform
        if transform is None:
            return self._answer(drawn).assign(sample=drawn.tolist())
        rows = transform.decode(drawn)
        samples: Any = rows.to_dict("records")
        return self._answer(self._points(rows)).assign(sample=samples)

    def _answer(self, points: "Tensor") -> pd.DataFrame:
        energy = self._energies(points)
        anomaly = None if self.threshold is None else energy >= self.threshold
        return pd.DataFrame({"energy": energy, "anomaly": anomaly})

    def _energies(self, points: "Tensor") -> np.ndarray:
        """[B], float64."""
        from ebm import EBMError

        try:
            energy = self.model.energies(points)
        except EBMError as error:
            _refuse(str(error))
        if (wrong := ~np.isfinite(energy)).any():
            _refuse(f"row {wrong.argmax() + 1}: its energy is {energy[wrong][0]}")
        return energy

    def _draw(self, count: int, seed: int) -> "Tensor":
        """`count` samples, which depend on the seed and the count and on nothing else."""
        import torch

        from ebm import seeds

        with self._alone(), torch.random.fork_rng(devices=[]):
            seeds.seed("sample", seed)
            drawn = self.model.network.sample(count, **self.drawing)["samples"].detach()
        if not len(drawn):
            _refuse("samples: this model only scores, it draws none")
        return drawn

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self.turn.acquire(timeout=WAIT):
            raise MlflowException(
                "samples: others are being drawn; again later", RESOURCE_EXHAUSTED
            )
        try:
            yield
        finally:
            self.turn.release()

    def _points(self, given: Any) -> "Tensor":
        """Points float32 [B, *shape] of a request."""
        import torch

        _check_rows(given)
        transform = self.model.transform
        if transform is None:
            points = torch.from_numpy(_numbers(given, self.model.shape))
            if (row := self.model.first_strange(points)) is not None:
                _refuse(f"row {row + 1}: has greys; the model knows 0 and 1 alone")
            return points
        from ebm import EBMError
        from ebm.data.transform import FIRST_ROW, warn_of_unseen

        first = 1 - FIRST_ROW  # so that messages count the rows from 1
        try:
            rows = given.set_axis(pd.RangeIndex(first, first + len(given)))
            rows = _without_padding(rows, transform)
            points, unseen = transform.encode(rows, "input")
        except EBMError as error:
            _refuse(str(error))
        warn_of_unseen(unseen, "input")
        return points


def _without_padding(rows: pd.DataFrame, transform: "Transform") -> pd.DataFrame:
    """The rows with no blanks before a category that is known without them: MLflow keeps those
    behind a comma of a CSV file, where preparation and `pipelines.score` skip them."""
    for column in transform.columns:
        if column.kind == "categorical" and column.name in rows:
            known, cells = set(column.categories), rows[column.name]
            bare = cells.map(lambda cell: str(cell).lstrip(" "))
            texts = cells.map(lambda cell: isinstance(cell, str))
            padded = texts & bare.isin(known) & ~cells.isin(known)
            rows = rows.assign(**{column.name: cells.mask(padded, bare)})
    return rows


def _numbers(given: "np.ndarray | pd.DataFrame", shape: tuple[int, ...]) -> np.ndarray:
    """Numbers float32 [B, *shape] of an array or a table of them."""
    values = np.asarray(given)
    if values.ndim < 2 or values.shape[1:] not in (shape, (math.prod(shape),)):
        _refuse(f"expected rows of shape {list(shape)}, not an array of {list(values.shape)}")
    cells = values.reshape(len(values), math.prod(shape))
    if cells.dtype.kind not in "biuf":  # what is text in them becomes NaN
        texts = pd.Series(cells.ravel(), dtype=object)
        cells = pd.to_numeric(texts, errors="coerce").to_numpy(np.float64).reshape(cells.shape)
    with np.errstate(over="ignore"):
        numbers = cells.astype(np.float32)
    if (wrong := ~np.isfinite(numbers)).any():
        row, column = np.argwhere(wrong)[0]
        cell = str(values.reshape(wrong.shape)[row, column])[:40]
        _refuse(f"row {row + 1}, number {column + 1} = {cell!r}: no finite number of float32")
    return numbers.reshape(len(numbers), *shape)


def _check_rows(given: Any) -> None:
    """Refuse too many rows, and rows with names: where one of a CSV file has more cells than the
    header, pandas takes the first ones for those."""
    _check_count("rows", len(given) if np.ndim(given) else 1, MOST_ROWS)
    if isinstance(given, pd.DataFrame) and not given.index.equals(pd.RangeIndex(len(given))):
        problem = "rows are not numbered from 0; give them no index"
        _refuse(f"{problem}, and no row of a CSV file more cells than the header")


def _check_count(what: str, count: int, most: int) -> None:
    if not 0 <= count <= most:
        _refuse(f"{count} {what}: expected 0 to {most} in one request")


def _threshold(value: Any) -> float | None:
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
        _refuse(f"threshold = {value!r}: expected a finite number or null")
    return value


def _refuse(problem: str) -> NoReturn:
    """What is wrong with a request goes back with status 400, named as MLflow names it itself."""
    raise MlflowException.invalid_parameter_value(problem, error_class="SCHEMA_ENFORCEMENT_FAILED")


set_model(Energy())
