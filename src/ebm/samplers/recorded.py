"""An energy and its gradient, recorded once and replayed (`ebm.recorded`)."""

import copy
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ebm.recorded import kind, record


class Recorded:
    """An energy that samplers take like any other: `HMC(Recorded(energy, x), 0.1, 10)`.

    It is recorded for points like x [B, *] at once, and anew when points of another shape first
    come. An energy that is given more, E(x, y) of a class y say, is recorded with that:
    `Recorded(energy, x, y)`, and `recorded.given(y)` is the same record for another y.

    `ebm.recorded.record` says what of the energy is seen, what `compile` does and which energies
    raise EBMError: those that draw or change something in training, so put a network into
    `eval()`. Where a gradient needs a graph of its own (chains that are `differentiable`),
    autograd is asked after all.
    """

    def __init__(
        self, energy: Callable[..., Tensor], x: Tensor, *given: Tensor, compile: bool = False
    ) -> None:
        self.energy, self.compile = energy, compile
        self._given = given
        self._replays: dict[Hashable, Callable[..., tuple[Tensor, Tensor]]] = {}
        self.value_and_gradient(x)

    def given(self, *given: Tensor) -> "Recorded":
        """The energy given others of the same kind; what is recorded is shared."""
        other = copy.copy(self)
        other._given = given
        return other

    def __call__(self, x: Tensor) -> Tensor:
        """E(x) [B], as the energy itself gives it."""
        return self.energy(x, *self._given)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) [B] and grad E(x) [B, *]."""
        inputs = x, *self._given
        known = kind(*inputs)
        with torch.no_grad():
            if known not in self._replays:
                both = with_gradient(self.energy, torch.ones_like(self.energy(*inputs)))
                self._replays[known] = record(both, *inputs, compile=self.compile)
            return self._replays[known](*inputs)


def with_gradient(
    energy: Callable[..., Tensor], ones: Tensor
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of (x, *given) that gives E(x, *given) and its gradient in x; `ones` like E."""

    def both(x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = energy(x, *given)
            (gradient,) = torch.autograd.grad(value, x, ones)
        return value.detach(), gradient

    return both
