"""Results in, the words, numbers and lines of the report's page out. Opens only its template."""

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ebm.params import dotted
from ebm.schema import COMPANIONS, ORACLE_TITLES
from pipelines.results import Comparison, History, Line, Picture, Reference, Result
from pipelines.typeset import duration, measured, number, template
from pipelines.words import (
    AREAS,
    DATA,
    EQUILIBRIA,
    KINDS,
    METRICS,
    SAMPLERS,
    VARIANTS,
    Metric,
    beside,
    method,
    metric,
)


@dataclass(frozen=True)
class Row:
    """A metric of one experiment; `estimates` (that err low and high), `generator` (before MCMC)
    and `gradient` (by the norm of the gradient as score) are empty where there is none."""

    name: str
    metric: Metric
    value: str
    exact: float
    estimates: str
    generator: str
    gradient: str
    references: Sequence[Reference]
    gradient_references: Sequence[Reference]


@dataclass(frozen=True)
class Curve:
    """A training scalar as a line in a box of WIDTH x HEIGHT; ticks are (position, text). `level`:
    where its equilibrium lies, None where it has none."""

    name: str
    path: str
    level: float | None
    ticks: Sequence[tuple[float, str]]
    last: str
    summary: str


WIDTH, HEIGHT = 210, 92
HIGHEST = 1e300
"""What is higher has no place in a curve: the way to it from below zero would be infinite."""


def render(
    results: Sequence[Result],
    comparison: Comparison | None = None,
    folder: str = ".",
) -> str:
    """The page, self-contained: styles inline, images as data URIs, no script. `folder` is that of
    the checkout in which its params.yaml lies."""
    tables = {result.name: rows(result) for result in results}
    shown = {name for table in tables.values() for name in table}
    if any(classes(result) for result in results):
        shown |= {area.split("_")[0] for area in AREAS}
    kinds = {r.kind for result in results for refs in result.references.values() for r in refs}
    filters: dict[str, Callable[..., str]] = {
        "held_against": held_against,
        "method": method,
        "data_uri": data_uri,
    }
    return template("report.html.j2", filters).render(
        results=results,
        tables=tables,
        groups=list(groups(results, tables)),
        matrices={
            r.name: matrix(r.record.dataset, [r], list(AREAS)) for r in results if classes(r)
        },
        curves={r.name: curves(r.history, EQUILIBRIA.get(r.record.variant)) for r in results},
        beside={r.name: beside(r.record.variant) for r in results},
        settings={result.name: dotted(_settings(result)) for result in results},
        glossary=[metric for name, metric in METRICS.items() if name in shown],
        kinds={kind: text for kind, text in KINDS.items() if kind in kinds},
        lanes=lanes(results),
        comparison=comparison,
        bench=by_oracle(comparison.table) if comparison else {},
        bench_columns=SAMPLERS,
        bench_settings=dotted(comparison.settings) if comparison else {},
        prefix="" if folder == "." else f"{folder}/",
        variants=VARIANTS,
        width=WIDTH,
        height=HEIGHT,
    )


def rows(result: Result) -> dict[str, Row]:
    """All metrics of an experiment in the order of METRICS, what is not listed there last, without
    those of single classes."""
    names = [
        name
        for name in result.metrics
        if not _companion(name, result.metrics) and _area(name) is None
    ]
    known = [name for name in METRICS if name in names]
    other = [name for name in names if name not in known]
    return {name: _row(result, name) for name in known + other}


def _companion(name: str, metrics: Mapping[str, float]) -> bool:
    return any(name.endswith(end) and name.removesuffix(end) in metrics for end in COMPANIONS)


def _row(result: Result, name: str) -> Row:
    numbers = result.metrics
    low, high = numbers.get(f"{name}_lower"), numbers.get(f"{name}_upper")
    generator, gradient = f"{name}_generator", f"{name}_gradient"
    return Row(
        name=name,
        metric=metric(name),
        value=_value(numbers, name),
        exact=numbers[name],
        estimates="" if low is None or high is None else _estimates(low, high),
        generator=_value(numbers, generator) if generator in numbers else "",
        gradient=_value(numbers, gradient) if gradient in numbers else "",
        references=result.references.get(name, ()),
        gradient_references=result.references.get(gradient, ()),
    )


def _estimates(low: float, high: float) -> str:
    """Both, with as many digits as tell them apart."""
    forms = (f"#.{digits}g" for digits in range(4, 9))
    form = next((f for f in forms if number(low, f) != number(high, f)), "#.8g")
    return f"{number(low, form)} and {number(high, form)}"


def _value(numbers: Mapping[str, float], name: str) -> str:
    """The number with what belongs to it: a total, a spread."""
    if name == "seconds":
        return duration(numbers[name])
    stem = name.removesuffix("_generator")
    total, spread = numbers.get(f"{stem}_total"), numbers.get(f"{name}_std")
    text = measured(numbers[name])
    text += f" / {number(total)}" if total is not None else ""
    return text + (f" ± {_spread(spread)}" if spread is not None else "")


