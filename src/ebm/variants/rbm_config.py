"""Settings of the restricted Boltzmann machine, as they stand in `params.yaml`."""

from typing import Literal

from ebm import schema
from ebm.schema import Count, Decay, NonNegative, Positive, Section, Several


class Model(Section):
    """`hidden` units; `k` Gibbs steps per update, from `chains` persistent chains (PCD-k) or, with
    `chains: 0`, from the data (CD-k); gradient descent with `momentum`, and `weight_decay` on the
    weights only."""

    hidden: Count
    k: Count
    chains: schema.Size
    learning_rate: Positive
    momentum: Decay
    weight_decay: NonNegative


class Sample(schema.Drawn):
    """`count` chains of `steps` block Gibbs steps, started from the base rate."""

    steps: Count


class Evaluate(schema.Detection):
    """Annealed importance sampling: `chains`, `temperatures`, and the Gibbs steps that bring the
    chains of the reverse estimate from the data into the model's own distribution first."""

    chains: Count
    temperatures: Several
    burn_in: Count


class Experiment(schema.Experiment):
    variant: Literal["rbm"]
    model: Model
    sample: Sample
    evaluate: Evaluate
