"""The words of the report's page: what metrics, variants, data and references are called, and
mean."""

import math
from dataclasses import dataclass

from ebm.schema import AGAINST


@dataclass(frozen=True)
class Metric:
    """How a number is presented. `better` is +1 (higher), -1 (lower) or 0 (neither)."""

    label: str
    better: int
    meaning: str
    unit: str = ""
    overview: bool = True


METRICS = {
    "modes": Metric(
        "Modes found",
        +1,
        "Modes of the data that at least one sample lies near: of stacks of images, tuples of "
        "classes that the reference network sees in at least one; it sees one in every stack, "
        "however bad.",
    ),
    "high_quality_share": Metric(
        "High-quality share",
        +1,
        "Share of the samples within 4 standard deviations of a mode, or of the data's curve.",
    ),
    "mode_kl": Metric(
        "Mode KL", -1, "KL divergence of the samples' mode histogram from the uniform one.", "nats"
    ),
    "grid_kl": Metric(
        "Density KL", -1, "KL(true density ‖ learned density), integrated on a grid.", "nats"
    ),
    "outside": Metric(
        "Mass outside",
        -1,
        "Share of the learned density beyond the square that holds the true one.",
        "",
        False,
    ),
    "log_likelihood": Metric(
        "Log-likelihood",
        +1,
        "Mean log p of the test split. Where log Z is estimated, it is the middle of two "
        "estimates: one tends to err low (annealing away from the model), one high (annealing "
        "towards it); within their noise they may cross. In the plane Z comes from a grid; a "
        "flow has none.",
        "nats",
    ),
    "log_likelihood_train": Metric(
        "Log-likelihood, training split", 0, "The same of the training split.", "nats", False
    ),
    "bits_per_dim": Metric(
        "Bits per dimension",
        -1,
        "Mean −log2 p of the test images per pixel and channel, grey levels with uniform noise; "
        "of contrastive energies with log Z as measured, and unknown where few draws of the "
        "noise count.",
        "bits",
    ),
    "bits_per_dim_train": Metric(
        "Bits per dimension, training split", 0, "The same of training images.", "bits", False
    ),
    "log_density_mse": Metric(
        "Log-density error",
        -1,
        "Mean squared error of the learned log density at the test points.",
        "nats²",
    ),
    "log_partition_error": Metric(
        "Error of log Z by the noise",
        -1,
        "Root mean square error of the true density's log Z, by telling its draws from a hundred "
        "times as many of the noise.",
        "nats",
        False,
    ),
    "log_partition": Metric(
        "log Z",
        0,
        "Logarithm of the partition function, in the middle of two estimates.",
        "nats",
        False,
    ),
    "log_partition_left": Metric(
        "log Z left over",
        0,
        "Of an energy that has learned its constant: log of the integral of exp(−E), which is 0 "
        "where that constant is right; by a grid in the plane, of images by importance sampling.",
        "nats",
        False,
    ),
    "log_partition_ess": Metric(
        "Effective draws for log Z",
        0,
        "Effective size of the sample of the noise by which the constant was checked; with few, "
        "log Z is not known.",
        "",
        False,
    ),
    "frechet_distance": Metric(
        "Fréchet distance",
        -1,
        "Squared distance of the Gaussians fitted to samples and to test data: to their "
        "coordinates in the plane, to the features of the reference for images: those of a "
        "classifier, or pixels where there is none.",
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
    ),
    "sample_recall": Metric(
        "Sample recall",
        +1,
        "Share of the test images within reach of samples: how much of the data they cover.",
    ),
    "inception_score": Metric(
        "Inception-style score",
        +1,
        "How clearly each sample shows one class, and how many classes there are: exp of the mean "
        "KL(p(class | sample) ‖ p(class)) by the reference network, at most as many as classes.",
        "",
        False,
    ),
    "conditional_accuracy": Metric(
        "Conditional accuracy",
        +1,
        "Share of conditional samples in which the reference network sees the class asked for.",
    ),
    "accuracy": Metric("Accuracy", +1, "Share of the test split classified rightly."),
    "accuracy_supervised": Metric(
        "Accuracy, labels alone",
        0,
        "The same of the same network, trained on the labelled points alone.",
        "",
        False,
    ),
    "precision": Metric("Precision", +1, "Share of the flagged that are anomalies."),
    "recall": Metric("Recall", +1, "Share of the anomalies that are flagged."),
    "f1": Metric(
        "F1",
        +1,
        "Harmonic mean of precision and recall of the rows that are flagged as anomalies: by the "
        "threshold of the best F1 on the validation split, or, in the published protocol, the "
        "share of the test rows, a fifth unless another is set, that scores highest.",
    ),
    "f1_ensemble": Metric(
        "F1, mean energy",
        +1,
        "The same of one detector, whose score is the mean energy of all trainings.",
        "",
        False,
    ),
    "auroc": Metric("AUROC", +1, "Area under the ROC curve of the energy as anomaly score."),
    "auroc_mean": Metric(
        "AUROC, mean",
        +1,
        "Area under the ROC curve of the energy as anomaly score, the test split against an "
        "outlier set: the mean over the sets.",
    ),
    "auprc": Metric(
        "AUPRC",
        +1,
        "Area under the precision-recall curve of the energy as anomaly score. Scores that know "
        "nothing have the share of anomalies, not a half.",
    ),
    "auprc_ensemble": Metric(
        "AUPRC, mean energy",
        +1,
        "The same of the mean energy of all trainings.",
        "",
        False,
    ),
    "flagged_share": Metric(
        "Flagged", 0, "Share of the test rows that the threshold flags, where none has a label."
    ),
    "acceptance": Metric(
        "Acceptance",
        0,
        "Mean acceptance probability of the proposals of the sampling chains; of IGEBM, of "
        "the last jump of each.",
        "",
        False,
    ),
    "seconds": Metric("Training time", -1, "Wall time of the training loop."),
}

