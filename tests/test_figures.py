"""Figures show what the arrays say: the right way up, in the right place, on one scale."""

import gc
import io
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from ebm import EBMError, figures

EXTENT = (-3.0, 3.0, -3.0, 3.0)
N = 60
ROOT = Path(__file__).parents[1]


def drawn(figure: Figure) -> np.ndarray:
    """The pixels [h, w, 3], row 0 at the top."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(figures.DPI)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def colour_at(pixels, ax, x, y):
    """The drawn colour at the data coordinates (x, y) of `ax`."""
    right, up = ax.transData.transform((x, y))
    return pixels[pixels.shape[0] - 1 - int(up), int(right)]


def darkness(pixels, ax, x, y, radius=2):
    """How far from white the darkest pixel near (x, y) is."""
    right, up = (int(v) for v in ax.transData.transform((x, y)))
    row = pixels.shape[0] - 1 - up
    near = pixels[row - radius : row + radius + 1, right - radius : right + radius + 1]
    return 255 * 3 - near.sum(-1).min()


def spot(x, y, value=0.0, size=4):
    """A log density that is `value` around (x, y) and very low elsewhere."""
    centres = -3 + 6 * (np.arange(N) + 0.5) / N
    field = np.full((N, N), value - 50.0)
    i, j = np.abs(centres - y).argmin(), np.abs(centres - x).argmin()
    field[i - size : i + size + 1, j - size : j + size + 1] = value
    return field


FLAT = np.zeros((N, N))


def panels(true, learned, samples=((0.0, 0.0),), before=None):
    points = {"Samples": samples} if before is None else {"Before": before, "After": samples}
    arrays = {title: np.array(x) for title, x in points.items()}
    return figures.density_panels(true, learned, arrays, EXTENT)


def titled(figure, title):
    return next(ax for ax in figure.axes if ax.get_title() == title)


@pytest.mark.parametrize("title", ["True density", "Learned density"])
def test_a_density_is_drawn_the_right_way_up(title):
    figure = panels(spot(2, 1), spot(2, 1))
    pixels, ax = drawn(figure), titled(figure, title)
    assert colour_at(pixels, ax, 2, 1).sum() < 120
    for mirrored in [(-2, 1), (2, -1), (1, 2), (-1, -2)]:
        assert colour_at(pixels, ax, *mirrored).sum() > 750


def test_equal_densities_have_equal_colours_in_both_panels():
    """Even where the learned one has a spike that the truth has not."""
    truth = np.maximum(spot(1, 1), spot(-1, 1, -4.0))
    learned = np.maximum(spot(-1, 1, -4.0), spot(0, -2, 30.0))
    figure = panels(truth, learned)
    pixels = drawn(figure)
    true, model = titled(figure, "True density"), titled(figure, "Learned density")
    assert (colour_at(pixels, true, -1, 1) == colour_at(pixels, model, -1, 1)).all()
    assert (colour_at(pixels, model, 0, -2) == colour_at(pixels, true, 1, 1)).all()
    assert (colour_at(pixels, true, -1, 1) != colour_at(pixels, true, 1, 1)).any()


def test_samples_land_where_they_are_and_before_and_after_are_not_confused():
    figure = panels(FLAT, FLAT, [(2.0, 1.0)], before=[(-1.0, -2.0)])
    pixels = drawn(figure)
    before, after = titled(figure, "Before"), titled(figure, "After")
    assert darkness(pixels, after, 2, 1) > 100
    assert darkness(pixels, before, -1, -2) > 100
    for ax, x, y in [
        (after, -1, -2),
        (before, 2, 1),
        (after, -2, 1),
        (after, 2, -1),
        (after, 1, 2),
    ]:
        assert darkness(pixels, ax, x, y) == 0


def test_the_contour_stands_at_four_standard_deviations():
    centres = -3 + 6 * (np.arange(200) + 0.5) / 200
    squared = centres[None, :] ** 2 + (centres[:, None] - 0.6) ** 2
    gaussian = -squared / (2 * 0.5**2)
    figure = figures.density_panels(gaussian, gaussian, {"Samples": np.zeros((0, 2))}, EXTENT)
    pixels, ax = drawn(figure), titled(figure, "Samples")
    for angle in np.linspace(0.1, 6.2, 7):
        x, y = np.cos(angle), np.sin(angle)
        assert darkness(pixels, ax, 2.0 * x, 0.6 + 2.0 * y) > 60
        assert darkness(pixels, ax, 1.7 * x, 0.6 + 1.7 * y) == 0


def test_samples_outside_the_frame_are_counted():
    figure = panels(FLAT, FLAT, [(0, 0), (9, 0), (0, -3.1)])
    assert [text.get_text() for text in titled(figure, "Samples").texts] == ["2 of 3 outside"]
    inside = panels(FLAT, FLAT, [(0, 0), (3, -3)])
    assert not titled(inside, "Samples").texts


def tile(pixels, k, columns, shape, gap=(4, 4), top=0):
    """Tile k of a mosaic whose first tile is at the top left: mean of each image pixel."""
    h, w = shape
    row, column = divmod(k, columns)
    zoom = 12
    y, x = top + row * (zoom * h + gap[0]), column * (zoom * w + gap[1])
    return pixels[y : y + zoom * h, x : x + zoom * w].reshape(h, zoom, w, zoom, 3)


def test_an_image_grid_keeps_order_orientation_and_sharp_pixels():
    images = np.zeros((5, 2, 3))
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)]
    for k, place in enumerate(places):
        images[k][place] = 1
    pixels = drawn(figures.image_grid(images, columns=3))
    for k, place in enumerate(places):
        shown = tile(pixels, k, 3, (2, 3))
        assert (shown == shown[:, :1, :, :1]).all(), "a blurred pixel"
        dark = shown[:, 0, :, 0].sum(-1) < 200
        assert np.argwhere(dark).tolist() == [list(place)]
    assert (tile(pixels, 5, 3, (2, 3)) == 255).all(), "an empty place is paper"


def test_filters_are_symmetric_around_zero():
    weights = np.array([[[0.0, 0.7], [0.6, 0.1]], [[-0.1, 0.0], [0.2, -0.2]]])
    pixels = drawn(figures.filters(weights, columns=2))
    colour = {
        value: tile(pixels, k, 2, (2, 2))[i, 0, j, 0]
        for (k, i, j), value in np.ndenumerate(weights)
    }
    assert np.ptp(colour[0.0]) < 6, "zero is neutral"
    for value in (0.1, 0.2):
        red, blue = colour[value], colour[-value]
        assert red[0] > red[2], "positive is red"
        assert blue[2] > blue[0], "negative is blue"
        assert abs(red.sum() - blue.sum()) < 120, "equally strong"


def test_one_outlier_does_not_fade_the_other_filters():
    weights = np.random.default_rng(0).uniform(-1, 1, (50, 8, 8))
    before = drawn(figures.filters(weights, 10))
    weights[-1, -1, -1] = 1000
    after = drawn(figures.filters(weights, 10))
    assert np.abs(before - after)[:96, :96].max() <= 4


def test_a_chain_runs_to_the_right_and_chains_lie_below_each_other():
    steps, chains = 3, 2
    chain = np.arange(steps * chains).reshape(steps, chains, 1, 1) / 5 * np.ones((1, 1, 4, 4))
    figure = figures.chain_strip(chain.swapaxes(0, 1), [0, 10, 1000])
    pixels = drawn(figure)
    top = pixels.shape[0] - (chains * 48 + 8)
    grey = [tile(pixels, k, steps, (4, 4), (8, 4), top).mean() for k in range(steps * chains)]
    by_time = np.array(grey).reshape(chains, steps)
    assert (np.argsort(-by_time.T.ravel()) == np.arange(steps * chains)).all()
    assert [text.get_text() for text in figure.axes[0].texts] == ["step 0", "10", "1,000"]


def test_energy_histograms_have_common_bins_and_unit_area():
    r = np.random.default_rng(0)
    figure = figures.energy_histogram({"data": r.normal(size=500), "noise": r.normal(4, 2, 90)})
    outlines = [ax.patches[0].get_path().vertices for ax in figure.axes]
    edges = [np.unique(outline[:, 0]) for outline in outlines]
    assert (edges[0] == edges[1]).all()
    for outline in outlines:
        x, y = outline[:, 0], outline[:, 1]
        assert np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) == pytest.approx(1)


def test_a_set_that_is_far_away_does_not_squeeze_the_others():
    r = np.random.default_rng(0)
    sets = {"train": r.normal(size=500), "test": r.normal(size=500), "far": np.full(90, 1e6)}
    figure = figures.energy_histogram(sets)
    low, high = figure.axes[0].get_xlim()
    assert high - low < 60
    assert [ax.get_ylabel() for ax in figure.axes] == list(sets)
    outline = figure.axes[2].patches[0].get_path().vertices
    assert outline[outline[:, 1] > 0, 0].min() > 20, "counted in the last bin"
    figures.energy_histogram({"constant": np.zeros(9), "other": np.ones(5)})


def test_scores_of_rows_are_shares_of_them_and_the_threshold_is_dashed():
    r = np.random.default_rng(0)
    near = {"normal": r.normal(size=900), "anomalous": r.normal(2, 1, 100)}
    wide = {"normal": np.exp(r.normal(0, 3, 900)), "anomalous": np.exp(r.normal(9, 3, 100))}
    figure = figures.score_histograms({"energy": (near, 1.5), "gradient": (wide, 20.0)})
    drawn(figure)
    assert [ax.get_xlabel() for ax in figure.axes] == ["score: energy", "score: gradient"]
    assert [ax.get_xscale() for ax in figure.axes] == ["linear", "log"]
    assert [ax.lines[0].get_xdata()[0] for ax in figure.axes] == [1.5, 20.0]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["normal", "anomalous", "threshold"]
    three_to_one = {"test": np.repeat([0.0, 10.0], [30, 10]), "constant": np.zeros(9)}
    figure = figures.score_histograms({"energy": (three_to_one, 5.0)})
    outlines = [patch.get_path().vertices[:, 1].round(9) for patch in figure.axes[0].patches]
    assert [sorted({*y} - {y.min()}) for y in outlines] == [[0.25, 0.75], [1.0]]


@pytest.mark.parametrize(
    ("normal", "anomalous", "threshold"),
    [
        ((-1519, 4, 800), (5e4, 5e4, 200), -1382),  # anomalies that are far away
        ((0, 1e-3, 800), (-4000, 2000, 200), 0.01),  # anomalies far below the normal rows
        ((8, 0, 800), (9, 1, 200), 8.0),  # a tie of most rows with the threshold
        ((0, 1, 800), (1, 1, 200), 50.0),  # a threshold above all rows
        ((0, 0, 800), (0, 0, 200), 0.0),
    ],
)
def test_the_frame_of_scores_shows_their_threshold_and_most_rows(normal, anomalous, threshold):
    r = np.random.default_rng(0)
    sets = {"normal": r.normal(*normal), "anomalous": r.normal(*anomalous)}
    figure = figures.score_histograms({"energy": (sets, threshold)})
    pixels, (ax,) = drawn(figure), figure.axes
    low, high = ax.get_xlim()
    margin = (high - low) / 100
    assert low + margin < threshold < high - margin
    assert darkness(pixels, ax, threshold, np.sqrt(np.prod(ax.get_ylim()))) > 100
    assert ((low <= sets["normal"]) & (sets["normal"] <= high)).mean() > 0.99
    assert abs(normal[0] - threshold) < 1 or abs(normal[0] - threshold) > 10 * margin


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e-3, 0.1, 1.0, 1e4, 1e12])
def test_ticks_of_scores_do_not_run_into_each_other(size):
    scores = {"test": size * np.random.default_rng(0).uniform(0.95, 1.81, 500)}
    figure = figures.score_histograms({"energy": (scores, 1.38 * size)})
    drawn(figure)
    (ax,) = figure.axes
    boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    assert len(boxes) > 2
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize("threshold", [np.nan, np.inf])
def test_a_threshold_that_is_no_number_is_not_drawn(threshold):
    scores = {"test": np.random.default_rng(0).normal(size=500)}
    figure = figures.score_histograms({"energy": (scores, threshold)})
    drawn(figure)
    (ax,) = figure.axes
    assert not ax.lines
    low, high = ax.get_xlim()
    assert low < np.median(scores["test"]) < high


def test_curves_of_detectors_begin_at_nothing_flagged_and_have_their_chance():
    steps = np.array([0.5, 1.0])
    figure = figures.detection_curves({"energy": (steps / 2, steps, steps)}, 0.3)
    roc, pr = figure.axes
    assert (roc.get_xlabel(), roc.get_ylabel()) == ("false positive rate", "recall")
    assert (pr.get_xlabel(), pr.get_ylabel()) == ("recall", "precision")
    assert roc.lines[0].get_xydata()[0].tolist() == [0, 0]
    assert pr.lines[0].get_xydata().tolist() == [[0.5, 0.5], [1, 1]]
    assert [list(line.get_ydata()) for line in (roc.lines[1], pr.lines[1])] == [[0, 1], [0.3, 0.3]]
    drawn(figure)


def test_a_line_of_modes_ends_where_they_do():
    figure = figures.mode_shares({"all": np.full(4, 0.25), "few": np.array([0, 0.2, 0, 0.8])})
    every, few, alike = figure.axes[0].lines
    assert every.get_xydata().tolist() == [[1, 1], [2, 1], [3, 1], [4, 1]]
    np.testing.assert_allclose(few.get_xydata(), [[1, 3.2], [2, 0.8]])
    assert alike.get_ydata()[0] == 1
    assert figure.axes[0].get_xlim() == (0, 4)


def same_colour(a, b):
    return np.array_equal(a.get_edgecolor(), b.get_edgecolor())


def test_numbers_by_class_stand_beside_each_other_over_their_class():
    kinds = {"released": ([0.1, 0.2], [0.0, 0.1]), "strict": ([0.3, 0.4], [0.0, 0.1])}
    panels = {"energy": kinds, "gradient": kinds}
    lines = {
        "chance": {"released": [0.35, 0.36], "strict": [0.37, 0.38]},
        "floor": {"released": [0.25, 0.26], "strict": [0.27, 0.28]},
    }
    figure = figures.by_class(panels, lines, ["4", "9"], "AUPRC")
    drawn(figure)
    assert [text.get_text() for text in figure.axes[-1].get_xticklabels()] == ["4", "9"]
    for ax in figure.axes:
        first, second = (container.lines[0].get_xydata() for container in ax.containers)
        assert first[:, 1].tolist() == [0.1, 0.2]
        np.testing.assert_allclose(first[:, 0], [-0.18, 0.82])
        np.testing.assert_allclose(second[:, 0], [0.18, 1.18])
        for kind, container in zip(kinds, ax.containers, strict=True):
            points, _, (bars,) = container.lines
            own = [c for c in ax.collections if same_colour(c, bars) and c is not bars]
            for short, values in zip(own, lines.values(), strict=True):
                ends = np.array(short.get_segments())
                np.testing.assert_allclose(ends[:, :, 0].mean(1), points.get_xdata())
                assert ends[:, 0, 1].tolist() == ends[:, 1, 1].tolist() == values[kind]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*lines, *kinds]


def test_error_curves_have_the_line_of_exact_draws_and_a_look_for_each_sampler():
    n = np.array([1.0, 10.0, 100.0])
    lines = {"slow": (n, n**-0.1), "lost": (n, np.array([1.0, 1e9, np.nan]))}
    figure = figures.error_curves({"one": lines, "two": lines, "three": {"slow": lines["slow"]}})
    assert [ax.get_title() for ax in figure.axes] == ["one", "two", "three"]
    assert not any(ax.get_legend() for ax in figure.axes), "over no line"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["slow", "lost", "exact draws"]
    slow, lost, exact = figure.axes[0].lines
    assert slow.get_color() != lost.get_color()
    np.testing.assert_allclose(exact.get_ydata(), np.asarray(exact.get_xdata()) ** -0.5)
    assert max(exact.get_xdata()) == 100
    low, high = figure.axes[0].get_ylim()
    assert low < 0.1 < 1 < high < 1e3, "the line that is lost leaves the panel"
    drawn(figure)
    bottom = min(ax.get_tightbbox().y0 for ax in figure.axes)
    assert legend.get_window_extent().y1 <= bottom


def test_error_curves_that_lie_on_one_another_show_all_their_marks():
    n = np.geomspace(1, 1000, 80)
    names = ["a", "b", "c", "d", "e", "f", "g", "h", "i"]
    figure = figures.error_curves({"flat": {name: (n, np.ones(80)) for name in names}})
    pixels, (ax,) = drawn(figure), figure.axes
    *lines, _ = ax.lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(names)
    row = pixels.shape[0] - 1 - int(ax.transData.transform((1, 1))[1])
    beside = pixels[[row - 3, row - 2, row + 2, row + 3], int(ax.bbox.x0) : int(ax.bbox.x1)]
    for line in lines:  # beside the one that lies on top there are the marks of all
        colour = np.round(255 * np.array(to_rgb(line.get_color())))
        assert (beside == colour).all(-1).any(), line.get_marker()


def test_paths_lie_over_the_density_they_explore():
    path = np.array([[2.0, 1.0], [-1.0, -2.0]])
    figure = figures.chain_paths(spot(0, 0), EXTENT, {"a": path, "b": path[::-1]}, ("v", "x"))
    pixels = drawn(figure)
    assert [ax.get_xlabel() for ax in figure.axes] == ["v", "v"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["x", ""]
    for ax, start in zip(figure.axes, path, strict=True):
        assert ax.get_xlim() == EXTENT[:2]
        assert ax.get_ylim() == EXTENT[2:]
        assert darkness(pixels, ax, 2, 1) > 100
        assert darkness(pixels, ax, -1, -2) > 100
        assert darkness(pixels, ax, 0, 0) > 100
        assert darkness(pixels, ax, -2, 1) == 0
        assert tuple(ax.lines[-1].get_xydata()[0]) == tuple(start)


def test_traces_lie_below_each_other_on_common_axes():
    t = np.arange(5.0)
    figure = figures.traces({"a": (t, t), "b": (t / 2, -t)}, "mean spin")
    drawn(figure)
    assert [ax.get_title("left") for ax in figure.axes] == ["a", "b"]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_xydata(), np.stack([t / 2, -t], 1))


def test_fields_are_drawn_the_right_way_up_on_the_scale_of_the_first():
    fields = {"Noise": spot(1, 1), "A": spot(2, 1, -4.0), "B": spot(0, -2, 30.0)}
    figure = figures.log_density_fields(fields, EXTENT)
    pixels = drawn(figure)
    noise, a, b = (titled(figure, title) for title in fields)
    assert colour_at(pixels, noise, 1, 1).sum() < 120
    assert (colour_at(pixels, b, 0, -2) == colour_at(pixels, noise, 1, 1)).all()
    fainter = colour_at(pixels, a, 2, 1).sum()
    assert 120 < fainter < 750
    for x, y in [(-2, 1), (2, -1), (1, 2)]:
        assert colour_at(pixels, a, x, y).sum() > 750
    assert [ax.get_title() for ax in figure.axes] == ["Noise", "A", "B"]
    one = figures.log_density_fields({"Noise": spot(1, 1)}, EXTENT)
    pixels, (ax,) = drawn(one), one.axes
    assert colour_at(pixels, ax, 1, 1).sum() < 120
    assert (pixels[:, int(ax.bbox.x1) + 4 :] < 200).any(), "the scale"


def test_points_stand_over_the_line_that_is_expected_on_logarithmic_axes():
    nu = [0.1, 1.0, 10.0]
    measured, expected = [0.5, 0.04, 0.003], [0.4, 0.05, 0.004]
    figure = figures.log_lines({"here": (nu, measured)}, {"theory": (nu, expected)}, "nu", "error")
    pixels, (ax,) = drawn(figure), figure.axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("nu", "error")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["theory", "here"]
    for x, y in zip(nu, measured, strict=True):
        assert darkness(pixels, ax, x, y) > 100
    assert darkness(pixels, ax, 0.1**0.5, (0.4 * 0.05) ** 0.5) > 60  # on the line
    assert darkness(pixels, ax, 0.1**0.5, (0.5 * 0.04) ** 0.5 / 3) == 0


def random():
    return np.random.default_rng(0)


def densities():
    r = random()
    centres = -3 + 6 * (np.arange(200) + 0.5) / 200
    modes = np.array([(i, j) for i in range(-2, 3) for j in range(-2, 3)])
    squared = [(centres - x) ** 2 + ((centres - y) ** 2)[:, None] for x, y in modes]
    density = np.logaddexp.reduce([-s / (2 * 0.12**2) for s in squared])
    samples = modes[r.integers(0, 25, 10000)] + 0.12 * r.normal(size=(10000, 2))
    spread = samples + 0.2 * r.normal(size=samples.shape)
    return figures.density_panels(
        density, density / 2, {"Before": spread, "After": samples}, EXTENT
    )


REALISTIC = {
    "densities": densities,
    "images": lambda: figures.image_grid(random().uniform(size=(64, 28, 28)), 16),
    "filters": lambda: figures.filters(random().normal(size=(100, 8, 8)), 20),
    "chains": lambda: figures.chain_strip(random().uniform(size=(12, 8, 8, 8)), range(12)),
}


@pytest.mark.parametrize("kind", REALISTIC)
def test_a_png_is_small_and_true_to_the_colours(kind):
    file = figures.png(REALISTIC[kind]())
    assert len(file) < 150_000
    exact = io.BytesIO()
    REALISTIC[kind]().savefig(exact, dpi=figures.DPI)
    shown, drawn = (np.asarray(Image.open(f).convert("RGB")) for f in (io.BytesIO(file), exact))
    assert np.abs(shown.astype(int) - drawn).max() <= 12


def test_figures_are_freed_and_style_stays_inside():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = figures.image_grid(np.zeros((2, 3, 3)), 2)
    alive = weakref.ref(figure)
    del figure
    gc.collect()
    assert alive() is None
    assert dict(matplotlib.rcParams) == before


def test_neither_pyplot_nor_torch_is_imported():
    unwanted = {"torch", "matplotlib.pyplot"}
    code = f"import sys, pipelines, ebm.figures; print({unwanted} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "set()\n", result.stderr


def test_energies_that_are_no_numbers_are_left_out_of_a_histogram():
    normal = np.random.default_rng(0).normal(size=500)
    odd = np.array([np.inf, -np.inf, np.nan, 0.0])
    figure = figures.energy_histogram({"data": np.concatenate([normal, odd]), "other": odd})
    assert all(np.isfinite(ax.get_xlim()).all() for ax in figure.axes)
    with pytest.raises(EBMError, match="energies of other: none of them is a number"):
        figures.energy_histogram({"data": normal, "other": odd[2:3]})


def test_a_line_marks_the_median_of_energies_and_not_their_mean():
    sets = {"data": np.array([0.0, 1.0, 9.0]), "other": np.array([2.0, 3.0, 3.0, 8.0])}
    figure = figures.energy_histogram(sets)
    assert [ax.lines[0].get_xdata()[0] for ax in figure.axes] == [1, 3]


def test_the_scale_of_filters_ends_where_one_in_two_hundred_is_beyond():
    weights = np.linspace(-0.5, 1, 3001).reshape(-1, 1, 1)
    figure = figures.filters(np.abs(weights) * np.sign(weights), 60)
    share = (np.abs(weights) > figure.axes[0].images[0].norm.vmax).mean()
    assert share == pytest.approx(0.005, abs=4e-4)


def test_the_legend_has_each_line_of_a_class_in_its_own_form():
    kinds = {"strict": ([0.3], [0.1])}
    lines = {"chance": {"strict": [0.2]}, "floor": {"strict": [0.1]}}
    figure = figures.by_class({"energy": kinds}, lines, ["4"], "AUPRC")
    (ax,) = figure.axes
    patterns = {c.get_segments()[0][0, 1]: c.get_linestyle()[0][1] for c in ax.collections[-2:]}
    handles, names = ax.get_legend_handles_labels()
    forms = dict(zip(names, handles, strict=True))
    for name, values in lines.items():
        dash, gap = patterns[values["strict"][0]]
        assert (dash > gap) == (forms[name].get_linestyle() == "--"), name


def test_an_animation_shows_its_frames_in_turn_and_rests_at_the_last():
    greys = [0.0, 0.5, 1.0]
    frames = [figures.image_grid(np.full((1, 4, 4), grey), 1) for grey in greys]
    file = Image.open(io.BytesIO(figures.png(frames)))
    shown, times = [], []
    for k in range(file.n_frames):
        file.seek(k)
        shown.append(np.asarray(file.convert("L"))[20, 20])
        times.append(file.info["duration"])
    assert times == [250, 250, 1000]
    assert shown[0] > shown[1] > shown[2]
    assert file.info["loop"] == 0
