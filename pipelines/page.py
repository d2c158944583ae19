"""Results in, the words, numbers and lines of the report's page out. Opens only its template."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.results import Comparison, History, Line, Picture, Reference, Result

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Metric:
    """How a number is presented. `better` is +1 (higher), -1 (lower) or 0 (neither)."""

    label: str
    better: int
    meaning: str
    unit: str = ""
    overview: bool = True


METRICS = {
    "modes": Metric("Modes found", +1, "Modes of the data that at least one sample lies near."),
    "high_quality_share": Metric(
        "High-quality share",
        +1,
        "Share of the samples within 4 standard deviations of a mode, or of the data's curve.",
    ),
    "mode_kl": Metric(
        "Mode KL", -1, "KL divergence of the samples' mode histogram from the true one.", "nats"
    ),
    "grid_kl": Metric(
        "Density KL", -1, "KL(true density ‖ learned density), integrated on a grid.", "nats"
    ),
    "log_likelihood": Metric(
        "Log-likelihood",
        +1,
        "Mean log p of the test split. Where log Z is estimated, a lower and an upper estimate "
        "bracket it: they come from annealing towards the model and away from it.",
        "nats",
    ),
    "log_likelihood_train": Metric(
        "Log-likelihood, training split", 0, "The same of the training split.", "nats", False
    ),
    "log_partition": Metric("log Z", 0, "Logarithm of the partition function.", "nats", False),
    "frechet_distance": Metric(
        "Fréchet distance",
        -1,
        "Squared distance of the Gaussians fitted to samples and to test data: to their "
        "coordinates in the plane, to the features of a reference network for images.",
    ),
    "frechet_distance_extrapolated": Metric(
        "Fréchet distance, extrapolated",
        -1,
        "The same for infinitely many samples, on a line through the values of fewer; an estimate "
        "that can be negative.",
        "",
        False,
    ),
    "kernel_distance": Metric(
        "Kernel distance",
        -1,
        "KID: squared maximum mean discrepancy of samples and test data, on the same features, "
        "estimated without bias; about 0, of either sign, for draws of one distribution.",
        "",
        False,
    ),
    "sample_precision": Metric(
        "Sample precision",
        +1,
        "Share of the samples within reach of test images: how good they look.",
        "",
        False,
    ),
    "sample_recall": Metric(
        "Sample recall",
        +1,
        "Share of the test images within reach of samples: how much of the data they cover.",
        "",
        False,
    ),
    "conditional_accuracy": Metric(
        "Conditional accuracy",
        +1,
        "Share of conditional samples in which the reference network sees the class asked for.",
    ),
    "accuracy": Metric("Accuracy", +1, "Share of the test split classified rightly."),
    "auroc": Metric("AUROC", +1, "Area under the ROC curve of the energy as anomaly score."),
    "auroc_mean": Metric(
        "AUROC, mean",
        +1,
        "Area under the ROC curve of the energy as anomaly score, the test split against an "
        "outlier set: the mean over the sets.",
    ),
    "auprc": Metric("AUPRC", +1, "Area under the precision-recall curve of the energy."),
    "f1": Metric("F1", +1, "Harmonic mean of precision and recall."),
    "precision": Metric("Precision", +1, "Share of the flagged that are anomalies.", "", False),
    "recall": Metric("Recall", +1, "Share of the anomalies that are flagged.", "", False),
    "acceptance": Metric(
        "Acceptance", 0, "Mean acceptance probability of the sampling chains.", "", False
    ),
    "seconds": Metric("Training time", -1, "Wall time of the training loop."),
}
COMPANIONS = ("_generator", "_total", "_lower", "_upper", "_std")
"""Suffixes of numbers that are shown in the row of the number they belong to."""

VARIANTS = {
    "rbm": "Restricted Boltzmann machine",
    "igebm": "Langevin-trained energy (IGEBM)",
    "meg": "Maximum entropy generators",
    "nce": "Noise-contrastive estimation",
    "fce": "Flow-contrastive estimation",
}
DATA = {"density": "Densities in the plane", "digits": "Handwritten digits"}
SAMPLERS = {
    "error": Metric(
        "Error",
        -1,
        "Root mean square, over chains and known expectations, of the error of a chain's mean, in "
        "standard deviations.",
    ),
    "ess": Metric(
        "ESS",
        +1,
        "Effective sample size of the worst known expectation, per 1000 evaluations of a chain: "
        "1000 for exact draws. It believes the chains: where R-hat is high, it means nothing.",
        "per 1000",
    ),
    "r_hat": Metric(
        "R-hat", -1, "Rank-normalised and split; of the worst known expectation. Trust below 1.01."
    ),
    "tau": Metric(
        "Autocorrelation", -1, "Autocorrelation time of the energy, in evaluations.", "evaluations"
    ),
    "acceptance": Metric("Acceptance", 0, "Mean acceptance probability of the proposals."),
    "swaps": Metric("Swaps", 0, "Smallest mean swap acceptance of two neighbours of a ladder."),
    "round_trips": Metric("Round trips", +1, "From the hot end to the target and back, mean."),
    "step_size": Metric("Step size", 0, "As adapted before sampling; of Langevin, MALA's."),
    "cost": Metric("Cost", -1, "Evaluations for one transition, those of all rungs together."),
}
ORACLES = {
    "banana": "Banana",
    "funnel": "Neal's funnel, 10 dimensions",
    "8gaussians": "Eight Gaussians",
    "ising": "Ising lattice, 4 × 4 spins",
}
KINDS = {
    "exact": "the value of a perfect model, known in closed form",
    "ceiling": "what exact samples or the true density score: the most a model can honestly get",
    "floor": "what exact samples score: the least a model can honestly get",
    "published": "as printed in the paper named beside it",
    "baseline": "a simple model, fitted to the same data here",
}


@dataclass(frozen=True)
class Row:
    """A metric of one experiment; `bracket` and `generator` are empty where there is none."""

    name: str
    metric: Metric
    value: str
    exact: float
    bracket: str
    generator: str
    references: Sequence[Reference]


@dataclass(frozen=True)
class Curve:
    """A training scalar as a line in a box of WIDTH x HEIGHT; ticks are (position, text)."""

    name: str
    path: str
    ticks: Sequence[tuple[float, str]]
    last: str
    summary: str


WIDTH, HEIGHT = 210, 92


def render(results: Sequence[Result], comparison: Comparison | None = None) -> str:
    """The page, self-contained: styles inline, images as data URIs, no script."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "measured": measured,
        "held_against": held_against,
        "duration": duration,
        "data_uri": data_uri,
    }
    tables = {result.name: rows(result) for result in results}
    shown = {row.name: row for table in tables.values() for row in table.values()}
    kinds = {r.kind for result in results for refs in result.references.values() for r in refs}
    return environment.get_template("report.html.j2").render(
        results=results,
        tables=tables,
        groups=list(groups(results, tables)),
        curves={result.name: curves(result.history) for result in results},
        settings={result.name: dict(_flat(_settings(result))) for result in results},
        glossary=[metric for name, metric in METRICS.items() if name in shown],
        kinds={kind: text for kind, text in KINDS.items() if kind in kinds},
        lanes=lanes(results),
        comparison=comparison,
        bench=by_oracle(comparison.table) if comparison else {},
        bench_columns=SAMPLERS,
        bench_settings=dict(_flat(comparison.settings)) if comparison else {},
        variants=VARIANTS,
        width=WIDTH,
        height=HEIGHT,
    )


