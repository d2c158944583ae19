"""Timing side by side: contenders in turn, the peer's time over theirs, and what bounds them."""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ebm.variants.base import multiplies_bfloat16

Chain = Callable[[int], Any]
"""Runs so many steps."""


class Machine(NamedTuple):
    """Its best, measured: arithmetic in float32 and bfloat16 (0: it has none), and bytes, in 1e9 a
    second; seconds of the smallest operation."""

    float32: float
    bfloat16: float
    bytes: float
    operation: float

    def describe(self, threads: int) -> str:
        """The line that a benchmark begins with."""
        return (
            f"torch {torch.__version__}, {threads} threads; at best {self.float32:.0f} "
            f"GFLOP/s in float32, {self.bfloat16:.0f} in bfloat16 (matrices), "
            f"{self.bytes:.1f} GB/s (copy), {self.operation * 1e6:.1f} us for an operation"
        )


class Traffic(TorchDispatchMode):
    """Counts operations, their arithmetic, and the bytes that go in and out of them; views are
    free."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.flops = self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function is not torch.ops.aten.detach.default:
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            self.operations += 1
            self.bytes += sum(t.nbytes for t in tensors)
        if count := flop_registry.get(function.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def race(title: str, runs: dict[str, Chain], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, by contender; the first is the peer."""
    print(f"\n{title}", flush=True)
    peer = next(iter(runs))
    runs[peer](1)
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


def bfloat16() -> bool:
    """Whether it is worth timing: emulated, a layer takes up to a hundred times as long."""
    return multiplies_bfloat16("cpu")


def seconds(run: Chain, steps: int) -> float:
    begun = time.perf_counter()
    run(steps)
    return time.perf_counter() - begun


def explain(run: Chain, step: float, machine: Machine) -> None:
    """What a step asks for, and which share of its seconds that would take at the best."""
    with Traffic() as traffic:
        run(1)
    flops, moved, operations = traffic.flops, traffic.bytes, traffic.operations
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
        flops / best(lambda: half @ half) if bfloat16() else 0.0,
        2 * big.nbytes / 1e9 / best(lambda: other.copy_(big)),
        best(lambda: torch.ops.aten.add.Tensor(small, small), 1000),
    )
