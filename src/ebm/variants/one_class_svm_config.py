"""Settings of one-class support vector machines, as they stand in `params.yaml`."""

from typing import Annotated, Literal

from pydantic import Field

from ebm import schema
from ebm.schema import Count, Positive, Section


class Model(Section):
    """Fitted to `points` random training rows, of which about the share `nu` is left outside, with
    the Gaussian kernel exp(-gamma |x - y|^2); `gamma: scale` is 1 / (columns times variance).
    `standardise`: columns with mean 0 and variance 1 by the training data."""

    points: Count
    nu: Annotated[float, Field(gt=0, lt=1)]
    gamma: Positive | Literal["scale"]
    standardise: bool


class Experiment(schema.Experiment):
    variant: Literal["one_class_svm"]
    model: Model
    sample: schema.NothingDrawn
    evaluate: schema.Detection

    @property
    def takes_no_steps(self) -> bool:
        return True
