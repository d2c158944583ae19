"""Speed of maximum entropy generators beside their published update: one process, in turn, ratios.

    python -m benchmarks.meg --threads 2

First a training iteration, one step of the energy and one of generator and statistics network,
against a plain transcription of the released loop (energy_based_generative_models, train_energy_
model and train_generator) on the same networks and batches, of the three kinds that are trained
here. Losses and gradients of both are compared before: equal in float64, in float32 but for
rounding; of bfloat16 it is printed how far off its gradients are.

Then the energy step of five members of an ensemble, which takes them in turn, against the same
five with stacked parameters, where every layer is one product for all: what that would bring.

`benchmarks.samplers` explains the lines; a step is an iteration here.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from benchmarks.timing import Chain, Machine, bfloat16, explain, measure, race
from ebm.ensemble import Ensemble
from ebm.networks import Kind
from ebm.variants.base import descend, moved_by, parameters_of
from ebm.variants.meg import MEG

RATE, BETAS = 1e-4, (0.5, 0.9)  # Kumar et al. (2019)
MEMBERS = 5
FEW = 8
"""So many points are enough to compare numbers."""

Losses = dict[str, Tensor]
Activation = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    """Networks over points of `shape`, as `MEG` takes them, and how many points are a batch."""

    title: str
    shape: tuple[int, ...]
    network: Kind
    energy: list[int]
    generator: list[int]
    statistics: list[int]
    latent: int
    penalty: float
    batch: int


KDD99 = Case("KDD99", (121,), "mlp", [256, 128, 128], [64, 128], [256, 128, 128], 32, 100.0, 256)
CASES = [
    KDD99,
    Case("plane", (2,), "mlp", [128] * 3, [128] * 3, [128] * 3, 2, 0.1, 256),
    Case(
        "StackedMNIST, a quarter as wide",
        (3, 28, 28),
        "conv",
        [16, 32, 64, 128],
        [128, 64, 32, 16],
        [16, 32, 64, 128],
        128,
        10.0,
        64,
    ),
]


def make(
    case: Case, precision: str = "float32", kind: type[MEG] = MEG, compile: bool = False
) -> MEG:
    """Initial weights are the same for all."""
    torch.manual_seed(0)
    return kind(
        case.shape,
        case.network,
        case.energy,
        case.generator,
        case.statistics,
        case.latent,
        energy_steps=1,
        score_penalty=case.penalty,
        entropy=0.5,  # the released average over both halves of the bound
        energy_learning_rate=RATE,
        generator_learning_rate=RATE,
        betas=BETAS,
        ema=0.0,
        energy_ema=0.0,
        precision=precision,
        compile=compile,
    )


class Published:
    """The released update, as it was run: the terms of a loss one after another, each with forward
    and backward passes of its own, nothing frozen, contiguous memory, losses fetched every step.
    The penalty's norm is over all axes, as ours."""

    def __init__(self, ours: MEG) -> None:
        copies = (deepcopy(n) for n in (ours.energy_network, ours.generator, ours.statistics))
        self.energy, self.generator, self.statistics = (
            n.to(memory_format=torch.contiguous_format) for n in copies
        )
        self.latent, self.score_penalty = ours.latent, ours.score_penalty
        self.optimizers = [
            Adam(network.parameters(), RATE, BETAS, foreach=False)
            for network in (self.energy, self.generator, self.statistics)
        ]
        self.fetched: list[list[float]] = []

    def training_step(self, x: Tensor) -> Losses:
        return self.energy_step(x) | self.generator_step(len(x))

    def energy_step(self, x: Tensor) -> Losses:
        self.energy.zero_grad()
        real = self.energy(x).mean()
        real.backward()
        fake = self.energy(self.generator(self.prior(x, len(x))).detach()).mean()
        (-fake).backward()
        penalty = self.penalty(x)
        (self.score_penalty * penalty).backward()
        self.optimizers[0].step()
        return self.fetch(energy_gap=real - fake, real=real, fake=fake, score_norm=penalty)

    def penalty(self, x: Tensor) -> Tensor:
        """The mean squared norm of the score at points [B, *], from passes of its own."""
        x = x.detach().requires_grad_()
        (score,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return (score.flatten(1).norm(dim=1) ** 2).mean()

    def generator_step(self, n: int) -> Losses:
        self.generator.zero_grad()
        self.statistics.zero_grad()
        z = self.prior(next(self.generator.parameters()), n)
        x = self.generator(z)
        energy = self.energy(x).mean()
        energy.backward(retain_graph=True)
        pairs = torch.cat([x, x]), torch.cat([z, z[torch.randperm(n)]])
        joint = torch.cat([torch.ones(n), torch.zeros(n)]).to(z)
        entropy = F.binary_cross_entropy_with_logits(self.statistics(*pairs), joint)
        entropy.backward()
        for optimizer in self.optimizers[1:]:
            optimizer.step()
        return self.fetch(energy=energy, information=-2 * entropy)

    def prior(self, like: Tensor, n: int) -> Tensor:
        return torch.randn(n, self.latent, dtype=like.dtype)

    def fetch(self, **losses: Tensor) -> Losses:
        self.fetched.append([loss.item() for loss in losses.values()])
        return {name: loss.detach() for name, loss in losses.items()}


class EnergyStep(MEG):
    """One that trains its energy and nothing else."""

    def training_step(self, x: Tensor, y: Tensor | None = None) -> Losses:
        return self._energy_step(x)


class Stacked:
    """Weights [M, in, out] and biases [M, 1, out] of the linear layers of M networks, and what
    stands between the layers."""

    def __init__(self, networks: Sequence[nn.Module], activation: Activation) -> None:
        layers = zip(*(linear(network) for network in networks), strict=True)
        self.layers = [
            (
                nn.Parameter(torch.stack([layer.weight.detach().T for layer in of])),
                nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in of])),
            )
            for of in layers
        ]
        self.activation = activation

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.layers for parameter in layer]

    def __call__(self, x: Tensor) -> Tensor:
        """Points [M, B, in] of each network to [M, B, out]."""
        *hidden, (weight, bias) = self.layers
        for inner, offset in hidden:
            x = self.activation(torch.baddbmm(offset, x, inner))
        return torch.baddbmm(bias, x, weight)


