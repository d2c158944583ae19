r"""Wasserstein GAN with gradient penalty (Gulrajani, Ahmed, Arjovsky, Dumoulin & Courville 2017,
arXiv:1704.00028), the baseline of maximum entropy generators.

A critic D, at most 1-Lipschitz, whose mean over data exceeds its mean over samples by the
Wasserstein distance of the two, and a generator G that lessens it. The energy here is E = -D:

    E descends   E_data[E(x)] - E_z[E(G(z))] + lambda E_x^[(|grad E(x^)| - 1)^2]
    G descends   E_z[E(G(z))]
    x^           = u x + (1 - u) G(z),   u uniform in [0, 1]

    paper     | here
    ----------|------------------------------------------------------------------------
    D         | -energy_network         G | generator
    n_critic  | energy_steps per generator step; a batch is cut into that many parts
    lambda    | gradient_penalty. The critic's slope is that in the points as they are; images
              | lie in [0, 1], half as wide as the published [-1, 1]: lambda 5 is its 10.
    epsilon   | u, one number for each pair

The baseline in the released code of maximum entropy generators is another model in two places,
both mended here. Its u is drawn for every entry of x, so that x^ lies anywhere in the box between
the pair; here x^ is on the segment, where the theorem behind the penalty has it. Its norm is over
axis 1 alone, for images the channels, which asks every pixel for a slope of 1; here it is over all
axes of a point.

The energy is in units of distance, not in nats: exp(-E) is no density of the data, only its order
means something. Samples: G(z), by the moving average where there is one.

Logged: `energy_gap` = E_data[E] - E_z[E(G(z))], minus the estimated Wasserstein distance; `slope`,
the mean |grad E| at x^, and `penalty`, the mean (|grad E| - 1)^2 there; `gradient_norm` and
`generator_gradient_norm` of the two steps.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ebm.networks import Kind, decoder, encoder
from ebm.parallel import parts
from ebm.recorded import Loss
from ebm.samplers import by_row
from ebm.variants.base import Generative, autocast, average_of, update_average


class WGANGP(Generative):
    """WGAN-GP over points of `shape`; settings as in `wgan_gp_config.Model`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        network: Kind,
        energy: Sequence[int],
        generator: Sequence[int],
        latent: int,
        energy_steps: int,
        gradient_penalty: float,
        energy_learning_rate: float,
        generator_learning_rate: float,
        betas: tuple[float, float],
        ema: float,
        precision: str,
        compile: bool,
    ) -> None:
        super().__init__()
        self.compiled = compile
        self.latent, self.energy_steps, self.ema = latent, energy_steps, ema
        self.gradient_penalty, self.precision = gradient_penalty, getattr(torch, precision)
        self.energy_network = encoder(network, shape, energy, 1)
        self.generator = decoder(network, latent, shape, generator)
        self.average = average_of(self.generator, ema)
        self.to(memory_format=torch.channels_last)
        self.energy_learning_rate, self.betas = energy_learning_rate, betas
        self.generator_learning_rate = generator_learning_rate

    def configure_optimizers(self) -> dict[str, Optimizer]:
        energy, generator = self.energy_network, self.generator
        adam = partial(Adam, betas=self.betas, fused=self.fused)
        return {
            "energy": adam(energy.parameters(), self.energy_learning_rate),
            "generator": adam(generator.parameters(), self.generator_learning_rate),
        }

    def averaged_generator(self) -> nn.Module | None:
        return self.average

    def energy(self, x: Tensor) -> Tensor:
        return self.energy_network(x).squeeze(1)

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        for data in parts(x, self.energy_steps):
            logs = self._energy_step(data)
        return logs | self._generator_step(len(data))

    def _energy_step(self, data: Tensor) -> dict[str, Tensor]:
        z = self._prior(len(data))
        share = torch.rand(len(data), device=data.device, dtype=data.dtype)
        return self.minimise("energy", self._energy_loss, data, z, share)

    def _energy_loss(self, data: Tensor, z: Tensor, share: Tensor) -> Loss:
        """What the energy descends, at points [B, *], latents [B, latent] and the points that are
        a `share` [B] of the way between the two."""
        with torch.no_grad(), autocast(self.precision, data):
            fake = self.generator(z).to(data)
        mixed = between(fake, data, share)
        with autocast(self.precision, data):
            positive, negative = self.energy(torch.cat([data, fake])).chunk(2)
            slope = self._slope(mixed)
        gap = positive.mean() - negative.mean()
        penalty = (slope - 1).square().mean()
        logs = {"energy_gap": gap, "slope": slope.mean(), "penalty": penalty}
        return gap + self.gradient_penalty * penalty, logs

    def _slope(self, x: Tensor) -> Tensor:
        """|grad E(x)| over all axes of each point x [B, *], differentiable in the weights: [B]."""
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return gradient.flatten(1).norm(dim=1)

    def _generator_step(self, n: int) -> dict[str, Tensor]:
        z, norm = self._prior(n), "generator_gradient_norm"
        logs = self.minimise("generator", self._generator_loss, z, norm=norm)
        update_average(self.average, self.generator, self.ema)
        return logs

    def _generator_loss(self, z: Tensor) -> Loss:
        """What the generator descends, at latents [B, latent]."""
        with autocast(self.precision, z):
            energy = self.energy(self.generator(z))
        return energy.mean(), {}

    def sample(self, n: int) -> dict[str, Tensor]:
        """`samples` G(z) [n, *]."""
        return {"samples": self.generated(self._prior(n))}


def between(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """The points [B, *] on the segments from `start` to `end` [B, *], each at its own `share` [B]
    of the way."""
    return start.lerp(end, by_row(share, start))
