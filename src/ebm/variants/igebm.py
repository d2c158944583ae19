r"""Implicit generation with energy-based models (Du & Mordatch 2019, arXiv:1903.08689), and the
terms that improved contrastive divergence adds (Du, Li, Tenenbaum & Mordatch 2021,
arXiv:2012.01316).

An energy E, trained by the gradient of the log-likelihood with samples x~ that come from short
Langevin chains, started from a replay buffer:

    L = E_data[E(x+)] - E[E(x~)]  +  alpha (E_data[E(x+)^2] + E[E(x~)^2])
        + kl E[E_stop(x~)]  -  entropy E[log d(x~)]

E_stop moves its argument only, through the last Langevin step; d is the distance to the nearest
of some points of the buffer, whose logarithm estimates the entropy of x~ (Kozachenko & Leonenko
1987).

    paper     | here
    ----------|-------------------------------------------------------------------------------
    E_theta   | network, conditional on a class where there are `classes`
    K, lambda | langevin_steps; step_size (the code's x - step grad E; the text halves it)
    omega     | noise, of its own, or `coupled` to the step size: sqrt(2 step_size), and then the
              | last thing in a step: the chains are Langevin's at temperature 1
    B         | replay [buffer, *], with replay_label and replay_age; written back by index (the
              | released code appends a second copy of the chain), without a detour over bytes
    5 %       | fresh
    alpha     | energy_penalty
    Omega     | bounds, gradient_clip, spectral_norm, clip

Between them and the paper stand a swish for the leaky ReLU, and labels that stay with their chains
in the buffer (the released code draws new ones for old chains). Noise on the data is kept within
the bounds like the chains: what reaches beyond them could be told from any sample at a glance, and
the energy would grow without end.

Chains of short length never pass from mode to mode, so nothing in the objective sets how deep one
well is beside another, nor raises one that no data made. Where `jumps` are asked for, every chain
proposes so many before each `langevin_steps`: moves by the difference of two points of the buffer,
which Metropolis' rule accepts or refuses. They pay where points are few numbers (toy densities,
tables); between images no difference leads to another image.

Of a conditional model the chains of a class are compared with data of the same class, so each
E(., y) has a constant of its own that nothing sets. Before energies of several classes are put
together, the mean energy c_y of the chains of the class in the buffer is taken off, in the place
of -T log Z_y (equal entropies taken for granted). The temperature is that at which Langevin steps
with such noise would be exact, T = noise^2 / (2 step_size): far below 1 for the published numbers.

Layers may compute in bfloat16 in training: the rounding of a gradient is far below the noise of
the chains. The last layer, energies and weights stay float32.

Logged: `energy_gap` = E_data[E] - E[E(x~)], which hovers around 0; `gradient_norm` of the
parameters' step; `langevin_gradient`, the mean |grad E| at the last Langevin step; `energy_scale`,
the root mean square of all energies; `buffer_age`, the mean number of training steps that the
chains of the batch have lived; `reset_share`, the share of them that was started anew;
`kl` and `entropy`, the two terms before their weights (0 where the weight is 0).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim import Adam, Optimizer

from ebm import EBMError
from ebm.networks import Scalar, normalise_spectrally, scalar
from ebm.parallel import gathered, world
from ebm.samplers import (
    DecoupledLangevin,
    DifferentialEvolution,
    Energy,
    Interspersed,
    Kernel,
    Recorded,
    State,
    at_milestones,
    by_row,
    run,
    value_and_gradient,
)
from ebm.variants.base import EBM, autocast, average_of, descend, joined, update_average

NEIGHBOURS = 100
"""Points of the buffer that stand in for the model where its entropy is estimated."""
CHAINS = 512
"""Chains of the buffer whose energies are computed at once."""
AT_ONCE = 2**22
"""Numbers of points that are drawn at once: more images than these would have to lie in a card's
memory with all that their gradients take."""
SHOWN = 32
"""Chains whose way is kept."""


class IGEBM(EBM):
    """An energy over points of `shape`: vectors [D], or images [H, W] or [C, H, W]; settings as
    in `igebm_config.Model`."""

    frequencies: Tensor
    replay: Tensor
    replay_label: Tensor
    replay_age: Tensor
    sharded = ("replay", "replay_label", "replay_age")

    def __init__(
        self,
        shape: tuple[int, ...],
        network: Mapping[str, Any],
        input_scale: float,
        classes: int,
        spectral_norm: bool,
        langevin_steps: int,
        jumps: int,
        step_size: float,
        noise: float | str,
        gradient_clip: float | None,
        bounds: tuple[float, float],
        buffer: int,
        fresh: float,
        augment: float,
        data_noise: float,
        energy_penalty: float,
        kl: float,
        entropy: float,
        learning_rate: float,
        betas: tuple[float, float],
        clip: float,
        ema: float,
        precision: str,
        compile: bool,
    ) -> None:
        super().__init__()
        self.shape, self.classes, self.ema = shape, classes, ema
        self.input_scale, self.precision = input_scale, getattr(torch, precision)
        self.langevin_steps, self.jumps, self.step_size = langevin_steps, jumps, step_size
        self.coupled = isinstance(noise, str)
        self.noise = math.sqrt(2 * step_size) if isinstance(noise, str) else noise
        self.gradient_clip = math.inf if gradient_clip is None else gradient_clip
        self.support = self.bounds = (bounds[0], bounds[1])
        self.fresh, self.augment, self.data_noise = fresh, augment, data_noise
        self.energy_penalty, self.kl, self.entropy = energy_penalty, kl, entropy
        self.clip = clip
        self.network = scalar(shape=shape, classes=classes, **network)
        if jumps and not self.coupled:
            raise EBMError(
                f"model.jumps = {jumps}: Metropolis' rule accepts them at temperature 1, and only "
                "`noise: coupled` walks at it; or set it to 0"
            )
        if augment and not self.network.images:
            raise EBMError("model.augment: only images can be augmented; set it to 0")
        if spectral_norm:
            normalise_spectrally(self.network)
        self.average = average_of(self.network, ema)
        self.register_buffer("frequencies", torch.full((classes,), 1 / max(classes, 1)))
        self.register_buffer("replay", torch.zeros(buffer, *shape))
        self.register_buffer("replay_label", torch.zeros(buffer, dtype=torch.long))
        self.register_buffer("replay_age", torch.zeros(buffer, dtype=torch.long))
        self.learning_rate, self.betas = learning_rate, betas
        if compile and spectral_norm:
            raise EBMError("model.compile: not with `spectral_norm`; set one of them to false")
        self.compiled = compile
        self.spectral_norm = spectral_norm

    def configure_optimizers(self) -> dict[str, Optimizer]:
        weights = self.network.parameters()
        return {"energy": Adam(weights, self.learning_rate, self.betas, fused=self.fused)}

    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        """Fill the buffer with uniform noise, of classes as frequent as in the `labels`; the data
        have to lie within the bounds."""
        low, high = self.bounds
        if data.min() < low or data.max() > high:
            raise EBMError(f"model.bounds = [{low}, {high}]: the data reach beyond them")
        if labels is not None:
            counts = labels.bincount(minlength=self.classes)
            self.frequencies.copy_(counts / counts.sum())
        self.replay.copy_(self.noise_like(self.replay))
        self.replay_label.copy_(self._labels(len(self.replay)))

    def energy(self, x: Tensor) -> Tensor:
        """E(x), by the moving average where there is one; of a conditional model, whose classes y
        are as frequent as pi_y in the data, -T log sum_y pi_y exp(-(E(x, y) - c_y) / T), T that of
        its chains."""
        if not self.classes:
            return self.conditional_energy(x, None)
        energies, temperature = self.class_energies(x), self.noise**2 / (2 * self.step_size)
        if temperature:
            energies = energies - temperature * self.frequencies.log()
        return free_energy(energies, temperature)

    def class_energies(self, x: Tensor) -> Tensor:
        """E(x, y) - c_y of every class y: shape [B, classes]. Training compares energies within a
        class only; c_y, the mean energy of the chains of the class, makes them comparable."""
        one = torch.ones(len(x), dtype=torch.long, device=x.device)
        by_class = [self.conditional_energy(x, k * one) for k in range(self.classes)]
        return torch.stack(by_class, 1) - self._levels()

    def classify(self, x: Tensor) -> dict[str, Tensor]:
        """The class of x [B, *] with the lowest energy: `accuracy` [B]."""
        return {"accuracy": self.class_energies(x).argmin(1)} if self.classes else {}

    def conditional_energy(self, x: Tensor, y: Tensor | None) -> Tensor:
        """E(x, y) for x [B, *] and classes y [B]: shape [B]."""
        return self._evaluate(self.average or self.network, x, y)

    def kernel(self, energy: Energy) -> DecoupledLangevin:
        """The chains that this model was trained with, on any energy of its points."""
        return DecoupledLangevin(
            energy,
            self.step_size,
            self.noise,
            self.gradient_clip,
            self.bounds,
            noise_last=self.coupled,
        )

    def chains(self, energy: Energy, differentiable: bool = False) -> Kernel[State]:
        """`kernel`, with the jumps between modes."""
        walk = replace(self.kernel(energy), differentiable=differentiable)
        if not self.jumps:
            return walk
        jump = DifferentialEvolution(within(energy, *self.bounds), self.replay)
        return Interspersed(
            walk,
            jump,
            self.langevin_steps,
            self.jumps,
            start=lambda x: x.clamp(*self.bounds),  # a walk goes beyond
        )

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        with parametrize.cached():
            normalised_weights(self.network)  # before chains that need no graph ask for them
            batch = self._draw_batch(len(x))
            energy = self._chain_energy(batch)
            negative = self._langevin(energy, batch.start)
            data = (x + self.data_noise * torch.randn_like(x)).clamp(*self.bounds)
            positive_energy = self._training_energy(data, y)
            negative_energy = self._training_energy(negative.x.detach(), batch.label)
            gap = positive_energy.mean() - negative_energy.mean()
            scale = positive_energy.square().mean() + negative_energy.square().mean()
            kl, entropy = self._improvement(negative.x, energy, batch.others)
            loss = gap + self.energy_penalty * scale + self.kl * kl - self.entropy * entropy
            norm = descend(self.optimizers["energy"], loss, self.clip)
        self._write_back(batch, negative.x.detach())
        if self.average is not None:
            update_average(self.average, self.network, self.ema)
            with torch.no_grad():
                normalised_weights(self.average)  # a power iteration of its own
        assert negative.gradient is not None
        return {
            "energy_gap": gap.detach(),
            "gradient_norm": norm,
            "langevin_gradient": negative.gradient.flatten(1).norm(dim=1).mean().detach(),
            "energy_scale": (scale.detach() / 2).sqrt(),
            "buffer_age": self.replay_age[batch.rows].float().mean(),
            "reset_share": batch.reset.float().mean(),
            "kl": kl.detach(),
            "entropy": entropy.detach(),
        }

    def sample(self, n: int, steps: int | None = None) -> dict[str, Tensor]:
        """`samples` [n, *] after `steps` Langevin steps from uniform noise, and of 32 of the
        chains `chain` [32, T, *] at `chain_steps` [T]; `labels` [n] of a conditional model; with
        jumps the `acceptance` [n] of each chain's last.

        By default there are as many steps as the chains of the buffer have run, on average. On
        images much longer chains go where training never was, and get worse."""
        if steps is None:
            steps = round(self.replay_age.double().mean().item() * self.langevin_steps)
        labels = torch.arange(n, device=self.replay.device) % max(self.classes, 1)
        size = max(SHOWN, AT_ONCE // math.prod(self.shape))
        return joined([self._drawn(part, steps) for part in labels.split(size)])

    def _drawn(self, labels: Tensor, steps: int) -> dict[str, Tensor]:
        """The same of chains that run side by side, each for one of the labels [n]."""
        y = labels if self.classes else None
        kernel = self.chains(lambda x: self.conditional_energy(x, y))
        end, chain, marks = at_milestones(kernel, self.starts(len(labels)), steps, SHOWN)
        drawn = {
            "samples": end.x.clamp(*self.bounds),
            "chain": chain.clamp(*self.bounds),
            "chain_steps": torch.tensor(marks),
        }
        if self.classes:
            drawn["labels"] = labels
        if end.acceptance is not None:
            drawn["acceptance"] = end.acceptance
        return drawn

    def _training_energy(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """E(x, y) of the weights as they are now, by layers in `precision`: [B]."""
        with autocast(self.precision, x):
            return self._evaluate(self.network, x, y)

    def _evaluate(self, network: Scalar, x: Tensor, y: Tensor | None) -> Tensor:
        """The network's number for points [B, *] of this model's shape."""
        return network.of_points(self.input_scale * x, y)

    def _draw_batch(self, n: int) -> "Batch":
        """Rows of the buffer, where their chains start now, and other rows to compare with."""
        if n + bool(self.entropy) > len(self.replay):
            few = "is less than" if n > len(self.replay) else "leaves no neighbours beside"
            raise EBMError(f"model.buffer = {len(self.replay)} {few} the batch of {n}")
        device = self.replay.device
        rows = torch.randperm(len(self.replay), device=device)
        rows, others = rows[:n], rows[n : n + NEIGHBOURS // world()]
        reset = torch.rand(n, device=device) < self.fresh
        start, label = self.replay[rows], self.replay_label[rows]
        if self.augment:
            moved = torch.rand(n, device=device) < self.augment
            start = _where(moved, augmented(start), start)
        start = _where(reset, self.starts(n), start)
        label = torch.where(reset, self._labels(n), label)
        return Batch(rows, others, start, label if self.classes else None, reset)

    def _chain_energy(self, batch: "Batch") -> Energy:
        """E(x, y) for the labels of a batch, recorded once; spectral normalisation makes weights
        anew at every step, which a record would not see."""
        if self.spectral_norm:
            return partial(self._training_energy, y=batch.label)
        labels = () if batch.label is None else (batch.label,)
        if "chains" not in self.records:
            self.records["chains"] = Recorded(
                self._training_energy, batch.start, *labels, compile=self.compiled
            )
        recorded: Recorded = self.records["chains"]
        return recorded.given(*labels)

    def _langevin(self, energy: Energy, start: Tensor) -> State:
        """The end of chains from `start`, differentiable in the parameters through the last step
        where a term asks for it."""
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        before = run(self.chains(energy), start, self.langevin_steps - 1)
        for parameter in self.network.parameters():
            parameter.requires_grad_(True)
        state = self.chains(energy, differentiable=bool(self.kl or self.entropy)).step(before)
        return state._replace(x=state.x.clamp(*self.bounds))

    def _improvement(self, x: Tensor, energy: Energy, others: Tensor) -> tuple[Tensor, Tensor]:
        """E[E_stop(x~)] and E[log d(x~)], both with a gradient through x~ [B, *] only."""
        kl = entropy = torch.zeros((), device=x.device)
        if self.kl:
            value, gradient = value_and_gradient(energy, x)
            through = (gradient * x).sum() / len(x)
            kl = value.mean() + through - through.detach()
        if self.entropy:
            points = gathered(self.replay[others])
            exactly = "donot_use_mm_for_euclid_dist"  # else near points are rounding's
            distance = torch.cdist(x.flatten(1), points.flatten(1), compute_mode=exactly)
            entropy = distance.min(1).values.clamp(min=1e-12).log().mean()
        return kl, entropy

    def _write_back(self, batch: "Batch", x: Tensor) -> None:
        self.replay[batch.rows] = x
        self.replay_age[batch.rows] = torch.where(batch.reset, 0, self.replay_age[batch.rows]) + 1
        if batch.label is not None:
            self.replay_label[batch.rows] = batch.label

    @torch.no_grad()
    def _levels(self) -> Tensor:
        """c [classes]: the mean of E(x, y) over the chains x of class y in the buffer, which is
        computed once while the model does not train; -inf of a class that has none there, which so
        is infinitely unlikely."""
        if self.training or "levels" not in self.records:
            chains = zip(self.replay.split(CHAINS), self.replay_label.split(CHAINS), strict=True)
            energy = torch.cat([self.conditional_energy(x, y) for x, y in chains])
            sums = energy.new_zeros(self.classes).index_add(0, self.replay_label, energy)
            counts = self.replay_label.bincount(minlength=self.classes)
            means = sums / counts.clamp(min=1)
            self.records["levels"] = means.masked_fill(counts == 0, -math.inf)
        levels: Tensor = self.records["levels"]
        return levels

    def train(self, mode: bool = True) -> Self:
        """Training moves the energies of the buffer's chains."""
        self.records.pop("levels", None)
        return super().train(mode)

    def noise_like(self, x: Tensor) -> Tensor:
        """Uniform noise within the bounds, of x's shape: where chains start."""
        low, high = self.bounds
        return low + (high - low) * torch.rand_like(x)

    def starts(self, n: int) -> Tensor:
        """Uniform noise for n points: [n, *]."""
        return self.noise_like(self.replay[:1].expand(n, *self.shape))

    def _labels(self, n: int) -> Tensor:
        """Classes of n chains, as frequent as those of the data: else a class would have more
        chains against it than data, and training would have no equilibrium."""
        draws = torch.rand(n, device=self.replay.device)
        return torch.bucketize(draws, self.frequencies.cumsum(0)[:-1])