def rows(result: Result) -> dict[str, Row]:
    """All metrics of an experiment in the order of METRICS, what is not listed there last."""
    names = [name for name in result.metrics if not _companion(name, result.metrics)]
    known = [name for name in METRICS if name in names]
    other = [name for name in names if name not in known]
    return {name: _row(result, name) for name in known + other}


def _companion(name: str, metrics: Mapping[str, float]) -> bool:
    return any(name.endswith(end) and name.removesuffix(end) in metrics for end in COMPANIONS)


def _row(result: Result, name: str) -> Row:
    numbers = result.metrics
    low, high = numbers.get(f"{name}_lower"), numbers.get(f"{name}_upper")
    generator = f"{name}_generator"
    return Row(
        name=name,
        metric=metric(name),
        value=_value(numbers, name),
        exact=numbers[name],
        bracket="" if low is None or high is None else _bracket(low, high),
        generator=_value(numbers, generator) if generator in numbers else "",
        references=result.references.get(name, ()),
    )


def _bracket(low: float, high: float) -> str:
    """Both ends, with as many digits as tell them apart."""
    forms = (f"#.{digits}g" for digits in range(4, 9))
    form = next((f for f in forms if number(low, f) != number(high, f)), "#.8g")
    return f"{number(low, form)} to {number(high, form)}"


