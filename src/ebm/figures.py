"""Arrays in, matplotlib figures out. Opens no file, keeps no global state, never imports pyplot.

Figures are made for `DPI`: at that resolution one pixel of an image becomes a whole number of
pixels of the file, so that small images stay sharp and files small. `png` makes such a file.
"""

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from ebm import EBMError

DPI = 110

Array = NDArray[Any]
Extent = tuple[float, float, float, float]

INK, MUTED, FAINT = "#1f2933", "#5f6b76", "#d5dbe1"
SERIES = ("#2f6690", "#c8682b", "#3c8267", "#8a5a9e", "#a8862c", "#4d4d4d")
DENSITY = LinearSegmentedColormap.from_list(
    "density", ("#ffffff", "#dcebf2", "#9fcbd9", "#4f9bb8", "#23648f", "#143459", "#0b1a33"), N=24
)
INK_ON_PAPER = LinearSegmentedColormap.from_list("ink on paper", ("#edf0f3", INK))
DIVERGING = LinearSegmentedColormap.from_list(
    "diverging", ("#123a66", "#3f7fb3", "#a9cbe0", "#f6f6f4", "#f0b697", "#c8594a", "#7a1526")
)
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
}

NATS_SHOWN = 10.0  # of log density, below its highest value
NATS_OF_FOUR_SIGMA = 8.0  # what a Gaussian loses at 4 standard deviations
WIDEST, TALLEST = 900, 720  # mosaics aim at this, in pixels of the file
LARGEST_PIXEL = 12  # of the file, for one pixel of an image
LABEL = 11  # points: a mosaic is often shown at half its size
GAP = 4
FRAME_TIME = 250  # milliseconds
MARKS = "osD^vXP"  # with SERIES, a look of its own for each of 42 lines
SPACING = 0.3  # of the marks on a line, in diagonals of its panel
NEAR = 3.0  # times three quarters of the rows' distance to a threshold: histograms stop there
LOWEST = 0.3  # rows of a set: where the axis of their shares begins
FAR = 4.0  # widths of the data's energies: beyond, histograms stop
SMOOTH: Any = {"interpolation": "bilinear", "interpolation_stage": "data"}


Drawing = Figure | Sequence[Figure]
"""A picture, or the frames of an animation."""


def png(drawing: Drawing) -> bytes:
    """The figure as a PNG file with 256 colours of its own, none off by more than a few of 255
    levels: a third of the usual size. Several figures become an animated PNG, grey, without
    end."""
    small = io.BytesIO()
    if not isinstance(drawing, Figure):
        first, *rest = (_pixels(figure).convert("L") for figure in drawing)
        timing: Any = {"duration": [FRAME_TIME] * len(rest) + [4 * FRAME_TIME], "loop": 0}
        first.save(small, "PNG", save_all=True, append_images=rest, **timing)
        return small.getvalue()
    palette: Any = {"method": Image.Quantize.MAXCOVERAGE, "kmeans": 1, "dither": Image.Dither.NONE}
    _pixels(drawing).quantize(256, **palette).save(small, "PNG", optimize=True)
    return small.getvalue()


def _pixels(figure: Figure) -> Image.Image:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    return Image.open(drawn).convert("RGB")


@rc_context(STYLE)
def density_panels(
    true_log_density: Array,
    learned_log_density: Array,
    points: Mapping[str, Array],
    extent: Extent,
) -> Figure:
    """True density, learned density and sets of `points` in the plane, side by side.

    Densities [n, n] are normalised log densities in nats at the centres of the cells that fill
    `extent` (x_min, x_max, y_min, y_max), row 0 at the lowest y. They share one colour scale,
    whose top is the highest value of the first panel, so that a spike in the learned density
    cannot fade the truth. Points are [m, 2], each set under its name. A thin contour around them
    shows where the true density has fallen by 8 nats, as a Gaussian has at 4 standard deviations.
    """
    densities = {"True density": true_log_density, "Learned density": learned_log_density}
    count = len(densities) + len(points)
    figure = Figure(figsize=(2.35 * count + 0.8, 2.6), layout="constrained")
    axes = list(figure.subplots(1, count, sharex=True, sharey=True))
    _draw_log_densities(axes, densities, extent)
    for ax, (title, x) in zip(axes[len(densities) :], points.items(), strict=True):
        _contour(ax, true_log_density, float(true_log_density.max()) - NATS_OF_FOUR_SIGMA, extent)
        _scatter(ax, x, extent)
        ax.set_title(title)
    return figure


