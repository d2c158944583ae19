"""Settings of the variational autoencoder, as they stand in `params.yaml`."""

from typing import Literal

from ebm import schema
from ebm.schema import Betas, Count, Positive, Section, Widths


class Model(Section):
    """`network`: `mlp`, or `conv` for images (`ebm.networks.encoder` and `decoder`). Widths of the
    hidden layers, channels of the convolutions, of the `encoder` and the `decoder`; `latent`
    dimension of z, Adam's `learning_rate` and `betas`."""

    network: Literal["mlp", "conv"]
    encoder: Widths
    decoder: Widths
    latent: Count
    learning_rate: Positive
    betas: Betas


class Experiment(schema.Experiment):
    variant: Literal["vae"]
    model: Model
    sample: schema.Drawn
    evaluate: schema.DensityDetection
