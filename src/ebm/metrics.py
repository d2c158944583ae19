"""Samples and scores in, numbers out. No model, no file, no randomness."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SLICE = 1024
"""Points that are compared with all others at once."""


def nearest_mode(x: Tensor, modes: Tensor, radius: float) -> Tensor:
    """For x [N, D] the index of its nearest mode [N], or -1 where that is over `radius` away."""
    distance, index = torch.cdist(x.double(), modes.double()).min(1)
    return torch.where(distance <= radius, index, -1)


def mode_counts(assignment: Tensor, modes: int) -> Tensor:
    """How many samples each of the `modes` got [modes]; assignments of -1 count for none."""
    return torch.bincount(assignment[assignment >= 0], minlength=modes)


def kl_to_uniform(counts: Tensor) -> float:
    """KL(histogram || uniform) in nats; 0 log 0 = 0. NaN for an empty histogram.

    For n draws of the uniform itself the expectation is about (K - 1) / (2 n): its floor.
    """
    p = counts.double() / counts.sum()
    return (torch.xlogy(p, p).sum() + math.log(len(counts))).item()


def uniform_kl(modes: int, n: int) -> float:
    """The expectation of `kl_to_uniform` for n draws of the uniform distribution over so many
    modes: a mode's count is binomial, and the expectation is a sum over its values."""
    count = torch.arange(n + 1, dtype=torch.float64)
    share = torch.tensor(1 / modes, dtype=torch.float64)
    probability = torch.distributions.Binomial(n, share).log_prob(count)
    expected = (probability.exp() * torch.xlogy(count / n, count / n)).sum()
    return (modes * expected + math.log(modes)).item()


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)) of class probabilities [N, K], p(y) their mean (Salimans
    et al. 2016, arXiv:1606.03498): between 1 and K, high where every point shows one class
    clearly and all classes are there. NaN if a probability is NaN."""
    p = probabilities.double()
    marginal = p.mean(0)
    gain = torch.xlogy(p, p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
    return gain.exp().item()


def cell_centres(low: float, high: float, cells: int) -> Tensor:
    """Centres of the cells x cells grid over [low, high]^2, rows = y ascending: [cells^2, 2]."""
    axis = low + (high - low) * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def grid_log_partition(energy: Tensor, low: float, high: float) -> Tensor:
    """log of the integral of exp(-E) over a square, by the midpoint rule on its cell centres."""
    cells = math.isqrt(energy.numel())
    return torch.logsumexp(-energy.double(), 0) + 2 * math.log((high - low) / cells)


def grid_kl(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) in nats of two densities given at the cells of one grid, each normalised on
    it."""
    log_p, log_q = log_p.double().log_softmax(0), log_q.double().log_softmax(0)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum().item()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of features [N, *], in float64; D is the rest, flattened."""
    x = x.double().flatten(1)
    return x.mean(0), torch.cov(x.T)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to features [N, *] and [M, *]."""
    return gaussian_frechet_distance(*moments(x), *moments(y))


