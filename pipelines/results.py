"""What an experiment left in `models/<experiment>/`, read and checked without importing torch."""

import csv
import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FiniteFloat,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ebm import EBMError

T = TypeVar("T")

COMPARISON = "samplers"
"""The stage that compares them, its section of params.yaml, its folder and its numbers."""

History = dict[str, list[float]]
"""The training curves: `step` first, then one column per scalar; NaN where nothing was logged. Of
a model that was fitted without steps there is nothing but an empty `step`."""


class Provenance(BaseModel):
    """`run.json`: where the numbers come from."""

    model_config = ConfigDict(frozen=True)

    seed: int
    threads: int
    device: str
    git_commit: str
    git_dirty: bool
    params_sha256: str
    started: str
    seconds: FiniteFloat
    python: str
    torch: str
    tracking_key: str
    mlflow_run_id: str | None


class Record(Provenance):
    """Provenance of a training."""

    variant: str
    dataset: str
    data_sha256: str
    restarts: int


class Line(BaseModel):
    """A sampler on a target, as `ebm.comparison` explains it; None: it has no such number."""

    model_config = ConfigDict(frozen=True)

    oracle: str
    kernel: str
    step_size: float | None
    cost: float
    acceptance: float | None
    swaps: float | None
    round_trips: float | None
    error: float
    ess: float
    r_hat: float | None
    tau: float | None
    diverged: float


def _number(value: Any) -> float:
    """A whole one stays what it is."""
    if isinstance(value, float) or (type(value) is int and abs(value) < 2**63):
        return value
    raise PydanticCustomError("number", "expected a number")


def _finite(value: Any) -> float:
    if math.isfinite(_number(value)):
        return value
    raise PydanticCustomError("finite", "expected a finite number")


class Reference(BaseModel):
    """What a number is held against."""

    model_config = ConfigDict(frozen=True)

    value: Annotated[float, PlainValidator(_finite)]
    kind: Literal["exact", "floor", "ceiling", "chance", "published", "baseline"]
    source: str


class Listing(BaseModel):
    """A figure as `figures.json` lists it; `file` is relative to that file."""

    file: str
    title: str
    caption: str


@dataclass(frozen=True)
class Picture:
    """A PNG file with the words that go with it. Width and height in pixels."""

    name: str
    title: str
    caption: str
    png: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Result:
    """One experiment. `settings` is its part of params.yaml, `data` that of its data set."""

    name: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    record: Record
    history: History
    metrics: dict[str, float]
    references: dict[str, list[Reference]]
    pictures: list[Picture]


@dataclass(frozen=True)
class Comparison:
    """Comparison of the samplers. `settings` is its section of params.yaml."""

    settings: Mapping[str, Any]
    record: Provenance
    metrics: dict[str, float]
    table: list[Line]
    pictures: list[Picture]


def _stages(name: str, params: Mapping[str, Any]) -> list[str]:
    """The stages that results of an experiment, or of COMPARISON, come from."""
    if name == COMPARISON:
        return [COMPARISON]
    data = params["experiments"][name]["dataset"]
    own = [f"{stage}@{name}" for stage in ("train", "sample", "evaluate")]
    return [f"prepare@{data}", f"reference@{data}", *own]


@dataclass(frozen=True)
class Used:
    """What a stage was run with last: parameters by their dotted keys, and the checksums of what
    it read and what it made, by path."""

    params: Mapping[str, Any]
    read: Mapping[str, str]
    made: Mapping[str, str]


def used(lock: Path) -> dict[str, Used]:
    """What a `dvc.lock` says of that, by stage: nothing of one that DVC did not run."""
    try:
        stages = YAML(typ="safe").load(lock.read_text(encoding="utf-8"))["stages"]
        return {name: _used(entry) for name, entry in stages.items()}
    except FileNotFoundError:
        return {}
    except (YAMLError, OSError, ValueError) as error:
        raise EBMError(f"{lock}: cannot be read: {' '.join(str(error).split())}") from None
    except (KeyError, TypeError, AttributeError):
        raise EBMError(f"{lock}: cannot be read: not as DVC writes it") from None


def _used(entry: Mapping[str, Any]) -> Used:
    files = entry.get("params", {}).values()
    read, made = (
        {one["path"]: one["md5"] for one in entry.get(side, []) if "md5" in one}
        for side in ("deps", "outs")
    )
    return Used(dict(ChainMap(*files)), read, made)


