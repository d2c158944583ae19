"""Laws of the metrics: closed forms, invariances, known floors."""

import math
import statistics
from functools import cache, partial
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch

from ebm import metrics
from ebm.densities import DENSITIES, EXTENT
from ebm.schema import DensityData


def test_modes_are_counted_within_the_radius_only():
    modes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[0.05, 0.0], [0.95, 0.0], [0.5, 0.5], [0.0, 0.04]])
    near = metrics.nearest_mode(x, modes, radius=0.1)
    assert near.tolist() == [0, 1, -1, 0]
    assert metrics.mode_counts(near, 3).tolist() == [2, 1, 0]


def test_kl_to_uniform_in_closed_form():
    assert metrics.kl_to_uniform(torch.tensor([5, 5, 5])) == pytest.approx(0, abs=1e-12)
    assert metrics.kl_to_uniform(torch.tensor([9, 0, 0])) == pytest.approx(math.log(3))
    expected = 0.75 * math.log(0.75 * 2) + 0.25 * math.log(0.25 * 2)
    assert metrics.kl_to_uniform(torch.tensor([3, 1])) == pytest.approx(expected)
    assert math.isnan(metrics.kl_to_uniform(torch.tensor([0, 0])))


def test_kl_of_uniform_draws_has_its_known_floor():
    torch.manual_seed(0)
    values = [
        metrics.kl_to_uniform(torch.bincount(torch.randint(25, (5000,)), minlength=25))
        for _ in range(200)
    ]
    assert sum(values) / 200 == pytest.approx(24 / (2 * 5000), rel=0.1)


def test_that_floor_is_the_mean_over_all_draws():
    draws = [torch.bincount(torch.tensor(d), minlength=3) for d in product(range(3), repeat=4)]
    expected = sum(metrics.kl_to_uniform(counts) for counts in draws) / len(draws)
    assert metrics.uniform_kl(3, 4) == pytest.approx(expected)
    assert metrics.uniform_kl(3, 1) == pytest.approx(math.log(3))
    assert metrics.uniform_kl(1000, 26000) == pytest.approx(999 / 52000, rel=0.02)


