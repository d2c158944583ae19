"""Gibbs sampling of binary units in blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ebm.samplers.kernel import State


def draw(p: Tensor) -> Tensor:
    """Independent bits that are 1 with probability p, of p's shape and type (a third of the time
    that `torch.bernoulli` takes on a CPU)."""
    return (torch.rand_like(p) < p).to(p.dtype)


@dataclass(frozen=True)
class BlockGibbs:
    """Two-block Gibbs sampling of binary units: h ~ p(h | v), then v ~ p(v | h).

    `p_hidden`: [B, V] -> [B, H] and `p_visible`: [B, H] -> [B, V] are probabilities of being on.
    """

    p_hidden: Callable[[Tensor], Tensor]
    p_visible: Callable[[Tensor], Tensor]

    def init(self, x: Tensor) -> State:
        return State(x)

    def step(self, state: State) -> State:
        return State(draw(self.p_visible(draw(self.p_hidden(state.x)))), steps=state.steps + 1)


@dataclass(frozen=True)
class SpinGibbs:
    """Gibbs sampling of spins of +-1, one block of sites after another, each site from p(x_i | the
    rest). `p_up`: [B, *] -> [B, *], every site's probability of +1; `blocks`: masks [*], together
    all sites. No two sites of a block may interact: a lattice has its black and white squares.
    """

    p_up: Callable[[Tensor], Tensor]
    blocks: tuple[Tensor, ...]

    def init(self, x: Tensor) -> State:
        return State(x)

    def step(self, state: State) -> State:
        x = state.x
        for block in self.blocks:
            x = torch.where(block, 2 * draw(self.p_up(x)) - 1, x)
        return State(x, steps=state.steps + 1)
