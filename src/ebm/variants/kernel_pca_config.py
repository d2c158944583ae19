"""Settings of kernel principal components, as they stand in `params.yaml`."""

from typing import Literal

from ebm import schema
from ebm.schema import Count, Positive, Section


class Model(Section):
    """Fitted to `points` random training rows, of which so many principal `components` are kept,
    with the Gaussian kernel exp(-gamma |x - y|^2); `gamma: scale` is 1 / (columns times variance).
    `standardise`: columns with mean 0 and variance 1 by the training data."""

    points: Count
    components: Count
    gamma: Positive | Literal["scale"]
    standardise: bool


class Experiment(schema.Experiment):
    variant: Literal["kernel_pca"]
    model: Model
    sample: schema.NothingDrawn
    evaluate: schema.Detection

    @property
    def takes_no_steps(self) -> bool:
        return True