@rc_context(STYLE)
def log_density_fields(fields: Mapping[str, Array], extent: Extent) -> Figure:
    """A panel for each log density [n, n] in nats, as in `density_panels`, on one scale whose top
    is the highest value of the first."""
    figure = Figure(figsize=(2.35 * len(fields) + 0.8, 2.6), layout="constrained")
    axes = list(figure.subplots(1, len(fields), sharex=True, sharey=True, squeeze=False)[0])
    _draw_log_densities(axes, fields, extent)
    return figure


def _draw_log_densities(axes: Sequence[Axes], fields: Mapping[str, Array], extent: Extent) -> None:
    """Fill the first of the `axes` with `fields`, and put their scale beside the last."""
    top = float(next(iter(fields.values())).max())
    scale = Normalize(top - NATS_SHOWN, top)
    for ax, (title, field) in zip(axes, fields.items(), strict=False):
        ax.imshow(field, DENSITY, scale, origin="lower", extent=extent, **SMOOTH)
        ax.set_title(title)
    axes[0].locator_params(nbins=4)
    bar_ax = axes[-1].inset_axes((1.05, 0, 0.04, 1))
    bar = axes[-1].figure.colorbar(ScalarMappable(scale, DENSITY), cax=bar_ax, extend="both")
    bar.set_label("log density (nats)")


@rc_context(STYLE)
def log_lines(
    measured: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    expected: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
) -> Figure:
    """What was measured (x [k], y [k]) as points over what is expected as lines, both axes
    logarithmic."""
    figure = Figure(figsize=(4.2, 3.0), layout="constrained")
    ax = figure.subplots()
    for name, line in expected.items():
        ax.loglog(*line, color=MUTED, lw=0.9, label=name)
    for (name, points), colour in zip(measured.items(), cycle(SERIES), strict=False):
        ax.loglog(*points, "o", color=colour, ms=4, label=name)
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7.5)
    return figure


def _contour(ax: Axes, field: Array, level: float, extent: Extent) -> None:
    if field.min() < level < field.max():
        line: Any = {"colors": "#aab6c1", "linewidths": 0.7, "linestyles": "solid"}
        ax.contour(field, [level], origin="lower", extent=extent, **line)


def _scatter(ax: Axes, x: Array, extent: Extent) -> None:
    """Points [m, 2]; those outside the frame are counted, so that they are not silently lost."""
    low, high = np.array(extent[::2]), np.array(extent[1::2])
    opacity = min(0.7, max(0.12, 1500 / (len(x) + 1)))
    ax.scatter(x[:, 0], x[:, 1], s=3, color=SERIES[0], alpha=opacity, linewidths=0)
    ax.set(xlim=extent[:2], ylim=extent[2:], aspect="equal")
    outside = len(x) - int(((low <= x) & (x <= high)).all(1).sum())
    if outside:
        text = f"{outside:,} of {len(x):,} outside"
        ax.text(0.96, 0.03, text, transform=ax.transAxes, ha="right", size=8, color=SERIES[1])


@rc_context(STYLE)
def image_grid(images: Array, columns: int) -> Figure:
    """Images [n, h, w] in [0, 1] row by row, 0 light and 1 dark: ink on paper; or [n, 3, h, w] in
    colour."""
    return _mosaic(images, columns, Normalize(0, 1), INK_ON_PAPER)[0]


