"""Speed of the samplers beside their peers: one process, contenders in turn, ratios.

    python -m benchmarks.samplers --threads 2

In two dimensions: Langevin, and HMC of 10 leapfrogs, against torchebm, on the same energy, at the
same step size, for as many steps; that both draw from the same distribution is checked first, on
a Gaussian. For images: the chain of implicit generation for 64 chains on its MNIST network,
against a plain transcription of the published loop on the same weights.

Every round times each contender once; a line gives the time of a step, and the peer's over it:
median of the rounds, least and most. Below stands what a step of the recorded contender asks for
(operations, arithmetic, bytes that go in and out of the operations), and the share of its time
that each would take at the machine's best, measured in this run: the largest says what bounds it.
The share of bytes overrates them where tensors stay in the cache.
"""

import argparse
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torchebm.core import BaseModel
from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics

from benchmarks.timing import Chain, Machine, bfloat16, explain, measure, race
from ebm.densities import DENSITIES
from ebm.networks import Scalar, normalise_spectrally, scalar
from ebm.samplers import HMC, DecoupledLangevin, Energy, Langevin, Recorded, value_and_gradient

LEAPFROGS = 10
STEP, NOISE, CLIP, BOUNDS = 10.0, 0.005, 0.01, (0.0, 1.0)  # Du & Mordatch (2019)


class Peer(BaseModel):
    """Our energy as torchebm's."""

    def __init__(self, energy: Energy) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        return self.energy(x)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="the peer's share of a round")
    parser.add_argument("--small", action="store_true", help="few chains, nothing compiled")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = measure(256 if options.small else 2048)
    print(machine.describe(options.threads))
    check_moments(1000 if options.small else 10_000)
    for chains in (8,) if options.small else (64, 10_000):
        planar(chains, options, machine)
    images(4 if options.small else 64, options, machine)


def planar(chains: int, options: argparse.Namespace, machine: Machine) -> None:
    mixture = DENSITIES["8gaussians"]().float()
    network = scalar("mlp", (2,), width=128, depth=3, classes=0).requires_grad_(False)
    energies: list[tuple[str, Energy, float]] = [
        ("8 Gaussians", mixture.energy, mixture.sigma),
        ("MLP, 3 x 128", network, 0.1),
    ]
    for name, energy, scale in energies:
        x = mixture.sample(chains)
        ways: dict[str, Energy] = {"ours": energy, "ours, recorded": Recorded(energy, x)}
        if not options.small:
            ways["ours, compiled"] = Recorded(energy, x, compile=True)
        for sampler, peer, kernel in (
            ("Langevin", *langevin(energy, scale**2 / 10)),
            (f"HMC, {LEAPFROGS} leapfrogs", *hmc(energy, scale / 10)),
        ):
            runs = {"torchebm": stepper(peer, x)}
            runs |= {way: chain(kernel(e), x) for way, e in ways.items()}
            times = race(f"{sampler}, {name}, {chains} chains", runs, options)
            explain(runs["ours, recorded"], times["ours, recorded"], machine)


def langevin(energy: Energy, step_size: float) -> tuple[Any, Callable[[Energy], Any]]:
    """torchebm's sampler, and ours on any form of the energy."""
    return LangevinDynamics(Peer(energy), step_size), lambda e: Langevin(e, step_size)


def hmc(energy: Energy, step_size: float) -> tuple[Any, Callable[[Energy], Any]]:
    peer = HamiltonianMonteCarlo(Peer(energy), step_size, LEAPFROGS)
    return peer, lambda e: HMC(e, step_size, LEAPFROGS)


def stepper(peer: Any, x: Tensor) -> Chain:
    return lambda steps: peer.sample(x=x.clone(), n_steps=steps)


def chain(kernel: Any, x: Tensor) -> Chain:
    """A chain that has begun: its first evaluation, one in its whole life, is not counted."""
    start = kernel.init(x)

    def steps_on(steps: int) -> Tensor:
        state = start
        for _ in range(steps):
            state = kernel.step(state)
        return state.x

    return steps_on