def _spread(value: float) -> str:
    """Two significant digits."""
    return f"{value:#.2g}".rstrip(".") if 1e-4 <= value < 99.5 else number(value)


LIKELIHOODS = {
    name: METRICS[name]
    for name in (
        *("log_likelihood", "bits_per_dim", "grid_kl", "outside", "log_density_mse"),
        *("log_partition", "log_partition_left", "log_partition_ess"),
    )
}
"""What says how good a model is as a density."""


@dataclass(frozen=True)
class Group:
    """Experiments on one kind of data: a table of the metrics `columns`, or, where they are
    measured class by class, a matrix for each data set."""

    title: str
    columns: Mapping[str, Metric]
    members: Sequence[Result]
    matrices: Sequence["Matrix"]


def groups(results: Sequence[Result], tables: Mapping[str, Mapping[str, Row]]) -> Iterator[Group]:
    """Experiments on one kind of data belong together, those on one data set below each other."""
    overview = [area for area in AREAS if area.startswith("auprc")]
    for kind in dict.fromkeys(result.data["kind"] for result in results):
        members = [result for result in results if result.data["kind"] == kind]
        datasets = by_dataset(members)
        ordered = [result for several in datasets.values() for result in several]
        present = {name for result in members for name in tables[result.name]}
        columns = {n: m for n, m in METRICS.items() if m.overview and n in present}
        matrices = [
            matrix(dataset, several, overview)
            for dataset, several in datasets.items()
            if any(classes(result) for result in several)
        ]
        yield Group(DATA.get(kind, str(kind).capitalize()), columns, ordered, matrices)
    known = [result for result in results if tables[result.name].keys() & LIKELIHOODS.keys()]
    if known:
        columns = {n: m for n, m in LIKELIHOODS.items() if any(n in tables[r.name] for r in known)}
        yield Group("Densities of all families", columns, known, [])


