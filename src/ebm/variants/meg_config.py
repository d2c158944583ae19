"""Settings of maximum entropy generators, as they stand in `params.yaml`."""

from typing import Annotated, Literal

from pydantic import Field

from ebm import schema
from ebm.schema import Count, NonNegative, Positive, Section, Share, Size


class Model(Section):
    """`width` and `depth` of the hidden layers of all three networks, `latent` dimension of z,
    `energy_steps` per generator step, weights of the `score_penalty` and of the `entropy` bound,
    Adam's `learning_rate`s and `betas`, and the decay of the generator's moving average (`ema: 0`
    keeps none)."""

    width: Count
    depth: Count
    latent: Count
    energy_steps: Count
    score_penalty: NonNegative
    entropy: NonNegative
    energy_learning_rate: Positive
    generator_learning_rate: Positive
    betas: Annotated[tuple[Share, Share], Field(strict=False)]
    ema: Share


class Sample(schema.Drawn):
    """`count` draws of the generator, then `steps` of latent MALA with `step_size` on the target
    exp(-inverse_temperature E(G(z)) - |z|^2 / 2)."""

    steps: Size
    step_size: Positive
    inverse_temperature: Positive


class Evaluate(Section):
    """`grid`: cells per axis of the square on which the learned density is integrated."""

    grid: Count


class Experiment(schema.Experiment):
    variant: Literal["meg"]
    model: Model
    sample: Sample
    evaluate: Evaluate