def test_inception_scores_in_closed_form():
    sure, unsure = torch.eye(4).repeat(5, 1), torch.full((20, 4), 0.25)
    assert metrics.inception_score(sure) == pytest.approx(4)
    assert metrics.inception_score(sure[:1].expand(9, 4)) == pytest.approx(1)
    assert metrics.inception_score(unsure) == pytest.approx(1)
    half = metrics.inception_score(torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    gain = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert half == pytest.approx(math.exp(gain))
    assert math.isnan(metrics.inception_score(torch.tensor([[math.nan, 1.0]])))


def test_frechet_distance_of_two_gaussians_in_closed_form():
    """Diagonal covariances: |m|^2 + sum (s - t)^2."""
    torch.manual_seed(1)
    x = torch.randn(400000, 2) * torch.tensor([1.0, 2.0])
    y = torch.randn(400000, 2) * torch.tensor([3.0, 0.5]) + torch.tensor([1.0, -1.0])
    assert metrics.frechet_distance(x, y) == pytest.approx(2 + 4 + 2.25, rel=0.01)


def test_frechet_distance_is_zero_on_itself_symmetric_and_free_of_rotation():
    torch.manual_seed(2)
    x, y = torch.randn(500, 5).double(), torch.randn(400, 5).double() @ torch.randn(5, 5).double()
    q, _ = torch.linalg.qr(torch.randn(5, 5).double())
    there, back = metrics.frechet_distance(x, y), metrics.frechet_distance(y, x)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert there == pytest.approx(back)
    assert metrics.frechet_distance(x @ q, y @ q) == pytest.approx(there)


def test_frechet_distance_survives_constant_pixels():
    x = torch.cat([torch.randn(100, 3), torch.zeros(100, 2)], 1)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_from_statistics_is_that_from_features():
    torch.manual_seed(5)
    x, y = torch.randn(300, 4), 2 * torch.randn(200, 4) + 1
    stored = metrics.gaussian_frechet_distance(*metrics.moments(x), *metrics.moments(y))
    assert stored == metrics.frechet_distance(x, y)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """In closed form for two dimensions: tr (AB)^(1/2) = (tr AB + 2 det(AB)^(1/2))^(1/2)."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()
    root = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    mean = torch.zeros(2).double()
    found = metrics.gaussian_frechet_distance(mean, a, mean + 1, b)
    assert found == pytest.approx((2 + a.trace() + b.trace() - 2 * root).item())


def test_extrapolation_takes_the_bias_of_few_samples_away():
    torch.manual_seed(6)
    mean, covariance = torch.zeros(16).double(), torch.eye(16).double()
    plain, extrapolated = [], []
    for _ in range(20):
        x = torch.randn(500, 16)
        plain.append(metrics.gaussian_frechet_distance(*metrics.moments(x), mean, covariance))
        order = torch.randperm(500)
        distance = metrics.extrapolated_frechet_distance(x, mean, covariance, order)
        extrapolated.append(distance)
    plain, extrapolated = torch.tensor(plain), torch.tensor(extrapolated)
    assert plain.mean() > 0.1  # the truth is 0
    assert extrapolated.mean().abs() < 0.1 * plain.mean()
    assert extrapolated.std() < 0.05


def test_extrapolation_keeps_a_true_distance():
    torch.manual_seed(7)
    mean, covariance = torch.full((8,), 0.5).double(), torch.eye(8).double()
    x = torch.randn(4000, 8)
    found = metrics.extrapolated_frechet_distance(x, mean, covariance, torch.randperm(4000))
    assert found == pytest.approx(8 * 0.25, abs=0.15)


def biased_kernel_distance(x, y):
    """A planted bug: the pairs of a point with itself are left in."""
    dim = x.shape[1]
    return sum(
        sign * ((u @ v.T / dim + 1) ** 3).mean().item()
        for u, v, sign in ((x, x, 1), (y, y, 1), (x, y, -2))
    )


@pytest.mark.parametrize("distance", [metrics.kernel_distance, biased_kernel_distance])
def test_kernel_distance_has_no_bias_on_one_distribution(distance):
    torch.manual_seed(8)
    values = torch.tensor(
        [distance(torch.randn(30, 6).double(), torch.randn(20, 6).double()) for _ in range(400)]
    )
    deviation = values.mean().abs() / (values.std() / 20)
    assert (deviation < 3.5) == (distance is metrics.kernel_distance)


def test_kernel_distance_of_points_in_closed_form():
    """Two equal points at a, two at b: k(a, a) + k(b, b) - 2 k(a, b)."""
    a, b = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 3.0]).double()
    expected = 3.5**3 + 5.5**3 - 2 * 4.0**3
    found = metrics.kernel_distance(a.expand(2, 2), b.expand(2, 2))
    assert found == pytest.approx(expected)


def test_kernel_distance_in_slices_is_that_at_once():
    torch.manual_seed(9)
    x, y = torch.randn(1500, 3).double(), torch.randn(1100, 3).double() + 1
    n, m = len(x), len(y)
    k = (torch.cat([x, y]) @ torch.cat([x, y]).T / 3 + 1) ** 3
    within = (k[:n, :n].sum() - k[:n, :n].trace()) / (n * (n - 1))
    within += (k[n:, n:].sum() - k[n:, n:].trace()) / (m * (m - 1))
    assert metrics.kernel_distance(x, y) == pytest.approx((within - 2 * k[:n, n:].mean()).item())


def test_precision_and_recall_of_equal_and_of_distant_sets():
    torch.manual_seed(10)
    x = torch.randn(200, 5)
    assert metrics.precision_recall(x, x.clone()) == (1, 1)
    assert metrics.precision_recall(x, x + 100) == (0, 0)


def test_dropped_modes_cost_recall_and_noise_costs_precision():
    torch.manual_seed(11)
    centres = 50 * torch.eye(4)
    data, samples = (centres.repeat(100, 1) + torch.randn(400, 4) for _ in range(2))
    few = samples[torch.arange(400) % 4 < 2]  # of two modes of four
    noisy = torch.cat([samples[:200], 100 + 50 * torch.randn(200, 4)])
    precision, recall = metrics.precision_recall(samples, data)
    assert precision > 0.85
    assert recall > 0.85
    precision, recall = metrics.precision_recall(few, data)
    assert precision > 0.85
    assert 0.4 < recall <= 0.5
    precision, recall = metrics.precision_recall(noisy, data)
    assert 0.4 < precision <= 0.5


def test_the_manifold_reaches_to_the_kth_other_point():
    """On a line of integers the balls of k = 1 have radius 1, those of k = 3 have 2 and 3."""
    data = torch.arange(10.0).unsqueeze(1)
    probe = torch.tensor([[10.5], [11.5], [12.5], [13.5]])
    for k, inside in ((1, 0), (2, 1), (3, 2)):
        assert metrics.precision_recall(probe, data, k)[0] == inside / 4


def scores(ties):
    torch.manual_seed(12)
    inliers, outliers = torch.randn(80).double(), torch.randn(50).double() + 0.7
    return ((2 * inliers).round(), (2 * outliers).round()) if ties else (inliers, outliers)


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_the_statistic_of_mann_and_whitney(ties):
    inliers, outliers = scores(ties)
    pairs = outliers.unsqueeze(1) - inliers
    expected = ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()
    found = metrics.auroc(inliers, outliers)
    assert found == pytest.approx(expected)
    assert found > 0.6
    assert metrics.auroc(-inliers, -outliers) == pytest.approx(1 - found)
    assert metrics.auroc(inliers.exp(), outliers.exp()) == pytest.approx(found)
    if ties:  # counting ties as wins, a planted bug, is seen
        assert abs((pairs >= 0).double().mean().item() - found) > 0.03


@pytest.mark.parametrize("ties", [False, True])
def test_areas_are_those_of_scikit_learn(ties):
    from sklearn.metrics import average_precision_score, roc_auc_score

    inliers, outliers = scores(ties)
    truth, score = [0] * len(inliers) + [1] * len(outliers), torch.cat([inliers, outliers])
    assert metrics.auroc(inliers, outliers) == pytest.approx(roc_auc_score(truth, score))
    assert metrics.auprc(inliers, outliers) == pytest.approx(average_precision_score(truth, score))


@pytest.mark.parametrize("ties", [False, True])
def test_the_trapezoid_is_that_of_released_code(ties):
    from sklearn.metrics import auc, precision_recall_curve

    inliers, outliers = scores(ties)
    truth, score = [0] * len(inliers) + [1] * len(outliers), torch.cat([inliers, outliers])
    precision, recall, _ = precision_recall_curve(truth, score)
    found = metrics.auprc_trapezoid(inliers, outliers)
    assert found == pytest.approx(auc(recall, precision))
    assert abs(found - metrics.auprc(inliers, outliers)) > 1e-4


@pytest.mark.parametrize("ties", [False, True])
def test_a_prevalence_counts_inliers_as_if_there_were_more(ties):
    inliers, outliers = (part[:20] for part in scores(ties))
    many = metrics.auprc(inliers.repeat(9), outliers)
    assert metrics.auprc(inliers, outliers, 0.1) == pytest.approx(many)
    assert metrics.auprc(inliers, outliers, 0.5) == metrics.auprc(inliers, outliers)


AREAS = [
    metrics.auroc,
    metrics.auprc,
    metrics.auprc_trapezoid,
    partial(metrics.auprc, prevalence=0.1),
]


@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize(("inliers", "outliers"), [(3, 3), (5, 1), (2, 4)])
def test_no_ranking_is_below_the_worst_one(area, inliers, outliers):
    everything = [
        area(torch.tensor(ranks[outliers:]), torch.tensor(ranks[:outliers]))
        for ranks in permutations(range(inliers + outliers))
    ]
    assert metrics.worst(area, inliers, outliers) == pytest.approx(min(everything))
    assert max(everything) == pytest.approx(1)


def test_the_floor_of_mnist_with_the_digit_0_is_the_known_one():
    """Of 70,000 images 6,903 show it; a fifth of the others are test."""
    normal = round(0.2 * (70000 - 6903))
    for area in (metrics.auprc, metrics.auprc_trapezoid):
        assert metrics.worst(area, normal, 6903) == pytest.approx(0.202, abs=5e-4)


@pytest.mark.parametrize("ties", [False, True])
def test_detection_is_what_scikit_learn_counts(ties):
    from sklearn.metrics import precision_recall_fscore_support

    inliers, outliers = scores(ties)
    truth, score = [0] * len(inliers) + [1] * len(outliers), torch.cat([inliers, outliers])
    for threshold in (-1.0, 0.5, 1.0):
        flagged = score >= threshold
        expected = precision_recall_fscore_support(truth, flagged, average="binary")[:3]
        assert metrics.detection(inliers, outliers, threshold) == pytest.approx(expected)
    assert metrics.detection(inliers, outliers, 99.0) == (0, 0, 0)


def test_a_threshold_is_not_rounded_to_the_type_of_the_scores():
    score = torch.tensor([0.1])
    assert metrics.detection(score, score, 0.1)[1] == 1  # 0.1 as float32 is above 0.1
    assert metrics.detection(score, score, 0.1000001)[1] == 0


@pytest.mark.parametrize("ties", [False, True])
def test_a_share_is_flagged_as_by_released_code(ties):
    torch.manual_seed(13)
    score = torch.randn(1001)
    score = score.mul(3).round() if ties else score
    threshold = metrics.share_threshold(score, 0.2)
    released = score.double() >= np.percentile(score.double().numpy(), 80)
    assert torch.equal(score.double() >= threshold, released)
    assert ties or int((score.double() >= threshold).sum()) == 201
    assert threshold == (score[released].min().double() + score[~released].max().double()) / 2
    assert metrics.share_threshold(torch.zeros(9), 0.2) == 0  # and all nine are flagged
    assert math.isnan(metrics.share_threshold(torch.tensor([0.0, math.nan]), 0.2))


@pytest.mark.parametrize("ties", [False, True])
def test_no_threshold_has_a_better_f1_than_the_best(ties):
    inliers, outliers = scores(ties)
    found = metrics.best_f1_threshold(inliers, outliers)
    others = {
        t: metrics.detection(inliers, outliers, t)[2]
        for t in [-99.0, *torch.cat([inliers, outliers]).tolist()]
    }
    best = max(others.values())
    assert metrics.detection(inliers, outliers, found)[2] == best
    lowest = max(t for t, f1 in others.items() if f1 == best)
    assert found == (lowest + max(t for t in others if t < lowest)) / 2


def test_of_thresholds_alike_the_highest_is_taken():
    inliers, outliers = torch.tensor([1.0, 1.5]), torch.tensor([0.0, 2.0])
    f1 = {t: metrics.detection(inliers, outliers, t)[2] for t in (0.0, 1.0, 1.5, 2.0)}
    assert f1[0.0] == f1[2.0] == max(f1.values())
    assert metrics.best_f1_threshold(inliers, outliers) == 1.75


def test_a_threshold_between_two_classes_leaves_room_for_new_points_of_either():
    assert metrics.best_f1_threshold(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 9.0])) == 2


@pytest.mark.parametrize("inlier", [-math.inf, 0.1])
def test_a_threshold_flags_no_row_more_where_there_is_no_middle(inlier):
    inliers = torch.tensor([inlier], dtype=torch.float64)
    outliers = inliers.clamp(min=-1).nextafter(torch.tensor(math.inf))
    found = metrics.best_f1_threshold(inliers, outliers)
    assert metrics.detection(inliers, outliers, found)[2] == 1


@pytest.mark.parametrize("infinite", [1, 5])
def test_rows_that_the_model_holds_for_impossible_leave_it_a_finite_threshold(infinite):
    """Anomalies are what overflows first."""
    usual, impossible = torch.arange(100.0), torch.full((infinite,), math.inf)
    found = metrics.best_f1_threshold(usual, impossible)
    assert 99 < found < 100  # whatever is more than all that was usual
    assert metrics.detection(usual, impossible, found) == (1, 1, 1)
    scores = torch.cat([usual, impossible])
    for share in (0.01, 0.2, 1.0):
        threshold = metrics.share_threshold(scores, share)
        assert math.isfinite(threshold)
        assert int((scores.double() >= threshold).sum()) >= share * len(scores)
    assert 99 < metrics.share_threshold(scores, 0.005) < 100
    assert metrics.share_threshold(impossible, 0.5) == math.inf  # no number flags half of them


@pytest.mark.parametrize(("outliers", "flagged"), [(2, 2), (2, 3), (3, 2), (4, 1)])
def test_no_rule_of_a_fixed_share_has_a_better_f1_than_its_ceiling(outliers, flagged):
    n = 7
    found = []
    for rows in combinations(range(n), flagged):
        score = torch.zeros(n)
        score[list(rows)] = 1
        found.append(metrics.detection(score[outliers:], score[:outliers], 1.0)[2])
    assert metrics.f1_ceiling(outliers / n, flagged / n) == pytest.approx(max(found))


def test_the_ceiling_of_the_published_protocol_is_the_known_one():
    assert metrics.f1_ceiling(0.197, 0.2) == pytest.approx(0.992, abs=5e-4)


def test_areas_of_scores_that_know_nothing_and_of_perfect_ones():
    same = torch.ones(30)
    assert metrics.auroc(same, same[:10]) == 0.5
    assert metrics.auprc(same, same[:10]) == pytest.approx(0.25)
    assert metrics.auroc(same, same[:10] + 1) == metrics.auprc(same, same[:10] + 1) == 1


def test_a_score_that_is_not_a_number_is_not_ranked():
    good, bad = torch.zeros(3), torch.tensor([0.0, math.nan])
    for area in (*AREAS, metrics.best_f1_threshold):
        assert math.isnan(area(good, bad))
        assert math.isnan(area(bad, good))
    assert all(map(math.isnan, metrics.detection(good, bad, 0.0)))
    assert all(map(math.isnan, metrics.detection(good, good, math.nan)))


def test_grid_log_partition_of_a_gaussian():
    grid = metrics.cell_centres(-8, 8, 200)
    log_z = metrics.grid_log_partition(grid.square().sum(1) / 2, -8, 8)
    assert log_z.item() == pytest.approx(math.log(2 * math.pi), abs=1e-9)


def test_grid_kl_of_two_gaussians_in_closed_form():
    grid = metrics.cell_centres(-8, 8, 300)
    p, q = -grid.square().sum(1) / 2, -(grid - 0.5).square().sum(1) / (2 * 1.5**2)
    per_axis = math.log(1.5) + (1 + 0.25) / (2 * 1.5**2) - 0.5
    assert metrics.grid_kl(p, q) == pytest.approx(2 * per_axis, rel=1e-5)
    assert metrics.grid_kl(p, p + 7) == pytest.approx(0, abs=1e-12)


def test_the_grid_is_in_rows_of_ascending_y():
    grid = metrics.cell_centres(0, 1, 2)
    assert grid.tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


@cache
def log_p_on_grid(name):
    """log p of a toy density on the cells of its square, in slices that a processor's cache
    holds."""
    density = DENSITIES[name]()
    cells = 300 if density.modal else 180  # below sigma: there the midpoint rule is exact to 1e-8
    return metrics.in_batches(density.log_prob, metrics.cell_centres(*EXTENT, cells), 256)


@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_a_toy_density_integrates_to_one_and_fits_its_square(name):
    log_z = metrics.grid_log_partition(-log_p_on_grid(name), *EXTENT)
    assert log_z.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["8gaussians", "25gaussians"])
def test_the_narrowest_do_so_on_the_fewest_cells_that_an_evaluation_may_have(name):
    fewest = DensityData.fewest_cells
    for cells in range(fewest, fewest + 40):
        grid = metrics.cell_centres(*EXTENT, cells)
        energy = DENSITIES[name]().energy(grid.double())
        log_z = metrics.grid_log_partition(energy, *EXTENT)
        assert log_z.exp().item() == pytest.approx(1, abs=1e-2), cells


@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_draws_of_a_toy_density_have_its_entropy(name):
    """Mean log p of draws equals the integral of p log p: sampler and density are of one
    distribution."""
    density = DENSITIES[name]()
    torch.manual_seed(3)
    log_p = metrics.in_batches(density.log_prob, density.sample(4000), 256)
    on_grid = log_p_on_grid(name)
    p = on_grid.softmax(0)
    error = 5 * log_p.std() / math.sqrt(len(log_p)) + 0.01
    assert log_p.mean().item() == pytest.approx((p * on_grid).sum().item(), abs=error.item())


@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_a_toy_density_is_as_exact_for_points_in_single_precision(name):
    density = DENSITIES[name]()
    x = density.sample(500).float()
    found, exact = density.log_prob(x), density.log_prob(x.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), rtol=1e-6, atol=1e-6)


def test_every_curve_is_strung_closely_enough():
    for name, factory in DENSITIES.items():
        density = factory()
        if density.modal:
            continue
        distance = torch.cdist(density.means, density.means) + 9 * torch.eye(len(density.means))
        assert distance.min(1).values.max() < density.sigma / 2, name


def test_modes_of_exact_draws_hold_what_theory_says():
    """A two-dimensional Gaussian has 1 - exp(-8) of its mass within 4 sigma."""
    torch.manual_seed(4)
    density = DENSITIES["25gaussians"]()
    near = metrics.nearest_mode(density.sample(200000), density.means, 4 * density.sigma)
    assert (near >= 0).double().mean().item() == pytest.approx(1 - math.exp(-8), abs=3e-4)


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_of_a_toy_density_are_of_the_class_of_their_run_of_means(name):
    torch.manual_seed(5)
    density = DENSITIES[name]()
    x, y = density.sample_with_classes(2000)
    assert x.shape == (2000, 2)
    share = y.bincount(minlength=density.classes) / 2000
    assert len(share) == density.classes
    assert (share - 1 / density.classes).abs().max() < 4 * 0.5 / math.sqrt(2000)
    run = len(density.means) // density.classes
    distance = torch.stack([torch.cdist(x, m).min(1).values for m in density.means.split(run)], 1)
    assert distance[torch.arange(2000), y].max() < 5 * density.sigma
    assert (distance.argmin(1) == y).double().mean() > 0.99
    torch.manual_seed(5)
    assert torch.equal(density.sample(2000), x)


@pytest.mark.parametrize(("inliers", "outliers"), [(49, 1), (17, 3), (1, 4)])
def test_the_average_precision_of_chance_is_the_mean_over_rankings(inliers, outliers):
    torch.manual_seed(0)
    n = inliers + outliers
    found = [
        metrics.auprc(scores[outliers:], scores[:outliers])
        for scores in (torch.randperm(n).double() for _ in range(4000))
    ]
    mean, deviation = statistics.fmean(found), statistics.stdev(found)
    assert metrics.chance_auprc(inliers, outliers) == pytest.approx(mean, abs=4 * deviation / 63)


def test_the_average_precision_of_chance_is_the_share_of_many():
    assert metrics.chance_auprc(80000, 20000) == pytest.approx(0.2, abs=2e-4)


def test_manifolds_reach_to_the_third_neighbour_unless_another_is_asked_for():
    torch.manual_seed(14)
    x, y = torch.randn(60, 5), torch.randn(60, 5)
    by_default = metrics.precision_recall(x, y)
    assert by_default == metrics.precision_recall(x, y, 3)
    assert by_default != metrics.precision_recall(x, y, 4)


def test_the_covariance_of_few_features_is_without_bias():
    """Half the mean square of the differences of all pairs of two points, axis by axis."""
    torch.manual_seed(15)
    x = torch.randn(5, 2, 3).double()
    flat = x.flatten(1)
    differences = torch.stack([flat[i] - flat[j] for i, j in combinations(range(5), 2)])
    mean, covariance = metrics.moments(x)
    torch.testing.assert_close(mean, flat.mean(0))
    torch.testing.assert_close(covariance, differences.T @ differences / len(differences) / 2)


def test_toy_densities_have_the_scales_that_they_are_known_for():
    """Those of MEG's code where it has them: rings of Gaussians and rolls in units of 2."""
    names = ("8gaussians", "25gaussians", "swissroll", "rings", "2spirals")
    ring, grid, roll, rings, spirals = (DENSITIES[name]() for name in names)
    radius = ring.means.norm(dim=1)
    torch.testing.assert_close(radius, torch.full_like(radius, math.sqrt(2)), rtol=0, atol=1e-3)
    assert ring.sigma == pytest.approx(0.02 / math.sqrt(2), rel=1e-3)
    sides = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64) / math.sqrt(2)
    torch.testing.assert_close(grid.means[:5, 1], sides, rtol=1e-3, atol=0)
    torch.testing.assert_close(grid.means[::5, 0], sides, rtol=1e-3, atol=0)
    assert grid.sigma == pytest.approx(0.05 / math.sqrt(8), rel=1e-3)
    ends = torch.tensor([0.2, 0.6], dtype=torch.float64) * math.pi
    torch.testing.assert_close(roll.means[[0, -1]].norm(dim=1), ends, rtol=1e-3, atol=0)
    assert roll.sigma == pytest.approx(1 / 30)
    radii = rings.means.norm(dim=1).view(4, -1)
    exact = torch.tensor([[0.4], [0.8], [1.2], [1.6]], dtype=torch.float64).expand_as(radii)
    torch.testing.assert_close(radii, exact)
    half = len(spirals.means) // 2
    outer = torch.tensor([math.pi / 2, 0], dtype=torch.float64)
    torch.testing.assert_close(spirals.means[half - 1], outer, rtol=0, atol=0.01)
    torch.testing.assert_close(spirals.means[half:], -spirals.means[:half])
    assert rings.sigma == spirals.sigma == 0.03