def gaussian_frechet_distance(m_x: Tensor, c_x: Tensor, m_y: Tensor, c_y: Tensor) -> float:
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of means [D] and covariances [D, D].

    The squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982). The trace of the
    root is the sum of the roots of the eigenvalues of C_x^(1/2) C_y C_x^(1/2), which is symmetric,
    so nothing complex or unstable is taken.
    """
    values, vectors = torch.linalg.eigh(c_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_y @ root).clamp(min=0).sqrt().sum()
    return ((m_x - m_y).square().sum() + c_x.trace() + c_y.trace() - 2 * cross).item()


def extrapolated_frechet_distance(
    x: Tensor, mean: Tensor, covariance: Tensor, order: Tensor, parts: int = 3
) -> float:
    """Frechet distance of features x [N, *] to a Gaussian, extrapolated to N = infinity.

    The bias of N draws is a / N to first order (Chong & Forsyth 2020, arXiv:1911.07023), so a line
    through the distances at N, N/2, N/3 ... is read off at 1 / N = 0. The distance at N/k is the
    mean over the k parts of x in the permutation `order` [N], so all of x counts at each size.
    It can be negative. What is left of the bias counts where N / parts is not well above D. The
    Gaussian's own bias remains.
    """

    def distance(pieces: int) -> float:
        fits = [moments(x[rows]) for rows in order.tensor_split(pieces)]
        return sum(gaussian_frechet_distance(mean, covariance, *fit) for fit in fits) / pieces

    k = torch.arange(parts, dtype=torch.float64) + 1
    distances = torch.tensor([distance(n) for n in range(1, parts + 1)], dtype=torch.float64)
    line = torch.linalg.lstsq(torch.stack([torch.ones_like(k), k], 1), distances)
    return line.solution[0].item()


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID: unbiased estimate of MMD^2 of features [N, *] and [M, *] by the kernel
    k(a, b) = (a . b / D + 1)^3, over all pairs at once (Binkowski et al. 2018, arXiv:1801.01401,
    who average over subsets). 0 in expectation for draws of one distribution, so it can be
    negative."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    n, m = len(x), len(y)
    within = 2 * _kernel_of_pairs(x) / (n * (n - 1)) + 2 * _kernel_of_pairs(y) / (m * (m - 1))
    between = torch.stack([_kernel(part, y).sum() for part in x.split(SLICE)]).sum()
    return (within - 2 * between / (n * m)).item()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """k of each row of x [N, D] with each row of y [M, D]: [N, M]."""
    k = torch.addmm(x.new_ones(()), x, y.T, alpha=1 / x.shape[1])
    return k.square().mul_(k)


def _kernel_of_pairs(x: Tensor) -> Tensor:
    """k summed over all pairs of two different rows of x, each once."""
    sums = [
        _kernel(part, x[start:]).triu_(1).sum()
        for start, part in zip(range(0, len(x), SLICE), x.split(SLICE), strict=True)
    ]
    return torch.stack(sums).sum()


def precision_recall(x: Tensor, y: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of the samples x [N, *] within the manifold of the data y [M, *], and of y in that of
    x: quality and coverage (Kynkaanniemi et al. 2019, arXiv:1904.06991).

    A manifold is the union of the balls around its points, each just reaching the k-th nearest
    other point.
    """
    x, y = x.double().flatten(1), y.double().flatten(1)
    of_x, of_y = _radii(x, neighbours), _radii(y, neighbours)
    within, covered = [], torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for part, radii in zip(x.split(SLICE), of_x.split(SLICE), strict=True):
        distances = torch.cdist(part, y)
        within.append((distances <= of_y).any(1))
        covered |= (distances <= radii[:, None]).any(0)
    return torch.cat(within).double().mean().item(), covered.double().mean().item()


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """Distance of each point of x [N, D] to its `neighbours`-th nearest other point: [N]."""
    k = neighbours + 1  # a point is its own nearest
    nearest = in_batches(lambda part: torch.cdist(part, x).topk(k, largest=False).values, x, SLICE)
    return nearest[:, -1]


def _has_nan(inliers: Tensor, outliers: Tensor) -> bool:
    """Whether a score is NaN."""
    return bool(inliers.isnan().any() or outliers.isnan().any())


def auroc(inliers: Tensor, outliers: Tensor) -> float:
    """Area under the ROC curve of scores [N] and [M] that should be higher for outliers:
    P(outlier > inlier) + P(outlier = inlier) / 2, the statistic of Mann & Whitney (1947). NaN if a
    score is NaN."""
    if _has_nan(inliers, outliers):
        return math.nan
    ordered = inliers.sort().values
    below = torch.searchsorted(ordered, outliers)
    not_above = torch.searchsorted(ordered, outliers, right=True)
    return (below + not_above).double().mean().item() / (2 * len(inliers))


def auprc(inliers: Tensor, outliers: Tensor, prevalence: float | None = None) -> float:
    """Area under the precision-recall curve of the same scores, as average precision: the mean,
    over the outliers, of the precision at their own score. M / (N + M) for scores that know
    nothing; NaN if a score is NaN.

    With a `prevalence` the outliers count as if they made up that share of the rows.
    """
    if _has_nan(inliers, outliers):
        return math.nan
    true = len(outliers) - torch.searchsorted(outliers.sort().values, outliers)
    false = len(inliers) - torch.searchsorted(inliers.sort().values, outliers)
    weight = 1.0
    if prevalence is not None:
        weight = prevalence / (1 - prevalence) * len(inliers) / len(outliers)
    return (weight * true.double() / (weight * true.double() + false)).mean().item()


def auprc_trapezoid(inliers: Tensor, outliers: Tensor) -> float:
    """The same area with straight lines between the points of the curve and a first point at
    precision 1: what scikit-learn's `auc` makes of its `precision_recall_curve`, and what much
    released code reports. Straight lines flatter scores with many ties (Davis & Goadrich 2006)."""
    if _has_nan(inliers, outliers):
        return math.nan
    _, true, false = operating_points(inliers, outliers)
    precision = torch.cat([true.new_ones(1).double(), true.double() / (true + false)])
    recall = torch.cat([true.new_zeros(1).double(), true.double() / len(outliers)])
    return torch.trapezoid(precision, recall).item()


