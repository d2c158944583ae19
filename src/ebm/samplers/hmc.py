"""Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011) with the leapfrog integrator.

paper        | here
-------------|---------------------------------------------------------------------------
q, U(q)      | x, energy(x)
p            | momentum, drawn from N(0, I): the mass is the identity
H(q, p)      | U(q) + |p|^2 / 2
eps, L       | step_size, leapfrogs
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ebm.samplers.kernel import Energy, State, metropolise, squared_norm, value_and_gradient


@dataclass(frozen=True)
class HMC:
    """A fresh momentum, `leapfrogs` steps along the flow of H, then Metropolis' question.

    Exact at any step size; `leapfrogs` evaluations of the gradient a transition. One leapfrog is
    MALA with the step size eps^2 / 2. In many dimensions it is at its best where it accepts 0.651
    (Beskos et al. 2013), in practice above that, at 0.8.
    """

    energy: Energy
    step_size: float
    leapfrogs: int

    def init(self, x: Tensor) -> State:
        return State(x, *value_and_gradient(self.energy, x))

    def step(self, state: State) -> State:
        momentum = torch.randn_like(state.x)
        proposal, last = self.flow(state, momentum)
        return metropolise(state, proposal, self.log_accept(state, momentum, proposal, last))

    def flow(self, s: State, p: Tensor) -> tuple[State, Tensor]:
        """`leapfrogs` steps from (s, p), then the momentum turned round: its own inverse, and it
        preserves volume, so that H alone decides."""
        steps = s.steps + 1
        p = p - self.step_size / 2 * _gradient(s)
        for left in reversed(range(self.leapfrogs)):
            s = self.init(s.x + self.step_size * p)
            p = p - self.step_size / (1 if left else 2) * _gradient(s)
        return s._replace(steps=steps), -p

    def log_accept(self, s: State, p: Tensor, t: State, q: Tensor) -> Tensor:
        """H(s, p) - H(t, q), shape [B]; draws nothing."""
        assert s.energy is not None
        assert t.energy is not None
        return s.energy - t.energy + (squared_norm(p) - squared_norm(q)) / 2


def _gradient(state: State) -> Tensor:
    assert state.gradient is not None
    return state.gradient
