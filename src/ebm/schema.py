"""The sections of `params.yaml` as frozen, typed objects. Imports no torch, so a typo costs no
wait.

Every field is required: a number that shapes a result stands in `params.yaml`, where DVC sees it
change, and never as a silent default here. What only one variant knows is in `<variant>_config.py`
beside that variant.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Section(BaseModel):
    """A mapping in `params.yaml`: immutable, and no key may be left over."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DensityData(Section):
    """Draws from a density with a known log p (`ebm.densities`)."""

    kind: Literal["density"]
    density: Literal["8gaussians", "25gaussians", "swissroll", "rings", "2spirals"]
    train: Count
    validation: Count
    test: Count
    seed: Seed


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


Dataset = Annotated[DensityData | DigitsData, Field(discriminator="kind")]


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
