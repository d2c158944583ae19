"""CSV files: the rows of any, and a user's as a data set."""

import hashlib
import logging
import lzma
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ebm import EBMError
from ebm.data.made import Made
from ebm.data.own import check_room, refuse_links
from ebm.data.shares import by_class, repeated
from ebm.data.transform import (
    MISSING,
    Transform,
    fit,
    listed,
    numbers_of,
    present,
    short,
    warn_of_lost_digits,
    warn_of_unseen,
)
from ebm.schema import TableData

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)

COPIES = 3
"""Copies of a table in memory: all rows, the splits, and what is written of them."""


def header(path: Path) -> list[str]:
    """The names of the columns of a CSV file; EBMError if it cannot be read or a name occurs
    twice. A column without a name has the one that pandas gives it."""
    import pandas as pd

    if not path.is_file():
        problem = "no regular file, and it is read twice" if path.exists() else "no such file"
        raise EBMError(f"{path}: {problem}")
    options: dict[str, Any] = {"header": None, "nrows": 1, "dtype": str, "skipinitialspace": True}
    options["keep_default_na"] = False
    with _reading(path):
        first = pd.read_csv(path, **options).iloc[0]
    names = [name or f"Unnamed: {number}" for number, name in enumerate(first)]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise EBMError(f"{path}: more than one column {listed(twice)}")
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise EBMError(f"{path}: one column {short(names[0])}; cells are separated by commas")
    if len(names) == 1 and _begins_empty(path, options):
        raise EBMError(f"{path}: begins with an empty line; expected the name of its one column")
    if all(map(_is_number, names)):
        log.warning("%s: its first line is taken for names of columns, and is all numbers", path)
    return names


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _begins_empty(path: Path, options: dict[str, Any]) -> bool:
    """Whether a file of one column has an empty line before its header, which would be taken for
    it where empty lines count."""
    import pandas as pd
    from pandas.errors import EmptyDataError

    try:
        first = pd.read_csv(path, **options, skip_blank_lines=False)
    except EmptyDataError:
        return True
    return not first.iloc[0, 0]


def chunks(
    path: Path, names: Sequence[str], text: Collection[str], rows: int | None = None
) -> "Iterator[DataFrame]":
    """The rows of a CSV file whose `header` is `names`, `rows` at a time (all if None), the
    columns `text` as they are written, the others as numbers wherever they are some; the index
    counts rows from 0.

    Raises EBMError naming the file if it is no table, or has no rows.
    """
    import pandas as pd

    alone: dict[str, Any] = {}
    if len(names) == 1:  # then an empty line is an empty cell
        alone = {"skip_blank_lines": False, "header": 0, "names": list(names)}
    count = 0
    with _reading(path):
        reader = pd.read_csv(
            path,
            chunksize=rows or 2**62,
            dtype=dict.fromkeys(text, "str"),
            keep_default_na=False,
            na_values=MISSING,
            skipinitialspace=True,
            index_col=False,
            **alone,
            low_memory=False,  # the type of a column is that of a chunk, not of a piece of it
        )
    with reader:
        while True:
            with _reading(path):
                frame = next(reader, None)
            if frame is None or not len(frame):
                break
            count += len(frame)
            yield _with_gaps(frame, text)
    if not count:
        raise EBMError(f"{path}: no rows below the header")


def _with_gaps(frame: "DataFrame", text: Collection[str]) -> "DataFrame":
    """A chunk in whose columns other than `text` what is MISSING is none: where whole numbers go
    beyond 63 bits, pandas gives a column with gaps as it is written, gaps and all."""
    for name in frame.columns.difference(list(text)):
        if frame[name].dtype.kind not in "biuf":
            frame[name] = frame[name].mask(frame[name].isin(MISSING))
    return frame


UNPACKED = (ImportError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
UNREADABLE = (OSError, ValueError, EOFError, AssertionError, tarfile.TarError, *UNPACKED)
"""What pandas raises of a file that is no table, or that cannot be unpacked (AssertionError: what
lies in a tar archive is no file)."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What can go wrong with a file, in one line."""
    from pandas.errors import ParserWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)
            yield
    except ParserWarning:
        raise EBMError(f"{path}: not a table: rows have more cells than the header") from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} is none of UTF-8's"
        raise EBMError(f"{path}: not UTF-8 ({byte}); save it as CSV in UTF-8") from None
    except UNREADABLE as error:
        problem = " ".join(str(error).split())[:200]
        raise EBMError(f"{path}: cannot be read as a CSV table ({problem})") from None


def prepare(settings: TableData) -> Made:
    """A user's table, split at random by `seed`, each class (if there is a label) in the same
    shares. Only rows that count as normal are trained on; the anomalies of the rest are not used.

    The notes: rows that were `dropped` for an empty cell, test rows that are `repeated` in train
    (if any are), `anomalies` by split, and those that are `unused`; without label the first two.
    """
    import pandas as pd

    path = Path(settings.path)
    refuse_links(*path.parents)
    names = header(path)
    _check_names(settings, names)
    others = [*settings.ignore, *([settings.label] if settings.label else [])]
    frame = pd.concat(chunks(path, names, [*settings.categorical, *others]))
    frame, dropped = _checked(frame, settings, str(path))
    anomaly = _anomalies(frame, settings)
    index = split(anomaly, settings)
    train = frame.iloc[index["train"].numpy()]
    categorical, missing = settings.categorical, settings.missing
    transform = fit(train, categorical, settings.scale, str(path), missing, others)
    _check_room(len(frame), transform, str(path))
    points, unseen = transform.encode(frame, str(path))
    warn_of_unseen(unseen, str(path))
    rows = torch.from_numpy(frame.index.to_numpy(copy=True))
    tensors = {name: points[which] for name, which in index.items()}
    tensors |= {f"{name}_index": rows[which] for name, which in index.items()}
    notes: dict[str, Any] = {"dropped": dropped} | repeated(tensors, str(path), "rows")
    if settings.label:
        tensors |= labels(anomaly, index)
        notes |= counts(anomaly, index)
    source = f"{path}, sha256 {_digest(path)}"
    return Made(source, tensors, notes=notes, transform=transform.to_json())


