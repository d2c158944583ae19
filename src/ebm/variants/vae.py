r"""Variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114).

A decoder p(x | z) over the prior p(z) = N(0, I), and an encoder q(z | x) = N(mu(x), sigma(x)^2)
that stands in for the posterior; both ascend the evidence lower bound, by one draw of z:

    ELBO(x)  = E_q(z|x)[log p(x | z)] - KL(q(z | x) || p(z))   <=   log p(x)
    z        = mu + sigma epsilon,   epsilon ~ N(0, I)
    KL       = 1/2 sum_j (mu_j^2 + sigma_j^2 - 1 - log sigma_j^2)

    paper       | here
    ------------|----------------------------------------------------------------------
    theta, phi  | decoder, encoder
    L           | one draw of epsilon per point and step
    p(x | z)    | images: Bernoulli, whose logits are the decoder's output, so -log p is the binary
                | cross entropy, also of greys in [0, 1]; vectors: Gaussian around the decoder's
                | output, with one variance for all entries, exp(2 log_scale), which is learned

The energy is -ELBO at epsilon = 0: KL exactly, the reconstruction at the mean of the posterior
alone, so that a point scores the same whenever it is scored. Where log p(x | z) bends down in z,
that is below the mean over q: what the posterior's spread costs the reconstruction is left out. It
is in nats, for vectors and binary images; for greys, where the Bernoulli terms do not integrate to
one, up to a function of the greys.

Samples: the decoder at draws of the prior; of vectors with the noise of p(x | z), of images the
means.

Logged: `energy_gap`, the mean of -ELBO over data (a normalised density has no second term);
`reconstruction`, its part -log p(x | z), and `divergence`, its part KL; `gradient_norm`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Adam, Optimizer

from ebm import networks
from ebm.variants.base import EBM, descend, in_slices, standard_normal


class VAE(EBM):
    """VAE over points of `shape`, vectors or images in [0, 1]; settings as in
    `vae_config.Model`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        network: networks.Kind,
        encoder: Sequence[int],
        decoder: Sequence[int],
        latent: int,
        learning_rate: float,
        betas: tuple[float, float],
    ) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = networks.encoder(network, shape, encoder, 2 * latent)
        layers = networks.decoder(network, latent, shape, decoder)
        self.decoder = nn.Sequential(*(m for m in layers if not isinstance(m, nn.Sigmoid)))
        self.log_scale = None if len(shape) > 1 else nn.Parameter(torch.zeros(()))
        self.to(memory_format=torch.channels_last)
        self.learning_rate, self.betas = learning_rate, betas

    def configure_optimizers(self) -> dict[str, Optimizer]:
        return {"model": Adam(self.parameters(), self.learning_rate, self.betas)}

    def energy(self, x: Tensor) -> Tensor:
        """-ELBO for x [B, *] with the reconstruction at the posterior's mean: [B], in nats."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return self.reconstruction(x, self.decoder(mean)) + kl_to_prior(mean, log_variance)

    def terms(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(x | z) at z = mu + sigma noise, noise [B, latent], and KL(q(z | x) || p(z)) for
        x [B, *]: both [B]. The mean of their sum over N(0, I) noise is -ELBO."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        z = mean + (log_variance / 2).exp() * noise
        return self.reconstruction(x, self.decoder(z)), kl_to_prior(mean, log_variance)

    def reconstruction(self, x: Tensor, decoded: Tensor) -> Tensor:
        """-log p(x | z) for x [B, *] and the decoder's output at z [B, *]: [B]."""
        if self.log_scale is None:
            entropy = binary_cross_entropy_with_logits(decoded, x, reduction="none")
        else:
            standard = (x - decoded) * (-self.log_scale).exp()
            entropy = standard.square() / 2 + self.log_scale + math.log(2 * math.pi) / 2
        return entropy.flatten(1).sum(1)

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        parts = self.terms(x, self._noise(len(x)))
        reconstruction, divergence = (part.mean() for part in parts)
        loss = reconstruction + divergence
        norm = descend(self.optimizers["model"], loss)
        return {
            "energy_gap": loss.detach(),
            "reconstruction": reconstruction.detach(),
            "divergence": divergence.detach(),
            "gradient_norm": norm,
        }

    @torch.no_grad()
    def sample(self, n: int) -> dict[str, Tensor]:
        """`samples` [n, *]: means of p(x | z) for images, draws of it for vectors."""
        decoded = in_slices(self.decoder, self._noise(n))
        if self.log_scale is None:
            return {"samples": decoded.sigmoid()}
        return {"samples": decoded + self.log_scale.exp() * torch.randn_like(decoded)}

    def _noise(self, n: int) -> Tensor:
        """N(0, I): of epsilon and of the prior, [n, latent]."""
        return standard_normal(self.decoder, n, self.latent)


def kl_to_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, I)) of axes independent of each other: [B, D] to
    [B]."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
