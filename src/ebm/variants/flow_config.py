"""Settings of normalising flows, as they stand in `params.yaml`."""

from typing import Literal

from ebm import schema
from ebm.schema import Betas, Flow, Levels, Margin, NonNegative, Positive, Section


class Model(Section):
    """The `flow`; grey `levels` of images (0: vectors) and the `margin` of their logit
    (`ebm.flows`); Adam's `learning_rate`, `betas` and `weight_decay`; the norm to which gradients
    are cut (`clip`, null: none). Whether to `compile` training."""

    flow: Flow
    levels: Levels
    margin: Margin
    learning_rate: Positive
    betas: Betas
    weight_decay: NonNegative
    clip: Positive | None
    compile: schema.Compile


class Experiment(schema.Experiment):
    variant: Literal["flow"]
    model: Model
    sample: schema.Drawn
    evaluate: schema.DensityDetection

    @property
    def takes_no_steps(self) -> bool:
        return self.model.flow.kind == "gaussian"