def linear(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


class Batched:
    """The energy step of all members of an ensemble at once."""

    def __init__(self, members: Sequence[MEG]) -> None:
        self.energy = Stacked([m.energy_network for m in members], lambda x: F.leaky_relu(x, 0.2))
        self.generator = Stacked([m.generator for m in members], F.relu)
        self.members, self.latent = len(members), members[0].latent
        self.score_penalty = members[0].score_penalty
        self.optimizer = Adam(self.energy.parameters(), RATE, BETAS)

    def training_step(self, x: Tensor) -> Losses:
        """On a part of x [M * B, D] for each."""
        data = x.view(self.members, -1, x.shape[1]).requires_grad_()
        with torch.no_grad():
            z = torch.randn(*data.shape[:2], self.latent, dtype=x.dtype)
            fake = self.generator(z)
        positive, negative = self.energy(data), self.energy(fake)
        (score,) = torch.autograd.grad(positive.sum(), data, create_graph=True)
        score_norm = score.square().sum(2).mean(1)
        gap = (positive - negative).mean((1, 2))
        norm = descend(self.optimizer, (gap + self.score_penalty * score_norm).sum())
        return {
            "energy_gap": gap.detach().mean(),
            "score_norm": score_norm.detach().mean(),
            "gradient_norm": norm,
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="the peer's share of a round")
    parser.add_argument("--small", action="store_true", help="few points in a batch")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    machine = measure(256 if options.small else 2048)
    print(machine.describe(options.threads))
    for case in CASES:
        check_update(case)
    check_members(KDD99)
    for case in CASES:
        iterations(case, options, machine)
    members(KDD99, options, machine)


def iterations(case: Case, options: argparse.Namespace, machine: Machine) -> None:
    batch = FEW if options.small else case.batch
    ours = make(case)
    x = torch.rand(batch, *case.shape)
    runs = {
        "published update": trainer(Published(ours).training_step, x),
        "ours": trainer(ours.training_step, x),
    }
    if bfloat16():
        runs["ours, bfloat16"] = trainer(make(case, "bfloat16").training_step, x)
    if not options.small:
        for precision in ("float32", "bfloat16") if bfloat16() else ("float32",):
            model = make(case, precision, compile=True)
            runs[f"compiled, {precision}"] = trainer(model.training_step, x)
    times = race(f"Training iteration, {case.title}, batch {batch}", runs, options)
    explain(runs["ours"], times["ours"], machine)


def members(case: Case, options: argparse.Namespace, machine: Machine) -> None:
    batch = FEW if options.small else case.batch
    ensemble = ensemble_of(case)
    x = torch.rand(MEMBERS * batch, *case.shape)
    runs = {
        "in turn": trainer(ensemble.training_step, x),
        "stacked": trainer(stacked(ensemble).training_step, x),
    }
    title = f"Energy step of {MEMBERS} members, {case.title}, batch {batch} each"
    times = race(title, runs, options)
    explain(runs["stacked"], times["stacked"], machine)


def trainer(step: Callable[[Tensor], Losses], x: Tensor) -> Chain:
    """So many steps on the points x [B, *]."""

    def train(steps: int) -> None:
        for _ in range(steps):
            step(x)

    return train


def ensemble_of(case: Case) -> Ensemble:
    """Members with weights of their own that train their energies only."""
    ensemble = Ensemble(lambda: make(case, kind=EnergyStep), MEMBERS, 0, 1, ())
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters_of(ensemble):
        factor = torch.rand(parameter.shape, generator=generator)
        parameter.data.mul_(0.5 + factor)
    return ensemble


def stacked(ensemble: Ensemble) -> Batched:
    return Batched([member for member in ensemble.members if isinstance(member, MEG)])


def check_update(case: Case) -> None:
    """Losses and gradients of an iteration of the transcription and of ours are the same."""
    off: dict[str, float] = {}
    for name, limit in (("float64", 1e-9), ("float32", 1e-3)):
        ours = make(case).to(getattr(torch, name))
        theirs = Published(ours)
        x = torch.rand(FEW, *case.shape).to(getattr(torch, name))
        losses, wanted = observed(theirs.optimizers, theirs.training_step, x)
        logs, found = observed(ours.optimizers.values(), ours.training_step, x)
        for loss in ("energy_gap", "score_norm", "information"):
            torch.testing.assert_close(logs[loss], losses[loss], rtol=limit, atol=limit)
        off[name] = distance(found, wanted)
        assert off[name] < limit, f"{case.title}, {name}: gradients differ by {off[name]:.1e}"
    if bfloat16():
        half = make(case, "bfloat16")
        _, found = observed(half.optimizers.values(), half.training_step, x)
        off["bfloat16"] = distance(found, wanted)
    listed = ", ".join(f"{value:.1e} in {name}" for name, value in off.items())
    print(f"{case.title}: gradients off from the published update's by {listed}")


def check_members(case: Case) -> None:
    """Members in turn and stacked log the same numbers and come to the same weights."""
    ensemble = ensemble_of(case).double()
    batched = stacked(ensemble)
    x = torch.rand(MEMBERS * FEW, *case.shape).double()
    for _ in range(3):
        torch.manual_seed(2)
        wanted = ensemble.training_step(x)
        torch.manual_seed(2)
        found = batched.training_step(x)
        for loss in ("energy_gap", "score_norm"):
            torch.testing.assert_close(found[loss], wanted[loss], rtol=1e-9, atol=1e-9)
    ends = stacked(ensemble).energy.parameters()
    for parameter, end in zip(batched.energy.parameters(), ends, strict=True):
        torch.testing.assert_close(parameter, end, rtol=1e-9, atol=1e-9)
    print(f"{case.title}: members stacked and in turn come to the same weights")


def observed(
    optimizers: Iterable[Optimizer], step: Callable[[Tensor], Losses], x: Tensor
) -> tuple[Losses, Tensor]:
    """What a step from a fixed seed returns, and all gradients that its optimisers go down, one
    after another."""
    gradients: list[Tensor] = []

    def note(optimizer: Optimizer, *_: Any) -> None:
        gradients.extend(p.grad.flatten().clone() for p in moved_by(optimizer))

    hooks = [optimizer.register_step_pre_hook(note) for optimizer in optimizers]
    torch.manual_seed(1)
    losses = step(x)
    for hook in hooks:
        hook.remove()
    return losses, torch.cat(gradients)


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


if __name__ == "__main__":
    main()
