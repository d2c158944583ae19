"""The sections of `params.yaml` as frozen, typed objects. Imports no torch, so a typo costs no
wait.

Every field is required: a number that shapes a result stands in `params.yaml`, where DVC sees it
change, and never as a silent default here. What only one variant knows is in `<variant>_config.py`
beside that variant.
"""

import re
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

WHOLE = 2**31
"""Beyond all whole numbers: what is counted with them counts in 32 bits here and there."""
LARGEST = 3.4e38
"""The largest number: float32 has hardly larger ones."""
Count = Annotated[int, Field(gt=0, lt=WHOLE)]
Size = Annotated[int, Field(ge=0, lt=WHOLE)]
Threads = Annotated[int, Field(gt=0, le=1024)]
FEWEST = 6
"""Images of a split that distances take: those of thirds of them are extrapolated, and three
neighbours of each are looked for."""
Images = Annotated[int, Field(ge=FEWEST, lt=WHOLE)]
Several = Annotated[int, Field(ge=2, lt=WHOLE)]
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["float32", "bfloat16"]
"""Arithmetic of layers in training; float32 where the device has none for bfloat16."""
Compile = bool
"""Whether TorchInductor compiles the losses of training with their gradients, which takes up to
half a minute for each, needs a C++ compiler, and rounds otherwise."""
Scale = Literal["none", "minmax", "log"]
"""What becomes of the numbers of a table (`ebm.data.transform`)."""
Widths = Annotated[list[Count], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=WHOLE)]
Binarize = Literal["sample", "dynamic", "threshold", "none"]
"""What becomes of greys: `sample` draws each pixel once, on with the probability that is its grey
value (Salakhutdinov & Murray's way); `dynamic` does too, and has updates see bits that are drawn
anew (Burda et al. 2016), while what is fitted at once sees those drawn once; `threshold` turns on
what is at least half; `none` keeps them."""
COLOURED = ("cifar10", "svhn")


class Section(BaseModel):
    """A mapping in `params.yaml`: immutable, and no key may be left over."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CoordinatesReference(Section):
    """Sets of points are compared as they are, images by means of their pixels if there are
    many."""

    kind: Literal["coordinates"]


class ClassifierReference(Section):
    """Images are compared by the features of a classifier, trained on the data set's own labels
    with the data set's seed (`ebm.reference`): convolutions of `width`, twice and four times the
    width, `epochs` of Adam whose `learning_rate` is the highest of its cycle."""

    kind: Literal["classifier"]
    width: Count
    epochs: Count
    batch_size: Several
    learning_rate: Positive
    threads: Threads


class InceptionReference(Section):
    """Images are compared by the features of torchvision's Inception network."""

    kind: Literal["inception"]
    threads: Threads


Reference = Annotated[
    CoordinatesReference | ClassifierReference | InceptionReference, Field(discriminator="kind")
]


class Data(Section):
    """What every kind of data says of the experiments on it, beside its settings."""

    sampled: ClassVar[bool] = False
    """Whether nothing can be measured without samples."""
    fewest: ClassVar[int] = 0
    """If there are samples, at least so many."""
    too_few: ClassVar[str] = ""
    """Why not fewer."""
    fewest_cells: ClassVar[int] = 0
    """If learned densities are integrated on a grid in the plane, at least so many per axis."""
    ensembles: ClassVar[bool] = False
    """Whether several trainings of one experiment can be measured: each as a detector, or all as
    the one model that draws from each in turn."""
    left_out: ClassVar[bool] = False
    """Whether a training never sees the class that it is to find."""


class OfImages(Data):
    """Images; distances of fewer samples would not be worth a number."""

    fewest: ClassVar[int] = 30
    too_few: ClassVar[str] = f"images are measured from {fewest} on"


class OfRows(Data):
    """Rows among which anomalies are to be found."""

    ensembles: ClassVar[bool] = True

    def without_labels(self) -> str:
        """Why a share of the rows is flagged; empty where labels set the threshold."""
        return ""


