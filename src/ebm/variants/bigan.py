r"""Bidirectional GAN (Donahue, Krähenbühl & Darrell 2017, arXiv:1605.09782; Dumoulin et al. 2017,
arXiv:1606.00704) as a detector of anomalies (Zenati et al. 2018, arXiv:1802.06222).

A generator G, an encoder F that learns its inverse, and a discriminator D of pairs of a point and
a latent, whose logit is d: are they (x, F(x)) with x from the data, or (G(z), z)?

    H(a, b)           = E[softplus(-a)] + E[softplus(b)]    cross entropy, a is 1 and b is 0
    D descends        H(d(x, F(x)), d(G(z), z))
    G and F descend   H(d(G(z), z), d(x, F(x)))             the labels exchanged, non-saturating
    E(x)              = (1 - w) |x - G(F(x))|_1 + w softplus(-d(x, F(x)))

    paper       | here
    ------------|--------------------------------------------------------------------------
    E (encoder) | encoder, a function of x; F above, as E is the energy
    L_G, L_D    | the two terms of the energy, |.|_1 summed over all axes of x; L_D is `sigma`,
                | the cross entropy with "this is a data pair"
    1 - alpha   | mix = w, published 0.1. Images lie in [0, 1], half as wide as the published
                | [-1, 1], which halves |.|_1: mix 1/19 orders points as the published 0.1 does
    EMA         | ema, of all three networks: energies and samples are those of the averages

The released code's `sigma` judges the reconstruction's pair (G(F(x)), F(x)), under which an
anomaly hides by its own reconstruction; here it is that of the formula, (x, F(x)). Its
discriminator has batch normalisation and dropout, its encoder batch normalisation; here neither
has, so what comes of a point depends on no other one. One z, one batch and one pass through G and
F serve both steps.

The energy is a score, not in nats: only its order means something. Samples: G(z).

Logged: `energy_gap` = E[-d(x, F(x))] - E[-d(G(z), z)], data pairs against made ones, at most 0
where D tells them apart; `discriminator_loss` and `generator_loss`, the two H (2 log 2: told apart
by chance); `gradient_norm` of D's step and `generator_gradient_norm` of G's and F's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Adam, Optimizer

from ebm import networks
from ebm.variants.base import Generative, average_of, descend, parameters_of, update_average


class BiGAN(Generative):
    """BiGAN over points of `shape`; settings as in `bigan_config.Model`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        network: networks.Kind,
        encoder: Sequence[int],
        generator: Sequence[int],
        discriminator: Sequence[int],
        latent: int,
        mix: float,
        generator_learning_rate: float,
        discriminator_learning_rate: float,
        betas: tuple[float, float],
        ema: float,
    ) -> None:
        super().__init__()
        self.latent, self.mix, self.ema = latent, mix, ema
        self.encoder = networks.encoder(network, shape, encoder, latent)
        self.generator = networks.decoder(network, latent, shape, generator)
        self.discriminator = networks.Joint(network, shape, latent, discriminator)
        self.average = average_of(self._current(), ema)
        self.to(memory_format=torch.channels_last)
        self.discriminator_learning_rate, self.betas = discriminator_learning_rate, betas
        self.generator_learning_rate = generator_learning_rate

    def configure_optimizers(self) -> dict[str, Optimizer]:
        critic, both = self.discriminator, parameters_of(self.encoder, self.generator)
        return {
            "discriminator": Adam(
                critic.parameters(), self.discriminator_learning_rate, self.betas
            ),
            "generator": Adam(both, self.generator_learning_rate, self.betas),
        }

    def energy(self, x: Tensor) -> Tensor:
        """The anomaly score of x [B, *]: [B]."""
        encoder, generator, discriminator = self.average or self._current()
        z = encoder(x)
        distance = (x - generator(z)).abs().flatten(1).sum(1)
        return (1 - self.mix) * distance + self.mix * softplus(-discriminator(x, z))

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z = self._prior(len(x))
        code, fake = self.encoder(x), self.generator(z)
        logs = self._discriminator_step(x, code.detach(), fake.detach(), z)
        logs |= self._generator_step(x, code, fake, z)
        update_average(self.average, self._current(), self.ema)
        return logs

    def _discriminator_step(
        self, x: Tensor, code: Tensor, fake: Tensor, z: Tensor
    ) -> dict[str, Tensor]:
        logits = self.discriminator(torch.cat([x, fake]), torch.cat([code, z]))
        encoded, generated = logits.chunk(2)
        loss = cross_entropy(encoded, generated)
        norm = descend(self.optimizers["discriminator"], loss)
        return {
            "energy_gap": (generated.mean() - encoded.mean()).detach(),
            "discriminator_loss": loss.detach(),
            "gradient_norm": norm,
        }

    def _generator_step(
        self, x: Tensor, code: Tensor, fake: Tensor, z: Tensor
    ) -> dict[str, Tensor]:
        with torch.no_grad():  # nothing of x depends on G or F
            features = self.discriminator.features(x)
        encoded = self.discriminator.pair(features, code)
        generated = self.discriminator(fake, z)
        loss = cross_entropy(generated, encoded)
        norm = descend(self.optimizers["generator"], loss)
        return {"generator_loss": loss.detach(), "generator_gradient_norm": norm}

    def averaged_generator(self) -> nn.Module | None:
        return None if self.average is None else self.average[1]

    def sample(self, n: int) -> dict[str, Tensor]:
        """`samples` G(z) [n, *]."""
        return {"samples": self.generated(self._prior(n))}

    def _current(self) -> nn.ModuleList:
        """Encoder, generator and discriminator as they are trained."""
        return nn.ModuleList([self.encoder, self.generator, self.discriminator])


def cross_entropy(ones: Tensor, zeros: Tensor) -> Tensor:
    """-E[log sigmoid(ones)] - E[log(1 - sigmoid(zeros))] of logits [B] and [B]: a scalar."""
    return softplus(-ones).mean() + softplus(zeros).mean()
