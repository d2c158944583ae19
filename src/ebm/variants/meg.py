r"""Maximum entropy generators (Kumar, Ozair, Goyal, Courville & Bengio 2019, arXiv:1901.08508).

An energy E, a generator G whose samples stand in for the model's own, and a statistics network T
that bounds the mutual information I(G(z); z), which for a deterministic G is its entropy:

    E descends   E_data[E(x)] - E_z[E(G(z))] + lambda E_data[|grad E(x)|^2]
    G descends   E_z[E(G(z))] - I_JSD,   and T, with the same gradient, ascends
    I_JSD        = -E_p(x,z)[softplus(-T(x, z))] - E_p(x)p(z)[softplus(T(x, z'))]

    paper     | here
    ----------|------------------------------------------------------------------------
    E_theta   | energy_network      G_omega | generator      T_phi | statistics
    lambda    | score_penalty, on the squared norm over all axes of x (the released code's is
              | over axis 1, the same for vectors)
    n_phi     | energy_steps per generator step; a batch is cut into that many parts
    -         | entropy, the weight of I_JSD. The released code averages where the formula adds:
              | its weight 1 is 0.5 here.
    z'        | z with its rows shuffled, as released (the text shuffles each dimension)
    x         | images are points of [0, 1]; of the released code's in [-1, 1] the squared score,
              | and so the same penalty, is a quarter

Samples: z by MALA on the latent target exp(-beta E(G(z)) - |z|^2 / 2). The released sampler leaves
out the prior and squares no norm, so its target is another one; this is the corrected one.

Logged: `energy_gap` = E_data[E] - E_z[E(G(z))], the critic's part of the loss; `score_norm`, the
mean |grad E|^2 at data; `information`, the bound I_JSD (at most 0; -2 log 2 = nothing learned);
`gradient_norm` and `generator_gradient_norm` of the two steps.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Adam, Optimizer

from ebm.networks import FourierFeatures, Joint, Kind, decoder, encoder, vector_size
from ebm.parallel import parts, shuffled
from ebm.recorded import Loss
from ebm.samplers import MALA, InSlices, with_acceptance
from ebm.variants.base import (
    SLICE,
    Generative,
    autocast,
    average_of,
    parameters_of,
    update_average,
)


class MEG(Generative):
    """MEG over points of `shape`; settings as in `meg_config.Model`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        network: Kind | Mapping[str, Any],
        energy: Sequence[int],
        generator: Sequence[int],
        statistics: Sequence[int],
        latent: int,
        energy_steps: int,
        score_penalty: float,
        entropy: float,
        energy_learning_rate: float,
        generator_learning_rate: float,
        betas: tuple[float, float],
        ema: float,
        energy_ema: float,
        precision: str,
        compile: bool,
    ) -> None:
        super().__init__()
        self.compiled = compile
        self.shape, self.latent, self.ema, self.energy_ema = shape, latent, ema, energy_ema
        self.energy_steps, self.score_penalty, self.entropy = energy_steps, score_penalty, entropy
        self.precision = getattr(torch, precision)
        kind = network if isinstance(network, str) else "mlp"
        self.energy_network = _energy_network(network, shape, energy)
        self.generator = decoder(kind, latent, shape, generator)
        self.statistics = Joint(kind, shape, latent, statistics)
        self.average = average_of(self.generator, ema)
        self.energy_average = average_of(self.energy_network, energy_ema)
        self.energy_learning_rate, self.betas = energy_learning_rate, betas
        self.generator_learning_rate = generator_learning_rate

    def configure_optimizers(self) -> dict[str, Optimizer]:
        energy, generator = self.energy_network, parameters_of(self.generator, self.statistics)
        adam = partial(Adam, betas=self.betas, fused=self.fused)
        return {
            "energy": adam(energy.parameters(), self.energy_learning_rate),
            "generator": adam(generator, self.generator_learning_rate),
        }

    def averaged_generator(self) -> nn.Module | None:
        return self.average

    def energy(self, x: Tensor) -> Tensor:
        """E(x), by the moving average where there is one."""
        return (self.energy_average or self.energy_network)(x).squeeze(1)

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        for data in parts(x, self.energy_steps):
            logs = self._energy_step(data)
        return logs | self._generator_step(len(data))

    def _energy_step(self, data: Tensor) -> dict[str, Tensor]:
        logs = self.minimise("energy", self._energy_loss, data, self._prior(len(data)))
        update_average(self.energy_average, self.energy_network, self.energy_ema)
        return logs

    def _energy_loss(self, data: Tensor, z: Tensor) -> Loss:
        """What E descends, at points [B, *] and latents [B, latent]."""
        with torch.no_grad(), autocast(self.precision, data):
            fake = self.generator(z)
        data = data.detach().requires_grad_()
        with autocast(self.precision, data):
            positive, negative = self.energy_network(data), self.energy_network(fake.to(data))
        (score,) = torch.autograd.grad(positive.sum(), data, create_graph=True)
        score_norm = score.square().flatten(1).sum(1).mean()
        gap = positive.mean() - negative.mean()
        logs = {"energy_gap": gap, "score_norm": score_norm}
        return gap + self.score_penalty * score_norm, logs

    def _generator_step(self, n: int) -> dict[str, Tensor]:
        z = self._prior(n)
        told, norm = (z, shuffled(z)), "generator_gradient_norm"
        logs = self.minimise("generator", self._generator_loss, *told, norm=norm)
        update_average(self.average, self.generator, self.ema)
        return logs

    def _generator_loss(self, z: Tensor, other: Tensor) -> Loss:
        """What G descends and T with it, at latents z and z' [B, latent]."""
        with autocast(self.precision, z):
            x = self.generator(z)
            information = self.information(x, z, other)
            energy = self.energy_network(x)
        return energy.mean() - self.entropy * information, {"information": information}

    def information(self, x: Tensor, z: Tensor, shuffled: Tensor) -> Tensor:
        """I_JSD, the Jensen-Shannon bound on I(x; z) up to the constant 2 log 2; a scalar."""
        features = self.statistics.features(x)
        joint = self.statistics.pair(features, z)
        product = self.statistics.pair(features, shuffled)
        return -softplus(-joint).mean() - softplus(product).mean()

    def latent_energy(self, z: Tensor, inverse_temperature: float) -> Tensor:
        """beta E(G(z)) + |z|^2 / 2 for z [B, latent]: shape [B]."""
        return inverse_temperature * self.energy(self.generate(z)) + z.square().sum(1) / 2

    def sample(
        self, n: int, steps: int = 0, step_size: float = 0.01, inverse_temperature: float = 1.0
    ) -> dict[str, Tensor]:
        """`samples` G(z) after `steps` of latent MALA; if there are any, `generator` G(z) before
        them, both [n, *]; and the mean `acceptance` of every step [steps]."""
        z = self._prior(n)
        generated = self.generated(z)
        if not steps:
            return {"samples": generated, "acceptance": torch.ones(0)}
        energy = InSlices(lambda z: self.latent_energy(z, inverse_temperature), SLICE)
        end, rates = with_acceptance(MALA(energy, step_size), z, steps)
        return {"samples": self.generated(end.x), "generator": generated, "acceptance": rates}


def _energy_network(
    network: Kind | Mapping[str, Any], shape: tuple[int, ...], widths: Sequence[int]
) -> nn.Sequential:
    """The energy of points of `shape`; of vectors also hidden layers over Fourier features."""
    if isinstance(network, str):
        return encoder(network, shape, widths, 1)
    features = FourierFeatures(vector_size(shape), network["frequencies"], network["bandwidth"])
    return nn.Sequential(features, encoder("mlp", (features.outputs,), widths, 1))
