"""Settings of the variational autoencoder, as they stand in `params.yaml`."""

from typing import Annotated, Literal

from pydantic import Field

from ebm import schema
from ebm.schema import Count, Positive, Section, Share, Size, Widths


class Model(Section):
    """`network`: `mlp`, or `conv` for images (`ebm.networks.encoder` and `decoder`). Widths of the
    hidden layers, channels of the convolutions, of the `encoder` and the `decoder`; `latent`
    dimension of z, Adam's `learning_rate` and `betas`."""

    network: Literal["mlp", "conv"]
    encoder: Widths
    decoder: Widths
    latent: Count
    learning_rate: Positive
    betas: Annotated[tuple[Share, Share], Field(strict=False)]


class Evaluate(schema.Detection):
    """`grid`: cells per axis of the square on which exp(-E) is integrated (0 for points that do
    not lie in the plane)."""

    grid: Size


class Experiment(schema.Experiment):
    variant: Literal["vae"]
    model: Model
    sample: schema.Drawn
    evaluate: Evaluate
