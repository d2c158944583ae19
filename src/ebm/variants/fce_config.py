"""Settings of flow-contrastive estimation, as they stand in `params.yaml`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, ValidationInfo

from ebm import schema
from ebm.schema import Flow, NonNegative, Positive, Share, Size


def _of_classes(labelled: int, section: ValidationInfo) -> int:
    classes = section.data.get("classes")  # none if they are wrong themselves
    if classes is not None and (labelled > 0) != (classes > 0):
        raise ValueError("should be 0 where `classes` is, and nowhere else")
    return labelled


class Model(schema.Contrasted):
    """The `flow`, its turn after an accuracy over `threshold`, its learning rate in the game, in
    which it descends the value if that is `saturating`, else ascends it with exchanged labels.
    Semi-supervised with `classes` (0: none), of each of which the first `labelled` points show
    theirs: `supervision` is the weight of their cross entropy, `smoothness` that of the roughness
    of p(k | x) over the distance `radius`."""

    flow: Flow
    threshold: Share
    flow_learning_rate: Positive
    saturating: bool
    classes: Size
    labelled: Annotated[Size, AfterValidator(_of_classes)]
    supervision: NonNegative
    smoothness: NonNegative
    radius: Positive

    def is_trained_in(self, steps: int) -> bool:
        """Whether so many `steps` leave one to the game, which waits for the warm-up."""
        return self.warmup < steps


class Experiment(schema.Experiment):
    variant: Literal["fce"]
    model: Model
    sample: schema.Proposed
    evaluate: schema.DensityDetection
