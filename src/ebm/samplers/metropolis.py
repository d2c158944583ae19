"""Metropolis' algorithm with proposals that are symmetric, or look at no chain: all that it asks
of an energy is its value.

paper  | here
-------|---------------------------------------------------------------------------------
q(y|x) | propose(x) draws y; q(y|x) = q(x|y), so it cancels from the ratio
sigma  | step_size of `RandomWalk`: y = x + sigma N(0, I)
Z      | archive of `DifferentialEvolution`: y = x + a - b, a and b of Z
w      | exp(-energy) of `Independence`, q what its draw() is of
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ebm.samplers.kernel import Energy, State, metropolise


@dataclass(frozen=True)
class Metropolis:
    """A proposal y of `propose`, as likely as the way back, is accepted with probability
    min(1, p(y) / p(x)) (Metropolis et al. 1953). One evaluation of E a step, no gradient."""

    energy: Energy

    def init(self, x: Tensor) -> State:
        with torch.no_grad():
            return State(x, self.energy(x))

    def step(self, state: State) -> State:
        proposal = self.proposal(state.x)._replace(steps=state.steps + 1)
        return metropolise(state, proposal, self.log_accept(state, proposal))

    def proposal(self, x: Tensor) -> State:
        """A proposal for chains at x [B, *], and what is known of it."""
        return self.init(self.propose(x))

    def propose(self, x: Tensor) -> Tensor:
        """Draw a proposal [B, *] for chains at x [B, *]."""
        raise NotImplementedError

    def log_accept(self, s: State, t: State) -> Tensor:
        """log of p(t) / p(s), shape [B]; draws nothing."""
        assert s.energy is not None
        assert t.energy is not None
        return s.energy - t.energy


@dataclass(frozen=True)
class RandomWalk(Metropolis):
    """Random-walk Metropolis: y = x + sigma N(0, I). In many dimensions it is at its best where it
    accepts 0.234 of its proposals (Roberts, Gelman & Gilks 1997)."""

    step_size: float

    def propose(self, x: Tensor) -> Tensor:
        return x + self.step_size * torch.randn_like(x)


@dataclass(frozen=True)
class DifferentialEvolution(Metropolis):
    """y = x + a - b, with a and b drawn from an `archive` [N, *] of points: one that has points of
    all modes lets chains jump from mode to mode, which no walk along a gradient does (ter Braak &
    Vrugt 2008, with their gamma = 1). Exact for an archive that stays as it is."""

    archive: Tensor

    def propose(self, x: Tensor) -> Tensor:
        rows = torch.randint(len(self.archive), (2, len(x)), device=x.device)
        a, b = self.archive[rows]
        return x + a - b


@dataclass(frozen=True)
class SpinFlip(Metropolis):
    """Single-spin-flip Metropolis for spins of +-1: one site of each chain, drawn uniformly."""

    def propose(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        site = torch.randint(flat.shape[1], (len(x), 1), device=x.device)
        return flat.scatter(1, site, -flat.gather(1, site)).view_as(x)


@dataclass(frozen=True)
class Independence(Metropolis):
    """Proposals y ~ q from a density that is known, wherever the chain is, accepted with
    probability min(1, w(y) / w(x)), w = p / q (Hastings 1970; Tierney 1994). The `energy` is
    -log w, that of p relative to q. `draw(n)` gives n proposals [n, *] and their energies [n],
    which where points are drawn often cost less than where any are given."""

    draw: Callable[[int], tuple[Tensor, Tensor]]

    def start(self, n: int) -> State:
        """n chains, each at a proposal."""
        with torch.no_grad():
            return State(*self.draw(n))

    def proposal(self, x: Tensor) -> State:
        return self.start(len(x))
