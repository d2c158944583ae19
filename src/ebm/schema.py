"""The sections of `params.yaml` as frozen, typed objects. Imports no torch, so a typo costs no
wait.

Every field is required: a number that shapes a result stands in `params.yaml`, where DVC sees it
change, and never as a silent default here. What only one variant knows is in `<variant>_config.py`
beside that variant.
"""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

Count = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Section(BaseModel):
    """A mapping in `params.yaml`: immutable, and no key may be left over."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CoordinatesReference(Section):
    """Sets of points are compared as they are."""

    kind: Literal["coordinates"]


class ClassifierReference(Section):
    """Images are compared by the features of a classifier, trained on the data set's own labels
    with the data set's seed (`ebm.reference`): convolutions of `width`, twice and four times the
    width, `epochs` of Adam whose `learning_rate` is the highest of its cycle."""

    kind: Literal["classifier"]
    width: Count
    epochs: Count
    batch_size: Count
    learning_rate: Positive
    threads: Count


class InceptionReference(Section):
    """Images are compared by the features of torchvision's Inception network."""

    kind: Literal["inception"]
    threads: Count


Reference = Annotated[
    CoordinatesReference | ClassifierReference | InceptionReference, Field(discriminator="kind")
]


class DensityData(Section):
    """Draws from a density with a known log p (`ebm.densities`)."""

    kind: Literal["density"]
    density: Literal["8gaussians", "25gaussians", "swissroll", "rings", "2spirals"]
    train: Count
    validation: Count
    test: Count
    seed: Seed
    reference: CoordinatesReference


class DigitsData(Section):
    """scikit-learn's 1,797 handwritten digits, 8x8, split at random by `seed`.

    `binarize`: `sample` draws each pixel once, on with the probability that is its grey value
    (Salakhutdinov & Murray's way); `threshold` turns on what is at least half; `none` keeps greys.
    """

    kind: Literal["digits"]
    binarize: Literal["sample", "threshold", "none"]
    validation: Count
    test: Count
    seed: Seed
    reference: Reference


def _others(names: list[str], section: ValidationInfo) -> list[str]:
    if len(set(names)) < len(names) or section.data.get("name") in names:
        raise ValueError("should name other sets, each once")
    return names


class ImageData(Section):
    """A published image data set with its labels, as bytes: 28x28 grey, or 32x32 in colour.

    `validation` images are set apart by `seed` from the published train part; the published test
    part is the test split. `outliers` are sets of which the test part is kept in the same form.
    """

    kind: Literal["images"]
    name: Literal["mnist", "fashion-mnist", "cifar10"]
    outliers: Annotated[
        list[Literal["mnist", "fashion-mnist", "omniglot", "usps"]], AfterValidator(_others)
    ]
    validation: Count
    seed: Seed
    reference: Reference


Dataset = Annotated[DensityData | DigitsData | ImageData, Field(discriminator="kind")]


class Watch(Section):
    """When training counts as diverged, and how often it may go back to a good checkpoint."""

    limits: dict[str, Positive]
    restarts: Size


class Train(Section):
    """The loop: what `ebm.train.fit` needs to know."""

    steps: Count
    batch_size: Count
    log_every: Count
    checkpoint_every: Count
    cooldown: Share
    watch: Watch


class Drawn(Section):
    """How many samples to draw; `<variant>_config.Sample` adds how."""

    count: Count


class Experiment(Section):
    """What every experiment has; `<variant>_config.Experiment` gives the last three their
    types."""

    dataset: str
    variant: str
    seed: Seed
    threads: Count
    train: Train
    model: Section
    sample: Drawn
    evaluate: Section


def _rising_to_one(betas: list[float]) -> list[float]:
    if betas[-1] != 1 or any(a >= b for a, b in pairwise(betas)):
        raise ValueError("should rise and end at 1.0")
    return betas


Ladder = Annotated[list[Positive], Field(min_length=1), AfterValidator(_rising_to_one)]
OracleName = Literal["banana", "funnel", "8gaussians", "ising"]


class Samplers(Section):
    """The comparison of samplers on the oracles that have a ladder here (`ebm.comparison`).

    Every chain may spend `evaluations`, after a `warmup` of so many transitions for each step size
    that is adapted. A ladder are the inverse temperatures of parallel tempering, hot to cold.
    """

    seed: Seed
    threads: Count
    chains: Annotated[int, Field(ge=4)]
    evaluations: Annotated[int, Field(ge=1000)]
    warmup: Count
    leapfrogs: Count
    ladders: Annotated[dict[OracleName, Ladder], Field(min_length=1)]
