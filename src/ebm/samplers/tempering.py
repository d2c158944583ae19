"""Parallel tempering (Swendsen & Wang 1986; Geyer 1991): chains along a path of energies that
trade places, so that what moves freely at one end brings news to the other.

    paper        | here
    -------------|---------------------------------------------------------------------------
    pi_k         | exp(-energy_at(betas[k], .)), from the easy end to the target, the last
    K_k          | kernel_at(betas[k])
    alpha_k      | swap_acceptance[k], of the pair (k, k + 1)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ebm import EBMError
from ebm.samplers.kernel import Interspersed, Kernel, State, choose, probability
from ebm.samplers.langevin import DecoupledLangevin
from ebm.samplers.metropolis import Independence

NO_RUNGS = (Independence, DecoupledLangevin)
"""Kernels whose states keep something else than the energy at their points."""

TO_TARGET, TO_START = 1, 2
"""Where a replica is headed: it has touched the path's start, or the target after that."""


class Tempered(NamedTuple):
    """B ladders of K rungs. What a kernel's `State` has at the top is that of the target alone.

    `swap_acceptance` [K - 1, B]: the probability with which each pair last traded places, NaN
    before its first time. `heading` [K, B]: TO_TARGET, TO_START or 0, carried along by whoever
    climbs; `round_trips` [B] counts those from the start to the target and back.
    """

    rungs: tuple[State, ...]
    swap_acceptance: Tensor
    heading: Tensor
    round_trips: Tensor
    steps: int = 0

    @property
    def x(self) -> Tensor:
        return self.rungs[-1].x

    @property
    def energy(self) -> Tensor | None:
        return self.rungs[-1].energy

    @property
    def gradient(self) -> Tensor | None:
        return self.rungs[-1].gradient

    @property
    def acceptance(self) -> Tensor | None:
        return self.rungs[-1].acceptance


def _innermost(kernel: Kernel[State]) -> Kernel[State]:
    """The kernel that makes the states."""
    while isinstance(kernel, Interspersed):
        kernel = kernel.kernel
    return kernel


@dataclass(frozen=True)
class ParallelTempering:
    """`sweeps` transitions in every rung, then swaps: of the even pairs after an even number of
    steps, of the odd ones after an odd number (the non-reversible scheme, whose round trips are
    quicker: Syed et al. 2021).

    `energy_at` and `kernel_at` are those of `ais`: a path, and kernels that leave it invariant; a
    kernel that caches energies caches energy_at(beta, x) at its points x, as not all do: EBMError
    names those that keep something else. `betas` go from the easy end to the target. A step costs
    `sweeps` transitions of each rung, and for a kernel with a cache one look at each place that is
    offered.
    """

    energy_at: Callable[[float, Tensor], Tensor]
    kernel_at: Callable[[float], Kernel[State]]
    betas: tuple[float, ...]
    sweeps: int = 1

    @cached_property
    def kernels(self) -> tuple[Kernel[State], ...]:
        kernels = tuple(self.kernel_at(beta) for beta in self.betas)
        for kernel in map(_innermost, kernels):
            if isinstance(kernel, NO_RUNGS):
                problem = "what its states keep is not the energy at their points"
                raise EBMError(f"{type(kernel).__name__} is no kernel of a rung: {problem}")
        return kernels

    def init(self, x: Tensor) -> Tempered:
        """All rungs at x [B, *]."""
        count, batch = len(self.betas), len(x)
        heading = torch.zeros(count, batch, dtype=torch.uint8, device=x.device)
        heading[0] = TO_TARGET
        return Tempered(
            rungs=tuple(kernel.init(x) for kernel in self.kernels),
            swap_acceptance=torch.full((count - 1, batch), torch.nan, device=x.device),
            heading=heading,
            round_trips=torch.zeros(batch, dtype=torch.long, device=x.device),
        )

    def step(self, state: Tempered) -> Tempered:
        rungs = [self._sweep(k, s) for k, s in zip(self.kernels, state.rungs, strict=True)]
        swaps, heading = state.swap_acceptance.clone(), state.heading.clone()
        for k in range(state.steps % 2, len(rungs) - 1, 2):
            below, above = rungs[k], rungs[k + 1]
            to_below, to_above = self.exchanged(k, below, above)
            acceptance = probability(self.log_accept(k, below, above, to_below, to_above))
            swap = torch.rand_like(acceptance) < acceptance
            rungs[k], rungs[k + 1] = choose(swap, to_below, below), choose(swap, to_above, above)
            heading[k : k + 2] = torch.where(swap, heading[[k + 1, k]], heading[k : k + 2])
            swaps[k] = acceptance
        arrived = heading[0] == TO_START
        heading[0] = TO_TARGET
        heading[-1] = torch.where(heading[-1] == TO_TARGET, TO_START, heading[-1])
        trips = state.round_trips + arrived
        return Tempered(tuple(rungs), swaps, heading, trips, state.steps + 1)

    def _sweep(self, kernel: Kernel[State], state: State) -> State:
        for _ in range(self.sweeps):
            state = kernel.step(state)
        return state

    def exchanged(self, k: int, below: State, above: State) -> tuple[State, State]:
        """What rungs k and k + 1 would be if their chains traded places."""
        down = self.kernels[k].init(above.x)._replace(steps=below.steps)
        return down, self.kernels[k + 1].init(below.x)._replace(steps=above.steps)

    def log_accept(
        self, k: int, below: State, above: State, to_below: State, to_above: State
    ) -> Tensor:
        """log of pi_k(y) pi_k+1(x) / (pi_k(x) pi_k+1(y)) for x below and y above, shape [B]; draws
        nothing."""
        stay = self._energy(k, below) + self._energy(k + 1, above)
        return stay - self._energy(k, to_below) - self._energy(k + 1, to_above)

    def _energy(self, k: int, state: State) -> Tensor:
        if state.energy is not None:
            return state.energy
        with torch.no_grad():
            return self.energy_at(self.betas[k], state.x)


@dataclass(frozen=True)
class PowerTempering(ParallelTempering):
    """Along the powers of one density: `energy_at(beta, x)` is beta E(x), every beta positive.
    What is known of a place in one rung is then known in all, and a swap costs a kernel with a
    cache nothing, one without two looks at the energy."""

    def exchanged(self, k: int, below: State, above: State) -> tuple[State, State]:
        ratio = self.betas[k + 1] / self.betas[k]
        down = _scaled(above, 1 / ratio)._replace(steps=below.steps)
        return down, _scaled(below, ratio)._replace(steps=above.steps)

    def log_accept(
        self, k: int, below: State, above: State, to_below: State, to_above: State
    ) -> Tensor:
        share = 1 - self.betas[k] / self.betas[k + 1]
        return share * (self._energy(k + 1, above) - self._energy(k + 1, to_above))


def _scaled(state: State, factor: float) -> State:
    """The same places where the energy is `factor` times as high."""
    energy, gradient = state.energy, state.gradient
    return State(
        state.x,
        None if energy is None else factor * energy,
        None if gradient is None else factor * gradient,
    )
