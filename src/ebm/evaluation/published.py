"""Numbers as printed in papers, by the name of the variant that they belong to: the file of its
class. Only what was read in a paper itself stands here, or where the source says so in another's
words.

Kumar, Ozair, Goyal, Courville & Bengio 2019 is read in its first version, where the method is
called EnGAN. Its figures for a VAE on MNIST are left out: those of the digits 1, 7 and 9 are below
what the worst possible ranking scores, so they come from a test of another composition.
"""

from dataclasses import dataclass

from ebm.evaluation.result import Evaluation
from ebm.evaluation.scores import variant
from ebm.variants.base import EBM

MEG = "Kumar et al. 2019 (arXiv:1901.08508v1)"


@dataclass(frozen=True)
class Published:
    """Numbers by the metric's name, and where they are printed."""

    numbers: dict[str, float]
    source: str


def _detection(numbers: tuple[float, float, float], source: str, end: str = "") -> Published:
    names = ("precision", "recall", "f1")
    found = {name + end: value for name, value in zip(names, numbers, strict=True)}
    return Published(found, f"{MEG}, table 4: {source}")


KDDCUP99 = {
    "kernel_pca": _detection((0.8627, 0.6319, 0.7352), "kernel PCA"),
    "one_class_svm": _detection((0.7457, 0.8523, 0.7954), "OC-SVM"),
    "dsebm": _detection((0.8619, 0.6446, 0.7399), "DSEBM-e"),
    "dagmm": _detection((0.9297, 0.9442, 0.9369), "DAGMM"),
    "meg": _detection(
        (0.9307, 0.9472, 0.9389),
        "EnGAN, scored by the norm of the gradient; ± 0.0146, 0.0153 and 0.0148 over 5 runs",
        "_gradient",
    ),
}
"""Network intrusions, the published protocol."""


def _digits(numbers: dict[int, float], source: str) -> Published:
    return Published(
        {f"auprc_released_{digit}": value for digit, value in numbers.items()},
        f"{MEG}, on MNIST: {source}",
    )


MNIST_NOVELTY = {
    "meg": _digits(
        {1: 0.281, 4: 0.401, 5: 0.402, 7: 0.29, 9: 0.342},
        "EnGAN, ± 0.035, 0.061, 0.062, 0.04 and 0.034 for the digits 1, 4, 5, 7 and 9",
    ),
    "bigan": _digits({1: 0.287, 4: 0.443, 5: 0.514, 7: 0.347, 9: 0.307}, "BiGAN-σ"),
}
"""One digit is the anomaly, the released split."""


def _modes(modes: int, kl: float, source: str) -> Published:
    return Published({"modes": modes, "mode_kl": kl}, f"{MEG}, tables 1 and 2: {source}")


MNIST_STACKED = {
    3: {
        "meg": _modes(1000, 0.0313, "EnGAN"),
        "wgan_gp": _modes(959, 0.7276, "WGAN-GP, as the authors ran it"),
    },
    4: {
        "meg": _modes(10000, 0.0480, "EnGAN"),
        "wgan_gp": _modes(9538, 0.9144, "WGAN-GP, as the authors ran it"),
    },
}
"""Stacked MNIST, by the number of parts."""


MNIST_BINARY = {
    "rbm": Published(
        {"log_likelihood": -86.34},
        "Salakhutdinov & Murray 2008: 500 hidden units, CD-25, forward annealing alone; as the "
        "documentation of natural_bm quotes it",
    )
}
"""MNIST, each pixel drawn once, on with the probability that is its grey value."""


def refer_to_published(result: Evaluation, model: EBM, published: dict[str, Published]) -> None:
    """Hold what was measured against what is `published` of the variant of `model`, or of its
    members."""
    if found := published.get(variant(model)):
        for name, value in found.numbers.items():
            if name in result.metrics:
                result.refer(name, value, "published", found.source)