def _check_room(rows: int, transform: Transform, source: str) -> None:
    """EBMError if the points, and the copies of them that are made on their way, are more than the
    memory of this machine."""
    widest = max(transform.columns, key=lambda column: column.width)
    check_room(
        COPIES * rows * transform.width * 4,
        f"{source}: {rows} rows of {transform.width} numbers",
        f"column {short(widest.name)} takes {widest.width} of them",
    )


def _check_names(settings: TableData, names: list[str]) -> None:
    """EBMError if the file lacks a column that the settings name, or a column lacks a name."""
    label = [settings.label] if settings.label else []
    wanted = {"label": label, "categorical": settings.categorical, "ignore": settings.ignore}
    for key, columns in wanted.items():
        if lacking := [name for name in columns if name not in names]:
            has = listed(names)
            raise EBMError(f"{settings.path}: {key}: no column {listed(lacking)}; it has {has}")
    nameless = [name for name in names if name.startswith("Unnamed: ")]
    if left := [name for name in nameless if name not in settings.ignore]:
        advice = f"give it one, or ignore it as {left[0]!r}"
        raise EBMError(f"{settings.path}: a column has no name; {advice}")
    if not set(names) - {*settings.ignore, *label}:
        raise EBMError(f"{settings.path}: no column is left for the model to see")


def _checked(frame: "DataFrame", settings: TableData, source: str) -> tuple["DataFrame", int]:
    """The rows that are kept, their numbers as such, and how many rows are not: those with an
    empty cell, if they may be. EBMError names the first cell that cannot be used."""
    used = frame.drop(columns=settings.ignore)
    empty = used.isna()
    complete = ~empty.any(axis=1)
    dropped, by_column = int((~complete).sum()), empty.sum()
    if settings.missing == "drop" and dropped:
        if dropped == len(used):
            worst = str(by_column.idxmax())
            where = f"column {worst!r} is empty in {int(by_column[worst])}"
            raise EBMError(f"{source}: no row is left: {where} of {dropped}")
        most = by_column.nlargest(3)
        where = ", ".join(f"{short(name)} {count}" for name, count in most.items() if count)
        told = "%s: %d rows with an empty cell are left out; most are empty in %s"
        log.warning(told, source, dropped, where)
        used = used[complete]
    columns = {str(name): present(used[name], source) for name in used}
    numeric = set(columns) - {*settings.categorical, settings.label}
    numbers = {name: numbers_of(columns[name], source) for name in columns if name in numeric}
    used = used.copy()
    for name, values in numbers.items():
        warn_of_lost_digits(columns[name], values, source)
        used[name] = values
    return used, dropped


def _anomalies(frame: "DataFrame", settings: TableData) -> Tensor:
    """Which rows do not count as normal: bool [N]; none where there is no label."""
    if settings.label is None:
        return torch.zeros(len(frame), dtype=torch.bool)
    values = present(frame[settings.label], settings.path)
    found = list(values.unique())
    where = f"{settings.path}: column {settings.label!r}"
    stripped = {name.strip() for name in settings.normal}
    if alike := [v for v in found if v not in settings.normal and str(v).strip() in stripped]:
        raise EBMError(f"{where}: {listed(alike)} differ from normal by blanks only")
    if absent := [name for name in settings.normal if name not in found]:
        raise EBMError(f"{where} is never {listed(absent)} (normal); it is {listed(found)}")
    anomalous = torch.from_numpy(~values.isin(settings.normal).to_numpy())
    if not anomalous.any():
        advice = "set label: null, normal: [], ignore the column and give evaluate.flagged"
        raise EBMError(f"{where}: no row is anomalous; {advice}")
    return anomalous


def split(anomaly: Tensor, settings: TableData) -> dict[str, Tensor]:
    """Rows of each split, in random order: of each class the shares `validation` and `test`, of
    what is not `anomaly` [N] the rest to train on. EBMError if a class is too small for that."""
    kinds = ("normal", "anomalous") if settings.label else ("complete",)
    told = {number: (settings.path, f"{kind} rows") for number, kind in enumerate(kinds)}
    shares = settings.validation, settings.test
    return by_class(anomaly.long(), told, *shares, settings.seed, unlearned=[1])


def splits(
    frame: "DataFrame",
    anomaly: Tensor,
    index: dict[str, Tensor],
    transform: Transform,
    source: str,
) -> dict[str, Tensor]:
    """The rows `index` of each split as points, with labels but for train, and these rows."""
    tensors = {f"{split}_index": rows for split, rows in index.items()}
    for split, rows in index.items():
        tensors[split], _ = transform.encode(frame.iloc[rows.numpy()], source)
    return tensors | labels(anomaly, index)


def labels(anomaly: Tensor, index: dict[str, Tensor]) -> dict[str, Tensor]:
    """`<split>_labels`, 1 for an anomaly, of the splits that hold some."""
    return {f"{s}_labels": anomaly[index[s]].long() for s in ("validation", "test")}


def counts(anomaly: Tensor, index: dict[str, Tensor]) -> dict[str, Any]:
    """How many anomalies are in which split, and in none."""
    found = {s: int(anomaly[index[s]].sum()) for s in ("validation", "test")}
    return {"anomalies": found, "unused": int(anomaly.sum()) - sum(found.values())}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
