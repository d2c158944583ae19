"""Settings of deep structured energy-based models, as they stand in `params.yaml`."""

from typing import Literal

from ebm import schema
from ebm.schema import Betas, Positive, Section, Widths


class Model(Section):
    """`widths` of the softplus layers; standard deviation of the `noise` that is to be removed
    from the columns; `standardise`: columns with mean 0 and variance 1 by the training data;
    Adam's `learning_rate` and `betas`."""

    widths: Widths
    noise: Positive
    standardise: bool
    learning_rate: Positive
    betas: Betas


class Experiment(schema.Experiment):
    variant: Literal["dsebm"]
    model: Model
    sample: schema.NothingDrawn
    evaluate: schema.Detection