VARIANTS = {
    "rbm": "Restricted Boltzmann machine",
    "igebm": "Langevin-trained energy (IGEBM)",
    "meg": "Maximum entropy generators",
    "flow": "Normalising flow",
    "nce": "Noise-contrastive estimation",
    "fce": "Flow-contrastive estimation",
    "wgan_gp": "Wasserstein GAN with gradient penalty",
    "vae": "Variational autoencoder",
    "bigan": "Bidirectional GAN",
    "dagmm": "Deep autoencoding Gaussian mixture",
    "dsebm": "Deep structured energy-based model",
    "kernel_pca": "Kernel principal components",
    "one_class_svm": "One-class support vector machine",
}
SHORT = {
    "flow": "flow",
    "wgan_gp": "WGAN-GP",
    "bigan": "BiGAN",
    "kernel_pca": "Kernel PCA",
    "one_class_svm": "One-class SVM",
}
"""Names of variants where there is little room; others are their own in capitals."""

DATA = {
    "density": "Densities in the plane",
    "digits": "Handwritten digits",
    "images": "Images",
    "folder": "Images of your own",
    "stacked": "Stacks of images",
    "kddcup99": "Network intrusions, KDD Cup 1999",
    "tumours": "Breast tumours, the malignant ones as anomalies",
    "table": "Anomalies in tables",
    "novelty": "Classes never seen in training",
}
AREAS = {
    "auprc_released": "AUPRC, released: the normal images are those of the second split of the "
    "released code, most of which were trained on",
    "auprc_strict": "AUPRC, strict: no normal image was trained on",
    "auprc_tenth": "AUPRC, strict, with the anomalies counted as a tenth of all",
    "auroc_released": "AUROC, released",
    "auroc_strict": "AUROC, strict",
}
"""What is measured of each class, by what the names begin with; overviews show the AUPRC."""

EQUILIBRIA = {"fce": {"value": -math.log(4), "accuracy": 0.5}}
"""By variant, where scalars of its training come to rest."""

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
        "Autocorrelation",
        -1,
        "Autocorrelation time of the energy. It believes the chains: where R-hat is high, it "
        "means nothing.",
        "evaluations",
    ),
    "acceptance": Metric("Acceptance", 0, "Mean acceptance probability of the proposals."),
    "swaps": Metric("Swaps", 0, "Smallest mean swap acceptance of two neighbours of a ladder."),
    "round_trips": Metric("Round trips", +1, "From the hot end to the target and back, mean."),
    "step_size": Metric(
        "Step size", 0, "As adapted before sampling; of Langevin, a quarter of MALA's."
    ),
    "cost": Metric("Cost", -1, "Evaluations for one transition, those of all rungs together."),
}

KINDS = {
    "exact": "the value of a perfect model, known in closed form",
    "ceiling": "the most a model can honestly get: what real data, exact samples, the true "
    "density or the best possible ranking score (precision of samples alone can be higher, at the "
    "price of their recall, and the reverse)",
    "floor": "the least a model can honestly get, but for the noise of its own draw: what real "
    "data, exact samples or the worst possible ranking score",
    "chance": "what scores that know nothing get",
    "published": "as printed in the paper named beside it",
    "baseline": "a simple model, fitted to the same data here, or the same measured on the "
    "validation split",
}


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


def beside(variant: str) -> str:
    """Whose the numbers beside those of an energy are: of what it was trained against, without a
    defence; else of the same model's generator."""
    return f"Of its {AGAINST[variant]}" if variant in AGAINST else "Before MCMC"


def method(variant: str) -> str:
    """What to call a variant where there is little room."""
    return SHORT.get(variant, variant.upper())
