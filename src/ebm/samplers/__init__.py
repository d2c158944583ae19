"""Markov chain Monte Carlo for an energy function; chains are the rows of a batch.

A kernel is `init(x) -> State` and `step(State) -> State`; `run` is the only loop. A kernel sees an
energy `E: [B, *] -> [B]`, never a model: the samplers of a latent space and of an annealing path
are the same kernels on another energy. Chance and arithmetic are apart: what decides acceptance
draws nothing.
"""

from ebm.samplers.adaptation import adapt
from ebm.samplers.annealing import ais, log_mean_exp
from ebm.samplers.gibbs import BlockGibbs, SpinGibbs, draw
from ebm.samplers.hmc import HMC
from ebm.samplers.kernel import (
    Energy,
    InSlices,
    Interspersed,
    Kernel,
    Schedule,
    State,
    at_milestones,
    by_row,
    milestones,
    run,
    value_and_gradient,
    with_acceptance,
)
from ebm.samplers.langevin import MALA, DecoupledLangevin, Langevin, polynomial_decay
from ebm.samplers.metropolis import (
    DifferentialEvolution,
    Independence,
    Metropolis,
    RandomWalk,
    SpinFlip,
)
from ebm.samplers.recorded import Recorded
from ebm.samplers.tempering import ParallelTempering, PowerTempering, Tempered

__all__ = [
    "HMC",
    "MALA",
    "BlockGibbs",
    "DecoupledLangevin",
    "DifferentialEvolution",
    "Energy",
    "InSlices",
    "Independence",
    "Interspersed",
    "Kernel",
    "Langevin",
    "Metropolis",
    "ParallelTempering",
    "PowerTempering",
    "RandomWalk",
    "Recorded",
    "Schedule",
    "SpinFlip",
    "SpinGibbs",
    "State",
    "Tempered",
    "adapt",
    "ais",
    "at_milestones",
    "by_row",
    "draw",
    "log_mean_exp",
    "milestones",
    "polynomial_decay",
    "run",
    "value_and_gradient",
    "with_acceptance",
]
