"""A trained model and its samples in; numbers, what to hold them against, and pictures out.

A reference is of one of five kinds: `exact` (the truth, known in closed form), `ceiling` and
`floor` (what draws of the true distribution itself score: no model can honestly do better),
`baseline` (a simple model fitted here) and `published`.

Names of metrics, the same in every experiment:

    modes, modes_total      modes with at least one sample within 4 sigma; how many there are
    mode_kl                 KL(histogram over the modes || uniform), nats
    high_quality_share      share of samples within 4 sigma of a mode (of the curve, if it is one)
    grid_kl                 KL(true density || learned density) on the cells of a square, nats
    log_likelihood          mean log p of the test split, nats; `_lower`, `_upper` bracket it where
                            Z is estimated, `_train` is the same of the training split
    log_partition           log Z, nats
    frechet_distance        between samples and test split: of raw coordinates in the plane, of the
                            features of `ebm.reference` for images, as are the next four
    frechet_distance_extrapolated   the same for infinitely many samples
    kernel_distance         KID: the same by an unbiased estimate of MMD^2
    sample_precision        share of the samples that lie in the manifold of the test split
    sample_recall           share of the test split that lies in the manifold of the samples
    conditional_accuracy    share of conditional samples that the reference classifier assigns to
                            the class that was asked for
    auroc_<set>             of the energy as score of anomaly, test split against an outlier set
                            (`ebm.outliers`); `auroc_mean` over all sets
    acceptance              mean acceptance probability of the chains that drew the samples

The suffix `_generator` marks a number of the generator's samples before any MCMC.
"""

from typing import Any

from torch import Tensor

from ebm.data import Prepared
from ebm.evaluation.density import evaluate_density
from ebm.evaluation.images import evaluate_images
from ebm.evaluation.result import Evaluation
from ebm.reference import Reference
from ebm.variants.base import EBM

__all__ = ["Evaluation", "evaluate"]


def evaluate(
    model: EBM,
    samples: dict[str, Tensor],
    prepared: Prepared,
    reference: Reference,
    settings: dict[str, Any],
) -> Evaluation:
    """All that can be said of `model` and its `samples`, on the device where they lie, as does the
    network of `reference`."""
    if prepared.density is None:
        return evaluate_images(model, samples, prepared, reference, settings)
    return evaluate_density(model, samples, prepared, prepared.density, settings)
