"""Markov chain Monte Carlo for an energy function; chains are the rows of a batch.

A kernel is `init(x) -> State` and `step(State) -> State`; `run` is the only loop. A kernel sees an
energy `E: [B, *] -> [B]`, never a model: the samplers of a latent space and of an annealing path
are the same kernels on another energy. Chance and arithmetic are apart: what decides acceptance
draws nothing.

    paper | here
    ------|------------------------------------------------------------------
    E(x)  | energy(x), the negative log-density up to a constant
    eps   | step_size: x' = x - eps grad E(x) + sqrt(2 eps) N(0, I)
    q     | that proposal's density
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Energy = Callable[[Tensor], Tensor]


class State(NamedTuple):
    """Where the chains are, and what is already known about that place.

    `x` [B, *]; `energy` [B] and `gradient` [B, *] at x; `acceptance` [B], the probability with
    which the last proposal was accepted. None: this kernel does not need it.
    """

    x: Tensor
    energy: Tensor | None = None
    gradient: Tensor | None = None
    acceptance: Tensor | None = None


class Kernel(Protocol):
    """A Markov transition on a batch of chains."""

    def init(self, x: Tensor) -> State: ...

    def step(self, state: State) -> State: ...


def run(
    kernel: Kernel,
    x: Tensor,
    steps: int,
    observe: Callable[[int, State], None] = lambda step, state: None,
) -> State:
    """`steps` transitions from `x`; `observe(step, state)` sees the start (0) and every step."""
    state = kernel.init(x)
    observe(0, state)
    for step in range(1, steps + 1):
        state = kernel.step(state)
        observe(step, state)
    return state


def value_and_gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """E(x) [B] and grad E(x) [B, *], from one forward and one backward pass."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = energy(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def draw(p: Tensor) -> Tensor:
    """Independent bits that are 1 with probability p, of p's shape and type (a third of the time
    that `torch.bernoulli` takes on a CPU)."""
    return (torch.rand_like(p) < p).to(p.dtype)


def _squared_norm(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


def _where(accept: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor:
    assert new is not None
    assert old is not None
    return torch.where(accept.view(-1, *[1] * (new.dim() - 1)), new, old)


@dataclass(frozen=True)
class Langevin:
    """Unadjusted Langevin dynamics: x' = x - eps grad E(x) + sqrt(2 eps) N(0, I).

    Biased at any finite step: on a unit Gaussian its variance is 1 / (1 - eps / 2).
    """

    energy: Energy
    step_size: float

    def init(self, x: Tensor) -> State:
        return State(x, *value_and_gradient(self.energy, x))

    def step(self, state: State) -> State:
        noise = torch.randn_like(state.x)
        return self.init(self.drift(state) + (2 * self.step_size) ** 0.5 * noise)

    def drift(self, state: State) -> Tensor:
        """The mean of the next state."""
        assert state.gradient is not None
        return state.x - self.step_size * state.gradient


@dataclass(frozen=True)
class MALA(Langevin):
    """Metropolis-adjusted Langevin algorithm: Langevin's move as a proposal, accepted with
    probability min(1, p(y) q(x | y) / (p(x) q(y | x))). Exact at any step size
    (Roberts & Tweedie 1996, section 1.4)."""

    def step(self, state: State) -> State:
        proposal = super().step(state)
        acceptance = self.log_accept(state, proposal).clamp(max=0).exp()
        accept = torch.rand_like(acceptance) < acceptance
        return State(
            _where(accept, proposal.x, state.x),
            _where(accept, proposal.energy, state.energy),
            _where(accept, proposal.gradient, state.gradient),
            acceptance,
        )

    def log_accept(self, s: State, t: State) -> Tensor:
        """log of p(t) q(s | t) / (p(s) q(t | s)), shape [B]; draws nothing."""
        assert s.energy is not None
        assert t.energy is not None
        return s.energy - t.energy + self.log_proposal(s, t) - self.log_proposal(t, s)

    def log_proposal(self, to: State, given: State) -> Tensor:
        """log q(to | given) = -|to - drift(given)|^2 / (4 eps), up to a constant; shape [B]."""
        return -_squared_norm(to.x - self.drift(given)) / (4 * self.step_size)


@dataclass(frozen=True)
class BlockGibbs:
    """Two-block Gibbs sampling of binary units: h ~ p(h | v), then v ~ p(v | h).

    `p_hidden`: [B, V] -> [B, H] and `p_visible`: [B, H] -> [B, V] are probabilities of being on.
    """

    p_hidden: Callable[[Tensor], Tensor]
    p_visible: Callable[[Tensor], Tensor]

    def init(self, x: Tensor) -> State:
        return State(x)

    def step(self, state: State) -> State:
        return State(draw(self.p_visible(draw(self.p_hidden(state.x)))))


def ais(
    energy_at: Callable[[float, Tensor], Tensor],
    kernel_at: Callable[[float], Kernel],
    x: Tensor,
    betas: Sequence[float],
) -> Tensor:
    """Annealed importance sampling (Neal 2001) along `betas`: log-weights [B] in float64.

    `energy_at(beta, x)` is the path, `kernel_at(beta)` leaves exp(-energy_at(beta, .)) invariant
    and `x` [B, *] are draws from the path's start. The mean of exp(log-weight) is Z_end /
    Z_start, so the log of the mean errs on the low side. Walking the ladder backwards from draws
    of the target gives an estimate of Z_start / Z_end, hence one of Z_end that errs on the high
    side: the gap between the two bounds the error of both (Grosse, Ghahramani & Adams 2015).
    """
    log_weight = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for last, beta in pairwise(betas):
        log_weight += (energy_at(last, x) - energy_at(beta, x)).double()
        kernel = kernel_at(beta)
        x = kernel.step(kernel.init(x)).x
    return log_weight


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """log of the mean of exp(log_weight) over the last axis, without overflow."""
    return torch.logsumexp(log_weight, -1) - torch.log(torch.tensor(log_weight.shape[-1]))