def test_extrapolation_is_the_line_through_three_sizes_of_parts_in_the_order_that_is_given():
    """Least squares through d_1, d_2, d_3 at 1, 2, 3 has the value (4 d_1 + d_2 - 2 d_3) / 3 at
    0."""
    torch.manual_seed(16)
    x = torch.randn(90, 3).double().sort(0).values  # rows side by side are alike
    mean, covariance = torch.zeros(3).double(), torch.eye(3).double()
    order = torch.randperm(90)

    def distance(pieces):
        fits = [metrics.moments(part) for part in x[order].tensor_split(pieces)]
        return statistics.fmean(
            metrics.gaussian_frechet_distance(*fit, mean, covariance) for fit in fits
        )

    expected = (4 * distance(1) + distance(2) - 2 * distance(3)) / 3
    found = metrics.extrapolated_frechet_distance(x, mean, covariance, order)
    assert found == pytest.approx(expected, rel=1e-9)


def test_manifolds_in_slices_are_those_at_once(monkeypatch):
    torch.manual_seed(17)
    x, y = torch.randn(50, 3), torch.randn(40, 3) + 0.7
    at_once = metrics.precision_recall(x, y)
    assert 0 < min(at_once) < max(at_once) < 1
    monkeypatch.setattr(metrics, "SLICE", 16)
    assert metrics.precision_recall(x, y) == at_once


def test_moments_of_features_in_single_precision_are_exact():
    mean, covariance = metrics.moments(torch.tensor([[2.0**24], [2.0**24 + 2]]))
    assert mean.item() == 2**24 + 1  # between two numbers of float32
    assert covariance.item() == 2


def test_a_constant_of_the_energy_leaves_log_z_by_itself_to_the_last_digits():
    energy = metrics.cell_centres(-2.0, 2.0, 20).square().sum(1)
    log_z = metrics.grid_log_partition(energy, -2.0, 2.0).item()
    found = metrics.grid_log_partition(energy + 1e6, -2.0, 2.0).item()
    assert found + 1e6 == pytest.approx(log_z, abs=1e-8)


def test_recall_is_by_the_manifold_of_the_samples_and_precision_by_that_of_the_data():
    """Samples close together among data far apart: each is in the data's, hardly any data in
    theirs."""
    x = torch.tensor([[0.0], [0.1], [0.2], [0.3]])
    y = torch.tensor([[0.15], [5.0], [10.0], [15.0]])
    assert metrics.precision_recall(x, y, 1) == (1.0, 0.25)
    assert metrics.precision_recall(y, x, 1) == (0.25, 1.0)