class DensityData(Data):
    """Draws from a density with a known log p (`ebm.densities`)."""

    sampled: ClassVar[bool] = True
    fewest: ClassVar[int] = 2
    too_few: ClassVar[str] = "one point has no covariance; should be more"
    fewest_cells: ClassVar[int] = 160
    """With these the integral of every density is off by less than 1 %; with 120, by 6 %."""

    kind: Literal["density"]
    density: Literal["8gaussians", "25gaussians", "swissroll", "rings", "2spirals"]
    train: Several
    validation: Count
    test: Several
    seed: Seed
    reference: CoordinatesReference


class DigitsData(OfImages):
    """scikit-learn's 1,797 handwritten digits, 8x8, split at random by `seed`."""

    kind: Literal["digits"]
    binarize: Binarize
    validation: Count
    test: Images
    seed: Seed
    reference: Reference


def _of_greys(how: str, section: ValidationInfo) -> str:
    if how != "none" and section.data.get("name") in COLOURED:
        raise ValueError("should be none for images in colour")
    return how


def _others(names: list[str], section: ValidationInfo) -> list[str]:
    if len(set(names)) < len(names) or section.data.get("name") in names:
        raise ValueError("should name other sets, each once")
    return names


class ImageData(OfImages):
    """A published image data set with its labels, as bytes: 28x28 grey, or 32x32 in colour.

    `validation` images are set apart by `seed` from the published train part; the published test
    part is the test split. `outliers` are sets of which the test part is kept in the same form,
    binarised alike.
    """

    kind: Literal["images"]
    name: Literal["mnist", "fashion-mnist", "cifar10", "svhn"]
    binarize: Annotated[Binarize, AfterValidator(_of_greys)]
    outliers: Annotated[
        list[Literal["mnist", "fashion-mnist", "cifar10", "svhn", "omniglot", "usps"]],
        AfterValidator(_others),
    ]
    validation: Count
    seed: Seed
    reference: Reference


RESERVED_SETS = ("train", "test", "samples", "uniform", "constant", "interpolation", "mean")
"""Names that other sets of images have, or the mean over them (`ebm.outliers`)."""

COMPANIONS = ("_generator", "_gradient", "_total", "_lower", "_upper", "_std")
"""How the names of numbers end that say more of another (`ebm.evaluation`): the report's page has
them in its row."""

PROTOCOLS = ("released_", "strict_", "tenth_")
"""How they go on after the metric where every class is the anomaly once (`ebm.evaluation`)."""


def _own_names(names: list[str]) -> list[str]:
    reserved, endings, beginnings = map(", ".join, (RESERVED_SETS, COMPANIONS, PROTOCOLS))
    if len(set(names)) < len(names) or set(names) & set(RESERVED_SETS):
        raise ValueError(f"should name folders, each once and none of them {reserved}")
    if odd := [name for name in names if not re.fullmatch(r"\w[\w .-]*", name)]:
        raise ValueError(f"should be letters, digits, '_', '-', '.' and blanks, not {odd[0]!r}")
    if any(name.endswith(COMPANIONS) for name in names):
        raise ValueError(f"should end in none of {endings}")
    if any(name.startswith(PROTOCOLS) for name in names):
        raise ValueError(f"should begin with none of {beginnings}")
    return names


def _held_out(share: float, section: ValidationInfo) -> float:
    if share + section.data.get("validation", 0) >= 1:
        raise ValueError("validation and test should leave something to train on")
    return share


Part = Annotated[float, Field(gt=0, lt=1)]
Rest = Annotated[Part, AfterValidator(_held_out)]