def _value(numbers: Mapping[str, float], name: str) -> str:
    """The number with what belongs to it: a total, a spread."""
    if name == "seconds":
        return duration(numbers[name])
    stem = name.removesuffix("_generator")
    total, spread = numbers.get(f"{stem}_total"), numbers.get(f"{name}_std")
    text = measured(numbers[name])
    text += f" / {number(total)}" if total is not None else ""
    return text + (f" ± {spread:.1g}" if spread is not None else "")


def metric(name: str) -> Metric:
    """How `name` is presented: by METRICS, as one of them on another data set (`auroc_noise`), or
    under its own name."""
    if name in METRICS:
        return METRICS[name]
    for stem, known in METRICS.items():
        if name.startswith(f"{stem}_"):
            rest = name.removeprefix(f"{stem}_").replace("_", " ")
            return Metric(f"{known.label}, {rest}", known.better, "", known.unit, False)
    return Metric(name.replace("_", " "), 0, "", "", False)


def groups(
    results: Sequence[Result], tables: Mapping[str, Mapping[str, Row]]
) -> Iterator[tuple[str, dict[str, Metric], list[Result]]]:
    """Experiments on one kind of data belong in one table: its title, its columns, its rows."""
    for kind in dict.fromkeys(result.data["kind"] for result in results):
        members = [result for result in results if result.data["kind"] == kind]
        present = {name for result in members for name in tables[result.name]}
        columns = {n: m for n, m in METRICS.items() if m.overview and n in present}
        yield DATA.get(kind, str(kind).capitalize()), columns, members


def by_oracle(table: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines of one target belong in one table, under its title."""
    tables: dict[str, list[Line]] = {}
    for line in table:
        tables.setdefault(ORACLES.get(line.oracle, line.oracle), []).append(line)
    return tables


def measured(value: float) -> str:
    """Four significant digits, the last ones even if they are zeros."""
    return number(value, "#.4g").rstrip(".")


def held_against(reference: Reference) -> str:
    """Published numbers as they were printed, all others as those measured here."""
    return (number if reference.kind == "published" else measured)(reference.value)


def number(value: float, form: str = ".4g") -> str:
    """A number as a reader wants it: a real minus sign, powers of ten, thin spaces."""
    if not math.isfinite(value):
        return "undefined"
    if abs(value) >= 9999.5:
        text = f"{round(value):,}".replace(",", "\u2009")
    elif isinstance(value, int) or value == 0:
        text = f"{value:.0f}"
    elif abs(value) >= 1e-3:
        text = f"{value:{form}}"
    else:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa} × 10{_superscript(int(exponent))}"
    return text.replace("-", "−")


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def data_uri(picture: Picture) -> str:
    """The PNG file inside the page."""
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def curves(history: History) -> list[Curve]:
    """A line for each scalar over the steps."""
    return [_curve(name, history["step"], y) for name, y in history.items() if name != "step"]


def _curve(name: str, steps: Sequence[float], values: Sequence[float]) -> Curve:
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    ticks = _ticks(low, high)
    bottom, top = min(low, *ticks), max(high, *ticks)
    first, span = steps[0], (steps[-1] - steps[0]) or 1

    def up(value: float) -> float:
        share = (value - bottom) / (top - bottom) if top > bottom else 0.5
        return round(HEIGHT * (1 - share), 1)

    points = [
        (round(WIDTH * (step - first) / span, 1), up(value)) if math.isfinite(value) else None
        for step, value in zip(steps, values, strict=True)
    ]
    summary = f"from {number(low)} to {number(high)}" if finite else "no finite value"
    last = number(finite[-1]) if finite else "undefined"
    labels = [(up(tick), f"{tick:g}".replace("-", "−")) for tick in ticks]
    return Curve(name, _path(points), labels, last, summary)


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
    step = max(m * magnitude for m in (1, 2, 5) if 2 * m * magnitude <= high - low)
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


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings under dotted names, as params.yaml and MLflow call them."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