@rc_context(STYLE)
def filters(weights: Array, columns: int) -> Figure:
    """Weights [n, h, w] row by row: red positive, blue negative, one symmetric scale for all.

    The scale ends at the 99.5th percentile of |w|: one large weight would fade the rest.
    """
    limit = float(np.quantile(np.abs(weights), 0.995)) or 1.0
    scale = Normalize(-limit, limit)
    figure, ax, _ = _mosaic(weights, columns, scale, DIVERGING, margin=(0, 130))
    bar_ax = ax.inset_axes((1 + 12 / ax.bbox.width, 0, 10 / ax.bbox.width, 1))
    bar = figure.colorbar(ScalarMappable(scale, DIVERGING), cax=bar_ax, extend="both")
    bar.set_label("weight", size=LABEL)
    bar_ax.tick_params(labelsize=LABEL)
    return figure


@rc_context(STYLE)
def chain_strip(chain: Array, step_numbers: Sequence[int]) -> Figure:
    """Markov chains [chains, steps, *] of images in [0, 1]: a row for each chain, time to the
    right."""
    first, *others = step_numbers
    return strips(chain, [f"step {first:,}", *(f"{n:,}" for n in others)])


@rc_context(STYLE)
def strips(images: Array, titles: Sequence[str]) -> Figure:
    """Images [rows, columns, *] in [0, 1], each column under its title; `*` as in
    `image_grid`."""
    columns = images.shape[1]
    figure, ax, corners = _mosaic(
        images.reshape(-1, *images.shape[2:]),
        columns,
        Normalize(0, 1),
        INK_ON_PAPER,
        gap_below=2 * GAP,
        margin=(28, 0),
    )
    for text, (x, y) in zip(titles, corners, strict=False):
        ax.text(x, y - 5, text, size=LABEL, color=MUTED, va="bottom")
    return figure