class Batch(NamedTuple):
    """Chains of one training step: their `rows` of the buffer [B], `others` of its rows, where
    they `start` [B, *], their `label` [B] if the model is conditional, and which were `reset`
    [B]."""

    rows: Tensor
    others: Tensor
    start: Tensor
    label: Tensor | None
    reset: Tensor


def free_energy(energies: Tensor, temperature: float) -> Tensor:
    """-T log sum_y exp(-E_y / T) of energies [B, K] at a temperature T: [B]; at 0 the lowest."""
    if temperature == 0:
        return energies.amin(1)
    return -temperature * torch.logsumexp(-energies / temperature, 1)


def within(energy: Energy, low: float, high: float) -> Energy:
    """The energy, infinite of points [B, *] that reach beyond low or high."""

    def bounded(x: Tensor) -> Tensor:
        beyond = ((x < low) | (x > high)).flatten(1).any(1)
        return energy(x).masked_fill(beyond, math.inf)

    return bounded


def normalised_weights(network: Scalar) -> list[Tensor]:
    """The weights that spectral normalisation has made anew, each with its graph."""
    return [
        module.weight
        for module in network.modules()
        if parametrize.is_parametrized(module, "weight") and isinstance(module.weight, Tensor)
    ]


def augmented(images: Tensor) -> Tensor:
    """Images [B, H, W] or [B, C, H, W], each rescaled by 0.8 to 1.25, turned by up to 0.15 radians
    and shifted by up to a tenth, at random; what comes in from outside is 0."""
    n, device = len(images), images.device
    scale, angle = 0.8 * 1.5625 ** torch.rand(n, device=device), 0.3 * torch.rand(n, device=device)
    cos, sin = scale * (angle - 0.15).cos(), scale * (angle - 0.15).sin()
    shift = 0.4 * torch.rand(2, n, device=device) - 0.2
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).view(n, 2, 3)
    x = images.view(n, -1, *images.shape[-2:])
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False).view(images.shape)


def _where(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(by_row(chosen, new), new, old)
