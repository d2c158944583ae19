"""Targets about which everything is known, to try samplers on. Each has an `energy`, exact draws,
exact expectations, and a place where chains begin.

    oracle  | hard because                     | E(x), up to a constant
    --------|----------------------------------|----------------------------------------------
    Banana  | curved and thin                  | x_1^2 / 2 a^2 + (x_2 - b (x_1^2 - a^2))^2 / 2
    Funnel  | its width varies by orders       | v^2 / 2 s^2 + |x|^2 exp(-v) / 2 + n v / 2
    Mixture | walls between the modes          | -log sum_k N(x; mean_k, sigma^2 I)
    Ising   | discrete; all spins have to turn | -J sum_<ij> x_i x_j

The banana is Haario, Saksman & Tamminen's (1999), the funnel Neal's (2003). Continuous energies
are normalised: Z = 1, energy = -log p.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ebm import EBMError
from ebm.densities import DENSITIES, GaussianMixture

ENUMERABLE = 4
"""The largest side of an Ising lattice whose states are enumerated: 2^16 of them."""


class Expectation(NamedTuple):
    """A function of points [B, *] -> [B], and the mean and standard deviation of its values;
    whether it is a `coordinate` of the points."""

    name: str
    function: Callable[[Tensor], Tensor]
    mean: float
    deviation: float
    coordinate: bool = False


class Oracle(Protocol):
    """What a comparison of samplers asks of a target."""

    def energy(self, x: Tensor) -> Tensor:
        """E(x) [B] of points [B, *]."""

    def sample(self, n: int) -> Tensor:
        """n independent exact draws [n, *]."""

    def start(self, n: int) -> Tensor:
        """Where n chains begin [n, *]: not where they should end."""

    @property
    def expectations(self) -> tuple[Expectation, ...]:
        """What is known exactly."""


class Planar(Oracle, Protocol):
    """A continuous oracle, whose first two coordinates can be drawn in a plane."""

    @property
    def axes(self) -> tuple[str, str]:
        """What these coordinates are called."""

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """What to show of that plane: x_min, x_max, y_min, y_max."""

    def marginal(self, x: Tensor) -> Tensor:
        """log p(x_1, x_2) [B] of the first two coordinates [B, 2], the others integrated out."""


def _normal(x: Tensor, variance: Tensor | float) -> Tensor:
    """-log N(x; 0, variance), entry by entry."""
    return (x.square() / variance + torch.as_tensor(2 * math.pi * variance).log()) / 2


def _coordinate(index: int, deviation: float) -> Expectation:
    return Expectation(f"x{index + 1}", lambda x: x[:, index], 0.0, deviation, True)


@dataclass(frozen=True)
class Banana:
    """x_1 ~ N(0, a^2), x_2 ~ N(b (x_1^2 - a^2), 1)."""

    a: float = 2.0
    b: float = 0.5
    extent: tuple[float, float, float, float] = (-7.0, 7.0, -6.0, 16.0)
    axes: tuple[str, str] = ("x₁", "x₂")

    def energy(self, x: Tensor) -> Tensor:
        return _normal(x[:, 0], self.a**2) + _normal(x[:, 1] - self._bend(x[:, 0]), 1.0)

    def _bend(self, x: Tensor) -> Tensor:
        return self.b * (x.square() - self.a**2)

    def marginal(self, x: Tensor) -> Tensor:
        return -self.energy(x)

    def sample(self, n: int) -> Tensor:
        x = torch.randn(n, 2, dtype=torch.float64)
        along = self.a * x[:, 0]
        return torch.stack([along, self._bend(along) + x[:, 1]], 1)

    def start(self, n: int) -> Tensor:
        return torch.randn(n, 2, dtype=torch.float64)

    @property
    def expectations(self) -> tuple[Expectation, ...]:
        across = math.sqrt(1 + 2 * self.b**2 * self.a**4)
        return _coordinate(0, self.a), _coordinate(1, across)


@dataclass(frozen=True)
class Funnel:
    """v ~ N(0, s^2), and n coordinates x_i ~ N(0, exp(v)); points are (v, x_1, ... x_n)."""

    s: float = 3.0
    n: int = 9
    extent: tuple[float, float, float, float] = (-9.0, 9.0, -20.0, 20.0)
    axes: tuple[str, str] = ("v", "x₁")

    def energy(self, x: Tensor) -> Tensor:
        v, rest = x[:, 0], x[:, 1:]
        return _normal(v, self.s**2) + _normal(rest, v.exp()[:, None]).sum(1)

    def marginal(self, x: Tensor) -> Tensor:
        return -Funnel(self.s, 1).energy(x)

    def sample(self, n: int) -> Tensor:
        v = self.s * torch.randn(n, 1, dtype=torch.float64)
        return torch.cat([v, (v / 2).exp() * torch.randn(n, self.n, dtype=torch.float64)], 1)

    def start(self, n: int) -> Tensor:
        return torch.randn(n, 1 + self.n, dtype=torch.float64)

    @property
    def expectations(self) -> tuple[Expectation, ...]:
        """Moments of v alone: those of x are finite, but no sampler's estimate is usable."""
        square = Expectation("v²", lambda x: x[:, 0] ** 2, self.s**2, math.sqrt(2) * self.s**2)
        return _coordinate(0, self.s)._replace(name="v"), square


