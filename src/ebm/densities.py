"""Two-dimensional densities with exact log p, exact sampling and known modes: the oracles.

They wear the interface of a learned model: `energy`, `sample`. Each is a mixture of equal
Gaussians, and log p and the draws are those of that very mixture, so they agree exactly. A curve
(Swiss roll, rings, spirals) is strung with so many Gaussians that neighbours are less than half a
standard deviation apart: the midpoint rule for the curve blurred by noise, equal to the integral
within 1e-8 along the curve and within 1 % at its open ends.

Scales follow the toy data of the MEG paper's released code where it has them (8 and 25 Gaussians,
Swiss roll), so that all fit into [-2, 2]^2.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

EXTENT = (-2.0, 2.0)
"""Both axes of the square that holds every density here, up to less than 1e-5 of its mass."""


class GaussianMixture(nn.Module):
    """Equal mixture of N(means_k, sigma^2 I); `means` [K, 2] are its modes if `modal`. Of as many
    `classes` each has an equal run of the means."""

    means: Tensor

    def __init__(self, means: Tensor, sigma: float, modal: bool, classes: int = 1) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.sigma, self.modal, self.classes = sigma, modal, classes

    @property
    def modes(self) -> Tensor | None:
        """Centres of the modes [K, 2], or None where the density is a curve and has none."""
        return self.means if self.modal else None

    def energy(self, x: Tensor) -> Tensor:
        """-log p(x), normalised (Z = 1), for x [B, 2]: shape [B]."""
        return -self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats for x [B, 2]: shape [B]."""
        exact = x.double()  # `cdist` takes the difference of squares
        squared = torch.cdist(exact, self.means.to(exact)).square()
        log_kernel = -squared / (2 * self.sigma**2)
        log_norm = math.log(len(self.means)) + math.log(2 * math.pi * self.sigma**2)
        return (torch.logsumexp(log_kernel, 1) - log_norm).to(x.dtype)

    def sample(self, n: int) -> Tensor:
        """n independent draws [n, 2]."""
        return self.sample_with_classes(n)[0]

    def sample_with_classes(self, n: int) -> tuple[Tensor, Tensor]:
        """n independent draws [n, 2] and the classes that they are of [n]."""
        which = torch.randint(len(self.means), (n,))  # on the CPU, so that devices draw alike
        noise = torch.randn(n, 2, dtype=self.means.dtype).to(self.means.device)
        which = which.to(self.means.device)
        x = self.means[which] + self.sigma * noise
        return x, which * self.classes // len(self.means)


def _ring_of_gaussians(count: int, radius: float, sigma: float) -> GaussianMixture:
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, sigma, modal=True)


def _grid_of_gaussians(side: int, spacing: float, sigma: float) -> GaussianMixture:
    axis = spacing * (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)
    return GaussianMixture(torch.cartesian_prod(axis, axis), sigma, modal=True)


def _blurred(
    curve: Callable[[Tensor], Tensor], nodes: int, sigma: float, classes: int = 1
) -> GaussianMixture:
    middle = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
    return GaussianMixture(curve(middle), sigma, modal=False, classes=classes)


def _roll(u: Tensor) -> Tensor:
    t = 1.5 * math.pi * (1 + 2 * u)
    return t[:, None] * torch.stack([t.cos(), t.sin()], 1) / 7.5


def _rings(u: Tensor) -> Tensor:
    which = (4 * u).floor()
    angle = 2 * math.pi * (4 * u - which)
    return 0.4 * (which + 1)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


def _spirals(u: Tensor) -> Tensor:
    arm = 1 - 2 * (2 * u).floor()
    t = 3 * math.pi * ((2 * u % 1 + 0.01) / 1.01).sqrt()
    return (arm * t)[:, None] * torch.stack([-t.cos(), t.sin()], 1) / 6


DENSITIES: dict[str, Callable[[], GaussianMixture]] = {
    "8gaussians": lambda: _ring_of_gaussians(8, radius=2 / 1.414, sigma=0.02 / 1.414),
    "25gaussians": lambda: _grid_of_gaussians(5, spacing=2 / 2.828, sigma=0.05 / 2.828),
    "swissroll": lambda: _blurred(_roll, nodes=2048, sigma=0.25 / 7.5),
    "rings": lambda: _blurred(_rings, nodes=3072, sigma=0.03),
    "2spirals": lambda: _blurred(_spirals, nodes=2048, sigma=0.03, classes=2),
}
