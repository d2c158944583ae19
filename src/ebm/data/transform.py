"""Tables as points: numbers are scaled, categories become one column each, by a transform that is
fitted on training rows and kept with the data and with every model that is trained on them.

    cell                     becomes
    number, scale `minmax`   (x - low) / (high - low), by the bounds of the training rows and not
                             clipped beyond them; x - low (so 0 in training) where they are equal
                             but for rounding
    number, scale `log`      the same of sign(x) log(1 + |x|): for bytes, counts, sums of money, of
                             which a few large ones leave the others no room between the bounds
    number, scale `none`     itself
    category                 1 in its own column, 0 in those of the others; all 0 if it was never
                             fitted, which is counted and warned of
    empty, or NaN            an error, or the whole row is left out if `missing` is `drop`

Categories are compared as text (`0` is not `0.0`). Messages count rows as an editor does: the
header is row 1 (blank lines do not count, nor do line breaks within a cell).
"""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ebm import EBMError
from ebm.schema import Scale

if TYPE_CHECKING:
    from pandas import DataFrame, Series

log = logging.getLogger(__name__)

MISSING = ["", "nan", "NaN"]
MOST_CATEGORIES = 1000
"""A column with more is an identifier or free text, and would be as many columns."""
ADVICE = "a column of text belongs in categorical or ignore"
ROUNDING = 8
"""Bounds so many spacings of doubles apart are one number: 0.3 and 0.1 + 0.2, say."""
FIRST_ROW = 2
"""The row, as messages count, of what a frame has at index 0."""

Kind = Literal["numeric", "categorical"]


@dataclass(frozen=True)
class Column:
    """A column that the model sees: its `categories`, or the bounds of its numbers."""

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def width(self) -> int:
        """How many columns it becomes."""
        return len(self.categories) if self.kind == "categorical" else 1

    def scaled(self, numbers: np.ndarray, scale: Scale) -> np.ndarray:
        """Numbers [N] as `scale` has them, float32."""
        low, span = self._bounds(scale)
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is told of
            return ((_bent(numbers, scale) - low) / span).astype(np.float32)

    def unscaled(self, scaled: np.ndarray, scale: Scale) -> np.ndarray:
        """The numbers [N] that are `scaled` so."""
        low, span = self._bounds(scale)
        return _straight(low + scaled * span, scale)

    def _bounds(self, scale: Scale) -> tuple[float, float]:
        """What is taken from its numbers, and what they are divided by."""
        if scale == "none":
            return 0.0, 1.0
        bounds = _bent(np.array([self.low, self.high]), scale)
        low, high = bounds.tolist()
        rounding = ROUNDING * np.spacing(np.abs(bounds).max())
        return low, high - low if high - low > rounding else max(1.0, rounding)


def _bent(numbers: np.ndarray, scale: Scale) -> np.ndarray:
    """Numbers as they are scaled by their bounds."""
    return np.sign(numbers) * np.log1p(np.abs(numbers)) if scale == "log" else numbers


def _straight(bent: np.ndarray, scale: Scale) -> np.ndarray:
    """What was bent."""
    return np.sign(bent) * np.expm1(np.abs(bent)) if scale == "log" else bent


