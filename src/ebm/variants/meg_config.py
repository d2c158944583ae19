"""Settings of maximum entropy generators, as they stand in `params.yaml`."""

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from ebm import schema
from ebm.schema import Betas, Count, Decay, NonNegative, Positive, Section, Size, Widths


class Features(Section):
    """So many `frequencies`, drawn with the standard deviation `bandwidth`
    (`ebm.networks.FourierFeatures`)."""

    kind: Literal["fourier"]
    frequencies: Count
    bandwidth: Positive


Network = Annotated[
    Annotated[Literal["mlp", "conv"], Tag("name")] | Annotated[Features, Tag("fourier")],
    Discriminator(lambda value: "fourier" if isinstance(value, dict | Section) else "name"),
]


class Model(Section):
    """`network`: `mlp`, or `conv` for images (`ebm.networks.encoder` and `decoder`), or that of
    vectors with Fourier features before the energy. Widths of the hidden layers, channels of the
    convolutions, of the `energy`, the `generator` and the `statistics` network; `latent` dimension
    of z, `energy_steps` per generator step, weights of the `score_penalty` and of the `entropy`
    bound, Adam's `learning_rate`s and `betas`, the decay of the moving averages of the generator
    (`ema`) and of the energy (`energy_ema`; 0 keeps none), the `precision` in which the layers
    compute in training, and whether to `compile` it."""

    network: Network
    energy: Widths
    generator: Widths
    statistics: Widths
    latent: Count
    energy_steps: Count
    score_penalty: NonNegative
    entropy: NonNegative
    energy_learning_rate: Positive
    generator_learning_rate: Positive
    betas: Betas
    ema: Decay
    energy_ema: Decay
    precision: schema.Precision
    compile: schema.Compile


class Sample(schema.Drawn):
    """`count` draws of the generator, then `steps` of latent MALA with `step_size` on the target
    exp(-inverse_temperature E(G(z)) - |z|^2 / 2)."""

    steps: Size
    step_size: Positive
    inverse_temperature: Positive


class Experiment(schema.Experiment):
    variant: Literal["meg"]
    model: Model
    sample: Sample
    evaluate: schema.DensityDetection
