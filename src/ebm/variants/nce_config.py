"""Settings of noise-contrastive estimation, as they stand in `params.yaml`."""

from typing import Literal

from ebm import schema
from ebm.schema import Flow, Positive, Size


class Model(schema.Contrasted):
    """The `noise`, which the first `warmup` steps train if it can be trained, and its `ratio` nu:
    draws of it for each point of data."""

    noise: Flow
    ratio: Positive


class Sample(schema.Drawn):
    """`count` chains of `steps` of Metropolis' algorithm, which proposes draws of the noise."""

    steps: Size


class Evaluate(schema.Detection):
    """`grid`: cells per axis of the square on which the density is integrated (0 for points that
    do not lie in the plane)."""

    grid: Size


class Experiment(schema.Experiment):
    variant: Literal["nce"]
    model: Model
    sample: Sample
    evaluate: Evaluate
