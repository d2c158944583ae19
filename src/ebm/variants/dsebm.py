r"""Deep structured energy-based models, fully connected (Zhai, Cheng, Lu & Zhang 2016,
arXiv:1605.07717), a baseline.

    E(x) = |x - b'|^2 / 2 - sum_j h_L,j(x),      h_l = softplus(W_l h_(l-1) + b_l),  h_0 = x
    f(x) = x - grad E(x)

trained as a denoising autoencoder, which is score matching (Vincent 2011): f of a point with
Gaussian noise is to be the point without it,

    L = E |x - f(x + sigma e)|^2,     e ~ N(0, 1)

At its least f is the mean of x given x + sigma e, so E / sigma^2 is the energy, in nats, of the
data with that noise.

    paper      | here
    -----------|--------------------------------------------------------------------------
    W_l, b_l   | layers; going back through the same weights is what grad E does
    b'         | centre [D]
    sigma      | noise

A widely used reimplementation has one b' for each row of a batch, so that what a test point scores
depends on its place in the batch, and sends h_L through two more softplus layers with the
transposed weights before the sum; neither is in the paper, nor here.

`energy` is the score of DSEBM-e; |grad E|^2, that of DSEBM-r, is |x - f(x)|^2. Standardised
columns divide that gradient by their scale.

Logged: `energy_gap` = E_data[E(x)] - E_data[E(x + sigma e)]; `gradient_norm` of the parameters'
step; `reconstruction_error`, the loss L.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Adam, Optimizer

from ebm.networks import mlp
from ebm.scoring import Scorer
from ebm.variants.base import descend, parameters_of


class DSEBM(Scorer):
    """DSEBM over points of `shape`; settings as in `dsebm_config.Model`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        widths: Sequence[int],
        noise: float,
        standardise: bool,
        learning_rate: float,
        betas: tuple[float, float],
    ) -> None:
        super().__init__(shape, standardise)
        self.noise = noise
        dimensions = len(self.columns.mean)
        self.layers = mlp([dimensions, *widths], nn.Softplus())
        self.centre = nn.Parameter(torch.zeros(dimensions))
        self.learning_rate, self.betas = learning_rate, betas

    def configure_optimizers(self) -> dict[str, Optimizer]:
        return {"model": Adam(parameters_of(self), self.learning_rate, self.betas)}

    def energy(self, x: Tensor) -> Tensor:
        return self.column_energy(self.columns(x))

    def column_energy(self, x: Tensor) -> Tensor:
        """E of points given as the network's own columns [B, D]: shape [B]."""
        return (x - self.centre).square().sum(1) / 2 - softplus(self.layers(x)).sum(1)

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        x = self.columns(x)
        noisy = (x + self.noise * torch.randn_like(x)).requires_grad_()
        energy = self.column_energy(noisy)
        (gradient,) = torch.autograd.grad(energy.sum(), noisy, create_graph=True)
        error = (x - (noisy - gradient)).square().sum(1).mean()
        with torch.no_grad():
            gap = self.column_energy(x).mean() - energy.mean()
        norm = descend(self.optimizers["model"], error)
        return {
            "energy_gap": gap,
            "gradient_norm": norm,
            "reconstruction_error": error.detach(),
        }
