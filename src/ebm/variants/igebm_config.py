"""Settings of implicit generation with energy-based models, as they stand in `params.yaml`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from ebm import schema
from ebm.schema import (
    Betas,
    Count,
    Decay,
    EnergyNetwork,
    NonNegative,
    Positive,
    Section,
    Share,
    Size,
)

Finite = Annotated[float, Field(allow_inf_nan=False)]
Bounds = Annotated[tuple[Finite, Finite], Field(strict=False)]


class Model(Section):
    """The energy: `network` (`mlp` or `fourier` for vectors; `conv`, `strided` or `resnet` for
    images), whose input is the point times `input_scale` (large where the density has fine
    structure), `classes` it is conditional on (0: none), `spectral_norm` on its weights.

    The chains: `langevin_steps` with `step_size`, every entry of the gradient cut at
    `gradient_clip` (null: not at all), `noise` of its own or `coupled` to the step size, points
    within `bounds`, and before so many steps `jumps` between modes (0 for images). They live in a
    replay buffer of `buffer` points, of which each step starts the share `fresh` anew from uniform
    noise and sends the share `augment` through an augmentation.

    The objective: Gaussian `data_noise`, the weight `energy_penalty` of the squared energies, the
    weights `kl` and `entropy` of the terms of improved contrastive divergence. Adam's
    `learning_rate` and `betas`, the norm `clip` at which the parameters' gradient is cut, and the
    decay of their moving average (`ema: 0` keeps none). The `precision` in which the layers
    compute in training: what is sampled and measured afterwards is float32. Whether to `compile`
    the chains of training (not with `spectral_norm`).
    """

    network: EnergyNetwork
    input_scale: Positive
    classes: Size
    spectral_norm: bool
    langevin_steps: Count
    jumps: Size
    step_size: Positive
    noise: NonNegative | Literal["coupled"]
    gradient_clip: Positive | None
    bounds: Bounds
    buffer: Count
    fresh: Share
    augment: Share
    data_noise: NonNegative
    energy_penalty: NonNegative
    kl: NonNegative
    entropy: NonNegative
    learning_rate: Positive
    betas: Betas
    clip: Positive
    ema: Decay
    precision: schema.Precision
    compile: schema.Compile


class Sample(schema.Drawn):
    """`count` chains of `steps` Langevin steps from uniform noise, the classes in turn."""

    steps: Count


class Evaluate(schema.DensityDetection):
    """`steps`: Langevin steps of what is completed, denoised, composed and transferred."""

    steps: Size


def _watched(model: Model, section: ValidationInfo) -> Model:
    """Chains that no longer find what they are to find leave the gap where its penalty holds it:
    E = -1 / 2 alpha of data, +1 / 2 alpha of chains."""
    train = section.data.get("train")  # none if it is wrong itself
    limit = train.watch.limits.get("energy_gap") if train else None
    if limit is None or model.kl or model.entropy or limit * model.energy_penalty < 1:
        return model
    raise ValueError(
        f"energy_penalty = {model.energy_penalty:g} keeps |energy_gap| below "
        f"{1 / model.energy_penalty:g}: train.watch.limits.energy_gap should be less than that"
    )


class Experiment(schema.Experiment):
    variant: Literal["igebm"]
    model: Annotated[Model, AfterValidator(_watched)]
    sample: Sample
    evaluate: Evaluate