class FolderData(OfImages):
    """A user's images: those in the folder `path`, from the folder of `params.yaml`, within its
    folder `images`, where DVC sees a change; where they lie in folders of their own, these are
    their classes (`ebm.data.folder`).

    Each is cropped to a square and resized to `size` x `size` pixels, grey or in `colour`. The
    classes `outliers` are never trained on: test images are held against theirs. The shares
    `validation` and `test` of each other class are set apart by `seed`.
    """

    within: ClassVar[str] = "images"

    kind: Literal["folder"]
    path: Annotated[str, Field(min_length=1)]
    size: Annotated[int, Field(ge=4, lt=WHOLE)]
    colour: bool
    outliers: Annotated[list[str], AfterValidator(_own_names)]
    validation: Part
    test: Rest
    seed: Seed
    reference: Reference


class StackedData(OfImages):
    """Stacks of `parts` random images of a labelled set as channels: 10^parts modes.

    `train`, `validation` and `test` stacks are drawn by `seed` from images of the split of that
    name; `held_out` images of the base go to validation (of `digits`, as many to test).
    """

    sampled: ClassVar[bool] = True
    ensembles: ClassVar[bool] = True

    kind: Literal["stacked"]
    base: Literal["digits", "mnist", "fashion-mnist"]
    parts: Annotated[int, Field(ge=2, le=4)]
    train: Images
    validation: Count
    test: Images
    held_out: Count
    seed: Seed
    reference: ClassifierReference


class NoveltyData(Data):
    """All images of a labelled set, each of whose classes is to be found as an anomaly by models
    that never saw it: a share `train` of the pool and `validation` images are set apart by `seed`,
    the rest are test."""

    ensembles: ClassVar[bool] = True
    left_out: ClassVar[bool] = True

    kind: Literal["novelty"]
    name: Literal["mnist", "fashion-mnist"]
    train: Annotated[float, Field(gt=0, lt=1)]
    validation: Count
    seed: Seed
    reference: CoordinatesReference


def _only_with_label(normal: list[str], section: ValidationInfo) -> list[str]:
    if "label" in section.data and bool(normal) != (section.data["label"] is not None):
        raise ValueError(
            "should name the values of the label that count as not anomalous, "
            "and be empty where the label is null"
        )
    return normal


def _of_one_use(names: list[str], section: ValidationInfo) -> list[str]:
    used = [section.data.get("label"), *section.data.get("categorical", [])]
    if len(set(names)) < len(names) or set(names) & set(used):
        raise ValueError("should name columns that have no other use here, each once")
    return names


Names = Annotated[list[str], AfterValidator(_of_one_use)]


class TableData(OfRows):
    """A user's table: a CSV file with a header, at `path` from the folder of `params.yaml`, in its
    folder `tables`, where DVC sees a change.

    `label` is the column that says what a row is, or null; rows whose label is in `normal` are not
    anomalous and are all that is trained on. `categorical` columns hold text, or numbers without
    an order; `ignore` names those that no model sees; all others hold numbers, treated as `scale`
    says. A row with an empty cell is an error, or dropped, as `missing` says. The shares
    `validation` and `test` of each class are set apart by `seed`.
    """

    within: ClassVar[str] = "tables"

    kind: Literal["table"]
    path: Annotated[str, Field(min_length=1)]
    label: Annotated[str, Field(min_length=1)] | None
    normal: Annotated[list[str], AfterValidator(_only_with_label)]
    categorical: Names
    ignore: Names
    missing: Literal["error", "drop"]
    scale: Scale
    validation: Part
    test: Rest
    seed: Seed
    reference: CoordinatesReference

    def without_labels(self) -> str:
        return "" if self.label is not None else "no labels set a threshold"


class TumoursData(OfRows):
    """scikit-learn's breast tumours (`ebm.data.tumours`): the benign ones are learned, the
    malignant ones are the anomalies. `scale` is what happens to numbers; the shares `validation`
    and `test` of each are set apart by `seed`."""

    kind: Literal["tumours"]
    scale: Scale
    validation: Part
    test: Rest
    seed: Seed
    reference: CoordinatesReference