def check_moments(chains: int) -> None:
    """Langevin's variance on a unit Gaussian is 1 / (1 - step / 2), HMC's is 1: for both."""

    def energy(x: Tensor) -> Tensor:
        return x.square().sum(1) / 2

    for law, (peer, kernel) in ((1 / 0.9, langevin(energy, 0.2)), (1.0, hmc(energy, 0.15))):
        for sample in (stepper(peer, x := torch.randn(chains, 2)), chain(kernel(energy), x)):
            drawn = sample(60)
            off = drawn.square().mean() / law - 1
            assert abs(off) < 5 / math.sqrt(chains), f"the variance is off by {off:.1%}"
            assert abs(drawn.mean()) < 5 * math.sqrt(law / 2 / chains), "the mean is off"
    print("moments on a Gaussian: torchebm's and ours as they should be")


def images(chains: int, options: argparse.Namespace, machine: Machine) -> None:
    network = normalise_spectrally(scalar("conv", (28, 28), width=64, depth=3, classes=10))
    x, y = torch.rand(chains, 28, 28), torch.arange(chains) % 10
    for _ in range(200):
        network(x[:1, None], y[:1])  # so that the power iteration has converged
    network.eval()
    layout = torch.channels_last
    ours = normalised(network).requires_grad_(False).to(memory_format=layout)
    ways: dict[str, Energy] = {
        "ours": evaluate(ours, y),
        "recorded": Recorded(evaluate(ours, y), x),
    }
    fastest, name = ours, "compiled"
    if bfloat16():
        ways["bfloat16 autocast"] = Recorded(autocast(evaluate(ours, y)), x)
        fastest, name = deepcopy(ours), "bfloat16 layers, compiled"
        fastest.blocks.bfloat16()
        ways["bfloat16 layers"] = Recorded(evaluate(fastest, y), x)
    if not options.small:
        ways[name] = Recorded(evaluate(fastest, y), x, compile=True)
    print()
    exact = value_and_gradient(evaluate(network, y), x)[1]
    for way, energy in ways.items():
        off = (value_and_gradient(energy, x)[1] - exact).norm() / exact.norm()
        print(f"gradient, MNIST network, {way}: off by {off:.1e} of the published one's norm")
    network.train()
    runs: dict[str, Chain] = {"published loop": lambda steps: published(network, x, y, steps)}
    for way, energy in ways.items():
        runs[way] = chain(DecoupledLangevin(energy, STEP, NOISE, CLIP, BOUNDS), x)
    title = f"Langevin of implicit generation, MNIST network, {chains} chains"
    times = race(title, runs, options)
    explain(runs["recorded"], times["recorded"], machine)


def published(network: Scalar, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The released loop (ebm_code_release, train.py) in PyTorch: everything float32 and
    contiguous, weights normalised anew in each evaluation, parameters that ask for gradients."""
    for _ in range(steps):
        x = (x + NOISE * torch.randn_like(x)).clamp(*BOUNDS).requires_grad_()
        energy = network(x.view(len(x), 1, 28, 28), y)
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        x = (x - STEP * gradient.clamp(-CLIP, CLIP)).detach()
    return x


def normalised(network: Scalar) -> Scalar:
    """The same network with its normalised weights written down, no more computed."""
    plain = scalar("conv", (28, 28), width=64, depth=3, classes=10)
    with torch.no_grad():
        to: Any
        layer: Any
        for to, layer in zip(plain.blocks, network.blocks, strict=True):
            to.modulation.load_state_dict(layer.modulation.state_dict())
            to.layer.weight.copy_(layer.layer.weight)
    plain.head.load_state_dict(network.head.state_dict())
    return plain


def evaluate(network: Scalar, y: Tensor) -> Energy:
    """Layers in the precision of their weights, the head in float32."""

    def energy(x: Tensor) -> Tensor:
        x = x.view(len(x), 1, 28, 28).to(next(network.parameters()).dtype)
        for block in network.blocks:
            x = block(x, y)
        return network.head(x.flatten(1).float()).squeeze(1)

    return energy


def autocast(energy: Energy) -> Energy:
    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return energy(x).float()

    return cast


if __name__ == "__main__":
    main()