def chance_auprc(inliers: int, outliers: int) -> float:
    """What `auprc` is on average over all rankings of so many: in the limit of many the share of
    the outliers, of few more.

    At an outlier of rank k, on average 1 + (k - 1) (M - 1) / (n - 1) of the first k of n points
    are outliers, whose M ranks are uniform.
    """
    n = inliers + outliers
    harmonic = (1 / torch.arange(1, n + 1, dtype=torch.float64)).sum().item()
    others = (outliers - 1) / max(n - 1, 1)
    return (harmonic + others * (n - harmonic)) / n


def worst(area: Callable[[Tensor, Tensor], float], inliers: int, outliers: int) -> float:
    """What the worst ranking of so many, every inlier above every outlier and no two alike, scores
    by `area`. (Straight lines give outliers that are all alike a little less: M / (N + M) / 2.)"""
    ranks = torch.arange(inliers + outliers)
    return area(ranks[outliers:], ranks[:outliers])


def operating_points(inliers: Tensor, outliers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every way to flag the highest of scores [N] and [M]: thresholds [K] from the highest down,
    and how many outliers and how many inliers are not below them [K]."""
    thresholds = torch.cat([inliers, outliers]).unique().flip(0)
    true = len(outliers) - torch.searchsorted(outliers.sort().values, thresholds)
    false = len(inliers) - torch.searchsorted(inliers.sort().values, thresholds)
    return thresholds, true, false


def detection(inliers: Tensor, outliers: Tensor, threshold: float) -> tuple[float, float, float]:
    """Precision, recall and F1 of flagging what of scores [N] and [M] is not below `threshold`:
    share of the flagged that are outliers, share of the outliers that are flagged, and their
    harmonic mean. 0 where nothing is flagged, as scikit-learn has it; NaN if a score or the
    threshold is."""
    if _has_nan(inliers, outliers) or math.isnan(threshold):
        return math.nan, math.nan, math.nan
    true = int((outliers.double() >= threshold).sum())
    flagged = true + int((inliers.double() >= threshold).sum())
    return true / max(flagged, 1), true / len(outliers), 2 * true / (flagged + len(outliers))


def share_threshold(scores: Tensor, share: float) -> float:
    """Threshold that flags about the highest `share` of scores [N]: the same of them as NumPy's
    quantile, ties included. It lies midway between the lowest that is flagged and the highest that
    is not: a row that is scored again, in a smaller batch, may differ in its last digit, and that
    must flip nothing. NaN if a score is NaN."""
    scores, largest = scores.double(), torch.finfo(torch.float64).max
    finite = scores.clamp(-largest, largest)  # no quantile lies between infinities
    flagged = finite >= np.quantile(finite.cpu().numpy(), 1 - share)
    if not flagged.any():
        return math.nan
    lowest, others = scores[flagged].min().item(), scores[~flagged]
    return _between(lowest, others.max().item()) if len(others) else lowest


def best_f1_threshold(inliers: Tensor, outliers: Tensor) -> float:
    """The threshold of the best F1 on scores [N] and [M]; of several rules the one that flags
    fewest. All thresholds between two neighbouring scores flag the same of these; the middle
    leaves new points as much room on either side. NaN if a score is NaN."""
    if _has_nan(inliers, outliers):
        return math.nan
    thresholds, true, false = operating_points(inliers, outliers)
    f1 = 2 * true.double() / (true + false + len(outliers))
    lowest = int(f1.argmax())  # of the flagged scores; the next one is the highest of the others
    around = thresholds[lowest : lowest + 2].tolist()
    return _between(around[0], around[-1])


def _between(above: float, below: float) -> float:
    """The middle of two scores, or the upper one where no number lies between them; of infinity
    and a number what comes next to that."""
    middle = above / 2 + below / 2
    if middle == math.inf:
        return math.nextafter(below, math.inf)
    return middle if below < middle else above


def f1_ceiling(prevalence: float, flagged: float) -> float:
    """The best F1 of a rule that flags the share `flagged` of rows of which the share `prevalence`
    are outliers: 2 min(p, q) / (p + q), of a recall of at most min(1, q / p) and a precision of at
    most min(1, p / q)."""
    return 2 * min(prevalence, flagged) / (prevalence + flagged)


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, size: int = 16384) -> Tensor:
    """function(x) computed in slices along the first axis, without gradients."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(size)])
