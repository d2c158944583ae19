"""Settings of the bidirectional GAN, as they stand in `params.yaml`."""

from typing import Literal

from ebm import schema
from ebm.schema import Betas, Count, Decay, Positive, Section, Share, Widths


class Model(Section):
    """`network`: `mlp`, or `conv` for images (`ebm.networks.encoder`, `decoder` and `Joint`).
    Widths of the hidden layers, channels of the convolutions, of the `encoder`, the `generator`
    and the `discriminator`; `latent` dimension of z, the share `mix` of the discriminator's term
    in the energy, Adam's `learning_rate`s, that of the generator for the encoder too, and `betas`,
    the decay of the moving averages of all three networks (`ema: 0` keeps none)."""

    network: Literal["mlp", "conv"]
    encoder: Widths
    generator: Widths
    discriminator: Widths
    latent: Count
    mix: Share
    generator_learning_rate: Positive
    discriminator_learning_rate: Positive
    betas: Betas
    ema: Decay


class Experiment(schema.Experiment):
    variant: Literal["bigan"]
    model: Model
    sample: schema.Drawn
    evaluate: schema.DensityDetection