def _less_than_all(share: float, section: ValidationInfo) -> float:
    if section.data.get("protocol") == "strict" and share == 1:
        raise ValueError("should be less than 1 under the protocol 'strict'")
    return share


class KDDCup99Data(OfRows):
    """The 10 % file of the KDD Cup 1999 under a `protocol` (`ebm.data.kddcup99`), split by `seed`.
    `validation` is, of `paper`, the share of the training attacks that validation holds as well;
    of `strict`, the share of the attacks not trained on that it is given. `scale` is what happens
    to numbers."""

    kind: Literal["kddcup99"]
    protocol: Literal["paper", "strict"]
    scale: Scale
    validation: Annotated[float, Field(gt=0, le=1), AfterValidator(_less_than_all)]
    seed: Seed
    reference: CoordinatesReference

    def without_labels(self) -> str:
        flags = "the protocol 'paper' flags a share of the rows"
        return flags if self.protocol == "paper" else ""


Dataset = Annotated[
    DensityData
    | DigitsData
    | ImageData
    | FolderData
    | StackedData
    | NoveltyData
    | TableData
    | TumoursData
    | KDDCup99Data,
    Field(discriminator="kind"),
]


class Watch(Section):
    """When training counts as diverged, and how often it may go back to a good checkpoint:
    `limits` of the size of logged scalars, by the names that the variant's docstring gives them;
    so many `restarts`."""

    limits: dict[str, Positive]
    restarts: Size


class Train(Section):
    """The loop (`ebm.train.fit`): so many `steps` on batches of `batch_size` rows; scalars are
    logged every `log_every` steps, a checkpoint is written every `checkpoint_every`; over the last
    share `cooldown` of the steps the learning rates fall to 0. A model that is fitted at once
    needs no `steps`."""

    steps: Size
    batch_size: Count
    log_every: Count
    checkpoint_every: Count
    cooldown: Share
    watch: Watch


class GaussianFlow(Section):
    """Mean and covariance of the data; nothing is trained."""

    kind: Literal["gaussian"]


class CouplingFlow(Section):
    """Affine couplings over vectors: so many `transforms`, each of two layers of `width`."""

    kind: Literal["coupling"]
    transforms: Count
    width: Count


class SplineFlow(Section):
    """Splines of so many `bins` over vectors, else as couplings."""

    kind: Literal["spline"]
    transforms: Count
    bins: Several
    width: Count


class GlowFlow(Section):
    """Over images: `levels`, `depth` steps at each, couplings of `width` channels."""

    kind: Literal["glow"]
    levels: Count
    depth: Count
    width: Count


Flow = Annotated[GaussianFlow | CouplingFlow | SplineFlow | GlowFlow, Field(discriminator="kind")]


class FourierNetwork(Section):
    """An energy of vectors: `depth` hidden layers of `width` over so many `frequencies`, drawn
    with the standard deviation `bandwidth` (`ebm.networks.FourierFeatures`)."""

    kind: Literal["fourier"]
    width: Count
    depth: Count
    frequencies: Count
    bandwidth: Positive


class PlainNetwork(Section):
    """An energy of vectors (`mlp`) or images (`ebm.networks.scalar`)."""

    kind: Literal["mlp", "conv", "strided", "resnet"]
    width: Count
    depth: Count


EnergyNetwork = Annotated[FourierNetwork | PlainNetwork, Field(discriminator="kind")]
Margin = Annotated[float, Field(ge=0, lt=0.5)]
Levels = Annotated[int, Field(ge=0, le=256)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Decay, Decay], Field(strict=False)]