def by_dataset(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Experiments by the name of their data set."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.record.dataset, []).append(result)
    return found


@dataclass(frozen=True)
class Cell:
    """A number of one class; `low` if scores that know nothing have a higher one."""

    value: str
    spread: str
    exact: float
    low: bool


@dataclass(frozen=True)
class MatrixRow:
    """Numbers by class: those of the experiment `name`, or, without a name, a reference."""

    name: str
    title: str
    note: str
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class Matrix:
    """What is measured class by class: `blocks` of rows by their titles, a column for each
    class."""

    title: str
    columns: Sequence[str]
    blocks: Mapping[str, Sequence[MatrixRow]]


def matrix(title: str, results: Sequence[Result], areas: Sequence[str]) -> Matrix:
    """The `areas` of experiments on one data set, the references beneath them."""
    found = {name for result in results for name in classes(result)}
    columns = [*sorted(found - {"mean"}, key=lambda c: (len(c), c)), "mean"]
    blocks = {area: list(_block(area, results, columns)) for area in areas}
    return Matrix(title, columns, {AREAS[area]: rows for area, rows in blocks.items() if rows})


def classes(result: Result) -> list[str]:
    """Classes of which something is measured on their own, and `mean`."""
    areas = {name: _area(name) for name in result.metrics}
    found = [name.removeprefix(f"{area}_") for name, area in areas.items() if area]
    return [name for name in dict.fromkeys(found) if name == "mean" or name.isdecimal()]


def _area(name: str) -> str | None:
    """Which of AREAS the metric `name` is, if it is that of a class."""
    return next((area for area in AREAS if name.startswith(f"{area}_")), None)


def _block(area: str, results: Sequence[Result], columns: Sequence[str]) -> Iterator[MatrixRow]:
    chance = _referred(area, results, columns, "chance")
    for result in results:
        for end, note in (("", ""), ("_gradient", "norm of gradient")):
            names = [f"{area}_{column}{end}" for column in columns]
            cells = list(map(partial(_cell, result.metrics), names, chance))
            if any(cells):
                yield MatrixRow(result.name, result.name, _noted(result, note), cells)
    for result in results:
        yield from _reference_row("published", _noted(result), area, [result], columns)
    for kind in ("chance", "floor"):
        yield from _reference_row(kind, "", area, results, columns)


def _noted(result: Result, note: str = "") -> str:
    """The method, in short, and what else is to be said of a row."""
    name = method(result.record.variant)
    return f"{name}, {note}" if note else name


def _reference_row(
    kind: str, note: str, area: str, results: Sequence[Result], columns: Sequence[str]
) -> Iterator[MatrixRow]:
    """The references of a kind, if there are any."""
    form = number if kind == "published" else _decimals
    values = _referred(area, results, columns, kind)
    cells = [None if v is None else Cell(form(v), "", v, False) for v in values]
    if any(cells):
        yield MatrixRow("", kind, note, cells)


def _referred(
    area: str, results: Sequence[Result], columns: Sequence[str], kind: str
) -> list[float | None]:
    """The first reference of a kind that any of the experiments has, by column."""
    return [
        next(
            (
                reference.value
                for result in results
                for reference in result.references.get(f"{area}_{column}", ())
                if reference.kind == kind
            ),
            None,
        )
        for column in columns
    ]


def _cell(numbers: Mapping[str, float], name: str, chance: float | None) -> Cell | None:
    if name not in numbers:
        return None
    value, spread = numbers[name], numbers.get(f"{name}_std")
    text = f"± {spread:.3f}" if spread is not None else ""
    return Cell(_decimals(value), text, value, chance is not None and value < chance)


def _decimals(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "undefined"


def by_oracle(table: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines of one target belong in one table, under its title."""
    tables: dict[str, list[Line]] = {}
    for line in table:
        tables.setdefault(ORACLE_TITLES.get(line.oracle, line.oracle), []).append(line)
    return tables


def held_against(reference: Reference) -> str:
    """Published numbers as they were printed, all others as those measured here."""
    return (number if reference.kind == "published" else measured)(reference.value)


def data_uri(picture: Picture) -> str:
    """The PNG file inside the page."""
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def curves(history: History, equilibria: Mapping[str, float] | None = None) -> list[Curve]:
    """A line for each scalar over the steps, beside its equilibrium where it has one; none for
    those that are always 0, of terms that are not in use, and a line begins where its scalar is
    first another: until there a warm-up does not compute it."""
    levels = equilibria or {}
    names = [name for name in history if name != "step" and any(history[name])]
    return [
        _curve(name, history["step"], _once_computed(history[name]), levels.get(name))
        for name in names
    ]


def _once_computed(values: Sequence[float]) -> list[float]:
    """NaN for the zeros that they begin with, if there are several."""
    zeros = next(i for i, value in enumerate(values) if value)
    return [math.nan] * zeros + list(values[zeros:]) if zeros > 1 else list(values)


def _curve(
    name: str, steps: Sequence[float], values: Sequence[float], level: float | None
) -> Curve:
    finite = [value for value in values if abs(value) <= HIGHEST]
    shown = finite if level is None else [*finite, level]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    ticks = _ticks(low, high)
    bottom, top = min(low, *ticks), max(high, *ticks)
    first, span = steps[0], (steps[-1] - steps[0]) or 1

    def up(value: float) -> float:
        share = (value - bottom) / (top - bottom) if top > bottom else 0.5
        return round(HEIGHT * (1 - share), 1)

    points = [
        (round(WIDTH * (step - first) / span, 1), up(value)) if abs(value) <= HIGHEST else None
        for step, value in zip(steps, values, strict=True)
    ]
    summary = (
        f"from {number(min(finite))} to {number(max(finite))}" if finite else "no finite value"
    )
    last = number(finite[-1]) if finite else "undefined"
    labels = [(up(tick), text) for tick, text in zip(ticks, _labels(ticks), strict=True)]
    return Curve(name, _path(points), None if level is None else up(level), labels, last, summary)


def _labels(ticks: Sequence[float]) -> list[str]:
    """With as many digits as tell them apart."""
    texts = [[f"{tick:.{digits}g}" for tick in ticks] for digits in range(6, 18)]
    apart = next((some for some in texts if len(set(some)) == len(ticks)), texts[0])
    return [text.replace("-", "−") for text in apart]


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """SVG path data; the pen is lifted where a point is missing."""
    parts, down = [], False
    for point in points:
        if point is not None:
            parts.append(f"{'L' if down else 'M'}{point[0]:g} {point[1]:g}")
        down = point is not None
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Two to four round numbers within [low, high]; the value itself where they are equal."""
    if low == high:
        return [low]
    magnitude = 10.0 ** math.floor(math.log10((high - low) / 2))
    fitting = (m * magnitude for m in (1, 2, 5) if 2 * m * magnitude <= high - low)
    step = max(fitting, default=magnitude / 2)  # the logarithm was rounded up to the next power
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(k * step, 12) for k in range(first, last + 1)][:: 1 if last - first < 4 else 2]


@dataclass(frozen=True)
class Lane:
    """An experiment in the picture of the pipeline, at height `y`; its data set at `source`."""

    name: str
    dataset: str
    y: int
    source: int


def lanes(results: Sequence[Result]) -> list[Lane]:
    """Experiments below each other, those on one data set together, level with its first."""
    datasets = dict.fromkeys(result.record.dataset for result in results)
    ordered = [r for dataset in datasets for r in results if r.record.dataset == dataset]
    names = [result.record.dataset for result in ordered]
    place = [58 + 38 * k for k in range(len(ordered))]
    return [
        Lane(result.name, dataset, y, source=place[names.index(dataset)])
        for result, dataset, y in zip(ordered, names, place, strict=True)
    ]


def _settings(result: Result) -> dict[str, Any]:
    return {"dataset": {"name": result.record.dataset, **result.data}} | {
        key: value for key, value in result.settings.items() if key != "dataset"
    }
