"""Langevin dynamics: unadjusted, Metropolis-adjusted, and as implicit generation uses it.

paper  | here
-------|-----------------------------------------------------------------------------------
E(x)   | energy(x), the negative log-density up to a constant
eps    | step_size: x' = x - eps grad E(x) + sqrt(2 eps) N(0, I)
q      | that proposal's density
lambda | step_size of `DecoupledLangevin` (Du & Mordatch write x - lambda / 2 grad E + w)
w      | N(0, noise^2 I)
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from ebm.samplers.kernel import (
    Energy,
    Schedule,
    State,
    at,
    metropolise,
    squared_norm,
    value_and_gradient,
)


@dataclass(frozen=True)
class Langevin:
    """Unadjusted Langevin dynamics: x' = x - eps grad E(x) + sqrt(2 eps) N(0, I).

    Biased at any finite step: on a unit Gaussian its variance is 1 / (1 - eps / 2). With a
    `step_size` that falls along a schedule the bias goes too (Welling & Teh 2011).
    """

    energy: Energy
    step_size: Schedule

    def init(self, x: Tensor) -> State:
        return State(x, *value_and_gradient(self.energy, x))

    def step(self, state: State) -> State:
        noise = sqrt(2 * at(self.step_size, state.steps)) * torch.randn_like(state.x)
        return self.init(self.drift(state) + noise)._replace(steps=state.steps + 1)

    def drift(self, state: State) -> Tensor:
        """The mean of the next state."""
        assert state.gradient is not None
        return state.x - at(self.step_size, state.steps) * state.gradient


@dataclass(frozen=True)
class MALA(Langevin):
    """Metropolis-adjusted Langevin algorithm: Langevin's move as a proposal, accepted with
    probability min(1, p(y) q(x | y) / (p(x) q(y | x))). Exact at any step size
    (Roberts & Tweedie 1996, section 1.4)."""

    step_size: float

    def step(self, state: State) -> State:
        proposal = super().step(state)
        return metropolise(state, proposal, self.log_accept(state, proposal))

    def log_accept(self, s: State, t: State) -> Tensor:
        """log of p(t) q(s | t) / (p(s) q(t | s)), shape [B]; draws nothing."""
        assert s.energy is not None
        assert t.energy is not None
        return s.energy - t.energy + self.log_proposal(s, t) - self.log_proposal(t, s)

    def log_proposal(self, to: State, given: State) -> Tensor:
        """log q(to | given) = -|to - drift(given)|^2 / (4 eps), up to a constant; shape [B]."""
        return -squared_norm(to.x - self.drift(given)) / (4 * self.step_size)


@dataclass(frozen=True)
class DecoupledLangevin:
    """The sampler of implicit generation (Du & Mordatch 2019), step size and noise set apart:

        y = clip(x + noise N(0, I)),     x' = y - eps clip(grad E(y))

    with y kept within `bounds` and every entry of the gradient within +-`clip`. It is Langevin
    dynamics on E / T at the temperature T = noise^2 / (2 eps), without bounds and clip, and up to
    where in the loop one looks: T = 1 where noise = sqrt(2 eps), and then the points y are
    Langevin's chain, and the points x', which the noise has yet to come to, lie too close
    together. With `noise_last` a step ends with the noise, at the next y before it is put within
    the bounds. `gradient` of its states is that at y, before the cut, `energy` is E(y): one
    evaluation a step. If `differentiable`, the end of a step keeps its dependence on the
    parameters of E through this step's gradient.
    """

    energy: Energy
    step_size: Schedule
    noise: Schedule
    clip: float = inf
    bounds: tuple[float, float] = (-inf, inf)
    differentiable: bool = False
    noise_last: bool = False

    def init(self, x: Tensor) -> State:
        return State(x)

    def step(self, state: State) -> State:
        noise = at(self.noise, state.steps) * torch.randn_like(state.x)
        y = (state.x if self.noise_last else state.x + noise).clamp(*self.bounds)
        energy, gradient = value_and_gradient(self.energy, y, self.differentiable)
        x = y - at(self.step_size, state.steps) * gradient.clamp(-self.clip, self.clip)
        end = x + noise if self.noise_last else x
        return State(end, energy, gradient, steps=state.steps + 1)


def polynomial_decay(first: float, delay: float, power: float) -> Callable[[int], float]:
    """eps_t = first (1 + t / delay)^-power: the schedule a (b + t)^-gamma of Welling & Teh (2011)
    that begins at `first`. With 1/2 < power <= 1 the steps sum to infinity and their squares do
    not, so that `Langevin` forgets its start and its bias."""
    return lambda step: first * (1 + step / delay) ** -power
