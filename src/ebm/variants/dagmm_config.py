"""Settings of deep autoencoding Gaussian mixtures, as they stand in `params.yaml`."""

from typing import Annotated, Literal

from pydantic import Field

from ebm import schema
from ebm.schema import Betas, Count, Decay, NonNegative, Positive, Section, Widths


class Model(Section):
    """Widths of the hidden tanh layers of `encoder`, `decoder` and `estimation` network, the last
    of which loses a share `dropout` of its units in training; dimensions of the `latent` code;
    `components` of the mixture.

    Weights of the mean energy (`energy_weight`) and of the reciprocals of the variances
    (`diagonal_penalty`) beside the squared reconstruction error; the variance that is added to
    every feature (`regularisation`); the decay `ema` of the running moments that points are scored
    by; `standardise`: columns with mean 0 and variance 1 by the training data; Adam's
    `learning_rate` and `betas`.
    """

    encoder: Widths
    decoder: Widths
    latent: Count
    components: Count
    estimation: Widths
    dropout: Annotated[float, Field(ge=0, lt=1)]
    energy_weight: NonNegative
    diagonal_penalty: NonNegative
    regularisation: Positive
    ema: Decay
    standardise: bool
    learning_rate: Positive
    betas: Betas


class Experiment(schema.Experiment):
    variant: Literal["dagmm"]
    model: Model
    sample: schema.NothingDrawn
    evaluate: schema.Detection
