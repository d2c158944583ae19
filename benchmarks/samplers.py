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
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchebm.core import BaseModel
from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics

from ebm.densities import DENSITIES
from ebm.networks import Scalar, normalise_spectrally, scalar
from ebm.recorded import Recorded
from ebm.samplers import HMC, DecoupledLangevin, Energy, Langevin, value_and_gradient

LEAPFROGS = 10
STEP, NOISE, CLIP, BOUNDS = 10.0, 0.005, 0.01, (0.0, 1.0)  # Du & Mordatch (2019)

Chain = Callable[[int], Any]
"""Runs so many steps."""


class Machine(NamedTuple):
    """Its best, measured: arithmetic in float32 and bfloat16, and bytes, in 1e9 a second;
    seconds of the smallest operation."""

    float32: float
    bfloat16: float
    bytes: float
    operation: float


class Peer(BaseModel):
    """Our energy as torchebm's."""

    def __init__(self, energy: Energy) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        return self.energy(x)


class Traffic(TorchDispatchMode):
    """Counts operations, and the bytes that go in and out of them; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function is not torch.ops.aten.detach.default:
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            self.operations += 1
            self.bytes += sum(t.nbytes for t in tensors)
        return result


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
    print(
        f"torch {torch.__version__}, {options.threads} threads; at best {machine.float32:.0f} "
        f"GFLOP/s in float32, {machine.bfloat16:.0f} in bfloat16 (matrices), "
        f"{machine.bytes:.1f} GB/s (copy), {machine.operation * 1e6:.1f} us for an operation"
    )
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
    half = normalised(network).requires_grad_(False).to(memory_format=layout)
    half.blocks.bfloat16()
    ways: dict[str, Energy] = {
        "ours": evaluate(ours, y),
        "recorded": Recorded(evaluate(ours, y), x),
        "bfloat16 autocast": Recorded(autocast(evaluate(ours, y)), x),
        "bfloat16 layers": Recorded(evaluate(half, y), x),
    }
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


def race(title: str, runs: dict[str, Chain], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, by contender; the first is the peer."""
    print(f"\n{title}", flush=True)
    peer = next(iter(runs))
    steps = max(1, round(options.seconds / seconds(runs[peer], 1)))
    for contender in runs.values():
        contender(min(steps, 3))
    rounds = [
        {n: seconds(r, steps) / steps for n, r in runs.items()} for _ in range(options.rounds)
    ]
    for name in runs:
        ratios = [times[peer] / times[name] for times in rounds]
        step = median(times[name] for times in rounds)
        spread = f"{median(ratios):5.2f}x ({min(ratios):.2f} - {max(ratios):.2f})"
        print(f"  {name:18} {step * 1e6:10.0f} us {1 / step:9.1f} steps/s   {spread}", flush=True)
    return {name: median(times[name] for times in rounds) for name in runs}


def seconds(run: Chain, steps: int) -> float:
    begun = time.perf_counter()
    run(steps)
    return time.perf_counter() - begun


def explain(run: Chain, step: float, machine: Machine) -> None:
    """What a step asks for, and which share of its seconds that would take at the best."""
    with Traffic() as traffic, FlopCounterMode(display=False) as arithmetic:
        run(1)
    flops, moved, operations = arithmetic.get_total_flops(), traffic.bytes, traffic.operations
    shares = {
        "arithmetic": flops / machine.float32 / 1e9 / step,
        "bytes": moved / machine.bytes / 1e9 / step,
        "operations": operations * machine.operation / step,
    }
    print(
        f"  asks for {operations} operations, {flops / 1e9:.3g} GFLOP, {moved / 1e6:.3g} MB: "
        f"{flops / 1e9 / step:.3g} GFLOP/s, {moved / 1e9 / step:.3g} GB/s; bound by "
        f"{max(shares, key=lambda k: shares[k])} ("
        + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        + ")"
    )


def measure(size: int) -> Machine:
    """The machine's best of several tries."""
    a, small = torch.randn(size, size), torch.zeros(1)
    big, other = torch.zeros(size * size * 8), torch.empty(size * size * 8)
    half = a.bfloat16()

    def best(function: Callable[[], Any], times: int = 1) -> float:
        return (
            min(seconds(lambda n: [function() for _ in range(n)], times) for _ in range(7)) / times
        )

    flops = 2 * size**3 / 1e9
    return Machine(
        flops / best(lambda: a @ a),
        flops / best(lambda: half @ half),
        2 * big.nbytes / 1e9 / best(lambda: other.copy_(big)),
        best(lambda: torch.ops.aten.add.Tensor(small, small), 1000),
    )


if __name__ == "__main__":
    main()
