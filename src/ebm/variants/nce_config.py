"""Settings of noise-contrastive estimation, as they stand in `params.yaml`."""

from typing import Literal

from ebm import schema
from ebm.schema import Flow, Positive


class Model(schema.Contrasted):
    """The `noise`, which the first `warmup` steps train if it can be trained, and its `ratio` nu:
    draws of it for each point of data."""

    noise: Flow
    ratio: Positive


class Experiment(schema.Experiment):
    variant: Literal["nce"]
    model: Model
    sample: schema.Proposed
    evaluate: schema.DensityDetection
