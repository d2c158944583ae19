r"""Contrastive estimation: to learn a density by telling its draws from those of a known one.

A logistic regression with the logit r(x) = log p(x) - log q(x), nu draws of the noise q for each
point of data, has its optimum where p is the density of the data, normalised (Gutmann & Hyvarinen
2010, 2012). The value of that game is what it ascends, per point of data:

    V(p, q)  = E_data[log sigmoid(r - log nu)] + nu E_noise[log sigmoid(log nu - r)]
    V*       = -log(1 + nu) - nu log(1 + 1 / nu)      where p = q = data: -log 4 for nu = 1

    paper                   | here
    ------------------------|----------------------------------------------------------
    nu                      | ratio
    G(u; theta)             | r = log p - log q
    h(u; theta)             | sigmoid(r - log nu): that u is data
    c                       | -log_z
    J_T                     | value
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.optim import AdamW, Optimizer

from ebm import EBMError
from ebm.flows import Defended, Density, Flow, Gaussian, Latents, Noise, Space, adam, in_slices
from ebm.networks import scalar
from ebm.recorded import Loss
from ebm.samplers import Independence, by_row, with_acceptance
from ebm.variants.base import EBM


def value(data: Tensor, noise: Tensor, ratio: float = 1.0) -> Tensor:
    """V of the logits r = log p - log q at data [N] and at draws of the noise [M]; a scalar, in
    nats per point of data."""
    shift = math.log(ratio)
    return logsigmoid(data - shift).mean() + ratio * logsigmoid(shift - noise).mean()


def accuracy(data: Tensor, noise: Tensor, ratio: float = 1.0) -> Tensor:
    """Mean of the shares of data [N] and of noise [M] that the classifier knows for what they
    are, of which a tie is neither: 1/2 where nothing is left to tell; a scalar."""
    shift = math.log(ratio)
    return ((data > shift).float().mean() + (noise < shift).float().mean()) / 2


def importance_log_partition(energy: Tensor, log_q: Tensor) -> Tensor:
    """log of the mean of exp(-E) / q over draws of q: importance sampling's log Z, from E [N, *]
    and log q [N] at the draws; [*]."""
    weight = -energy - by_row(log_q, energy)
    return weight.logsumexp(0) - math.log(len(weight))


STARTING = 4096
"""Draws of the noise that say where the constants start."""

LogDensity = Callable[[Tensor], Tensor]
"""From points [B, *] to log densities [B]."""

Logits = tuple[Tensor, Tensor]
"""log p - log q at data [B] and at draws of the noise [R]."""

LOGGED = ("value", "accuracy", "log_z", "noise_loss", "energy_gap", "gradient_norm")


class Contrasted(EBM):
    """A correction f of a density b over the space of a density q, the `noise`, and constants
    log Z that are learned: log p(v) = log b(v) - f(v) - log Z. Of several `outputs` f_k, log Z_k
    the density is the mixture of equal parts; they share all layers but the last.

    b is the flow as it is now if the energy is `tilted`; else, of vectors, the Gaussian of the
    data, so that p falls where neither data nor noise ever were (f grows like |v| at most, and of
    Fourier features it need not grow); of images there is none. Nothing trains b through p.

    `network` are the settings of f (`ebm.networks.scalar`); `noise`, `levels` and `margin` those
    of a `flows.Density`; the others as in `schema.Contrasted`.
    """

    steps: Tensor
    ratio: float = 1.0
    logged: tuple[str, ...] = LOGGED

    def __init__(
        self,
        shape: tuple[int, ...],
        noise: Mapping[str, Any],
        network: Mapping[str, Any],
        defence: float,
        tilted: bool,
        levels: int,
        margin: float,
        warmup: int,
        warmup_learning_rate: float,
        learning_rate: float,
        constant_learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float | None,
        compile: bool,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.compiled = compile
        self.warmup, self.warmup_learning_rate = warmup, warmup_learning_rate
        self.learning_rate, self.constant_learning_rate = learning_rate, constant_learning_rate
        self.betas, self.weight_decay, self.clip = betas, weight_decay, clip or math.inf
        if defence and len(shape) > 1:
            raise EBMError(f"model.defence = {defence}: expected 0 for images")
        self.normalised, self.shape, self.outputs = True, shape, outputs
        self.network = scalar(shape=shape, outputs=outputs, **network)
        nn.init.zeros_(self.network.head.bias).requires_grad_(False)  # the constant is `log_z`
        if tilted:
            nn.init.zeros_(self.network.head.weight)
        self.log_z = nn.Parameter(torch.zeros(outputs))
        self.noise = Density(shape, noise, levels, margin)
        self.tilted = tilted
        self.defence = defence
        vectors = len(shape) == 1
        self.broad = Gaussian(*shape) if vectors and (defence or not tilted) else None
        self.register_buffer("steps", torch.tensor(0))

    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        self.noise.initialise(data)
        if self.broad is not None:
            self.broad.initialise(self.space.enter(data))
        self.start_constants()

    @property
    def space(self) -> Space:
        return self.noise.space

    @property
    def flow(self) -> Flow:
        return self.noise.flow

    @property
    def contrast(self) -> Noise:
        """q: the flow, with the defence that it was given."""
        if self.broad is None or not self.defence:
            return self.flow
        return Defended(self.flow, self.broad, self.defence)

    @property
    def corrected(self) -> Flow | None:
        """b: what the energy is a correction of, if of anything."""
        return self.flow if self.tilted else self.broad

    def unnormalised(self, v: Tensor) -> Tensor:
        """f_k(v) for points v [B, *] of the space: [B, outputs]."""
        return self.network.of_points(v).view(len(v), -1)

    def log_densities(self, v: Tensor, log_b: LogDensity | None = None) -> Tensor:
        """log p_k(v) of every output, with log b as `log_b` has it, or else b: [B, outputs]."""
        tilt, b = -self.unnormalised(v) - self.log_z, self.corrected
        return tilt if b is None else tilt + (log_b or b.log_prob)(v).unsqueeze(1)

    def log_density(self, v: Tensor, log_b: LogDensity | None = None) -> Tensor:
        """log p(v), of the mixture of all outputs, with log b as for each of them: [B]."""
        log_p = self.log_densities(v, log_b)
        return log_p.logsumexp(1) - math.log(log_p.shape[1])

    def energy(self, x: Tensor) -> Tensor:
        """-log p(x), of images that of their grey levels, normalised as far as log Z is right:
        [B]."""
        return -self._log_prob(self.space.centre(x))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(x), of greys the bound by one draw of the noise within their levels: [B]."""
        return self._log_prob(self.space.enter(x))

    def _log_prob(self, v: Tensor) -> Tensor:
        return self.log_density(v) + self.space.log_det(v)

    def noise_log_prob(self, x: Tensor) -> Tensor:
        """log q(x) of the noise that the energy is trained against, defence included: [B]."""
        v = self.space.centre(x)
        return self.contrast.log_prob(v) + self.space.log_det(v)

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """Adam for the energy, whose weights decay, and for its constants, which do not; for the
        `warmup` of the flow, if it has anything to train."""
        weights = [p for p in self.network.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": weights, "lr": self.learning_rate, "weight_decay": self.weight_decay},
            {"params": [self.log_z], "lr": self.constant_learning_rate, "weight_decay": 0.0},
        ]
        warmup = self.noise, self.warmup_learning_rate, self.betas, self.weight_decay
        return {"energy": AdamW(groups, betas=self.betas, fused=True)} | adam("warmup", *warmup)

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        data = self.space.enter(x)
        loss = self.warm_up(data)
        if loss is None:
            return self._logs(**self.turn(data, warming=False))
        if self.tilted:  # it has nothing to correct yet
            return self._logs(noise_loss=loss)
        return self._logs(**self.turn(data, warming=True) | {"noise_loss": loss})

    def turn(self, data: Tensor, warming: bool) -> dict[str, Tensor]:
        """One update of the game at points [B, *] of the space, while the flow is still `warming`
        up or afterwards; what is logged of it."""
        raise NotImplementedError

    def energy_loss(self, data: Tensor, noise: Noise, latents: Latents) -> Loss:
        """-V on points [B, *] of the space and on the draws of a noise that are made of `latents`;
        no gradient of it reaches the noise."""
        with torch.no_grad():
            draws, log_q_draws = noise.from_latents(*latents)
            log_q = noise.log_prob(data)
        known = self.tilted and noise is self.flow
        _, logs = self.play(data, draws, log_q, log_q_draws, known)
        return -logs["value"], logs

    def play(
        self, data: Tensor, draws: Tensor, log_q: Tensor, log_q_draws: Tensor, known: bool = False
    ) -> tuple[Logits, dict[str, Tensor]]:
        """The logits at points [B, *] and at draws [R, *] with their log q, which may be `known`
        to be log b too; and what is logged of them, V among it; p does not change with b."""
        points, b = torch.cat([data, draws]), self.corrected
        both = torch.cat([log_q, log_q_draws])
        held = None if b is None else b.held
        log_p = self.log_density(points, (lambda _: both) if known else held)
        log_p, log_p_draws = log_p.split((len(data), len(draws)))
        r, r_draws = log_p - log_q, log_p_draws - log_q_draws
        return (r, r_draws), {
            "value": value(r, r_draws, self.ratio),
            "accuracy": accuracy(r, r_draws, self.ratio),
            "noise_loss": -log_q.mean(),
            "energy_gap": log_p_draws.mean() - log_p.mean(),
        }

    def warm_up(self, data: Tensor) -> Tensor | None:
        """One of the first `warmup` steps, in which the flow follows the likelihood of `data`,
        points of the space: its loss, or None where there is no such step to take. The learning
        rate falls from what `ebm.train` has set for this step to 0 over the second half of
        them."""
        left = self.warmup - int(self.steps)
        self.steps += 1
        optimizer = self.optimizers.get("warmup")
        if left <= 0 or optimizer is None:
            return None
        for group in optimizer.param_groups:
            group["lr"] *= min(1.0, 2 * left / self.warmup)
        return self.minimise("warmup", self._noise_loss, data, clip=self.clip)["noise_loss"]

    def _noise_loss(self, data: Tensor) -> Loss:
        loss = -self.flow.log_prob(data).mean()
        return loss, {"noise_loss": loss}

    @torch.no_grad()
    def start_constants(self) -> None:
        """c as importance sampling from the noise has it; of a tilted energy, where p starts as
        the noise, 0."""
        if not self.tilted:
            v, log_q = self.contrast.draw_with_log_prob(STARTING)
            self.log_z.zero_()
            self.log_z.copy_(importance_log_partition(-self.log_densities(v), log_q))

    def _logs(self, **known: Tensor) -> dict[str, Tensor]:
        """What is `known` of a step under all names that are `logged`; what is not is 0."""
        nothing = torch.zeros_like(self.log_z[0])
        known = {"log_z": self.log_z.mean(), **known}
        return {name: known.get(name, nothing).detach() for name in self.logged}

    def draw_with_energy(self, n: int) -> tuple[Tensor, Tensor]:
        """Draws of the noise [n, *] and their `relative_energy` [n]."""
        v, log_q = self.contrast.draw_with_log_prob(n)
        return v, in_slices(self.relative_energy, v, log_q)

    def relative_energy(self, v: Tensor, log_q: Tensor | None = None) -> Tensor:
        """-log of p / q at points [B, *], whose log q by the noise may be known: [B]. Where the
        energy corrects that very density, p / q is the correction alone."""
        if self.tilted and self.contrast is self.flow:
            return -self.log_density(v, lambda v: v.new_zeros(len(v)))
        return (self.contrast.log_prob(v) if log_q is None else log_q) - self.log_density(v)

    @torch.no_grad()
    def sample(self, n: int, steps: int = 100) -> dict[str, Tensor]:
        """`samples` [n, *], after `steps` of Metropolis' algorithm that starts at draws of the
        noise and proposes such; `generator` [n, *], those that it started at, or where these have
        a defence other ones of the flow alone; the mean `acceptance` of every step [steps]."""
        kernel = Independence(self.relative_energy, self.draw_with_energy)
        start = kernel.start(n)
        end, rates = with_acceptance(kernel, start, steps)
        drawn = self.flow.draw_with_log_prob(n)[0] if self.defence else start.x
        leave = self.space.leave
        return {"samples": leave(end.x), "generator": leave(drawn), "acceptance": rates}
