"""Settings of flow-contrastive estimation, as they stand in `params.yaml`."""

from typing import Literal

from ebm import schema
from ebm.schema import Flow, NonNegative, Positive, Share, Size


class Model(schema.Contrasted):
    """The `flow`, its turn after an accuracy over `threshold`, its learning rate in the game.
    Semi-supervised with `classes` (0: none), of each of which the first `labelled` points show
    theirs: `supervision` is the weight of their cross entropy, `smoothness` that of the roughness
    of p(k | x) over the distance `radius`."""

    flow: Flow
    threshold: Share
    flow_learning_rate: Positive
    classes: Size
    labelled: Size
    supervision: NonNegative
    smoothness: NonNegative
    radius: Positive


class Experiment(schema.Experiment):
    variant: Literal["fce"]
    model: Model
    sample: schema.Proposed
    evaluate: schema.DensityDetection
