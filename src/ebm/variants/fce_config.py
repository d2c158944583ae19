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


class Sample(schema.Drawn):
    """`count` chains of `steps` of Metropolis' algorithm, which proposes draws of the flow."""

    steps: Size


class Evaluate(schema.Detection):
    """`grid`: cells per axis of the square on which the density is integrated (0 for points that
    do not lie in the plane)."""

    grid: Size


class Experiment(schema.Experiment):
    variant: Literal["fce"]
    model: Model
    sample: Sample
    evaluate: Evaluate