@dataclass(frozen=True)
class Transform:
    """Rows of a table to points: see the table in this module's docstring.

    Attributes:
        columns: what becomes a point, in the order in which it does.
        scale: `minmax`, `log` or `none`, of all numeric columns.
        missing: what becomes of a row with an empty cell.
        others: columns that the table may have and the model never sees, such as its label.
    """

    columns: tuple[Column, ...]
    scale: Scale
    missing: Literal["error", "drop"] = "error"
    others: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Dimension D of a point."""
        return sum(column.width for column in self.columns)

    @property
    def numeric(self) -> list[str]:
        """Names of the numeric columns."""
        return [column.name for column in self.columns if column.kind == "numeric"]

    def check(self, names: Sequence[str], source: str) -> None:
        """EBMError if a column is not among `names`, a warning if there are others; both name
        them."""
        known = [column.name for column in self.columns]
        if lacking := [name for name in known if name not in names]:
            raise EBMError(f"{source}: no column {listed(lacking)}; it has {listed(names)}")
        if extra := [name for name in names if name not in {*known, *self.others}]:
            log.warning("%s: columns that the model does not know: %s", source, listed(extra))

    def complete(self, frame: "DataFrame") -> np.ndarray:
        """Which rows have no empty cell in these columns: bool [N]."""
        return frame[[column.name for column in self.columns]].notna().all(axis=1).to_numpy()

    def encode(
        self, frame: "DataFrame", source: str, finite: bool = True
    ) -> tuple[Tensor, dict[str, int]]:
        """Points float32 [N, D] of the rows of `frame`, and by column how many of its categories
        were not fitted.

        Raises EBMError naming `source`, row and column of a cell that is empty or no number, or,
        if they are to be `finite`, beyond float32.
        """
        points = torch.zeros(len(frame), self.width)
        unseen: dict[str, int] = {}
        blocks = points.numpy()
        for column in self.columns:
            block, blocks = blocks[:, : column.width], blocks[:, column.width :]
            values = present(frame[column.name], source)
            if column.kind == "numeric":
                numbers = numbers_of(values, source, "as the model was fitted to numbers there")
                block[:, 0] = column.scaled(numbers, self.scale)
                if finite:
                    _finite(block[:, 0], values, source)
            elif unknown := _one_hot(column.categories, values, block):
                unseen[column.name] = unknown
        return points, unseen

    def far(self, points: Tensor) -> Tensor:
        """Which of the points [N, D] have a number that lies beyond its bounds in training by more
        than these are apart: bool [N]."""
        ends = []
        for column in self.columns:
            if column.kind == "categorical":
                ends += [(0.0, 1.0)] * column.width
            else:
                low, high = column.scaled(np.array([column.low, column.high]), self.scale).tolist()
                ends.append((low, high))
        low, high = torch.tensor(ends).T
        apart = torch.where(high > low, high - low, 1.0)
        return ((points < low - apart) | (points > high + apart)).any(1)

    def decode(self, points: Tensor) -> "DataFrame":
        """Rows of which `encode` makes `points` [N, D], up to rounding; for a category the largest
        of its columns counts."""
        import pandas as pd

        blocks = points.double().cpu().numpy()
        cells: dict[str, Any] = {}
        for column in self.columns:
            block, blocks = blocks[:, : column.width], blocks[:, column.width :]
            if column.kind == "categorical":
                cells[column.name] = [column.categories[i] for i in block.argmax(1)]
            else:
                cells[column.name] = column.unscaled(block[:, 0], self.scale)
        return pd.DataFrame(cells)

    def apply(self, frame: "DataFrame", source: str = "table") -> Tensor:
        """Points float32 [N, D] of a table whose columns are found by their names; unknown
        columns and categories are warned of. Raises EBMError as `check` and `encode` do."""
        self.check(list(frame.columns), source)
        points, unseen = self.encode(frame, source)
        warn_of_unseen(unseen, source)
        return points

    def to_json(self) -> dict[str, Any]:
        """Itself as what JSON knows."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, content: Any, source: str) -> "Transform":
        """What `to_json` made; EBMError naming `source` if it is something else."""
        try:
            columns = [c | {"categories": tuple(c["categories"])} for c in content["columns"]]
            lists = {"columns": tuple(Column(**c) for c in columns)}
            found = cls(**content | lists | {"others": tuple(content["others"])})
            if not found.columns or found.scale not in get_args(Scale):
                raise ValueError(f"{len(found.columns)} columns, scale {found.scale!r}")
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise EBMError(f"{source}: not a transform of a table ({error!r})") from None


def warn_of_unseen(unseen: dict[str, int], source: str) -> None:
    """A warning for each column with categories that were not fitted."""
    for name, count in unseen.items():
        log.warning("%s: column %r: %d rows with a category never fitted", source, name, count)


def fit(
    frame: "DataFrame",
    categorical: Collection[str],
    scale: Scale,
    source: str,
    missing: Literal["error", "drop"] = "error",
    others: Collection[str] = (),
    vocabulary: "DataFrame | None" = None,
) -> Transform:
    """The transform of all columns of `frame` but `others`, in their order, with the bounds and
    the categories (sorted) of its rows, or the categories of another frame, the `vocabulary`."""
    of = frame if vocabulary is None else vocabulary
    columns = []
    for name in (name for name in frame.columns if name not in others):
        if name in categorical:
            categories = sorted(present(of[name], source).astype(str).unique())
            if len(categories) > MOST_CATEGORIES:
                many = f"{len(categories)} categories, more than {MOST_CATEGORIES}"
                where = f"{source}: column {short(name)}"
                raise EBMError(f"{where}: {many}; ignore it, or group them")
            _warn_of_blanks(name, categories, source)
            columns.append(Column(name, "categorical", tuple(categories)))
        else:
            values = present(frame[name], source)
            numbers = _finite(numbers_of(values, source), values, source)
            columns.append(Column(name, "numeric", (), numbers.min().item(), numbers.max().item()))
            _warn_of_outlier(columns[-1], numbers, scale, source)
    return Transform(tuple(columns), scale, missing, tuple(others))