class Contrasted(Section):
    """What noise- and flow-contrastive energies share: the `network` of f; a share `defence` of
    the noise that a Gaussian of the data draws, and whether the energy is `tilted`, a correction
    of the flow; the `warmup` steps in which the flow follows the likelihood alone, at
    `warmup_learning_rate`; grey `levels` of images (0: vectors) and the `margin` of their logit;
    Adam's `learning_rate`s for f and for its constant, `betas`, `weight_decay`; the norm to which
    gradients are cut (`clip`, null: none); whether to `compile` training."""

    network: EnergyNetwork
    defence: Annotated[float, Field(ge=0, lt=1)]
    tilted: bool
    levels: Levels
    margin: Margin
    warmup: Size
    warmup_learning_rate: Positive
    learning_rate: Positive
    constant_learning_rate: Positive
    betas: Betas
    weight_decay: NonNegative
    clip: Positive | None
    compile: Compile

    def is_trained_in(self, steps: int) -> bool:
        """Whether so many `steps` are enough for the warm-up and for what has to wait for it: a
        tilted energy."""
        return self.warmup < steps if self.tilted else self.warmup <= steps


AGAINST = {"nce": "noise", "fce": "flow"}
"""By variant, what contrastive energies are trained against. Their chains begin with its draws;
those of others, if at draws, with a generator's."""


class Ensemble(Section):
    """`members` models trained side by side, each on its part of every batch, with `snapshots` of
    each taken `every` so many steps; `without`: the class that each never sees, in turn, as
    detectors of that class (empty: they see all)."""

    members: Count
    snapshots: Size
    every: Count
    without: list[Size]


class Drawn(Section):
    """How many samples to draw; `<variant>_config.Sample` adds how."""

    count: Count


class NothingDrawn(Drawn):
    """Samples of a model that only scores points and can draw none."""

    count: Literal[0]


class Detection(Section):
    """Evaluation of what finds anomalies by its energy, as any model can: the share of the rows
    that is `flagged` where no labels set a threshold; null where they do, and, for points and
    images, where it is the share 0.01."""

    flagged: Part | None


class DensityDetection(Detection):
    """`Detection` of points that may lie in the plane: `grid`, the cells per axis of the square on
    which exp(-E) is integrated (0 for points that do not lie in the plane)."""

    grid: Size


class Proposed(Drawn):
    """`count` chains of `steps` of Metropolis' algorithm, which proposes draws of the noise or
    the flow."""

    steps: Size


class Experiment(Section):
    """What every experiment has: the data set and the variant it is of, the `seed` of all that is
    random in it, the `threads` of its stages on a CPU. `<variant>_config.Experiment` gives the
    last three their types."""

    dataset: str
    variant: str
    seed: Seed
    threads: Threads
    train: Train
    ensemble: Ensemble | None
    model: Section
    sample: Drawn
    evaluate: Detection

    @property
    def takes_no_steps(self) -> bool:
        """Whether the model is fitted to all data at once, before the first step."""
        return False


def _rising_to_one(betas: list[float]) -> list[float]:
    if betas[-1] != 1 or any(a >= b for a, b in pairwise(betas)):
        raise ValueError("should rise and end at 1.0")
    return betas


Ladder = Annotated[list[Positive], Field(min_length=2), AfterValidator(_rising_to_one)]
OracleName = Literal["banana", "funnel", "8gaussians", "ising"]
ORACLE_TITLES = {
    "banana": "Banana",
    "funnel": "Neal's funnel, 10 dimensions",
    "8gaussians": "Eight Gaussians",
    "ising": "Ising lattice, 4 × 4 spins",
}
"""What to call the oracles in figures and on the page."""


class Samplers(Section):
    """The comparison of samplers on the oracles that have a ladder here (`ebm.comparison`).

    Every chain may spend `evaluations`, after a `warmup` of so many transitions for each step size
    that is adapted. A ladder are the inverse temperatures of parallel tempering, hot to cold.
    """

    seed: Seed
    threads: Threads
    chains: Annotated[int, Field(ge=4, lt=WHOLE)]
    evaluations: Annotated[int, Field(ge=1000, lt=WHOLE)]
    warmup: Count
    leapfrogs: Count
    ladders: Annotated[dict[OracleName, Ladder], Field(min_length=1)]
