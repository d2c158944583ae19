"""A trained model and its samples in; numbers, what to hold them against, and pictures out.

A reference is of one of six kinds: `exact` (the truth, known in closed form), `ceiling` and
`floor` (what draws of the true distribution itself score, or what the metric allows: no model can
honestly do better, but for the precision of samples at the price of their recall, and the
reverse), `chance` (scores that know nothing), `baseline` (a simple model fitted here, or the same
measured on the validation split) and `published`.

Names of metrics, the same in every experiment:

    modes, modes_total      modes with at least one sample: within 4 sigma in the plane, of that
                            tuple of classes for stacks; how many there are
    mode_kl                 KL(histogram over the modes || uniform), nats
    high_quality_share      share of samples within 4 sigma of a mode (of the curve, if it is one)
    grid_kl                 KL(true density || learned density), the true one on the cells of the
                            square that holds it, the learned one normalised as below, nats
    outside                 share of the learned density that lies beyond that square
    log_likelihood          mean log p of the test split, nats; in the plane Z is the integral over
                            the square and the 8 around it, where the model has support; that of a
                            flow is 1; where Z is estimated, the middle of the next two
    log_likelihood_lower, log_likelihood_upper   by estimates that tend to err low and high
                            (annealed importance sampling, back from the data and forward), and
                            within their noise may cross
    log_likelihood_train    the middle of the same of the training split
    log_partition           log Z, nats, in the middle of the same two estimates
    log_partition_left      log Z of an energy that has learned its constant, nats: 0 where that is
                            right; by a grid, of images by importance sampling from the noise that
                            the energy was trained against
    log_partition_ess       the effective size of that sample
    log_partition_error     root mean square error of log Z of the true density, estimated from
                            the model's noise, over several trials
    log_density_mse         mean squared error of log p at the test points, nats^2
    bits_per_dim            -log2 p per pixel and channel of the test images, NaN where log Z is
                            not known
    bits_per_dim_train      the same of as many training images
    accuracy                of the model as a classifier, by p(y | x) or by the class with the
                            lowest energy
    accuracy_supervised     the same of the same network without the unlabelled points
    frechet_distance        between samples and test split: of raw coordinates in the plane, of the
                            features of `ebm.reference` for images, as are the next four
    frechet_distance_extrapolated   the same for infinitely many samples
    kernel_distance         KID: the same by an unbiased estimate of MMD^2
    sample_precision        share of the samples that lie in the manifold of the test split
    sample_recall           share of the test split that lies in the manifold of the samples
    inception_score         exp of the mean KL(p(y|x) || p(y)) by the reference classifier; of
                            stacks the mean over their parts
    conditional_accuracy    share of conditional samples that the reference classifier assigns to
                            the class that was asked for
    auroc_<set>             of the energy as score of anomaly, test split against an outlier set
                            (`ebm.outliers`)
    auroc_mean              the mean of these over all sets
    acceptance              mean acceptance probability of what the sampling chains proposed to
                            Metropolis' rule; of IGEBM, of the last jump of each chain
    precision, recall, f1   of the test rows that are flagged as anomalies (`ebm.evaluation.tables`
                            has the rule)
    auroc, auprc            areas under their ROC and precision-recall curves, over all thresholds
    f1_ensemble, auprc_ensemble   the same of the mean energy of all trainings
    flagged_share           share of the test rows that are flagged, where nobody knows which are
                            anomalies
    auprc_<protocol>_<d>    class d as the anomaly, by protocol (`ebm.evaluation.novelty`):
    auroc_<test>_<d>        `released`, `strict`, `tenth`; of the first two `auroc` too
    auprc_<protocol>_mean, auroc_<test>_mean   their means over all classes

The suffix `_generator` marks a number of the generator's samples before any MCMC, or of the flow
or Gaussian that an energy was trained against, without its defence; `_gradient` one of |grad E|^2
as score of anomaly instead of E. Of several trainings a number is the mean (of the snapshots of
each first), and the suffix `_std` marks their standard deviation.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ebm import EBMError, metrics
from ebm.data import Prepared
from ebm.evaluation.density import evaluate_density
from ebm.evaluation.images import evaluate_images
from ebm.evaluation.novelty import evaluate_novelty
from ebm.evaluation.result import Case, Evaluation
from ebm.evaluation.scores import energies
from ebm.evaluation.stacked import evaluate_stacked
from ebm.evaluation.tables import evaluate_table
from ebm.reference import Reference
from ebm.variants.base import EBM

__all__ = ["Evaluation", "evaluate"]

EVALUATORS: dict[str, Callable[[Case], Evaluation]] = {
    "density": evaluate_density,
    "digits": evaluate_images,
    "folder": evaluate_images,
    "images": evaluate_images,
    "kddcup99": evaluate_table,
    "novelty": evaluate_novelty,
    "stacked": evaluate_stacked,
    "table": evaluate_table,
    "tumours": evaluate_table,
}
"""By the kind of the data."""

FLAGGED = 0.01
"""The share of the validation split that the threshold of a model flags, unless another is asked
for or it is a model of a table, which has a rule of its own."""


def evaluate(
    model: EBM,
    samples: dict[str, Tensor],
    prepared: Prepared,
    reference: Reference,
    settings: dict[str, Any],
) -> Evaluation:
    """All that can be said of `model` and its `samples`, on the device where they lie, as does the
    network of `reference`."""
    case = Case(model, samples, prepared, reference, settings)
    evaluator = EVALUATORS[case.about["kind"]]
    if evaluator is evaluate_table:
        return evaluate_table(case)
    _check_finite(samples)
    result = evaluator(case)
    _set_usual_threshold(result, case)
    return result


def _check_finite(samples: dict[str, Tensor]) -> None:
    """EBMError if there are samples that are no numbers: nothing true can be said of the others
    alone."""
    for name in ("samples", "generator"):
        if name in samples:
            odd = ~samples[name].flatten(1).isfinite().all(1)
            if count := int(odd.sum()):
                where = f"{count} of {len(odd)} {name} are not finite numbers"
                raise EBMError(f"{where}; lower the step size of their chains, or train anew")


def _set_usual_threshold(result: Evaluation, case: Case) -> None:
    """The energy from which on a point is unusual, as a share of the validation split is."""
    usual = energies(case.model, case.prepared.tensors["validation"].to(case.device))
    threshold = metrics.share_threshold(usual, case.settings["flagged"] or FLAGGED)
    if math.isfinite(threshold):
        result.thresholds["energy"] = threshold
