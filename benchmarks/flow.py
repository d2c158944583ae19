"""Speed of training a flow beside the library's own loop: one process, in turn, ratios.

    python -m benchmarks.flow --threads 2

The flow is `flow-25gaussians`' spline flow of zuko. The peer is the loop of zuko's tutorial: a
DataLoader that shuffles, `flow().log_prob(x)`, Adam. Ours is an iteration of `ebm.train.fit`
without its bookkeeping: a batch by index, the space of the flow, one training step. The densities
of both on one batch are compared before. `benchmarks.samplers` explains the lines; a step is an
iteration here.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import repeat

import torch
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset
from zuko.flows import NSF

from benchmarks.timing import explain, measure, race
from ebm.densities import DENSITIES
from ebm.train import Batches
from ebm.variants.flow import NormalisingFlow

RATE, ROWS = 3e-3, 100_000
SPLINE = {"kind": "spline", "transforms": 2, "bins": 16, "width": 64}


def ours(data: Tensor, compile: bool) -> NormalisingFlow:
    torch.manual_seed(0)
    model = NormalisingFlow((2,), SPLINE, 0, 0.0, RATE, (0.9, 0.999), 0.0, None, compile)
    model.initialise(data)
    return model


class Tutorial:
    """zuko's tutorial, on the points that our flow sees."""

    def __init__(self, data: Tensor, batch: int) -> None:
        torch.manual_seed(0)
        self.flow = NSF(2, transforms=2, bins=16, hidden_features=(64, 64), passes=2)
        self.optimizer = Adam(self.flow.parameters(), lr=RATE)
        loader = DataLoader(TensorDataset(data), batch_size=batch, shuffle=True)
        self.batches: Iterator[list[Tensor]] = (b for part in repeat(loader) for b in part)

    def loss(self, x: Tensor) -> Tensor:
        return -self.flow().log_prob(x).mean()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            (x,) = next(self.batches)
            loss = self.loss(x)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def train(model: NormalisingFlow, data: Tensor, batch: int, steps: int) -> None:
    batches = Batches(len(data), batch, 0, data.device)
    for step in range(steps):
        model.training_step(data[batches(step)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of the peer, per round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = measure(2048)
    print(machine.describe(options.threads))
    data = DENSITIES["25gaussians"]().sample(ROWS).float()
    for batch in (64, 512):
        model, compiled = ours(data, False), ours(data, True)
        seen = model.space.centre(data) * 2  # as the spline stretches them
        peer = Tutorial(seen, batch)
        agree(model, peer, data[:batch], seen[:batch])
        runs = {
            "zuko's tutorial": peer.run,
            "here": partial(train, model, data, batch),
            "here, compiled": partial(train, compiled, data, batch),
        }
        times = race(f"Spline flow, batch {batch}", runs, options)
        explain(runs["here"], times["here"], machine)


def agree(model: NormalisingFlow, peer: Tutorial, x: Tensor, seen: Tensor) -> None:
    """The same flow: log densities differ by the constant of the space alone."""
    difference = model.energy(x) + peer.flow().log_prob(seen)
    torch.testing.assert_close(
        difference, difference.mean().expand_as(difference), rtol=0, atol=1e-3
    )


if __name__ == "__main__":
    main()