def _mosaic(
    images: Array,
    columns: int,
    scale: Normalize,
    colours: Colormap,
    gap_below: int = GAP,
    margin: tuple[int, int] = (0, 0),
) -> tuple[Figure, Axes, Array]:
    """Tiles [n, h, w], or [n, 3, h, w] in colour, on one axes, whose unit is a pixel of the file
    and whose y points down.

    Returns the figure, the axes and the top left corner (x, y) of every tile [n, 2]. `margin` is
    what stays free above and to the right. One image, not n axes: 100 axes take seconds to draw.
    """
    images = np.moveaxis(images, 1, -1) if images.ndim == 4 else images
    n, height, width = images.shape[:3]
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    fit = min((WIDEST // columns - GAP) // width, (TALLEST // rows - gap_below) // height)
    zoom = min(max(fit, 1), LARGEST_PIXEL)
    tiles = np.asarray(images, float).repeat(zoom, 1).repeat(zoom, 2)
    row, column = np.divmod(np.arange(n), columns)
    corners = np.stack([column * (zoom * width + GAP), row * (zoom * height + gap_below)], 1)
    wide, tall = corners[:, 0].max() + zoom * width, corners[:, 1].max() + zoom * height
    canvas = np.full((tall, wide, *images.shape[3:]), np.nan if images.ndim == 3 else 1.0)
    for tile, (x, y) in zip(tiles, corners, strict=True):
        canvas[y : y + zoom * height, x : x + zoom * width] = tile
    size = wide + margin[1], tall + margin[0]
    figure = Figure(figsize=((size[0] + 0.01) / DPI, (size[1] + 0.01) / DPI), dpi=DPI)
    ax = figure.add_axes((0, 0, wide / size[0], tall / size[1]))
    box = (0, wide, tall, 0)
    ax.imshow(canvas, colours, scale, aspect="auto", interpolation="nearest", extent=box)
    ax.set_axis_off()
    return figure, ax, corners


@rc_context(STYLE)
def energy_histogram(energies: Mapping[str, Array]) -> Figure:
    """Energies [n] of several sets over common bins, a row for each, each of an area of one.

    The bins reach FAR times the width of the first set's energies beyond it; all that lies further
    out is counted in the outermost bin. A line marks a median within the frame.
    """
    clipped, bins = _framed(energies)
    figure = Figure(figsize=(5.4, 0.5 + 0.36 * len(energies)), layout="constrained")
    axes = figure.subplots(len(energies), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, energy), colour in zip(axes, clipped.items(), cycle(SERIES), strict=False):
        ax.hist(
            energy, bins.tolist(), density=True, histtype="stepfilled", alpha=0.45, color=colour
        )
        if bins[0] < (median := float(np.median(energy))) < bins[-1]:
            ax.axvline(median, color=colour)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", color=INK)
        ax.set_yticks([])
        ax.spines[["top", "left", "right"]].set_visible(False)
    axes[-1].set_xlabel("energy")
    return figure


@rc_context(STYLE)
def score_histograms(panels: Mapping[str, tuple[Mapping[str, Array], float]]) -> Figure:
    """A panel for each score, below each other: its values [n] in several sets of rows and its
    threshold, dashed. The height of a bin is its share of a set, on a logarithmic axis that begins
    at LOWEST rows of the largest.

    The frame reaches NEAR times as far from the threshold as three quarters of all rows lie, and
    no further than the rows do: few that are far away, of whatever set, cannot squeeze the others.
    What lies beyond is counted in the outermost bin. Where the threshold is not finite, the frame
    lies around the median. The axis of scores is logarithmic where they are positive and spread
    over two orders of magnitude.
    """
    figure = Figure(figsize=(5.4, 0.4 + 1.9 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, (name, (sets, threshold)) in zip(axes, panels.items(), strict=True):
        values = np.concatenate(list(sets.values()))
        middle = threshold if math.isfinite(threshold) else float(np.median(values))
        if logarithmic := middle > 0 and _spread(values):
            bins = 10 ** _bins_around(math.log10(middle), np.log10(values[values > 0]))
        else:
            bins = _bins_around(middle, values)
        for (kind, score), colour in zip(sets.items(), cycle(SERIES), strict=False):
            style: Any = {"histtype": "stepfilled", "alpha": 0.45, "color": colour}
            share = np.full(len(score), 1 / len(score))
            framed = np.clip(score, bins[0], bins[-1])
            ax.hist(framed, bins.tolist(), weights=share, label=kind, **style)
        if middle == threshold:
            ax.axvline(threshold, color=INK, ls="--", lw=0.9, label="threshold")
        ax.set(xscale="log" if logarithmic else "linear", xlim=(bins[0], bins[-1]))
        ax.set(xlabel=f"score: {name}", yscale="log", ylabel="share of its kind")
        ax.set_ylim(bottom=LOWEST / max(map(len, sets.values())))
        if not logarithmic:  # 1.2 and 1e-4 beside the axis: 0.00012 has no room between ticks
            ax.ticklabel_format(axis="x", scilimits=(-3, 6))
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def _spread(values: Array) -> bool:
    """Whether nearly all are positive and most of them not within two orders of magnitude."""
    low, high = np.quantile(values, (0.005, 0.995))
    return bool(low > 0 and high > 100 * low)


def _bins_around(middle: float, values: Array) -> Array:
    """The edges of 80 bins; the middle lies within them, not at an end."""
    distance = np.abs(values - middle)
    reach = NEAR * (np.quantile(distance, 0.75) or distance.max() or 1.0)
    low, high = np.clip((values.min(), values.max()), middle - reach, middle + reach)
    return np.linspace(min(low, middle - reach / 20), max(high, middle + reach / 20), 81)


def _framed(sets: Mapping[str, Array]) -> tuple[dict[str, Array], Array]:
    """Values [n] of several sets, cut at FAR times the width of the first beyond it, and 80 common
    bins for them. Those that are no number are left out; EBMError if nothing else is there."""
    known = {name: values[~np.isnan(values)] for name, values in sets.items()}
    if empty := [name for name, values in known.items() if not len(values)]:
        raise EBMError(f"energies of {empty[0]}: none of them is a number")
    first = next(iter(known.values()))
    finite = first[np.isfinite(first)]
    low, high = np.quantile(finite if len(finite) else np.zeros(1), (0.005, 0.995))
    reach = FAR * (high - low)
    clipped = {k: np.clip(np.ravel(v), low - reach, high + reach) for k, v in known.items()}
    return clipped, np.histogram_bin_edges(np.concatenate(list(clipped.values())), 80)


@rc_context(STYLE)
def detection_curves(
    curves: Mapping[str, tuple[Array, Array, Array]], prevalence: float
) -> Figure:
    """ROC and precision-recall curves of several scores: false positive rates, recalls and
    precisions [k] from the highest threshold down. Dashed: what scores that know nothing have, on
    rows of which the share `prevalence` are anomalies."""
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    roc, pr = figure.subplots(1, 2)
    for (name, (false, recall, precision)), colour in zip(
        curves.items(), cycle(SERIES), strict=False
    ):
        roc.plot([0.0, *false], [0.0, *recall], color=colour)
        pr.plot(recall, precision, color=colour, label=name)
    chance: Any = {"ls": "--", "color": MUTED, "lw": 0.9}
    roc.plot([0, 1], [0, 1], **chance)
    pr.plot([0, 1], [prevalence, prevalence], **chance, label="chance")
    roc.set(xlabel="false positive rate", ylabel="recall", title="ROC")
    pr.set(xlabel="recall", ylabel="precision", title="Precision and recall")
    for ax in (roc, pr):
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


@rc_context(STYLE)
def mode_shares(shares: Mapping[str, Array]) -> Figure:
    """Shares [K] of the modes in several sets, each from its largest to its smallest, as multiples
    of 1 / K. A line ends at the number of modes that its set has."""
    figure = Figure(figsize=(5.4, 2.6), layout="constrained")
    ax = figure.subplots()
    looks = zip(cycle(SERIES), cycle(("-", "--", ":")), strict=False)
    for (name, share), (colour, form) in zip(shares.items(), looks, strict=False):
        found = np.sort(share[share > 0])[::-1] * len(share)
        ax.semilogy(np.arange(1, len(found) + 1), found, color=colour, ls=form, label=name)
    ax.axhline(1, color=FAINT, lw=0.9, zorder=0)
    ax.set(xlabel="modes, the most frequent first", ylabel="share × number of modes")
    ax.set_xlim(0, max(map(len, shares.values())))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8)
    return figure


Spread = tuple[Sequence[float], Sequence[float]]
"""Means and standard deviations."""


@rc_context(STYLE)
def by_class(
    panels: Mapping[str, Mapping[str, Spread]],
    lines: Mapping[str, Mapping[str, Sequence[float]]],
    classes: Sequence[str],
    label: str,
) -> Figure:
    """A panel for each score, below each other: of each of several kinds a number called `label`
    for every class. `lines` by their names: values of each kind for every class, which all panels
    share, as short lines of its colour."""
    figure = Figure(figsize=(5.4, 0.5 + 2.1 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    x, forms = np.arange(len(classes)), ("--", ":")
    for ax, (title, kinds) in zip(axes, panels.items(), strict=True):
        for number, (name, (means, spreads)) in enumerate(kinds.items()):
            place, colour = x + 0.36 * (number - (len(kinds) - 1) / 2), SERIES[number]
            ax.errorbar(place, means, spreads, fmt="o", ms=4, capsize=2, color=colour, label=name)
            for values, form in zip(lines.values(), forms, strict=False):
                ax.hlines(values[name], place - 0.16, place + 0.16, colour, form, lw=1)
        for name, form in zip(lines, forms, strict=False):
            ax.plot([], [], color=MUTED, ls=form, lw=1, label=name)
        ax.set(ylabel=label, xticks=x, xticklabels=classes)
        ax.set_title(title, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("class that is the anomaly")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@rc_context(STYLE)
def error_curves(curves: Mapping[str, Mapping[str, tuple[Array, Array]]]) -> Figure:
    """A panel for each target, a line (evaluations [k], error [k]) for each sampler, both axes
    logarithmic. Dashed: what independent exact draws have, 1 / sqrt(n). A line that leaves the
    panel upwards has left the target. Marks stand at other places on each line of a panel, so that
    lines that lie on one another can be told apart."""
    figure = Figure(figsize=(2.5 * len(curves) + 0.3, 3.6), layout="constrained")
    axes = list(figure.subplots(1, len(curves), sharey=True, squeeze=False)[0])
    names = dict.fromkeys(name for lines in curves.values() for name in lines)
    looks = dict(zip(names, zip(cycle(SERIES), cycle(MARKS), strict=False), strict=False))
    shown: dict[str, Line2D] = {}
    longest = 1.0
    for ax, (title, lines) in zip(axes, curves.items(), strict=True):
        for number, (name, line) in enumerate(lines.items()):
            colour, mark = looks[name]
            every = (SPACING * number / len(lines), SPACING)
            style: Any = {"color": colour, "marker": mark, "ms": 4.5, "markevery": every}
            (shown[name],) = ax.loglog(*line, **style)
        reach = np.array([1.0, max(evaluations[-1] for evaluations, _ in lines.values())])
        (shown["exact draws"],) = ax.loglog(reach, reach**-0.5, "--", color=MUTED, lw=0.9)
        ax.set(title=title, xlabel="evaluations per chain")
        ax.spines[["top", "right"]].set_visible(False)
        longest = max(longest, reach[1])
    axes[0].set(ylabel="error, in standard deviations", ylim=(longest**-0.5 / 2, 3))
    shown["exact draws"] = shown.pop("exact draws")
    figure.legend(shown.values(), list(shown), loc="outside lower center", ncols=5, fontsize=8)
    return figure


@rc_context(STYLE)
def chain_paths(
    log_density: Array, extent: Extent, paths: Mapping[str, Array], labels: tuple[str, str]
) -> Figure:
    """A panel for each sampler: the path [T, 2] of one chain over the density it should explore.

    `log_density` [n, n] in nats at the centres of the cells that fill `extent`, row 0 at the
    bottom, and `labels` name its axes. A cross marks where the chain began; what leaves the frame
    is cut off.
    """
    figure = Figure(figsize=(2.1 * len(paths) + 0.2, 2.4), layout="constrained")
    axes = list(figure.subplots(1, len(paths), sharex=True, sharey=True, squeeze=False)[0])
    top = float(log_density.max())
    scale = Normalize(top - NATS_SHOWN, top)
    for ax, (title, path) in zip(axes, paths.items(), strict=True):
        ax.imshow(log_density, DENSITY, scale, origin="lower", extent=extent, alpha=0.55, **SMOOTH)
        ax.plot(path[:, 0], path[:, 1], color=SERIES[1], lw=0.4, alpha=0.6)
        ax.plot(path[:, 0], path[:, 1], ".", color=SERIES[1], ms=1.8)
        ax.plot(*path[0], "x", color=INK, ms=6)
        ax.set(title=title, xlabel=labels[0], xlim=extent[:2], ylim=extent[2:], aspect="auto")
    axes[0].set_ylabel(labels[1])
    return figure


@rc_context(STYLE)
def traces(lines: Mapping[str, tuple[Array, Array]], label: str) -> Figure:
    """A panel for each sampler, below each other: a scalar (evaluations [T], values [T]) of one
    chain, called `label`."""
    figure = Figure(figsize=(5.4, 0.3 + 0.95 * len(lines)), layout="constrained")
    axes = list(figure.subplots(len(lines), 1, sharex=True, sharey=True, squeeze=False)[:, 0])
    for ax, (name, (evaluations, values)), colour in zip(
        axes, lines.items(), cycle(SERIES), strict=False
    ):
        ax.plot(evaluations, values, color=colour, lw=0.8)
        ax.set(ylabel=label)
        ax.set_title(name, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("evaluations")
    return figure
