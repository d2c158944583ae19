"""Settings of the Wasserstein GAN with gradient penalty, as they stand in `params.yaml`."""

from typing import Literal

from ebm import schema
from ebm.schema import Betas, Count, Decay, NonNegative, Positive, Section, Widths


class Model(Section):
    """`network`: `mlp`, or `conv` for images (`ebm.networks.encoder` and `decoder`). Widths of the
    hidden layers, channels of the convolutions, of the `energy`, which is minus the critic, and of
    the `generator`; `latent` dimension of z, `energy_steps` per generator step, weight of the
    `gradient_penalty`, Adam's `learning_rate`s and `betas`, the decay of the generator's moving
    average (`ema: 0` keeps none), the `precision` in which the layers compute in training, and
    whether to `compile` it."""

    network: Literal["mlp", "conv"]
    energy: Widths
    generator: Widths
    latent: Count
    energy_steps: Count
    gradient_penalty: NonNegative
    energy_learning_rate: Positive
    generator_learning_rate: Positive
    betas: Betas
    ema: Decay
    precision: schema.Precision
    compile: schema.Compile


class Experiment(schema.Experiment):
    variant: Literal["wgan_gp"]
    model: Model
    sample: schema.Drawn
    evaluate: schema.DensityDetection