def outdated(name: str, used: Mapping[str, Used], params: Mapping[str, Any]) -> bool:
    """Whether results of an experiment, or of COMPARISON, were made with parameters other than
    `params`, the whole of params.yaml, or measured on another training than lies there now."""
    ran = [used[stage] for stage in _stages(name, params) if stage in used]
    own = f"models/{name}/"
    made = {path: md5 for one in ran for path, md5 in one.made.items() if path.startswith(own)}
    return any(
        any(_at(params, key) != value for key, value in one.params.items())
        or any(made.get(path, md5) != md5 for path, md5 in one.read.items())
        for one in ran
    )


def _at(params: Any, key: str) -> Any:
    """What stands at a dotted key; None if nothing does."""
    for part in key.split("."):
        params = (params or {}).get(part)
    return params


_METRICS = TypeAdapter(dict[str, Annotated[float, PlainValidator(_number)]])
_REFERENCES = TypeAdapter(dict[str, list[Reference]])
_LISTINGS = TypeAdapter(list[Listing])


def read(models: Path, name: str, params: Mapping[str, Any]) -> Result:
    """The results of experiment `name` of `params`, the whole of params.yaml as plain mappings.

    EBMError names the first file that is missing or cannot be used, and the stage that makes it.
    """
    folder, train, evaluate = models / name, f"train@{name}", f"evaluate@{name}"
    settings = params["experiments"][name]
    record = _json(folder / "run.json", TypeAdapter(Record), train)
    measured = _json(folder / "evaluation" / "metrics.json", _METRICS, evaluate)
    listings = _json(folder / "evaluation" / "figures.json", _LISTINGS, evaluate)
    return Result(
        name=name,
        settings=settings,
        data=params["datasets"][settings["dataset"]],
        record=record,
        history=_history(folder / "history.csv", train),
        metrics={**measured, "seconds": record.seconds},
        references=_json(folder / "evaluation" / "references.json", _REFERENCES, evaluate),
        pictures=[_picture(folder / "evaluation", one, evaluate) for one in listings],
    )


def read_comparison(models: Path, params: Mapping[str, Any]) -> Comparison | None:
    """The comparison of samplers, if `params` has one; errors as those of `read`."""
    if params.get(COMPARISON) is None:
        return None
    folder = models / COMPARISON
    record = _json(folder / "run.json", TypeAdapter(Provenance), COMPARISON)
    listings = _json(folder / "figures.json", _LISTINGS, COMPARISON)
    return Comparison(
        settings=params[COMPARISON],
        record=record,
        metrics=_json(folder / "metrics.json", _METRICS, COMPARISON) | {"seconds": record.seconds},
        table=_json(folder / "table.json", TypeAdapter(list[Line]), COMPARISON),
        pictures=[_picture(folder, one, COMPARISON) for one in listings],
    )


def _unusable(path: Path, problem: object, stage: str) -> EBMError:
    return EBMError(f"{path}: {problem}; run stage {stage} again")


def _bytes(path: Path, stage: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(path, error.strerror, stage) from None


def _json(path: Path, form: TypeAdapter[T], stage: str) -> T:
    content = _bytes(path, stage)
    try:
        return form.validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        problem = f"{where}: {first['msg']}" if where else first["msg"]
        raise _unusable(path, problem, stage) from None


def _history(path: Path, stage: str) -> History:
    text = _bytes(path, stage).decode("utf-8", errors="replace")
    try:
        names, *rows = list(csv.reader(text.splitlines())) or [[]]
    except csv.Error as error:
        raise _unusable(path, error, stage) from None
    if names[:1] != ["step"] or (names[1:] and not rows):
        raise _unusable(path, "expected a header that begins with `step`, and rows", stage)
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            problem = f"line {number} has {len(row)} of {len(names)} columns"
            raise _unusable(path, problem, stage)
    try:
        columns = zip(*([float(cell or math.nan) for cell in row] for row in rows), strict=True)
    except ValueError as error:
        raise _unusable(path, error, stage) from None
    history = dict(zip(names, map(list, columns), strict=True)) if rows else {"step": []}
    if not all(map(math.isfinite, history["step"])):
        raise _unusable(path, "a step that is no number", stage)
    return history


def _picture(folder: Path, listing: Listing, stage: str) -> Picture:
    path = folder / listing.file
    png = _bytes(path, stage)
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[-8:-4] != b"IEND":
        raise _unusable(path, "not a complete PNG file", stage)
    width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))
    return Picture(path.stem, listing.title, listing.caption, png, width, height)