@dataclass(frozen=True)
class Mixture:
    """One of `ebm.densities`, centred there at 0."""

    density: GaussianMixture
    extent: tuple[float, float, float, float] = (-2.0, 2.0, -2.0, 2.0)
    axes: tuple[str, str] = ("x₁", "x₂")

    def energy(self, x: Tensor) -> Tensor:
        return self.density.energy(x)

    def marginal(self, x: Tensor) -> Tensor:
        return self.density.log_prob(x)

    def sample(self, n: int) -> Tensor:
        return self.density.sample(n)

    def start(self, n: int) -> Tensor:
        return torch.randn(n, 2, dtype=torch.float64)

    @property
    def expectations(self) -> tuple[Expectation, ...]:
        variance = self.density.means.var(0, correction=0) + self.density.sigma**2
        return tuple(_coordinate(k, v) for k, v in enumerate(variance.sqrt().tolist()))


@dataclass(frozen=True)
class Ising:
    """A square lattice of spins +-1, periodic, `side` even, small enough to be enumerated."""

    side: int = 4
    coupling: float = 0.44

    def __post_init__(self) -> None:
        if self.side % 2 or self.side > ENUMERABLE:
            raise EBMError(f"Ising: side = {self.side}: must be even, at most {ENUMERABLE}")

    def energy(self, x: Tensor) -> Tensor:
        bonds = x * (x.roll(1, 1) + x.roll(1, 2))
        return -self.coupling * bonds.flatten(1).sum(1)

    def p_up(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """Every site's probability of +1, the others given, at the inverse temperature beta."""
        neighbours = x.roll(1, 1) + x.roll(-1, 1) + x.roll(1, 2) + x.roll(-1, 2)
        return torch.sigmoid(2 * beta * self.coupling * neighbours)

    @cached_property
    def blocks(self) -> tuple[Tensor, Tensor]:
        """The black squares and the white ones [side, side]."""
        row, column = torch.meshgrid(*[torch.arange(self.side)] * 2, indexing="ij")
        black = (row + column) % 2 == 0
        return black, ~black

    @cached_property
    def states(self) -> Tensor:
        """All of them [2^(side^2), side, side]; bit i of a state's number is site i."""
        sites = torch.arange(self.side**2)
        bits = torch.arange(2 ** len(sites))[:, None] >> sites & 1
        return (2.0 * bits.double() - 1).view(-1, self.side, self.side)

    @cached_property
    def probabilities(self) -> Tensor:
        """Probability of each of `states`."""
        return (-self.energy(self.states)).softmax(0)

    def sample(self, n: int) -> Tensor:
        return self.states[torch.multinomial(self.probabilities, n, replacement=True)]

    def start(self, n: int) -> Tensor:
        """All up or all down."""
        sign = 2 * torch.randint(2, (n, 1, 1)).double() - 1
        return sign.expand(n, self.side, self.side).clone()

    @property
    def expectations(self) -> tuple[Expectation, ...]:
        """Moments of the mean spin, whose sign is slow to change, and of the energy."""
        return self._expectation("m", _mean_spin), self._expectation("E", self.energy)

    def _expectation(self, name: str, function: Callable[[Tensor], Tensor]) -> Expectation:
        values, p = function(self.states), self.probabilities
        mean = (p * values).sum()
        deviation = (p * (values - mean).square()).sum().sqrt()
        return Expectation(name, function, mean.item(), deviation.item())


def _mean_spin(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


ORACLES: dict[str, Callable[[], Planar | Ising]] = {
    "banana": Banana,
    "funnel": Funnel,
    "8gaussians": lambda: Mixture(DENSITIES["8gaussians"]()),
    "ising": Ising,
}
