r"""Deep autoencoding Gaussian mixture model (Zong, Song, Min, Cheng, Lumezanu, Cho & Chen 2018,
ICLR), a baseline.

An autoencoder makes a few features z of a point, an estimation network guesses which component of
a mixture they belong to, and the moments of a batch with these memberships are the mixture:

    z       = [code, |x - x'| / |x|, x.x' / |x||x'|],      code = h(x),  x' = g(code)
    gamma   = softmax(MLN(z))
    phi_k   = mean gamma_k,   mu_k = mean gamma_k z / phi_k,   Sigma_k = mean gamma_k zz' / phi_k
              - mu_k mu_k' + epsilon I
    E(z)    = -log sum_k phi_k N(z | mu_k, Sigma_k)
    L       = mean |x - x'|^2 + lambda_1 mean E(z) + lambda_2 sum_k,j 1 / Sigma_kjj

    paper       | here
    ------------|-------------------------------------------------------------------------
    h, g        | encoder, decoder        MLN | hidden, dropout, head
    lambda_1    | energy_weight           lambda_2 | diagonal_penalty
    epsilon     | regularisation (none in the text; the reimplementations add one)

The authors released no code. What they leave open, and what was decided here:

- The mixture by which a point is scored belongs to the training data, and never to the batch that
  is being scored. Reimplementations take the last batch's, or one more pass over all training rows
  at the end. Here `moments` are running means of gamma, gamma z and gamma zz' over the training
  batches, with decay `ema`, begun as the exact means over all rows: as learning rates fall to zero
  they become those of the final network, and a checkpoint of any step can be scored. The
  memberships that enter them are computed without dropout.
- Whether the columns were scaled: `standardise`, or a data set that is. With raw columns as large
  as 7e8 the reconstruction drowns everything else.
- Moments, Cholesky factors and sums are computed in float64. A Sigma that is not positive definite
  gives energies that are not finite, which the watch of the training loop notices.

Logged: `energy_gap`, the mean energy of the batch, as there are no samples to hold it against;
`gradient_norm` of the step; `reconstruction_error` = mean |x - x'|^2; `diagonal_penalty`, the sum
of the reciprocals before its weight.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from ebm.networks import mlp
from ebm.parallel import averaged
from ebm.scoring import Scorer
from ebm.variants.base import descend, parameters_of

SLICE = 16384
"""Rows that go through the encoder at once where no gradient is needed."""

LEAST = 1e-2
"""The least norm that anything is divided by: a row of zeros would be infinitely far from its
copy, and alone decide the moments of the mixture."""


class Mixture(NamedTuple):
    """Weights phi [K], means mu [K, F] and covariances Sigma [K, F, F]."""

    weights: Tensor
    means: Tensor
    covariances: Tensor


class DAGMM(Scorer):
    """DAGMM over points of `shape`; settings as in `dagmm_config.Model`."""

    moments: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        encoder: Sequence[int],
        decoder: Sequence[int],
        latent: int,
        components: int,
        estimation: Sequence[int],
        dropout: float,
        energy_weight: float,
        diagonal_penalty: float,
        regularisation: float,
        ema: float,
        standardise: bool,
        learning_rate: float,
        betas: tuple[float, float],
    ) -> None:
        super().__init__(shape, standardise)
        self.dropout, self.ema, self.regularisation = dropout, ema, regularisation
        self.energy_weight, self.diagonal_penalty = energy_weight, diagonal_penalty
        data, features = len(self.columns.mean), latent + 2
        self.dimensions = features
        self.encoder = mlp([data, *encoder, latent], nn.Tanh())
        self.decoder = mlp([latent, *decoder, data], nn.Tanh())
        self.hidden = nn.Sequential(mlp([features, *estimation], nn.Tanh()), nn.Tanh())
        self.head = nn.Linear(estimation[-1], components)
        size = 1 + features + features**2
        self.register_buffer("moments", torch.zeros(components, size, dtype=torch.double))
        self.learning_rate, self.betas = learning_rate, betas

    def configure_optimizers(self) -> dict[str, Optimizer]:
        return {"model": Adam(parameters_of(self), self.learning_rate, self.betas)}

    @torch.no_grad()
    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        """The mixture of all rows of `data` [N, *], by the network as it is."""
        super().initialise(data)
        parts = [self.features(self.columns(part))[0] for part in data.split(SLICE)]
        self.moments.copy_(self.moments_of(torch.cat(parts), 0.0))

    def energy(self, x: Tensor) -> Tensor:
        z, _ = self.features(self.columns(x))
        return mixture_energy(z.double(), self.mixture(self.moments)).to(x.dtype)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, latent + 2] and the reconstruction x' [B, D] of points given as columns [B, D]."""
        code = self.encoder(x)
        copy = self.decoder(code)
        distance = (x - copy).norm(dim=1) / x.norm(dim=1).clamp(min=LEAST)
        cosine = F.cosine_similarity(x, copy, dim=1, eps=LEAST)
        return torch.cat([code, distance[:, None], cosine[:, None]], 1), copy

    def membership(self, z: Tensor, dropout: float) -> Tensor:
        """gamma [B, K] of features z [B, F], float64, with a share `dropout` of the last hidden
        layer's units left out."""
        hidden = F.dropout(self.hidden(z), dropout, training=dropout > 0)
        return self.head(hidden).double().softmax(1)

    def moments_of(self, z: Tensor, dropout: float) -> Tensor:
        """The means over z [B, F] of gamma, gamma z and gamma zz', flattened and side by side:
        [K, 1 + F + F^2]."""
        gamma, z = self.membership(z, dropout), z.double()
        squares = (z[:, :, None] * z[:, None, :]).flatten(1)
        return gamma.T @ torch.cat([torch.ones_like(z[:, :1]), z, squares], 1) / len(z)

    def mixture(self, moments: Tensor) -> Mixture:
        """The mixture that has these `moments` [K, 1 + F + F^2]."""
        features = self.dimensions
        weights, first, second = moments.split([1, features, features**2], 1)
        means = first / weights
        covariances = (second / weights).unflatten(1, (features, features))
        covariances = covariances - means[:, :, None] * means[:, None, :]
        floor = self.regularisation * torch.diag_embed(torch.ones_like(means))
        return Mixture(weights.squeeze(1), means, covariances + floor)

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        x = self.columns(x)
        z, copy = self.features(x)
        mixture = self.mixture(averaged(self.moments_of(z, self.dropout)))
        error = (x - copy).square().sum(1).mean()
        energy = mixture_energy(z.double(), mixture).mean()
        penalty = mixture.covariances.diagonal(dim1=1, dim2=2).reciprocal().sum()
        loss = error + self.energy_weight * energy + self.diagonal_penalty * penalty
        norm = descend(self.optimizers["model"], loss)
        with torch.no_grad():
            self.moments.lerp_(averaged(self.moments_of(z.detach(), 0.0)), 1 - self.ema)
        return {
            "energy_gap": energy.detach().to(x.dtype),
            "gradient_norm": norm,
            "reconstruction_error": error.detach(),
            "diagonal_penalty": penalty.detach().to(x.dtype),
        }


def mixture_energy(z: Tensor, mixture: Mixture) -> Tensor:
    """-log sum_k phi_k N(z | mu_k, Sigma_k) for z [B, F]: shape [B], in nats. Not a number where a
    Sigma is not positive definite."""
    root, failed = torch.linalg.cholesky_ex(mixture.covariances)
    root = root.masked_fill((failed != 0)[:, None, None], math.nan)
    centred = (z - mixture.means[:, None]).mT
    white = torch.linalg.solve_triangular(root, centred, upper=False)
    log_root = root.diagonal(dim1=1, dim2=2).log().sum(1) + z.shape[1] / 2 * math.log(2 * math.pi)
    log_p = mixture.weights.log() - log_root
    return -torch.logsumexp(log_p[:, None] - white.square().sum(1) / 2, 0)