def _warn_of_blanks(name: str, categories: Sequence[str], source: str) -> None:
    """A warning if categories differ by nothing that can be seen."""
    stripped = [category.strip() for category in categories]
    if alike := [c for c, s in zip(categories, stripped, strict=True) if stripped.count(s) > 1]:
        told = f"{listed(alike)} differ by blanks only, and are categories of their own"
        log.warning("%s: column %s: %s", source, short(name), told)


EXACT = 2.0**53
"""Below it, and above its negative, float64 has every whole number."""
WHOLE = r"[+-]?[0-9]+"
"""Whole numbers in words: those of more than 64 bits are read as text."""


def warn_of_lost_digits(values: "Series", numbers: np.ndarray, source: str) -> None:
    """A warning if whole numbers that differ, as they were read, are one number in float64, in
    which they are `numbers`."""
    if values.dtype.kind == "f" or not len(values) or np.abs(numbers).max() < EXACT:
        return
    if values.dtype.kind not in "iu" and not values.astype(str).str.fullmatch(WHOLE).all():
        return
    if (after := len(np.unique(numbers))) < values.nunique():
        told = f"only {after} of {values.nunique()} different whole numbers stay different"
        advice = "they are too large for double precision; if they are names, ignore the column"
        where = f"{source}: column {short(str(values.name))}"
        log.warning("%s: %s: %s", where, told, advice)


def _warn_of_outlier(column: Column, numbers: np.ndarray, scale: Scale, source: str) -> None:
    """A warning if, in float32, cells become nearly one number: one is far from all others, or,
    where nothing is scaled, they are large and near one another."""
    before, after = (len(np.unique(cells)) for cells in (numbers, column.scaled(numbers, scale)))
    if after < before / 2:
        told = f"only {after} of {before} different numbers stay different"
        if scale == "none":
            why = "in single precision; scale: minmax keeps them apart"
        else:
            why = f"when scaled between {column.low:g} and {column.high:g}; is one of them a mark?"
        log.warning("%s: column %s: %s %s", source, short(column.name), told, why)


def present(values: "Series", source: str) -> "Series":
    """The cells of a column, if none is empty."""
    if (empty := values.isna().to_numpy()).any():
        raise EBMError(f"{_cell(values, empty, source)} is empty")
    return values


def numbers_of(values: "Series", source: str, advice: str = ADVICE) -> np.ndarray:
    """The cells of a column, none of them empty, as float64 [N]; EBMError names one that is no
    number, with the `advice`."""
    import pandas as pd

    if values.dtype.kind in "iuf":
        return values.to_numpy(np.float64)
    numbers = pd.to_numeric(values.astype(str), errors="coerce").to_numpy(np.float64)
    if (text := np.isnan(numbers)).any():
        cell = f"{_cell(values, text, source)} = {short(values[text].iloc[0])}"
        missing = f"nothing but an empty cell or {MISSING[-1]} counts as missing"
        raise EBMError(f"{cell}: not a number, {advice}; {missing}")
    return numbers


def _finite(numbers: np.ndarray, values: "Series", source: str) -> np.ndarray:
    """`numbers`, made of `values`, if all of them are finite."""
    if (wrong := ~np.isfinite(numbers)).any():
        cell = f"{_cell(values, wrong, source)} = {short(values[wrong].iloc[0])}"
        raise EBMError(f"{cell}: too large for float32, or no finite number")
    return numbers


def _one_hot(categories: tuple[str, ...], values: "Series", block: np.ndarray) -> int:
    """Set the 1s in `block` [N, len(categories)]; how many values are none of `categories`."""
    import pandas as pd

    codes = pd.Index(categories, dtype=str).get_indexer(pd.Index(values.astype(str)))
    rows = np.flatnonzero(codes >= 0)
    block[rows, codes[rows]] = 1.0
    return len(values) - len(rows)


def _cell(values: "Series", wrong: np.ndarray, source: str) -> str:
    """Where the first wrong cell of a column is; a row of a frame that counts in another way has
    the name it has there."""
    row = values.index[wrong][0]
    number = row + FIRST_ROW if isinstance(row, int | np.integer) else repr(row)
    return f"{source}: row {number}, column {short(values.name)}"


def listed(names: Sequence[Any], most: int = 8) -> str:
    shown = ", ".join(map(short, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def short(value: object) -> str:
    text = repr(str(value))
    return text if len(text) <= 40 else f"{text[:37]}..."
